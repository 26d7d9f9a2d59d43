"""Images and captions: caption JSONs, image files, tokens, training items, and the built-in `shapes` data set.

A data set is one block of configs.yaml; `load_split` turns the name of a split into a `Split`. Whatever is wrong with
the input raises `DataError`, whose text is one line that names the file and the entry and says what to do.
"""
import gzip
import json
import math
import os
import posixpath
import re
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

import numpy as np
import torch
from PIL import Image, ImageOps
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torchvision.transforms import v2 as T
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import entities
import hub
from shapes import Scene

PARTS = ("train", "val", "test")
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # not all that Pillow opens: EPS runs Ghostscript
REPLACEMENTS = 10  # tries for a readable image before skip_bad_images gives up
MAX_JSON = 2 ** 30  # bytes of a caption file; a small .gz can unpack to any number


class DataError(Exception):
    """Bad input, told in one line."""

    def __str__(self):  # a DataLoader worker's error arrives with the worker's traceback before it: the last line is ours
        return super().__str__().strip().rpartition("\n")[2].removeprefix(f"{__name__}.DataError: ")


def require(condition, message):
    if not condition:
        raise DataError(message)


def brief(error):
    return " ".join(f"{type(error).__name__}: {error}".split())[:150]


# ---- splits ----------------------------------------------------------------------------------------------------------
class Split:
    """A named list of images, each with one or more captions.
    texts: every caption, image by image, T in all; image_of_text: int64 (T,), the image of each."""

    def __init__(self, name, image_names, captions):
        self.name, self.image_names, self.captions = name, image_names, captions
        self.texts = [text for texts in captions for text in texts]
        self.image_of_text = np.repeat(np.arange(len(captions)), [len(texts) for texts in captions])

    def __len__(self):
        return len(self.image_names)

    def phrases(self, i):
        """For each caption of image i the list of its Phrases, or None where they are not known."""
        return [None] * len(self.captions[i])

    def objects(self, i):
        """Every box (x0, y0, x1, y1) of image i in fractions of its sides, as far as known."""
        return []

    def outlines(self, i):
        """Every object's corners [(x, y), ...], which only drawn images know."""
        return []


class FileSplit(Split):
    """Images on disk, each at folder/name."""

    def __init__(self, name, image_names, captions, folder):
        super().__init__(name, image_names, captions)
        self.folder = folder

    def subset(self, indices):
        return FileSplit(self.name, self.image_names[indices], self.captions[indices], self.folder)

    def load_image(self, i, size=None):
        """-> PIL RGB image, upright. Given `size`, a large JPEG is decoded at 1/2, 1/4 or 1/8, both sides >= 2 size."""
        path = self.folder / self.image_names[i]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                image = Image.open(path, formats=FORMATS)
            with image:
                if size is not None:
                    image.draft("RGB", (2 * size, 2 * size))  # twice: room for crops and for a clean resize
                ImageOps.exif_transpose(image, in_place=True)
                if image.mode.startswith("I;16"):  # convert() would clip 16 bits to white
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                if image.has_transparency_data:
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
                return image.convert("RGB")
        except Exception as error:  # Pillow's decoders raise nearly any type on damaged bytes
            raise DataError(f"{path}: image {i} of {self.name} ({self.image_names[i]!r}) does not decode "
                            f"({brief(error)}): replace the file or remove its entry") from None


class EntitiesSplit(FileSplit):
    """Images on disk with the captions, phrases and boxes of Flickr30K Entities."""

    def __init__(self, split, folder):
        try:
            read = [entities.read_image(folder, Path(name).stem) for name in split.image_names]
        except OSError as error:
            raise DataError(f"{split.name}: cannot read {error.filename} ({error.strerror}): Flickr30K Entities belongs in "
                            f"{folder}, with its folders Sentences and Annotations") from None
        except ValueError as error:
            raise DataError(str(error)) from None
        super().__init__(split.name, split.image_names, [captions for captions, _ in read], split.folder)
        self.all_phrases = [phrases for _, phrases in read]

    def phrases(self, i):
        return self.all_phrases[i]

    def objects(self, i):
        return list(dict.fromkeys(box for phrases in self.phrases(i) for p in phrases for box in p.boxes))


