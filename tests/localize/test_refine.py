"""The second stage: inputs, examples and losses against direct computations; trained, evaluated, killed and resumed."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import roi_align

from command_line import RunCli, run_python, start_python
from pages import Page
from painted_sets import TINY, in_python, lines, train, write_set
from reslearn import UserError, resume
from reslearn.data.augment import Draws
from reslearn.data.boxes.box_set import BoxSet
from reslearn.data.boxes.read import open_boxes
from reslearn.data.preprocess import Preprocessing, cover
from reslearn.data.sampling import SampleOrder, view_seed
from reslearn.localize import net
from reslearn.localize.evaluate import evaluate
from reslearn.localize.net import CODER, CONTEXT, Localizer, LocalizerSettings, create_localizer, load_localizer, warp
from reslearn.localize.predict import propose
from reslearn.localize.predict import refine as refined
from reslearn.localize.regions import RegionExamples, as_pictures, region_losses, regions_of
from reslearn.localize.sources import LocalizeSource
from reslearn.training import runtime

SECOND: dict[str, Any] = {
    "localizer.proposals": 20,
    "batch.size": 8,
    "schedule.epochs": 10,
    "schedule.warmup": 0.1,
    "checkpoint.every": 4,
    "data.val": 0,
    "log.every": 1,
}
VIEW = Preprocessing(channels=3, size=(32, 32), mean=(0.4, 0.5, 0.6), std=(0.2,) * 3)


@pytest.fixture(scope="module")
def weak(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A localizer after short training."""
    return train(shapes, tmp_path_factory.mktemp("weak") / "run", {**TINY, "schedule.epochs": 5}).folder


