"""CIFAR-10: plain and residual networks by depth (DRL Figures 1 and 6, Table 6), and DRL's constructed solution."""

from itertools import pairwise

from reslearn.nets import spec
from reslearn.reproduce.experiment import (
    SEEDS,
    Comparison,
    Dataset,
    Effect,
    Experiment,
    Metric,
    Panel,
    Plan,
    Scale,
    Training,
    minus,
    scales,
)
from reslearn.reproduce.recipes import deviations, shortened

STEPS = 1000  # at small scale
SHORT = f"{STEPS:,} iterations instead of 64,000; the learning rate drops once, after {4 * STEPS // 5}"
RESIDUAL, PLAIN = (20, 32, 44, 56, 110, 1202), (20, 32, 44, 56)
PUBLISHED = {"resnet110": 6.61}  # the mean of the paper's five runs; 6.43 is the best of them
GAP = minus("plain56", "plain20")
_METRICS: tuple[tuple[Metric, str], ...] = (("train_error", "training error"), ("test_error", "test error"))


def nets_for(data: Dataset, scale: Scale, *names: str) -> dict[str, Training]:
    """Returns the trainings of networks by name; experiments share their runs."""
    memory = {"resnet1202": ("recompute=true",)} if scale == "paper" else {}
    return {name: shortened(name, data, scale, STEPS, *memory.get(name, ())) for name in names}


def _deviations(data: Dataset, scale: Scale) -> tuple[str, ...]:
    return deviations(data, scale, SHORT)


def figure1(data: Dataset, scale: Scale) -> Plan:
    """The degradation problem: training and test errors of plain networks and of the residual networks of the same depth."""
    nets = ("plain20", "plain56", "resnet20", "resnet56")
    deep = minus("plain56", "resnet56")
    return Plan(
        trainings=nets_for(data, scale, *nets),
        seeds=SEEDS[scale],
        rows=tuple(Comparison(f"{net}, {name}", net, metric=metric) for net in nets for metric, name in _METRICS),
        effects=(
            Effect("The deeper plain net has a higher training error than the shallower one", GAP, "train_error"),
            Effect("This gap is larger than that of the residual nets", GAP | {"resnet56": -1.0, "resnet20": 1.0}, "train_error"),
            Effect("With 56 layers, the residual net has a lower training error than the plain net", deep, "train_error"),
            Effect("With 56 layers, the residual net has a lower test error than the plain net", deep),
        ),
        panels=(Panel("plain", ("plain20", "plain56")), Panel("residual", ("resnet20", "resnet56"))),
        crossings=(("resnet56", "resnet20"), ("plain56", "plain20")),
        deviations=_deviations(data, scale),
    )


def figure6(data: Dataset, scale: Scale) -> Plan:
    """Learning curves by depth: plain networks get worse, residual networks get better."""
    if scale == "paper":
        plain, residual = tuple(f"plain{d}" for d in PLAIN), tuple(f"resnet{d}" for d in RESIDUAL)
    else:
        plain, residual = ("plain20", "plain56"), ("resnet20", "resnet56")
    deepest = "resnet110" if scale == "paper" else residual[-1]
    panels = [Panel("plain", plain), Panel("residual", residual[:5])]
    if scale == "paper":
        panels.append(Panel("110 and 1202 layers", ("resnet110", "resnet1202")))
    return Plan(
        trainings=nets_for(data, scale, *plain, *residual),
        seeds=SEEDS[scale],
        rows=tuple(Comparison(f"{net}, test error", net, spec(net).published.get("CIFAR-10")) for net in (*plain, *residual)),
        effects=(
            Effect("Plain: higher training error with more depth", GAP, "train_error"),
            Effect("Plain: higher test error with more depth", GAP),
            Effect("Residual: lower test error with more depth", minus("resnet20", deepest)),
        ),
        panels=tuple(panels),
        crossings=(("resnet56", "resnet20"),),
        deviations=_deviations(data, scale),
    )


def table6(data: Dataset, scale: Scale) -> Plan:
    """Test errors of residual networks by depth."""
    nets = tuple(f"resnet{d}" for d in RESIDUAL) if scale == "paper" else ("resnet20", "resnet56")
    published = {net: spec(net).published["CIFAR-10"] for net in nets} | PUBLISHED
    return Plan(
        trainings=nets_for(data, scale, *nets),
        seeds=SEEDS[scale],
        rows=tuple(Comparison(f"ResNet-{spec(net).depth}, test error", net, published[net]) for net in nets),
        effects=tuple(
            Effect(f"ResNet-{spec(deep).depth} has a lower test error than ResNet-{spec(shallow).depth}", minus(shallow, deep))
            for shallow, deep in pairwise(nets[:5])
        ),
        panels=(Panel("residual", nets[:5]),),
        deviations=_deviations(data, scale),
    )


