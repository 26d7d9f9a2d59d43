"""Eq. 7, the similarity of every image with every caption: first as one would write it, then fast.

The fast form takes the products in tiles and is exact up to their precision. Evaluation, and training on a
CPU, leave padding out, and the backward pass is sparse. Training on CUDA pads captions and has a dense
backward pass, because there few large kernels beat many small ones.

Shapes: I images, L image tokens, T captions, M text tokens, d joint width, W weightings of the same tokens.
"""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Captions in one matrix product, and products held at once: enough to hide the cost of launching an
# operation, few enough that on a CPU the maxima read the products from the last-level cache.
BLOCK = {"cpu": 64, "cuda": 1024}
TILE = {"cpu": 2 ** 22, "cuda": 2 ** 26}
PADDED = {"cuda"}       # where training pads captions
DENSE = 16              # for at most so many image tokens (a ViT's K regions) gradients are dense products


def reference_similarity(image_tokens, text_tokens, text_valid, image_weight, text_weight):
    """Eq. 7, all products at once: (I,L,d), (T,M,d), (T,M) bool, (I,L), (T,M) -> (I,T). The paper's weights
    are 1. Every caption needs a valid token."""
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


def token_similarities(image_tokens, text_tokens, text_valid, image_weights, text_weights):
    """Similarity of every image with every caption, under W weightings of the same tokens.

        s(i,t) = sum_m w_m max_l <v_l, t_m> / sum_m w_m  +  sum_l a_l max_m <v_l, t_m> / sum_l a_l

    image_tokens (I,L,d), text_tokens (T,M,d), text_valid (T,M) bool, any pattern; image_weights a (I,L) and
    text_weights w (T,M): W entries each, non-negative, None for ones. Returns (W,I,T), in float32 also under
    autocast, where only products are in low precision and tokens must have a norm of at most 1. Every m is a
    valid token; a caption without any has similarity 0. Exact; of tied maxima one takes the gradient.

    The weightings share products and maxima, nearly all of the work. Memory beside the result: TILE products
    (padded: at least one image's); for the backward pass these again, and two numbers a (i,l,t) and (i,t,m).
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
        if keep and device in PADDED and text_valid.numel():
            return _PaddedSimilarities.apply(image_tokens, text_tokens, *weights, text_valid, low)
        image_tokens, text_tokens = image_tokens.to(low), text_tokens.to(low)
        return _PackedSimilarities.apply(image_tokens, text_tokens, *weights, text_valid, keep)


def _without_autocast(backward):
    """A backward pass called under autocast, whose products would be of two precisions, leaves it."""
    def call(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return backward(ctx, grad)
    return call


class _PackedSimilarities(torch.autograd.Function):
    """Without padding: T' captions that have a token, their N tokens as columns (see `_pack`).

    A maximum passes its gradient to one product, so the backward pass is a sparse product over the places
    of the maxima, (L+M)/(L*M) of the dense work; where that is much (DENSE), a dense one."""

    @staticmethod
    def forward(ctx, image_tokens, text_tokens, image_weights, text_weights, valid, keep):
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
            ctx.save_for_backward(image_tokens, text_tokens, image_weights, text_weights, order, tokens,
                                  owner, all_best_region, arg_region, all_best_word, arg_word)
        return result

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, grad):                                    # (W,I,T)
        (image_tokens, text_tokens, image_weights, text_weights, order, tokens, owner,
         best_region, arg_region, best_word, arg_word) = ctx.saved_tensors
        (_, L, d), N = image_tokens.shape, len(tokens)
        d_image, d_text = torch.zeros_like(image_tokens), torch.zeros_like(text_tokens)
        d_image_weights, d_text_weights = torch.zeros_like(image_weights), torch.zeros_like(text_weights)
        text = text_tokens.flatten(0, 1)[tokens].to(grad)       # (N,d)
        weight = text_weights.flatten(1)[:, None, tokens]       # (W,1,N)
        d_columns, d_weight = grad.new_zeros(N, d), grad.new_zeros(len(grad), N)
        for tile in _tiles(image_tokens, N) if N else ():
            v = image_tokens[tile].flatten(0, 1).to(grad)       # (i*L,d): row r: token r % L of image r // L
            g = grad[:, tile, order]                            # (W,i,T')
            g_token = g[..., owner]                             # (W,i,N)
            d_image_weights[:, tile] = (best_word[tile] @ g.permute(1, 2, 0)).permute(2, 0, 1)
            d_weight += (g_token * best_region[tile]).sum(1)
            # ds/dS at the best column of each (row, caption), and the best row of each (image, column)
            row = torch.arange(len(v), dtype=torch.int32, device=v.device)
            word_value = (image_weights[:, tile].permute(1, 2, 0) @ g.transpose(0, 1)).flatten(0, 1)
            word_column = arg_word[tile].flatten(0, 1)          # (i*L,T')
            region_value = (g_token * weight).sum(0)            # (i,N)
            region_row = arg_region[tile] + row[::L, None]
            if L <= DENSE:
                d_S = v.new_zeros(len(v), N).scatter_(1, word_column.long(), word_value)
                d_S.view(-1, L, N).scatter_add_(1, arg_region[tile, None].long(), region_value[:, None])
                d_image[tile] = (d_S @ text).view(-1, L, d)
                d_columns.addmm_(d_S.T, v)
                continue
            region_column = torch.arange(N, dtype=torch.int32, device=v.device).expand_as(region_row)
            regions = region_row.flatten(), region_column.flatten(), region_value.flatten()
            d_v = F.embedding_bag(word_column, text, mode="sum", per_sample_weights=word_value)
            d_v += _sparse_matmul(*regions, text, len(v))
            d_image[tile] = d_v.view(-1, L, d)
            # caption by caption, so that what is sorted to one column lies close together
            columns = torch.cat([word_column.T.flatten(), region_column.T.flatten()])
            rows = torch.cat([row.repeat(len(order)), region_row.T.flatten()])
            values = torch.cat([word_value.T.flatten(), region_value.T.flatten()])
            d_columns += _sparse_matmul(columns, rows, values, v, N)
        d_text.flatten(0, 1)[tokens] = d_columns.to(d_text)
        d_text_weights.flatten(1)[:, tokens] = d_weight
        return d_image, d_text, d_image_weights, d_text_weights, None, None


class _PaddedSimilarities(torch.autograd.Function):
    """In few operations: captions padded to one length, column m * T + t being token m of caption t, and a
    dense gradient of the products in the autocast's precision `low`. Where that has 16 bits products are
    float16, which for norms of at most 1 is finer than bfloat16, so that fewer maxima move."""

    @staticmethod
    def forward(ctx, image_tokens, text_tokens, image_weights, text_weights, valid, low):
        (I, L, d), (T, M) = image_tokens.shape, valid.shape
        precision = torch.float16 if low.itemsize == 2 else low
        image, new = image_tokens.to(precision), image_weights.new_empty
        text = text_tokens.to(precision).masked_fill(~valid[..., None], 0).transpose(0, 1).reshape(M * T, d)
        padding = ~valid.T                                      # (M,T)
        best_region, arg_region = new(I, M, T, dtype=precision), new(I, M, T, dtype=torch.int32)
        best_word, arg_word = new(I, L, T, dtype=precision), new(I, L, T, dtype=torch.int32)
        for tile in _tiles(image, M * T):
            S = (image[tile].flatten(0, 1) @ text.T).view(-1, L, M, T)
            best_region[tile], arg_region[tile] = S.max(1)
            best_word[tile], arg_word[tile] = S.masked_fill_(padding, -torch.inf).max(2)
            del S                                               # before the next is there
        best_word.masked_fill_(~valid.any(1), 0)
        ctx.low = low
        ctx.save_for_backward(image, text, image_weights, text_weights, valid,
                              best_region, arg_region, best_word, arg_word)
        return (torch.einsum("wil,ilt->wit", image_weights, best_word.to(image_weights))
                + torch.einsum("wtm,imt->wit", text_weights, best_region.to(image_weights)))

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, grad):                                    # (W,I,T)
        (image, text, image_weights, text_weights, valid,
         best_region, arg_region, best_word, arg_word) = ctx.saved_tensors
        (_, L, d), (T, M) = image.shape, valid.shape
        image, text = image.to(ctx.low), text.to(ctx.low)
        d_image_weights = torch.einsum("wit,ilt->wil", grad, best_word.to(grad))
        d_text_weights = torch.einsum("wit,imt->wtm", grad, best_region.to(grad))
        d_image, d_text = torch.empty_like(image, dtype=grad.dtype), torch.zeros_like(text, dtype=grad.dtype)
        for tile in _tiles(image, M * T):
            v, g = image[tile].flatten(0, 1), grad[:, tile]     # (i*L,d), (W,i,T)
            word_value = torch.einsum("wil,wit->ilt", image_weights[:, tile], g)[:, :, None].to(v)
            region_value = torch.einsum("wtm,wit->imt", text_weights, g)[:, None].to(v)
            word, region = arg_word[tile, :, None].long(), arg_region[tile, None].long()
            d_S = v.new_zeros(g.shape[1], L, M, T).scatter_(2, word, word_value)
            # not scatter_add_: each place comes once, so no atomics are needed
            d_S.scatter_(1, region, d_S.gather(1, region) + region_value)
            d_S = d_S.view(len(v), M * T)
            d_image[tile] = (d_S @ text).view(-1, L, d)
            d_text += d_S.T @ v
            del d_S
        d_text = d_text.view(M, T, d).transpose(0, 1).masked_fill(~valid[..., None], 0)
        return d_image, d_text, d_image_weights, d_text_weights, None, None


def _tiles(image_tokens, columns):
    """Slices of images with TILE products or fewer each, the first of which is the largest."""
    I, L, _ = image_tokens.shape
    step = max(1, TILE.get(image_tokens.device.type, 2 ** 22) // max(1, L * columns))
    return [slice(i, min(i + step, I)) for i in range(0, I, step)]


def _pack(valid, block):
    """Valid tokens as columns without padding: captions by length, longest first, and in each block of them
    all first tokens, then all second ones, ... as in `pack_padded_sequence`, so that a maximum over tokens is
    a few operations on slabs of columns. valid (T,M) -> order (T') captions with a token; tokens (N) place
    in (T*M) of each column; owner (N) place in `order` of its caption; blocks [(slice of order, slice of
    columns, captions that have 1, 2, ... tokens)]."""
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


def _sparse_matmul(rows, columns, values, table, num_rows):
    """Sums values[k] * table[columns[k]] into row rows[k] -> (num_rows,d), deterministically."""
    rows, by_row = rows.sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(num_rows + 1).to(rows), out_int32=True)
    return F.embedding_bag(columns[by_row], table, starts, mode="sum", per_sample_weights=values[by_row],
                           include_last_offset=True)
