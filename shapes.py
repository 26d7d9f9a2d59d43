"""The built-in data: scenes of 2 to 4 coloured shapes on cluttered ground, each with five captions.

A caption's phrases know the boxes of all objects that they fit. A phrase may fit several objects, as "a red
shape", and several phrases an object: one-to-many and many-to-one, with ground truth.

    python shapes.py            the recall that a perfect reader reaches on the test scenes
"""
import itertools
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 35), "orange": (250, 140, 10), "yellow": (245, 225, 40), "green": (30, 165, 55),
           "cyan": (40, 215, 225), "blue": (35, 60, 225), "purple": (145, 40, 195), "pink": (255, 115, 185)}
SIZES = {"small": (.11, .13), "large": (.19, .22)}  # the radius as a fraction of the image


# ---- objects -----------------------------------------------------------------------------------------------
@cache
def ngon(n, radius=1.0):
    """Corners of a regular polygon, clockwise from the top; y points down."""
    angles = [2 * math.pi * k / n for k in range(n)]
    return [(radius * math.sin(t), -radius * math.cos(t)) for t in angles]


def heart():
    """x = sin^3 t, y = (13 cos t - 5 cos 2t - 2 cos 3t - cos 4t) / 17, upwards."""
    cosines = [[math.cos(2 * math.pi * k / 40 * n) for n in range(1, 5)] for k in range(40)]
    heights = [(13 * a - 5 * b - 2 * c - d) / 17 for a, b, c, d in cosines]
    return [(x ** 3, -height) for (x, _), height in zip(ngon(40), heights)]


OUTLINES = {  # in units of the object's radius, y down
    "circle": ngon(40), "diamond": [(0, -1), (.7, 0), (0, 1), (-.7, 0)],
    "square": [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)], "triangle": [(0, -1), (1, .8), (-1, .8)],
    "star": [ngon(10, .42 if k % 2 else 1.0)[k] for k in range(10)],
    "cross": [(-.33, -1), (.33, -1), (.33, -.33), (1, -.33), (1, .33), (.33, .33),
              (.33, 1), (-.33, 1), (-.33, .33), (-1, .33), (-1, -.33), (-.33, -.33)],
    "ring": [*ngon(40), ngon(40)[0], ngon(40, .55)[0], *ngon(40, .55)[::-1]],  # around, then back inside
    "heart": heart()}


@dataclass
class Object:
    """One shape of a scene. Centre, radius and box are in fractions of the image."""
    words: tuple[str, str, str]  # size, colour, shape
    centre: tuple[float, float]
    radius: float
    box: tuple[float, float, float, float]

    @property
    def outline(self):
        """The corners of what is drawn, in fractions of the image."""
        (x, y), r = self.centre, self.radius
        return [(x + r * u, y + r * v) for u, v in OUTLINES[self.words[2]]]

    def say(self, keys):
        """Its words at the positions `keys` (0 size, 1 colour, 2 shape), and None for the others."""
        return tuple(word if key in keys else None for key, word in enumerate(self.words))

    def fits(self, said):
        """Whether everything that is said, as `say` says it, is true of it."""
        return all(word in (None, own) for word, own in zip(said, self.words))


def place_objects(rng):
    """2 to 4 objects whose boxes do not touch. Many share a colour or a shape: phrases are vague."""
    count, objects = rng.choice([2, 3, 4], p=[.15, .35, .5]), []
    while len(objects) < count:
        size, colour, shape = (list(words)[rng.integers(len(words))] for words in (SIZES, COLOURS, OUTLINES))
        if objects and rng.random() < .35:
            other = objects[rng.integers(len(objects))].words
            colour, shape = (other[1], shape) if rng.random() < .5 else (colour, other[2])
        r = rng.uniform(*SIZES[size])
        for x, y in rng.uniform(r + .01, .99 - r, (20, 2)).tolist():
            if all(max(abs(x - o.centre[0]), abs(y - o.centre[1])) > r + o.radius + .02 for o in objects):
                us, vs = zip(*OUTLINES[shape])
                box = (x + r * min(us), y + r * min(vs), x + r * max(us), y + r * max(vs))
                objects.append(Object((size, colour, shape), (x, y), r, box))
                break
        else:
            objects = []  # too crowded: start again
    return objects


