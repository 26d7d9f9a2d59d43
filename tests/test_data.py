"""What data.py promises: three caption layouts, one-line errors, tokens, reproducible items, and true scenes."""
import gzip
import io
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import ceiling_of_shapes
import data
import shapes
from data import DataError

SHARED = Path(__file__).parents[2] / "shared"
SHAPES = {"shapes": {"kind": "shapes", "size": 64, "seed": 0, "scenes": {"train": 600, "val": 50, "test": 50}}}
MINE = {"mine": {"annotations": "mine/a.json", "images": "mine"}}
PARTED = {"mine": {"annotations": {"train": "mine/a.json", "test": "mine/b.json"}, "images": "mine"}}
ENTRY = {"filename": "0.jpg", "split": "test", "sentences": [{"raw": "a dog"}, {"raw": "a cat"}]}
NOISE = np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8)


def shared(path):
    if not (SHARED / path).exists():
        pytest.skip(f"the development data shared/{path} is not here")
    return SHARED / path


def write(root, content, name="a.json", images=("images/0.jpg", "images/1.jpg", "images/2.jpg", "images/3.jpg")):
    """Writes a caption file (a str or bytes as they are, anything else as JSON) and images of noise; -> root."""
    for image in images:
        path = root / "mine" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(NOISE).save(path)
    (root / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, (str, bytes)) else json.dumps(content)
    (root / "mine" / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def message(call, *words):
    """The text of the DataError that call() raises: one line that holds all the words."""
    with pytest.raises(DataError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


def bad_entry(root, **change):
    """The message for a good Karpathy entry and then one with the changes; a change to None removes the key."""
    entry = {key: value for key, value in (ENTRY | {"filename": "1.jpg"} | change).items() if value is not None}
    write(root, {"images": [ENTRY, entry]})
    return message(lambda: data.load_split("mine", MINE, root), "a.json", "entry 1")


# ---- layouts ----

def test_karpathy_gives_the_images_and_captions_of_each_part_in_order(tmp_path):
    entries = [ENTRY, ENTRY | {"filename": "1.jpg", "split": "restval"},
               {"filename": "2.jpg", "filepath": "other", "split": "train", "sentences": [{"raw": "x"}, {"raw": "y"}, {"raw": "z"}]}]
    write(tmp_path, {"images": entries}, images=["images/0.jpg", "images/1.jpg", "other/2.jpg"])
    block = {"mine": MINE["mine"] | {"parts": {"train": ["train", "restval"]}}}
    train = data.load_split("mine_train", block, tmp_path)
    assert train.image_names == ["images/1.jpg", "other/2.jpg"]
    assert train.texts == ["a dog", "a cat", "x", "y", "z"] and train.captions[1] == ["x", "y", "z"]
    assert train.image_of_text.tolist() == [0, 0, 1, 1, 1] and train.image_of_text.dtype == np.int64
    assert data.load_split("mine", block, str(tmp_path)).image_names == ["images/0.jpg"]


def test_the_list_layout_merges_the_entries_of_one_image_in_order_of_appearance(tmp_path):
    write(tmp_path, [{"image": "images/1.jpg", "caption": "one"}, {"image": "images/0.jpg", "caption": ["two", "three"]},
                     {"image": "images/1.jpg", "caption": "four"}], "b.json")
    split = data.load_split("mine", PARTED, tmp_path)
    assert split.image_names == ["images/1.jpg", "images/0.jpg"] and split.captions == [["one", "four"], ["two", "three"]]


def test_cocos_own_captions_and_an_image_folder_per_part(tmp_path):
    write(tmp_path, {"images": [{"id": 7, "file_name": "2.jpg"}, {"id": 3, "file_name": "0.jpg"}], "annotations": [
        {"image_id": 3, "caption": "c"}, {"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": "b"}]}, "b.json")
    block = {"mine": PARTED["mine"] | {"images": {"test": "mine/images"}}}
    split = data.load_split("mine", block, tmp_path)
    assert split.image_names == ["2.jpg", "0.jpg"] and split.captions == [["a", "b"], ["c"]]
    assert split.load_image(0).size == (60, 40)


def test_a_gz_beside_the_missing_file_is_read(tmp_path):
    write(tmp_path, gzip.compress(json.dumps({"images": [ENTRY]}).encode()), "a.json.gz")
    assert len(data.load_split("mine", MINE, tmp_path)) == 1


def test_whitespace_captions_are_dropped(tmp_path):
    write(tmp_path, {"images": [ENTRY | {"sentences": [{"raw": " \n"}, {"raw": "a dog"}]}]})
    assert data.load_split("mine", MINE, tmp_path).texts == ["a dog"]


def test_split_names_default_to_test_val_and_train_and_carry_folds():
    block = {"mine": MINE["mine"], "coco": MINE["mine"] | {"splits": {"coco1k": {"part": "test", "folds": 5}}}}
    assert data.split_names(block) == {"mine": ("mine", "test", 1), "mine_val": ("mine", "val", 1),
                                       "mine_train": ("mine", "train", 1), "coco1k": ("coco", "test", 5)}


def test_a_slice_keeps_the_images_and_their_captions():
    whole, middle = data.load_split("shapes", SHAPES, "."), data.load_split("shapes[10:30]", SHAPES, ".")
    assert len(middle) == 20 and middle.name == "shapes[10:30]" and middle.captions == whole.captions[10:30]
    assert middle.texts == [text for texts in whole.captions[10:30] for text in texts]
    assert middle.image_of_text.tolist() == np.repeat(np.arange(20), 5).tolist()
    assert middle.load_image(3).tobytes() == whole.load_image(13).tobytes() and middle.phrases(3) == whole.phrases(13)
    assert len(data.load_split("shapes[40:]", SHAPES, ".")) == len(data.load_split("shapes[:10]", SHAPES, ".")) == 10


def test_real_flickr30k_captions_load():
    block = {"f30k": {"annotations": "dataset_flickr30k.json", "images": "."}}
    split = data.load_split("f30k", block, shared("data/flickr30k_captions"), check_images=False)
    assert len(split) == 1000 and len(split.texts) == 5000


def test_real_flickr8k_photographs_load_and_its_absent_test_split_is_told():
    block, root = {"f8k": {"annotations": "dataset_flickr8k.json", "images": "."}}, shared("data/flickr8k")
    split = data.load_split("f8k_val[:20]", block, root)
    assert len(split) == 20 and len(split.texts) == 100 and split.load_image(0, 112).size == (224, 224)
    message(lambda: data.load_split("f8k", block, root), "dataset_flickr8k.json", "'test'", "'train' (6000)", "'val' (1000)")


# ---- one-line errors ----

def test_a_missing_file_says_where_it_belongs_and_what_needs_no_download(tmp_path):
    block = {"coco": {"annotations": "coco/dataset_coco.json", "images": "coco"}}
    message(lambda: data.load_split("coco", block, tmp_path), str(tmp_path / "coco" / "dataset_coco.json"), "Karpathy",
            "images", "--data-root", "--backbone vit_micro")


@pytest.mark.parametrize("content, words", [
    ("", "not JSON"), ("{'images': []}", "not JSON"), ("[" * 100_000, "not JSON"), ('{"images": [', "not JSON"),
    (b'{"images": "\xff"}', "not valid UTF-8 at byte 12"), ("3", "unknown layout"), ("{}", "unknown layout"),
    ('["a.jpg"]', "unknown layout"), ('{"images": {}}', "unknown layout"), ('{"images": []}', "no image of split 'test'")])
def test_a_file_that_cannot_be_understood_is_named(tmp_path, content, words):
    message(lambda: data.load_split("mine", MINE, write(tmp_path, content)), "a.json", words)


def test_a_damaged_gz_is_named(tmp_path):
    write(tmp_path, gzip.compress(b"[]" * 1000)[:20], "a.json.gz")
    message(lambda: data.load_split("mine", MINE, tmp_path), "a.json.gz", "cannot be read")


@pytest.mark.parametrize("change, words", [
    ({"filename": 3}, "'filename' is int"), ({"filename": None}, "'filename' is missing"), ({"split": []}, "'split' is list"),
    ({"split": None}, "'split' is missing"), ({"sentences": {}}, "'sentences' is dict"), ({"sentences": ["a"]}, "sentence 0 is str"),
    ({"sentences": [{"raw": "a"}, {"raw": 1}]}, "caption 1 is int"), ({"sentences": [{}]}, "caption 0 is missing"),
    ({"sentences": [{"raw": "\ud800"}]}, "surrogate"), ({"filepath": 1}, "'filepath' is int"),
    ({"sentences": []}, "has no caption"), ({"sentences": [{"raw": "  "}]}, "has no caption"),
    ({"filename": "../../secret.jpg"}, "leaves the image folder"), ({"filename": "a/../../b.jpg"}, "leaves the image folder"),
    ({"filename": "/etc/passwd"}, "leaves the image folder"), ({"filepath": ".."}, "leaves the image folder"),
    ({"filename": "..\\x.jpg"}, "leaves the image folder"), ({"filename": "C:\\x.jpg"}, "leaves the image folder")])
def test_a_bad_karpathy_entry_is_named(tmp_path, change, words):
    assert words in bad_entry(tmp_path, **change)


def test_an_entry_that_is_no_map_is_named(tmp_path):
    message(lambda: data.load_split("mine", MINE, write(tmp_path, {"images": [ENTRY, "x"]})), "entry 1 is str, must be dict")


@pytest.mark.parametrize("content, words", [
    ([], "holds no images"), ([{"image": 3, "caption": "a"}], "entry 0 (3): 'image' is int"),
    ([{"image": "a.jpg"}], "entry 0 ('a.jpg'): 'caption' is missing"),
    ([{"image": "a.jpg", "caption": ["a", None]}], "caption 1 is missing"),
    ([{"image": "a.jpg", "caption": []}], "has no caption"), ([{"image": "/a.jpg", "caption": "a"}], "leaves the image folder"),
    ({"images": [], "annotations": 3}, "'annotations' is int"), ({"images": [], "annotations": []}, "holds no images"),
    ({"images": [{"id": "a"}], "annotations": []}, "image 0: 'id' is str"),
    ({"images": [{"id": 1, "file_name": 2}], "annotations": []}, "'file_name' is int"),
    ({"images": [{"id": 1, "file_name": "a"}] * 2, "annotations": []}, "image 1 ('a'): id 1 is another"),
    ({"images": [{"id": 1, "file_name": "a"}], "annotations": []}, "image 0 ('a') has no caption"),
    ({"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 2}]}, "annotation 0: no image has the id 2"),
    ({"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1}]}, "annotation 0: 'caption' is missing")])
def test_a_bad_entry_of_the_other_layouts_is_named(tmp_path, content, words):
    message(lambda: data.load_split("mine", PARTED, write(tmp_path, content, "b.json")), "b.json", words)


def test_an_empty_split_lists_what_the_file_has(tmp_path):
    message(lambda: data.load_split("mine_val", MINE, write(tmp_path, {"images": [ENTRY] * 3})), "'val'", "'test' (3)")


def test_a_layout_without_splits_inside_asks_for_one_file_per_part(tmp_path):
    write(tmp_path, [{"image": "images/0.jpg", "caption": "a"}])
    message(lambda: data.load_split("mine", MINE, tmp_path), "a.json", "no splits inside", "one file per part")


def test_missing_images_are_counted_and_three_are_named(tmp_path):
    entries = [ENTRY | {"filename": f"{n}.jpg"} for n in range(9)]
    write(tmp_path, {"images": entries})
    text = message(lambda: data.load_split("mine", MINE, tmp_path), "5 of 9", str(tmp_path / "mine"), "images/4.jpg", "images/6.jpg")
    assert "images/7.jpg" not in text
    assert len(data.load_split("mine", MINE, tmp_path, check_images=False)) == 9


def test_unknown_splits_empty_slices_and_bad_blocks_are_told(tmp_path):
    message(lambda: data.load_split("nope", SHAPES, "."), "nope", "shapes, shapes_val, shapes_train")
    message(lambda: data.load_split("shapes[50:]", SHAPES, "."), "slice is empty", "50 images")
    for change, words in [({"kind": "photos"}, "photos"), ({"size": "64"}, "size"), ({"seed": -1}, "seed"), ({"colour": 1}, "colour"),
                          ({"scenes": {"train": 5}}, "test"), ({"splits": []}, "splits"), ({"splits": {"shapes": {"part": "x"}}}, "part")]:
        message(lambda: data.load_split("shapes", {"shapes": SHAPES["shapes"] | change}, "."), "datasets.shapes", words)
    for block in ({}, {"annotations": 3, "images": "x"}, {"annotations": "a"}, {"annotations": {"val": "a"}, "images": "x"},
                  {"annotations": "a", "images": "b", "parts": {"train": "train"}}, None):
        message(lambda: data.load_split("mine", {"mine": block}, tmp_path), "datasets.mine")


# ---- images ----

def image_split(root, content, name="0.png"):
    write(root, content, f"images/{name}", images=())
    return data.FileSplit("mine", [f"images/{name}"], [["a"]], root / "mine")


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "bomb", "folder"])
def test_an_image_that_does_not_decode_is_named(tmp_path, monkeypatch, damage):
    whole = encoded(Image.fromarray(NOISE), "JPEG")
    split = image_split(tmp_path, {"empty": b"", "truncated": whole[:len(whole) // 2], "text": b"no image"}.get(damage, whole), "0.jpg")
    if damage == "bomb":  # Pillow only warns between once and twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 - 1)
    if damage == "folder":
        split.image_names = ["images"]
    message(lambda: split.load_image(0), "images", "image 0 of mine", "does not decode")


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = np.full((8, 8), 128, np.uint8)
    image = Image.fromarray(grey.astype(np.uint16) << 8) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    loaded = image_split(tmp_path, encoded(image, "TIFF"), "0.tif").load_image(0)
    assert loaded.mode == "RGB" and abs(np.asarray(loaded).mean() - 128) < 3


def test_transparent_pixels_become_white(tmp_path):
    loaded = image_split(tmp_path, encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)))).load_image(0)
    assert (np.asarray(loaded) == 255).all()
    palette = Image.new("P", (4, 4), 0)
    assert (np.asarray(image_split(tmp_path, encoded(palette, transparency=0)).load_image(0)) == 255).all()


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert image_split(tmp_path, encoded(Image.fromarray(NOISE), "JPEG", exif=exif), "0.jpg").load_image(0).size == (40, 60)


def test_a_large_jpeg_is_decoded_smaller_but_never_below_the_size_asked_for(tmp_path):
    split = image_split(tmp_path, encoded(Image.new("RGB", (1600, 1200)), "JPEG"), "0.jpg")
    assert split.load_image(0).size == (1600, 1200)
    assert split.load_image(0, 224).size == (800, 600) and min(split.load_image(0, 64).size) >= 64
    assert split.load_image(0, 601).size == (1600, 1200)


def test_the_evaluation_transform_squashes_and_the_training_one_crops():
    picture = Image.fromarray(NOISE)
    plain = data.image_transform(32, (.5,) * 3, (.5,) * 3, train=False)
    assert plain(picture).shape == (3, 32, 32) and plain(picture).dtype == torch.float32
    whole = np.asarray(picture.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(plain(picture), whole, atol=1.01 / 127.5)                             # one grey level off Pillow's
    assert torch.equal(data.image_transform(32, (.5,) * 3, (.5,) * 3, True, crop=[1.0, 1.0])(picture), plain(picture))
    assert not torch.equal(data.image_transform(32, (.5,) * 3, (.5,) * 3, True)(picture), plain(picture))


# ---- tokens ----

TEXTS = ["A man, to the LEFT of a dog.", "a dog", "the man's dog runs", "a café"]


@pytest.fixture(scope="module")
def tok():
    return data.load_tokenizer(None, TEXTS)


def test_the_built_vocabulary_is_lower_case_words_by_frequency(tok):
    words = tok.convert_ids_to_tokens(range(len(tok)))
    assert words[:7] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"] and tok.pad_token_id == 0
    ids = data.tokenize(tok, ["A DOG , zebra cafe"], 10)[0]
    assert tok.convert_ids_to_tokens(ids) == ["[CLS]", "a", "dog", ",", "[UNK]", "cafe", "[SEP]"]


def test_truncation_keeps_the_special_tokens(tok):
    ids = data.tokenize(tok, TEXTS, 4)
    assert all(len(i) <= 4 and i[0] == tok.cls_token_id and i[-1] == tok.sep_token_id and i.dtype == np.int32 for i in ids)
    message(lambda: data.tokenize(tok, TEXTS, 2), "max_length")


def test_a_tokenizer_survives_its_state(tok):
    tokenizers = [tok]
    if (SHARED / "weights/minilm-l6").exists():
        tokenizers.append(data.load_tokenizer(str(SHARED / "weights/minilm-l6")))
    for original in tokenizers:
        state = data.tokenizer_state(original)
        stream = io.BytesIO()
        torch.save(state, stream)
        again = data.tokenizer_from_state(torch.load(io.BytesIO(stream.getvalue()), weights_only=True))
        assert all((a == b).all() for a, b in zip(data.tokenize(original, TEXTS, 12), data.tokenize(again, TEXTS, 12)))
        assert data.tokenizer_state(again) == state and again.mask_token_id == original.mask_token_id


def test_bert_from_a_local_folder():
    bert = data.load_tokenizer(str(shared("weights/minilm-l6")))
    assert data.tokenize(bert, ["a dog"], 10)[0].tolist() == [101, 1037, 3899, 102]


def test_a_tokenizer_out_of_reach_is_told_or_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message(lambda: data.load_tokenizer("nobody/no-such-model"), "nobody/no-such-model", "text.name")
    (tmp_path / "tokenizer.json").write_text("{")
    message(lambda: data.load_tokenizer(str(tmp_path)), str(tmp_path))
    message(lambda: data.load_tokenizer(None), "text.name")
    with pytest.warns(UserWarning, match="vocabulary built from the captions"):
        assert "dog" in data.load_tokenizer("nobody/no-such-model", TEXTS).get_vocab()


def test_augmentation_drops_and_masks_at_its_rates_and_spares_the_ends():
    rng, ids = np.random.default_rng(0), np.arange(10_002, dtype=np.int32)
    out = data.augment_tokens(ids, rng, .2, .1, -1)
    assert out[0] == 0 and out[-1] == 10_001
    assert abs(len(out) / 10_000 - .8) < .02 and abs((out == -1).mean() - .1 / .8) < .02
    assert (ids == np.arange(10_002)).all()  # the cached caption is untouched
    assert all(len(data.augment_tokens(ids[:7], rng, 1.0, 0, None)) == 3 for _ in range(20))
    assert data.augment_tokens(ids[:2], rng, 1.0, 0, None).tolist() == [0, 1]
    assert data.augment_tokens(ids[:7], rng, 0, 0, -1).tolist() == list(range(7))


def test_left_and_right_change_places(tok):
    assert data.mirror_words("Left of a RIGHT-handed man, right; leftover bright") == "Right of a LEFT-handed man, left; leftover bright"
    mirrored = data.mirror_tokens(data.load_tokenizer(None, TEXTS + ["right"]), TEXTS, 20)
    assert list(mirrored) == [0]


def test_text_batches_cover_every_caption_once_with_little_padding(tok):
    texts = ["dog " * n for n in (3, 1, 5, 1, 2)]
    ids = data.tokenize(tok, texts, 20)
    batches = list(data.text_batches(ids, 2, 0))
    assert sorted(torch.cat([i for i, _, _ in batches]).tolist()) == list(range(5))
    assert [tuple(x.shape) for _, x, _ in batches] == [(2, 7), (2, 4), (1, 3)]
    for indices, tokens, valid in batches:
        assert tokens.dtype == torch.int64 and (tokens[~valid] == 0).all()
        assert all(tokens[row][valid[row]].tolist() == ids[i].tolist() for row, i in enumerate(indices))


# ---- items ----

def sampler(mode="captions", batch_size=16, **kw):
    return data.PairSampler(data.load_split("shapes", SHAPES, "."), batch_size, mode, seed=3, **kw)


def test_an_epoch_of_captions_has_every_caption_once():
    s = sampler(drop_last=False)
    items = [item for batch in s for item in batch]
    assert sorted(t for _, t, _ in items) == list(range(250)) and all(i == t // 5 for i, t, _ in items)
    assert len(list(s)) == len(s) == 16 and len(list(sampler())) == len(sampler()) == 15


def test_an_epoch_of_images_has_every_image_once_with_any_of_its_captions():
    s = sampler("images", drop_last=False)
    items = [item for batch in s for item in batch]
    assert sorted(i for i, _, _ in items) == list(range(50)) and {t % 5 for _, t, _ in items} == set(range(5))
    assert all(i == t // 5 for i, t, _ in items)


def test_a_resumed_epoch_goes_on_where_it_stopped_and_epochs_differ():
    whole, rest, other = sampler(), sampler(), sampler()
    rest.start, other.epoch = 6, 1
    assert list(whole)[6:] == list(rest) and len(rest) == len(whole) and list(other) != list(whole)


def test_fewer_items_than_a_batch_are_one_batch():
    assert [len(batch) for batch in sampler("images", batch_size=64)] == [50]


def test_an_unknown_epoch_mode_lists_the_valid_ones():
    message(lambda: sampler("all"), "all", "captions, images")


def train_pairs(split, tok, flip=.5):
    transform = data.image_transform(32, (.5,) * 3, (.5,) * 3, train=True)
    ids = data.tokenize(tok, split.texts, 32)
    return data.TrainPairs(split, ids, transform, tok.mask_token_id, .1, .1, flip, data.mirror_tokens(tok, split.texts, 32))


def test_items_are_the_same_whatever_the_workers_and_leave_the_global_randomness_alone():
    split = data.load_split("shapes", SHAPES, ".")
    tok = data.load_tokenizer(None, split.texts)
    pairs = train_pairs(split, tok)
    state = torch.get_rng_state()
    batches = list(map(data.Collate(0), ([pairs[item] for item in batch] for batch in sampler())))[:3]
    assert torch.equal(state, torch.get_rng_state())
    loader = DataLoader(pairs, batch_sampler=sampler(), collate_fn=data.Collate(0), num_workers=2)
    for batch, loaded in zip(batches, loader):
        assert all(torch.equal(batch[key], loaded[key]) for key in batch)
    assert batch["images"].shape == (16, 3, 32, 32) and batch["images"].dtype == torch.float32
    assert batch["ids"].dtype == batch["image_ids"].dtype == torch.int64 and batch["valid"].dtype == torch.bool
    assert (batch["ids"][~batch["valid"]] == 0).all() and batch["valid"].any(0).all()


def test_a_flipped_image_swaps_left_and_right_in_its_caption():
    split = data.load_split("shapes", SHAPES, ".")
    tok = data.load_tokenizer(None, split.texts)
    text = next(t for t, caption in enumerate(split.texts) if " left " in caption)
    image = int(split.image_of_text[text])
    pairs = train_pairs(split, tok)
    pairs.transform, pairs.word_drop, pairs.word_mask = data.image_transform(64, (0,) * 3, (1,) * 3, False), 0, 0
    upright, seen = pairs.transform(split.load_image(image)), set()
    for seed in range(20):
        pixels, ids, _ = pairs[image, text, seed]
        flipped = not torch.equal(pixels, upright)
        assert not flipped or torch.equal(pixels.flip(2), upright)
        assert (tok.convert_tokens_to_ids("right") in ids) == flipped
        seen.add(flipped)
    assert seen == {True, False}


def test_an_image_that_fails_in_a_worker_is_still_one_line(tmp_path):
    split = image_split(tmp_path, b"", "0.jpg")
    loader = DataLoader(data.EvalImages(split, data.image_transform(32, (.5,) * 3, (.5,) * 3, False)), num_workers=1)
    assert message(lambda: list(loader), "0.jpg").startswith(str(tmp_path))


# ---- shapes ----

@pytest.fixture(scope="module")
def scenes():
    return data.load_split("shapes_train", SHAPES, ".")


KINDS = [("small", "large"), tuple(shapes.COLOURS), tuple(shapes.OUTLINES)]


def fitting(text, objects):
    """The objects that a phrase fits, read from its words alone."""
    words = {word.removesuffix("s") if word != "crosses" else "cross" for word in text.split() if word != "cross"} | ({"cross"} & set(text.split()))
    said = [words & set(kind) for kind in KINDS]
    return [o for o in objects if all(not want or have in want for want, have in zip(said, o.words))]


def centre(box):
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2


TRUE = {"left": lambda a, b: a[0] < b[0], "right": lambda a, b: a[0] > b[0], "above": lambda a, b: a[1] < b[1],
        "over": lambda a, b: a[1] < b[1], "below": lambda a, b: a[1] > b[1], "under": lambda a, b: a[1] > b[1],
        "near": lambda a, b: np.hypot(a[0] - b[0], a[1] - b[1]) < .5, "next": lambda a, b: np.hypot(a[0] - b[0], a[1] - b[1]) < .5}


def test_a_scene_is_decided_by_seed_part_and_index(scenes):
    again = data.load_split("shapes_train", SHAPES, ".")
    assert again.texts == scenes.texts and again.load_image(7).tobytes() == scenes.load_image(7).tobytes()
    other = data.load_split("shapes", SHAPES, ".")
    assert not {tuple(c) for c in other.captions} & {tuple(c) for c in scenes.captions}
    assert data.load_split("shapes_train", {"shapes": SHAPES["shapes"] | {"seed": 1}}, ".").texts != scenes.texts
    assert scenes.load_image(0).size == (64, 64) and scenes.load_image(0).mode == "RGB"
    assert pickle.loads(pickle.dumps(scenes)).texts == scenes.texts


def test_scenes_hold_2_to_4_separate_objects_and_five_captions(scenes):
    for i in range(len(scenes)):
        boxes = scenes.objects(i)
        assert len(boxes) in (2, 3, 4) and len(scenes.captions[i]) == len(scenes.phrases(i)) == 5
        for k, (x0, y0, x1, y1) in enumerate(boxes):
            assert 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1
            assert all(x1 <= b[0] or b[2] <= x0 or y1 <= b[1] or b[3] <= y0 for b in boxes[:k])


def test_a_phrase_has_its_span_and_the_boxes_of_all_objects_that_it_fits(scenes):
    for i in range(len(scenes)):
        for caption, phrases in zip(scenes.captions[i], scenes.phrases(i)):
            assert phrases
            for phrase in phrases:
                assert caption[phrase.start:phrase.end] == phrase.text
                assert phrase.boxes == [o.box for o in fitting(phrase.text, scenes.scenes[i].objects)] and phrase.boxes
            outside = list(caption)
            for phrase in phrases:
                outside[phrase.start:phrase.end] = " " * (phrase.end - phrase.start)
            outside = set("".join(outside).replace("left of", "").split())
            assert not outside & {"shape", "shapes", *shapes.COLOURS, *shapes.OUTLINES}, caption  # no noun without a phrase


def test_captions_are_true(scenes):
    relations = counts = 0
    for i in range(len(scenes)):
        for caption, phrases in zip(scenes.captions[i], scenes.phrases(i)):
            for phrase in phrases:
                number = {"two": 2, "three": 3, "four": 4}.get(phrase.text.split()[0])
                assert number is None or len(phrase.boxes) == number, caption
                counts += number is not None
            for a, b in zip(phrases, phrases[1:]):
                words = set(caption[a.end:b.start].split()) & set(TRUE)
                for word in words:
                    pairs = [(p, q) for p in a.boxes for q in b.boxes if p is not q and p != q]
                    assert any(TRUE[word](centre(p), centre(q)) for p, q in pairs), caption
                    relations += 1
    assert relations > 300 and counts > 150


def test_alignment_is_one_to_many_and_many_to_one(scenes):
    phrases = [p for i in range(len(scenes)) for caption in scenes.phrases(i) for p in caption]
    singular = [p for p in phrases if p.text.split()[0] in ("a", "an", "some", "another")]
    assert sum(len(p.boxes) > 1 for p in singular) > .05 * len(singular)
    assert any(p.text in ("a red shape", "a blue shape") and len(p.boxes) > 1 for p in phrases)
    described = {}
    for i in range(len(scenes)):
        for caption in scenes.phrases(i):
            for p in caption:
                for box in p.boxes:
                    described.setdefault((i, box), set()).add(p.text)
    assert np.mean([len(texts) >= 3 for texts in described.values()]) > .8


def test_most_captions_name_two_objects_by_colour_and_shape(scenes):
    clear = [[sum(bool(set(p.text.split()) & set(shapes.COLOURS)) and "shape" not in p.text for p in phrases) >= 2
              or re.search("two|three|four", caption) is not None for caption, phrases in zip(scenes.captions[i], scenes.phrases(i))]
             for i in range(len(scenes))]
    assert np.mean([sum(scene) >= 4 for scene in clear]) > .95


def test_the_pixels_of_an_object_have_its_colour_and_the_ground_is_muted(scenes):
    for i in range(50):
        pixels, ground = np.asarray(scenes.load_image(i)).astype(int), np.ones((64, 64), bool)
        for o in scenes.scenes[i].objects:
            x0, y0, x1, y1 = (round(64 * v) for v in o.box)
            inside = pixels[y0:y1, x0:x1]
            near = (np.abs(inside - shapes.COLOURS[o.words[1]]).max(-1) < 40).mean()
            assert near > .2, (i, o, near)
            ground[max(0, y0 - 1):y1 + 1, max(0, x0 - 1):x1 + 1] = False
        assert (np.ptp(pixels[ground], axis=-1) < 60).all()


def test_the_reader_of_scenes_tells_true_captions_from_false_ones():
    circle, square, other = (shapes.Object(words, (x, .5), .1, (0, 0, 1, 1)) for words, x in (
        (("small", "red", "circle"), .2), (("large", "blue", "square"), .8), (("small", "red", "square"), .5)))
    scene = [circle, square, other]
    for parts, true, false in (
            (["", ("a", (None, "red", "circle")), "is", "left of", ("a", (None, "blue", "square"))], scene, [square, other]),
            (["", ("a", (None, "blue", "square")), "", "right of", ("a", (None, "red", None))], [circle, square], [circle, other]),
            (["", ("a", (None, "red", "circle")), "and", ("two", (None, None, "square"))], scene, [circle, square]),
            ([("two", (None, None, "square")), ":", ("a", (None, "red", "square")), "and", ("a", (None, "blue", "square")), ", with",
              ("a", (None, "red", "circle"))], scene, [circle, square, square])):
        caption, phrases = shapes.compose(true, parts)
        reads = ceiling_of_shapes.reading(caption, phrases, true)
        assert reads(true) and not reads(false), caption
