"""Images and captions: caption files, image files, tokens, training items, the built-in `shapes` data set.

A data set is a block of configs.yaml; `load_split` turns the name of a split into a `Split`.
"""
import gzip
import json
import math
import os
import posixpath
import re
import unicodedata
import warnings
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2 as T

import shapes

PARTS = {"train": ["train", "restval"], "val": ["val"], "test": ["test"]}  # of a data set: the JSON's splits
BLOCK_KEYS = "annotations images parts entities kind size seed scenes splits config".split()  # of a data set
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # not all that Pillow opens: EPS runs Ghostscript
MAX_JSON = 2 ** 30  # bytes of a caption file; a small .gz can unpack to any number


class UserError(Exception):
    """Something that a user can put right, told in one line: what is wrong, where, and what to do."""

    def __str__(self):  # raised in a DataLoader's worker it comes after a traceback: the last line is ours
        return super().__str__().strip().rpartition("\n")[2].removeprefix(f"{__name__}.UserError: ")


def require(condition, message):
    if not condition:
        raise UserError(message)


def typed(value, kind, label):
    """value, if it is of type `kind` and, where that is str, can be encoded."""
    found = "missing" if value is None else type(value).__name__
    require(type(value) is kind, f"{label} is {found}, must be {kind.__name__}: correct it")
    require(kind is not str or not re.search("[\ud800-\udfff]", value), f"{label} is not Unicode: correct it")
    return value


# ---- splits ------------------------------------------------------------------------------------------------
class Split:
    """A named list of images with their captions. texts (T,): all captions; image_of_text: int64 (T,)."""
    dataset, folds = None, 1  # of load_split: its data set, and in how many folds it is scored

    def __init__(self, name, image_names, captions, folder=None):
        self.name, self.image_names, self.captions, self.folder = name, image_names, captions, folder
        self.texts = [text for texts in captions for text in texts]
        self.image_of_text = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])

    def __len__(self):
        return len(self.image_names)


class FileSplit(Split):
    """Images on disk, each at folder/name."""

    def subset(self, indices):
        return FileSplit(self.name, self.image_names[indices], self.captions[indices], self.folder)

    def load_image(self, i, size=None):
        return read_image(self.folder / self.image_names[i], f"image {i} of {self.name}", size)


class ShapesSplit(Split):
    """Drawn scenes (shapes.Scene), which know their objects and phrases; no files."""

    def __init__(self, name, image_names, scenes):
        super().__init__(name, image_names, [scene.captions for scene in scenes])
        self.scenes = scenes

    def subset(self, indices):
        return ShapesSplit(self.name, self.image_names[indices], self.scenes[indices])

    def load_image(self, i, size=None):  # of the data set's own size, whatever `size`
        return Image.fromarray(self.scenes[i].pixels)


def read_image(source, label, size=None):
    """A path or PIL image -> PIL RGB image, upright, on white. Given `size`, a large JPEG is decoded smaller,
    both sides >= 2 size. label: what UserError calls the image, beside its path."""
    given = isinstance(source, Image.Image)
    require(given or isinstance(source, (str, os.PathLike)),
            f"{label} is a {type(source).__name__}: give a path or a PIL image")
    require(given or os.path.exists(source), f"no such image: {str(source)!r}, {label}: add it")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = source.copy() if given else Image.open(source, formats=FORMATS)
        with image:
            if size is not None:
                image.draft("RGB", (2 * size, 2 * size))  # twice: room for crops and for a clean resize
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            if image.has_transparency_data:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # Pillow's decoders raise nearly any type on damaged bytes
        raise UserError(f"{str(source)!r}, {label}, does not decode ({error!r:.150}): replace it") from None


