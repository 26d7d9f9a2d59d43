"""Does each part find what it is for? Phrases against boxes, masks against objects and words, regions.

    python ground_grm.py --ckpt best.pt --split shapes

pointing     phrases whose map over the patches l, sum_m w_m <v_l, t_m> / sum_m w_m, is highest in their box.
             words: its tokens m weigh alike. masks: by A_T; the map, scaled to [0, 1], is multiplied by A_V.
             chance: a patch at random.
AUC          image: the mask of patches in boxes against others; text: of content against function words.
cosine       mean between two regions of an image.
variance     of a phrase's region, the prior's being 1: phrases of several boxes less those of one.
open         of gated regions, those that an image uses. with objects: correlation with how many it shows.

Boxes come with `shapes`, and with Flickr30K Entities: `entities` of a data set's block names the folder.
"""
import argparse


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint, as eval_grm.py takes it")
    parser.add_argument("--split", metavar="NAME", help="as f8k_val[500:] (default: the run's test split)")
    parser.add_argument("--config", metavar="FILE", help="take the data sets from this file")
    parser.add_argument("--data-root", metavar="DIR", help="folder of data sets (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images at a time")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images and their captions")
    parser.add_argument("--size", type=int, metavar="PX", help="pixels of the images (default: the run's)")
    parser.add_argument("--out", metavar="DIR", help="write DIR/grounding.json")
    args = parser.parse_args(argv)
    if any(n is not None and n < 1 for n in (args.batch_size, args.limit, args.size)):
        parser.error("--batch-size, --limit and --size must be at least 1")
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()

import json
import math
import re
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np
import torch.nn.functional as F
from tqdm import tqdm

import data
import eval_grm
import runs
from shapes import Phrase

FUNCTION_WORDS = set("a an the some this that these those is are was were be there here it its his her their "
                     "of to on in at by for from as with along and or".split())
PLACE_WORDS = set("left right above over below under near next between behind front".split())
EDGES = "xmin", "ymin", "xmax", "ymax"
MARK = re.compile(r"\[/EN#(\d+)/[^\s\[\]]+ ([^\[\]]+)\]")


# ---- figures -----------------------------------------------------------------------------------------------
def auc(positive, negative):
    """Area under the ROC curve, P(positive > negative) + P(equal) / 2. None without both kinds."""
    positive, negative = np.asarray(positive), np.sort(np.asarray(negative))
    if len(positive) == 0 or len(negative) == 0:
        return None
    below = np.searchsorted(negative, positive, "left")
    up_to = np.searchsorted(negative, positive, "right")
    return float((below + up_to).mean() / 2 / len(negative))


def mean(values):
    """None without values, or where one has no meaning."""
    return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None


def bootstrap(values, images, groups=None, draws=2000):
    """[mean, low, high]: a mean and its 95% interval from resampling whole images, whose values go together.

    values, images (the image of each value) and groups (bool): (n,). With groups, the mean of the True less
    that of the False. None where there is nothing to take a mean of.
    """
    rows = np.unique(images, return_inverse=True)[1]
    columns = np.zeros(len(rows), dtype=int) if groups is None else np.asarray(groups, dtype=int)
    count = len(np.unique(rows))
    sums, sizes = np.zeros((2, count, 1 if groups is None else 2))          # (images, groups)
    np.add.at(sums, (rows, columns), values)
    np.add.at(sizes, (rows, columns), 1)
    if not sizes.any(0).all():
        return None

    def means_of(weights):
        with np.errstate(invalid="ignore"):                                 # a draw may lack a group
            means = (weights @ sums) / (weights @ sizes)
        return means[:, 0] if groups is None else means[:, 1] - means[:, 0]

    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), draws)
    return [means_of(np.ones((1, count))).item(), *np.nanquantile(means_of(drawn), [0.025, 0.975]).tolist()]


def inside(boxes, grid):
    """(n, L) bool: which patch centres of a square grid, row by row, lie in each of n boxes (x0, y0, x1, y1).
    Coordinates here and below are fractions of the image's width and height."""
    centre = (np.arange(grid) + 0.5) / grid
    x, y = np.tile(centre, grid), np.repeat(centre, grid)
    x0, y0, x1, y1 = np.asarray(boxes, dtype=float).reshape(-1, 4).T[..., None]
    return (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)


def token_indices(offsets, start, end):
    """Which tokens overlap the characters start..end. offsets: each token's (start, end), (0, 0) if added."""
    return [m for m, (first, last) in enumerate(offsets) if first < min(end, last) and last > start]


def is_function_word(word):
    """Whether it is a function word, or punctuation."""
    return word.lower() in FUNCTION_WORDS or not word[0].isalnum()


def kind_of_word(word, start, end, phrases):
    """`function`; `content`, a word of place or, where phrases are known, of one with boxes; or `other`."""
    if is_function_word(word):
        return "function"
    told = phrases is None or any(p.boxes and p.start <= start and end <= p.end for p in phrases)
    return "content" if told or word.lower() in PLACE_WORDS else "other"


