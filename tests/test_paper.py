"""Recipe `paper` is the paper: Eq. 1 to 13 computed one number at a time, in float64, in this file's own
words.

The references know the weights, what the encoders give, and the noise; they share no code with modules.py.
Where the paper is silent, they read it as README says: Eq. 7 takes dot products of unit tokens, which the
masks then multiply; evaluation has no noise; the regularisers are means.
"""
import math

import pytest
import torch

import modules
import runs
from conftest import CONFIG

I, L, T, M, WIDTH, D, K = 4, 6, 4, 7, 5, 8, 3             # images, patches, captions, tokens, widths, prompts
CLASS_TOKENS = 1
IMAGE_IDS = [0, 1, 1, 2]                                       # two captions of one image are no negatives


class Given(torch.nn.Module):
    """An encoder that gives what the test decided."""
    width = embedding_width = WIDTH
    class_tokens = CLASS_TOKENS

    def __init__(self, *output):
        super().__init__()
        self.output = output if len(output) > 1 else output[0]

    def forward(self, *inputs):
        return self.output


@pytest.fixture(params=[0, 1, 2])
def setting(request):
    """A model of recipe `paper` with random weights, and what its encoders give."""
    config = runs.load_config(CONFIG, "vit_micro", "paper", sets=[f"model.dim={D}", f"model.num_prompts={K}"])
    generator = torch.Generator().manual_seed(request.param)
    patches = torch.randn(I, CLASS_TOKENS + L, WIDTH, generator=generator)
    hidden = torch.randn(T, M, WIDTH, generator=generator)
    lengths = torch.randint(4, M + 1, (T, 1), generator=generator)
    place = torch.arange(M)
    valid, words = place < lengths, (place > 0) & (place < lengths - 1)          # [CLS] words [SEP] padding
    levels = {level: config["loss"][level] for level in modules.LEVELS}
    model = modules.GRM(Given(patches), Given(hidden, hidden, hidden[:, 0, :0]), levels, **config["model"])
    for parameter in model.parameters():                    # no weight may stay at a special value, such as 0
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
    for fixed in (model.region_prompts.log_scale, model.region_prompts.bias):
        fixed.data.zero_()                                     # not learned: Eq. 2 has neither scale nor bias
        assert not fixed.requires_grad
    return model, config["loss"], patches[:, CLASS_TOKENS:], hidden, valid, words


# ---- the equations -----------------------------------------------------------------------------------------
def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def gelu(x):
    return x * 0.5 * (1 + math.erf(x / math.sqrt(2)))


def linear(weights, name, x):
    matrix, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
    return [sum(matrix[o][i] * x[i] for i in range(len(x))) + bias[o] for o in range(len(bias))]


def norm(x):
    return math.sqrt(sum(a * a for a in x))


def dot(x, y):
    return sum(a * b for a, b in zip(x, y))


def times(x, factor):
    return [a * factor for a in x]


def total(vectors):
    return [sum(values) for values in zip(*vectors)]


def adapter(weights, name, tokens, tau, gumbel):
    """Eq. 1 -> A, one number a token."""
    mask = []
    for l, token in enumerate(tokens):
        D_l = linear(weights, f"{name}.logits", [gelu(x) for x in linear(weights, f"{name}.hidden", token)])
        drop, keep = (math.exp((d + g) / tau) for d, g in zip(D_l, gumbel[l]))
        mask.append(keep / (drop + keep))
    return mask


def regions_of(weights, V_hat, noise):
    """Eq. 2 to 6 for one image. noise: (K, d), the sum over patches of A^_lk eps_lk over its own standard
    deviation."""
    A_r, mu, log_var, U = [], [], [], []
    for k in range(K):
        prompt = weights["region_prompts.prompts"][k]
        a = [sigmoid(dot(v, prompt) / norm(prompt)) for v in V_hat]              # Eq. 2
        a_hat = [x / sum(a) for x in a]
        mu_k = total([times(v, x) for v, x in zip(V_hat, a_hat)])                # Eq. 3
        hidden = [gelu(x) for x in linear(weights, "sampler.hidden", mu_k)]
        phi = linear(weights, "sampler.log_var", hidden)                         # Eq. 4
        # Noise eps_lk for every patch and region whose sum in Eq. 6 is the model's one draw for the region.
        spread = norm(a_hat)
        z = [[m + noise[k][j] * a_hat[l] / spread * math.exp(phi[j] / 2) for j, m in enumerate(mu_k)]
             for l in range(L)]                                                  # Eq. 5
        A_r.append(a)
        mu.append(mu_k)
        log_var.append(phi)
        U.append(total([times(z[l], a_hat[l]) for l in range(L)]))               # Eq. 6
    return A_r, mu, log_var, U


def level(image_tokens, image_masks, text_tokens, text_masks):
    """Eq. 7 of one image and caption: dot products of unit tokens, times both masks."""
    S = [[a * b * dot(v, t) / norm(v) / norm(t) for t, b in zip(text_tokens, text_masks)]
         for v, a in zip(image_tokens, image_masks)]
    best_patch = [max(row[m] for row in S) for m in range(len(text_tokens))]
    best_word = [max(row) for row in S]
    return sum(best_patch) / len(best_patch) + sum(best_word) / len(best_word)


