"""Does every part earn its place? Trains variants of a configuration over several seeds, and tables them.

    python ablate_grm.py --backbone vit_micro --out runs/ablation
    python ablate_grm.py --backbone vit_micro --out runs/ablation --variants full ori_alone changes
    python ablate_grm.py --backbone vit_micro --out runs/ablation --variants full model.tau=0.5,train.lr=5e-4
    python ablate_grm.py --write-results              RESULTS.md from the tables in results/

Every run is train_grm.py with a few --set more, in OUT/<variant>/seed<n>. Finished runs are recognised and
interrupted ones go on, so the same command, stopped or extended by variants and seeds, does what is left. The
table is written after every run. best.pt is chosen on the validation split, the table is of the test split.
"""
import argparse
import sys

GROUPS = {
    "parts": {                                       # the rows of the paper's ablation, named as there
        "without_SA": ["model.image_mask=false"], "without_GA": ["model.text_mask=false"],
        "without_RP": ["model.prompts=false"], "without_UM": ["model.uncertainty=false"],
        "without_L_ori": ["loss.ori=0"], "without_L_key": ["loss.key=0"], "without_L_unc": ["loss.unc=0"],
        "without_L_recon": ["loss.consistency=0"], "without_L_reg": ["loss.kl=0", "loss.entropy=0"]},
    "recipes": {"recipe_paper": [], "recipe_grm": []},   # each under its own --recipe
    # At the weight of the paper's three levels together, so that the loss keeps its scale.
    "ori_alone": {"ori_alone": ["loss.ori=1", "loss.key=0", "loss.unc=0", "loss.glo=0"]}}


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="configs.yaml", metavar="FILE", help="default configs.yaml")
    add("--backbone", metavar="NAME", help="of train_grm.py, as all flags up to --set")
    add("--recipe", metavar="NAME", help="default: the backbone's")
    add("--data", metavar="NAME", help="default: the backbone's")
    add("--data-root", metavar="DIR", help="default: data")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings of every run")
    add("--variants", nargs="+", default=["full", "parts"], metavar="NAME",
        help="full, groups, names, or settings as model.tau=0.5,loss.kind=triplet (default: full parts). "
             "Groups: changes (each difference from recipe paper turned back, as paper_loss.kind); "
             + "; ".join(f"{group}: {', '.join(names)}" for group, names in GROUPS.items()))
    add("--seeds", type=int, default=3, metavar="N", help="runs of each variant (default 3)")
    add("--jobs", type=int, metavar="N", help="runs at a time (default: one a GPU or free core)")
    add("--split", metavar="NAME", help="split of the table (default: the one that training ends with)")
    add("--grounding", action="store_true", help="run ground_grm.py too, for more columns")
    add("--out", metavar="DIR", help="folder of the runs")
    add("--json", metavar="FILE", help="the table, as results/NAME.json (default OUT/table.json)")
    add("--write-results", action="store_true", help="only write RESULTS.md")
    args = parser.parse_args(argv)
    if not args.write_results and not (args.backbone and args.out):
        parser.error("--backbone and --out are needed")
    if args.seeds < 1 or args.jobs is not None and args.jobs < 1:
        parser.error("--seeds and --jobs must be at least 1")
    args.argv = sys.argv[1:] if argv is None else argv
    return args


if __name__ == "__main__":
    ARGUMENTS = parse_arguments()                    # before the imports, so that --help answers at once

import json
import os
import re
import shlex
import statistics
import subprocess
import time
from collections import deque
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

import data
import runs
from data import UserError, require

ROOT = Path(__file__).resolve().parent
ELSEWHERE = {"data.root", "data.workers"}            # may differ between a run and its continuation
# The 97.5% quantile of Student's t for 1 to 10 degrees of freedom; beyond, intervals are a little too wide.
T_QUANTILE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


# ---- the variants ------------------------------------------------------------------------------------------
def variants_of(args) -> dict[str, list[str]]:
    """{variant: settings} of --variants."""
    groups = {"full": {"full": []}, **GROUPS}
    if any(name == "changes" or name.startswith("paper_") for name in args.variants):
        groups["changes"] = changes(args)
    known = {name: {name: settings} for group in groups.values() for name, settings in group.items()} | groups
    found = {}
    for name in args.variants:
        require(name in known or "=" in name, f"no variant '{name}'; valid: changes, {', '.join(known)}, "
                                              "and settings as model.tau=0.5,loss.kind=triplet")
        found |= known[name] if name in known else {name: re.split(r",(?=[\w.]+=)", name)}
    return found


