"""data.py: three caption layouts, one-line errors, images, own and added tokens, reproducible items."""
import gzip
import json
import unicodedata
from functools import partial

import numpy as np
import pytest
import torch
from conftest import SHARED
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

import data

SHAPES = {"kind": "shapes", "size": 32, "seed": 0, "scenes": {"train": 10, "val": 10, "test": 50}}
MINE = {"annotations": "mine/a.json", "images": "mine"}
PARTED = {"annotations": {"train": "mine/a.json", "test": "mine/b.json"}, "images": "mine"}
ENTRY = {"filename": "0.jpg", "split": "test", "sentences": [{"raw": "a dog"}, {"raw": "a cat"}]}
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3)).astype(np.uint8))


def write(root, content, name="a.json", images=("images/0.jpg", "images/1.jpg", "images/2.jpg")):
    """Writes mine/<name> (bytes as they are, anything else as JSON) and images of noise; -> root."""
    for image in images:
        (root / "mine" / image).parent.mkdir(parents=True, exist_ok=True)
        NOISE.save(root / "mine" / image)
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    (root / "mine" / name).write_bytes(content)
    return root


def message(call, *words):
    """The text of the UserError that call() raises: one line that holds all the words."""
    with pytest.raises(data.UserError) as error:
        call()
    text = str(error.value)
    assert len(text.splitlines()) == 1 and all(word in text for word in words), text
    return text


def load(root, block, name="mine", **options):
    return data.load_split(name, {"mine": block}, root, **options)


def shapes_split(name="shapes"):
    return data.load_split(name, {"shapes": SHAPES}, ".")


# ---- layouts -----------------------------------------------------------------------------------------------
def test_karpathy_gives_the_images_and_captions_of_each_part_in_order(tmp_path):
    two = [{"raw": "x"}, {"raw": " \n"}, {"raw": "y"}]  # a blank caption is none
    entries = [ENTRY, ENTRY | {"filename": "1.jpg", "split": "restval"},
               {"filename": "2.jpg", "filepath": "other", "split": "train", "sentences": two}]
    write(tmp_path, {"images": entries}, images=("images/0.jpg", "images/1.jpg", "other/2.jpg"))
    assert load(tmp_path, MINE | {"parts": {"train": ["train"]}}, "mine_train").image_names == ["other/2.jpg"]
    train = load(tmp_path, MINE, "mine_train")
    assert train.image_names == ["images/1.jpg", "other/2.jpg"]
    assert train.captions == [["a dog", "a cat"], ["x", "y"]] and train.texts == ["a dog", "a cat", "x", "y"]
    assert train.image_of_text.tolist() == [0, 0, 1, 1] and train.image_of_text.dtype == np.int64
    assert load(str(tmp_path), MINE).image_names == ["images/0.jpg"]


def test_a_list_merges_the_entries_of_one_image_and_coco_has_captions_apart(tmp_path):
    entries = [("images/1.jpg", "one"), ("images/0.jpg", ["2", "3"]), ("images/1.jpg", "four")]
    write(tmp_path, [{"image": image, "caption": caption} for image, caption in entries], "b.json")
    split = load(tmp_path, PARTED)
    assert split.image_names == ["images/1.jpg", "images/0.jpg"]
    assert split.captions == [["one", "four"], ["2", "3"]]
    images = [{"id": 7, "file_name": "2.jpg"}, {"id": 3, "file_name": "0.jpg"}]
    annotations = [{"image_id": n, "caption": caption} for n, caption in ((3, "c"), (7, "a"), (7, "b"))]
    write(tmp_path, {"images": images, "annotations": annotations}, "b.json")
    split = load(tmp_path, PARTED | {"images": {"test": "mine/images"}})
    assert split.image_names == ["2.jpg", "0.jpg"] and split.captions == [["a", "b"], ["c"]]
    assert split.load_image(0).size == (60, 40)


