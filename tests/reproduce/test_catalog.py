"""Every experiment at every scale: plans are consistent, recipes are valid, published numbers match the papers' tables."""

from typing import Any

import numpy as np
import pytest
import torch

from reslearn import UserError
from reslearn.data import DataSet, Split
from reslearn.nets import models, spec
from reslearn.reproduce.catalog import ALIASES, EXPERIMENTS, experiment
from reslearn.reproduce.experiment import SCALES, Dataset, Training
from reslearn.training.request import parse
from reslearn.training.resolve import resolve

CASES = [(name, scale) for name, e in EXPERIMENTS.items() if e.task == "classify" for scale in e.plans]


def small_set(name: str, channels: int, size: int) -> DataSet:
    splits = {
        split: Split(
            np.arange(40) % 10,
            tuple(f"{split}{i}" for i in range(40)),
            torch.zeros(40, channels, size, size, dtype=torch.uint8),
            None,
        )
        for split in ("train", "test")
    }
    return DataSet(name, tuple("abcdefghij"), channels, splits, {}, (size, size))


CIFAR, OTHER = small_set("cifar10", 3, 32), small_set("fashion-sample", 1, 32)


def resolved(training: Training, data: DataSet) -> Any:
    request = parse(data.name, training.recipe, model=training.net, settings=training.settings, seed=0)
    return resolve(request, data)[0]


@pytest.mark.parametrize("data", [Dataset("cifar10", True), Dataset("fashion-sample", False)], ids=["cifar10", "other"])
@pytest.mark.parametrize(("name", "scale"), CASES)
def test_plans_are_consistent(name: str, scale: str, data: Dataset) -> None:
    if scale == "paper" and not data.cifar:
        pytest.skip("the paper's protocol is for the paper's data")
    plan = EXPERIMENTS[name].plans[scale](data)  # type: ignore[index]
    labels = {row.run for row in plan.rows} | {label for effect in plan.effects for label in effect.terms}
    labels |= {label for panel in plan.panels for label in panel.runs} | {label for pair in plan.crossings for label in pair}
    assert labels <= set(plan.trainings)
    assert bool(plan.trainings) or bool(plan.analyze) or bool(plan.count)
    assert plan.seeds >= 1 and not (plan.count and plan.trainings)
    for effect in plan.effects:
        assert sum(effect.terms.values()) == 0, "an effect is a difference"
    earlier: set[str] = set()
    recipes: set[tuple[str, str | None]] = set()
    for label, training in plan.trainings.items():
        recipe = resolved(training, CIFAR if data.cifar else OTHER)
        assert recipe.net.name == training.net
        assert training.start is None or training.start in earlier
        earlier.add(label)
        distinct = (recipe.model_dump_json(), training.start)
        assert distinct not in recipes, f"{label} is the same training as another label"
        recipes.add(distinct)
        if scale == "smoke":
            assert recipe.schedule.steps == 2 and recipe.batch.size == 16
        elif scale == "small":
            assert (recipe.schedule.steps or 0) <= 2000
            assert all(drop < (recipe.schedule.steps or 0) for drop in recipe.schedule.drops)
    if scale == "small" and plan.trainings:
        assert plan.seeds >= 2 and (plan.effects or plan.analyze), "small tests an effect, with seeds"
    if scale == "small" and data.cifar and plan.effects:
        assert any("instead of" in deviation for deviation in plan.deviations)


def test_table6_matches_the_paper() -> None:
    plan = EXPERIMENTS["table6"].plans["paper"](Dataset("cifar10"))
    published = {row.run: row.published for row in plan.rows}
    assert published == {
        "resnet20": 8.75,
        "resnet32": 7.51,
        "resnet44": 7.17,
        "resnet56": 6.97,
        "resnet110": 6.61,
        "resnet1202": 7.93,
    }
    recipe = resolved(plan.trainings["resnet110"], CIFAR)
    assert recipe.schedule.steps == 64_000 and recipe.schedule.warmup_lr == 0.01


def test_other_published_numbers() -> None:
    published = {}
    for name in ("im-table1", "im-table2", "im-table3", "stochastic-depth"):
        rows = EXPERIMENTS[name].plans["paper"](Dataset("cifar10")).rows
        published[name] = [row.published for row in rows if row.metric == "test_error"]
    assert published == {
        "im-table1": [6.61, 12.35, 8.70, 12.86, 6.91, 12.22, None],
        "im-table2": [6.61, 8.17, 7.84, 6.71, 6.37],
        "im-table3": [6.61, 6.37, 5.93, 5.46, 7.61, 4.92],
        "stochastic-depth": [6.41, 5.25],
    }


def test_every_experiment_has_a_plan_and_a_text() -> None:
    for e in EXPERIMENTS.values():
        assert e.plans and len(e.see) > 60
        assert set(e.plans) <= set(SCALES)


def test_names() -> None:
    assert experiment("figure4").name == ALIASES["figure4"]
    with pytest.raises(UserError, match="no experiment called 'figur1'; did you mean 'figure1'"):
        experiment("figur1")
    assert all(spec(net) for net in models("resnet*"))
