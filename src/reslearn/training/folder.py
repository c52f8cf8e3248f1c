"""A run folder as the run's processes find it: its facts, and who is at work in it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import ValidationError

from reslearn import tasks
from reslearn.data.preprocess import Preprocessing
from reslearn.errors import UserError
from reslearn.files import writing
from reslearn.training import ranks


def begun(out: str | Path | None) -> Path | None:
    """The run that torchrun's present job has begun before it was restarted, if that is what has happened."""
    restarted, most = ranks.restarts()
    if most and out is None:
        raise UserError("torchrun may restart this run, which needs a folder to find it again: say where with --out")
    if not restarted or out is None or not (Path(out) / "recipe.json").exists():
        return None
    return Path(out) if read_facts(Path(out)).get("job") == ranks.job() else None


def read_facts(folder: Path) -> dict[str, Any]:
    """What recipe.json holds. Raises UserError where the folder is no run, or the file is damaged."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no recipe.json")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"recipe": dict, "source": str, "data": dict, "machine": dict, "versions": dict, "chose": list}
        for key, kind in kinds.items():
            if not isinstance(facts[key], kind):
                raise TypeError(f"'{key}' is no {kind.__name__}")
        for key in ("name", "classes", "n", "fingerprint", *tasks.get(facts["task"]).described):
            facts["data"][key]
        for key in ("device", "processor", "threads", "precision", "execution"):
            facts["machine"][key]
        Preprocessing.model_validate(facts["preprocessing"])
    except UserError:
        raise
    except ValidationError as error:
        raise UserError(f"{path} is damaged (preprocessing): the run cannot be resumed") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): the run cannot be resumed") from error
    return facts


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder. Raises UserError where one is there already."""
    lock = FileLock(folder / "lock")

    def take() -> None:
        with writing(folder / "lock"):
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(f"another process is at work in {folder}") from error

    ranks.by_first(take)
    try:
        yield
    finally:
        lock.release()


def read_held_out(model: Path) -> dict[str, list[str]]:
    """The names that the run of a model file or run folder held out of an undivided set; {} where there is no such record."""
    record = (model if model.is_dir() else model.parent) / "split.json"
    if not record.is_file():
        return {}
    try:
        held_out = json.loads(record.read_text(encoding="utf-8"))
        if any(not isinstance(name, str) for names in held_out.values() for name in names):
            raise TypeError("its names are no texts")
    except (OSError, ValueError, TypeError, AttributeError) as why:
        raise UserError(f"{record}: damaged, so that it is not known which images the run held out: {why}") from None
    return held_out
