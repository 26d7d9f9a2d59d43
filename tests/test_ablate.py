"""Switches turn a part off and nothing else; the table's statistics; and ablate_grm.py recognises, continues and reports."""
import json
import math
import os
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch
import yaml

import ablate_grm
import modules
import train_grm
from conftest import ROOT, TINY

CONFIG = str(ROOT / "configs.yaml")
IMAGES = torch.randn(4, 3, 2, 3, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(0))
VALID = torch.arange(7)[None] < torch.tensor([[7], [4], [5], [6]])


# ------------------------------------------------------------------------------------------------------------- switches

class Pixels(torch.nn.Module):
    """The least image encoder: a token a pixel."""
    num_features = 3

    def forward_features(self, images):
        return images.flatten(2).transpose(1, 2)


class Embedding(torch.nn.Module):
    """The least text encoder."""
    config = type("config", (), {"hidden_size": 8})

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(20, 8)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask):
        return type("output", (), {"last_hidden_state": self.table(input_ids)})


@pytest.fixture
def switched():
    """switched("model.text_mask=false") -> that model, its features in training and the loss's terms; same seed always."""
    def build(*sets):
        config = train_grm.load_config(CONFIG, "vit_micro", sets=["model.dim=16", *sets])
        torch.manual_seed(0)
        levels = {name: config["loss"][name] for name in modules.LEVELS}
        model = modules.GRM(Pixels(), Embedding(), levels=levels, **config["model"])
        torch.manual_seed(1)
        image, text = model(IMAGES, IDS, VALID)
        total, terms = model.loss(image, text, torch.arange(4), config["loss"])
        total.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        return model, image, text, terms
    return build


def test_without_masks_every_valid_token_counts_alike_and_key_is_ori(switched):
    words = modules.without_special_tokens(VALID)
    _, image, text, terms = switched("model.image_mask=false", "model.text_mask=false")
    assert (image.mask == 1).all() and torch.equal(text.mask, words.float())
    torch.testing.assert_close(terms["key"], terms["ori"])
    _, image, text, terms = switched("model.image_mask=false")
    assert (image.mask == 1).all() and text.mask[words].std() > 0 and not torch.allclose(terms["key"], terms["ori"])
    _, image, text, terms = switched("model.text_mask=false")
    assert image.mask.std() > 0 and torch.equal(text.mask, words.float()) and not torch.allclose(terms["key"], terms["ori"])


def test_without_prompts_an_image_has_one_region_the_mean_of_its_tokens_under_the_mask(switched):
    model, image, _, _ = switched("model.prompts=false")
    expected = (image.tokens * image.mask[..., None]).sum(1) / image.mask.sum(1, keepdim=True)
    torch.testing.assert_close(image.means, expected[:, None])
    torch.testing.assert_close(image.attention[..., 0], image.mask / image.mask.sum(1, keepdim=True))
    assert model.region_prompts.prompts.grad is None                                             # and stays that


def test_without_uncertainty_regions_are_their_means_in_training_and_l_kl_is_gone(switched):
    model, image, _, terms = switched("model.uncertainty=false")
    torch.testing.assert_close(image.regions, torch.nn.functional.normalize(image.means, dim=-1))
    assert "kl" not in terms and {"consistency", "entropy", "unc"} <= terms.keys()
    assert all(p.grad is None for p in model.sampler.parameters())
    _, image, _, terms = switched()
    assert "kl" in terms and not torch.allclose(image.regions, torch.nn.functional.normalize(image.means, dim=-1))


@pytest.mark.parametrize("variant", [
    *ablate_grm.GROUPS["parts"], *ablate_grm.GROUPS["levels"], *ablate_grm.GROUPS["regularisers"]])
def test_every_variant_of_the_list_changes_the_loss_and_trains(variant, switched):
    *_, whole = switched()
    model, *_, terms = switched(*ablate_grm.NAMED[variant])
    level = re.fullmatch("no_(ori|key|unc)", variant)
    if level:
        assert level[1] not in terms
    elif variant in ablate_grm.GROUPS["regularisers"]:                   # its term is reported still, with weight 0
        assert terms.keys() == whole.keys()
    else:
        assert any(key not in terms or not torch.allclose(terms[key], whole[key]) for key in whole)


@pytest.mark.parametrize("name", ["consistency", "kl", "entropy"])
def test_a_regulariser_of_weight_0_has_no_gradient(name, switched, tiny_config):
    model, image, text, _ = switched()
    total = [model.loss(image, text, torch.arange(4), tiny_config["loss"] | {name: weight})[0] for weight in (0, 1, 2)]
    terms = model.loss(image, text, torch.arange(4), tiny_config["loss"])[1]
    torch.testing.assert_close(total[1] - total[0], terms[name])
    torch.testing.assert_close(total[2] - total[1], terms[name])