def test_json_lines_are_read_as_a_list(tmp_path):
    entries = [{"image": f"images/{n}.jpg", "caption": "a\u2028b"} for n in (1, 0)]
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    split = load(write(tmp_path, "\n".join([*lines, ""]).encode(), "b.json"), PARTED)
    assert split.image_names == ["images/1.jpg", "images/0.jpg"] and split.texts == ["a\u2028b"] * 2


def test_an_accent_may_be_a_character_of_its_own_or_part_of_a_letter(tmp_path):
    """As one program writes the file's name and another the caption file."""
    for other, name in (("NFD", "caf\u00e9.jpg"), ("NFC", "cafe\u0301.jpg")):
        root = write(tmp_path / other, {"images": [ENTRY | {"filename": unicodedata.normalize(other, name)}]},
                     images=[f"images/{name}"])
        assert load(root, MINE).load_image(0).size == (60, 40)


def test_a_gz_beside_a_missing_file_is_read_unless_it_is_damaged_or_holds_too_much(tmp_path, monkeypatch):
    whole = gzip.compress(json.dumps({"images": [ENTRY]}).encode("utf-8-sig"))
    assert len(load(write(tmp_path, whole, "a.json.gz"), MINE)) == 1
    message(lambda: load(write(tmp_path, whole[:30], "a.json.gz"), MINE), "a.json.gz", "cannot be read")
    monkeypatch.setattr(data, "MAX_JSON", 10)
    message(lambda: load(write(tmp_path, whole, "a.json.gz"), MINE), "a.json.gz", "more than 10 bytes")


def test_split_names_default_to_test_val_and_train_and_carry_folds():
    folds = MINE | {"splits": {"coco1k": {"part": "test", "folds": 5}}}
    names = {"mine": ("mine", "test", 1), "mine_val": ("mine", "val", 1), "mine_train": ("mine", "train", 1),
             "coco1k": ("coco", "test", 5)}
    blocks = {"mine": MINE | {"entities": "e"}, "coco": folds}
    assert data.split_names(blocks) == names
    assert data.name_of_part(blocks, "mine", "val") == "mine_val"
    message(lambda: data.name_of_part(blocks, "coco", "val"), "'coco'", "'val'", "datasets.coco.splits")


def test_a_slice_keeps_the_images_and_their_captions():
    whole, middle = shapes_split(), shapes_split("shapes[10:30]")
    assert len(middle) == 20 and middle.name == "shapes[10:30]"
    assert middle.captions == whole.captions[10:30] and middle.texts == whole.texts[50:150]
    assert middle.image_of_text.tolist() == np.repeat(np.arange(20), 5).tolist()
    assert middle.load_image(3).tobytes() == whole.load_image(13).tobytes()
    assert middle.scenes[3].phrases == whole.scenes[13].phrases
    assert len(shapes_split("shapes[40:]")) == len(shapes_split("shapes[:10]")) == 10


@pytest.mark.skipif(not (SHARED / "data").exists(), reason=f"the development data {SHARED} is not here")
def test_real_captions_and_photographs_load():
    block = {"annotations": "dataset_flickr30k.json", "images": "."}
    split = load(SHARED / "data/flickr30k_captions", block, check_images=False)
    assert len(split) == 1000 and len(split.texts) == 5000
    split = load(SHARED / "data/flickr8k", block | {"annotations": "dataset_flickr8k.json"}, "mine_val[:20]")
    assert len(split) == 20 and len(split.texts) == 100 and split.load_image(0, 112).size == (224, 224)


# ---- one-line errors ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("content, words", [
    (b"", "JSON"), (b"{'images': []}", "JSON"), (b"[" * 100_000, "JSON"), (b'{"images": "\xff"}', "0xff"),
    (3, "is int, must be dict"), ({}, "'images' is missing"), ({"images": {}}, "'images' is dict"),
    ({"images": []}, "it has none"), ([{"image": "0.jpg", "caption": "a"}], "no split: give one file")])
