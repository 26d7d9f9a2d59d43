"""Train GRM.

    python train_grm.py --config configs.yaml --backbone vit_b_224        COCO, pretrained encoders
    python train_grm.py --config configs.yaml --backbone vit_micro        built-in scenes, nothing to download
    torchrun --nproc_per_node=4 train_grm.py ...                          four GPUs, which share every batch

A run folder (default runs/<backbone>-<data>) gets config.yaml, metrics.jsonl, last.pt (everything, for --resume; the one
before it is last.prev.pt) and best.pt (the weights that did best on the validation split).
"""
import argparse
import contextlib
import json
import math
import os
import sys
import time
import warnings
from pathlib import Path

import torch
import yaml
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import eval_grm
import hub
import modules
import ranks
from checkpoints import CheckpointError, load_checkpoint, load_last, save
from config import ConfigError, load_config
from stopping import Stop, Stopped, leave_signals_to_the_run


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


def gradients(model, batch: dict, loss: dict, micro_batch: int | None, amp=contextlib.nullcontext(), scale=lambda x: x):
    """Backward pass of one batch -> loss, terms, features (detached). model: a GRM, or DistributedDataParallel around a
    ranks.SharedLoss; then batch and features are this rank's part, and loss, terms and the gradient are the whole batch's.

    With micro_batch, gradient caching (Gao et al., 2021): encode the batch in parts without a graph, take the loss and its
    gradient with respect to the features over the whole batch, then encode each part again, under the same random numbers,
    and carry the cached gradient on. Same gradient, memory of one part; but batch norm, where an encoder has it, takes its
    statistics over a part.

    amp: the context of every forward pass, left before each backward pass and between those with and without a graph, as what
    autocast keeps of a weight without one must not serve the other.
    """
    parallel = model if isinstance(model, DistributedDataParallel) else None
    shared = parallel.module if parallel else ranks.SharedLoss(model)
    inputs = batch["images"], batch["ids"], batch["valid"]
    size = len(batch["images"])
    if not micro_batch or micro_batch >= size:
        with amp:
            total, terms, image, text = (parallel or shared)(inputs, batch["image_ids"], loss)
        scale(total).backward()
        return *mean_over_ranks(total, terms), image, text
    parts = [tuple(x[start:start + micro_batch] for x in inputs) for start in range(0, size, micro_batch)]
    random_states, encoded = [], []
    with torch.no_grad(), amp:
        for part in parts:
            random_states.append(random_state())
            encoded.append(shared.model(*part))
    joined = [kind(*(torch.cat(x) for x in zip(*features)))                       # leaves that collect the gradient
              for kind, features in zip((modules.ImageFeatures, modules.TextFeatures), zip(*encoded))]
    for feature in (*joined[0], *joined[1]):
        feature.requires_grad_(feature.is_floating_point())
    with amp:
        total, terms = shared.loss(*joined, batch["image_ids"], loss)
    scale(total).backward()
    after = random_state()
    cached = [feature.grad for feature in (*joined[0], *joined[1])]
    for n, part in enumerate(parts):
        set_random_state(random_states[n])
        rows = slice(n * micro_batch, (n + 1) * micro_batch)
        last = n == len(parts) - 1                             # the ranks exchange what all parts have added up
        with parallel.no_sync() if parallel and not last else contextlib.nullcontext():
            with amp:
                carried = (parallel or shared)(part, cached=[g if g is None else g[rows] for g in cached])
            carried.backward()
    set_random_state(after)
    return *mean_over_ranks(total, terms), *joined


def mean_over_ranks(total, terms: dict):
    """The whole batch's loss and terms, detached, from what each rank has of them."""
    total, *values = (ranks.sum_over(torch.stack([total.detach(), *terms.values()])) / ranks.count()).unbind()
    return total, dict(zip(terms, values))


