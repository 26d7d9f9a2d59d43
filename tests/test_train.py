"""train_grm.py: the steps, and whole runs of both recipes, from their first line to their table."""
import contextlib
import json
import shutil

import pytest
import torch
import yaml
from conftest import CONFIG, SHARED, TINY, records, run_eval, run_train, signal_at

import data
import encoders
import eval_grm
import gradients
import modules
import runs
import train_grm

INPUTS = ("images", "ids", "valid", "words")                           # of a model, as a batch names them


def micro(out, *more, sets=()):
    """train_grm.py on the tiny vit_micro -> its exit message."""
    return run_train("--backbone", "vit_micro", "--out", out, *more, "--set", *TINY, *sets)


# ---- the pieces --------------------------------------------------------------------------------------------
def test_without_milestones_the_rate_rises_then_falls_to_nothing():
    rates = [train_grm.learning_rate(step, 100, 0.1) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1 and max(rates) == 1
    assert rates[55] == pytest.approx(0.5)                     # half a cosine, half of it done
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[99] < 0.001
    assert train_grm.learning_rate(0, 1, 0.1) == 1


def test_the_papers_rate_falls_to_three_tenths_at_epochs_9_15_20_and_25_of_30():
    milestones = runs.load_config(CONFIG, "vit_b_224")["train"]["milestones"]
    rates = [train_grm.learning_rate(10 * epoch + 5, 300, 0.0, milestones) for epoch in range(30)]
    assert rates == pytest.approx([1] * 9 + [0.3] * 6 + [0.09] * 5 + [0.027] * 5 + [0.0081] * 5)


def test_adapters_and_pretrained_encoders_have_their_rates_and_vectors_do_not_decay(tiny_model):
    train = {"lr": 1.0, "encoder_lr": 0.1, "adapter_lr": 0.2, "weight_decay": 0.5}
    groups = train_grm.parameter_groups(tiny_model, train, {"image_encoder": True, "text_encoder": False})
    found = {id(p): (g["peak"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(found) == len(list(tiny_model.parameters()))
    attention = tiny_model.image_encoder.timm.blocks[0].attn.qkv
    assert found[id(attention.weight)] == (0.1, 0.5) and found[id(attention.bias)] == (0.1, 0.0)
    assert found[id(tiny_model.image_proj.weight)] == (1.0, 0.5)
    assert found[id(tiny_model.text_adapter.hidden.weight)] == (0.2, 0.5)
    assert found[id(tiny_model.text_encoder.hugging.get_input_embeddings().weight)] == (1.0, 0.5)


def some_pairs(config, items):
    """-> a batch of training pairs (image, caption) of scenes, without augmentation; the tokeniser."""
    split = data.load_split("shapes_train", config["datasets"], "")
    tokenizer = encoders.load_tokenizer(None, split.texts)
    captions = data.tokenize(tokenizer, split.texts, 64)
    transform = data.image_transform(64, (0.5,) * 3, (0.5,) * 3)
    pairs = data.TrainPairs(split, captions, transform, config["augment"] | {"flip": 0.0}, tokenizer, {})
    return data.collate([pairs[image, text, 0] for image, text in items], tokenizer.pad_token_id), tokenizer


DEEPER = ["image.options={patch_size: 16, embed_dim: 32, depth: 2, num_heads: 2}",
          "text.options={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2}"]


def built(recipe, pairs, *sets, device="cpu"):
    """-> a model of that recipe in training mode, a batch of so many pairs, and its loss."""
    config = runs.load_config(CONFIG, "vit_micro", recipe, sets=[*TINY, *sets])
    batch, tokenizer = some_pairs(config, [(i, 5 * i) for i in range(pairs)])
    torch.manual_seed(0)
    model = modules.build_grm(config, len(tokenizer), 0).to(device)

    def loss(image, text, image_ids):
        return model.loss(image, text, image_ids, config["loss"])
    return model.train(), {key: value.to(device) for key, value in batch.items()}, loss


def gradients_with_and_without_caching(model, batch, loss, part, amp):
    """{name: gradient}, with the graph of all parts kept, and by `gradients`; same noise, same parts."""
    torch.manual_seed(1)
    with amp:
        encoded = [model(*(batch[key][a:a + part] for key in INPUTS))
                   for a in range(0, len(batch["ids"]), part)]
        image, text = (kind(*(torch.cat(x) for x in zip(*features))) for kind, features in
                       zip((modules.ImageFeatures, modules.TextFeatures), zip(*encoded)))
        total = loss(image, text, batch["image_ids"])[0]
    total.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.manual_seed(1)
    gradients.gradients(model, batch, loss, part, amp)
    return expected, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_compiled_layers_give_the_same_gradient_and_keep_their_names(recipe):
    model, batch, loss = built(recipe, 6, *DEEPER)
    names, found = list(model.eval().state_dict()), []
    for compile_it in (False, True):
        if compile_it:
            gradients.compile_encoders(model, backend="aot_eager")
        model.zero_grad()
        gradients.gradients(model, batch, loss, None)
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert distance(found[1], found[0]) <= 1e-5 and list(model.state_dict()) == names
    compiled = [name for name, module in model.named_modules() if module._compiled_call_impl]
    assert len(compiled) == 4 and all(name.endswith((".0", ".1")) for name in compiled)


def distance(got, expected):
    """||got - expected|| / ||expected|| over all tensors."""
    got, expected = (torch.cat([x.flatten().double().cpu() for x in tensors]) for tensors in (got, expected))
    return ((got - expected).norm() / expected.norm()).item()


def test_gradient_caching_gives_the_uncached_gradient_with_all_noise_replayed(recipe):
    """Dropout, Gumbel and sampling noise fall the same way in both, so only the caching differs."""
    expected, got = gradients_with_and_without_caching(*built(recipe, 12), 5, contextlib.nullcontext())
    assert expected.keys() == got.keys()
    assert distance(got.values(), expected.values()) <= 1e-5
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, g in expected.items():
        assert (got[name] - g).norm() <= 1e-4 * g.norm() + 1e-6 * whole, name


def test_a_model_learns_32_pairs_by_heart():
    model, batch, loss = built("grm", 32, "image.options.patch_size=8", "image.options.embed_dim=64",
                               "image.options.num_heads=4", "model.dim=64")
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(300):
        model.train()
        optimizer.zero_grad()
        gradients.gradients(model, batch, loss, None)
        optimizer.step()
        if step % 25 == 24:
            model.eval()
            with torch.no_grad():
                scores = model.similarity(*model(*(batch[key] for key in INPUTS)))
            figures = eval_grm.recall_at_k(scores["combined"], torch.arange(32))
            if figures["i2t_r1"] == figures["t2i_r1"] == 100:
                return
    pytest.fail(f"after 300 steps: {figures}")


# ---- every backbone and recipe -----------------------------------------------------------------------------
@pytest.fixture
def without_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.chdir(tmp_path)


SLOW = pytest.mark.slow
SHALLOW = {"vit_b_224": ["image.options.depth=1"], "swin_b_224": ["image.options.depths=[1, 1, 1, 1]"],
           "vit_tiny": ["image.options.depth=1"]}              # one layer a stage: no shape depends on it


@pytest.mark.filterwarnings("ignore:tokenizer .* cannot be loaded")
@pytest.mark.parametrize("backbone, tokens", [
    ("vit_b_224", 196), ("swin_b_224", 49), ("vit_tiny", 49), ("vit_micro", 64),
    pytest.param("vit_b_384", 576, marks=SLOW), pytest.param("swin_b_384", 144, marks=SLOW)])
def test_every_backbone_trains_a_step_and_evaluates(backbone, tokens, recipe, coco_folder, without_hub,
                                                    capsys):
    """By the two commands, on a folder in COCO's shape, encoders at random: no weights are needed."""
    sets = ["image.pretrained=false", "text.pretrained=false", "text.options.num_hidden_layers=1",
            "train.batch_size=2", "train.max_steps=1", "data.workers=0", *SHALLOW.get(backbone, [])]
    assert run_train("--backbone", backbone, "--recipe", recipe, "--data", "coco", "--set", *sets) is None
    assert run_eval("--ckpt", "best.pt", "--split", "coco5k", "--limit", 4) is None
    printed = capsys.readouterr().out
    assert "on coco5k: 5 images, 25 captions" in printed
    assert "test rSum" in printed and f"checkpoint: runs/{backbone}-coco/best.pt" in printed
    assert "4 images, 20 captions" in printed
    model, _ = runs.model_from_checkpoint(runs.load_checkpoint(f"runs/{backbone}-coco/best.pt"))
    size = runs.load_config(CONFIG, backbone)["image"]["size"]
    with torch.no_grad():
        image = model.encode_image(torch.zeros(1, 3, size, size))
    assert image.tokens.shape[1] == model.class_tokens + tokens
    shutil.rmtree("runs")


@pytest.mark.filterwarnings("ignore:tokenizer .* cannot be loaded")
def test_without_data_or_hub_the_error_says_what_to_get_and_what_works(coco_folder, without_hub, tmp_path):
    def fails(*argv):
        failure = run_train("--backbone", "vit_b_224", *argv)
        assert failure.startswith("error: ") and "\n" not in failure
        return failure
    without_data = fails("--data-root", "nowhere")
    assert "dataset_coco.json" in without_data and "--backbone vit_micro" in without_data
    assert not (tmp_path / "runs").exists()
    command = "--data-root", coco_folder, "--out", tmp_path / "run"
    assert "text.name=" in fails(*command)
    failure = fails(*command, "--set", "text.pretrained=false")
    for words in ("vit_base_patch16_224", "image.weights=PATH", "--backbone vit_micro"):
        assert words in failure
    assert "nowhere.pth" in fails(*command, "--set", "text.pretrained=false", "image.weights=nowhere.pth")


# ---- runs --------------------------------------------------------------------------------------------------
def same_run(one, other):
    """Equal weights, state and metrics, but for what the clock says."""
    for name in ("last.pt", "best.pt"):
        a, b = (runs.load_checkpoint(out / name) for out in (one, other))
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])
        assert all(a[key] == b[key] for key in ("step", "best", "config", "tokenizer"))
    clocks = {"images_per_s", "train_seconds"}
    lines = [[{key: value for key, value in record.items() if key not in clocks} for record in records(out)]
             for out in (one, other)]
    assert lines[0] == lines[1]


def test_a_stopped_run_goes_on_to_the_very_end_of_one_left_alone(recipe, tmp_path):
    """Stopped by a signal in the middle of an epoch, resumed, and evaluated."""
    command, sets = ("--recipe", recipe), ["train.epochs=1", "train.log_every=1"]
    assert micro(tmp_path / "whole", *command, sets=sets) is None
    with signal_at(train_grm, "gradients", 6):
        failure = micro(tmp_path / "cut", *command, sets=sets)
    assert "stopped at step 6 of 20" in failure and "--resume" in failure and "\n" not in failure
    assert runs.load_last(tmp_path / "cut")["step"] == 6
    assert micro(tmp_path / "cut", *command, "--resume", sets=sets) is None
    same_run(tmp_path / "whole", tmp_path / "cut")
    assert run_eval("--ckpt", tmp_path / "cut" / "best.pt", "--out", tmp_path) is None
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["levels"] == records(tmp_path / "cut")[-1]["test"] and report["recipe"] == recipe


def test_a_run_leaves_what_it_should(tmp_path, capsys):
    out = tmp_path / "run"
    assert micro(out, sets=["train.epochs=1", "train.log_every=5"]) is None
    printed = capsys.readouterr().out
    assert "combined" in printed and "test rSum" in printed
    files = ["best.pt", "config.yaml", "last.prev.pt", "last.pt", "lock", "metrics.jsonl"]
    assert sorted(path.name for path in out.iterdir()) == files
    step = records(out)[0]
    assert {"loss", "lr", "images_per_s", "loss_ori", "loss_key", "loss_unc", "loss_consistency", "loss_kl",
            "loss_entropy", "image_mask_mean", "image_mask_std", "text_mask_std",
            "region_cosine"} <= step.keys()
    assert any("val_rsum" in r for r in records(out)) and "test" in records(out)[-1]
    assert yaml.safe_load((out / "config.yaml").read_text())["model"]["dim"] == 32
    # A second run in the same place does not destroy the first.
    assert micro(out, sets=["train.max_steps=1"]) is None
    assert (tmp_path / "run.1" / "best.pt").exists() and len(records(out)) < len(records(tmp_path / "run.1"))


def test_best_is_chosen_on_validation_and_the_table_is_of_best(tmp_path):
    micro(tmp_path, sets=["train.epochs=3", "train.lr=0.005", "train.log_every=1000", "train.val_every=1",
                          "datasets.shapes.scenes={train: 16, val: 24, test: 12}"])
    values = {r["step"]: r["val_rsum"] for r in records(tmp_path) if "val_rsum" in r}
    assert all(r["train_seconds"] > 0 for r in records(tmp_path) if "val_rsum" in r)
    best = runs.load_checkpoint(tmp_path / "best.pt")
    assert list(values) == [5, 10, 15] and values[best["step"]] == max(values.values()) == best["best"]
    assert records(tmp_path)[-1]["step"] == best["step"]


def test_without_a_test_part_the_table_is_of_the_validation_split(tmp_path, capsys):
    parts = "datasets.shapes.splits={shapes_val: {part: val}, shapes_train: {part: train}}"
    assert micro(tmp_path / "run", sets=["train.max_steps=1", parts]) is None
    printed = capsys.readouterr().out
    assert "no test split (data set 'shapes' has no split of part 'test'" in printed
    assert "validation rSum" in printed
    failure = run_eval("--ckpt", tmp_path / "run" / "best.pt")
    assert failure.startswith("error: data set 'shapes' has no split of part 'test'") and "\n" not in failure
    failure = micro(tmp_path / "other", sets=["datasets.shapes.splits={shapes_val: {part: val}}"])
    assert failure.startswith("error: data set 'shapes' has no split of part 'train'")


def test_validation_images_may_be_those_of_another_data_set(tmp_path):
    sets = ["datasets.shapes.splits={shapes: {part: test}, shapes_train: {part: train}}", "train.max_steps=1",
            "datasets.other={kind: shapes, size: 64, seed: 1, scenes: {val: 24}}", "data.val_split=other_val"]
    assert micro(tmp_path, sets=sets) is None
    assert "other_val" in [record.get("val_split") for record in records(tmp_path)]


def test_a_run_starts_from_the_weights_of_another(run_folder, tmp_path):
    """At no rate it keeps its weights and its words, whatever the captions; resumed, it does not need it."""
    start = shutil.copy(run_folder / "best.pt", tmp_path / "start.pt")
    sets = [f"train.init={start}", "datasets.shapes.seed=5", "image.pretrained=true", "train.lr=1e-30"]
    for more, said in (("image.size=70", "'vit_tiny_patch16_224' ignores"),
                       ("model.dim=64", "the settings do not fit"),
                       ("text.name=bert", f"'{start}' was trained with text.name=null: repeat")):
        failure = micro(tmp_path / "other", sets=[*sets, more])
        assert failure.startswith(f"error: {said}") and "\n" not in failure
    assert micro(tmp_path / "run", sets=[*sets, "train.max_steps=2"]) is None
    one, other = (runs.load_checkpoint(path) for path in (start, tmp_path / "run" / "best.pt"))
    assert one["tokenizer"] == other["tokenizer"] and other["config"]["train"]["init"] == str(start)
    assert all(torch.equal(one["model"][name], weight) for name, weight in other["model"].items())
    start.unlink()
    assert micro(tmp_path / "run", "--resume", sets=[*sets, "train.max_steps=3"]) is None
    failure = micro(tmp_path / "none", sets=sets)
    assert failure.startswith(f"error: no such checkpoint: '{start}'") and not (tmp_path / "none").exists()


@pytest.mark.parametrize("out", ["file", "file/below", "."])
def test_a_run_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    for name in ("file", "metrics.jsonl"):
        (tmp_path / name).write_text("")
    failure = micro(out)
    assert failure.startswith("error: --out") and "\n" not in failure


# ---- mixed precision ---------------------------------------------------------------------------------------
@pytest.fixture
def precision(monkeypatch):
    """precision(dtype): runs use that autocast, and fp16 its scaler, on the CPU, as they do on CUDA."""
    real = train_grm.Run.build_model

    def use(dtype):
        def build_model(run, last):
            real(run, last)
            run.amp = torch.autocast("cpu", dtype)
            run.scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
        monkeypatch.setattr(train_grm.Run, "build_model", build_model)
        monkeypatch.setattr(runs, "amp_context", lambda *_: torch.autocast("cpu", dtype))
    return use


@pytest.mark.parametrize("recipe, dtype, micro_batch", [
    ("paper", torch.bfloat16, "null"), ("grm", torch.bfloat16, 5), ("paper", torch.float16, 5),
    ("grm", torch.float16, "null")])
def test_mixed_precision_trains(tmp_path, precision, recipe, dtype, micro_batch):
    """The first loss is float32's but for rounding. The scaler of fp16 lowers its scale until it fits."""
    losses, sets = [], ["train.log_every=1", "train.max_steps=6", f"train.micro_batch={micro_batch}"]
    for name in ("full", "half"):
        if name == "half":
            precision(dtype)
        assert micro(tmp_path / name, "--recipe", recipe, sets=sets) is None
        losses.append([r["loss"] for r in records(tmp_path / name) if "loss" in r])
    assert losses[1][0] == pytest.approx(losses[0][0], rel=0.005) and losses[1][0] != losses[0][0]
    scaler = runs.load_last(tmp_path / "half")["scaler"]
    assert bool(scaler) == (dtype == torch.float16)
    if scaler:  # a step that overflows halves the scale, any other is counted; some of the six were taken
        assert scaler["scale"] > 2.0 ** (16 - 6)
        assert scaler["scale"] < 2.0 ** 16 or scaler["_growth_tracker"] == 6


def test_a_run_goes_on_where_precision_and_devices_are_others(tmp_path, precision):
    """Without a scaler, then where one is needed; on a GPU, then on the CPU with other random numbers."""
    assert micro(tmp_path, sets=["train.max_steps=2"]) is None
    last = runs.load_last(tmp_path)
    assert not last["scaler"]
    torch.save(last | {"random_states": [2 * last["random_states"][0]]}, tmp_path / "last.pt")
    precision(torch.float16)
    with pytest.warns(UserWarning, match=r"1 process\(es\) with 1 GPU\(s\) each, now 1 with 0"):
        assert micro(tmp_path, "--resume", sets=["train.max_steps=4"]) is None
    last = runs.load_last(tmp_path)
    assert last["step"] == 4 and last["scaler"]["scale"] > 1


def test_a_gradient_that_stays_nan_is_not_the_scalers(tmp_path, precision, monkeypatch):
    precision(torch.float16)
    real = train_grm.gradients

    def spoiled(model, *args):
        result = real(model, *args)
        model.text_proj.weight.grad[0, 0] = torch.nan
        return result
    monkeypatch.setattr(train_grm, "gradients", spoiled)
    failure = micro(tmp_path, sets=["train.epochs=10", "train.val_every=10"])
    # The scale sinks from 2^16 to below 1, and then come five in a row.
    assert failure.startswith("error: the gradient's norm is nan at step 22")


# ---- pretrained weights ------------------------------------------------------------------------------------
def test_local_pretrained_weights_train_stop_and_resume_on_photographs(recipe, tmp_path):
    weights, photographs = SHARED / "weights", SHARED / "data" / "flickr8k"
    if not photographs.exists() or not weights.exists():
        pytest.skip("the development photographs and weights (../shared) are not here")
    entries = json.loads((photographs / "dataset_flickr8k.json").read_text())["images"]
    some = [entry for part in ("train", "val") for entry in [e for e in entries if e["split"] == part][:20]]
    (tmp_path / "flickr8k").mkdir()
    (tmp_path / "flickr8k" / "dataset_flickr8k.json").write_text(json.dumps({"images": some}))
    (tmp_path / "flickr8k" / "images").symlink_to(photographs / "images")

    def train(out, *more):
        return run_train(
            "--backbone", "vit_tiny", "--recipe", recipe, "--data-root", tmp_path, "--out", tmp_path / out,
            *more, "--set", f"image.weights={weights / 'vit_tiny_patch16_224' / 'model.safetensors'}",
            f"text.name={weights / 'minilm-l6'}", "train.batch_size=8", "train.max_steps=2",
            "train.log_every=1", "data.workers=1")
    assert train("whole") is None
    with signal_at(train_grm, "gradients", 1):
        assert "step 1 of 2" in train("cut")
    assert train("cut", "--resume") is None
    same_run(tmp_path / "whole", tmp_path / "cut")
    last = runs.load_last(tmp_path / "cut")
    model, _ = runs.model_from_checkpoint(last)
    assert {p.dtype for p in model.parameters()} == {torch.float32}    # the text weights are stored in fp16
    peaks = sorted({group["peak"] for group in last["optimizer"]["param_groups"]})
    assert peaks == pytest.approx({"paper": [1e-4, 2e-3], "grm": [1e-4, 4e-4, 4e-3]}[recipe])