def paint(objects, size, rng):
    """-> uint8 (size, size, 3): objects on muted, cluttered ground, drawn large and then reduced."""

    def muted(*shape):  # grey to brown
        grey, warmth = rng.uniform(60, 165, (*shape, 1)), rng.uniform(0, 22, (*shape, 1))
        return (grey + warmth * (1, 0, -1)).astype(np.uint8)

    s = 3 * size
    image = Image.fromarray(muted(4, 4)).resize((s, s), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(image)
    for colour in muted(rng.integers(10, 20)).tolist():  # slivers and blobs: polygons under a random map
        points = ngon(int(rng.integers(3, 12))) @ rng.normal(0, .06 * s, (2, 2)) + rng.uniform(0, s, 2)
        canvas.polygon(points.ravel().tolist(), tuple(colour))
    for o in objects:
        colour = np.clip(COLOURS[o.words[1]] + rng.integers(-12, 13, 3), 0, 255)
        canvas.polygon((s * np.array(o.outline)).ravel().tolist(), tuple(colour.tolist()))
    return np.clip(image.reduce(3) + rng.normal(0, 6, (size, size, 1)), 0, 255).astype(np.uint8)


# ---- captions ----------------------------------------------------------------------------------------------
PLAIN, FULL = (1, 2), (0, 1, 2)  # what a phrase says of an object: colour and shape, or size as well
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
RELATIONS = {"left": ("to the left of", "left of"), "right": ("to the right of", "on the right of"),
             "above": ("above", "over"), "below": ("below", "under"), "near": ("near", "next to")}
OPENINGS = ("", "a", "is"), ("there is", "a", ""), ("a picture of", "a", ""), ("", "some", "is")


@dataclass
class Phrase:
    """A noun phrase of a caption, caption[start:end] == text, and the boxes of every object that it fits."""
    text: str
    start: int
    end: int
    boxes: list[tuple[float, float, float, float]]  # x0, y0, x1, y1 in fractions of the image
    number: int = 1  # of objects that it speaks of
    said: tuple = ()  # what it says of them, as Object.say


def relations(a, b):
    """Which of RELATIONS are clearly true of object a to object b; never none, as boxes do not touch."""
    dx, dy = b.centre[0] - a.centre[0], b.centre[1] - a.centre[1]
    true = [name for name, d in (("left", dx), ("right", -dx), ("above", dy), ("below", -dy)) if d > .15]
    return [*true, "near"] if math.hypot(dx, dy) < .4 else true


def noun_phrase(determiner, said):
    """"two", (None, "red", None) -> "two red shapes"."""
    size, colour, shape = said
    noun = shape or "shape"
    if determiner in ("two", "three", "four"):
        noun += "es" if noun == "cross" else "s"
    return " ".join(filter(None, (determiner, size, colour, noun))).replace("a orange", "an orange")


def compose(objects, parts):
    """parts: strings, and (determiner, (size, colour, shape)) for noun phrases -> (caption, [Phrase])."""
    caption, phrases = "", []
    for part in filter(None, parts):
        caption += " " if caption else ""
        text = part if isinstance(part, str) else noun_phrase(*part)
        if text is not part:
            boxes = [o.box for o in objects if o.fits(part[1])]
            number = {text: n for n, text in NUMBERS.items()}.get(part[0], 1)
            phrases.append(Phrase(text, len(caption), len(caption) + len(text), boxes, number, part[1]))
        caption += text
    return caption, phrases


def pick(rng, *options):
    return options[rng.integers(len(options))]


def shuffled(rng, objects):
    return [objects[k] for k in rng.permutation(len(objects))]


def listing(objects, keys):
    """Parts of "a red circle , two blue stars and a ring": objects that sound alike are counted together."""
    counts = Counter(o.say(keys) for o in objects)
    parts = [part for said, n in counts.items() for part in (",", (NUMBERS[n], said))]
    parts[-2] = "and"
    return parts[1:]


def relating(rng, objects, keys_a, keys_b, third):
    """Parts of "a red circle is left of a blue square", with probability `third` and one more object."""
    a, b, *others = shuffled(rng, objects)
    said_a, said_b = a.say(keys_a), b.say(keys_b)
    opening, determiner, verb = pick(rng, *OPENINGS)
    preposition = pick(rng, *RELATIONS[pick(rng, *relations(a, b))])
    other = "another" if said_a == said_b else "a"
    parts = [opening, (determiner, said_a), verb, preposition, (other, said_b)]
    if others and rng.random() < third:
        parts += [pick(rng, ", with", ", and there is"), ("a", others[0].say(PLAIN))]
    return parts


def counting(rng, objects):
    """Parts of "two squares : a red square and a blue square": those that share a word, or all."""
    words = [o.say((key,)) for o in objects for key in FULL]
    shared = [said for said in words if sum(o.fits(said) for o in objects) > 1]
    said = pick(rng, *shared) if shared else (None, None, None)
    rest = [o for o in objects if not o.fits(said)]
    group = [o for o in shuffled(rng, objects) if o.fits(said)]
    alike = {o.say(PLAIN) for o in group} & {o.say(PLAIN) for o in rest}
    keys = FULL if alike else PLAIN  # without sizes, the counts of two that are alike would be false
    parts = [(NUMBERS[len(group)], said), pick(rng, ":", ","), *listing(group, keys)]
    if rest:
        parts += [pick(rng, ", with", ", and", ", along with"), *listing(rest, keys)]
    return parts


def write_captions(objects, rng):
    """Five true captions with their phrases: list, relation, vague relation, count, list or relation."""
    vague = pick(rng, (0,), (1,), (2,), (0, 1))
    clear = pick(rng, (0, 2), PLAIN, FULL)
    captions = [[pick(rng, "", "here are", "a scene with"), *listing(shuffled(rng, objects), FULL)],
                relating(rng, objects, pick(rng, PLAIN, FULL), pick(rng, PLAIN, FULL), third=1),
                relating(rng, objects, *pick(rng, (vague, clear), (clear, vague)), third=1),
                counting(rng, objects)]
    if rng.random() < .8:
        opening, order = pick(rng, "a picture of", "an image with", "we see"), shuffled(rng, objects)
        captions.append([opening, *listing(order, pick(rng, PLAIN, FULL))])
    else:
        captions.append(relating(rng, objects, FULL, FULL, third=0))
    return [compose(objects, parts) for parts in captions]


class Scene:
    """Objects, five captions, each caption's phrases, and pixels, which are drawn when first asked for."""

    def __init__(self, key, size):
        self.rng, self.size = np.random.default_rng(key), size
        self.objects = place_objects(self.rng)
        self.captions, self.phrases = map(list, zip(*write_captions(self.objects, self.rng)))

    @cached_property
    def pixels(self):
        return paint(self.objects, self.size, self.rng)


def scenes_of(part, count, size=64, seed=0):
    """The first scenes of a part (0 train, 1 val, 2 test), each decided by seed, part and index alone."""
    return [Scene([seed, part, i], size) for i in range(count)]


# ---- what a perfect reader reaches -------------------------------------------------------------------------
def reading(caption, phrases, objects):
    """-> a function that tells whether the caption is true of a scene's objects. Lists and counts leave none
    out. `objects`, which the caption was written for, tell whether its first phrase sums up the others."""
    groups, total = [(phrase.number, phrase.said) for phrase in phrases], None
    after = caption[phrases[0].end:].removeprefix(" is").strip()
    stated = next((name for name, texts in RELATIONS.items() if after.startswith(texts)), None)
    if not stated and sum(n for n, _ in groups) != len(objects):
        total, *groups = groups
    said = [words for n, words in groups for _ in range(n)]

    def is_true(scene):
        if not stated and len(scene) != len(said):
            return False
        fitting = [[k for k, o in enumerate(scene) if o.fits(words)] for words in said]
        found = (some for some in itertools.product(*fitting) if len(set(some)) == len(said))
        if stated:
            return any(stated in relations(scene[some[0]], scene[some[1]]) for some in found)
        return any(found) and (total is None or sum(o.fits(total[1]) for o in scene) == total[0])

    return is_true


def ceiling(scenes):
    """Recalls in per cent of a reader who knows all objects: it finds the scenes that a caption is true of
    and guesses among them, and it never errs from an image to its captions."""
    numbers = []
    for scene in scenes:
        for caption, phrases in zip(scene.captions, scene.phrases):
            true = reading(caption, phrases, scene.objects)
            numbers.append(sum(true(other.objects) for other in scenes))
    recalls = {f"t2i_r{k}": 100 * sum(min(1, k / n) for n in numbers) / len(numbers) for k in (1, 5, 10)}
    return {**recalls, "rsum": 300 + sum(recalls.values())}


if __name__ == "__main__":
    print(", ".join(f"{name} {value:.1f}" for name, value in ceiling(scenes_of(part=2, count=1000)).items()))
