"""CIFAR-10: plain and residual networks by depth (DRL Figures 1 and 6, Table 6), and the constructed solution."""

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
SHORT = f"{STEPS:,} iterations instead of 64,000; the lr drops once, after {4 * STEPS // 5}"
RESIDUAL, PLAIN = (20, 32, 44, 56, 110, 1202), (20, 32, 44, 56)
PUBLISHED = {"resnet110": 6.61}  # the mean of the paper's five runs; 6.43 is the best of them
GAP = minus("plain56", "plain20")


def nets_for(data: Dataset, scale: Scale, *names: str) -> dict[str, Training]:
    """The trainings of networks, a label each: those of Figure 1, so that experiments share them."""
    return {name: shortened(name, data, scale, STEPS, *_memory(name, scale)) for name in names}


def _memory(name: str, scale: Scale) -> tuple[str, ...]:
    return ("recompute=true",) if name == "resnet1202" and scale == "paper" else ()


def _deviations(data: Dataset, scale: Scale) -> tuple[str, ...]:
    return deviations(data, scale, SHORT)


def figure1(data: Dataset, scale: Scale) -> Plan:
    """The degradation: training and test error of plain nets, with their residual twins beside them."""
    pair = ("plain20", "plain56", "resnet20", "resnet56")
    return Plan(
        trainings=nets_for(data, scale, *pair),
        seeds=SEEDS[scale],
        rows=tuple(Comparison(f"{net}, {what}", net, metric=m) for net in pair for m, what in _METRICS),
        effects=(
            Effect("The deeper plain net's training error is above the shallower one's", GAP, "train_error"),
            Effect(
                "That gap is larger than the residual twins' own",
                GAP | {"resnet56": -1.0, "resnet20": 1.0},
                "train_error",
            ),
            Effect(
                "At 56 layers the residual net's training error is below the plain one's",
                minus("plain56", "resnet56"),
                "train_error",
            ),
            Effect("At 56 layers the residual net's test error is below the plain one's", minus("plain56", "resnet56")),
        ),
        panels=(Panel("plain", ("plain20", "plain56")), Panel("residual", ("resnet20", "resnet56"))),
        crossings=(("resnet56", "resnet20"), ("plain56", "plain20")),
        deviations=_deviations(data, scale),
    )


_METRICS: tuple[tuple[Metric, str], ...] = (("train_error", "training error"), ("test_error", "test error"))


def figure6(data: Dataset, scale: Scale) -> Plan:
    """Curves by depth: plain nets get worse, residual nets better."""
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
            Effect("Plain: more depth, more training error", GAP, "train_error"),
            Effect("Plain: more depth, more test error", GAP),
            Effect("Residual: more depth, less test error", minus("resnet20", deepest)),
        ),
        panels=tuple(panels),
        crossings=(("resnet56", "resnet20"),),
        deviations=_deviations(data, scale),
    )


def table6(data: Dataset, scale: Scale) -> Plan:
    """Test errors of residual nets by depth."""
    nets = tuple(f"resnet{d}" for d in RESIDUAL) if scale == "paper" else ("resnet20", "resnet56")
    published = {net: spec(net).published["CIFAR-10"] for net in nets} | PUBLISHED
    return Plan(
        trainings=nets_for(data, scale, *nets),
        seeds=SEEDS[scale],
        rows=tuple(Comparison(f"ResNet-{spec(net).depth}, test error", net, published[net]) for net in nets),
        effects=tuple(
            Effect(f"ResNet-{spec(deep).depth} errs less than ResNet-{spec(shallow).depth}", minus(shallow, deep))
            for shallow, deep in pairwise(nets[:5])
        ),
        panels=(Panel("residual", nets[:5]),),
        deviations=_deviations(data, scale),
    )


