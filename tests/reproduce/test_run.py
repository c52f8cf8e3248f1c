"""Experiments from plan to result: shared runs, resuming after a signal, verdicts, plots, the page."""

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


TINY = Experiment("tiny", "A tiny experiment", "no source", "It runs.", {"small": tiny}, small_data=None)


@pytest.fixture
def options(images: Path, tmp_path: Path) -> dict[str, Any]:
    return {"data": str(images), "out": tmp_path / "out", "quiet": True}


def test_a_result(options: dict[str, Any]) -> None:
    result = reproduce(TINY, **options)
    out = options["out"]
    assert json.loads((out / "tiny-small.json").read_text()) == result
    assert [row["verdict"] for row in result["rows"]] == ["not comparable", ""]
    assert result["rows"][0]["ours"]["n"] == 2 and result["claims"][0]["effect"]["n"] == 2
    note = "The training error of long is not below that of short throughout the last tenth of training in any seed."
    assert note in result["notes"]
    for name in ("tiny-small.png", "tiny-small-effects.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    runs = sorted(path.parent for path in (out / "runs").glob("*/seed-*/result.json"))
    assert len(runs) == 6
    values = [metric(run, "train_loss") for run in runs if run.parent.name == result["runs"]["deeper"][0].split("/")[0]]
    assert result["rows"][1]["ours"]["mean"] == pytest.approx(sum(values) / 2)


def test_finished_runs_are_reused_and_shared(options: dict[str, Any]) -> None:
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (options["out"] / "runs").rglob("*") if path.is_file()}

    reproduce(TINY, **options)
    before = times()
    other = replace(TINY, name="other", plans={"small": lambda data: replace(tiny(data), seeds=1)})
    result = reproduce(other, **options)
    assert result["rows"][0]["ours"]["n"] == 1
    assert times() == before
    changed = Plan({"short": Training("resnet8", "default", (*SETTINGS, "data.flip=false"))})
    reproduce(replace(TINY, plans={"small": lambda data: changed}), **options)
    assert len(list((options["out"] / "runs").iterdir())) == 4, "another recipe is another run"


def test_a_network_initialized_from_itself_on_other_data_than_the_papers(options: dict[str, Any]) -> None:
    longer = Training("resnet8", "default", (*SETTINGS, "schedule.lr=0.001"), start="short")
    trainings = {"short": Training("resnet8", "default", SETTINGS), "longer": longer}
    plan = Plan(trainings, rows=(Comparison("longer", "longer", 10.0),))
    result = reproduce(replace(TINY, plans={"paper": lambda data: plan}), "paper", **options)
    assert result["rows"][0]["ours"]["n"] == 1
    assert result["rows"][0]["verdict"] == "not comparable" and result["deviations"] == ["images instead of cifar10"]


def test_some_of_the_trainings(options: dict[str, Any]) -> None:
    result = reproduce(TINY, **options, only=["deeper"], seeds=1)
    assert [row["verdict"] for row in result["rows"]] == ["not comparable", ""], "with the training that initializes it"
    assert result["claims"] == [{"text": "longer has less loss", "effect": None, "verdict": "not run"}]
    assert reproduce(TINY, **options, training=False, seeds=2)["rows"][0]["ours"]["n"] == 1
    with pytest.raises(UserError, match="tiny has no training 'longest' at scale small; known: short, long, deeper"):
        reproduce(TINY, **options, only=["longest"])


def test_analyses_of_trained_and_given_networks(options: dict[str, Any]) -> None:
    nets = {"plain8": Training("plain8", "default", SETTINGS), "resnet14": Training("resnet14", "default", SETTINGS)}

    def experiment(analyze: Any) -> Experiment:
        return replace(TINY, name="look", plans={"small": lambda data: Plan(nets, seeds=2, analyze=analyze)})

    for analyze, rows, claims in ((measure_responses, 2, 0), (measure_lesions, 7, 6)):
        result = reproduce(experiment(analyze), **options)
        assert len(result["rows"]) == rows and len(result["claims"]) == claims
        assert all(row["ours"]["n"] == 2 for row in result["rows"])
        assert (options["out"] / result["picture"]).exists()
    model = next((options["out"] / "runs").glob("resnet14*/seed-0"))
    given = reproduce(experiment(measure_lesions), **options, models=[model])
    assert given["scale"] == "models" and given["rows"][0]["what"] == "resnet14, intact"
    assert (options["out"] / "look-models.json").exists()
    with pytest.raises(UserError, match="tiny does not measure models: remove --model"):
        reproduce(TINY, **options, models=[model])
    with pytest.raises(UserError, match="look trains nothing with --model: --seeds does not apply"):
        reproduce(experiment(measure_lesions), **options, models=[model], seeds=2)


def test_no_trained_networks_to_analyze(options: dict[str, Any]) -> None:
    plan = Plan({"a": Training("resnet8", "default", SETTINGS)}, analyze=measure_responses)
    with pytest.raises(UserError, match="no trained networks of tiny"):
        reproduce(replace(TINY, plans={"small": lambda data: plan}), **options, training=False)
    assert not list(options["out"].glob("*.json"))


