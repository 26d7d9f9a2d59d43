"""The token similarity of every image with every caption: exact, in tiles. Evaluation and a CPU's training do without padding, and
training with a sparse backward pass; a GPU's training, bound by the launching of operations, does with few of them."""
import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# Captions per matrix product, and products held at once, by device. Measured: large enough to hide the cost of launching
# an operation, small enough that on a CPU the maxima read the products from the last-level cache.
BLOCK, TILE = {"cpu": 64, "cuda": 1024}, {"cpu": 2 ** 22, "cuda": 2 ** 26}
# Where launching an operation costs more than its work, training pads captions to one length: twice the products, a quarter
# of the operations. On an H100 forward and backward were 1.25 times as fast so even with 1,024 captions (RESULTS.md).
PADDED = {"cuda"}
# Up to so many image tokens (a ViT's K regions) the maxima fill a fifth of the products: dense backward products are faster.
DENSE = 16


def token_similarity(image_tokens, text_tokens, text_valid, image_weight=None, text_weight=None):
    """`token_similarities` for one weighting: (I,L,d), (T,M,d), (T,M) bool, (I,L), (T,M) -> (I,T)."""
    return token_similarities(image_tokens, text_tokens, text_valid, [image_weight], [text_weight])[0]


def token_similarities(image_tokens, text_tokens, text_valid, image_weights, text_weights):
    """Similarity of every image with every caption, under W weightings of the same tokens.

        s(i,t) = sum_m w_m max_l <v_l, t_m> / sum_m w_m  +  sum_l a_l max_m <v_l, t_m> / sum_l a_l

    image_tokens (I,L,d), text_tokens (T,M,d), text_valid (T,M) bool, any pattern; image_weights a and text_weights w:
    W entries each, (I,L) and (T,M), non-negative, None for ones. Returns (W,I,T), in float32 also under autocast,
    where only the products are in low precision and tokens have to be unit vectors. Every m is a valid token; a caption
    without any has similarity 0.

    The weightings share the products and the maxima, that is nearly all of the work. Value and gradient are exact
    (of tied maxima one takes the gradient) and do not depend on BLOCK and TILE. Memory beside the result:
    TILE products (padded: those of one image if these are more), and for the backward pass as many again and two numbers
    per (i,l,t) and (i,t,m), never (I,T,L,M).
    """
    device = image_tokens.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else image_tokens.dtype
    dtype = torch.promote_types(image_tokens.dtype, torch.float32)

    def normalise(weights, valid):
        weights = torch.stack([valid.to(dtype) if w is None else w.to(dtype) * valid for w in weights])
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)

    with torch.autocast(device, enabled=False):
        image_weights = normalise(image_weights, torch.ones_like(image_tokens[..., 0], dtype=torch.bool))
        text_weights = normalise(text_weights, text_valid)
        weights = image_weights, text_weights
        keep = torch.is_grad_enabled() and any(x.requires_grad for x in (image_tokens, text_tokens, *weights))
        if keep and device in PADDED and text_valid.numel():
            return _PaddedSimilarities.apply(image_tokens, text_tokens, *weights, text_valid, low)
        return _TokenSimilarities.apply(image_tokens.to(low), text_tokens.to(low), *weights, text_valid, keep)


