"""eval_grm.py: recalls against a full sort, protocols, the door for Python users, and errors of one line."""
import json

import numpy as np
import pytest
import torch
from conftest import TINY, run_eval, run_train
from PIL import Image

import data
import encoders
import eval_grm
from data import UserError
from eval_grm import recall_at_k
from modules import ImageFeatures, TextFeatures

LEVELS = ["ori", "key", "unc", "combined"]
SQUARE = Image.fromarray(np.random.default_rng(0).integers(256, size=(90, 90, 3), dtype=np.uint8))


# ---- the figures -------------------------------------------------------------------------------------------
def sorted_ranks(similarity, owner):
    """Ranks by sorting, a tie putting the wrong candidate first: the definition, in numpy."""
    s, i2t = np.asarray(similarity, np.float64), []
    for i in range(len(s)):
        order = sorted(range(s.shape[1]), key=lambda t: (-s[i, t], owner[t] == i))
        if (owner == i).any():
            i2t.append(1 + next(place for place, t in enumerate(order) if owner[t] == i))
    t2i = [1 + sorted(range(len(s)), key=lambda i: (-s[i, t], owner[t] == i)).index(owner[t])
           for t in range(s.shape[1])]
    return np.array(i2t), np.array(t2i)


@pytest.mark.parametrize("ties", [False, True])
def test_recalls_equal_a_full_sort(ties):
    rng = np.random.default_rng(0)
    owner = np.sort(rng.integers(0, 30, 90))                   # any number of captions an image, also none
    s = rng.normal(size=(30, 90)) + 1.5 * (owner[None] == np.arange(30)[:, None])
    s = np.round(s) if ties else s
    figures = recall_at_k(torch.tensor(s), torch.tensor(owner))
    for way, ranks in zip(("i2t", "t2i"), sorted_ranks(s, owner)):
        for k in (1, 5, 10):
            assert figures[f"{way}_r{k}"] == pytest.approx(100 * (ranks <= k).mean())
    recalls = [figures[f"{way}_r{k}"] for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert figures["rsum"] == pytest.approx(sum(recalls))


def test_a_constant_similarity_finds_nothing_and_a_perfect_one_all():
    figures = recall_at_k(torch.zeros(20, 40), torch.arange(20).repeat_interleave(2))
    assert set(figures.values()) == {0}
    owner = torch.arange(600)                                      # more images than are counted at a time
    assert recall_at_k(torch.eye(600), owner)["rsum"] == 600
    assert recall_at_k(torch.eye(600).roll(1, 0), owner)["t2i_r1"] == 0


def test_other_captions_of_the_image_do_not_count_against_it():
    s = torch.tensor([[.5, .9, .1], [.0, .0, .4]])
    assert recall_at_k(s, torch.tensor([0, 0, 1]))["i2t_r1"] == 100


def test_a_nan_and_misfitting_shapes_are_errors():
    s = torch.eye(4)
    s[2, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="NaN"):
        recall_at_k(s, torch.arange(4))
    for owner, said in ((torch.arange(3), "captions"), (torch.tensor([0, 1, 2, 4]), "outside")):
        with pytest.raises(ValueError, match=said):
            recall_at_k(torch.eye(4), owner)
    with pytest.raises(ValueError, match="captions"):
        recall_at_k(torch.zeros(4, 0), torch.zeros(0, dtype=torch.long))


@pytest.fixture
def matcher(tiny_model, tiny_config):
    """-> an untrained model with its tokeniser, a split."""
    split = data.load_split("shapes", tiny_config["datasets"], "")
    tokenizer = encoders.load_tokenizer(None, split.texts)
    return eval_grm.Matcher(tiny_model, tokenizer, tiny_config, torch.device("cpu")), split


def test_folds_are_the_mean_over_consecutive_groups(matcher):
    matcher, split = matcher
    whole, folded = (matcher.evaluate(split, folds, progress=False) for folds in (1, 4))
    parts = [matcher.evaluate(split.subset(slice(a, a + 8)), progress=False) for a in range(0, 32, 8)]
    for level in LEVELS:
        assert folded[level]["rsum"] == pytest.approx(np.mean([part[level]["rsum"] for part in parts]))
    assert folded["combined"]["t2i_r10"] > whole["combined"]["t2i_r10"]            # fewer distractors, easier


def test_the_batch_size_changes_no_figure(matcher):
    matcher, split = matcher
    assert matcher.evaluate(split, batch_size=3, progress=False) == matcher.evaluate(split, progress=False)


# ---- the door for Python users -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def grm(run_folder):
    return eval_grm.load(run_folder / "best.pt")


@pytest.fixture(scope="module")
def scenes(grm, tmp_path_factory):
    """-> a split, its images as files, its sentences."""
    folder = tmp_path_factory.mktemp("scenes")
    split = data.load_split("shapes", grm.config["datasets"], "").subset(slice(7))
    for i, name in enumerate(split.image_names):
        split.load_image(i).save(folder / f"{name}.png")
    return split, [folder / f"{name}.png" for name in split.image_names], split.texts


@pytest.mark.parametrize("level", LEVELS)
def test_score_is_evaluations_matrix(grm, scenes, level, monkeypatch):
    split, paths, texts = scenes
    monkeypatch.setattr(grm, "figures", lambda rows, *_: rows[level])
    expected = grm.evaluate(split, progress=False)
    assert expected.shape == (7, 35) and expected.std() > 0
    torch.testing.assert_close(grm.score(paths, texts, level), expected, atol=1e-6, rtol=0)
    images = [Image.open(path) for path in paths]
    torch.testing.assert_close(grm.score(images, texts, level), expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(grm.score([str(paths[3])], texts[5:6], level), expected[3:4, 5:6])
    for image in (paths[3], str(paths[3]), images[3]):                       # one, not in a list
        torch.testing.assert_close(grm.score(image, texts[5], level), expected[3:4, 5:6])


def test_an_image_that_is_turned_or_transparent_is_read_alike_from_a_path_and_from_pillow(grm, tmp_path):
    noise = np.random.default_rng(0).integers(256, size=(40, 60, 4), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(noise).save(tmp_path / "clear.png")
    Image.fromarray(noise[..., :3]).save(tmp_path / "turned.png", exif=turned)
    paths = [tmp_path / "clear.png", tmp_path / "turned.png"]
    images = [Image.open(path) for path in paths]
    assert torch.equal(grm.encode_images(images).tokens, grm.encode_images(paths).tokens)
    assert images[1].size == (60, 40) and images[0].mode == "RGBA"           # ours to read, not to change
    upright = Image.fromarray(noise[..., :3]).transpose(Image.Transpose.ROTATE_270)
    assert torch.equal(grm.encode_images(upright).tokens, grm.encode_images(paths[1]).tokens)


def test_encoded_features_have_the_documented_shapes_and_can_be_kept_and_joined(grm, scenes):
    _, paths, texts = scenes
    images, sentences = grm.encode_images(paths, batch_size=3), grm.encode_texts(texts, batch_size=4)
    d, K = grm.config["model"]["dim"], grm.config["model"]["num_prompts"]
    longest = max(len(grm.tokenizer(text).input_ids) for text in texts)
    assert isinstance(images, ImageFeatures) and isinstance(sentences, TextFeatures)
    assert images.tokens.shape == (7, 16, d) and images.mask.shape == (7, 16)
    assert images.regions.shape == (7, K, d) and images.token_mean.shape == (7, 1, d)
    assert sentences.tokens.shape == (35, longest, d)
    assert sentences.valid.shape == sentences.mask.shape == (35, longest)
    assert all(x.device.type == "cpu" and not x.requires_grad for x in (*images, *sentences))
    torch.testing.assert_close(images.tokens.norm(dim=-1), torch.ones(7, 16))
    scores = grm.score(paths, texts)
    torch.testing.assert_close(grm.similarity(images, sentences), scores)
    halves = grm.encode_images(paths[:2]), grm.encode_images(paths[2:])
    joined = ImageFeatures(*(torch.cat(x) for x in zip(*halves)))
    torch.testing.assert_close(grm.similarity(joined, sentences), scores)
    some = TextFeatures(*(torch.cat([x[9:], x[:9]]) for x in sentences))
    torch.testing.assert_close(grm.similarity(images, some), torch.cat([scores[:, 9:], scores[:, :9]], 1))


def test_a_mistake_in_python_is_one_line(grm, scenes, tmp_path):
    _, paths, texts = scenes
    (tmp_path / "text.jpg").write_text("no image")
    for call, said in ((lambda: grm.score(paths, texts, "all"), "ori, key, unc, combined"),
                       (lambda: grm.score([tmp_path / "gone.jpg"], texts), "gone.jpg"),
                       (lambda: grm.score([tmp_path / "text.jpg"], texts), "text.jpg"),
                       (lambda: grm.score([np.zeros((9, 9, 3))], texts), "image 0 is a ndarray"),
                       (lambda: grm.score(paths, ["a dog", None]), "sentence 1 is missing"),
                       (lambda: grm.score(paths, [("a dog", "a cat")]), "sentence 0 is tuple"),
                       (lambda: grm.score([], texts), "no images"),
                       (lambda: grm.score(paths, []), "no sentences"),
                       (lambda: eval_grm.load("gone.pt"), "no such checkpoint")):
        with pytest.raises(UserError, match=said) as error:
            call()
        assert "\n" not in str(error.value)


# ---- the script --------------------------------------------------------------------------------------------
def test_evaluation_prints_every_level_and_writes_metrics(run_folder, grm, tmp_path, capsys):
    assert run_eval("--ckpt", run_folder / "best.pt", "--out", tmp_path / "report") is None
    printed = capsys.readouterr().out
    assert "shapes: 32 images, 160 captions" in printed and all(word in printed for word in (*LEVELS, "rSum"))
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["metrics.json"]
    report = json.loads((tmp_path / "report" / "metrics.json").read_text())
    expected = grm.evaluate(data.load_split("shapes", grm.config["datasets"], ""), progress=False)
    assert report.pop("levels") == expected and list(expected) == LEVELS
    assert report == {"checkpoint": str(run_folder / "best.pt"), "recipe": "grm", "step": 2,
                      "split": "shapes", "size": 64, "images": 32, "captions": 160, "folds": 1}
    assert set(expected["combined"]) == {f"{way}_{key}" for way in ("i2t", "t2i")
                                         for key in ("r1", "r5", "r10")} | {"rsum"}


def test_limit_and_slices_take_some_images_and_their_captions(run_folder, tmp_path, capsys):
    command = "--ckpt", run_folder / "best.pt", "--batch-size", 4
    run_eval(*command, "--split", "shapes", "--limit", 10, "--out", tmp_path)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["images"] == 10 and report["captions"] == 50
    run_eval(*command, "--split", "shapes_val[20:]")
    assert "shapes_val[20:]: 4 images, 20 captions" in capsys.readouterr().out


def test_images_are_evaluated_at_the_size_that_the_run_or_the_reader_says(run_folder, tmp_path, capsys):
    out = tmp_path / "run"
    assert run_train("--backbone", "vit_micro", "--out", out, "--set", *TINY, "train.max_steps=2",
                     "image.eval_size=96") is None
    printed = capsys.readouterr().out
    grm, same, small = (eval_grm.load(out / "best.pt", size=size) for size in (None, 96, 64))
    assert [x.encode_images(SQUARE).mask.shape[1] for x in (grm, same, small)] == [36, 36, 16]
    assert torch.equal(grm.encode_images(SQUARE).tokens, same.encode_images(SQUARE).tokens)
    # The weights are those of the training size, at which nothing is resampled.
    untouched = eval_grm.load(run_folder / "best.pt")
    assert torch.equal(small.encode_images(SQUARE).tokens, untouched.encode_images(SQUARE).tokens)
    for size in (64, 96):
        run_eval("--ckpt", out / "best.pt", "--size", size, "--out", tmp_path / f"{size}")
        report = json.loads((tmp_path / f"{size}" / "metrics.json").read_text())
        assert report["size"] == size
        said = eval_grm.figures_table(report["levels"])
        assert (said in printed) == (size == 96)                # training ends with the figures of eval_size
    with pytest.raises(UserError, match="cannot encode 72 px as image.eval_size .*patch size .16"):
        eval_grm.load(out / "best.pt", size=72)


def test_a_bare_name_means_the_newest_run(run_folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "vit_micro-shapes").symlink_to(run_folder)
    monkeypatch.chdir(tmp_path)
    assert run_eval("--ckpt", "best.pt", "--split", "shapes_val") is None
    assert "checkpoint: runs/vit_micro-shapes/best.pt" in capsys.readouterr().out


def test_data_sets_of_another_file_take_the_place_of_the_checkpoints(run_folder, tmp_path, capsys):
    (tmp_path / "mine.yaml").write_text("datasets: {mine: {kind: shapes, size: 64, seed: 5, splits: {folded: "
                                        "{part: test, folds: 3}}, scenes: {train: 1, val: 1, test: 9}}}")
    command = "--ckpt", run_folder / "best.pt", "--config", tmp_path / "mine.yaml", "--split", "folded"
    assert run_eval(*command) is None
    assert "folded: 9 images, 45 captions, mean of 3 folds" in capsys.readouterr().out
    failure = run_eval(*command, "--limit", 2)
    assert failure.startswith("error: folded") and "at least 3 images" in failure and "\n" not in failure


@pytest.mark.parametrize("argv, said", [
    (["--ckpt", "nowhere.pt"], "no such checkpoint"), (["--split", "coco7k"], "coco5k"),
    (["--split", "coco5k", "--data-root", "nowhere"], "dataset_coco.json"),
    (["--split", "f8k_val"], "dataset_flickr8k.json"), (["--config", "nowhere.yaml"], "nowhere.yaml")])
def test_what_is_missing_is_told_in_one_line(argv, said, run_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    checkpoint = [] if "--ckpt" in argv else ["--ckpt", run_folder / "best.pt"]
    failure = run_eval(*checkpoint, *argv)
    assert failure.startswith("error: ") and said in failure and "\n" not in failure


def test_a_similarity_that_is_nan_is_told_in_one_line(run_folder, tmp_path):
    checkpoint = torch.load(run_folder / "best.pt", weights_only=True)
    checkpoint["model"]["image_proj.weight"][0, 0] = torch.nan
    torch.save(checkpoint, tmp_path / "best.pt")
    failure = run_eval("--ckpt", tmp_path / "best.pt")
    assert failure.startswith("error: ") and "NaN" in failure and "\n" not in failure
