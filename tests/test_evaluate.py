"""`cli.py eval` against the scores' definition in plain numpy, on its own data set and on another one."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import interpolate

from pipeline.config import load
from pipeline.learning.checkpoint import Checkpoint, load_student, save_student
from pipeline.learning.inference import squashed
from pipeline.learning.scoring import worst_and_best
from pipeline.looking.confusion import confused_pairs, confusion_picture, row_shares
from pipeline.looking.gallery import scores_of
from pipeline.models.student import build_student
from pipeline.models.teacher import Teacher
from pipeline.ops import metrics
from pipeline.ops.labels import IGNORE, from_file
from pipeline.running.table import config_fingerprint
from tests.conftest import ROOT, is_one_line_error

CHANNELS, SIDE = 128, 64  # of the demo's teacher; of the student's input
# What the student was trained on: bee is unseen.
TRAINED = ("grass", "zebra", "bee", "leopard")


def by_definition(truths, guesses, num_classes, seen, unseen):
    """Pixel accuracy, each class's IoU, S, U and their harmonic mean in percent, straight from their words."""
    right = total = 0
    for truth, guess in zip(truths, guesses, strict=True):
        right += int(((truth == guess) & (truth != IGNORE)).sum())
        total += int((truth != IGNORE).sum())
    ious = []
    for c in range(num_classes):
        both = either = 0
        for truth, guess in zip(truths, guesses, strict=True):
            is_known = truth != IGNORE
            both += int(((truth == c) & (guess == c)).sum())
            either += int((((truth == c) | (guess == c)) & is_known).sum())
        ious.append(both / either if either else math.nan)
    means = []
    for group in (seen, unseen):
        there = [ious[c] for c in group if not math.isnan(ious[c])]
        means.append(sum(there) / len(there) if there else math.nan)
    s, u = means
    harmonic = (2 * s * u / (s + u) if s + u else 0.0) if not math.isnan(s + u) else math.nan
    accuracy = right / total if total else math.nan
    return [100 * v for v in (accuracy, s, u, harmonic)], [100 * v for v in ious]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_swept_scores_are_the_definitions(seed):
    """Images of different sizes, some without a label; classes that are nowhere, or only in the prediction."""
    rng = np.random.default_rng(seed)
    num, gammas = int(rng.integers(2, 9)), (0.0, 0.5, 2.0)
    unseen = sorted(rng.permutation(num)[: rng.integers(0, num)].tolist())
    seen = [c for c in range(num) if c not in unseen]
    swept = metrics.SweptConfusion(num, gammas, IGNORE)
    truths, guesses = [], {gamma: [] for gamma in gammas}
    for _ in range(int(rng.integers(1, 5))):
        size = rng.integers(1, 9, 2)
        truth = rng.choice([*range(max(1, num - 2)), IGNORE], size).astype(np.int16)
        if rng.random() < 0.3:
            truth[:] = IGNORE
        best_seen, best_unseen = (rng.choice(ids or [0], size) for ids in (seen, unseen))
        needed = rng.integers(-2, 6, size) / 2 if unseen else np.full(size, np.inf)
        swept.update(*(torch.from_numpy(np.asarray(a)) for a in (truth, best_seen, best_unseen, needed)))
        truths.append(truth)
        for gamma in gammas:  # gamma is added to the unseen class's logit; a tie stays with the seen one
            guesses[gamma].append(np.where(needed < gamma, best_unseen, best_seen))
    for gamma in gammas:
        found = metrics.summary(swept.matrix(gamma), seen, unseen)
        wanted, ious = by_definition(truths, guesses[gamma], num, seen, unseen)
        assert [found[k] for k in ("pAcc", "mIoU_S", "mIoU_U", "hIoU")] == pytest.approx(wanted, nan_ok=True)
        assert list(found["per_class"].values()) == pytest.approx(ious, nan_ok=True)


