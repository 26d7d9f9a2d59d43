"""Train GRM.

    python train_grm.py --config configs.yaml --backbone vit_b_224        COCO, pretrained encoders
    python train_grm.py --config configs.yaml --backbone vit_micro        built-in scenes, nothing to download
    torchrun --nproc_per_node=4 train_grm.py ...                          four GPUs, which share every batch

A run folder (default runs/<backbone>-<data>) gets config.yaml, metrics.jsonl, last.pt (everything, for
--resume; the one before it is last.prev.pt) and best.pt (the weights that did best on the validation split).
"""
import argparse


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE", help="configs.yaml, or one of your own")
    parser.add_argument("--backbone", required=True, metavar="NAME",
                        help="vit_b_224, vit_b_384, swin_b_224, swin_b_384, clip_b_224, siglip_b_224, "
                             "vit_tiny, vit_micro, or your own")
    parser.add_argument("--recipe", metavar="NAME", help="paper or grm (default: the backbone's)")
    parser.add_argument("--data", metavar="NAME",
                        help="coco, f30k, f8k, shapes, or your own (default: the backbone's)")
    parser.add_argument("--data-root", metavar="DIR", help="folder that holds the data sets (default: data)")
    parser.add_argument("--out", metavar="DIR", help="run folder (default: runs/<backbone>-<data>)")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's last.pt")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE",
                        help="change settings, as train.lr=1e-4; an unknown key lists the valid ones")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()                         # before the imports, so that --help answers at once

import json
import math
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import data
import encoders
import eval_grm
import modules
import runs
from data import UserError, require
from encoders import one_line
from gradients import compile_encoders, gradients, random_state, set_random_state