def constructed(data: Dataset, scale: Scale) -> Plan:
    """Nets of 56 layers that begin as trained nets of 20: does training keep what it was given?"""
    more = 300
    on = ("schedule.lr=0.01",)
    trainings = nets_for(data, scale, "plain20", "resnet20", "plain56", "resnet56")
    for kind in ("plain", "resnet"):
        trainings[f"{kind}20, longer"] = shortened(f"{kind}20", data, scale, more, *on, start=f"{kind}20")
        trainings[f"{kind}56, constructed"] = shortened(f"{kind}56", data, scale, more, *on, start=f"{kind}20")
    rows = []
    for label in trainings:
        rows += [Comparison(f"{label}, {what}", label, metric=m) for m, what in _METRICS]
    better = "begins as a trained plain-20: less training error than plain-56 from scratch"
    return Plan(
        trainings=trainings,
        seeds=SEEDS[scale],
        rows=tuple(rows),
        effects=(
            Effect(f"Plain-56 that {better}", minus("plain56", "plain56, constructed"), "train_error"),
            Effect(
                "ResNet-56 that begins as a trained ResNet-20: less training error than ResNet-56 from scratch",
                minus("resnet56", "resnet56, constructed"),
                "train_error",
            ),
            Effect(
                "Plain-56 loses something of what it was given: more training error than plain-20 trained as long",
                minus("plain56, constructed", "plain20, longer"),
                "train_error",
            ),
            Effect(
                "ResNet-56 makes use of its depth: less training error than ResNet-20 trained as long",
                minus("resnet20, longer", "resnet56, constructed"),
                "train_error",
            ),
        ),
        panels=(
            Panel("plain, trained on", ("plain20, longer", "plain56, constructed")),
            Panel("residual, trained on", ("resnet20, longer", "resnet56, constructed")),
        ),
        deviations=(
            *_deviations(data, scale),
            f"then {'two' if scale == 'smoke' else more} iterations at lr 0.01; the paper describes the net, and does not train it",
        ),
    )


TRICKS = {
    "as it is": (),
    "no alternating flip": ("data.flip=true",),
    "no Nesterov": ("optimizer.nesterov=false",),
    "weight decay of the paper": ("optimizer.weight_decay=1e-4",),
    "steps instead of one cycle": ("schedule.shape=steps", "schedule.warmup=0", "schedule.lr=0.1"),
    "no weight average": ("ema=null",),
    "single view in tests": ("evaluate.flip=false",),
    "with label smoothing 0.1": ("loss.label_smoothing=0.1",),
}


def fast_tricks(data: Dataset, scale: Scale) -> Plan:
    """cifar10-fast with each of its tricks left out in turn (and label smoothing put in)."""
    steps = {"smoke": 2, "small": 1000, "paper": 12_800}[scale]
    base = (f"schedule.steps={steps}",)
    if not data.cifar:  # the recipe for other small images, with these tricks
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
        effects=tuple(Effect(f"{label}: errs more", minus(label, "as it is")) for label in list(trainings)[1:]),
        deviations=() if scale == "paper" else deviations(data, scale, f"{steps:,} iterations instead of 12,800"),
    )


EXPERIMENTS = (
    Experiment(
        "figure1",
        "The degradation: a deeper plain net has more training error",
        "DRL, Figure 1",
        "Two plain nets, 20 and 56 layers deep. The deeper one could do whatever the shallower one does, by leaving the other 36 "
        "layers idle. It ends up with more error even on the images that it is trained on, so this is no overfitting: the "
        "optimizer does not find the better net. The residual twins of both have the same layers, and shortcuts.",
        scales(figure1),
    ),
    Experiment(
        "figure6",
        "CIFAR-10 by depth: plain nets get worse, residual nets get better",
        "DRL, Figure 6",
        "Dashed lines are training error, bold lines the error on held-out images. On the left more depth is worse, on the right "
        "it is better. The steps down are where the learning rate is divided by ten.",
        scales(figure6),
    ),
    Experiment(
        "table6",
        "CIFAR-10 test errors by depth",
        "DRL, Table 6",
        "The error falls from 20 to 110 layers. At 1202 layers it rises again, though the training error does not: that net is "
        "too large for 50,000 images.",
        scales(table6),
    ),
    Experiment(
        "constructed",
        "The constructed solution: a deep net that begins as a shallow one",
        "DRL, section 1",
        "The paper argues with a deeper net made of a trained shallower one and layers that do nothing: it errs no more. "
        "Here it is built, and trained on: does training keep what it was given?",
        scales(constructed, "smoke", "small"),
    ),
    Experiment(
        "fast-tricks",
        "What each trick of the recipe cifar10-fast is worth",
        "the recipe's own sources",
        "The recipe with one of its tricks left out at a time: above zero is what the trick earns in test error. The last line "
        "puts in one that it does not have: above zero it would harm.",
        scales(fast_tricks),
    ),
)
