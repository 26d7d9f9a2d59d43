"""Kills a training run on the built-in scenes again and again with SIGKILL, resumes it each time, and compares what comes
out with a run that was left alone: weights, optimizer and metrics must be equal to the bit.

    python tests/kill_and_resume.py --kills 20

The run saves after every step, so that many kills fall into the writing of a checkpoint; every other one waits for that.
A life of the run is a fork of this process, which has the libraries loaded already; its death is as sudden as any.
"""
import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import checkpoints  # noqa: E402
import train_grm  # noqa: E402

SETTINGS = ["image.name=vit_tiny_patch16_224", "image.options={patch_size: 16, embed_dim: 64, depth: 1, num_heads: 2}",
            "model.dim=64",
            "text.options={hidden_size: 64, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 128}",
            "datasets.shapes.scenes={train: 32, val: 12, test: 12}", "train.batch_size=8", "train.val_every=1",
            "train.micro_batch=5", "data.val_split=null", "train.log_every=1", "train.save_minutes=0",
            "train.deterministic=true"]


def start(out: Path, steps: int, resume: bool) -> int:
    """-> process id of a training run to `steps` steps."""
    process = os.fork()
    if process == 0:
        log = os.open(out.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["train_grm.py", "--config", str(ROOT / "configs.yaml"), "--backbone", "vit_micro", "--out", str(out),
                    *["--resume"] * resume, "--set", *SETTINGS, f"train.max_steps={steps}", f"train.epochs={steps}"]
        try:
            train_grm.main()
            sys.stdout.flush()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return process


def ended(process: int) -> bool:
    """Whether it has; if so, it must have ended well."""
    done, status = os.waitpid(process, os.WNOHANG)
    if done and status:
        raise SystemExit(f"the run failed (status {status})")
    return bool(done)


def kill_somewhere(process: int, out: Path, chance: random.Random, in_a_write: bool, deadline: float = 120) -> str:
    """Kills the run after a few more steps. -> "training", "writing" (a checkpoint was half written), or "finished"."""
    metrics, until = out / "metrics.jsonl", time.monotonic() + deadline
    size = metrics.stat().st_size if metrics.exists() else 0
    changes = chance.randint(2, 6)                             # of which resuming makes one
    while changes:
        if ended(process):
            return "finished"
        if time.monotonic() > until:
            raise SystemExit(f"no step in {deadline} s: see {out.with_suffix('.log')}")
        now = metrics.stat().st_size if metrics.exists() else 0
        changes, size = changes - (now != size), now
        time.sleep(0.0005)
    time.sleep(chance.uniform(0, 0.1))
    while in_a_write and not (out / "last.tmp").exists():
        if ended(process):
            return "finished"
    time.sleep(chance.uniform(0, 0.005) * in_a_write)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return "writing" if (out / "last.tmp").exists() else "training"


def losses(out: Path) -> list:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(r["step"], r.get("loss"), r.get("val_rsum")) for r in records]


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def kill_and_resume(folder: Path, kills: int, steps: int, seed: int) -> dict[str, int]:
    """-> how many kills fell where; SystemExit if the runs differ."""
    chance, fell = random.Random(seed), {"training": 0, "writing": 0, "finished": 0}
    whole, cut = folder / "whole", folder / "cut"
    process = start(whole, steps, resume=False)
    os.waitpid(process, 0)
    for kill in range(kills):
        resume = any((cut / name).exists() for name in ("last.pt", "last.prev.pt"))
        (cut / "last.tmp").unlink(missing_ok=True)             # of the kill before; a new one tells where this one falls
        where = kill_somewhere(start(cut, steps, resume), cut, chance, in_a_write=kill % 2 == 0)
        fell[where] += 1
        print(f"kill {kill + 1}: while {where}, after {(cut / 'metrics.jsonl').read_bytes().count(10)} lines", flush=True)
        if where == "finished":
            raise SystemExit(f"the run was over before kill {kill + 1}: more --steps")
    process = start(cut, steps, resume=True)
    if os.waitpid(process, 0)[1]:
        raise SystemExit(f"the resumed run failed: see {cut.with_suffix('.log')}")
    for name in ("last.pt", "best.pt"):
        a, b = (checkpoints.load_checkpoint(out / name) for out in (whole, cut))
        for key in ("model", "optimizer", "scaler", "random_state", "step", "best", "validated"):
            if not equal(a.get(key), b.get(key)):
                raise SystemExit(f"{name}: '{key}' differs")
    if losses(whole) != losses(cut):
        raise SystemExit("metrics.jsonl differs")
    return fell


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N")
    parser.add_argument("--steps", type=int, metavar="N", help="steps of the run (default: enough for all kills)")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    args = parser.parse_args()
    torch.set_num_threads(1)                                   # a fork has one thread
    with tempfile.TemporaryDirectory() as temporary:
        steps = args.steps or 4 * args.kills
        fell = kill_and_resume(Path(temporary), args.kills, steps, args.seed)
        print(f"{args.kills} kills, {fell['writing']} of them inside a checkpoint write: after {steps} steps, weights, "
              "optimizer, random state, best.pt and metrics are equal to the bit to those of the run that was left alone")
