"""The speed and memory of this code on this machine, in one table.

    python bench_grm.py                 under two minutes on two CPU cores; nothing to download
    python bench_grm.py --json FILE     the same, also as JSON
    python bench_grm.py --evaluation 5000   only an evaluation's time: 5,000 images and 25,000 captions, a half, a quarter, ...

Every ratio is the median over repetitions in which the things compared take turns, so that a busy machine slows all alike.
"memory" is the peak beyond what was held before the call (MiB; on CPUs Linux only), without the gradients handed back.

similarity      images x captions scored per second, captions as long as those of COCO 5K. "GEMM" multiplies the same tokens
                without padding, as one matrix product, and does nothing else: no exact method that forms the products can be
                faster. "einsum" holds all products at once, "loop" goes caption by caption, as published code does.
loss            memory of all levels' losses and their gradient at 384 px (577 tokens), batch 128.
recall          ranks of a 5,000 x 25,000 matrix.
loading         JPEGs of 640 x 480 decoded at the training resolution, then cropped, resized and normalised, by one process.
step            one training step, and its parts by themselves. "not encoders" is the share of heads, similarity, loss and
                optimiser; loading is done by other processes: it limits the step only if it takes longer, divided by the
                number of workers.
evaluation      seconds when images and captions double: encoding (images decoded included) is twice the work, similarity and
                ranks four times. The memory holds the result, four levels of 4 bytes a pair.
cuda            where there is a card: similarity under autocast, the loss and steps there, ViT-B-224 and Swin-B-224 at batch
                128 with AMP, and what gradient caching (train.micro_batch) saves.
"""
import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import data
import eval_grm
import modules
import train_grm
from similarity import token_similarity

CONFIG = str(Path(__file__).with_name("configs.yaml"))
MIB = 2 ** 20
# how many of COCO 5K's 25,000 test captions have 8, 9, 10, ... word pieces of BERT, special ones included
COCO_LENGTHS = [1, 77, 908, 3156, 4569, 4783, 3901, 2741, 1789, 1103, 668, 407, 282, 170, 119, 79, 53, 39, 39, 25, 22, 16, 5,
                9, 7, 5, 4, 3, 3, 1]


# ------------------------------------------------------------------------------------------------------------- measuring

def seconds_of(function, device) -> float:
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


def peak_memory(function, device, gradients: int = 0) -> float | None:
    """MiB at the peak of a call beyond what was held before it and the bytes of the gradients it returns."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()                                 # or what is timed next would wait for it
        return (torch.cuda.max_memory_allocated() - before - gradients) / MIB
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)                  # or freed memory would be used again uncounted
        Path("/proc/self/clear_refs").write_text("5")            # resets VmHWM, the peak of the resident memory
    except OSError:
        return None
    before = status("VmRSS")
    result = function()                                          # held until the peak is read
    peak = status("VmHWM")
    del result
    return (peak - before - gradients) / MIB


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return 1024 * int(line.split()[1])


class Report:
    """Prints rows as they come and keeps them for --json."""

    def __init__(self):
        self.rows = []

    def section(self, name: str, title: str):
        self.name = name
        print(f"\n{name}: {title}", flush=True)

    def row(self, what: str, figure: float, unit: str, memory: float | None = None, note: str = "", **more):
        self.rows.append({"section": self.name, "what": what, "figure": figure, "unit": unit, "memory_mib": memory, **more})
        digits = 0 if figure >= 1000 else 1 if figure >= 10 else 2
        print(f"  {what:34}{figure:>12,.{digits}f} {unit:10}" + (f"{memory:>9,.0f} MiB" if memory is not None else " " * 13)
              + f"  {note}", flush=True)


# ------------------------------------------------------------------------------------------------------------ similarity

def features(images: int, tokens: int, captions: int, dim: int, device):
    """Random unit tokens -> image (I, L, d), text (T, M, d), valid (T, M), with COCO's caption lengths."""
    generator = torch.Generator().manual_seed(0)
    lengths = 8 + torch.multinomial(torch.tensor(COCO_LENGTHS, dtype=torch.float), captions, True, generator=generator)
    valid = torch.arange(int(lengths.max())) < lengths[:, None]
    image, text = (F.normalize(torch.randn(*shape, dim, generator=generator), dim=-1).to(device)
                   for shape in ((images, tokens), valid.shape))
    return image, text, valid.to(device)


def einsum_similarity(image, text, valid):
    S = torch.einsum("ild,tmd->itlm", image, text)
    words = (S.amax(2) * valid).sum(-1) / valid.sum(-1)
    return words + S.masked_fill(~valid[:, None], -torch.inf).amax(3).mean(-1)