class Run:
    """A training run of one process: its parts, its state (all of which last.pt holds), and the loop."""

    rank, ranks = 0, 1                                             # ranks.py runs several
    progress = sys.stderr.isatty()                                 # finer bars only where they can be redrawn

    def __init__(self, config: dict, out: Path, device: torch.device, signals: runs.Signals, resume: bool):
        self.config, self.out, self.device, self.signals = config, out, device, signals
        self.step, self.best, self.validated = 0, -1.0, 0      # steps done; best rSum; last step validated
        self.skipped, self.skipped_in_a_row = 0, 0             # steps whose loss or gradient was not finite
        self.trained, self.saved_at = 0.0, time.perf_counter() # seconds of training; time of the last save
        torch.manual_seed(config["train"]["seed"])
        if config["train"]["deterministic"]:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        self.load_data()
        init = config["train"]["init"]
        self.origin = out if resume else init and runs.find_checkpoint(init)
        last = runs.load_last(out) if resume else None
        start = last or self.origin and runs.load_checkpoint(self.origin)
        if start:
            old, new = runs.flat(start["config"]), runs.flat(config)
            # Under other values, what is done, or the tokeniser, would mean something else.
            fixed = "image.name text.name" if not last else ("recipe train.init data.name data.epoch "
                    "data.val_split image.size image.eval_size train.batch_size train.seed")
            changed = [f"{key}={json.dumps(old.get(key))}" for key in fixed.split()
                       if old.get(key) != new[key]]
            require(not changed, f"'{self.origin}' was trained with {', '.join(changed)}: repeat that, or "
                                 "train without --resume and train.init")
        self.build_model(start)
        self.build_loader()
        if last:
            self.restore(last)
        self.prepare_folder(last)

    # ---- the loop ------------------------------------------------------------------------------------------
    def train(self):
        """The training loop: steps, logging, checkpoints and validation, in the order they happen."""
        config, seconds = self.config["train"], []
        self.bar = tqdm(total=self.total_steps, initial=self.step, desc="train", unit="step",
                        disable=self.rank > 0, dynamic_ncols=True, mininterval=0.5 if self.progress else 15)
        while self.step < self.total_steps or self.validation_due():
            self.model.train()
            started = time.perf_counter()
            for batch in self.rest_of_epoch():
                # One step.
                epochs = self.step / len(self.sampler)
                rate = learning_rate(self.step, self.total_steps, config["warmup"], config["milestones"])
                for group in self.optimizer.param_groups:
                    group["lr"] = group["peak"] * rate
                self.optimizer.zero_grad(set_to_none=True)
                loss, terms, image, text = self.gradients(batch, epochs)
                self.scaler.unscale_(self.optimizer)
                norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config["clip"])
                loss, norm = torch.stack([loss, norm]).tolist()
                finite = self.may_step(loss, norm)
                if finite:
                    self.scaler.step(self.optimizer)
                    self.skipped_in_a_row = 0
                self.scaler.update()
                self.step += 1
                self.bar.update()

                # Logging.
                seconds.append(time.perf_counter() - started)
                self.trained += seconds[-1]
                if not finite:
                    self.count_bad_step(loss, norm)
                elif self.step % config["log_every"] == 0 or self.step == self.total_steps:
                    speed = len(batch["images"]) * self.ranks * len(seconds) / sum(seconds)
                    self.log_step(loss, config["lr"] * rate, norm, speed, terms, image, text)
                    seconds.clear()

                # A checkpoint, by the clock or because a signal arrived.
                stop, late = self.stop_or_late()
                if (stop or late) and self.step < self.total_steps:
                    self.save_last()
                    if stop:
                        raise runs.Stopped
                started = time.perf_counter()
            self.save_last()
            if self.validation_due():
                with self.signals.at_once():
                    self.validate()
                self.save_last()
        self.bar.close()

    def rest_of_epoch(self):
        """The batches that are left of the epoch; none for a run that was stopped while validating."""
        if self.validation_due():
            return
        self.sampler.epoch, self.sampler.start = divmod(self.step, len(self.sampler))
        for batch in self.loader:
            yield {key: value.to(self.device, non_blocking=True) for key, value in batch.items()}
            if self.step == self.total_steps:
                return

    def gradients(self, batch: dict, epochs: float):
        return gradients(self.model, batch, partial(self.loss, epochs=epochs),
                         self.config["train"]["micro_batch"], self.amp, self.scaler.scale)

    def loss(self, image, text, image_ids, epochs: float):
        return self.model.loss(image, text, image_ids, self.config["loss"], epochs)

    def may_step(self, loss: float, norm: float) -> bool:
        """Whether a step may be taken. A gradient that overflows in fp16 is the scaler's to mend, until the
        scale is so low that nothing can have overflown."""
        overflow = self.scaler.is_enabled() and self.scaler.get_scale() >= 1
        return math.isfinite(loss) and (math.isfinite(norm) or overflow)

    def stop_or_late(self) -> tuple[bool, bool]:
        """Whether a signal asks the run to stop, and whether the last save is too long ago."""
        late = time.perf_counter() - self.saved_at >= 60 * self.config["train"]["save_minutes"]
        return self.signals.stop, late

    def validation_due(self) -> bool:
        epochs, within = divmod(self.step, len(self.sampler))
        epoch_ends = within == 0 and epochs and epochs % self.config["train"]["val_every"] == 0
        return bool(self.step == self.total_steps or epoch_ends) and self.validated != self.step

    def validate(self):
        started = time.perf_counter()
        results = self.evaluate(self.val_split)
        rsum = results["combined"]["rsum"]
        self.log({"epoch": (self.step - 1) // len(self.sampler), "val_split": self.val_split.name,
                  "val_rsum": rsum, "val": results, "train_seconds": round(self.trained, 1)})
        self.validated, improved = self.step, rsum > self.best
        if improved:
            self.best = rsum
            self.save("best.pt", self.checkpoint())
        levels = ", ".join(f"{level} {figures['rsum']:.1f}" for level, figures in results.items())
        best = ", best so far" if improved else ""
        self.say(f"step {self.step}, {self.val_split.name}, rSum: {levels}{best} "
                 f"({time.perf_counter() - started:.0f} s)")

    def matcher(self) -> eval_grm.Matcher:
        return eval_grm.Matcher(self.model, self.tokenizer, self.config, self.device)

    def evaluate(self, split: data.Split, folds: int = 1) -> dict:
        return self.matcher().evaluate(split, folds, progress=self.progress)

    def test(self):
        """The table of best.pt on the test split or, where the data has none, on the validation split."""
        best = runs.load_checkpoint(self.out / "best.pt")
        self.model.load_state_dict(best["model"])
        try:
            name = data.name_of_part(self.config["datasets"], self.config["data"]["name"], "test")
            split, what = self.load_split(name), "test"
        except UserError as error:
            self.say(f"no test split ({error}): this is the validation split, on which best.pt was chosen")
            split, what = self.val_split, "validation"
        folds = min(len(split), split.folds)
        results = self.evaluate(split, folds)
        self.log({"step": best["step"], "test_split": split.name, "test": results})
        self.say(f"\nbest.pt (step {best['step']}) on {eval_grm.describe(split.name, split, folds)}\n"
                 f"{eval_grm.figures_table(results)}\n{what} rSum {results['combined']['rsum']:.1f}")

    # ---- its parts -----------------------------------------------------------------------------------------
    def load_data(self):
        """All data, checked before the first step."""
        config, datasets = self.config["data"], self.config["datasets"]
        train = data.name_of_part(datasets, config["name"], "train")
        val = config["val_split"] or data.name_of_part(datasets, config["name"], "val")
        self.train_split, self.val_split = map(self.load_split, (train, val))

    def load_split(self, name: str) -> data.Split:
        return data.load_split(name, self.config["datasets"], self.config["data"]["root"])

    def build_model(self, start: dict | None):
        config, train = self.config, self.config["train"]
        pretrained = {f"{kind}_encoder": config[kind]["pretrained"] for kind in ("image", "text")}
        if config["model"]["joint"]:                               # the projections are the encoders' own
            pretrained |= {f"{kind}_proj": config[kind]["pretrained"] for kind in ("image", "text")}
        if start:
            self.tokenizer = encoders.tokenizer_from_state(start["tokenizer"])
        else:
            words = None if config["text"]["pretrained"] else self.train_split.texts
            self.tokenizer = encoders.load_tokenizer(config["text"]["name"], words)
        rows, pad_id = encoders.rows_needed(self.tokenizer), self.tokenizer.pad_token_id
        self.model = modules.build_grm(config, rows, pad_id, start and start["text_config"],
                                       pretrained=not start).to(self.device)
        if start:
            self.load(self.model, start["model"])
        if train["compile"] and self.device.type == "cuda":
            compile_encoders(self.model)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, train, pretrained), fused=True)
        self.amp = runs.amp_context(config, self.device)
        scaled = self.device.type == "cuda" and train["amp"] and runs.amp_type(self.device) == torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

    def build_loader(self):
        config, train = self.config, self.config["train"]
        length, texts = config["text"]["max_length"], self.train_split.texts
        transform = data.image_transform(config["image"]["size"], *self.model.image_encoder.statistics,
                                         crop=config["augment"]["crop"])
        captions = data.tokenize(self.tokenizer, texts, length)
        mirrored = data.mirror_tokens(self.tokenizer, texts, length)
        pairs = data.TrainPairs(self.train_split, captions, transform, config["augment"], self.tokenizer,
                                mirrored)
        self.sampler = data.PairSampler(self.train_split, train["batch_size"], config["data"]["epoch"],
                                        train["seed"], rank=self.rank, ranks=self.ranks)
        # Attention's kernels differ with what is left of a length divided by 8, and are compiled one by one.
        collate = partial(data.collate, pad_id=self.tokenizer.pad_token_id,
                          multiple=8 if train["compile"] else 1, most=length)
        self.loader = runs.loader(pairs, config["data"]["workers"], self.device,
                                  batch_sampler=self.sampler, collate_fn=collate)
        self.total_steps = min(train["epochs"] * len(self.sampler), train["max_steps"] or math.inf)

    def prepare_folder(self, last: dict | None):
        kept = runs.make_folder(self.out, self.config, resume=bool(last))
        if kept:
            self.say(f"the earlier run in {self.out} is kept as {kept}")
        self.metrics = open(self.out / "metrics.jsonl", "ab", buffering=0)
        if last and self.metrics.tell() > last["metrics_size"]:   # steps that are done again are logged again
            self.metrics.seek(self.metrics.truncate(last["metrics_size"]))

    # ---- its state -----------------------------------------------------------------------------------------
    def checkpoint(self) -> dict:
        return {"model": self.model.state_dict(), "config": self.config, "step": self.step, "best": self.best,
                "tokenizer": encoders.tokenizer_state(self.tokenizer),
                "text_config": self.model.text_encoder.config}

    def save_last(self):
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                 "random_states": self.random_states(), "validated": self.validated, "trained": self.trained,
                 "skipped": [self.skipped, self.skipped_in_a_row], "metrics_size": self.metrics.tell()}
        self.save("last.pt", self.checkpoint() | state, self.out / "last.prev.pt")
        self.saved_at = time.perf_counter()

    def save(self, name: str, checkpoint: dict, previous: Path | None = None):
        runs.save(self.out / name, checkpoint, previous)

    def load(self, part, state: dict):
        try:
            part.load_state_dict(state)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the settings do not fit '{self.origin}' ({one_line(error)}): repeat its own, "
                            "or train without --resume and train.init") from None

    def restore(self, last: dict):
        rates = [(group["peak"], group["weight_decay"]) for group in self.optimizer.param_groups]
        self.load(self.optimizer, last["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates):    # as set now, not as saved
            group["peak"], group["weight_decay"] = rate
        if last["scaler"]:                               # empty where the run had none: bf16, or no train.amp
            self.scaler.load_state_dict(last["scaler"])
        self.step, self.trained = last["step"], last["trained"]
        if (self.out / "best.pt").exists():                        # else last.pt alone was copied here
            self.best, self.validated = last["best"], last["validated"]
        self.skipped, self.skipped_in_a_row = last["skipped"]
        states = last["random_states"]
        if len(states) == self.ranks and len(states[0]) == len(random_state()):
            set_random_state(states[self.rank])
        else:
            warnings.warn(f"the run had {len(states)} process(es) with {len(states[0]) - 1} GPU(s) each, now "
                          f"{self.ranks} with {len(random_state()) - 1}: from step {self.step} on, it draws "
                          "other random numbers")
            torch.manual_seed(self.config["train"]["seed"] + self.step + self.rank)

    def random_states(self) -> list:
        return [random_state()]                                    # of every process

    # ---- what it tells -------------------------------------------------------------------------------------
    def say(self, text: str):
        tqdm.write(text)                                           # above the bar, if there is one

    def introduce(self):
        config, parameters = self.config, sum(p.numel() for p in self.model.parameters())
        pairs = eval_grm.describe(config["data"]["name"], self.train_split)
        self.say(f"{config['backbone']}, recipe {config['recipe']}, {parameters / 1e6:.1f} M parameters; "
                 f"{pairs}; {self.total_steps:,} steps of {config['train']['batch_size']} on {self.ranks} x "
                 f"{self.device.type}; run folder {self.out}"
                 + (f"; from {self.origin}" if self.origin else ""))

    def log(self, record: dict):
        self.metrics.write(json.dumps({"step": self.step} | record).encode() + b"\n")

    def log_step(self, loss: float, rate: float, norm: float, speed: float, terms: dict, image, text):
        record = {"epoch": self.sampler.epoch, "loss": loss, "lr": rate, "grad_norm": norm,
                  "images_per_s": round(speed, 2), "skipped_steps": self.skipped}
        record |= {f"loss_{name}": term.item() for name, term in terms.items()}
        record |= {name: figure.item() for name, figure in modules.diagnostics(image, text).items()}
        self.log(record)
        self.bar.set_postfix_str(f"loss {loss:.3f} lr {rate:.1e} {speed:.0f} img/s", refresh=False)

    def count_bad_step(self, loss: float, norm: float):
        """A step that is not finite has left the weights alone. A few of them in a row end the run."""
        self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        what = f"the gradient's norm is {norm}" if math.isfinite(loss) else f"the loss is {loss}"
        self.log({"skipped": what})
        self.say(f"step {self.step} is skipped: {what}")
        require(self.skipped_in_a_row < self.config["train"]["max_bad_steps"],
                f"{what} at step {self.step}, the {self.skipped_in_a_row}th in a row that is not finite: "
                f"try a lower train.lr or train.amp=false; {self.out / 'last.pt'} is from before")


# ---- the parts of a step -----------------------------------------------------------------------------------
def learning_rate(step: int, total: int, warmup: float, milestones=()) -> float:
    """Factor of the peak rate. It rises over the first `warmup` of all steps; then it is multiplied by 0.3 at
    each milestone (a part of all steps) or, without milestones, follows half a cosine down to 0."""
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / rising
    if milestones:
        return 0.3 ** sum(step >= part * total for part in milestones)
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def parameter_groups(model: modules.GRM, train: dict, pretrained: dict[str, bool]) -> list[dict]:
    """New layers at lr, adapters and pretrained encoders at fractions of it; biases and norms never decay."""
    groups = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        fraction = train["encoder_lr"] if pretrained.get(part) else 1.0
        rate = train["lr"] * (train["adapter_lr"] if "adapter" in part else fraction)
        decay = train["weight_decay"] if parameter.ndim > 1 else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": found, "lr": rate, "peak": rate, "weight_decay": decay}
            for (rate, decay), found in groups.items()]


# ---- the command line --------------------------------------------------------------------------------------
def main(args) -> str | None:
    """Trains, and returns what sys.exit takes: None, or, if a signal stopped the run, how to go on."""
    kind = Run
    if "LOCAL_RANK" in os.environ:                            # one of several processes that torchrun started
        import ranks
        kind = type("RankRun", (ranks.SharedRun, Run), {})
    signals, run, begun = runs.Signals(), None, False
    try:
        with signals.at_once():
            config = runs.load_config(args.config, args.backbone, args.recipe, args.data, args.data_root,
                                      args.set)
            out = Path(args.out or f"runs/{args.backbone}-{config['data']['name']}")
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            run = kind(config, out, device, signals, args.resume)
        if not args.resume:
            run.save_last()                                 # from here on there is always something to resume
        begun = True
        run.introduce()
        run.train()
        run.say(f"trained {run.step} steps, {run.trained:.0f} s of training")
        with signals.at_once():
            run.test()
    except runs.Stopped:
        if not begun:
            return "stopped before the first step; an earlier last.pt is as it was"
        return (f"stopped at step {run.step} of {run.total_steps}; {out / 'last.pt'} is saved: repeat the "
                "command with --resume to go on")
    finally:
        signals.release()


if __name__ == "__main__":
    with runs.one_line_errors():
        sys.exit(main(ARGUMENTS))
