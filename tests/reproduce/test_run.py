"""An experiment from plan to result: trained once, shared, resumed after a signal, judged, drawn, shown on the page."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command_line import RunCli, run_python, start_python
from reslearn import UserError, train
from reslearn.reproduce.anatomy import measure_lesions, measure_responses
from reslearn.reproduce.catalog import EXPERIMENTS
from reslearn.reproduce.experiment import Comparison, Dataset, Effect, Experiment, Measured, Panel, Plan, Training
from reslearn.reproduce.run import crossing, dataset, make_plan, reproduce
from reslearn.reproduce.runs import Curve, metric
from reslearn.weights.read import import_weights

SETTINGS = ("schedule.epochs=4", "batch.size=4", "log.every=1", "data.val=4", "loss.class_weights=none", "evaluate.every=2")


def tiny(data: Dataset) -> Plan:
    return Plan(
        trainings={
            "short": Training("resnet8", "default", SETTINGS),
            "long": Training("resnet8", "default", (*SETTINGS, "schedule.epochs=6")),
            "deeper": Training("resnet14", "default", SETTINGS, start="short"),
        },
        seeds=2,
        rows=(Comparison("short, error", "short", 10.0), Comparison("deeper, loss", "deeper", metric="train_loss")),
        effects=(Effect("longer has less loss", {"short": 1.0, "long": -1.0}, "train_loss"),),
        panels=(Panel("both", ("short", "long")),),
        crossings=(("long", "short"),),
        deviations=("tiny",),
    )


TINY = Experiment("tiny", "A tiny experiment", "nobody", "See that it runs.", {"small": tiny}, small_data=None)


@pytest.fixture
def one(images: Path, tmp_path: Path) -> dict[str, Any]:
    return {"data": str(images), "out": tmp_path / "out", "quiet": True}


def test_a_result(one: dict[str, Any]) -> None:
    result = reproduce(TINY, **one)
    out = one["out"]
    assert json.loads((out / "tiny-small.json").read_text()) == result
    assert [row["verdict"] for row in result["rows"]] == ["not comparable", ""]
    assert result["rows"][0]["ours"]["n"] == 2 and result["claims"][0]["effect"]["n"] == 2
    assert "The training error of long does not stay below that of short for the last tenth, in any seed." in result["notes"]
    for name in ("tiny-small.png", "tiny-small-effects.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    runs = sorted(path.parent for path in (out / "runs").glob("*/seed-*/result.json"))
    assert len(runs) == 6
    values = [metric(run, "train_loss") for run in runs if run.parent.name == result["runs"]["deeper"][0].split("/")[0]]
    assert result["rows"][1]["ours"]["mean"] == pytest.approx(sum(values) / 2)


def test_what_was_trained_is_not_trained_again_and_is_shared(one: dict[str, Any]) -> None:
    reproduce(TINY, **one)
    before = {path: path.stat().st_mtime_ns for path in (one["out"] / "runs").rglob("*") if path.is_file()}
    other = replace(TINY, name="other", plans={"small": lambda data: replace(tiny(data), seeds=1)})
    result = reproduce(other, **one)
    assert result["rows"][0]["ours"]["n"] == 1
    assert {path: path.stat().st_mtime_ns for path in (one["out"] / "runs").rglob("*") if path.is_file()} == before
    changed = replace(
        TINY, plans={"small": lambda data: Plan({"short": Training("resnet8", "default", (*SETTINGS, "data.flip=false"))})}
    )
    reproduce(changed, **one)
    assert len(list((one["out"] / "runs").iterdir())) == 4, "another recipe is another run"


def test_a_net_that_starts_from_itself_and_other_data_than_the_papers(one: dict[str, Any]) -> None:
    longer = Training("resnet8", "default", (*SETTINGS, "schedule.lr=0.001"), start="short")
    planned = Plan(
        {"short": Training("resnet8", "default", SETTINGS), "longer": longer}, rows=(Comparison("longer", "longer", 10.0),)
    )
    found = reproduce(replace(TINY, plans={"paper": lambda data: planned}), "paper", **one)
    assert found["rows"][0]["ours"]["n"] == 1
    assert found["rows"][0]["verdict"] == "not comparable" and found["deviations"] == ["the data set is images, not cifar10"]


def test_a_part_of_it(one: dict[str, Any]) -> None:
    result = reproduce(TINY, **one, only=["deeper"], seeds=1)
    assert [row["verdict"] for row in result["rows"]] == ["not comparable", ""], "and what it starts from"
    assert result["claims"] == [{"text": "longer has less loss", "effect": None, "verdict": "not run"}]
    assert reproduce(TINY, **one, training=False, seeds=2)["rows"][0]["ours"]["n"] == 1
    with pytest.raises(UserError, match="tiny has no training 'longest' at scale small; known: short, long, deeper"):
        reproduce(TINY, **one, only=["longest"])


def test_networks_are_looked_into_trained_here_or_given(one: dict[str, Any], tmp_path: Path) -> None:
    nets = {"plain8": Training("plain8", "default", SETTINGS), "resnet14": Training("resnet14", "default", SETTINGS)}

    def looking(how: Any) -> Experiment:
        return replace(TINY, name="look", plans={"small": lambda data: Plan(nets, seeds=2, analyze=how)})

    for how, rows, claims in ((measure_responses, 2, 0), (measure_lesions, 7, 6)):
        found = reproduce(looking(how), **one)
        assert len(found["rows"]) == rows and len(found["claims"]) == claims
        assert all(row["ours"]["n"] == 2 for row in found["rows"])
        assert (one["out"] / found["picture"]).exists()
    model = next((one["out"] / "runs").glob("resnet14*/seed-0"))
    given = reproduce(looking(measure_lesions), **one, models=[model])
    assert given["scale"] == "models" and given["rows"][0]["what"] == "resnet14, whole"
    assert (one["out"] / "look-models.json").exists()
    with pytest.raises(UserError, match="tiny does not measure models: leave --model out"):
        reproduce(TINY, **one, models=[model])
    with pytest.raises(UserError, match="look trains nothing with --model: --seeds does not apply"):
        reproduce(looking(measure_lesions), **one, models=[model], seeds=2)


def test_nothing_trained_to_look_into(one: dict[str, Any]) -> None:
    look = replace(
        TINY, plans={"small": lambda data: Plan({"a": Training("resnet8", "default", SETTINGS)}, analyze=measure_responses)}
    )
    with pytest.raises(UserError, match="none of tiny's networks has been trained"):
        reproduce(look, **one, training=False)
    assert not list(one["out"].glob("*.json"))


def test_published_weights_beside_table6(real_data: Path, tmp_path: Path) -> None:
    path = import_weights(real_data / "weights" / "resnet20-12fca82f.th", out=tmp_path / "r20.safetensors")[0]
    found = reproduce(EXPERIMENTS["models"], "paper", out=tmp_path / "out", models=[path], quiet=True)
    (row,) = found["rows"]
    assert row["published"] == 8.75 and row["ours"]["mean"] == pytest.approx(8.27) and row["verdict"] == "holds"


def test_which_data(monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    monkeypatch.delenv("RESLEARN_DATA", raising=False)
    figure1 = EXPERIMENTS["figure1"]
    assert dataset(figure1, "small", None) == Dataset("fashion-sample", False)
    assert dataset(figure1, "paper", None) == Dataset("cifar10", True)
    assert dataset(figure1, "small", str(images)) == Dataset(str(images), False), "not of CIFAR's size"


def test_which_scale() -> None:
    with pytest.raises(UserError, match="constructed has no scale 'paper': take smoke or small"):
        make_plan(EXPERIMENTS["constructed"], "paper", Dataset("cifar10"))
    with pytest.raises(UserError, match="table7 has no scale 'paper': take smoke or small"):
        make_plan(EXPERIMENTS["table7"], "paper", Dataset("bccd", False))


def test_where_one_curve_falls_below_another_for_good() -> None:
    low = Curve([(1, 9.0), (2, 5.0), (3, 7.0), (4, 3.0), (5, 2.0)], [])
    high = Curve([(1, 8.0), (2, 6.0), (3, 6.0), (4, 4.0), (5, 4.0), (6, 1.0)], [])
    assert crossing(low, high) == 4
    assert crossing(high, low) is None
    late = Curve([(step, 5.0 if step < 20 else 3.0) for step in range(1, 21)], [])
    assert crossing(late, Curve([(step, 4.0) for step in range(1, 21)], [])) is None, "one point at the end is no crossing"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    monkeypatch.chdir(tmp_path)
    code, said, _ = run_cli("reproduce", "table1", "--scale", "paper")
    assert code == 0
    assert "ResNet-152, multiply-adds" in said and "differs" not in said
    result = json.loads((tmp_path / "reproduction" / "table1-paper.json").read_text())
    assert len(result["rows"]) == 32 and all(row["verdict"] == "holds" for row in result["rows"])
    page = (tmp_path / "reproduction" / "index.html").read_text()
    assert "The networks, layer by layer, counted" in page and "http" not in page.replace("http-equiv", "")


def test_the_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_cli: RunCli) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RESLEARN_DATA", raising=False)
    rows = {row["name"]: row for row in json.loads(run_cli("reproduce", "--json").out)}
    assert set(rows) == set(EXPERIMENTS)
    assert rows["figure1"]["seconds"] > 10 and rows["figure1"]["state"] == "12 runs"
    assert rows["table7"]["seconds"] is None and "no set with boxes called 'bccd'" in rows["table7"]["state"]
    assert not (tmp_path / "reproduction").exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["figure9"], "no experiment called 'figure9'"),
        (["table1", "--data", "fashion-sample"], "table1 only counts: --data and --no-train do not apply"),
        (["figure1", "--scale", "smoke", "--no-train"], "none of figure1's networks has been trained in reproduction yet"),
        (["table1", "--seeds", "2"], "table1 trains nothing: --seeds does not apply"),
        (["figure1", "--all"], "experiment names cannot be combined with --all"),
        (["--only", "plain20"], "--only, --model and --no-train need the name of an experiment"),
        (["figure1", "table6", "--only", "plain20"], "--only and --model apply to a single experiment"),
        (["veit", "--model", "x", "--scale", "small"], "--scale does not apply with --model: nothing is trained"),
        (["veit", "--model", "x", "--no-train"], "--only and --no-train do not apply with --model: nothing is trained"),
        (["constructed", "--scale", "paper"], "constructed has no scale 'paper': take smoke or small"),
        (["models"], "models needs models to measure: give them with --model"),
        (["table4"], "table4 needs models to measure: give them with --model"),
        (["table8", "--scale", "paper"], "table8 has no scale 'paper': take smoke or small"),
        (["table1", "--out", __file__], "is a file: give a folder"),
        (["figure1", "--data", "nowhere"], "no data set or folder called 'nowhere'"),
    ],
)
def test_errors(words: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli("reproduce", *words)
    assert code == 2 and line in err
    assert not list(tmp_path.rglob("*.json"))


DRIVER = """
from reslearn import cli
from reslearn.reproduce import cifar
cifar.STEPS = 40
cli.main()
"""


def test_a_signal_and_the_same_command_again(tmp_path: Path) -> None:
    words = ["reproduce", "figure1", "--data", "fashion-sample", "--only", "plain20", "--seeds", "1", "--json"]
    command = ["-c", DRIVER, *words]

    def logged() -> list[str]:
        found = list(tmp_path.rglob("metrics.jsonl"))
        return [line for line in found[0].read_text().splitlines() if '"train"' in line] if found else []

    first = start_python(*command, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(logged()) < 3 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=300)[1]
    assert first.returncode == 143 and "reproduce figure1" in said and "Traceback" not in said
    before = logged()
    assert 3 <= len(before) < 40
    code, out, err = run_python(*command, cwd=tmp_path)
    assert code == 0, err
    rows = json.loads(out)[0]["rows"]
    assert [row["verdict"] for row in rows[:2]] == ["", ""] and rows[2]["verdict"] == "not run"
    assert logged()[: len(before)] == before, "it went on, and did not begin anew"
    assert [json.loads(line)["step"] for line in logged()] == list(range(1, 41))


def test_a_training_that_fails_is_a_result(one: dict[str, Any]) -> None:
    wild = Training("resnet8", "default", (*SETTINGS, "schedule.lr=1e38", "schedule.warmup=0"))
    planned = replace(tiny(Dataset("")), trainings={**tiny(Dataset("")).trainings, "wild": wild, "on": replace(wild, start="wild")})
    planned = replace(planned, rows=(*planned.rows, Comparison("wild, error", "wild"), Comparison("on, error", "on")))
    failing = replace(TINY, plans={"small": lambda data: planned})
    result = reproduce(failing, **one)
    assert [row["verdict"] for row in result["rows"]] == ["not comparable", "", "failed", "not run"]
    assert result["claims"][0]["effect"]["n"] == 2
    assert "wild: its loss became NaN or infinite (seeds 0, 1); its numbers are of the other seeds." in result["notes"]
    before = sorted((path, path.stat().st_mtime_ns) for path in (one["out"] / "runs").rglob("*"))
    assert reproduce(failing, **one)["rows"] == result["rows"]
    assert sorted((path, path.stat().st_mtime_ns) for path in (one["out"] / "runs").rglob("*")) == before, "it is not tried again"


def test_a_damaged_run_is_named(one: dict[str, Any]) -> None:
    reproduce(TINY, **one)
    damaged = next((one["out"] / "runs").glob("*/seed-0/result.json"))
    damaged.write_text("{")
    with pytest.raises(UserError, match=r"result\.json is damaged: remove it"):
        reproduce(TINY, **one)
    damaged.unlink()
    assert reproduce(TINY, **one)["rows"][0]["ours"]["n"] == 2


def test_given_models_are_told_apart_by_options_and_looked_into_on_their_own_data(
    one: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    found = []
    for i, settings in enumerate(((), ("net.order=relu-only",))):
        found.append(
            train(
                images, "default", model="resnet8", settings=(*SETTINGS, *settings), seed=0, out=tmp_path / f"run{i}", quiet=True
            ).folder
        )
    look = replace(TINY, name="look", plans={"small": lambda data: Plan(analyze=measure_responses)})
    result = reproduce(look, out=one["out"], models=found, quiet=True)
    assert [row["what"] for row in result["rows"]] == [
        "resnet8, mean over its 3x3 layers",
        "resnet8 order=relu-only, mean over its 3x3 layers",
    ]
    assert result["data"] == images.name
    other = found[0] / "model.safetensors"
    twice = reproduce(look, out=one["out"], models=[found[0], other], quiet=True)["rows"]
    assert [row["what"].split(", ")[0] for row in twice] == ["resnet8 (run0)", "resnet8 (model.safetensors)"], "no seeds of one"
    stale = one["out"] / "look-models-effects.png"
    stale.write_bytes(b"of another time")
    assert "effects_picture" not in reproduce(look, out=one["out"], models=found, quiet=True) and not stale.exists()


def test_every_experiment(one: dict[str, Any], monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    bad = replace(TINY, name="bad", plans={"small": lambda data: Plan({"a": Training("resnet8", "nowhere")})})
    count = replace(TINY, name="count", plans={"small": lambda data: Plan(count=lambda: Measured([]))})
    for each in [*EXPERIMENTS]:
        monkeypatch.delitem(EXPERIMENTS, each)
    for each in (bad, count, TINY):
        monkeypatch.setitem(EXPERIMENTS, each.name, each)
    words = ["reproduce", "--all", "--seeds", "1", "--data", one["data"], "--out", str(one["out"])]
    said = run_cli(*words)
    assert said.code == 2, "one of them could not run"
    assert "continuing with the next" in said.err and "bad" in said.err and "page:" in said.out
    assert {path.name for path in one["out"].glob("*.json")} == {"count-paper.json", "tiny-small.json"}
    result = json.loads((one["out"] / "tiny-small.json").read_text())
    assert result["rows"][0]["ours"]["n"] == 1 and result["command"].startswith("reslearn reproduce --all --seeds 1")
    assert "A tiny experiment" in (one["out"] / "index.html").read_text()
