"""Recipes of detectors: the default, the paper's, files and settings."""

from pathlib import Path
from typing import Any

import pytest

import boxed
from reslearn import UserError
from reslearn.data.boxes.annotated import AnnotatedSet
from reslearn.data.preprocess import Preprocessing
from reslearn.detect.recipes import NAMED, DetectRecipe
from reslearn.detect.sources import open_set
from reslearn.training import resolve
from reslearn.weights.store import Card
from training_jobs import resolved


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> AnnotatedSet:
    return open_set(boxed.shapes(tmp_path_factory.mktemp("shapes")), "train", "fail")


def made(
    splits: AnnotatedSet, *settings: str, recipe: str | Path | None = None, net: str | None = None, init: str | None = None
) -> DetectRecipe:
    return chosen(splits, *settings, recipe=recipe, net=net, init=init)[0]


def chosen(splits: AnnotatedSet, *settings: str, recipe: str | Path | None = None, **options: str | None) -> tuple[Any, list[str]]:
    return resolved(splits, recipe, options.get("net"), settings, init=options.get("init"), task="detect")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fake initial models: a/NET is one of this network."""
    view = Preprocessing(channels=3, size=(32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)
    monkeypatch.setattr(resolve, "read_card", lambda path: Card(net=Path(path).name, classes=("a", "b"), preprocessing=view))


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", ["c4", "fpn"])
def test_every_named_recipe_is_valid(splits: AnnotatedSet, name: str, kind: str) -> None:
    recipe = made(splits, f"detector.kind={kind}", recipe=name)
    assert recipe.name == name and recipe.detector.kind == kind and recipe.detector.batch_norm == "live"


def test_the_papers_hyperparameters(splits: AnnotatedSet) -> None:
    coco, voc = (made(splits, recipe=name) for name in ("coco-paper", "voc-paper"))
    assert (coco.schedule.steps, coco.schedule.lr, coco.batch.size, coco.schedule.drops) == (320_000, 1e-3, 8, (0.75,))
    assert coco.detector.anchors == (64, 128, 256, 512) and voc.detector.anchors == (128, 256, 512)
    for recipe in (coco, voc):
        d = recipe.detector
        assert (d.min_size, d.max_size, d.ranked, d.proposals, d.foreground) == (600, 1000, (12000, 6000), (2000, 300), 0.25)
        assert (d.nms, recipe.net.name, recipe.optimizer.momentum) == (0.3, "resnet101", 0.9)
    assert (voc.optimizer.weight_decay, voc.data.train, voc.data.difficult) == (5e-4, "trainval", False)


@pytest.mark.usefixtures("start")
@pytest.mark.parametrize(("net", "frozen"), [("vgg16", 2), ("vgg16-bn", 2), ("resnet50", 0)])
def test_the_papers_rules_for_anchors_background_and_vgg(splits: AnnotatedSet, net: str, frozen: int) -> None:
    for name, background in (("voc-paper", 0.1), ("voc-paper-4step", 0.1), ("coco-paper", None)):
        d = made(splits, recipe=name, init=f"a/{net}").detector
        assert (d.background, d.anchors_inside, d.frozen) == (background, True, frozen)
        assert made(splits, recipe=name, net=net).detector.frozen == 0, "no layer of a new network is frozen"
        assert made(splits, "detector.frozen=0", recipe=name, init=f"a/{net}").detector.frozen == 0
    assert {"background", "anchors_inside"}.isdisjoint(made(splits).model_dump(exclude_none=True)["detector"])


def test_the_default_depends_on_the_boxes(splits: AnnotatedSet) -> None:
    recipe, chose = chosen(splits)
    d = recipe.detector
    assert d.min_size == 48, "not larger than the images"
    assert all(12 <= side <= 28 for side in d.anchors), "objects have 14 to 25 px"
    assert all(big >= small * 7 / 6 for small, big in zip(d.anchors, d.anchors[1:], strict=False))
    assert len(chose) >= 4 and "IoU >= 0.5" in " ".join(chose)


def test_anchors_are_fitted_to_the_given_size(splits: AnnotatedSet) -> None:
    usual, twice = made(splits).detector.anchors, made(splits, "detector.min_size=96").detector
    assert twice.anchors[-1] == pytest.approx(2 * usual[-1], abs=2) and twice.max_size >= 96


def test_files_and_settings(splits: AnnotatedSet, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('base = "detect-default"\n[net]\nname = "resnet50"\n[detector]\nkind = "fpn"\nmin_size = 96\n')
    recipe = made(splits, "detector.max_size=160", recipe=file)
    d = recipe.detector
    assert (recipe.name, recipe.net.name, d.kind, d.min_size, d.max_size, len(d.anchors)) == ("mine", "resnet50", "fpn", 96, 160, 5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["detector.min_sze=96"], "no key 'detector.min_sze'; did you mean 'detector.min_size'?"),
        (["min_sze=96"], "no key 'min_sze'; did you mean 'detector.min_size'?"),
        (["detector.lr=0.1"], "no key 'detector.lr'; did you mean 'schedule.lr'?"),
        (["detector.msk=true"], "did you mean 'detector.masks' or 'detector.nms'?"),
        (["detector.kind=c5"], "detector.kind='c5': must be one of"),
        (["detector.anchors=[0]"], "anchors and ratios must be above 0"),
        (["alternate=[1,1]"], "--set alternate=[1,1]: alternate: takes 4 values (not [1, 1])"),
        (["alternate=[]"], "alternate: takes 4 values (not [])"),
        (["detector.max_size=20"], "below min_size"),
        (["detector.frozen=2"], "set net.init"),
        (["net.frozen=1"], "net.frozen"),
        (["optimizer.backbone_lr=0.1"], "does not apply to detection"),
        (["loss.label_smoothing=0.1"], "no key 'loss.label_smoothing'"),
        (["execution=captured"], "execution"),
        (["data.bad=maybe"], "data.bad"),
        (["detector.masks=true"], "have no masks"),
        (["batch.size=0"], "batch.size"),
        (["schedule.shape=plateau", "schedule.warmup=0", "data.val=0"], "plateau needs a validation set"),
    ],
)
def test_invalid_settings_are_rejected(splits: AnnotatedSet, settings: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        made(splits, *settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_a_base_gets_a_suggestion(splits: AnnotatedSet, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("seed = 1\n")
    with pytest.raises(UserError, match='such as base = "detect-default"'):
        made(splits, recipe=file)


@pytest.mark.usefixtures("start")
def test_precise_bn_is_set_for_a_trained_backbone_with_frozen_bn(splits: AnnotatedSet) -> None:
    def images(net: str, *settings: str, start: bool = True) -> int | None:
        return made(splits, *settings, net=net, init=f"a/{net}" if start else None).precise_bn

    assert images("resnet18") == images("vgg16-bn") == 64 and images("resnet18", "precise_bn=8") == 8
    assert images("vgg16") is None and images("resnet18", start=False) is None
    assert images("resnet18", "detector.batch_norm=live") is None


def test_a_pyramid_needs_one_anchor_per_level(splits: AnnotatedSet) -> None:
    with pytest.raises(UserError, match=r"detector\.anchors: a pyramid on resnet18 needs 5, one per level, not 3"):
        made(splits, "detector.kind=fpn", "detector.anchors=[8,16,32]", net="resnet18")
    assert len(made(splits, "detector.kind=fpn", "detector.anchors=[8,16,32,64,128]", net="resnet18").detector.anchors) == 5


def test_elongated_images_are_rejected(splits: AnnotatedSet, tmp_path: Path) -> None:
    thin = open_set(boxed.shapes(tmp_path / "set", images=2, size=(30, 2000)), "train", "fail")
    with pytest.raises(UserError, match=r"train-0\.\w+: 2000 x 30 px: too elongated"):
        made(thin, "detector.min_size=16", "detector.max_size=32", "detector.anchors=[16]")
    assert made(thin, "detector.min_size=32", "detector.max_size=128", "detector.anchors=[16]")


def test_epochs_are_reported_if_they_are_chosen(splits: AnnotatedSet) -> None:
    def reported(*settings: str) -> bool:
        return " epochs: 8 images" in " ".join(chosen(splits, *settings)[1])

    assert reported() and not reported("schedule.steps=5") and not reported("schedule.epochs=5")


@pytest.mark.usefixtures("start")
@pytest.mark.parametrize(
    ("init", "line"),
    [(None, "lr 0.02: the backbone is trained from scratch"), ("a/resnet18", "lr 0.005: the backbone is pretrained")],
)
def test_the_lr_is_reported_if_it_is_chosen(splits: AnnotatedSet, init: str | None, line: str) -> None:
    def reported(*settings: str) -> list[str]:
        return [reason for reason in chosen(splits, *settings, init=init)[1] if reason.startswith("lr ")]

    assert reported()[0].startswith(line) and len(reported()) == 1 and not reported("schedule.lr=0.01")
