"""GRM (AAAI 2026, arXiv 2511.07710): the method.

Shapes everywhere: B batch (I images, T captions), L image tokens, M text tokens, d joint width, K region prompts.

    image -> encoder -> V (B, L, d) -> SignificanceAdapter -> A_V (B, L)
                                    -> RegionPrompts       -> mu  (B, K, d), attention (B, L, K)
                                    -> GaussianSampler     -> U   (B, K, d), log sigma^2 (B, K, d)
    text  -> encoder -> T (B, M, d) -> SignificanceAdapter -> A_T (B, M)

    level   text tokens   image tokens
    ori     T             V
    key     T, by A_T     V, by A_V
    unc     T, by A_T     U
"""
import difflib
import math
import os
import urllib.error
import urllib.request
import warnings
from typing import NamedTuple

import huggingface_hub
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LEVELS = ("ori", "key", "unc")


class ModelError(Exception):
    """A model that cannot be built or loaded; the message is one line that says what to do."""


# ---------------------------------------------------------------------------------------------- the parts of the method

class SignificanceAdapter(nn.Module):
    """Which tokens matter, judged inside one modality ("significance" for images, "granularity" for text).

    Two linear maps to two logits (keep, drop). Training draws the soft mask with Gumbel-Softmax at temperature `tau`;
    evaluation takes the softmax itself, the probability that the Gumbel draw keeps the token, so it is deterministic.

    Logits are taken relative to their mean over the image's (caption's) valid tokens. Without that the noise of the draw
    rewards masks that are one everywhere: on photographs the image mask ended at 1.000 +- 0.010, and `key` equalled `ori`.

    forward: tokens (B, L, d), valid (B, L) bool or None -> mask (B, L) in [0, 1], 0 where invalid.
    """

    def __init__(self, dim: int, tau: float = 1.0):
        super().__init__()
        self.tau = tau
        self.hidden = nn.Linear(dim, dim)
        self.logits = nn.Linear(dim, 2)

    def forward(self, tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        logits = self.logits(F.gelu(self.hidden(tokens))).float()                                # (B, L, 2)
        counted = torch.ones_like(logits[..., :1]) if valid is None else valid[..., None].to(logits)
        logits = logits - (logits * counted).sum(1, keepdim=True) / counted.sum(1, keepdim=True).clamp_min(1)
        if self.training:
            mask = F.gumbel_softmax(logits, tau=self.tau, dim=-1)[..., 0]
        else:
            mask = logits.softmax(-1)[..., 0]
        return mask if valid is None else mask * valid


class RegionPrompts(nn.Module):
    """K learnable prompts, each gathering one latent region: A_r = sigmoid(scale * V P^T + bias), mu = A_r^T V.

    Prompts are L2-normalised. A bare sigmoid of a product of unit vectors lies in [0.27, 0.73], which makes every region
    the global mean, so the scores have a learned scale and, because a region covers a small part of an image, a negative
    bias. The saliency mask enters as a factor of the attention, and each column is normalised over the L tokens.

    forward: tokens (B, L, d), mask (B, L) or None -> means (B, K, d), attention (B, L, K), columns summing to 1 over L.
    """

    def __init__(self, dim: int, num_prompts: int, scale: float = 10.0, bias: float = -5.0):
        super().__init__()
        self.prompts = nn.Parameter(torch.randn(num_prompts, dim))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.bias = nn.Parameter(torch.tensor(bias))

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

    forward: means (B, K, d), attention (B, L, K) -> regions (B, K, d), log_var (B, K, d); evaluation returns the means.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.hidden = nn.Linear(dim, dim)
        self.log_var = nn.Linear(dim, dim)
        nn.init.zeros_(self.log_var.weight)
        nn.init.constant_(self.log_var.bias, -math.log(dim))

    def forward(self, means: Tensor, attention: Tensor) -> tuple[Tensor, Tensor]:
        dim = means.shape[-1]
        log_var = self.log_var(F.gelu(self.hidden(means * math.sqrt(dim)))).float()
        log_var = log_var.clamp(-math.log(dim) - 8, -math.log(dim) + 8)
        if not self.training:
            return means, log_var
        shrink = attention.float().square().sum(1).sqrt()[..., None]                             # (B, K, 1)
        return means + torch.randn_like(means) * (0.5 * log_var).exp() * shrink, log_var


# ------------------------------------------------------------------------------------------------- the token similarity

# Captions per matrix product, and products held at once, by device. Measured: large enough to hide the cost of launching
# an operation, small enough that on a CPU the maxima read the products from the last-level cache.
BLOCK, TILE = {"cpu": 64, "cuda": 1024}, {"cpu": 2 ** 22, "cuda": 2 ** 26}


def token_similarity(image_tokens, text_tokens, text_valid, image_weight=None, text_weight=None):
    """`token_similarities` for one weighting: (I,L,d), (T,M,d), (T,M) bool, (I,L), (T,M) -> (I,T)."""
    return token_similarities(image_tokens, text_tokens, text_valid, [image_weight], [text_weight])[0]


def token_similarities(image_tokens, text_tokens, text_valid, image_weights, text_weights):
    """Similarity of every image with every caption, under W weightings of the same tokens.

        s(i,t) = sum_m w_m max_l <v_l, t_m> / sum_m w_m  +  sum_l a_l max_m <v_l, t_m> / sum_l a_l

    image_tokens (I,L,d), text_tokens (T,M,d), text_valid (T,M) bool, any pattern; image_weights a and text_weights w:
    W entries each, (I,L) and (T,M), non-negative, None for ones. Returns (W,I,T), in float32 also under autocast,
    where only the products are in low precision. Every m is a valid token; a caption without any has similarity 0.

    The weightings share the products and the maxima, that is nearly all of the work. Value and gradient are exact
    (of tied maxima the last takes the gradient) and do not depend on BLOCK and TILE. Memory beside the result:
    TILE products, and for the backward pass two numbers per (i,l,t) and (i,t,m), never (I,T,L,M).
    """
    device = image_tokens.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        image_tokens, text_tokens = image_tokens.to(low), text_tokens.to(low)
    dtype = torch.promote_types(image_tokens.dtype, torch.float32)

    def normalise(weights, valid):
        weights = torch.stack([valid.to(dtype) if w is None else w.to(dtype) * valid for w in weights])
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)

    with torch.autocast(device, enabled=False):
        image_weights = normalise(image_weights, torch.ones_like(image_tokens[..., 0], dtype=torch.bool))
        text_weights = normalise(text_weights, text_valid)
        inputs = image_tokens, text_tokens, image_weights, text_weights
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
        return _TokenSimilarities.apply(*inputs, text_valid, keep)


