"""Several processes: two with half a batch each do what one does with the whole, and stop and go on together."""
import json
import os
import signal
import socket
import sys

import pytest
import torch

import checkpoints
import data
import modules
import ranks
import train_grm
from conftest import ROOT, TINY

CASES = {  # pairs in the batch, pairs encoded at a time, loss
    "whole": (64, None, "infonce"), "in parts": (64, 12, "infonce"), "uneven": (63, None, "infonce"),
    "one rank in parts, one whole": (63, 31, "infonce"), "triplet": (64, None, "triplet")}


def loss_and_gradient(case, rank, count):
    """-> {"loss", "terms", "gradient" by parameter} of one case. In evaluation mode, or each rank would draw its own noise:
    the masks are the softmax's, the regions their means, and nothing is dropped. Some pairs share an image."""
    size, micro_batch, kind = CASES[case]
    config = train_grm.load_config(str(ROOT / "configs.yaml"), "vit_micro", sets=[*TINY, f"loss.kind={kind}"])
    split = data.load_split("shapes_train", config["datasets"], "")
    tokenizer = data.load_tokenizer(None, split.texts)
    transform = data.image_transform(64, (0.5,) * 3, (0.5,) * 3, train=False)
    pairs = data.TrainPairs(split, data.tokenize(tokenizer, split.texts, 64), transform, tokenizer.mask_token_id, 0.0, 0.0)
    items = [(n % 50, 5 * (n % 50) + n // 50, n) for n in range(size)]
    own = slice(size * rank // count, size * (rank + 1) // count)
    batch = data.Collate(tokenizer.pad_token_id)([pairs[i] for i in items[own]])
    torch.manual_seed(0)
    model = modules.build_grm(config, len(tokenizer), 0).eval()
    value, terms, _, _ = train_grm.gradients(ranks.parallel(model), batch, config["loss"], micro_batch)
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": value, "terms": terms, "gradient": gradient}


def train(out, *options, stop_at=None):
    """The training script in this process; a signal reaches this rank at step stop_at. -> exit message or code."""
    sys.argv = ["train_grm.py", "--config", str(ROOT / "configs.yaml"), "--backbone", "vit_micro", "--out", str(out),
                *options, "--set", *TINY, "train.epochs=1", "train.batch_size=15", "train.micro_batch=4",
                "train.max_steps=6", "train.log_every=1", "datasets.shapes.scenes={train: 16, val: 8, test: 8}"]
    steps, real = [], train_grm.gradients

    def interrupted(*args):
        steps.append(1)
        if len(steps) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)
    train_grm.gradients = interrupted
    try:
        train_grm.main()
    except SystemExit as stop:
        return stop.code
    finally:
        train_grm.gradients = real
        ranks.finish()


def one_rank(rank, ports, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    results = {}
    os.environ["MASTER_PORT"] = str(ports[0])
    ranks.start()
    results["cases"] = {case: loss_and_gradient(case, rank, 2) for case in CASES}
    ranks.finish()
    for port, out, options, stop_at in ((ports[1], "whole", (), None), (ports[2], "cut", (), 3 if rank else None),
                                        (ports[3], "cut", ("--resume",), None)):
        os.environ["MASTER_PORT"] = str(port)
        results[f"{out}{options}"] = train(folder / out, *options, stop_at=stop_at)
    torch.save(results, folder / f"{rank}.pt")


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """-> (folder, results of each rank) of one_rank in two processes of gloo."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(one_rank, (free_ports(4), folder), nprocs=2)
    return folder, [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_have_the_loss_and_the_gradient_of_one(two_ranks, case):
    expected = loss_and_gradient(case, 0, 1)
    for found in (results["cases"][case] for results in two_ranks[1]):
        assert found["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)
        assert found["terms"].keys() == expected["terms"].keys()
        for name, term in expected["terms"].items():
            assert found["terms"][name].item() == pytest.approx(term.item(), rel=1e-5, abs=1e-6), name
        gradient, wanted = found["gradient"], expected["gradient"]
        assert gradient.keys() == wanted.keys()
        whole = torch.stack([g.norm() for g in wanted.values()]).norm()
        assert torch.stack([(gradient[n] - g).norm() for n, g in wanted.items()]).norm() <= 1e-5 * whole
        for name, g in wanted.items():
            assert (gradient[name] - g).norm() <= 1e-4 * g.norm() + 1e-6 * whole, name


def test_a_signal_to_one_process_stops_both_at_the_same_step_and_the_run_goes_on_exactly(two_ranks):
    """With noise: each rank's own random state is saved and restored."""
    folder, results = two_ranks
    assert "stopped at step 3 of 5" in results[0]["cut()"] and "--resume" in results[0]["cut()"] and results[1]["cut()"] == 1
    assert results[0]["cut('--resume',)"] is None and results[0]["whole()"] is None
    whole, cut = (checkpoints.load_checkpoint(folder / name / "last.pt") for name in ("whole", "cut"))
    assert all(torch.equal(whole["model"][name], cut["model"][name]) for name in whole["model"])
    states = whole["random_state"][0]
    assert len(states) == 2 and not torch.equal(*states)                                   # a noise of one's own
    lines = [[json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
             for name in ("whole", "cut")]
    assert [r["loss"] for r in lines[0] if "loss" in r] == [r["loss"] for r in lines[1] if "loss" in r]
    assert [r["step"] for r in lines[0] if "loss" in r] == [1, 2, 3, 4, 5]                 # one writer


def test_the_ranks_share_every_batch_without_overlap():
    config = train_grm.load_config(str(ROOT / "configs.yaml"), "vit_micro", sets=TINY)
    split = data.load_split("shapes_train", config["datasets"], "")
    whole = list(data.PairSampler(split, 16, "captions", 3))
    parts = [list(data.PairSampler(split, 16, "captions", 3, rank=rank, ranks=3)) for rank in range(3)]
    assert [sum(batch, []) for batch in zip(*parts)] == whole
    assert {len(batch) for part in parts for batch in part} == {5, 6}