def loop_similarity(image, text, valid):
    columns = []
    for tokens, mask in zip(text, valid):
        S = image @ tokens[mask].T                               # (I, L, M)
        columns.append(S.amax(1).mean(-1) + S.amax(2).mean(-1))
    return torch.stack(columns, 1)


def bench_similarity(report: Report, device, images: int, tokens: int, captions: int, dim: int, peers: bool):
    image, text, valid = features(images, tokens, captions, dim, device)
    rows, columns = image.flatten(0, 1), text[valid].T
    products = image.new_empty(len(rows), columns.shape[1])
    leaves = [x.clone().requires_grad_() for x in (image, text)]
    methods = {"GRM": token_similarity} | ({"einsum": einsum_similarity, "loop": loop_similarity} if peers else {})

    def forward(method):
        with torch.no_grad():
            return method(image, text, valid)

    def backward(method):
        return torch.autograd.grad(method(*leaves, valid).sum(), leaves)

    calls = {"GEMM": lambda: torch.mm(rows, columns, out=products)}
    calls |= {f"{name} {what}": lambda run=run, method=method: run(method)
              for name, method in methods.items() for what, run in (("forward", forward), ("forward + backward", backward))}
    seconds = take_turns(calls, device, 3)
    report.section("similarity", f"{images} images of {tokens} tokens, {captions} captions, d={dim}")
    for name, taken in seconds.items():
        gradients = 4 * (image.numel() + text.numel()) if "backward" in name else 0
        memory = peak_memory(calls[name], device, gradients) if name != "GEMM" else 4 * products.numel() / MIB
        speed = ratio(seconds["GEMM"], taken)
        note = "" if name == "GEMM" else f"{speed:.2f} of the GEMM's speed"
        more = {"of_gemm": speed}
        if name.endswith("backward"):
            more["over_forward"] = ratio(taken, seconds[name.removesuffix(" + backward")])
            note += f", {more['over_forward']:.2f} x its forward"
        report.row(name, images * captions / statistics.median(taken), "pairs/s", memory, note, **more)


# ------------------------------------------------------------------------------------------------------------ the model

def model_of(backbone: str, settings=()):
    """-> the model of random weights, its configuration."""
    config = train_grm.load_config(CONFIG, backbone, "shapes",
                                   sets=["image.pretrained=false", "text.pretrained=false", *settings])
    torch.manual_seed(0)
    return modules.build_grm(config, vocab_size=30522, pad_id=0).train(), config


MINILM = ["text.name=null", "text.options={hidden_size: 384, num_hidden_layers: 6, num_attention_heads: 12, "
          "intermediate_size: 1536}"]
BERT = ["text.name=null"]                                        # the default of transformers is BERT-base


def bench_loss(report: Report, device):
    model, config = model_of("vit_micro", ["model.dim=512"])
    tokens, text, valid = features(128, 577, 128, 512, device)
    model.to(device)
    with torch.no_grad():
        mask = model.image_adapter(tokens)
        means, attention = model.region_prompts(tokens, mask)
        regions, log_var = model.sampler(means, attention)
        captions = modules.TextFeatures(text, valid, torch.rand(valid.shape, device=device) * valid)
    image = modules.ImageFeatures(tokens, mask, F.normalize(regions, dim=-1), means, attention, log_var)
    leaves = [x.requires_grad_() for x in (*image, *captions) if x.is_floating_point()]

    def gradient():
        loss, _ = model.loss(image, captions, torch.arange(128, device=device), config["loss"])
        return torch.autograd.grad(loss, leaves)

    gradient()
    report.section("loss", "all levels and their gradient, batch 128, 577 image tokens, d=512")
    memory = peak_memory(gradient, device, 4 * sum(x.numel() for x in leaves))
    report.row("loss forward + backward", seconds_of(gradient, device), "s", memory, "target: at most 300 MiB")


def bench_recall(report: Report):
    similarity, owner = torch.rand(5000, 25000), torch.arange(5000).repeat_interleave(5)
    cpu = torch.device("cpu")
    report.section("recall", "ranks of 5,000 images x 25,000 captions")
    taken = []
    memory = peak_memory(lambda: taken.append(seconds_of(lambda: eval_grm.recall_at_k(similarity, owner), cpu)), cpu)
    report.row("recall_at_k", taken[0], "s", memory, "beyond the matrix; target: 60 s, 2048 MiB")


# -------------------------------------------------------------------------------------------------------------- loading