class _TokenSimilarities(torch.autograd.Function):
    """A maximum passes its gradient to one product only, so the backward pass is a sparse product over the remembered
    places of the maxima, (L+M)/(L*M) of the dense work; recomputing the products would cost three times the forward.
    Where that fraction is large, the same gradient is written out and multiplied densely (DENSE)."""

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
        with torch.autocast(grad.device.type, enabled=False):     # called under autocast, its products would not fit together
            return _TokenSimilarities.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx, grad):
        (image_tokens, text_tokens, image_weights, text_weights, order, tokens, owner,
         best_region, arg_region, best_word, arg_word) = (x.detach() for x in ctx.saved_tensors)
        (_, L, d), N, T = image_tokens.shape, len(tokens), len(order)
        d_image = torch.empty_like(image_tokens) if T else torch.zeros_like(image_tokens)
        d_text = torch.zeros_like(text_tokens)
        d_image_weights, d_text_weights = torch.zeros_like(image_weights), torch.zeros_like(text_weights)
        text, weight = text_tokens.flatten(0, 1)[tokens].to(grad), text_weights.flatten(1)[:, None, tokens]
        d_columns, d_weight = grad.new_zeros(N, d), grad.new_zeros(len(grad), N)
        for tile_of in _tiles(image_tokens, N) if T else ():
            v = image_tokens[tile_of].flatten(0, 1).to(grad)  # (i*L,d): row r is token r % L of image r // L
            g = grad[:, tile_of, order]  # (W,i,T)
            g_token = g[..., owner]  # (W,i,N)
            d_image_weights[:, tile_of] = (best_word[tile_of] @ g.permute(1, 2, 0)).permute(2, 0, 1)
            d_weight += (g_token * best_region[tile_of]).sum(1)
            # d s / d S at the best text column of each (row, caption), and at the best row of each (image, column)
            row = torch.arange(len(v), dtype=torch.int32, device=v.device)
            word_value = (image_weights[:, tile_of].permute(1, 2, 0) @ g.transpose(0, 1)).flatten(0, 1)  # (i*L,T)
            word_column = arg_word[tile_of].flatten(0, 1)
            region_value = (g_token * weight).sum(0)  # (i,N)
            region_row = arg_region[tile_of] + row[::L, None]
            if L <= DENSE:
                d_S = v.new_zeros(len(v), N).scatter_(1, word_column.long(), word_value)
                d_S.view(-1, L, N).scatter_add_(1, arg_region[tile_of, None].long(), region_value[:, None])
                d_image[tile_of] = (d_S @ text).view(-1, L, d)
                d_columns.addmm_(d_S.T, v)
                continue
            region_column = torch.arange(N, dtype=torch.int32, device=v.device).expand_as(region_row)
            d_v = F.embedding_bag(word_column, text, mode="sum", per_sample_weights=word_value)
            d_v += _sparse_matmul(region_row.flatten(), region_column.flatten(), region_value.flatten(), text, len(v))
            d_image[tile_of] = d_v.view(-1, L, d)
            # caption by caption, so that what is sorted to one column lies close together: half the time of row by row
            columns, rows, values = (torch.cat([word.T.flatten(), region.T.flatten()]) for word, region in (
                (word_column, region_column), (row[:, None].expand_as(word_column), region_row), (word_value, region_value)))
            d_columns += _sparse_matmul(columns, rows, values, v, N)
        d_text.flatten(0, 1)[tokens] = d_columns.to(d_text)
        d_text_weights.flatten(1)[:, tokens] = d_weight
        return d_image, d_text, d_image_weights, d_text_weights, None, None


