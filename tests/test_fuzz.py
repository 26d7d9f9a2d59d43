"""Damaged, hostile and odd input ends in success or in one clear line, within bounds of time and memory."""
import copy
import gzip
import io
import json
import resource
import signal
import warnings
from pathlib import Path

import numpy as np
import pytest
import test_data
from PIL import Image

import data
import ground_grm

SECONDS, BYTES = 5, 3 * 2 ** 30  # of computing, and beside what the process has, that a case may take
SENTENCES = [{"raw": "a dog", "tokens": ["a", "dog"]}, {"raw": "a cat"}]
LAYOUTS = {
    "karpathy": {"images": [{"filepath": "x", "filename": f"{n}.png", "split": "test",
                             "sentences": copy.deepcopy(SENTENCES)} for n in range(3)]},
    "list": [{"image": "x/0.png", "caption": "a dog"}, {"image": "x/1.png", "caption": ["a cat", "cats"]}],
    "coco": {"info": {}, "images": [{"id": n, "file_name": f"x/{n}.png"} for n in range(3)],
             "annotations": [{"id": n, "image_id": n % 3, "caption": f"dog {n}"} for n in range(6)]}}
ODD = [None, True, 0, -1, 10 ** 40, 1e308, float("nan"), float("inf"), "", " ", "\0", "\n", "a\nb", "\ud800",
       "\U0001f415", "\u202e\u05d0", "\x85", "\u2028", "word " * 600, "x" * 20_000, "../../x", "/etc/passwd",
       "C:\\x", "..\\x", "x/../../y", "x/0.png", "file://x", "train", "test", "images", [], {}, [[]], [None],
       [""], {"raw": "a"}, {"": ""}, [1] * 1000]
KEYS = ["images", "annotations", "image", "caption", "filename", "filepath", "split", "sentences", "raw",
        "id", "file_name", "image_id", "", "\0", "__class__"]


def pictures():
    """{name: bytes} of one small image of every format and mode that are read."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3)).astype(np.uint8))
    found, exif = {}, Image.Exif()
    exif[0x0112] = 6
    for name in ("JPEG RGB", "JPEG L", "JPEG CMYK", "PNG RGB", "PNG P", "PNG RGBA", "PNG 1", "PNG I;16",
                 "WEBP RGBA", "BMP RGB", "GIF P", "TIFF RGB", "TIFF CMYK"):
        stream, (kind, mode) = io.BytesIO(), name.split()
        image = Image.new(mode, (32, 24), 1 << 14) if mode == "I;16" else noise.convert(mode)
        image.save(stream, kind, **({"exif": exif} if kind in ("JPEG", "PNG", "WEBP") else {}))
        found[name] = stream.getvalue()
    return found


def places(node):
    """Every (container, key) of a JSON value."""
    for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from places(node[key])


def mutate(rng, content):
    """One thing of a JSON value changed, in place."""
    found = list(places(content))
    if not 0 < len(found) < 3000:
        return
    node, key = found[rng.integers(len(found))]
    kind = rng.integers(6)
    if kind < 2:
        node[key] = copy.deepcopy(ODD[rng.integers(len(ODD))])
    elif kind == 2:
        del node[key]
    elif kind == 3 and isinstance(node, dict):
        node[KEYS[rng.integers(len(KEYS))]] = node.pop(key)
    elif kind == 4:
        for _ in range(rng.choice([1, 3, 200])):
            node[key] = [node[key]] if rng.integers(2) else {"images": node[key]}
    elif isinstance(node, list):
        node.extend([node[key]] * rng.choice([1, 20, 300]))


def encoded(rng, content):
    text = json.dumps(content, ensure_ascii=bool(rng.integers(2)))
    text = "[" * 100_000 + text if rng.random() < .02 else text
    encoding = (["utf-8"] * 8 + ["utf-8-sig", "utf-16", "utf-32", "latin-1"])[rng.integers(12)]
    return text.encode(encoding, "replace" if encoding == "latin-1" or rng.integers(2) else "surrogatepass")


def damaged(rng, content):
    """Bytes with some flipped, cut, doubled or put in."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 6])):
        a, b = sorted(rng.integers(0, len(content) + 1, 2).tolist())
        kind = rng.integers(8)
        if kind < 5 and content:
            content[a % len(content)] ^= 1 << rng.integers(8)
        elif kind == 5:
            del content[a:min(b, a + 16)]
        elif kind == 6:
            content[a:a] = rng.integers(0, 256, 8, np.uint8).tobytes()
        else:
            content = content[:a] if rng.random() < .3 else content[:b] + content[a:b] + content[b:]
    return bytes(content)