def changes(args) -> dict[str, list[str]]:
    """Each setting in which the configuration differs from recipe `paper`, turned back to the value there."""
    def settings_of(recipe):
        return runs.flat(runs.load_config(args.config, args.backbone, recipe, args.data, args.data_root,
                                          args.set))

    own, paper = settings_of(args.recipe), settings_of("paper")
    return {f"paper_{key}": [f"{key}={json.dumps(value)}"] for key, value in paper.items()
            if value != own[key] and key != "recipe"}


# ---- the runs ----------------------------------------------------------------------------------------------
class Job:
    """A variant under one seed. UserError if its folder holds a run of other settings, or they set a seed."""

    def __init__(self, args, variant: str, settings: list[str], seed: int):
        self.args, self.variant, self.seed, self.name = args, variant, seed, f"{variant}/seed{seed}"
        self.recipe = variant.removeprefix("recipe_") if variant in GROUPS["recipes"] else args.recipe
        self.folder = Path(args.out) / file_name(variant) / f"seed{seed}"
        self.log = self.folder.with_suffix(".log")
        require("train.seed=" not in " ".join([*args.set, *settings]), "train.seed is set by --seeds")
        self.settings = [*args.set, *settings, f"train.seed={seed}"]
        self.config = runs.load_config(args.config, args.backbone, self.recipe, args.data, args.data_root,
                                       self.settings)
        path = self.folder / "config.yaml"
        if path.exists():
            old, new = runs.flat(read(path, yaml.safe_load) or {}), runs.flat(self.config)
            changed = sorted(key for key in {*old, *new} - ELSEWHERE if old.get(key) != new.get(key))
            require(not changed, f"{self.folder} was trained with another {', '.join(changed[:4])}: "
                                 "choose another --out, or remove it")

    def records(self) -> list[dict]:
        """The complete lines of metrics.jsonl; a run that was killed may have left part of one."""
        return read(self.folder / "metrics.jsonl",
                    lambda text: [json.loads(line) for line in text.split("\n")[:-1]]) or []

    def done(self) -> tuple[str | None, dict | None, dict | None]:
        """The split of the table, its recalls, and its grounding: None for what the run has not got to."""
        tables = {record["test_split"]: record["test"] for record in self.records() if "test" in record}
        if not tables:
            return None, None, None
        split = self.args.split or next(iter(tables))
        reports = self.folder / file_name(split)
        levels = tables.get(split) or read(reports / "metrics.json").get("levels")
        return split, levels, read(reports / "grounding.json") or None

    def result(self) -> dict | None:
        """The figures for the table, or None if the run is not that far."""
        split, levels, grounding = self.done()
        if not levels or self.args.grounding and not grounding:
            return None
        return {"rSum": levels["combined"]["rsum"], "split": split,
                "evidence": evidence(grounding) if self.args.grounding else {}}

    def command(self) -> list[str]:
        """What is to be done next: train, from the start or from last.pt; evaluate another split; ground."""
        args, (split, levels, _) = self.args, self.done()
        if not split:
            flags = {"config": args.config, "backbone": args.backbone, "recipe": self.recipe,
                     "data": args.data, "data-root": args.data_root, "out": self.folder}
            resume = ["--resume"] if any(self.folder.glob("last*.pt")) else []
            return script("train_grm.py", flags) + resume + ["--set", *self.settings]
        flags = {"ckpt": self.folder / "best.pt", "split": split, "out": self.folder / file_name(split),
                 "data-root": args.data_root}
        return script("ground_grm.py" if levels else "eval_grm.py", flags)

    def start(self, environment: dict) -> subprocess.Popen:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(self.log, "ab") as log:
            # In a session of its own, so that a signal reaches it once, from `work_off`.
            return subprocess.Popen(self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                    env=os.environ | environment, start_new_session=True)


def script(name: str, flags: dict) -> list[str]:
    words = [sys.executable, str(ROOT / name)]
    for key, value in flags.items():
        words += [f"--{key}", str(value)] if value is not None else []
    return words


