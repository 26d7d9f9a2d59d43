"""CLIP and SigLIP: tokens and the level glo are what timm and transformers themselves compute."""
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from test_text_families import CAPTIONS, save_folder

import data
import eval_grm
import runs
import train_grm
from conftest import CONFIG, TINY, run_train

IMAGES = {"clip": "vit_base_patch16_clip_quickgelu_224", "siglip": "vit_base_patch16_siglip_224"}
TEXTS = [*CAPTIONS, "dogs", *(f"{CAPTIONS[0]} {text}" for text in CAPTIONS), *CAPTIONS]


@pytest.fixture
def towers(request, tmp_path):
    """-> family, timm's model, transformers' model, and how the command line names both."""
    family = request.param
    torch.manual_seed(0)
    shape = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    image = timm.create_model(IMAGES[family], img_size=48, **shape).eval()
    for weight in image.parameters():                            # biases and the like start as zeros
        weight.data += 0.05 * torch.randn_like(weight)
    torch.save(image.state_dict(), tmp_path / "image.pth")
    save_folder(family, str(tmp_path / "text"))
    text = transformers.AutoModel.from_pretrained(tmp_path / "text", dtype=torch.float32).eval()
    sets = [f"image.name={IMAGES[family]}", f"image.options={shape}".replace("'", ""), "image.size=48",
            "image.pretrained=true", f"image.weights={tmp_path / 'image.pth'}", "text.pretrained=true",
            f"text.name={tmp_path / 'text'}", "model.joint=true", "loss.glo=0.4",
            f"model.dim={512 if family == 'clip' else 32}"]                        # CLIP's own
    return family, image, text, sets


@pytest.mark.parametrize("towers", ["clip", "siglip"], indirect=True)
def test_tokens_and_glo_are_those_of_the_libraries_alone(towers, tmp_path):
    family, image_model, text_model, sets = towers
    assert run_train("--backbone", "vit_micro", "--out", tmp_path / "run", "--set", *TINY, *sets,
                     "train.max_steps=1", "train.lr=1e-12") is None
    grm = eval_grm.load(tmp_path / "run" / "best.pt")
    assert grm.levels == ["ori", "key", "unc", "glo", "combined"]
    split = data.load_split("shapes", grm.config["datasets"], "").subset(slice(5))
    pictures = [split.load_image(i) for i in range(5)]
    images, texts = grm.encode_images(pictures), grm.encode_texts(TEXTS)

    with torch.no_grad():
        pixels = torch.stack([grm.transform(picture) for picture in pictures])
        pooled_images, hidden = image_model(pixels), image_model.forward_features(pixels)
        if family == "clip":
            patches = image_model.head(hidden[:, 1:])
        else:
            patches = torch.stack([image_model.attn_pool(hidden[:, l:l + 1]) for l in range(9)], 1)
        torch.testing.assert_close(images.tokens, F.normalize(patches, dim=-1), rtol=0, atol=1e-5)

        glo = grm.score(pictures, TEXTS, level="glo")
        for t, text in enumerate(TEXTS):
            ids = torch.tensor([grm.tokenizer(text)["input_ids"]])
            length = ids.shape[1]
            if family == "siglip":                               # as its processor pads
                ids = F.pad(ids, (0, text_model.config.text_config.max_position_embeddings - length),
                            value=grm.tokenizer.pad_token_id)
            output = text_model.get_text_features(ids)
            expected = F.cosine_similarity(pooled_images, output.pooler_output)
            torch.testing.assert_close(glo[:, t], expected, rtol=0, atol=1e-5)
            project = text_model.text_projection if family == "clip" else text_model.text_model.head
            words = F.normalize(project(output.last_hidden_state[0, :length]), dim=-1)
            torch.testing.assert_close(texts.tokens[t, :length], words, rtol=0, atol=1e-5)


