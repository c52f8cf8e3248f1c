"""Training detectors: real runs on small images, killed and resumed, and rejected settings."""

import json
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

import boxed
from command_line import start_python
from painted_sets import lines
from reslearn import UserError, create, resume, save, train
from reslearn.data.boxes.read import open_boxes
from reslearn.data.boxes.source import to_tensor
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sampling import SampleOrder
from reslearn.detect import load_detector
from reslearn.detect.task import BoxExamples
from reslearn.training.request import parse
from reslearn.training.run import Run, prepare
from reslearn.training.step import LossModule, Outcome, update
from reslearn.training.stepper import make_stepper
from reslearn.training.task import Job, Losses
from reslearn.weights.store import Card, read_card
from training_jobs import make_state

SMALL = ["data.val=2", "detector.regions=8", "detector.anchors=[20]", "detector.ratios=[1.0]", "log.every=5", "batch.size=2"]
STEPS = ["schedule.steps=20", "evaluate.every=10", "checkpoint.every=5"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    boxed.shapes(root, images=10)
    return boxed.shapes(root, images=4, split="test")


@pytest.fixture(scope="module")
def run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("runs") / "whole"
    return train(shapes, model="resnet8", settings=[*SMALL, *STEPS], out=out, quiet=True, task="detect", device="cpu")


def test_a_run_has_losses_metrics_and_a_model(run: Run) -> None:
    parts = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}
    trained = [line for line in lines(run.folder) if line["event"] == "train"]
    evaluations = [line for line in lines(run.folder) if line["event"] == "eval"]
    assert [line["step"] for line in trained] == [5, 10, 15, 20] and [line["step"] for line in evaluations] == [10, 20]
    for line in trained + evaluations:
        assert set(line["losses"]) == parts and line["loss"] == pytest.approx(sum(line["losses"].values()))
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert all({"AP", "AP50", "AP75"} <= set(line) for line in evaluations)
    test = run.result["last"]["test"]
    assert test["n"] == 4 and sum(test["review"]["mistakes"]["all"].values()) > 0 and len(test["per_class"]) == 2
    assert run.result["gallery"] and all((run.folder / each["image"]).is_file() for each in run.result["gallery"])
    card = read_card(run.folder)
    assert card.classes == ("disc", "square") and card.metrics["test"]["AP"] == test["AP"]
    model = load_detector(run.folder)
    assert model.settings.anchors == (20,) and set(model(torch.rand(1, 3, 48, 64).unbind())[0]) == {"boxes", "labels", "scores"}


