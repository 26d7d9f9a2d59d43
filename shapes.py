"""The built-in data: scenes of 2 to 4 coloured shapes on cluttered ground, drawn from a seed, with five captions each.

Every phrase of a caption knows the boxes of all objects that it fits, also when it fits several ("a red shape"), and an
object may be described by several phrases: one-to-many and many-to-one, with ground truth.
"""
import math
from collections import Counter
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {"red": (220, 30, 35), "orange": (250, 140, 10), "yellow": (245, 225, 40), "green": (30, 165, 55),
           "cyan": (40, 215, 225), "blue": (35, 60, 225), "purple": (145, 40, 195), "pink": (255, 115, 185)}
SIZES = {"small": (.11, .13), "large": (.19, .22)}  # the radius as a fraction of the image


@cache
def ngon(n, radius=1.0):
    return [(radius * math.sin(2 * math.pi * k / n), -radius * math.cos(2 * math.pi * k / n)) for k in range(n)]


OUTLINES = {  # in units of the object's radius, y down
    "circle": ngon(40), "diamond": [(0, -1), (.7, 0), (0, 1), (-.7, 0)],
    "square": [(-.85, -.85), (.85, -.85), (.85, .85), (-.85, .85)], "triangle": [(0, -1), (1, .8), (-1, .8)],
    "star": [point for pair in zip(ngon(10)[::2], ngon(10, .42)[1::2]) for point in pair],
    "cross": [(-.33, -1), (.33, -1), (.33, -.33), (1, -.33), (1, .33), (.33, .33),
              (.33, 1), (-.33, 1), (-.33, .33), (-1, .33), (-1, -.33), (-.33, -.33)],
    "ring": [*ngon(40), ngon(40)[0], ngon(40, .55)[0], *ngon(40, .55)[::-1]],  # round outside, then back round inside
    "heart": [(x ** 3, -(13 * c - 5 * (2 * c * c - 1) - 2 * (4 * c ** 3 - 3 * c) - (8 * c ** 4 - 8 * c * c + 1)) / 17)
              for x, c in ((s, -y) for s, y in ngon(40))],
}
RELATIONS = {"left": ("to the left of", "left of"), "right": ("to the right of", "on the right of"),
             "above": ("above", "over"), "below": ("below", "under"), "near": ("near", "next to")}
NUMBERS = {1: "a", 2: "two", 3: "three", 4: "four"}
PLAIN, FULL = (1, 2), (0, 1, 2)  # which of an object's words (size, colour, shape) a phrase says


@dataclass
class Phrase:
    """A noun phrase of a caption, caption[start:end] == text, and the boxes of every object that it fits."""
    text: str
    start: int
    end: int
    boxes: list[tuple[float, float, float, float]]  # x0, y0, x1, y1 in fractions of the image's width and height


@dataclass
class Object:
    """One shape of a scene: its size, colour and shape in words; centre, radius and box in fractions of the image."""
    words: tuple[str, str, str]
    centre: tuple[float, float]
    radius: float
    box: tuple[float, float, float, float]

    @property
    def outline(self) -> list[tuple[float, float]]:
        """The corners of what is drawn, in fractions of the image."""
        return [(self.centre[0] + self.radius * u, self.centre[1] + self.radius * v) for u, v in OUTLINES[self.words[2]]]

    def fits(self, said):
        return all(word in (None, own) for word, own in zip(said, self.words))


def place_objects(rng):
    """2 to 4 objects whose boxes do not touch. They often share a colour or a shape, so that phrases are ambiguous."""
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


def relations(a, b):
    """Which of RELATIONS are clearly true of object a to object b; never none, as boxes do not touch."""
    dx, dy = b.centre[0] - a.centre[0], b.centre[1] - a.centre[1]
    true = [r for r, d in (("left", dx), ("right", -dx), ("above", dy), ("below", -dy)) if d > .15]
    return true + ["near"] * (math.hypot(dx, dy) < .4)


def compose(objects, parts):
    """parts: strings, and (determiner, (size, colour, shape)) for noun phrases -> (caption, [Phrase])."""
    text, phrases = "", []
    for part in filter(None, parts):
        text += " " if text else ""
        words = part
        if not isinstance(part, str):
            determiner, said = part
            plural = ("es" if said[2] == "cross" else "s") if determiner in ("two", "three", "four") else ""
            words = " ".join(filter(None, (determiner, *said[:2], (said[2] or "shape") + plural))).replace("a orange", "an orange")
            phrases.append(Phrase(words, len(text), len(text) + len(words), [o.box for o in objects if o.fits(said)]))
        text += words
    return text, phrases


