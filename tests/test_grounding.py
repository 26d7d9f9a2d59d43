"""Grounding and probes: the figures against counts by hand, the reader of Flickr30K Entities, and the whole report."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

import data
import entities
import grounding
import modules
from shapes import Object, Phrase

# ------------------------------------------------------------------------------------------------------------ the figures


def test_auc_is_the_share_of_pairs_in_the_right_order_with_ties_counted_half():
    rng = np.random.default_rng(0)
    for levels in (3, 1000):                                                                     # many ties, and few
        positive, negative = rng.integers(0, levels, 40), rng.integers(0, levels, 30)
        pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positive for n in negative]
        assert grounding.auc(positive, negative) == pytest.approx(np.mean(pairs))
    assert grounding.auc([2, 3], [0, 1]) == 1 and grounding.auc([0], [1]) == 0
    assert grounding.auc([], [1]) is None


def test_a_patch_is_inside_a_box_when_its_centre_is():
    within = grounding.inside([(0, 0, 0.5, 0.5), (0.3, 0.6, 0.9, 0.9)], 4)
    assert within[0].reshape(4, 4).tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert within[1].reshape(4, 4).tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1]]
    assert grounding.inside([], 4).shape == (0, 16)


def test_a_patch_is_on_an_object_when_its_centre_is_within_the_outline():
    triangle = [(0, 1), (1, 1), (.5, 0)]                          # its box is the whole image
    within = grounding.inside_outlines([triangle], 4).reshape(4, 4).astype(int).tolist()
    assert within == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [1, 1, 1, 1]]
    ring = Object(("large", "red", "ring"), (.5, .5), .5, (0, 0, 1, 1)).outline
    within = grounding.inside_outlines([ring], 4).reshape(4, 4).astype(int).tolist()
    assert within == [[0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 0, 1], [0, 1, 1, 0]]
    assert not grounding.inside_outlines([], 4).any()


def test_a_map_becomes_the_tight_boxes_of_its_connected_high_patches():
    heat = np.array([[9., 8, 0, 0], [0, 0, 0, 4.4], [0, 0, 6, 0], [0, 0, 0, 6]])
    assert sorted(map(tuple, grounding.boxes_of_map(heat, 0.5))) == [(0, 0, .5, .25), (.5, .5, .75, .75), (.75, .75, 1, 1)]
    assert len(grounding.boxes_of_map(heat, 0.4)) == 4                                           # 4.4 of 9 counts now
    np.testing.assert_allclose(grounding.boxes_of_map(heat - 100), grounding.boxes_of_map(heat))  # cosines may be negative


def test_iou_against_areas_by_hand():
    np.testing.assert_allclose(grounding.iou([(0, 0, 1, 1), (0, 0, .5, .5)], [(0, 0, .5, 1), (.5, .5, 1, 1)]),
                               [[.5, .25], [1 / 2, 0]])


def test_phrases_find_their_tokens_through_the_offsets():
    caption = "a dark-red circle is left of a square"
    tokenizer = data.build_tokenizer([caption])
    encoding = tokenizer.backend_tokenizer.encode(caption)
    said = lambda text: [encoding.tokens[m] for m in grounding.token_indices(
        encoding.offsets, caption.index(text), caption.index(text) + len(text))]
    assert said("a dark-red circle") == ["a", "dark", "-", "red", "circle"]
    assert said("a square") == ["a", "square"]                                                   # and no special token
    assert grounding.token_indices([(0, 0), (0, 1), (1, 5), (0, 0)], 0, 1) == [1]


def test_words_are_content_function_or_neither():
    caption = "A picture of two red circles , left of it"
    kinds = grounding.word_kinds(caption, [Phrase("two red circles", 13, 28, [(0, 0, 1, 1)])])
    words = {kind: [caption[start:end] for start, end, own in kinds if own == kind] for kind in grounding.KINDS}
    assert words == {"phrase": ["red", "circles"], "number": ["two"], "place": ["left"], "function": ["A", "of", ",", "of", "it"]}
    anything = grounding.word_kinds(caption, None)                   # a caption whose phrases are not known
    assert [caption[start:end] for start, end, kind in anything if kind == "phrase"] == ["picture", "red", "circles"]
    assert [own for own in anything if own[2] != "phrase"] == [own for own in kinds if own[2] != "phrase"]


def test_where_a_phrase_looks_is_the_weighted_mean_of_its_words_maps():
    rng = np.random.default_rng(0)
    products, patch_mask, word_mask = rng.normal(size=(2, 9)), rng.random(9), np.array([0.8, 0.2])
    maps = grounding.similarity_maps(products, patch_mask, word_mask)
    np.testing.assert_allclose(maps["words"], [(products[0, l] + products[1, l]) / 2 for l in range(9)])
    heat = np.array([0.8 * products[0, l] + 0.2 * products[1, l] for l in range(9)])
    np.testing.assert_allclose(maps["masks"], (heat - heat.min()) / (heat.max() - heat.min()) * patch_mask)
    np.testing.assert_allclose(grounding.similarity_maps(products, patch_mask, word_mask / 9)["masks"], maps["masks"])


def test_the_interval_of_a_difference_resamples_images_not_values():
    """Ten copies of every value in the same image are no more evidence than one; in images of their own they would be."""
    rng = np.random.default_rng(0)
    groups, images = rng.integers(0, 2, 200), np.arange(200)
    values = groups + rng.normal(size=200)
    alone = grounding.bootstrap_difference(values, groups, images)
    together = grounding.bootstrap_difference(*(np.repeat(x, 10) for x in (values, groups, images)))
    apart = grounding.bootstrap_difference(np.repeat(values, 10), np.repeat(groups, 10), np.arange(2000))
    expected = values[groups == 1].mean() - values[groups == 0].mean()
    standard_error = np.sqrt(sum(values[groups == g].var() / (groups == g).sum() for g in (0, 1)))
    assert alone[0] == pytest.approx(expected) and together == pytest.approx(alone)
    assert alone[2] - alone[1] == pytest.approx(2 * 1.96 * standard_error, rel=0.1)
    assert apart[2] - apart[1] < (alone[2] - alone[1]) / 2.5
    assert grounding.bootstrap_difference([1, 2], [1, 1], [0, 1]) is None


def zeros(split):
    """Similarities that find nothing."""
    return torch.zeros(len(split), len(split.texts))


class Counter(torch.nn.Module):
    """Scores an image and a caption by how many of the words, each counted, they do not share."""

    def encode_text(self, ids, valid):
        return modules.TextFeatures(torch.nn.functional.one_hot(ids, 50).float(), valid, valid.float())

    def similarity(self, image, text):
        return {"combined": -torch.cdist(image.tokens.sum(1), (text.tokens * text.mask[..., None]).sum(1), p=1)}


def test_what_retrieval_needs_are_the_words_without_which_images_are_not_found():
    captions = ["red dogs , two , left", "red dogs , three , left", "a blue dog , left", "a green dog , left"]
    split, tokenizer = data.FileSplit("x", list("1234"), [[c] for c in captions], None), data.build_tokenizer(captions)
    words, _ = grounding.encode_captions(Counter(), tokenizer, captions, 64, "cpu")
    bags = (words.tokens * words.mask[..., None]).split(2)                                       # images in two batches
    images = [modules.ImageFeatures(bag, bag[..., 0], bag) for bag in bags]
    kinds = [grounding.word_kinds(caption, None) for caption in captions]
    needed = grounding.recall_without(Counter(), images, split, kinds, tokenizer, 64, "cpu")
    # only their numbers tell the first two apart, only their colours the last two; ties are failures
    assert needed == {"all": 100, "phrase": -50, "number": -50, "place": 0, "function": 0}


def test_the_variance_tells_failures_by_the_regions_of_what_is_retrieved():
    """Against loops, in two batches of captions of different length; images and captions without a tie."""
    g = torch.Generator().manual_seed(3)
    regions, spread = torch.randn(6, 4, 5, generator=g), torch.rand(6, 4, generator=g)
    texts = [modules.TextFeatures(torch.randn(n, m, 5, generator=g), torch.ones(n, m) > 0, torch.rand(n, m, generator=g))
             for n, m in ((7, 3), (5, 6))]
    scores, image_of_text = torch.randn(6, 12, generator=g), torch.arange(12) // 2
    figures = grounding.error_auroc(regions, spread, texts, scores, image_of_text)
    wrong, right, caption = [], [], 0
    for text in texts:
        for tokens, mask in zip(text.tokens, text.mask):
            found = max(range(6), key=lambda i: scores[i, caption])
            variance = [spread[found, max(range(4), key=lambda k: regions[found, k] @ t)] for t in tokens]
            value = float(sum(a * v for a, v in zip(mask, variance)) / sum(mask))
            (right if found == caption // 2 else wrong).append(value)
            caption += 1
    assert figures["caption_error_auroc"] == pytest.approx(np.mean([[w > r for r in right] for w in wrong]))
    first = [max(range(12), key=lambda t: scores[i, t]) // 2 == i for i in range(6)]
    means = [float(spread[i].mean()) for i in range(6)]
    assert figures["image_error_auroc"] == pytest.approx(np.mean(
        [[means[i] > means[j] for j in range(6) if first[j]] for i in range(6) if not first[i]]))


# ------------------------------------------------------------------------------------------------------ a model that knows

class Ideal(torch.nn.Module):
    """Stands for a trained model whose answers are known: patches of objects are kept and equal their phrase's tokens, one
    region covers each object, and the variance is higher where a phrase fits several objects."""

    def __init__(self, split, tokenizer, right=True):
        super().__init__()
        self.split, self.tokenizer, self.right, self.next = split, tokenizer, right, 0
        self.sampler = modules.GaussianSampler(8)

    def encode_image(self, batch):
        boxes = [self.split.objects(self.next + b) for b in range(len(batch))]
        self.next += len(batch)
        tokens, mask = torch.zeros(len(batch), 64, 8), torch.zeros(len(batch), 64)
        attention, log_var = torch.full((len(batch), 64, 4), 1e-9), torch.zeros(len(batch), 4, 8)
        tokens[..., 7] = 1                                                                       # ground
        for b, objects in enumerate(boxes):
            for k, within in enumerate(torch.from_numpy(grounding.inside(objects, 8))):
                tokens[b, within], mask[b, within], attention[b, within, k] = torch.eye(8)[k], 1, 1
        if not self.right:
            tokens, mask = tokens.flip(-1), 1 - mask                         # the ground looks like an object
        attention = attention / attention.sum(1, keepdim=True)
        regions = torch.eye(8)[:4].expand(len(batch), 4, 8)
        log_var[:, 0] = 1                                                                        # the first object's region
        return modules.ImageFeatures(tokens, mask, regions, regions, attention, log_var)

    def encode_text(self, ids, valid):
        words = [self.tokenizer.convert_ids_to_tokens(row) for row in ids.tolist()]
        content = torch.tensor([[float(w not in grounding.FUNCTION_WORDS and w.isalpha()) for w in row] for row in words])
        return modules.TextFeatures(torch.eye(8)[0].expand(*ids.shape, 8), valid, content if self.right else 1 - content)

    def similarity(self, image, text):
        return {"combined": torch.zeros(len(image.tokens), len(text.tokens))}


class OneObject(data.ShapesSplit):
    """Every phrase speaks of the first object; those of the first caption also fit the second object."""

    def phrases(self, i):
        first, second = self.objects(i)[:2]
        return [[Phrase(p.text, p.start, p.end, [first, second] if k == 0 else [first]) for p in phrases]
                for k, phrases in enumerate(super().phrases(i))]


@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_knows_gets_full_marks_and_its_opposite_none(right, tiny_config):
    scenes = data.load_split("shapes", tiny_config["datasets"], "").subset(slice(12))
    split = OneObject(scenes.name, scenes.image_names, scenes.scenes)
    tokenizer = data.build_tokenizer(split.texts)
    report = grounding.measure(Ideal(split, tokenizer, right), split, tokenizer, tiny_config, torch.device("cpu"),
                               zeros(split), 5, False)
    figures, probes = report["grounding"], report["probes"]
    assert figures["phrases"] == sum(len(p) for scene in scenes.scenes for p in scene.phrases)
    assert 0.01 < figures["chance"] < 0.25
    for name in grounding.MAPS:
        assert figures[name]["pointing_game"] == 1 if right else figures[name]["pointing_game"] < 0.2
        assert (figures[name]["box_recall"] > 0.5) == right
    assert probes["image_mask_auc"] == right and probes["text_mask_auc"] == right
    assert probes["text_mask_auc_phrase"] == probes["text_mask_auc_number"] == probes["text_mask_auc_place"] == right
    assert (probes["image_mask_auc_outlines"] > 0.5) == right            # its masks fill the boxes, which outlines do not
    assert probes["region_coverage"] == 1 and probes["region_cosine"] == pytest.approx(0)
    assert probes["image_error_auroc"] is None                                                   # ties: nothing is retrieved
    assert "pointing game" in grounding.table(report)


# --------------------------------------------------------------------------------------------------- on the real things

def test_the_whole_report_on_shapes_by_the_script(script, tiny_model, tiny_config, tmp_path):
    """An untrained model, all the way from the command line; probes of the variance go with the uncertainty."""
    split = data.load_split("shapes", tiny_config["datasets"], "")
    tokenizer = data.build_tokenizer(split.texts)
    for uncertainty in (True, False):
        tiny_config["model"]["uncertainty"] = uncertainty
        model = modules.build_grm(tiny_config, len(tokenizer), tokenizer.pad_token_id)
        torch.save({"model": model.state_dict(), "config": tiny_config, "tokenizer": data.tokenizer_state(tokenizer),
                    "text_config": model.text_encoder.config.to_dict()}, tmp_path / "x.pt")
        failure, printed = script("eval", "--ckpt", tmp_path / "x.pt", "--split", "shapes", "--limit", 10, "--batch-size", 4,
                                  "--grounding", "--out", tmp_path)
        assert failure is None and "pointing game" in printed and ("AUROC" in printed) == uncertainty
        report = json.loads((tmp_path / "metrics.json").read_text())
        assert 0 <= report["grounding"]["masks"]["pointing_game"] <= 1 and report["levels"]["combined"]["rsum"] > 0
        assert 0 < report["probes"]["image_mask_auc"] < 1 and ("variance_difference" in report["probes"]) == uncertainty


# --------------------------------------------------------------------------------------------------- Flickr30K Entities

SENTENCES = """[/EN#1/people A man] in [/EN#2/clothing a blue shirt] waves at [/EN#0/notvisual someone] .
[/EN#1/bodyparts/people The man 's arm] is up in [/EN#3/scene the street] .
"""
BOXES = """<annotation><filename>77.jpg</filename><size><width>200</width><height>100</height><depth>3</depth></size>
<object><name>1</name><name>2</name><bndbox><xmin>21</xmin><ymin>11</ymin><xmax>60</xmax><ymax>90</ymax></bndbox></object>
<object><name>1</name><bndbox><xmin>101</xmin><ymin>1</ymin><xmax>200</xmax><ymax>100</ymax></bndbox></object>
<object><name>3</name><scene>1</scene><nobndbox>0</nobndbox></object>
</annotation>"""


@pytest.fixture
def entities_root(tmp_path):
    """A data root with one photograph (of noise), its Karpathy entry and its Entities files."""
    root = tmp_path / "data" / "flickr30k"
    for folder, name, text in (("Sentences", "77.txt", SENTENCES), ("Annotations", "77.xml", BOXES)):
        (root / "entities" / folder).mkdir(parents=True)
        (root / "entities" / folder / name).write_text(text)
    (root / "images").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 200, 3), np.uint8)).save(root / "images" / "77.jpg")
    (root / "dataset_flickr30k.json").write_text(json.dumps({"images": [
        {"filename": "77.jpg", "split": "test", "sentences": [{"raw": "A man in a blue shirt waves at someone."}] * 2}]}))
    return tmp_path / "data"


def test_entities_give_captions_phrases_and_boxes(entities_root):
    captions, phrases = entities.read_image(entities_root / "flickr30k" / "entities", "77")
    assert captions == ["A man in a blue shirt waves at someone .", "The man 's arm is up in the street ."]
    assert all(captions[k][p.start:p.end] == p.text for k in range(2) for p in phrases[k])
    assert [[(p.text, len(p.boxes)) for p in some] for some in phrases] == [
        [("A man", 2), ("a blue shirt", 1), ("someone", 0)], [("The man 's arm", 2), ("the street", 0)]]
    assert phrases[0][0].boxes == [(.1, .1, .3, .9), (.5, 0, 1, 1)] and phrases[0][1].boxes == [(.1, .1, .3, .9)]


def test_grounding_runs_on_flickr30k_entities(entities_root, tiny_model, tiny_config):
    datasets = tiny_config["datasets"]
    split = data.with_phrases(data.load_split("f30k", datasets, entities_root), datasets, entities_root)
    tokenizer = data.build_tokenizer(split.texts)
    figures = grounding.measure(tiny_model, split, tokenizer, tiny_config, torch.device("cpu"), zeros(split), 4, False)
    assert figures["probes"]["image_mask_auc_outlines"] is None and "AUC" in grounding.table(figures)
    figures = figures["grounding"]
    assert figures["phrases"] == 3 and figures["chance"] == pytest.approx((2 * 0.66 + 0.16) / 3, abs=0.15)


@pytest.mark.parametrize("file, text, said", [
    ("Annotations/77.xml", None, "cannot read"), ("Sentences/77.txt", None, "Sentences and Annotations"),
    ("Annotations/77.xml", "<annotation>", "77.xml"), ("Annotations/77.xml", "<a></a>", "no <size>"),
    ("Annotations/77.xml", BOXES.replace("<xmin>21</xmin>", ""), "no <xmin>"), ("Sentences/77.txt", "\n", "no sentence"),
    ("Annotations/77.xml", BOXES.replace("100<", "0<"), "200 x 0"),
    ("Annotations/77.xml", BOXES.replace("21", "x"), "77.xml"),
    ("Sentences/77.txt", "[/EN#1/people A man in a shirt", "[/EN#1/people A man")])
def test_bad_entities_files_are_named_in_one_line(file, text, said, entities_root, tiny_config):
    path = entities_root / "flickr30k" / "entities" / file
    path.unlink() if text is None else path.write_text(text)
    split = data.load_split("f30k", tiny_config["datasets"], entities_root)
    with pytest.raises(data.DataError) as error:
        data.with_phrases(split, tiny_config["datasets"], entities_root)
    assert said in str(error.value) and path.name in str(error.value) and "\n" not in str(error.value)


def test_without_boxes_only_what_needs_none_is_measured(coco_folder, tiny_model, tiny_config):
    split = data.load_split("coco5k", tiny_config["datasets"], coco_folder)
    split = data.with_phrases(split, tiny_config["datasets"], coco_folder)
    tokenizer = data.build_tokenizer(data.load_split("shapes_val", tiny_config["datasets"], "").texts)
    report = grounding.measure(tiny_model, split, tokenizer, tiny_config, torch.device("cpu"), zeros(split), 4, False)
    printed = grounding.table(report)
    assert report["grounding"]["phrases"] == 0 and "text mask" in printed
    assert not any(said in printed for said in ("pointing", "image mask", "covers", "several"))
    missing = {name for name, value in (report["probes"] | report["grounding"]["masks"]).items() if value is None}
    missing -= {"image_error_auroc", "caption_error_auroc"}      # None if so few retrievals are all right or all wrong
    assert missing == {"image_mask_auc", "image_mask_auc_outlines", "text_mask_auc_number", "text_mask_auc_place",
                       "region_coverage", "coverage_of_one", "variance_several", "variance_one", "variance_difference",
                       "pointing_game", "box_recall"}
    assert 0 < report["probes"]["text_mask_auc"] < 1
