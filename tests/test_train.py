"""The training script: configurations, schedule, gradient caching, checkpoints, and errors of one line."""
import contextlib
import json
import shutil

import pytest
import torch
import transformers
import yaml

import checkpoints
import data
import eval_grm
import modules
import train_grm
from conftest import ROOT, TINY
from train_grm import ConfigError, learning_rate, load_config

CONFIG = str(ROOT / "configs.yaml")
BACKBONES = {"vit_b_224": 196, "vit_b_384": 576, "swin_b_224": 49, "swin_b_384": 144}
SHARED = ROOT.parent / "shared"


# ---------------------------------------------------------------------------------------------------------- configuration

def test_general_settings_give_way_to_special_ones():
    assert load_config(CONFIG, "vit_b_224")["train"]["batch_size"] == 256                   # the data set's
    assert load_config(CONFIG, "vit_b_224", "f30k")["train"]["batch_size"] == 128           # the default
    assert load_config(CONFIG, "vit_tiny", "coco")["train"]["batch_size"] == 64             # the backbone's
    assert load_config(CONFIG, "vit_tiny", sets=["train.batch_size=7"])["train"]["batch_size"] == 7
    assert load_config(CONFIG, "swin_b_384")["model"]["num_prompts"] == 50
    assert load_config(CONFIG, "vit_b_384", sets=["train.lr=3e-4"])["train"]["lr"] == 3e-4


@pytest.mark.parametrize("item, said", [
    ("train.learning_rate=1", "train.lr"), ("lr=1", "train.lr"), ("train=1", "train.lr"), ("train.lr", "key=value"),
    ("train.lr=fast", "float"), ("train.batch_size=0", "at least 1"), ("train.batch_size=true", "int"),
    ("train.lr=-1", "above 0"), ("loss.kind=hinge", "infonce, triplet"), ("data.epoch=all", "captions, images"),
    ("model.num_prompts=0", "at least 1"), ("model.text_keep=1", "between 0 and 1"), ("loss.kind=[", "YAML"),
    ("train.lr=null", "must have a value"), ("train.micro_batch=2.5", "whole number"), ("train.seed=-1", "at least 0"),
    ("image.optionsx=1", "image.options"), ("train.warmup=-0.1", "at least 0")])
def test_a_setting_that_cannot_be_names_what_can(item, said):
    with pytest.raises(ConfigError, match=said) as error:
        load_config(CONFIG, "vit_micro", sets=[item])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change, said", [
    ("defaults.train.lr=1e-4", None), ("backbones.vit_micro.train.lr=1e-4", None), ("backbones.vit_micro.image=", None),
    ("backbones.vit_micro.image=vit", "a block"), ("backbones.vit_micro=vit", "a block"), ("defaults.loss=", "unknown key"),
    ("backbones.vit_micro.train.save_minutes=0.5", None), ("defaults.train.max_steps=9", None), ("defaults.train.clip=2,0", "clip"),
    ("backbones.vit_micro.train.lr=fast", "not a float"), ("backbones.vit_micro.data=", "unknown data set")])
def test_what_the_file_says_is_checked_as_what_set_says(tmp_path, change, said):
    """YAML reads 1e-4, without a dot, as text, and an empty block as null."""
    content = yaml.safe_load((ROOT / "configs.yaml").read_text())
    (*path, last), value = change.split("=")[0].split("."), change.split("=")[1]
    block = content
    for key in path:
        block = block[key]
    block[last] = value or None
    (tmp_path / "configs.yaml").write_text(yaml.safe_dump(content))
    if said:
        with pytest.raises(ConfigError, match=said):
            load_config(tmp_path / "configs.yaml", "vit_micro")
    else:
        train = load_config(tmp_path / "configs.yaml", "vit_micro")["train"]
        assert isinstance(train["lr"], float) and ("vit_micro.train.lr" not in change or train["lr"] == 1e-4)