def test_an_images_own_score_by_hand():
    # Class 0 has 4 pixels, 2 of them right, and is said nowhere else: 2 / 4. Class 1 has one, right, and is said once
    # more: 1 / 2. Class 4 is only said: 0. The pixel without a label counts nowhere.
    truth, guess = np.array([[0, 0, 0], [1, IGNORE, 0]]), np.array([[0, 0, 4], [1, 1, 1]])
    assert metrics.image_iou(truth, guess, 5, IGNORE) == pytest.approx((1 / 2 + 1 / 2 + 0) / 3)
    assert math.isnan(metrics.image_iou(np.full((2, 2), IGNORE), np.zeros((2, 2), int), 5, IGNORE))
    rng = np.random.default_rng(3)
    truth, guess = (rng.choice([0, 1, 3, IGNORE], (9, 7)).astype(np.int16), rng.integers(0, 5, (9, 7)))
    ours, theirs = metrics.image_iou(truth, guess, 5, IGNORE), scores_of(guess.astype(np.int16), truth, 5)
    assert 100 * ours == pytest.approx(theirs[1])


def test_class_accuracy_by_hand():
    accuracy = metrics.class_accuracy(np.array([[3, 1, 0], [2, 2, 0], [0, 0, 0]]))
    assert accuracy.tolist()[:2] == [0.75, 0.5]
    assert math.isnan(accuracy[2])


def test_worst_and_best_share_no_image():
    assert worst_and_best([0.5, math.nan, 0.1, 0.9, 0.3], 2) == ([2, 4], [3, 0])
    assert worst_and_best([0.5, 0.1, 0.9], 6) == ([1, 0], [2])
    assert worst_and_best([], 6) == ([], [])


def test_confusion_pictures_show_what_is_confused(tmp_path):
    # Row 1 has most: 5 of its 8 pixels go to class 0; then 2 of 3 of class 2 go to class 1.
    matrix = np.array([[9, 1, 0], [5, 3, 0], [0, 2, 1]])
    assert confused_pairs(matrix, 9) == [(1, 0), (2, 1), (0, 1)]
    assert row_shares(matrix.astype(float))[1].tolist() == [5 / 8, 3 / 8, 0]
    assert row_shares(np.zeros((2, 2))).tolist() == [[0, 0], [0, 0]]
    for num in (1, 3, 60):  # a matrix with numbers, then bars
        names = [f"class {i}" for i in range(num)]
        counts = np.random.default_rng(0).integers(0, 99, (num, num))
        confusion_picture(counts, names, names[:1], tmp_path / f"{num}.png", "a run")
        with Image.open(tmp_path / f"{num}.png") as picture:
            assert picture.width > 200
    confusion_picture(np.zeros((60, 60)), names, [], tmp_path / "nothing.png", "nothing was labelled")


