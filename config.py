"""The configuration: configs.yaml from general to special, then --set, and what no run can use told in one line."""
import contextlib
import copy
from pathlib import Path

import yaml

import modules


class ConfigError(Exception):
    """A setting that does not exist or cannot be; the message is one line."""


SECTIONS = ("image", "text", "model", "loss", "augment", "data", "train")
FREE = ("image.options", "text.options", "datasets")           # below these, --set may add keys
# where the least is an int, so is the value
AT_LEAST = {"train.epochs": 1, "train.max_steps": 1, "train.batch_size": 1, "train.micro_batch": 1, "train.log_every": 1,
            "train.val_every": 1, "image.size": 1, "text.max_length": 3, "model.dim": 1, "model.num_prompts": 1,
            "train.max_bad_steps": 1, "data.workers": 0, "train.seed": 0, "train.warmup": 0.0, "train.weight_decay": 0.0,
            "train.save_minutes": 0.0, "train.encoder_lr": 0.0}
NULLABLE = ("train.max_steps", "train.micro_batch")             # numbers that null switches off
POSITIVE = ("model.tau", "model.prompt_scale", "loss.temperature", "train.lr", "train.clip")
CHOICES = {"loss.kind": ("infonce", "triplet"), "data.epoch": ("captions", "images")}


def load_config(path: str, backbone: str, dataset: str | None = None, data_root: str | None = None, sets=()) -> dict:
    """The resolved configuration: defaults <- the data set's `config` <- the backbone <- flags and --set key=value."""
    try:
        blocks = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration '{path}': {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"'{path}' is not YAML: {' '.join(str(error).split())}") from None
    needed = ("defaults", "backbones", "datasets")
    if not isinstance(blocks, dict) or not all(isinstance(blocks.get(key), dict) for key in needed):
        raise ConfigError(f"'{path}' needs the blocks defaults, backbones and datasets")
    if backbone not in blocks["backbones"]:
        raise ConfigError(f"unknown backbone '{backbone}'; valid: {', '.join(blocks['backbones'])}")
    defaults = {section: {key: fitting(value, None, key) for key, value in
                          settings(blocks["defaults"].get(section), f"defaults.{section}").items()} for section in SECTIONS}
    special = settings(blocks["backbones"][backbone], f"backbones.{backbone}")
    name = dataset or settings(special.get("data"), f"backbones.{backbone}.data").get("name")
    if name not in blocks["datasets"]:
        raise ConfigError(f"unknown data set '{name}'; valid: {', '.join(blocks['datasets'])}")
    config = copy.deepcopy(defaults)
    merge(config, settings(blocks["datasets"][name], f"datasets.{name}").get("config"), f"datasets.{name}.config")
    merge(config, special, f"backbones.{backbone}")
    config |= {"backbone": backbone, "datasets": blocks["datasets"]}
    config["data"]["name"] = name
    if data_root:
        config["data"]["root"] = data_root
    for item in sets:
        set_key(config, item)
    check(config, defaults)
    return config


def settings(block, where: str) -> dict:
    """A block of the file; an empty one is null in YAML."""
    if not isinstance(block or {}, dict):
        raise ConfigError(f"{where} is {block!r}; it must be a block of settings")
    return block or {}


def merge(into: dict, new: dict | None, where: str):
    for key, value in settings(new, where).items():
        if key not in into:
            raise ConfigError(f"unknown key '{key}' in {where}; valid: {', '.join(into)}")
        if isinstance(into[key], dict) and key != "options":
            merge(into[key], value, f"{where}.{key}")
        else:
            into[key] = fitting(value, into[key], f"{where}.{key}")


def fitting(value, old, where: str):
    """`value`, if it is of the type of the setting `old`, or null; any number will do for a number. ConfigError else."""
    if isinstance(value, str) and not isinstance(old, str):
        with contextlib.suppress(ValueError):
            value = float(value)                               # YAML reads 2e-4, without a dot, as text
    fits = is_number(value) if is_number(old) else old is None or isinstance(value, type(old))
    if not fits and value is not None:
        raise ConfigError(f"{where}: {value!r} is not a {type(old).__name__}, as {old!r} is")
    return value


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def set_key(config: dict, item: str):
    """One --set key=value, the key dotted, the value YAML."""
    key, equals, text = item.partition("=")
    if not equals:
        raise ConfigError(f"--set takes key=value, got '{item}'")
    *path, last = key.split(".")
    block = config
    for part in path:
        block = block.get(part) if isinstance(block, dict) else None
    settable = isinstance(block, dict) and (
        any(f"{key}.".startswith(f"{free}.") for free in FREE) or last in block and not isinstance(block[last], dict))
    if not settable:
        valid = [f"{s}.{k}" for s in SECTIONS for k in config[s]]
        raise ConfigError(f"unknown key '{key}'; valid: {', '.join(valid)}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: '{text}' is not a YAML value") from None
    block[last] = fitting(value, block.get(last), f"--set {key}")


def check(config: dict, defaults: dict):
    """Values that no run can use, before anything is read."""
    def get(key):
        section, name = key.split(".")
        if name not in config[section]:
            raise ConfigError(f"{key} is missing: the block `defaults` must have it")
        return config[section][name]

    for section in SECTIONS:
        for name, default in defaults[section].items():
            nullable = f"{section}.{name}" in NULLABLE or not isinstance(default, (int, float, list))
            if config[section][name] is None and not nullable:
                raise ConfigError(f"{section}.{name} is null; it must have a value, as {default!r}")
    for key, least in AT_LEAST.items():
        value, whole = get(key), isinstance(least, int)
        fits = is_number(value) and value >= least and not (whole and isinstance(value, float))
        if not fits and not (value is None and key in NULLABLE):
            raise ConfigError(f"{key} is {value!r}; it must be {'a whole number ' * whole}at least {least}")
    for key in POSITIVE:
        if not (is_number(get(key)) and get(key) > 0):
            raise ConfigError(f"{key} is {get(key)!r}; it must be above 0")
    for key in ("model.image_keep", "model.text_keep"):
        if not (is_number(get(key)) and 0 < get(key) < 1):
            raise ConfigError(f"{key} is {get(key)!r}; it must lie between 0 and 1")
    for key, valid in CHOICES.items():
        if get(key) not in valid:
            raise ConfigError(f"{key} is '{get(key)}'; valid: {', '.join(valid)}")
    if not any(get(f"loss.{level}") for level in modules.LEVELS):
        raise ConfigError("loss.ori, loss.key and loss.unc are all 0: nothing is left to learn from")