def photographs(folder: Path, count: int = 24) -> data.FileSplit:
    """Pictures of COCO's size that are about as hard to decode as photographs: smooth colours, edges, some noise."""
    rng = np.random.default_rng(0)
    for n in range(count):
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        noisy = np.asarray(coarse, np.float32) + rng.normal(0, 8, (480, 640, 1))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{n}.jpg", quality=90)
    return data.FileSplit("photographs", [f"{n}.jpg" for n in range(count)], [["a photograph"]] * count, folder)


def bench_loading(report: Report, split: data.FileSplit):
    report.section("loading", "JPEGs of 640 x 480, one process")
    for size in (112, 224):
        train = data.image_transform(size, (0.5,) * 3, (0.5,) * 3, train=True)
        decoded = [split.load_image(i, size) for i in range(len(split))]
        seconds = take_turns({"decode": lambda: [split.load_image(i, size) for i in range(len(split))],
                              "augment": lambda: [train(image) for image in decoded],
                              "decode, augment": lambda: [train(split.load_image(i, size)) for i in range(len(split))]},
                             torch.device("cpu"), 3)
        for name, taken in seconds.items():
            report.row(f"{size} px: {name}", len(split) / statistics.median(taken), "images/s")


# ----------------------------------------------------------------------------------------------------------- training step

def batch_of(size: int, pixels: int, device) -> dict:
    _, _, valid = features(1, 1, size, 1, device)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, valid.shape, generator=generator).to(device) * valid
    return {"images": torch.randn(size, 3, pixels, pixels, generator=generator).to(device), "ids": ids, "valid": valid,
            "image_ids": torch.arange(size, device=device)}


