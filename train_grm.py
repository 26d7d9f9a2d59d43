"""Train GRM.

    python train_grm.py --config configs.yaml --backbone vit_b_224        COCO, pretrained encoders
    python train_grm.py --config configs.yaml --backbone vit_micro        built-in scenes, nothing to download

A run folder (default runs/<backbone>-<data>) gets config.yaml, metrics.jsonl, last.pt (everything, for --resume) and
best.pt (the weights that did best on the validation split).
"""
import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import torch
import yaml
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eval_grm
import modules


class ConfigError(Exception):
    """A setting that does not exist or cannot be; the message is one line."""


# ---------------------------------------------------------------------------------------------------------- configuration

SECTIONS = ("image", "text", "model", "loss", "augment", "data", "train")
FREE = ("image.options", "text.options", "datasets")           # below these, --set may add keys
AT_LEAST = {"train.epochs": 1, "train.max_steps": 1, "train.batch_size": 1, "train.micro_batch": 1, "train.log_every": 1,
            "train.val_every": 1, "image.size": 1, "text.max_length": 3, "model.dim": 1, "model.num_prompts": 1,
            "data.workers": 0, "train.warmup": 0, "train.weight_decay": 0}
POSITIVE = ("model.tau", "loss.temperature", "train.lr", "train.clip")
CHOICES = {"loss.kind": ("infonce", "triplet"), "data.epoch": ("captions", "images")}


def load_config(path: str, backbone: str, dataset: str | None = None, data_root: str | None = None, sets=()) -> dict:
    """The resolved configuration: defaults <- the data set's `config` <- the backbone <- flags and --set key=value."""
    try:
        blocks = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration '{path}': {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(blocks, dict) or not all(isinstance(blocks.get(k), dict) for k in ("defaults", "backbones", "datasets")):
        raise ConfigError(f"'{path}' needs the blocks defaults, backbones and datasets")
    if backbone not in blocks["backbones"]:
        raise ConfigError(f"unknown backbone '{backbone}'; valid: {', '.join(blocks['backbones'])}")
    special = blocks["backbones"][backbone]
    name = dataset or special.get("data", {}).get("name")
    if name not in blocks["datasets"]:
        raise ConfigError(f"unknown data set '{name}'; valid: {', '.join(blocks['datasets'])}")
    config = copy.deepcopy(blocks["defaults"])
    merge(config, blocks["datasets"][name].get("config") or {}, f"datasets.{name}.config")
    merge(config, special, f"backbones.{backbone}")
    config |= {"backbone": backbone, "datasets": blocks["datasets"]}
    config["data"]["name"] = name
    if data_root:
        config["data"]["root"] = data_root
    for item in sets:
        set_key(config, item)
    check(config)
    return config


def merge(into: dict, new: dict, where: str):
    for key, value in new.items():
        if key not in into:
            raise ConfigError(f"unknown key '{key}' in {where}; valid: {', '.join(into)}")
        if isinstance(into[key], dict) and key != "options":
            merge(into[key], value, f"{where}.{key}")
        else:
            into[key] = value


def set_key(config: dict, item: str):
    """One --set key=value, the key dotted, the value YAML."""
    key, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"--set takes key=value, got '{item}'")
    *path, last = key.split(".")
    block = config
    for part in path:
        block = block.get(part) if isinstance(block, dict) else None
    settable = isinstance(block, dict) and (key.startswith(FREE) or last in block and not isinstance(block[last], dict))
    if not settable:
        valid = [f"{s}.{k}" for s in SECTIONS for k in config[s]]
        raise ConfigError(f"unknown key '{key}'; valid: {', '.join(valid)}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: '{text}' is not a YAML value") from None
    if isinstance(value, str):
        try:
            value = float(value)                               # YAML reads 2e-4, without a dot, as text
        except ValueError:
            pass
    old = block.get(last)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = (old is None or value is None or isinstance(value, type(old)) or isinstance(old, float) and number)
    if not fits or isinstance(old, int) and not isinstance(old, bool) and isinstance(value, bool):
        raise ConfigError(f"--set {key}: '{text}' is not a {type(old).__name__}, as {old!r} is")
    block[last] = value


