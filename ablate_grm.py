"""Does every part earn its place? Trains variants of a configuration over several seeds and tables what each one costs.

    python ablate_grm.py --backbone vit_micro --out runs/ablation
    python ablate_grm.py --backbone vit_micro --out runs/ablation --variants full prompts weights
    python ablate_grm.py --backbone vit_micro --out runs/ablation --variants full model.tau=0.5 train.lr=5e-4,train.clip=1

Every run is train_grm.py with a few --set more, in OUT/<variant>/seed<n>: finished ones are recognised, interrupted ones go
on, so the same command, stopped or extended by variants and seeds, does what is left. OUT/table.md and OUT/table.json are
written anew after every run. best.pt is chosen on the validation split, the table is of the test split.
"""
import argparse
import json
import operator
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from functools import reduce
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

import data
import train_grm

GROUPS = {
    # ori at the weight of the three together, so that the loss keeps its scale
    "parts": {"ori_only": ["loss.ori=1", "loss.key=0", "loss.unc=0"], "no_image_mask": ["model.image_mask=false"],
              "no_text_mask": ["model.text_mask=false"], "no_prompts": ["model.prompts=false"],
              "no_uncertainty": ["model.uncertainty=false"]},
    "levels": {f"no_{level}": [f"loss.{level}=0"] for level in ("ori", "key", "unc")},
    "regularisers": {f"no_{name}": [f"loss.{name}=0"] for name in ("consistency", "kl", "entropy")},
    "prompts": {f"prompts_{k}": [f"model.num_prompts={k}"] for k in (1, 2, 3, 5, 8, 12, 20)},
    "weights": {f"weights_{a}_{b}_{c}": [f"loss.ori={a}", f"loss.key={b}", f"loss.unc={c}"] for a, b, c in (
        (0.2, 0.4, 0.4), (0.4, 0.2, 0.4), (0.6, 0.2, 0.2), (0.2, 0.6, 0.2), (0.45, 0.45, 0.1), (0.3, 0.3, 0.4))},
}
NAMED = {"full": []} | {name: sets for group in GROUPS.values() for name, sets in group.items()}
# 97.5% quantiles of Student's t for 1 to 30 degrees of freedom
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
              2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)
ELSEWHERE = {"data.root", "data.workers"}           # settings that may differ between a run and its continuation
EVIDENCE = {"pointing": ("grounding", "masks", "pointing_game"), "AUC image": ("probes", "image_mask_auc"),
            "AUC outlines": ("probes", "image_mask_auc_outlines"),
            "AUC text": ("probes", "text_mask_auc"), "cosine": ("probes", "region_cosine"),
            "variance": ("probes", "variance_difference", 0)}


# -------------------------------------------------------------------------------------------------------- the statistics

def mean(values) -> float | None:
    return statistics.mean(values) if values else None


def interval(values: list[float]) -> tuple[float, float] | None:
    """95% interval of the mean of n values by Student's t; None for fewer than two."""
    if len(values) < 2:
        return None
    freedom = len(values) - 1
    quantile = T_QUANTILE[freedom - 1] if freedom <= len(T_QUANTILE) else 1.96 + 2.46 / freedom
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return mean(values) - half, mean(values) + half


def summarise(results: dict[str, dict[int, dict]]) -> list[dict]:
    """{variant: {seed: {"levels", "step_seconds", ...}}} -> a row a variant; differences to `full` are paired by seed."""
    rows, full = [], results.get("full", {})
    for variant, runs in results.items():
        rsum = {seed: run["levels"]["combined"]["rsum"] for seed, run in runs.items()}
        paired = [seed for seed in runs if seed in full and variant != "full"]
        base = [full[seed]["levels"]["combined"]["rsum"] for seed in paired]
        differences = [rsum[seed] - own for seed, own in zip(paired, base)]
        times = [runs[seed]["step_seconds"] / full[seed]["step_seconds"] for seed in paired]
        rows.append({"variant": variant, "seeds": sorted(runs), "rsum": mean(rsum.values()),
                     "rsum_std": statistics.stdev(rsum.values()) if len(rsum) > 1 else None,
                     "difference": mean(differences), "interval": interval(differences),
                     "difference_percent": 100 * mean(differences) / mean(base) if paired else None,
                     "time_ratio": mean(times), "runs": runs})
    return rows


