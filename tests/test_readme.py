"""Every command and snippet of README.md and docs/*.md runs, with fewer steps, or stands in NOT_RUN with the reason."""

import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import typer.main

import boxed
import pasting
from command_line import RunCli
from drawing import draw_images
from reslearn import create
from reslearn.cli import app
from reslearn.data.download import OFFICIAL
from reslearn.nets import zoo
from reslearn.weights import write

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMAND = re.compile(r"(\S*/)?(reslearn|torchrun|make|python3?|pip|git|open|docker|srun|sbatch) .+")
TORCHRUN = "eight processes; tests/training/test_ranks.py and tests/detect/test_ranks.py start two"
NOT_RUN = {
    "make demo": "creates an environment; its target is checked below",
    "make test": "runs this test",
    ".venv/bin/reslearn predict runs/demo examples/clothes": "printed by make demo",
    "make install": "creates an environment; its target is checked below",
    "pip install .": "tests/test_packaging.py installs the wheel",
    "torchrun --nproc-per-node 8 -m reslearn train photos --out runs/eight": TORCHRUN,
    "torchrun --nproc-per-node 8 -m reslearn train --resume runs/eight": TORCHRUN,
    "torchrun --nproc-per-node 8 --max-restarts 3 -m reslearn train photos --out runs/eight": TORCHRUN,
    "torchrun --nproc-per-node 8 -m reslearn detect train coco --recipe coco-paper --init runs/imagenet": TORCHRUN,
}
HOURS = "takes minutes to hours; tests/reproduce runs every experiment at smoke scale"
STAND_INS = {"runs/imagenet": "reslearn train photos --model resnet8 --out runs/imagenet"}  # what no command makes
FEWER: list[tuple[str, list[str]]] = [  # the first that a command begins with: options that make it small
    (r"reslearn (detect )?train --resume", []),
    (r"reslearn train .*imagenet-classic", ["--set", "schedule.steps=2", "--set", "data.size=64"]),
    (r"reslearn train .*imagenet-fast", ["--set", "schedule.steps=2", "--set", "data.size=64", "--set", "data.grow=[32,64]"]),
    (r"reslearn train cifar10", ["--set", "schedule.steps=2", "--set", "data.val=50"]),
    (r"reslearn train", ["--set", "schedule.steps=2"]),
    (r"reslearn detect train .*alternate=\[1,1,1,1\]|.*4step", ["--set", "schedule.steps=4"]),
    (r"reslearn detect train .*alternate=\[2,1,2,1\]", ["--set", "schedule.steps=6"]),
    (r"reslearn detect train", ["--set", "schedule.steps=2"]),
    (r"reslearn localize train .*localize-regions", ["--set", "schedule.epochs=0.5", "--set", "localizer.proposals=8"]),
    (r"reslearn localize train (?!--resume)", ["--set", "schedule.epochs=0.5", "--set", "data.size=32"]),
    (r"reslearn bench train", ["--data", "fashion-sample", "--batch", "8", "--rounds", "1", "--steps", "1"]),
    (r"reslearn bench", ["--rounds", "1", "--images", "50"]),
    (r"reslearn analyze (?!explain)", ["--images", "8"]),
    (r"reslearn reproduce figure1", ["--scale", "smoke", "--only", "plain20"]),
]
SMALL_IMAGES = ["--set", "detector.min_size=48", "--set", "detector.max_size=64"]
SHORTER = {
    "epochs=5": "epochs=0.02",
    "resnet50-v1.5": "resnet8",
    "masks=True)  #": "masks=True, min_size=48, max_size=64)  #",
    "(200, 400, 600, 800, 1000)": "(48, 64)",
}


class Section(NamedTuple):
    document: Path
    heading: str
    blocks: list[tuple[str, str]]  # language and text


def read_sections() -> Iterator[Section]:
    for document in DOCUMENTS:
        blocks: list[tuple[str, str]] = []
        for heading, language, block in re.findall(r"^#+ (.*)$|^```(\w*)\n((?:.|\n)*?)^```", document.read_text(), re.M):
            if heading:
                blocks = []
                yield Section(document, heading, blocks)
            else:
                blocks.append((language, block))


def commands(section: Section) -> list[str]:
    lines = [line for language, block in section.blocks if not language for line in block.splitlines()]
    return [re.sub(r"\s+#.*", "", line) for line in lines if COMMAND.match(line)]


