"""Follow-up papers: Identity Mappings (IM) and Stochastic Depth (SD)."""

from collections.abc import Mapping

from reslearn.nets import spec
from reslearn.reproduce.experiment import SEEDS, Comparison, Dataset, Effect, Experiment, Plan, Scale, Training, minus, scales
from reslearn.reproduce.recipes import deviations, shortened

STEPS = 600  # at small scale

# IM Table 1: operation on the shortcut -> (settings, published error of ResNet-110; None: it failed to converge)
SHORTCUTS: dict[str, tuple[tuple[str, ...], float | None]] = {
    "original": ((), 6.61),
    "constant scaling": (("net.merge=constant",), 12.35),
    "exclusive gating, bias -6": (("net.merge=exclusive-gate", "net.gate_bias=-6"), 8.70),
    "shortcut-only gating, bias 0": (("net.merge=shortcut-gate", "net.gate_bias=0"), 12.86),
    "shortcut-only gating, bias -6": (("net.merge=shortcut-gate", "net.gate_bias=-6"), 6.91),
    "1x1 convolution": (("net.shortcut=C",), 12.22),
    "dropout": (("net.merge=dropout",), None),
}
# IM Table 2: order of BN, ReLU and addition -> (settings, published error of ResNet-110)
ORDERS: dict[str, tuple[tuple[str, ...], float]] = {
    "original": ((), 6.61),
    "BN after addition": (("net.order=bn-after-addition",), 8.17),
    "ReLU before addition": (("net.order=relu-before-addition",), 7.84),
    "ReLU-only pre-activation": (("net.order=relu-only",), 6.71),
    "full pre-activation": (("net.order=full",), 6.37),
}


def _net(scale: Scale) -> str:
    return "resnet110" if scale == "paper" else "resnet56"


def _deviations(data: Dataset, scale: Scale, layers: str = "56 layers instead of 110") -> tuple[str, ...]:
    return deviations(data, scale, f"{STEPS} iterations instead of 64,000", layers)


def _variants(
    data: Dataset, scale: Scale, variants: Mapping[str, tuple[tuple[str, ...], float | None]], effects: tuple[Effect, ...]
) -> Plan:
    """A plan that trains every variant of the network."""
    return Plan(
        trainings={label: shortened(_net(scale), data, scale, STEPS, *settings) for label, (settings, _) in variants.items()},
        seeds=SEEDS[scale],
        rows=tuple(Comparison(f"{label}, test error", label, published) for label, (_, published) in variants.items()),
        effects=effects,
        deviations=_deviations(data, scale),
    )


def _worse(label: str) -> Effect:
    return Effect(f"{label}: higher training loss than the original", minus(label, "original"), "train_loss")


def im_table1(data: Dataset, scale: Scale) -> Plan:
    """Operations on the shortcut."""
    return _variants(data, scale, SHORTCUTS, tuple(_worse(label) for label in SHORTCUTS if label != "original"))


def im_table2(data: Dataset, scale: Scale) -> Plan:
    """The positions of BN and ReLU around the addition."""
    better = minus("original", "full pre-activation")
    effects = (
        _worse("BN after addition"),
        _worse("ReLU before addition"),
        Effect("Full pre-activation: lower training loss than the original", better, "train_loss"),
    )
    return _variants(data, scale, ORDERS, effects)


def _published(net: str) -> float | None:
    """IM Table 3. For ResNet-110 it has the mean of the runs; DRL has the best run."""
    return 6.61 if net == "resnet110" else spec(net).published.get("CIFAR-10")


def im_table3(data: Dataset, scale: Scale) -> Plan:
    """Pre-activation by depth."""
    if scale == "paper":
        pairs = [(f"resnet{d}", f"preact-resnet{d}") for d in (110, 164, 1001)]
        trainings = {net: shortened(net, data, scale, STEPS) for pair in pairs for net in pair}
    else:
        pairs = [(f"resnet{d}", f"resnet{d}, pre-activation") for d in (20, 110)]
        trainings = {}
        for net, pre in pairs:
            trainings |= {net: shortened(net, data, scale, STEPS), pre: shortened(net, data, scale, STEPS, "net.order=full")}
    return Plan(
        trainings=trainings,
        seeds=SEEDS[scale],
        rows=tuple(Comparison(f"{n}, test error", n, _published(n) if scale == "paper" else None) for n in trainings),
        effects=tuple(Effect(f"{n}: lower training loss with pre-activation", minus(n, pre), "train_loss") for n, pre in pairs),
        deviations=_deviations(data, scale, "20 and 110 layers instead of 110, 164 and 1001"),
    )


def stochastic_depth(data: Dataset, scale: Scale) -> Plan:
    """Blocks dropped at random during training: faster and, with long training, a lower test error."""
    eager = ("execution=eager",)  # the only execution mode that supports both, which makes the times comparable
    if scale == "paper":
        settings = (
            "schedule.steps=175781",
            "schedule.drops=[87890,131836]",
            "optimizer.nesterov=true",
            "schedule.warmup_lr=null",
            "schedule.warmup_until=null",
            "optimizer.style=pytorch",
            *eager,
        )
        trainings = {
            "constant depth": Training("resnet110", "cifar10-paper", settings),
            "stochastic depth": Training("stochastic-resnet110", "cifar10-paper", settings),
        }
    else:
        trainings = {
            "constant depth": shortened("resnet56", data, scale, STEPS, *eager),
            "stochastic depth": shortened("resnet56", data, scale, STEPS, *eager, "net.last_survival=0.5"),
        }
    published = {"constant depth": 6.41, "stochastic depth": 5.25}
    return Plan(
        trainings=trainings,
        seeds=SEEDS[scale],
        rows=(
            *(Comparison(f"{label}, test error", label, published[label]) for label in trainings),
            *(Comparison(f"{label}, minutes", label, metric="minutes") for label in trainings),
        ),
        effects=(
            Effect("Stochastic depth trains faster", minus("constant depth", "stochastic depth"), "minutes"),
            Effect("Stochastic depth has a lower test error", minus("constant depth", "stochastic depth")),
            Effect("Stochastic depth has a higher training error", minus("stochastic depth", "constant depth"), "train_error"),
        ),
        deviations=_deviations(data, scale),
    )


EXPERIMENTS = (
    Experiment(
        "im-table1",
        "Operations on the shortcut hurt training",
        "IM, Table 1",
        "The shortcut is scaled, gated, convolved or dropped out. Each time the network trains worse, even if it could represent "
        "more: a clean path matters most. A missing published value means that the paper's run failed (more than 20% error).",
        scales(im_table1),
    ),
    Experiment(
        "im-table2",
        "Positions of BN and ReLU around the addition",
        "IM, Table 2",
        "With BN and ReLU before the convolutions, the path through the additions is an identity: the signal passes from any block "
        "to any other unchanged.",
        scales(im_table2),
    ),
    Experiment(
        "im-table3",
        "Pre-activation helps deep networks",
        "IM, Table 3",
        "The gain from pre-activation grows with depth. At 1001 layers, the network trains well only with pre-activation.",
        scales(im_table3),
    ),
    Experiment(
        "stochastic-depth",
        "Stochastic depth: blocks dropped at random during training",
        "SD, Table 1",
        "Each step skips some blocks, later blocks more often. Training takes a quarter less time; with the paper's long schedule, "
        "the test error falls from 6.41% to 5.25%.",
        scales(stochastic_depth),
    ),
)