def split_names(datasets):
    """{split name: (data set, part, folds)} of the `datasets` block; folds is 1 unless stated."""
    names = {}
    for dataset, block in typed(datasets, dict, "configs: datasets").items():
        where = f"configs: datasets.{dataset}"
        unknown = set(typed(block, dict, where)) - set(BLOCK_KEYS)
        require(not unknown, f"{where} has unknown keys {unknown}; valid: {', '.join(BLOCK_KEYS)}")
        usual = {dataset: "test", f"{dataset}_val": "val", f"{dataset}_train": "train"}
        splits = block.get("splits", {name: {"part": part} for name, part in usual.items()})
        for name, split in typed(splits, dict, f"{where}.splits").items():
            label = f"{where}.splits.{name}"
            part, folds = typed(split, dict, label).get("part"), split.get("folds", 1)
            require(part in PARTS and type(folds) is int and folds >= 1 and set(split) <= {"part", "folds"},
                    f"{label} must be {{part: {'|'.join(PARTS)}}} with an optional folds: N, N >= 1")
            require(name not in names, f"{label} is already a split of another data set: rename one")
            names[name] = dataset, part, folds
    return names


def name_of_part(datasets, dataset, part):
    """The name of the first split that is this part of the data set."""
    names = split_names(datasets).items()
    found = [name for name, (owner, own, _) in names if (owner, own) == (dataset, part)]
    require(found, f"data set {dataset!r} has no split of part {part!r}: see datasets.{dataset}.splits")
    return found[0]


def load_split(name, datasets, root, check_images=True, limit=None):
    """The split `name`, which may carry a slice over its images: f8k, f8k_val[:500], f8k_val[500:].
    The paths in `datasets` start from the folder root. check_images: whether all images must be there.
    limit: take only so many images. The split also tells its data set and in how many folds it is scored."""
    base, *bounds = re.fullmatch(r"(.*?)(?:\[(\d*):(\d*)\])?", name, re.DOTALL).groups()
    names = split_names(datasets)
    require(base in names, f"unknown split {name!r}; valid: {', '.join(map(str, names))}, or a slice [:500]")
    dataset, part, folds = names[base]
    read = shapes_split if "kind" in datasets[dataset] else file_split
    whole = read(dataset, datasets[dataset], part, Path(root))
    split = whole.subset(slice(*(int(bound) if bound else None for bound in bounds))).subset(slice(limit))
    split.name, split.dataset, split.folds = name, dataset, folds
    require(len(split), f"{name}: the slice is empty: {base} has {len(whole)} images")
    if check_images and isinstance(split, FileSplit):
        split.image_names = [as_on_disk(split.folder, image) for image in split.image_names]
        missing = [image for image in split.image_names if not os.path.isfile(split.folder / image)]
        require(not missing, f"{name}: {len(missing)} of {len(split)} images are not in {split.folder}: "
                f"{str(missing[:3]):.300}: add them, or change datasets.{dataset}.images or --data-root")
    return split


def as_on_disk(folder, image):
    """The name as the disk writes it: an accent may be a character of its own (macOS) or part of a letter."""
    forms = image, *(unicodedata.normalize(form, image) for form in ("NFC", "NFD"))
    return next((form for form in forms if os.path.isfile(folder / form)), image)


def shapes_split(dataset, block, part, root):
    where, kinds = f"configs: datasets.{dataset}", {"size": int, "seed": int, "scenes": dict}
    size, seed, counts = (typed(block.get(key), kind, f"{where}.{key}") for key, kind in kinds.items())
    count = typed(counts.get(part), int, f"{where}.scenes.{part}")
    require(block["kind"] == "shapes" and count >= 1 and 16 <= size <= 1024 and seed >= 0,
            f"{where} must have kind shapes, size 16 to 1024, seed 0 or more, and 1 or more scenes of a part")
    scenes = shapes.scenes_of(list(PARTS).index(part), count, size, seed)
    return ShapesSplit(dataset, [f"{part}_{i:05d}" for i in range(count)], scenes)


