"""The recipes of the experiments: the paper's, or its rules over fewer steps."""

from reslearn.reproduce.experiment import Dataset, Scale, Training

SMOKE = ("schedule.steps=2", "schedule.drops=[]", "batch.size=16", "batch.micro=null", "evaluate.every=1", "log.every=1")


def deviations(data: Dataset, scale: Scale, *small: str) -> tuple[str, ...]:
    """What differs from the paper's protocol: `small` at small scale, and the data."""
    said = {"paper": ("bf16 where the processor has it (the paper: fp32)",), "small": small, "smoke": ("two iterations",)}[scale]
    return said if data.cifar else (*said, f"the data set is {data.source}, not CIFAR-10")


def shortened(net: str, data: Dataset, scale: Scale, steps: int, *settings: str, start: str | None = None) -> Training:
    """The paper's CIFAR training in so many steps: its lr, decay, crops and flips; the lr drops once, after 4/5 of them."""
    if scale == "paper":
        return Training(net, "cifar10-paper", settings, start)
    rules = (
        f"schedule.steps={steps}",
        f"schedule.drops=[{4 * steps // 5}]",
        "schedule.warmup_lr=null",
        "schedule.warmup_until=null",
        f"evaluate.every={max(1, steps // 10)}",
        f"log.every={max(1, steps // 40)}",
    )
    if not data.cifar:  # other small images, by the same rules
        rules = ("schedule.shape=steps", "schedule.warmup=0", "schedule.lr=0.1", "data.val=0.1", *rules)
        rules = ("optimizer.nesterov=false", "optimizer.weight_decay=1e-4", *rules)
    recipe = "cifar10-paper" if data.cifar else "fashion"
    return Training(net, recipe, (*rules, *settings, *(SMOKE if scale == "smoke" else ())), start)
