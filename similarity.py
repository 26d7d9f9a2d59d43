"""Eq. 7, the similarity of every image with every caption: first as one would write it, then fast.

The fast form is exact up to the precision of its products. On a CPU it takes them in tiles, without padding.
On CUDA, a Triton kernel takes the maxima of a tile where its products are, so that no product is ever written
to memory. The backward pass is the same for both.

Shapes: I images, L image tokens, T captions, M text tokens, d joint width, W weightings of the same tokens.
"""
from __future__ import annotations      # kernels are read, but not compiled, where there is no Triton

import os
import shutil

import torch
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
    jit = triton.jit
except ImportError:                     # as on a Mac
    triton, jit = None, lambda function: function

# Without Triton: captions in one matrix product, and products held at once: enough to hide the cost of
# launching an operation, few enough that on a CPU the maxima read the products from the last-level cache.
BLOCK = {"cpu": 64, "cuda": 1024}
TILE = {"cpu": 2 ** 22, "cuda": 2 ** 26}
# Triton compiles its kernels with a C compiler, which a small container may lack.
FUSED = {"cuda"} if triton and any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))) else set()
LONGEST = 256           # tokens of a caption in a kernel


def reference_similarity(image_tokens, text_tokens, text_valid, image_weight, text_weight):
    """Eq. 7, all at once: (I,L,d), (T,M,d), (T,M) bool, a True in each caption, (I,L), (T,M) -> (I,T)."""
    S = torch.einsum("ild,tmd->itlm", image_tokens, text_tokens)            # every patch with every word
    S = S.masked_fill(~text_valid[:, None], -torch.inf)                     # padding is no word
    best_patch = S.amax(2).masked_fill(~text_valid, 0)                      # (I,T,M)
    best_word = S.amax(3)                                                   # (I,T,L)
    word_weight = text_weight * text_valid
    words = (word_weight * best_patch).sum(-1) / word_weight.sum(-1)       # (I,T)
    patches = (image_weight[:, None] * best_word).sum(-1) / image_weight.sum(-1, keepdim=True)
    return words + patches


def token_similarity(image_tokens, text_tokens, text_valid, image_weight=None, text_weight=None):
    """`token_similarities` for one weighting: (I,L,d), (T,M,d), (T,M) bool, (I,L), (T,M) -> (I,T)."""
    return token_similarities(image_tokens, text_tokens, text_valid, [image_weight], [text_weight])[0]


@torch.compiler.disable
def token_similarities(image_tokens, text_tokens, text_valid, image_weights, text_weights):
    """Similarity of every image with every caption, under W weightings of the same tokens.

        s(i,t) = sum_m w_m max_l <v_l, t_m> / sum_m w_m  +  sum_l a_l max_m <v_l, t_m> / sum_l a_l

    image_tokens (I,L,d), text_tokens (T,M,d), text_valid (T,M) bool, any pattern; image_weights a (I,L) and
    text_weights w (T,M): W entries each, non-negative, None for ones. Returns (W,I,T), in float32 also under
    autocast, where only products are in low precision and tokens must have a norm of at most 1. Every m is a
    valid token; a caption without any has similarity 0. Exact; of tied maxima one takes the gradient.

    Memory beside the result: TILE products (on CUDA none); for the backward pass these again, and two numbers
    a (i,l,t) and (i,t,m).
    """
    device = image_tokens.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else image_tokens.dtype
    dtype = torch.promote_types(image_tokens.dtype, torch.float32)

    def normalise(weights, valid):
        weights = torch.stack([valid.to(dtype) if w is None else w.to(dtype) * valid for w in weights])
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)

    with torch.autocast(device, enabled=False):
        every = torch.ones_like(image_tokens[..., 0], dtype=torch.bool)
        weights = normalise(image_weights, every), normalise(text_weights, text_valid)   # (W,I,L), (W,T,M)
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in (image_tokens, text_tokens, *weights))
        fits = low.itemsize <= 4 and text_valid.shape[1] <= LONGEST
        if device in FUSED and fits and text_valid.numel() and image_tokens.numel():
            return _FusedSimilarities.apply(image_tokens, text_tokens, *weights, text_valid, low, keep)
        return _PackedSimilarities.apply(image_tokens, text_tokens, *weights, text_valid, low, keep)


