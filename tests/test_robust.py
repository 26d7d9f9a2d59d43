"""What goes wrong while a run lasts: signals, kills, damaged and hostile files, full disks, numbers that are not finite."""
import json
import pickle
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import checkpoints
import data
import eval_grm
import fuzz_data
import modules
import train_grm
from conftest import ROOT, TINY

RUN = ["--backbone", "vit_micro", "--set", *TINY, "datasets.shapes.scenes={train: 16, val: 12, test: 12}",
       "train.log_every=1", "train.epochs=2", "train.max_steps=7", "train.deterministic=true"]         # 5 steps an epoch


@pytest.fixture(scope="module", autouse=True)
def as_before():
    """train.deterministic is the process's."""
    yield
    torch.use_deterministic_algorithms(False)


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing disturbs."""
    out, argv = tmp_path_factory.mktemp("whole") / "run", sys.argv
    sys.argv = ["train_grm.py", "--config", str(ROOT / "configs.yaml"), *RUN[:2], "--out", str(out), *RUN[2:]]
    try:
        train_grm.main()
    finally:
        sys.argv = argv
    return out


@pytest.fixture
def copied(whole, tmp_path):
    """That folder, to be damaged."""
    return shutil.copytree(whole, tmp_path / "run")


def alike(a, b):
    """Equal weights, and metrics of the same steps with the same values."""
    first, second = (checkpoints.load_checkpoint(out / "last.pt") for out in (a, b))
    assert first["step"] == second["step"] == 7
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])
    assert [[(r["step"], r.get("loss"), r.get("val_rsum")) for r in records(out)] for out in (a, b)][0] == \
           [(r["step"], r.get("loss"), r.get("val_rsum")) for r in records(b)]


def signal_at(monkeypatch, module, name, call, number=signal.SIGTERM):
    """The signal arrives as the module's function is called for the `call`th time."""
    calls, real = [], getattr(module, name)

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            signal.raise_signal(number)
        return real(*args, **kwargs)
    monkeypatch.setattr(module, name, interrupted)


# ---------------------------------------------------------------------------------------------------------------- signals

@pytest.mark.parametrize("module, function, call, step", [
    (train_grm, "gradients", 3, 3), (eval_grm, "evaluate", 1, 5), (eval_grm, "encode_captions", 2, 7)],
    ids=["in a step", "in the first validation", "in the last validation"])