def read(path: Path, parse=json.loads):
    """What a file holds, {} if there is none. UserError if it is damaged."""
    try:
        return parse(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (ValueError, yaml.YAMLError):
        raise UserError(f"'{path}' is damaged or no file of ours: choose another place") from None


def evidence(grounding: dict) -> dict[str, float]:
    """The columns of grounding.json that mean something; of an interval, its mean."""
    figures = {name: value[0] if isinstance(value, list) else value for name, value in grounding.items()}
    return {name: value for name, value in figures.items()
            if isinstance(value, float) and name not in ("chance", "masks less words")}


def file_name(text: str) -> str:
    return re.sub(r"[^\w.=,-]", "_", text)


def environments(count: int | None) -> list[dict]:
    """What each of `count` runs at a time gets: a GPU or else a core; by default, all GPUs or free cores."""
    if torch.cuda.is_available():
        names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        found = [{"CUDA_VISIBLE_DEVICES": name} for name in names.split(",")]
    else:
        linux = hasattr(os, "sched_getaffinity")
        cores = len(os.sched_getaffinity(0)) - round(os.getloadavg()[0]) if linux else os.cpu_count()
        found = [{"OMP_NUM_THREADS": "1"}] * max(1, cores)
    return [found[n % len(found)] for n in range(count or len(found))]


def work_off(jobs: list[Job], slots: list[dict], after_each) -> dict[str, str]:
    """Does everything that is left, one run a slot (its environment) at a time -> {job: why it failed}.

    A signal lets every run save; SystemExit then says how to go on."""
    waiting, working, failed = deque(job for job in jobs if job.result() is None), {}, {}
    signals = runs.Signals()
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(waiting), desc="ablate", unit="run")
    try:
        while (working or waiting) and not signals.stop:
            for slot, environment in enumerate(slots):
                if slot not in working and waiting:
                    job = waiting.popleft()
                    working[slot] = job, job.start(environment)
                    bar.set_postfix_str(", ".join(job.name for job, _ in working.values()))
            time.sleep(0.5)
            for slot, (job, process) in list(working.items()):
                if process.poll() is None:
                    continue
                del working[slot]
                if process.returncode == 0 and job.result() is not None:
                    bar.update()
                    after_each()
                elif process.returncode == 0 and job.command() != process.args:
                    waiting.appendleft(job)          # trained; its evaluation is next
                else:
                    said = job.log.read_text(errors="replace").replace("\r", "\n").strip().rpartition("\n")[2]
                    failed[job.name] = said.removeprefix("error: ")
    finally:                                         # also after an error, as of a table that has no room
        for _, process in working.values():
            process.terminate()                      # training saves last.pt after its step and ends
        for _, process in working.values():
            process.wait()
        signals.release()
        bar.close()
    if signals.stop:
        sys.exit("stopped; every run that had begun is saved: repeat the command to go on")
    return failed


# ---- the statistics ----------------------------------------------------------------------------------------
def interval(values: list[float]) -> dict | None:
    """Mean of n values with its 95% interval by Student's t; of one value that alone; None of none."""
    if len(values) < 2:
        return {"mean": values[0]} if values else None
    mean, quantile = statistics.mean(values), T_QUANTILE[min(len(values), 11) - 2]
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summarise(results: dict[str, dict[int, dict]]) -> tuple[list[str], list[dict]]:
    """{variant: {seed: Job.result()}} -> columns, rows. What is compared with `full` is paired by seed."""
    more = {name: None for found in results.values() for run in found.values() for name in run["evidence"]}
    rows, full = [], results.get("full", {})
    for variant, seeds in results.items():
        paired = seeds.keys() & full.keys() if variant != "full" else ()
        values = {"seeds": len(seeds), "rSum": [run["rSum"] for run in seeds.values()],
                  "difference": interval([seeds[seed]["rSum"] - full[seed]["rSum"] for seed in paired])}
        for name in more:
            values[name] = [run["evidence"][name] for run in seeds.values() if name in run["evidence"]]
        rows.append({"name": variant, "values": values})
    return ["seeds", "rSum", "difference", *more], rows