class _Similarities(torch.autograd.Function):
    """The backward pass. A maximum passes its gradient to one product: these are laid out, a tile at a time,
    and two matrix products take them to the tokens. That costs no more than a sparse product would.

    Saved: the maxima and their places, of captions `order` (T') and of their tokens as columns, of which each
    is `tokens` (N) in (T*M) and belongs to the caption `owner` (N) of `order`. best_word, arg_word (I,L,T'),
    counted from `first` (T'), a caption's first column; best_region, arg_region (I,N)."""

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):                                    # (W,I,T)
        (image_tokens, text_tokens, image_weights, text_weights, valid, order, tokens, owner, first,
         best_word, arg_word, best_region, arg_region) = ctx.saved_tensors
        L, N = image_tokens.shape[1], len(tokens)
        # Called under autocast, it would have products of two precisions.
        with torch.autocast(grad.device.type, enabled=False):
            d_image, d_text = grad.new_zeros(image_tokens.shape), grad.new_zeros(text_tokens.shape)
            d_image_weights, d_text_weights = torch.zeros_like(image_weights), torch.zeros_like(text_weights)
            text = text_tokens.flatten(0, 1)[tokens].to(ctx.low)                            # (N,d)
            weight = text_weights.flatten(1)[:, None, tokens]                               # (W,1,N)
            d_columns, d_weight = grad.new_zeros(text.shape), grad.new_zeros(len(grad), N)
            for tile in _tiles(image_tokens, N) if N else ():
                v = image_tokens[tile].to(ctx.low)                                          # (i,L,d)
                g = grad[:, tile, order]                                                    # (W,i,T')
                g_token = g[..., owner]                                                     # (W,i,N)
                d_image_weights[:, tile] = torch.einsum("wit,ilt->wil", g, best_word[tile].to(g))
                d_weight += (g_token * best_region[tile]).sum(1)
                # ds/dS at the best column of each (row, caption), and the best row of each (image, column)
                word = torch.einsum("wil,wit->ilt", image_weights[:, tile], g).to(v)
                region = (g_token * weight).sum(0)[:, None].to(v)                           # (i,1,N)
                d_S = v.new_zeros(len(v), L, N).scatter_(2, arg_word[tile] + first, word)
                # Each place comes once, so that no atomics are needed, as scatter_add_ would.
                row = arg_region[tile, None].long()
                d_S = d_S.scatter_(1, row, d_S.gather(1, row) + region).flatten(0, 1)
                d_image[tile] = (d_S @ text).view_as(v)
                d_columns += d_S.T @ v.flatten(0, 1)
                del d_S                                         # before the next is there
            d_text.flatten(0, 1)[tokens] = d_columns
            d_text.masked_fill_(~valid[..., None], 0)           # the first token of a caption without any
            d_text_weights.flatten(1)[:, tokens] = d_weight
        return d_image, d_text, d_image_weights, d_text_weights, None, None, None


class _PackedSimilarities(_Similarities):
    """Without padding: T' captions that have a token, their N tokens as columns (see `_pack`)."""

    @staticmethod
    def forward(ctx, image_tokens, text_tokens, image_weights, text_weights, valid, low, keep):
        image_tokens, text_tokens = image_tokens.to(low), text_tokens.to(low)
        (I, L, _), W, T = image_tokens.shape, len(image_weights), len(valid)
        new = image_weights.new_empty
        order, tokens, owner, blocks = _pack(valid, BLOCK.get(valid.device.type, 64))
        position = torch.arange(L, device=order.device).to(image_weights)[:, None]
        result = image_weights.new_zeros(W, I, T)
        if keep:
            all_best_region, arg_region = new(I, len(tokens)), new(I, len(tokens), dtype=torch.int32)
            all_best_word, arg_word = new(I, L, len(order)), new(I, L, len(order), dtype=torch.int32)
        for captions, columns, counts in blocks:
            n, C = sum(counts), counts[0]                       # its columns and captions
            text = text_tokens.flatten(0, 1)[tokens[columns]].T                             # (d,n)
            tiles = _tiles(image_tokens, n)
            most = tiles[0].stop                                # images of a tile
            products = new(most * L, n + -n % 16)[:, :n]        # rows start on a cache line
            best_region = all_best_region[:, columns] if keep else new(I, n)
            best_word = all_best_word[..., captions] if keep else new(most, L, C)
            similarity = new(W, I, C)
            for tile in tiles:
                v = image_tokens[tile]                                                      # (i,L,d)
                S = products[:len(v) * L]                                                   # (i*L,n)
                if v.dtype == S.dtype:
                    torch.mm(v.flatten(0, 1), text, out=S)
                else:
                    S.copy_(torch.mm(v.flatten(0, 1), text))
                S = S.view(len(v), L, n)
                region = torch.amax(S, 1, out=best_region[tile])                            # (i,n)
                word = _fold(torch.maximum, S, counts, best_word[tile] if keep else best_word[:len(v)])
                similarity[:, tile] = (image_weights[:, tile].transpose(0, 1) @ word).transpose(0, 1)
                if keep:
                    arg_word[tile, :, captions] = _column_of(word, S, counts, columns.start)
                    arg_region[tile, columns] = S.eq_(region[:, None]).mul_(position).amax(1)
            weighted = best_region * text_weights.flatten(1)[:, None, tokens[columns]]      # (W,I,n)
            similarity += _fold(torch.add, weighted, counts, torch.empty_like(similarity))
            result[:, :, order[captions]] = similarity
        if keep:
            ctx.low = result.dtype
            ctx.save_for_backward(image_tokens, text_tokens, image_weights, text_weights, valid, order,
                                  tokens, owner, torch.zeros_like(order), all_best_word, arg_word,
                                  all_best_region, arg_region)
        return result