def words_of(caption):
    """[(start, end)] of the caption's words and punctuation marks."""
    return [found.span() for found in re.finditer(r"\w+|[^\w\s]", caption)]


def similarity_maps(products, patch_mask, word_mask):
    """A phrase's maps (L,), by words and by masks, from <v_l, t_m> (n, L), A_V (L,) and A_T (n,)."""
    masked = word_mask @ products / max(word_mask.sum(), 1e-6)
    masked = (masked - masked.min()) / max(masked.max() - masked.min(), 1e-6) * patch_mask
    return {"words": products.mean(0), "masks": masked}


# ---- what is where: phrases and objects of the images ------------------------------------------------------
class Truth(NamedTuple):
    """What is known of an image: each caption's phrases or None, and its objects' boxes."""
    phrases: list
    boxes: list


def with_truth(split, datasets, root):
    """-> the split, with the captions of Flickr30K Entities if there are any, and a Truth for each image."""
    if isinstance(split, data.ShapesSplit):
        return split, [Truth(scene.phrases, [shape.box for shape in scene.objects]) for scene in split.scenes]
    folder = datasets[split.dataset].get("entities")
    if folder is None:
        return split, [Truth([None] * len(captions), []) for captions in split.captions]
    data.require(isinstance(folder, str), f"configs: datasets.{split.dataset}.entities must be a folder")
    captions, truths = [], []
    for name in split.image_names:
        own_captions, phrases = read_entities(Path(root) / folder, Path(name).stem)
        boxes = {box for some in phrases for phrase in some for box in phrase.boxes}
        captions.append(own_captions)
        truths.append(Truth(phrases, sorted(boxes)))
    return data.FileSplit(split.name, split.image_names, captions, split.folder), truths


def read_entities(folder, image_id):
    """-> an image's captions and each caption's phrases, from Flickr30K Entities (Plummer et al., 2015):

    Sentences/<id>.txt     a caption a line:  [/EN#123/people A man] in [/EN#124/clothing a blue shirt] .
    Annotations/<id>.xml   <size>, and <object>s with <name>s (the numbers above) and perhaps a <bndbox>.
                           Pixels count from 1, and both ends belong to the box.
    """
    path = folder / "Annotations" / f"{image_id}.xml"
    try:
        boxes = read_boxes(path.read_bytes())
        path = folder / "Sentences" / f"{image_id}.txt"
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        sentences = [read_sentence(line, boxes) for line in lines]
        if not sentences:
            raise ValueError("it holds no sentence")
    except OSError as error:
        raise data.UserError(f"cannot read {path} ({error.strerror}): `entities` of the data set must name a "
                             "folder with Sentences and Annotations of every image") from None
    except (ValueError, ElementTree.ParseError) as error:                   # also UnicodeDecodeError
        raise data.UserError(f"{path}: not as in Flickr30K Entities ({error}): correct the file") from None
    return [caption for caption, _ in sentences], [phrases for _, phrases in sentences]


def read_sentence(line, boxes):
    """-> the caption without its marks, and its Phrases."""
    caption, phrases, done = "", [], 0
    for mark in MARK.finditer(line):
        number, words = mark.groups()
        caption += line[done:mark.start()]
        phrases.append(Phrase(words, len(caption), len(caption) + len(words), boxes.get(number, [])))
        caption += words
        done = mark.end()
    caption += line[done:]
    if "[/EN#" in caption:
        raise ValueError(f"a mark that is not [/EN#number/type words] in {line!r:.80}")
    return caption, phrases


def read_boxes(xml):
    """{number of an entity: its boxes (x0, y0, x1, y1) in fractions of width and height}."""
    root, boxes = ElementTree.fromstring(xml), defaultdict(list)
    width, height = (float(root.findtext(f"size/{side}", "")) for side in ("width", "height"))
    if not (width > 0 and height > 0):
        raise ValueError(f"<size> is {width:g} x {height:g}")
    for item in root.findall("object"):
        if item.find("bndbox") is not None:
            x0, y0, x1, y1 = (float(item.findtext(f"bndbox/{edge}", "")) for edge in EDGES)
            for name in item.findall("name"):
                boxes[name.text].append(((x0 - 1) / width, (y0 - 1) / height, x1 / width, y1 / height))
    return boxes


# ---- a split's figures -------------------------------------------------------------------------------------
class Encoded(NamedTuple):
    """An image and its captions as the model sees them, without class tokens, which have no place."""
    tokens: np.ndarray          # (L, d)
    mask: np.ndarray            # (L,)
    regions: np.ndarray         # (K, d) unit vectors, or 0 where closed
    variance: np.ndarray        # (K,) 1 is the prior's
    cosine: float               # mean cosine between two regions' means, NaN for one region
    captions: list              # of each caption: tokens (M, d), mask (M,), and its tokens' offsets


