"""Pictures of where the words of a caption are found in its photograph, as Figures 5 and 6 of the paper.

    python visualize_grm.py --ckpt best.pt --image dog.jpg --caption "a dog runs on the grass" --out dog.png
    python visualize_grm.py --ckpt best.pt --split f8k_val --words dog ball --out sheet.png

A row shows the photograph, then for each word its cosine with every patch, from least to most similar,
smoothly enlarged to the photograph's size. Below is the caption, each word shaded by its mask A_T.
--regions adds the attention of every region, from 0 to its most, and its variance (the prior's is 1).
"""
import argparse


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--ckpt", required=True, metavar="FILE", help="checkpoint, as eval_grm.py takes it")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--image", nargs="+", metavar="FILE", help="images of your own, each with a --caption")
    what.add_argument("--split", metavar="NAME", help="images of a split, or part, as f8k_val[500:]\n"
                                                      "(default: the run's test split)")
    parser.add_argument("--caption", nargs="+", metavar="TEXT", help="a caption for each --image")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="images of a split (default 3)")
    parser.add_argument("--words", nargs="+", metavar="WORD",
                        help="what to look for; of a split, images that have all of it in a caption\n"
                             "(default: the three content words of highest mask)")
    parser.add_argument("--regions", action="store_true", help="also draw the attention of each region")
    parser.add_argument("--size", type=int, metavar="PX", help="pixels of the encoded images, for finer maps")
    parser.add_argument("--data-root", metavar="DIR", help="folder of data sets (default: as in training)")
    parser.add_argument("--out", required=True, metavar="FILE", help="picture to write, as sheet.png")
    args = parser.parse_args(argv)
    if len(args.image or []) != len(args.caption or []):
        parser.error("--image and --caption go together, a caption for each image")
    if args.rows < 1 or args.size is not None and args.size < 1:
        parser.error("--rows and --size must be at least 1")
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

import data
import eval_grm
import runs
from encoders import one_line
from ground_grm import is_function_word, similarity_maps, token_indices, words_of

# Pixels of a sheet, which is meant to be shown at half its size.
PANEL, GAP, MARGIN, LINE, TEXT = 420, 24, 56, 50, 27
INK = 30, 30, 34
HEAT = [(0, 0, 4), (40, 11, 84), (101, 21, 110), (159, 42, 99), (212, 72, 66), (245, 125, 21), (250, 193, 39),
        (252, 255, 164)]                                # colours from 0 to 1: matplotlib's inferno
SHADE = [(255, 255, 255), (255, 190, 70)]               # the same for the mask of a word


@dataclass
class Row:
    """What is drawn of an image and its caption."""
    picture: Image.Image
    words: list         # (title, heat (G, G) in [0, 1]) of each word
    regions: list       # the same of each region
    caption: list       # (word, mask) of every word


# ---- what the model sees -----------------------------------------------------------------------------------
def find_word(caption, word):
    """(start, end) of a whole word or phrase in the caption, in any case, or None."""
    found = re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE)
    return found.span() if found else None


def key_words(caption, mask_of, count=3):
    """Spans of the content words of highest mask, in their order; without content words, of any words."""
    spans = words_of(caption)
    content = [span for span in spans if not is_function_word(caption[slice(*span)])] or spans
    first = {caption[slice(*span)].lower(): span for span in reversed(content)}         # each word once
    return sorted(sorted(first.values(), key=mask_of, reverse=True)[:count])


def scaled(values, low):
    """values (L,) on a grid (G, G) and on a scale from `low`, 0, to their maximum, 1."""
    side = math.isqrt(len(values))
    return ((values - low) / max(values.max() - low, 1e-9)).reshape(side, side)


def explain(matcher, picture, caption, words=(), with_regions=False):
    """The Row of a picture and a caption. words: what to look for, as far as the caption has it (default: its
    key words). UserError where there is nothing to look for."""
    image, text = matcher.encode_images([picture]), matcher.encode_texts([caption])
    max_length = matcher.config["text"]["max_length"]
    offsets, = data.token_offsets(matcher.tokenizer, [caption], max_length)
    places = slice(matcher.model.class_tokens, None)                        # class tokens have no place
    tokens_v, mask_v = image.tokens[0, places].numpy(), image.mask[0, places].numpy()
    tokens_t, mask_t = text.tokens[0].numpy(), text.mask[0].numpy()

    def mask_of(span):
        tokens = token_indices(offsets, *span)
        return float(mask_t[tokens].mean()) if tokens else 0.0              # no token: beyond max_length

    said = [span for word in words if (span := find_word(caption, word))] or key_words(caption, mask_of)
    data.require(said, f"the caption {caption!r:.80} has no word to look for")
    row = Row(picture, [], [], [(caption[slice(*span)], mask_of(span)) for span in words_of(caption)])
    for span in said:
        word, tokens = caption[slice(*span)], token_indices(offsets, *span)
        data.require(tokens, f"'{word}' lies beyond the {max_length} tokens that a caption may have")
        heat = similarity_maps(tokens_t[tokens] @ tokens_v.T, mask_v, mask_t[tokens])["words"]
        row.words.append((word, scaled(heat, heat.min())))
    if with_regions:
        variance = (image.log_var[0].exp() / matcher.model.sampler.prior).mean(-1)
        for k in image.gates[0].nonzero()[:, 0].tolist():                   # those that the image uses
            note = f", variance {variance[k]:.2f}" if matcher.model.sampler.sample else ""
            row.regions.append((f"region {k + 1}{note}", scaled(image.attention[0, places, k].numpy(), 0)))
    return row