def data_folder(folder, classes, unseen, seed, sizes=((64, 96), (50, 40), (64, 64))):
    """Images of several sizes; the last mask is all 255, and the last class is in no mask."""
    rng = np.random.default_rng(seed)
    for part in ("train", "test"):
        (folder / part).mkdir(parents=True)
        for i, size in enumerate(sizes):
            blocks = rng.integers(0, len(classes) - 1, (2, 3))
            labels = blocks.repeat(size[0] // 2, 0).repeat(size[1] // 3 + 1, 1)[:, : size[1]].astype(np.uint8)
            labels[:3] = 255
            if i == len(sizes) - 1:
                labels[:] = 255
            pixels = (labels[..., None] * 70 + rng.integers(0, 50, (*labels.shape, 3))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{i}.png")
            Image.fromarray(labels).save(folder / part / f"{i}_ids.png")
    parts = {p: {"images": f"{p}/?.png", "masks": f"{p}/*_ids.png", "mask_suffix": "_ids"} for p in ("train", "test")}
    (folder / "dataset.yaml").write_text(json.dumps({"classes": classes, "unseen": unseen, **parts}))


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """A run whose student nobody trained: what eval reads of a finished training, and its config's path."""
    monkeypatch.chdir(ROOT)
    data_folder(tmp_path / "meadow", TRAINED, ["bee"], seed=0)
    path = tmp_path / "meadow.yaml"
    path.write_text(
        f"name: meadow\nruns: {tmp_path}/runs\ndata: {{kind: folder, root: {tmp_path}/meadow}}\n"
        f"teacher: {{model: 'local-dir:config/demo_teacher', pretrained: null, image_size: {SIDE}}}\n"
        "text: {templates: ['a photo of a {}.']}\n"
        "student: {arch: FPN, encoder: tu-resnet10t, encoder_weights: null}\n"
        "eval: {batch: 2, pictures: 1, gamma: 0.01, gamma_sweep: [0, 0.01, 9]}\n"
    )
    config = load(path)
    torch.manual_seed(0)
    student = build_student(config.student, CHANNELS)
    student.eval()
    image = np.array(Image.open(tmp_path / "meadow" / "test" / "0.png"))
    with torch.inference_mode():
        dense = student(squashed(image, SIDE)[None])[0].flatten(1).T  # (positions, C)
    # Directions in which its features differ, their mean taken out, so that several classes are predicted.
    mean = torch.nn.functional.normalize(dense.mean(0), dim=0)
    text = dense[[3, 90, 140, 200]] - (dense[[3, 90, 140, 200]] @ mean)[:, None] * mean
    text = torch.nn.functional.normalize(text, dim=1).clone()
    folder = config.run_path / "train"
    folder.mkdir(parents=True)
    save_student(folder / "student.safetensors", student, Checkpoint(config, "id", TRAINED, ("bee",), text))
    manifest = {
        "config": config_fingerprint(config, "train"),
        "fingerprint": "id",
        "student": "student.safetensors",
        "classes": list(TRAINED),
        "unseen": ["bee"],
    }
    (folder / "train.manifest.json").write_text(json.dumps(manifest))
    return path, config.run_path


def naive(run, text, folder, gamma, unseen):
    """Truths and predictions of a folder's test images: every plane enlarged, gamma added, the best taken.

    text: of each class the features of its names, the best of which counts.
    """
    student, _ = load_student(run / "train" / "student.safetensors")
    truths, guesses = [], []
    for path in sorted((folder / "test").glob("?.png")):
        image = np.array(Image.open(path))
        with torch.inference_mode():
            dense = student(squashed(image, SIDE)[None])[0]
        planes = torch.stack([torch.einsum("chw,nc->nhw", dense, names).amax(0) for names in text])[None]
        logits = interpolate(planes, image.shape[:2], mode="bilinear", align_corners=False)[0]
        logits[unseen] += gamma
        guesses.append(logits.argmax(0).numpy())
        truths.append(from_file(np.asarray(Image.open(path.with_name(f"{path.stem}_ids.png")))))
    return truths, guesses


def test_eval_is_the_definition(trained, tmp_path, run_cli):
    config, run = trained
    done = run_cli("eval", "--config", config)
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "eval" / "metrics.json").read_text())
    text = load_student(run / "train" / "student.safetensors")[1].text[:, None]
    for gamma in (0.0, 0.01, 9.0):
        wanted, ious = by_definition(*naive(run, text, tmp_path / "meadow", gamma, [2]), len(TRAINED), [0, 1, 3], [2])
        swept = found["gamma_sweep"][str(gamma)]
        assert [swept[k] for k in ("pAcc", "mIoU_S", "mIoU_U", "hIoU")] == pytest.approx(wanted, abs=0.02)
        if gamma == found["gamma"]:
            shown = [math.nan if v is None else v for v in found["per_class"].values()]
            assert shown == pytest.approx(ious, abs=0.02, nan_ok=True)
    best = found["best_of_sweep"]
    assert best["hIoU"] == max(scores["hIoU"] for scores in found["gamma_sweep"].values()) > 0
    assert best == {"gamma": best["gamma"], **found["gamma_sweep"][str(best["gamma"])]}
    assert f"best of the sweep, chosen on these images: gamma {best['gamma']:g}" in done.stderr
    matrix = np.load(run / "eval" / "confusion.npy")
    assert (matrix.sum(0) > 0).sum() >= 3, "hardly anything is predicted"
    assert (found["mode"], found["flip"], found["scales"], found["side"]) == ("whole", False, [1.0], SIDE)
    with (run / "eval" / "per_class.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["class"] for line in lines] == list(TRAINED)
    assert [line["group"] for line in lines] == ["seen", "seen", "unseen", "seen"]
    assert [int(line["pixels"]) for line in lines] == matrix.sum(1).tolist()
    assert float(lines[2]["IoU"]) == found["per_class"]["bee"]
    assert float(lines[0]["accuracy"]) == pytest.approx(100 * matrix[0, 0] / matrix[0].sum(), abs=0.01)
    assert lines[3]["accuracy"] == ""  # no pixel of it anywhere
    # The third image has no label, so it is neither; the other two are one of each.
    pictures = sorted(path.name for path in (run / "eval" / "pictures").iterdir())
    assert [name[:8] for name in pictures] == ["best-01-", "worst-01"]
    assert not any("-2." in name for name in pictures)


def test_what_is_there_is_not_made_again(trained, run_cli):
    config, run = trained
    first = run_cli("eval", "--config", config)
    assert "nothing to do" not in first.stderr
    before = {path: path.stat().st_mtime_ns for path in (run / "eval").rglob("*")}
    assert "nothing to do" in run_cli("eval", "--config", config).stderr
    assert before == {path: path.stat().st_mtime_ns for path in (run / "eval").rglob("*")}
    for changed in ("eval.flip=true", "eval.scales=[1, 1.5]", "eval.mode=slide", "eval.pictures=0"):
        done = run_cli("eval", "--config", config, "--set", changed)
        assert done.returncode == 0, done.stderr
        assert "nothing to do" not in done.stderr, changed
    assert not (run / "eval" / "pictures").exists()
    found = json.loads((run / "eval" / "metrics.json").read_text())
    assert found["pictures"] == 0


def test_a_corrected_mask_is_noticed(trained, run_cli, tmp_path):
    config, run = trained
    run_cli("eval", "--config", config)
    before = json.loads((run / "eval" / "metrics.json").read_text())
    mask = next(iter(sorted((tmp_path / "meadow" / "test").glob("0_*.png"))))
    Image.fromarray(np.zeros_like(np.array(Image.open(mask)))).save(mask)
    assert "nothing to do" not in run_cli("eval", "--config", config).stderr
    after = json.loads((run / "eval" / "metrics.json").read_text())
    assert after["pAcc"] != before["pAcc"]


def other_config(tmp_path, **more):
    """Another data set: one class the student had labels of, one it hadn't, one whose name it doesn't know."""
    classes = ["zebra", "bee", "taxi", "big cat", "never"]
    if not (tmp_path / "street").exists():
        data_folder(tmp_path / "street", classes, ["zebra", "taxi"], seed=1)
    text = {"synonyms": {"big cat": ["leopard", "big cat"]}} | more
    described = {"name": "street", "data": {"kind": "folder", "root": str(tmp_path / "street")}, "text": text}
    (tmp_path / "street.yaml").write_text(json.dumps(described))
    return tmp_path / "street.yaml"


def test_another_data_set(trained, tmp_path, run_cli):
    config, run = trained
    other = other_config(tmp_path)
    done = run_cli("eval", "--config", config, "--on", other)
    assert done.returncode == 0, done.stderr
    assert not (run / "eval").exists()
    found = json.loads((run / "eval-on-street" / "metrics.json").read_text())
    # zebra is unseen here, though the student had labels of it: the split is this data set's.
    assert found["unseen"] == ["zebra", "taxi"]
    assert found["trained_on"] == {"zebra": ["zebra"], "big cat": ["leopard"]}
    assert found["on"]["config"] == "street"
    assert found["trained"]["unseen"] == ["bee"]
    assert found["text"]["templates"] == ["a photo of a {}."]
    # Known names keep the student's rows; the others are the teacher's; of a class's two the best counts.
    rows = load_student(run / "train" / "student.safetensors")[1].text
    teacher = Teacher.load("local-dir:config/demo_teacher", None, image_size=SIDE, quick_gelu=None)
    new = teacher.encode_text([[f"a photo of a {name}."] for name in ("taxi", "big cat", "never")])
    text = [rows[[1]], rows[[2]], new[[0]], torch.stack([rows[3], new[1]]), new[[2]]]
    wanted, ious = by_definition(*naive(run, text, tmp_path / "street", 0.01, [0, 2]), 5, [1, 3, 4], [0, 2])
    keys = ("pAcc", "mIoU_S", "mIoU_U", "hIoU")
    assert [found[key] for key in keys] == pytest.approx(wanted, abs=0.02, nan_ok=True)
    shown = [math.nan if v is None else v for v in found["per_class"].values()]
    assert shown == pytest.approx(ious, abs=0.02, nan_ok=True)
    assert "nothing to do" in run_cli("eval", "--config", config, "--on", other).stderr
    done = run_cli("eval", "--config", config, "--on", other, "--on-set", "data.unseen=[bee]")
    assert "nothing to do" not in done.stderr
    mask = tmp_path / "street" / "test" / "0_ids.png"
    Image.fromarray(255 - (np.asarray(Image.open(mask)) != 0).astype(np.uint8)).save(mask)
    done = run_cli("eval", "--config", config, "--on", other, "--on-set", "data.unseen=[bee]")
    assert is_one_line_error(done, "254")  # labels changed, so they are read again, and 254 is no class


def test_text_features_of_the_other_data_set(trained, tmp_path, run_cli):
    config, run = trained
    text = np.random.default_rng(5).normal(size=(5, CHANNELS)).astype(np.float32)
    np.save(tmp_path / "text.npy", text)
    other = other_config(tmp_path, features=str(tmp_path / "text.npy"))
    done = run_cli("eval", "--config", config, "--on", other)
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "eval-on-street" / "metrics.json").read_text())
    assert found["text"]["templates"] is None
    unit = torch.from_numpy(text / np.linalg.norm(text, axis=1, keepdims=True))
    wanted, _ = by_definition(*naive(run, unit[:, None], tmp_path / "street", 0.01, [0, 2]), 5, [1, 3, 4], [0, 2])
    keys = ("pAcc", "mIoU_S", "mIoU_U", "hIoU")
    assert [found[key] for key in keys] == pytest.approx(wanted, abs=0.02, nan_ok=True)
    np.save(tmp_path / "text.npy", -text)  # another file under the same name
    assert "nothing to do" not in run_cli("eval", "--config", config, "--on", other).stderr
    np.save(tmp_path / "text.npy", text[:4])
    assert is_one_line_error(run_cli("eval", "--config", config, "--on", other), "(4, 128)", "(5, 128)")
    (tmp_path / "text.npy").unlink()
    assert is_one_line_error(run_cli("eval", "--config", config, "--on", other), "text.features")


def test_mistakes(trained, tmp_path, run_cli):
    config, run = trained
    done = run_cli("eval", "--config", config, "--on", "contxt")
    assert is_one_line_error(done, "config/contxt.yaml", "config/context.yaml")
    done = run_cli("eval", "--config", config, "--on", "context", "--on-set", "data.root=nowhere")
    assert is_one_line_error(done, "nowhere")
    done = run_cli("eval", "--config", config, "--on-set", "data.root=nowhere")
    assert is_one_line_error(done, "--on-set belongs to --on")
    other = other_config(tmp_path)
    closed = ("--set", "recipe=clip_es", "--set", "student.classifier=learned")
    done = run_cli("eval", "--config", config, *closed, "--on", other)
    assert is_one_line_error(done, "has learned its classes", "student.classifier text")
    done = run_cli("eval", "--config", config, "--on", other, "--on-set", "text.synonyms={bull: [cow]}")
    assert is_one_line_error(done, "text.synonyms", "bull")
    (run / "train" / "train.manifest.json").unlink()
    assert is_one_line_error(run_cli("eval", "--config", config, "--on", other), "cli.py train")
