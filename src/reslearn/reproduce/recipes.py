"""The recipes of the experiments: the paper's recipe, or a shortened version of it."""

from reslearn.reproduce.experiment import Dataset, Scale, Training

SMOKE = ("schedule.steps=2", "schedule.drops=[]", "batch.size=16", "batch.micro=null", "evaluate.every=1", "log.every=1")


def deviations(data: Dataset, scale: Scale, *small: str) -> tuple[str, ...]:
    """Deviations from the paper's protocol at a scale. small: those at small scale."""
    fp32 = "bf16 on processors that support it (the paper: fp32)"
    listed = {"paper": (fp32,), "small": small, "smoke": ("two iterations",)}[scale]
    return listed if data.cifar else (*listed, f"{data.source} instead of CIFAR-10")


def shortened(net: str, data: Dataset, scale: Scale, steps: int, *settings: str, start: str | None = None) -> Training:
    """The paper's CIFAR training; except at paper scale, reduced to `steps` with one learning rate drop after 4/5 of them."""
    if scale == "paper":
        return Training(net, "cifar10-paper", settings, start)
    shorter = (
        f"schedule.steps={steps}",
        f"schedule.drops=[{4 * steps // 5}]",
        "schedule.warmup_lr=null",
        "schedule.warmup_until=null",
        f"evaluate.every={max(1, steps // 10)}",
        f"log.every={max(1, steps // 40)}",
    )
    if not data.cifar:  # the same schedule and optimizer for other small images
        shorter = ("schedule.shape=steps", "schedule.warmup=0", "schedule.lr=0.1", "data.val=0.1", *shorter)
        shorter = ("optimizer.nesterov=false", "optimizer.weight_decay=1e-4", *shorter)
    recipe = "cifar10-paper" if data.cifar else "fashion"
    return Training(net, recipe, (*shorter, *settings, *(SMOKE if scale == "smoke" else ())), start)
