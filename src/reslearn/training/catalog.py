"""Lists and prints the named recipes of all tasks."""

import json
from contextlib import suppress
from inspect import getdoc
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined
from rich import print as rich_print
from rich.table import Table

from reslearn import tasks
from reslearn.errors import UserError, did_you_mean
from reslearn.training.recipe import Chosen, Recipe, fields, flatten, shown, validate
from reslearn.training.task import Task
from reslearn.weights.store import read_card


def by_name() -> dict[str, Task[Any, Any, Any]]:
    """The task of every named recipe, for the tasks that can be imported."""
    recipes: dict[str, Task[Any, Any, Any]] = {}
    for name in tasks.names():
        with suppress(UserError):
            task = tasks.get(name)
            for recipe in task.named:
                recipes.setdefault(recipe, task)
    return recipes


def summary(task: Task[Any, Any, Any], name: str) -> str:
    """The first sentence of a recipe's description."""
    text = " ".join((task.named[name].__doc__ or "").split())
    return text.split(". ")[0].rstrip(".:") + "."


def list_recipes(as_json: bool) -> None:
    """Print the names, tasks and summaries of all recipes."""
    rows = [{"name": name, "task": task.name, "summary": summary(task, name)} for name, task in by_name().items()]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("recipe", "task", "summary", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row.values())
    rich_print(table)


def choose(name: str, data: str | Path | None, model: str | None, init: str | Path | None = None) -> tuple[Recipe, Chosen]:
    """A named recipe, and where its values come from.

    Raises UserError for unknown names, and if a recipe depends on data that is not given.
    """
    recipes = by_name()
    if name not in recipes:
        raise UserError(f"no recipe '{name}'{did_you_mean(name, recipes)}")
    task = recipes[name]
    given = {"base": name} | ({} if init is None else {"net.init": init})
    opened = None if data is None else task.open(data, given)
    chosen = task.choose(name, opened, model if init is None else read_card(init).net, given)
    values = chosen.plain()
    if init is not None:
        values["net"] = {**values["net"], "init": str(init)}
    return validate(values, task.recipe, f"recipe {name}"), chosen


def describe(name: str, data: str | Path | None, model: str | None, init: str | Path | None = None) -> list[dict[str, Any]]:
    """Every key of a named recipe, with its value, meaning and source. Raises UserError; see choose."""
    recipe, chosen = choose(name, data, model, init)
    sources, values = chosen.sources(), flatten(recipe.model_dump())
    rows = []
    for key, field in fields(type(recipe)):
        default = None if field.default is PydanticUndefined else field.default
        source = sources.get(key) or chosen.reasons.get(key) or ("default" if values.get(key) == default else "this recipe")
        rows.append({"key": key, "value": values.get(key), "meaning": field.description or "", "source": source})
    return rows


def print_recipe(name: str, data: str | None, model: str | None, init: str | None, as_json: bool) -> None:
    """Print a named recipe, as a table or as JSON."""
    rows = describe(name, data, model, init)
    if as_json:
        print(json.dumps(rows))
        return
    print(f"{getdoc(by_name()[name].named[name]) or ''}\n")
    table = Table(box=None, pad_edge=False)
    for column in ("key", "value", "meaning", "source"):
        table.add_column(column, overflow="fold", no_wrap=column == "key")
    for row in rows:
        table.add_row(row["key"], shown(row["value"]), row["meaning"], row["source"])
    rich_print(table)
