"""Pictures of what a trained model does with an image and a caption: masks, regions with their variance, and word maps.

    python visualize_grm.py --ckpt best.pt --image dog.jpg --caption "a dog runs on the grass" --word dog --out dog.png
    python visualize_grm.py --ckpt best.pt --image dog.jpg cat.jpg --caption "a dog runs" "a cat sleeps" --out both.png
    python visualize_grm.py --ckpt best.pt --split shapes --out sheet.png

Each patch is coloured by a value: the saliency mask A_V; the cosine between patch and a chosen word, and that times A_V
(as grounding.py has it); the attention of each region prompt. The words of the caption are coloured by their mask A_T.
"""
import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import checkpoints
import data
import grounding
import modules

GAP, MOST_REGIONS = 10, 6                                  # pixels; regions shown, those nearest to the caption first
SCALE = [(0, 0, 30), (70, 15, 110), (185, 50, 85), (250, 130, 10), (255, 245, 130)]      # colours from 0 to 1, dark to light


@dataclass
class Example:
    """What is drawn of one image and caption."""
    picture: Image.Image
    tiles: list[tuple[str, str, np.ndarray | None]]        # title, note, (G, G) values in [0, 1] or None for the image alone
    words: list[tuple[str, float]]                         # with their masks


def colours(values: np.ndarray) -> np.ndarray:
    """(...) in [0, 1] -> (..., 3) float colours of the scale."""
    return np.stack([np.interp(values, np.linspace(0, 1, len(SCALE)), channel) for channel in zip(*SCALE)], -1)


def scaled(values: np.ndarray, low: float | None = None) -> np.ndarray:
    low = values.min() if low is None else low
    return (values - low) / max(values.max() - low, 1e-9)


def find_word(caption: str, word: str) -> tuple[int, int] | None:
    match = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE)
    return match and match.span()


@torch.no_grad()
def explain(model, tokenizer, config: dict, picture: Image.Image, caption: str, word: str | None = None) -> Example:
    """word: one of the caption's; by default the one with the highest mask, words of grammar aside. DataError for a word
    that is not there."""
    statistics = modules.image_statistics(config["image"]["name"])
    image = model.encode_image(data.image_transform(config["image"]["size"], *statistics, train=False)(picture)[None])
    text, (offsets,) = grounding.encode_captions(model, tokenizer, [caption], config["text"]["max_length"], "cpu")
    grid, mask_v, mask_t = grounding.grid_side(image.mask.shape[1]), image.mask[0].numpy(), text.mask[0].numpy()

    def mask_of(span):
        tokens = grounding.token_indices(offsets, *span)
        return float(mask_t[tokens].mean()) if tokens else 0.0                                   # none: cut off
    spans = [found.span() for found in re.finditer(r"\w+|[^\w\s]", caption)]
    words = {s: caption[slice(*s)] for s in spans}
    candidates = [s for s, text in words.items() if not grounding.of_grammar(text.lower())]
    span = find_word(caption, word) if word else max(candidates or spans, key=mask_of, default=None)
    data.require(span, f"the word {word!r} is not in the caption {caption!r:.120}" if word else "the caption has no word")
    data.require(grounding.token_indices(offsets, *span),
                 f"the word {caption[slice(*span)]!r} lies beyond the {config['text']['max_length']} tokens that a caption may have")
    said, tokens = caption[slice(*span)], grounding.token_indices(offsets, *span)
    maps = grounding.similarity_maps((text.tokens[0, tokens] @ image.tokens[0].T).numpy(), mask_v, mask_t[tokens])

    nearest = (text.tokens[0] @ image.regions[0].T).numpy() * mask_t[:, None]                    # (M, K)
    shown = sorted(np.argsort(-nearest.max(0), kind="stable")[:MOST_REGIONS].tolist())
    variance = image.log_var[0].exp().mean(-1) * image.log_var.shape[-1]
    tiles = [("image", "", None), ("saliency mask", f"mean {mask_v.mean():.2f}", mask_v),
             (f'near "{said}"', f"cosine {maps['words'].min():.2f} to {maps['words'].max():.2f}", scaled(maps["words"])),
             (f'"{said}" x mask', "0 to its maximum", scaled(maps["masks"], 0))]
    for k in shown:
        attention = image.attention[0, :, k].float().numpy()
        place = offsets[nearest[:, k].argmax()]
        note = f"variance {variance[k]:.2f}" if model.sampler.sample else ""
        own = [f": {text}" for s, text in words.items() if grounding.token_indices([place], *s)]
        tiles.append((f"region {k + 1}" + (own[0] if own else ""), note, scaled(attention, 0)))  # "": [CLS] or [SEP]
    tiles = [(title, note, values if values is None else values.reshape(grid, grid)) for title, note, values in tiles]
    return Example(picture, tiles, [(text, mask_of(s)) for s, text in words.items()])


def shade(picture: Image.Image, values: np.ndarray, side: int) -> Image.Image:
    """The picture in grey under the colours of its patches."""
    patches = Image.fromarray(colours(values).astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)
    return Image.blend(picture.resize((side, side)).convert("L").convert("RGB"), patches, 0.6)


def font_of(size: int):
    """Pillow's own has hardly more than English letters, so one that is often on a machine goes first."""
    try:
        return ImageFont.truetype("DejaVuSans.ttf", size)
    except OSError:
        return ImageFont.load_default(size)


def shortened(text: str, width: float, font) -> str:
    while font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


