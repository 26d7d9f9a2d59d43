"""The parts of the method, and what recipe `grm` changes. That recipe `paper` is the paper is shown in
test_paper.py."""
import math

import pytest
import torch
import torch.nn.functional as F

import runs
from conftest import CONFIG, TINY
from modules import (GaussianSampler, ImageFeatures, RegionPrompts, SignificanceAdapter,
                     TextFeatures, budget_shift, build_grm, consistency_loss, contrastive_loss, diagnostics,
                     entropy_loss, kl_loss, region_gates)
from similarity import reference_similarity, token_similarity


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


@pytest.fixture
def model(recipe):
    torch.manual_seed(0)
    return build_grm(runs.load_config(CONFIG, "vit_micro", recipe, sets=TINY), vocab_size=120, pad_id=0)


def batch(size=4, longest=9):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 64, 64, generator=generator)
    lengths = torch.randint(4, longest + 1, (size, 1), generator=generator)
    ids, place = torch.randint(5, 120, (size, longest), generator=generator), torch.arange(longest)
    valid = place < lengths
    return images, ids * valid, valid, valid & (place > 0) & (place < lengths - 1)


# ---- the adapters ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_with_a_budget_the_mask_is_a_shifted_softmax_of_the_wanted_mean(keep, tau):
    adapter, tokens = SignificanceAdapter(8, tau, keep).double().eval(), 4 * torch.randn(2, 5, 8).double()
    mask = adapter(tokens).double()
    D = adapter.logits(F.gelu(adapter.hidden(tokens)))
    score = (D[..., 1] - D[..., 0]) / tau
    shift = score[:, :1] - mask[:, :1].logit()                                   # the same for every token
    torch.testing.assert_close(mask, (score - shift).sigmoid(), rtol=0, atol=1e-4)
    torch.testing.assert_close(mask.mean(1), torch.full((2,), keep).double(), rtol=0, atol=1e-5)


def test_the_gradient_of_the_budgets_shift_is_that_of_its_implicit_function():
    score = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(7) < torch.tensor([[7], [4], [1]])
    assert torch.autograd.gradcheck(lambda s: budget_shift(s, valid, 0.3), (score,))


@pytest.mark.parametrize("keep", [None, 0.4])
def test_a_mask_in_training_is_kept_as_often_as_the_softmax_says(keep):
    adapter, tokens = SignificanceAdapter(8, 1.0, keep), (3 * torch.randn(1, 4, 8)).expand(20_000, 4, 8)
    kept = (adapter.train()(tokens) > 0.5).float().mean(0)
    torch.testing.assert_close(kept, adapter.eval()(tokens)[0], rtol=0, atol=0.02)
    assert kept.std() > 0.03


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("keep", [None, 0.5])
def test_a_mask_is_0_on_padding_and_between_0_and_1_elsewhere(training, keep):
    adapter = SignificanceAdapter(8, 1.0, keep).train(training)
    valid = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    mask = adapter(100 * torch.randn(3, 3, 8), valid)
    assert mask.shape == (3, 3) and (mask[~valid] == 0).all() and (mask >= 0).all() and (mask <= 1).all()


def test_a_budget_holds_whatever_bias_the_adapter_learns_and_ignores_padding():
    adapter, tokens = SignificanceAdapter(8, 1.0, 0.5).eval(), torch.randn(1, 6, 8)
    valid = torch.arange(6)[None] < 4
    mask = adapter(tokens, valid)
    assert mask[valid].mean().item() == pytest.approx(0.5, abs=1e-5)
    with torch.no_grad():
        adapter.logits.bias[0] += 100
    torch.testing.assert_close(adapter(tokens, valid), mask, rtol=0, atol=1e-5)
    torch.testing.assert_close(adapter(tokens[:, :4]), mask[:, :4])


# ---- regions -----------------------------------------------------------------------------------------------
def test_masked_tokens_have_no_part_in_a_region_even_if_hardly_any_is_left():
    prompts, mask = RegionPrompts(6, 3, 20.0), torch.tensor([[0., 0., 1e-6, 0.], [0., 0., 0., 0.]])
    tokens = unit(2, 4, 6).float()
    means, attention, scores = prompts(tokens, mask)
    assert attention.isfinite().all() and means.isfinite().all() and (attention[mask == 0] == 0).all()
    torch.testing.assert_close(attention[0].sum(0), torch.ones(3))
    torch.testing.assert_close(means, attention.transpose(1, 2) @ tokens)
    P = F.normalize(prompts.prompts, dim=-1)
    torch.testing.assert_close(scores, torch.sigmoid(20 * tokens @ P.T - 10))


