"""Localization in the shared training loop: recipe keys, seeds, EMA, best weights, ranks."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import reslearn
from command_line import TORCHRUN, RunCli, run_python
from painted_sets import TINY, lines, train, write_set
from reslearn import UserError, resume
from reslearn.data.boxes.read import open_boxes
from reslearn.data.preprocess import Preprocessing
from reslearn.localize.evaluate import errors, evaluate
from reslearn.localize.net import load_localizer, save_localizer
from reslearn.localize.predict import predict
from reslearn.localize.views import of_one_kind
from reslearn.training import checkpoint
from reslearn.training.request import parse
from reslearn.training.run import prepare
from reslearn.weights.store import Card, read_card

SHORT = {**TINY, "schedule.epochs": 1}
VIEW = Preprocessing(channels=3, size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2,) * 3)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classification model with an option that only affects initialization."""
    torch.manual_seed(1)
    card = Card(net="resnet8", options={"zero_init_last_gamma": True}, classes=("a", "b", "c"), preprocessing=VIEW)
    net = reslearn.create("resnet8", 3, zero_init_last_gamma=True)
    return reslearn.save(net, tmp_path_factory.mktemp("classifier") / "c.safetensors", card)


@pytest.fixture(scope="module")
def validated(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with held-out images and EMA, at a learning rate at which the last weights are not the best."""
    changes = {"data.val": 12, "schedule.epochs": 6, "schedule.lr": 0.2, "schedule.shape": "steps", "ema": 0.5}
    return train(shapes, tmp_path_factory.mktemp("validated") / "run", {**TINY, **changes}).folder


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def evaluated(run: Path) -> dict[int, float]:
    """Logged validation errors by step."""
    return {line["step"]: line["localization_error"] for line in lines(run) if line["event"] == "eval"}


def test_settings_of_every_type(shapes: Path, tmp_path: Path) -> None:
    settings = {
        "seed": "7", "net.shortcut": "B", "data.size": "48", "data.jitter": "[50,60]", "data.crop_ratio": "0.8",
        "data.val": "0.25", "data.workers": "0", "localizer.anchors": "[[8,9.5],[20,10]]", "localizer.hidden": "16",
        "localizer.iou": "[0.2,0.6]", "batch.size": "6", "batch.micro": "3", "optimizer.nesterov": "true",
        "optimizer.style": "caffe", "optimizer.undecayed": "norm-and-bias", "schedule.steps": "9", "schedule.shape": "steps",
        "schedule.drops": "[0.5]", "schedule.warmup": "2", "ema": "0.9", "precision": "fp32", "execution": "eager",
        "evaluate.every": "4", "checkpoint.every": "null", "log.every": "5",
    }  # fmt: skip
    request = parse(shapes, model="resnet8", settings=[f"{key}={value}" for key, value in settings.items()], task="localize")
    job = prepare(request)
    values = job.recipe.model_dump(mode="json")
    for key, text in settings.items():
        value: Any = values
        for word in key.split("."):
            value = value[word]
        assert value == (json.loads(text) if text not in ("B", "caffe", "norm-and-bias", "steps", "fp32", "eager") else text), key
    assert values["schedule"]["epochs"] is None and len(job.sources.train) == 48 and len(job.sources.val) == 16
    assert not any("anchors" in line for line in job.facts["chose"]), "anchors are given, not chosen"
    model = job.task.model(job, fresh=True)
    assert model.hidden.out_channels == 16 and model.settings.anchors == ((8, 9.5), (20, 10))
    three = prepare(parse(shapes, settings={**TINY, "localizer.count": 3}, task="localize")).recipe.localizer
    assert three.anchors is not None and len(three.anchors) == 3


def test_ema_weights_are_evaluated_and_saved(validated: Path) -> None:
    saved = checkpoint.load(checkpoint.find(validated / "checkpoints")[-1])
    kept = load_file(validated / "model.safetensors")
    average = {name.removeprefix("ema."): tensor for name, tensor in saved.state.items() if name.startswith("ema.")}
    assert all(torch.equal(kept[name], average[name]) for name in kept)
    assert any(not torch.equal(kept[name], saved.model[name]) for name in kept)


def test_the_validation_set_selects_the_best_weights(validated: Path, shapes: Path) -> None:
    held_out = set(json.loads((validated / "split.json").read_text())["val"])
    facts, log, final = json.loads((validated / "recipe.json").read_text()), evaluated(validated), result(validated)
    assert len(held_out) == 12 and facts["data"]["n"] == {"train": 52, "val": 12, "test": 30}
    best = final["best"]["step"]
    assert sorted(log) == [step for step in range(1, 40) if step * 8 // 52 > (step - 1) * 8 // 52]
    assert log[best] == min(log.values())
    assert best == min(step for step, error in log.items() if error == log[best]) < final["last"]["step"]
    assert final["best"]["val"]["1-crop"]["true_class"]["error"] == log[best]
    assert final["last"]["val"]["1-crop"]["true_class"]["error"] == log[final["last"]["step"]]
    split = open_boxes(shapes)["train"]
    val = type(split)(split.name, split.classes, tuple(image for image in split.images if image.name in held_out))
    model = load_localizer(validated / "best.safetensors")
    scores, boxes = predict(model, val)
    truth = of_one_kind(val)
    assert errors(np.argsort(-scores, axis=1), boxes, truth, split.classes)["true_class"]["error"] == log[best]
    assert evaluate(model, shapes)["dense"] == final["best"]["test"]["dense"]
    assert read_card(validated / "best.safetensors").metrics["val"]["1-crop"] == log[best]


def test_a_sets_own_val_split_is_used(tmp_path: Path) -> None:
    data = write_set(tmp_path / "set", {"train": 16, "val": 10, "test": 6})
    settings = {key: value for key, value in SHORT.items() if key != "data.val"}
    run = train(data, tmp_path / "run", {**settings, "schedule.epochs": 2}).folder
    assert json.loads((run / "recipe.json").read_text())["data"]["n"] == {"train": 16, "val": 10, "test": 6}
    assert not (run / "split.json").exists() and (run / "best.safetensors").exists() and sorted(evaluated(run)) == [2, 4]
    assert evaluate(run, data, split="val")["dense"] == result(run)["last"]["val"]["dense"]


def test_backbone_lr_scales_only_the_backbone(shapes: Path, classifier: Path, tmp_path: Path) -> None:
    once = {key: value for key, value in TINY.items() if key not in ("net.name", "schedule.epochs")}
    once |= {"schedule.steps": 1, "schedule.warmup": 0, "optimizer.weight_decay": 0}
    job = prepare(parse(shapes, settings=once, init=classifier, task="localize", device="cpu", quiet=True))
    start = {name: parameter.detach().clone() for name, parameter in job.task.model(job, fresh=True).named_parameters()}
    moved = []
    for share in (1.0, 0.125):
        run = train(shapes, tmp_path / str(share), once | {"optimizer.backbone_lr": share}, init=classifier).folder
        moved.append({name: load_file(run / "model.safetensors")[name] - tensor for name, tensor in start.items()})
    for name in start:
        expected = moved[0][name] * (0.125 if name.startswith("backbone.") else 1)
        torch.testing.assert_close(moved[1][name], expected, rtol=1e-3, atol=1e-7, msg=name)
    assert {name.split(".")[0] for name in start} == {"backbone", "hidden", "scores", "deltas"}
    assert all(moved[0][name].any() for name in ("backbone.conv1.weight", "hidden.weight", "scores.weight", "deltas.weight"))


def test_a_run_resumes_without_its_initial_model(
    shapes: Path, classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """~ is expanded in DATA and --init."""
    shutil.copy(classifier, tmp_path / "c.safetensors")
    (tmp_path / "set").symlink_to(shapes)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = {key: value for key, value in SHORT.items() if key != "net.name"}
    whole = train("~/set", tmp_path / "whole", settings, init="~/c.safetensors").folder
    once = (whole / "model.safetensors").read_bytes()
    (whole / "result.json").unlink()
    (tmp_path / "c.safetensors").unlink()
    assert resume(whole, device="cpu", quiet=True).result["step"] == 8
    assert (whole / "model.safetensors").read_bytes() == once, "including the card"
    second = {"localizer.proposals": 4, "batch.size": 8, "schedule.steps": 2, "schedule.warmup": 0, "data.val": 0}
    both = train("~/set", tmp_path / "both", second, "localize-regions", init="~/whole").folder
    once = (both / "model.safetensors").read_bytes()
    (both / "result.json").unlink()
    shutil.rmtree(whole)
    resume(both, device="cpu", quiet=True)
    assert (both / "model.safetensors").read_bytes() == once


def test_a_gray_localizer_cannot_get_a_second_stage(run: Path, shapes: Path, tmp_path: Path) -> None:
    model = load_localizer(run)
    gray = model.card.model_copy(update={"preprocessing": Preprocessing(channels=1, size=(32, 32), mean=(0.5,), std=(0.2,))})
    model.backbone.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
    save_localizer(model, tmp_path / "gray.safetensors", gray)
    for recipe, words in (("localize-regions", "gray"), ("localize-default", "localizer")):
        with pytest.raises(UserError, match=words):
            train(shapes, tmp_path / "run", {"batch.size": 8}, recipe, init=tmp_path / "gray.safetensors")
    assert not (tmp_path / "run").exists()


RANKED = """
import hashlib, json, sys
from pathlib import Path
from reslearn import cli
from reslearn.localize import task
from reslearn.training import ranks, run

seen, views, finish = [], task.views, run.finish

def watched(model, data, *more, **options):
    seen.append([image.name for image in data.images])
    return views(model, data, *more, **options)

def finished(loop, stop):
    result = finish(loop, stop)
    state = loop.state.model.state_dict()
    weights = hashlib.sha256(b"".join(tensor.numpy().tobytes() for tensor in state.values())).hexdigest()
    record = {"weights": weights, "seen": seen, "last": result["last"]}
    Path(f"{sys.argv[-1]}.{ranks.rank()}").write_text(json.dumps(record))
    return result

task.views, run.finish = watched, finished
cli.main()
"""


def test_two_ranks_make_one_run(run: Path, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "ranked.py").write_text(RANKED)
    settings = [word for key, value in SHORT.items() for word in ("--set", f"{key}={value}")]
    words = ["localize", "train", shapes, "--device", "cpu", *settings, "--out", tmp_path / "run"]
    done = run_python(*TORCHRUN, tmp_path / "ranked.py", *words, env={"TORCH_CPP_LOG_LEVEL": "ERROR"})
    assert done.code == 0, done.err[-3000:]
    assert all(done.out.count(word) == 1 for word in ("machine  ", "model    ", "report   ")) and "2 ranks" in done.out
    one, two = (json.loads((tmp_path / f"run.{rank}").read_text()) for rank in (0, 1))
    assert one["weights"] == two["weights"] and one["last"] == two["last"]
    names = [image.name for image in open_boxes(shapes)["test"].images]
    assert one["seen"] == [names[::2]] and two["seen"] == [names[1::2]], "each image is evaluated once"
    final = result(tmp_path / "run")
    assert final["last"] == one["last"] and final["last"]["test"]["n"] == 30
    alone = evaluate(tmp_path / "run", shapes)
    assert all(alone[view] == final["last"]["test"][view] for view in ("1-crop", "dense"))
    streams = [[line["stream"] for line in lines(folder)][:8] for folder in (tmp_path / "run", run)]
    assert streams[0] == streams[1] and len(streams[0]) == 8, "the same images in the same order"


def test_eval_does_not_support_torchrun(run: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    done = run_cli("localize", "eval", run, shapes)
    assert done.code == 2 and "localize eval does not support torchrun" in done.err