def with_phrases(split, datasets, root):
    """The split with the phrases and boxes of the folder that `entities` of its data set's block names; without one, as it is."""
    dataset = split_names(datasets)[split.name.split("[")[0]][0]
    folder = datasets[dataset].get("entities")
    if folder is None:
        return split
    require(type(folder) is str, f"datasets.{dataset}.entities must be a folder in the form of Flickr30K Entities")
    return EntitiesSplit(split, Path(root) / folder)


def split_names(datasets):
    """{split name: (data set, part, folds)} of every split in the `datasets` block; folds is 1 unless stated."""
    names = {}
    require(isinstance(datasets, dict), "configs: datasets must be a map from a data set's name to where it lies")
    for dataset, block in datasets.items():
        where = f"configs: datasets.{dataset}"
        require(isinstance(block, dict), f"{where} must be a map")
        valid = {"splits", "config", *(("kind", "size", "seed", "scenes") if "kind" in block else
                                       ("annotations", "images", "parts", "entities"))}
        require(set(block) <= valid, f"{where} has unknown keys {set(block) - valid}; valid: {', '.join(sorted(valid))}")
        default = {dataset: {"part": "test"}, f"{dataset}_val": {"part": "val"}, f"{dataset}_train": {"part": "train"}}
        splits = block.get("splits", default)
        require(isinstance(splits, dict), f"{where}.splits must be a map from a split's name to {{part: ...}}")
        for name, split in splits.items():
            folds = split.get("folds", 1) if isinstance(split, dict) and set(split) <= {"part", "folds"} else None
            require(type(folds) is int and folds >= 1 and split.get("part") in PARTS,
                    f"{where}.splits.{name} must be {{part: {'|'.join(PARTS)}}} with an optional folds: N, N >= 1")
            require(name not in names, f"{where}.splits.{name} is already a split of another data set: rename one")
            names[name] = (dataset, split["part"], folds)
    return names


def splits_of(names, dataset, part):
    """The splits among `names`, as split_names returns them, that are this part of the data set; at least one."""
    found = [name for name, (owner, own, _) in names.items() if (owner, own) == (dataset, part)]
    require(found, f"data set {dataset!r} has no split that is its part {part!r}: name one, as "
                   f"{dataset}_{part}: {{part: {part}}}, below datasets.{dataset}.splits")
    return found


def load_split(name, datasets, root, check_images=True):
    """The split `name`, which may carry a slice over its images: f8k, f8k_val[:500], f8k_val[500:].
    datasets: the `datasets` block of configs.yaml; root: the folder that its paths start from (--data-root).
    check_images=False skips the check that every image file is there, for work on captions alone."""
    base, first, last = re.fullmatch(r"(.*?)(?:\[(\d*):(\d*)\])?", name, re.DOTALL).groups()
    names = split_names(datasets)
    require(base in names, f"unknown split {name!r}; valid: {', '.join(names)} (each may carry a slice such as [:500])")
    dataset, part, _ = names[base]
    block, where = datasets[dataset], f"configs: datasets.{dataset}"
    whole = shapes_split(block, part, where) if "kind" in block else file_split(dataset, block, part, Path(root), where)
    split = whole.subset(slice(int(first) if first else None, int(last) if last else None))
    split.name = name
    require(len(split), f"{name}: the slice is empty: {base} has {len(whole)} images")
    if check_images and isinstance(split, FileSplit):
        missing = [image for image in split.image_names if not os.path.isfile(split.folder / image)]
        require(not missing, f"{name}: {len(missing)} of {len(split)} images are missing in {split.folder}, first "
                f"{', '.join(f'{image!r:.80}' for image in missing[:3])}: put them there, or change {where}.images or --data-root")
    return split


