"""Eq. 7's fast form equals the formula in value and gradient, whatever tiling, padding and order."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import similarity
from similarity import reference_similarity, token_similarities, token_similarity


def literal(v, t, valid, a=None, w=None):
    """The formula, one pair at a time, over the list of valid tokens."""
    rows = []
    for i in range(len(v)):
        row = []
        for j in range(len(t)):
            words = valid[j].nonzero().flatten()
            if len(words) == 0:
                row.append(v.new_zeros(()))
                continue
            S = torch.einsum("ld,md->lm", v[i], t[j, words])
            wj = v.new_ones(len(words)) if w is None else w[j, words]
            ai = v.new_ones(len(v[i])) if a is None else a[i]
            row.append((wj * S.max(0).values).sum() / wj.sum() + (ai * S.max(1).values).sum() / ai.sum())
        rows.append(torch.stack(row))
    return torch.stack(rows)


def sample(I=4, L=7, T=9, M=6, d=5, dtype=None):
    dtype = dtype or (torch.float32 if "cpu" in similarity.FUSED else torch.float64)
    g = torch.Generator().manual_seed(0)
    v, t = torch.randn(I, L, d, generator=g, dtype=dtype), torch.randn(T, M, d, generator=g, dtype=dtype)
    a, w = torch.rand(I, L, generator=g, dtype=dtype) + 0.1, torch.rand(T, M, generator=g, dtype=dtype) + 0.1
    valid = torch.rand(T, M, generator=g) > 0.4  # any pattern: holes, and captions that start with padding
    valid[0], valid[1], valid[2] = False, True, torch.arange(M) == M - 1
    return [x.requires_grad_() for x in (v, t, a, w)] + [valid]


def both(v, t, valid, a, w):
    return token_similarities(v, t, valid, [None, a], [None, w])


def choose(monkeypatch, way, block=64, tile=2 ** 22):
    """The form for the CPU or the kernel; captions a block, products a tile."""
    if way == "fused":
        pytest.importorskip("triton")
    monkeypatch.setattr(similarity, "FUSED", {"cpu"} if way == "fused" else set())
    monkeypatch.setitem(similarity.BLOCK, "cpu", block)
    monkeypatch.setitem(similarity.TILE, "cpu", tile)


@pytest.fixture(params=["packed", "fused"])
def way(request, monkeypatch):
    choose(monkeypatch, request.param)


@pytest.mark.parametrize("shape", [
    {}, dict(L=1, M=3), dict(I=1, T=3, L=3, M=1), dict(I=2, L=130, T=5, M=40, d=2),
    dict(I=2, L=20, T=50, M=17, d=80)], ids=str)
@pytest.mark.parametrize("tiling", [
    ("packed",), ("packed", 1, 1), ("packed", 2, 60), ("packed", 4, 300), ("fused",), ("fused", 64, 1)],
    ids=str)
def test_value_and_gradient_equal_the_literal_formula(shape, tiling, monkeypatch):
    choose(monkeypatch, *tiling)
    v, t, a, w, valid = sample(**shape)
    expected = torch.stack([literal(v, t, valid), literal(v, t, valid, a, w)])
    got = both(v, t, valid, a, w)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype)
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad((s * upstream).sum(), (v, t, a, w)) for s in (got, expected)]
    if v.dtype == torch.float64:
        torch.testing.assert_close(*gradients)
    # In single precision, terms that cancel leave the rounding of the largest.
    largest = max(y.abs().max() for y in gradients[1])
    assert all((x - y).abs().max() <= 1e-5 * largest for x, y in zip(*gradients))


def test_the_reference_is_the_literal_formula():
    v, t, a, w, valid = sample()
    some = valid.any(1)
    torch.testing.assert_close(reference_similarity(v, t[some], valid[some], a, w[some]),
                               literal(v, t, valid, a, w)[:, some])
    ones = torch.ones_like
    torch.testing.assert_close(reference_similarity(v, t[some], valid[some], ones(a), ones(w[some])),
                               literal(v, t, valid)[:, some])


def test_one_weighting_is_a_row_of_several(way):
    v, t, a, w, valid = sample()
    torch.testing.assert_close(token_similarity(v, t, valid), both(v, t, valid, a, w)[0])
    torch.testing.assert_close(token_similarity(v, t, valid, a, w), both(v, t, valid, a, w)[1])
    torch.testing.assert_close(token_similarity(v, t, valid, None, w), literal(v, t, valid, None, w))
    torch.testing.assert_close(token_similarity(v, t, valid, a / 1e4, w / 1e4), literal(v, t, valid, a, w))


def test_without_gradient_the_value_is_the_same():
    v, t, a, w, valid = sample()
    with torch.no_grad():
        value = both(v, t, valid, a, w)
    assert torch.equal(value, both(v, t, valid, a, w).detach())


def test_padding_is_never_read(way):
    v, t, a, w, valid = sample()
    bad = t.detach().masked_fill(~valid[..., None], torch.nan)
    bad = torch.cat([bad, t.new_full((9, 3, 5), torch.inf)], 1).requires_grad_()
    more = torch.cat([valid, torch.zeros(9, 3, dtype=torch.bool)], 1)
    wide = torch.cat([w, torch.ones(9, 3, dtype=w.dtype)], 1)
    torch.testing.assert_close(both(v, bad, more, a, wide), both(v, t, valid, a, w))
    gradient, = torch.autograd.grad(both(v, bad, more, a, wide).sum(), bad)
    assert gradient.isfinite().all() and (gradient[~more] == 0).all()


def test_order_of_images_captions_and_tokens_does_not_matter():
    v, t, a, w, valid = sample()
    i, j, l, m = torch.randperm(4), torch.randperm(9), torch.randperm(7), torch.randperm(6)
    moved = both(v[i][:, l], t[j][:, m], valid[j][:, m], a[i][:, l], w[j][:, m])
    torch.testing.assert_close(moved, both(v, t, valid, a, w)[:, i][:, :, j])


@pytest.mark.parametrize("every", [True, False])
def test_captions_without_a_token_have_similarity_and_gradient_zero(every, way):
    v, t, a, w, valid = sample()
    if every:
        valid = torch.zeros_like(valid)
    s = both(v, t, valid, a, w)[:, :, ~valid.any(1)]
    gradients = torch.autograd.grad(s.sum(), (v, t, a, w))
    assert s.numel() and (s == 0).all() and all((x == 0).all() for x in gradients)


def test_weights_that_are_all_zero_do_not_give_nan(way):
    v, t, a, w, valid = sample()
    zero_a, zero_w = torch.zeros_like(a, requires_grad=True), torch.zeros_like(w, requires_grad=True)
    s = token_similarity(v, t, valid, zero_a, zero_w)
    assert (s == 0).all()
    assert all(x.isfinite().all() for x in torch.autograd.grad(s.sum(), (v, t, zero_a, zero_w)))


def test_tied_maxima_share_one_unit_of_gradient(way):
    """As tokens do that a mask has multiplied by 0."""
    v, t = torch.ones(1, 3, 2, requires_grad=True), torch.ones(1, 4, 2, requires_grad=True)
    token_similarity(v, t, torch.ones(1, 4, dtype=torch.bool)).sum().backward()
    torch.testing.assert_close(v.grad.sum(), torch.tensor(4.0))    # two means of weight 1, d = 2
    torch.testing.assert_close(t.grad.sum(), torch.tensor(4.0))


@pytest.mark.parametrize("scale", [1, 30])
def test_float32_is_close_to_float64(scale):
    """Also for long tokens: only 16 bits need a norm of at most 1."""
    v, t, a, w, valid = (x.detach() for x in sample(d=64))
    single = both(scale * v.float(), t.float(), valid, a.float(), w.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), both(scale * v, t, valid, a, w), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_autocast_lowers_only_the_products(masked, way):
    """Of unit vectors, and of unit vectors that a mask has multiplied, as in the recipe `paper`."""
    v, t, a, w, valid = sample(d=32)
    v, t = (torch.nn.functional.normalize(x.detach().float(), dim=-1) for x in (v, t))
    if masked:
        v, t = v * (a[..., None] / 1.1).detach().float(), t * (w[..., None] / 1.1).detach().float()
    leaves = [x.detach().float().requires_grad_() for x in (v, t, a, w)]
    exact = both(*leaves[:2], valid, *leaves[2:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = both(*leaves[:2], valid, *leaves[2:])
        inside = torch.autograd.grad(low.sum(), leaves, retain_graph=True)    # bad style, but not to fail for
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, exact, atol=0.02, rtol=0)
    outside = torch.autograd.grad(low.sum(), leaves)
    for x, same, y in zip(outside, inside, torch.autograd.grad(exact.sum(), leaves)):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, same)
        assert (x - y).norm() < 0.3 * y.norm()  # a maximum may fall on another, nearly equal, product


class Largest(TorchDispatchMode):
    """Remembers the largest storage that any operation returns."""
    nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.nbytes = max(self.nbytes, x.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("way", ["packed", "fused"])
def test_never_holds_the_four_dimensional_tensor(way, monkeypatch):
    choose(monkeypatch, way, block=8, tile=2 ** 15)
    I, L, T, M, d = 24, 40, 40, 30, 4
    v, t, a, w, valid = sample(I, L, T, M, d, torch.float32)
    with Largest() as largest:
        both(v, t, valid, a, w).sum().backward()
    maxima = 8 * I * max(L * T, T * M)                          # 64 bits for each (i,l,t) or (i,t,m)
    image = 4 * L * T * M                                       # the products of one image
    assert largest.nbytes <= max(maxima, image) < 4 * I * L * T * M / 10
    with torch.no_grad(), Largest() as largest:
        both(v, t, valid, a, w)
    assert largest.nbytes <= max(4 * 2 ** 15, 8 * I * 8 * M)    # a tile, or the weighted maxima of a block