def why_not_run(section: Section, command: str) -> str:
    """The reason why a command is not run here; "" if it is."""
    measured = section.document.name == "paper.md" and section.heading != "The paper, reproduced"
    return NOT_RUN.get(command) or (HOURS if measured else "")


def result_of(command: str) -> str:
    """The path that a command writes to."""
    return next(iter(re.findall(r"(?:--out|-o) (\S+)", command)), "")


SECTIONS = [section for section in list(read_sections()) if section.blocks]
RUN = [(section, command) for section in SECTIONS for command in commands(section) if not why_not_run(section, command)]
MAKERS = STAND_INS | {result_of(command): command for _, command in reversed(RUN) if result_of(command)}


def namespace(heading: str) -> dict[str, Any]:
    """The names that a snippet takes for given."""
    if heading == "Average precision in Python":
        from reslearn.data.boxes.read import open_boxes
        from reslearn.evaluation.matching import match

        test = open_boxes("VOCdevkit")["test"]
        detections = [{**image.target(), "scores": torch.ones(len(image.objects))} for image in test.images]
        others = match([image.objects for image in test.images], detections, test.classes)
        return {"test": test, "detections": detections, "others": others}
    if heading == "Detectors in Python":
        from reslearn.detect import create_detector

        images = [torch.rand(3, 64, 64)]
        target = {"boxes": torch.tensor([[8.0, 8, 40, 48]]), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, 64, 64, dtype=torch.uint8)
        another = create_detector("resnet8", 20, kind="fpn", masks=True, min_size=48, max_size=64).eval()
        return {"images": images, "targets": [target], "held_out_images": images, "their_targets": [target], "another": another}
    return {}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results that several sections need."""
    return tmp_path_factory.mktemp("kept")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data that the documents speak of, small."""
    folder = tmp_path_factory.mktemp("prepared")
    photos = draw_images(folder / "photos", classes=["cat", "dog"], each=14, size=(100, 140))
    (photos / "cat" / "0.png").rename(photos / "cat" / "1.jpg")  # a PNG that is called a JPEG
    shutil.copy(photos / "cat" / "2.png", folder / "slide.jpg")
    for root in (folder / "cells", folder / "bccd", folder / "VOCdevkit" / "VOC2007"):
        boxed.shapes(root, split="trainval" if root.name == "VOC2007" else "train")
        boxed.shapes(root, images=3, split="test")
    flat = next((folder / "bccd" / "Annotations").glob("train-*.xml"))
    flat.write_text(re.sub(r"(<xmax>).*?(</xmax>.*?<xmin>)(.*?)(</xmin>)", r"\g<1>\3\2\3\4", flat.read_text(), count=1))
    pasting.paste(folder / "coco", sorted((photos / "dog").iterdir()), {"train": 4, "val": 2}, side=64)
    shutil.copytree(ROOT / "examples" / "clothes", folder / "examples" / "clothes")
    state = {f"module.{name.replace('fc.', 'linear.')}": value for name, value in create("resnet20").state_dict().items()}
    torch.save({"state_dict": state}, folder / "resnet20-12fca82f.th")
    return folder