def check(config: dict):
    """Values that no run can use, before anything is read."""
    get = lambda key: config[key.split(".")[0]][key.split(".")[1]]
    for key, least in AT_LEAST.items():
        if get(key) is not None and not (isinstance(get(key), (int, float)) and get(key) >= least):
            raise ConfigError(f"{key} is {get(key)!r}; it must be at least {least}")
    for key in POSITIVE:
        if not get(key) > 0:
            raise ConfigError(f"{key} is {get(key)!r}; it must be above 0")
    for key, valid in CHOICES.items():
        if get(key) not in valid:
            raise ConfigError(f"{key} is '{get(key)}'; valid: {', '.join(valid)}")
    if not any(config["loss"][level] for level in modules.LEVELS):
        raise ConfigError("loss.ori, loss.key and loss.unc are all 0: nothing is left to learn from")


# ------------------------------------------------------------------------------------------------------- one training step

def learning_rate(step: int, total: int, warmup: float) -> float:
    """Factor of the peak rate: linear over the first `warmup` of all steps, then half a cosine down to 0."""
    rising = max(1, round(warmup * total))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def parameter_groups(model: modules.GRM, train: dict, pretrained: dict[str, bool]) -> list[dict]:
    """New layers at lr, pretrained encoders at a fraction of it; no decay on biases, norms and other vectors."""
    groups = {}
    for name, parameter in model.named_parameters():
        encoder = name.split(".")[0]
        rate = train["lr"] * (train["encoder_lr"] if pretrained.get(encoder) else 1.0)
        decay = train["weight_decay"] if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": p, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]


def gradients(model, batch: dict, loss: dict, micro_batch: int | None, scale=lambda x: x):
    """Backward pass of one batch -> loss, terms, features (detached).

    With micro_batch, gradient caching (Gao et al., 2021): encode the batch in parts without a graph, take the loss and its
    gradient with respect to the features over the whole batch, then encode each part again, under the same random numbers,
    and carry the cached gradient on. Same gradient, memory of one part.
    """
    inputs = batch["images"], batch["ids"], batch["valid"]
    size = len(batch["images"])
    if not micro_batch or micro_batch >= size:
        image, text = model(*inputs)
        total, terms = model.loss(image, text, batch["image_ids"], loss)
        scale(total).backward()
        return total.detach(), terms, image, text
    parts = [tuple(x[start:start + micro_batch] for x in inputs) for start in range(0, size, micro_batch)]
    random_states, encoded = [], []
    with torch.no_grad():
        for part in parts:
            random_states.append(random_state())
            encoded.append(model(*part))
    joined = [kind(*(torch.cat(x) for x in zip(*features)))                       # leaves that collect the gradient
              for kind, features in zip((modules.ImageFeatures, modules.TextFeatures), zip(*encoded))]
    for feature in (*joined[0], *joined[1]):
        feature.requires_grad_(feature.is_floating_point())
    total, terms = model.loss(*joined, batch["image_ids"], loss)
    scale(total).backward()
    after = random_state()
    cached = [feature.grad for feature in (*joined[0], *joined[1])]
    for n, part in enumerate(parts):
        set_random_state(random_states[n])
        image, text = model(*part)
        wanted = [(x, g[n * micro_batch:n * micro_batch + len(x)]) for x, g in zip((*image, *text), cached) if g is not None]
        torch.autograd.backward(*zip(*((x, g) for x, g in wanted if x.requires_grad)))
    set_random_state(after)
    return total.detach(), terms, *joined


def random_state() -> list[torch.Tensor]:
    return [torch.get_rng_state()] + (torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])


def set_random_state(state: list[torch.Tensor]):
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


# -------------------------------------------------------------------------------------------------------------- the run

def save(path: Path, checkpoint: dict):
    """Whole or not at all: written beside, flushed, then renamed over the old one."""
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def prepare_folder(out: Path, resume: bool):
    """An earlier run in the folder is kept under another name unless it is resumed."""
    if resume:
        if not (out / "last.pt").exists():
            raise ConfigError(f"--resume: '{out}' holds no last.pt; name the run's folder with --out, or start without --resume")
    elif (out / "metrics.jsonl").exists():
        number = 1
        while (kept := out.with_name(f"{out.name}.{number}")).exists():
            number += 1
        out.rename(kept)
        print(f"the earlier run in {out} is kept as {kept}")
    out.mkdir(parents=True, exist_ok=True)


