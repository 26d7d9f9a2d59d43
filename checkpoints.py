"""Checkpoints: best.pt and last.pt, written whole or not at all, and read without executing anything."""
import os
import warnings
import zipfile
from pathlib import Path

import torch

import data
import hub
import modules

STATE = {"optimizer", "scaler", "random_state", "step", "best", "validated", "skipped", "bad_images", "metrics_size",
         "trained"}                                            # what train_grm.Run.save_last writes and restore needs


class CheckpointError(Exception):
    """A checkpoint that cannot be read or written; the message is one line that says what to do."""


def save(path: Path, checkpoint: dict, previous: Path | None = None):
    """Whole or not at all, whenever the power fails: written beside, flushed to the disk, renamed. What `path` held before
    becomes `previous`."""
    beside = path.with_suffix(".tmp")
    try:
        with open(beside, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if previous and path.exists():
            os.replace(path, previous)
        os.replace(beside, path)
        if hasattr(os, "O_DIRECTORY"):                         # the names as well; Windows cannot
            folder = os.open(path.parent, os.O_DIRECTORY)
            os.fsync(folder)
            os.close(folder)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"'{path}' cannot be written ({hub.one_line(error)}); what was saved before is intact: make room "
                              "and go on with --resume") from None


def load_last(out: Path) -> dict:
    """last.pt, or, with a warning, the one before it where last.pt is damaged or was just being replaced."""
    found = [path for path in (out / "last.pt", out / "last.prev.pt") if path.exists()]
    if not found:
        raise CheckpointError(f"--resume: '{out}' holds no last.pt; name the run's folder with --out, or leave --resume out")
    for path in found:
        try:
            checkpoint = load_checkpoint(path)
            with zipfile.ZipFile(path) as archive:             # torch.load compares no checksums
                if damaged := archive.testzip():
                    raise CheckpointError(f"'{path}' is damaged ({damaged} fails its checksum)")
            if lacking := STATE - checkpoint.keys():
                raise CheckpointError(f"'{path}' cannot be resumed: it holds no {', '.join(sorted(lacking))}")
            return checkpoint
        except CheckpointError as error:
            if path == found[-1]:
                raise
            warnings.warn(f"{error}: going on from {found[-1].name}, the one before")


def load_checkpoint(path: str | Path) -> dict:
    """The dictionary that train_grm.py saved; nothing in the file can execute (weights_only=True)."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such checkpoint: '{path}'; training writes runs/<backbone>-<data>/best.pt")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                                 # a damaged file raises whatever its bytes lead the reader to
        raise CheckpointError(f"'{path}' is not a GRM checkpoint or is damaged ({hub.one_line(error)[:100]})") from None
    if not isinstance(checkpoint, dict) or not {"model", "config", "tokenizer", "text_config"} <= checkpoint.keys():
        raise CheckpointError(f"'{path}' is not a GRM checkpoint: it was not written by train_grm.py")
    return checkpoint


def model_from_checkpoint(checkpoint: dict):
    """-> GRM in evaluation mode, its tokeniser. Needs neither hub nor pretrained weights."""
    tokenizer = data.tokenizer_from_state(checkpoint["tokenizer"])
    try:
        model = modules.build_grm(checkpoint["config"], len(tokenizer), tokenizer.pad_token_id, checkpoint["text_config"],
                                  pretrained=False)
        model.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's settings are those of another version of this code: {error}") from None
    except RuntimeError as error:
        raise CheckpointError("the checkpoint's weights do not fit its configuration: "
                              + str(error).splitlines()[1].strip()) from None
    return model.eval(), tokenizer


def find_checkpoint(name: str) -> Path:
    """A path as it is; a bare file name that is not here means that file of the newest run below runs/."""
    path = Path(name)
    if path.exists() or len(path.parts) > 1:
        return path
    runs = sorted(Path("runs").glob(f"*/{name}"), key=os.path.getmtime)
    return runs[-1] if runs else path
