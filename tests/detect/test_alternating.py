"""Alternating training: what each phase trains, against a plain loop, after kills, and rejected settings."""

import copy
import itertools
import signal
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torchvision.models import VGG
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.vgg import make_layers

import boxed
from command_line import run_python
from detect.small import TINY, pictures, target
from drawing import draw_images
from painted_sets import lines
from reslearn import UserError, resume, train
from reslearn.detect import Detector, create_detector, load_detector
from reslearn.detect.alternating import Alternating, phases
from reslearn.detect.recipes import NAMED, DetectRecipe
from reslearn.detect.task import DETECT, BoxExamples
from reslearn.training import run, runtime
from reslearn.training.loop import Loop
from reslearn.training.request import parse
from reslearn.training.run import Run
from reslearn.training.state import State
from reslearn.training.task import Phase

SMALL = ["data.val=2", "detector.regions=8", "detector.anchors=[20]", "detector.ratios=[1.0]", "batch.size=2", "precision=fp32"]
TURNS = ["alternate=[2,1,2,1]", "schedule.steps=18", "schedule.shape=steps", "schedule.drops=[0.5]", "schedule.warmup=0"]
TIMES = ["log.every=4", "evaluate.every=4", "checkpoint.every=2"]
SETTINGS = [*SMALL, *TURNS, *TIMES]
ENDS = (6, 9, 15, 18)
PROPOSALS, REGIONS = {"loss_objectness", "loss_rpn_box_reg"}, {"loss_classifier", "loss_box_reg"}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    boxed.shapes(root, images=10)
    return boxed.shapes(root, images=2, split="test")


class Moment(NamedTuple):
    """A run after a step: the detector's weights, phase 1's detector, and the largest momentum of each module."""

    model: dict[str, Tensor]
    first: dict[str, Tensor] | None
    momentum: dict[str, float]


class Watched(NamedTuple):
    loop: Loop
    moments: list[Moment]
    done: Run


def moment(state: State) -> Moment:
    assert isinstance(state.model, Alternating)
    detector, proposer = state.model.detector, state.model.proposer
    first = None if proposer is None else copy.deepcopy(proposer.state_dict())
    momentum: dict[str, float] = {}
    for name, tensor in state.to_checkpoint().state.items():
        if name.startswith("momentum."):
            part = ".".join(name.split(".")[1:3])
            momentum[part] = max(momentum.get(part, 0.0), tensor.abs().max().item())
    return Moment(copy.deepcopy(detector.state_dict()), first, momentum)


def phase_at(step: int) -> int:
    """The phase (from 1) of a step (from 0)."""
    return 1 + sum(end <= step for end in ENDS[:-1])


