"""What the tests share: the repository on the path, a tiny model, and the way a script is run and fails."""
import json
import os
import sys
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""      # figures are compared to the digit: the tests run on the CPU, where there is a GPU too

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
torch.set_num_threads(2)

import eval_grm  # noqa: E402
import modules  # noqa: E402
import train_grm  # noqa: E402

# a run of vit_micro that takes seconds
TINY = ["image.name=vit_tiny_patch16_224", "image.options={patch_size: 16, embed_dim: 32, depth: 1, num_heads: 2}",
        "model.dim=32",
        "text.options={hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 64}",
        "datasets.shapes.scenes={train: 64, val: 24, test: 32}", "train.batch_size=16", "train.val_every=1", "data.val_split=null"]


@pytest.fixture
def tiny_config():
    return train_grm.load_config(str(ROOT / "configs.yaml"), "vit_micro", sets=TINY)


@pytest.fixture
def tiny_model(tiny_config):
    torch.manual_seed(0)
    return modules.build_grm(tiny_config, vocab_size=120, pad_id=0)


@pytest.fixture
def script(monkeypatch, capsys):
    """script("train", "--backbone", ...) -> (exit message or None, standard output)."""
    def call(name, *argv):
        module = {"train": train_grm, "eval": eval_grm}[name]
        if name == "train" and "--config" not in argv:
            argv = ("--config", str(ROOT / "configs.yaml"), *argv)
        monkeypatch.setattr(sys, "argv", [f"{name}_grm.py", *map(str, argv)])
        failure = None
        try:
            module.main()
        except SystemExit as stop:
            failure = stop.code
        return failure, capsys.readouterr().out
    return call


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