# ---- caption files -----------------------------------------------------------------------------------------
def file_split(dataset, block, part, root):
    """One part of a data set on disk. The content of its JSON tells the layout."""
    where, paths = f"configs: datasets.{dataset}", {}
    for key in ("annotations", "images"):
        path = block.get(key)
        path = path.get(part) if isinstance(path, dict) else path  # one path, or one for each part
        paths[key] = root / typed(path, str, f"{where}.{key} of {part}")
    parts = typed(block.get("parts", {}), dict, f"{where}.parts")
    wanted = typed(parts.get(part, PARTS[part]), list, f"{where}.parts.{part}")
    file, content = read_json(paths["annotations"], paths["images"])
    is_coco = isinstance(content, dict) and "annotations" in content
    read = read_list if isinstance(content, list) else read_coco if is_coco else read_karpathy
    captions, seen = {}, Counter()
    for label, split, path, texts in read(file, content):
        require(split or isinstance(block["annotations"], dict), f"{label} has no split: give one file per "
                f"part in {where}.annotations, as {{train: a.json, val: b.json, test: c.json}}")
        seen[split] += 1
        if not split or split in wanted:
            captions.setdefault(path, (label, []))[1].extend(text for text in texts if text.strip())
    found = ", ".join(f"{split!r:.80} ({n})" for split, n in seen.most_common(8)) or "none"
    require(captions, f"{file}: no image of split {str(wanted)[1:-1]}; it has {found}: change {where}.parts")
    for label, texts in captions.values():
        require(texts, f"{label} has no caption: add one or remove the entry")
    return FileSplit(dataset, list(captions), [texts for _, texts in captions.values()], paths["images"])


def read_json(path, folder):
    """-> (the file that was read: path, or path.gz where only that exists; its content)."""
    file = path if os.path.isfile(path) else Path(f"{path}.gz")
    require(os.path.isfile(file), f"{path}: no such file (Karpathy's: cs.stanford.edu/people/karpathy/"
            f"deepimagesent), with images in {folder}: fetch both or change --data-root; "
            "`--backbone vit_micro` needs no download")
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            content = stream.read(MAX_JSON + 1)
        require(len(content) <= MAX_JSON, f"{file}: holds more than {MAX_JSON:,} bytes: divide the data set")
        text = content.decode("utf-8-sig")
        if re.match(r"\s*\{.*\}[^\S\n]*\n\s*\{", text):  # JSON Lines
            text = "[" + ",".join(filter(str.strip, text.split("\n"))) + "]"
        return file, json.loads(text)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON in UTF-8 ({error}): fetch it again") from None


def labelled(where, what, entries, key=None):
    """Yields (label for messages, entry): the label says where it is, its index, and its value of `key`."""
    for i, entry in enumerate(entries):
        value = f" ({entry[key]!r:.80})" if isinstance(entry, dict) and key in entry else ""
        yield f"{where}: {what} {i}{value}", entry


def field(label, entry, key, kind=str, default=None):
    return typed(typed(entry, dict, label).get(key, default), kind, f"{label}: {key!r}")


def image_path(label, *steps):
    """The steps, joined. None of them may leave the image folder, by any system's rules."""
    for step in steps:
        root, up = re.match(r"[/\\]|.:", step), re.search(r"(^|[/\\])\.\.($|[/\\])", step)
        require(not root, f"{label}: path {step!r:.80} is absolute: make it relative to the image folder")
        require(not up, f"{label}: path {step!r:.80} leaves the image folder: use a path inside it")
    return posixpath.join(*steps)


# Each reader yields (label for messages, split or "", path below the image folder, captions) of every entry.
def read_karpathy(file, content):
    """{"images": [{filepath?, filename, split?, sentences: [{raw}]}]}"""
    for label, entry in labelled(file, "entry", field(file, content, "images", list), "filename"):
        folder, name = field(label, entry, "filepath", default="images"), field(label, entry, "filename")
        sentences = labelled(label, "sentence", field(label, entry, "sentences", list))
        texts = (field(place, sentence, "raw") for place, sentence in sentences)
        yield label, field(label, entry, "split", default=""), image_path(label, folder, name), texts


def read_list(file, content):
    """[{"image", "caption": str or [str]}]"""
    for label, entry in labelled(file, "entry", content, "image"):
        path = image_path(label, field(label, entry, "image"))
        texts = entry["caption"] if isinstance(entry.get("caption"), list) else [entry.get("caption")]
        yield label, "", path, [typed(text, str, f"{label}: caption {k}") for k, text in enumerate(texts)]


