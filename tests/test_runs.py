"""runs.py: what a configuration may say, and checkpoints that are whole, told apart, and never executed."""
import io
import pickle
import resource
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
import yaml
from conftest import CONFIG, ROOT, TINY, Bomb, run_eval, run_train

import runs
from data import UserError

BACKBONES = {"vit_b_224": "paper", "vit_b_384": "paper", "swin_b_224": "paper", "swin_b_384": "paper",
             "clip_b_224": "grm", "siglip_b_224": "grm", "vit_tiny": "grm", "vit_micro": "grm"}


def setting(key, *names, path=CONFIG, **more):
    section, name = key.split(".")
    return runs.load_config(path, *names, **more)[section][name]


def written(folder, **changes):
    """configs.yaml with these changes, {dotted__key: value} -> its path."""
    content = runs.read_blocks(CONFIG)
    for key, value in changes.items():
        *path, last = key.split("__")
        block = content
        for part in path:
            block = block.setdefault(part, {})
        block[last] = value
    (folder / "configs.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "configs.yaml")


def one_line(text, *words):
    assert text and "\n" not in text and all(word in text for word in words), text
    return True


# ---- configuration -----------------------------------------------------------------------------------------
def test_special_settings_win_over_general_ones(tmp_path):
    """defaults < the data set's < the backbone's < the recipe's < the recipe's for the backbone < --set"""
    layers = ["defaults__loss", "datasets__shapes__config__loss", "backbones__vit_micro__loss",
              "recipes__grm__all__loss", "recipes__grm__vit_micro__loss"]
    for count in range(1, len(layers) + 1):
        path = written(tmp_path, **{f"{layer}__margin": 1 + n for n, layer in enumerate(layers[:count])})
        assert setting("loss.margin", "vit_micro", path=path) == count
    assert setting("loss.margin", "vit_micro", path=path, sets=["loss.margin=7"]) == 7


def test_the_settings_of_the_file():
    assert setting("train.batch_size", "vit_b_224") == 256                             # COCO's
    assert setting("train.batch_size", "vit_b_224", dataset="f30k") == 128             # the default
    assert setting("train.batch_size", "vit_tiny", dataset="coco") == 64               # the backbone's
    assert setting("train.lr", "vit_tiny") > setting("train.lr", "vit_tiny", "paper")  # the recipe's for it
    assert setting("model.num_prompts", "swin_b_384") == 50
    assert setting("model.image_keep", "vit_b_224") is None                            # the paper's
    assert setting("model.image_keep", "vit_b_224", "grm") == 0.5
    assert setting("model.image_keep", "vit_micro") == 0.3                             # the recipe's for it
    assert setting("model.image_keep", "vit_micro", sets=["model.image_keep=0.7"]) == 0.7
    assert setting("train.lr", "vit_micro", sets=["train.lr=3e-4"]) == 3e-4


def test_a_size_in_evaluation_holds_for_its_encoder_and_its_training_size():
    tiny = partial(setting, "image.eval_size", "vit_tiny")
    assert tiny() == tiny(sets=["train.lr=1"]) == 192
    for changed in "image.size=224", "image.name=resnet18":
        assert tiny(sets=[changed]) is None
        assert tiny(sets=[changed, "image.eval_size=224"]) == tiny(sets=["image.eval_size=224", changed]) == 224


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_has_its_recipe_and_no_recipe_sets_the_batch_size(backbone):
    assert runs.load_config(CONFIG, backbone)["recipe"] == BACKBONES[backbone]
    sizes = {setting("train.batch_size", backbone, recipe) for recipe in ("paper", "grm")}
    assert len(sizes) == 1


def test_recipe_paper_is_the_defaults():
    settings = runs.load_config(CONFIG, "vit_b_224", "paper", dataset="f30k")
    defaults = runs.read_blocks(CONFIG)["defaults"]
    for section in ("text", "model", "loss", "augment", "train"):
        assert settings[section] == defaults[section]


@pytest.mark.parametrize("item, said", [
    ("train.learning_rate=1", "train.lr"), ("lr=1", "train.lr"), ("train=1", "train.lr"),
    ("train.lr", "key=value"), ("train.lr=fast", "float"), ("train.batch_size=0", "at least 1"),
    ("train.batch_size=true", "int"), ("train.lr=-1", "above 0"), ("loss.kind=hinge", "triplet, infonce"),
    ("data.epoch=all", "captions, images"), ("model.num_prompts=0", "at least 1"),
    ("model.text_keep=1", "between 0 and 1"), ("model.prior=wide", "standard, scaled"),
    ("loss.kind=[", "YAML"), ("train.lr=null", "must have a value"), ("train.micro_batch=2.5", "whole"),
    ("train.seed=-1", "from 0 to"), (f"train.seed={10 ** 20}", "from 0 to"),
    ("image.optionsx=1", "image.options"), ("loss.ramp=-1", "at least 0"),
    ("train.warmup=-0.1", "at least 0"), ("train.milestones=[2]", "0 to 1"), ("train.milestones=1", "list"),
    ("data.name=f8k", "--data"), ("data.root=", "must have a value"), ("image.name=", "must have a value"),
    ("data.val_split=3", "not a str"), ("train.init=[x]", "a name"), ("text.name=", None),
    ("augment.crop=[0.5]", "least, most"), ("augment.crop=[1,0.5]", "least, most"),
    ("augment.crop=[0.6,a]", "0 to 1"), ("augment.flip=2", "0 to 1"), ("image.weights=x", "pretrained")])
def test_a_setting_that_cannot_be_names_what_can(item, said):
    if not said:
        runs.load_config(CONFIG, "vit_micro", sets=[item])
        return
    with pytest.raises(UserError, match=said) as error:
        runs.load_config(CONFIG, "vit_micro", sets=[item])
    assert one_line(str(error.value))


def test_without_a_level_there_is_nothing_to_learn():
    with pytest.raises(UserError, match="nothing is left"):
        runs.load_config(CONFIG, "vit_micro", sets=["loss.ori=0", "loss.key=0", "loss.unc=0"])


@pytest.mark.parametrize("key, value, said", [
    ("defaults__train__lr", "1e-4", None), ("backbones__vit_micro__train__lr", "1e-4", None),
    ("backbones__vit_micro__image", None, None), ("backbones__vit_micro__image", "vit", "a block"),
    ("backbones__vit_micro", "vit", "a block"), ("defaults__loss", None, None),
    ("defaults__loss", {"margin": 0.3}, None), ("defaults__loss__marign", 0.3, "margin"),
    ("defaults__los", {}, "loss"), ("backbones__vit_micro__train__save_minutes", "0.5", None),
    ("defaults__train__max_steps", "9", None), ("defaults__train__clip", "2,0", "clip"),
    ("backbones__vit_micro__train__lr", "fast", "not a float"),
    ("backbones__vit_micro__data", None, "coco, f30k, f8k, shapes"), ("recipes__grm", "ours", "a block"),
    ("recipes__grm__all__model__keep", 0.5, "image_keep"), ("recipes", None, "needs the blocks")])
def test_the_file_is_checked_as_set_is(tmp_path, key, value, said):
    """YAML reads 1e-4, without a dot, as text, and an empty block as null. What `defaults` lacks is as in the
    project's file."""
    path = written(tmp_path, **{key: value})
    if said:
        with pytest.raises(UserError, match=said):
            runs.load_config(path, "vit_micro")
    else:
        expected = 1e-4 if "vit_micro__train__lr" in key else 3e-3
        assert setting("train.lr", "vit_micro", path=path) == expected
        assert setting("loss.key", "vit_micro", path=path) == 0.4


def test_unknown_names_list_the_valid_ones(tmp_path):
    assert one_line(run_train("--backbone", "vit_x"), ", ".join(BACKBONES))
    assert one_line(run_train("--backbone", "vit_micro", "--recipe", "nonsense"), "recipes", "paper, grm")
    assert one_line(run_train("--backbone", "vit_micro", "--data", "imagenet"), "coco, f30k, f8k, shapes")
    assert one_line(run_train("--backbone", "vit_micro", "--config", tmp_path / "none.yaml"), "cannot read")
    assert one_line(run_train("--backbone", "vit_micro", "--out", tmp_path / "x", "--set", *TINY,
                              "image.name=vit_nano"), "error: image.name")


def test_yaml_that_would_run_code_does_not(tmp_path):
    for text in ("a: [", f"a: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]"):
        (tmp_path / "bad.yaml").write_text(text)
        assert one_line(run_train("--backbone", "vit_micro", "--config", tmp_path / "bad.yaml"), "not YAML")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("script", ["train", "eval", "ground", "ablate", "bench", "visualize"])
def test_help_answers_before_the_libraries_are_loaded(script):
    code = (f"import runpy, sys\nsys.argv = ['{script}_grm.py', '--help']\ntry:\n"
            f" runpy.run_path('{script}_grm.py', run_name='__main__')\n"
            "finally:\n assert not {'torch', 'timm', 'transformers'} & sys.modules.keys()")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: " in done.stdout, done.stderr


def test_running_out_of_memory_is_one_line():
    for error in (torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), None):
        with pytest.raises(SystemExit, match="error: there is no memory left.*train.micro_batch"):
            with runs.one_line_errors():
                if error:
                    raise error
                torch.empty(10 ** 15)