# ---- caption files: each reader returns [(label for messages, (folder, file name), captions)], checked by file_split -
def file_split(dataset, block, part, root, where):
    """Reads one part of a data set on disk; the layout of its JSON is told by its content."""

    def of_part(key):  # `annotations` and `images` are one path, or one per part
        value = block.get(key)
        if isinstance(value, dict):
            require(part in value, f"{where}.{key} has no {part!r}, only {', '.join(map(repr, value))}")
            value = value[part]
        require(type(value) is str, f"{where}.{key} must be a path, or a map from {', '.join(PARTS)} to a path each")
        return root / value
    wanted = block.get("parts", {})
    require(isinstance(wanted, dict) and all(isinstance(value, list) and value for value in wanted.values()),
            f"{where}.parts must map a part to a list of split names in the file, such as train: [train, restval]")
    path, folder = of_part("annotations"), of_part("images")
    one_file = not isinstance(block["annotations"], dict)
    file, content = read_json(path, folder, dataset)
    if isinstance(content, list) and (not content or isinstance(content[0], dict) and "image" in content[0]):
        entries = read_list(file, content)
    elif isinstance(content, dict) and isinstance(content.get("images"), list):
        if "annotations" in content:
            entries = read_coco(file, content)
        else:
            entries, one_file = read_karpathy(file, content, wanted.get(part, [part]), one_file), False
    else:
        raise DataError(f"{file}: unknown layout; known: Karpathy {{'images': [{{'filename', 'split', 'sentences'}}]}}, "
                        "a list [{'image', 'caption'}], COCO {'images', 'annotations'}")
    require(not one_file, f"{file}: this layout has no splits inside: give one file per part in {where}.annotations, "
            "such as {train: a.json, val: b.json, test: c.json}")
    require(entries, f"{file}: holds no images: give a file with at least one")
    names, captions = [], []
    for label, steps, texts in entries:
        for step in steps:
            safe = posixpath.normpath(step.replace("\\", "/")).split("/")[0] != ".." and not PureWindowsPath(step).anchor
            require(safe, f"{label}: path {step!r:.80} leaves the image folder: use a path relative to it")
        texts = [typed(text, str, f"{label}: caption {k}") for k, text in enumerate(texts)]
        captions.append([text for text in texts if text.strip()])
        require(captions[-1], f"{label} has no caption: add one or remove the entry")
        names.append(posixpath.join(*steps))
    return FileSplit(dataset, names, captions, folder)


def read_json(path, folder, dataset):
    """-> (the file that was read: path, or path.gz where only that exists; its content)."""
    zipped = path.with_name(path.name + ".gz")
    file = zipped if zipped.is_file() and not path.is_file() else path
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rb") as stream:
            data = stream.read(MAX_JSON + 1)
        require(len(data) <= MAX_JSON, f"{file}: holds more than {MAX_JSON:,} bytes: divide it over several data sets")
        return file, json.loads(data.decode("utf-8-sig"))
    except FileNotFoundError:
        source = " (Karpathy's split file: cs.stanford.edu/people/karpathy/deepimagesent)" * path.name.startswith("dataset_")
        raise DataError(f"{path}: no such file: {dataset} needs {path.name!r}{source} there and its images in {folder}; is "
                        "--data-root right? `--backbone vit_micro` trains on the built-in scenes without a download") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not valid UTF-8 at byte {error.start}: save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}: not JSON ({brief(error)}): fetch or write the file again") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({brief(error)}): fetch it again or check its permissions") from None


def typed(value, kind, label):
    """value, if it is of type `kind`, and text that can be encoded if that is str."""
    if type(value) is not kind:
        found = "missing" if value is None else type(value).__name__
        raise DataError(f"{label} is {found}, must be {kind.__name__}: correct the entry")
    if kind is str and not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise DataError(f"{label} holds half a surrogate pair, which is not text: correct the entry")
    return value


def labelled(file, items, name_key, what="entry"):
    """Yields (label, entry): the label names the file, the index and the image's name where the entry has one."""
    for i, entry in enumerate(items):
        name = f" ({entry[name_key]!r:.80})" if type(entry) is dict and name_key in entry else ""
        yield f"{file}: {what} {i}{name}", typed(entry, dict, f"{file}: {what} {i}")


def read_karpathy(file, content, wanted, need_split):
    """{"images": [{filepath?, filename, split, sentences: [{raw}]}]}, the entries of the wanted splits."""
    entries, seen = [], Counter()
    for label, entry in labelled(file, content["images"], "filename"):
        split = typed(entry.get("split"), str, f"{label}: 'split'") if need_split or "split" in entry else wanted[0]
        seen[split] += 1
        if split not in wanted:
            continue
        steps = (typed(entry.get("filepath", "images"), str, f"{label}: 'filepath'"),
                 typed(entry.get("filename"), str, f"{label}: 'filename'"))
        sentences = typed(entry.get("sentences"), list, f"{label}: 'sentences'")
        entries.append((label, steps, [typed(s, dict, f"{label}: sentence {k}").get("raw") for k, s in enumerate(sentences)]))
    found = ", ".join(f"{split!r:.80} ({n})" for split, n in seen.most_common(8)) or "no images"
    require(entries, f"{file}: no image of split {' or '.join(map(repr, wanted))}; the file has {found}: change `parts`")
    return entries


