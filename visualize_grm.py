"""A sheet of examples from a split: what the masks keep, and where each region looks.

    python visualize_grm.py --ckpt best.pt --split shapes --out sheet.png

A row is one image: the image, its saliency mask A_V, the attention of each region prompt (every map scaled to its own
maximum, printed below it), and a caption with each word shaded by its mask A_T.
"""
import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import data
import eval_grm
import modules

SIDE, GAP, TEXT = 150, 8, 44        # pixels: a picture's side, the space between, the lines below
MOST_REGIONS = 6


def shaded(image: Image.Image, weights: torch.Tensor) -> Image.Image:
    """The image darkened where weights (H, W) in [0, 1] are low, with a warm tint where they are high."""
    heat = Image.fromarray((255 * weights.clamp(0, 1).numpy()).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    heat = np.asarray(heat, np.float32)[..., None] / 255
    pixels = np.asarray(image, np.float32)
    return Image.fromarray((pixels * (0.25 + 0.6 * heat) + np.array([255, 140, 0]) * 0.3 * heat).clip(0, 255).astype(np.uint8))


def draw_words(canvas: ImageDraw.ImageDraw, font, x: int, y: int, words: list[str], mask: list[float]):
    """Words in a line, each on a ground as orange as its mask is high."""
    for word, weight in zip(words, mask):
        width = canvas.textlength(word, font=font)
        ground = tuple(int(255 - (255 - c) * weight) for c in (255, 150, 20))
        canvas.rectangle((x, y, x + width + 6, y + 20), fill=ground)
        canvas.text((x + 3, y + 2), word, fill="black", font=font)
        x += width + 8


@torch.no_grad()
def sheet(model, split, tokenizer, config: dict, rows: int) -> Image.Image:
    transform = data.image_transform(config["image"]["size"], *modules.image_statistics(config["image"]["name"]), train=False)
    shown = min(config["model"]["num_prompts"], MOST_REGIONS)
    font, small = ImageFont.load_default(14), ImageFont.load_default(12)
    result = Image.new("RGB", (GAP + (shown + 2) * (SIDE + GAP), 30 + rows * (SIDE + TEXT + GAP)), "white")
    canvas = ImageDraw.Draw(result)
    for column, title in enumerate(["image", "saliency mask", *(f"region {k + 1}" for k in range(shown))]):
        canvas.text((GAP + column * (SIDE + GAP), 6), title, fill="black", font=font)
    for row in range(rows):
        picture = split.load_image(row)
        image = model.encode_image(transform(picture)[None])
        ids = data.tokenize(tokenizer, split.captions[row][:1], config["text"]["max_length"])[0]
        text = model.encode_text(torch.from_numpy(ids.astype(np.int64))[None], torch.ones(1, len(ids), dtype=torch.bool))
        grid = round(image.mask.shape[1] ** 0.5)                              # square images on square patches
        picture, top = picture.resize((SIDE, SIDE)), 30 + row * (SIDE + TEXT + GAP)
        maps = [(None, "")] + [(image.mask[0], "mean {:.2f}".format(image.mask.mean()))]
        maps += [(image.attention[0, :, k], "max {:.2f}".format(image.attention[0, :, k].max())) for k in range(shown)]
        for column, (weights, note) in enumerate(maps):
            x = GAP + column * (SIDE + GAP)
            if weights is not None and column > 1:
                weights = weights / weights.max()
            result.paste(picture if weights is None else shaded(picture, weights.view(grid, grid)), (x, top))
            canvas.text((x, top + SIDE + 1), note, fill="gray", font=small)
        draw_words(canvas, font, GAP, top + SIDE + 18, tokenizer.convert_ids_to_tokens(ids), text.mask[0].tolist())
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint, found as eval_grm.py finds it")
    parser.add_argument("--split", default="shapes", metavar="NAME", help="split, or part of one (default: shapes)")
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (default: the checkpoint's)")
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="number of images (default 4)")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write, as sheet.png")
    args = parser.parse_args()
    try:
        checkpoint = eval_grm.load_checkpoint(eval_grm.find_checkpoint(args.ckpt))
        config = checkpoint["config"]
        split = data.load_split(args.split, config["datasets"], args.data_root or config["data"]["root"])
        model, tokenizer = eval_grm.model_from_checkpoint(checkpoint)
        picture = sheet(model, split, tokenizer, config, min(args.rows, len(split)))
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        picture.save(args.out)
    except (eval_grm.CheckpointError, data.DataError, modules.ModelError) as error:
        sys.exit(f"error: {eval_grm.last_line(error)}")
    print(f"{args.out}: {picture.width} x {picture.height}")


if __name__ == "__main__":
    main()