def read_captions(rng, folder):
    """Reads a caption file with a few things wrong."""
    layout = list(LAYOUTS)[rng.integers(3)]
    content = copy.deepcopy(LAYOUTS[layout])
    for _ in range(rng.choice([1, 1, 2, 3])):
        mutate(rng, content)
    content = encoded(rng, ODD[rng.integers(len(ODD))] if rng.random() < .03 else content)
    content = damaged(rng, content) if rng.random() < .3 else content
    name = "a.json.gz" if rng.random() < .1 else "a.json"
    if name == "a.json.gz":
        content = gzip.compress(content, 1)
        content = damaged(rng, content) if rng.random() < .5 else content
        (folder / "a.json").unlink(missing_ok=True)
    (folder / name).write_bytes(content)
    annotations = "a.json" if layout == "karpathy" else {"test": "a.json"}
    split = data.load_split("mine", {"mine": {"annotations": annotations, "images": "."}}, folder)
    assert len(split) == len(split.captions) and len(split) and all(text.strip() for text in split.texts)


def read_image(rng, folder, images):
    """Reads an image file with a few bytes wrong."""
    (folder / "image").write_bytes(damaged(rng, list(images.values())[rng.integers(len(images))]))
    image = data.FileSplit("mine", ["image"], [["a"]], folder).load_image(0, 16 if rng.integers(2) else None)
    assert image.mode == "RGB" and min(image.size) >= 1


class Hang(BaseException):
    """Not an Exception, so that nothing takes it for damaged input."""


@pytest.fixture
def bounded():
    """Stops what takes too long (once the timer is set) or too much memory."""
    def hang(number, frame):
        raise Hang(f"more than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, hang)
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.signal(signal.SIGPROF, handler)
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("cases, seed", [(200, 1), pytest.param(10_000, 8, marks=pytest.mark.slow)])
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, bounded, cases, seed):
    images, counts = pictures(), np.zeros((2, 2), int)
    (tmp_path / "x").mkdir()
    for n, content in enumerate(images.values()):
        (tmp_path / "x" / f"{n}.png").write_bytes(content)
        data.FileSplit("mine", [f"{n}.png"], [["a"]], tmp_path / "x").load_image(0)  # whole, all are read
    for case in range(cases):
        rng, of_captions = np.random.default_rng([seed, case]), case % 2
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow's remarks about damaged metadata
                read_captions(rng, tmp_path) if of_captions else read_image(rng, tmp_path, images)
            counts[of_captions, 0] += 1
        except data.UserError as error:
            assert len(str(error).splitlines()) == 1 and len(str(error)) < 2000, f"case {case}: {error!r}"
            counts[of_captions, 1] += 1
        except BaseException as error:
            raise AssertionError(f"case {case} of seed {seed} ends in {error!r:.500}") from error
    assert (counts > cases / 50).all(), counts


def test_long_files_are_read_or_refused_within_seconds(tmp_path, bounded):
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    (tmp_path / "a.json").write_text("{}" + "\n" * 10 ** 5 + "x")
    with pytest.raises(data.UserError, match="cannot be read as JSON"):
        data.load_split("mine", {"mine": {"annotations": "a.json", "images": "."}}, tmp_path)
    with pytest.raises(ValueError, match="a mark that is not"):
        ground_grm.read_sentence("[/EN#1/" * 10 ** 5, {})


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "bomb", "folder", "EPS"])
def test_an_image_that_does_not_decode_is_named(tmp_path, monkeypatch, damage):
    split, file = data.FileSplit("mine", ["0.jpg"], [["a"]], tmp_path), tmp_path / "0.jpg"
    if damage == "folder":
        file.mkdir()
    elif damage == "EPS":  # Pillow would hand it to Ghostscript
        Image.new("RGB", (8, 8)).save(file, "EPS")
    else:
        whole = pictures()["JPEG RGB"]
        damaged_ones = {"empty": b"", "truncated": whole[:len(whole) // 2], "text": b"no image"}
        file.write_bytes(damaged_ones.get(damage, whole))
    if damage == "bomb":  # Pillow only warns between once and twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24 * 32 - 1)
    told = test_data.message(lambda: split.load_image(0), repr(str(file)), "image 0 of mine, does not decode")
    assert "cannot identify" in told or damage not in ("EPS", "text")


@pytest.mark.parametrize("size", [(1, 300), (300, 1), (1, 1), (20_000, 40)])
def test_images_of_any_shape_are_trained_on(tmp_path, size):
    Image.new("RGB", size, (9, 9, 9)).save(tmp_path / "0.jpg")
    split = data.FileSplit("mine", ["0.jpg"], [["a"]], tmp_path)
    for crop in ((1, 1), (.6, 1)):
        pixels = data.image_transform(32, (0,) * 3, (1,) * 3, crop)(split.load_image(0, 32))
        assert pixels.shape == (3, 32, 32) and (pixels * 255 - 9).abs().max() < 3


@pytest.mark.parametrize("text", [
    "word " * 600, "x" * 5000, "a \U0001f415 on a \U0001f6f9\U0001f3fd", "\u05db \u202e \u05e8", "\u200b\0",
    "a\u0301" * 300])
def test_odd_captions_become_tokens_and_keep_one_when_augmented(text):
    for build, how, *_ in test_data.KINDS.values():
        tok = build(how)
        caption, = data.tokenize(tok, [text], 16)
        assert 1 <= caption.shape[1] <= 16 and caption[1].any()
        assert test_data.augmented(caption, 0, drop=.9, mask=.1)[1].any()