@pytest.fixture
def _small_cifar10(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 of a few random images, wherever the real one is."""
    official, data, numbers = OFFICIAL["cifar10"], tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    (data / official.folder).mkdir()
    for file in official.files:
        records = numbers.integers(0, 256, (60, 3073), np.uint8)
        records[:, 0] = np.arange(60) % 10
        (data / official.folder / file).write_bytes(records.tobytes())
    monkeypatch.setitem(OFFICIAL, "cifar10", replace(official, files=dict.fromkeys(official.files, 60 * 3073)))
    monkeypatch.setenv("RESLEARN_DATA", str(data))


class Shell:
    """Runs commands, each after those that make what it needs; results in `kept` are for the sections that follow."""

    def __init__(self, run_cli: RunCli, kept: Path) -> None:
        self.run_cli, self.kept = run_cli, kept

    def need(self, text: str) -> None:
        for path in MAKERS:
            kept = self.kept / path
            if not re.search(rf"(?<![\w./-]){re.escape(path)}(?![\w-])", text) or Path(path).exists():
                continue
            if not kept.exists():
                self.run(MAKERS[path])
            source, target = (kept, Path(path)) if kept.exists() else (Path(path), kept)
            target.parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if source.is_dir() else shutil.copy)(source, target)

    def run(self, command: str) -> None:
        self.need(command.replace(result_of(command) or " ", " "))
        words = shlex.split(re.sub(r"--set schedule\.(epochs|steps)=\d+|--epochs \d+|--size 96", "", command))
        words += next((more for pattern, more in FEWER if re.match(pattern, command)), [])
        if words[1:3] == ["detect", "train"] and "--resume" not in words:
            words += SMALL_IMAGES + (["--set", "detector.anchors=[16,24]"] if "-paper" in command else [])
        code, _, err = self.run_cli(*words[1:])
        findings = words[1] == "doctor" and code == 1  # a photo is not what its name says
        assert code == 0 or findings, f"{command}: {err}"


@pytest.mark.slow
@pytest.mark.usefixtures("_small_cifar10")
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: f"{section.document.stem}: {section.heading}")
def test_every_command_and_snippet_runs(
    section: Section, prepared: Path, kept: Path, tmp_path: Path, run_cli: RunCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zoo, "TABLE", dict(zoo.TABLE))  # snippets add rows
    monkeypatch.setattr(write, "FORMATS", dict(write.FORMATS))
    shutil.copytree(prepared, tmp_path, symlinks=True, dirs_exist_ok=True)
    for made in filter(None, map(result_of, commands(section))):
        shutil.rmtree(tmp_path / made, ignore_errors=True)
    shell = Shell(run_cli, kept)
    for language, block in section.blocks:
        if language == "python":
            shell.need(block)
            for long, short in SHORTER.items():
                block = block.replace(long, short)
            exec(block, namespace(section.heading))
        elif language == "toml" and "entry-points" in block:
            module, _, attribute = tomllib.loads(block)["project"]["entry-points"]["reslearn.tasks"]["brightness"].partition(":")
            assert getattr(import_module(module), attribute).name == "brightness"
        elif language == "toml":
            Path("my.toml").write_text(block)
            shell.run("reslearn train photos --recipe my.toml --out runs/toml")
        else:
            for command in commands(section._replace(blocks=[(language, block)])):
                if not why_not_run(section, command):
                    assert command.startswith("reslearn "), f"{command}: give the reason in NOT_RUN why this cannot run"
                    shell.run(command)


def test_what_is_not_run_is_still_there() -> None:
    assert set(NOT_RUN) <= {command for section in SECTIONS for command in commands(section)}


def test_commands_that_are_not_run_and_those_within_sentences_have_options_that_exist() -> None:
    words = [shlex.split(command) for section in SECTIONS for command in commands(section) if why_not_run(section, command)]
    words = [line[line.index("reslearn") + 1 :] for line in words if "reslearn" in line]
    for document in DOCUMENTS:
        prose = re.sub(r"^```(?:.|\n)*?^```", "", document.read_text(), flags=re.M)
        words += [shlex.split(span) for span in re.findall(r"`reslearn ([^`]+)`", prose) if "..." not in span]
    assert len(words) > 50
    for line in words:
        command, rest = typer.main.get_command(app), line
        while groups := getattr(command, "commands", {}):
            if rest[0].startswith("--"):
                break
            assert rest[0] in groups, line
            command, rest = groups[rest[0]], rest[1:]
        options = {"--help", "--install-completion"} | {name for parameter in command.params for name in parameter.opts}
        assert not {word for word in rest if word.startswith("--")} - options, line


def test_links_and_pictures_are_there() -> None:
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_the_readme_is_short() -> None:
    assert len(DOCUMENTS[0].read_text().splitlines()) <= 150


def test_no_block_is_overlooked() -> None:
    for document in DOCUMENTS:
        fences = len(re.findall(r"^```", document.read_text(), re.M))
        assert fences == 2 * sum(len(section.blocks) for section in SECTIONS if section.document == document)


def test_make_has_the_targets_that_the_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^make (\w+)", DOCUMENTS[0].read_text(), re.M))
    assert {"demo", "test"} <= targets
    assert all(re.search(rf"^{target}:", makefile, re.M) for target in targets)


def test_benchmarks_that_the_documents_name_are_there() -> None:
    for script in re.findall(r"benchmarks/\w+\.py", "".join(document.read_text() for document in DOCUMENTS)):
        assert (ROOT / script).is_file()
