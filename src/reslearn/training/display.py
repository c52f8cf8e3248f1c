"""What a person sees of a run: a live line in a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Display:
    """Loss, error, images/s and time left. In a terminal a bar shows every step; each line of metrics prints in both."""

    PLAIN_SECONDS = 10  # without a terminal, training lines come no more often

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet, highlight=False, soft_wrap=True, markup=False)
        self.bar: Progress | None = None
        self.printed_at = 0.0

    def say(self, line: str) -> None:
        self.console.print(line)

    def start(self, step: int, total: int) -> None:
        if self.console.is_terminal:
            columns = (
                BarColumn(),
                TextColumn("step {task.completed}/{task.total}  {task.fields[speed]}"),
                TimeRemainingColumn(),
            )
            self.bar = Progress(*columns, console=self.console, transient=True)
            self.task = self.bar.add_task("train", total=total, completed=step, speed="")
            self.bar.start()

    def stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def advance(self, step: int, total: int, images_per_s: float) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step, speed=f"{images_per_s:,.0f} images/s")

    def train(self, line: dict[str, Any], total: int, images_per_s: float) -> None:
        now = time.monotonic()
        if self.bar is None and now - self.printed_at < self.PLAIN_SECONDS and line["step"] != total:
            return
        self.printed_at = now
        self.say(
            f"step {line['step']:>6}/{total}  epoch {line['epoch']:6.2f}  lr {line['lr']:.4f}  loss {line['loss']:.4f}  "
            f"train error {line['error']:5.2f}%  {images_per_s:,.0f} images/s"
        )

    def evaluation(self, line: dict[str, Any]) -> None:
        self.say(
            f"step {line['step']:>6}  epoch {line['epoch']:6.2f}  held-out error {line['top1_error']:.2f}%  loss {line['loss']:.4f}"
        )
