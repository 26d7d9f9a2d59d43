"""The method against literal references in float64, and the traps that masks, prompts and variances fall into."""
import math

import pytest
import torch
import torch.nn.functional as F

from modules import (GRM, GaussianSampler, ImageFeatures, ModelError, RegionPrompts, SignificanceAdapter, TextFeatures,
                     budget_shift, build_grm, build_image_encoder, build_text_encoder, consistency_loss, contrastive_loss,
                     diagnostics, entropy_loss, kl_loss, token_similarity, without_special_tokens)

torch.manual_seed(0)


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


# ---------------------------------------------------------------------------------------------------------- the adapters

def scores(adapter, tokens):
    """The difference of the two logits of each token (L, d), written out."""
    logits = [adapter.logits.weight @ F.gelu(adapter.hidden.weight @ v + adapter.hidden.bias) + adapter.logits.bias for v in tokens]
    return torch.stack([keep - drop for keep, drop in logits])


@pytest.mark.parametrize("keep", [0.5, 0.2])
def test_the_mask_in_evaluation_is_the_softmax_of_two_linear_maps_with_the_mean_keep(keep):
    adapter, tokens = SignificanceAdapter(8, 0.5, keep).double().eval(), 4 * torch.randn(2, 5, 8, dtype=torch.float64)
    mask = adapter(tokens)
    for b in range(2):
        score = scores(adapter, tokens[b])
        shift = score[0] - mask[b, 0].double().logit()                                           # the same for every token
        torch.testing.assert_close(mask[b].double(), (score - shift).exp() / ((score - shift).exp() + 1), rtol=0, atol=1e-4)
    torch.testing.assert_close(mask.mean(1), torch.full((2,), keep), rtol=0, atol=1e-5, check_dtype=False)
    assert torch.equal(adapter(tokens), mask)


def test_the_gradient_of_the_shift_is_that_of_its_implicit_function():
    score = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    valid = torch.arange(7) < torch.tensor([[7], [4], [1]])
    assert torch.autograd.gradcheck(lambda s: budget_shift(s, valid, 0.3), (score,))


def test_the_mask_in_training_is_a_gumbel_softmax_draw():
    """P(mask > 1/2) is the softmax probability, and a lower temperature moves the masks to 0 and 1."""
    adapter, tokens = SignificanceAdapter(8, tau=1.0), (3 * torch.randn(1, 4, 8)).expand(20_000, 4, 8)
    adapter.train()
    kept = (adapter(tokens) > 0.5).float().mean(0)
    torch.testing.assert_close(kept, adapter.eval()(tokens)[0], rtol=0, atol=0.02)
    assert kept.std() > 0.03
    adapter.train()
    soft = adapter(tokens)
    adapter.tau = 0.1
    assert (adapter(tokens) - 0.5).abs().mean() > (soft - 0.5).abs().mean() + 0.1


@pytest.mark.parametrize("training", [True, False])
def test_the_mask_is_0_where_a_token_is_padding_and_in_0_1_elsewhere(training):
    adapter = SignificanceAdapter(8, 1.0).train(training)
    valid = torch.tensor([[True, True, False], [True, False, False]])
    mask = adapter(100 * torch.randn(2, 3, 8), valid)
    assert mask.shape == (2, 3) and (mask[~valid] == 0).all() and (mask >= 0).all() and (mask <= 1).all()


def test_masks_have_a_budget_so_they_cannot_all_be_one():
    """Trap 2: whatever bias the adapter learns, the mask of an image keeps its mean; padding has no part in it."""
    adapter, tokens, valid = SignificanceAdapter(8, 1.0).eval(), torch.randn(1, 6, 8), torch.arange(6)[None] < 4
    mask = adapter(tokens, valid)
    assert mask[valid].mean().item() == pytest.approx(0.5, abs=1e-5)
    with torch.no_grad():
        adapter.logits.bias[0] += 100
    torch.testing.assert_close(adapter(tokens, valid), mask, rtol=0, atol=1e-5)
    torch.testing.assert_close(adapter(tokens[:, :4]), mask[:, :4])
    assert torch.isfinite(adapter(tokens, torch.zeros_like(valid))).all()                        # nothing valid at all


def test_special_tokens_are_no_words_unless_a_caption_has_no_others():
    lengths = torch.tensor([5, 3, 2, 1, 0])
    words = without_special_tokens(torch.arange(6) < lengths[:, None])
    assert [row.nonzero().flatten().tolist() for row in words] == [[1, 2, 3], [1], [0, 1], [0], []]


