"""What the parts of a model find: the figures against counts by hand, Flickr30K Entities, and the command."""
import json
import types

import numpy as np
import pytest
import torch
from PIL import Image

import data
import encoders
import ground_grm
import modules
from shapes import Phrase


# ---- figures -----------------------------------------------------------------------------------------------
def test_auc_is_the_share_of_pairs_in_the_right_order_with_ties_counted_half():
    rng = np.random.default_rng(0)
    for levels in (3, 1000):                                                # many ties, and few
        positive, negative = rng.integers(0, levels, 40), rng.integers(0, levels, 30)
        pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
        assert ground_grm.auc(positive, negative) == pytest.approx(np.mean(pairs))
    assert ground_grm.auc([], [1]) is None and ground_grm.auc([1], []) is None


def test_a_patch_is_inside_when_its_centre_is_in_the_box():
    within = ground_grm.inside([(0, 0, 0.5, 0.5), (0.3, 0.6, 0.9, 0.9)], 4).reshape(2, 4, 4)
    assert within[0].tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert within[1].tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]


def test_phrases_find_their_tokens_and_captions_their_content_words():
    caption = "A dark-red circle is left of a square ."
    tokenizer = encoders.build_tokenizer([caption])
    offsets, = data.token_offsets(tokenizer, [caption], 64)
    tokens = tokenizer.backend_tokenizer.encode(caption).tokens
    for text in ("A dark-red circle", "a square", "."):
        start = caption.index(text)
        found = ground_grm.token_indices(offsets, start, start + len(text))
        assert [tokens[m] for m in found] == text.lower().replace("-", " - ").split()
    phrases = [Phrase("A dark-red circle", 0, 17, [(0, 0, 1, 1)]), Phrase("a square", 29, 37, [])]
    told = ["dark", "red", "circle", "left"]
    for known, content in ((phrases, told), (None, [*told, "square"])):
        kinds = [(caption[a:b], ground_grm.kind_of_word(caption[a:b], a, b, known))
                 for a, b in ground_grm.words_of(caption)]
        assert [word for word, kind in kinds if kind == "content"] == content
        assert [word for word, kind in kinds if kind == "function"] == ["A", "-", "is", "of", "a", "."]


def test_where_a_phrase_looks_is_the_weighted_mean_of_its_words_maps():
    rng = np.random.default_rng(0)
    products, patch_mask, word_mask = rng.normal(size=(2, 9)), rng.random(9), np.array([0.8, 0.2])
    maps = ground_grm.similarity_maps(products, patch_mask, word_mask)
    np.testing.assert_allclose(maps["words"], [(products[0, l] + products[1, l]) / 2 for l in range(9)])
    heat = np.array([0.8 * products[0, l] + 0.2 * products[1, l] for l in range(9)])
    expected = (heat - heat.min()) / (heat.max() - heat.min()) * patch_mask
    np.testing.assert_allclose(maps["masks"], expected)
    fainter = ground_grm.similarity_maps(products, patch_mask, word_mask / 9)
    np.testing.assert_allclose(fainter["masks"], expected)


def test_the_interval_resamples_images_not_values():
    """Ten copies of a value are no more evidence than one within an image, but are in images of their own."""
    rng = np.random.default_rng(0)
    groups, images = rng.integers(0, 2, 200), np.arange(200)
    values = groups + rng.normal(size=200)
    difference = values[groups == 1].mean() - values[groups == 0].mean()
    errors = [values[groups == group].std() / (groups == group).sum() ** 0.5 for group in (0, 1)]
    for some, expected, error in ((None, values.mean(), values.std() / 200 ** 0.5),
                                  (groups, difference, np.hypot(*errors))):
        copies = some if some is None else np.repeat(some, 10)
        alone = ground_grm.bootstrap(values, images, some)
        together = ground_grm.bootstrap(np.repeat(values, 10), np.repeat(images, 10), copies)
        apart = ground_grm.bootstrap(np.repeat(values, 10), np.arange(2000), copies)
        assert alone[0] == pytest.approx(expected) and together == pytest.approx(alone)
        assert alone[2] - alone[1] == pytest.approx(2 * 1.96 * error, rel=0.1)
        assert apart[2] - apart[1] < (alone[2] - alone[1]) / 2.5
    assert ground_grm.bootstrap([1, 2], [0, 1], [1, 1]) is None and ground_grm.bootstrap([], []) is None