def test_a_signal_leaves_a_run_that_goes_on_exactly(whole, script, tmp_path, monkeypatch, module, function, call, step):
    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        signal_at(patched, module, function, call)
        failure, _ = script("train", *RUN[:2], "--out", out, *RUN[2:])
    assert f"stopped at step {step} of 7" in failure and "--resume" in failure and "\n" not in failure
    assert checkpoints.load_last(out)["step"] == step
    failure, _ = script("train", *RUN[:2], "--out", out, "--resume", *RUN[2:])
    assert failure is None
    alike(whole, out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_loading_ends_the_run_at_once(script, copied, monkeypatch, number):
    before, handlers = (copied / "last.pt").read_bytes(), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    signal_at(monkeypatch, data, "load_split", 1, number)
    failure, _ = script("train", *RUN[:2], "--out", copied, "--resume", *RUN[2:])
    assert "before the first step" in failure and "\n" not in failure
    assert (copied / "last.pt").read_bytes() == before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_killed_twice_and_resumed_a_run_ends_bit_equal():
    """tests/kill_and_resume.py, which can be run with more kills."""
    command = [sys.executable, ROOT / "tests" / "kill_and_resume.py", "--kills", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "equal to the bit" in done.stdout, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------ checkpoints

def test_a_damaged_last_pt_falls_back_to_the_one_before(whole, copied, script):
    """One byte among the weights, which torch.load itself does not notice."""
    content = bytearray((copied / "last.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (copied / "last.pt").write_bytes(content)
    with pytest.warns(UserWarning, match="last.pt.*going on from last.prev.pt"):
        failure, _ = script("train", *RUN[:2], "--out", copied, "--resume", *RUN[2:])
    assert failure is None
    alike(whole, copied)


def test_killed_between_two_renames_the_one_before_is_found(copied):
    (copied / "last.pt").unlink()
    assert checkpoints.load_last(copied)["step"] == 7
    for rest in (b"cut", b""):
        (copied / "last.prev.pt").write_bytes(rest)
        with pytest.raises(checkpoints.CheckpointError, match="last.prev.pt"):
            checkpoints.load_last(copied)


def test_best_pt_alone_cannot_be_resumed(copied):
    (copied / "last.prev.pt").unlink()
    shutil.copy(copied / "best.pt", copied / "last.pt")
    with pytest.raises(checkpoints.CheckpointError, match="cannot be resumed"):
        checkpoints.load_last(copied)


def test_a_lower_rate_holds_after_resuming(copied, script):
    script("train", *RUN[:2], "--out", copied, "--resume", *RUN[2:], "train.max_steps=8", "train.lr=1e-5", "train.warmup=0")
    last = records(copied)[-3]
    assert last["step"] == 8 and last["lr"] < 1e-5
    group = checkpoints.load_last(copied)["optimizer"]["param_groups"][0]
    assert group["peak"] == 1e-5 and group["lr"] < 1e-5


def test_resuming_with_another_model_is_one_line(copied, script):
    failure, _ = script("train", *RUN[:2], "--out", copied, "--resume", *RUN[2:], "model.dim=16")
    assert failure.startswith("error: --resume") and "do not fit" in failure and "\n" not in failure


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path):
    path = tmp_path / "last.pt"
    checkpoints.save(path, {"weights": torch.ones(10)}, tmp_path / "last.prev.pt")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(checkpoints.CheckpointError, match="cannot be written") as error:
            checkpoints.save(path, {"weights": torch.ones(10_000)}, tmp_path / "last.prev.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(error.value)
    assert len(torch.load(path, weights_only=True)["weights"]) == 10


def test_two_deterministic_runs_are_bit_equal_and_checkpoints_come_by_the_clock(whole, script, tmp_path, monkeypatch):
    saved, real = [], train_grm.save
    monkeypatch.setattr(train_grm, "save", lambda path, checkpoint, *rest: saved.append(checkpoint["step"]) or real(
        path, checkpoint, *rest))
    failure, _ = script("train", *RUN[:2], "--out", tmp_path / "run", *RUN[2:], "train.save_minutes=0")
    assert failure is None and set(saved) == set(range(8))
    alike(whole, tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------- numbers

def test_a_step_that_is_not_finite_is_skipped_and_named(script, tmp_path, monkeypatch):
    """An infinite gradient in step 2: the weights stay as they were, the run goes on."""
    weights, real = {}, train_grm.gradients

    def overflow(model, *args):
        result = real(model, *args)
        step = len(weights) + 1
        weights[step] = model.text_proj.weight.detach().clone()                           # as they are before the step
        if step == 2:
            model.text_proj.weight.grad[0, 0] = torch.inf
        return result
    monkeypatch.setattr(train_grm, "gradients", overflow)
    failure, printed = script("train", *RUN[:2], "--out", tmp_path / "run", *RUN[2:])
    assert failure is None and "step 2 is skipped: the gradient's norm is" in printed
    assert not torch.equal(weights[1], weights[2]) and torch.equal(weights[2], weights[3])
    assert weights[7].isfinite().all() and not torch.equal(weights[3], weights[4])
    skipped, = (r for r in records(tmp_path / "run") if "skipped" in r)
    assert skipped["step"] == 2 and len(skipped["images"]) == 16 and skipped["images"][0].startswith("train_")
    assert [r["skipped_steps"] for r in records(tmp_path / "run") if "loss" in r] == [0, 1, 1, 1, 1, 1]


def test_a_loss_that_stays_nan_ends_the_run_with_the_last_good_checkpoint(script, tmp_path):
    failure, _ = script("train", *RUN[:2], "--out", tmp_path / "run", *RUN[2:], "loss.temperature=1e-42",
                        "train.max_bad_steps=3")
    assert failure.startswith("error: the loss is nan at step 3") and "last.pt" in failure and "\n" not in failure
    last = checkpoints.load_last(tmp_path / "run")
    assert last["step"] == 0 and all(x.isfinite().all() for x in last["model"].values())
    assert sum("skipped" in r for r in records(tmp_path / "run")) == 3


# ----------------------------------------------------------------------------------------------------------------- images

def test_bad_images_are_replaced_counted_and_listed_if_asked(script, coco_folder, tmp_path):
    """Photographs that do not decode, met in a data-loading process."""
    bad = coco_folder / "coco" / "train2014" / "1.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    command = ["train", "--backbone", "vit_micro", "--data", "coco", "--data-root", coco_folder]
    settings = ["--set", *TINY, "train.batch_size=5", "train.epochs=1", "data.workers=1"]
    failure, printed = script(*command, "--out", tmp_path / "run", *settings, "data.skip_bad_images=true")
    assert failure is None and "1 images could not be read, and others took their place: train2014/1.jpg" in printed
    assert [r["bad_images"] for r in records(tmp_path / "run") if "bad_images" in r] == [["train2014/1.jpg"]]
    failure, _ = script(*command, "--out", tmp_path / "stops", *settings)
    assert failure.startswith("error: ") and str(bad) in failure and "\n" not in failure


def pairs(folder, count, skip_bad):
    for n in range(count):
        Image.new("RGB", (8, 8), (n, n, n)).save(folder / f"{n}.png")
    split = data.FileSplit("mine", [f"{n}.png" for n in range(count)], [["a", "b"]] * count, folder)
    transform = data.image_transform(8, (0.0,) * 3, (1.0,) * 3, train=False)
    ids = [np.array([1, text, 2], np.int32) for text in range(2 * count)]
    return data.TrainPairs(split, ids, transform, None, 0.0, 0.0, skip_bad=skip_bad)


def test_the_replacement_is_the_seeds_and_a_whole_pair(tmp_path):
    items = pairs(tmp_path, 20, skip_bad=True)
    (tmp_path / "3.png").unlink()                                                          # after the files were looked for
    found = [items[3, 6, seed] for seed in range(30)]
    for pixels, ids, image in found:
        assert image != 3 and ids[1] // 2 == image and (pixels * 255).round().eq(image).all()
    assert len({image for _, _, image in found}) > 10
    assert [image for _, _, image in found] == [items[3, 6, seed][2] for seed in range(30)]
    assert items.bad.nonzero().tolist() == [[3]]


def test_an_image_that_vanishes_names_itself_also_if_too_many_do(tmp_path):
    items = pairs(tmp_path, 3, skip_bad=False)
    (tmp_path / "2.png").unlink()
    with pytest.raises(data.DataError, match="2.png"):
        items[2, 4, 0]
    items = pairs(tmp_path, 3, skip_bad=True)
    for n in range(3):
        (tmp_path / f"{n}.png").unlink()
    with pytest.raises(data.DataError, match=r"\.png"):
        items[2, 4, 0]


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1), (20_000, 40)])
def test_images_of_any_shape_are_trained_on(tmp_path, size):
    Image.new("RGB", size, (9, 9, 9)).save(tmp_path / "0.jpg")
    split = data.FileSplit("mine", ["0.jpg"], [["a"]], tmp_path)
    for train in (False, True):
        pixels = data.image_transform(32, (0.0,) * 3, (1.0,) * 3, train)(split.load_image(0, 32))
        assert pixels.shape == (3, 32, 32) and (pixels * 255 - 9).abs().max() < 3


def test_an_image_that_would_run_a_program_is_refused(tmp_path):
    """Pillow hands EPS to Ghostscript."""
    Image.new("RGB", (8, 8)).save(tmp_path / "0.jpg", "EPS")
    with pytest.raises(data.DataError, match="cannot identify"):
        data.FileSplit("mine", ["0.jpg"], [["a"]], tmp_path).load_image(0)


def test_a_small_gz_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    import gzip
    monkeypatch.setattr(data, "MAX_JSON", 1000)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(b"[" + b" " * 5000 + b"]"))
    with pytest.raises(data.DataError, match="more than 1,000 bytes"):
        data.load_split("mine", {"mine": {"annotations": "a.json", "images": "."}}, tmp_path)


# --------------------------------------------------------------------------------------------------------------- captions

ODD = {"long": "word " * 600, "emoji": "a \U0001f415 on a \U0001f6f9\U0001f3fd",
       "right to left": "כלב רץ \u202e על הדשא", "invisible": "\u200b\u0000", "unspaced": "x" * 5000,
       "combining": "a\u0301" * 300}


@pytest.mark.parametrize("caption", ODD.values(), ids=list(ODD))
def test_odd_captions_are_encoded(tiny_model, caption):
    tokenizer = data.build_tokenizer(["a dog on a word"])
    ids, = data.tokenize(tokenizer, [caption], 64)
    assert 2 <= len(ids) <= 64 and ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id
    for new in (ids, data.augment_tokens(ids, np.random.default_rng(0), 0.9, 0.1, tokenizer.mask_token_id)):
        features = tiny_model.encode_text(*data.pad([new], tokenizer.pad_token_id))
        assert all(x.isfinite().all() for x in (features.tokens, features.mask))


# ---------------------------------------------------------------------------------------------------------- hostile files

class Bomb:
    def __reduce__(self):
        import os
        return os.mkdir, (str(Bomb.path),)


def test_encoder_weights_that_would_run_code_do_not(tiny_config, tmp_path):
    Bomb.path = tmp_path / "ran"
    tiny_config["image"] |= {"pretrained": True, "weights": str(tmp_path / "image.pth")}
    for write in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        write({"state_dict": Bomb()}, tmp_path / "image.pth")
        with pytest.raises(modules.ModelError) as error:
            modules.build_grm(tiny_config, 120, 0)
        assert "\n" not in str(error.value) and not Bomb.path.exists()


def test_a_text_encoders_folder_that_would_run_code_does_not(tmp_path):
    Bomb.path, folder = tmp_path / "ran", tmp_path / "bert"
    folder.mkdir()
    config = {"model_type": "bert", "architectures": ["BertModel"], "hidden_size": 32, "num_hidden_layers": 1,
              "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    settings = {"name": str(folder), "options": {}}
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"embeddings.word_embeddings.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(modules.ModelError) as error:
        modules.build_text_encoder(settings, True, 50, 0)
    assert "\n" not in str(error.value) and not Bomb.path.exists()
    # and a folder that brings its own model code
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mine", "auto_map": {
        "AutoConfig": "mine.Mine", "AutoModel": "mine.Mine", "AutoTokenizer": ["mine.Mine", None]}}))
    (folder / "mine.py").write_text(f"import os\nos.mkdir({str(Bomb.path)!r})\nclass Mine: pass\n")
    with pytest.raises(modules.ModelError) as error:
        modules.build_text_encoder(settings, True, 50, 0)
    with pytest.raises(data.DataError):
        data.load_tokenizer(str(folder))
    assert "\n" not in str(error.value) and not Bomb.path.exists()


def test_yaml_that_would_run_code_does_not(tmp_path):
    path = tmp_path / "configs.yaml"
    path.write_text(f"defaults: !!python/object/apply:os.mkdir [{tmp_path / 'ran'}]\n")
    with pytest.raises(train_grm.ConfigError, match="not YAML"):
        train_grm.load_config(str(path), "vit_micro")
    assert not (tmp_path / "ran").exists()


def test_a_few_hundred_damaged_files_end_well(tmp_path):
    """tests/fuzz_data.py, which can be run with more cases."""
    counts = fuzz_data.fuzz(400, 1, tmp_path)
    assert all(count > 10 for count in counts.values()), counts
