"""Does each part of the model find what it is for? Phrases against their boxes, masks, regions and variances against the
objects and words they should tell apart. Called by `eval_grm.py --grounding`. Phrases with boxes are those of `shapes`, and of
Flickr30K with the files of Flickr30K Entities; on other data only what needs no boxes is measured.

Where a phrase looks is its similarity map over the patches, m(l) = sum_m w_m <v_l, t_m> / sum_m w_m over its tokens:
`words` weights them alike; `masks` weights them by A_T, scales the map to [0, 1] and multiplies it by A_V.
"""
import re

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import modules

MAPS = ("words", "masks")
# Share of the map's range above which patches form the predicted boxes. Recall of `masks` on shapes_val[500:700] after 160
# steps of vit_micro: 0.43 at 0.5, 0.49 at 0.6, 0.54 at 0.7, 0.58 at 0.8 (`words`: 0.01 to 0.13).
BOX_THRESHOLD = 0.7
RELATIONS = {"left", "right", "above", "over", "below", "under", "near", "next", "between", "behind", "front"}
NUMBERS = set("one two three four five six seven eight nine ten".split())
CONTENT = ("phrase", "number", "place")
KINDS = (*CONTENT, "function")
NEED_IMAGES = 300  # for recall_without, which encodes every caption five times: the batches that begin before it
FUNCTION_WORDS = set("a an the some this that these those is are was were be there here it its his her their of to on in at "
                     "by for from as with along and or".split())


# -------------------------------------------------------------------------------------------------- figures, alone testable