def describe(objects, rng):
    """Five true captions: a full list, a relation, an ambiguous relation, a count, and another list or relation."""
    pick = lambda *options: options[rng.integers(len(options))]
    shuffled = lambda: [objects[i] for i in rng.permutation(len(objects))]
    say = lambda o, keys: tuple(word if key in keys else None for key, word in enumerate(o.words))

    def listing(some, keys):  # "a red circle , two stars and ..."
        *first, last = [(NUMBERS[n], said) for said, n in Counter(say(o, keys) for o in some).items()]
        return [part for phrase in first for part in (phrase, ",")][:-1] + ["and"] * bool(first) + [last]

    def related(keys_a, keys_b, third=0.0):  # "a red circle is left of a blue square"
        a, b, *others = shuffled()
        opener, determiner, verb = pick(("", "a", "is"), ("there is", "a", ""), ("a picture of", "a", ""), ("", "some", "is"))
        parts = [opener, (determiner, say(a, keys_a)), verb, pick(*RELATIONS[pick(*relations(a, b))]),
                 ("another" if say(a, keys_a) == say(b, keys_b) else "a", say(b, keys_b))]
        return parts + ([pick(", with", ", and there is"), ("a", say(others[0], PLAIN))] if others and rng.random() < third else [])

    def counted():  # objects that share a word, or else all of them: "two squares , a red square and a blue square"
        shared = [say(o, (key,)) for o in objects for key in FULL if sum(p.fits(say(o, (key,))) for p in objects) > 1]
        said = pick(*shared) if shared else (None, None, None)
        rest = [o for o in objects if not o.fits(said)]
        group = [o for o in shuffled() if o.fits(said)]
        keys = FULL if {say(o, PLAIN) for o in group} & {say(o, PLAIN) for o in rest} else PLAIN  # so that counts are true
        parts = [(NUMBERS[len(group)], said), pick(":", ","), *listing(group, keys)]
        return parts + ([pick(", with", ", and", ", along with"), *listing(rest, keys)] if rest else [])
    vague, clear = pick((0,), (1,), (2,), (0, 1)), pick((0, 2), PLAIN, FULL)
    return zip(*(compose(objects, parts) for parts in (
        [pick("", "here are", "a scene with"), *listing(shuffled(), FULL)],
        related(pick(PLAIN, FULL), pick(PLAIN, FULL), third=1),
        related(*pick((vague, clear), (clear, vague)), third=1), counted(),
        [pick("a picture of", "an image with", "we see"), *listing(shuffled(), pick(PLAIN, FULL))] if rng.random() < .8
        else related(FULL, FULL))))


def draw(objects, size, rng):
    """-> uint8 (size, size, 3): muted, cluttered ground and the objects, at three times the size and then reduced."""

    def muted(*shape):  # grey to brown
        return (rng.uniform(60, 165, (*shape, 1)) + rng.uniform(0, 22, (*shape, 1)) * (1, 0, -1)).astype(np.uint8)
    s = 3 * size
    image = Image.fromarray(muted(4, 4)).resize((s, s), Image.Resampling.BICUBIC)
    canvas = ImageDraw.Draw(image)
    for colour in map(tuple, muted(rng.integers(10, 20)).tolist()):  # slivers and blobs: polygons under a random map
        points = ngon(int(rng.integers(3, 12))) @ rng.normal(0, .06 * s, (2, 2)) + rng.uniform(0, s, 2)
        canvas.polygon(points.ravel().tolist(), colour)
    for o in objects:
        colour = np.clip(COLOURS[o.words[1]] + rng.integers(-12, 13, 3), 0, 255)
        canvas.polygon((s * np.array(o.outline)).ravel().tolist(), tuple(colour.tolist()))
    return np.clip(image.reduce(3) + rng.normal(0, 6, (size, size, 1)), 0, 255).astype(np.uint8)


class Scene:
    """One scene: objects, five captions and their phrases; the pixels are drawn when first asked for and kept."""

    def __init__(self, key, size):
        self.rng, self.size = np.random.default_rng(key), size
        self.objects = place_objects(self.rng)
        self.captions, self.phrases = map(list, describe(self.objects, self.rng))

    @cached_property
    def pixels(self):
        return draw(self.objects, self.size, self.rng)