def markdown(rows: list[dict], title: str, commands: dict[str, str]) -> str:
    """The table as text; a figure that does not exist yet is a dash."""
    evidence = [name for name in EVIDENCE if any(name in run for row in rows for run in row["runs"].values())]

    def show(value, form):
        return "–" if value is None else form.format(value)

    heads = ["variant", "seeds", "rSum", "difference", "of `full`", "time", *evidence]
    table = [heads, ["---"] * len(heads)]
    for row in rows:
        own = [[run[name] for run in row["runs"].values() if run.get(name) is not None] for name in evidence]
        table.append([
            row["variant"], str(len(row["seeds"])),
            show(row["rsum"], "{:.1f}") + (f" ± {row['rsum_std']:.1f}" if row["rsum_std"] is not None else ""),
            show(row["difference"], "{:+.1f}") + (" [{:+.1f}, {:+.1f}]".format(*row["interval"]) if row["interval"] else ""),
            show(row["difference_percent"], "{:+.1f}%"), show(row["time_ratio"], "{:.2f}"),
            *(show(mean(v), "{:.3f}") + (f" ± {statistics.stdev(v):.3f}" if len(v) > 1 else "") for v in own)])
    return "\n".join([
        f"# {title}", "",
        "rSum in per cent, ± the standard deviation over seeds. Difference: the variant less `full`, paired by seed, with a",
        "95% interval (Student's t); below 0, what was switched off helps. Time: of a training step, against `full`.", "",
        *["Pointing game with the masks; AUC of the image mask against objects' boxes and outlines, of the text mask against",
          "function words; mean cosine of an image's regions; variance of a phrase's region, several objects less one.", ""]
        * bool(evidence),
        *("| " + " | ".join(cells) + " |" for cells in table), "",
        "The command of each row's first run; `train.seed` gives the others:", "",
        *(f"- {name}: `{command}`" for name, command in commands.items()), ""])


# --------------------------------------------------------------------------------------------------------------- the runs

class Run:
    """One training run: what it is called, its settings, its folder, and what of it is done."""

    def __init__(self, variant: str, seed: int, args):
        self.variant, self.seed, self.args = variant, seed, args
        self.folder = Path(args.out) / re.sub(r"[^\w.=,-]", "_", variant) / f"seed{seed}"
        sets = [*args.set, *variant_settings(variant), f"train.seed={seed}"]
        self.config = train_grm.load_config(args.config, args.backbone, args.data, args.data_root, sets)
        self.train = ["--config", args.config, "--backbone", args.backbone]
        for flag in ("data", "data_root"):
            self.train += [f"--{flag.replace('_', '-')}", getattr(args, flag)] if getattr(args, flag) else []
        self.train += ["--out", str(self.folder), "--set", *sets]
        self.report = self.folder / re.sub(r"\W", "_", args.split or "test") / "metrics.json"

    def check_settings(self):
        """ConfigError if the folder holds a run that was trained with other settings."""
        path = self.folder / "config.yaml"
        if path.exists():
            old, new = flat(yaml.safe_load(path.read_text()) or {}), flat(self.config)
            changed = sorted(key for key in (old.keys() | new.keys()) - ELSEWHERE if old.get(key) != new.get(key))
            if changed:
                raise train_grm.ConfigError(
                    f"{self.folder} was trained with another {', '.join(changed[:4])}: choose another --out, or remove it")

    def records(self) -> list[dict]:
        try:
            lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        except OSError:
            return []
        found = []
        for line in lines:
            try:
                found.append(json.loads(line))
            except ValueError:                                  # the line at which a run was killed
                pass
        return found

    def result(self) -> dict | None:
        """Figures of the split asked for and seconds of a training step, or None if the run is not that far."""
        records = self.records()
        tables = [r for r in records if "test" in r]
        if not tables:
            return None
        wanted = [r for r in tables if self.args.split in (None, r["test_split"])]
        report = json.loads(self.report.read_text()) if self.report.exists() else {}
        if self.args.split not in (None, report.get("split")):
            report = {}
        if not (wanted or report) or self.args.grounding and "probes" not in report:
            return None
        # the median, because it is no concern of this table if the machine was busy for a while
        rates = [r["images_per_s"] for r in records if r.get("images_per_s")]
        result = {"levels": wanted[0]["test"] if wanted else report["levels"], "best_step": tables[0]["step"],
                  "split": wanted[0]["test_split"] if wanted else report["split"],
                  "step_seconds": self.config["train"]["batch_size"] / statistics.median(rates)}
        for name, keys in EVIDENCE.items() if self.args.grounding else ():
            try:
                result[name] = reduce(operator.getitem, keys, report)
            except (KeyError, TypeError):                       # no variance without uncertainty
                result[name] = None
        return result

    def command(self) -> list[str]:
        """What is to be done next: training, from the start or from last.pt, or the evaluation of another split."""
        tables = [record for record in self.records() if "test" in record]
        if not tables:
            return script("train_grm.py") + self.train + ["--resume"] * any(self.folder.glob("last*.pt"))
        evaluate = script("eval_grm.py") + ["--ckpt", str(self.folder / "best.pt"), "--out", str(self.report.parent),
                                                "--split", self.args.split or tables[0]["test_split"]]
        evaluate += ["--data-root", self.args.data_root] if self.args.data_root else []
        return evaluate + ["--grounding"] * self.args.grounding

    def state(self) -> str:
        steps = [record["step"] for record in self.records()]
        return f"{self.variant}/{self.seed} at step {steps[-1] if steps else 0}"