# ---- drawing -----------------------------------------------------------------------------------------------
def colours(values, stops):
    """(...) in [0, 1] -> (..., 3) uint8."""
    places = np.linspace(0, 1, len(stops))
    channels = [np.interp(values, places, channel) for channel in zip(*stops)]
    return np.stack(channels, -1).round().astype(np.uint8)


def heat_map(picture, heat):
    """The picture under the colours of heat (G, G), enlarged to its size; the hotter, the more is covered."""
    smooth = Image.fromarray(heat.astype(np.float32)).resize(picture.size, Image.Resampling.BICUBIC)
    values = np.asarray(smooth).clip(0, 1)
    cover = Image.fromarray((255 * (0.4 + 0.35 * values)).astype(np.uint8))
    return Image.composite(Image.fromarray(colours(values, HEAT)), picture, cover)


def font_of(text):
    """Pillow's own font, which has only ASCII; for other text DejaVu Sans where it is installed."""
    if not text.isascii():
        try:
            return ImageFont.truetype("DejaVuSans.ttf", TEXT)
        except OSError:
            pass
    return ImageFont.load_default(TEXT)


def join(pieces, gap, down=False):
    """Pictures side by side or under each other, on white."""
    sizes = np.array([piece.size for piece in pieces])
    size = np.where([not down, down], sizes.sum(0) + gap * (len(pieces) - 1), sizes.max(0)).tolist()
    canvas, place = Image.new("RGB", size, "white"), 0
    for piece in pieces:
        canvas.paste(piece, (0, place) if down else (place, 0))
        place += gap + piece.size[down]                                     # the height is size[1]
    return canvas


def write(words, width, font):
    """Every (word, colour of its ground), in as many lines as it takes."""
    places, x, y = [], 0, 0
    for word, _ in words:
        length = font.getlength(word) + 16
        if x > 0 and x + length > width:
            x, y = 0, y + LINE
        places.append((x, y, length))
        x += length + 8
    canvas = Image.new("RGB", (width, y + LINE), "white")
    pen = ImageDraw.Draw(canvas)
    for (word, colour), (x, y, length) in zip(words, places):
        pen.rounded_rectangle((x, y + 4, x + length, y + LINE - 4), 8, colour)
        pen.text((x + 8, y + LINE / 2), word, INK, font, anchor="lm")
    return canvas


def draw(rows):
    """The sheet of Rows."""
    font = font_of("".join(word for row in rows for word, _ in row.caption))
    columns = max(max(1 + len(row.words), min(len(row.regions), 5)) for row in rows)
    width, blocks = columns * (PANEL + GAP) - GAP, []

    def panel(title, picture):
        return join([write([(title, "white")], PANEL, font), picture], 0, down=True)

    for row in rows:
        factor = PANEL / max(row.picture.size)
        size = [max(1, round(factor * side)) for side in row.picture.size]
        picture = row.picture.resize(size, Image.Resampling.LANCZOS)
        panels = [panel("", picture), *(panel(title, heat_map(picture, heat)) for title, heat in row.words)]
        regions = [panel(title, heat_map(picture, heat)) for title, heat in row.regions]
        caption = write([(word, tuple(colours(mask, SHADE))) for word, mask in row.caption], width, font)
        more = [join(regions[n:n + columns], GAP) for n in range(0, len(regions), columns)]
        blocks.append(join([join(panels, GAP), caption, *more], GAP // 2, down=True))
    heat, shade = ([(" ", tuple(colours(n / 7, stops))) for n in range(8)] for stops in (HEAT, SHADE))
    legend = [("least similar", "white"), *heat, ("most", "white"),
              ("mask of a word: 0", "white"), *shade, ("1", "white")]
    sheet = join([*blocks, write(legend, width, font)], 2 * GAP, down=True)
    return ImageOps.expand(sheet, MARGIN, "white")


# ---- the command line --------------------------------------------------------------------------------------
def examples(args, config):
    """[(picture, caption)] that the arguments ask for."""
    found, words = [], args.words or []
    if args.image:
        found = [(data.read_image(path, "of --image"), text) for path, text in zip(args.image, args.caption)]
    else:
        datasets, root = config["datasets"], args.data_root or config["data"]["root"]
        name = args.split or data.name_of_part(datasets, config["data"]["name"], "test")
        split = data.load_split(name, datasets, root)
        for i, captions in enumerate(split.captions):
            fitting = [caption for caption in captions if all(find_word(caption, word) for word in words)]
            if fitting and len(found) < args.rows:
                found.append((split.load_image(i), fitting[0]))
    for word in words:
        data.require(any(find_word(caption, word) for _, caption in found),
                     f"--words: '{word}' is in no caption, or, of a split, in none with the other words")
    return found


def main(args):
    matcher = eval_grm.load(args.ckpt, size=args.size)
    pairs = examples(args, matcher.config)
    sheet = draw([explain(matcher, *pair, args.words or (), args.regions) for pair in pairs])
    try:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        sheet.save(args.out)
    except (ValueError, OSError) as error:
        raise data.UserError(f"--out: cannot write '{args.out}' ({one_line(error)})") from None
    print(f"{args.out}: {sheet.width} x {sheet.height}")


if __name__ == "__main__":
    with runs.one_line_errors():
        main(ARGUMENTS)
