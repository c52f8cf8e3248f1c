"""Recipes of detectors: chosen from the data, the paper's, files and settings."""

from pathlib import Path

import pytest

import boxed
from reslearn import UserError
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.boxes.read import open_boxes
from reslearn.detect.recipes import DETECTION, NAMED, DetectRecipe
from reslearn.training.resolve import resolve


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, BoxSet]:
    return open_boxes(boxed.shapes(tmp_path_factory.mktemp("shapes")))


def made(splits: dict[str, BoxSet], *settings: str, recipe: str | Path | None = None, net: str | None = None) -> DetectRecipe:
    return resolve(splits, recipe, net, settings, family=DETECTION)[0]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kind", ["c4", "fpn"])
def test_every_named_recipe_is_valid(splits: dict[str, BoxSet], name: str, kind: str) -> None:
    recipe = made(splits, f"detector.kind={kind}", recipe=name)
    assert recipe.name == name and recipe.detector.kind == kind and recipe.detector.batch_norm == "live"


def test_the_papers_numbers(splits: dict[str, BoxSet]) -> None:
    coco, voc = (made(splits, recipe=name) for name in ("coco-paper", "voc-paper"))
    assert (coco.schedule.steps, coco.schedule.lr, coco.batch.size, coco.schedule.drops) == (320_000, 1e-3, 8, (0.75,))
    assert coco.detector.anchors == (64, 128, 256, 512) and voc.detector.anchors == (128, 256, 512)
    for recipe in (coco, voc):
        d = recipe.detector
        assert (d.min_size, d.max_size, d.ranked, d.proposals, d.foreground) == (600, 1000, (12000, 6000), (2000, 300), 0.25)
        assert (d.nms, recipe.net.name, recipe.optimizer.momentum) == (0.3, "resnet101", 0.9)
    assert (voc.optimizer.weight_decay, voc.data.train, voc.data.difficult) == (5e-4, "trainval", False)


@pytest.mark.parametrize(("net", "frozen"), [("vgg16", 2), ("vgg16-bn", 2), ("resnet50", 0)])
def test_the_papers_rules_for_anchors_background_and_vgg(splits: dict[str, BoxSet], net: str, frozen: int) -> None:
    for name, background in (("voc-paper", 0.1), ("voc-paper-4step", 0.1), ("coco-paper", None)):
        start = {"name": net, "init": "a/model"}
        d = resolve(splits, name, net, (), start=start, family=DETECTION)[0].detector
        assert (d.background, d.anchors_inside, d.frozen) == (background, True, frozen)
        assert made(splits, recipe=name, net=net).detector.frozen == 0, "new layers are all trained"
        assert resolve(splits, name, net, ["detector.frozen=0"], start=start, family=DETECTION)[0].detector.frozen == 0
    assert {"background", "anchors_inside"}.isdisjoint(made(splits).model_dump(exclude_none=True)["detector"])


def test_the_default_is_chosen_from_the_boxes(splits: dict[str, BoxSet]) -> None:
    recipe, chose = resolve(splits, None, None, (), family=DETECTION)
    d = recipe.detector
    assert d.min_size == 48, "no larger than the images"
    assert all(12 <= side <= 28 for side in d.anchors), "objects have 14 to 25 px"
    assert all(big >= small * 7 / 6 for small, big in zip(d.anchors, d.anchors[1:], strict=False))
    assert len(chose) >= 4 and "IoU >= 0.5" in " ".join(chose)


def test_anchors_are_chosen_for_the_size_that_is_asked_for(splits: dict[str, BoxSet]) -> None:
    usual, twice = made(splits).detector.anchors, made(splits, "detector.min_size=96").detector
    assert twice.anchors[-1] == pytest.approx(2 * usual[-1], abs=2) and twice.max_size >= 96


def test_files_and_settings(splits: dict[str, BoxSet], tmp_path: Path) -> None:
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
        (["detector.frozen=2"], "give it as well"),
        (["net.frozen=1"], "net.frozen"),
        (["optimizer.backbone_lr=0.1"], "of classification"),
        (["loss.label_smoothing=0.1"], "no key 'loss.label_smoothing'"),
        (["step=captured"], "step"),
        (["data.bad=maybe"], "data.bad"),
        (["detector.masks=true"], "have no masks"),
        (["batch.size=0"], "batch.size"),
        (["schedule.shape=plateau", "schedule.warmup=0", "data.val=0"], "plateau watches the AP of held-out images"),
    ],
)
def test_what_does_not_apply_is_said_in_one_line(splits: dict[str, BoxSet], settings: list[str], words: str) -> None:
    with pytest.raises(UserError) as error:
        made(splits, *settings)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_file_without_a_base_is_told_the_usual_one(splits: dict[str, BoxSet], tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("seed = 1\n")
    with pytest.raises(UserError, match='such as base = "detect-default"'):
        made(splits, recipe=file)


def test_a_trained_backbones_statistics_are_averaged_anew_where_it_has_any_and_they_are_frozen(tmp_path: Path) -> None:
    splits = open_boxes(boxed.shapes(tmp_path / "set"))

    def images(net: str, *settings: str, start: bool = True) -> int | None:
        begin = {"name": net, "init": "a/model"} if start else None
        return resolve(splits, "detect-default", net, settings, start=begin, family=DETECTION)[0].precise_bn

    assert images("resnet18") == images("vgg16-bn") == 64 and images("resnet18", "precise_bn=8") == 8
    assert images("vgg16") is None and images("resnet18", start=False) is None
    assert images("resnet18", "detector.batch_norm=live") is None


def test_a_pyramid_takes_an_anchor_a_level(splits: dict[str, BoxSet]) -> None:
    with pytest.raises(UserError, match=r"detector\.anchors: a pyramid on resnet18 has 5 levels, an anchor each, not 3"):
        made(splits, "detector.kind=fpn", "detector.anchors=[8,16,32]", net="resnet18")
    assert len(made(splits, "detector.kind=fpn", "detector.anchors=[8,16,32,64,128]", net="resnet18").detector.anchors) == 5


def test_images_of_which_nothing_would_be_left_are_refused(splits: dict[str, BoxSet], tmp_path: Path) -> None:
    thin = open_boxes(boxed.shapes(tmp_path / "set", images=2, size=(30, 2000)))
    with pytest.raises(UserError, match=r"train-0\.\w+: 2000 x 30 px: too elongated"):
        made(thin, "detector.min_size=16", "detector.max_size=32", "detector.anchors=[16]")
    assert made(thin, "detector.min_size=32", "detector.max_size=128", "detector.anchors=[16]")


def test_epochs_are_said_to_be_chosen_where_they_are(splits: dict[str, BoxSet]) -> None:
    def said(*settings: str) -> bool:
        return " epochs: 8 images" in " ".join(resolve(splits, None, None, settings, family=DETECTION)[1])

    assert said() and not said("schedule.steps=5") and not said("schedule.epochs=5")


@pytest.mark.parametrize(
    ("start", "line"),
    [(None, "lr 0.02: the backbone starts from nothing"), ({"name": "resnet18", "init": "m.safetensors"}, "lr 0.005: ")],
)
def test_the_lr_is_said_to_be_chosen_where_it_is(splits: dict[str, BoxSet], start: dict[str, str] | None, line: str) -> None:
    def said(*settings: str) -> list[str]:
        chose = resolve(splits, None, None, settings, start=start, family=DETECTION)[1]
        return [each for each in chose if each.startswith("lr ")]

    assert said()[0].startswith(line) and len(said()) == 1 and not said("schedule.lr=0.01")
