"""The pictures: what is drawn is what the model computed, in the right place, and errors are one line."""
import numpy as np
import pytest
import torch
from PIL import Image

import data
import encoders
import eval_grm
import modules
import visualize_grm
from visualize_grm import GAP, HEAT, LINE, MARGIN, PANEL, SHADE, Row, colours, explain, find_word

CAPTION = "A red circle is left of an uncommon blue square , here"


@pytest.fixture
def matcher(tiny_config):
    """An untrained model with a class token among its tokens, and a vocabulary of its size."""
    tiny_config["model"]["special_tokens"] = True
    tokenizer = encoders.build_tokenizer([CAPTION])
    model = modules.build_grm(tiny_config, len(tokenizer), tokenizer.pad_token_id).eval()
    return eval_grm.Matcher(model, tokenizer, tiny_config, torch.device("cpu"))


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 90, 3), np.uint8))


def brightness(image):
    return np.asarray(image.convert("L"), dtype=float)


# ---- what is computed --------------------------------------------------------------------------------------
def test_heat_is_the_models_cosine_attention_and_variance(matcher, picture):
    row = explain(matcher, picture, CAPTION, ["SQUARE", "red circle", "star"], with_regions=True)
    image, text = matcher.encode_images([picture]), matcher.encode_texts([CAPTION])
    assert [title for title, _ in row.words] == ["square", "red circle"]    # there is no star in the caption
    for (_, heat), said in zip(row.words, ([9], [1, 2])):
        # the first token of each is the class token, [CLS]
        cosines = sum(image.tokens[0, 1:] @ text.tokens[0, 1 + m] for m in said).numpy()
        expected = (cosines - cosines.min()) / (cosines.max() - cosines.min())
        np.testing.assert_allclose(heat.ravel(), expected, atol=1e-4)
    assert len(row.regions) == matcher.config["model"]["num_prompts"]
    for k, (title, heat) in enumerate(row.regions):
        attention = image.attention[0, 1:, k]
        np.testing.assert_allclose(heat.ravel(), attention / attention.max(), rtol=1e-4)
        assert title == f"region {k + 1}, variance {float((image.log_var[0, k].exp() * 32).mean()):.2f}"
    assert [word for word, _ in row.caption] == CAPTION.split()
    np.testing.assert_allclose([mask for _, mask in row.caption], text.mask[0, 1:-1], rtol=1e-5)


def test_key_words_are_the_content_words_of_highest_mask_in_their_order():
    masks = {"the": 0.99, "dog": 0.9, "red": 0.2, "ball": 0.8, "chases": 0.3, ",": 0.95}
    caption = "The dog chases the red ball , the dog"
    spans = visualize_grm.key_words(caption, lambda span: masks[caption[slice(*span)].lower()])
    assert [caption[slice(*span)] for span in spans] == ["dog", "chases", "ball"]       # and dog once
    assert visualize_grm.key_words("it is", lambda span: 0.5) == [(0, 2), (3, 5)]       # without content


def test_words_are_found_whole_and_in_any_case():
    assert find_word("The redder red", "Red") == (11, 14) and find_word("reddish", "red") is None
    assert find_word("a small red circle", "red circle") == (8, 18)


# ---- what is drawn -----------------------------------------------------------------------------------------
def test_colours_run_evenly_from_dark_to_light():
    light = colours(np.linspace(0, 1, 50), HEAT) @ [0.299, 0.587, 0.114]
    steps = np.diff(light)
    assert light[0] < 10 and light[-1] > 230 and steps.min() > 0 and steps.max() < 4 * steps.mean()


@pytest.mark.parametrize("patch", [(0, 0), (1, 3), (3, 2)])
def test_a_heat_map_is_smooth_and_hot_where_the_patch_is(patch):
    heat = np.zeros((4, 4))
    heat[patch] = 1
    grey = Image.new("RGB", (320, 160), (128, 128, 128))                    # a patch is 80 x 40
    light = brightness(visualize_grm.heat_map(grey, heat))
    patches = light.reshape(4, 40, 4, 80).mean((1, 3))
    assert patches.max() == patches[patch] > 1.5 * np.sort(patches.ravel())[-2]
    steps = [np.abs(np.diff(light, axis=axis)).max() for axis in (0, 1)]
    assert max(steps) < np.ptp(light) / 8                                   # of a mosaic, the whole range


