"""What later papers changed: Identity Mappings (IM), Stochastic Depth (SD)."""

from reslearn.nets import spec
from reslearn.reproduce.experiment import SEEDS, Comparison, Dataset, Effect, Experiment, Plan, Scale, Training, minus, scales
from reslearn.reproduce.recipes import deviations, shortened

STEPS = 600  # at small scale

# IM Table 1: what is on the shortcut -> (settings, published error of ResNet-110; None where it failed)
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


def im_table1(data: Dataset, scale: Scale) -> Plan:
    """Anything on the shortcut hurts."""
    trainings = {label: shortened(_net(scale), data, scale, STEPS, *settings) for label, (settings, _) in SHORTCUTS.items()}
    return Plan(
        trainings=trainings,
        seeds=SEEDS[scale],
        rows=tuple(Comparison(f"{label}, test error", label, published) for label, (_, published) in SHORTCUTS.items()),
        effects=tuple(
            Effect(f"{label}: more training loss than the original", minus(label, "original"), "train_loss")
            for label in list(trainings)[1:]
        ),
        deviations=_deviations(data, scale),
    )


def im_table2(data: Dataset, scale: Scale) -> Plan:
    """Where BN and ReLU stand around the addition."""
    trainings = {label: shortened(_net(scale), data, scale, STEPS, *settings) for label, (settings, _) in ORDERS.items()}
    worse = ("BN after addition", "ReLU before addition")
    return Plan(
        trainings=trainings,
        seeds=SEEDS[scale],
        rows=tuple(Comparison(f"{label}, test error", label, published) for label, (_, published) in ORDERS.items()),
        effects=(
            *(Effect(f"{label}: more training loss than the original", minus(label, "original"), "train_loss") for label in worse),
            Effect(
                "Full pre-activation: less training loss than the original",
                minus("original", "full pre-activation"),
                "train_loss",
            ),
        ),
        deviations=_deviations(data, scale),
    )


def _published(net: str) -> float | None:
    """IM Table 3; it prints the mean of ResNet-110's runs, where DRL has the best."""
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
        effects=tuple(Effect(f"{net}: pre-activation has less training loss", minus(net, pre), "train_loss") for net, pre in pairs),
        deviations=_deviations(data, scale, "20 and 110 layers instead of 110, 164 and 1001"),
    )


def stochastic_depth(data: Dataset, scale: Scale) -> Plan:
    """Blocks left out by chance while training: faster, and in long training less test error."""
    alike = ("execution=eager",)  # faster steps take constant depth only: times would compare implementations
    if scale == "paper":
        settings = (
            "schedule.steps=175781",
            "schedule.drops=[87890,131836]",
            "optimizer.nesterov=true",
            "schedule.warmup_lr=null",
            "schedule.warmup_until=null",
            "optimizer.style=pytorch",
            *alike,
        )
        trainings = {
            "constant depth": Training("resnet110", "cifar10-paper", settings),
            "stochastic depth": Training("stochastic-resnet110", "cifar10-paper", settings),
        }
    else:
        trainings = {
            "constant depth": shortened("resnet56", data, scale, STEPS, *alike),
            "stochastic depth": shortened("resnet56", data, scale, STEPS, *alike, "net.last_survival=0.5"),
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
            Effect("Stochastic depth trains in less time", minus("constant depth", "stochastic depth"), "minutes"),
            Effect("It has less test error", minus("constant depth", "stochastic depth")),
            Effect("It has more training error, as it should", minus("stochastic depth", "constant depth"), "train_error"),
        ),
        deviations=_deviations(data, scale),
    )


EXPERIMENTS = (
    Experiment(
        "im-table1",
        "What is put on the shortcut gets in the way",
        "IM, Table 1",
        "The shortcut is scaled, gated, convolved or dropped, and the net trains worse each time, even where it could represent "
        "more: the clean path is what counts. A published value that is missing means that "
        "the paper's run failed (more than 20% error).",
        scales(im_table1),
    ),
    Experiment(
        "im-table2",
        "Where BN and ReLU stand around the addition",
        "IM, Table 2",
        "With BN and ReLU before the convolutions, nothing stands between the additions: the signal passes from any block to any "
        "other unchanged.",
        scales(im_table2),
    ),
    Experiment(
        "im-table3",
        "Pre-activation pays where nets are deep",
        "IM, Table 3",
        "The gain of pre-activation grows with depth; at 1001 layers it is what makes the net trainable well.",
        scales(im_table3),
    ),
    Experiment(
        "stochastic-depth",
        "Blocks left out by chance while training",
        "SD, Table 1",
        "In every step some blocks are skipped, the later ones more often. Training takes a quarter less time; in the paper's long "
        "schedule the test error falls from 6.41 to 5.25%.",
        scales(stochastic_depth),
    ),
)