def read_coco(file, content):
    """{"images": [{id, file_name}], "annotations": [{image_id, caption}]}"""
    texts = {}
    for label, entry in labelled(file, "annotation", field(file, content, "annotations", list)):
        texts.setdefault(field(label, entry, "image_id", int), []).append(field(label, entry, "caption"))
    for label, entry in labelled(file, "image", field(file, content, "images", list), "file_name"):
        path = image_path(label, field(label, entry, "file_name"))
        yield label, "", path, texts.pop(field(label, entry, "id", int), [])
    require(not texts, f"{file}: annotations name an image {next(iter(texts), 0)} that is not there: add it")


# ---- captions as tokens ------------------------------------------------------------------------------------
def encode(tokenizer, texts, max_length):
    """The fast tokeniser's encodings, cut to max_length tokens, those that it adds included."""
    backend = tokenizer.backend_tokenizer
    least = 1 + backend.num_special_tokens_to_add(False)
    require(max_length >= least, f"text.max_length is {max_length}: with this tokeniser at least {least}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else every forked worker prints a warning
    backend.enable_truncation(max_length)
    backend.no_padding()
    return backend.encode_batch(list(texts))


def tokenize(tokenizer, texts, max_length):
    """-> list of int32 (2, M): token ids; 1 on the caption's own tokens, 0 on those that the tokeniser added.
    A caption without an own token has 1 everywhere; one without any token becomes one of padding."""
    captions = []
    for encoding in encode(tokenizer, texts, max_length):
        ids, own = encoding.ids or [tokenizer.pad_token_id], [1 - n for n in encoding.special_tokens_mask]
        captions.append(np.array([ids, own if any(own) else [1] * len(ids)], dtype=np.int32))
    return captions


def token_offsets(tokenizer, texts, max_length):
    """-> for every caption of `tokenize` its tokens' [(first character, last + 1)], (0, 0) for added ones."""
    return [encoding.offsets or [(0, 0)] for encoding in encode(tokenizer, texts, max_length)]


def mirror_words(text):
    """Swaps "left" and "right": what the caption says of its image's mirror image."""
    other = {"left": "right", "Left": "Right", "right": "left", "Right": "Left"}
    return re.sub(rf"\b({'|'.join(other)})\b", lambda match: other[match[0]], text)


def mirror_tokens(tokenizer, texts, max_length):
    """{text index: tokens of the mirrored caption}, for the captions that change."""
    mirrored = {i: new for i, text in enumerate(texts) if (new := mirror_words(text)) != text}
    return dict(zip(mirrored, tokenize(tokenizer, mirrored.values(), max_length)))


def augment_tokens(caption, rng, drop, mask, random, mask_id, word_ids):
    """Own tokens of a caption (2, M) leave with probability `drop`, become mask_id with probability `mask`,
    if there is one, and any of word_ids (n,) with probability `random`. At least one stays."""
    ids, own = caption[0].copy(), np.flatnonzero(caption[1])
    fate = np.searchsorted(np.cumsum([drop, mask, random]), rng.random(len(own)), side="right")
    if mask_id is not None:
        ids[own[fate == 1]] = mask_id
    ids[own[fate == 2]] = rng.choice(word_ids, (fate == 2).sum())
    if (fate == 0).all():
        fate[rng.integers(len(own))] = 3
    return np.delete(np.stack([ids, caption[1]]), own[fate == 0], axis=1)


def pad(captions, pad_id, multiple=1, most=math.inf):
    """list of (2, M) -> ids (B, M) int64, valid (B, M): not padding, words (B, M) bool: the captions' own.
    M is rounded up to a multiple of `multiple`, but not above `most`."""
    columns = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(c.T).long() for c in captions], True)
    more = min(-columns.shape[1] % multiple, most - columns.shape[1])
    ids, words = torch.nn.functional.pad(columns, (0, 0, 0, more)).unbind(-1)
    valid = torch.arange(ids.shape[1]) < torch.tensor([[c.shape[1]] for c in captions])
    return ids.masked_fill(~valid, pad_id), valid, words.bool()