@pytest.fixture(scope="module")
def both(weak: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(shapes, tmp_path_factory.mktemp("both") / "run", SECOND, "localize-regions", init=str(weak)).folder


@pytest.fixture(scope="module")
def fresh() -> Localizer:
    torch.manual_seed(0)
    settings = LocalizerSettings(anchors=((12, 12), (20, 14)), proposals=7)
    return create_localizer("resnet8", ("disc", "square"), settings, VIEW).eval()


@pytest.fixture(scope="module")
def few(shapes: Path) -> BoxSet:
    data = open_boxes(shapes)["test"]
    return BoxSet(data.name, data.classes, data.images[:4])


def test_a_region_includes_its_margin() -> None:
    image = torch.zeros(1, 60, 100)
    image[:, 20:40, 30:90] = 1
    whole = warp(image, torch.tensor([[30.0, 20, 90, 40]]), (227, 227))[0, 0]
    rows, columns = (whole > 0.5).nonzero().T
    assert [rows.min(), rows.max() + 1, columns.min(), columns.max() + 1] == pytest.approx([16, 211, 16, 211], abs=1)
    edge = warp(image + 5, torch.tensor([[60.0, 20, 100, 40]]), (227, 227))[0, 0]
    assert (edge[:, 218:] == 0).all() and (edge[:, :205] > 4).all(), "filled with the mean outside the image"


def test_warp_uses_the_kernel_under_best_effort_determinism(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where torchvision would use its compiled Python version."""
    seen = []

    def watched(*arguments: object, **more: object) -> torch.Tensor:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return roi_align(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(net, "roi_align", watched)
    with runtime.deterministic(torch.device("meta")):  # any device except a CPU
        warp(torch.zeros(1, 8, 8), torch.tensor([[1.0, 1, 5, 5]]), (4, 4))
    assert seen == [False] and not torch.are_deterministic_algorithms_enabled()


def test_proposals_are_the_highest_scored_boxes_of_their_class(fresh: Localizer, few: BoxSet) -> None:
    classes = np.array([[0, 1], [1, 0], [1, 1], [0, 0]])
    found = propose(fresh, few, classes, 9, (32, 45))
    assert found.shape == (4, 2, 9, 4) and found.dtype == np.float32
    for i, image in enumerate(few.images):
        every: list[list[tuple[float, list[float]]]] = [[], []]
        for scale in (32, 45):
            wide = round(scale * 52 / 40)
            view = torch.from_numpy(cover(image.pixels(), scale, scale).copy()).permute(2, 0, 1)[None]
            assert view.shape[2:] == (scale, wide)
            logits, deltas, anchors = fresh(VIEW.normalizer()(view))
            for k in range(2):
                boxes = CODER.decode_single(deltas[0, :, k], anchors)
                for score, box in zip(logits[0, :, k].tolist(), boxes.tolist(), strict=True):
                    cut = [min(max(v, 0), (wide, scale)[j % 2]) for j, v in enumerate(box)]
                    every[k].append((score, [v * (52 / wide, 40 / scale)[j % 2] for j, v in enumerate(cut)]))
        for c, k in enumerate(classes[i]):
            best = sorted(every[k], key=lambda pair: -pair[0])[:9]
            np.testing.assert_allclose(found[i, c], [box for _, box in best], atol=1e-3)
    many = propose(fresh, few, classes[:, :1], 999)
    assert (many[:, 0, -1] == many[:, 0, -2]).all() and len(np.unique(many[0, 0], axis=0)) > 40


def test_the_best_refined_proposal_is_kept(fresh: Localizer, few: BoxSet) -> None:
    classes = np.array([[0, 1], [1, 1], [1, 0], [0, 0]])
    proposals = propose(fresh, few, classes, 7)
    regions = fresh.regions
    assert regions is not None
    torch.nn.init.normal_(regions.deltas.weight, std=0.3)
    torch.nn.init.normal_(regions.scores.weight, std=0.3)
    scores, boxes = refined(fresh, few, classes, proposals)
    for i, image in enumerate(few.images):
        x = VIEW.normalizer()(torch.from_numpy(image.pixels().copy()).permute(2, 0, 1)[None])[0]
        for k in range(2):
            if k not in classes[i]:
                assert scores[i, k] == -np.inf and not boxes[i, k].any()
                continue
            every = []
            for given in proposals[i, [*classes[i]].index(k)].astype(float):
                logits, deltas = (each.detach() for each in regions(warp(x, torch.tensor(given[None]).float(), (32, 32))))
                x1, y1, x2, y2 = given
                dx, dy, dw, dh = (deltas[0, k].numpy() / [10, 10, 5, 5]).tolist()
                cx, cy, w, h = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1), x2 - x1, y2 - y1
                w, h = w * math.exp(dw), h * math.exp(dh)
                box = np.clip([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], 0, [52, 40, 52, 40])
                every.append((float(logits[0, k]), box))
            best = max(every, key=lambda pair: pair[0])
            assert scores[i, k] == pytest.approx(best[0], abs=1e-4)
            np.testing.assert_allclose(boxes[i, k], best[1], atol=1e-2)


def test_region_losses_match_scalar_computation() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, deltas = torch.randn(3, 2, generator=generator), torch.randn(3, 2, 4, generator=generator)
    targets, positive, labels = torch.randn(3, 4, generator=generator), [True, False, True], [1, 0, 0]
    scores = boxes = 0.0
    for r in range(3):
        for k in range(2):
            sigmoid = 1 / (1 + math.exp(-float(logits[r, k])))
            scores -= math.log(sigmoid if positive[r] and k == labels[r] else 1 - sigmoid)
        if positive[r]:
            for have, want in zip(deltas[r, labels[r]].tolist(), targets[r].tolist(), strict=True):
                d = abs(have - want)
                boxes += d - 0.5 if d >= 1 else d * d / 2
    found = region_losses(logits, deltas, torch.tensor(labels), torch.tensor(positive), targets)
    assert [found["scores"].item(), found["boxes"].item()] == pytest.approx([scores / 3, boxes / 3], rel=1e-5)


def examples(source: LocalizeSource, proposals: np.ndarray, step: int, size: int = 64) -> RegionExamples:
    """The examples of a step of a run with seed 0."""
    return regions_of(source, proposals, VIEW, Draws(view_seed(0), *SampleOrder(0, len(source), size)[step]))


def test_training_regions_and_targets(shapes: Path) -> None:
    """Half of the regions are positive, and their targets match the object's color, mirrored or not."""
    sources = [LocalizeSource(open_boxes(shapes)["train"]) for _ in range(2)]
    single = sources[0].single
    near = np.stack([boxes[0] + [-3, 2, 2, 3] for boxes in single.boxes])  # around the object
    far = np.stack([boxes[0] * 0 + [0, 0, 6, 6] for boxes in single.boxes])
    proposals = np.stack([far, near, far], 1).astype(np.float32)
    first, second = (vars(examples(source, proposals, 3)) for source in sources)
    assert all(torch.equal(first[name], second[name]) for name in first)
    views, labels, positive, targets = first.values()
    assert 20 < positive.sum() < 44
    side = 32 * (1 - 2 * CONTEXT)
    own = torch.tensor([[32 * CONTEXT, 32 * CONTEXT, 32 * CONTEXT + side, 32 * CONTEXT + side]])
    colors = VIEW.normalizer().invert(views).float()
    mirrored = 0
    for view, label, good, target in zip(colors, labels, positive, targets, strict=True):
        if not good:
            continue
        dx, dy, dw, dh = (target / torch.tensor([10.0, 10, 5, 5])).tolist()
        center, size = own[0, :2] + side / 2 + torch.tensor([dx, dy]) * side, side * torch.exp(torch.tensor([dw, dh]))
        x1, y1, x2, y2 = torch.cat([center - size / 2, center + size / 2]).tolist()
        assert painted(view, label) == pytest.approx([max(x1, 0), max(y1, 0), min(x2, 32), min(y2, 32)], abs=2.1)
        mirrored += dx > 0
    assert 5 < mirrored < positive.sum() - 5


def painted(view: torch.Tensor, label: torch.Tensor) -> list[float]:
    """x1, y1, x2, y2 of the pixels with the class's color in (3, H, W)."""
    rows, columns = (view[{0: 0, 1: 2}[int(label)]] - view[1] > 70).nonzero().T
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]  # type: ignore[list-item]


def test_the_sheet_of_examples_has_the_right_boxes(shapes: Path) -> None:
    source = LocalizeSource(open_boxes(shapes)["train"])
    boxes = source.single.boxes
    proposals = np.stack([np.stack([own[0] * 0 + [0, 0, 6, 6], own[0] + [-3, 2, 2, 3]]) for own in boxes]).astype(np.float32)
    seen = examples(source, proposals, 0, 24)
    drawn, labels, positive = list(as_pictures(seen, VIEW)), seen.labels, seen.positive
    assert len(drawn) == 24 and [len(true) for _, true, _ in drawn] == positive.int().tolist()
    edge = 32 * CONTEXT
    assert 5 < positive.sum() < 19
    for (view, true, given), label in zip(drawn, labels, strict=True):
        assert given[0].tolist() == pytest.approx([edge, edge, 32 - edge, 32 - edge])
        if len(true):
            own = painted(torch.from_numpy(view.copy()).permute(2, 0, 1).float(), label)
            assert own == pytest.approx(true[0].clip(0, 32).tolist(), abs=2.1)


def test_the_second_stage_improves_on_the_first(weak: Path, both: Path, shapes: Path) -> None:
    result = json.loads((both / "result.json").read_text())["last"]["test"]
    first, second = (result[view]["true_class"]["error"] for view in ("dense", "refined"))
    assert first >= 20 and second <= first - 10, (first, second)
    alone = evaluate(weak, shapes)
    assert "refined" not in alone and alone["dense"] == result["dense"], "the first stage is unchanged"
    assert evaluate(both, shapes, device="cpu")["refined"] == result["refined"]
    model = load_localizer(both)
    assert model.regions is not None and model.card.metrics["test"]["refined"] == second
    torch.manual_seed(0)
    for layer in (model.regions.scores, model.regions.deltas):
        torch.nn.init.normal_(layer.weight, std=0.01)
    assert evaluate(model, shapes)["refined"]["true_class"]["error"] > second + 10


def test_killed_and_resumed_without_the_first_run(both: Path, weak: Path, shapes: Path, tmp_path: Path) -> None:
    first, out = tmp_path / "first", tmp_path / "killed"
    shutil.copytree(weak, first)
    child = start_python("-c", in_python(shapes, out, SECOND, "localize-regions", init=str(first)))
    until = time.monotonic() + 240
    while not (out / "checkpoints" / "step-00000008").exists() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.002)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate(timeout=60)
    assert (out / "checkpoints").exists() and not (out / "model.safetensors").exists()
    shutil.rmtree(first)
    proposals = (out / "proposals.npy").read_bytes()
    np.save(out / "proposals.npy", np.load(out / "proposals.npy") + 1)
    with pytest.raises(UserError, match=r"proposals\.npy is damaged"):
        resume(out, device="cpu", quiet=True)
    (out / "proposals.npy").write_bytes(proposals)
    resume(out, device="cpu", quiet=True)
    ours, theirs = (load_localizer(folder).state_dict() for folder in (out, both))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert lines(out) == lines(both) and load_localizer(out).card.options == load_localizer(both).card.options


