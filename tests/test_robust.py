"""What goes wrong while a run lasts: signals, kills, bad and hostile files, losses that are not finite."""
import fcntl
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import termios
import time

import pytest
import torch
from conftest import ROOT, TINY, Bomb, records, run_train, signal_at

import data
import encoders
import eval_grm
import modules
import runs
import train_grm

COMMAND = ["--backbone", "vit_micro", "--set", *TINY, "datasets.shapes.scenes={train: 16, val: 12, test: 12}",
           "train.log_every=1", "train.epochs=2", "train.max_steps=7", "train.deterministic=true"]
STEPS = 7                                                                                # of 5 an epoch


@pytest.fixture(scope="module", autouse=True)
def deterministic_only_here():
    """train.deterministic is the process's."""
    yield
    torch.use_deterministic_algorithms(False)


def train(out, *settings, resume=False):
    return run_train("--out", out, *["--resume"] if resume else [], *COMMAND, *settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert train(out) is None
    return out


@pytest.fixture
def copied(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def same_end(one, other):
    """Equal to the bit: weights, optimiser, random state, and metrics of the same steps."""
    for name in ("last.pt", "best.pt"):
        a, b = (runs.load_checkpoint(out / name) for out in (one, other))
        for key in ("model", "optimizer", "scaler", "random_states", "step", "best", "validated"):
            assert equal(a.get(key), b.get(key)), f"{name}: {key} differs"
    keys = "step", "epoch", "loss", "val_rsum", "test"
    a, b = ([[record.get(key) for key in keys] for record in records(out)] for out in (one, other))
    assert a == b


# ---- signals -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("owner, function, call, step", [
    (train_grm, "gradients", 3, 3), (eval_grm.Matcher, "evaluate", 1, 5),
    (eval_grm.Matcher, "caption_batches", 2, 7)],
    ids=["in a step", "in the first validation", "in the last validation"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_a_run_that_goes_on_exactly(whole, tmp_path, owner, function, call, step, number):
    workers = "data.workers=1" if function == "gradients" else "data.workers=0"
    if signal.getsignal(number) == signal.SIG_IGN:                          # this suite runs under nohup
        signal.signal(number, signal.SIG_DFL)
    with signal_at(owner, function, call, number):
        failure = train(tmp_path / "run", workers)
    assert f"stopped at step {step} of {STEPS}" in failure and "--resume" in failure and "\n" not in failure
    assert runs.load_last(tmp_path / "run")["step"] == step
    assert train(tmp_path / "run", resume=True) is None
    same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading_ends_the_run_at_once(copied, number):
    before, handler = (copied / "last.pt").read_bytes(), signal.getsignal(number)
    with signal_at(data, "load_split", 1, number):
        failure = train(copied, resume=True)
    assert "before the first step" in failure and "as it was" in failure and "\n" not in failure
    assert (copied / "last.pt").read_bytes() == before and signal.getsignal(number) == handler


SCRIPT = """import sys, time
sys.path[:0] = sys.argv[1:3]
import conftest, data
real, when = data.ShapesSplit.load_image, sys.argv[3]
def load_image(self, i, size=None):
    open(when, "a").close()
    time.sleep(40 if when.endswith("stuck") else 0.05)
    return real(self, i, size)
data.ShapesSplit.load_image = load_image
sys.exit(conftest.run_train(*sys.argv[4:]))
"""


def start(marker, out, *settings, **options):
    """A process that trains. Its images take a moment each or, if the marker is called stuck, very long."""
    words = [sys.executable, "-c", SCRIPT, ROOT, ROOT / "tests", marker, "--out", out, *COMMAND, *settings]
    process = subprocess.Popen(list(map(str, words)), **options)
    while not marker.exists():                                 # it loads its first image
        assert process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_a_run_that_waits_for_an_image(tmp_path, number):
    process = start(tmp_path / "stuck", tmp_path / "run", "data.workers=1")
    process.send_signal(number)
    with pytest.raises(subprocess.TimeoutExpired):             # the first one waits for the step
        process.wait(0.5)
    process.send_signal(number)
    assert process.wait(20) == -number


def test_a_terminal_that_goes_away_leaves_a_run_that_goes_on_exactly(whole, tmp_path):
    master, terminal = os.openpty()

    def take_terminal():
        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    process = start(tmp_path / "slow", tmp_path / "run", stdin=terminal, stdout=terminal, stderr=terminal,
                    preexec_fn=take_terminal)
    os.close(terminal)
    os.close(master)                                           # the kernel sends SIGHUP
    assert process.wait(60) == 1 and 0 < runs.load_last(tmp_path / "run")["step"] < STEPS
    assert train(tmp_path / "run", resume=True) is None
    same_end(whole, tmp_path / "run")


@pytest.mark.parametrize("fault", ["stuck", "killed"])
def test_data_loading_processes_that_fail_are_one_line(tmp_path, monkeypatch, fault):
    monkeypatch.setattr(runs, "LOADER_SECONDS", 1)
    monkeypatch.setattr(data.ShapesSplit, "load_image", lambda *_: time.sleep(1000) if fault == "stuck"
                        else os.kill(os.getpid(), signal.SIGKILL))
    failure = train(tmp_path / "run", "data.workers=1")
    assert failure.startswith("error: the processes that load images failed") and "\n" not in failure
    assert "data.workers=0" in failure and {"stuck": "timed out", "killed": "exited"}[fault] in failure


# ---- kills -------------------------------------------------------------------------------------------------
def life(out, steps, resume):
    """A process's: trains, and saves after every step."""
    log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    assert train(out, f"train.max_steps={steps}", f"train.epochs={steps}", "train.save_minutes=0",
                 "train.micro_batch=6", resume=resume) is None


def kill_somewhere(process, out, chance, in_a_write):
    """Kills the process after a few more steps, or in the next write -> whether a write was under way."""
    def lines():
        return (out / "metrics.jsonl").read_bytes().count(b"\n") if (out / "metrics.jsonl").exists() else 0

    def wait_for(condition):
        while not condition():
            assert process.is_alive(), f"the run is over too early: see {out.with_suffix('.log')}"
            assert time.monotonic() < until, f"no step in two minutes: see {out.with_suffix('.log')}"
    until = time.monotonic() + 120
    for _ in range(chance.randint(2, 4)):                      # changes, of which resuming may make one
        before = lines()
        wait_for(lambda before=before: lines() != before)
    time.sleep(chance.uniform(0, 0.1))
    if in_a_write:
        wait_for((out / "last.tmp").exists)
        time.sleep(chance.uniform(0, 0.002))
    process.kill()
    process.join()
    return (out / "last.tmp").exists()


@pytest.mark.parametrize("kills, in_a_write", [(2, 1), pytest.param(20, 10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_and_resumed_again_and_again_ends_as_one_left_alone(tmp_path, kills, in_a_write):
    processes, chance = multiprocessing.get_context("forkserver"), random.Random(0)
    processes.set_forkserver_preload(["conftest", "train_grm"])            # a fork has the libraries
    steps, cut, done, written = 8 * kills, tmp_path / "cut", 0, 0
    while done < kills or written < in_a_write:
        (cut / "last.tmp").unlink(missing_ok=True)                         # of the kill before
        process = processes.Process(target=life, args=(cut, steps, done > 0))
        process.start()
        written += kill_somewhere(process, cut, chance, in_a_write=written < in_a_write)
        done += 1
    for out, resume in ((tmp_path / "whole", False), (cut, True)):
        process = processes.Process(target=life, args=(out, steps, resume))
        process.start()
        process.join()
        assert process.exitcode == 0, out.with_suffix(".log").read_text()
    same_end(tmp_path / "whole", cut)


# ---- going on ----------------------------------------------------------------------------------------------
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(whole, copied):
    """One byte among the weights, which torch.load itself does not notice."""
    content = bytearray((copied / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "last.pt").write_bytes(content)
    with pytest.warns(UserWarning, match="last.pt.*going on from last.prev.pt"):
        assert train(copied, resume=True) is None
    same_end(whole, copied)


def test_a_lower_rate_holds_after_resuming(copied):
    assert train(copied, "train.max_steps=8", "train.lr=1e-5", "train.warmup=0", resume=True) is None
    step, = (r for r in records(copied) if r["step"] == 8 and "lr" in r)
    group = runs.load_last(copied)["optimizer"]["param_groups"][0]
    assert step["lr"] < 1e-5 and group["peak"] == 1e-5 and group["lr"] < 1e-5


def test_runs_are_equal_to_the_bit_and_saved_by_the_clock(whole, tmp_path, monkeypatch):
    saved, real = set(), runs.save
    monkeypatch.setattr(runs, "save", lambda path, checkpoint, *previous: saved.add(checkpoint["step"])
                        or real(path, checkpoint, *previous))
    assert train(tmp_path / "run", "train.save_minutes=0") is None
    assert saved == set(range(STEPS + 1))
    same_end(whole, tmp_path / "run")


# ---- numbers -----------------------------------------------------------------------------------------------
def test_a_step_that_is_not_finite_is_skipped_and_named(tmp_path, monkeypatch, capsys):
    """An infinite gradient in step 2: the weights stay as they were, the run goes on."""
    weights, real = {}, train_grm.gradients

    def overflow(model, *args):
        result = real(model, *args)
        step = len(weights) + 1
        weights[step] = model.text_proj.weight.detach().clone()        # as they are before the step
        if step == 2:
            model.text_proj.weight.grad[0, 0] = torch.inf
        return result
    monkeypatch.setattr(train_grm, "gradients", overflow)
    assert train(tmp_path) is None
    assert "step 2 is skipped: the gradient's norm is" in capsys.readouterr().out
    assert not torch.equal(weights[1], weights[2]) and torch.equal(weights[2], weights[3])
    assert weights[STEPS].isfinite().all() and not torch.equal(weights[3], weights[4])
    skipped, = (r for r in records(tmp_path) if "skipped" in r)
    assert skipped["step"] == 2
    assert [r["skipped_steps"] for r in records(tmp_path) if "loss" in r] == [0, 1, 1, 1, 1, 1]


def test_a_loss_that_stays_nan_ends_the_run_with_the_last_good_checkpoint(tmp_path):
    failure = train(tmp_path, "loss.temperature=1e-42", "train.max_bad_steps=3")
    assert failure.startswith("error: the loss is nan at step 3") and "last.pt" in failure
    assert "\n" not in failure
    last = runs.load_last(tmp_path)
    assert last["step"] == 0 and all(x.isfinite().all() for x in last["model"].values())
    assert sum("skipped" in r for r in records(tmp_path)) == 3


# ---- images and hostile files ------------------------------------------------------------------------------
@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_does_not_decode_ends_the_run_with_its_name(workers, coco_folder, tmp_path):
    bad = coco_folder / "coco" / "train2014" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    failure = run_train("--backbone", "vit_micro", "--data", "coco", "--data-root", coco_folder, "--out",
                        tmp_path / "run", "--set", *TINY, "train.batch_size=5", "train.max_steps=5",
                        f"data.workers={workers}")
    assert failure.startswith("error: ") and str(bad) in failure and "\n" not in failure


def test_encoder_weights_that_would_run_code_do_not(tiny_config, tmp_path):
    Bomb.path = tmp_path / "ran"
    tiny_config["image"] |= {"pretrained": True, "weights": str(tmp_path / "image.pth")}
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, 2))):
        write({"state_dict": Bomb()}, tmp_path / "image.pth")
        with pytest.raises(data.UserError) as error:
            modules.build_grm(tiny_config, 120, 0)
        assert "\n" not in str(error.value) and not Bomb.path.exists()


def test_a_text_encoders_folder_that_would_run_code_does_not(tmp_path):
    Bomb.path, folder = tmp_path / "ran", tmp_path / "bert"
    folder.mkdir()

    def refused(load, *args):
        with pytest.raises(data.UserError) as error:
            load(*args)
        assert "\n" not in str(error.value) and not Bomb.path.exists()
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    settings = {"name": str(folder), "options": {}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"embeddings.word_embeddings.weight": Bomb()}, folder / "pytorch_model.bin")
    refused(encoders.build_text_encoder, settings, True, 50, 0)
    # And a folder that brings its own model code.
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": {
        "AutoConfig": "mine.Mine", "AutoModel": "mine.Mine", "AutoTokenizer": ["mine.Mine", None]}}))
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(Bomb.path)!r})\nclass Mine: pass\n")
    refused(encoders.build_text_encoder, settings, True, 50, 0)
    refused(encoders.load_tokenizer, str(folder))


HOLDER = """import pathlib, sys
sys.path.insert(0, sys.argv[1])
import runs
runs.hold(pathlib.Path(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_process_writes_to_is_refused_until_that_ends(copied, resume):
    before = sorted(path.name for path in copied.parent.iterdir())
    command = [sys.executable, "-c", HOLDER, str(ROOT), str(copied)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        failure = train(copied, resume=resume)
        assert "another run writes to" in failure and "\n" not in failure
        assert sorted(path.name for path in copied.parent.iterdir()) == before      # nothing was renamed
        holder.kill()
    assert train(copied, resume=resume) is None
