"""GRM (AAAI 2026, arXiv 2511.07710): the method.

Shapes everywhere: B batch (I images, T captions), L image tokens, M text tokens, d joint width, K region prompts.

    image -> encoder -> V (B, L, d) -> SignificanceAdapter -> A_V (B, L)
                                    -> RegionPrompts       -> mu  (B, K, d), attention (B, L, K)
                                    -> GaussianSampler     -> U   (B, K, d), log sigma^2 (B, K, d)
    text  -> encoder -> T (B, M, d)
          -> words' embeddings -> SignificanceAdapter -> A_T (B, M)

    level   text tokens   image tokens
    ori     T             V
    key     T, by A_T     V, by A_V
    unc     T, by A_T     U, and the mean of V by A_V: the mixture's parts, and the mixture as a whole
"""
import difflib
import math
import os
import warnings
from typing import NamedTuple

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import hub
from similarity import token_similarities, token_similarity

LEVELS = ("ori", "key", "unc")


class ModelError(Exception):
    """A model that cannot be built or loaded; the message is one line that says what to do."""


# ---------------------------------------------------------------------------------------------- the parts of the method

class SignificanceAdapter(nn.Module):
    """Which tokens matter, judged inside one modality ("significance" for images, "granularity" for text).

    Two linear maps to two logits (keep, drop). Training draws the soft mask with Gumbel-Softmax at temperature `tau`;
    evaluation takes the softmax itself, the probability that the Gumbel draw keeps the token, so it is deterministic.

    Each image (caption) has a budget: the logits of its valid tokens are shifted alike, so that the probabilities have the
    mean `keep`. Without one the mask ends at either extreme. A mean under the mask is largest if only the most telling
    tokens stay (on the scenes: colours, but neither shapes nor sizes), and where tokens tell alike the noise of the draw
    rewards masks that are one everywhere (on photographs: 1.000 +- 0.010, and `key` equalled `ori`). RESULTS.md has
    the figures, also of what decided nothing in rSum on the scenes beyond what a seed can do: no activation between the maps,
    tau 0.5 or 2 instead of 1 (382.8, 391.8 against 393.3), absolute logits, the mask inside the maximum.

    forward: tokens (B, L, d), valid (B, L) bool or None -> mask (B, L) in [0, 1], 0 where invalid.
    """

    def __init__(self, dim: int, tau: float = 1.0, keep: float = 0.5):
        super().__init__()
        self.tau, self.keep = tau, keep
        self.hidden = nn.Linear(dim, dim)
        self.logits = nn.Linear(dim, 2)

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        logits = self.logits(F.gelu(self.hidden(tokens))).float()                                # (B, L, 2)
        score = logits[..., 0] - logits[..., 1]
        valid = torch.ones_like(score, dtype=torch.bool) if valid is None else valid
        score = score - budget_shift(score, valid, self.keep)
        if not self.training:
            return score.sigmoid() * valid
        return F.gumbel_softmax(torch.stack([score, torch.zeros_like(score)], -1), tau=self.tau)[..., 0] * valid


def budget_shift(score: Tensor, valid: Tensor, keep: float) -> Tensor:
    """The b (B, 1) for which sigmoid(score - b) has the mean `keep` over each row's valid entries. score, valid: (B, L).

    Cutting the interval into eight finds the part of it that holds b, seven times: less than half of the operations that halving
    takes, which is what counts on a GPU. A Newton step from there makes it exact and gives the gradient of the implicit function,
    db/dscore_l = sigmoid'_l / sum sigmoid'.
    """
    count = valid.sum(1, keepdim=True).clamp_min(1)

    def mean(values):
        return (values * valid).sum(1, keepdim=True) / count

    with torch.no_grad():
        low = score.masked_fill(~valid, math.inf).amin(1, keepdim=True).nan_to_num(posinf=0) - 20
        width = score.masked_fill(~valid, -math.inf).amax(1, keepdim=True).nan_to_num(neginf=0) + 20 - low
        cuts = torch.arange(1, 8, device=score.device)                                           # 7 between 8 parts
        for _ in range(7):
            width = width / 8
            sums = (score[:, None] - (low + width * cuts)[..., None]).sigmoid_().mul_(valid[:, None]).sum(2)         # (B, 7)
            low = low + width * (sums > keep * count).sum(1, keepdim=True)
        middle = low + width / 2
        kept = (score - middle).sigmoid()
        slope = mean(kept * (1 - kept)).clamp_min(1e-6)
    return middle + (mean((score - middle).sigmoid()) - keep) / slope


