"""Damaged caption files and images: every case must end in success or in one clear line.

    python tests/fuzz_data.py --cases 20000 --seed 1

Anything else (another exception, a message of several lines, more than LIMIT seconds or memory) stops with the case's
number, from which the same case can be made again.
"""
import argparse
import gzip
import io
import json
import resource
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import data  # noqa: E402

LIMIT = 5                           # seconds of computing that a case may take
MEMORY = 3 * 2 ** 30                # bytes the process may take beside what it has
LAYOUTS = {
    "karpathy": {"images": [{"filepath": "x", "filename": f"{n}.png", "split": "test", "cocoid": n, "sentids": [n],
                             "sentences": [{"raw": "a dog", "tokens": ["a", "dog"]}, {"raw": "a cat"}]} for n in range(3)]},
    "list": [{"image": f"x/{n}.png", "caption": text} for n, text in enumerate(["a dog", ["a cat", "two cats"], "a cow"])],
    "coco": {"info": {}, "images": [{"id": n, "file_name": f"x/{n}.png"} for n in range(3)],
             "annotations": [{"id": n, "image_id": n % 3, "caption": f"dog {n}"} for n in range(6)]}}
ODD = [None, True, 0, -1, 10 ** 40, 1e308, float("nan"), float("inf"), "", " ", "\0", "\n", "a\nb", "\ud800", "\U0001f415",
       "\u202e\u05d0", "word " * 600, "x" * 20_000, "../../etc/passwd", "/etc/passwd", "C:\\x", "..\\x", "x/../../y",
       "x/0.png", "train", "test", [], {}, [[]], [None], [""], {"raw": "a"}, {"": ""}, [1] * 1000, "images", "file://x",
       "\x85", "\u2028"]
KEYS = ["images", "annotations", "image", "caption", "filename", "filepath", "split", "sentences", "raw", "id", "file_name",
        "image_id", "", "\0", "__class__"]


