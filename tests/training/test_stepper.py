"""Every way to run a step gives the same losses from the same batches; what cannot be used is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reslearn import UserError, create
from reslearn.data.images.resident import Resident
from reslearn.data.preprocess import Preprocessing
from reslearn.data.sets import Split
from reslearn.training import runtime
from reslearn.training.recipe import Recipe, validate
from reslearn.training.schedule import lr
from reslearn.training.state import State
from reslearn.training.step import NonFinite, make_criterion, set_lr
from reslearn.training.stepper import DeviceStepper, HostStepper, Stepper, make_stepper, pick

CPU = torch.device("cpu")
STEPS = 50
DIRECTLY: dict[str, Callable[..., Stepper]] = {
    "host": HostStepper,
    "device": lambda *parts: DeviceStepper(*parts, graph=False),
}


def recipe(**changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "seed": 3,
        "net": {"name": "resnet8"},
        "data": {"pad": 2},
        "batch": {"size": 32, "micro": 16},
        "schedule": {"steps": STEPS, "lr": 0.05, "shape": "one-cycle", "warmup": 5},
        "optimizer": {"style": "caffe"},
        "ema": 0.9,
        "precision": "fp32",
    }
    return validate(values | changes)


def source(made: Recipe) -> Resident:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (100, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 4, (100,), generator=generator)
    pixels[labels == 1] //= 2
    split = Split(labels.numpy(), tuple(map(str, range(100))), pixels=pixels)
    view = Preprocessing(channels=3, size=(16, 16), mean=(0.5,) * 3, std=(0.25,) * 3)
    return Resident(split, view, flip=True, pad=made.data.pad)


def losses(make: str | Callable[..., Stepper], steps: int = STEPS, **changes: Any) -> tuple[list[float], list[list[int]], State]:
    """The loss and the indices of each step."""
    made = recipe(**changes)
    images = source(made)
    torch.manual_seed(0)
    model = create(made.net.name, 4, **made.net.options()).to(memory_format=torch.channels_last).train()
    model.recompute = made.recompute  # type: ignore[assignment]
    state = State(model, made)
    criterion = make_criterion(made.loss, torch.bincount(images.labels))
    if isinstance(make, str):
        mode, _ = pick(make, CPU, made, resident=True)
        stepper = make_stepper(mode, made, images, state, criterion, made.precision)
    else:
        stepper = make(made, images, state, criterion, made.precision, state.model)
    stepper.restart(state.progress)
    found, seen, before = [], [], 0.0
    for step in range(steps):
        set_lr(state.optimizer, lr(made.schedule, step, steps), made.optimizer.style)
        runtime.seed_step(made.seed, step)
        batch = stepper.prepare(step)
        seen.append(batch.indices.tolist())
        stepper(batch, state.progress)
        stepper.collect(state.progress)
        found.append((state.progress.loss - before) / made.batch.size)
        before = state.progress.loss
        state.progress.step += 1
    return found, seen, state


def difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("mode", "net"), [("fused", "resnet8"), ("fused", "plain8"), ("fused", "resnet8-full"), ("compiled", "resnet8")]
)
def test_every_way_gives_the_losses_of_eager(mode: str, net: str) -> None:
    name, _, order = net.partition("-")
    options = {"name": name, "order": order} if order else {"name": name}
    # A rounding grows a hundredfold in these steps at lr 0.01, whatever it comes from (another number of threads, say).
    changes: dict[str, Any] = {"net": options, "schedule": {"steps": STEPS, "lr": 3e-4}}
    eager, batches, _ = losses("eager", **changes)
    other, same, _ = losses(mode, **changes)
    assert batches == same, "the same images in the same order"
    assert 0 < difference(eager, other) < 1e-5 and eager[-1] < eager[0]


def test_on_the_device_is_as_on_the_host() -> None:
    host, batches, one = losses(DIRECTLY["host"])
    device, same, other = losses(DIRECTLY["device"])
    assert batches == same and difference(host, device) < 1e-6
    assert one.progress == other.progress
    averages = [state.evaluated.state_dict() for state in (one, other)]
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def test_bf16_is_near_fp32() -> None:
    exact, _, _ = losses("fused")
    rounded, _, _ = losses("fused", precision="bf16")
    assert 0 < difference(exact, rounded) < 0.3


@pytest.mark.parametrize("how", DIRECTLY)
def test_what_is_not_finite_changes_nothing(how: str) -> None:
    made = recipe()
    images = source(made)
    state = State(create("resnet8", 4).train(), made)
    stepper = DIRECTLY[how](made, images, state, make_criterion(made.loss, torch.bincount(images.labels)), "fp32", state.model)
    stepper.restart(state.progress)
    stepper(stepper.prepare(0), state.progress)
    stepper.collect(state.progress)
    state.progress.step = 1
    weights = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    velocity = state.optimizer.state[state.model.conv1.weight]["momentum_buffer"].clone()  # type: ignore[union-attr,index]
    images.normalize.shift.fill_(float("nan"))
    with pytest.raises(NonFinite) as caught:
        stepper(stepper.prepare(1), state.progress)
        stepper(stepper.prepare(2), state.progress)  # the device does not wait to be asked
        stepper.collect(state.progress)
    assert caught.value.step in (None, 1)
    assert all(torch.equal(weights[name], p) for name, p in state.model.named_parameters())
    assert torch.equal(velocity, state.optimizer.state[state.model.conv1.weight]["momentum_buffer"])  # type: ignore[union-attr,index]


def test_what_cannot_be_used_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="step=captured cannot be used: it is for GPUs"):
        pick("captured", CPU, recipe(), resident=True)
    cuda = torch.device("cuda")
    with pytest.raises(UserError, match="the images do not lie in memory"):
        pick("captured", cuda, recipe(), resident=False)
    depth = recipe(net={"name": "resnet8", "last_survival": 0.5})
    with pytest.raises(UserError, match="stochastic depth draws on the host"):
        pick("captured", cuda, depth, resident=True)
    assert pick("auto", cuda, recipe(), resident=True) == ("captured", None)
    assert pick("auto", cuda, depth, resident=True)[0] == "eager"
    with pytest.raises(UserError, match="it is for CPUs"):
        pick("fused", cuda, recipe(), resident=True)
    with pytest.raises(UserError, match="no BN and ReLU of this network"):
        pick("fused", CPU, recipe(net={"name": "alexnet"}), resident=True)
    assert pick("auto", CPU, recipe(net={"name": "alexnet"}), resident=True) == ("eager", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert pick("auto", CPU, recipe(), resident=True) == ("eager", "BN and ReLU are not fused: there is no C++ compiler")
    with pytest.raises(UserError, match="step=fused cannot be used: there is no C\\+\\+ compiler"):
        pick("fused", CPU, recipe(), resident=True)


def test_a_run_says_how_its_steps_are_run(tmp_path: Path, images: Path) -> None:
    from reslearn import train

    run = train(images, "resnet8", settings=["schedule.steps=2", "batch.size=4", "step=eager"], out=tmp_path / "run", quiet=True)
    assert json.loads((run.folder / "recipe.json").read_text())["machine"]["step"] == "eager"


@pytest.mark.parametrize("mode", ["eager", "fused"])
@pytest.mark.parametrize("options", [{}, {"last_survival": 0.5}], ids=str)
def test_recomputing_changes_no_bit_and_keeps_less(mode: str, options: dict[str, Any]) -> None:
    results = []
    for recompute in (False, True):
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            found, _, state = losses(mode, 3, net={"name": "resnet20", **options}, recompute=recompute)
        results.append((found, state.model.state_dict(), kept))
    (found, weights, kept), (again, others, less) = results
    assert found == again and all(torch.equal(weights[name], others[name]) for name in weights), "BN's statistics too"
    assert less < kept / 2