def auc(positive, negative) -> float | None:
    """Area under the ROC curve: P(positive > negative) + P(equal) / 2, by ranks. None without both kinds."""
    positive, negative = np.asarray(positive), np.sort(np.asarray(negative))
    if not len(positive) or not len(negative):
        return None
    below, up_to = (np.searchsorted(negative, positive, side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(negative))


def inside(boxes, grid: int) -> np.ndarray:
    """(n, L) bool: which patch centres of a square grid, row by row, lie in each of n boxes (fractions of the image)."""
    centre = (np.arange(grid) + 0.5) / grid
    x, y = np.tile(centre, grid), np.repeat(centre, grid)
    x0, y0, x1, y1 = np.asarray(boxes, dtype=float).reshape(-1, 4).T[..., None]
    return (x0 <= x) & (x <= x1) & (y0 <= y) & (y <= y1)


def inside_outlines(outlines, grid: int) -> np.ndarray:
    """(L,) bool: which patch centres lie within any of the outlines, each a list of corners (x, y) in fractions of the image."""
    fine = 32                                                    # pixels a patch
    image = Image.new("1", (fine * grid, fine * grid))
    for outline in outlines:
        ImageDraw.Draw(image).polygon([(fine * grid * x, fine * grid * y) for x, y in outline], fill=1)
    return np.asarray(image)[fine // 2::fine, fine // 2::fine].ravel()


def boxes_of_map(heat: np.ndarray, threshold: float = BOX_THRESHOLD) -> np.ndarray:
    """(n, 4): the tight box of every connected group (4 neighbours) of patches of heat (G, G) whose value, on the scale from
    the map's minimum 0 to its maximum 1, is at least the threshold."""
    low, high = heat.min(), heat.max()
    left = set(zip(*np.nonzero(heat >= low + threshold * (high - low))))
    boxes, grid = [], len(heat)
    while left:
        group, border = [], [left.pop()]
        while border:
            row, column = border.pop()
            group.append((row, column))
            around = {(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)} & left
            left -= around
            border.extend(around)
        rows, columns = zip(*group)
        boxes.append((min(columns), min(rows), max(columns) + 1, max(rows) + 1))
    return np.array(boxes) / grid


def iou(a, b) -> np.ndarray:
    """(n, m) intersection over union of boxes a (n, 4) and b (m, 4)."""
    a, b = np.asarray(a, dtype=float)[:, None], np.asarray(b, dtype=float)[None]
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    shared = sides.clip(0).prod(-1)
    return shared / ((a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - shared)


def token_indices(offsets, start: int, end: int) -> list[int]:
    """Which tokens overlap the characters start..end, given each token's (start, end); special tokens are (0, 0)."""
    return [m for m, (first, last) in enumerate(offsets) if first < min(end, last) and last > start]


def of_grammar(word: str) -> bool:
    """Whether a word in lower case is a function word or a mark."""
    return word in FUNCTION_WORDS or not word[0].isalnum()


def word_kinds(caption: str, phrases) -> list[tuple[int, int, str]]:
    """(start, end, kind) of the caption's words and marks. `function`: articles, punctuation and other words of grammar.
    Content: words of place, `place`; number words, `number`; the rest of a phrase with boxes, `phrase`, or of the caption where no
    phrases are known (None). What is none of these is left out."""
    kinds = []
    for word in re.finditer(r"\w+|[^\w\s]", caption):
        start, end, text = *word.span(), word[0].lower()
        if of_grammar(text):
            kinds.append((start, end, "function"))
        elif text in RELATIONS:
            kinds.append((start, end, "place"))
        elif phrases is None or any(p.boxes and p.start <= start and end <= p.end for p in phrases):
            kinds.append((start, end, "number" if text in NUMBERS else "phrase"))
    return kinds


def similarity_maps(products, patch_mask, word_mask) -> dict[str, np.ndarray]:
    """{"words", "masks"}: (L,) each, as the head of this file defines them, from <v_l, t_m> of the phrase's n tokens (n, L),
    A_V (L,) and the tokens' A_T (n,), all numpy."""
    masked = word_mask @ products / max(word_mask.sum(), 1e-6)
    masked = (masked - masked.min()) / max(masked.max() - masked.min(), 1e-6) * patch_mask
    return {"words": products.mean(0), "masks": masked}


def bootstrap_difference(values, groups, images, draws: int = 2000) -> tuple[float, float, float] | None:
    """Mean of the values of group 1 less the mean of group 0, with a 95% interval from resampling whole images, because
    the values of one image go together. All (n,); None without both groups."""
    values, groups, images = np.asarray(values, dtype=float), np.asarray(groups, dtype=int), np.asarray(images)
    if len(np.unique(groups)) < 2:
        return None
    rows = np.unique(images, return_inverse=True)[1]
    sums, counts = np.zeros((2, rows.max() + 1, 2))
    np.add.at(sums, (rows, groups), values)
    np.add.at(counts, (rows, groups), 1)
    weights = np.random.default_rng(0).multinomial(len(sums), np.full(len(sums), 1 / len(sums)), draws)

    def difference(weights):
        one, several = (weights @ sums / np.maximum(weights @ counts, 1)).T
        return several - one
    low, high = np.quantile(difference(weights), [0.025, 0.975])
    return difference(np.ones((1, len(sums))))[0].item(), low.item(), high.item()


# ------------------------------------------------------------------------------------------------------- a split's figures

def encode_captions(model, tokenizer, texts, max_length: int, device):
    """-> TextFeatures on the CPU, and each caption's token offsets: (first character, last + 1), (0, 0) for special ones."""
    ids, valid = data.pad(data.tokenize(tokenizer, texts, max_length), tokenizer.pad_token_id)
    offsets = [e.offsets for e in tokenizer.backend_tokenizer.encode_batch(list(texts))]         # truncated as tokenize does
    features = model.encode_text(ids.to(device), valid.to(device))
    return modules.TextFeatures(*(x.cpu() for x in features)), offsets


def grid_side(patches: int) -> int:
    side = round(patches ** 0.5)
    if side * side != patches:
        raise modules.ModelError(f"{patches} patches are no square grid: where they lie in the image is not known")
    return side


@torch.no_grad()
def measure(model, split, tokenizer, config: dict, device, combined: Tensor, batch_size: int = 64,
            progress: bool = True) -> dict:
    """Every figure of a split, of which `combined` (I, T) is the sum of the levels: {"grounding": {...}, "probes": {...}};
    None where a figure has no meaning, as all that need phrases with boxes have on a split without."""
    model.eval()
    statistics = modules.image_statistics(config["image"]["name"])
    transform = data.image_transform(config["image"]["size"], *statistics, train=False)
    loader = DataLoader(data.EvalImages(split, transform), batch_size, num_workers=config["data"]["workers"])
    found = {name: {"hits": [], "boxes": []} for name in MAPS}
    object_patches, ground_patches, drawn, undrawn = [], [], [], []
    word_masks, kinds_of = {kind: [] for kind in KINDS}, []
    chance, covered, one_object, variance, several, image_of_phrase, figures = [], [], [], [], [], [], []
    first_images, gaussians, texts, skipped, first = [], [], [], 0, 0
    for batch in tqdm(loader, desc=f"{split.name}: grounding", disable=not progress, leave=False):
        rows = range(first, first + len(batch))
        first += len(batch)
        image = modules.ImageFeatures(*(x.cpu() for x in model.encode_image(batch.to(device))))
        text, offsets = encode_captions(model, tokenizer, [t for i in rows for t in split.captions[i]],
                                        config["text"]["max_length"], device)
        figures.append((len(batch), modules.diagnostics(image, text)))
        spread = image.log_var.exp().mean(-1) * image.log_var.shape[-1]                          # (B, K), 1 is the prior's
        gaussians.append((image.regions, spread))
        texts.append(text)
        if rows.start < NEED_IMAGES:
            first_images.append(image._replace(means=None, attention=None, log_var=None))
        grid, caption = grid_side(image.mask.shape[1]), 0
        # numpy from here: on arrays this small torch's threads cost more than they do
        tokens_v, mask_v, regions, attention = (x.float().numpy() for x in image[:3] + (image.attention,))
        tokens_t, mask_t = text.tokens.numpy(), text.mask.float().numpy()
        for b, i in enumerate(rows):
            phrases_of = split.phrases(i)
            objects = split.objects(i)
            if objects:
                within = inside(objects, grid)                                                   # (objects, L)
                anywhere = within.any(0)
                object_patches.extend(mask_v[b, anywhere])
                ground_patches.extend(mask_v[b, ~anywhere])
                if outlines := split.outlines(i):
                    on_object = inside_outlines(outlines, grid)
                    drawn.extend(mask_v[b, on_object])
                    undrawn.extend(mask_v[b, ~on_object])
                # of boxes that lie in one another, as in Entities, the inner never holds most: there the figure is a lower bound
                best = (within.astype(np.float32) @ attention[b]).argmax(0)                      # (K,)
                covered.append(len(set(best)) / len(objects))
                one_object.append(1 / len(objects))
            for words, phrases in zip(split.captions[i], phrases_of):
                mask, places, products = mask_t[caption], offsets[caption], tokens_t[caption] @ tokens_v[b].T
                kinds_of.append(word_kinds(words, phrases))
                for start, end, kind in kinds_of[-1]:
                    word_masks[kind].extend(mask[token_indices(places, start, end)])
                for phrase in phrases or []:
                    tokens = token_indices(places, phrase.start, phrase.end)
                    if not phrase.boxes or not tokens:
                        skipped += bool(phrase.boxes)
                        continue
                    target = inside(phrase.boxes, grid).any(0)
                    chance.append(target.mean())
                    for name, heat in similarity_maps(products[tokens], mask_v[b], mask[tokens]).items():
                        found[name]["hits"].append(target[heat.argmax()])
                        overlap = iou(phrase.boxes, boxes_of_map(heat.reshape(grid, grid)))
                        found[name]["boxes"].extend(overlap.max(1) >= 0.5)
                    region = (regions[b] @ (mask[tokens] @ tokens_t[caption, tokens])).argmax()
                    variance.append(spread[b, region].item())
                    several.append(len(phrase.boxes) > 1)
                    image_of_phrase.append(i)
                caption += 1
    mean = lambda values: float(np.mean(values)) if len(values) else None
    weighted = lambda key: sum(n * f[key].item() for n, f in figures) / len(split)
    grounding = {"phrases": len(chance), "phrases_cut_off": skipped, "chance": mean(chance)}
    for name, kept in found.items():
        grounding[name] = {"pointing_game": mean(kept["hits"]), "box_recall": mean(kept["boxes"])}
    probes = {"image_mask_auc": auc(object_patches, ground_patches), "image_mask_auc_outlines": auc(drawn, undrawn),
              "text_mask_auc": auc(sum((word_masks[kind] for kind in CONTENT), []), word_masks["function"]),
              **{f"text_mask_auc_{kind}": auc(word_masks[kind], word_masks["function"]) for kind in CONTENT},
              "recall_without": recall_without(model, first_images, split, kinds_of, tokenizer, config["text"]["max_length"],
                                              device, progress),
              "region_cosine": weighted("region_cosine"),
              "region_coverage": mean(covered), "coverage_of_one": mean(one_object)}
    if model.sampler.sample:
        variance, several = np.array(variance), np.array(several, dtype=bool)
        probes |= {"region_snr": weighted("region_snr"), "variance_several": mean(variance[several]),
                   "variance_one": mean(variance[~several]),
                   "variance_difference": bootstrap_difference(variance, several, image_of_phrase)}
        regions, spread = (torch.cat(parts) for parts in zip(*gaussians))
        probes |= error_auroc(regions, spread, texts, combined, torch.as_tensor(split.image_of_text))
    return {"grounding": grounding, "probes": probes}


def recall_without(model, images, split, kinds_of, tokenizer, max_length: int, device, progress=False) -> dict[str, float]:
    """Which words retrieval needs, whatever the mask says: the captions that find their image first (per cent), "all", and the
    change once the words of a kind are taken out of every caption.  images: ImageFeatures of the split's first, in batches."""
    part = split.subset(slice(sum(len(image.mask) for image in images)))
    images = [modules.ImageFeatures(*(x.to(device) for x in image[:3])) for image in images]

    def recall(texts):
        found = 0
        for start in range(0, len(texts), 256):
            text, _ = encode_captions(model, tokenizer, texts[start:start + 256], max_length, device)
            text = modules.TextFeatures(*(x.to(device) for x in text))
            rows = torch.cat([model.similarity(image, text)["combined"].float().cpu() for image in images])
            own = rows[part.image_of_text[start:start + 256], range(rows.shape[1])]
            found += ((rows >= own).sum(0) == 1).sum().item()                                    # a tie is a failure
        return 100 * found / len(texts)

    def without(kind):
        for caption, kinds in zip(part.texts, kinds_of):
            for start, end, own in reversed(kinds):
                caption = caption[:start] + caption[end:] if own == kind else caption
            yield caption
    whole = recall(part.texts)
    kinds = tqdm(KINDS, desc=f"{split.name}: words taken out", disable=not progress, leave=False)
    return {"all": whole} | {kind: recall(list(without(kind))) - whole for kind in kinds}


def error_auroc(regions: Tensor, spread: Tensor, texts, scores: Tensor, image_of_text: Tensor) -> dict:
    """Does the variance tell which retrievals fail (the right answer is not first; a tie is a failure)?

    An image's uncertainty is the mean variance of its regions. A caption's is that of the regions that its words match best
    in the image retrieved for it, weighted by A_T: what is known without the right answer.
    regions (I, K, d), their variances `spread` (I, K), texts: TextFeatures in batches, scores (I, T), image_of_text (T,).
    """
    uncertainty, tops = [], scores.argmax(0).split([len(text.mask) for text in texts])
    for text, top in zip(texts, tops):
        best = torch.einsum("tmd,tkd->tmk", text.tokens, regions[top]).argmax(-1)                # (t, m)
        uncertainty.append((spread[top].gather(1, best) * text.mask).sum(1) / text.mask.sum(1).clamp_min(1e-6))
    uncertainty = torch.cat(uncertainty)
    own = scores[image_of_text, torch.arange(len(image_of_text))]
    text_wrong = (scores >= own).sum(0) > 1
    matched = image_of_text[None] == torch.arange(len(scores))[:, None]
    image_wrong = scores.masked_fill(~matched, -torch.inf).amax(1) <= scores.masked_fill(matched, -torch.inf).amax(1)
    per_image = spread.mean(1)
    return {"image_error_auroc": auc(per_image[image_wrong], per_image[~image_wrong]),
            "caption_error_auroc": auc(uncertainty[text_wrong], uncertainty[~text_wrong])}


def table(report: dict) -> str:
    """The report as text."""
    grounding, probes, needed = report["grounding"], report["probes"], report["probes"]["recall_without"]
    show = lambda value, form="{:.3f}": "-" if value is None else form.format(value)
    line = lambda name, *values: f"  {name:58}" + "".join(f"{v:>9}" for v in values)
    lines = [f"grounding: {grounding['phrases']:,} phrases with boxes"
             + f", {grounding['phrases_cut_off']:,} more beyond the longest caption" * bool(grounding["phrases_cut_off"])
             + ": what needs them is left out (`entities` of a data set's block in configs.yaml names their folder)"
             * (not grounding["phrases"])]
    if grounding["phrases"]:
        lines += [line("where the phrase looks, by", *MAPS, "chance"),
                  line("pointing game (the highest patch is in a box)", *(show(grounding[m]["pointing_game"]) for m in MAPS),
                       show(grounding["chance"])),
                  line(f"boxes found at IoU 0.5 (patches above {BOX_THRESHOLD} of the range)",
                       *(show(grounding[m]["box_recall"]) for m in MAPS))]
    lines += ["probes"]
    if probes["image_mask_auc"] is not None:
        lines += [line("image mask: AUC, patches in boxes of objects against others", show(probes["image_mask_auc"]))
                  + (f"   (on the objects themselves: {show(probes['image_mask_auc_outlines'])})"
                     if probes["image_mask_auc_outlines"] is not None else "")]
    lines += [line("text mask: AUC, content words against function words", show(probes["text_mask_auc"]))
              + "   (" + ", ".join(f"{kind}: {show(probes[f'text_mask_auc_{kind}'])}" for kind in CONTENT) + ")",
              line("captions that find their image first, per cent", show(needed["all"], "{:.1f}"))
              + "   (without words of " + ", ".join(f"{kind}: {needed[kind]:+.1f}" for kind in KINDS) + ")",
              line("regions: mean cosine between an image's means", show(probes["region_cosine"]))]
    if probes["region_coverage"] is not None:
        lines += [line("regions: share of objects that some region covers most", show(probes["region_coverage"]))
                  + f"   (one region: {show(probes['coverage_of_one'])})"]
    if "region_snr" in probes:
        lines += [line("regions: signal-to-noise of samples", show(probes["region_snr"], "{:.2f}"))]
        if difference := probes["variance_difference"]:
            lines += [line("variance (the prior's is 1) of the phrase's region: several, one", show(probes["variance_several"]),
                           show(probes["variance_one"])) + "   difference {:+.4f} [{:+.4f}, {:+.4f}]".format(*difference)]
        lines += [line("variance predicts a wrong retrieval: AUROC, images, captions", show(probes["image_error_auroc"]),
                       show(probes["caption_error_auroc"]))]
    return "\n".join(lines)
