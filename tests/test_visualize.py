"""The pictures: what is drawn is what the model computed, and what cannot be drawn is answered in one line."""
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import data
import grounding
import modules
import visualize_grm
from visualize_grm import Example, colours, draw, explain, find_word


@pytest.fixture
def tokenizer():
    return data.build_tokenizer(["a red circle is left of an uncommon blue square , here"])


@pytest.fixture
def checkpoint(tiny_model, tiny_config, tmp_path):
    """An untrained model and a vocabulary of its size, as train_grm.py would save them."""
    split = data.load_split("shapes", tiny_config["datasets"], "")
    tokenizer = data.build_tokenizer(split.texts)
    model = modules.build_grm(tiny_config, len(tokenizer), tokenizer.pad_token_id)
    torch.save({"model": model.state_dict(), "config": tiny_config, "tokenizer": data.tokenizer_state(tokenizer),
                "text_config": model.text_encoder.config.to_dict()}, tmp_path / "x.pt")
    return tmp_path / "x.pt"


def visualize(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["visualize_grm.py", *map(str, argv)])
    failure = None
    try:
        visualize_grm.main()
    except SystemExit as stop:
        failure = stop.code
    return failure, capsys.readouterr().out


def test_the_scale_runs_from_dark_to_light():
    light = colours(np.linspace(0, 1, 50)) @ [0.299, 0.587, 0.114]
    assert (np.diff(light) > 0).all() and light[0] < 20 and light[-1] > 220


def test_a_patch_is_drawn_where_it_is_and_a_word_as_its_mask_says():
    values = np.zeros((4, 4))
    values[1, 3] = 1
    example = Example(Image.new("RGB", (50, 80), "gray"), [("mask", "", values)], [("low", 0.0), ("high", 1.0)])
    picture = draw([example], "title", side=100, columns=1)
    grey = np.asarray(picture.convert("L"), dtype=float)
    tile = grey[90:190, 10:110].reshape(4, 25, 4, 25).mean((1, 3))                     # below the title of the tile
    assert tile.argmax() == 7 and tile[1, 3] > 2 * np.delete(tile, 7).max()
    words = grey[215:236]
    assert words[3, 12] < 40 and (words[3, 45:90] > 220).any()                                   # dark, and light on white


def test_the_maps_are_the_models(tiny_model, tiny_config, tokenizer):
    tiny_model.eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    caption = "A red circle is left of an uncommon square"
    example = explain(tiny_model, tokenizer, tiny_config, picture, caption, "SQUARE")
    transform = data.image_transform(64, *modules.image_statistics("vit_tiny_patch16_224"), train=False)
    with torch.no_grad():
        image = tiny_model.encode_image(transform(picture)[None])
        text, _ = grounding.encode_captions(tiny_model, tokenizer, [caption], 64, "cpu")
    titles = [title.split(":")[0] for title, *_ in example.tiles]
    assert titles == ["image", "saliency mask", 'near "square"', '"square" x mask', *(f"region {k}" for k in range(1, 6))]
    np.testing.assert_allclose(example.tiles[1][2].ravel(), image.mask[0], rtol=1e-5)
    cosine = image.tokens[0] @ text.tokens[0, -2]                                                # before [SEP]
    near = example.tiles[2][2].ravel()
    assert near.argmax() == cosine.argmax() and near.max() == 1 and near.min() == 0
    for k in range(5):
        attention = image.attention[0, :, k]
        np.testing.assert_allclose(example.tiles[4 + k][2].ravel(), attention / attention.max(), rtol=1e-4)
        variance = image.log_var[0, k].exp().sum()
        assert example.tiles[4 + k][1] == f"variance {variance:.2f}"
    assert [word for word, _ in example.words] == caption.split()
    np.testing.assert_allclose([mask for _, mask in example.words], text.mask[0, 1:-1], rtol=1e-5)


def test_by_default_the_word_is_the_one_with_the_highest_mask_that_is_not_grammar(tiny_model, tiny_config, tokenizer):
    tiny_model.eval()
    caption = "here is a red circle , an uncommon square"
    example = explain(tiny_model, tokenizer, tiny_config, Image.new("RGB", (64, 64)), caption)
    content = {word: mask for word, mask in example.words if word in ("here", "red", "circle", "uncommon", "square")}
    content.pop("here")                                                                          # a word of grammar
    assert example.tiles[2][0] == f'near "{max(content, key=content.get)}"'


def test_words_are_found_whole_and_in_any_case():
    assert find_word("The redder red", "Red") == (11, 14) and find_word("reddish", "red") is None
    assert find_word("a small red circle", "red circle") == (8, 18)


def test_one_image_and_a_sheet_by_the_script(checkpoint, tmp_path, monkeypatch, capsys):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8)).save(tmp_path / "mine.png")
    failure, printed = visualize(monkeypatch, capsys, "--ckpt", checkpoint, "--image", tmp_path / "mine.png",
                                 "--caption", "a small red circle", "--word", "red", "--out", tmp_path / "new" / "one.png")
    assert failure is None and "one.png" in printed and min(Image.open(tmp_path / "new" / "one.png").size) > 300
    heights = []
    for rows in (1, 2):
        out = tmp_path / f"{rows}.png"
        failure, _ = visualize(monkeypatch, capsys, "--ckpt", checkpoint, "--split", "shapes", "--rows", rows, "--out", out)
        assert failure is None
        heights.append(Image.open(out).height)
    assert heights[1] > heights[0] + 150
    two = [tmp_path / "mine.png"] * 2
    failure, _ = visualize(monkeypatch, capsys, "--ckpt", checkpoint, "--image", *two, "--caption", "a red circle", "a square",
                           "--word", "red", "square", "--out", tmp_path / "two.png")
    assert failure is None and Image.open(tmp_path / "two.png").height == pytest.approx(heights[1], abs=2)
    failure, printed = visualize(monkeypatch, capsys, "--ckpt", checkpoint, "--image", *two, "--caption", "a", "--out", "x.png")
    assert failure == 2


@pytest.mark.parametrize("argv, said", [
    (["--image", "nowhere.png", "--caption", "a circle"], "nowhere.png"),
    (["--split", "shapes", "--word", "giraffe"], "giraffe"), (["--split", "shape"], "shapes_val"),
    (["--split", "shapes", "--rows", "1", "--out", "sheet.xyz"], "sheet.png")])
def test_what_cannot_be_drawn_is_one_line(argv, said, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = [] if "--out" in argv else ["--out", "x.png"]
    failure, _ = visualize(monkeypatch, capsys, "--ckpt", checkpoint, *argv, *out)
    assert failure.startswith("error: ") and said in failure and "\n" not in failure


def test_a_word_that_is_not_in_the_caption_is_an_error(tiny_model, tiny_config, tokenizer):
    with pytest.raises(data.DataError, match="giraffe"):
        explain(tiny_model.eval(), tokenizer, tiny_config, Image.new("RGB", (64, 64)), "a red circle", "giraffe")
    with pytest.raises(data.DataError, match="no word"):
        explain(tiny_model.eval(), tokenizer, tiny_config, Image.new("RGB", (64, 64)), "")