def read_list(file, content):
    """[{"image", "caption": str or [str]}]; entries of one image are merged."""
    entries = {}
    for label, entry in labelled(file, content, "image"):
        name, texts = typed(entry.get("image"), str, f"{label}: 'image'"), entry.get("caption")
        texts = texts if type(texts) is list else [typed(texts, str, f"{label}: 'caption'")]
        entries.setdefault(name, (label, (name,), []))[2].extend(texts)
    return list(entries.values())


def read_coco(file, content):
    """{"images": [{id, file_name}], "annotations": [{image_id, caption}]}."""
    entries = {}
    for label, entry in labelled(file, content["images"], "file_name", "image"):
        key = typed(entry.get("id"), int, f"{label}: 'id'")
        require(key not in entries, f"{label}: id {key} is another image's already: give every image its own")
        entries[key] = (label, (typed(entry.get("file_name"), str, f"{label}: 'file_name'"),), [])
    for label, entry in labelled(file, typed(content["annotations"], list, f"{file}: 'annotations'"), "id", "annotation"):
        key = typed(entry.get("image_id"), int, f"{label}: 'image_id'")
        require(key in entries, f"{label}: no image has the id {key}: add the image or remove the annotation")
        entries[key][2].append(typed(entry.get("caption"), str, f"{label}: 'caption'"))
    return list(entries.values())


# ---- tokens ----------------------------------------------------------------------------------------------------------
def load_tokenizer(name, captions=None):
    """The tokenizer `name`: a local folder, or a name in the hub's cache or on the hub.
    captions: give them where a vocabulary of one's own will do (a text encoder from scratch); it is built from them
    when name is None or cannot be loaded."""
    try:
        require(name is not None, "text.name is not set")
        tok = hub.load(name, lambda **where: AutoTokenizer.from_pretrained(name, trust_remote_code=False, **where))
        require(isinstance(tok, PreTrainedTokenizerFast), "it has no fast tokenizer")
    except (OSError, DataError) as error:
        require(captions, f"text.name: no tokenizer ({error}): give a local folder with --set text.name=DIR")
        if name is not None:
            warnings.warn(f"tokenizer {name!r} cannot be loaded: using a vocabulary built from the captions")
        return build_tokenizer(captions)
    if tok.pad_token is None:  # padding is masked everywhere, so any token will do
        tok.pad_token = tok.eos_token or tok.unk_token
    return tok


def build_tokenizer(captions):
    """Lower-case words and punctuation marks; the vocabulary is every word of the captions, frequent ones first."""
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts = Counter(word for text in captions for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text)))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    ids = {word: i for i, word in enumerate([*special.values(), *words])}
    tok = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer = normalizer, splitter
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(mark, ids[mark]) for mark in ("[CLS]", "[SEP]")])
    return PreTrainedTokenizerFast(tokenizer_object=tok, **special)


def tokenizer_state(tok):
    """A tokenizer as plain strings, for a checkpoint that loads with weights_only=True."""
    state = json.loads(tok.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}  # those are of the last call
    special = {key: str(token) for key, token in tok.special_tokens_map.items() if isinstance(token, str)}
    return {"tokenizer": json.dumps(state), "special": special}


def tokenizer_from_state(state):
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(state["tokenizer"]), **state["special"])


def tokenize(tok, texts, max_length):
    """-> list of int32 (M,), M <= max_length with the special tokens, which truncation keeps."""
    require(max_length >= 3, f"text.max_length is {max_length}: at least 3, for a word between two special tokens")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said aloud, else every forked worker prints a warning
    tok.backend_tokenizer.enable_truncation(max_length)
    tok.backend_tokenizer.no_padding()
    return [np.array(e.ids, dtype=np.int32) for e in tok.backend_tokenizer.encode_batch_fast(list(texts))]


def mirror_words(text):
    """Swaps "left" and "right": what the caption says of its image's mirror image."""
    other = {"left": "right", "Left": "Right", "LEFT": "RIGHT", "right": "left", "Right": "Left", "RIGHT": "LEFT"}
    return re.sub(rf"\b({'|'.join(other)})\b", lambda match: other[match[0]], text)


