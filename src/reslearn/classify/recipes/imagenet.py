"""ImageNet, or any folder of photos: the paper's training, the classic one of ninety epochs, and a fast one.

reslearn train IMAGENET --model resnet50 --recipe imagenet-classic
"""

from reslearn.data.sets import DataSet
from reslearn.errors import UserError
from reslearn.nets import spec
from reslearn.nets.options import applies
from reslearn.training.recipe import Chosen, Cited


def check_photos(data: DataSet | None, recipe: str) -> None:
    """Raise UserError for small images of one size, which stay in memory."""
    if data is not None and data.resident:
        height, width = data.sizes
        raise UserError(f"recipe {recipe} is for photos; '{data.name}' has images of {height}x{width} px: use --recipe default")


def imagenet_paper(data: DataSet | None, net: str | None) -> Chosen:
    """DRL 3.4, with the numbers' sources beside them.

    reslearn train IMAGENET --model resnet34 --recipe imagenet-paper

    The paper's own nets under it, 10-crop top-1 error: ResNet-34 A 25.03, ResNet-50 22.85, 101 21.75, 152 21.43 (DRL Tables 2
    and 3); 600,000 iterations are 120 epochs of ImageNet. Not run here: that takes days on a GPU.

    Deviations: bf16 where the device has it; what a plateau is the paper does not say: five epochs without a lower error on
    held-out images; 32 images share BN's statistics, as on eight GPUs.
    """
    check_photos(data, "imagenet-paper")
    values = {
        "name": "imagenet-paper",
        "net": {"name": net or "resnet34"},
        "data": {
            "size": Cited(224, '"a 224x224 crop is randomly sampled from an image or its horizontal flip"'),
            "crop_ratio": 0.875,
            "jitter": Cited((256, 480), '"its shorter side randomly sampled in [256, 480]"'),
            "normalize": Cited("pixel-mean", '"with the per-pixel mean subtracted"'),
            "color": Cited(0.1 if data is None or data.channels == 3 else None, '"the standard color augmentation in [21]"'),
            "flip": True,
            "workers": 2,
        },
        "batch": {"size": Cited(256, '"a mini-batch size of 256"'), "micro": Cited(32, "as on eight GPUs")},
        "optimizer": {"momentum": 0.9, "weight_decay": 1e-4, "style": Cited("caffe", "the authors trained with Caffe")},
        "schedule": {
            "steps": Cited(600_000, '"trained for up to 60x10^4 iterations"'),
            "lr": 0.1,
            "shape": Cited("plateau", '"divided by 10 when the error plateaus"'),
        },
        "precise_bn": Cited(200, "the paper says only that statistics are computed after training"),
        "log": {"every": 100},
    }
    return Chosen(values, {})


def imagenet_classic(data: DataSet | None, net: str | None) -> Chosen:
    """Ninety epochs of random resized crops, as most published weights were trained (torchvision's V1 weights among them).

    reslearn train IMAGENET --model resnet50-v1.5 --recipe imagenet-classic

    ResNet-50 with it: 23.85% top-1 error, one crop (torchvision's V1 weights). At the 2,470 images/s that NVIDIA's examples
    report for PyTorch on an A100, 13 hours. Not run here.
    """
    check_photos(data, "imagenet-classic")
    values = {
        "name": "imagenet-classic",
        "net": {"name": net or "resnet50-v1.5"},
        "data": {"size": 224, "crop_ratio": 0.875, "crop_scale": (0.08, 1.0), "flip": True, "workers": 2},
        "batch": {"size": 256},
        "optimizer": {"momentum": 0.9, "weight_decay": 1e-4},
        "schedule": {"epochs": 90, "lr": 0.1, "lr_batch": 256, "shape": "steps", "drops": (1 / 3, 2 / 3)},
        "log": {"every": 100},
    }
    return Chosen(values, {})


def imagenet_fast(data: DataSet | None, net: str | None) -> Chosen:
    """Accuracy by the hour: views that grow, one cycle of a higher lr, label smoothing, an average of the weights, no decay of BN
    and biases. `--set schedule.epochs=` takes 16 to 88; more is better.

    reslearn train IMAGENET --model resnet50-v1.5 --recipe imagenet-fast --set schedule.epochs=40

    The same means took ResNet-50 to 77.2% top-1 in 40 epochs and 78.4% in 88 elsewhere (FFCV, 3,000 images/s on an A100: 40
    epochs in 4.7 hours); that code is not this one, and this one has not been run on ImageNet.
    """
    check_photos(data, "imagenet-fast")
    net = net or "resnet50-v1.5"
    values = {
        "name": "imagenet-fast",
        "net": {
            "name": net,
            "zero_init_last_gamma": Cited(applies(spec(net), "zero_init_last_gamma") or None, "Goyal et al., 2017"),
        },
        "data": {
            "size": 224,
            "crop_ratio": 0.875,
            "crop_scale": Cited((0.35, 1.0), "short trainings want easier crops"),
            "grow": Cited((128, 192), "smaller than at test (Touvron et al., 2019)"),
            "flip": True,
            "workers": 2,
        },
        "batch": {"size": 256},
        "optimizer": {"momentum": 0.9, "weight_decay": 5e-5, "nesterov": True, "undecayed": "norm-and-bias"},
        "schedule": {"epochs": 16, "lr": 0.5, "lr_batch": 256, "shape": "one-cycle", "warmup": 0.125},
        "loss": {"label_smoothing": 0.1},
        "ema": 0.999,
        "log": {"every": 100},
    }
    return Chosen(values, {})