def draw(examples: list[Example], title: str, side: int, columns: int) -> Image.Image:
    """One block an example: its tiles, `columns` in a line, then its caption. The scale is at the top."""
    font, small, large = map(font_of, (15, 13, 19))
    width = max(GAP + columns * (side + GAP), 960)
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def wrapped(words):                                    # [(x, line, word, mask)] and the number of lines
        placed, x, line = [], 0, 0
        for word, mask in words:
            length = ruler.textlength(word, font=font) + 10
            if x and x + length > width - 2 * GAP:
                x, line = 0, line + 1
            placed.append((x, line, word, mask))
            x += length + 2
        return placed, line + 1
    layouts = [(example, -(-len(example.tiles) // columns), *wrapped(example.words)) for example in examples]
    line_height, row_height, top = 24, side + 40, 70
    height = top + sum(rows * row_height + lines * line_height + 3 * GAP for _, rows, _, lines in layouts)
    canvas = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(canvas)
    pen.text((GAP, 8), shortened(title, width - 2 * GAP, large), fill="black", font=large)
    bar = colours(np.linspace(0, 1, 200))[None].repeat(14, 0).astype(np.uint8)
    pen.text((GAP, 36), "0", fill="black", font=small)
    canvas.paste(Image.fromarray(bar), (GAP + 14, 38))
    pen.text((GAP + 220, 36), fill="black", font=small, text="1     saliency and words: the mask itself; near: from the "
             "least to the most; x mask, regions: from 0 to the most; variance: the prior's is 1")
    y = top
    for example, rows, words, lines in layouts:
        for n, (name, note, values) in enumerate(example.tiles):
            x, at = GAP + n % columns * (side + GAP), y + n // columns * row_height
            pen.text((x, at), shortened(name, side, font), fill="black", font=font)
            tile = example.picture.resize((side, side)) if values is None else shade(example.picture, values, side)
            canvas.paste(tile, (x, at + 20))
            pen.text((x, at + side + 22), note, fill=(90, 90, 90), font=small)
        y += rows * row_height + GAP // 2
        for x, line, word, mask in words:
            left, upper = GAP + x, y + line * line_height
            box = left, upper, left + ruler.textlength(word, font=font) + 8, upper + line_height - 3
            pen.rectangle(box, fill=tuple(colours(np.array(mask)).astype(int).tolist()))
            pen.text((left + 4, upper + 2), word, fill="white" if mask < 0.6 else "black", font=font)
        y += lines * line_height + 2 * GAP + GAP // 2
    return canvas


def chosen(split, rows: int, word: str | None) -> list[tuple[int, str]]:
    """The first images of the split and a caption of each; given a word, the first that have it in a caption."""
    if word is None:
        return [(i, split.captions[i][0]) for i in range(min(rows, len(split)))]
    found = []
    for i, captions in enumerate(split.captions):
        found += [(i, caption) for caption in captions if find_word(caption, word)][:1]
        if len(found) == rows:
            break
    data.require(found, f"{split.name}: no caption has the word {word!r}")
    return found


def run(args):
    checkpoint = checkpoints.load_checkpoint(checkpoints.find_checkpoint(args.ckpt))
    config = checkpoint["config"]
    model, tokenizer = checkpoints.model_from_checkpoint(checkpoint)
    words = args.word or [None] * len(args.image or ["the split"])
    side, columns = 130, 4 + min(MOST_REGIONS, model.region_prompts.prompts.shape[0])
    if args.image:
        wanted, where = [], ", ".join(Path(path).name for path in args.image)
        for path, caption, word in zip(map(Path, args.image), args.caption, words):
            data.require(path.is_file(), f"--image '{path}': no such file")
            wanted.append((data.FileSplit("--image", [path.name], [[caption]], path.parent), 0, caption, word))
        if len(wanted) == 1:
            side, columns = 200, 5
    else:
        split, where = data.load_split(args.split, config["datasets"], args.data_root or config["data"]["root"]), args.split
        wanted = [(split, i, caption, words[0]) for i, caption in chosen(split, args.rows, words[0])]
    examples = [explain(model, tokenizer, config, split.load_image(i), caption, word) for split, i, caption, word in wanted]
    picture = draw(examples, f"{config['backbone']} trained on {config['data']['name']}: {where}", side, columns)
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        picture.save(args.out)
    except (ValueError, OSError) as error:
        raise data.DataError(f"cannot write '{args.out}' ({data.brief(error)}): name a file such as sheet.png") from None
    print(f"{args.out}: {picture.width} x {picture.height}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint, found as eval_grm.py finds it")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--image", nargs="+", metavar="FILE", help="images of your own, with as many --caption")
    what.add_argument("--split", default="shapes", metavar="NAME", help="sheet of a split or part of one (default: shapes)")
    parser.add_argument("--caption", nargs="+", metavar="TEXT", help="what to look for in each --image")
    parser.add_argument("--word", nargs="+", metavar="WORD",
                        help="word whose map is drawn, one for a split or one for each --image (default: that of the highest mask)")
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (default: the checkpoint's)")
    parser.add_argument("--rows", type=int, default=4, metavar="N", help="images of a sheet (default 4)")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write, as sheet.png")
    args = parser.parse_args()
    if len(args.image or []) != len(args.caption or []):
        parser.error("--image and --caption go together, a caption for each image")
    if args.word and len(args.word) != len(args.image or ["a split"]):
        parser.error("--word takes one word for a split, or one for each --image")
    if args.rows < 1:
        parser.error("--rows must be at least 1")
    try:
        run(args)
    except (checkpoints.CheckpointError, data.DataError, modules.ModelError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