def test_with_a_scale_a_prompt_separates_tokens_that_a_bare_sigmoid_does_not():
    tokens = torch.eye(64)[[0] * 5 + [1] * 5][None]
    cosines = []
    for scale in (None, 20.0):
        prompts = RegionPrompts(64, 2, scale)
        with torch.no_grad():
            prompts.prompts.copy_(torch.eye(64)[:2])
        means, _, _ = prompts(tokens)
        cosines.append(F.cosine_similarity(means[0, 0], means[0, 1], dim=0))
    assert cosines[0] > 0.9 and cosines[1] < 0.3


def test_one_draw_for_a_region_has_the_distribution_of_the_papers_draws():
    """u_k = sum_l A_lk (mu_k + eps_lk sigma_k) with all L noises drawn, against the one that is drawn."""
    draws, L, K, d = 20_000, 6, 2, 3
    sampler = GaussianSampler(d, prior=0.5).train()
    torch.nn.init.normal_(sampler.log_var.weight)
    means, attention = torch.randn(1, K, d).expand(draws, K, d), torch.rand(1, L, K).softmax(1) ** 2
    attention = (attention / attention.sum(1, keepdim=True)).expand(draws, L, K)
    with torch.no_grad():
        once, log_var = sampler(means, attention)
    z = means[:, None] + torch.randn(draws, L, K, d) * (0.5 * log_var).exp()[:, None]
    literal = (attention[..., None] * z).sum(1)
    torch.testing.assert_close(once.mean(0), literal.mean(0), rtol=0, atol=0.04)
    torch.testing.assert_close(once.var(0), literal.var(0), rtol=0.06, atol=0)
    assert once.var(0).std() > 0                                               # not a comparison of constants


@pytest.mark.parametrize("prior", [1.0, 1 / 256])
def test_the_variance_starts_at_the_prior_and_evaluation_is_silent(prior):
    sampler, means = GaussianSampler(256, prior).eval(), torch.randn(2, 3, 256)
    regions, log_var = sampler(means, torch.rand(2, 5, 3))
    assert torch.equal(regions, means)
    torch.testing.assert_close(log_var, torch.full_like(means, math.log(prior)))


# ---- gates -------------------------------------------------------------------------------------------------
def test_gates_are_gumbel_sigmoids_in_training_and_open_or_closed_in_evaluation_one_always_open():
    logits = torch.tensor([[2.0, -1.0, 0.5], [-3.0, -2.0, -5.0]])
    assert region_gates(logits, False).tolist() == [[1, 0, 1], [0, 1, 0]]
    draws = torch.stack([region_gates(logits, True) for _ in range(4000)])
    assert (draws.amax(2) == 1).all() and draws[:, 0, 0].min() == draws[:, 1, 1].min() == 1
    for place in ((0, 1), (0, 2), (1, 0)):              # P(logit + logistic noise > 0) is the sigmoid
        share = (draws[:, *place] > 0.5).double().mean().item()
        assert share == pytest.approx(logits[place].sigmoid().item(), abs=0.03)


def test_a_closed_region_has_similarity_0_and_no_weight_and_the_open_ones_are_weighted_alike():
    torch.manual_seed(0)
    sets = [*TINY, "model.gates=true", "model.num_prompts=6"]
    config = runs.load_config(CONFIG, "vit_micro", "grm", sets=sets)
    model = build_grm(config, 120, 0)
    torch.nn.init.normal_(model.gate.weight, std=2)
    image, text = model.eval()(*batch())
    assert set(image.gates.unique().tolist()) == {0, 1}
    regions = (F.normalize(image.regions, dim=-1) * image.gates[..., None]).double()
    expected = reference_similarity(regions, text.tokens.double(), text.valid, image.gates.double(),
                                    text.mask.double())
    torch.testing.assert_close(model.similarity(image, text)["unc"], expected.float(), rtol=0, atol=1e-5)
    other = torch.where(image.gates[..., None] > 0, image.regions, torch.randn_like(image.regions))
    unc = model.similarity(image._replace(regions=other), text)["unc"]
    torch.testing.assert_close(unc, expected.float(), rtol=0, atol=1e-5)


# ---- the losses --------------------------------------------------------------------------------------------
def literal_contrastive(s, ids, kind, hardest):
    n, loss = len(s), 0.0
    for way in (s.tolist(), s.T.tolist()):
        for i in range(n):
            negatives = [way[i][j] for j in range(n) if ids[i] != ids[j]]
            if kind == "infonce":
                partition = sum(math.exp(x / 0.05) for x in [way[i][i], *negatives])
                loss -= math.log(math.exp(way[i][i] / 0.05) / partition) / (2 * n)
            else:
                costs = [max(0.0, 0.2 + x - way[i][i]) for x in negatives]
                loss += (max if hardest else sum)(costs, **({"default": 0.0} if hardest else {}))
    return loss