def run(args):
    config = load_config(args.config, args.backbone, args.data, args.data_root, args.set)
    out = Path(args.out or f"runs/{args.backbone}-{config['data']['name']}")
    train, loss = config["train"], config["loss"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(train["seed"])
    if train["deterministic"]:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)

    # data, all of it checked before the first step
    name, datasets, root = config["data"]["name"], config["datasets"], config["data"]["root"]
    names = data.split_names(datasets)
    split_of = {part: [s for s, (owner, p, _) in names.items() if (owner, p) == (name, part)] for part in ("train", "val", "test")}
    train_split = data.load_split(split_of["train"][0], datasets, root)
    val_split = data.load_split(config["data"]["val_split"] or split_of["val"][0], datasets, root)
    resumed = eval_grm.load_checkpoint(out / "last.pt") if args.resume and (out / "last.pt").exists() else None
    tokenizer = (data.tokenizer_from_state(resumed["tokenizer"]) if resumed else
                 data.load_tokenizer(config["text"]["name"], None if config["text"]["pretrained"] else train_split.texts))

    model = modules.build_grm(config, len(tokenizer), tokenizer.pad_token_id,
                              resumed and resumed["text_config"], pretrained=resumed is None).to(device)
    optimizer = torch.optim.AdamW(parameter_groups(model, train, {
        "image_encoder": config["image"]["pretrained"], "text_encoder": config["text"]["pretrained"]}), fused=device.type == "cuda")
    amp = eval_grm.amp_context(config, device)
    scaler = torch.amp.GradScaler(device.type, enabled=amp._enabled and amp.fast_dtype == torch.float16)

    mean, std = modules.image_statistics(config["image"]["name"])
    augment = config["augment"]
    transform = data.image_transform(config["image"]["size"], mean, std, train=True, crop=augment["crop"])
    texts, longest = train_split.texts, config["text"]["max_length"]
    pairs = data.TrainPairs(train_split, data.tokenize(tokenizer, texts, longest), transform, tokenizer.mask_token_id,
                            augment["word_drop"], augment["word_mask"], augment["flip"],
                            data.mirror_tokens(tokenizer, texts, longest))
    sampler = data.PairSampler(train_split, train["batch_size"], config["data"]["epoch"], train["seed"])
    loader = DataLoader(pairs, batch_sampler=sampler, collate_fn=data.Collate(tokenizer.pad_token_id),
                        num_workers=config["data"]["workers"], pin_memory=device.type == "cuda",
                        generator=torch.Generator())       # its own, or starting an epoch would move the model's random numbers
    total_steps = min(train["epochs"] * len(sampler), train["max_steps"] or math.inf)

    step, best = 0, -1.0
    prepare_folder(out, args.resume)
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        step, best = resumed["step"], resumed["best"]
        set_random_state(resumed["random_state"])
    (out / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    metrics = open(out / "metrics.jsonl", "a", buffering=1)
    try:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(out)
    except ImportError:
        board = None

    def log(record: dict):
        metrics.write(json.dumps(record) + "\n")
        for key, value in record.items() if board else ():
            if isinstance(value, (int, float)) and key != "step":
                board.add_scalar(key, value, record["step"])

    def checkpoint() -> dict:
        return {"model": model.state_dict(), "config": config, "tokenizer": data.tokenizer_state(tokenizer),
                "text_config": model.text_encoder.config.to_dict(), "step": step, "best": best}

    def save_last():
        save(out / "last.pt", checkpoint() | {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                                              "random_state": random_state()})

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda signum, frame: stop.append(signum))

    count = sum(p.numel() for p in model.parameters())
    print(f"{args.backbone} on {name}: {len(train_split):,} images, {len(train_split.texts):,} captions, {count / 1e6:.1f} M "
          f"parameters, {total_steps:,} steps of {train['batch_size']} on {device}; run folder {out}")
    trained, seen, since = 0.0, 0, time.perf_counter()
    bar = tqdm(total=total_steps, initial=step, desc="train", unit="step", dynamic_ncols=True,
               mininterval=0.5 if sys.stderr.isatty() else 15)
    while step < total_steps:
        sampler.epoch, sampler.start = divmod(step, len(sampler))
        model.train()
        for batch in loader:
            batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
            factor = learning_rate(step, total_steps, train["warmup"])
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * factor
            optimizer.zero_grad(set_to_none=True)
            with amp:
                value, terms, image, text = gradients(model, batch, loss, train["micro_batch"], scaler.scale)
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train["clip"])
            scaler.step(optimizer)
            scaler.update()
            step += 1
            seen += len(batch["images"])
            if step % train["log_every"] == 0 or step == total_steps:
                now = time.perf_counter()
                rate, seen, trained, since = seen / (now - since), 0, trained + now - since, now
                if not math.isfinite(value.item()):
                    raise ConfigError(f"the loss is {value.item()} at step {step}; try a lower train.lr, or train.amp=false")
                record = {"step": step, "epoch": sampler.epoch, "loss": value.item(), "lr": train["lr"] * factor,
                          "grad_norm": norm.item(), "images_per_s": round(rate, 2)}
                record |= {f"loss_{key}": term.item() for key, term in terms.items()}
                record |= {key: figure.item() for key, figure in modules.diagnostics(image, text).items()}
                log(record)
                bar.set_postfix_str(f"loss {record['loss']:.3f} lr {record['lr']:.1e} {rate:.0f} img/s", refresh=False)
            bar.update()
            if stop or step == total_steps:
                break
        if stop:
            save_last()
            bar.close()
            raise SystemExit(f"stopped at step {step} of {total_steps}; {out / 'last.pt'} is saved: repeat the command with --resume to go on")
        epochs_done = step // len(sampler)
        if epochs_done % train["val_every"] == 0 or step == total_steps:
            started = time.perf_counter()
            results, = eval_grm.evaluate(model, val_split, tokenizer, config, device, progress=sys.stderr.isatty())
            figures = results["combined"]
            log({"step": step, "epoch": sampler.epoch, "val_split": val_split.name, "val_rsum": figures["rsum"], "val": results,
                 "train_seconds": round(trained, 1)})
            improved = figures["rsum"] > best
            if improved:
                best = figures["rsum"]
                save(out / "best.pt", checkpoint())
            bar.write(f"epoch {epochs_done} step {step}: {val_split.name} rSum {figures['rsum']:.1f}"
                      + " (" + ", ".join(f"{k} {v['rsum']:.1f}" for k, v in results.items() if k != "combined") + ")"
                      + (", best so far" if improved else "") + f", {time.perf_counter() - started:.0f} s")
        save_last()
        since, seen = time.perf_counter(), 0
    bar.close()
    print(f"trained {step} steps" + (f", {trained:.0f} s of training in this call" if trained else ""))
    final_table(out, config, split_of, names, tokenizer, model, device)


