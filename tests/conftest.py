"""Shared fixtures: real data from RESLEARN_DATA, small image folders, a cache per test."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from command_line import Result, RunCli
from drawing import draw_images
from reslearn import cli

torch.set_num_threads(1)  # tests run side by side
if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # started in a shell's background: commands that tests start would ignore it, too
    signal.signal(signal.SIGINT, signal.default_int_handler)

# New examples are for a developer's machine: a landing must not fail by chance.
settings.register_profile("ci", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


# What trains for long, starts many processes or goes over large tables: left out by `make quick`.
SLOW = (
    "analysis",
    "bench",
    "cli/test_detect.py",
    "classify/test_imagenet.py",
    "classify/test_init.py",
    "data/boxes/test_devkit.py",
    "data/images/test_decode.py",
    "data/images/test_imagenet.py",
    "data/images/test_pack.py",
    "data/images/test_sources.py",
    "data/test_download.py",
    "data/doctor",
    "detect/test_alternating.py",
    "detect/test_devkit.py",
    "detect/test_examples.py",
    "detect/test_improvements.py",
    "detect/test_masks.py",
    "detect/test_ranks.py",
    "detect/test_training.py",
    "evaluation/test_views.py",
    "localize/test_commands.py",
    "localize/test_refine.py",
    "localize/test_runs.py",
    "localize/test_training.py",
    "nets/test_convolutional.py",
    "nets/test_cost.py",
    "nets/test_deepen.py",
    "nets/test_zoo.py",
    "reproduce",
    "report/test_story.py",
    "test_notebooks.py",
    "test_packaging.py",
    "test_site.py",
    "test_tasks.py",
    "training/test_catalog.py",
    "training/test_many.py",
    "training/test_ranks.py",
    "training/test_resume.py",
    "training/test_run.py",
    "training/test_stepper.py",
    "weights",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    folder = Path(__file__).parent
    for item in items:
        name = item.path.relative_to(folder).as_posix()
        if any(name == slow or name.startswith(f"{slow}/") for slow in SLOW):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of compiled kernels, shared by all tests."""
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, kernels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path_factory.mktemp("cache")
    (cache / "reslearn").mkdir()
    (cache / "reslearn" / "kernels").symlink_to(kernels)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets."""
    folder = os.environ.get("RESLEARN_DATA")
    if not folder:
        pytest.skip("RESLEARN_DATA is not set: real data is needed")
    return Path(folder)


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunCli:
    """Runs the command line in this process."""

    def run(*words: object) -> Result:
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["reslearn", *map(str, words)])
            with pytest.raises(SystemExit) as exit:
                cli.main()
        return Result(int(exit.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of twelve 16x16 color images."""
    return draw_images(tmp_path / "images")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Two classes of twelve 90x120 color images."""
    return draw_images(tmp_path / "photos", size=(90, 120))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small disk here: that takes root")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)