@pytest.fixture(scope="module")
def watched(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    """A run recorded after each step; moments[0] is before the first."""
    out = tmp_path_factory.mktemp("watched") / "run"
    job = run.begin(parse(shapes, model="resnet8", settings=SETTINGS, out=out, device="cpu", quiet=True, task="detect"))
    loop = run.make_loop(job)
    moments = [moment(loop.state)]
    with runtime.deterministic(job.device):
        moments += [moment(loop.state) for _ in loop.steps(runtime.Stop())]
        return Watched(loop, moments, Run(out, "detect", run.finish(loop, runtime.Stop())))


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The modules of a detector whose state differs."""
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def test_each_phase_trains_only_its_modules(watched: Watched) -> None:
    moments = watched.moments
    at = [moments[step] for step in (0, *ENDS)]
    first, learned, used = at[0].first, at[1].first, moments[ENDS[1] - 1].first
    assert first is not None and learned is not None and used is not None and at[2].first is None
    assert not changed(first, at[0].model), "both backbones start from the same weights"
    assert changed(first, learned) == {"backbone", "rpn"} and not changed(learned, used)
    parts = [set(), {"backbone", "roi_heads"}, {"rpn"}, {"roi_heads"}]
    assert [changed(a.model, b.model) for a, b in itertools.pairwise(at)] == parts
    statistics = [name for name in at[0].model if name.startswith("backbone") and "running_mean" in name]
    assert statistics, "BN is live: its statistics are fixed as well"
    assert not any(torch.equal(at[1].model[name], at[2].model[name]) for name in statistics)


def test_each_phase_starts_with_zero_momentum(watched: Watched) -> None:
    parts = [
        {"proposer.backbone", "proposer.rpn"},
        {"detector.backbone", "detector.roi_heads"},
        {"detector.rpn"},
        {"detector.roi_heads"},
    ]
    for step, seen in enumerate(watched.moments):
        assert set(seen.momentum) == parts[phase_at(step) - 1]
        still = step in (0, *ENDS[:-1])
        assert all((largest == 0) == still for largest in seen.momentum.values()), step


def test_the_log_has_the_losses_of_each_phase(watched: Watched) -> None:
    folder, result = watched.done.folder, watched.done.result
    trained = {line["step"]: line for line in lines(folder) if line["event"] == "train"}
    assert list(trained) == [4, 6, 8, 9, 12, 15, 16, 18], "each phase's last step has a line: no line spans two phases"
    for step, line in trained.items():
        assert line["phase"] == phase_at(step - 1)
        assert set(line["losses"]) == (PROPOSALS if line["phase"] % 2 else REGIONS)
        assert line["loss"] == pytest.approx(sum(line["losses"].values()))
    assert [line["lr"] for line in trained.values()] == pytest.approx([0.002, 0.002, 0.02, 0.002, 0.02, 0.002, 0.02, 0.002])
    evaluations = [line for line in lines(folder) if line["event"] == "eval"]
    assert [line["step"] for line in evaluations] == [12, 16, 18], "phases 1 and 2 are not evaluated"
    assert all(set(line["losses"]) == PROPOSALS | REGIONS for line in evaluations)
    assert result["best"]["step"] in (12, 16, 18) and result["last"]["test"]["n"] == 2
    ours, theirs = load_detector(folder).state_dict(), watched.moments[-1].model
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_training_equals_a_plain_loop_with_torchvisions_modules(watched: Watched) -> None:
    """The same batches and random numbers, with torchvision's forward passes and a plain SGD."""
    loop, recipe = watched.loop, watched.loop.recipe
    assert isinstance(loop.state.model, Alternating)
    model = copy.deepcopy(loop.state.model.detector).requires_grad_(True)
    model._frozen = ()
    model.load_state_dict(watched.moments[0].model)
    first = copy.deepcopy(model)

    def learn(net: Detector, parts: list[str], steps: range, proposer: Detector | None, backbone: bool) -> None:
        net.train()
        net.backbone.train(backbone)
        names = ["backbone", *parts] if backbone else parts
        chosen = [(n, p) for n, p in net.named_parameters() if n.split(".")[0] in names]
        groups = [
            {"params": [p for _, p in chosen if p.ndim > 1], "weight_decay": recipe.optimizer.weight_decay},
            {"params": [p for _, p in chosen if p.ndim <= 1], "weight_decay": 0.0},
        ]
        sgd = torch.optim.SGD(groups, momentum=recipe.optimizer.momentum, nesterov=recipe.optimizer.nesterov)
        for step in steps:
            for group in sgd.param_groups:
                group["lr"] = recipe.schedule.lr * (0.1 if step - steps.start >= round(len(steps) / 2) else 1)
            batch = loop.stepper.prepare(step)
            runtime.seed_step(recipe.seed, step, 0)
            assert isinstance(batch.examples, BoxExamples)
            images, targets = net.transform(batch.examples.images, batch.examples.targets)
            with torch.set_grad_enabled(backbone):
                features = net.backbone(images.tensors)
            if parts == ["rpn"]:
                losses = RegionProposalNetwork.forward(net.rpn, images, features, targets)[1]
            else:
                with torch.no_grad(), torch.random.fork_rng():
                    source = proposer or net
                    proposals = RegionProposalNetwork.forward(source.rpn, images, source.backbone(images.tensors), targets)[0]
                losses = RoIHeads.forward(net.roi_heads, features, proposals, images.image_sizes, targets)[1]
            sgd.zero_grad()
            sum(losses.values()).backward()  # type: ignore[union-attr]
            sgd.step()

    with runtime.deterministic(torch.device("cpu")):
        learn(first, ["rpn"], range(6), None, backbone=True)
        first.backbone.eval()
        learn(model, ["roi_heads"], range(6, 9), first, backbone=True)
        learn(model, ["rpn"], range(9, 15), None, backbone=False)
        learn(model, ["roi_heads"], range(15, 18), None, backbone=False)
    ours, theirs = watched.moments[-1].model, model.state_dict()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_a_run_killed_in_each_phase_ends_with_the_same_bits(watched: Watched, shapes: Path, tmp_path: Path) -> None:
    """One run is killed in the update of each of these steps, and resumed from the previous checkpoint."""
    out, whole = tmp_path / "killed", watched.done.folder
    for step in (5, 7, 8, 13, 17):  # step 7 resumes at the end of phase 1, the others within a phase
        code = f"""
import os, signal
from reslearn import resume, train
from reslearn.training.stepper import HostStepper
def die():
    os.kill(os.getpid(), signal.SIGKILL)
call = HostStepper.__call__
def step(self, batch):
    if self.state.progress.step == {step}:
        self.state.optimizer.step = die
    call(self, batch)
HostStepper.__call__ = step
if {out.exists()}:
    resume({str(out)!r}, device="cpu", quiet=True)
else:
    train({str(shapes)!r}, model="resnet8", settings={SETTINGS!r}, out={str(out)!r}, quiet=True, task="detect", device="cpu")
"""
        assert run_python("-c", code).code == -signal.SIGKILL
        assert sorted(path.name for path in (out / "checkpoints").glob("step-*"))[-1] == f"step-{step // 2 * 2:08d}"
    resume(out, device="cpu", quiet=True)
    for file in ("model.safetensors", "best.safetensors"):
        ours, theirs = (load_detector(folder / file).state_dict() for folder in (out, whole))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert lines(out) == lines(whole)


@pytest.mark.parametrize(
    ("net", "options", "regions"),
    [
        ("resnet8", {"kind": "fpn", "anchors": (8, 16, 32, 48)}, REGIONS),
        ("resnet8", {"masks": True, "context": True}, REGIONS | {"loss_mask"}),
        ("vgg", {}, REGIONS),
    ],
)
def test_every_kind_of_detector_alternates(net: str, options: dict, regions: set[str]) -> None:
    torch.manual_seed(0)
    body = net
    if net == "vgg":  # full-width fc6 and fc7 have 120 million weights
        body = VGG(make_layers([8, "M", 8, "M", 8, "M", 8, "M", 8, "M"]), num_classes=5)
        body.classifier = torch.nn.Sequential(
            torch.nn.Linear(8 * 49, 32), torch.nn.ReLU(), torch.nn.Dropout(), torch.nn.Linear(32, 16), torch.nn.Linear(16, 5)
        )
    model = create_detector(body, 3, **{**TINY, **({"anchors": (8, 16)} | options)})
    recipe = DetectRecipe.model_validate(
        {"net": {"name": "resnet8"}, "detector": model.settings, "schedule": {"steps": 4, "lr": 0.01}, "alternate": (1, 1, 1, 1)}
    )
    state = State(Alternating(model), recipe, tuple(map(Phase, (1, 2, 3, 4))), DETECT)
    images = pictures((40, 56), (48, 40))
    targets = [target(image, (4, 4, 20, 24), label=i + 1) for i, image in enumerate(images)]
    for phase in (1, 2, 3, 4):
        state.enter(phase)
        before = copy.deepcopy(model.state_dict())
        losses = state.model(images, targets)
        assert set(losses) == (PROPOSALS if phase % 2 else regions)
        sum(losses.values()).backward()  # type: ignore[union-attr]
        state.optimizer.step()
        parts = [set(), {"backbone", "roi_heads"}, {"rpn"}, {"roi_heads"}]
        assert changed(before, model.state_dict()) == parts[phase - 1]
    model.eval()
    assert len(model(images)) == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["alternate=[1,1,1]"], "alternate"),
        (["alternate=[1,1,0,1]"], "greater than 0"),
        (["alternate=true"], "alternate"),
        (["alternate=[1,1,1,1]", "schedule.steps=3"], "none of the run's 3 steps"),
        (["alternate=[1,1,1,1]", "ema=0.9"], "ema cannot be combined with alternate"),
        (["alternate=[1,1,1,1]", "schedule.shape=plateau"], "plateau cannot be combined with alternate"),
        (["alternate=[1,1,1,1]", "schedule.shape=steps", "schedule.drops=[5]"], "shares below 1 of each phase"),
        (["alternate=[9,1,9,1]", "schedule.steps=100", "schedule.warmup=5"], "must be shorter than the shortest phase (5 steps)"),
    ],
)
def test_invalid_settings_are_rejected_before_anything_is_written(
    shapes: Path, tmp_path: Path, settings: list[str], words: str
) -> None:
    with pytest.raises(UserError) as error:
        train(shapes, model="resnet8", settings=settings, out=tmp_path / "run", quiet=True, task="detect", device="cpu")
    assert words in str(error.value) and not (tmp_path / "run").exists()


def test_classification_has_no_key_alternate(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no key 'alternate'"):
        train(draw_images(tmp_path / "photos"), model="resnet8", settings=["alternate=[1,1,1,1]"], out=tmp_path / "run", quiet=True)


def test_the_papers_schedule() -> None:
    recipe = DetectRecipe.model_validate(NAMED["voc-paper-4step"](None, None, "c4", False).values)
    assert [phase.end for phase in phases(recipe, 5011)] == [80_000, 120_000, 200_000, 240_000]
    assert recipe.schedule.drops == (0.75,)
    assert recipe.data.train == "trainval" and recipe.net.name == "resnet101"