def mirror_tokens(tok, texts, max_length):
    """{text index: ids of the mirrored caption}, for the captions that change (0.7% of Flickr30K's)."""
    mirrored = {i: new for i, text in enumerate(texts) if (new := mirror_words(text)) != text}
    return dict(zip(mirrored, tokenize(tok, mirrored.values(), max_length))) if mirrored else {}


def augment_tokens(ids, rng, drop, mask, mask_id):
    """Drops a token with probability `drop`, replaces it by mask_id with probability `mask` (mask_id None: never).
    ids: (M,); the first and the last are special and stay; at least one inner token stays."""
    inner = ids[1:-1].copy()
    u = rng.random(len(inner))
    keep = u >= drop
    if mask_id is not None:
        inner[keep & (u < drop + mask)] = mask_id
    if len(inner) and not keep.any():
        keep[rng.integers(len(inner))] = True
    return np.concatenate([ids[:1], inner[keep], ids[-1:]])


def pad(token_ids, pad_id):
    """list of (M_i,) -> ids (B, M) int64, valid (B, M) bool."""
    lengths = torch.tensor([len(ids) for ids in token_ids])[:, None]
    valid = torch.arange(int(lengths.max())) < lengths
    tokens = [torch.as_tensor(ids).long() for ids in token_ids]
    return torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=pad_id), valid


def text_batches(token_ids, batch_size, pad_id):
    """Yields (indices (b,), ids (b, M) int64, valid (b, M) bool), longest first, so that there is little padding."""
    order = np.argsort([-len(ids) for ids in token_ids], kind="stable")
    for indices in np.split(order, range(batch_size, len(order), batch_size)):
        yield torch.from_numpy(indices), *pad([token_ids[i] for i in indices], pad_id)


# ---- items and batches -----------------------------------------------------------------------------------------------
def image_transform(size, mean, std, train, crop=(0.6, 1.0)):
    """PIL image -> (3, size, size) float32, normalised.
    Training crops a random share `crop` of the area; (1, 1) is no crop. Evaluation squashes the whole image into the
    square, as LAPS and VSE do: nothing that a caption mentions is cut off."""
    resize = T.Resize((size, size), T.InterpolationMode.BICUBIC, antialias=True)
    if train and tuple(crop) != (1, 1):
        resize = T.RandomResizedCrop(size, scale=tuple(crop), interpolation=T.InterpolationMode.BICUBIC, antialias=True)
    # on bytes in a tensor, which torchvision resizes twice as fast as Pillow, nearly everywhere to within a grey level of it
    transform = T.Compose([T.PILToTensor(), resize, T.ToDtype(torch.float32, scale=True), T.Normalize(mean, std)])
    transform.size = size  # tells load_image how large a decoded image must be
    return transform


