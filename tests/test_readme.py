"""What the README says is so: its Python example runs, and it names every difference of recipe `grm`."""
import re

import numpy as np
import yaml
from PIL import Image

from conftest import CONFIG, ROOT, TINY, run_train

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = ["--set", *TINY, "train.max_steps=1"]
    assert run_train("--backbone", "vit_micro", "--out", "runs/vit_tiny-f8k", *settings) is None
    for name in ("dog.jpg", "cat.jpg"):
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(name)
    example, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {}
    exec(example, names)
    assert names["scores"].shape == (2, 2) and names["scores"].isfinite().all()


def test_every_difference_of_recipe_grm_is_named_with_the_papers_value():
    with open(CONFIG, encoding="utf-8") as file:
        blocks = yaml.safe_load(file)
    told = dict(re.findall(r"([a-z]+\.[a-z_]+)=([^\s`;:\"]+)", README.split("## What differs")[1]))
    for section, settings in blocks["recipes"]["grm"]["all"].items():
        for key in settings:
            paper = blocks["defaults"][section][key]
            assert yaml.safe_load(told[f"{section}.{key}"]) == paper, f"{section}.{key}"


def test_the_files_it_links_to_are_there():
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