class KeepAll(nn.Module):
    """The mask of a switched-off adapter: one on every valid token. The shapes are SignificanceAdapter's."""

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        return tokens.new_ones(tokens.shape[:2]) if valid is None else valid.to(tokens.dtype)


class RegionPrompts(nn.Module):
    """K learnable prompts, each gathering one latent region: A_r = sigmoid(scale * V P^T + bias), mu = A_r^T V.

    Prompts are L2-normalised. A bare sigmoid of a product of unit vectors lies in [0.27, 0.73], which makes every region
    the global mean, so the scores have a learned scale and, because a region covers a small part of an image, a negative
    bias; at first bias = -scale / 2. A larger scale makes a scene's regions differ more and is learnt later: after 300 steps from
    10, 20, 40 their mean cosine on the test scenes was 0.47, 0.45, 0.40, rSum on `shapes_val[:500]` 526, 524, 499 (three seeds, before
    unc had the whole; RESULTS.md). A bias of -scale changed neither (20, two seeds). The saliency mask enters as a factor of the
    attention, and each column is normalised over the L tokens.

    forward: tokens (B, L, d), mask (B, L) or None -> means (B, K, d), attention (B, L, K), columns summing to 1 over L.
    """

    def __init__(self, dim: int, num_prompts: int, scale: float = 20.0):
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(num_prompts, dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(-scale / 2))

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = tokens @ F.normalize(self.prompts, dim=-1).T                                    # (B, L, K)
        log_attention = F.logsigmoid(self.log_scale.exp() * scores.float() + self.bias)
        if mask is not None:
            log_attention = log_attention + mask.float().clamp_min(1e-30).log()[..., None]
        # softmax of a logarithm is division by the column's sum, without its underflow
        attention = log_attention.softmax(1)
        if mask is not None:
            attention = attention * (mask > 0)[..., None]
        return attention.transpose(1, 2).to(tokens.dtype) @ tokens, attention


