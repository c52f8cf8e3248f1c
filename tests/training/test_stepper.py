"""Execution modes give the same losses from the same batches; unavailable ones are rejected."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from reslearn import UserError, create, train
from reslearn.classify.recipes import ClassifyRecipe
from reslearn.kernels.fuse import library
from reslearn.training import runtime
from reslearn.training.optimizer import set_lr
from reslearn.training.recipe import validate
from reslearn.training.schedule import lr
from reslearn.training.state import State
from reslearn.training.step import NonFinite
from reslearn.training.stepper import DeviceStepper, HostStepper, Stepper, make_stepper, pick
from training_jobs import CPU, make_job, make_state, resident, take_step

STEPS = 50
DIRECTLY: dict[str, Callable[..., Stepper]] = {"host": HostStepper, "device": lambda *parts: DeviceStepper(*parts, graph=False)}


def recipe(**changes: Any) -> ClassifyRecipe:
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
    return validate(values | changes, ClassifyRecipe)


def losses(make: str | Callable[..., Stepper], steps: int = STEPS, **changes: Any) -> tuple[list[float], list[list[int]], State]:
    """The losses and the indices of all steps, and the final state."""
    made = recipe(**changes)
    execution = pick(made, CPU, resident=True, mode=make)[0] if isinstance(make, str) else "eager"
    job = make_job(made, resident(), execution=execution)
    torch.manual_seed(0)
    model = create(made.net.name, 4, **made.net.options()).to(memory_format=torch.channels_last)
    model.recompute = made.recompute  # type: ignore[assignment]
    state = make_state(job, model)
    stepper = (make_stepper if isinstance(make, str) else make)(job, state)
    stepper.restart()
    found, seen, before = [], [], 0.0
    for step in range(steps):
        set_lr(state.optimizer, lr(made.schedule, step, steps), made.optimizer.style)
        runtime.seed_step(made.seed, step)
        seen.append(stepper.prepare(step).indices.tolist())
        take_step(stepper, state)
        found.append((state.progress.loss - before) / made.batch.size)
        before = state.progress.loss
    return found, seen, state


def difference(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(
    ("mode", "net"), [("fused", "resnet8"), ("fused", "plain8"), ("fused", "resnet8-full"), ("compiled", "resnet8")]
)
def test_every_execution_mode_gives_the_losses_of_eager(mode: str, net: str) -> None:
    name, _, order = net.partition("-")
    options = {"name": name, "order": order} if order else {"name": name}
    # Rounding errors grow a hundredfold in these steps at lr 0.01.
    changes: dict[str, Any] = {"net": options, "schedule": {"steps": STEPS, "lr": 3e-4}}
    eager, batches, _ = losses("eager", **changes)
    other, same, _ = losses(mode, **changes)
    assert batches == same, "the same images in the same order"
    assert 0 < difference(eager, other) < 1e-5 and eager[-1] < eager[0]


def test_the_device_stepper_equals_the_host_stepper() -> None:
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
def test_a_non_finite_step_changes_nothing(how: str) -> None:
    job = make_job(recipe(), resident())
    state = make_state(job, create("resnet8", 4))
    stepper = DIRECTLY[how](job, state)
    stepper.restart()
    take_step(stepper, state)
    weights = {name: p.detach().clone() for name, p in state.model.named_parameters()}
    buffer = state.optimizer.state[state.model.conv1.weight]["momentum_buffer"].clone()  # type: ignore[union-attr,index]
    job.sources.train.normalize.shift.fill_(float("nan"))
    with pytest.raises(NonFinite) as caught:
        stepper(stepper.prepare(1))
        stepper(stepper.prepare(2))  # the device does not wait to be asked
        stepper.collect()
    assert caught.value.step in (None, 1)
    assert all(torch.equal(weights[name], p) for name, p in state.model.named_parameters())
    assert torch.equal(buffer, state.optimizer.state[state.model.conv1.weight]["momentum_buffer"])  # type: ignore[union-attr,index]


def test_unavailable_modes_are_rejected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="execution=captured is not available: it is for GPUs"):
        pick(recipe(), CPU, resident=True, mode="captured")
    cuda = torch.device("cuda")
    with pytest.raises(UserError, match="the images are not resident in memory"):
        pick(recipe(), cuda, resident=False, mode="captured")
    depth = recipe(net={"name": "resnet8", "last_survival": 0.5})
    with pytest.raises(UserError, match="stochastic depth samples on the host"):
        pick(depth, cuda, resident=True, mode="captured")
    assert pick(recipe(), cuda, resident=True, mode="auto") == ("captured", None)
    assert pick(depth, cuda, resident=True, mode="auto")[0] == "eager"
    with pytest.raises(UserError, match="it is for CPUs"):
        pick(recipe(), cuda, resident=True, mode="fused")
    with pytest.raises(UserError, match="this network has no BN and ReLU"):
        pick(recipe(net={"name": "alexnet"}), CPU, resident=True, mode="fused")
    assert pick(recipe(net={"name": "alexnet"}), CPU, resident=True, mode="auto") == ("eager", None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    library.cache_clear()
    assert pick(recipe(), CPU, resident=True, mode="auto") == ("eager", "BN and ReLU are not fused: there is no C++ compiler")
    with pytest.raises(UserError, match="execution=fused is not available: there is no C\\+\\+ compiler"):
        pick(recipe(), CPU, resident=True, mode="fused")


def test_recipe_json_records_the_execution_mode(tmp_path: Path, images: Path) -> None:
    run = train(
        images, model="resnet8", settings=["schedule.steps=2", "batch.size=4", "execution=eager"], out=tmp_path / "run", quiet=True
    )
    assert json.loads((run.folder / "recipe.json").read_text())["machine"]["execution"] == "eager"


@pytest.mark.parametrize("mode", ["eager", "fused"])
@pytest.mark.parametrize("options", [{}, {"last_survival": 0.5}], ids=str)
def test_recomputing_saves_memory_and_changes_no_bit(mode: str, options: dict[str, Any]) -> None:
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
