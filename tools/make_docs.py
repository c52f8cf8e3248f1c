"""Write the generated pages of docs/: recipes.md from the recipe classes, paper.md from docs/reproduction/*.json.

Run by `make docs`. A test compares the committed pages with the output of this script.
"""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reslearn import tasks
from reslearn.errors import UserError
from reslearn.reproduce.catalog import EXPERIMENTS
from reslearn.reproduce.show import CLAIM_COLUMNS, COLUMNS, cells, claim_cells
from reslearn.training.catalog import describe
from reslearn.training.recipe import shown

DOCS = Path(__file__).parents[1] / "docs"
INTRODUCTION = {
    "classify": "Classification: `reslearn train DATA --recipe NAME`.",
    "detect": "Detection: `reslearn detect train DATA --recipe NAME`.",
    "localize": "Localization: `reslearn localize train DATA --recipe NAME`.",
}


RECIPES = """\
# Recipes

A recipe contains all settings of a run. `--recipe NAME` chooses a named recipe, `--set key=value` changes a key, and a `.toml` or
`.json` file passed as `--recipe` changes several (`base` is the recipe that it starts from). Without `--recipe`, the recipe is
chosen from the data. `reslearn recipes NAME [DATA]` prints one recipe, with the values that it would choose for your data.

DRL is *Deep Residual Learning for Image Recognition*, IM *Identity Mappings in Deep Residual Networks*, SD *Deep Networks with
Stochastic Depth*. With a value of `null`, the network's own value is used, or none.
"""
PAPER = """\
# The paper, reproduced

Every table and figure of the papers is an experiment: a command that trains or analyzes networks and compares the results with
the published numbers. `reslearn reproduce` lists the experiments with their estimated time on your machine:

```
reslearn reproduce
reslearn reproduce table1 --scale paper
reslearn reproduce figure1 --scale small
reslearn reproduce models --model published.safetensors
```

| scale | purpose |
| --- | --- |
| `paper` | the paper's protocol; only this scale is compared with the paper's numbers |
| `small` | tests a named effect in minutes to hours, with seeds and 95% intervals |
| `smoke` | shows that the experiment runs |

Runs are kept in `reproduction/runs`, shared between experiments, and resumed. Each experiment writes a table, plots, a JSON file
and a section of `reproduction/index.html`. `--model` uses given model files instead of training; `--only` trains one entry.

The paper's CIFAR-10 networks, trained by its whole schedule of 64,000 iterations (`--set schedule.steps=1200` trains the first ones
only), and compared as in Figure 6:

```
reslearn train cifar10 --model resnet20 --recipe cifar10-paper --out runs/resnet20
reslearn train cifar10 --model plain20 --recipe cifar10-paper --out runs/plain20
reslearn report runs/resnet20 runs/plain20 -o figure6.html
```

The results below were measured on two CPU cores. Means are over n seeds, ± is the standard deviation, intervals are 95%.
"""


def table(head: tuple[str, ...], rows: Iterator[tuple[str, ...]] | list[tuple[str, ...]]) -> Iterator[str]:
    """A Markdown table."""
    yield from ("| " + " | ".join(row) + " |" for row in (head, ("---",) * len(head)))
    for row in rows:
        yield "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |"
    yield ""


def recipes() -> Iterator[str]:
    """The page of recipes."""
    yield RECIPES
    for task in map(tasks.get, tasks.TASKS):
        yield from (f"## {task.name.capitalize()}", "", INTRODUCTION[task.name], "")
        for name in sorted(task.named, key=lambda name: "default" not in name):
            text = inspect.cleandoc(task.named[name].__doc__ or "")
            yield from (f"### {name}", "", *text.splitlines(), "")
            try:
                rows = [row for row in describe(name, None, None) if row["source"] != "default"]
            except UserError:
                yield from (f"Its values are chosen from the data: `reslearn recipes {name} DATA` prints them.", "")
                continue
            yield from table(
                ("key", "value", "source"), [(f"`{row['key']}`", f"`{shown(row['value'])}`", row["source"]) for row in rows]
            )
        yield from (f"### Keys of {task.name} recipes", "")
        yield from table(("key", "default", "meaning"), keys(task.name))


def keys(task: str) -> Iterator[tuple[str, str, str]]:
    """Every key of a task's recipes with its default and meaning."""
    from pydantic_core import PydanticUndefined

    from reslearn.training.recipe import fields

    for key, field in fields(tasks.get(task).recipe):
        default = "" if field.default is PydanticUndefined else f"`{shown(field.default)}`"
        yield f"`{key}`", default, field.description or ""


def paper() -> Iterator[str]:
    """The page of the paper's tables and figures."""
    results = [json.loads(path.read_text()) for path in sorted((DOCS / "reproduction").glob("*.json"))]
    yield PAPER
    for result in sorted(results, key=lambda result: (result.get("order", 99), result.get("scale", ""))):
        if "experiment" in result:
            yield from experiment(result)


def experiment(result: dict[str, Any]) -> Iterator[str]:
    """The section of one result."""
    known = EXPERIMENTS[result["experiment"]]
    scale = "" if result["scale"] == "models" else f", {result['scale']} scale"
    yield from (f"## {known.title}{scale.replace(', ', ' (') + ')' if scale else ''}", "", f"*{known.source}*: {known.see}", "")
    yield from ("```", result["command"].replace(" --no-train", ""), "```", "")
    rows = [cells(row) for row in result["rows"] if row["ours"]]
    shown_columns = [i for i in range(len(COLUMNS)) if i in (0, 2) or any(row[i] for row in rows)]
    yield from table(tuple(COLUMNS[i] for i in shown_columns), [tuple(row[i] for i in shown_columns) for row in rows])
    if claims := [claim_cells(claim) for claim in result["claims"] if claim["effect"]]:
        yield from table(CLAIM_COLUMNS, claims)
    for key in ("picture", "effects_picture"):
        if result.get(key):
            yield from (f"![{known.title}](reproduction/{result[key]})", "")
    missing = [row["what"] for row in result["rows"] if not row["ours"]]
    if missing:
        yield from (f"Not run: {', '.join(missing)}.", "")
    yield from (f"- {note}" for note in result["notes"])
    yield from (f"- Deviation: {deviation}" for deviation in result["deviations"])
    yield from (f"- Run on {' and '.join(result['made_on'])}", "")


PAGES = {"recipes.md": recipes, "paper.md": paper}


def render(name: str) -> str:
    """The text of a generated page."""
    return "\n".join(PAGES[name]()).rstrip() + "\n"


if __name__ == "__main__":
    for page in PAGES:
        (DOCS / page).write_text(render(page))
