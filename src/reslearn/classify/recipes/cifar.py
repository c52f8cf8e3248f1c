"""The paper's CIFAR-10 training (DRL section 4.2).

reslearn train cifar10 --model resnet20 --recipe cifar10-paper
"""

from reslearn.data.sets import DataSet
from reslearn.errors import UserError
from reslearn.training.recipe import Chosen, Cited


def check_cifar(data: DataSet | None, recipe: str) -> None:
    """Raise UserError for data unlike CIFAR."""
    if data is not None and (data.sizes != (32, 32) or not data.resident or data.channels != 3):
        height, width = data.sizes
        raise UserError(
            f"recipe {recipe} is for 32x32 color images; '{data.name}' has {data.channels}-channel images of "
            f"about {height}x{width} px: use --recipe default"
        )


def cifar10_paper(data: DataSet | None, net: str | None) -> Chosen:
    """The paper's CIFAR-10 training (DRL 4.2), with the source of each number.

    Deviations: bf16 where the hardware supports it (paper: fp32). Padding is zero after mean subtraction (not stated in the paper).
    5,000 training images stay held out to the end (data.val=0 trains on all 50,000). The training error that ends the warm-up is
    measured over the last 100 iterations.
    """
    check_cifar(data, "cifar10-paper")
    net = net or "resnet20"
    deep = net in ("resnet110", "resnet1202")
    values = {
        "name": "cifar10-paper",
        "net": {"name": net},
        "data": {
            "val": Cited(5000, '"a 45k/5k train/val split"'),
            "normalize": Cited("pixel-mean", '"the per-pixel mean subtracted"'),
            "flip": True,
            "pad": Cited(4, '"4 pixels are padded on each side, and a 32x32 crop is randomly sampled"'),
            "pad_with": "mean",
        },
        "batch": {
            "size": Cited(128, '"a mini-batch size of 128 on two GPUs"'),
            "micro": Cited(64, "each GPU normalized its own images"),
        },
        "optimizer": {
            "momentum": Cited(0.9, '"a weight decay of 0.0001 and momentum of 0.9"'),
            "weight_decay": 1e-4,
            "style": Cited("caffe", "the authors trained with Caffe"),
        },
        "schedule": {
            "steps": Cited(64_000, '"terminate training at 64k iterations"'),
            "lr": Cited(0.1, '"a learning rate of 0.1"'),
            "shape": "steps",
            "drops": Cited((32_000, 48_000), '"divide it by 10 at 32k and 48k iterations"'),
            "warmup_lr": Cited(0.01, 'ResNet-110: "0.01 to warm up the training until the training error is below 80%"')
            if deep
            else None,
            "warmup_until": 80 if deep else None,
        },
        "log": {"every": 100},
    }
    return Chosen(values, {})