KILLED_WHILE_SAVING = """
import os, signal
from reslearn.localize import regions
def killed(path, text):
    os.kill(os.getpid(), signal.SIGKILL)
regions.write_text = killed
"""


def test_a_run_killed_while_saving_proposals_computes_them_again(weak: Path, shapes: Path, tmp_path: Path) -> None:
    out, short = tmp_path / "killed", {**SECOND, "schedule.epochs": 0.5}
    child = run_python("-c", KILLED_WHILE_SAVING + in_python(shapes, out, short, "localize-regions", init=str(weak)))
    assert child.code == -signal.SIGKILL and (out / "proposals.npy").exists() and not (out / "proposals.npy.sha256").exists()
    (out / "proposals.npy").write_bytes(b"half of i")
    assert resume(out, device="cpu", quiet=True).result["step"] == 4


def test_training_the_second_stage_by_command(
    weak: Path, both: Path, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run_cli: RunCli
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = ["localizer.proposals=5", "schedule.epochs=0.5", "batch.size=8", "schedule.lr=0.01", "data.val=0"]
    options = [word for setting in settings for word in ("--set", setting)]
    words = ["train", shapes, "--recipe", "localize-regions", "--init", weak, "--out", "o", "--seed", 3, "--device", "cpu"]
    code, said, _ = run_cli("localize", *words, *options)
    assert code == 0
    assert "test localization error, true class given, R-CNN" in said and "model    o/model.safetensors" in said
    code, out, _ = run_cli("localize", "eval", "o", shapes, "--device", "cpu")
    assert code == 0 and "R-CNN" in out.splitlines()[1]
    page = Page(Path("o/report.html"))
    assert "The second stage (R-CNN) of a localizer on resnet8" in page.text and "dense, then R-CNN" in page.text
    assert "the first stage, which proposes regions, is " in page.text and page.count("img") > 3
    others = write_set(tmp_path / "others", {"train": 2})
    file = others / "train" / "_annotations.coco.json"
    file.write_text(file.read_text().replace('"disc"', '"ring"'))
    refine = ["--recipe", "localize-regions", "--init"]
    for given, line in (
        ([*refine, weak, "--out", "n"], "DATA is missing"),
        ([shapes, *refine, both, "--out", "n"], "already has a second stage"),
        ([others, *refine, weak, "--out", "n"], "has the classes disc, square, but others has ring, square"),
        ([shapes, *refine, weak, "--out", "n", "--set", "localizer.proposals=0"], "proposals: must be at least 1"),
        ([shapes, *refine, weak, "--out", "o"], "already contains a run"),
        (["--resume", "o", "--set", "schedule.lr=1"], "--set cannot be combined with --resume"),
    ):
        code, out, err = run_cli("localize", "train", *given)
        assert line in err and code == 2, err
    assert not (tmp_path / "n").exists()
    # A run's recipe can be reused, also for another localizer.
    words = ["train", shapes, "--recipe", "o/recipe.json", "--init", weak, "--out", "again", "--device", "cpu"]
    code, _, err = run_cli("localize", *words)
    assert code == 0, err
    ours, theirs = (load_localizer(folder).state_dict() for folder in ("again", "o"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