def test_published_weights_match_table6(real_data: Path, tmp_path: Path) -> None:
    path = import_weights(real_data / "weights" / "resnet20-12fca82f.th", out=tmp_path / "r20.safetensors")[0]
    (row,) = reproduce(EXPERIMENTS["models"], "paper", out=tmp_path / "out", models=[path], quiet=True)["rows"]
    assert row["published"] == 8.75 and row["ours"]["mean"] == pytest.approx(8.27) and row["verdict"] == "holds"


def test_default_data(monkeypatch: pytest.MonkeyPatch, images: Path) -> None:
    monkeypatch.delenv("RESLEARN_DATA", raising=False)
    figure1 = EXPERIMENTS["figure1"]
    assert dataset(figure1, "small", None) == Dataset("fashion-sample", False)
    assert dataset(figure1, "paper", None) == Dataset("cifar10", True)
    assert dataset(figure1, "small", str(images)) == Dataset(str(images), False), "not of CIFAR's size"


@pytest.mark.parametrize("name", ["constructed", "table7"])
def test_unsupported_scale(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} has no scale 'paper': use smoke or small"):
        make_plan(EXPERIMENTS[name], "paper", Dataset(""))


def test_crossing() -> None:
    low = Curve([(1, 9.0), (2, 5.0), (3, 7.0), (4, 3.0), (5, 2.0)], [])
    high = Curve([(1, 8.0), (2, 6.0), (3, 6.0), (4, 4.0), (5, 4.0), (6, 1.0)], [])
    assert crossing(low, high) == 4
    assert crossing(high, low) is None
    late = Curve([(step, 5.0 if step < 20 else 3.0) for step in range(1, 21)], [])
    assert crossing(late, Curve([(step, 4.0) for step in range(1, 21)], [])) is None, "one point at the end is no crossing"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_cli("reproduce", "table1", "--scale", "paper")
    assert code == 0
    assert "ResNet-152, multiply-adds" in out and "differs" not in out
    result = json.loads((tmp_path / "reproduction" / "table1-paper.json").read_text())
    assert len(result["rows"]) == 32 and all(row["verdict"] == "holds" for row in result["rows"])
    page = (tmp_path / "reproduction" / "index.html").read_text()
    assert EXPERIMENTS["table1"].title in page and "http" not in page.replace("http-equiv", "")