class GaussianSampler(nn.Module):
    """Each region as a Gaussian N(mu_k, sigma_k^2), log sigma_k^2 predicted from mu_k.

    The paper samples z_lk = mu_k + eps_lk * sigma_k for every token and sums u_k = sum_l A_lk z_lk. As A's columns sum to
    1 and the noise is independent, u_k is exactly N(mu_k, sigma_k^2 * sum_l A_lk^2): one draw per region replaces L.

    Means of unit vectors have norm at most 1, so the scale on which "standard normal" is meant is sqrt(d) mu (components
    of order 1): the network starts at, and `kl_loss` pulls towards, a variance of 1/d per component. A prior variance of
    1 would drown the signal by a factor d.

    forward: means (B, K, d), attention (B, L, K) -> regions (B, K, d), log_var (B, K, d); evaluation returns the means, and
    so does training with sample=False.
    """

    def __init__(self, dim: int, sample: bool = True):
        super().__init__()
        self.sample = sample
        self.hidden = nn.Linear(dim, dim)
        self.log_var = nn.Linear(dim, dim)
        nn.init.zeros_(self.log_var.weight)
        nn.init.constant_(self.log_var.bias, -math.log(dim))

    def forward(self, means: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        dim = means.shape[-1]
        log_var = self.log_var(F.gelu(self.hidden(means * math.sqrt(dim)))).float()
        log_var = log_var.clamp(-math.log(dim) - 8, -math.log(dim) + 8)
        if not (self.training and self.sample):
            return means, log_var
        shrink = attention.float().square().sum(1).sqrt()[..., None]                             # (B, K, 1)
        # noise like log_var, which is float32 also under autocast: drawn in 16 bits it would be coarse, and other noise
        return means + torch.randn_like(log_var) * (0.5 * log_var).exp() * shrink, log_var


# ----------------------------------------------------------------------------------------------------------- the losses

def contrastive_loss(similarity: Tensor, image_ids: Tensor, kind: str = "infonce", temperature: float = 0.05,
                     margin: float = 0.2) -> Tensor:
    """Matched pairs on the diagonal of similarity (B, B) against the rest, image-to-text plus text-to-image, halved.

    Entries off the diagonal with equal image_ids (B,) are other captions of the same image: true matches, never negatives.

    infonce:  mean_i  -log( exp(s_ii / temperature) / (exp(s_ii / temperature) + sum_negatives exp(s_ij / temperature)) )
    triplet:  mean_i  max(0, margin + max_negatives s_ij - s_ii)     (VSE++; 0 for a row without negatives)

    From scratch on the scenes (150 steps, a ViT, one seed; RESULTS.md) infonce at temperature 0.05, 0.02, 0.01 reached rSum 286,
    325, 297; triplet collapsed at 9.7.
    """
    similarity = similarity.float()
    positive = similarity.diagonal()
    matched = image_ids[:, None] == image_ids[None, :]
    if kind == "infonce":
        other_match = matched & ~torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
        logits = (similarity / temperature).masked_fill(other_match, -math.inf)
        target = torch.arange(len(similarity), device=similarity.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    if kind == "triplet":
        negatives = similarity.masked_fill(matched, -math.inf)
        hardest = torch.stack([negatives.amax(1), negatives.amax(0)])                            # (2, B)
        return (margin + hardest - positive).clamp_min(0).mean()
    raise ModelError(f"loss.kind is '{kind}'; valid: infonce, triplet")


def consistency_loss(means: Tensor, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
    """L_recon: regions together say what the patches say.

    || mean_k mu_k - sum_l A_l v_l / sum_l A_l ||^2, averaged over the batch.  means (B, K, d), tokens (B, L, d), mask (B, L)
    """
    mask = torch.ones(tokens.shape[:2], device=tokens.device) if mask is None else mask
    weighted = (mask[:, None].to(tokens) @ tokens)[:, 0]                   # a product, which holds no (B, L, d) of its own
    patch_mean = weighted / mask.sum(1, keepdim=True).clamp_min(1e-6)
    return (means.mean(1) - patch_mean).float().square().sum(-1).mean()


def kl_loss(means: Tensor, log_var: Tensor) -> Tensor:
    """L_KL per component: KL( N(mu, sigma^2) || N(0, 1/d) ), the standard normal for sqrt(d) mu (see GaussianSampler).

    1/2 (d sigma^2 + d mu^2 - 1 - log(d sigma^2)), averaged over batch, regions and components.  Both (B, K, d).
    """
    dim = means.shape[-1]
    return 0.5 * (dim * log_var.exp() + dim * means.float().square() - 1 - math.log(dim) - log_var).mean()


def entropy_loss(attention: Tensor) -> Tensor:
    """L_ent: no region may collapse onto a single token.

    1 - H(A_k) / log L with H(A_k) = -sum_l A_lk log A_lk, averaged: 0 for uniform columns, 1 for one-hot ones. (B, L, K)
    """
    # clamped, as the slope at 0 is infinite and a mask of 0 would make the gradient 0 * inf
    entropy = torch.special.entr(attention.float().clamp_min(1e-30)).sum(1)
    return 1 - entropy.mean() / math.log(max(attention.shape[1], 2))


# ------------------------------------------------------------------------------------------------------------ the model

class ImageFeatures(NamedTuple):
    """An encoded batch of images. Only `tokens`, `mask` and `regions` enter the similarity."""
    tokens: Tensor      # (B, L, d) unit vectors
    mask: Tensor        # (B, L)
    regions: Tensor     # (B, K, d) unit vectors
    means: Tensor | None = None       # (B, K, d)
    attention: Tensor | None = None   # (B, L, K)
    log_var: Tensor | None = None     # (B, K, d)


class TextFeatures(NamedTuple):
    """An encoded batch of captions."""
    tokens: Tensor      # (B, M, d) unit vectors
    valid: Tensor       # (B, M) bool, False on padding and special tokens
    mask: Tensor        # (B, M)


def without_special_tokens(valid: Tensor) -> Tensor:
    """(B, M) bool without each row's first and last True, the places of [CLS] and [SEP]; a row of nothing else stays.

    These two, read by the encoder but no word of the caption, gather what suits the loss and draw the mask to them: with them
    among the tokens the text mask was 1.0 on [CLS] and 0.2 on the words for shapes.
    """
    place = valid.cumsum(1)
    inner = valid & (place > 1) & (place < place[:, -1:])
    return torch.where(inner.any(1, keepdim=True), inner, valid)


class GRM(nn.Module):
    """The whole model over a timm image encoder and a Hugging Face text encoder.

    levels: {"ori": a, "key": b, "unc": c}; a level of weight 0 is neither computed nor reported. image_keep, text_keep: the
    budgets of the two adapters, each the mean of its mask. prompt_scale: the scale at which RegionPrompts starts.

    Switches, for ablations: without image_mask or text_mask every (valid) token has mask 1; without prompts an image has one
    region, the mean of its tokens weighted by the mask, whatever num_prompts; without uncertainty regions are their means in
    training too, and L_KL is left out.
    """

    def __init__(self, image_encoder: nn.Module, text_encoder: nn.Module, dim: int = 512, num_prompts: int = 5,
                 tau: float = 1.0, image_keep: float = 0.5, text_keep: float = 0.5, prompt_scale: float = 20.0,
                 levels: dict[str, float] | None = None, image_mask: bool = True, text_mask: bool = True, prompts: bool = True,
                 uncertainty: bool = True):
        super().__init__()
        self.levels = {"ori": 0.4, "key": 0.4, "unc": 0.2} if levels is None else levels
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_proj = nn.Linear(image_encoder.num_features, dim)
        self.text_proj = nn.Linear(text_encoder.config.hidden_size, dim)
        self.image_adapter = SignificanceAdapter(dim, tau, image_keep) if image_mask else KeepAll()
        width = text_encoder.get_input_embeddings().embedding_dim
        self.text_adapter = SignificanceAdapter(width, tau, text_keep) if text_mask else KeepAll()
        self.region_prompts = RegionPrompts(dim, num_prompts if prompts else 1, prompt_scale)
        if not prompts:                             # a prompt of zeros scores every token alike: its attention is the mask
            nn.init.zeros_(self.region_prompts.prompts.requires_grad_(False))
        self.sampler = GaussianSampler(dim, uncertainty)

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """images (B, 3, H, W), normalised as the encoder expects."""
        # channels last: convolutions of a CNN take a fifth less time so on the CPU; a ViT does not care
        grid = self.image_encoder.forward_features(images.contiguous(memory_format=torch.channels_last))
        if grid.ndim == 4:                                               # Swin gives (B, H, W, C), CNNs (B, C, H, W)
            channels_last = getattr(self.image_encoder, "output_fmt", "NCHW") == "NHWC"
            grid = grid.flatten(1, 2) if channels_last else grid.flatten(2).transpose(1, 2)
        # without the class token, which has no place in the image; as one more patch it had rSum 189.1 against 182.4 on photographs
        # in one short run (RESULTS.md)
        patches = grid[:, getattr(self.image_encoder, "num_prefix_tokens", 0):]
        projected = self.image_proj(patches)                                                     # (B, L, d)
        mask = self.image_adapter(projected)
        # normalise first, mask afterwards: a cosine cancels any factor that a mask put on its token
        tokens = F.normalize(projected.float(), dim=-1)
        means, attention = self.region_prompts(tokens, mask)
        regions, log_var = self.sampler(means, attention)
        return ImageFeatures(tokens, mask, F.normalize(regions.float(), dim=-1), means, attention, log_var)

    def encode_text(self, ids: Tensor, valid: Tensor) -> TextFeatures:
        """ids (B, M) token ids, valid (B, M) bool, False on padding. Only words and marks of the caption are aligned."""
        projected = self.text_proj(self._hidden_states(ids, valid))
        words = without_special_tokens(valid)
        # The mask judges words before they read each other: in context, words and marks of grammar take up what is said around them.
        # AUC text 0.897 (six runs) instead of 0.875 (three) after 1,200 steps, within chance, no gain after 400 (RESULTS.md)
        embedded = self.text_encoder.get_input_embeddings()(ids)
        mask = self.text_adapter(F.layer_norm(embedded, embedded.shape[-1:]), words)
        return TextFeatures(F.normalize(projected.float(), dim=-1), words, mask)

    def _hidden_states(self, ids: Tensor, valid: Tensor) -> Tensor:
        """(B, M, width). Caption lengths vary threefold: a CPU, which gains nothing from one large call, encodes the batch
        in four parts of similar length and so hardly works on padding."""
        def encode(ids, valid):
            return self.text_encoder(input_ids=ids, attention_mask=valid.long()).last_hidden_state

        if ids.device.type != "cpu" or len(ids) < 8:
            return encode(ids, valid)
        lengths = (valid * torch.arange(1, valid.shape[1] + 1)).amax(1)
        order = lengths.argsort(stable=True)
        parts = [(rows, int(lengths[rows].max())) for rows in order.chunk(4)]
        hidden = [F.pad(encode(ids[rows, :longest], valid[rows, :longest]), (0, 0, 0, ids.shape[1] - longest))
                  for rows, longest in parts]
        return torch.cat(hidden)[order.argsort()]

    def forward(self, images: Tensor, ids: Tensor, valid: Tensor) -> tuple[ImageFeatures, TextFeatures]:
        return self.encode_image(images), self.encode_text(ids, valid)

    def similarity(self, image: ImageFeatures, text: TextFeatures) -> dict[str, Tensor]:
        """(I, T) for every level with a weight, and `combined`, their sum with the weights a, b, c.

        The paper models an image as a mixture of its regions' Gaussians, so unc is the mean of two similarities of the caption: with
        the mixture's parts U, and with the mixture as a whole, one token with the direction of sum_l A_l v_l, where L_recon holds
        the mean of the parts. Without the whole, the parts have to stand for it and look alike (mean cosine of an image's regions
        on the scenes 0.46 instead of 0.31), and `combined` gains nothing from unc. The mean of the parts themselves as the whole
        makes them alike (0.51). RESULTS.md has the figures.
        """
        # unc first: what is computed first is differentiated last, so the gradient that the whole gives the tokens does not lie
        # there while the other levels', which take the most memory, are differentiated
        scores = dict.fromkeys(name for name in LEVELS if self.levels[name])
        if self.levels["unc"]:
            whole = F.normalize(image.mask[:, None].to(image.tokens) @ image.tokens, dim=-1)     # (I, 1, d)
            scores["unc"] = sum(token_similarity(regions, text.tokens, text.valid, text_weight=text.mask)
                                for regions in (image.regions, whole)) / 2
        shared = [name for name in ("ori", "key") if self.levels[name]]
        if shared:      # these two levels weight the same token maxima, so one pass serves both
            scores.update(zip(shared, token_similarities(
                image.tokens, text.tokens, text.valid,
                [None if name == "ori" else image.mask for name in shared],
                [None if name == "ori" else text.mask for name in shared])))
        scores["combined"] = sum(self.levels[name] * scores[name] for name in scores)
        return scores

    def loss(self, image: ImageFeatures, text: TextFeatures, image_ids: Tensor, loss: dict) -> tuple[Tensor, dict]:
        """The training objective and its terms (detached), for matched pairs and the `loss` block of the configuration.

        L = a L_ori + b L_key + c L_unc + consistency * L_recon + kl * L_KL + entropy * L_ent
        """
        # What is computed last is differentiated first: so the similarity, which takes the most memory for it, does not find
        # the regularisers' gradient of the tokens there already
        regularisers = self.regularisers(image)
        return self.loss_of(self.similarity(image, text), regularisers, image_ids, loss)

    def regularisers(self, image: ImageFeatures) -> dict[str, Tensor]:
        """L_recon, L_ent and L_KL, as far as the switches leave them. They act on regions, which only unc uses."""
        if not self.levels["unc"]:
            return {}
        terms = {"consistency": consistency_loss(image.means, image.tokens, image.mask), "entropy": entropy_loss(image.attention)}
        return terms | ({"kl": kl_loss(image.means, image.log_var)} if self.sampler.sample else {})

    def loss_of(self, scores: dict[str, Tensor], regularisers: dict[str, Tensor], image_ids: Tensor,
                loss: dict) -> tuple[Tensor, dict]:
        """`loss` from what `similarity` and `regularisers` returned."""
        terms = {name: contrastive_loss(scores[name], image_ids, loss["kind"], loss["temperature"], loss["margin"])
                 for name in LEVELS if name in scores}
        total = sum(self.levels[name] * term for name, term in terms.items())
        total = total + sum(loss[name] * term for name, term in regularisers.items())
        return total, {name: term.detach() for name, term in (terms | regularisers).items()}


@torch.no_grad()
def diagnostics(image: ImageFeatures, text: TextFeatures) -> dict[str, Tensor]:
    """The figures that tell a working method from a collapsed one (DESIGN's traps 2, 3 and 5).

    mask mean and standard deviation over valid tokens; mean pairwise cosine of an image's region means (1: all regions are
    the same); signal-to-noise of the sampled regions, |mu|^2 / E|u - mu|^2.
    """
    words = text.mask[text.valid]
    unit = F.normalize(image.means.float(), dim=-1)
    cosine = unit @ unit.transpose(1, 2)                                                         # (B, K, K)
    k = cosine.shape[1]
    off_diagonal = (cosine.sum((1, 2)) - k) / max(k * (k - 1), 1)
    noise = image.log_var.exp().sum(-1) * image.attention.square().sum(1)                        # (B, K)
    return {"image_mask_mean": image.mask.mean(), "image_mask_std": image.mask.std(),
            "text_mask_mean": words.mean(), "text_mask_std": words.std(),
            "region_cosine": off_diagonal.mean(), "region_snr": (image.means.square().sum(-1) / noise).mean()}


# --------------------------------------------------------------------------------------------------------- the encoders

def build_image_encoder(cfg: dict, pretrained: bool) -> nn.Module:
    """Any timm model. cfg: {name, weights, size, options}; `weights` is a local file, else timm's own come from the hub."""
    name, size = cfg["name"], cfg["size"]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), 3, 0.3)
        raise ModelError(f"image.name: timm has no model '{name}'; close: {', '.join(near) or 'none'}")
    options = {"num_classes": 0, **(cfg["options"] or {})}
    default = timm.get_pretrained_cfg(name)
    if default is None or size != default.input_size[-1]:
        options["img_size"] = size                               # transformers of fixed grid resample their positions
    if pretrained:
        weights = cfg["weights"] or _hub_weights(name, default)
        if not os.path.isfile(weights):
            raise ModelError(f"image.weights: no such file '{weights}'")
    try:
        if pretrained:      # read here: nothing that timm's version, or a file's form, would let execute
            state = timm.models.load_state_dict(weights, weights_only=True)
            options.update(pretrained=True, pretrained_cfg_overlay={"state_dict": state})
        try:
            encoder = timm.create_model(name, **options)
        except TypeError as error:                               # CNNs take any size and have no such argument
            if "img_size" not in str(error):
                raise
            options.pop("img_size")
            encoder = timm.create_model(name, **options)
    except Exception as error:                                   # timm raises whatever its model code raises
        raise ModelError(f"image encoder '{name}' at {size} px could not be built: {hub.one_line(error)}") from error
    encoder.pretrained_cfg.pop("state_dict", None)               # else it would hold its weights twice
    return encoder


def image_statistics(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation with which this timm model wants its pixels (in [0, 1], per channel) normalised."""
    default = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    return (tuple(default.mean), tuple(default.std)) if default else ((0.5,) * 3, (0.5,) * 3)


def build_text_encoder(cfg: dict, pretrained: bool, vocab_size: int, pad_id: int,
                       encoder_config: dict | None = None) -> nn.Module:
    """Any Hugging Face text encoder. cfg: {name, max_length, options}; `name` is a hub name or a local folder.

    Untrained encoders take their shape from encoder_config (a checkpoint's), else from `name` where that is at hand, else
    they are a BERT with `options`, and their vocabulary from the tokeniser.
    """
    if pretrained:
        if not cfg["name"]:
            raise ModelError("text.pretrained is true but text.name is empty: name a hub model or a local folder")
        return _from_hub(cfg["name"], "text.name", lambda **where: transformers.AutoModel.from_pretrained(
            cfg["name"], dtype=torch.float32,                # float32 masters: transformers 5 keeps the stored dtype
            trust_remote_code=False, **where))               # else a folder with code of its own would ask on the terminal
    if encoder_config is None:                               # a checkpoint's stays: it may have more rows than words
        encoder_config = {"model_type": "bert"}
        if cfg["name"]:
            try:
                found = transformers.AutoConfig.from_pretrained(cfg["name"], local_files_only=True, trust_remote_code=False)
                encoder_config = found.to_dict()
            except Exception:                                # nothing at hand: BERT-base is what `name` stands for here
                warnings.warn(f"text.name '{cfg['name']}' is not on this machine: an untrained BERT takes its place")
        encoder_config |= {**(cfg["options"] or {}), "vocab_size": vocab_size, "pad_token_id": pad_id}
    try:
        return transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model(**encoder_config), dtype=torch.float32)
    except Exception as error:
        raise ModelError(f"text encoder '{cfg['name']}' could not be built: {hub.one_line(error)}") from error


def build_grm(config: dict, vocab_size: int, pad_id: int, encoder_config: dict | None = None,
              pretrained: bool = True) -> GRM:
    """The model of a resolved configuration; `pretrained=False` skips all loading, for a checkpoint's weights to follow."""
    image, text, model = config["image"], config["text"], config["model"]
    return GRM(build_image_encoder(image, pretrained and image["pretrained"]),
               build_text_encoder(text, pretrained and text["pretrained"], vocab_size, pad_id, encoder_config),
               levels={name: config["loss"][name] for name in LEVELS}, **model)


def _hub_weights(name: str, default) -> str:
    """The cached or downloaded weight file of a timm model."""
    if default is None or not default.hf_hub_id:
        raise ModelError(f"image.name: timm has no pretrained weights for '{name}'; set image.pretrained=false")
    return _from_hub(default.hf_hub_id, "image.weights", lambda **where: huggingface_hub.hf_hub_download(
        default.hf_hub_id, default.hf_hub_filename or "model.safetensors", **where))


def _from_hub(name: str, key: str, from_pretrained):
    """hub.load with an error that says what to download, where it goes, and which command works without."""
    try:
        return hub.load(name, from_pretrained)
    except OSError as error:
        raise ModelError(
            f"{key}: {error}. Download it from https://huggingface.co/{name} and pass the local path with --set {key}=PATH; "
            f"without data or weights, --backbone vit_micro trains on built-in scenes") from error
