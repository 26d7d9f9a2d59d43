"""GRM (AAAI 2026, arXiv 2511.07710), in the order of the paper's equations. Eq. 7 itself is in similarity.py.

Shapes: B images or captions, L image tokens, M text tokens, d joint width, K region prompts.

    image -> encoder -> V (B, L, d) -> Eq. 1: mask A_V, V^ = A_V V -> Eq. 2-3: regions -> Eq. 4-6: Gaussians U
    text  -> encoder -> T (B, M, d) -> Eq. 1: mask A_T, T^ = A_T T

    Eq. 7, three levels of similarity:  ori: T and V    key: T^ and V^    unc: T^ and U
    Eq. 8-13, the loss

Encoders that share a space already, as CLIP's (`joint`): the projections to V and T start as their own, and a
fourth level, glo, is the cosine of their own embeddings of image and caption. Settings of the configuration
that are not the paper's (recipe `grm`) are values that the same lines read.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import require
from encoders import ImageEncoder, TextEncoder, build_image_encoder, build_text_encoder
from similarity import token_similarities, token_similarity

LEVELS = ("ori", "key", "unc", "glo")


# ---- Eq. 1: significance and granularity adapters ----------------------------------------------------------
class SignificanceAdapter(nn.Module):
    """Eq. 1: which tokens matter, judged inside one modality. A = GumbelSoftmax(W2 GELU(W1 V), tau)[:, 1]

    Training draws a soft mask; evaluation takes the softmax itself. With a budget `keep`, the logits of an
    image (caption) are shifted alike, so that the softmax has the mean `keep` and the mask cannot saturate.

    forward: tokens (B, L, dim), valid (B, L) bool or None -> mask (B, L) in [0, 1], 0 where invalid.
    """

    def __init__(self, dim: int, tau: float = 1.0, keep: float | None = None):
        super().__init__()
        self.tau, self.keep = tau, keep
        self.hidden = nn.Linear(dim, dim)
        self.logits = nn.Linear(dim, 2)

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        valid = torch.ones_like(tokens[..., 0], dtype=torch.bool) if valid is None else valid
        drop, keep = self.logits(F.gelu(self.hidden(tokens))).float().unbind(-1)   # columns of D, (B, L) each
        if self.keep is not None:
            keep = keep - self.tau * budget_shift((keep - drop) / self.tau, valid, self.keep)
        D = torch.stack([drop, keep], -1)                                                        # (B, L, 2)
        A = F.gumbel_softmax(D, self.tau) if self.training else (D / self.tau).softmax(-1)
        return A[..., 1] * valid


def budget_shift(score: Tensor, valid: Tensor, keep: float) -> Tensor:
    """The b (B, 1) for which sigmoid(score - b), (B, L), has the mean `keep` over each row's valid entries.

    A search that cuts the interval into eight, seven times, takes few operations, which a GPU needs. One
    Newton step makes it exact and carries the gradient of the implicit function.
    """
    count = valid.sum(1, keepdim=True).clamp_min(1)

    def mean(values):
        return (values * valid).sum(1, keepdim=True) / count

    with torch.no_grad():
        low = score.masked_fill(~valid, math.inf).amin(1, keepdim=True).nan_to_num(posinf=0) - 20
        high = score.masked_fill(~valid, -math.inf).amax(1, keepdim=True).nan_to_num(neginf=0) + 20
        width = high - low
        eighths = torch.arange(1, 8, device=score.device)
        for _ in range(7):
            width = width / 8
            cuts = (low + width * eighths)[..., None]                                            # (B, 7, 1)
            sums = (score[:, None] - cuts).sigmoid_().mul_(valid[:, None]).sum(2)                # (B, 7)
            low = low + width * (sums > keep * count).sum(1, keepdim=True)
        middle = low + width / 2
        kept = (score - middle).sigmoid()
        slope = mean(kept * (1 - kept)).clamp_min(1e-6)
    return middle + (mean((score - middle).sigmoid()) - keep) / slope


# ---- Eq. 2-3: region prompts -------------------------------------------------------------------------------
class RegionPrompts(nn.Module):
    """Eq. 2-3: A_r = sigmoid(V P^T) with the rows of P at unit length, columns normalised, mu = A_r^T V.

    A sigmoid of cosines is nearly flat, which makes every region the mean of the image. With `scale`, the
    products therefore get a learned factor, at first `scale`, and a learned bias, at first -scale / 2.

    forward: tokens (B, L, d), mask (B, L) or None, a factor of the attention -> means (B, K, d), attention
    (B, L, K) whose columns sum to 1, and A_r itself (B, L, K).
    """

    def __init__(self, dim: int, num_prompts: int, scale: float | None = None):
        super().__init__()
        learned, log_scale, bias = (False, 0.0, 0.0) if scale is None else (True, math.log(scale), -scale / 2)
        self.prompts = nn.Parameter(torch.randn(num_prompts, dim))
        self.log_scale = nn.Parameter(torch.tensor(log_scale), requires_grad=learned)
        self.bias = nn.Parameter(torch.tensor(bias), requires_grad=learned)

    def forward(self, tokens: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        products = (tokens @ F.normalize(self.prompts, dim=-1).T).float()
        log_scores = F.logsigmoid(self.log_scale.exp() * products + self.bias)     # (B, L, K)  Eq. 2: log A_r
        log_weights = log_scores
        if mask is not None:
            log_weights = log_scores + mask.float().clamp_min(1e-30).log()[..., None]
        # The softmax of a logarithm divides by the column's sum without underflow.
        attention = log_weights.softmax(1)                                         # (B, L, K)  Eq. 3: A^_r
        if mask is not None:
            attention = attention * (mask > 0)[..., None]
        means = attention.transpose(1, 2).to(tokens.dtype) @ tokens                # (B, K, d)  Eq. 3: mu
        return means, attention, log_scores.exp()


# ---- Eq. 4-6: region uncertainty ---------------------------------------------------------------------------
class GaussianSampler(nn.Module):
    """Eq. 4-6: regions are Gaussians, log sigma_k^2 = phi(mu_k), u_k = sum_l A_lk (mu_k + eps_lk sigma_k).

    As the columns of A sum to 1 and the noise is independent, u_k is N(mu_k, sigma_k^2 sum_l A_lk^2): one
    draw for each region has the distribution of the paper's L draws. sigma^2 starts at `prior`.

    forward: means (B, K, d), attention (B, L, K) -> regions (B, K, d), log_var (B, K, d). Evaluation returns
    the means, and so does training with sample=False.
    """

    def __init__(self, dim: int, prior: float = 1.0, sample: bool = True):
        super().__init__()
        self.prior, self.sample = prior, sample
        self.hidden = nn.Linear(dim, dim)
        self.log_var = nn.Linear(dim, dim)
        nn.init.zeros_(self.log_var.weight)
        nn.init.zeros_(self.log_var.bias)

    def forward(self, means: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        phi = self.log_var(F.gelu(self.hidden(means / math.sqrt(self.prior)))).float()
        # The clamp only guards exp against overflow.
        log_var = math.log(self.prior) + phi.clamp(-8, 8)                          # (B, K, d)  Eq. 4
        if not (self.training and self.sample):
            return means, log_var
        shrink = attention.float().square().sum(1).sqrt()[..., None]               # (B, K, 1)
        # The noise is float32, as log_var is, also under autocast.
        regions = means + torch.randn_like(log_var) * (0.5 * log_var).exp() * shrink           # Eq. 5-6
        return regions, log_var


def region_gates(logits: Tensor, training: bool) -> Tensor:
    """Ours: which regions an image uses, (B, K) -> gates (B, K) in [0, 1]. Training draws Gumbel-sigmoids;
    evaluation takes 0 or 1. The likeliest is always open."""
    noise = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6).logit() if training else 0.0
    gates = (logits + noise).sigmoid() if training else (logits > 0).to(logits)
    return torch.maximum(gates, F.one_hot(logits.argmax(1), logits.shape[1]).to(logits))


# ---- Eq. 8: the contrastive loss of a level (Eq. 7 is similarity.py) ---------------------------------------
def contrastive_loss(similarity: Tensor, image_ids: Tensor, kind: str = "triplet", temperature: float = 0.05,
                     margin: float = 0.2, hardest: bool = True) -> Tensor:
    """Eq. 8, of similarity (B, B) with the matched pairs on its diagonal, image to text plus text to image.

    Entries off the diagonal with equal image_ids (B,) are other captions of an image and never negatives.

    triplet:  sum_i max(0, margin + s_ij - s_ii) for the hardest negative j (VSE++), or, with hardest=False,
              summed over all negatives
    infonce:  1/2 mean_i -log( exp(s_ii / temperature) / sum_j exp(s_ij / temperature) ), j = i or a negative
    """
    similarity = similarity.float()
    matched = image_ids[:, None] == image_ids[None, :]
    if kind == "infonce":
        other_match = matched & ~torch.eye(len(similarity), dtype=torch.bool, device=similarity.device)
        logits = (similarity / temperature).masked_fill(other_match, -math.inf)
        target = torch.arange(len(similarity), device=similarity.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    if kind != "triplet":
        raise ValueError(f"kind is '{kind}'; valid: triplet, infonce")
    negatives = similarity.masked_fill(matched, -math.inf)
    positive = similarity.diagonal()
    if hardest:
        both = torch.stack([negatives.amax(1), negatives.amax(0)])                               # (2, B)
    else:
        both = torch.stack([negatives, negatives.T])                                             # (2, B, B)
        positive = positive[:, None]
    return (margin + both - positive).clamp_min(0).sum()


# ---- Eq. 10-12: the regularisers ---------------------------------------------------------------------------
def consistency_loss(regions: Tensor, tokens: Tensor) -> Tensor:
    """Eq. 10, L_recon: || mean_k U_k - mean_l V^_l ||^2, mean over the batch. (B, K, d) and (B, L, d)."""
    return (regions.mean(1) - tokens.mean(1)).float().square().sum(-1).mean()


def kl_loss(means: Tensor, log_var: Tensor, prior: float = 1.0) -> Tensor:
    """Eq. 11, L_KL: KL( N(mu, sigma^2) || N(0, prior) ), mean over all of the batch. Both (B, K, d)."""
    ratio = log_var.exp() / prior
    return 0.5 * (ratio + means.float().square() / prior - 1 - ratio.log()).mean()


def entropy_loss(raw_attention: Tensor) -> Tensor:
    """Eq. 12, L_ent: -A_r log A_r of the sigmoids of Eq. 2 (B, L, K), mean over batch, tokens and regions."""
    # Clamped, because the slope at 0 is infinite.
    return torch.special.entr(raw_attention.float().clamp_min(1e-30)).mean()


# ---- the model ---------------------------------------------------------------------------------------------
class ImageFeatures(NamedTuple):
    """An encoded batch of images. The first five enter the similarity."""
    tokens: Tensor                      # (B, L, d) V, brought to unit length
    mask: Tensor                        # (B, L)    A_V
    regions: Tensor                     # (B, K, d) U
    pooled: Tensor                      # (B, d)    the image as a whole, unit length; (B, 0) if not joint
    gates: Tensor                       # (B, K)    how far each region is used, 1 without gates
    token_mean: Tensor | None = None    # (B, 1, d) the mean of V^
    means: Tensor | None = None         # (B, K, d) mu
    log_var: Tensor | None = None       # (B, K, d) log sigma^2
    attention: Tensor | None = None     # (B, L, K) A^_r, whose columns sum to 1
    raw_attention: Tensor | None = None # (B, L, K) A_r


class TextFeatures(NamedTuple):
    """An encoded batch of captions."""
    tokens: Tensor                      # (B, M, d) T, brought to unit length
    valid: Tensor                       # (B, M)    bool, the tokens that are aligned
    mask: Tensor                        # (B, M)    A_T
    pooled: Tensor                      # (B, d)    the caption as a whole, unit length; (B, 0) if not joint


class GRM(nn.Module):
    """The whole model. levels: weights of "ori", "key", "unc" (a, b, c of Eq. 9), "glo"; of 0, not computed.

    The other arguments are the `model` block of configs.yaml, which explains each. Switched off, for
    ablations: image_mask and text_mask, every mask is 1; prompts, an image has one region, the mean of its
    tokens; uncertainty, regions are their means in training too, without L_KL.
    """

    def __init__(self, image_encoder: ImageEncoder, text_encoder: TextEncoder, levels: dict[str, float], *,
                 dim: int, num_prompts: int, tau: float, unit_tokens: bool, special_tokens: bool,
                 image_keep: float | None, text_keep: float | None, mask_acts_on: str, text_mask_reads: str,
                 prompt_scale: float | None, prior: str, image_mask: bool, text_mask: bool,
                 prompts: bool, uncertainty: bool, joint: bool = False, gates: bool = False):
        super().__init__()
        self.levels, self.joint = levels, joint
        self.unit_tokens, self.special_tokens = unit_tokens, special_tokens
        self.masked_tokens = mask_acts_on == "tokens"
        self.mask_reads_embeddings = text_mask_reads == "embeddings"
        self.class_tokens = image_encoder.class_tokens if special_tokens else 0
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_proj = image_encoder.projection() if joint else nn.Linear(image_encoder.width, dim)
        self.text_proj = text_encoder.projection() if joint else nn.Linear(text_encoder.width, dim)
        text_width = text_encoder.embedding_width if self.mask_reads_embeddings else dim
        self.image_adapter = SignificanceAdapter(dim, tau, image_keep) if image_mask else None
        self.text_adapter = SignificanceAdapter(text_width, tau, text_keep) if text_mask else None
        self.region_prompts = RegionPrompts(dim, num_prompts if prompts else 1, prompt_scale)
        if not prompts:                         # a prompt of zeros attends to every token alike
            nn.init.zeros_(self.region_prompts.prompts.requires_grad_(False))
        self.sampler = GaussianSampler(dim, 1 / dim if prior == "scaled" else 1.0, uncertainty)
        self.gate = nn.Linear(dim, 1) if gates else None
        if gates:                               # undecided at first; from open ones, few would ever close
            for parameter in self.gate.parameters():
                nn.init.zeros_(parameter)

    def masked(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """V^ and its weights: the paper multiplies tokens by their mask, ours weights their means by it."""
        return (tokens * mask[..., None], torch.ones_like(mask)) if self.masked_tokens else (tokens, mask)

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """images (B, 3, H, W), normalised as the encoder expects."""
        encoded = self.image_encoder(images)                                   # (B, C + G*G, width)
        none = encoded.new_zeros(len(encoded), 0)
        pooled = self.image_encoder.timm.forward_head(encoded) if self.joint else none
        if not self.special_tokens:
            encoded = encoded[:, self.image_encoder.class_tokens:]
        V = self.image_proj(encoded)                                           # (B, L, d)
        mask = self.image_adapter(V) if self.image_adapter else torch.ones_like(V[..., 0])      # (B, L) Eq. 1
        tokens = F.normalize(V.float(), dim=-1)
        V, weight = self.masked(tokens if self.unit_tokens else V.float(), mask)
        means, attention, raw = self.region_prompts(V, weight)                 # (B, K, d)    Eq. 2-3
        regions, log_var = self.sampler(means, attention)                      # (B, K, d)    Eq. 4-6
        gates = torch.ones_like(log_var[..., 0])                               # (B, K)
        if self.gate:
            logits = self.gate(means / math.sqrt(self.sampler.prior))[..., 0].float()
            gates = region_gates(logits, self.training)
        mean = (weight / weight.sum(1, keepdim=True).clamp_min(1e-6))[:, None].to(V) @ V         # (B, 1, d)
        pooled = F.normalize(pooled.float(), dim=-1)
        return ImageFeatures(tokens, mask, regions, pooled, gates, mean, means, log_var, attention, raw)

    def encode_text(self, ids: Tensor, valid: Tensor, words: Tensor) -> TextFeatures:
        """ids (B, M); valid (B, M) bool, False on padding; words (B, M) bool, the caption's own tokens."""
        hidden, embeddings, pooled = self.text_encoder(ids, valid)
        T = self.text_proj(hidden)                                             # (B, M, d)
        aligned = valid if self.special_tokens else words
        # Ours judges words by themselves: in context, function words take up what is said around them.
        judged = F.layer_norm(embeddings, embeddings.shape[-1:]) if self.mask_reads_embeddings else T
        mask = self.text_adapter(judged, aligned) if self.text_adapter else aligned.float()     # (B, M) Eq. 1
        tokens, pooled = (F.normalize(x.float(), dim=-1) for x in (T, pooled))
        return TextFeatures(tokens, aligned, mask, pooled)

    def forward(self, images, ids, valid, words) -> tuple[ImageFeatures, TextFeatures]:
        return self.encode_image(images), self.encode_text(ids, valid, words)

    def similarity(self, image: ImageFeatures, text: TextFeatures) -> dict[str, Tensor]:
        """Eq. 7, (I, T) of every level that has a weight, and `combined`, their weighted sum, which ranks."""
        V, T, valid = image.tokens, text.tokens, text.valid
        V_hat, V_weight = self.masked(V, image.mask)
        T_hat, T_weight = self.masked(T, text.mask)
        # unc comes first because autograd goes backwards: its gradient of the tokens would lie there while
        # those of the other levels, which take the most memory, are computed.
        scores = {}
        if self.levels["unc"]:
            U = F.normalize(image.regions.float(), dim=-1) * image.gates[..., None]              # (I, K, d)
            scores["unc"] = token_similarity(U, T_hat, valid, image.gates, T_weight)
        if self.levels["ori"] and self.levels["key"] and not self.masked_tokens:
            # The two levels weight the maxima of the same products, so one pass serves both.
            weights = [None, V_weight], [None, T_weight]
            scores["ori"], scores["key"] = token_similarities(V, T, valid, *weights)
        else:
            if self.levels["ori"]:
                scores["ori"] = token_similarity(V, T, valid)
            if self.levels["key"]:
                scores["key"] = token_similarity(V_hat, T_hat, valid, V_weight, T_weight)
        if self.levels["glo"]:
            with torch.autocast(V.device.type, enabled=False):          # in 16 bits, many would tie
                scores["glo"] = image.pooled @ text.pooled.T
        scores = {level: scores[level] for level in LEVELS if level in scores}
        scores["combined"] = sum(self.levels[level] * scores[level] for level in scores)
        return scores

    def loss(self, image: ImageFeatures, text: TextFeatures, image_ids: Tensor, settings: dict,
             epochs: float = math.inf, scores: dict | None = None) -> tuple[Tensor, dict]:
        """Eq. 9 and 13: a L_ori + b L_key + c L_unc + consistency * L_recon + kl * L_KL + entropy * L_ent.

        settings: the `loss` block; `gates`, ours, weights their mean. epochs: how many are done; the first
        `ramp` take all negatives and scale L_con up from 0. scores: of `similarity`. -> loss, detached terms.
        """
        scores = scores or self.similarity(image, text)
        ramping = epochs < settings["ramp"]
        scale = epochs / settings["ramp"] if ramping else 1.0
        kind = settings["kind"], settings["temperature"], settings["margin"]
        terms = {level: contrastive_loss(scores[level], image_ids, *kind, hardest=not ramping)
                 for level in LEVELS if level in scores}
        total = scale * sum(self.levels[level] * term for level, term in terms.items())
        if self.levels["unc"]:                          # the regularisers act on regions, which only unc uses
            terms["consistency"] = consistency_loss(image.regions, image.token_mean)
            terms["entropy"] = entropy_loss(image.raw_attention)
            if self.sampler.sample:
                terms["kl"] = kl_loss(image.means, image.log_var, self.sampler.prior)
            if self.gate:
                terms["gates"] = image.gates.mean()
        total = total + sum(settings[name] * term for name, term in terms.items() if name not in LEVELS)
        return total, {name: term.detach() for name, term in terms.items()}