def encoded_images(matcher, split, batch_size, progress):
    """Yields Encoded, image by image."""
    config, first = matcher.config, matcher.model.class_tokens
    starts = range(0, len(split), batch_size)
    for start in tqdm(starts, desc=f"{split.name}: grounding", disable=not progress, leave=False):
        rows = range(start, min(start + batch_size, len(split)))
        texts = [caption for i in rows for caption in split.captions[i]]
        pictures = [split.load_image(i, matcher.transform.size) for i in rows]
        image, text = matcher.encode_images(pictures, batch_size), matcher.encode_texts(texts, len(texts))
        offsets = data.token_offsets(matcher.tokenizer, texts, config["text"]["max_length"])
        variance = (image.log_var.exp() / matcher.model.sampler.prior).mean(-1).numpy()
        unit, K = F.normalize(image.means, dim=-1), image.means.shape[1]
        cosine = (((unit @ unit.transpose(1, 2)).sum((1, 2)) - K) / (K * (K - 1))).tolist()
        regions = (F.normalize(image.regions, dim=-1) * image.gates[..., None]).numpy()
        captions = iter(zip(text.tokens.numpy(), text.mask.numpy(), offsets))
        for b, i in enumerate(rows):
            yield Encoded(image.tokens[b, first:].numpy(), image.mask[b, first:].numpy(), regions[b],
                          variance[b], cosine[b], [next(captions) for _ in split.captions[i]])


def measure(matcher, split, truths, batch_size=128, progress=True):
    """The figures of a split, given a Truth for each image; None where a figure has no meaning."""
    rows = []                       # a phrase: image, chance, hit by words, hit by masks, variance, ambiguous
    per_image = []                  # cosine between its regions, how many are open, how many objects it shows
    masks = defaultdict(list)       # mask values by what they lie on
    images = encoded_images(matcher, split, batch_size, progress)
    for i, (image, captions, truth) in enumerate(zip(images, split.captions, truths)):
        grid = math.isqrt(len(image.mask))
        per_image.append((image.cosine, image.regions.any(-1).sum(), len(truth.boxes)))
        if truth.boxes:
            within = inside(truth.boxes, grid).any(0)
            masks["box"].append(image.mask[within])
            masks["no box"].append(image.mask[~within])
        for caption, phrases, (tokens, mask, offsets) in zip(captions, truth.phrases, image.captions):
            for start, end in words_of(caption):
                kind = kind_of_word(caption[start:end], start, end, phrases)
                masks[kind].append(mask[token_indices(offsets, start, end)])
            for phrase in phrases or []:
                said = token_indices(offsets, phrase.start, phrase.end)
                if not phrase.boxes or not said:        # nothing is drawn, or the phrase is cut off
                    continue
                target = inside(phrase.boxes, grid).any(0)
                maps = similarity_maps(tokens[said] @ image.tokens.T, image.mask, mask[said])
                fit = image.regions @ (mask[said] @ tokens[said])
                region = np.where(image.regions.any(-1), fit, -np.inf).argmax()     # of those that are open
                rows.append((i, target.mean(), target[maps["words"].argmax()], target[maps["masks"].argmax()],
                             image.variance[region], len(phrase.boxes) > 1))
    image_of, chance, by_words, by_masks, variance, ambiguous = np.array(rows, dtype=float).reshape(-1, 6).T
    masks = defaultdict(list, {kind: np.concatenate(parts) for kind, parts in masks.items()})
    cosines, opened, objects = np.array(per_image).T
    model, a, b = matcher.model, opened - opened.mean(), objects - objects.mean()
    pearson = [a @ b / math.sqrt(a @ a * (b @ b))] if a.any() and b.any() else []
    return {"split": split.name, "size": matcher.transform.size, "images": len(split),
            "phrases": len(rows), "chance": mean(chance), "pointing, words": mean(by_words),
            "pointing, masks": mean(by_masks), "masks less words": bootstrap(by_masks - by_words, image_of),
            "AUC image": auc(masks["box"], masks["no box"]),
            "AUC text": auc(masks["content"], masks["function"]), "cosine": mean(cosines),
            "variance": bootstrap(variance, image_of, ambiguous) if model.sampler.sample else None,
            "open": mean(opened) if model.gate else None,
            "open with objects": mean(pearson) if model.gate else None}


def table(report):
    """The figures as text; those without a meaning are left out."""
    head = f"{report['split']}: {report['images']:,} images, {report['phrases']:,} phrases with boxes"
    if report["phrases"] == 0:
        head += "; without boxes (`entities` of a data set's block) only what needs none is measured"
    lines = [f"  {name:18}{value:.3f}" for name, value in report.items() if isinstance(value, float)]
    lines += [f"  {name:18}" + "{:+.3f} [{:+.3f}, {:+.3f}]".format(*value)
              for name, value in report.items() if isinstance(value, list)]
    return "\n".join([head, *lines])


# ---- the command line --------------------------------------------------------------------------------------
def main(args):
    matcher = eval_grm.load(args.ckpt, size=args.size)
    split, truths = with_truth(*eval_grm.split_of(args, matcher.config))
    report = measure(matcher, split, truths, args.batch_size)
    print(table(report))
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "grounding.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with runs.one_line_errors():
        main(ARGUMENTS)