def constructed(data: Dataset, scale: Scale) -> Plan:
    """Networks of 56 layers initialized from trained networks of 20 layers: does training preserve that solution?"""
    steps = 300
    trainings = nets_for(data, scale, "plain20", "resnet20", "plain56", "resnet56")
    for kind in ("plain", "resnet"):
        for label, net in ((f"{kind}20, longer", f"{kind}20"), (f"{kind}56, constructed", f"{kind}56")):
            trainings[label] = shortened(net, data, scale, steps, "schedule.lr=0.01", start=f"{kind}20")
    return Plan(
        trainings=trainings,
        seeds=SEEDS[scale],
        rows=tuple(Comparison(f"{label}, {name}", label, metric=metric) for label in trainings for metric, name in _METRICS),
        effects=(
            Effect(
                "Plain-56 initialized from a trained plain-20 has a lower training error than plain-56 from scratch",
                minus("plain56", "plain56, constructed"),
                "train_error",
            ),
            Effect(
                "ResNet-56 initialized from a trained ResNet-20 has a lower training error than ResNet-56 from scratch",
                minus("resnet56", "resnet56, constructed"),
                "train_error",
            ),
            Effect(
                "Plain-56 loses part of its initialization: its training error is higher than plain-20's, trained equally long",
                minus("plain56, constructed", "plain20, longer"),
                "train_error",
            ),
            Effect(
                "ResNet-56 uses its depth: its training error is lower than ResNet-20's, trained equally long",
                minus("resnet20, longer", "resnet56, constructed"),
                "train_error",
            ),
        ),
        panels=(
            Panel("plain, continued", ("plain20, longer", "plain56, constructed")),
            Panel("residual, continued", ("resnet20, longer", "resnet56, constructed")),
        ),
        deviations=(
            *_deviations(data, scale),
            f"then {'two' if scale == 'smoke' else steps} iterations at learning rate 0.01; the paper does not train this network",
        ),
    )


TRICKS = {
    "baseline": (),
    "no alternating flip": ("data.flip=true",),
    "no Nesterov momentum": ("optimizer.nesterov=false",),
    "weight decay of the paper": ("optimizer.weight_decay=1e-4",),
    "step schedule instead of one cycle": ("schedule.shape=steps", "schedule.warmup=0", "schedule.lr=0.1"),
    "no weight averaging": ("ema=null",),
    "no flip at test time": ("evaluate.flip=false",),
    "added label smoothing of 0.1": ("loss.label_smoothing=0.1",),
}


def fast_tricks(data: Dataset, scale: Scale) -> Plan:
    """cifar10-fast without each of its tricks in turn, and with label smoothing added."""
    steps = {"smoke": 2, "small": 1000, "paper": 12_800}[scale]
    base = (f"schedule.steps={steps}",)
    if not data.cifar:  # the recipe for other small images, plus these tricks
        base += ("data.flip=alternate", "ema=0.99", "evaluate.flip=true")

    def training(settings: tuple[str, ...]) -> Training:
        drops = (f"schedule.drops={sorted({steps // 2, 3 * steps // 4})}",) if "schedule.shape=steps" in settings else ()
        smoke = ("batch.size=16", "data.val=100") if scale == "smoke" else ()
        return Training("resnet20", "cifar10-fast" if data.cifar else "fashion", (*base, *settings, *drops, *smoke))

    trainings = {label: training(settings) for label, settings in TRICKS.items()}
    return Plan(
        trainings=trainings,
        seeds=1 if scale == "smoke" else 3,
        rows=tuple(Comparison(f"{label}, test error", label) for label in trainings),
        effects=tuple(Effect(f"{label}: higher test error", minus(label, "baseline")) for label in list(trainings)[1:]),
        deviations=() if scale == "paper" else deviations(data, scale, f"{steps:,} iterations instead of 12,800"),
    )


EXPERIMENTS = (
    Experiment(
        "figure1",
        "Degradation: a deeper plain network has a higher training error",
        "DRL, Figure 1",
        "Two plain networks of 20 and 56 layers. The deeper one could match the shallower one by leaving its other 36 layers idle. "
        "Instead, its error is higher even on the images it is trained on. This is not overfitting: the optimizer does not find "
        "the better solution. The residual networks of the same depth have the same layers, plus shortcuts.",
        scales(figure1),
    ),
    Experiment(
        "figure6",
        "CIFAR-10 by depth: plain networks get worse, residual networks get better",
        "DRL, Figure 6",
        "Dashed lines are training error, bold lines held-out error. More depth is worse on the left and better on the right. The "
        "error drops where the learning rate is divided by ten.",
        scales(figure6),
    ),
    Experiment(
        "table6",
        "CIFAR-10 test errors by depth",
        "DRL, Table 6",
        "The test error falls from 20 to 110 layers. At 1202 layers it rises again although the training error does not: that "
        "network is too large for 50,000 images.",
        scales(table6),
    ),
    Experiment(
        "constructed",
        "The constructed solution: a deep network initialized from a shallow one",
        "DRL, section 1",
        "Adding layers that do nothing to a trained shallow network gives a deeper network with the same error, as the paper "
        "argues. Here this network is built and trained further: does training preserve the solution?",
        scales(constructed, "smoke", "small"),
    ),
    Experiment(
        "fast-tricks",
        "What each trick of the recipe cifar10-fast is worth",
        "the recipe's sources",
        "The recipe without one of its tricks at a time: values above zero are the test error that the trick saves. The last line "
        "adds a trick that the recipe does not use: a value above zero means that it would hurt.",
        scales(fast_tricks),
    ),
)
