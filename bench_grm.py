"""The speed and memory of this code on this machine, a GPU's if there is one. Nothing to download.

    python bench_grm.py

similarity   captions as long as COCO's. Ratio: to "GEMM", one matrix product of the same tokens, no padding.
loss         all levels and their gradient, 577 tokens (384 px), batch 128; target: 300 MiB.
step         with clipping and AdamW; without its encoders; on a GPU with gradient caching, then compiled.
             Ratio: to the step; target without the encoders: 0.15.
evaluation   on a GPU: the similarity of COCO 5K on all levels; target: 15 s.

What is compared takes turns. MiB: the peak beyond what was held before, without gradients.
"""
import argparse
import sys


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the table there, as results/NAME.json")
    args = parser.parse_args(argv)
    args.argv = sys.argv[1:] if argv is None else argv
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()                    # before the imports, so that --help answers at once

import ctypes
import gc
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import eval_grm
import modules
import runs
from ablate_grm import cell, save_table, shown_command
from gradients import compile_encoders, gradients
from similarity import token_similarity

CONFIG = str(Path(__file__).with_name("configs.yaml"))
CPU = torch.device("cpu")
MIB = 2 ** 20
# How many of COCO 5K's test captions have 8, 9, 10, ... word pieces of BERT, special ones included.
COCO_LENGTHS = [1, 77, 908, 3156, 4569, 4783, 3901, 2741, 1789, 1103, 668, 407, 282, 170, 119, 79, 53, 39, 39,
                25, 22, 16, 5, 9, 7, 5, 4, 3, 3, 1]
MINILM = ["text.name=null", "text.options={hidden_size: 384, num_hidden_layers: 6, num_attention_heads: 12, "
                            "intermediate_size: 1536}"]
BERT = ["text.name=null", "text.options={}"]         # transformers' default is BERT-base


# ---- measuring ---------------------------------------------------------------------------------------------
def seconds_of(function, device=CPU) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(functions: dict, device, repetitions: int) -> dict[str, list[float]]:
    """Seconds of each call of each function, after one call of each that does not count."""
    seconds = {name: [] for name in functions}
    for turn in range(repetitions + 1):
        for name, function in functions.items():
            taken = seconds_of(function, device)
            if turn:
                seconds[name].append(taken)
    return seconds


def ratio(numerator: list[float], denominator: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(numerator, denominator))


def cost_of(function, device, returned: int = 0) -> tuple[float, float | None]:
    """Seconds of a call, and MiB at its peak beyond what was held before and the bytes that it returns."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = seconds_of(function, device)
        return seconds, (torch.cuda.max_memory_allocated() - before - returned) / MIB
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)      # or freed memory would be used again uncounted
        Path("/proc/self/clear_refs").write_text("5")        # resets VmHWM, the peak of resident memory
    except OSError:
        return seconds_of(function), None
    before, results = status("VmRSS"), []            # what the call returns is held until the peak is read
    seconds = seconds_of(lambda: results.append(function()))
    return seconds, (status("VmHWM") - before - returned) / MIB


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key + ":")).split()[1])


class Report:
    """Prints rows as they come and keeps them for --json."""
    columns = ["figure", "ratio", "MiB"]

    def __init__(self):
        self.rows = []

    def section(self, name: str, title: str):
        self.name = name
        print(f"\n{name}: {title}\n{'':56}" + "".join(f"{column:>12}" for column in self.columns), flush=True)

    def row(self, what: str, unit: str, *figures: float | None):
        values = dict(zip(self.columns, (*figures, None, None)))
        self.rows.append({"name": f"{self.name}: {what}, {unit}", "values": values})
        cells = "".join(f"{cell(value):>12}" for value in values.values())
        print(f"  {f'{what}, {unit}':54}{cells}", flush=True)


# ---- similarity and loss -----------------------------------------------------------------------------------
def features(images: int, tokens: int, captions: int, dim: int, device=CPU):
    """Random unit tokens -> image (I, L, d), text (T, M, d), valid (T, M), with COCO's caption lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = 8 + torch.multinomial(torch.tensor(COCO_LENGTHS).float(), captions, True, generator=generator)
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    image, text = (F.normalize(torch.randn(*shape, dim, generator=generator), dim=-1).to(device)
                   for shape in ((images, tokens), valid.shape))
    return image, text, valid.to(device)