# ---- the tables: results/*.json and RESULTS.md -------------------------------------------------------------
def save_table(path: Path, title: str, command: str, columns: list[str], rows: list[dict], notes=()) -> dict:
    """Writes a table of RESULTS.md. A file that is there keeps title, conclusion (a sentence by a person) and
    notes (one-line strings). rows: {"name", "values": {column: value}}, a value being a number, a list of one
    number a seed, {"mean", "low", "high"} or {"mean"}, or null."""
    table = {"title": title, "conclusion": "", "notes": list(notes)} | read_table(path)
    table |= {"command": command, **runs.provenance(), "columns": columns, "rows": rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return table


def read_table(path: Path) -> dict:
    table = read(path)
    known = isinstance(table, dict) and "conclusion" in table
    require(known or not path.exists(), f"'{path}' is no table: name another file")
    return table


def shown_command(name: str, argv: list[str], data_root: str | None = None) -> str:
    """A command without paths of this machine: the data root is DATA, of others the last two parts stay."""
    folders = r"(?:^|(?<=[=,\[{ ]))/(?:[^/,\]}]+/)*(?=[^/,\]}]+/[^/,\]}]+)"
    words = ["DATA" if word == data_root else re.sub(folders, "", word) for word in argv]
    return shlex.join(["python", name, *words])


def cell(value) -> str:
    """A value of a table as text. Its size decides the digits."""
    if value is None or value == []:
        return "–"
    if isinstance(value, dict):
        digits = 1 if max(map(abs, value.values())) >= 1 else 3
        mean, *ends = (f"{figure:+.{digits}f}" for figure in value.values())
        return f"{mean} [{', '.join(ends)}]" if ends else mean
    values = value if isinstance(value, list) else [value]
    mean = statistics.mean(values)
    digits = 0 if isinstance(mean, int) else sum(abs(mean) < least for least in (1000, 10, 1))
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean:,.{digits}f}{spread}"


def table_text(table: dict) -> str:
    """A table in Markdown, with its conclusion above, and command, commit and machine below."""
    lines = [["", *table["columns"]], ["---"] * (1 + len(table["columns"]))]
    lines += [[row["name"], *map(cell, map(row["values"].get, table["columns"]))] for row in table["rows"]]
    grid = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    origin = f"`{table['command']}`, commit {table['commit']}, {versions}, {table['machine']}"
    below = "\n".join([origin, *(f"- {note}" for note in table.get("notes", []))])
    return "\n\n".join([f"## {table['title']}", table["conclusion"], grid, below]) + "\n"


def results_page(folder: Path) -> str:
    """RESULTS.md: 0_head.md, and the tables of a folder in the order of their file names."""
    head = (folder / "0_head.md").read_text(encoding="utf-8")
    return "\n".join([head, *(table_text(read_table(path)) for path in sorted(folder.glob("*.json")))])


# ---- the command line --------------------------------------------------------------------------------------
def main(args):
    if args.write_results:
        (ROOT / "RESULTS.md").write_text(results_page(ROOT / "results"), encoding="utf-8")
        return
    variants, seeds = variants_of(args), range(args.seeds)
    require(variants, "--variants: nothing differs from recipe paper: name other variants")
    # Seed by seed, so that an unfinished table compares all variants.
    jobs = [Job(args, name, settings, seed) for seed in seeds for name, settings in variants.items()]
    config, path = jobs[0].config, Path(args.json or f"{args.out}/table.json")
    read_table(path)                                 # an error now, not after the first run
    if args.split:
        data.load_split(args.split, config["datasets"], config["data"]["root"], check_images=False)

    def write() -> str:
        results = {name: {} for name in variants}
        for job in jobs:
            if (result := job.result()) is not None:
                results[job.variant][job.seed] = result
        where = ", ".join({run["split"] for found in results.values() for run in found.values()})
        title = f"{args.backbone}, recipe {config['recipe']}, on {where}"
        command = shown_command("ablate_grm.py", args.argv, args.data_root)
        return table_text(save_table(path, title, command, *summarise(results)))

    slots, left = environments(args.jobs), sum(job.result() is None for job in jobs)
    print(f"{left} of {len(jobs)} runs to do, {len(slots)} at a time; table in {path}", flush=True)
    failed = work_off(jobs, slots, write)
    print(write())
    reasons = "; ".join(f"{name} failed ({why})" for name, why in failed.items())
    require(not failed, f"{reasons}; logs in {args.out}/*/*.log")


if __name__ == "__main__":
    with runs.one_line_errors():
        main(ARGUMENTS)