def test_unknown_names_list_the_valid_ones(script, tmp_path):
    assert "vit_b_224, vit_b_384, swin_b_224, swin_b_384, vit_tiny, vit_micro" in script("train", "--backbone", "vit_x")[0]
    assert "coco, f30k, f8k, shapes" in script("train", "--backbone", "vit_micro", "--data", "imagenet")[0]
    assert "cannot read" in script("train", "--backbone", "vit_micro", "--config", tmp_path / "none.yaml")[0]
    (tmp_path / "bad.yaml").write_text("a: [")
    assert "not YAML" in script("train", "--backbone", "vit_micro", "--config", tmp_path / "bad.yaml")[0]
    unknown = script("train", "--backbone", "vit_micro", "--set", *TINY, "image.name=vit_nano", "--out", tmp_path / "x")[0]
    assert unknown.startswith("error: image.name") and "\n" not in unknown


def test_without_data_the_error_says_what_to_get_and_what_works_without(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    failure, _ = script("train", "--backbone", "vit_b_224")
    assert failure.startswith("error: ") and "\n" not in failure
    assert "dataset_coco.json" in failure and "--backbone vit_micro" in failure
    assert not (tmp_path / "runs").exists()


def test_without_a_hub_the_error_says_what_to_get_and_what_works_without(script, coco_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    failure, _ = script("train", "--backbone", "vit_b_224", "--data-root", coco_folder, "--out", tmp_path / "run")
    assert failure.startswith("error: ") and "\n" not in failure and "text.name=" in failure
    failure, _ = script("train", "--backbone", "vit_b_224", "--data-root", coco_folder, "--out", tmp_path / "run",
                        "--set", "text.pretrained=false")
    assert failure.startswith("error: ") and "image.weights=PATH" in failure and "--backbone vit_micro" in failure
    assert "vit_base_patch16_224" in failure and "\n" not in failure
    failure, _ = script("train", "--backbone", "vit_b_224", "--data-root", coco_folder, "--out", tmp_path / "run",
                        "--set", "text.pretrained=false", "image.weights=nowhere.safetensors")
    assert "nowhere.safetensors" in failure


# --------------------------------------------------------------------------------------------------------------- the pieces

def test_the_rate_rises_then_falls_to_nothing():
    rates = [learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and max(rates) == 1
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[99] < 0.001
    assert learning_rate(0, 1, 0.1) == 1


def test_pretrained_encoders_learn_slower_and_vectors_do_not_decay(tiny_model):
    train = {"lr": 1.0, "encoder_lr": 0.1, "weight_decay": 0.5}
    groups = train_grm.parameter_groups(tiny_model, train, {"image_encoder": True, "text_encoder": False})
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(list(tiny_model.parameters()))
    assert found[id(tiny_model.image_encoder.blocks[0].attn.qkv.weight)] == (0.1, 0.5)
    assert found[id(tiny_model.image_encoder.blocks[0].attn.qkv.bias)] == (0.1, 0.0)
    assert found[id(tiny_model.image_proj.weight)] == (1.0, 0.5)
    assert found[id(tiny_model.text_encoder.embeddings.word_embeddings.weight)] == (1.0, 0.5)


def some_pairs(config, count):
    split = data.load_split("shapes_train", config["datasets"], "")
    tokenizer = data.load_tokenizer(None, split.texts)
    ids = data.tokenize(tokenizer, split.texts, 64)
    transform = data.image_transform(64, (0.5,) * 3, (0.5,) * 3, train=False)
    pairs = data.TrainPairs(split, ids, transform, tokenizer.mask_token_id, 0.0, 0.0)
    batch = data.Collate(tokenizer.pad_token_id)([pairs[i, 5 * i, i] for i in range(count)])
    return batch, tokenizer


def uncached_gradient(model, batch, loss, micro_batch, amp=contextlib.nullcontext()):
    """Of the batch encoded in the same parts as train_grm.gradients does, with the graph kept -> {name: gradient}."""
    with amp:
        parts = [model(*(batch[key][a:a + micro_batch] for key in ("images", "ids", "valid")))
                 for a in range(0, len(batch["ids"]), micro_batch)]
        image, text = (kind(*(torch.cat(x) for x in zip(*features))) for kind, features in
                       zip((modules.ImageFeatures, modules.TextFeatures), zip(*parts)))
        total = model.loss(image, text, batch["image_ids"], loss)[0]
    total.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradient_caching_gives_the_uncached_gradient_with_all_noise_replayed(tiny_config):
    """The uncached run encodes the same parts, in the same order, with the graph kept: dropout, Gumbel and sampling noise
    fall the same way, so only the caching differs."""
    batch, tokenizer = some_pairs(tiny_config, 12)
    torch.manual_seed(0)
    model = modules.build_grm(tiny_config, len(tokenizer), 0).train()

    torch.manual_seed(1)
    expected = uncached_gradient(model, batch, tiny_config["loss"], 5)
    model.zero_grad()
    torch.manual_seed(1)
    train_grm.gradients(model, batch, tiny_config["loss"], micro_batch=5)
    assert expected.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    difference = {name: p.grad - expected[name] for name, p in model.named_parameters() if p.grad is not None}
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    assert torch.stack([g.norm() for g in difference.values()]).norm() <= 1e-5 * whole
    for name, g in difference.items():
        assert g.norm() <= 1e-4 * expected[name].norm() + 1e-6 * whole, name


def test_a_model_learns_32_pairs_by_heart(tiny_config):
    batch, tokenizer = some_pairs(tiny_config, 32)
    tiny_config["model"]["dim"] = 64
    tiny_config["image"]["options"].update(patch_size=8, embed_dim=64, num_heads=4)
    torch.manual_seed(0)
    model = modules.build_grm(tiny_config, len(tokenizer), 0)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(300):
        model.train()
        optimizer.zero_grad()
        train_grm.gradients(model, batch, tiny_config["loss"], None)
        optimizer.step()
        if step % 25 == 24:
            model.eval()
            with torch.no_grad():
                scores = model.similarity(*model(batch["images"], batch["ids"], batch["valid"]))
            figures = eval_grm.recall_at_k(scores["combined"], torch.arange(32))
            if figures["i2t_r1"] == figures["t2i_r1"] == 100:
                return
    pytest.fail(f"after 300 steps: {figures}")


# ----------------------------------------------------------------------------------------------------------------- the runs

@pytest.mark.parametrize("backbone", [*BACKBONES, "vit_tiny", "vit_micro"])
def test_every_configuration_trains_a_step_and_evaluates(backbone, script, coco_folder, tmp_path, monkeypatch):
    """By the two commands, on a folder in COCO's shape, encoders at random: no weights are needed. Only the text encoder is
    cut down (one layer), which no configuration's shape depends on."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    options = ["image.pretrained=false", "text.pretrained=false", "text.options.num_hidden_layers=1",
               "train.batch_size=2", "train.max_steps=1", "data.workers=0"]
    failure, printed = script("train", "--backbone", backbone, "--data", "coco", "--set", *options)
    assert failure is None and "test rSum" in printed and "coco5k" in printed and "coco1k" in printed
    failure, printed = script("eval", "--ckpt", "best.pt", "--split", "coco5k", "--limit", 4)
    assert failure is None and "4 images, 20 captions" in printed
    model, _ = checkpoints.model_from_checkpoint(checkpoints.load_checkpoint(f"runs/{backbone}-coco/best.pt"))
    size = load_config(CONFIG, backbone)["image"]["size"]
    with torch.no_grad():
        tokens = model.encode_image(torch.zeros(1, 3, size, size)).tokens
    assert tokens.shape[1] == BACKBONES.get(backbone, tokens.shape[1])
    shutil.rmtree("runs")


def records(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_it_should(script, tmp_path):
    failure, printed = script("train", "--backbone", "vit_micro", "--out", tmp_path / "run", "--set", *TINY,
                              "train.epochs=1", "train.log_every=5")
    assert failure is None and "combined" in printed and "test rSum" in printed
    out = tmp_path / "run"
    assert {"best.pt", "last.pt", "metrics.jsonl", "config.yaml"} <= {p.name for p in out.iterdir()}
    step = records(out)[0]
    assert {"loss", "lr", "images_per_s", "loss_ori", "loss_key", "loss_unc", "loss_consistency", "loss_kl", "loss_entropy",
            "image_mask_mean", "image_mask_std", "text_mask_std", "region_cosine", "region_snr"} <= step.keys()
    assert any("val_rsum" in r for r in records(out)) and "test" in records(out)[-1]
    assert yaml.safe_load((out / "config.yaml").read_text())["model"]["dim"] == 32
    # a second run in the same place does not destroy the first
    script("train", "--backbone", "vit_micro", "--out", out, "--set", *TINY, "train.max_steps=1")
    assert (tmp_path / "run.1" / "best.pt").exists()


def test_without_a_test_part_the_table_is_of_the_validation_split(script, tmp_path):
    failure, printed = script("train", "--backbone", "vit_micro", "--out", tmp_path / "run", "--set", *TINY, "train.max_steps=1",
                              "datasets.shapes.splits={shapes_val: {part: val}, shapes_train: {part: train}}")
    assert failure is None and "no split that is its part 'test'" in printed and "validation rSum" in printed
    failure, _ = script("eval", "--ckpt", tmp_path / "run" / "best.pt")
    assert failure.startswith("error: data set 'shapes' has no split") and "\n" not in failure
    failure, _ = script("train", "--backbone", "vit_micro", "--out", tmp_path / "other", "--set", *TINY,
                        "datasets.shapes.splits={shapes_val: {part: val}}")
    assert failure.startswith("error: data set 'shapes' has no split that is its part 'train'")


def test_best_is_chosen_on_validation_and_the_table_is_of_best(script, tmp_path):
    out = tmp_path / "run"
    script("train", "--backbone", "vit_micro", "--out", out, "--set", *TINY, "train.epochs=3", "train.lr=0.005",
           "train.log_every=1000")
    values = {r["step"]: r["val_rsum"] for r in records(out) if "val_rsum" in r}
    assert all(r["train_seconds"] > 0 for r in records(out) if "val_rsum" in r)           # before the first log line, too
    best = checkpoints.load_checkpoint(out / "best.pt")
    assert len(values) == 3 and values[best["step"]] == max(values.values()) == best["best"]
    assert records(out)[-1]["step"] == best["step"]


def test_a_stopped_run_resumed_ends_with_the_same_weights(script, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch by the signal's own path, then resumed, against a run that was left alone."""
    settings = ["--set", *TINY, "train.epochs=2"]
    script("train", "--backbone", "vit_micro", "--out", tmp_path / "whole", *settings)
    import signal
    steps, real = [], train_grm.gradients
    def interrupted(*args):
        steps.append(1)
        if len(steps) == 6:
            signal.raise_signal(signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(train_grm, "gradients", interrupted)
    failure, _ = script("train", "--backbone", "vit_micro", "--out", tmp_path / "cut", *settings)
    assert "step 6" in failure and "--resume" in failure
    monkeypatch.setattr(train_grm, "gradients", real)
    failure, _ = script("train", "--backbone", "vit_micro", "--out", tmp_path / "cut", "--resume", *settings)
    assert failure is None
    whole, cut = (checkpoints.load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


@pytest.mark.parametrize("micro_batch", ["null", 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains(script, tmp_path, monkeypatch, dtype, micro_batch):
    """As on CUDA, whose context for a model is put around the CPU's: the loss of the first step is float32's but for rounding,
    and float16 has its scaler, whose first scale may overflow."""
    losses = []
    for amp in (False, True):
        with monkeypatch.context() as patched:
            patched.setattr(eval_grm, "amp_context", lambda *_, amp=amp: torch.autocast("cpu", dtype, enabled=amp))
            failure, _ = script("train", "--backbone", "vit_micro", "--out", tmp_path / str(amp), "--set", *TINY,
                                "train.log_every=1", "train.max_steps=6", f"train.micro_batch={micro_batch}")
        assert failure is None
        losses.append([r["loss"] for r in records(tmp_path / str(amp)) if "loss" in r])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.005)
    scaler = checkpoints.load_last(tmp_path / "True")["scaler"]
    assert bool(scaler) == (dtype == torch.float16)
    assert not scaler or scaler["scale"] >= 1 and scaler["_growth_tracker"] > 0            # the last step was taken


def test_a_run_goes_on_where_precision_and_devices_are_others(script, tmp_path, monkeypatch):
    """One without a scaler on a card that needs it; one that drew from a GPU on the CPU, with random numbers of its own."""
    command = "train", "--backbone", "vit_micro", "--out", tmp_path / "run", "--set", *TINY
    assert script(*command, "train.max_steps=2")[0] is None
    last = checkpoints.load_last(tmp_path / "run")
    assert not last["scaler"]
    torch.save(last | {"random_state": last["random_state"] * 2}, tmp_path / "run" / "last.pt")
    monkeypatch.setattr(eval_grm, "amp_context", lambda *_: torch.autocast("cpu", torch.float16))
    with pytest.warns(UserWarning, match="1 process on the GPU and has 1 process on the CPU now"):
        assert script(*command, "train.max_steps=4", "--resume")[0] is None
    last = checkpoints.load_last(tmp_path / "run")
    assert last["step"] == 4 and last["scaler"]["scale"] > 1


def test_a_gradient_that_stays_nan_is_not_the_scalers(script, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_grm, "amp_context", lambda *_: torch.autocast("cpu", torch.float16))
    real = train_grm.gradients

    def spoiled(model, *args):
        result = real(model, *args)
        model.text_proj.weight.grad[0, 0] = torch.nan
        return result
    monkeypatch.setattr(train_grm, "gradients", spoiled)
    failure, _ = script("train", "--backbone", "vit_micro", "--out", tmp_path / "run", "--set", *TINY, "train.epochs=10",
                        "train.val_every=10")
    assert failure.startswith("error: the gradient's norm is nan at step 22")             # 65536 = 2^16, and five in a row


def test_an_encoder_with_more_rows_than_words_comes_back(tiny_config, tmp_path):
    """Multilingual encoders have them: the checkpoint's own description counts, not the tokenizer."""
    folder = str(tmp_path / "bert")
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    transformers.BertModel(transformers.BertConfig(vocab_size=50, **shape)).save_pretrained(folder)
    tiny_config["text"] |= {"name": folder, "options": {}}
    encoder = modules.build_text_encoder(tiny_config["text"], True, 40, 0)
    again = modules.build_text_encoder(tiny_config["text"], False, 40, 0, encoder.config.to_dict())
    again.load_state_dict(encoder.state_dict())


@pytest.mark.parametrize("out", ["file", "file/below", "."])
def test_a_run_folder_that_cannot_be_made_is_one_line(script, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    failure, _ = script("train", "--backbone", "vit_micro", "--out", out, "--set", *TINY)
    assert failure.startswith("error: --out") and "\n" not in failure


def test_resume_without_a_run_says_so(script, tmp_path):
    failure, _ = script("train", "--backbone", "vit_micro", "--resume", "--out", tmp_path / "none", "--set", *TINY)
    assert failure.startswith("error: --resume") and "last.pt" in failure


def test_local_pretrained_weights_load_and_train_on_photographs(script, tmp_path):
    weights = SHARED / "weights"
    if not (SHARED / "data" / "flickr8k").exists() or not weights.exists():
        pytest.skip("the development photographs and weights (../shared) are not here")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "flickr8k").symlink_to(SHARED / "data" / "flickr8k")
    failure, printed = script(
        "train", "--backbone", "vit_tiny", "--data-root", tmp_path / "data", "--out", tmp_path / "run", "--set",
        f"image.weights={weights / 'vit_tiny_patch16_224' / 'model.safetensors'}", f"text.name={weights / 'minilm-l6'}",
        "train.batch_size=8", "train.max_steps=2", "data.val_split=f8k_val[:20]", "data.workers=1",
        "datasets.f8k.splits={f8k: {part: test}, f8k_val: {part: val}, f8k_train: {part: train}}")
    assert failure is None and "no test split" in printed
    model, _ = checkpoints.model_from_checkpoint(checkpoints.load_checkpoint(tmp_path / "run" / "best.pt"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}                        # the text weights are stored in fp16