def bench_similarity(report: Report, device, images: int, tokens: int, captions: int, dim: int):
    image, text, valid = features(images, tokens, captions, dim, device)
    low = runs.amp_type(device) if device.type == "cuda" else torch.float32
    rows, columns = image.flatten(0, 1).to(low), text[valid].T.to(low)
    products = rows.new_empty(len(rows), columns.shape[1])
    leaves = [x.clone().requires_grad_() for x in (image, text)]

    def similarity(image, text):
        with torch.autocast(device.type, low, enabled=low != torch.float32):
            return token_similarity(image, text, valid)

    calls = {"GEMM": lambda: torch.mm(rows, columns, out=products),
             "GRM": lambda: similarity(image, text),
             "GRM and gradient": lambda: torch.autograd.grad(similarity(*leaves).sum(), leaves)}
    seconds = take_turns(calls, device, 3 if device == CPU else 20)
    report.section("similarity", f"images x tokens x captions x width, {low}")
    for name, taken in seconds.items():
        held = 4 * (image.numel() + text.numel()) if "gradient" in name else 0
        memory = products.nbytes / MIB if name == "GEMM" else cost_of(calls[name], device, held)[1]
        report.row(f"{images} x {tokens} x {captions} x {dim}: {name}", "pairs/s",
                   images * captions / statistics.median(taken), ratio(seconds["GEMM"], taken), memory)


class Recorded(torch.nn.Module):
    """In place of an encoder: what that would return, whatever it is given."""

    def __init__(self, encoder, output):
        super().__init__()
        self.class_tokens, self.output = getattr(encoder, "class_tokens", 0), output

    def forward(self, *_):
        return self.output


def model_of(backbone: str, settings=(), device=CPU):
    """-> the model with random weights, its configuration."""
    config = runs.load_config(CONFIG, backbone, dataset="shapes", sets=[
        "image.pretrained=false", "text.pretrained=false", "data.workers=0", *settings])
    torch.manual_seed(0)
    return modules.build_grm(config, vocab_size=30522, pad_id=0).train().to(device), config


def bench_loss(report: Report, device):
    model, config = model_of("vit_micro", ["model.dim=512"], device)
    batch = batch_of(128, 64, device)
    model.image_encoder = Recorded(None, torch.randn(128, 577, model.image_encoder.width, device=device))
    with torch.no_grad():
        image, text = model(batch["images"], batch["ids"], batch["valid"], batch["words"])
    leaves = [x.requires_grad_() for x in (*image, *text) if x.is_floating_point()]

    def gradient():
        with runs.amp_context(config, device):
            total, _ = model.loss(image, text, batch["image_ids"], config["loss"])
        return torch.autograd.grad(total, leaves, allow_unused=True)

    handed_back = sum(4 * x.numel() for x in gradient() if x is not None)
    report.section(f"loss, {device.type}", f"recipe {config['recipe']}, batch 128, 577 tokens, d=512")
    seconds, memory = cost_of(gradient, device, handed_back)
    report.row("all levels and gradient", "s", seconds, None, memory)


# ---- a training step ---------------------------------------------------------------------------------------
def batch_of(size: int, pixels: int, device) -> dict:
    _, _, valid = features(1, 1, size, 1, device)
    if device.type == "cuda":
        valid = F.pad(valid, (0, -valid.shape[1] % 8))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, valid.shape, generator=generator).to(device) * valid
    images = torch.randn(size, 3, pixels, pixels, generator=generator).to(device)
    return {"images": images, "ids": ids, "valid": valid, "words": valid,
            "image_ids": torch.arange(size, device=device)}


