"""How much recall do the scenes' captions allow? Prints what a reader reaches who knows every object of every scene.

    python tests/ceiling_of_shapes.py

Some captions are true of several scenes ("a red circle is left of a blue square"). The reader finds exactly the scenes that a
caption is true of and guesses among these; from an image to its captions it never errs. Lists and counts are read as complete: no
object of the scene is left out. Beyond this sum nothing but luck, or a habit of the captions' author, adds recall.
"""
import argparse
import itertools
import re
import sys
from pathlib import Path

import yaml
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import data  # noqa: E402
import shapes  # noqa: E402

RELATION = {text: name for name, texts in shapes.RELATIONS.items() for text in texts}
NUMBER = {word: n for n, word in shapes.NUMBERS.items()} | {"an": 1, "some": 1, "another": 1}


def parse(phrase: str) -> tuple[int, tuple]:
    """"two red circles" -> 2, (None, "red", "circle")."""
    number, *words = phrase.split()
    words = [re.sub(r"(?<=cross)es$|(?<!s)s$", "", word) for word in words]                      # without the plural's ending
    return NUMBER[number], tuple(next((word for word in words if word in options), None)
                                 for options in (shapes.SIZES, shapes.COLOURS, shapes.OUTLINES))


def reading(caption: str, phrases, objects):
    """A function that tells whether the caption is true of a scene's objects. `objects`, those it was written for, tell a list
    from a count."""
    groups = [parse(p.text) for p in phrases]
    between = caption[phrases[0].end:phrases[1].start] if len(phrases) > 1 else ""
    relation = next((name for text, name in RELATION.items() if re.fullmatch(rf"( is)? {text} ", between)), None)
    if relation:
        said = [words for _, words in groups]
        return lambda scene: any(relation in shapes.relations(*some[:2]) and all(o.fits(words) for o, words in zip(some, said))
                                 for some in itertools.permutations(scene, len(said)))
    count, *named = groups if sum(n for n, _ in groups) != len(objects) else (None, *groups)
    said = [words for n, words in named for _ in range(n)]
    return lambda scene: len(scene) == len(said) and (
        count is None or sum(o.fits(count[1]) for o in scene) == count[0]) and any(
        all(o.fits(words) for o, words in zip(some, said)) for some in itertools.permutations(scene))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", default="shapes", metavar="NAME", help="shapes (default), shapes_val, or part of one")
    args = parser.parse_args()
    datasets = yaml.safe_load((Path(__file__).parents[1] / "configs.yaml").read_text())["datasets"]
    split = data.load_split(args.split, datasets, "")
    scenes, true_of = [scene.objects for scene in split.scenes], []
    for scene in tqdm(split.scenes, desc="captions", unit="scene", mininterval=0.5 if sys.stderr.isatty() else 15):
        for caption, phrases in zip(scene.captions, scene.phrases):
            true = reading(caption, phrases, scene.objects)
            assert true(scene.objects), caption
            true_of.append(sum(map(true, scenes)))
    recalls = {k: 100 * sum(min(1, k / n) for n in true_of) / len(true_of) for k in (1, 5, 10)}
    alone = sum(n == 1 for n in true_of) / len(true_of)
    print(f"{split.name}: {len(scenes):,} scenes, {len(true_of):,} captions, {alone:.1%} true of their own scene only")
    print("text to image " + ", ".join(f"R@{k} {r:.1f}" for k, r in recalls.items()) + f"; rSum {300 + sum(recalls.values()):.1f}")


if __name__ == "__main__":
    main()
