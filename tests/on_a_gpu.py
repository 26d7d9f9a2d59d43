"""What only a GPU can show, one line a check; the tests themselves run on the CPU, wherever they run. About two minutes.

    python tests/on_a_gpu.py
"""
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))
VISIBLE = os.environ.get("CUDA_VISIBLE_DEVICES")
from conftest import TINY  # noqa: E402   it hides the GPU from the tests

if VISIBLE is None:
    del os.environ["CUDA_VISIBLE_DEVICES"]
else:
    os.environ["CUDA_VISIBLE_DEVICES"] = VISIBLE

import checkpoints  # noqa: E402
import eval_grm  # noqa: E402
import modules  # noqa: E402
import train_grm  # noqa: E402
from similarity import token_similarities  # noqa: E402
from test_similarity import both, literal, sample  # noqa: E402
from test_train import some_pairs, uncached_gradient  # noqa: E402

CUDA = torch.device("cuda")
failed = []


def check(what: str, figure: float, limit: float, note: str = ""):
    passed = figure <= limit                                   # not so of NaN
    if not passed:
        failed.append(what)
    print(f"{'ok    ' if passed else 'FAILED'}  {what}: {figure:.2g} (limit {limit:g}) {note}", flush=True)


def distance(got, expected) -> float:
    """||got - expected|| / ||expected|| over all tensors."""
    pairs = [(a.double().cpu(), b.double().cpu()) for a, b in zip(got, expected)]
    return (sum((a - b).square().sum() for a, b in pairs) / sum(b.square().sum() for _, b in pairs)).sqrt().item()


def similarity_equals_the_formula():
    """Value and gradients against the literal formula in float64 on the CPU; under autocast against float32 on the GPU, where
    near ties between tokens may fall otherwise."""
    leaves = sample(I=6, L=33, T=21, M=17, d=64)
    expected = torch.stack([literal(*leaves[:2], leaves[4]), literal(*leaves[:2], leaves[4], *leaves[2:4])])
    upstream = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * upstream).sum(), leaves[:4])
    v, t, a, w = (x.detach().to(CUDA, torch.float32).requires_grad_() for x in leaves[:4])
    valid = leaves[4].to(CUDA)
    with torch.no_grad():
        check("similarity in float32, evaluation, to the formula", distance([both(v, t, valid, a, w)], [expected]), 1e-6)
    got = both(v, t, valid, a, w)
    check("similarity in float32, training, to the formula", distance([got], [expected]), 1e-6)
    check("    its gradients", distance(torch.autograd.grad((got * upstream.to(got)).sum(), (v, t, a, w)), wanted), 1e-5)
    generator = torch.Generator().manual_seed(0)
    v, t = (torch.nn.functional.normalize(torch.randn(n, m, 512, generator=generator), dim=-1).to(CUDA)
            for n, m in ((128, 196), (128, 30)))
    valid = torch.arange(30, device=CUDA) < torch.randint(5, 31, (128, 1), generator=generator).to(CUDA)
    v.requires_grad_(), t.requires_grad_()
    exact = token_similarities(v, t, valid, [None], [None])
    with torch.autocast("cuda", torch.bfloat16):
        low = token_similarities(v, t, valid, [None], [None])
    check("similarity under bf16 autocast, to float32", distance([low], [exact]), 2e-4)
    low, exact = (torch.autograd.grad(s.diagonal(dim1=1, dim2=2).sum(), (v, t)) for s in (low, exact))
    check("    its gradients", distance(low, exact), 0.3)


def caching_gives_the_gradient(config):
    """train.micro_batch against the same parts with their graph kept; all noise is replayed on the GPU too."""
    batch, tokenizer = some_pairs(config, 12)
    batch = {key: value.to(CUDA) for key, value in batch.items()}
    torch.manual_seed(0)
    model = modules.build_grm(config, len(tokenizer), 0).to(CUDA).train()
    for name, amp, limit in (("float32", torch.autocast("cuda", enabled=False), 1e-5),
                             ("bf16", torch.autocast("cuda", torch.bfloat16), 2e-2)):
        model.zero_grad()
        torch.manual_seed(1)
        wanted = uncached_gradient(model, batch, config["loss"], 5, amp).values()
        model.zero_grad()
        torch.manual_seed(1)
        train_grm.gradients(model, batch, config["loss"], 5, amp)
        check(f"gradient caching, {name}", distance([p.grad for p in model.parameters() if p.grad is not None], wanted), limit)


