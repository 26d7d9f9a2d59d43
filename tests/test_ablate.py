"""Switches turn a part off and nothing else; statistics; what ablate_grm.py recognises and continues."""
import json
import math
import os
import signal
import subprocess
import threading
import time

import numpy as np
import pytest
import torch
import yaml

import ablate_grm
import modules
import runs
from conftest import CONFIG, TINY, records
from data import UserError

IMAGES = torch.randn(4, 3, 2, 3, generator=torch.Generator().manual_seed(0))
IDS = torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(0))
VALID = torch.arange(7)[None] < torch.tensor([[7], [4], [5], [6]])
WORDS = VALID & VALID.roll(-1, 1) & (torch.arange(7) > 0)        # without the first and the last token
BATCH = IMAGES, IDS, VALID, WORDS


# ---- switches ----------------------------------------------------------------------------------------------
class Pixels(torch.nn.Module):
    """The least image encoder: a token a pixel."""
    width, class_tokens = 3, 0

    def forward(self, images):
        return images.flatten(2).transpose(1, 2)


class Embedding(torch.nn.Module):
    """The least text encoder."""
    width = embedding_width = 8

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(20, 8)

    def forward(self, ids, valid):
        return self.table(ids), self.table(ids), self.table(ids)[:, 0, :0]


@pytest.fixture
def switched(recipe):
    """switched("model.text_mask=false") -> model, features in training, terms of the loss; one seed."""
    def build(*sets):
        config = runs.load_config(CONFIG, "vit_micro", recipe, sets=["model.dim=16", *sets])
        torch.manual_seed(0)
        levels = {level: config["loss"][level] for level in modules.LEVELS}
        model = modules.GRM(Pixels(), Embedding(), levels, **config["model"])
        torch.manual_seed(1)
        image, text = model(*BATCH)
        total, terms = model.loss(image, text, torch.arange(4), config["loss"])
        total.backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
        return model, image, text, terms
    return build


def test_without_masks_every_token_counts_alike_and_key_is_ori(switched):
    _, image, text, terms = switched("model.image_mask=false", "model.text_mask=false")
    assert (image.mask == 1).all() and torch.equal(text.mask, WORDS.float())
    torch.testing.assert_close(terms["key"], terms["ori"])
    _, image, text, terms = switched("model.image_mask=false")
    assert (image.mask == 1).all() and text.mask[WORDS].std() > 0
    assert not torch.allclose(terms["key"], terms["ori"])
    _, image, text, terms = switched("model.text_mask=false")
    assert image.mask.std() > 0 and torch.equal(text.mask, WORDS.float())
    assert not torch.allclose(terms["key"], terms["ori"])


