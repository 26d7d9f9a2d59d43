"""What only a GPU can show. The other tests hide it, so these run by

    GRM_TEST_GPU=0 python -m pytest tests/test_gpu.py

.ci/gpu does that and runs the benchmark.
"""
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY, run_train, signal_at
from test_similarity import both, literal, sample
from test_train import DEEPER, INPUTS, built, distance, gradients_with_and_without_caching

import gradients
import runs
import train_grm
from similarity import token_similarities

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU, or without GRM_TEST_GPU=0")
CUDA = torch.device("cuda")
PRECISIONS = [torch.float32, torch.bfloat16]


def autocast(dtype):
    return torch.autocast("cuda", dtype, enabled=dtype != torch.float32)


def test_the_similarity_is_the_formula_with_and_without_gradient():
    leaves = sample(I=6, L=33, T=21, M=17, d=64)
    expected = torch.stack([literal(*leaves[:2], leaves[4]), literal(*leaves[:2], leaves[4], *leaves[2:4])])
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves[:4])
    v, t, a, w = (x.detach().to(CUDA, torch.float32).requires_grad_() for x in leaves[:4])
    valid = leaves[4].to(CUDA)
    with torch.no_grad():
        assert distance([both(v, t, valid, a, w)], [expected]) <= 1e-6
    got = both(v, t, valid, a, w)
    assert distance([got], [expected]) <= 1e-6
    assert distance(torch.autograd.grad((got * upstream.to(got)).sum(), (v, t, a, w)), wanted) <= 1e-5


def test_the_similarity_under_autocast_is_close_to_float32s():
    """Where two tokens nearly tie, the maximum, and with it the gradient, may fall on the other."""
    generator = torch.Generator().manual_seed(0)
    v, t = (torch.nn.functional.normalize(torch.randn(n, m, 512, generator=generator), dim=-1).to(CUDA)
            .requires_grad_() for n, m in ((128, 196), (128, 30)))
    valid = torch.arange(30, device=CUDA) < torch.randint(5, 31, (128, 1), generator=generator).to(CUDA)
    exact = token_similarities(v, t, valid, [None], [None])
    with autocast(torch.bfloat16):
        low = token_similarities(v, t, valid, [None], [None])
    assert distance([low], [exact]) <= 2e-4
    low, exact = (torch.autograd.grad(s.diagonal(dim1=1, dim2=2).sum(), (v, t)) for s in (low, exact))
    assert distance(low, exact) <= 0.3


@pytest.mark.parametrize("dtype, limit", list(zip(PRECISIONS, [1e-5, 2e-2])))
def test_gradient_caching_gives_the_uncached_gradient_with_all_noise_replayed(recipe, dtype, limit):
    model, batch, loss = built(recipe, 12, device=CUDA)
    expected, got = gradients_with_and_without_caching(model, batch, loss, 5, autocast(dtype))
    assert expected.keys() == got.keys() and distance(got.values(), expected.values()) <= limit


def test_compiled_layers_give_the_gradient_of_the_model(recipe):
    """Without noise for captions of several lengths; with noise a second pass draws what the first drew."""
    model, batch, loss = built(recipe, 12, *DEEPER, device=CUDA)
    plain, found = model.eval(), []
    shorter = [{key: x[:, :x.shape[1] - cut] if key in INPUTS[1:] else x for key, x in batch.items()}
               for cut in (0, 1, 3)]
    for compile_it in (False, True):
        if compile_it:
            gradients.compile_encoders(model)
        for part in shorter:
            model.zero_grad()
            gradients.gradients(plain, part, loss, None)
            found.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(distance(got, expected) <= 1e-5 for expected, got in zip(found[:3], found[3:]))
    model.zero_grad()
    expected, got = gradients_with_and_without_caching(model.train(), batch, loss, 6, autocast(torch.float32))
    assert distance(got.values(), expected.values()) <= 1e-5


@pytest.mark.parametrize("dtype, limit", list(zip(PRECISIONS, [1e-4, 2e-2])))
def test_gpu_and_cpu_agree(recipe, dtype, limit):
    """The same weights and pairs, evaluated: no noise."""
    scores = []
    for device, precision in (("cpu", torch.float32), ("cuda", dtype)):
        model, batch, _ = built(recipe, 32, device=device)
        with torch.no_grad(), torch.autocast(device, precision, enabled=precision != torch.float32):
            scores.append(model.eval().similarity(*model(*(batch[key] for key in INPUTS))))
    assert distance(scores[1].values(), scores[0].values()) <= limit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_run_stops_and_resumes(recipe, dtype, tmp_path, monkeypatch):
    """A GPU's sums may differ between two runs left alone; a resumed one may differ from them as much."""
    monkeypatch.setattr(runs, "amp_type", lambda device: dtype)

    def train(out, *flags):
        failure = run_train("--backbone", "vit_micro", "--recipe", recipe, "--out", tmp_path / out, *flags,
                            "--set", *TINY, "train.epochs=2")
        return failure, runs.load_last(tmp_path / out)
    one, two = (train(out)[1] for out in ("one", "two"))
    with signal_at(train_grm, "gradients", 6):
        assert "stopped at step 6 of 40" in train("cut")[0]
    failure, last = train("cut", "--resume")
    assert failure is None and last["step"] == 40
    assert bool(last["scaler"]) == (dtype == torch.float16) and last["skipped"] == one["skipped"]
    one, two, cut = (state["model"].values() for state in (one, two, last))
    assert distance(cut, one) <= max(3 * distance(two, one), 1e-6)


def test_deterministic_runs_and_torchrun_train(tmp_path):
    command = ["train_grm.py", "--config", "configs.yaml", "--backbone", "vit_micro", "--out", tmp_path,
               "--set", *TINY, "train.max_steps=4"]
    torchrun = ["-m", "torch.distributed.run", "--standalone"]

    def run(*argv):
        return subprocess.run([sys.executable, *argv], cwd=ROOT, capture_output=True, text=True)
    for done in (run(*command, "train.deterministic=true"), run(*torchrun, "--nproc_per_node=1", *command)):
        assert done.returncode == 0 and "test rSum" in done.stdout, done.stderr
    too_many = run(*torchrun, f"--nproc_per_node={torch.cuda.device_count() + 1}", *command)
    assert too_many.returncode != 0 and "lower --nproc_per_node" in too_many.stderr
