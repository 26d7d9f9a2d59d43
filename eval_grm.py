"""Evaluate a checkpoint: recalls both ways, for each level and their weighted sum.

    python eval_grm.py --ckpt best.pt --split coco5k

From Python, `load("best.pt")` scores photographs and sentences of your own: see Matcher.
"""
import argparse


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, metavar="FILE",
                        help="checkpoint; a bare name that is not here is that of the newest run below runs/")
    parser.add_argument("--split", metavar="NAME",
                        help="coco5k, coco1k, coco_val, f30k, f30k_val, f8k, f8k_val, shapes, shapes_val, or "
                             "part of one, as f8k_val[500:] (default: the run's test split)")
    parser.add_argument("--config", metavar="FILE", help="data sets of this file instead of the checkpoint's")
    parser.add_argument("--data-root", metavar="DIR", help="folder of data sets (default: as in training)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images at a time")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--size", type=int, metavar="PX", help="pixels of the images (default: the run's)")
    parser.add_argument("--out", metavar="DIR", help="write DIR/metrics.json")
    args = parser.parse_args(argv)
    if any(n is not None and n < 1 for n in (args.batch_size, args.limit, args.size)):
        parser.error("--batch-size, --limit and --size must be at least 1")
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()                  # before the imports, so that --help answers at once

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import data
import runs
from data import require
from modules import LEVELS, ImageFeatures, TextFeatures


# ---- the figures -------------------------------------------------------------------------------------------
def recall_at_k(similarity: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """similarity (I, T), the image that each caption describes (T,) -> i2t_r1 ... t2i_r10, and their sum
    `rsum`, in per cent. An image counts by its best caption, a tie counts against the model, images without a
    caption only distract. FloatingPointError for a NaN, ValueError for shapes that do not fit.
    """
    similarity, image_of_text = (torch.as_tensor(x).cpu() for x in (similarity, image_of_text))
    images, texts = similarity.shape
    if image_of_text.shape != (texts,) or texts == 0:
        raise ValueError(f"image_of_text has the shape {tuple(image_of_text.shape)} for {texts} captions")
    if image_of_text.min() < 0 or image_of_text.max() >= images:
        raise ValueError(f"image_of_text names images outside 0..{images - 1}")
    # A rank is 1 + the number of wrong candidates that score at least as much as the right one: counting, not
    # sorting.
    own = similarity[image_of_text, torch.arange(texts)]                                         # (T,)
    best = similarity.new_full((images,), -torch.inf).scatter_reduce(0, image_of_text, own, "amax")
    own_above = torch.bincount(image_of_text[own >= best[image_of_text]], minlength=images)      # (I,)
    i2t, t2i = torch.empty(images, dtype=torch.long), torch.ones(texts, dtype=torch.long)
    for start in range(0, images, 256):                                                    # bounds the memory
        rows = similarity[start:start + 256]
        if rows.isnan().any():
            raise FloatingPointError(f"the similarity has a NaN from image {start} on: lower train.lr")
        i2t[start:start + 256] = 1 + (rows >= best[start:start + 256, None]).sum(1)
        t2i += (rows >= own).sum(0)
    i2t, t2i = i2t - own_above, t2i - 1                          # what is right does not count against itself
    i2t = i2t[torch.bincount(image_of_text, minlength=images) > 0]
    figures = {f"{way}_r{k}": 100 * (places <= k).double().mean().item()
               for way, places in (("i2t", i2t), ("t2i", t2i)) for k in (1, 5, 10)}
    return figures | {"rsum": sum(figures.values())}


def fold_figures(matrix: Tensor, image_of_text: Tensor, folds: int) -> dict[str, float]:
    """Mean of recall_at_k over so many consecutive groups of images, each with its own captions."""
    images, rows = len(matrix), []
    for first, last in ((images * n // folds, images * (n + 1) // folds) for n in range(folds)):
        inside = image_of_text.ge(first) & image_of_text.lt(last)
        part = matrix if folds == 1 else matrix[first:last, inside]        # one fold needs no copy
        rows.append(recall_at_k(part, image_of_text[inside] - first))
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def figures_table(results: dict[str, dict[str, float]]) -> str:
    """The figures as text, one row per level."""
    heads = "".join(f"{head:>8}" for head in ["R@1", "R@5", "R@10"] * 2 + ["rSum"])
    lines = [f"{'':10}{'image to text':^24}{'text to image':^24}", f"{'level':10}{heads}"]
    lines += [f"{level:10}" + "".join(f"{value:8.1f}" for value in row.values())
              for level, row in results.items()]
    return "\n".join(lines)


def describe(name: str, split: data.Split, folds: int = 1) -> str:
    mean = f", mean of {folds} folds" if folds > 1 else ""
    return f"{name}: {len(split):,} images, {len(split.texts):,} captions{mean}"


# ---- a model that scores photographs against sentences -----------------------------------------------------
def load(path: str | Path, device: str | torch.device | None = None, size: int | None = None) -> "Matcher":
    """The model of a checkpoint, on the GPU if there is one and no device is named. size: pixels of the
    images, for finer maps or less time; by default as its run evaluates."""
    checkpoint = runs.load_checkpoint(runs.find_checkpoint(str(path)))
    model, tokenizer = runs.model_from_checkpoint(checkpoint, size)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return Matcher(model.to(device), tokenizer, checkpoint["config"], device, checkpoint.get("step"))


def listed(values, kinds, what: str) -> list:
    """What a user gave as a list; one value of such kinds is a list of one."""
    values = [values] if isinstance(values, kinds) else list(values)
    require(values, f"there are no {what} to encode")
    return values


class Matcher:
    """A model with its tokeniser. Features are returned on the CPU, in float32. Long lists show a bar."""

    def __init__(self, model, tokenizer, config: dict, device: torch.device, step: int | None = None):
        self.model, self.tokenizer, self.config = model, tokenizer, config
        self.device, self.step = device, step
        self.levels = [level for level in LEVELS if model.levels[level]] + ["combined"]
        size = config["image"].get("eval_size") or config["image"]["size"]
        self.transform = data.image_transform(size, *model.image_encoder.statistics)

    def score(self, images, texts, level: str = "combined") -> Tensor:
        """How well I images (paths or PIL images) fit T sentences -> (I, T). Either may be a single one."""
        return self.similarity(self.encode_images(images), self.encode_texts(texts), level)

    def encode_images(self, images, batch_size: int = 128) -> ImageFeatures:
        """Paths or PIL images, or one, turned upright by EXIF -> their features. UserError for a bad one."""
        images, batches = listed(images, (str, os.PathLike, Image.Image), "images"), []
        starts = range(0, len(images), batch_size)
        for start in tqdm(starts, "images", unit="batch", disable=len(starts) < 2, leave=False):
            pixels = [self.transform(data.read_image(image, f"image {i}", self.transform.size))
                      for i, image in enumerate(images[start:start + batch_size], start)]
            batches.append(self._encode_images(torch.stack(pixels)))
        return ImageFeatures(*(torch.cat(x).cpu() for x in zip(*batches)))

    def encode_texts(self, texts, batch_size: int = 256) -> TextFeatures:
        """Sentences, or one -> their features, padded to the longest."""
        texts = listed(texts, str, "sentences")
        texts = [data.typed(str(text) if isinstance(text, str) else text, str, f"sentence {i}")
                 for i, text in enumerate(texts)]               # str() makes numpy's strings plain ones
        batches = self.caption_batches(texts, batch_size, "sentences" if len(texts) > batch_size else None)
        order = torch.cat([indices for indices, _ in batches]).argsort()
        rows = ([row for part in parts for row in part] for parts in zip(*(text for _, text in batches)))
        return TextFeatures(*(pad_sequence(x, batch_first=True)[order] for x in rows))

    @torch.no_grad()
    def similarity(self, images: ImageFeatures, texts: TextFeatures, level: str = "combined") -> Tensor:
        """(I, T) of encoded images and sentences. level: combined, which ranks, or another of `levels`."""
        require(level in self.levels, f"the model has no level '{level}', only {', '.join(self.levels)}")
        texts, rows = TextFeatures(*(x.to(self.device) for x in texts)), []
        for start in range(0, len(images.mask), 128):
            some = ImageFeatures(*(x[start:start + 128].to(self.device) for x in images[:5]))
            rows.append(self._similarity(some, texts)[level].float().cpu())
        return torch.cat(rows)

    # Whole splits: images are scored as they are encoded, so that only the captions' tokens and the result
    # are held.

    def evaluate(self, split: data.Split, folds: int = 1, batch_size: int = 128, progress=True) -> dict:
        """{level: figures} of a split. With f folds the images are cut into f consecutive groups that are
        scored alone, and the figures are the mean. FloatingPointError if the similarity has a NaN."""
        title = split.name if progress else None
        texts = self.caption_batches(split.texts, 4 * batch_size, title)
        rows = self.score_rows(split, range(len(split)), texts, batch_size, title)
        return self.figures(rows, split, folds)

    def figures(self, rows: dict[str, Tensor], split: data.Split, folds: int) -> dict:
        owner = torch.as_tensor(split.image_of_text)
        return {level: fold_figures(matrix, owner, folds) for level, matrix in rows.items()}

    @torch.no_grad()
    def caption_batches(self, texts: list, batch_size: int, title: str | None = None,
                        part=slice(None)) -> list:
        """[(indices (b,), TextFeatures)] on the CPU, captions of similar length together; all, or a part."""
        require(texts, "there are no sentences to encode")
        self.model.eval()
        captions = data.tokenize(self.tokenizer, texts, self.config["text"]["max_length"])
        batches = list(data.text_batches(captions, batch_size, self.tokenizer.pad_token_id))[part]
        encoded = []
        for indices, *inputs in tqdm(batches, f"{title}: captions", disable=title is None, leave=False):
            with runs.amp_context(self.config, self.device):
                text = self.model.encode_text(*(x.to(self.device) for x in inputs))
            encoded.append((indices, TextFeatures(*(x.cpu() for x in text))))
        return encoded

    @torch.no_grad()
    def score_rows(self, split: data.Split, images: range, texts: list, batch_size: int,
                   title: str | None = None) -> dict[str, Tensor]:
        """{level: (I', T) on the CPU} of some images of the split with the captions of `caption_batches`."""
        texts = [(columns, TextFeatures(*(x.to(self.device) for x in text))) for columns, text in texts]
        matrices = torch.empty(len(self.levels), len(images), sum(len(columns) for columns, _ in texts))
        loader = runs.loader(images, self.config["data"]["workers"], self.device, batch_size=batch_size,
                             collate_fn=partial(data.load_images, split=split, transform=self.transform))
        done = 0
        with tqdm(total=matrices[0].numel(), desc=f"{title}: images and similarity", unit="pairs",
                  unit_scale=True, disable=title is None, leave=False) as bar:
            for pixels in loader:
                image = self._encode_images(pixels)
                for columns, text in texts:
                    scores = self._similarity(image, text)
                    block = torch.stack([scores[level] for level in self.levels]).float().cpu()
                    matrices[:, done:done + len(pixels), columns] = block
                    bar.update(block[0].numel())
                done += len(pixels)
        return dict(zip(self.levels, matrices))

    @torch.no_grad()
    def _encode_images(self, pixels: Tensor) -> ImageFeatures:
        self.model.eval()
        with runs.amp_context(self.config, self.device):
            image = self.model.encode_image(pixels.to(self.device, non_blocking=True))
        return ImageFeatures(*(x.float() for x in image))

    def _similarity(self, image: ImageFeatures, text: TextFeatures) -> dict[str, Tensor]:
        with runs.amp_context(self.config, self.device):
            return self.model.similarity(image, text)


# ---- the command line --------------------------------------------------------------------------------------
def split_of(args, config: dict) -> tuple[data.Split, dict, str]:
    """The split that --split, --config, --data-root and --limit ask for -> split, datasets, data root."""
    datasets = runs.read_blocks(args.config)["datasets"] if args.config else config["datasets"]
    root = args.data_root or config["data"]["root"]
    wanted = args.split or data.name_of_part(datasets, config["data"]["name"], "test")
    return data.load_split(wanted, datasets, root, limit=args.limit), datasets, root


def main(args):
    path = runs.find_checkpoint(args.ckpt)
    if str(path) != args.ckpt:
        print(f"checkpoint: {path}")
    grm = load(path, size=args.size)
    split, _, _ = split_of(args, grm.config)
    folds = split.folds
    require(folds <= len(split), f"{split.name} is the mean of {folds} folds: take at least {folds} images")
    results = grm.evaluate(split, folds, args.batch_size)
    print(f"{describe(split.name, split, folds)}, {grm.transform.size} px\n{figures_table(results)}")
    if args.out:
        report = {"checkpoint": str(path), "recipe": grm.config["recipe"], "step": grm.step,
                  "split": split.name, "size": grm.transform.size, "images": len(split),
                  "captions": len(split.texts), "folds": folds, "levels": results}
        Path(args.out).mkdir(parents=True, exist_ok=True)
        (Path(args.out) / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    with runs.one_line_errors():
        main(ARGUMENTS)