def test_the_seed_determines_the_weights(run: Run, shapes: Path, tmp_path: Path) -> None:
    options = {"model": "resnet8", "settings": [*SMALL, *STEPS], "quiet": True, "task": "detect", "device": "cpu"}
    again, other = (train(shapes, seed=seed, out=tmp_path / f"{seed}", **options) for seed in (None, 1))
    first, second, third = (load_detector(each.folder).state_dict() for each in (run, again, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


@pytest.mark.parametrize("attempt", range(3))
def test_a_killed_and_resumed_run_ends_with_the_same_bits(run: Run, shapes: Path, tmp_path: Path, attempt: int) -> None:
    out = tmp_path / "killed"
    code = f"""
from reslearn import train
train({str(shapes)!r}, model="resnet8", settings={[*SMALL, *STEPS]!r}, out={str(out)!r}, quiet=True, task="detect", device="cpu")
"""
    process = start_python("-c", code)
    wanted = (1, 2, 3)[attempt]
    while process.poll() is None and not list((out / "checkpoints").glob(f"step-{5 * wanted:08d}")):
        time.sleep(0.002)
    time.sleep(0.03 * attempt)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = resume(out, device="cpu", quiet=True)
    ours, theirs = (load_detector(folder).state_dict() for folder in (resumed.folder, run.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert lines(out) == lines(run.folder)


def test_training_with_micro_batches_and_ema(shapes: Path, tmp_path: Path) -> None:
    settings = [*SMALL, "schedule.steps=4", "batch.micro=1", "ema=0.9", "log.every=1"]
    done = train(shapes, model="resnet8", settings=settings, out=tmp_path / "run", quiet=True, task="detect", device="cpu")
    assert all(line["loss"] < 50 for line in lines(done.folder))


def test_passes_are_weighted_by_their_images(shapes: Path) -> None:
    """The gradient of a step with several passes is their mean weighted by images, not by boxes."""

    def gradient(micro: str) -> float:
        given = ready(shapes, None, "batch.size=4", f"batch.micro={micro}", "data.val=2")
        state = make_state(given, torch.nn.Linear(1, 1, bias=False))
        weight, outcomes = next(state.model.parameters()), list[Outcome]()

        def losses(_: torch.nn.Module, examples: BoxExamples) -> Losses:
            boxes = torch.cat([target["boxes"] for target in examples.targets])  # a mean over the boxes of a pass
            return Losses({"one": weight.sum() * boxes[:, 2].mean(), "two": weight.sum() * boxes.new_ones(1).mean()})

        examples = make_stepper(given, state).prepare(0).examples
        assert isinstance(examples, BoxExamples)
        seen.append([target["boxes"] for target in examples.targets])
        update(LossModule(state.model, losses, nullcontext()), examples, state, outcomes.append)
        assert weight.grad is not None and outcomes[0].grad_norm == pytest.approx(abs(weight.grad.item()))
        return weight.grad.item()

    seen: list[list[torch.Tensor]] = []
    whole, singly = gradient("null"), gradient("1")
    boxes = seen[0]
    assert all(torch.equal(one, other) for one, other in zip(boxes, seen[1], strict=True))
    assert whole == pytest.approx(torch.cat(boxes)[:, 2].mean().item() + 1)
    passes = [one[:, 2].mean().item() + 1 for one in boxes]
    assert singly == pytest.approx(sum(passes) / 4) and singly != pytest.approx(whole)


def test_a_trained_backbone_keeps_its_weights_and_frozen_statistics(shapes: Path, tmp_path: Path) -> None:
    from drawing import draw_images

    photos = draw_images(tmp_path / "photos", size=(32, 32))
    start = train(photos, model="resnet8", settings=["schedule.steps=4"], out=tmp_path / "start", quiet=True, device="cpu")
    settings = [*SMALL, "schedule.steps=1", "schedule.lr=1e-9", "schedule.warmup=0", "optimizer.weight_decay=0", "precise_bn=null"]
    on = {"out": tmp_path / "run", "quiet": True, "task": "detect", "device": "cpu"}
    done = train(shapes, settings=settings, init=start.folder, **on)
    from reslearn.weights import load

    backbone, detector = load(start.folder).state_dict(), load_detector(done.folder).state_dict()
    mine = {name.removeprefix("backbone."): tensor for name, tensor in detector.items() if name.startswith("backbone.")}
    shared = [name for name in mine if name in backbone]
    assert len(shared) > 10 and all(torch.allclose(mine[name], backbone[name], atol=1e-6) for name in shared)
    assert read_card(done.folder).detector["batch_norm"] == "frozen"  # type: ignore[index]
    assert read_card(done.folder).preprocessing.mean == read_card(start.folder).preprocessing.mean


def test_precise_bn_averages_a_backbones_statistics_over_training_images(shapes: Path, tmp_path: Path) -> None:
    from reslearn.weights import load

    view = Preprocessing(channels=3, size=(32, 32), mean=(0.4,) * 3, std=(0.25,) * 3)
    save(create("resnet8", 2), tmp_path / "start.safetensors", Card(net="resnet8", classes=("a", "b"), preprocessing=view))
    sizes = ["detector.min_size=48", "detector.max_size=64", "data.flip=none", "data.val=0"]  # the images' size; none held out
    settings = [*SMALL[1:], *sizes, "schedule.steps=1", "schedule.warmup=0", "precise_bn=10"]
    on = {"out": tmp_path / "run", "quiet": True, "task": "detect", "device": "cpu"}
    done = train(shapes, settings=settings, init=tmp_path / "start.safetensors", **on)
    backbone, detector = load(tmp_path / "start.safetensors"), load_detector(done.folder).state_dict()
    order = [SampleOrder(0, 10, 8)[0][1], SampleOrder(0, 10, 8)[1][1][:2]]  # batches of 8 and 2
    images = open_boxes(shapes)["train"].images
    with torch.no_grad():
        each = [backbone.conv1((torch.stack([to_tensor(images[i].pixels()) for i in batch]) - 0.4) / 0.25) for batch in order]
    means = torch.stack([maps.mean((0, 2, 3)) for maps in each]).mean(0)
    variances = torch.stack([maps.transpose(0, 1).flatten(1).var(1) for maps in each]).mean(0)
    torch.testing.assert_close(detector["backbone.bn1.running_mean"], means, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(detector["backbone.bn1.running_var"], variances, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"precise_bn needs a trained backbone \(net\.init\)"):
        train(shapes, model="resnet8", settings=["precise_bn=10"], out=tmp_path / "no", quiet=True, task="detect", device="cpu")


def test_a_gray_backbone_gets_gray_images(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view = Preprocessing(channels=1, size=(32, 32), mean=(0.5,), std=(0.2,))
    save(create("resnet8", 2, 1), tmp_path / "gray.safetensors", Card(net="resnet8", classes=("a", "b"), preprocessing=view))
    settings = [*SMALL, "schedule.steps=1", "schedule.warmup=0"]
    on = {"out": tmp_path / "run", "quiet": True, "task": "detect", "device": "cpu"}
    done = train(shapes, settings=settings, init=tmp_path / "gray.safetensors", **on)
    assert load_detector(done.folder)([torch.rand(1, 48, 64)]) and done.result["last"]["test"]["n"] == 4
    (done.folder / "result.json").unlink()
    resumed = resume(done.folder, device="cpu")
    assert "images are converted to gray, as the initial model needs" in capsys.readouterr().out
    assert resumed.result["last"]["test"] == done.result["last"]["test"]


def ready(data: Path, recipe: Path | str | None = None, *settings: str, init: Path | None = None) -> Job:
    return prepare(parse(data, recipe, settings=settings, init=init, device="cpu", task="detect", quiet=True))


def test_three_equivalent_ways_to_give_a_backbone(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = Preprocessing(channels=1, size=(32, 32), mean=(0.5,), std=(0.2,))
    card = Card(net="resnet8", options={"shortcut": "B"}, classes=("a", "b"), preprocessing=view)
    file = save(create("resnet8", 2, 1, shortcut="B"), tmp_path / "gray.safetensors", card)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text('base = "detect-default"\n[net]\ninit = "gray.safetensors"\n')
    options = [(None, (), file), (None, ("net.init=gray.safetensors",), None), (tmp_path / "mine.toml", (), None)]
    found = [ready(shapes, recipe, *settings, init=init) for recipe, settings, init in options]
    recipes = [one.recipe.model_copy(update={"name": ""}) for one in found]
    assert recipes[0] == recipes[1] == recipes[2]
    for key in ("chose", "preprocessing", "data"):
        assert found[0].facts[key] == found[1].facts[key] == found[2].facts[key]
    assert recipes[1].detector.batch_norm == "frozen" and recipes[1].schedule.lr == 0.005 and recipes[1].net.init == str(file)
    assert ready(shapes, tmp_path / "mine.toml", "net.init=null", "net.name=resnet8").recipe.detector.batch_norm == "live"
    with pytest.raises(UserError, match=r"--init .* and --set net\.init=x: give only one of them"):
        ready(shapes, None, "net.init=x", init=file)
    (tmp_path / "mine.toml").write_text('base = "detect-default"\n[net]\ninit = 5\n')
    with pytest.raises(UserError, match=r"mine\.toml: net\.init: must be a string"):
        ready(shapes, tmp_path / "mine.toml")


def test_a_recipe_file_uses_the_split_of_its_base(shapes: Path, tmp_path: Path) -> None:
    root = boxed.shapes(tmp_path / "set", images=6, split="trainval")
    boxed.shapes(root, images=4, split="train")
    boxed.shapes(root, images=3, split="test")
    (tmp_path / "mine.toml").write_text('base = "voc-paper"\nseed = 3\n')
    found = ready(root, tmp_path / "mine.toml", "data.val=1")
    assert [len(one) for one in found.sources.named().values()] == [5, 1, 3] and found.recipe.seed == 3
    (tmp_path / "bad.toml").write_text('base = "voc-paper"\n[data]\ntrain = 5\n')
    with pytest.raises(UserError, match=r"data\.train"):
        ready(root, tmp_path / "bad.toml")


def test_a_runs_recipe_can_be_reused(shapes: Path, tmp_path: Path) -> None:
    root = boxed.shapes(tmp_path / "set", images=6)
    boxed.shapes(root, images=2, split="val")
    values = {"recipe": ready(root).recipe.model_dump(mode="json")}
    (tmp_path / "recipe.json").write_text(json.dumps(values))
    assert ready(root, tmp_path / "recipe.json").recipe.model_dump(mode="json") == values["recipe"]
    for settings in (["data.val=0.1"], ["data.val=3"]):
        with pytest.raises(UserError, match="its own val images"):
            ready(root, tmp_path / "recipe.json", *settings)
    assert [len(one) for one in ready(root, None, "data.train=val", "data.val=1").sources.named().values()] == [1, 1]


def test_validation_losses_use_the_same_objects_as_training(tmp_path: Path) -> None:
    hard = boxed.voc_object((5, 5, 25, 29), more="<difficult>1</difficult>")
    root = boxed.voc(tmp_path, {name: boxed.voc_xml(boxed.voc_object((30, 5, 50, 29)), hard) for name in "abc"})
    for difficult, count in (("true", 2), ("false", 1)):
        sources = ready(root, None, f"data.difficult={difficult}", "data.val=1").sources
        assert [len(one[0][1]["boxes"]) for one in sources.named().values()] == [count, count]
        assert len(sources.val.split.images[0].objects) == 2, "evaluation ignores difficult objects"


@pytest.mark.parametrize(
    ("data", "settings", "words"),
    [
        ("nowhere", [], "nowhere"),
        ("shapes", ["data.train=trainval"], "trainval"),
        ("file", ["data.train=val"], "no split 'val'"),
        ("shapes", ["data.val=100"], "hold out"),
        ("shapes", ["schedule.warmup=1000"], "must be shorter than the run"),
        ("flat", [], "no area"),
    ],
)
def test_invalid_data_is_rejected_before_anything_is_written(
    shapes: Path, tmp_path: Path, data: str, settings: list[str], words: str
) -> None:
    flat = boxed.voc(tmp_path / "flat", {"a": boxed.voc_xml(boxed.voc_object((5, 5, 5, 9)), boxed.voc_object((1, 1, 9, 9)))})
    file = boxed.coco(tmp_path, [boxed.annotation()])
    path = {"nowhere": tmp_path / "nowhere", "shapes": shapes, "flat": flat, "file": file}[data]
    with pytest.raises(UserError) as error:
        train(path, model="resnet8", settings=settings, out=tmp_path / "run", quiet=True, task="detect", device="cpu")
    assert words in str(error.value) and not (tmp_path / "run").exists()


def test_voc_recipes_suggest_a_split_if_there_is_no_trainval(shapes: Path, tmp_path: Path) -> None:
    file = boxed.coco(tmp_path, [boxed.annotation()])
    for data, split in ((file, "all"), (shapes, "train")):
        with pytest.raises(UserError) as error:
            train(data, model="resnet8", recipe="voc-paper", out=tmp_path / "run", quiet=True, task="detect", device="cpu")
        assert str(error.value) == f"{data}: voc-paper trains on VOC's trainval, which is missing: use --set data.train={split}"
    anchors = ["data.train=all", "detector.min_size=64", "detector.max_size=64", "detector.anchors=[16]"]
    assert ready(file, "voc-paper", *anchors).recipe.data.train == "all"


def test_a_missing_or_unsupported_set_is_reported_first(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / "yolo" / "train" / folder).mkdir(parents=True)
    for data, words in ((tmp_path / "yolo", "YOLO's layout"), (tmp_path / "gone.json", "no such folder or .json file")):
        with pytest.raises(UserError, match=words):
            train(data, model="resnet8", recipe="voc-paper", out=tmp_path / "run", quiet=True, task="detect", device="cpu")
