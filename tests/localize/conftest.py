"""An easy data set, and a run on it."""

from pathlib import Path

import pytest

from painted_sets import train, write_set


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("shapes") / "set", {"train": 64, "test": 30})


@pytest.fixture(scope="session")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("run") / "whole"
    train(shapes, folder)
    return folder
