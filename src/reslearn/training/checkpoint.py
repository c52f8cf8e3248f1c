"""Checkpoints: folders with a manifest of hashes, written atomically and verified when loaded. No pickle."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from reslearn.errors import UserError
from reslearn.files import fsync_file, fsync_folder, writing
from reslearn.weights.store import CARD, Card

KEEP = 2  # the newest, and one to fall back to if it is damaged


class Checkpoint(NamedTuple):
    """model: weights. state: all other tensors by name. facts: JSON-compatible. best: weights with the lowest validation error."""

    model: dict[str, Tensor]
    state: dict[str, Tensor]
    facts: dict[str, Any]
    best: dict[str, Tensor]


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def save(folder: Path, step: int, checkpoint: Checkpoint, card: Card | None = None) -> Path:
    """Write folder/step-00001200 atomically: write to a temporary name, fsync, rename. Then delete all but the newest two.

    A run that is killed at any moment leaves only complete checkpoints. Raises UserError if the disk is full or read-only;
    existing checkpoints are kept. card: makes model.safetensors and best.safetensors model files that can be loaded.
    """
    target = folder / f"step-{step:08d}"
    if target.exists():  # it is identical: the state at a step is determined by the recipe
        return target
    temporary = folder / f".{target.name}.partial"
    tensors = {"model": checkpoint.model, "state": checkpoint.state, "best": checkpoint.best}
    megabytes = sum(t.nbytes for group in tensors.values() for t in group.values()) / 1e6
    with writing(target, megabytes):
        try:
            for stale in folder.glob(".step-*.partial"):  # left by a process that was killed while saving
                shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir(parents=True)
            for name, group in tensors.items():
                metadata = {CARD: card.model_dump_json()} if card is not None and name != "state" else None
                safetensors.torch.save_file(_contiguous(group), temporary / f"{name}.safetensors", metadata)
            (temporary / "state.json").write_text(json.dumps(checkpoint.facts, indent=1))
            manifest = {file.name: _digest(file) for file in sorted(temporary.iterdir())}
            (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
            for file in temporary.iterdir():
                fsync_file(file)
            fsync_folder(temporary)
            temporary.rename(target)
            fsync_folder(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    prune(folder, KEEP)
    return target


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints of a folder."""
    for old in find(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def find(folder: Path) -> list[Path]:
    """The checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def load(path: Path) -> Checkpoint:
    """Load a checkpoint after verifying every file against the manifest.

    Raises UserError naming the first file that is missing or damaged.
    """
    older = [other.name for other in find(path.parent) if other < path]
    remedy = f"; delete {path} to resume from {older[-1]}" if older else f"; delete {path} to start again"
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name in ("model.safetensors", "state.safetensors", "best.safetensors", "state.json"):
            if _digest(path / name) != manifest.get(name):
                raise UserError(f"{path / name} is damaged: it does not match the manifest{remedy}")
        tensors = {name: safetensors.torch.load_file(path / f"{name}.safetensors") for name in ("model", "state", "best")}
        return Checkpoint(tensors["model"], tensors["state"], json.loads((path / "state.json").read_text()), tensors["best"])
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing{remedy}") from error
    except OSError as error:
        raise UserError(f"cannot read {error.filename or path}: {error.strerror or error}{remedy}") from error
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{path / 'manifest.json'} is damaged: {error}{remedy}") from error