def test_a_file_that_cannot_be_understood_is_named(tmp_path, content, words):
    message(lambda: load(write(tmp_path, content), MINE), "a.json", words)


@pytest.mark.parametrize("change, words", [
    ({"filename": 3}, "'filename' is int"), ({"filename": None}, "'filename' is missing"),
    ({"split": []}, "'split' is list"), ({"split": ""}, "no split"), ({"sentences": {}}, "'sentences' is"),
    ({"sentences": ["a"]}, "sentence 0 is str"), ({"sentences": [{}]}, "'raw' is missing"),
    ({"sentences": [{"raw": "a"}, {"raw": 1}]}, "sentence 1: 'raw'"), ({"filepath": 1}, "'filepath' is int"),
    ({"sentences": [{"raw": "\ud800"}]}, "not Unicode"), ({"sentences": []}, "has no caption"),
    ({"sentences": [{"raw": "  "}]}, "has no caption"), ({"filepath": ".."}, "leaves the image folder")])
def test_a_bad_karpathy_entry_is_named(tmp_path, change, words):
    write(tmp_path, {"images": [ENTRY, ENTRY | {"filename": "1.jpg"} | change]})
    message(lambda: load(tmp_path, MINE), "a.json: entry 1", words)


@pytest.mark.parametrize("path, what", [
    ("../x", "leaves"), ("a/../../b", "leaves"), ("/etc/x", "is absolute"), ("..\\x", "leaves"),
    ("C:\\x", "is absolute"), ("a\\..\\x", "leaves"), ("\\x", "is absolute"), ("..", "leaves")])
def test_a_path_out_of_the_image_folder_is_refused_by_any_systems_rules(tmp_path, path, what):
    write(tmp_path, {"images": [ENTRY | {"filename": path}]})
    message(lambda: load(tmp_path, MINE), "a.json: entry 0", repr(path), what, "the image folder")
    write(tmp_path, [{"image": path, "caption": "a"}], "b.json")
    message(lambda: load(tmp_path, PARTED), "b.json: entry 0", repr(path), what, "the image folder")


ONE, TEXT = {"id": 1, "file_name": "a"}, {"image_id": 1, "caption": "a"}


@pytest.mark.parametrize("content, words", [
    ([], "no image"), (["a.jpg"], "entry 0 is str"), ([{"image": 3}], "entry 0 (3): 'image' is int"),
    ([{"image": "a.jpg"}], "entry 0 ('a.jpg'): caption 0 is missing"),
    ([{"image": "a.jpg", "caption": ["a", None]}], "caption 1 is missing"),
    ([{"image": "a.jpg", "caption": []}], "has no caption"), ({"images": [], "annotations": []}, "no image"),
    ({"images": [], "annotations": 3}, "'annotations' is int"), ({"annotations": []}, "'images' is missing"),
    ({"images": [{"id": "a", "file_name": "a"}], "annotations": []}, "image 0 ('a'): 'id' is str"),
    ({"images": [{"id": 1, "file_name": 2}], "annotations": []}, "'file_name' is int"),
    ({"images": [ONE], "annotations": []}, "image 0 ('a') has no caption"),
    ({"images": [ONE, ONE | {"file_name": "b"}], "annotations": [TEXT]}, "image 1 ('b') has no caption"),
    ({"images": [], "annotations": [TEXT]}, "an image 1 that is not there"),
    ({"images": [], "annotations": [{"image_id": 1}]}, "annotation 0: 'caption' is missing")])
def test_a_bad_entry_of_the_other_layouts_is_named(tmp_path, content, words):
    message(lambda: load(write(tmp_path, content, "b.json"), PARTED), "b.json", words)