# ---- a model that knows ------------------------------------------------------------------------------------
class Knows:
    """A matcher of words that are all alike. Of an image's objects the first looks most like them, and the
    second, which the mask prefers, nearly so. Of its regions, which are all unlike them, the second is least
    so. With right = False, objects and ground change places, and so do content and function words."""

    def __init__(self, split, config, right=True):
        self.split, self.config, self.right, self.done = split, config, right, 0
        self.tokenizer = encoders.build_tokenizer(split.texts)
        self.transform = types.SimpleNamespace(size=64)
        self.model = types.SimpleNamespace(class_tokens=2, gate=True,
                                           sampler=modules.GaussianSampler(8, prior=1 / 8))

    def encode_images(self, images, batch_size):
        features = [self.image(self.done + b) for b in range(len(images))]
        self.done += len(images)
        return modules.ImageFeatures(*(torch.stack(x) for x in zip(*features)))

    def image(self, i):
        likeness, mask = torch.zeros(64), torch.zeros(64)
        for n, shape in enumerate(self.split.scenes[i].objects):
            within = torch.from_numpy(ground_grm.inside(shape.box, 8)[0])
            likeness[within], mask[within] = (1, 0.5) if n == 0 else (0.9, 1) if n == 1 else (0.5, 0.5)
        if not self.right:
            likeness, mask = 1 - likeness, 1 - mask
        likeness, mask = (torch.cat([torch.ones(2), x]) for x in (likeness, mask))      # class tokens
        means = torch.eye(8)[[1, 0, 0, 2]]
        means[0] = torch.tensor([6, 8, 0, 0, 0, 0, 0, 0])
        regions = torch.zeros(4, 8)
        regions[:, :2] = torch.tensor([[-0.6, 0.8], [-1, 10], [-2, 10], [-3, 10]])      # not the longest
        variance = torch.tensor([100, i + 1, 100, 100])[:, None].expand(4, 8) / 8       # the prior's is 1 / 8
        tokens, nothing = likeness[:, None] * torch.eye(8)[0], torch.zeros(0)
        gates = (torch.arange(4) < len(self.split.scenes[i].objects)).float()
        return tokens, mask, regions, nothing, gates, means[:1], means, variance.log()

    def encode_texts(self, texts, batch_size):
        ids, _, words = data.pad(data.tokenize(self.tokenizer, texts, 64), self.tokenizer.pad_token_id)
        told = [self.tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
        content = torch.tensor([[not ground_grm.is_function_word(word) for word in row] for row in told])
        mask = (content == self.right).float() * words
        return modules.TextFeatures(torch.eye(8)[0].expand(*ids.shape, 8), words, mask + 1e-3 * words, None)


def scenes(config, count=None):
    return data.load_split("shapes", config["datasets"], "").subset(slice(count))


def measure(split, config, right=True):
    split, truths = ground_grm.with_truth(split, {}, "")
    return ground_grm.measure(Knows(split, config, right), split, truths, batch_size=5, progress=False)


def test_every_figure_of_a_known_model_against_a_count(tiny_config):
    split = scenes(tiny_config, 12)
    report = measure(split, tiny_config)
    phrases = [(i, phrase) for i in range(12) for some in split.scenes[i].phrases for phrase in some]
    first = [split.scenes[i].objects[0].box in phrase.boxes for i, phrase in phrases]
    second = [split.scenes[i].objects[1].box in phrase.boxes for i, phrase in phrases]
    centres = [((l % 8 + 0.5) / 8, (l // 8 + 0.5) / 8) for l in range(64)]
    chance = [any(a <= x <= c and b <= y <= d for a, b, c, d in phrase.boxes)
              for _, phrase in phrases for x, y in centres]
    several = [i + 1 for i, phrase in phrases if len(phrase.boxes) > 1]
    one = [i + 1 for i, phrase in phrases if len(phrase.boxes) == 1]
    assert (report["split"], report["images"], report["phrases"]) == ("shapes", 12, len(phrases))
    assert report["chance"] == pytest.approx(np.mean(chance))
    assert report["pointing, words"] == pytest.approx(np.mean(first))
    assert report["pointing, masks"] == pytest.approx(np.mean(second))
    value, low, high = report["masks less words"]
    assert value == pytest.approx(np.mean(second) - np.mean(first)) and low < value < high
    assert report["cosine"] == pytest.approx((1 + .6 + .6) / 6)      # six pairs
    assert report["variance"][0] == pytest.approx(np.mean(several) - np.mean(one), rel=1e-4)
    objects = [len(scene.objects) for scene in split.scenes]
    assert report["open"] == pytest.approx(np.minimum(objects, 4).mean())
    assert report["open with objects"] == pytest.approx(np.corrcoef(objects, np.minimum(objects, 4))[0, 1])


@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_knows_gets_full_marks_and_its_opposite_none(right, tiny_config):
    split = scenes(tiny_config, 6)
    for scene in split.scenes:                                              # every phrase means every object
        for phrase in (phrase for phrases in scene.phrases for phrase in phrases):
            phrase.boxes = [shape.box for shape in scene.objects]
    report = measure(split, tiny_config, right)
    assert report["pointing, words"] == right and report["pointing, masks"] == right
    assert report["AUC image"] == right and report["AUC text"] == right
    assert report["variance"] is None                            # no phrase means one object


# ---- Flickr30K Entities ------------------------------------------------------------------------------------
SENTENCES = """[/EN#1/people A man] in [/EN#2/clothing a blue shirt] waves at [/EN#0/notvisual someone] .
[/EN#1/bodyparts/people The man 's arm] is up in [/EN#3/scene the street] .
"""
BOXES = """<annotation><filename>77.jpg</filename><size><width>200</width><height>100</height></size>
<object><name>1</name><name>2</name>
<bndbox><xmin>21</xmin><ymin>11</ymin><xmax>60</xmax><ymax>90</ymax></bndbox></object>
<object><name>1</name><bndbox><xmin>101</xmin><ymin>1</ymin><xmax>200</xmax><ymax>100</ymax></bndbox></object>
<object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object>
</annotation>"""


@pytest.fixture
def entities_root(tmp_path):
    """A data root with one photograph (of noise), its Karpathy entry and its Entities files."""
    root = tmp_path / "data" / "flickr30k"
    for file, text in (("entities/Sentences/77.txt", SENTENCES), ("entities/Annotations/77.xml", BOXES),
                       ("dataset_flickr30k.json", json.dumps({"images": [
                           {"filename": "77.jpg", "split": "test", "sentences": [{"raw": "A man."}]}]}))):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text(text)
    (root / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (100, 200, 3), np.uint8)
    Image.fromarray(noise).save(root / "images" / "77.jpg")
    return tmp_path / "data"


def truth_of(config, root):
    return ground_grm.with_truth(data.load_split("f30k", config["datasets"], root), config["datasets"], root)


def test_entities_give_captions_phrases_and_boxes(entities_root, tiny_config):
    split, (truth,) = truth_of(tiny_config, entities_root)
    assert split.captions == [["A man in a blue shirt waves at someone .",
                               "The man 's arm is up in the street ."]]
    for caption, phrases in zip(split.captions[0], truth.phrases):
        assert all(caption[phrase.start:phrase.end] == phrase.text for phrase in phrases)
    left, right = (.1, .1, .3, .9), (.5, 0, 1, 1)
    assert [[(phrase.text, phrase.boxes) for phrase in phrases] for phrases in truth.phrases] == [
        [("A man", [left, right]), ("a blue shirt", [left]), ("someone", [])],
        [("The man 's arm", [left, right]), ("the street", [])]]
    assert truth.boxes == [left, right]


@pytest.mark.parametrize("file, text, said", [
    ("Annotations/77.xml", None, "cannot read"), ("Sentences/77.txt", None, "Sentences and Annotations"),
    ("Annotations/77.xml", "<annotation>", "Entities"),
    ("Annotations/77.xml", "<a></a>", "could not convert"),
    ("Annotations/77.xml", BOXES.replace("<xmin>21</xmin>", ""), "could not convert"),
    ("Annotations/77.xml", BOXES.replace("100</h", "0</h"), "200 x 0"),
    ("Annotations/77.xml", BOXES.replace("21", "x"), "could not convert"),
    ("Sentences/77.txt", "\n", "no sentence"),
    ("Sentences/77.txt", "[/EN#1/people A man in a shirt", "[/EN#1/people A man")])
def test_bad_entities_files_are_named_in_one_line(file, text, said, entities_root, tiny_config):
    path = entities_root / "flickr30k" / "entities" / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(data.UserError) as error:
        truth_of(tiny_config, entities_root)
    assert said in str(error.value) and path.name in str(error.value) and "\n" not in str(error.value)


# ---- the command -------------------------------------------------------------------------------------------
KEYS = {"split", "size", "images", "phrases", "chance", "pointing, words", "pointing, masks",
        "masks less words", "AUC image", "AUC text", "cosine", "variance", "open", "open with objects"}


def ground(config, folder, capsys, *argv):
    """ground_grm.py on an untrained model -> what it prints, and what it writes."""
    tokenizer = encoders.build_tokenizer(scenes(config).texts)
    model = modules.build_grm(config, len(tokenizer), tokenizer.pad_token_id)
    torch.save({"model": model.state_dict(), "config": config,
                "tokenizer": encoders.tokenizer_state(tokenizer),
                "text_config": model.text_encoder.config}, folder / "x.pt")
    arguments = ["--ckpt", str(folder / "x.pt"), "--out", str(folder / "out"), *map(str, argv)]
    ground_grm.main(ground_grm.parse_arguments(arguments))
    report = json.loads((folder / "out" / "grounding.json").read_text())
    assert report.keys() == KEYS
    return capsys.readouterr().out, report


@pytest.mark.parametrize("uncertainty", [True, False])
def test_the_command_measures_the_test_split(uncertainty, tiny_config, tmp_path, capsys):
    tiny_config["model"]["uncertainty"] = uncertainty
    printed, report = ground(tiny_config, tmp_path, capsys, "--limit", 10, "--batch-size", 4)
    assert report["split"] == "shapes" and report["images"] == 10 and "pointing, words" in printed
    assert 0 < report["AUC image"] < 1 and 0 < report["AUC text"] < 1
    assert (report["variance"] is not None) == ("variance" in printed) == uncertainty
    del tiny_config["image"]["eval_size"]                                   # as in older checkpoints
    _, same = ground(tiny_config, tmp_path, capsys, "--limit", 10)
    _, large = ground(tiny_config, tmp_path, capsys, "--limit", 10, "--size", 128)
    assert same["size"] == 64 and large["size"] == 128 and large["chance"] != same["chance"]


def test_the_command_takes_entities_and_leaves_class_tokens_out(entities_root, tiny_config, tmp_path, capsys):
    tiny_config["model"]["special_tokens"] = True
    printed, report = ground(tiny_config, tmp_path, capsys, "--split", "f30k", "--data-root", entities_root)
    assert report["phrases"] == 3
    assert report["chance"] == pytest.approx((2 * 0.66 + 0.16) / 3, abs=0.15)           # areas of the boxes


def test_without_boxes_only_what_needs_none_is_measured(coco_folder, tiny_config, tmp_path, capsys):
    printed, report = ground(tiny_config, tmp_path, capsys, "--split", "coco5k", "--data-root", coco_folder)
    missing = {key for key in KEYS if report[key] is None}
    assert report["phrases"] == 0
    assert missing == KEYS - {"split", "size", "images", "phrases", "AUC text", "cosine"}
    assert "without boxes" in printed and "AUC text" in printed and "pointing" not in printed
