"""reslearn recipes: listing and printing the named recipes."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import boxed
from command_line import RunCli
from reslearn import UserError, tasks
from reslearn.classify import recipes
from reslearn.detect import recipes as detectors
from reslearn.training.catalog import by_name, describe
from reslearn.training.recipe import Recipe, fields, keys

# Recipes that are chosen from the data cannot be printed without.
FROM_DATA = {"default", "detect-default"}
FREE = sorted({*recipes.NAMED, *detectors.NAMED} - FROM_DATA)


@pytest.fixture(autouse=True)
def _without_a_task(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Make one task impossible to import."""
    monkeypatch.setattr(tasks, "TASKS", tasks.TASKS | {"localize": "reslearn.no_such_room.task:LOCALIZE"})
    tasks._known.cache_clear()
    yield
    tasks._known.cache_clear()


def test_all_recipes_of_the_tasks_that_can_be_imported_are_listed(run_cli: RunCli) -> None:
    listed = json.loads(run_cli("recipes", "--json").out)
    expected = {name: "classify" for name in recipes.NAMED} | {name: "detect" for name in detectors.NAMED}
    assert {row["name"]: row["task"] for row in listed} == expected
    assert all(row["summary"].endswith(".") and len(row["summary"]) > 10 for row in listed)
    code, out, err = run_cli("recipes")
    assert code == 0 and not err
    assert all(any(line.split()[:2] == [name, task] for line in out.splitlines()) for name, task in expected.items())


@pytest.mark.parametrize("task", ["classify", "detect"])
def test_every_key_has_a_description(task: str) -> None:
    assert not [key for key, field in fields(tasks.get(task).recipe) if not field.description]
    sized = ("size", "min_size", "max_size", "pad", "jitter", "grow", "anchors", "roi_size")
    for key, field in fields(tasks.get(task).recipe):
        unit = {"data": "px", "detector": ("px", "pixels")}.get(key.split(".")[0], "")
        if key.split(".")[-1] in sized and unit:
            assert any(word in (field.description or "") for word in ([unit] if isinstance(unit, str) else unit)), key


@pytest.mark.parametrize("name", FREE)
def test_a_recipe_is_printed_key_by_key(name: str) -> None:
    rows = describe(name, None, None)
    task = by_name()[name]
    assert [row["key"] for row in rows] == keys(task.recipe)
    assert all(row["meaning"] and row["source"] for row in rows)
    values = {row["key"]: row["value"] for row in rows}
    assert values["name"] == name
    defaults = {key: field.default for key, field in fields(task.recipe)}
    assert not any(isinstance(value, list) for value in values.values()), "tuples, as the defaults are"
    assert all(defaults[row["key"]] == row["value"] for row in rows if row["source"] == "default")
    assert all(defaults[row["key"]] != row["value"] for row in rows if row["source"] == "this recipe")


def test_cifar10_paper_quotes_the_paper(run_cli: RunCli) -> None:
    rows = {row["key"]: row for row in json.loads(run_cli("recipes", "cifar10-paper", "--json").out)}
    assert rows["schedule.drops"]["value"] == [32000, 48000]
    assert rows["schedule.drops"]["source"] == '"divide it by 10 at 32k and 48k iterations"'
    assert rows["batch.size"]["value"] == 128 and rows["net.name"]["value"] == "resnet20"
    assert (rows["ema"]["value"], rows["ema"]["source"]) == (None, "default")
    deep = {row["key"]: row for row in json.loads(run_cli("recipes", "cifar10-paper", "--model", "resnet110", "--json").out)}
    assert deep["schedule.warmup_lr"]["value"] == 0.01 and "below 80%" in deep["schedule.warmup_lr"]["source"]
    code, out, err = run_cli("recipes", "cifar10-paper")
    assert code == 0 and not err and out.startswith("The paper's CIFAR-10 training (DRL 4.2), with the source of each number.")
    words = " ".join(out.split())
    assert all(key in words for key in keys(Recipe)) and "[32000,48000]" in words and "Deviations:" in words


def test_recipes_that_depend_on_data_require_it_and_give_reasons(images: Path, tmp_path: Path, run_cli: RunCli) -> None:
    for name in FROM_DATA:
        code, out, err = run_cli("recipes", name)
        assert code == 2 and not out and err.count("\n") == 1
        assert f"recipe {name} " in err and "the data" in err
    rows = {row["key"]: row for row in json.loads(run_cli("recipes", "default", images, "--json").out)}
    assert (rows["net.name"]["value"], rows["net.name"]["source"]) == ("resnet20", "net resnet20: images are about 16x16 px")
    assert (rows["batch.size"]["value"], rows["batch.size"]["source"]) == (16, "batch 16: 24 images")
    code, out, err = run_cli("recipes", "default", images, "--model", "resnet14")
    assert code == 0 and not err and "resnet14" in out and "60 epochs: 24 images" in " ".join(out.split())
    boxes = boxed.shapes(tmp_path / "boxes")
    rows = {row["key"]: row for row in json.loads(run_cli("recipes", "detect-default", boxes, "--json").out)}
    assert rows["detector.min_size"]["value"] == 48 and "shorter side 48 px" in rows["detector.min_size"]["source"]


@pytest.mark.parametrize("words, said", [
    (["cifar10-papr"], "no recipe 'cifar10-papr'; did you mean 'cifar10-paper'?"),
    (["cifar10-paper", "nowhere"], "no data set or folder called 'nowhere'"),
    (["cifar10-paper", "--model", "resnt20"], "no network called 'resnt20'; did you mean 'resnet20'"),
])  # fmt: skip
def test_invalid_arguments_give_a_one_line_error(words: list[str], said: str, run_cli: RunCli) -> None:
    code, out, err = run_cli("recipes", *words)
    assert code == 2 and not out and err.count("\n") == 1 and said in err


def test_unsuitable_data_is_rejected(images: Path) -> None:
    with pytest.raises(UserError, match="recipe cifar10-paper is for 32x32 color images"):
        describe("cifar10-paper", str(images), None)