def test_missing_files_are_told_with_where_they_belong_and_missing_images_are_counted(tmp_path):
    message(lambda: load(tmp_path, {"annotations": "coco/dataset_coco.json", "images": "coco"}), "karpathy",
            str(tmp_path / "coco/dataset_coco.json"), "images", "--data-root", "--backbone vit_micro")
    write(tmp_path, {"images": [ENTRY | {"filename": f"{n}.jpg"} for n in range(9)]})
    told = message(lambda: load(tmp_path, MINE), "6 of 9", str(tmp_path / "mine"), "/3.jpg", "/5.jpg")
    assert "/6.jpg" not in told and len(load(tmp_path, MINE, check_images=False)) == 9
    message(lambda: load(tmp_path, MINE, "mine_val"), "a.json: no image of split 'val'; it has 'test' (9)")


def test_unknown_splits_empty_slices_and_bad_blocks_are_told(tmp_path):
    message(lambda: shapes_split("nope"), "nope", "shapes, shapes_val, shapes_train")
    message(lambda: shapes_split("shapes[50:]"), "slice is empty", "50 images")
    for change, word in [({"kind": "photos"}, "kind"), ({"size": "64"}, "size"), ({"size": 8}, "size"),
                         ({"seed": -1}, "seed"), ({"hue": 1}, "hue"), ({"scenes": {"train": 5}}, "scenes"),
                         ({"splits": []}, "splits"), ({"splits": {"mine": {"part": "x"}}}, "part"),
                         *(({"splits": {"mine": {"part": "test"} | more}}, "folds")
                           for more in ({"folds": 0}, {"folds": "2"}, {"fold": 2}))]:
        message(lambda: load(".", SHAPES | change), "datasets.mine", word)
    for block in ({}, {"annotations": 3, "images": "x"}, {"annotations": "a"}, None,
                  {"annotations": {"val": "a"}, "images": "x"}, MINE | {"parts": {"test": "test"}}):
        message(lambda: load(tmp_path, block), "datasets.mine")
    other = MINE | {"splits": {"mine": {"part": "val"}}}
    message(lambda: data.split_names({"mine": MINE, "other": other}), "datasets.other.splits.mine", "rename")


# ---- images ------------------------------------------------------------------------------------------------
def image_split(root, image, kind="PNG", **options):
    image.save(root / "image", kind, **options)
    return data.FileSplit("mine", ["image"], [["a"]], root)


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey, deep = Image.new("L", (8, 8), 128), Image.new("I;16", (8, 8), 128 << 8)
    loaded = image_split(tmp_path, deep if mode == "I;16" else grey.convert(mode), "TIFF").load_image(0)
    assert loaded.mode == "RGB" and abs(np.asarray(loaded).mean() - 128) < 3


def test_transparent_pixels_become_white_and_exif_orientation_is_applied(tmp_path):
    clear = image_split(tmp_path, Image.new("RGBA", (4, 4), (0, 0, 0, 0))).load_image(0)
    palette = image_split(tmp_path, Image.new("P", (4, 4), 0), transparency=0).load_image(0)
    assert (np.asarray(clear) == 255).all() and (np.asarray(palette) == 255).all()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert image_split(tmp_path, NOISE, "JPEG", exif=exif).load_image(0).size == (40, 60)


def test_a_large_jpeg_is_decoded_smaller_but_never_below_twice_the_size_asked_for(tmp_path):
    split = image_split(tmp_path, Image.new("RGB", (1600, 1200)), "JPEG")
    assert split.load_image(0).size == split.load_image(0, 601).size == (1600, 1200)
    assert split.load_image(0, 224).size == (800, 600) and split.load_image(0, 64).size == (200, 150)


def test_the_evaluation_transform_squashes_and_the_training_one_crops():
    evaluate, uncut, cut = (data.image_transform(32, (.5,) * 3, (.5,) * 3, *crop) for crop in (
        (), ([1.0, 1.0],), ((.6, 1),)))
    whole = np.asarray(NOISE.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1) / 127.5 - 1
    assert evaluate(NOISE).dtype == torch.float32 and evaluate.size == cut.size == 32
    assert np.allclose(evaluate(NOISE), whole, atol=1.01 / 127.5)  # one grey level
    assert torch.equal(uncut(NOISE), evaluate(NOISE)) and not torch.equal(cut(NOISE), evaluate(NOISE))