def script(name: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name(name))]


def variant_settings(variant: str) -> list[str]:
    """A name of the list, or settings themselves, parted by commas."""
    if variant not in NAMED and "=" not in variant:
        raise train_grm.ConfigError(f"unknown variant '{variant}'; valid: {', '.join(NAMED)}, a group "
                                    f"({', '.join(GROUPS)}), or settings as model.tau=0.5,loss.kind=triplet")
    return NAMED.get(variant) if variant in NAMED else re.split(r",(?=[\w.]+=)", variant)


def flat(config: dict, prefix: str = "") -> dict:
    """{"train.lr": ...} of nested blocks."""
    result = {}
    for key, value in config.items():
        result |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return result


def free_slots() -> int:
    """How many runs at a time: one a GPU, or else one a core that has nothing to do now."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return torch.cuda.device_count() or max(1, cores - round(os.getloadavg()[0]))


def gpu_names(visible: str, count: int) -> list[str]:
    """What CUDA_VISIBLE_DEVICES has to be for each of the `count` GPUs that torch sees, given what it is now."""
    names = [name.strip() for name in visible.split(",")][:count]
    return names if len(names) == count and all(names) else [str(gpu) for gpu in range(count)]


def work_off(runs: list[Run], slots: int, after_each) -> dict[str, str]:
    """Runs everything that is not done, `slots` at a time; -> {run: why it failed}. SystemExit once a signal stops it."""
    waiting, working, failed, stop = deque(run for run in runs if run.result() is None), {}, {}, []
    gpus = gpu_names(os.environ.get("CUDA_VISIBLE_DEVICES", ""), torch.cuda.device_count())
    handlers = {number: signal.signal(number, lambda signum, frame: stop.append(signum))
                for number in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=len(runs), initial=len(runs) - len(waiting), desc="ablate", unit="run", dynamic_ncols=True,
               miniters=0, mininterval=0.5 if sys.stderr.isatty() else 15)
    while waiting and not stop or working:
        for slot in range(slots if not stop else 0):
            if slot in working or not waiting:
                continue
            run, environment = waiting.popleft(), dict(os.environ)
            if gpus:
                environment["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
            else:
                environment["OMP_NUM_THREADS"] = "1"
            run.folder.parent.mkdir(parents=True, exist_ok=True)
            with open(run.folder.with_suffix(".log"), "ab") as log:
                # a session of its own: signals reach it from here only, once
                process = subprocess.Popen(run.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                                           start_new_session=True)
            working[slot] = run, process, process.args
        if stop:
            for _, process, _ in working.values():
                process.terminate()                             # training saves last.pt at the next step and ends
        for slot, (run, process, command) in list(working.items()):
            if stop:
                process.wait()
            if process.poll() is None:
                continue
            del working[slot]
            if stop:
                continue
            if process.returncode == 0 and run.result() is not None:
                bar.update()
                after_each()
            elif process.returncode == 0 and run.command() != command:
                waiting.appendleft(run)                            # trained; its evaluation is next
            else:
                log = run.folder.with_suffix(".log").read_text(errors="replace").replace("\r", "\n").strip().splitlines()
                failed[f"{run.variant}/{run.seed}"] = log[-1] if log else f"exit status {process.returncode}"
        bar.set_postfix_str(", ".join(run.state() for run, *_ in working.values()), refresh=False)
        bar.update(0)                                               # draws it, as often as mininterval allows
        if working:
            time.sleep(0.5)
    bar.close()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if stop:
        sys.exit("stopped; every run that had begun is saved: repeat the command to go on")
    return failed


def run(args):
    names = []
    for name in args.variants or ["full", "parts", "levels", "regularisers"]:
        names += [n for n in GROUPS.get(name, [name]) if n not in names]
    # seed by seed, so that an unfinished table compares all variants
    runs = [Run(name, seed, args) for seed in range(args.first_seed, args.first_seed + args.seeds) for name in names]
    for one in runs:
        one.check_settings()
    config = runs[0].config
    if args.split:                                                 # a name that is none is told before the first run
        data.load_split(args.split, config["datasets"], config["data"]["root"], check_images=False)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    commands = {one.variant: shlex.join(["python", "train_grm.py", *one.train]) for one in reversed(runs)}

    def write():
        results = {name: {} for name in names}
        for one in runs:
            if (result := one.result()) is not None:
                results[one.variant][one.seed] = result
        rows = summarise(results)
        split = next((run["split"] for row in rows for run in row["runs"].values()), args.split or "the test split")
        title = f"Ablation of {args.backbone} on {config['data']['name']}: {split}"
        text = markdown(rows, title, {name: commands[name] for name in names})
        (out / "table.md").write_text(text)
        content = [row | {"command": commands[row["variant"]]} for row in rows]
        (out / "table.json").write_text(json.dumps(content, indent=1) + "\n")
        return text
    slots = args.jobs or free_slots()
    left = sum(one.result() is None for one in runs)
    print(f"{len(names)} variants, {args.seeds} seeds: {left} of {len(runs)} runs to do, {slots} at a time; table in {out}")
    failed = work_off(runs, slots, write)
    print(write())
    if failed:
        reasons = "; ".join(f"{name} failed ({why})" for name, why in failed.items())
        sys.exit(f"error: {reasons}; logs in {out}/*/*.log")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs.yaml", metavar="FILE", help="as of train_grm.py (default configs.yaml)")
    parser.add_argument("--backbone", required=True, metavar="NAME", help="as of train_grm.py")
    parser.add_argument("--data", metavar="NAME", help="as of train_grm.py")
    parser.add_argument("--data-root", metavar="DIR", help="as of train_grm.py")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings of every run")
    parser.add_argument("--variants", nargs="+", metavar="NAME",
                        help="names, groups, or settings as model.tau=0.5,loss.kind=triplet (default: full parts levels "
                        "regularisers). " + "; ".join(f"{group}: {', '.join(names)}" for group, names in GROUPS.items()))
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each variant (default 3)")
    parser.add_argument("--first-seed", type=int, default=0, metavar="N", help="seeds count from here (default 0)")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: one a GPU, or one a free core)")
    parser.add_argument("--split", metavar="NAME",
                        help="split of the table (default: the test split, or the validation split where there is none)")
    parser.add_argument("--grounding", action="store_true", help="columns of eval_grm.py --grounding as well")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the runs and the table")
    args = parser.parse_args()
    if args.seeds < 1 or args.jobs is not None and args.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    try:
        run(args)
    except (train_grm.ConfigError, data.DataError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