def hinge(S, margin, every_negative=False):
    """Eq. 8 of S[image][caption], hardest negative, both directions, summed over the batch."""
    loss = 0.0
    for i in range(I):
        for candidates in ([S[i][j] for j in range(I) if IMAGE_IDS[j] != IMAGE_IDS[i]],
                           [S[j][i] for j in range(I) if IMAGE_IDS[j] != IMAGE_IDS[i]]):
            costs = [max(0.0, margin + s - S[i][i]) for s in candidates]
            loss += sum(costs) if every_negative else max(costs)
    return loss


def the_paper(setting, image_gumbel, text_gumbel, noise, epochs=1.0):
    """Everything that Eq. 1 to 13 define."""
    model, config, patches, hidden, _, words = setting
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    images, captions = [], []
    for i in range(I):
        V = [linear(weights, "image_proj", token) for token in patches[i].tolist()]
        A_V = adapter(weights, "image_adapter", V, model.image_adapter.tau, image_gumbel[i])
        V_hat = [times(v, a) for v, a in zip(V, A_V)]
        images.append((V, A_V, V_hat, *regions_of(weights, V_hat, noise[i])))
    for t in range(T):
        own = [m for m in range(M) if words[t, m]]
        text = [linear(weights, "text_proj", hidden[t, m].tolist()) for m in own]
        captions.append((text, adapter(weights, "text_adapter", text, model.text_adapter.tau,
                                       [text_gumbel[t][m] for m in own])))

    result = {"ori": [], "key": [], "unc": []}
    for V, A_V, _, _, _, _, U in images:
        result["ori"].append([level(V, [1] * L, text, [1] * len(text)) for text, _ in captions])
        result["key"].append([level(V, A_V, text, A_T) for text, A_T in captions])
        result["unc"].append([level(U, [1] * K, text, A_T) for text, A_T in captions])
    ramping = epochs < config["ramp"]
    terms = {f"L_{name}": hinge(result[name], config["margin"], ramping) for name in ("ori", "key", "unc")}
    L_con = 0.4 * terms["L_ori"] + 0.4 * terms["L_key"] + 0.2 * terms["L_unc"]                         # Eq. 9
    recon, kl, entropy = [], [], []
    for _, _, V_hat, A_r, mu, log_var, U in images:
        difference = [u / K - v / L for u, v in zip(total(U), total(V_hat))]
        recon.append(dot(difference, difference))                                                     # Eq. 10
        for mu_k, log_var_k in zip(mu, log_var):
            kl += [(math.exp(s) + m * m - 1 - s) / 2 for m, s in zip(mu_k, log_var_k)]                # Eq. 11
        entropy += [-a * math.log(a) for a_k in A_r for a in a_k]                                     # Eq. 12
    for name, values in (("L_consistency", recon), ("L_kl", kl), ("L_entropy", entropy)):
        terms[name] = sum(values) / len(values)
    L_reg = terms["L_kl"] + terms["L_entropy"]                                                        # Eq. 13
    terms["loss"] = L_con * (epochs / config["ramp"] if ramping else 1) + terms["L_consistency"] + L_reg
    features = {"A_V": [i[1] for i in images], "A_r": [i[3] for i in images], "mu": [i[4] for i in images],
                "log_var": [i[5] for i in images], "U": [i[6] for i in images]}
    return result, terms, features


def ours(setting, epochs=1.0):
    model, config, _, _, valid, words = setting
    image, text = model(torch.zeros(I), torch.zeros(T, M), valid, words)
    scores = model.similarity(image, text)
    total_loss, terms = model.loss(image, text, torch.tensor(IMAGE_IDS), config, epochs)
    terms = {f"L_{name}": term for name, term in terms.items()} | {"loss": total_loss}
    features = {"A_V": image.mask, "A_r": image.raw_attention.transpose(1, 2), "mu": image.means,
                "log_var": image.log_var, "U": image.regions}
    return scores, terms, features


def check_equal(found, expected):
    for mine, papers in zip(found, expected):
        assert mine.keys() >= papers.keys()
        for name, value in papers.items():
            torch.testing.assert_close(mine[name].detach().double(), torch.tensor(value, dtype=torch.float64),
                                       rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# ---- the tests ---------------------------------------------------------------------------------------------
def test_in_evaluation_recipe_paper_is_the_papers(setting):
    setting[0].eval()
    expected = the_paper(setting, torch.zeros(I, L, 2).tolist(), torch.zeros(T, M, 2).tolist(),
                         torch.zeros(I, K, D).tolist())
    check_equal(ours(setting), expected)
    ori, key, unc = (torch.tensor(expected[0][name]) for name in ("ori", "key", "unc"))
    found = ours(setting)[0]["combined"]
    torch.testing.assert_close(found, .4 * ori + .4 * key + .2 * unc, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("epochs", [1.0, 0.25])
def test_in_training_with_its_noise_given_recipe_paper_is_the_papers(setting, epochs):
    setting[0].train()
    torch.manual_seed(5)
    found = ours(setting, epochs)
    torch.manual_seed(5)                              # the same numbers, in the order in which they are drawn
    image_gumbel = -torch.empty(I, L, 2).exponential_().log()
    noise = torch.randn(I, K, D)
    text_gumbel = -torch.empty(T, M, 2).exponential_().log()
    noises = (x.tolist() for x in (image_gumbel, text_gumbel, noise))
    check_equal(found, the_paper(setting, *noises, epochs))