def test_a_sheet_shows_the_photograph_the_maps_and_the_caption_shaded(picture):
    heat = np.zeros((4, 4))
    heat[3, 0] = 1
    row = Row(picture, [("dog", heat)], [("region", heat.T)] * 3, [("low", 0.0), ("high", 1.0)])
    sheet = visualize_grm.draw([row])
    top, second, height = MARGIN + LINE, MARGIN + PANEL + GAP, round(PANEL * 40 / 90)
    photograph = sheet.crop((MARGIN, top, MARGIN + PANEL, top + height))    # in its own proportions
    np.testing.assert_array_equal(photograph, picture.resize(photograph.size, Image.Resampling.LANCZOS))

    def hottest(x, y):
        light = brightness(sheet.crop((x, y, x + PANEL, y + height)).resize((4, 4), Image.Resampling.BOX))
        return np.unravel_index(light.argmax(), (4, 4))

    assert hottest(second, top) == (3, 0)
    title = brightness(sheet.crop((second, MARGIN, second + PANEL, top)))
    assert title.min() < 100 and title[:, 100:].min() == 255                # short, and at the left
    words = top + height + GAP // 2 + LINE // 2
    chips = np.asarray(sheet)[words, MARGIN:MARGIN + 200].tolist()
    assert chips[3] == list(SHADE[0]) and list(SHADE[1]) in chips           # masks of 0 and 1
    regions = words + LINE // 2 + GAP // 2 + LINE
    assert hottest(MARGIN, regions) == hottest(second, regions) == (0, 3)


def test_captions_titles_and_legend_stay_on_the_sheet(picture):
    words = [(f"word{n}", 0.5) for n in range(60)]
    rows = [Row(picture, [("very " * n, np.eye(4))], [], words[:n]) for n in (1, 60)]
    short, long = (visualize_grm.draw([row]) for row in rows)
    assert long.width == short.width and long.height >= short.height + 5 * LINE
    assert brightness(long)[:, -MARGIN:].min() == 255
    assert brightness(short)[-MARGIN - LINE:, -MARGIN - 9:].min() == 255    # nor is the legend cut off


# ---- the command -------------------------------------------------------------------------------------------
@pytest.fixture
def visualize(tiny_config, tmp_path, monkeypatch, picture):
    """visualize_grm.py on an untrained model, with arguments -> the picture."""
    monkeypatch.chdir(tmp_path)
    picture.save("mine.png")
    tokenizer = encoders.build_tokenizer(data.load_split("shapes", tiny_config["datasets"], "").texts)
    model = modules.build_grm(tiny_config, len(tokenizer), tokenizer.pad_token_id)
    torch.save({"model": model.state_dict(), "config": tiny_config,
                "tokenizer": encoders.tokenizer_state(tokenizer),
                "text_config": model.text_encoder.config}, "x.pt")

    def run(*argv):
        defaults = ["--ckpt", "x.pt", "--rows", "1", "--out", "new/sheet.png"]
        arguments = visualize_grm.parse_arguments([*defaults, *argv])
        visualize_grm.main(arguments)
        return Image.open(arguments.out)

    return run


def test_the_command_draws_a_split_and_images_of_ones_own(visualize):
    one, two = visualize(), visualize("--rows", "2")
    assert two.height > one.height + PANEL and two.width == one.width == 4 * (PANEL + GAP) - GAP + 2 * MARGIN
    assert visualize("--regions", "--size", "128").height > one.height + PANEL
    assert visualize("--words", "circle").width == one.width - 2 * (PANEL + GAP)
    own = visualize("--image", "mine.png", "mine.png", "--caption", "a red star", "café", "--words", "star")
    assert own.height < two.height                                          # the pictures are wide


def test_pictures_are_of_the_test_split_of_the_runs_own_data_set(tiny_config):
    datasets = tiny_config["datasets"]
    datasets["scenes"] = datasets["shapes"] | {"splits": {"held_out": {"part": "test"}}, "seed": 7}
    tiny_config["data"]["name"] = "scenes"
    (picture, caption), = visualize_grm.examples(visualize_grm.parse_arguments(
        ["--ckpt", "x.pt", "--out", "x.png", "--rows", "1"]), tiny_config)
    expected = data.load_split("held_out", datasets, "")
    assert caption == expected.captions[0][0] and picture == expected.load_image(0)


@pytest.mark.parametrize("argv, said", [
    (["--image", "nowhere.png", "--caption", "a circle"], "nowhere.png"), (["--words", "giraffe"], "giraffe"),
    (["--split", "shape"], "shapes_val"), (["--image", "mine.png", "--caption", " "], "no word"),
    (["--size", "7"], "7 px"), (["--out", "sheet.xyz"], "sheet.xyz"),
    (["--image", "mine.png", "--caption", "and " * 70 + "star", "--words", "star"], "64 tokens")])
def test_what_cannot_be_drawn_is_one_line(argv, said, visualize):
    with pytest.raises(data.UserError) as error:
        visualize(*argv)
    assert said in str(error.value) and "\n" not in str(error.value)