def final_table(out: Path, config: dict, split_of: dict, names: dict, tokenizer, model, device):
    """best.pt on the test split, or on the validation split where the data has no test part."""
    best = eval_grm.load_checkpoint(out / "best.pt")
    model.load_state_dict(best["model"])
    try:
        splits = split_of["test"]
        split = data.load_split(splits[0], config["datasets"], config["data"]["root"])
    except data.DataError as error:
        print(f"no test split ({error}); the table is of the validation split, on which best.pt was chosen")
        splits = [config["data"]["val_split"] or split_of["val"][0]]
        split = data.load_split(splits[0], config["datasets"], config["data"]["root"])
    folds = [f for f in (names[s.split("[")[0]][2] for s in splits) if f <= len(split)]
    for f, results in zip(folds, eval_grm.evaluate(model, split, tokenizer, config, device, folds=folds, progress=sys.stderr.isatty())):
        print(f"\n{splits[folds.index(f)]}: best.pt (step {best['step']}), {len(split):,} images, {len(split.texts):,} captions"
              + (f", mean of {f} folds" * (f > 1)) + f"\n{eval_grm.figures_table(results)}")
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": best["step"], "test_split": splits[folds.index(f)], "test": results}) + "\n")
    print(f"test rSum {results['combined']['rsum']:.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="configs.yaml, or your own in its form")
    parser.add_argument("--backbone", required=True, metavar="NAME",
                        help="a block of the configuration: vit_b_224, vit_b_384, swin_b_224, swin_b_384, vit_tiny, vit_micro")
    parser.add_argument("--data", metavar="NAME", help="data set: coco, f30k, f8k, shapes, or your own (default: the backbone's)")
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (default: data)")
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/<backbone>-<data>)")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last.pt")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change settings, as train.lr=1e-4 model.num_prompts=8; an unknown key lists the valid ones")
    args = parser.parse_args()
    try:
        run(args)
    except (ConfigError, data.DataError, modules.ModelError, eval_grm.CheckpointError) as error:
        sys.exit(f"error: {eval_grm.last_line(error)}")


if __name__ == "__main__":
    main()