# ---- tokens ------------------------------------------------------------------------------------------------
SENTENCE = "Two dogs run on the grass ."


def word_tokenizer(template="[CLS] $A [SEP]"):
    """Whole words in lower case; BERT's, but for its pieces of words."""
    words = f"[PAD] [UNK] [CLS] [SEP] [MASK] <a> <b> {SENTENCE.lower()} to left right a cat".split()
    ids = {word: i for i, word in enumerate(words)}
    tok = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tok.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(mark, ids[mark]) for mark in template.split() if mark != "$A"])
    roles = {f"{role}_token": f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    return PreTrainedTokenizerFast(tokenizer_object=tok, **roles)


def byte_tokenizer(end):
    """Pieces of bytes, as GPT-2, which adds no token, and Qwen, which adds one at the end."""
    tok, last = Tokenizer(models.BPE()), "<|endoftext|>"
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.train_from_iterator([SENTENCE], trainers.BpeTrainer(special_tokens=[last], show_progress=False))
    template = processors.TemplateProcessing(single=f"$A {last}", special_tokens=[(last, 0)])
    steps = [processors.ByteLevel(trim_offsets=False), template]
    tok.post_processor = processors.Sequence(steps if end else steps[:1])
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token=last, pad_token=last)


KINDS = {"BERT": (word_tokenizer, "[CLS] $A [SEP]", 1, 1), "GPT-2": (byte_tokenizer, False, 0, 0),
         "Qwen": (byte_tokenizer, True, 0, 1), "two each": (word_tokenizer, "[CLS] <a> $A <b> [SEP]", 2, 2)}


@pytest.mark.parametrize("kind", KINDS)
def test_own_tokens_are_all_but_those_that_the_tokenizer_adds(kind):
    build, how, before, after = KINDS[kind]
    tok, least = build(how), before + after + 1
    for longest in (64, least + 2, least):
        (caption,), (places,) = (f(tok, [SENTENCE], longest) for f in (data.tokenize, data.token_offsets))
        count = caption.shape[1] - before - after
        assert caption.dtype == np.int32 and caption.shape[1] == len(places) <= longest and count >= 1
        assert caption[1].tolist() == [0] * before + [1] * count + [0] * after  # cutting keeps what is added
        assert places[:before] + places[before + count:] == [(0, 0)] * (before + after)
        said = "".join(SENTENCE[start:end] for start, end in places).replace(" ", "")
        assert said == SENTENCE.replace(" ", "") if longest == 64 else count == longest - least + 1
    message(lambda: data.tokenize(tok, [SENTENCE], least - 1), "text.max_length", f"at least {least}")


def test_unknown_words_and_typed_marks_are_own_tokens_and_no_caption_is_without_one():
    tok = word_tokenizer()
    caption, blank = data.tokenize(tok, ["a zebra [MASK] [SEP] .", "\0"], 64)
    assert tok.decode(caption[0]) == "[CLS] a [UNK] [MASK] [SEP] . [SEP]"
    assert caption[1].tolist() == [0, 1, 1, 1, 1, 1, 0] and blank.tolist() == [[2, 3], [1, 1]]
    tok = byte_tokenizer(False)
    assert data.tokenize(tok, [""], 64)[0].tolist() == [[tok.pad_token_id], [1]]
    assert data.token_offsets(tok, [""], 64) == [[(0, 0)]]


def augmented(caption, seed, drop=0, mask=0, random=0, mask_id=-1, word_ids=range(-99, -1)):
    rng = np.random.default_rng(seed)
    return data.augment_tokens(caption, rng, drop, mask, random, mask_id, np.array(word_ids))


