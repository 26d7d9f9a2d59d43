"""ranks.py: two processes with half a batch each do what one does with all, and stop and go on together."""
import contextlib
import os
import socket

import pytest
import torch
import torch.distributed as dist
from conftest import CONFIG, TINY, records, run_train, signal_at
from test_train import distance, some_pairs

import data
import encoders
import modules
import ranks
import runs
import train_grm

RAMP = ["loss.kind=triplet", "loss.ramp=0.2"]
CASES = {                                # recipe, settings, pairs, pairs encoded at a time, part of training
    "whole": ("grm", [], 64, None, 1.0), "in parts": ("grm", [], 64, 12, 1.0),
    "uneven": ("grm", [], 63, None, 1.0),
    "one rank in parts, one whole": ("grm", [], 63, 31, 1.0), "triplet": ("grm", RAMP, 64, None, 1.0),
    "triplet, in its ramp": ("grm", RAMP, 64, None, 0.1), "recipe paper": ("paper", [], 63, None, 1.0),
    "recipe paper, in its ramp and in parts": ("paper", [], 63, 12, 0.5 / 30),
    "glo": ("grm", [], 63, 12, 1.0), "gates": ("grm", ["model.gates=true"], 63, 12, 1.0)}


def silent_run(recipe, sets, rank, count):
    """A run of one rank without a folder or noise: its masks are the softmax's, its regions their means."""
    shared = type("RankRun", (ranks.SharedRun, train_grm.Run), {})
    run = object.__new__(shared if count > 1 else train_grm.Run)
    run.config = runs.load_config(CONFIG, "vit_micro", recipe, sets=[*TINY, *sets])
    run.rank, run.ranks, run.device, run.progress = rank, count, torch.device("cpu"), False
    run.amp, run.scaler = contextlib.nullcontext(), torch.amp.GradScaler("cpu", enabled=False)
    return run


def loss_and_gradient(case, rank, count):
    """-> loss, terms and gradient by name. Some pairs share an image."""
    recipe, sets, size, micro_batch, progress = CASES[case]
    run = silent_run(recipe, [*sets, f"train.micro_batch={micro_batch or 'null'}"], rank, count)
    items = [(n % 50, 5 * (n % 50) + n // 50) for n in range(size)]
    own = slice(size * rank // count, size * (rank + 1) // count)
    batch, tokenizer = some_pairs(run.config, items[own])
    torch.manual_seed(0)
    run.model = model = modules.build_grm(run.config, len(tokenizer), 0).eval()
    if case == "glo":                                            # some embeddings of the whole
        model.joint, model.levels["glo"] = True, 0.4
        model.image_encoder.pooled = lambda tokens: tokens.mean(1)
        model.text_encoder.joint, model.text_encoder.head = True, torch.nn.Identity()
    loss, terms, _, _ = run.gradients(batch, progress)
    gradient = {name: p.grad for name, p in run.model.named_parameters() if p.grad is not None}
    return {"loss": loss} | terms, gradient


def evaluated(recipe, rank, count):
    """-> the figures of 13 images in two folds, and which images this rank read."""
    run = silent_run(recipe, [], rank, count)
    split = data.load_split("shapes", run.config["datasets"], "").subset(slice(13))
    run.tokenizer = encoders.load_tokenizer(None, split.texts)
    torch.manual_seed(0)
    run.model = modules.build_grm(run.config, len(run.tokenizer), 0)
    read, load_image = [], split.load_image
    split.load_image = lambda i, size=None: read.append(i) or load_image(i, size)
    return run.evaluate(split, 2), read


def train(out, *flags, stop_at=None):
    """The training script in this process; a signal reaches this rank at step stop_at. -> exit message"""
    with signal_at(train_grm, "gradients", stop_at):
        return run_train("--backbone", "vit_micro", "--out", out, *flags, "--set", *TINY, "train.epochs=1",
                         "train.batch_size=15", "train.micro_batch=4", "train.log_every=1",
                         "datasets.shapes.scenes={train: 16, val: 8, test: 8}")


def one_rank(rank, ports, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}

    def joined(work, *args, **options):
        os.environ["MASTER_PORT"] = str(ports.pop())
        result = work(*args, **options)
        if dist.is_initialized():                              # a run that is finished has left already
            dist.destroy_process_group()
        return result

    def silent():
        ranks.start()
        return {"losses": {case: loss_and_gradient(case, rank, 2) for case in CASES},
                "figures": {recipe: evaluated(recipe, rank, 2) for recipe in ("paper", "grm")}}
    results = joined(silent)
    results["whole"] = joined(train, folder / "whole")
    results["seed"] = torch.initial_seed()
    results["cut"] = joined(train, folder / "cut", stop_at=3 if rank else None)
    results["resumed"] = joined(train, folder / "cut", "--resume")
    torch.save(results, folder / f"{rank}.pt")


def free_ports(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """-> folder, what one_rank found in each of two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (free_ports(4), folder), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_loss_and_the_gradient_of_one(two_ranks, case):
    expected, wanted = loss_and_gradient(case, 0, 1)
    for terms, gradient in (results["losses"][case] for results in two_ranks[1]):
        assert terms.keys() == expected.keys() and gradient.keys() == wanted.keys()
        for name, term in expected.items():
            assert terms[name].item() == pytest.approx(term.item(), rel=1e-5, abs=1e-6), name
        assert distance([gradient[name] for name in wanted], wanted.values()) <= 1e-5
        whole = torch.stack([g.norm() for g in wanted.values()]).norm()
        for name, g in wanted.items():
            assert (gradient[name] - g).norm() <= 1e-4 * g.norm() + 1e-6 * whole, name


def test_two_processes_share_the_images_and_return_the_figures_of_one(two_ranks, recipe):
    (figures, images), (same, others) = (results["figures"][recipe] for results in two_ranks[1])
    assert figures == same == evaluated(recipe, 0, 1)[0]
    assert images == list(range(6)) and others == list(range(6, 13))


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_the_run_goes_on_exactly(two_ranks):
    """With noise, of which each rank has its own."""
    folder, results = two_ranks
    for result in results:
        assert "stopped at step 3 of 5" in result["cut"] and "--resume" in result["cut"]
        assert result["whole"] is None and result["resumed"] is None
    whole, cut = (runs.load_last(folder / name) for name in ("whole", "cut"))
    assert all(torch.equal(whole["model"][name], cut["model"][name]) for name in whole["model"])
    assert len(whole["random_states"]) == 2 and results[0]["seed"] != results[1]["seed"]
    lines, same = ([(r["step"], r["loss"]) for r in records(folder / name) if "loss" in r]
                   for name in ("whole", "cut"))
    assert records(folder / "whole")[-1]["step"] in range(1, 6)                        # of best.pt
    assert lines == same and [step for step, _ in lines] == [1, 2, 3, 4, 5]            # one writer