def text_batches(captions, batch_size, pad_id):
    """Yields (indices (b,), ids, valid, words (b, M)), longest first, so that there is little padding."""
    order = np.argsort([-caption.shape[1] for caption in captions], kind="stable")
    for indices in np.split(order, range(batch_size, len(order), batch_size)):
        yield torch.from_numpy(indices), *pad([captions[i] for i in indices], pad_id)


# ---- items and batches -------------------------------------------------------------------------------------
def image_transform(size, mean, std, crop=(1, 1)):
    """PIL image -> (3, size, size) float32, normalised. The whole image is squashed into the square or, with
    `crop` (low, high), in training, a random part of it, whose share of the area lies between the two."""
    resize = T.Resize((size, size), T.InterpolationMode.BICUBIC)
    if tuple(crop) != (1, 1):
        resize = T.RandomResizedCrop(size, scale=tuple(crop), interpolation=T.InterpolationMode.BICUBIC)
    to_float = T.ToDtype(torch.float32, scale=True)  # after resizing, which is faster on bytes
    transform = T.Compose([T.PILToTensor(), resize, to_float, T.Normalize(mean, std)])
    transform.size = size  # tells load_image how large a decoded image must be
    return transform


class PairSampler:
    """Batches of (image, text, item seed) of one epoch, the same for any number of workers: runs can resume.
    mode "captions": every caption once; "images": every image once, with any caption of it. The caller sets
    `epoch`, and `start`, how many of its batches to skip. Each rank yields its part of every batch."""

    def __init__(self, split, batch_size, mode, seed, rank=0, ranks=1):
        self.image_of_text, self.items = split.image_of_text, len(split if mode == "images" else split.texts)
        self.batch_size, self.mode, self.seed = batch_size, mode, seed
        self.rank, self.ranks, self.epoch, self.start = rank, ranks, 0, 0

    def __len__(self):
        return max(1, self.items // self.batch_size)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        texts = rng.permutation(len(self.image_of_text))
        if self.mode == "images":
            _, first = np.unique(self.image_of_text[texts], return_index=True)
            texts = rng.permutation(texts[first])
        images, seeds = self.image_of_text[texts], rng.integers(2 ** 62, size=len(texts))
        items = list(zip(images.tolist(), texts.tolist(), seeds.tolist()))
        for b in range(self.start, len(self)):
            batch = items[b * self.batch_size:(b + 1) * self.batch_size]
            yield batch[len(batch) * self.rank // self.ranks:len(batch) * (self.rank + 1) // self.ranks]


class TrainPairs(torch.utils.data.Dataset):
    """(image, text, item seed) -> (image (3, H, W) float32, caption (2, M), image); the seed decides all.
    mirrored: captions of flipped images, from mirror_tokens."""

    def __init__(self, split, captions, transform, augment, tokenizer, mirrored):
        self.split, self.captions, self.mirrored = split, captions, mirrored
        self.transform, self.augment = transform, augment
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.mask_id = tokenizer.mask_token_id
        self.word_ids = np.array(sorted(set(tokenizer.get_vocab().values()) - special))

    def __getitem__(self, item):
        image, text, seed = item
        rng = np.random.default_rng(seed)
        pixels, caption = self.split.load_image(image, self.transform.size), self.captions[text]
        if rng.random() < self.augment["flip"]:
            pixels, caption = ImageOps.mirror(pixels), self.mirrored.get(text, caption)
        rates = (self.augment[key] for key in ("word_drop", "word_mask", "word_random"))
        caption = augment_tokens(caption, rng, *rates, self.mask_id, self.word_ids)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerator too
            return self.transform(pixels), caption, image


def collate(items, pad_id, **length):
    """Items of TrainPairs -> {"images" (B, 3, H, W), "ids", "valid", "words" (B, M), "image_ids" (B,)}"""
    images, captions, image_ids = zip(*items)
    text = dict(zip(("ids", "valid", "words"), pad(captions, pad_id, **length)))
    return {"images": torch.stack(images), "image_ids": torch.tensor(image_ids), **text}


def load_images(indices, split, transform):
    """Images of a split -> (b, 3, H, W) float32."""
    return torch.stack([transform(split.load_image(i, transform.size)) for i in indices])
