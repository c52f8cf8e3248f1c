"""One step against arithmetic written out: both kinds of SGD, micro-batches, weights of classes, what is refused."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from reslearn import UserError, create
from reslearn.training import runtime
from reslearn.training.ema import Ema
from reslearn.training.recipe import Loss, Optimizer
from reslearn.training.step import NonFinite, make_criterion, make_optimizer, set_lr, train_step

PLAIN = make_criterion(Loss(), torch.ones(3))


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x.flatten(1))


def batch(n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 1, 2, 2, generator=generator), torch.randint(0, 3, (n,), generator=generator)


@pytest.mark.parametrize("style", ["pytorch", "caffe"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_written_out(style: str, nesterov: bool) -> None:
    torch.manual_seed(0)
    model = Linear()
    recipe = Optimizer(momentum=0.9, weight_decay=0.01, nesterov=nesterov, style=style)
    optimizer = make_optimizer(model, recipe, 0.1)
    images, labels = batch()
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
        set_lr(optimizer, lr, style)
        result = train_step(model, images, labels, PLAIN, optimizer, nullcontext())
        assert result.loss.item() == pytest.approx(loss.item(), rel=1e-5)
        torch.testing.assert_close(model.fc.weight, w, rtol=0, atol=1e-6)


def test_micro_batches_give_the_whole_batchs_gradient() -> None:
    models = []
    for micro in (None, 2):
        torch.manual_seed(0)
        models.append(model := Linear())
        optimizer = make_optimizer(model, Optimizer(), 0.1)
        result = train_step(model, *batch(), PLAIN, optimizer, nullcontext(), micro)
        assert result.wrong == 6 and result.grad_norm > 0
    torch.testing.assert_close(models[0].fc.weight, models[1].fc.weight)


def test_batch_norm_sees_one_micro_batch_at_a_time() -> None:
    torch.manual_seed(0)
    net = create("resnet8", 3)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8) % 3
    train_step(net, images, labels, PLAIN, make_optimizer(net, Optimizer(), 0.1), nullcontext(), 4)
    assert net.bn1.num_batches_tracked == 2


def test_auto_weights_are_images_over_classes_times_count() -> None:
    criterion = make_criterion(Loss(class_weights="auto", label_smoothing=0.1), torch.tensor([60, 30, 10]))
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 0])
    weight = torch.tensor([100 / 180, 100 / 90, 100 / 30])
    assert criterion(logits, labels) == F.cross_entropy(logits, labels, weight, label_smoothing=0.1)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_never_reaches_the_weights(poison: float) -> None:
    model = Linear()
    before = model.fc.weight.detach().clone()
    images, labels = batch()
    images[3] = poison
    with pytest.raises(NonFinite, match="the loss is"):
        train_step(model, images, labels, PLAIN, make_optimizer(model, Optimizer(), 0.1), nullcontext())
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


def test_versions_that_do_not_match_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime.check_versions()
    monkeypatch.setattr(runtime, "requires", lambda name: ["numpy", "torch==1.0.0"])
    with pytest.raises(UserError, match=r"torch .* and torchvision .* do not match \(it needs torch 1.0.0\)"):
        runtime.check_versions()


def test_what_does_not_decay() -> None:
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