class PairSampler:
    """Batches of (image, text, item seed) of one epoch; the same whatever the number of workers, so that runs resume.
    mode "captions": every caption once an epoch; "images": every image once, with a random caption of it.
    The caller sets `epoch`, and `start`: how many of the epoch's batches to skip (back to 0 for the next epoch).
    With several ranks, each yields its part of every batch; the parts differ by at most one."""

    def __init__(self, split, batch_size, epoch_mode, seed, drop_last=True, rank=0, ranks=1):
        require(epoch_mode in ("captions", "images"), f"unknown data.epoch {epoch_mode!r}; valid: captions, images")
        self.rank, self.ranks = rank, ranks
        self.image_of_text, self.images, self.batch_size = split.image_of_text, len(split), batch_size
        self.mode, self.seed, self.drop_last, self.epoch, self.start = epoch_mode, seed, drop_last, 0, 0

    def __len__(self):
        n = self.items
        return max(1, n // self.batch_size) if self.drop_last else math.ceil(n / self.batch_size)

    @property
    def items(self):
        return self.images if self.mode == "images" else len(self.image_of_text)

    def __iter__(self):
        rng = np.random.default_rng([self.seed, self.epoch])
        if self.mode == "images":
            images = rng.permutation(self.images)
            texts = rng.integers(np.searchsorted(self.image_of_text, images),
                                 np.searchsorted(self.image_of_text, images, side="right"))
        else:
            texts = rng.permutation(len(self.image_of_text))
            images = self.image_of_text[texts]
        items = list(zip(images.tolist(), texts.tolist(), rng.integers(2 ** 62, size=len(texts)).tolist()))
        for b in range(self.start, len(self)):
            batch = items[b * self.batch_size:(b + 1) * self.batch_size]
            yield batch[len(batch) * self.rank // self.ranks:len(batch) * (self.rank + 1) // self.ranks]


class TrainPairs(torch.utils.data.Dataset):
    """(image, text, item seed) -> (image (3, H, W) float32, ids (M,) int64, image); all randomness is the item seed's.
    flip: probability of mirroring the image, and left and right in its caption: `mirrored` is what mirror_tokens gives.
    skip_bad: another pair, which the seed decides, takes the place of one whose image cannot be read; `bad` (images,) bool
    notes it, in memory that the data-loading processes share."""

    def __init__(self, split, token_ids, transform, mask_id, word_drop, word_mask, flip=0.0, mirrored=None, skip_bad=False):
        self.split, self.token_ids, self.transform, self.mirrored = split, token_ids, transform, mirrored
        self.mask_id, self.word_drop, self.word_mask, self.flip = mask_id, word_drop, word_mask, flip
        self.skip_bad, self.bad = skip_bad, torch.zeros(len(split), dtype=torch.bool).share_memory_()

    def load(self, image, text, seed):
        """-> (pixels, image, text), of the pair asked for or of one in its place."""
        size, others = self.transform.size, np.random.default_rng([seed, 1])
        for _ in range(REPLACEMENTS if self.skip_bad else 0):
            try:
                return self.split.load_image(image, size), image, text
            except DataError:
                self.bad[image] = True
            text = int(others.integers(len(self.token_ids)))
            image = int(self.split.image_of_text[text])
        return self.split.load_image(image, size), image, text

    def __getitem__(self, item):
        image, text, seed = item
        rng = np.random.default_rng(seed)
        pixels, image, text = self.load(image, text, seed)
        ids = self.token_ids[text]
        if rng.random() < self.flip:
            pixels, ids = ImageOps.mirror(pixels), self.mirrored.get(text, ids)
        ids = augment_tokens(ids, rng, self.word_drop, self.word_mask, self.mask_id)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerator as well
            pixels = self.transform(pixels)
        return pixels, torch.from_numpy(ids.astype(np.int64)), image


@dataclass
class Collate:
    """Items of TrainPairs -> {"images" (B,3,H,W), "ids" (B,M) int64, "valid" (B,M) bool, "image_ids" (B,) int64}."""
    pad_id: int

    def __call__(self, items):
        images, token_ids, image_ids = zip(*items)
        ids, valid = pad(token_ids, self.pad_id)
        return {"images": torch.stack(images), "ids": ids, "valid": valid, "image_ids": torch.tensor(image_ids)}


class EvalImages(torch.utils.data.Dataset):
    """i -> image (3, H, W) float32."""

    def __init__(self, split, transform):
        self.split, self.transform = split, transform

    def __len__(self):
        return len(self.split)

    def __getitem__(self, i):
        return self.transform(self.split.load_image(i, self.transform.size))


class ShapesSplit(Split):
    """Scenes drawn from (seed, part, index), no files."""

    def __init__(self, name, image_names, scenes):
        super().__init__(name, image_names, [scene.captions for scene in scenes])
        self.scenes = scenes

    def subset(self, indices):
        return ShapesSplit(self.name, self.image_names[indices], self.scenes[indices])

    def load_image(self, i, size=None):  # of the data set's own size, whatever `size`
        return Image.fromarray(self.scenes[i].pixels)

    def phrases(self, i):
        return self.scenes[i].phrases

    def objects(self, i):
        return [o.box for o in self.scenes[i].objects]

    def outlines(self, i):
        return [o.outline for o in self.scenes[i].objects]


def shapes_split(block, part, where):
    size, seed, scenes = block.get("size", 64), block.get("seed", 0), block.get("scenes", dict(train=4000, val=1000, test=1000))
    require(block["kind"] == "shapes", f"{where}.kind is {block['kind']!r}; valid: shapes (leave it out for files)")
    require(type(size) is int and 16 <= size <= 1024, f"{where}.size must be a whole number from 16 to 1024")
    require(type(seed) is int and seed >= 0, f"{where}.seed must be a whole number >= 0")
    count = scenes.get(part) if isinstance(scenes, dict) else None
    require(type(count) is int and count >= 1, f"{where}.scenes must map {part} to a whole number >= 1")
    drawn = {f"{part}_{i:05d}": Scene([seed, PARTS.index(part), i], size) for i in range(count)}
    return ShapesSplit("shapes", list(drawn), list(drawn.values()))
