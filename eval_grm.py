"""Evaluate a checkpoint: every image and caption encoded once, recalls both ways, for each level and their sum.

    python eval_grm.py --ckpt best.pt --split coco5k

With --out DIR the similarities of finished images are kept in DIR until the end: interrupted and repeated, the command goes
on from there.
"""
import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torch.distributed as dist
import yaml
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

import data
import grounding
import modules
import ranks
from checkpoints import CheckpointError, find_checkpoint, load_checkpoint, model_from_checkpoint

RECALLS = (1, 5, 10)


# ------------------------------------------------------------------------------------------------------------ the figures

def recall_at_k(similarity: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """Retrieval figures of a similarity matrix (I, T), with image_of_text (T,) the image that each caption describes.

    i2t_r1, i2t_r5, i2t_r10, t2i_r1, t2i_r5, t2i_r10 and their sum `rsum` in per cent; i2t_medr, t2i_medr median ranks
    (1 is best). An image counts by its best caption. A tie counts against the model. Images without a caption are
    distractors only. FloatingPointError for a NaN, ValueError for shapes that do not fit.
    """
    similarity, image_of_text = torch.as_tensor(similarity), torch.as_tensor(image_of_text)
    images, texts = similarity.shape
    if image_of_text.shape != (texts,) or texts == 0:
        raise ValueError(f"image_of_text has shape {tuple(image_of_text.shape)}, the similarity {texts} captions")
    if image_of_text.min() < 0 or image_of_text.max() >= images:
        raise ValueError(f"image_of_text names images outside 0..{images - 1}")
    # a rank is 1 + the number of wrong candidates that score at least as much as the right one: counting, not sorting
    own = similarity[image_of_text, torch.arange(texts, device=similarity.device)]               # (T,)
    best = similarity.new_full((images,), -torch.inf).scatter_reduce(0, image_of_text, own, "amax")
    own_above = torch.zeros(images, dtype=torch.long).index_add(0, image_of_text, (own >= best[image_of_text]).long())
    i2t, t2i = torch.empty(images, dtype=torch.long), torch.ones(texts, dtype=torch.long)
    for start in range(0, images, 256):                                                          # bounded memory
        rows = similarity[start:start + 256]
        if rows.isnan().any():
            raise FloatingPointError(f"the similarity has a NaN among images {start}..{start + len(rows) - 1}")
        i2t[start:start + 256] = 1 + (rows >= best[start:start + 256, None]).sum(1)
        t2i += (rows >= own).sum(0)
    i2t, t2i = i2t - own_above, t2i - 1                             # what is right does not count against itself
    i2t = i2t[torch.bincount(image_of_text, minlength=images) > 0]
    figures = {f"{way}_r{k}": 100 * (places <= k).double().mean().item()
               for way, places in (("i2t", i2t), ("t2i", t2i)) for k in RECALLS}
    figures["rsum"] = sum(figures.values())
    figures |= {"i2t_medr": float(np.median(i2t)), "t2i_medr": float(np.median(t2i))}
    return figures


def figures_table(results: dict[str, dict[str, float]]) -> str:
    """The figures of each level as text, a row a level."""
    columns = [f"{way}_{key}" for way in ("i2t", "t2i") for key in ("r1", "r5", "r10", "medr")] + ["rsum"]
    heads = ["R@1", "R@5", "R@10", "MedR"] * 2 + ["rSum"]
    lines = [f"{'':10}{'image to text':^32}{'text to image':^32}", f"{'level':10}" + "".join(f"{h:>8}" for h in heads)]
    lines += [f"{level:10}" + "".join(f"{row[c]:8.1f}" for c in columns) for level, row in results.items()]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- from a split to its figures

def evaluate(model, split, tokenizer, config: dict, device, batch_size: int = 128, folds=(1,), progress: bool = True,
             partial: "PartialResult | None" = None):
    """{level: figures} of a split for each number of folds asked for; one encoding and one similarity serve them all.

    With f folds, the images are cut into f consecutive groups that are scored alone, and the figures are the mean.

    Called by every process of torch.distributed, each encodes its share of the captions and scores its share of the images,
    and all return the same figures.
    """
    return figures_of(share_of_rows(model, split, tokenizer, config, device, batch_size, progress, partial), split, folds)


def share_of_rows(model, split, tokenizer, config: dict, device, batch_size: int, progress: bool = True,
                  partial: "PartialResult | None" = None) -> dict[str, Tensor]:
    """{level: (I', T)} of this process's share of the images with all captions; of all images if there is no other process.

    Only the captions' tokens, in 16 bits, and these matrices are held: images are scored as they are encoded.
    """
    model.eval()
    first, last = (len(split) * r // ranks.count() for r in (ranks.rank(), ranks.rank() + 1))
    texts = encode_captions(model, split, tokenizer, config, device, 4 * batch_size, progress)
    return similarity_matrices(model, split, range(first, last), texts, config, device, batch_size, progress, partial)


def figures_of(matrices: dict[str, Tensor], split, folds=(1,)) -> list[dict[str, dict[str, float]]]:
    """`evaluate`'s figures from every process's share of the rows."""
    image_of_text = torch.as_tensor(split.image_of_text)
    results = [{} for _ in folds]
    for level, rows in matrices.items():
        matrix = joined_rows(rows)
        for result, f in zip(results, folds) if ranks.rank() == 0 else ():
            result[level] = fold_figures(matrix, image_of_text, f)
    if ranks.count() > 1:
        dist.broadcast_object_list(results, src=0)
    return results


def to_16_bits(tokens: Tensor) -> Tensor:
    """Each token in steps of 1/32767 of its largest component, which float16, as small, has up to 16 times coarser near 1.
    Normalising undoes the scale."""
    tokens = tokens.float()
    return (tokens / tokens.abs().amax(-1, keepdim=True).clamp_min(1e-12) * 32767).round().to(torch.int16)


@torch.no_grad()
def encode_captions(model, split, tokenizer, config: dict, device, batch_size: int, progress: bool = True):
    """Every caption once -> [(indices (b,), TextFeatures)] on the CPU, captions of similar length together.

    Tokens are kept in 16 bits (`to_16_bits`), half the memory; products are taken in float32. Ranks move only where two scores
    nearly tie.
    """
    ids = data.tokenize(tokenizer, split.texts, config["text"]["max_length"])
    batches = list(data.text_batches(ids, batch_size, tokenizer.pad_token_id))[ranks.rank()::ranks.count()]
    texts = []
    hidden = not progress or ranks.rank() > 0
    for indices, tokens, valid in tqdm(batches, desc=f"{split.name}: captions", disable=hidden, leave=False):
        with amp_context(config, device):
            text = model.encode_text(tokens.to(device), valid.to(device))
        text = modules.TextFeatures(to_16_bits(text.tokens), text.valid, text.mask.float())
        texts.append((indices, modules.TextFeatures(*(x.cpu() for x in text))))
    if ranks.count() > 1:
        shares = [None] * ranks.count()
        dist.all_gather_object(shares, texts)
        texts = [batch for share in shares for batch in share]
    return texts


@torch.no_grad()
def similarity_matrices(model, split, indices: range, texts, config: dict, device, batch_size: int, progress: bool = True,
                        partial: "PartialResult | None" = None) -> dict[str, Tensor]:
    """{level: (I', T) float32 on the CPU} of the images `indices` with the captions of `encode_captions`.

    Images are encoded batch by batch, and each batch is scored against all captions, tile by tile on the device, before the
    next: no image token outlives its batch.
    """
    levels = [name for name in modules.LEVELS if model.levels[name]] + ["combined"]
    texts = [(columns, modules.TextFeatures(*(x.to(device) for x in text))) for columns, text in texts]
    matrices = torch.empty(len(levels), len(indices), sum(len(t) for t, _ in texts))
    done = partial.load(matrices) if partial else 0
    transform = data.image_transform(config["image"]["size"], *modules.image_statistics(config["image"]["name"]), train=False)
    loader = DataLoader(Subset(data.EvalImages(split, transform), indices[done:]), batch_size,
                        num_workers=config["data"]["workers"], pin_memory=device.type == "cuda")
    with tqdm(total=matrices[0].numel(), initial=done * matrices.shape[2], desc=f"{split.name}: images and similarity",
              unit="pairs", unit_scale=True, disable=not progress or ranks.rank() > 0, leave=False) as bar:
        for images in loader:
            with amp_context(config, device):
                image = model.encode_image(images.to(device, non_blocking=True))
            image = modules.ImageFeatures(image.tokens.float(), image.mask.float(), image.regions.float())
            rows = matrices[:, done:done + len(images)]
            for columns, text in texts:
                text = text._replace(tokens=F.normalize(text.tokens.float(), dim=-1))
                scores = model.similarity(image, text)
                rows[:, :, columns] = torch.stack([scores[name] for name in levels]).float().cpu()
                bar.update(len(images) * len(columns))
            if partial:
                partial.append(rows)
            done += len(images)
    return dict(zip(levels, matrices))


def joined_rows(rows: Tensor) -> Tensor:
    """The rows of all processes one below the other, on the first process; elsewhere an empty list stands for them."""
    if ranks.count() == 1:
        return rows
    parts = [None] * ranks.count() if ranks.rank() == 0 else None
    dist.gather_object(rows.clone(), parts, dst=0)               # a clone, or its neighbours would travel with the view
    return torch.cat(parts) if ranks.rank() == 0 else rows[:0]


def fold_figures(matrix: Tensor, image_of_text: Tensor, folds: int) -> dict[str, float]:
    """Mean of recall_at_k over so many consecutive groups of images, each with its own captions."""
    images, rows = len(matrix), []
    for a, b in ((images * n // folds, images * (n + 1) // folds) for n in range(folds)):
        inside = image_of_text.ge(a) & image_of_text.lt(b)
        rows.append(recall_at_k(matrix if folds == 1 else matrix[a:b, inside], image_of_text[inside] - a))
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


class PartialResult:
    """The rows of an unfinished evaluation in a file, from which the same evaluation goes on.

    The file holds a fingerprint of what is evaluated (64 characters), then for each finished image its rows: one float32 row
    per level. A file of another evaluation is replaced; a last image that is not whole is dropped.
    """

    def __init__(self, path: Path, fingerprint: str):
        self.path, self.fingerprint = path, fingerprint.encode()

    def load(self, matrices: Tensor) -> int:
        """Fills matrices (levels, I, T) with the finished rows -> the number of finished images."""
        levels, images, texts = matrices.shape
        size = 4 * levels * texts                                                                # bytes of an image
        self.path.touch()
        self.file = self.path.open("r+b")
        done = 0
        if self.file.read(64) == self.fingerprint:
            while done < images and len(row := self.file.read(size)) == size:
                matrices[:, done] = torch.frombuffer(bytearray(row), dtype=torch.float32).view(levels, texts)
                done += 1
        else:
            self.file.seek(0)
            self.file.write(self.fingerprint)
        self.file.truncate(64 + done * size)
        self.file.seek(0, os.SEEK_END)
        return done

    def append(self, rows: Tensor):
        """rows (levels, b, T), of the next b images."""
        self.file.write(rows.transpose(0, 1).contiguous().numpy())
        self.file.flush()

    def remove(self):
        self.file.close()
        self.path.unlink()


def amp_context(config: dict, device):
    """Autocast as `train.amp` says: bf16 where the card has it, else fp16; nothing on the CPU."""
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    dtype = torch.bfloat16 if has_bf16 else torch.float16
    return torch.autocast(device.type, dtype, enabled=config["train"]["amp"] and device.type == "cuda")


# ------------------------------------------------------------------------------------------------------ the command line

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, metavar="FILE",
                        help="checkpoint; a bare name that is not in this folder is looked up in the newest run below runs/")
    parser.add_argument("--split", metavar="NAME", help="coco5k, coco1k, coco_val, f30k, f30k_val, f8k, f8k_val, shapes, "
                        "shapes_val, one of your own data set, or part of one, as f8k_val[500:] (default: the run's test split)")
    parser.add_argument("--config", metavar="FILE", help="take the data sets from this file instead of the checkpoint")
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (default: the checkpoint's)")
    parser.add_argument("--batch-size", type=int, default=128, metavar="N", help="images encoded at a time (default 128)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images and their captions")
    parser.add_argument("--grounding", action="store_true", help="also measure what the parts of the model find: phrases against "
                        "their boxes (shapes, or Flickr30K with the files of Flickr30K Entities), masks, regions and variances")
    parser.add_argument("--out", metavar="DIR", help="write DIR/metrics.json; interrupted and repeated with "
                        "the same DIR, the command goes on where it stopped")
    args = parser.parse_args()
    for flag in ("batch_size", "limit"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1")
    try:
        run(args)
    except (CheckpointError, data.DataError, modules.ModelError, OSError) as error:      # OSError: --out, or a full disk
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped" + "; repeat the command to go on" * bool(args.out))


def run(args):
    path = find_checkpoint(args.ckpt)
    if str(path) != args.ckpt:
        print(f"checkpoint: {path}")
    checkpoint = load_checkpoint(path)
    config = checkpoint["config"]
    datasets = config["datasets"]
    if args.config:
        try:
            datasets = yaml.safe_load(Path(args.config).read_text(encoding="utf-8"))["datasets"]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
            raise CheckpointError(f"--config '{args.config}' has no readable datasets block ({' '.join(str(error).split())})") from None
    names = data.split_names(datasets)
    wanted = args.split or data.splits_of(names, config["data"]["name"], "test")[0]
    split = data.load_split(wanted, datasets, args.data_root or config["data"]["root"])
    if args.limit:
        split = split.subset(slice(args.limit))
    folds = names[wanted.split("[")[0]][2]
    if folds > len(split):
        raise data.DataError(f"split {wanted} is the mean of {folds} folds, which takes at least {folds} images")
    if args.grounding:
        split = data.with_phrases(split, datasets, args.data_root or config["data"]["root"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = model_from_checkpoint(checkpoint)
    partial = None
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        partial = PartialResult(Path(args.out) / "similarity.partial", fingerprint(path, split, config))
    try:
        matrices = share_of_rows(model.to(device), split, tokenizer, config, device, args.batch_size, partial=partial)
        results, = figures_of(matrices, split, [folds])
    except FloatingPointError as error:
        raise CheckpointError(f"'{path}' on {split.name}: {error}") from None
    print(f"{split.name}: {len(split):,} images, {len(split.texts):,} captions" + (f", mean of {folds} folds" * (folds > 1)))
    print(figures_table(results))
    evidence = {}
    if args.grounding:
        evidence = grounding.measure(model, split, tokenizer, config, device, matrices["combined"], args.batch_size)
        print(grounding.table(evidence))
    if args.out:
        report = {"checkpoint": str(path), "split": wanted, "images": len(split), "captions": len(split.texts),
                  "folds": folds, "step": checkpoint.get("step"), "levels": results} | evidence
        (Path(args.out) / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
        partial.remove()


def fingerprint(checkpoint: Path, split, config: dict) -> str:
    """64 characters that change with the weights, the images' places and the captions."""
    with open(checkpoint, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(repr((split.name, getattr(split, "folder", None), split.image_names, split.captions)).encode())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