def test_a_checkpoint_from_before_the_switches_is_the_full_model(tiny_config):
    for key in ("image_mask", "text_mask", "prompts", "uncertainty"):
        del tiny_config["model"][key]
    model = modules.build_grm(tiny_config, vocab_size=120, pad_id=0)
    assert isinstance(model.image_adapter, modules.SignificanceAdapter) and model.sampler.sample


# ------------------------------------------------------------------------------------------------------------ the table

@pytest.mark.parametrize("freedom", [1, 2, 5, 30, 60])
def test_the_interval_is_students(freedom):
    """The density of t integrates to 0.975 up to the quantile used."""
    values = np.random.default_rng(0).normal(3, 2, freedom + 1).tolist()
    low, high = ablate_grm.interval(values)
    quantile = (high - low) / 2 / (np.std(values, ddof=1) / math.sqrt(freedom + 1))
    x = np.linspace(0, quantile, 200_001)
    density = (1 + x ** 2 / freedom) ** (-(freedom + 1) / 2)
    factor = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    assert 0.5 + factor * np.trapezoid(density, x) == pytest.approx(0.975, abs=2e-4)
    assert (low + high) / 2 == pytest.approx(np.mean(values))
    assert ablate_grm.interval([1.0]) is None


def made_up(rsum, seconds=1.0, **evidence):
    return {"levels": {"combined": {"rsum": rsum}}, "step_seconds": seconds, "split": "shapes", **evidence}


def test_differences_are_paired_by_seed():
    """Seeds differ much, the variant always loses 10: the interval is about 10, however large the spread; a seed that only
    one side has takes no part."""
    rows = ablate_grm.summarise({
        "full": {0: made_up(300), 1: made_up(340), 2: made_up(380), 9: made_up(1)},
        "worse": {0: made_up(290, 0.5), 1: made_up(331, 0.5), 2: made_up(369, 0.5), 5: made_up(600)}, "none": {}})
    worse = rows[1]
    assert worse["difference"] == pytest.approx(-10) and worse["difference_percent"] == pytest.approx(-1000 / 340)
    assert worse["interval"] == pytest.approx((-10 - 4.303 / math.sqrt(3), -10 + 4.303 / math.sqrt(3)))
    assert worse["time_ratio"] == 0.5 and worse["rsum_std"] > 30 and worse["seeds"] == [0, 1, 2, 5]
    assert rows[0]["difference"] is None and rows[2]["rsum"] is None
    text = ablate_grm.markdown(rows, "title", {"worse": "python train_grm.py --x"})
    assert "| worse | 4 | 397.5 ± 138.8 | -10.0 [-12.5, -7.5] | -2.9% | 0.50 |" in text
    assert "| none | 0 | – | – | – | – |" in text and "- worse: `python train_grm.py --x`" in text


# ------------------------------------------------------------------------------------------------------------- the script

def ablate(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["ablate_grm.py", "--config", CONFIG, "--backbone", "vit_micro", *map(str, argv)])
    failure = None
    try:
        ablate_grm.main()
    except SystemExit as stop:
        failure = stop.code
    return failure, capsys.readouterr().out