def test_a_console_that_lacks_a_character_gets_its_number(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "cp1252")
    monkeypatch.setattr("sys.stdout", console)
    with runs.one_line_errors():
        print("\u72d7.jpg", flush=True)
    assert console.buffer.getvalue().strip() == b"\\u72d7.jpg"


# ---- checkpoints -------------------------------------------------------------------------------------------
@pytest.fixture
def copied(run_folder, tmp_path):
    """That folder, to be damaged."""
    return shutil.copytree(run_folder, tmp_path / "run")


def resume(out, *sets, recipe="grm"):
    return run_train("--backbone", "vit_micro", "--recipe", recipe, "--out", out, "--resume", "--set", *TINY,
                     "train.max_steps=3", *sets)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    path = tmp_path / "last.pt"
    runs.save(path, {"weights": torch.ones(10)}, tmp_path / "last.prev.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written") as error:
            runs.save(path, {"weights": torch.ones(10_000)}, tmp_path / "last.prev.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert one_line(str(error.value))
    assert len(torch.load(path, weights_only=True)["weights"]) == 10


def test_killed_between_two_renames_the_checkpoint_before_is_found(copied):
    (copied / "last.pt").unlink()
    assert runs.load_last(copied)["step"] == 2
    for rest in (b"cut", b""):
        (copied / "last.prev.pt").write_bytes(rest)
        with pytest.raises(UserError, match="last.prev.pt"):
            runs.load_last(copied)


def test_what_cannot_be_resumed_is_told(copied, tmp_path):
    assert one_line(resume(tmp_path / "none"), "error: --resume", "last.pt")
    settings = (copied / "config.yaml").read_bytes()
    for changed in "model.dim=16", "train.adapter_lr=0.1":
        assert one_line(resume(copied, changed), f"error: the settings do not fit '{copied}'")
    changed = ("train.batch_size=8", "train.seed=1", "data.val_split=shapes", "train.init=x.pt",
               "image.eval_size=96")
    assert one_line(resume(copied, *changed), f"error: '{copied}' was trained with train.init=null, "
                    "data.val_split=null, image.eval_size=null, train.batch_size=16, train.seed=0: ")
    assert (copied / "config.yaml").read_bytes() == settings           # as of the run that is there
    (copied / "last.prev.pt").unlink()
    shutil.copy(copied / "best.pt", copied / "last.pt")
    assert one_line(resume(copied), "last.pt' cannot be resumed")


def test_a_run_is_not_resumed_with_another_recipe(copied):
    before = (copied / "last.pt").read_bytes()
    assert one_line(resume(copied, recipe="paper"), "error: ", "was trained with recipe=\"grm\": repeat")
    assert (copied / "last.pt").read_bytes() == before


def test_last_alone_is_not_overwritten(run_folder, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(run_folder / "last.pt", tmp_path / "run")
    assert run_train("--backbone", "vit_micro", "--out", tmp_path / "run", "--set", *TINY,
                     "train.max_steps=1") is None
    kept = tmp_path / "run.1" / "last.pt"
    assert kept.read_bytes() == (run_folder / "last.pt").read_bytes()


def test_a_run_goes_on_where_last_alone_was_copied(copied):
    for sets, step in ((["train.max_steps=2"], 2), ([], 3)):               # finished, and to be gone on with
        (copied / "best.pt").unlink()
        assert resume(copied, *sets) is None and runs.load_checkpoint(copied / "best.pt")["step"] == step


def test_a_figure_has_a_machine_also_where_there_is_no_git(monkeypatch):
    assert runs.provenance()["machine"]
    monkeypatch.setenv("PATH", "")
    assert runs.provenance()["commit"] is None and runs.provenance()["machine"]


@pytest.mark.parametrize("content", ["text", "pickle", "torch", "other", "cut"])
def test_a_file_that_is_no_checkpoint_is_one_line_and_does_not_execute(content, run_folder, tmp_path):
    path, Bomb.path = tmp_path / "x.pt", tmp_path / "ran"
    if content == "torch":
        torch.save({"model": Bomb(), "config": {}, "tokenizer": {}, "text_config": {}}, path)
    elif content == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    else:
        path.write_bytes({"text": b"not a checkpoint", "pickle": pickle.dumps(Bomb(), 2),
                          "cut": (run_folder / "best.pt").read_bytes()[:5000]}[content])
    assert one_line(run_eval("--ckpt", path, "--split", "shapes"), "error: ", str(path))
    assert not Bomb.path.exists()


@pytest.mark.parametrize("change", ["a setting more", "a setting less", "no block"])
def test_a_checkpoint_of_another_version_is_one_line(change, copied):
    """The code before this one had no model.unit_tokens, no recipe, and other names in last.pt."""
    checkpoint = torch.load(copied / "last.pt", weights_only=True)
    model = checkpoint["config"]["model"]
    if change == "a setting more":
        model["unheard_of"] = 1
    elif change == "a setting less":
        del model["unit_tokens"]
    else:
        del checkpoint["config"]["model"]
    torch.save(checkpoint, copied / "best.pt")
    assert one_line(run_eval("--ckpt", copied / "best.pt", "--split", "shapes"), "another version")
    del checkpoint["config"]["image"]
    torch.save(checkpoint, copied / "best.pt")
    assert one_line(run_eval("--ckpt", copied / "best.pt", "--size", 96), "another version")


def test_a_run_of_the_code_before_is_not_resumed(copied):
    for name in ("last.pt", "last.prev.pt"):
        last = torch.load(copied / name, weights_only=True)
        last["random_state"] = last.pop("random_states")
        del last["config"]["recipe"]
        torch.save(last, copied / name)
    with pytest.warns(UserWarning, match="last.pt.*cannot be resumed"):
        assert one_line(resume(copied), "last.prev.pt' cannot be resumed", "another version")


def test_a_checkpoint_whose_weights_do_not_fit_is_one_line(copied):
    checkpoint = torch.load(copied / "best.pt", weights_only=True)
    checkpoint["model"]["image_proj.weight"] = torch.zeros(2, 2)
    torch.save(checkpoint, copied / "best.pt")
    assert one_line(run_eval("--ckpt", copied / "best.pt", "--split", "shapes"), "version", "image_proj")


@pytest.mark.parametrize("where, value, said", [
    ("tokenizer.tokenizer", "{}", "damaged"), ("tokenizer", [], "damaged"), ("config", [], "damaged"),
    ("config.model.dim", -1, "damaged"), ("model", [], "damaged"),
    ("config.image.options.checkpoint_path", "bomb.pt", "no checkpoint_path"),
    ("config.image.options.pretrained_cfg_overlay", {"file": "bomb.pt"}, "no pretrained_cfg_overlay"),
    ("text_config.attn_implementation", "somebody/code", "would be fetched")])
def test_no_entry_of_a_checkpoint_is_more_than_one_line_or_reads_other_files(where, value, said, copied,
                                                                             monkeypatch):
    monkeypatch.chdir(copied)
    Bomb.path = copied / "ran"
    torch.save(Bomb(), "bomb.pt")
    block = checkpoint = torch.load("best.pt", weights_only=True)
    *blocks, last = where.split(".")
    for key in blocks:
        block = block[key]
    block[last] = value
    torch.save(checkpoint, "best.pt")
    assert one_line(run_eval("--ckpt", "best.pt", "--split", "shapes"), said) and not Bomb.path.exists()
    if blocks == ["tokenizer"]:
        again = run_train("--backbone", "vit_micro", "--out", "new", "--set", *TINY, "train.init=best.pt")
        assert one_line(again, said)
