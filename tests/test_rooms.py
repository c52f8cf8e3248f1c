"""Packages can be removed: without one of them, the others import, their commands run and their tests pass."""

import json
import os
import shutil
from pathlib import Path

import pytest

import reslearn
from command_line import run_python
from drawing import draw_images

TESTS = Path(__file__).parent
SOURCE = Path(reslearn.__file__).parent

# A room, and what of the rooms above is about it: all are removed together.
ROOMS = {
    "detect": ["detect", "localize", "reproduce"],
    "localize": ["localize", "reproduce"],
    "report": ["report"],
    "deploy": ["deploy"],
    "analysis": ["analysis", "reproduce"],
    "reproduce": ["reproduce"],
    "bench": ["bench"],
}
COMMANDS = {  # one of each room, after a run in "run"
    "": "train photos --model resnet8 --set schedule.steps=1 --set batch.size=4 --out run",
    "report": "report run",
    "deploy": "predict run photos",
    "analysis": "analyze signal run --images 4",
    "reproduce": "reproduce table1 --scale paper",
    "bench": "bench input --help",
}
CORE = [  # tests of what remains, quick ones
    "data/test_sampling.py",
    "weights/test_store.py",
    "evaluation/test_metrics.py",
    "training/test_checkpoint.py",
    "training/test_schedule.py",
    "training/test_step.py",
]
MORE = {  # of the core, without the two tasks that are built on it
    "detect": ["nets/test_blocks.py", "kernels/test_fuse.py", "data/test_augment.py", "classify/test_init.py"]
}

USE = """
import json, os, sys
from importlib import import_module
from pathlib import Path
root, folder, tests, commands = map(json.loads, sys.argv[1:])
for path in sorted(Path(root).rglob("*.py")):
    if path.name != "__main__.py":
        import_module(".".join(("reslearn", *path.relative_to(root).with_suffix("").parts)).removesuffix(".__init__"))
assert sys.modules["reslearn"].__file__ == f"{root}/__init__.py"
from reslearn import cli
for command in commands:
    sys.argv = ["reslearn", *command.split()]
    try:
        cli.main()
    except SystemExit as exit:
        assert not exit.code, command
import pytest
os.chdir(folder)
sys.argv = ["pytest"]
sys.exit(pytest.main(tests))
"""


@pytest.mark.parametrize(
    "room", ["reproduce", *(pytest.param(room, marks=pytest.mark.slow) for room in ROOMS if room != "reproduce")]
)
def test_without_a_room_the_others_work(room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "copy" / "reslearn"
    shutil.copytree(SOURCE, copy)
    for part in ROOMS[room]:
        (shutil.rmtree if (copy / part).is_dir() else os.unlink)(copy / part)
    monkeypatch.setenv("PYTHONPATH", str(copy.parent))
    draw_images(tmp_path / "photos")
    commands = [command for other, command in COMMANDS.items() if other not in ROOMS[room]]
    files = [*CORE, *MORE.get(room, [])]
    tests = ["-n0", "-qx", "-mnot slow", f"--basetemp={tmp_path}/tests", f"--rootdir={TESTS.parent}", *files]
    done = run_python("-c", USE, *map(json.dumps, (str(copy), str(TESTS), tests, commands)), cwd=tmp_path)
    assert done.code == 0, done.out[-3000:] + done.err[-3000:]