# ------------------------------------------------------------------------------------------------------ regions and noise

@pytest.mark.parametrize("masked", [True, False])
def test_region_prompts_are_the_papers_formula(masked):
    prompts, tokens = RegionPrompts(6, 3).double(), unit(2, 7, 6)
    mask = torch.rand(2, 7, dtype=torch.float64) if masked else None
    means, attention = prompts(tokens, mask)
    for b in range(2):
        for k in range(3):
            p = prompts.prompts[k] / prompts.prompts[k].norm()
            a = torch.stack([torch.sigmoid(prompts.log_scale.exp() * v @ p + prompts.bias) for v in tokens[b]])
            a = a * mask[b] if masked else a
            a = a / a.sum()
            torch.testing.assert_close(attention[b, :, k].double(), a, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(means[b, k], sum(a[l] * tokens[b, l] for l in range(7)), rtol=1e-5, atol=1e-6)


def test_masked_tokens_have_no_part_in_a_region_even_if_hardly_any_is_left():
    prompts, mask = RegionPrompts(6, 3), torch.tensor([[0., 0., 1e-6, 0.], [0., 0., 0., 0.]])
    means, attention = prompts(unit(2, 4, 6).float(), mask)
    assert attention.isfinite().all() and means.isfinite().all()
    assert (attention[mask == 0] == 0).all()
    torch.testing.assert_close(attention[0].sum(0), torch.ones(3))


def test_a_prompt_separates_the_tokens_that_point_its_way():
    """Trap 3: with the bare sigmoid the largest attention is at most 2.7 times the smallest, all regions the global mean."""
    prompts = RegionPrompts(64, 2)
    with torch.no_grad():
        prompts.prompts.copy_(torch.eye(64)[:2])
    tokens = torch.eye(64)[[0] * 5 + [1] * 5][None]
    means, attention = prompts(tokens)
    assert attention[0, 0, 0] / attention[0, 9, 0] > 20
    assert F.cosine_similarity(means[0, 0], means[0, 1], dim=0) < 0.3


def test_one_draw_per_region_has_the_literal_samplers_mean_and_variance():
    """u_k = sum_l A_lk (mu_k + eps_lk sigma_k), the (L, K, d) noise drawn in full, against the (K, d) draw."""
    draws, L, K, d = 20_000, 6, 2, 3
    sampler = GaussianSampler(d).train()
    torch.nn.init.normal_(sampler.log_var.weight)
    means, attention = torch.randn(1, K, d).expand(draws, K, d), torch.rand(1, L, K).softmax(1) ** 2
    attention = (attention / attention.sum(1, keepdim=True)).expand(draws, L, K)
    with torch.no_grad():
        cheap, log_var = sampler(means, attention)
    z = means[:, None] + torch.randn(draws, L, K, d) * (0.5 * log_var).exp()[:, None]
    literal = (attention[..., None] * z).sum(1)
    torch.testing.assert_close(cheap.mean(0), literal.mean(0), rtol=0, atol=0.03)
    torch.testing.assert_close(cheap.var(0), literal.var(0), rtol=0.06, atol=0)
    torch.testing.assert_close(cheap.var(0), (log_var.exp() * attention.square().sum(1)[..., None])[0], rtol=0.06, atol=0)
    assert cheap.var(0).std() > 0                                                # the comparison is not of equal constants


def test_the_sampler_is_silent_in_evaluation():
    sampler, means = GaussianSampler(4).eval(), torch.randn(2, 3, 4)
    regions, log_var = sampler(means, torch.rand(2, 5, 3))
    assert torch.equal(regions, means) and log_var.shape == means.shape


def test_signal_survives_the_prior():
    """Trap 5: at the prior's own variance a region gathered from a few alike tokens is mostly signal."""
    sampler = GaussianSampler(256).train()
    means, attention = unit(50, 4, 256).float(), torch.full((50, 16, 4), 1 / 16)
    regions, _ = sampler(means, attention)
    assert F.cosine_similarity(regions, means, dim=-1).mean() > 0.9


# ------------------------------------------------------------------------------------------------------------- the losses

def literal_contrastive(s, ids, kind, temperature=0.05, margin=0.2):
    total, n = 0.0, len(s)
    for way in (s, s.T):
        for i in range(n):
            negatives = [way[i, j] for j in range(n) if ids[i] != ids[j]]
            if kind == "infonce":
                z = sum(math.exp(x / temperature) for x in [way[i, i], *negatives])
                total += -math.log(math.exp(way[i, i] / temperature) / z)
            elif negatives:
                total += max(0.0, margin + max(negatives).item() - way[i, i].item())
    return total / (2 * n)


@pytest.mark.parametrize("kind", ["infonce", "triplet"])
@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4], [0, 1, 0, 2, 1], [0, 0, 0, 0, 0]])
def test_contrastive_loss_is_its_formula(kind, ids):
    s = 0.3 * torch.randn(5, 5, dtype=torch.float64)
    value = contrastive_loss(s, torch.tensor(ids), kind)
    assert value.item() == pytest.approx(literal_contrastive(s, ids, kind), rel=1e-5)


