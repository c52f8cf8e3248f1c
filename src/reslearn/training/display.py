"""Progress output: a live progress bar in a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10  # shortest time between progress lines without a terminal


def percent(value: float | None) -> str:
    """Formats a percentage that may be undefined."""
    return "none" if value is None else f"{value:.2f}%"


class Display:
    """Prints lines and progress, with speed and remaining time."""

    def __init__(self, quiet: bool = False, stderr: bool = False) -> None:
        self.console = Console(quiet=quiet, stderr=stderr, highlight=False, soft_wrap=True, markup=False)
        self.bar: Progress | None = None
        self._title = ""
        self.printed_at = self.trained_at = time.monotonic()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def say(self, line: str) -> None:
        """Print a line."""
        self.console.print(line)
        self.printed_at = time.monotonic()

    def progress(self, title: str, done: int, total: int, note: str = "") -> None:
        """Show that `done` of `total` items are finished. A new title starts a new progress bar."""
        if title != self._title:
            self.stop()
            self._title, self.began, self.began_at = title, done, time.monotonic()
        if self.console.is_terminal:
            if self.bar is None:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
                self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
                self.task = self.bar.add_task(title, total=total, completed=done, note=note)
                self.bar.start()
            self.bar.update(self.task, completed=done, note=note)
        elif time.monotonic() - self.printed_at >= PLAIN_SECONDS:
            self.say(f"{title} {done:,}/{total:,}  {note}  {self._left(done, total)}")

    def stop(self) -> None:
        """Remove the progress bar."""
        if self.bar is not None:
            self.bar.stop()
        self.bar, self._title = None, ""

    def train(self, line: dict[str, Any], total: int, images_per_s: float) -> None:
        """Print a training line of metrics.jsonl."""
        now = time.monotonic()
        if self.bar is None and now - self.trained_at < PLAIN_SECONDS and line["step"] != total:
            return
        self.trained_at = now
        phase = f"  phase {line['phase']}" if "phase" in line else ""
        error = f"train error {line['error']:5.2f}%  " if "error" in line else ""
        self.say(
            f"step {line['step']:>6}/{total}{phase}  epoch {line['epoch']:6.2f}  lr {line['lr']:.4f}  loss {line['loss']:.4f}  "
            f"{error}{images_per_s:,.{0 if images_per_s >= 10 else 1}f} images/s  {self._left(line['step'], total)}"
        )

    def evaluation(self, step: int, epoch: float, text: str) -> None:
        """Print the result of an evaluation."""
        self.say(f"step {step:>6}  epoch {epoch:6.2f}  {text}")

    def _left(self, done: int, total: int) -> str:
        if done <= self.began:
            return ""
        seconds = round((time.monotonic() - self.began_at) / (done - self.began) * (total - done))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return (f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}") + " left"
