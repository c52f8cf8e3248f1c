"""Writes the numbers of metrics.jsonl for TensorBoard."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reslearn.errors import UserError


def check_installed() -> None:
    """Raise UserError, naming the extra to install, if TensorBoard is missing."""
    if find_spec("tensorboard") is None:
        raise UserError("log.tensorboard needs TensorBoard: pip install 'reslearn[tensorboard]', or set log.tensorboard=false")


class Board:
    """Writes RUN/tensorboard. step: the step that the run continues from; later entries of an earlier process are purged."""

    def __init__(self, folder: Path, step: int) -> None:
        check_installed()
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, line: dict[str, Any]) -> None:
        """Write the numbers of one line of metrics.jsonl, grouped by split."""
        group = line.get("split", "train")
        for key, value in [*line.items(), *line.get("losses", {}).items()]:
            if isinstance(value, float):
                self.writer.add_scalar(f"{group}/{key}", value, line["step"])
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
