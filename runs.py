"""What a run consists of beside training: its configuration, its checkpoints, and what signals do to it."""
import contextlib
import copy
import os
import platform
import signal
import stat
import subprocess
import sys
import warnings
import zipfile
from numbers import Real
from pathlib import Path

import torch
import yaml
from torch.utils.data import DataLoader

import encoders
import modules
from data import UserError, require
from encoders import one_line

SECTIONS = ("image", "text", "model", "loss", "augment", "data", "train")
FREE = ("image.options", "text.options", "datasets")               # below these, --set may add keys
LIMITS = {                                                         # what a value must be, if it is not null
    "a whole number of at least 1": (int, lambda x: x >= 1, "image.size image.eval_size text.max_length "
                                     "model.dim model.num_prompts train.epochs train.max_steps "
                                     "train.batch_size train.micro_batch train.log_every train.val_every "
                                     "train.max_bad_steps"),
    "a whole number from 0 to 2 ** 62": (int, lambda x: 0 <= x <= 2 ** 62, "data.workers train.seed"),
    "at least 0": (Real, lambda x: x >= 0, "loss.ramp train.warmup train.weight_decay train.save_minutes "
                                           "train.encoder_lr train.adapter_lr"),
    "above 0": (Real, lambda x: 0 < x < 9e99, "model.tau model.prompt_scale loss.temperature train.lr "
                                              "train.clip"),
    "between 0 and 1": (Real, lambda x: 0 < x < 1, "model.image_keep model.text_keep"),
    "from 0 to 1": (Real, lambda x: 0 <= x <= 1, "augment.flip augment.word_drop augment.word_mask "
                                                 "augment.word_random"),
    "a list of parts, from 0 to 1": (list, lambda x: all(is_number(part) and 0 <= part <= 1 for part in x),
                                     "augment.crop train.milestones"),
    "a name": (str, len, "image.weights data.val_split train.init")}
SIGHUP = getattr(signal, "SIGHUP", None)                           # Windows has none
LOADER_SECONDS = 100                              # a data loader that gives nothing for so long is stuck
CHOICES = {"loss.kind": ("triplet", "infonce"), "data.epoch": ("captions", "images"),
           "image.statistics": ("imagenet", "model"), "model.mask_acts_on": ("tokens", "means"),
           "model.text_mask_reads": ("outputs", "embeddings"), "model.prior": ("standard", "scaled")}


# ---- the configuration -------------------------------------------------------------------------------------
def load_config(path: str, backbone: str, recipe: str | None = None, dataset: str | None = None,
                data_root: str | None = None, sets=()) -> dict:
    """The settings of a run: configs.yaml's defaults <- the file's <- the data set's `config` <- the backbone
    <- the recipe, by default the backbone's <- --set. UserError for one that does not exist or cannot be."""
    blocks = read_blocks(path, ["defaults", "recipes", "backbones", "datasets"])
    shipped = read_blocks(Path(__file__).with_name("configs.yaml"), ["defaults"])["defaults"]
    defaults = {section: {key: fitting(value, None, key) for key, value in
                          settings(shipped.get(section), f"defaults.{section}").items()}
                for section in SECTIONS}
    special = dict(settings(named(blocks, "backbones", backbone), f"backbones.{backbone}"))
    recipe = recipe or special.get("recipe")
    special.pop("recipe", None)
    changes = settings(named(blocks, "recipes", recipe), f"recipes.{recipe}")
    name = dataset or settings(special.get("data"), f"backbones.{backbone}.data").get("name")
    own = settings(named(blocks, "datasets", name), f"datasets.{name}")

    config = copy.deepcopy(defaults)
    merge(config, blocks["defaults"], "defaults")
    merge(config, own.get("config"), f"datasets.{name}.config")
    merge(config, special, f"backbones.{backbone}")
    for key in ("all", backbone):
        merge(config, changes.get(key), f"recipes.{recipe}.{key}")
    config |= {"backbone": backbone, "recipe": recipe, "datasets": blocks["datasets"]}
    config["data"]["name"] = name
    config["data"]["root"] = data_root or config["data"]["root"]
    keys = [set_key(config, item) for item in sets]
    if {"image.name", "image.size"} & {*keys} and "image.eval_size" not in keys:
        config["image"]["eval_size"] = None            # what was chosen for another encoder or another size
    check(config, defaults)
    return config


