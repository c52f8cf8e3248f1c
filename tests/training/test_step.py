"""A training step against explicit formulas: SGD, micro-batches, class weights, EMA."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reslearn import UserError, create
from reslearn.classify.recipes import ClassifyRecipe
from reslearn.classify.recipes.recipe import Loss
from reslearn.classify.task import ImageExamples, cross_entropy
from reslearn.data.augment import Draws
from reslearn.training import runtime
from reslearn.training.ema import Ema
from reslearn.training.optimizer import make_optimizer, set_lr
from reslearn.training.recipe import Optimizer, validate
from reslearn.training.state import State
from reslearn.training.step import NonFinite, Outcome, update
from reslearn.training.stepper import HostStepper
from training_jobs import make_job, make_state


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 2, 2, generator=generator), torch.randint(0, 3, (n,), generator=generator)


class Fixed:
    """A split that always returns these images and labels."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels, self.names = images, labels, tuple(map(str, range(len(labels))))

    def __len__(self) -> int:
        return len(self.labels)

    def train_batch(self, draws: Draws) -> tuple[torch.Tensor, torch.Tensor]:
        return self.images, self.labels


def begun(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, **values: Any) -> tuple[State, HostStepper]:
    """State and stepper of a run on these images of three classes. values: of the recipe."""
    values = {"net": {"name": "resnet8"}, "schedule": {"steps": 9}, "batch": {"size": len(labels)}, "precision": "fp32"} | values
    job = make_job(validate(values, ClassifyRecipe), Fixed(images, labels), classes="abc")
    state = make_state(job, model)
    return state, HostStepper(job, state)


def step(state: State, stepper: HostStepper) -> Outcome:
    """Take a step and return its outcome."""
    seen: list[Outcome] = []
    examples = stepper.prepare(state.progress.step).examples
    assert examples is not None
    update(stepper.losses, examples, state, seen.append)
    return seen[0]


@pytest.mark.parametrize("style", ["pytorch", "caffe"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_equals_its_formula(style: str, nesterov: bool) -> None:
    torch.manual_seed(0)
    model = Linear()
    images, labels = batch()
    recipe = {"momentum": 0.9, "weight_decay": 0.01, "nesterov": nesterov, "style": style}
    state, stepper = begun(model, images, labels, optimizer=recipe)
    w, v = model.fc.weight.detach().clone(), torch.zeros(3, 4)
    for lr in (0.1, 0.1, 0.01, 0.01, 0.05):
        weight = w.clone().requires_grad_()
        loss = F.cross_entropy(images.flatten(1) @ weight.T, labels)
        (gradient,) = torch.autograd.grad(loss, weight)
        g = gradient + 0.01 * w
        if style == "caffe":  # v = m v + lr g; w -= v
            v = 0.9 * v + lr * g
            w = w - (0.9 * v + lr * g if nesterov else v)
        else:  # v = m v + g; w -= lr v
            v = 0.9 * v + g
            w = w - lr * (0.9 * v + g if nesterov else v)
        set_lr(state.optimizer, lr, style)
        assert step(state, stepper).loss.item() == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(model.fc.weight, w, rtol=0, atol=1e-6)


def test_micro_batches_give_the_gradient_of_the_whole_batch() -> None:
    models = []
    for micro in (None, 2):
        torch.manual_seed(0)
        models.append(model := Linear())
        outcome = step(*begun(model, *batch(), batch={"size": 8, "micro": micro}))
        assert outcome.names == ("cross_entropy",) and outcome.values[-1] == 6 and outcome.grad_norm > 0
    torch.testing.assert_close(models[0].fc.weight, models[1].fc.weight)


def test_batch_norm_sees_one_micro_batch_at_a_time() -> None:
    torch.manual_seed(0)
    net = create("resnet8", 3)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    step(*begun(net, images, labels, batch={"size": 8, "micro": 4}))
    assert net.bn1.num_batches_tracked == 2


def test_auto_class_weights() -> None:
    loss = cross_entropy(Loss(class_weights="auto", label_smoothing=0.1), torch.tensor([60, 30, 10]))
    images, labels, model = torch.randn(5, 1, 2, 2), torch.tensor([0, 1, 2, 2, 0]), Linear()
    weight = torch.tensor([100 / 180, 100 / 90, 100 / 30])
    parts, wrong = loss(model, ImageExamples(images, labels))
    logits = model(images)
    assert parts == {"cross_entropy": F.cross_entropy(logits, labels, weight, label_smoothing=0.1)}
    assert wrong == (logits.argmax(1) != labels).sum()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_loss_does_not_change_the_weights(poison: float) -> None:
    model = Linear()
    before = model.fc.weight.detach().clone()
    images, labels = batch()
    images[3] = poison
    _, stepper = begun(model, images, labels)
    with pytest.raises(NonFinite, match="the loss is"):
        stepper(stepper.prepare(0))
    assert torch.equal(model.fc.weight, before)


def test_ema_is_the_running_average_with_a_rising_decay() -> None:
    model = nn.Linear(1, 1, bias=False)
    average = model.weight.item()
    ema = Ema(model, 0.8)
    for n, value in enumerate((1.0, 2.0, 3.0, 4.0)):
        nn.init.constant_(model.weight, value)
        ema.set_step(n)
        ema.update()
        rate = min(0.8, (1 + n) / (10 + n))
        average = rate * average + (1 - rate) * value
        assert ema.module.weight.item() == pytest.approx(average)


def test_mismatched_versions_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.check_versions()
    monkeypatch.setattr(runtime, "requires", lambda name: ["numpy", "torch==1.0.0"])
    with pytest.raises(UserError, match=r"torchvision .* needs torch 1.0.0, but torch .* is installed"):
        runtime.check_versions()


def test_bn_parameters_and_biases_do_not_decay() -> None:
    model = create("resnet8", 3)
    optimizer = make_optimizer(model, Optimizer(weight_decay=0.1, undecayed="norm-and-bias", momentum=0), 0.5)
    decayed = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert {name: decayed[id(p)] for name, p in model.named_parameters()} == {
        name: 0.0 if "bn" in name or name.endswith("bias") else 0.1 for name, p in model.named_parameters()
    }
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    for name, parameter in model.named_parameters():
        shrunk = before[name] * (1 if "bn" in name or name.endswith("bias") else 0.95)
        assert torch.allclose(parameter, shrunk, atol=1e-7), name