def test_augmentation_drops_masks_and_replaces_own_tokens_at_its_rates_and_leaves_the_others():
    added = [0, 1, 15_000, 30_002]
    caption = np.stack([np.arange(30_003), np.ones(30_003)]).astype(np.int32)
    caption[1, added] = 0
    before = caption.copy()
    ids, own = augmented(caption, 0, drop=.3, mask=.2, random=.1)
    kept, n = ids[own == 1], caption[1].sum()
    rates = 1 - len(kept) / n, (kept == -1).sum() / n, (kept < -1).sum() / n
    assert np.allclose(rates, (.3, .2, .1), atol=.01) and len(np.unique(kept[kept < -1])) == 98
    assert ids[own == 0].tolist() == added and (np.diff(ids[ids >= 0]) > 0).all()
    assert (caption == before).all() and (augmented(caption, 0) == caption).all()


def test_at_least_one_own_token_stays_and_one_token_alone_is_never_doubled():
    caption, alone = np.array([[2, 7, 8, 9, 3], [0, 1, 1, 1, 0]], np.int32), np.array([[7], [1]], np.int32)
    left = {tuple(augmented(caption, seed, drop=1)[0].tolist()) for seed in range(30)}
    assert left == {(2, 7, 3), (2, 8, 3), (2, 9, 3)}
    assert all(augmented(alone, seed, drop=.9).tolist() == [[7], [1]] for seed in range(30))


def test_without_a_mask_token_nothing_is_masked_and_random_words_are_never_special():
    caption, tok = np.ones((2, 300), np.int32), byte_tokenizer(True)
    pairs = train_pairs(shapes_split(), tok=tok)
    assert pairs.mask_id is None and (augmented(caption, 0, mask=1, mask_id=None) == caption).all()
    word_ids = train_pairs(shapes_split()).word_ids  # of its marks the first five are declared special
    ids, _ = augmented(caption, 0, random=1, word_ids=word_ids)
    assert set(ids.tolist()) == set(word_ids.tolist()) == set(range(5, len(word_tokenizer())))


def test_left_and_right_change_places():
    assert data.mirror_words("Left of a right-hand man, leftover") == "Right of a left-hand man, leftover"
    tok = word_tokenizer()
    mirrored = data.mirror_tokens(tok, ["a cat", "to the Left"], 20)
    assert list(mirrored) == [1] and tok.decode(mirrored[1][0]) == "[CLS] to the right [SEP]"


def test_text_batches_cover_every_caption_once_longest_first_and_mark_padding_and_own_tokens():
    captions = data.tokenize(word_tokenizer(), ["cat " * n for n in (3, 1, 5, 1, 2)], 20)
    batches = list(data.text_batches(captions, 2, 99))
    assert sorted(torch.cat([indices for indices, *_ in batches]).tolist()) == list(range(5))
    assert [tuple(ids.shape) for _, ids, _, _ in batches] == [(2, 7), (2, 4), (1, 3)]
    for indices, ids, valid, words in batches:
        assert ids.dtype == torch.int64 and valid.dtype == words.dtype == torch.bool
        assert (ids[~valid] == 99).all() and not words[~valid].any()
        for row, i in enumerate(indices):
            assert np.array_equal(torch.stack([ids[row], words[row]])[:, valid[row]], captions[i])


def test_captions_are_padded_to_a_multiple_but_never_beyond_the_longest_that_the_encoder_takes():
    short, long = (data.tokenize(word_tokenizer(), ["cat " * n], 14) for n in (3, 20))
    assert [data.pad(captions, 0, 8, most=14)[0].shape[1] for captions in (short, long)] == [8, 14]


# ---- items -------------------------------------------------------------------------------------------------
def sampler(mode="captions", batch_size=10, **options):
    return data.PairSampler(shapes_split(), batch_size, mode, seed=3, **options)