def random_state() -> list[torch.Tensor]:
    """What torch draws from in this process: the CPU's state and, with a GPU, that of the current one."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def set_random_state(state: list[torch.Tensor]):
    torch.set_rng_state(state[0].clone())                      # of a view, torch.set_rng_state reads the wrong memory
    if len(state) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(state[1].clone())


# -------------------------------------------------------------------------------------------------------------- the run

def prepare_folder(out: Path, resume: bool):
    """An earlier run in the folder is kept under another name unless it is resumed."""
    try:
        if not resume and (out / "metrics.jsonl").exists():
            number = 1
            while (kept := out.with_name(f"{out.name}.{number}")).exists():
                number += 1
            out.rename(kept)
            print(f"the earlier run in {out} is kept as {kept}")
        out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:                     # ValueError: the folder has no name, as "."
        raise ConfigError(f"--out: '{out}' cannot be made, or what is there cannot be renamed ({hub.one_line(error)}): "
                          "name another folder") from None


class Run:
    """A training run: its parts, its state (all of which last.pt holds), and the loop."""

    def __init__(self, config: dict, out: Path, device: torch.device, resume: bool, stop: Stop):
        self.config, self.out, self.device, self.stop = config, out, device, stop
        self.step, self.best, self.trained = 0, -1.0, 0.0      # steps done; best validation rSum; seconds of training
        self.validated = 0                                     # step of the last validation
        self.skipped, self.skipped_in_a_row = 0, 0             # steps whose loss or gradient was not finite
        self.saved_at = time.perf_counter()
        torch.manual_seed(config["train"]["seed"])
        if config["train"]["deterministic"]:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.load_splits()
        resumed = load_last(out) if resume else None
        self.tokenizer = (data.tokenizer_from_state(resumed["tokenizer"]) if resumed else data.load_tokenizer(
            config["text"]["name"], None if config["text"]["pretrained"] else self.train_split.texts))
        self.build_loader()
        self.build_model(resumed)
        if ranks.rank() == 0:
            prepare_folder(out, resume)
            (out / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        ranks.wait()
        if resumed:
            self.restore(resumed)
        elif ranks.rank():
            torch.manual_seed(config["train"]["seed"] + ranks.rank())     # weights alike, noise each rank's own
        self.open_logs(resumed)

    # ---- its parts

    def load_splits(self):
        """All data checked before the first step."""
        config = self.config["data"]
        self.names = data.split_names(self.config["datasets"])
        self.train_split = self.load_split(data.splits_of(self.names, config["name"], "train")[0])
        self.val_split = self.load_split(config["val_split"] or data.splits_of(self.names, config["name"], "val")[0])

    def load_split(self, name: str) -> data.Split:
        return data.load_split(name, self.config["datasets"], self.config["data"]["root"])

    def build_loader(self):
        config, train, augment = self.config, self.config["train"], self.config["augment"]
        transform = data.image_transform(config["image"]["size"], *modules.image_statistics(config["image"]["name"]),
                                         train=True, crop=augment["crop"])
        texts, longest = self.train_split.texts, config["text"]["max_length"]
        self.pairs = data.TrainPairs(
            self.train_split, data.tokenize(self.tokenizer, texts, longest), transform, self.tokenizer.mask_token_id,
            augment["word_drop"], augment["word_mask"], augment["flip"], data.mirror_tokens(self.tokenizer, texts, longest),
            skip_bad=config["data"]["skip_bad_images"])
        self.sampler = data.PairSampler(self.train_split, train["batch_size"], config["data"]["epoch"], train["seed"],
                                        rank=ranks.rank(), ranks=ranks.count())
        smallest = min(train["batch_size"], self.sampler.items)
        if smallest < ranks.count():
            raise ConfigError(f"a batch of {smallest} cannot be shared by {ranks.count()} processes: "
                              "raise train.batch_size or lower --nproc_per_node")
        self.loader = DataLoader(
            self.pairs, batch_sampler=self.sampler, collate_fn=data.Collate(self.tokenizer.pad_token_id),
            num_workers=config["data"]["workers"], pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_signals_to_the_run,
            generator=torch.Generator())                       # its own: an epoch's start moves nobody's random numbers
        self.total_steps = min(train["epochs"] * len(self.sampler), train["max_steps"] or math.inf)

    def build_model(self, resumed: dict | None):
        config, train = self.config, self.config["train"]
        self.model = modules.build_grm(config, len(self.tokenizer), self.tokenizer.pad_token_id,
                                       resumed and resumed["text_config"], pretrained=resumed is None).to(self.device)
        self.parallel = ranks.parallel(self.model)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, train, {
            "image_encoder": config["image"]["pretrained"], "text_encoder": config["text"]["pretrained"]}), fused=True)
        self.amp = eval_grm.amp_context(config, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type,
                                           enabled=self.amp._enabled and self.amp.fast_dtype == torch.float16)

    def open_logs(self, resumed: dict | None):
        self.metrics = self.board = None
        if ranks.rank():
            return
        self.metrics = open(self.out / "metrics.jsonl", "ab", buffering=0)
        if resumed and self.metrics.tell() > resumed["metrics_size"]:      # steps that are done again are logged again
            self.metrics.seek(self.metrics.truncate(resumed["metrics_size"]))
        try:
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(self.out, purge_step=self.step + 1 if resumed else None)
        except ImportError:
            pass

    # ---- its state

    def checkpoint(self) -> dict:
        return {"model": self.model.state_dict(), "config": self.config, "tokenizer": data.tokenizer_state(self.tokenizer),
                "text_config": self.model.text_encoder.config.to_dict(), "step": self.step, "best": self.best}

    def save_last(self):
        states = [ranks.gather(x.to(self.device)[None]).cpu() for x in random_state()]     # each (R, bytes)
        bad_images = self.bad_images()
        if ranks.rank() == 0:
            state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "random_state": states,
                     "validated": self.validated, "skipped": [self.skipped, self.skipped_in_a_row], "bad_images": bad_images,
                     "metrics_size": self.metrics.tell(), "trained": self.trained}
            save(self.out / "last.pt", self.checkpoint() | state, self.out / "last.prev.pt")
        ranks.wait()
        self.saved_at = time.perf_counter()

    def restore(self, last: dict):
        rates = [{key: group[key] for key in ("peak", "weight_decay")} for group in self.optimizer.param_groups]
        try:
            self.model.load_state_dict(last["model"])
            self.optimizer.load_state_dict(last["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"--resume: the settings do not fit the run in '{self.out}' ({hub.one_line(error)}): repeat "
                              "its own command, or choose another --out") from None
        for group, rate in zip(self.optimizer.param_groups, rates):        # as set now, which may be lower than before
            group.update(rate)
        if last["scaler"]:                                     # empty where the run had none: in bf16 or without train.amp
            self.scaler.load_state_dict(last["scaler"])
        self.step, self.best, self.validated, self.trained = (last[key] for key in ("step", "best", "validated", "trained"))
        self.skipped, self.skipped_in_a_row = last["skipped"]
        if last["bad_images"].shape == self.pairs.bad.shape:
            self.pairs.bad |= last["bad_images"]
        states = last["random_state"]                          # of the CPU and, if the run had GPUs, of these
        if len(states[0]) == ranks.count() and len(states) == len(random_state()):
            set_random_state([state[ranks.rank()] for state in states])
        else:
            was, now = (f"{n} {'process' if n == 1 else 'processes'} on the {'GPU' if gpus else 'CPU'}" for n, gpus in (
                (len(states[0]), len(states) > 1), (ranks.count(), torch.cuda.is_available())))
            warnings.warn(f"the run had {was} and has {now} now: it goes on from step {self.step} with other random numbers")
            torch.manual_seed(self.config["train"]["seed"] + self.step + ranks.rank())

    def log(self, record: dict):
        if self.metrics:
            self.metrics.write(json.dumps({"step": self.step} | record).encode() + b"\n")
        for key, value in record.items() if self.board else ():
            if isinstance(value, (int, float)) and key != "step":
                self.board.add_scalar(key, value, self.step)

    # ---- the loop

    def train(self):
        with tqdm(total=self.total_steps, initial=self.step, desc="train", unit="step", dynamic_ncols=True,
                  mininterval=0.5 if sys.stderr.isatty() else 15, disable=ranks.rank() > 0) as self.bar:
            while self.step < self.total_steps or self.validation_due():
                if not self.validation_due():
                    self.train_epoch()
                    self.save_last()
                if self.validation_due():
                    with self.stop.at_once():
                        self.validate()
                    self.save_last()

    def validation_due(self) -> bool:
        epochs, within = divmod(self.step, len(self.sampler))
        ended = self.step == self.total_steps or within == 0 and epochs and epochs % self.config["train"]["val_every"] == 0
        return bool(ended) and self.validated != self.step

    def train_epoch(self):
        """The rest of the epoch that self.step lies in."""
        self.sampler.epoch, self.sampler.start = divmod(self.step, len(self.sampler))
        self.model.train()
        self.start_clock()
        for batch in self.loader:
            self.train_step({key: value.to(self.device, non_blocking=True) for key, value in batch.items()})
            self.bar.update()
            late = time.perf_counter() - self.saved_at >= 60 * self.config["train"]["save_minutes"]
            stop, late = ranks.sum_over(torch.tensor([self.stop.requested, late], device=self.device).int()).tolist()
            if self.step == self.total_steps:
                break
            if stop or late:
                self.stop_clock()
                self.save_last()
                self.start_clock()
            if stop:
                raise Stopped
        self.stop_clock()

    def start_clock(self):
        self.since, self.seen = time.perf_counter(), 0

    def stop_clock(self) -> float:
        """-> images per second since the start; this time counts as training."""
        seconds = time.perf_counter() - self.since
        self.trained += seconds
        return self.seen / seconds

    def train_step(self, batch: dict):
        train = self.config["train"]
        factor = learning_rate(self.step, self.total_steps, train["warmup"])
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        self.optimizer.zero_grad(set_to_none=True)
        loss, terms, image, text = gradients(self.parallel, batch, self.config["loss"], train["micro_batch"], self.amp,
                                             self.scaler.scale)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), train["clip"])
        loss, norm = torch.stack([loss, norm]).tolist()        # the same on every rank
        # an overflow is the scaler's to mend, until it has scaled so far down that nothing can have overflown
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        finite = math.isfinite(loss) and (math.isfinite(norm) or overflow)
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        self.seen += len(batch["images"]) * ranks.count()
        if not finite:
            self.count_bad_step(loss, norm, batch)
            return
        self.skipped_in_a_row = 0
        if self.step % train["log_every"] == 0 or self.step == self.total_steps:
            rate = self.stop_clock()
            self.start_clock()
            record = {"epoch": self.sampler.epoch, "loss": loss, "lr": train["lr"] * factor, "grad_norm": norm,
                      "images_per_s": round(rate, 2), "skipped_steps": self.skipped}
            record |= {f"loss_{key}": term.item() for key, term in terms.items()}
            record |= {key: figure.item() for key, figure in modules.diagnostics(image, text).items()}
            self.log(record)
            self.bar.set_postfix_str(f"loss {loss:.3f} lr {record['lr']:.1e} {rate:.0f} img/s", refresh=False)

    def count_bad_step(self, loss: float, norm: float, batch: dict):
        """A step whose loss or gradient is not finite has left the weights alone; a few in a row end the run."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        images = [self.train_split.image_names[i] for i in ranks.gather(batch["image_ids"]).tolist()]
        self.log({"skipped": what, "images": images})
        if ranks.rank() == 0:
            self.bar.write(f"step {self.step} is skipped: {what}; images {', '.join(images[:3])} ... (see metrics.jsonl)")
        if self.skipped_in_a_row >= self.config["train"]["max_bad_steps"]:
            raise ConfigError(f"{what} at step {self.step}, the {self.skipped_in_a_row}th step in a row that is not finite; "
                              f"{self.out / 'last.pt'} is from before: try a lower train.lr, or train.amp=false")

    def validate(self):
        started = time.perf_counter()
        ranks.broadcast(self.model.buffers())                  # batch norm's statistics, if any, are each rank's own
        results, = self.evaluate(self.val_split)
        rsum = results["combined"]["rsum"]
        self.log({"epoch": self.sampler.epoch, "val_split": self.val_split.name, "val_rsum": rsum, "val": results,
                  "train_seconds": round(self.trained, 1)})
        improved = rsum > self.best
        self.validated = self.step
        if improved:
            self.best = rsum
            if ranks.rank() == 0:
                save(self.out / "best.pt", self.checkpoint())
        if ranks.rank() == 0:
            epochs = self.step // len(self.sampler)
            self.bar.write(f"epoch {epochs} step {self.step}: {self.val_split.name} rSum {rsum:.1f} ("
                           + ", ".join(f"{k} {v['rsum']:.1f}" for k, v in results.items() if k != "combined") + ")"
                           + (", best so far" if improved else "") + f", {time.perf_counter() - started:.0f} s")

    def evaluate(self, split: data.Split, folds=(1,)) -> list[dict]:
        try:
            return eval_grm.evaluate(self.model, split, self.tokenizer, self.config, self.device, folds=folds,
                                     progress=sys.stderr.isatty() and ranks.rank() == 0)
        except FloatingPointError as error:
            raise ConfigError(f"{split.name}, step {self.step}: {error}: try a lower train.lr, or train.amp=false") from None

    def final_table(self):
        """best.pt on the test split, or on the validation split where the data has no test part."""
        if ranks.rank() == 0:
            best = load_checkpoint(self.out / "best.pt")
            self.model.load_state_dict(best["model"])
            self.step = best["step"]
        ranks.broadcast(self.model.state_dict().values())
        try:
            splits, what = data.splits_of(self.names, self.config["data"]["name"], "test"), "test"
            split = self.load_split(splits[0])
        except data.DataError as error:
            say(f"no test split ({error}); the table is of the validation split, on which best.pt was chosen")
            splits, split, what = [self.val_split.name], self.val_split, "validation"
        folds = {name: self.names[name.split("[")[0]][2] for name in splits}
        folds = {name: f for name, f in folds.items() if f <= len(split)}
        for (name, f), results in zip(folds.items(), self.evaluate(split, list(folds.values()))):
            say(f"\n{name}: best.pt (step {self.step}), {len(split):,} images, {len(split.texts):,} captions"
                + (f", mean of {f} folds" * (f > 1)) + f"\n{eval_grm.figures_table(results)}")
            self.log({"test_split": name, "test": results})
        say(f"{what} rSum {results['combined']['rsum']:.1f}")

    def bad_images(self) -> torch.Tensor:
        """(images,) bool: those that could not be read, in the loading processes of all ranks."""
        return ranks.sum_over(self.pairs.bad.int().to(self.device)).bool().cpu()

    def report_bad_images(self):
        names = [self.train_split.image_names[i] for i in self.bad_images().nonzero().flatten().tolist()]
        if names:
            self.log({"bad_images": names})
            say(f"{len(names)} images could not be read, and others took their place: {', '.join(names[:10])}"
                + ", ... (all in metrics.jsonl)" * (len(names) > 10))


