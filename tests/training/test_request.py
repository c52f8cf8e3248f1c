"""Requests: settings in every form, recipe objects, paths and contradictions."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from reslearn import UserError, train
from reslearn.classify.recipes import ClassifyRecipe
from reslearn.detect.recipes import DetectRecipe
from reslearn.training.recipe import keys, validate
from reslearn.training.request import TrainRequest, parse
from reslearn.training.run import prepare

QUICK = {"net": {"name": "resnet8"}, "schedule": {"steps": 3, "lr": 0.05}, "batch": {"size": 8}, "log": {"every": 1}}


@pytest.mark.parametrize("settings", [
    ["schedule.epochs=2.5", "data.flip=alternate", "data.crop_scale=[0.5,1]", "ema=null", "net.init=~/a"],
    {"schedule.epochs": 2.5, "data.flip": "alternate", "data.crop_scale": [0.5, 1], "ema": None, "net.init": Path("~/a")},
    {"schedule": {"epochs": 2.5}, "data": {"flip": "alternate", "crop_scale": [0.5, 1]}, "ema": None, "net.init": "~/a"},
])  # fmt: skip
def test_settings_are_a_list_a_mapping_or_nested(settings: Any) -> None:
    asked = {"schedule.epochs": 2.5, "data.flip": "alternate", "data.crop_scale": [0.5, 1], "ema": None, "net.init": "~/a"}
    assert parse("data", settings=settings).settings == asked
    assert parse("data", settings=settings, seed=3, model="resnet8").settings == asked | {"seed": 3, "net.name": "resnet8"}


def test_a_setting_may_be_a_string_and_use_python_literals() -> None:
    assert parse("data", settings="data.flip=True").settings == {"data.flip": True}
    assert parse("data", settings=["data.flip=False", "ema=None", "loss.class_weights=none"]).settings == {
        "data.flip": False,
        "ema": None,
        "loss.class_weights": "none",
    }


def test_the_last_of_repeated_settings_wins() -> None:
    assert parse("data", settings=["ema=0.5", "ema=0.9"]).settings == {"ema": 0.9}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"settings": ["schedule.step=3"]}, "--set schedule.step=3: no key 'schedule.step'; did you mean"),
    "an unknown key of a mapping": ({"settings": {"schedule": {"step": 3}}}, "settings: schedule.step=3: no key 'schedule.step'"),
    "a section as a key": ({"settings": {"schedule": 3}}, "settings: schedule=3: no key 'schedule'"),
    "a key that is no text": ({"settings": {1: 2}}, "settings: 1=2: no key '1'"),
    "a key of another task": ({"settings": ["detector.kind=fpn"]}, "no key 'detector.kind'"),
    "a key without a value": ({"settings": ["ema"]}, "--set ema: must have the form key=value, such as"),
    "two lengths": (
        {"settings": ["schedule.epochs=3", "schedule.steps=9"]},
        "--set schedule.epochs=3 and --set schedule.steps=9: give only one of them",
    ),
    "two lengths in a mapping": ({"settings": {"schedule": {"steps": 9, "epochs": 3}}}, "give only one of them"),
    "two networks": (
        {"model": "resnet8", "settings": ["net.name=resnet14"]},
        "--model resnet8 and --set net.name=resnet14: give only one of them",
    ),
    "two seeds": ({"seed": 0, "settings": {"seed": 0}}, "--seed 0 and --set seed=0: give only one of them"),
    "two starts": ({"init": Path("a"), "settings": ["net.init=b"]}, "--init a and --set net.init=b: give only one of them"),
    "an unknown network": ({"model": "resnt20"}, "no network called 'resnt20'; did you mean 'resnet20'"),
    "a network that is a number": ({"settings": ["net.name=20"]}, "--set net.name=20: net.name: must be a string"),
    "a start that is a list": ({"settings": ["net.init=[1]"]}, "--set net.init=[1]: net.init: must be a string"),
    "an unknown recipe": ({"recipe": "defualt"}, "no recipe or recipe file called 'defualt'; did you mean 'default'?"),
    "a recipe of another task": ({"recipe": "voc-paper"}, "no recipe or recipe file called 'voc-paper'"),
    "a recipe object of another task": (
        {"recipe": validate(QUICK, ClassifyRecipe), "task": "detect"},
        "task 'detect' needs a DetectRecipe, not a ClassifyRecipe",
    ),
    "an unknown task": ({"task": "detekt"}, "no task 'detekt'; did you mean 'detect'?"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_requests_give_a_one_line_error(case: str) -> None:
    asked, said = REFUSED[case]
    with pytest.raises(UserError) as caught:
        parse("data", **asked)
    assert said in str(caught.value) and "\n" not in str(caught.value)


ODD = ["null", "NaN", "1e999", "-1", "[1]", "[[", "{}", '{"a":', "9" * 5000, "[" * 9999, "=", '"\\ud800"']
TEXT = st.text() | st.sampled_from(ODD)


@given(
    task=st.sampled_from(["classify", "detect"]),
    settings=st.lists(st.builds("{}={}".format, st.sampled_from(keys(ClassifyRecipe) + keys(DetectRecipe)) | TEXT, TEXT) | TEXT),
    options=st.fixed_dictionaries({}, optional={"model": TEXT, "recipe": TEXT, "seed": st.integers(), "init": TEXT}),
)
def test_any_text_gives_a_request_or_a_one_line_error(task: str, settings: list[str], options: dict[str, Any]) -> None:
    try:
        assert isinstance(parse("data", task=task, settings=settings, **options), TrainRequest)
    except UserError as error:
        assert "\n" not in str(error)


def test_a_recipe_object_equals_its_file(images: Path, tmp_path: Path) -> None:
    recipe, file = validate(QUICK | {"data": {"pad": 2}}, ClassifyRecipe), tmp_path / "mine.json"
    file.write_text(recipe.model_dump_json())
    runs = [train(images, each, out=tmp_path / f"{i}", quiet=True).folder for i, each in enumerate((recipe, file))]
    first, second = (safetensors.torch.load_file(run / "model.safetensors") for run in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    changed = prepare(parse(images, recipe, settings={"schedule.epochs": 2, "data.pad": 1}, model="resnet14", quiet=True)).recipe
    assert (changed.schedule.epochs, changed.schedule.steps, changed.data.pad, changed.net.name) == (2, None, 1, "resnet14")
    assert changed.name == recipe.name and changed.batch.size == 8


def test_a_tilde_is_the_home_folder(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    first = train(images, model="resnet8", settings={"schedule.steps": 1}, out="~/start", quiet=True)
    assert first.folder == tmp_path / "start" and (tmp_path / "start" / "model.safetensors").is_file()
    (tmp_path / "mine.toml").write_text('base = "default"\nseed = 5\n')
    job = prepare(parse("~/images", "~/mine.toml", init="~/start", out="~/new", quiet=True))
    assert job.recipe.seed == 5 and job.folder == tmp_path / "new" and job.facts["source"] == str(images)
    assert job.recipe.net.init == str(tmp_path / "start") and job.recipe.net.name == "resnet8"
    set_otherwise = parse("~/images", settings=["net.init=~/start"], quiet=True)
    assert prepare(set_otherwise).recipe.net.init == str(tmp_path / "start")