@pytest.mark.parametrize("kind", ["infonce", "triplet"])
def test_other_captions_of_the_image_are_never_negatives(kind):
    s = torch.zeros(3, 3, requires_grad=True)
    contrastive_loss(s, torch.tensor([7, 7, 9]), kind).backward()
    assert s.grad[0, 1] == 0 and s.grad[1, 0] == 0 and s.grad[0, 0] < 0 and s.grad[0, 2] > 0


def test_an_unknown_loss_is_named():
    with pytest.raises(ModelError, match="infonce, triplet"):
        contrastive_loss(torch.zeros(2, 2), torch.arange(2), "hinge")


def test_consistency_loss_is_its_formula():
    means, tokens, mask = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.rand(2, 5)
    expected = sum(sum((means[b, :, c].mean() - (mask[b] * tokens[b, :, c]).sum() / mask[b].sum()) ** 2 for c in range(4))
                   for b in range(2)) / 2
    torch.testing.assert_close(consistency_loss(means, tokens, mask), expected)
    assert consistency_loss(tokens.mean(1, keepdim=True), tokens).item() == pytest.approx(0, abs=1e-9)


def test_kl_loss_is_the_divergence_from_the_prior():
    means, log_var = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(means, (0.5 * log_var).exp()), normal(0.0, 4 ** -0.5)).mean()
    torch.testing.assert_close(kl_loss(means, log_var), expected)


def test_entropy_loss_is_0_for_even_attention_and_1_for_one_token():
    one = F.one_hot(torch.tensor([[2, 0]]), 4).float().transpose(1, 2)                           # (1, 4, 2)
    assert entropy_loss(torch.full((1, 4, 2), 0.25)).item() == pytest.approx(0, abs=1e-6)
    assert entropy_loss(one).item() == pytest.approx(1)
    a = torch.rand(2, 5, 3).softmax(1)
    literal = -sum(a[b, l, k] * a[b, l, k].log() for b in range(2) for l in range(5) for k in range(3)) / 6
    assert entropy_loss(a).item() == pytest.approx(1 - literal.item() / math.log(5), rel=1e-5)


def test_a_mask_of_0_leaves_the_gradient_of_the_entropy_finite():
    tokens, mask = torch.randn(1, 4, 6, requires_grad=True), torch.tensor([[0.5, 0., 1., 0.]], requires_grad=True)
    _, attention = RegionPrompts(6, 3)(tokens, mask)
    entropy_loss(attention).backward()
    assert tokens.grad.isfinite().all() and mask.grad.isfinite().all() and tokens.grad.abs().sum() > 0


# -------------------------------------------------------------------------------------------------------------- the model

def batch(model, size=4, longest=9, vocab=50):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 64, 64, generator=generator)
    ids = torch.randint(5, vocab, (size, longest), generator=generator)
    valid = torch.arange(longest) < torch.randint(3, longest + 1, (size, 1), generator=generator)
    return images, ids * valid, valid


def test_levels_are_the_papers_three_pairs(tiny_model):
    model = tiny_model.eval()
    image, text = model(*batch(model))
    scores = model.similarity(image, text)
    plain = token_similarity(image.tokens, text.tokens, text.valid)
    masked = token_similarity(image.tokens, text.tokens, text.valid, image.mask, text.mask)
    whole = F.normalize((image.mask[..., None] * image.tokens).sum(1, keepdim=True), dim=-1)
    mixture = sum(token_similarity(regions, text.tokens, text.valid, None, text.mask)
                  for regions in (F.normalize(image.means, dim=-1), whole)) / 2
    for name, expected in (("ori", plain), ("key", masked), ("unc", mixture), ("combined", .4 * plain + .4 * masked + .2 * mixture)):
        torch.testing.assert_close(scores[name], expected, msg=lambda m: f"{name}: {m}")
    assert (plain - masked).abs().max() > 1e-4


