"""Recipes of classification: published values, values chosen from data, settings, files and errors."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from drawing import draw_images
from reslearn import UserError, train
from reslearn.classify.recipes import NAMED, ClassifyRecipe
from reslearn.data import DataSet, Split
from reslearn.data.preprocess import Preprocessing
from reslearn.training import resolve
from reslearn.training.recipe import change, flatten, keys
from reslearn.training.request import parse
from reslearn.training.schedule import lr
from reslearn.weights.store import Card
from training_jobs import resolved


def small(n: int = 60_000, size: int = 32, channels: int = 3, name: str = "cifar10", classes: int = 10) -> DataSet:
    """A set of black images without memory cost."""
    pixels = torch.zeros(1, dtype=torch.uint8).expand(n, channels, size, size)
    split = Split(np.arange(n) % classes, tuple(f"{i}" for i in range(n)), pixels)
    return DataSet(name, tuple(map(str, range(classes))), channels, {"train": split}, {}, (size, size))


def photos(n: int, sizes: tuple[int, int] = (375, 500), weights: tuple[int, ...] = (1, 1)) -> DataSet:
    labels = np.repeat(np.arange(len(weights)), np.array(weights) * n // sum(weights))
    split = Split(labels, tuple(map(str, labels)), None, tuple(Path(str(i)) for i in range(len(labels))))
    return DataSet("mine", tuple(f"c{i}" for i in range(len(weights))), 3, {"all": split}, {}, sizes)


def test_cifar10_paper_is_section_4_2() -> None:
    recipe, _ = resolved(small(), "cifar10-paper", "resnet56")
    assert (recipe.batch.size, recipe.batch.micro) == (128, 64)
    assert recipe.schedule.model_dump(exclude={"warmup_until", "lr_batch", "patience"}) == {
        "steps": 64_000,
        "epochs": None,
        "lr": 0.1,
        "shape": "steps",
        "drops": (32_000, 48_000),
        "warmup": 0,
        "warmup_lr": None,
    }
    assert (recipe.optimizer.momentum, recipe.optimizer.weight_decay, recipe.optimizer.nesterov) == (0.9, 1e-4, False)
    assert (recipe.data.val, recipe.data.pad, recipe.data.flip, recipe.data.normalize) == (5000, 4, True, "pixel-mean")
    assert recipe.loss.label_smoothing == 0 and recipe.ema is None and not recipe.net.zero_init_last_gamma
    deep, _ = resolved(small(), "cifar10-paper", "resnet110")
    assert (deep.schedule.warmup_lr, deep.schedule.warmup_until) == (0.01, 80)


@pytest.mark.parametrize(
    ("data", "net", "size", "batch", "epochs"),
    [
        (small(6000, 28, 1), "resnet20", None, 128, 33),
        (small(60_000), "resnet20", None, 128, 15),
        (photos(48), "resnet18", 128, 16, 60),
        (photos(5000), "resnet18", 128, 128, 40),
        (photos(300, (40, 44)), "resnet20", 32, 16, 60),
        (photos(300, (70, 64)), "resnet20", 64, 16, 60),
    ],
)
def test_the_default_recipe_depends_on_the_data(data: DataSet, net: str, size: int | None, batch: int, epochs: int) -> None:
    recipe, chose = resolved(data, "default")
    got = (recipe.net.name, recipe.data.size, recipe.batch.size, recipe.schedule.epochs)
    n = len(data.splits.get("train", data.splits.get("all")).labels)
    assert got == (net, size, batch, epochs)
    assert any(net in line for line in chose) and chose[-2:] == [f"batch {batch}: {n:,} images", f"{epochs} epochs: {n:,} images"]
    others = resolved(data, "default", settings=["data.size=64", "batch.size=8", "schedule.steps=9"] if size else ["batch.size=8"])[
        1
    ]
    assert not any(line.startswith(("batch", "image size")) for line in others), "what is asked for is not chosen"
    assert any(" epochs: " in line for line in others) == (size is None)


def test_imbalanced_classes_are_weighted() -> None:
    recipe, chose = resolved(photos(500, weights=(4, 1)))
    assert recipe.loss.class_weights == "auto" and any("100 to 400 images" in line for line in chose)
    assert resolved(photos(500))[0].loss.class_weights == "none"


def test_the_fashion_sets_use_their_own_recipe() -> None:
    assert resolved(small(600, 28, 1, name="fashion-sample"))[0].name == "fashion"
    assert resolved(small(600))[0].name == "default"


@pytest.mark.parametrize("name", ["fashion-mine", "elsewhere/fashion-sample"])
@pytest.mark.parametrize("size", [(70, 90), (16, 16)], ids=["photos", "small"])
def test_a_folder_named_like_a_fashion_set_uses_the_default(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    folder = draw_images(tmp_path / name, size=size)
    settings = {"schedule.steps": 2, **({"data.size": 32, "data.workers": 0} if size[0] > 16 else {})}
    run = train(folder, model="resnet8", settings=settings, out=tmp_path / "run", quiet=True)
    assert json.loads((run.folder / "recipe.json").read_text())["recipe"]["name"] == "default"
    assert run.result["last"]["test"]["n"] == 4


def test_every_named_recipe_survives_a_round_trip(tmp_path: Path) -> None:
    for name in NAMED:
        data, net = (photos(5000), "resnet18") if name.startswith("imagenet-") else (small(), "resnet20")
        recipe, _ = resolved(data, name, net, seed=3)
        path = tmp_path / f"{name}.json"
        path.write_text(recipe.model_dump_json())
        again, _ = resolved(data, path)
        assert again == recipe


def test_the_imagenet_recipes_have_the_published_values() -> None:
    paper, _ = resolved(photos(5000), "imagenet-paper")
    assert paper.data.jitter == (256, 480) and paper.data.size == 224 and paper.data.color == 0.1
    assert paper.data.normalize == "pixel-mean" and paper.precise_bn
    schedule = paper.schedule
    assert (schedule.steps, schedule.lr, schedule.shape, paper.batch.size) == (600_000, 0.1, "plateau", 256)
    assert (paper.optimizer.style, paper.optimizer.weight_decay, paper.optimizer.momentum) == ("caffe", 1e-4, 0.9)
    classic, _ = resolved(photos(1024), "imagenet-classic", settings=["batch.size=512"])
    rates = [lr(classic.schedule, step, 180, batch=512) for step in (0, 59, 60, 119, 120)]
    assert rates == pytest.approx([0.2, 0.2, 0.02, 0.02, 0.002]) and classic.data.crop_scale == (0.08, 1.0)
    fast, _ = resolved(photos(5000), "imagenet-fast")
    assert fast.net.zero_init_last_gamma and fast.optimizer.undecayed and fast.ema and fast.data.grow
    for name in ("imagenet-paper", "imagenet-classic", "imagenet-fast"):
        with pytest.raises(UserError, match=f"recipe {name} is for photos"):
            resolved(small(), name)


OTHER_VALUES = {  # key -> another value than that of `default`; what it needs besides
    "name": "mine",
    "seed": 5,
    "net.name": "resnet32",
    "net.shortcut": "B",
    "net.stride_in": "3x3 net.name=resnet50",
    "net.order": "full net.zero_init_last_gamma=null",
    "net.merge": "constant",
    "net.gate_bias": "-3.0 net.merge=shortcut-gate",
    "net.last_survival": 0.5,
    "net.per_sample": "true net.last_survival=0.5",
    "net.pool": "ceil net.name=resnet18",
    "net.zero_init_last_gamma": "false",
    "net.init": "m.safetensors",
    "net.frozen": "1 net.init=m.safetensors",
    "data.val": 0.2,
    "data.test": 0.3,
    "data.size": 64,
    "data.crop_ratio": 0.5,
    "data.normalize": "pixel-mean",
    "data.flip": "false",
    "data.pad": 3,
    "data.pad_with": "mean",
    "data.crop_scale": "[0.5,1.0]",
    "data.jitter": "[256,480]",
    "data.grow": "[8,16] data.crop_scale=[0.5,1.0]",
    "data.color": 0.1,
    "data.on_bad": "skip",
    "data.workers": 3,
    "data.cache": "off",
    "batch.size": 40,
    "batch.micro": 8,
    "batch.sync_bn": "true",
    "optimizer.momentum": 0.5,
    "optimizer.weight_decay": 0.5,
    "optimizer.nesterov": "false",
    "optimizer.style": "caffe",
    "optimizer.undecayed": "norm-and-bias",
    "optimizer.backbone_lr": "0.1 net.init=m.safetensors",
    "schedule.steps": 7,
    "schedule.epochs": 2.5,
    "schedule.lr": 0.3,
    "schedule.lr_batch": 64,
    "schedule.shape": "cosine",
    "schedule.patience": "3 schedule.shape=plateau",
    "schedule.drops": "[3,4] schedule.shape=steps",
    "schedule.warmup": 0.1,
    "schedule.warmup_lr": "0.01 schedule.warmup=0",
    "schedule.warmup_until": "70.0 schedule.warmup_lr=0.01 schedule.warmup=0",
    "loss.label_smoothing": 0.2,
    "loss.class_weights": "auto",
    "precise_bn": 3,
    "ema": 0.9,
    "precision": "fp32",
    "execution": "eager",
    "recompute": "true",
    "evaluate.flip": "true",
    "evaluate.every": 9,
    "checkpoint.every": 9,
    "log.every": 9,
    "log.tensorboard": "true",
}


@pytest.mark.parametrize("key", keys(ClassifyRecipe))
def test_setting_a_key_changes_only_that_key(key: str) -> None:
    before, _ = resolved(small(), "default")
    text, *more = f"{key}={OTHER_VALUES[key]}".split()
    after = flatten(change(before, parse("data", settings=[text, *more]).settings).model_dump(mode="json"))
    changed = {k: v for k, v in after.items() if v != flatten(before.model_dump(mode="json"))[k]}
    partner = {"schedule.steps": "schedule.epochs"}.get(key)
    assert set(changed) - {part.split("=")[0] for part in more} - {partner} == {key}
    assert json.dumps(changed[key]).strip('"') == text.partition("=")[2] or changed[key] == json.loads(text.partition("=")[2])


@pytest.mark.parametrize("how", ["--model", "--set", "file", "file and --set"])
def test_recipes_choose_values_for_the_requested_network(tmp_path: Path, how: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "cifar10-paper"\n[net]\nname = "resnet110"\n')
    recipe, _ = {
        "--model": lambda: resolved(small(), "cifar10-paper", "resnet110"),
        "--set": lambda: resolved(small(), "cifar10-paper", settings=["net.name=resnet110"]),
        "file": lambda: resolved(small(), path),
        "file and --set": lambda: resolved(small(), path, settings=["net.name=resnet1202"]),
    }[how]()
    assert recipe.schedule.warmup_lr == 0.01 and recipe.net.name == ("resnet1202" if "and" in how else "resnet110")
    plain, _ = resolved(small(), "default", settings=["net.name=plain20"])
    assert plain.net.zero_init_last_gamma is None


def test_init_keeps_the_other_net_keys_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = Preprocessing(channels=3, size=(32, 32), mean=(0.5,) * 3, std=(0.2,) * 3)
    monkeypatch.setattr(resolve, "read_card", lambda path: Card(net="resnet20", classes=("a", "b"), preprocessing=view))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "mine.toml"
    path.write_text('base = "default"\n[net]\nfrozen = 2\n')
    recipe, _ = resolved(small(), path, init="m.safetensors")
    assert recipe.net.frozen == 2 and recipe.net.init == str(tmp_path / "m.safetensors") and recipe.net.zero_init_last_gamma is None


def test_settings_change_values_and_steps_replace_epochs() -> None:
    recipe, _ = resolved(small(), "default", settings=["schedule.steps=1200", "data.flip=false", "optimizer.momentum=0.8"], seed=7)
    assert recipe.schedule.steps == 1200 and recipe.schedule.epochs is None
    assert not recipe.data.flip and recipe.optimizer.momentum == 0.8 and recipe.seed == 7
    assert resolved(small(), "cifar10-paper", settings=["schedule.epochs=2"])[0].schedule.steps is None
    with pytest.raises(UserError, match=r"^--set schedule\.epochs=2 and --set schedule\.steps=9: give only one of them"):
        resolved(small(), "cifar10-paper", settings=["schedule.epochs=2", "schedule.steps=9"])


def test_a_recipe_file_may_have_a_base(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('base = "cifar10-paper"\nseed = 4\n[schedule]\nepochs = 3\ndrops = []\n[net]\nname = "plain20"\n')
    recipe, _ = resolved(small(), path)
    assert (recipe.name, recipe.seed, recipe.net.name, recipe.batch.size) == ("mine", 4, "plain20", 128)
    assert (recipe.schedule.epochs, recipe.schedule.steps, recipe.schedule.drops) == (3, None, ())
    assert resolved(small(), path, "resnet32")[0].net.name == "resnet32"


SETTINGS = {
    "schedule.stepps=5": "no key 'schedule.stepps'; did you mean 'schedule.steps'?",
    "lr=0.1": "no key 'lr'; did you mean 'schedule.lr'?",
    "schedule.steps": "must have the form key=value",
    "schedule.steps=0": "schedule.steps: must be at least 1 (not 0)",
    "schedule.steps=many": "schedule.steps: must be an integer",
    "schedule.lr=nan": "schedule.lr",
    "schedule.lr=-1": "greater than 0",
    "schedule.shape=cosin": "did you mean 'cosine'",
    "schedule.drops=[5,3]": "drops must be increasing",
    "batch.micro=7": "size must be a multiple of micro",
    "batch.size=1": "must be at least 2",
    "data.val=1.5": "a fraction below 1 or a whole number",
    "data.val=-0.1": "must be at least 0",
    "data.crop_scale=[0.5,2]": "two fractions",
    "data.crop_scale=[0.5,1]": "data.crop_scale applies to photos",
    "data.cache=on": "data.cache applies to photos",
    "loss.label_smoothing=1": "less than 1",
    "loss.class_weights=atuo": "did you mean 'auto'",
    "net.name=resnt20": "no network called 'resnt20'; did you mean 'resnet20'",
    "net.name=resnet18": "",
    "net.shortcut=D": "net.shortcut",
    "net.stride_in=3x3": "stride_in does not apply",
    "precision=fp16": "precision: must be 'auto', 'fp32' or 'bf16'",
    "ema=1": "less than 1",
    "seed=-1": "seed",
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_invalid_setting_gives_a_one_line_error(setting: str) -> None:
    if not SETTINGS[setting]:
        assert resolved(small(), "default", settings=[setting])[0].net.name == "resnet18"
        return
    with pytest.raises(UserError) as caught:
        resolved(small(), "default", settings=[setting])
    assert SETTINGS[setting] in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is not valid json"),
        ("[1]", "does not contain a recipe"),
        ('{"bass": 1}', "no key 'bass'; did you mean 'base'?"),
        ('{"base": "cifar"}', "no base recipe 'cifar'; did you mean 'cifar10-"),
        ('{"base": "default", "sched": {}}', "no key 'sched'"),
        ('{"base": "default", "schedule": {"lrr": 1}}', "no key 'schedule.lrr'; did you mean 'schedule.lr'"),
    ],
)
def test_an_invalid_recipe_file_gives_a_one_line_error(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "recipe.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        resolved(small(), path)
    assert said.strip("'") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("setting", ["data.pad=4", "data.size=none", "data.pad_with=mean"])
def test_options_for_small_images_are_rejected_for_photos(setting: str) -> None:
    with pytest.raises(UserError):
        resolved(photos(100), settings=[setting])


@pytest.mark.parametrize(
    ("data", "settings", "line"),
    [
        (small(), ["data.jitter=[40,48]"], "data.jitter applies to photos"),
        (small(), ["data.color=0.1"], "data.color applies to photos"),
        (photos(100), ["data.jitter=[256,480]"], "give jitter or crop_scale, not both"),
        (photos(100), ["data.crop_scale=null", "data.jitter=[64,480]"], "jitter must be two sizes in px, size <= low"),
        (photos(100), ["data.crop_scale=null", "data.jitter=[256,480]", "data.cache=on"], "cache=on cannot be combined"),
        (photos(100), ["data.grow=[96,64]"], "grow must be two sizes in px"),
        (photos(100), ["data.grow=[64,96]", "data.normalize=pixel-mean"], "grow cannot be combined with normalize=pixel-mean"),
        (photos(100), ["schedule.patience=3"], "patience applies to shape 'plateau'"),
        (photos(100), ["schedule.shape=plateau", "data.val=0"], "schedule.shape=plateau needs a validation set"),
        (small(), ["schedule.shape=steps", "schedule.drops=[0.5,20]"], "drops must be increasing steps, or increasing fractions"),
        (small(), ["schedule.shape=steps", "schedule.drops=[2.5]"], "drops must be increasing steps, or increasing fractions"),
    ],
)
def test_inapplicable_and_conflicting_options_are_rejected(data: DataSet, settings: list[str], line: str) -> None:
    with pytest.raises(UserError, match=re.escape(line)):
        resolved(data, settings=settings)


def test_recipes_are_frozen() -> None:
    recipe, _ = resolved(small(), "default")
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]
    assert ClassifyRecipe.model_validate(recipe.model_dump()) == recipe