@pytest.mark.parametrize("towers", ["clip"], indirect=True)
def test_glo_alone_is_zero_shot_retrieval_and_trains_like_any_level(towers, tmp_path):
    *_, sets = towers
    sets = [*TINY, *sets, "loss.ori=0", "loss.key=0", "loss.unc=0", "train.max_steps=2", "train.lr=1e-3"]
    assert run_train("--backbone", "vit_micro", "--out", tmp_path / "run", "--set", *sets) is None
    grm = eval_grm.load(tmp_path / "run" / "best.pt")
    pictures = [Image.new("RGB", (40, 60), colour) for colour in ("red", "blue")]
    glo = grm.score(pictures, CAPTIONS, level="glo")
    torch.testing.assert_close(grm.score(pictures, CAPTIONS), 0.4 * glo)


@pytest.mark.parametrize("towers", ["clip"], indirect=True)
def test_joint_encoders_learn_at_the_encoders_rate_with_their_projections(towers, tmp_path):
    *_, sets = towers
    config = runs.load_config(CONFIG, "vit_micro", sets=[*TINY, *sets, "train.encoder_lr=0.01", "train.lr=1"])
    run = train_grm.Run(config, tmp_path / "run", torch.device("cpu"), runs.Signals(), resume=False)
    slow = {id(p) for group in run.optimizer.param_groups if group["lr"] == 0.01 for p in group["params"]}
    parts = {name.split(".")[0] for name, p in run.model.named_parameters() if id(p) in slow}
    assert parts == {"image_encoder", "text_encoder", "image_proj", "text_proj"}


@pytest.mark.parametrize("sets, said", [
    (["model.joint=true"], "needs text.pretrained=true"), (["loss.glo=1"], "needs model.joint=true"),
    (["model.joint=true", "text.pretrained=true", "text.name=FOLDER"], "is a bert, must be one of clip")])
def test_encoders_that_share_no_space_are_refused_in_one_line(sets, said, tmp_path):
    if "text.name=FOLDER" in sets:
        save_folder("bert", str(tmp_path / "bert"))
    sets = [word.replace("FOLDER", str(tmp_path / "bert")) for word in sets]
    failure = run_train("--backbone", "vit_micro", "--out", tmp_path / "run", "--set", *TINY, *sets)
    assert said in failure and "\n" not in failure


@pytest.mark.parametrize("towers", ["clip"], indirect=True)
@pytest.mark.parametrize("name, options", [
    ("resnet10t", ""), ("vit_tiny_patch16_224", "global_pool: avg"),
    ("vit_base_patch16_siglip_224", "embed_dim: 32, depth: 1, num_heads: 2, num_classes: 512")])
def test_an_image_encoder_without_a_head_of_that_kind_is_refused_in_one_line(name, options, towers, tmp_path):
    failure = run_train("--backbone", "vit_micro", "--out", tmp_path / "x", "--set", *TINY, *towers[3],
                        f"image.name={name}", f"image.options={{{options}}}", "image.pretrained=false",
                        "image.weights=", *(["image.size=64"] if name == "resnet10t" else []))
    assert "the image encoder has no projection" in failure and "\n" not in failure


@pytest.mark.parametrize("towers", ["clip"], indirect=True)
def test_another_width_than_the_joint_spaces_is_refused_in_one_line(towers, tmp_path):
    failure = run_train("--backbone", "vit_micro", "--out", tmp_path / "x", "--set", *TINY, *towers[3],
                        "model.dim=16")
    assert "image encoder 512, text encoder 512" in failure and "\n" not in failure


@pytest.mark.parametrize("towers", ["clip"], indirect=True)
def test_autocast_leaves_glo_in_single_precision(towers, tmp_path):
    config = runs.load_config(CONFIG, "vit_micro", sets=[*TINY, *towers[3]])
    run = train_grm.Run(config, tmp_path / "run", torch.device("cpu"), runs.Signals(), resume=False)
    matcher = run.matcher()
    features = matcher.encode_images([Image.effect_noise((48, 48), 50)] * 2), matcher.encode_texts(CAPTIONS)
    expected = run.model.similarity(*features)["glo"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(run.model.similarity(*features)["glo"], expected)