def test_the_attention_starts_at_the_scale_of_the_configuration(tiny_config):
    tiny_config["model"]["prompt_scale"] = 40.0
    prompts = build_grm(tiny_config, vocab_size=120, pad_id=0).region_prompts
    assert prompts.log_scale.exp().item() == pytest.approx(40) and prompts.bias.item() == -20


def test_each_modality_has_its_own_budget(tiny_config):
    tiny_config["model"] |= {"image_keep": 0.2, "text_keep": 0.7}
    model = build_grm(tiny_config, vocab_size=120, pad_id=0).eval()
    image, text = model(*batch(model))
    torch.testing.assert_close(image.mask.mean(1), torch.full((4,), 0.2), rtol=0, atol=1e-4)
    torch.testing.assert_close(text.mask.sum(1) / text.valid.sum(1), torch.full((4,), 0.7), rtol=0, atol=1e-4)


def test_the_text_mask_judges_words_before_they_read_each_other(tiny_model):
    ids = torch.tensor([[2, 7, 8, 9, 3], [2, 9, 7, 8, 3]])                       # the same three words in another order
    text = tiny_model.eval().encode_text(ids, ids > 0)
    torch.testing.assert_close(text.mask[0, 1:4], text.mask[1, [2, 3, 1]], rtol=0, atol=1e-6)
    assert (text.tokens[0, 1:4] - text.tokens[1, [2, 3, 1]]).abs().max() > 1e-2  # which the tokens do
    assert text.mask[0, 1:4].std() > 1e-3
    # The budget shifts a caption's logits alike, so it leaves their differences: those of the adapter's formula over LayerNorm's
    embedded = tiny_model.text_encoder.get_input_embeddings().weight.detach().double()[[7, 8, 9]]
    read = (embedded - embedded.mean(1, keepdim=True)) / (embedded.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    adapter = tiny_model.text_adapter.double()
    logits = adapter.logits(F.gelu(adapter.hidden(read)))
    score = (logits[:, 0] - logits[:, 1]).detach()
    torch.testing.assert_close(text.mask[0, 1:4].logit().diff().double(), score.diff(), rtol=0, atol=1e-4)


def test_the_text_adapter_is_as_wide_as_the_words_embeddings(tiny_config):
    """Encoders such as ALBERT and ELECTRA embed words in fewer dimensions than they work in."""
    tiny_config["text"]["options"] = {"model_type": "electra", "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 1,
                                      "num_attention_heads": 2, "intermediate_size": 32}
    model = build_grm(tiny_config, vocab_size=120, pad_id=0)
    assert model.text_adapter.hidden.in_features == 16
    assert model.encode_text(*batch(model)[1:]).mask.shape == (4, 9)


def test_a_mask_acts_as_weights_not_as_a_scale(tiny_model):
    """Traps 1 and 2: the mask is not cancelled by the cosine, and halving all of it changes nothing, so nothing pushes it
    towards one."""
    model = tiny_model.eval()
    image, text = model(*batch(model))
    key = model.similarity(image, text)["key"]
    halved = model.similarity(image._replace(mask=image.mask / 2), text._replace(mask=text.mask / 2))["key"]
    torch.testing.assert_close(key, halved)
    first_half = image.mask * (torch.arange(image.mask.shape[1]) < image.mask.shape[1] // 2)
    assert (model.similarity(image._replace(mask=first_half), text)["key"] - key).abs().max() > 1e-3


def test_a_level_of_weight_0_is_neither_computed_nor_learnt(tiny_config):
    tiny_config["loss"].update(key=0.0, unc=0.0)
    model = build_grm(tiny_config, 50, 0)
    image, text = model(*batch(model))
    assert set(model.similarity(image, text)) == {"ori", "combined"}
    loss, terms = model.loss(image, text, torch.arange(4), tiny_config["loss"])
    loss.backward()
    assert set(terms) == {"ori"} and model.image_adapter.hidden.weight.grad is None


def test_the_loss_is_the_weighted_sum_of_its_terms(tiny_model, tiny_config):
    image, text = tiny_model(*batch(tiny_model))
    weights = tiny_config["loss"]
    total, terms = tiny_model.loss(image, text, torch.arange(4), weights)
    assert set(terms) == {"ori", "key", "unc", "consistency", "kl", "entropy"}
    assert total.item() == pytest.approx(sum(weights[name] * term.item() for name, term in terms.items()), rel=1e-5)
    total.backward()
    silent = [name for name, p in tiny_model.named_parameters() if p.grad is None and "pooler" not in name]
    assert all(name.startswith(("image_encoder.fc_norm", "image_encoder.head")) for name in silent), silent


def test_padding_and_batch_order_change_nothing(tiny_model):
    model = tiny_model.eval()
    images, ids, valid = batch(model, size=9)
    with torch.no_grad():
        alone = model.similarity(*model(images, ids, valid))["combined"]
        wide = model.similarity(*model(images, F.pad(ids, (0, 7)), F.pad(valid, (0, 7))))["combined"]
        order = torch.randperm(9)
        shuffled = model.similarity(*model(images[order], ids[order], valid[order]))["combined"]
        single = model.similarity(model.encode_image(images), model.encode_text(ids[:1], valid[:1]))["combined"]
    torch.testing.assert_close(wide, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(shuffled, alone[order][:, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(single, alone[:, :1], rtol=0, atol=1e-5)


def test_diagnostics_tell_collapsed_regions_from_distinct_ones():
    tokens, valid = unit(2, 6, 8).float(), torch.ones(2, 3, dtype=torch.bool)
    text = TextFeatures(unit(2, 3, 8).float(), valid, torch.tensor([[0., 1., 0.], [1., 0., 1.]]))
    attention = torch.full((2, 6, 3), 1 / 6)
    def image(means):
        return ImageFeatures(tokens, torch.rand(2, 6), means, means, attention, torch.full((2, 3, 8), -math.log(8)))
    same, apart = diagnostics(image(torch.ones(2, 3, 8)), text), diagnostics(image(torch.eye(8)[:3].expand(2, 3, 8)), text)
    assert same["region_cosine"].item() == pytest.approx(1) and apart["region_cosine"].item() == pytest.approx(0, abs=1e-6)
    assert apart["region_snr"].item() == pytest.approx(6)                     # |mu|^2 = 1, noise d * 1/d * 6 * (1/6)^2 = 1/6
    assert apart["text_mask_mean"].item() == pytest.approx(0.5)


# ----------------------------------------------------------------------------------------------------------- the encoders

@pytest.mark.parametrize("name, size, tokens", [
    ("vit_tiny_patch16_224", 224, 196), ("vit_tiny_patch16_384", 384, 576), ("swin_tiny_patch4_window7_224", 224, 49),
    ("swin_base_patch4_window12_384", 384, 144), ("vit_tiny_patch16_224", 112, 49), ("resnet18", 96, 9)])
def test_every_encoders_grid_becomes_tokens_without_class_token(name, size, tokens):
    encoder = build_image_encoder({"name": name, "weights": None, "size": size, "options": {}}, pretrained=False)
    text = build_text_encoder({"name": None, "options": {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}},
                              pretrained=False, vocab_size=9, pad_id=0)
    model = GRM(encoder, text, dim=16, num_prompts=3).eval()
    with torch.no_grad():
        image = model.encode_image(torch.randn(1, 3, size, size))
    assert image.tokens.shape == (1, tokens, 16) and image.regions.shape == (1, 3, 16)
    torch.testing.assert_close(image.tokens.norm(dim=-1), torch.ones(1, tokens))


def test_the_grid_is_read_in_row_order():
    """A patch's token must be where the picture is: change one corner and only tokens near that corner move."""
    encoder = build_image_encoder({"name": "swin_tiny_patch4_window7_224", "weights": None, "size": 224, "options": {}}, False)
    images = torch.zeros(2, 3, 224, 224)
    images[1, :, :16, 200:] = 3                                                                  # top right
    with torch.no_grad():
        grid = encoder.eval().forward_features(images)
    moved = (grid[1] - grid[0]).norm(dim=-1).flatten()
    assert moved.argmax() % 7 >= 4 and moved.argmax() // 7 <= 2


def test_an_unknown_image_encoder_is_answered_with_close_names():
    with pytest.raises(ModelError, match="vit_tiny_patch16_224"):
        build_image_encoder({"name": "vit_tiny_patch16_22", "weights": None, "size": 224, "options": {}}, False)