@pytest.mark.parametrize("kind, hardest", [("infonce", True), ("triplet", True), ("triplet", False)])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1], [0, 0, 0, 0, 0]])
def test_the_contrastive_loss_is_its_formula(kind, hardest, ids):
    s = 0.3 * torch.randn(5, 5, dtype=torch.float64)
    value = contrastive_loss(s, torch.tensor(ids), kind, hardest=hardest)
    assert value.item() == pytest.approx(literal_contrastive(s, ids, kind, hardest), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind, hardest", [("infonce", True), ("triplet", True), ("triplet", False)])
def test_other_captions_of_the_image_are_never_negatives(kind, hardest):
    s = torch.zeros(3, 3, requires_grad=True)
    contrastive_loss(s, torch.tensor([7, 7, 9]), kind, hardest=hardest).backward()
    assert s.grad[0, 1] == 0 and s.grad[1, 0] == 0 and s.grad[0, 0] < 0 and s.grad[0, 2] > 0


def test_an_unknown_loss_is_named():
    with pytest.raises(ValueError, match="triplet, infonce"):
        contrastive_loss(torch.zeros(2, 2), torch.arange(2), "hinge")


@pytest.mark.parametrize("prior", [1.0, 0.25])
def test_the_kl_loss_is_the_divergence_from_the_prior(prior):
    means, log_var, normal = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.distributions.Normal
    posterior, wanted = normal(means, (0.5 * log_var).exp()), normal(0.0, prior ** 0.5)
    divergence = torch.distributions.kl_divergence(posterior, wanted)
    torch.testing.assert_close(kl_loss(means, log_var, prior), divergence.mean())


def test_the_consistency_loss_is_0_where_regions_and_tokens_have_the_same_mean():
    tokens = torch.randn(2, 5, 4)
    regions = tokens.mean(1, keepdim=True).expand(2, 3, 4)
    assert consistency_loss(regions, tokens).item() == pytest.approx(0, abs=1e-9)
    assert consistency_loss(regions + 1, tokens).item() == pytest.approx(4)  # a distance of 1 in 4 components


def test_a_score_of_0_leaves_the_gradient_of_the_entropy_finite():
    scores = torch.tensor([[[0.0], [0.5], [1.0]]], requires_grad=True)
    entropy_loss(scores).backward()
    assert scores.grad.isfinite().all() and scores.grad[0, 1] != 0


# ---- the model ---------------------------------------------------------------------------------------------
def test_the_levels_of_recipe_grm_are_their_formulas(tiny_model):
    """The masks weight the means."""
    model = tiny_model.eval()
    image, text = model(*batch())
    scores = model.similarity(image, text)
    plain = token_similarity(image.tokens, text.tokens, text.valid)
    masked = token_similarity(image.tokens, text.tokens, text.valid, image.mask, text.mask)
    unc = token_similarity(F.normalize(image.means, dim=-1), text.tokens, text.valid, None, text.mask)
    expected = {"ori": plain, "key": masked, "unc": unc, "combined": .4 * plain + .4 * masked + .2 * unc}
    for name, value in expected.items():
        torch.testing.assert_close(scores[name], value, msg=lambda text, name=name: f"{name}: {text}")
    assert (plain - masked).abs().max() > 1e-4
    halved = model.similarity(image._replace(mask=image.mask / 2), text._replace(mask=text.mask / 2))
    torch.testing.assert_close(halved["key"], masked)                           # weights, not a scale


def test_recipe_grm_reads_unit_tokens_and_the_scaled_prior(tiny_model):
    model = tiny_model.eval()
    image, _ = model(*batch())
    means, attention, _ = model.region_prompts(image.tokens, image.mask)
    torch.testing.assert_close(image.means, means)
    mean = (image.mask[..., None] * image.tokens).sum(1, keepdim=True) / image.mask.sum(1)[:, None, None]
    torch.testing.assert_close(image.token_mean, mean)
    assert model.sampler.prior == pytest.approx(1 / image.tokens.shape[-1])


def test_each_modality_has_its_own_budget(tiny_config):
    tiny_config["model"] |= {"image_keep": 0.2, "text_keep": 0.7}
    image, text = build_grm(tiny_config, vocab_size=120, pad_id=0).eval()(*batch())
    torch.testing.assert_close(image.mask.mean(1), torch.full((4,), 0.2), rtol=0, atol=1e-4)
    torch.testing.assert_close(text.mask.sum(1) / text.valid.sum(1), torch.full((4,), 0.7), rtol=0, atol=1e-4)


@pytest.mark.parametrize("reads, same", [("embeddings", True), ("outputs", False)])
def test_the_text_mask_judges_words_by_themselves_or_in_context(tiny_config, reads, same):
    tiny_config["model"]["text_mask_reads"] = reads
    torch.manual_seed(0)
    model = build_grm(tiny_config, vocab_size=120, pad_id=0).eval()
    ids = torch.tensor([[2, 7, 8, 9, 3], [2, 9, 7, 8, 3]])                   # the same words in another order
    text = model.encode_text(ids, ids > 0, torch.tensor([0, 1, 1, 1, 0]).bool().expand(2, 5))
    difference = (text.mask[0, 1:4] - text.mask[1, [2, 3, 1]]).abs().max()
    assert (difference < 1e-6) == same and text.mask[0, 1:4].std() > 1e-4


def test_the_text_adapter_is_as_wide_as_the_words_embeddings(tiny_config):
    """Encoders such as ALBERT and ELECTRA embed words in fewer dimensions than they work in."""
    tiny_config["text"]["options"] = {"embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 1,
                                      "num_attention_heads": 2, "intermediate_size": 32,
                                      "model_type": "electra"}
    model = build_grm(tiny_config, vocab_size=120, pad_id=0)
    assert model.text_adapter.hidden.in_features == 16
    assert model.encode_text(*batch()[1:]).mask.shape == (4, 9)


@pytest.mark.parametrize("special", [True, False])
def test_special_tokens_are_among_the_tokens_if_asked_for(tiny_config, special):
    tiny_config["model"]["special_tokens"] = special
    model = build_grm(tiny_config, vocab_size=120, pad_id=0).eval()
    images, ids, valid, words = batch()
    image, text = model(images, ids, valid, words)
    assert image.tokens.shape[1] == 16 + special and model.class_tokens == int(special)
    assert torch.equal(text.valid, valid if special else words)
    patches = F.normalize(model.image_proj(model.image_encoder(images))[:, 1:], dim=-1)
    torch.testing.assert_close(image.tokens[:, model.class_tokens:], patches)


def test_a_level_of_weight_0_is_neither_computed_nor_learnt(recipe):
    alone = ["loss.ori=1", "loss.key=0", "loss.unc=0"]
    config = runs.load_config(CONFIG, "vit_micro", recipe, sets=[*TINY, *alone])
    model = build_grm(config, 120, 0)
    image, text = model(*batch())
    assert set(model.similarity(image, text)) == {"ori", "combined"}
    loss, terms = model.loss(image, text, torch.arange(4), config["loss"])
    loss.backward()
    assert set(terms) == {"ori"} and model.image_adapter.hidden.weight.grad is None


def test_the_loss_is_the_weighted_sum_of_its_terms_and_reaches_every_weight(model, recipe):
    image, text = model(*batch())
    weights = runs.load_config(CONFIG, "vit_micro", recipe)["loss"]
    total, terms = model.loss(image, text, torch.arange(4), weights)
    assert set(terms) == {"ori", "key", "unc", "consistency", "kl", "entropy"}
    weighted = sum(weights[name] * term.item() for name, term in terms.items())
    assert total.item() == pytest.approx(weighted, rel=1e-5)
    total.backward()
    silent = {name for name, p in model.named_parameters() if p.grad is None}
    unused = ["pooler", "timm.fc_norm", "timm.head"]
    unused += ["log_scale", "prompts.bias"] if recipe == "paper" else []
    assert all(any(part in name for part in unused) for name in silent), silent


def test_padding_and_batch_order_change_nothing(model):
    model.eval()
    images, ids, valid, words = batch(size=9)
    with torch.no_grad():
        alone = model.similarity(*model(images, ids, valid, words))["combined"]
        wide = model.similarity(*model(images, *(F.pad(x, (0, 7)) for x in (ids, valid, words))))["combined"]
        order = torch.randperm(9)
        shuffled = model.similarity(*model(*(x[order] for x in (images, ids, valid, words))))["combined"]
        text = model.encode_text(ids[:1], valid[:1], words[:1])
        single = model.similarity(model.encode_image(images), text)
    torch.testing.assert_close(wide, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(shuffled, alone[order][:, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(single["combined"], alone[:, :1], rtol=0, atol=1e-5)


def test_diagnostics_tell_collapsed_regions_from_distinct_ones():
    tokens, valid = unit(2, 6, 8).float(), torch.ones(2, 3, dtype=torch.bool)
    text = TextFeatures(unit(2, 3, 8).float(), valid, torch.tensor([[0., 1., 0.], [1., 0., 1.]]), None)

    def figures(means):
        attention, log_var = torch.full((2, 6, 3), 1 / 6), torch.full((2, 3, 8), -math.log(8))
        image = ImageFeatures(tokens, torch.rand(2, 6), means, None, None, means, means, log_var, attention)
        return diagnostics(image, text)

    same, apart = figures(torch.ones(2, 3, 8)), figures(torch.eye(8)[:3].expand(2, 3, 8))
    assert same["region_cosine"].item() == pytest.approx(1)
    assert apart["region_cosine"].item() == pytest.approx(0, abs=1e-6)
    assert apart["text_mask_mean"].item() == pytest.approx(0.5)