def bench_step(report: Report, backbone: str, size: int, settings, split, repetitions: int, device=torch.device("cpu")):
    model, config = model_of(backbone, settings)
    model.to(device)
    pixels, amp = config["image"]["size"], eval_grm.amp_context(config, device)
    batch = batch_of(size, pixels, device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    transform = data.image_transform(pixels, (0.5,) * 3, (0.5,) * 3, train=True, crop=config["augment"]["crop"])

    def load():
        return torch.stack([transform(split.load_image(i % len(split), pixels)) for i in range(size)])

    def image_encoder():
        with amp:
            grid = model.image_encoder.forward_features(batch["images"])
        grid.sum().backward()

    def text_encoder():
        with amp:
            hidden = model._hidden_states(batch["ids"], batch["valid"])
        hidden.sum().backward()

    def gradient():
        train_grm.gradients(model, batch, config["loss"], None, amp)

    with torch.no_grad(), amp:
        grid = model.image_encoder.forward_features(batch["images"])
        hidden = model._hidden_states(batch["ids"], batch["valid"])
    grid.requires_grad_(), hidden.requires_grad_()

    def heads():
        """The step with what the encoders would give in place of the encoders."""
        model.image_encoder.forward_features, model._hidden_states = lambda images: grid, lambda ids, valid: hidden
        gradient()
        del model.image_encoder.forward_features, model._hidden_states

    def optimise():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizer.step()

    seconds = take_turns({"load": load, "image encoder": image_encoder, "text encoder": text_encoder,
                          "heads, similarity, loss": heads, "clear": optimizer.zero_grad, "gradient": gradient,
                          "optimiser": optimise, "clear again": optimizer.zero_grad}, device, repetitions)
    step = [g + o for g, o in zip(seconds["gradient"], seconds["optimiser"])]
    others = [h + o for h, o in zip(seconds["heads, similarity, loss"], seconds["optimiser"])]
    report.section("step", f"{backbone}, {pixels} px, batch {size}, forward and backward" + ", AMP" * amp._enabled)
    for name in ("image encoder", "text encoder", "heads, similarity, loss", "optimiser"):
        report.row(name, 1000 * statistics.median(seconds[name]), "ms", None,
                   f"{100 * ratio(seconds[name], step):.0f}% of the step")
    report.row("whole step", 1000 * statistics.median(step), "ms")
    report.row("not encoders", 100 * ratio(others, step), "%", None, "target: below 15%" if backbone == "vit_tiny" else "")
    report.row("loading a batch, one process", 1000 * statistics.median(seconds["load"]), "ms", None,
               f"{100 * ratio(seconds['load'], step):.0f}% of a step, beside it")


def bench_evaluation(report: Report, scenes, sizes, device):
    model, config = model_of("vit_micro", ["data.workers=0"])
    model.to(device).eval()
    tokenizer = data.build_tokenizer(scenes.texts)
    spent = {"similarity": 0.0, "ranks": 0.0}

    def timed(what, function):
        def run(*arguments):
            result = []
            spent[what] += seconds_of(lambda: result.append(function(*arguments)), device)
            return result[0]
        return run

    model.similarity = timed("similarity", model.similarity)
    report.section("evaluation", "vit_micro with random weights, five captions an image, all levels")
    before = None
    with mock.patch.object(eval_grm, "fold_figures", timed("ranks", eval_grm.fold_figures)):
        for images in sizes:
            split = scenes.subset(slice(images))
            for i in range(images):
                split.load_image(i)                                  # drawn once and kept
            spent.update(similarity=0.0, ranks=0.0)
            whole = []
            memory = peak_memory(lambda: whole.append(seconds_of(
                lambda: eval_grm.evaluate(model, split, tokenizer, config, device, 64, progress=False), device)), device)
            now = {"encoding": whole[0] - sum(spent.values()), **spent}
            for name, seconds in now.items():
                report.row(f"{images} x {len(split.texts)}: {name}", seconds, "s", memory if name == "encoding" else None,
                           f"{seconds / before[name]:.1f} times that of half as many" if before else "")
            before = now


# ----------------------------------------------------------------------------------------------------------------- CUDA

def bench_cuda(report: Report, split):
    device = torch.device("cuda")
    for shape in ((256, 196, 1024, 512), (256, 576, 1024, 512)):
        bench_similarity(report, device, *shape, peers=False)
        image, text, valid = features(*shape, device)
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            taken = take_turns({"autocast": lambda: token_similarity(image, text, valid)}, device, 3)["autocast"]
        report.row("GRM forward, bfloat16 products", shape[0] * shape[2] / statistics.median(taken), "pairs/s")
    bench_loss(report, device)
    bench_step(report, "vit_tiny", 64, MINILM, split, 5, device)
    for backbone in ("vit_b_224", "swin_b_224"):
        bench_step(report, backbone, 128, BERT, split, 5, device)
        report.section("cuda", f"{backbone} with BERT-base, batch 128, AMP: forward and backward")
        model, config = model_of(backbone, BERT)
        model.to(device)
        batch = batch_of(128, 224, device)
        for micro_batch in (None, 32):
            def step(micro_batch=micro_batch):
                model.zero_grad(set_to_none=True)
                train_grm.gradients(model, batch, config["loss"], micro_batch, eval_grm.amp_context(config, device))

            taken = take_turns({"step": step}, device, 3)["step"]
            model.zero_grad(set_to_none=True)
            report.row(f"micro_batch {micro_batch}", 128 / statistics.median(taken), "images/s", peak_memory(step, device))


def bench_all(report: Report, datasets: dict):
    cpu = torch.device("cpu")
    bench_similarity(report, cpu, 64, 197, 128, 512, peers=True)
    bench_similarity(report, cpu, 128, 5, 128, 512, peers=False)
    bench_similarity(report, cpu, 128, 64, 128, 128, peers=False)
    bench_loss(report, cpu)
    bench_recall(report)
    scenes = data.load_split("shapes[:256]", datasets, "")
    with tempfile.TemporaryDirectory() as folder:
        split = photographs(Path(folder))
        bench_loading(report, split)
        bench_step(report, "vit_tiny", 64, MINILM, split, repetitions=3)
        if torch.cuda.is_available():
            bench_cuda(report, split)
    bench_step(report, "vit_micro", 128, [], scenes, repetitions=3)
    bench_evaluation(report, scenes, (64, 128, 256), cpu)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="also write the figures there")
    parser.add_argument("--evaluation", type=int, metavar="N",
                        help="only evaluate N built-in scenes, N/2, ... N/16 (5,000 take about ten minutes on two cores)")
    args = parser.parse_args()
    if args.evaluation is not None and args.evaluation < 16:
        parser.error("--evaluation takes at least 16 images")
    if args.json:                                              # where that fails, it does so before a minute's work
        open(args.json, "a").close()
    report, started = Report(), time.perf_counter()
    machine = {"machine": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads(),
               "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None, "torch": torch.__version__,
               "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    datasets = train_grm.load_config(CONFIG, "vit_micro")["datasets"]
    if args.evaluation:
        datasets["shapes"]["scenes"]["test"] = args.evaluation
        scenes = data.load_split("shapes", datasets, "")
        bench_evaluation(report, scenes, [args.evaluation // n for n in (16, 8, 4, 2, 1)], device)
    else:
        bench_all(report, datasets)
    print(f"\n{time.perf_counter() - started:.0f} s in all")
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": machine, "rows": report.rows}, indent=1) + "\n")


if __name__ == "__main__":
    try:
        main()
    except (train_grm.ConfigError, data.DataError, modules.ModelError, OSError) as error:
        sys.exit(f"error: {error}")