def build_grm(config: dict, vocab_size: int, pad_id: int, encoder_config: dict | None = None,
              pretrained: bool = True, tried: bool = False) -> GRM:
    """The model of a configuration. pretrained=False: without weights; tried: known to take its images."""
    image, text, joint = config["image"], config["text"], config["model"].get("joint", False)
    image_encoder = build_image_encoder(image, pretrained and image["pretrained"], tried, joint)
    text_encoder = build_text_encoder(text, pretrained and text["pretrained"], vocab_size, pad_id,
                                      encoder_config, joint)
    levels = {level: config["loss"].get(level, 0.0) for level in LEVELS}
    model = GRM(image_encoder, text_encoder, levels, **config["model"])
    if joint:
        widths = image_encoder.timm.num_classes or image_encoder.width, model.text_proj.out_features
        require(set(widths) == {config["model"]["dim"]}, "model.dim must be the width of the joint space: "
                f"image encoder {widths[0]}, text encoder {widths[1]}")
    return model


@torch.no_grad()
def diagnostics(image: ImageFeatures, text: TextFeatures) -> dict[str, Tensor]:
    """What tells a collapsed method: the masks' mean and deviation, the mean cosine of two regions' means."""
    words = text.mask[text.valid]
    unit, K = F.normalize(image.means.float(), dim=-1), image.means.shape[1]
    cosine = ((unit @ unit.transpose(1, 2)).sum((1, 2)) - K) / max(K * (K - 1), 1)               # (B,)
    return {"image_mask_mean": image.mask.mean(), "image_mask_std": image.mask.std(),
            "text_mask_mean": words.mean(), "text_mask_std": words.std(), "region_cosine": cosine.mean()}