def gpu_and_cpu_agree(config):
    """The same weights and pairs, evaluated: no noise."""
    batch, tokenizer = some_pairs(config, 32)
    torch.manual_seed(0)
    model = modules.build_grm(config, len(tokenizer), 0).eval()
    scores = []
    for device in (torch.device("cpu"), CUDA):
        model.to(device)
        inputs = [batch[key].to(device) for key in ("images", "ids", "valid")]
        for amp in (False, True)[:1 if device.type == "cpu" else 2]:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                scores.append(model.similarity(*model(*inputs)))
    for n, (name, limit) in enumerate((("float32", 1e-4), ("bf16", 2e-2)), 1):
        check(f"all levels, the GPU in {name} to the CPU", distance(scores[n].values(), scores[0].values()), limit)


def a_run_stops_and_resumes(folder: Path):
    """By a signal in the middle of an epoch, in the card's own precision and in fp16 with its scaler. A GPU's sums may differ
    between two runs left alone, so the resumed one may differ from them as much as they do."""
    own, gradients = eval_grm.amp_context, train_grm.gradients

    def train(out: Path, *more, stop_at=None):
        steps = []

        def watched(*args):
            steps.append(1)
            if len(steps) == stop_at:
                signal.raise_signal(signal.SIGTERM)
            return gradients(*args)

        sys.argv = ["train_grm.py", "--config", str(ROOT / "configs.yaml"), "--backbone", "vit_micro", "--out", str(out), *more,
                    "--set", *TINY, "train.epochs=2"]
        train_grm.gradients = watched
        try:
            train_grm.main()
        except SystemExit as stop:
            print(f"        {stop}")
        return checkpoints.load_last(out)

    for name, context in (("own precision", own), ("fp16", lambda *_: torch.autocast("cuda", torch.float16))):
        eval_grm.amp_context = context
        one, two = (train(folder / name / out)["model"].values() for out in ("one", "two"))
        train(folder / name / "cut", stop_at=6)
        last = train(folder / name / "cut", "--resume")
        check(f"steps left undone, {name}", 40 - last["step"], 0)
        alone = distance(two, one)
        difference = distance(last["model"].values(), one)
        check(f"stopped and resumed, {name}", difference, max(3 * alone, 1e-6), f"two left alone: {alone:.2g}")
        check("    steps skipped", last["skipped"][0], 0, f"scaler {last['scaler']}")
    eval_grm.amp_context, train_grm.gradients = own, gradients


def processes(folder: Path):
    """What needs a process of its own: deterministic algorithms, and torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = ["train_grm.py", "--config", "configs.yaml", "--backbone", "vit_micro", "--out", str(folder / "nccl"),
                 "--set", *TINY, "train.max_steps=4"]
    fixed = subprocess.run([sys.executable, *arguments, "train.deterministic=true"], cwd=ROOT, capture_output=True, text=True)
    print(fixed.stderr[-300:] if fixed.returncode else "")
    check("train.deterministic trains", fixed.returncode != 0, 0)
    one = subprocess.run([*command, "--nproc_per_node=1", *arguments], cwd=ROOT, capture_output=True, text=True)
    print(one.stderr[-300:] if one.returncode else "")
    check("torchrun with one GPU", one.returncode != 0, 0)
    count = torch.cuda.device_count() + 1
    more = subprocess.run([*command, f"--nproc_per_node={count}", *arguments], cwd=ROOT, capture_output=True, text=True)
    check("torchrun with one process more than there are GPUs says so", "lower --nproc_per_node" not in more.stderr, 0)


def main():
    if not torch.cuda.is_available():
        sys.exit("no GPU that torch can use")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    config = train_grm.load_config(str(ROOT / "configs.yaml"), "vit_micro", sets=TINY)
    similarity_equals_the_formula()
    caching_gives_the_gradient(config)
    gpu_and_cpu_agree(config)
    with tempfile.TemporaryDirectory() as folder:
        a_run_stops_and_resumes(Path(folder))
        processes(Path(folder))
    sys.exit(f"failed: {', '.join(failed)}" if failed else None)


if __name__ == "__main__":
    main()