def read_blocks(path: str | Path, needed=("datasets",)) -> dict:
    """The blocks of a configuration file, among them those that are needed."""
    try:
        blocks = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the configuration '{path}': {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"'{path}' is not YAML: {one_line(error)}") from None
    require(isinstance(blocks, dict) and all(isinstance(blocks.get(key), dict) for key in needed),
            f"'{path}' needs the blocks {', '.join(needed)}")
    return blocks


def named(blocks: dict, kind: str, name: str | None):
    require(name in blocks[kind], f"{kind} has no '{name}'; valid: {', '.join(blocks[kind])}")
    return blocks[kind][name]


def settings(block, where: str) -> dict:
    """A block of the file; an empty one is null in YAML."""
    require(isinstance(block or {}, dict), f"{where} is {block!r}; it must be a block of settings")
    return block or {}


def merge(into: dict, new: dict | None, where: str):
    for key, value in settings(new, where).items():
        require(key in into, f"unknown key '{key}' in {where}; valid: {', '.join(into)}")
        if isinstance(into[key], dict) and key != "options":
            merge(into[key], value, f"{where}.{key}")
        else:
            into[key] = fitting(value, into[key], f"{where}.{key}")


def fitting(value, old, where: str):
    """`value`, if it is null or of the type of the setting `old` (any number for one). Else UserError."""
    if isinstance(value, str) and not isinstance(old, str):
        with contextlib.suppress(ValueError):
            value = float(value)                                   # YAML reads 2e-4, without a dot, as text
    fits = is_number(value) if is_number(old) else old is None or isinstance(value, type(old))
    require(fits or value is None, f"{where}: {value!r} is not a {type(old).__name__}, as {old!r} is")
    return value


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def set_key(config: dict, item: str) -> str:
    """One --set key=value: the key is dotted, the value YAML. -> the key."""
    key, equals, text = item.partition("=")
    require(equals, f"--set takes key=value, got '{item}'")
    require(key != "data.name", "--set data.name: name the data set with --data")
    *path, last = key.split(".")
    block = config
    for part in path:
        block = block.get(part) if isinstance(block, dict) else None
    free = any(f"{key}.".startswith(f"{name}.") for name in FREE)
    known = isinstance(block, dict) and last in block and not isinstance(block[last], dict) and path
    require(isinstance(block, dict) and (free or known), f"unknown key '{key}'; valid: "
            + ", ".join(f"{section}.{name}" for section in SECTIONS for name in config[section]))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"--set {key}: '{text}' is not a YAML value") from None
    block[last] = fitting(value, block.get(last), f"--set {key}")
    return key


def check(config: dict, defaults: dict):
    """Values that no run can use, told before anything is read."""
    found = flat(config)

    def get(key):
        require(key in found, f"{key} is missing: the block `defaults` of configs.yaml must have it")
        return found[key]

    for key, default in flat(defaults).items():
        may = default is None or key == "text.name"
        require(get(key) is not None or may, f"{key} is null; it must have a value, as {default!r}")
    for what, (kind, fits, keys) in LIMITS.items():
        for key in keys.split():
            value = get(key)
            fine = isinstance(value, kind) and not isinstance(value, bool) and fits(value)
            require(fine or value is None, f"{key} is {value!r}; it must be {what}")
    for key, valid in CHOICES.items():
        require(get(key) in valid, f"{key} is '{get(key)}'; valid: {', '.join(valid)}")
    crop = get("augment.crop")
    require(len(crop) == 2 and 0 < crop[0] <= crop[1], f"augment.crop is {crop}; it must be [least, most]")
    require(any(get(f"loss.{level}") for level in modules.LEVELS),
            "every level of loss (ori, key, unc, glo) is 0: nothing is left to learn from")
    require(not get("loss.glo") or get("model.joint"), "loss.glo needs model.joint=true and encoders for it")
    require(not get("model.joint") or get("text.pretrained"), "model.joint needs text.pretrained=true")
    require(not get("image.weights") or get("image.pretrained"), "image.weights needs image.pretrained=true")


def flat(config: dict, prefix: str = "") -> dict:
    """{"train.lr": ...} of nested blocks."""
    found = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