class _PaddedSimilarities(torch.autograd.Function):
    """The same on captions padded to one length, in few operations: column m * T + t is token m of caption t, and the gradient
    with respect to the products is written out and multiplied densely, in the autocast's precision `low`. The products of unit
    vectors are taken in float16 where `low` has 16 bits: bf16 has eight times its rounding error, which moves maxima (RESULTS.md)."""

    @staticmethod
    def forward(ctx, image_tokens, text_tokens, image_weights, text_weights, valid, low):
        (I, L, d), (T, M, _) = image_tokens.shape, text_tokens.shape
        ctx.low, precision = low, torch.float16 if low.itemsize == 2 else low
        image, new = image_tokens.to(precision), image_weights.new_empty
        text = text_tokens.to(precision).masked_fill(~valid[..., None], 0).transpose(0, 1).reshape(M * T, d)
        padding = ~valid.T
        best_region, arg_region = new(I, M, T, dtype=precision), new(I, M, T, dtype=torch.int32)
        best_word, arg_word = new(I, L, T, dtype=precision), new(I, L, T, dtype=torch.int32)
        for tile_of in _tiles(image, M * T):
            S = (image[tile_of].flatten(0, 1) @ text.T).view(-1, L, M, T)
            best_region[tile_of], arg_region[tile_of] = S.max(1)
            best_word[tile_of], arg_word[tile_of] = S.masked_fill_(padding, -torch.inf).max(2)
            del S                                              # before the next is there
        best_word.masked_fill_(~valid.any(1), 0)
        ctx.save_for_backward(image, text, image_weights, text_weights, valid, best_region, arg_region, best_word, arg_word)
        dtype = image_weights.dtype
        return (torch.einsum("wil,ilt->wit", image_weights, best_word.to(dtype))
                + torch.einsum("wtm,imt->wit", text_weights, best_region.to(dtype)))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return _PaddedSimilarities.gradients(ctx, grad)

    @staticmethod
    def gradients(ctx, grad):
        (image, text, image_weights, text_weights, valid,
         best_region, arg_region, best_word, arg_word) = (x.detach() for x in ctx.saved_tensors)
        (_, L, d), (T, M) = image.shape, valid.shape
        image, text = image.to(ctx.low), text.to(ctx.low)
        d_image_weights = torch.einsum("wit,ilt->wil", grad, best_word.to(grad))
        d_text_weights = torch.einsum("wit,imt->wtm", grad, best_region.to(grad))
        d_image, d_text = torch.empty_like(image, dtype=grad.dtype), torch.zeros_like(text, dtype=grad.dtype)
        for tile_of in _tiles(image, M * T):
            v, g = image[tile_of].flatten(0, 1), grad[:, tile_of]
            word_value = torch.einsum("wil,wit->ilt", image_weights[:, tile_of], g)[:, :, None].to(v)
            region_value = torch.einsum("wtm,wit->imt", text_weights, g)[:, None].to(v)
            word, region = arg_word[tile_of, :, None].long(), arg_region[tile_of, None].long()
            d_S = v.new_zeros(g.shape[1], L, M, T).scatter_(2, word, word_value)
            d_S.scatter_(1, region, d_S.gather(1, region) + region_value)      # each place once, so no atomics are needed
            d_S = d_S.view(len(v), M * T)
            d_image[tile_of] = (d_S @ text).view(-1, L, d)
            d_text += d_S.T @ v
            del d_S
        d_text = d_text.view(M, T, d).transpose(0, 1).masked_fill(~valid[..., None], 0)
        return d_image, d_text, d_image_weights, d_text_weights, None, None


def _tiles(image_tokens, columns):
    """Slices of images with TILE products or fewer each."""
    step = max(1, TILE.get(image_tokens.device.type, 2 ** 22) // max(1, image_tokens.shape[1] * columns))
    return [slice(i, i + step) for i in range(0, len(image_tokens), step)]


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
    slabs, offset = columns.split(counts, -1), best.new_tensor(counts[0])
    out, match = torch.zeros_like(best), torch.empty_like(best)
    for slab in slabs[1:]:
        n = slab.shape[-1]
        torch.eq(slab, best[..., :n], out=match[..., :n])
        out[..., :n].lerp_(offset, match[..., :n])
        offset += n
    return out.add_(torch.arange(start, start + counts[0], device=best.device))


def _sparse_matmul(rows, columns, values, table, num_rows):
    """Sums values[k] * table[columns[k]] into row rows[k] -> (num_rows,d); deterministic, unlike `index_add`."""
    rows, by_row = rows.sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(num_rows + 1, dtype=rows.dtype, device=rows.device), out_int32=True)
    return F.embedding_bag(columns[by_row], table, starts, mode="sum", per_sample_weights=values[by_row],
                           include_last_offset=True)
