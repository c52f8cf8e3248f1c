"""The 10crop, dense and multiscale protocols against direct implementations with Pillow and torch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import functional as T

from drawing import draw_images
from reslearn import UserError, evaluate, save
from reslearn import data as datasets
from reslearn.data.preprocess import Preprocessing
from reslearn.evaluation import views
from reslearn.evaluation.protocols import PIXELS, many_views
from reslearn.evaluation.scores import load_scores
from reslearn.evaluation.views import SCALES, Pictures, of_one_size, protocol
from reslearn.weights import Card
from small_nets import network

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def preprocessing(side: int, **change: object) -> Preprocessing:
    return Preprocessing(**{"channels": 3, "size": (side, side), "crop_ratio": 0.875, "mean": MEAN, "std": STD, **change})  # type: ignore[arg-type]


@pytest.fixture(params=["drawn", "photos"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Classes of images of several sizes: drawn, and real photos if available."""
    if request.param == "drawn":
        for name, size in (("a", (90, 120)), ("b", (130, 75)), ("c", (66, 67))):
            draw_images(tmp_path / "drawn", name, each=2, size=size)
        return tmp_path / "drawn"
    samples = request.getfixturevalue("real_data") / "imagenet-sample"
    target = tmp_path / "photos"
    for i, wnid in enumerate(sorted(samples.iterdir())[::40]):
        (target / "abc"[i % 3]).mkdir(parents=True, exist_ok=True)
        (target / "abc"[i % 3] / f"{wnid.name}.jpg").symlink_to(next(wnid.iterdir()))
    return target


def resized(path: Path, shorter: int) -> Tensor:
    """A photo resized by its shorter side: float32 (3, H, W) on [0, 1]."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    scale = shorter / min(image.size)
    size = (max(shorter, round(image.width * scale)), max(shorter, round(image.height * scale)))
    return T.pil_to_tensor(image.resize(size, Image.Resampling.BILINEAR)).float() / 255


def normalized(image: Tensor) -> Tensor:
    return T.normalize(image, list(MEAN), list(STD))[None]


def slow_ten_crop(net: nn.Module, path: Path, side: int) -> Tensor:
    image = resized(path, round(side / 0.875))
    h, w = image.shape[1:]
    corners = [(0, 0), (0, w - side), (h - side, 0), (h - side, w - side), ((h - side) // 2, (w - side) // 2)]
    crops = [T.crop(image, top, left, side, side) for top, left in corners]
    return torch.stack([net(normalized(c))[0].softmax(0) for crop in crops for c in (crop, T.hflip(crop))]).mean(0)


def slow_map(net: nn.Module, image: Tensor, window: int) -> Tensor:
    """Mean softmax over the positions of a residual network's map, one position at a time."""
    features = nn.Sequential(*[*net.children()][:-2])(normalized(image))[0]
    scores = []
    for top in range(features.shape[1] - window + 1):
        for left in range(features.shape[2] - window + 1):
            pooled = features[:, top : top + window, left : left + window].mean((1, 2))
            scores.append((net.fc.weight @ pooled + net.fc.bias).softmax(0))  # type: ignore[operator, union-attr]
    return torch.stack(scores).mean(0)


def slow_multiscale(net: nn.Module, path: Path, scales: tuple[int, ...], window: int, mirror: bool = True) -> Tensor:
    images = [resized(path, scale) for scale in scales]
    both = [side for image in images for side in ([image, T.hflip(image)] if mirror else [image])]
    return torch.stack([slow_map(net, image, window) for image in both]).mean(0)


@torch.inference_mode()
def check(folder: Path, name: str, side: int, slow: Callable[[nn.Module, Path], Tensor], **options: object) -> None:
    net = network("resnet18", seed=3)
    with torch.no_grad():
        net.fc.weight.mul_(8)  # type: ignore[union-attr, operator]  # so that scores differ between views
    split = datasets.open(folder).splits["all"]
    view = preprocessing(side)
    predictions = many_views(net, Pictures(split, view), protocol(name, view, **options))  # type: ignore[arg-type]
    assert split.files is not None and torch.equal(predictions.indices, torch.arange(len(split)))
    expected = torch.stack([slow(net, path) for path in split.files])
    assert (predictions.logits.softmax(1) - expected).abs().max() < 1e-5
    single = torch.stack([net(view.normalizer()(view.fit(Pictures(split, view).image(i))[None]))[0] for i in range(len(split))])
    assert (single.softmax(1) - expected).abs().max() > 1e-3, "the protocol differs from a single view"


def test_10crop(folder: Path) -> None:
    check(folder, "10crop", 64, lambda net, path: slow_ten_crop(net, path, 64))


def test_multiscale(folder: Path) -> None:
    scales = (64, 73, 110, 137, 183)
    assert protocol("multiscale", preprocessing(64)).scales == scales, "the paper's, in proportion"
    check(folder, "multiscale", 64, lambda net, path: slow_multiscale(net, path, scales, 2))


def test_dense(folder: Path) -> None:
    check(folder, "dense", 64, lambda net, path: slow_multiscale(net, path, (73,), 2, mirror=False))
    check(folder, "dense", 64, lambda net, path: slow_multiscale(net, path, (100,), 2), scales=(100,), flip=True)


def test_at_the_papers_sizes(real_data: Path, tmp_path: Path) -> None:
    (tmp_path / "d" / "a").mkdir(parents=True)
    (tmp_path / "d" / "a" / "tench.jpg").symlink_to(real_data / "imagenet-sample" / "n01440764" / "tench.jpg")
    assert protocol("multiscale", preprocessing(224)).scales == SCALES
    check(tmp_path / "d", "10crop", 224, lambda net, path: slow_ten_crop(net, path, 224))
    check(tmp_path / "d", "multiscale", 224, lambda net, path: slow_multiscale(net, path, SCALES, 7))