class _TokenSimilarities(torch.autograd.Function):
    """A maximum passes its gradient to one product only, so the backward pass is a sparse product over the remembered
    places of the maxima, (L+M)/(L*M) of the dense work; recomputing the products would cost three times the forward."""

    @staticmethod
    def forward(ctx, image_tokens, text_tokens, image_weights, text_weights, valid, keep):
        (I, L, _), W, new = image_tokens.shape, len(image_weights), image_weights.new_empty
        order, tokens, owner, blocks = _pack(valid, BLOCK.get(valid.device.type, 64))
        N, T = len(tokens), len(order)
        position = torch.arange(L, device=order.device).to(image_weights)[:, None]
        result = image_weights.new_zeros(W, I, len(valid))
        if keep:
            all_best_region, arg_region = new(I, N), new(I, N, dtype=torch.int32)
            all_best_word, arg_word = new(I, L, T), new(I, L, T, dtype=torch.int32)
        for captions, columns, counts in blocks:
            n, C = sum(counts), counts[0]
            text = text_tokens.flatten(0, 1)[tokens[columns]].T  # (d,n)
            step = min(I, max(1, TILE.get(text.device.type, 2 ** 22) // (L * n)))
            products = new(step * L, n + -n % 16)[:, :n]  # rows that start on a cache line: a tenth faster
            best_region = all_best_region[:, columns] if keep else new(I, n)
            best_word = all_best_word[..., captions] if keep else new(step, L, C)
            similarity = new(W, I, C)
            for i in range(0, I, step):
                tile_of = slice(i, i + step)
                v = image_tokens[tile_of]
                S = products[:len(v) * L]
                if v.dtype == S.dtype:
                    torch.mm(v.flatten(0, 1), text, out=S)
                else:
                    S.copy_(torch.mm(v.flatten(0, 1), text))
                S = S.view(len(v), L, n)
                region = torch.amax(S, 1, out=best_region[tile_of])  # (i,n)
                word = _fold(torch.maximum, S, counts, best_word[tile_of] if keep else best_word[:len(v)])  # (i,L,C)
                similarity[:, tile_of] = (image_weights[:, tile_of].transpose(0, 1) @ word).transpose(0, 1)
                if keep:
                    arg_word[tile_of, :, captions] = _column_of(word, S, counts, columns.start)
                    arg_region[tile_of, columns] = S.eq_(region[:, None]).mul_(position).amax(1)
            weighted = best_region * text_weights.flatten(1)[:, None, tokens[columns]]  # (W,I,n)
            similarity += _fold(torch.add, weighted, counts, torch.empty_like(similarity))
            result[:, :, order[captions]] = similarity
        if keep:
            ctx.save_for_backward(image_tokens, text_tokens, image_weights, text_weights, order, tokens, owner,
                                  all_best_region, arg_region, all_best_word, arg_word)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (image_tokens, text_tokens, image_weights, text_weights, order, tokens, owner,
         best_region, arg_region, best_word, arg_word) = (x.detach() for x in ctx.saved_tensors)
        (I, L, d), N, T = image_tokens.shape, len(tokens), len(order)
        d_image, d_text = torch.zeros_like(image_tokens), torch.zeros_like(text_tokens)
        d_image_weights, d_text_weights = torch.zeros_like(image_weights), torch.zeros_like(text_weights)
        text, weight = text_tokens.flatten(0, 1)[tokens].to(grad), text_weights.flatten(1)[:, None, tokens]
        d_columns, d_weight = grad.new_zeros(N, d), grad.new_zeros(len(grad), N)
        step = max(1, TILE.get(grad.device.type, 2 ** 22) // max(1, L * N))
        for i in range(0, I if T else 0, step):
            tile_of = slice(i, i + step)
            v = image_tokens[tile_of].flatten(0, 1).to(grad)  # (i*L,d): row r is token r % L of image r // L
            g = grad[:, tile_of, order]  # (W,i,T)
            g_token = g[..., owner]  # (W,i,N)
            d_image_weights[:, tile_of] = (best_word[tile_of] @ g.permute(1, 2, 0)).permute(2, 0, 1)
            d_weight += (g_token * best_region[tile_of]).sum(1)
            # d s / d S at the best text column of each (row, caption), and at the best row of each (image, column)
            row = torch.arange(len(v), dtype=torch.int32, device=v.device)
            word_value = (image_weights[:, tile_of].permute(1, 2, 0) @ g.transpose(0, 1)).flatten(0, 1)  # (i*L,T)
            word_column = arg_word[tile_of].flatten(0, 1)
            region_value = (g_token * weight).sum(0).flatten()  # (i*N)
            region_row = (arg_region[tile_of] + row[::L, None]).flatten()
            region_column = torch.arange(N, dtype=torch.int32, device=v.device).repeat(len(v) // L)
            d_v = F.embedding_bag(word_column, text, mode="sum", per_sample_weights=word_value)
            d_v += _sparse_matmul(region_row, region_column, region_value, text, len(v))
            d_image[tile_of] = d_v.view(-1, L, d)
            d_columns += _sparse_matmul(torch.cat([word_column.flatten(), region_column]),
                                        torch.cat([row.repeat_interleave(T), region_row]),
                                        torch.cat([word_value.flatten(), region_value]), v, N)
        d_text.flatten(0, 1)[tokens] = d_columns.to(d_text)
        d_text_weights.flatten(1)[:, tokens] = d_weight
        return d_image, d_text, d_image_weights, d_text_weights, None, None


def _pack(valid, block):
    """Valid tokens as columns without padding: captions sorted by length, longest first, and in each block of captions
    the first token of every caption, then every second token, ... (as `pack_padded_sequence` does), so that a maximum
    over tokens is a few vectorised operations on slabs of columns, whatever the lengths.

    valid (T,M) -> order (T',) captions with a token; tokens (N,) flat place in (T*M) of each column; owner (N,) place
    in `order` of its caption; blocks [(slice of order, slice of columns, captions that have 1, 2, ... tokens)].
    """
    lengths, order = valid.sum(1).sort(descending=True, stable=True)
    order = order[:int((lengths > 0).sum())]
    place = (~valid).to(torch.uint8).argsort(dim=1, stable=True)  # valid tokens first
    tokens, owner, blocks, start = [order[:0]], [order[:0]], [], 0
    for first in range(0, len(order), block):
        captions = torch.arange(first, min(first + block, len(order)), device=valid.device)
        used = torch.arange(int(lengths[first]), device=valid.device)[:, None] < lengths[captions]  # (M',C)
        tokens.append((order[captions] * valid.shape[1] + place[order[captions], :len(used)].T)[used])
        owner.append(captions.expand_as(used)[used])
        end = start + len(owner[-1])
        blocks.append((slice(first, first + len(captions)), slice(start, end), used.sum(1).tolist()))
        start = end
    return order, torch.cat(tokens), torch.cat(owner), blocks


def _fold(operation, columns, counts, out):
    """Reduces packed columns (...,n) over the tokens of each caption into out (...,C)."""
    first, *rest = columns.split(counts, -1)
    out.copy_(first)
    for slab in rest:
        head = out[..., :slab.shape[-1]]
        operation(head, slab, out=head)
    return out


def _column_of(best, columns, counts, start):
    """Column that holds the best (...,C) of packed columns (...,n), the first of which is number `start`. In floating
    point, because on a CPU arg-max and boolean masks are ten times slower; exact below 2**24 columns."""
    slabs, out, match, offset = columns.split(counts, -1), torch.zeros_like(best), torch.empty_like(best), counts[0]
    for slab in slabs[1:]:
        n = slab.shape[-1]
        torch.eq(slab, best[..., :n], out=match[..., :n])
        torch.maximum(out[..., :n], match[..., :n].mul_(offset), out=out[..., :n])
        offset += n
    return out.add_(torch.arange(start, start + counts[0], device=best.device))


def _sparse_matmul(rows, columns, values, table, num_rows):
    """Sums values[k] * table[columns[k]] into row rows[k] -> (num_rows,d); deterministic, unlike `index_add`."""
    rows, by_row = rows.sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(num_rows + 1, dtype=rows.dtype, device=rows.device), out_int32=True)
    return F.embedding_bag(columns[by_row], table, starts, mode="sum", per_sample_weights=values[by_row],
                           include_last_offset=True)


# ----------------------------------------------------------------------------------------------------------- the losses

def contrastive_loss(similarity: Tensor, image_ids: Tensor, kind: str = "infonce", temperature: float = 0.05,
                     margin: float = 0.2) -> Tensor:
    """Matched pairs on the diagonal of similarity (B, B) against the rest, image-to-text plus text-to-image, halved.

    Entries off the diagonal with equal image_ids (B,) are other captions of the same image: true matches, never negatives.

    infonce:  mean_i  -log( exp(s_ii / temperature) / (exp(s_ii / temperature) + sum_negatives exp(s_ij / temperature)) )
    triplet:  mean_i  max(0, margin + max_negatives s_ij - s_ii)     (VSE++; 0 for a row without negatives)
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
    patch_mean = (tokens * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp_min(1e-6)
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
    entropy = torch.special.entr(attention.float()).sum(1)
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
    valid: Tensor       # (B, M) bool
    mask: Tensor        # (B, M)


class GRM(nn.Module):
    """The whole model over a timm image encoder and a Hugging Face text encoder.

    levels: {"ori": a, "key": b, "unc": c}; a level of weight 0 is neither computed nor reported.
    """

    def __init__(self, image_encoder: nn.Module, text_encoder: nn.Module, dim: int = 512, num_prompts: int = 5,
                 tau: float = 1.0, levels: dict[str, float] | None = None):
        super().__init__()
        self.levels = {"ori": 0.4, "key": 0.4, "unc": 0.2} if levels is None else levels
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.image_proj = nn.Linear(image_encoder.num_features, dim)
        self.text_proj = nn.Linear(text_encoder.config.hidden_size, dim)
        self.image_adapter = SignificanceAdapter(dim, tau)
        self.text_adapter = SignificanceAdapter(dim, tau)
        self.region_prompts = RegionPrompts(dim, num_prompts)
        self.sampler = GaussianSampler(dim)

    def encode_image(self, images: Tensor) -> ImageFeatures:
        """images (B, 3, H, W), normalised as the encoder expects."""
        grid = self.image_encoder.forward_features(images)
        if grid.ndim == 4:                                               # Swin gives (B, H, W, C), CNNs (B, C, H, W)
            channels_last = getattr(self.image_encoder, "output_fmt", "NCHW") == "NHWC"
            grid = grid.flatten(1, 2) if channels_last else grid.flatten(2).transpose(1, 2)
        patches = grid[:, getattr(self.image_encoder, "num_prefix_tokens", 0):]
        projected = self.image_proj(patches)                                                     # (B, L, d)
        mask = self.image_adapter(projected)
        # normalise first, mask afterwards: a cosine cancels any factor that a mask put on its token
        tokens = F.normalize(projected.float(), dim=-1)
        means, attention = self.region_prompts(tokens, mask)
        regions, log_var = self.sampler(means, attention)
        return ImageFeatures(tokens, mask, F.normalize(regions.float(), dim=-1), means, attention, log_var)

    def encode_text(self, ids: Tensor, valid: Tensor) -> TextFeatures:
        """ids (B, M) token ids, valid (B, M) bool, False on padding."""
        projected = self.text_proj(self._hidden_states(ids, valid))
        mask = self.text_adapter(projected, valid)
        return TextFeatures(F.normalize(projected.float(), dim=-1), valid, mask)

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
        """(I, T) for every level with a weight, and `combined`, their sum with the weights a, b, c."""
        scores = {}
        shared = [name for name in ("ori", "key") if self.levels[name]]
        if shared:      # these two levels weight the same token maxima, so one pass serves both
            scores.update(zip(shared, token_similarities(
                image.tokens, text.tokens, text.valid,
                [None if name == "ori" else image.mask for name in shared],
                [None if name == "ori" else text.mask for name in shared])))
        if self.levels["unc"]:
            scores["unc"] = token_similarity(image.regions, text.tokens, text.valid, text_weight=text.mask)
        scores["combined"] = sum(self.levels[name] * scores[name] for name in LEVELS if name in scores)
        return scores

    def loss(self, image: ImageFeatures, text: TextFeatures, image_ids: Tensor, loss: dict) -> tuple[Tensor, dict]:
        """The training objective and its terms (detached), for matched pairs and the `loss` block of the configuration.

        L = a L_ori + b L_key + c L_unc + consistency * L_recon + kl * L_KL + entropy * L_ent
        """
        scores = self.similarity(image, text)
        terms = {name: contrastive_loss(scores[name], image_ids, loss["kind"], loss["temperature"], loss["margin"])
                 for name in LEVELS if name in scores}
        total = sum(self.levels[name] * term for name, term in terms.items())
        if self.levels["unc"]:                                      # the regularisers act on regions, which only unc uses
            terms["consistency"] = consistency_loss(image.means, image.tokens, image.mask)
            terms["kl"] = kl_loss(image.means, image.log_var)
            terms["entropy"] = entropy_loss(image.attention)
            total = total + sum(loss[name] * terms[name] for name in ("consistency", "kl", "entropy"))
        return total, {name: term.detach() for name, term in terms.items()}


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
        options.update(pretrained=True, pretrained_cfg_overlay={"file": str(weights)})
    try:
        try:
            return timm.create_model(name, **options)
        except TypeError as error:                               # CNNs take any size and have no such argument
            if "img_size" not in str(error):
                raise
            options.pop("img_size")
            return timm.create_model(name, **options)
    except Exception as error:                                   # timm raises whatever its model code raises
        raise ModelError(f"image encoder '{name}' at {size} px could not be built: {_one_line(error)}") from error


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
            cfg["name"], dtype=torch.float32, **where))      # float32 masters: transformers 5 keeps the stored dtype
    if encoder_config is None and cfg["name"]:
        try:
            found = transformers.AutoConfig.from_pretrained(cfg["name"], local_files_only=True)
            encoder_config = found.to_dict()
        except Exception:                                    # nothing at hand: BERT-base is what `name` stands for here
            warnings.warn(f"text.name '{cfg['name']}' is not on this machine: an untrained BERT takes its place")
    encoder_config = {"model_type": "bert", **(encoder_config or {}), **(cfg["options"] or {}), "vocab_size": vocab_size,
                      "pad_token_id": pad_id}
    try:
        return transformers.AutoModel.from_config(
            transformers.AutoConfig.for_model(**encoder_config), dtype=torch.float32)
    except Exception as error:
        raise ModelError(f"text encoder '{cfg['name']}' could not be built: {_one_line(error)}") from error


def build_grm(config: dict, vocab_size: int, pad_id: int, encoder_config: dict | None = None,
              pretrained: bool = True) -> GRM:
    """The model of a resolved configuration; `pretrained=False` skips all loading, for a checkpoint's weights to follow."""
    image, text, model = config["image"], config["text"], config["model"]
    return GRM(build_image_encoder(image, pretrained and image["pretrained"]),
               build_text_encoder(text, pretrained and text["pretrained"], vocab_size, pad_id, encoder_config),
               model["dim"], model["num_prompts"], model["tau"], {name: config["loss"][name] for name in LEVELS})


def _hub_weights(name: str, default) -> str:
    """The cached or downloaded weight file of a timm model."""
    if default is None or not default.hf_hub_id:
        raise ModelError(f"image.name: timm has no pretrained weights for '{name}'; set image.pretrained=false")
    return _from_hub(default.hf_hub_id, "image.weights", lambda **where: huggingface_hub.hf_hub_download(
        default.hf_hub_id, default.hf_hub_filename or "model.safetensors", **where))


def _from_hub(name: str, key: str, load):
    """load(local_files_only=True) from a folder or the cache, else load() from the hub; never a retry storm offline."""
    try:
        return load(local_files_only=True)
    except Exception as error:
        if os.path.isdir(name):
            raise ModelError(f"{key}: the folder '{name}' holds no loadable model: {_one_line(error)}") from error
    try:
        if not _hub_answers():
            raise ConnectionError("the hub cannot be reached")
        return load()
    except Exception as error:
        raise ModelError(
            f"{key}: '{name}' is not on this machine and could not be downloaded ({_one_line(error)}). Download it from "
            f"https://huggingface.co/{name} and pass the local path with --set {key}=PATH; "
            f"without data or weights, --backbone vit_micro trains on built-in scenes") from error


def _hub_answers(timeout: float = 5.0) -> bool:
    """Whether the hub (or HF_ENDPOINT) takes a request within `timeout` seconds, through a proxy where one is set."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD"), timeout=timeout)
    except urllib.error.HTTPError:                           # an answer, whatever it says
        return True
    except OSError:
        return False
    return True


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