def test_without_prompts_an_image_has_one_region_the_mean_of_its_tokens(switched, recipe):
    """Of masked tokens in `paper`; of unit tokens, weighted by the mask, in `grm`."""
    model, image, _, _ = switched("model.prompts=false")
    V, mask = model.image_proj(IMAGES.flatten(2).transpose(1, 2)), image.mask[..., None]
    if recipe == "paper":
        expected = (V * mask).mean(1)
    else:
        expected = (V / V.norm(dim=-1, keepdim=True) * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(image.means, expected[:, None])
    assert model.region_prompts.prompts.grad is None             # and stays that


def test_without_uncertainty_regions_are_their_means_in_training_and_l_kl_is_gone(switched):
    model, image, _, terms = switched("model.uncertainty=false")
    assert torch.equal(image.regions, image.means)
    assert "kl" not in terms and {"consistency", "entropy", "unc"} <= terms.keys()
    assert all(p.grad is None for p in model.sampler.parameters())
    _, image, _, terms = switched()
    assert "kl" in terms and not torch.allclose(image.regions, image.means)


@pytest.mark.parametrize("variant", [*ablate_grm.GROUPS["parts"], "ori_alone"])
def test_every_row_of_the_paper_turns_off_what_it_names_and_trains(variant, switched):
    full = switched()[-1]
    terms = switched(*(ablate_grm.GROUPS["parts"] | ablate_grm.GROUPS["ori_alone"])[variant])[-1]
    gone = {"without_L_ori": {"ori"}, "without_L_key": {"key"}, "without_UM": {"kl"},
            "without_L_unc": full.keys() - {"ori", "key"}, "ori_alone": full.keys() - {"ori"}}
    assert full.keys() - terms.keys() == gone.get(variant, set())
    if variant in ("without_L_recon", "without_L_reg"):          # reported still, with weight 0
        torch.testing.assert_close(terms, full)
    elif variant not in gone:
        assert any(not torch.allclose(terms[key], full[key]) for key in full)


@pytest.mark.parametrize("name", ["consistency", "kl", "entropy", "gates"])
def test_a_regulariser_enters_the_loss_with_its_weight(name, switched, tiny_config):
    model, image, text, _ = switched("model.gates=true")
    settings, ids = tiny_config["loss"], torch.arange(4)
    totals = [model.loss(image, text, ids, settings | {name: weight})[0] for weight in (0, 1, 2)]
    term = model.loss(image, text, ids, settings)[1][name]
    torch.testing.assert_close(totals[1] - totals[0], term)
    torch.testing.assert_close(totals[2] - totals[1], term)


# ---- variants ----------------------------------------------------------------------------------------------
def arguments(*argv):
    return ablate_grm.parse_arguments(["--config", CONFIG, "--backbone", "vit_micro", *map(str, argv)])


def variants_of(*names):
    return ablate_grm.variants_of(arguments("--out", "x", "--variants", *names))


def test_changes_turn_the_recipe_back_to_the_paper_one_setting_at_a_time():
    variants = variants_of("changes")

    def flat(recipe, sets=()):
        return runs.flat(runs.load_config(CONFIG, "vit_micro", recipe, sets=sets))

    own, paper = flat("grm"), flat("paper")
    for name, settings in variants.items():
        key = name.removeprefix("paper_")
        assert flat("grm", settings) == own | {key: paper[key]} != own
    every = [setting for settings in variants.values() for setting in settings]
    assert flat("grm", every) == paper | {"recipe": "grm"}
    assert variants_of("paper_loss.kind") == {"paper_loss.kind": ['loss.kind="triplet"']}


def test_variants_are_names_groups_or_settings():
    settings = "train.lr=1e-4,augment.crop=[0.5, 1.0],model.tau=2"
    assert variants_of("full", "without_SA", settings) == {
        "full": [], "without_SA": ["model.image_mask=false"],
        settings: ["train.lr=1e-4", "augment.crop=[0.5, 1.0]", "model.tau=2"]}
    assert len(variants_of("parts")) == 9


@pytest.mark.parametrize("argv, said", [
    (["--variants", "no_such"], "without_SA"), (["--variants", "model.taus=1"], "model.tau"),
    (["--set", "train.lr=fast"], "float"), (["--data", "imagenet"], "f30k"), (["--recipe", "x"], "paper"),
    (["--split", "shapes_vall"], "shapes_val"), (["--variants", "train.seed=5"], "set by --seeds"),
    (["--variants", "changes", "--recipe", "paper"], "nothing differs"),
    (["--json", CONFIG], "no file of ours")])
def test_every_variant_is_checked_before_the_first_run(argv, said, tmp_path):
    with pytest.raises(UserError) as error:
        ablate_grm.main(arguments("--out", tmp_path / "x", *argv))
    assert said in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "x").exists()


def test_a_run_of_other_settings_is_not_taken_for_one_of_these(tmp_path):
    args = arguments("--out", tmp_path)
    job = ablate_grm.Job(args, "full", [], 3)
    job.folder.mkdir(parents=True)
    job.config["data"]["root"] = "elsewhere"                     # data may move
    (job.folder / "config.yaml").write_text(yaml.safe_dump(job.config))
    ablate_grm.Job(args, "full", [], 3)
    with pytest.raises(UserError, match="full/seed3 was trained with another model.tau: choose"):
        ablate_grm.Job(args, "full", ["model.tau=2"], 3)
    for name in "metrics.jsonl", "config.yaml":                  # as after a power cut
        (job.folder / name).write_bytes(b"\0\0\n")
        with pytest.raises(UserError, match=f"{name}' is damaged"):
            ablate_grm.Job(args, "full", [], 3).records()


# ---- statistics --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("freedom", [1, 2, 5, 10])
def test_the_interval_is_students(freedom):
    """The density of t integrates to 0.975 up to the quantile used."""
    values = np.random.default_rng(0).normal(3, 2, freedom + 1).tolist()
    found = ablate_grm.interval(values)
    quantile = (found["high"] - found["low"]) / 2 / (np.std(values, ddof=1) / math.sqrt(freedom + 1))
    x = np.linspace(0, quantile, 200_001)
    density = (1 + x ** 2 / freedom) ** (-(freedom + 1) / 2)
    log_factor = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    assert 0.5 + math.exp(log_factor) * np.trapezoid(density, x) == pytest.approx(0.975, abs=2e-4)
    assert (found["low"] + found["high"]) / 2 == pytest.approx(found["mean"])
    assert found["mean"] == pytest.approx(np.mean(values))
    assert ablate_grm.interval([1.0]) == {"mean": 1.0} and ablate_grm.interval([]) is None


def made_up(rsum, **evidence):
    return {"rSum": rsum, "evidence": evidence}


def test_differences_are_paired_by_seed():
    """Seeds differ much and the variant always loses about 10, and so says the interval. A seed that only one
    side has takes no part."""
    columns, (full, worse, none) = ablate_grm.summarise({
        "full": {0: made_up(300, cosine=0.5), 1: made_up(340), 2: made_up(380), 9: made_up(1)},
        "worse": {0: made_up(290), 1: made_up(331), 2: made_up(369), 5: made_up(600)},
        "none": {}})
    assert columns == ["seeds", "rSum", "difference", "cosine"]
    half = 4.303 * np.std([-10, -9, -11], ddof=1) / math.sqrt(3)
    difference = {"mean": -10, "low": -10 - half, "high": -10 + half}
    assert worse["values"].pop("difference") == pytest.approx(difference)
    assert worse["values"] == {"seeds": 4, "rSum": [290, 331, 369, 600], "cosine": []}
    assert full["values"]["difference"] is None
    assert full["values"]["cosine"] == [0.5]
    assert none["values"] == {"seeds": 0, "rSum": [], "difference": None, "cosine": []}