def test_an_epoch_shows_every_caption_once_or_every_image_once_with_any_of_its_captions():
    images, texts, seeds = zip(*sum(sampler(), []))
    assert sorted(texts) == list(range(250)) and list(images) == [text // 5 for text in texts]
    assert len(sampler()) == 25 and len(set(seeds)) == 250
    images, texts, _ = zip(*sum(sampler("images"), []))
    assert sorted(images) == list(range(50)) and list(images) == [text // 5 for text in texts]
    assert len(sampler("images")) == 5 and {text % 5 for text in texts} == set(range(5))


def test_epochs_differ_a_resumed_one_goes_on_and_the_ranks_parts_make_up_every_batch():
    whole, rest, other = sampler(), sampler(), sampler()
    rest.start, other.epoch = 6, 1
    assert list(whole)[6:] == list(rest) and len(rest) == len(whole) and list(other) != list(whole)
    parts = [list(sampler(rank=rank, ranks=3)) for rank in range(3)]
    assert [sum(same, []) for same in zip(*parts)] == list(sampler())
    assert {len(batch) for part in parts for batch in part} == {3, 4}
    assert [len(batch) for batch in sampler("images", batch_size=64)] == [50]
    assert [len(batch) for batch in sampler(batch_size=60)] == [60] * 4  # the rest waits for another epoch


def train_pairs(split, train=True, tok=None, **augment):
    tok, crop = tok or word_tokenizer(), (.6, 1) if train else (1, 1)
    transform = data.image_transform(32, (0,) * 3, (1,) * 3, crop)
    captions, mirrored = data.tokenize(tok, split.texts, 32), data.mirror_tokens(tok, split.texts, 32)
    augment = {"flip": .5, "word_drop": 0, "word_mask": 0, "word_random": 0} | augment
    return data.TrainPairs(split, captions, transform, augment, tok, mirrored)


def test_items_are_the_same_whatever_the_workers_and_leave_the_global_randomness_alone():
    pairs, collate = train_pairs(shapes_split(), word_drop=.1, word_mask=.1), partial(data.collate, pad_id=0)
    state, wanted = torch.get_rng_state(), list(sampler())[:3]
    batches = [collate([pairs[item] for item in batch]) for batch in wanted]
    assert torch.equal(state, torch.get_rng_state())
    loader = DataLoader(pairs, batch_sampler=sampler(), collate_fn=collate, num_workers=2)
    for batch, loaded in zip(batches, loader):
        assert all(torch.equal(batch[key], loaded[key]) for key in batch)
    assert batch["images"].shape == (10, 3, 32, 32) and (batch["ids"] == word_tokenizer().mask_token_id).any()
    assert batch["image_ids"].tolist() == [image for image, *_ in wanted[2]]
    assert (batch["ids"][~batch["valid"]] == 0).all() and batch["words"].sum() == batch["valid"].sum() - 20


def test_a_flipped_image_swaps_left_and_right_in_its_caption():
    split = shapes_split()
    text = next(t for t, caption in enumerate(split.texts) if " left " in caption)
    pairs, image, seen = train_pairs(split, train=False), int(split.image_of_text[text]), set()
    upright, right = pairs.transform(split.load_image(image)), word_tokenizer().convert_tokens_to_ids("right")
    for seed in range(20):
        pixels, (ids, _), _ = pairs[image, text, seed]
        seen.add(right in ids)
        assert torch.equal(pixels, upright.flip(2) if right in ids else upright)
    assert seen == {True, False}


def test_an_image_that_vanishes_names_itself_also_from_a_worker(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "2.png")
    split = data.FileSplit("mine", ["2.png"], [["a", "b"]], tmp_path)
    pairs = train_pairs(split, train=False)
    (tmp_path / "2.png").unlink()                     # after the files were looked for
    message(lambda: pairs[0, 0, 0], "2.png")
    load = partial(data.load_images, split=pairs.split, transform=pairs.transform)
    loader = DataLoader(range(1), num_workers=1, collate_fn=load)
    assert message(lambda: list(loader)).startswith(f"no such image: {str(tmp_path / '2.png')!r}, image 0 of")
