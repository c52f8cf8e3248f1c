"""ImageNet or any folder of photos: the paper's training, the classic 90 epochs, and a fast recipe.

reslearn train IMAGENET --model resnet50 --recipe imagenet-classic
"""

from reslearn.data.sets import DataSet
from reslearn.errors import UserError
from reslearn.nets import spec
from reslearn.nets.options import applies
from reslearn.training.recipe import Chosen, Cited


def check_photos(data: DataSet | None, recipe: str) -> None:
    """Raise UserError for small images."""
    if data is not None and data.resident:
        height, width = data.sizes
        raise UserError(f"recipe {recipe} is for photos; '{data.name}' has images of {height}x{width} px: use --recipe default")


def imagenet_paper(data: DataSet | None, net: str | None) -> Chosen:
    """The paper's ImageNet training (DRL 3.4), with the source of each number.

    reslearn train IMAGENET --model resnet34 --recipe imagenet-paper

    Published 10-crop top-1 error: ResNet-34 A 25.03%, ResNet-50 22.85%, ResNet-101 21.75%, ResNet-152 21.43% (DRL Tables 2 and
    3). 600,000 iterations are 120 epochs of ImageNet. Not run here: it takes days on a GPU.

    Deviations: bf16 where the hardware supports it. A plateau, which the paper does not define, is five epochs without a lower
    validation error. BN statistics are computed over 32 images, as on eight GPUs.
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
        "precise_bn": Cited(200, "the paper computes the statistics after training; the number of batches is not stated"),
        "log": {"every": 100},
    }
    return Chosen(values, {})


def imagenet_classic(data: DataSet | None, net: str | None) -> Chosen:
    """90 epochs of random resized crops, as for torchvision's V1 weights and most other published weights.

    reslearn train IMAGENET --model resnet50-v1.5 --recipe imagenet-classic

    ResNet-50: 23.85% top-1 error, one crop (torchvision's V1 weights). 13 hours at the 2,470 images/s that NVIDIA's examples
    report for PyTorch on an A100. Not run here.
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
    """Short training with progressive resizing, a one-cycle schedule with a higher lr, label smoothing, a moving average of the
    weights, and no weight decay on BN and biases. Set schedule.epochs between 16 and 88; more epochs give a lower error.

    reslearn train IMAGENET --model resnet50-v1.5 --recipe imagenet-fast --set schedule.epochs=40

    FFCV reports 77.2% top-1 accuracy for ResNet-50 in 40 epochs and 78.4% in 88 with the same techniques (3,000 images/s on an
    A100: 40 epochs in 4.7 hours). This implementation has not been run on ImageNet.
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
            "crop_scale": Cited((0.35, 1.0), "larger crops suit short training"),
            "grow": Cited((128, 192), "smaller than in evaluation (Touvron et al., 2019)"),
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