def write_model(path: Path, side: int, net: str = "resnet18", seed: int = 3, **change: object) -> Path:
    model = network(net, seed=seed)
    return save(model, path, Card(net=net, classes=("a", "b", "c", "d"), preprocessing=preprocessing(side, **change)))


def test_dense_at_the_input_size_equals_center(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "square", "abc", each=4, size=(80, 80))
    model = write_model(tmp_path / "m.safetensors", 64, crop_ratio=1.0)
    for name in ("center", "dense"):
        evaluate(model, data, protocol=name, scores=tmp_path / f"{name}.npz")
    center, dense = (load_scores(tmp_path / f"{name}.npz") for name in ("center", "dense"))
    assert (center.protocol, dense.protocol) == ("center", "dense 64")
    torch.testing.assert_close(dense.scores, center.scores, rtol=1e-5, atol=1e-6)


def test_whole_images_use_the_mean_color_of_a_mean_image() -> None:
    mean = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    view = preprocessing(64, pixel_mean=Preprocessing.encode_pixel_mean(mean))
    pixels = torch.full((1, 3, 90, 70), 51, dtype=torch.uint8)
    expected = T.normalize(pixels.float() / 255, mean.mean((1, 2)).tolist(), list(STD))
    torch.testing.assert_close(views.normalizer(view, fully_convolutional=True)(pixels), expected)
    crop = views.normalizer(view, fully_convolutional=False)(pixels[:, :, :64, :64])
    torch.testing.assert_close(crop, (0.2 - mean) / torch.tensor(STD)[:, None, None].expand(1, -1, -1, -1))


def test_views_are_batched_by_size_in_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = np.zeros((2, 3, 1), np.uint8), np.ones((4, 5, 1), np.uint8)
    images = [(i, [small + i, large]) for i in range(7)]
    batches = [(indices.tolist(), tuple(pixels.shape)) for indices, pixels in of_one_size(images, 19)]
    assert [b for b in batches if b[1][1] == 2] == [([0, 1, 2], (3, 2, 3, 1)), ([3, 4, 5], (3, 2, 3, 1)), ([6], (1, 2, 3, 1))]
    assert [b for b in batches if b[1][1] == 4] == [([i], (1, 4, 5, 1)) for i in range(7)], "a batch has at least one view"
    monkeypatch.setattr(views, "MAX_WAITING", 40)
    count = 0

    def counted() -> object:
        nonlocal count
        for image in images:
            count += 1
            yield image

    first = next(of_one_size(counted(), PIXELS))  # type: ignore[arg-type]
    assert count == 2 and tuple(first[1].shape) == (2, 4, 5, 1), "52 pixels wait: the largest views go first"


def test_unreadable_and_elongated_images(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "d", "abc", each=2, size=(80, 90))
    model = write_model(tmp_path / "m.safetensors", 64)
    Image.fromarray(np.zeros((2, 5000, 3), np.uint8)).save(data / "a" / "long.png")
    with pytest.raises(UserError, match=r"a/long\.png: 5000 x 2 px is too elongated for scale 73"):
        evaluate(model, data, protocol="dense")
    (data / "b" / "1.png").write_bytes((data / "b" / "1.png").read_bytes()[:200])
    result = evaluate(model, data, protocol="multiscale", on_bad="skip", scores=tmp_path / "s.npz")
    assert sorted(result["unreadable"]) == ["a/long.png", "b/1.png"] and result["n"] == 5
    assert load_scores(tmp_path / "s.npz").names == ("a/0.png", "a/1.png", "b/0.png", "c/0.png", "c/1.png")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("10crops", {}, "no protocol '10crops'; did you mean '10crop'?"),
        ("center", {"scales": (64,)}, "scales do not apply to protocol center"),
        ("10crop", {"scales": (64,)}, "scales do not apply to protocol 10crop"),
        ("10crop", {"flip": True}, "protocol 10crop already flips each view"),
        ("multiscale", {"flip": True}, "protocol multiscale already flips each view"),
        ("multiscale", {"scales": (64, 80, 64)}, "scale 64 is given twice"),
        ("multiscale", {"scales": (80, 63)}, "scale 63: must be from 64 (the model's input) to 4096 px"),
        ("dense", {"scales": (64, 80)}, "protocol dense has one scale, not 2; use multiscale for several"),
        ("dense", {"scales": ()}, "protocol dense needs at least one scale"),
    ],
)
def test_invalid_options_are_rejected(name: str, options: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        protocol(name, preprocessing(64), **options)
    assert str(error.value).startswith(message)


def test_protocols_that_do_not_apply_to_small_images(tmp_path: Path) -> None:
    data = draw_images(tmp_path / "d", "abc", each=2, size=(32, 32))
    model = write_model(tmp_path / "m.safetensors", 32, "resnet8", crop_ratio=1.0)
    with pytest.raises(UserError, match=r"10crop does not apply: the model's input is the whole image, 32 x 32 px"):
        evaluate(model, data, protocol="10crop")
    for name in ("dense", "multiscale"):
        with pytest.raises(UserError, match=f"{name} does not apply to 'd': the model's input already covers its 32 x 32 px"):
            evaluate(model, data, protocol=name)
    larger = draw_images(tmp_path / "e", "abc", each=2, size=(48, 48))  # in memory, too, but larger than the input
    model = write_model(tmp_path / "n.safetensors", 32, "resnet8")
    assert evaluate(model, larger, protocol="dense", scales=[48])["protocol"] == "dense 48"
    assert evaluate(model, larger, protocol="10crop")["n"] == 6