# ---- the run folder and its checkpoints --------------------------------------------------------------------
def hold(out: Path):
    """Locks a run folder until this process ends. UserError if another process holds it."""
    with contextlib.suppress(ImportError):                         # Windows has no such locks
        import fcntl
        file = os.open(out / "lock", os.O_RDWR | os.O_CREAT)       # never closed, which would end the lock
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise UserError(f"--out: another run writes to '{out}': wait, or name another folder") from None


def make_folder(out: Path, config: dict, resume: bool) -> Path | None:
    """Makes the folder of a run. An earlier run in it is renamed, unless it is resumed -> its new name."""
    kept = None
    try:
        earlier = any((out / name).exists() for name in ("metrics.jsonl", "last.pt", "best.pt"))
        if earlier:
            hold(out)
        if earlier and not resume:
            number = 1
            while (kept := out.with_name(f"{out.name}.{number}")).exists():
                number += 1
            out.rename(kept)
        out.mkdir(parents=True, exist_ok=True)
        hold(out)
        (out / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    except (OSError, ValueError) as error:                        # ValueError: the folder has no name, as "."
        raise UserError(f"--out: '{out}' cannot be made, or what is there renamed ({one_line(error)}): name "
                        "another folder") from None
    return kept


def save(path: Path, checkpoint: dict, previous: Path | None = None):
    """Written whole or not at all: beside, flushed, then renamed. What was there becomes `previous`."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(beside, path)
        if hasattr(os, "O_DIRECTORY"):                             # the names as well; Windows cannot
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        raise UserError(f"'{path}' cannot be written ({one_line(error)}); what was saved before is intact: "
                        "make room and go on with --resume") from None


def load_checkpoint(path: str | Path) -> dict:
    """The dictionary that train_grm.py saved. Nothing in the file can execute (weights_only=True)."""
    path = Path(path)
    require(path.is_file(), f"no such checkpoint: '{path}'; training writes runs/<backbone>-<data>/best.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                              # a damaged file raises whatever its bytes lead to
        raise UserError(f"'{path}' is not a GRM checkpoint or is damaged ({one_line(error)[:100]})") from None
    needed = {"model", "config", "tokenizer", "text_config"}
    require(isinstance(checkpoint, dict) and needed <= checkpoint.keys(),
            f"'{path}' is not a GRM checkpoint: it was not written by train_grm.py")
    return checkpoint


def load_last(out: Path) -> dict:
    """last.pt, or, with a warning, the one before it where last.pt is damaged or was just being replaced."""
    found = [path for path in (out / "last.pt", out / "last.prev.pt") if path.exists()]
    require(found, f"--resume: '{out}' holds no last.pt; name the run's folder with --out, or do not resume")
    for path in found:
        try:
            checkpoint = load_checkpoint(path)
            with zipfile.ZipFile(path) as archive:                 # torch.load compares no checksums
                damaged = archive.testzip()
            require(not damaged, f"'{path}' is damaged ({damaged} fails its checksum)")
            require("random_states" in checkpoint,
                    f"'{path}' cannot be resumed: it holds weights only, or another version wrote it")
            return checkpoint
        except UserError as error:
            if path == found[-1]:
                raise
            warnings.warn(f"{error}: going on from {found[-1].name}, the one before")


def model_from_checkpoint(checkpoint: dict, size: int | None = None):
    """-> GRM in evaluation mode, its tokeniser, without the hub. size: becomes its own image.eval_size."""
    tokenizer = encoders.tokenizer_from_state(checkpoint["tokenizer"])
    try:
        if size is not None:
            checkpoint["config"]["image"]["eval_size"] = size
        rows, pad_id = encoders.rows_needed(tokenizer), tokenizer.pad_token_id
        model = modules.build_grm(checkpoint["config"], rows, pad_id, checkpoint["text_config"],
                                  pretrained=False, tried=size is None)
        model.load_state_dict(checkpoint["model"])
    except UserError:
        raise
    except Exception as error:               # whatever the libraries raise for entries that they cannot read
        raise UserError(f"the checkpoint is damaged or of another version of this code ({one_line(error)}): "
                        "train again or use the version that wrote it") from None
    return model.eval(), tokenizer


def find_checkpoint(name: str) -> Path:
    """A path as it is; a bare file name that is not here means that file of the newest run below runs/."""
    path = Path(name)
    if path.exists() or len(path.parts) > 1:
        return path
    found = sorted(Path("runs").glob(f"*/{name}"), key=os.path.getmtime)
    return found[-1] if found else path


# ---- signals -----------------------------------------------------------------------------------------------
class Stopped(BaseException):
    """A signal asked the run to stop. Not an Exception, so that nothing takes it for a failure of its own."""


class Signals:
    """SIGINT, SIGTERM, SIGHUP set `stop`, so that a step ends first; within `at_once()` they raise Stopped.
    The next SIGINT or SIGTERM ends the process, except under torchrun, which itself adds a SIGTERM."""

    def __init__(self):
        self.stop, self.immediate, self.process = False, False, os.getpid()
        numbers = [signal.SIGINT, signal.SIGTERM]
        if SIGHUP and signal.getsignal(SIGHUP) != signal.SIG_IGN:   # nohup ignores it
            numbers.append(SIGHUP)
        self.before = {number: signal.signal(number, self.receive) for number in numbers}

    def receive(self, number, frame):
        if os.getpid() != self.process:                         # in a copy of the process, which loads data
            return
        if number == SIGHUP:
            leave_terminal()
        if "LOCAL_RANK" not in os.environ:
            for other in self.before:
                signal.signal(other, signal.SIG_IGN if other == SIGHUP else signal.SIG_DFL)
        self.stop = True
        if self.immediate:
            raise Stopped

    @contextlib.contextmanager
    def at_once(self):
        self.immediate = True
        try:
            if self.stop:
                raise Stopped
            yield
        finally:
            self.immediate = False

    def release(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def leave_terminal():
    """Once a terminal is gone, every line written to it is an error: they go nowhere from here on."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        if not stat.S_ISREG(os.fstat(stream).st_mode):          # a log file stays
            os.dup2(nowhere, stream)


def leave_signals_to_the_run(worker: int):
    """For data-loading processes, which a shell's Ctrl-C reaches too: the last step still needs them. A
    second SIGTERM, which the run itself sends, ends one that is stuck."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if SIGHUP:
        signal.signal(SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


# ---- what every script shares ------------------------------------------------------------------------------
@contextlib.contextmanager
def one_line_errors():
    """One line ends a script for what the user did wrong, a NaN, want of memory or data, and Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):   # a console that lacks a character shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (UserError, OSError, FloatingPointError, RuntimeError, MemoryError) as error:
        said = str(error)
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in said:
            said = "there is no memory left: lower train.micro_batch, or an evaluation's --batch-size"
        elif said.startswith("DataLoader"):
            said = (f"the processes that load images failed ({one_line(said)}): give a container more shared "
                    "memory (--shm-size), check the disk or, in training, set data.workers=0 and --resume")
        elif isinstance(error, RuntimeError):
            raise
        error.__traceback__ = None           # it holds the data-loading processes, which would be waited for
        sys.exit(f"error: {said}")
    except KeyboardInterrupt:
        sys.exit("stopped")


def loader(dataset, workers: int, device: torch.device, **more) -> DataLoader:
    """A DataLoader. RuntimeError if its processes give no batch for LOADER_SECONDS, or one of them dies."""
    return DataLoader(dataset, num_workers=workers, timeout=LOADER_SECONDS if workers else 0,
                      pin_memory=device.type == "cuda", worker_init_fn=leave_signals_to_the_run,
                      generator=torch.Generator(), **more)         # its own, or an epoch's start draws noise


def amp_context(config: dict, device: torch.device):
    """Autocast as `train.amp` says: bf16 where the card has it, else fp16; nothing on the CPU."""
    enabled = config["train"]["amp"] and device.type == "cuda"
    return torch.autocast(device.type, amp_type(device), enabled=enabled)


def amp_type(device: torch.device) -> torch.dtype:
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bf16 else torch.float16


def provenance() -> dict:
    """Where a figure comes from, for results/*.json: commit, versions, machine."""
    git, commit = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], ""
    with contextlib.suppress(OSError):                             # a small container may have no git
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {"commit": commit or None, "versions": versions, "machine": machine}