def say(text: str):
    if ranks.rank() == 0:
        print(text, flush=True)


def run(args):
    """-> what sys.exit takes: None, or, if a signal stopped the run, how to go on (1 on ranks other than 0)."""
    stop = Stop()
    saved, message = "", None
    try:
        with stop.at_once():
            device = ranks.start()
            config = load_config(args.config, args.backbone, args.data, args.data_root, args.set)
            out = Path(args.out or f"runs/{args.backbone}-{config['data']['name']}")
            this = Run(config, out, device, args.resume, stop)
        if not args.resume:
            this.save_last()                                   # from here on there is always something to resume
        count, split = sum(p.numel() for p in this.model.parameters()), this.train_split
        say(f"{args.backbone} on {config['data']['name']}: {len(split):,} images, {len(split.texts):,} captions, "
            f"{count / 1e6:.1f} M parameters, {this.total_steps:,} steps of {config['train']['batch_size']} on {device}"
            + f" and {ranks.count() - 1} more" * (ranks.count() > 1) + f"; run folder {out}")
        saved = f"{out / 'last.pt'} is saved: repeat the command with --resume to go on"
        this.train()
        this.report_bad_images()
        say(f"trained {this.step} steps, {this.trained:.0f} s of training")
        with stop.at_once():
            this.final_table()
    except Stopped:
        message = (f"stopped at step {this.step} of {this.total_steps}; {saved}" if saved else
                   "stopped before the first step" + "; last.pt is as it was: repeat the command to go on" * args.resume)
        message = message if ranks.rank() == 0 else 1
    finally:
        stop.release()
    ranks.finish()
    return message


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="configs.yaml, or your own in its form")
    parser.add_argument("--backbone", required=True, metavar="NAME",
                        help="a block of the file: vit_b_224, vit_b_384, swin_b_224, swin_b_384, vit_tiny, vit_micro")
    parser.add_argument("--data", metavar="NAME",
                        help="data set: coco, f30k, f8k, shapes, or your own (default: the backbone's)")
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (default: data)")
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/<backbone>-<data>)")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last.pt")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change settings, as train.lr=1e-4 model.num_prompts=8; an unknown key lists the valid ones")
    args = parser.parse_args()
    try:
        message = run(args)
    except (ConfigError, data.DataError, modules.ModelError, CheckpointError) as error:
        message = f"rank {ranks.rank()}: " * (ranks.rank() > 0) + f"error: {error}"
        error.__traceback__ = None       # it holds the data-loading processes, which would be waited for
    if message:
        sys.exit(message)


if __name__ == "__main__":
    main()