def test_a_finished_run_is_recognised_and_an_interrupted_one_goes_on(script, tmp_path, monkeypatch, capsys):
    """One run finished, one stopped after training and before its table: the second alone is started, with --resume."""
    settings = [*TINY, "train.max_steps=2"]
    assert script("train", "--backbone", "vit_micro", "--out", tmp_path / "no_unc" / "seed3",
                  "--set", *settings, "loss.unc=0", "train.seed=3")[0] is None
    log = tmp_path / "no_unc" / "seed3" / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    assert "test" in json.loads(lines[-1])
    (tmp_path / "full" / "seed3").mkdir(parents=True)
    (tmp_path / "full" / "seed3" / "metrics.jsonl").write_text("".join(lines))
    config = train_grm.load_config(CONFIG, "vit_micro", sets=[*settings, "train.seed=3"])
    (tmp_path / "full" / "seed3" / "config.yaml").write_text(yaml.safe_dump(config))
    log.write_text("".join(lines[:-1]) + '{"step": 2, "te\n')                                    # stopped while writing
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed3/*")}
    failure, printed = ablate(monkeypatch, capsys, "--out", tmp_path, "--seeds", 1, "--first-seed", 3, "--jobs", 1,
                              "--variants", "full", "no_unc", "--set", *settings)
    assert failure is None and "1 of 2 runs to do" in printed and "| no_unc | 1 |" in printed
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path.parent.parent.name == "full")
    assert not (tmp_path / "no_unc" / "seed3.1").exists()                                        # resumed, not begun again
    assert json.loads(log.read_text().splitlines()[-1])["test"]["combined"]["rsum"] > 0
    rows = {row["variant"]: row for row in json.loads((tmp_path / "table.json").read_text())}
    assert rows["no_unc"]["command"].endswith("loss.unc=0 train.seed=3") and rows["no_unc"]["difference"] is not None
    assert (tmp_path / "table.md").read_text().count("\n| ") == 4

    failure, printed = ablate(monkeypatch, capsys, "--out", tmp_path, "--seeds", 1, "--first-seed", 3, "--jobs", 1,
                              "--variants", "full", "no_unc", "--grounding", "--set", *settings)
    probes = json.loads((tmp_path / "no_unc" / "seed3" / "test" / "metrics.json").read_text())["probes"]
    assert f"| {probes['image_mask_auc_outlines']:.3f} | {probes['text_mask_auc']:.3f} |" in printed
    assert f"| {probes['variance_difference'][0]:.3f} |\n" in printed

    # two halves of a split are two splits
    for half in ("shapes_val[:12]", "shapes_val[12:]"):
        failure, printed = ablate(monkeypatch, capsys, "--out", tmp_path, "--seeds", 1, "--first-seed", 3, "--jobs", 1,
                                  "--variants", "no_unc", "--split", half, "--set", *settings)
        assert failure is None and "1 of 1 runs to do" in printed and f": {half}" in printed

    failure, _ = ablate(monkeypatch, capsys, "--out", tmp_path, "--seeds", 1, "--first-seed", 3, "--variants", "full",
                        "--set", *settings, "train.lr=1e-4")
    assert "full/seed3 was trained with another train.lr" in failure and "\n" not in failure


STUBBORN = """import pathlib, signal, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True)
def stop(*_):
    (out / "saved").touch()
    sys.exit("stopped")
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, lambda *_: (out / "twice").touch())
(out / "started").touch()
time.sleep(100)
"""


def test_a_signal_lets_every_run_save_and_starts_no_other(tmp_path, monkeypatch, capsys):
    """Two runs at work, a third waiting, in place of training a process that says what it receives."""
    monkeypatch.setattr(ablate_grm, "script", lambda name: [sys.executable, "-c", STUBBORN])

    def interrupt():
        while len(list(tmp_path.rglob("started"))) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
    threading.Thread(target=interrupt, daemon=True).start()
    before = signal.getsignal(signal.SIGINT)
    failure, _ = ablate(monkeypatch, capsys, "--out", tmp_path, "--seeds", 1, "--jobs", 2,
                        "--variants", "full", "no_key", "no_kl", "--set", *TINY)
    assert "repeat the command" in failure and not list(tmp_path.rglob("twice"))
    assert sorted(p.parent.parent.name for p in tmp_path.rglob("saved")) == ["full", "no_key"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_run_that_fails_is_reported_with_its_reason(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ablate_grm, "script", lambda name: [sys.executable, "-c", "import sys; sys.exit('error: no room')"])
    failure, printed = ablate(monkeypatch, capsys, "--out", tmp_path, "--seeds", 1, "--jobs", 1, "--variants", "full",
                              "--set", *TINY)
    assert failure.startswith("error: full/0 failed (error: no room)") and "| full | 0 | – |" in printed


@pytest.mark.parametrize("argv, said", [
    (["--variants", "no_such"], "no_image_mask"), (["--variants", "model.taus=1"], "model.tau"),
    (["--set", "train.lr=fast"], "float"), (["--data", "imagenet"], "coco, f30k"), (["--split", "shapes_vall"], "shapes_val")])
def test_every_variant_is_checked_before_the_first_run(argv, said, tmp_path, monkeypatch, capsys):
    failure, _ = ablate(monkeypatch, capsys, "--out", tmp_path / "x", *argv)
    assert failure.startswith("error: ") and said in failure and "\n" not in failure and not (tmp_path / "x").exists()


def test_variants_may_be_settings():
    assert ablate_grm.variant_settings("train.lr=1e-4,augment.crop=[0.5, 1.0],model.tau=2") == [
        "train.lr=1e-4", "augment.crop=[0.5, 1.0]", "model.tau=2"]


@pytest.mark.parametrize("visible, count, names", [
    ("", 2, ["0", "1"]), ("", 0, []), ("2,3", 2, ["2", "3"]), ("3, 1,-1,0", 2, ["3", "1"]), ("GPU-8f2a", 1, ["GPU-8f2a"]),
    ("-1", 0, []), ("1,", 2, ["0", "1"])])
def test_runs_get_the_gpus_that_were_left_to_the_command(visible, count, names):
    assert ablate_grm.gpu_names(visible, count) == names