def test_the_list(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, run_cli: RunCli) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RESLEARN_DATA", raising=False)
    rows = {row["name"]: row for row in json.loads(run_cli("reproduce", "--json").out)}
    assert set(rows) == set(EXPERIMENTS)
    assert rows["figure1"]["seconds"] > 10 and rows["figure1"]["state"] == "12 runs"
    assert rows["table7"]["seconds"] is None and "no data set with boxes called 'bccd'" in rows["table7"]["state"]
    assert not (tmp_path / "reproduction").exists()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["figure9"], "no experiment called 'figure9'"),
        (["table1", "--data", "fashion-sample"], "table1 uses no data and no training: --data and --no-train do not apply"),
        (["figure1", "--scale", "smoke", "--no-train"], "no trained networks of figure1 in reproduction"),
        (["table1", "--seeds", "2"], "table1 trains nothing: --seeds does not apply"),
        (["figure1", "--all"], "give names or --all, not both"),
        (["--only", "plain20"], "--only, --model and --no-train go with an experiment's name"),
        (["figure1", "table6", "--only", "plain20"], "--only and --model go with one experiment"),
        (["veit", "--model", "x", "--scale", "small"], "--scale does not apply with --model: nothing is trained"),
        (["veit", "--model", "x", "--no-train"], "--only and --no-train do not apply with --model: nothing is trained"),
        (["constructed", "--scale", "paper"], "constructed has no scale 'paper': use smoke or small"),
        (["models"], "models needs models to measure: pass them with --model"),
        (["table4"], "table4 needs models to measure: pass them with --model"),
        (["table8", "--scale", "paper"], "table8 has no scale 'paper': use smoke or small"),
        (["table1", "--out", __file__], "is a file: pass a folder"),
        (["figure1", "--data", "nowhere"], "no data set or folder called 'nowhere'"),
    ],
)
def test_errors(arguments: list[str], line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run_cli("reproduce", *arguments)
    assert code == 2 and line in err
    assert not list(tmp_path.rglob("*.json"))


DRIVER = """
from reslearn import cli
from reslearn.reproduce import cifar
cifar.STEPS = 40
cli.main()
"""


def test_resuming_after_a_signal(tmp_path: Path) -> None:
    arguments = ["reproduce", "figure1", "--data", "fashion-sample", "--only", "plain20", "--seeds", "1", "--json"]
    command = ["-c", DRIVER, *arguments]

    def logged() -> list[str]:
        files = list(tmp_path.rglob("metrics.jsonl"))
        return [line for line in files[0].read_text().splitlines() if '"train"' in line] if files else []

    first = start_python(*command, cwd=tmp_path)
    deadline = time.monotonic() + 120
    while len(logged()) < 3 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    first.send_signal(signal.SIGTERM)
    err = first.communicate(timeout=300)[1]
    assert first.returncode == 143 and "reproduce figure1" in err and "Traceback" not in err
    before = logged()
    assert 3 <= len(before) < 40
    code, out, err = run_python(*command, cwd=tmp_path)
    assert code == 0, err
    rows = json.loads(out)[0]["rows"]
    assert [row["verdict"] for row in rows[:2]] == ["", ""] and rows[2]["verdict"] == "not run"
    assert logged()[: len(before)] == before, "resumed rather than started again"
    assert [json.loads(line)["step"] for line in logged()] == list(range(1, 41))


def test_a_diverged_training_is_a_result(options: dict[str, Any]) -> None:
    diverging = Training("resnet8", "default", (*SETTINGS, "schedule.lr=1e38", "schedule.warmup=0"))
    plan = tiny(Dataset(""))
    plan = replace(
        plan,
        trainings={**plan.trainings, "diverging": diverging, "next": replace(diverging, start="diverging")},
        rows=(*plan.rows, Comparison("diverging, error", "diverging"), Comparison("next, error", "next")),
    )
    experiment = replace(TINY, plans={"small": lambda data: plan})
    result = reproduce(experiment, **options)
    assert [row["verdict"] for row in result["rows"]] == ["not comparable", "", "failed", "not run"]
    assert result["claims"][0]["effect"]["n"] == 2
    assert "diverging: the loss became NaN or infinite (seeds 0, 1); the numbers are from the other seeds." in result["notes"]
    before = sorted((path, path.stat().st_mtime_ns) for path in (options["out"] / "runs").rglob("*"))
    assert reproduce(experiment, **options)["rows"] == result["rows"]
    after = sorted((path, path.stat().st_mtime_ns) for path in (options["out"] / "runs").rglob("*"))
    assert after == before, "not trained again"


def test_error_names_a_damaged_run(options: dict[str, Any]) -> None:
    reproduce(TINY, **options)
    damaged = next((options["out"] / "runs").glob("*/seed-0/result.json"))
    damaged.write_text("{")
    with pytest.raises(UserError, match=r"result\.json is damaged: delete it"):
        reproduce(TINY, **options)
    damaged.unlink()
    assert reproduce(TINY, **options)["rows"][0]["ours"]["n"] == 2


def test_given_models_are_labeled_by_options_and_analyzed_on_their_own_data(
    options: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    models = []
    for i, settings in enumerate((SETTINGS, (*SETTINGS, "net.order=relu-only"))):
        run = train(images, "default", model="resnet8", settings=settings, seed=0, out=tmp_path / f"run{i}", quiet=True)
        models.append(run.folder)
    look = replace(TINY, name="look", plans={"small": lambda data: Plan(analyze=measure_responses)})
    result = reproduce(look, out=options["out"], models=models, quiet=True)
    assert [row["what"] for row in result["rows"]] == [
        "resnet8, mean over its 3x3 layers",
        "resnet8 order=relu-only, mean over its 3x3 layers",
    ]
    assert result["data"] == images.name
    file = models[0] / "model.safetensors"
    rows = reproduce(look, out=options["out"], models=[models[0], file], quiet=True)["rows"]
    assert [row["what"].split(", ")[0] for row in rows] == ["resnet8 (run0)", "resnet8 (model.safetensors)"], "not seeds of one"
    stale = options["out"] / "look-models-effects.png"
    stale.write_bytes(b"from an earlier call")
    assert "effects_picture" not in reproduce(look, out=options["out"], models=models, quiet=True) and not stale.exists()


def test_all_experiments(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    bad = replace(TINY, name="bad", plans={"small": lambda data: Plan({"a": Training("resnet8", "nowhere")})})
    count = replace(TINY, name="count", plans={"small": lambda data: Plan(count=lambda: Measured([]))})
    for name in [*EXPERIMENTS]:
        monkeypatch.delitem(EXPERIMENTS, name)
    for experiment in (bad, count, TINY):
        monkeypatch.setitem(EXPERIMENTS, experiment.name, experiment)
    code, out, err = run_cli("reproduce", "--all", "--seeds", "1", "--data", options["data"], "--out", str(options["out"]))
    assert code == 2, "one of them could not run"
    assert "continuing with the next" in err and "bad" in err and "page:" in out
    assert {path.name for path in options["out"].glob("*.json")} == {"count-paper.json", "tiny-small.json"}
    result = json.loads((options["out"] / "tiny-small.json").read_text())
    assert result["rows"][0]["ours"]["n"] == 1 and result["command"].startswith("reslearn reproduce --all --seeds 1")
    assert "A tiny experiment" in (options["out"] / "index.html").read_text()
