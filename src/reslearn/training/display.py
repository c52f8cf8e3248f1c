"""What a person sees of long work: a live line in a terminal, plain lines elsewhere."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_SECONDS = 10  # without a terminal, lines of progress come no more often


def percent(value: float | None) -> str:
    """A number in percent that may not be there."""
    return "none" if value is None else f"{value:.2f}%"


class Display:
    """Lines that stay, and progress: how much is done, how fast, how long it will still take."""

    def __init__(self, quiet: bool = False, stderr: bool = False) -> None:
        self.console = Console(quiet=quiet, stderr=stderr, highlight=False, soft_wrap=True, markup=False)
        self.bar: Progress | None = None
        self.what = ""
        self.printed_at = self.trained_at = time.monotonic()

    def __enter__(self) -> "Display":
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line)
        self.printed_at = time.monotonic()

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """`done` of `total` of one piece of work; another `what` begins a new one."""
        if what != self.what:
            self.stop()
            self.what, self.began, self.began_at = what, done, time.monotonic()
        if self.console.is_terminal:
            if self.bar is None:
                columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
                self.bar = Progress(*columns, TimeRemainingColumn(), console=self.console, transient=True)
                self.task = self.bar.add_task(what, total=total, completed=done, note=note)
                self.bar.start()
            self.bar.update(self.task, completed=done, note=note)
        elif time.monotonic() - self.printed_at >= PLAIN_SECONDS:
            self.say(f"{what} {done:,}/{total:,}  {note}  {self._left(done, total)}")

    def stop(self) -> None:
        """The present piece of work is over."""
        if self.bar is not None:
            self.bar.stop()
        self.bar, self.what = None, ""

    def train(self, line: dict[str, Any], total: int, images_per_s: float) -> None:
        """One training line of metrics.jsonl."""
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
        """The numbers of an evaluation."""
        self.say(f"step {step:>6}  epoch {epoch:6.2f}  {text}")

    def _left(self, done: int, total: int) -> str:
        if done <= self.began:
            return ""
        seconds = round((time.monotonic() - self.began_at) / (done - self.began) * (total - done))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        return (f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}") + " left"