# ---- the script --------------------------------------------------------------------------------------------
def interrupt_after(path):
    """Sends this process Ctrl-C as soon as the file has a line."""
    while not (path.exists() and path.read_text().endswith("\n")):
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_saves_a_run_and_the_same_command_does_what_is_left(tmp_path, capsys):
    argv = ["--out", tmp_path, "--seeds", 1, "--variants", "full", "without_L_unc",
            "--set", *TINY, "train.max_steps=40", "train.log_every=1"]
    full, before = tmp_path / "full" / "seed0", signal.getsignal(signal.SIGINT)
    threading.Thread(target=interrupt_after, args=[full / "metrics.jsonl"], daemon=True).start()
    with pytest.raises(SystemExit, match="repeat the command to go on"):
        ablate_grm.main(arguments(*argv, "--jobs", 1))
    assert signal.getsignal(signal.SIGINT) is before and not (tmp_path / "without_L_unc").exists()
    assert "with --resume to go on" in full.with_suffix(".log").read_text()

    ablate_grm.main(arguments(*argv, "--jobs", 2))
    printed = capsys.readouterr().out
    assert "2 of 2 runs to do" in printed and "| without_L_unc | 1 |" in printed
    assert not (tmp_path / "full" / "seed0.1").exists()          # resumed, not begun again
    assert [line["step"] for line in records(full) if "loss" in line] == list(range(1, 41))
    table = json.loads((tmp_path / "table.json").read_text())
    assert [row["name"] for row in table["rows"]] == ["full", "without_L_unc"]
    assert table["title"] == "vit_micro, recipe grm, on shapes" and table["rows"][1]["values"]["difference"]

    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed0*")}
    ablate_grm.main(arguments(*argv))                            # finished: recognised, nothing is touched
    assert "0 of 2 runs to do" in capsys.readouterr().out
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("seed0*")}


@pytest.mark.slow
def test_another_split_and_grounding_follow_training(tmp_path, capsys):
    argv = ["--out", tmp_path, "--seeds", 1, "--jobs", 1, "--grounding", "--variants", "full", "--set", *TINY,
            "train.max_steps=2"]
    for split in ("shapes_val[:12]", "shapes_val[12:]"):
        ablate_grm.main(arguments(*argv, "--split", split))
        assert "1 of 1 runs to do" in capsys.readouterr().out
        folder = tmp_path / "full" / "seed0" / ablate_grm.file_name(split)
        found = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("metrics", "grounding")}
        values = json.loads((tmp_path / "table.json").read_text())["rows"][0]["values"]
        assert found["metrics"]["split"] == found["grounding"]["split"] == split
        assert values["rSum"] == [found["metrics"]["levels"]["combined"]["rsum"]]
        assert values["AUC text"] == [found["grounding"]["AUC text"]]
        assert values["variance"] == [found["grounding"]["variance"][0]]


def test_a_run_that_fails_is_reported_in_one_line(tmp_path, capsys):
    argv = ["--out", tmp_path, "--seeds", 1, "--variants", "full", "--set", *TINY, "data.val_split=shapes_x"]
    with pytest.raises(UserError, match=r"full/seed0 failed \(.*shapes_x.*\); logs in") as error:
        ablate_grm.main(arguments(*argv))
    assert "\n" not in str(error.value) and "| full | 0 | – |" in capsys.readouterr().out


def test_an_error_between_runs_ends_those_that_are_left():
    class Sleeper:
        """A run that takes so many seconds."""
        def __init__(self, seconds):
            self.name, self.seconds, self.process = f"sleep {seconds}", seconds, None

        def result(self):
            return self.process and {}

        def start(self, environment):
            self.process = subprocess.Popen(["sleep", str(self.seconds)], start_new_session=True)
            return self.process

    def full_disk():
        raise OSError("No space left on device")
    jobs, before = [Sleeper(0), Sleeper(600)], signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="No space"):
        ablate_grm.work_off(jobs, [{}, {}], full_disk)
    assert [job.process.poll() for job in jobs] == [0, -signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == before


def test_runs_get_the_gpus_that_were_left_to_the_command(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, names in (("", ["0", "1"]), ("2,3", ["2", "3"]), ("GPU-8f2a,1", ["GPU-8f2a", "1"])):
        monkeypatch.setitem(os.environ, "CUDA_VISIBLE_DEVICES", visible)
        assert [slot["CUDA_VISIBLE_DEVICES"] for slot in ablate_grm.environments(3)] == [*names, names[0]]