def places(node, found):
    """Every (container, key) of a JSON value."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        found.append((node, key))
        if isinstance(node[key], (dict, list)):
            places(node[key], found)
    return found


def mutated_json(rng) -> tuple[str, bytes]:
    """-> (layout, the bytes of a caption file with a few things wrong)."""
    layout = list(LAYOUTS)[rng.integers(3)]
    content = json.loads(json.dumps(LAYOUTS[layout]))
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        where = places(content, []) if isinstance(content, (dict, list)) else []
        if not 0 < len(where) < 3000:
            break
        node, key = where[rng.integers(len(where))]
        odd, kind = json.loads(json.dumps(ODD[rng.integers(len(ODD))])), rng.integers(6)
        if kind < 2:
            node[key] = odd
        elif kind == 2:
            del node[key]
        elif kind == 3 and isinstance(node, dict):
            node[KEYS[rng.integers(len(KEYS))]] = node.pop(key)
        elif kind == 4:
            for _ in range(int(rng.choice([1, 3, 200]))):
                node[key] = [node[key]] if rng.integers(2) else {"images": node[key]}
        elif isinstance(node, list):
            node.extend([node[key]] * int(rng.choice([1, 20, 300])))
    if rng.random() < .03:
        content = ODD[rng.integers(len(ODD))]
    return layout, mutated_bytes(rng, encoded(rng, content)) if rng.random() < .3 else encoded(rng, content)


def encoded(rng, content) -> bytes:
    text = json.dumps(content, ensure_ascii=bool(rng.integers(2)))
    if rng.random() < .02:
        text = "[" * 100_000 + text
    encoding = (["utf-8"] * 8 + ["utf-8-sig", "utf-16", "utf-32", "latin-1"])[rng.integers(12)]
    return text.encode(encoding, "replace" if encoding == "latin-1" or rng.integers(2) else "surrogatepass")


def mutated_bytes(rng, content: bytes) -> bytes:
    """Some bytes flipped, cut, doubled or put in."""
    content = bytearray(content)
    for _ in range(int(rng.choice([1, 1, 1, 2, 6]))):
        if not content:
            break
        a, b = sorted(rng.integers(0, len(content) + 1, 2).tolist())
        kind = rng.integers(8)
        if kind < 5:
            content[a % len(content)] ^= 1 << rng.integers(8)
        elif kind == 5:
            del content[a:min(b, a + 16)]
        elif kind == 6:
            content[a:a] = rng.integers(0, 256, 8, np.uint8).tobytes()
        else:
            content = content[:a] if rng.random() < .3 else content[:b] + content[a:b] + content[b:]
    return bytes(content)


def pictures() -> dict[str, bytes]:
    """One small image of every format and mode that are read."""
    pixels, found = np.random.default_rng(0).integers(0, 255, (24, 32, 3)).astype(np.uint8), {}
    for kind, mode in (("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "P"), ("PNG", "RGBA"),
                       ("PNG", "1"), ("PNG", "I;16"), ("WEBP", "RGBA"), ("BMP", "RGB"), ("GIF", "P"), ("TIFF", "RGB"),
                       ("TIFF", "CMYK")):
        stream, image = io.BytesIO(), Image.fromarray(pixels)
        if mode == "I;16":
            image = Image.fromarray(pixels[..., 0].astype(np.uint16) << 8)
        options = {}
        if kind in ("JPEG", "PNG", "WEBP"):
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6
        (image if mode == "I;16" else image.convert(mode)).save(stream, kind, **options)
        found[f"{kind} {mode}"] = stream.getvalue()
    return found


def outcome(case: int, folder: Path, images: dict[str, bytes], seed: int) -> str:
    """Runs one case -> "read", or the line that it ended in. Even cases are caption files, odd ones images."""
    rng = np.random.default_rng([seed, case])
    try:
        if case % 2 == 0:
            layout, content = mutated_json(rng)
            zipped = rng.random() < .1
            (folder / "a.json").unlink(missing_ok=True)
            (folder / "a.json.gz").unlink(missing_ok=True)
            if zipped:
                content = gzip.compress(content, 1)
                content = mutated_bytes(rng, content) if rng.random() < .5 else content
            (folder / ("a.json.gz" if zipped else "a.json")).write_bytes(content)
            annotations = "a.json" if layout == "karpathy" else {"test": "a.json"}
            split = data.load_split("mine", {"mine": {"annotations": annotations, "images": "."}}, folder)
            assert len(split) and all(text.strip() for text in split.texts) and len(split.captions) == len(split)
        else:
            kind = list(images)[rng.integers(len(images))]
            (folder / "image").write_bytes(mutated_bytes(rng, images[kind]))
            image = data.FileSplit("mine", ["image"], [["a"]], folder).load_image(0, 16 if rng.integers(2) else None)
            assert image.mode == "RGB" and min(image.size) >= 1
        return "read"
    except data.DataError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, f"case {case}: not one clear line: {error!r}"
        return str(error)


class Hang(BaseException):
    """Not an Exception, so that nothing takes it for damaged input."""


def hang(number, frame):
    raise Hang(f"more than {LIMIT} s")


def fuzz(cases: int, seed: int, folder: Path, first: int = 0) -> dict[str, int]:
    """-> how many caption files and images were read, and how many refused."""
    counts = {"captions read": 0, "captions refused": 0, "images read": 0, "images refused": 0}
    images = pictures()
    signal.signal(signal.SIGPROF, hang)
    for kind, content in images.items():
        (folder / kind).write_bytes(content)
        data.FileSplit("mine", [kind], [["a"]], folder).load_image(0)          # whole, they are all read
    (folder / "x").mkdir()
    for n in range(3):
        (folder / "x" / f"{n}.png").write_bytes(images["PNG RGB"])
    for case in range(first, first + cases):
        signal.setitimer(signal.ITIMER_PROF, LIMIT)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")          # Pillow's remarks about damaged metadata
                result = outcome(case, folder, images, seed)
        except BaseException:
            print(f"case {case} of seed {seed}:", file=sys.stderr)
            raise
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        counts[f"{'images' if case % 2 else 'captions'} {'read' if result == 'read' else 'refused'}"] += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="number of the first case")
    args = parser.parse_args()
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory() as temporary:
        print(fuzz(args.cases, args.seed, Path(temporary), args.first))