def bench_step(report: Report, backbone: str, size: int, settings=(), device=CPU, repetitions=3,
               micro_batch: int | None = None, compiled=False):
    model, config = model_of(backbone, settings, device)
    amp, batch = runs.amp_context(config, device), batch_of(size, config["image"]["size"], device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    encoders = model.image_encoder, model.text_encoder
    with torch.no_grad(), amp:
        tokens, words = encoders[0](batch["images"]), encoders[1](batch["ids"], batch["valid"])
    recorded = [Recorded(encoder, output) for encoder, output in zip(encoders, (tokens, words))]
    for x in (tokens, *words):
        x.requires_grad_()

    def step(micro_batch=None):
        optimizer.zero_grad(set_to_none=False)       # the optimiser has all to do also without the encoders
        gradients(model, batch, lambda *features: model.loss(*features, config["loss"]), micro_batch, amp)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()

    def not_encoders():
        model.image_encoder, model.text_encoder = recorded
        step()
        model.image_encoder, model.text_encoder = encoders

    ways, memory = {"step": step, "not encoders": not_encoders}, {}
    if micro_batch:
        ways[f"micro_batch {micro_batch}"] = lambda: step(micro_batch)
    report.section(f"step, {device.type}", f"{backbone}, recipe {config['recipe']}, batch {size}")
    for name, way in ways.items():
        try:
            way()                                    # the first makes gradients and the optimiser's state
            memory[name] = cost_of(way, device)[1]
        except torch.OutOfMemoryError:
            report.row(f"{backbone}: {name}: out of memory", "ms")
    seconds = take_turns({name: ways[name] for name in memory}, device, repetitions)
    if compiled:
        compile_encoders(model)
        first = f"compiled (first step {seconds_of(step, device):.0f} s)"
        memory[first] = cost_of(step, device)[1]
        seconds |= take_turns({first: step}, device, repetitions)
    for name, taken in seconds.items():
        share = ratio(taken, seconds["step"]) if "step" in seconds else None
        report.row(f"{backbone}: {name}", "ms", 1000 * statistics.median(taken), share, memory[name])


# ---- CUDA --------------------------------------------------------------------------------------------------
def bench_coco5k(report: Report, device):
    model, config = model_of("vit_micro", ["model.dim=512"], device)
    _, text, valid = features(1, 1, 25000, 512, device)
    tokens, regions = (F.normalize(torch.randn(5000, n, 512, device=device), dim=-1) for n in (196, 5))
    whole, gates = tokens[:, 0, :0], torch.ones_like(regions[..., 0])
    images = modules.ImageFeatures(tokens, tokens[..., 0].sigmoid(), regions, whole, gates)
    texts = modules.TextFeatures(text, valid, valid.float(), text[:, 0, :0])
    matcher = eval_grm.Matcher(model, None, config, device)
    seconds, memory = cost_of(lambda: matcher.similarity(images, texts), device)
    report.section("evaluation", "COCO 5K on all levels")
    report.row("5,000 x 196 x 25,000 x 512", "s", seconds, None, memory)


def bench_cuda(report: Report):
    device = torch.device("cuda")
    for shape in ((128, 196, 128, 512), (256, 196, 1024, 512), (256, 576, 1024, 512)):
        bench_similarity(report, device, *shape)
    bench_loss(report, device)
    bench_coco5k(report, device)
    for backbone, size in (("vit_b_384", 256), ("swin_b_384", 128)):
        bench_step(report, backbone, size, BERT, device, micro_batch=32)
    for backbone in ("vit_b_224", "swin_b_224"):
        bench_step(report, backbone, 128, BERT, device, 10, compiled=True)


# ---- the command line --------------------------------------------------------------------------------------
def main(args):
    report, started = Report(), time.perf_counter()
    if torch.cuda.is_available():
        bench_cuda(report)
    else:
        for shape in ((64, 197, 128, 512), (128, 5, 128, 512)):
            bench_similarity(report, CPU, *shape)
        bench_loss(report, CPU)
        bench_step(report, "vit_tiny", 64, MINILM)
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    if args.json:
        save_table(Path(args.json), "Speed and memory", shown_command("bench_grm.py", args.argv),
                   report.columns, report.rows, ["ratio: similarity, to GEMM; step, to the whole step."])


if __name__ == "__main__":
    with runs.one_line_errors():
        main(ARGUMENTS)
