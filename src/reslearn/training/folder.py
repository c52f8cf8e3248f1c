"""The run folder: recipe.json, split.json and the lock."""

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
    """The run to resume if torchrun has restarted the job that began it, otherwise None."""
    restarts, max_restarts = ranks.restarts()
    if max_restarts and out is None:
        raise UserError("torchrun --max-restarts needs a fixed run folder: set --out")
    if not restarts or out is None or not (Path(out) / "recipe.json").exists():
        return None
    return Path(out) if read_facts(Path(out)).get("job") == ranks.job() else None


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of recipe.json. Raises UserError if the folder is not a run or the file is damaged."""
    path = folder / "recipe.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: it has no recipe.json")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        kinds = {"recipe": dict, "source": str, "data": dict, "machine": dict, "versions": dict, "chose": list}
        for key, kind in kinds.items():
            if not isinstance(facts[key], kind):
                raise TypeError(f"'{key}' is not a {kind.__name__}")
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
    """Lock a run folder. Raises UserError if another process holds the lock."""
    lock = FileLock(folder / "lock")

    def take() -> None:
        with writing(folder / "lock"):
            try:
                lock.acquire(timeout=0)
            except Timeout as error:
                raise UserError(f"another process is using {folder}") from error

    ranks.by_first(take)
    try:
        yield
    finally:
        lock.release()


def read_held_out(model: Path) -> dict[str, list[str]]:
    """The images that the run of a model file or run folder held out, by split; {} if there is no split.json."""
    record = (model if model.is_dir() else model.parent) / "split.json"
    if not record.is_file():
        return {}
    try:
        held_out = json.loads(record.read_text(encoding="utf-8"))
        if any(not isinstance(name, str) for names in held_out.values() for name in names):
            raise TypeError("names must be strings")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{record} is damaged, so the held-out images of the run are unknown: {error}") from None
    return held_out
