"""Flickr30K Entities: which boxes of an image each noun phrase of its captions means (Plummer et al., 2015).

    Sentences/<id>.txt     a caption a line, its phrases marked:  [/EN#123/people A man] in [/EN#124/clothing a blue shirt] .
    Annotations/<id>.xml   <size> of the image; <object>s, each with one or more <name>s (the numbers above) and a <bndbox>
                           in pixels, 1 the first, both ends included, or <scene>/<nobndbox> instead of a box
"""
import re
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from shapes import Phrase

MARK = re.compile(r"\[/EN#(\d+)/\S+ ([^\[\]]+)\]")


def read_image(folder: Path, image_id: str) -> tuple[list[str], list[list[Phrase]]]:
    """-> the captions without their marks, and each caption's phrases; those that nothing was drawn for have no boxes.

    OSError for a file that cannot be read, ValueError, one line that names the file, for one that is not in the format.
    """
    path = folder / "Annotations" / f"{image_id}.xml"
    try:
        boxes = read_boxes(path.read_bytes())
        path = folder / "Sentences" / f"{image_id}.txt"
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        captions, phrases = zip(*(read_sentence(line, boxes) for line in lines)) if lines else ((), ())
    except (ValueError, ElementTree.ParseError) as error:                  # also UnicodeDecodeError
        raise ValueError(f"{path}: not in the format of Flickr30K Entities ({error})") from None
    if not captions:
        raise ValueError(f"{path}: holds no sentence")
    return list(captions), list(phrases)


def read_sentence(line: str, boxes: dict[str, list]) -> tuple[str, list[Phrase]]:
    caption, phrases, done = "", [], 0
    for mark in MARK.finditer(line):
        number, words = mark.groups()
        caption += line[done:mark.start()]
        phrases.append(Phrase(words, len(caption), len(caption) + len(words), boxes.get(number, [])))
        caption, done = caption + words, mark.end()
    caption += line[done:]
    if "[/EN#" in caption:
        raise ValueError(f"a mark that is not [/EN#number/type words] in {line!r:.80}")
    return caption, phrases


def read_boxes(xml: bytes) -> dict[str, list[tuple[float, float, float, float]]]:
    """{entity number: boxes (x0, y0, x1, y1) in fractions of width and height}."""
    root = ElementTree.fromstring(xml)

    def number(node, tag):
        text = node.findtext(tag)
        if text is None:
            raise ValueError(f"<{node.tag}> has no <{tag}>")
        return float(text)
    size = root.find("size")
    if size is None:
        raise ValueError("no <size>")
    width, height = number(size, "width"), number(size, "height")
    if not (width > 0 and height > 0):
        raise ValueError(f"<size> is {width:g} x {height:g}")
    boxes = defaultdict(list)
    for item in root.findall("object"):
        box = item.find("bndbox")
        if box is not None:
            left, top = (number(box, "xmin") - 1) / width, (number(box, "ymin") - 1) / height
            corners = left, top, number(box, "xmax") / width, number(box, "ymax") / height
            for name in item.findall("name"):
                boxes[name.text].append(corners)
    return dict(boxes)
