"""What the tests share: the repository on the path, a tiny model, and the way a script is run."""
import contextlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("GRM_TEST_GPU", "")    # on the CPU, figures are exact
if "GRM_TEST_GPU" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"                       # kernels run, slowly, without a GPU

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"                                # development data, which a clone does not have
CONFIG = str(ROOT / "configs.yaml")
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                                       # models this small gain nothing from more

# a run of vit_micro that takes seconds
TINY = ["image.name=vit_tiny_patch16_224", "model.dim=32",
        "image.options={patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}",
        "text.options={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}",
        "datasets.shapes.scenes={train: 64, val: 24, test: 32}", "train.batch_size=16", "train.val_every=1",
        "data.val_split=null"]


@pytest.fixture(params=["paper", "grm"])
def recipe(request):
    return request.param


@pytest.fixture
def tiny_config():
    import runs
    return runs.load_config(CONFIG, "vit_micro", sets=TINY)


@pytest.fixture
def tiny_model(tiny_config):
    import modules
    torch.manual_seed(0)
    return modules.build_grm(tiny_config, vocab_size=120, pad_id=0)


def run_train(*argv):
    """train_grm.py in this process -> what it would hand to sys.exit: None, or one line."""
    import train_grm
    argv = [str(value) for value in argv]
    config = [] if "--config" in argv else ["--config", CONFIG]
    return exit_of(train_grm, [*config, *argv])


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    """The folder of a finished run of two steps."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    assert run_train("--backbone", "vit_micro", "--out", out, "--set", *TINY, "train.max_steps=2") is None
    return out


def run_eval(*argv):
    import eval_grm
    return exit_of(eval_grm, [str(value) for value in argv])


def exit_of(script, argv):
    from runs import one_line_errors
    try:
        with one_line_errors():
            return script.main(script.parse_arguments(argv))
    except SystemExit as stop:
        return stop.code


@contextlib.contextmanager
def signal_at(owner, name, call, number=signal.SIGTERM):
    """The signal arrives as owner.name is called for the `call`th time, also in processes that load data."""
    calls, real = [], getattr(owner, name)

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            for child in multiprocessing.active_children():
                os.kill(child.pid, number)
            signal.raise_signal(number)
        return real(*args, **kwargs)
    setattr(owner, name, interrupted)
    try:
        yield
    finally:
        setattr(owner, name, real)


class Bomb:
    """Unpickled, it would make a folder."""
    def __reduce__(self):
        return os.mkdir, (str(Bomb.path),)


def records(out):
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def coco_folder(tmp_path):
    """A data root in COCO's shape: Karpathy's JSON and small pictures of noise."""
    rng, root, entries = np.random.default_rng(0), tmp_path / "data" / "coco", []
    for n, split in enumerate(["train"] * 3 + ["restval"] * 2 + ["val"] * 2 + ["test"] * 5):
        folder = "train2014" if split == "train" else "val2014"
        (root / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(root / folder / f"{n}.jpg")
        entries.append({"filepath": folder, "filename": f"{n}.jpg", "split": split,
                        "sentences": [{"raw": f"caption {k} of picture number {n} ."} for k in range(5)]})
    (root / "dataset_coco.json").write_text(json.dumps({"images": entries, "dataset": "coco"}))
    return tmp_path / "data"