def _tiles(image_tokens, columns):
    """Slices of images with TILE products or fewer each, the first of which is the largest."""
    I, L, _ = image_tokens.shape
    step = max(1, TILE.get(image_tokens.device.type, 2 ** 22) // max(1, L * columns))
    return [slice(i, min(i + step, I)) for i in range(0, I, step)]


def _pack(valid, block):
    """Valid tokens as columns: captions by length, longest first, and in each block of them all first tokens,
    then all second ones, ..., so that a maximum over tokens is a few operations on slabs. valid (T,M) ->
    order (T') captions with a token; tokens (N) place in (T*M) of each column; owner (N) place in `order` of
    its caption; blocks [(slice of order, slice of columns, captions with 1, 2, ... tokens)]."""
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
    """Column that holds the best (...,C) of packed columns (...,n), the first of which is number `start`. In
    floating point, because arg-max and boolean masks are slow on a CPU; exact below 2**24 columns."""
    slabs, offset = columns.split(counts, -1), best.new_tensor(counts[0])
    out, match = torch.zeros_like(best), torch.empty_like(best)
    for slab in slabs[1:]:
        n = slab.shape[-1]
        torch.eq(slab, best[..., :n], out=match[..., :n])
        out[..., :n].lerp_(offset, match[..., :n])
        offset += n
    return out.add_(torch.arange(start, start + counts[0], device=best.device))


# ---- CUDA --------------------------------------------------------------------------------------------------
# Captions are sorted by length. A tile of the forward pass is ROWS tokens of one image by G captions, with
# room for P tokens each: P = 16 for captions of up to 16 tokens, 32 for longer ones, and so on.
ROWS, COLUMNS, DEPTH = 64, 128, 128                             # columns: G * P; bytes along d at a time


class _FusedSimilarities(_Similarities):
    """Products are float16 where `low` has 16 bits, which for norms of at most 1 is finer than bfloat16, so
    that fewer maxima move; their gradients are `low`; sums are float32."""

    @staticmethod
    def forward(ctx, image_tokens, text_tokens, image_weights, text_weights, valid, low, keep):
        (I, L, d), (T, M), W = image_tokens.shape, valid.shape, len(image_weights)
        lengths, order = valid.sum(1, dtype=torch.int32).sort(descending=True, stable=True)
        # Places in (T*M) of every caption's tokens, valid ones first.
        tokens = order[:, None] * M + (~valid[order]).to(torch.uint8).argsort(dim=1, stable=True)    # (T,M)
        precision = torch.float16 if low.itemsize == 2 else low
        image = image_tokens.to(precision).contiguous()
        text = text_tokens.to(precision).masked_fill(~valid[..., None], 0)
        columns, weights = text.flatten(0, 1)[tokens], text_weights.flatten(1)[:, tokens]
        image_weights = image_weights.contiguous()
        sizes = [16 << n for n in range(max(M - 1, 15).bit_length() - 3)]
        longer = torch.stack([(lengths > size).sum(dtype=torch.int32) for size in (0, *sizes)])
        result = image_weights.new_zeros(W, I, T)
        best = [result] * 4
        if keep:
            best = [image.new_zeros(I, L, T), valid.new_zeros((I, L, T), dtype=torch.uint8),
                    image.new_zeros(I, T, M), valid.new_zeros((I, T, M), dtype=torch.int16)]
        for n, P in enumerate(sizes):
            G = max(1, COLUMNS // P)
            _maxima_kernel[triton.cdiv(T, G), I](
                image, columns, lengths, order, longer[n:], image_weights, weights, result, *best, I, L, T,
                M, D=d, W=W, WP=triton.next_power_of_2(W), G=G, P=P, KEEP=keep,
                ROWS=min(ROWS, max(16, triton.next_power_of_2(L))), STEP=DEPTH // image.itemsize)
        if keep:
            ctx.low, caption = low, torch.arange(T, device=order.device)
            ctx.save_for_backward(image, text, image_weights, text_weights, valid, order, tokens.flatten(),
                                  caption.repeat_interleave(M), caption * M, *best[:2],
                                  *(x.flatten(1) for x in best[2:]))
        return result


@jit
def _maxima_kernel(image, text, lengths, order, longer, image_weights, text_weights, out, best_word, arg_word,
                   best_region, arg_region, I, L, T, M, D: tl.constexpr, W: tl.constexpr, WP: tl.constexpr,
                   G: tl.constexpr, P: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
                   STEP: tl.constexpr):
    """One image and G captions: their products, ROWS tokens at a time, the maxima, their weighted sums.
    longer: how many captions are longer than P / 2 and than P; those between are this kernel's."""
    first, end = tl.load(longer + 1) + tl.program_id(0) * G, tl.load(longer)
    if first >= end:
        return
    i, n = tl.program_id(1).to(tl.int64), tl.arange(0, WP)[:, None]
    caption, token = first + tl.arange(0, G), tl.arange(0, P)
    here = caption < end
    inside = token[None, :] < tl.load(lengths + caption, here, 0)[:, None]                # (G,P)
    place = caption.to(tl.int64)[:, None] * M + token[None, :]
    column, used = tl.reshape(place, [G * P]), tl.reshape(inside, [G * P])
    region, arg = tl.full([G * P], float("-inf"), tl.float32), tl.zeros([G * P], tl.int32)
    total = tl.zeros([WP, G], tl.float32)
    for start in range(0, L, ROWS):
        row = start + tl.arange(0, ROWS)
        exists, S = row < L, tl.zeros([ROWS, G * P], tl.float32)
        for step in range(0, D, STEP):
            depth = step + tl.arange(0, STEP)
            v = tl.load(image + ((i * L + row) * D)[:, None] + depth[None, :],
                        exists[:, None] & (depth < D)[None, :], 0.0)
            t = tl.load(text + (column * D)[None, :] + depth[:, None],
                        used[None, :] & (depth < D)[:, None], 0.0)
            S = tl.dot(v, t, S, input_precision="tf32x3")
        best, where = tl.max(tl.where(exists[:, None], S, float("-inf")), 0, return_indices=True)
        region, arg = tl.maximum(best, region), tl.where(best > region, start + where, arg)
        words = tl.reshape(tl.where(used[None, :], S, float("-inf")), [ROWS, G, P])
        word, where = tl.max(words, 2, return_indices=True)     # (ROWS,G)
        word = tl.where(here[None, :], word, 0.0)
        weight = tl.load(image_weights + (n * I + i) * L + row[None, :], (n < W) & exists[None, :], 0.0)
        total += tl.sum(weight[:, :, None] * word[None], 1)
        if KEEP:
            target, known = ((i * L + row) * T)[:, None] + caption[None, :], exists[:, None] & here[None, :]
            tl.store(best_word + target, word, known)
            tl.store(arg_word + target, where, known)
    region = tl.where(inside, tl.reshape(region, [G, P]), 0.0)
    weight = tl.load(text_weights + n[:, :, None] * T * M + place[None],
                     (n < W)[:, :, None] & inside[None], 0.0)
    total += tl.sum(weight * region[None], 2)
    column = tl.load(order + caption, here, 0)
    tl.store(out + (n * I + i) * T + column[None, :], total, (n < W) & here[None, :])
    if KEEP:
        tl.store(best_region + i * T * M + place, region, inside)
        tl.store(arg_region + i * T * M + place, tl.reshape(arg, [G, P]), inside)
