"""One fact around a finished run changes: a description, a mask, an image, a name, a key, a version. Is it noticed?

    world = World(folder)                                  # a folder data set and a finished run of it
    verdict = world.tried("two classes swapped", random)   # "" when the change was noticed or made no difference

Noticed means: each stage does its work again, with the result of a run made from nothing, or says in one line and
exit code 2 why it doesn't; and no stage that is run alone goes on in silence. A change without effect must leave
what a run made from nothing would give, bit for bit.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).parents[1]
STAGES = ("extract", "cluster", "train", "eval")
SIDE, TRAIN, TEST = 64, 12, 3
CLASSES = ("grass", "sand", "water", "frog", "bee")
COLOURS = ((90, 160, 70), (210, 180, 120), (60, 110, 190), (200, 40, 40), (240, 220, 60))
DESCRIPTION: dict[str, Any] = {
    "name": "garden",
    "classes": list(CLASSES),
    "unseen": ["bee"],
    "train": {"images": "train/*.png", "masks": "train_masks/*.png"},
    "test": {"images": "test/*.png", "masks": "test_masks/*.png"},
}
SETTINGS: dict[str, Any] = {
    "teacher": {"model": "local-dir:config/demo_teacher", "pretrained": None, "image_size": SIDE, "batch": 16},
    "text": {"templates": ["a photo of a {}."]},
    "views": {"num": 1},
    "student": {
        "arch": "Segformer",
        "encoder": "tu-resnet10t",
        "encoder_weights": None,
        "options": {"decoder_segmentation_channels": 32},
    },
    "train": {
        "iterations": 2,
        "batch": 4,
        "lr": 3e-3,
        "head_lr_factor": 1,
        "warmup": 1,
        "photometric": False,
        "nel": "seen",
        "tracker": "none",
    },
    "eval": {"pictures": 0},
}


@dataclass
class Garden:
    """A copy of the data set and its run. `settings` are what a change of the config adds to the command line."""

    folder: Path
    settings: list[str] = field(default_factory=list)

    @property
    def config(self) -> Path:
        return self.folder / "run.yaml"

    @property
    def run(self) -> Path:
        return self.folder / "runs" / "garden"

    def described(self) -> dict[str, Any]:
        return yaml.safe_load((self.folder / "dataset.yaml").read_text(encoding="utf-8"))

    def describe(self, **changes: Any) -> None:
        text = yaml.safe_dump(self.described() | changes, sort_keys=False)
        (self.folder / "dataset.yaml").write_text(text, encoding="utf-8")

    def files(self, folder: str) -> list[Path]:
        return sorted((self.folder / folder).glob("*.png"))


# ---- the changes; each returns whether rows of the cache are in another order than of a run made from nothing -----

Change = Callable[[Garden, random.Random], None]


def class_renamed(garden: Garden, random_: random.Random) -> None:
    classes = garden.described()["classes"]
    place = random_.randrange(len(classes) - 1)  # not the unseen one, which another list names
    classes[place] = f"wild {classes[place]}"
    garden.describe(classes=classes)


def classes_swapped(garden: Garden, random_: random.Random) -> None:
    classes = garden.described()["classes"]
    one, two = random_.sample(range(len(classes)), 2)
    classes[one], classes[two] = classes[two], classes[one]
    garden.describe(classes=classes)


def class_added(garden: Garden, random_: random.Random) -> None:
    garden.describe(classes=[*CLASSES, random_.choice(["zebra", "taxi", "melon"])])


def split_changed(garden: Garden, random_: random.Random) -> None:
    garden.describe(unseen=random_.choice([["frog"], ["frog", "bee"], ["water"], []]))


def set_renamed(garden: Garden, random_: random.Random) -> None:
    garden.describe(name=f"garden{random_.randrange(9)}")


def ids_reduced(garden: Garden, random_: random.Random) -> None:
    garden.describe(reduce_zero_label=True, classes=list(CLASSES))


def ignored_id(garden: Garden, random_: random.Random) -> None:
    """The last class becomes the id of what has no label."""
    garden.describe(classes=list(CLASSES[:-1]), unseen=["frog"], ignore=len(CLASSES) - 1)


def values_exchanged(garden: Garden, random_: random.Random) -> None:
    """The description gives two raw ids each other's class."""
    one, two = random_.sample(range(len(CLASSES)), 2)
    values = {raw: CLASSES[raw] for raw in range(len(CLASSES))}
    values[one], values[two] = values[two], values[one]
    garden.describe(values=values)


def fewer_listed(garden: Garden, random_: random.Random) -> None:
    chosen = sorted(random_.sample([path.stem for path in garden.files("train")], TRAIN - 2))
    (garden.folder / "some.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    garden.describe(train={**DESCRIPTION["train"], "list": "some.txt"})


def other_masks(garden: Garden, random_: random.Random) -> None:
    """The pattern names another folder of masks, in which some pixels have another id."""
    target = garden.folder / "more_masks"
    target.mkdir()
    for path in garden.files("train_masks"):
        ids = np.array(Image.open(path))
        ids[: random_.randrange(8, 40)] = 0
        Image.fromarray(ids).save(target / path.name)
    garden.describe(train={**DESCRIPTION["train"], "masks": "more_masks/*.png"})


def fewer_tested(garden: Garden, random_: random.Random) -> None:
    (garden.folder / "one.txt").write_text(random_.choice(garden.files("test")).stem + "\n", encoding="utf-8")
    garden.describe(test={**DESCRIPTION["test"], "list": "one.txt"})


def mask_edited(garden: Garden, random_: random.Random) -> None:
    _painted(random_.choice(garden.files("train_masks")), random_, np.uint8(random_.randrange(len(CLASSES))))


def test_mask_edited(garden: Garden, random_: random.Random) -> None:
    _painted(random_.choice(garden.files("test_masks")), random_, np.uint8(random_.randrange(len(CLASSES))))


def image_edited(garden: Garden, random_: random.Random) -> None:
    _painted(random_.choice(garden.files("train")), random_, np.uint8([random_.randrange(256) for _ in range(3)]))


def test_image_edited(garden: Garden, random_: random.Random) -> None:
    _painted(random_.choice(garden.files("test")), random_, np.uint8([random_.randrange(256) for _ in range(3)]))


def images_swapped(garden: Garden, random_: random.Random) -> None:
    _swapped(*random_.sample(garden.files("train"), 2))


def masks_swapped(garden: Garden, random_: random.Random) -> None:
    _swapped(*random_.sample(garden.files("train_masks"), 2))


def image_added(garden: Garden, random_: random.Random) -> None:
    source = random_.choice(garden.files("test"))
    name = random_.choice(["000_first.png", "zzz_last.png"])
    shutil.copy(source, garden.folder / "train" / name)
    shutil.copy(garden.folder / "test_masks" / source.name, garden.folder / "train_masks" / name)


def image_removed(garden: Garden, random_: random.Random) -> None:
    name = random_.choice(garden.files("train")).name
    for folder in ("train", "train_masks"):
        (garden.folder / folder / name).unlink()


def mask_removed(garden: Garden, random_: random.Random) -> None:
    random_.choice(garden.files("train_masks")).unlink()


def image_broken(garden: Garden, random_: random.Random) -> None:
    path = random_.choice(garden.files("train"))
    path.write_bytes(path.read_bytes()[: random_.randrange(20, 300)])


def key_changed(garden: Garden, random_: random.Random) -> None:
    garden.settings.append(
        random_.choice(
            [
                'text.templates=["a picture of a {}."]',
                "text.synonyms={frog: [toad]}",
                "views.num=2",
                "teacher.precision=bf16",
                "cache.tokens=int8",
                "cluster.threshold=0.7",
                "cluster.sizes=[3]",
                "cluster.distance=euclidean",
                "train.lr=1e-3",
                "train.seed=7",
                "train.glm=off",
                "train.nel=off",
                "train.iterations=3",
                "train.weights={ce: 0.5}",
                "student.options={decoder_segmentation_channels: 16}",
                "eval.gamma=0.5",
                "eval.gamma_sweep=[0.0, 1.0]",
                "eval.flip=true",
                "data.unseen=[frog]",
            ]
        )
    )


def student_exchanged(garden: Garden, random_: random.Random) -> None:
    """The student becomes another run's: other names in its metadata, sound by its own hash."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    from pipeline.learning.checkpoint import CONTENT, content_digest

    path = garden.run / "train" / "student.safetensors"
    with safe_open(path, "pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    metadata["fingerprint"] = f"{random_.getrandbits(64):016x}"
    metadata[CONTENT] = content_digest(metadata, tensors)
    save_file(tensors, path, metadata=metadata)


def student_damaged(garden: Garden, random_: random.Random) -> None:
    path = garden.run / "train" / "student.safetensors"
    content = bytearray(path.read_bytes())
    for _ in range(200):
        content[random_.randrange(len(content) // 2, len(content))] ^= 1 << random_.randrange(8)
    path.write_bytes(content)


def student_gone(garden: Garden, random_: random.Random) -> None:
    (garden.run / "train" / "student.safetensors").unlink()


def arrays_gone(garden: Garden, random_: random.Random) -> None:
    shutil.rmtree(garden.run / "cache" / "data.zarr" / random_.choice(["", "tokens", "pseudo", "text", "cls"]))


# ---- changes that make no difference ------------------------------------------------------------------------------


def files_touched(garden: Garden, random_: random.Random) -> None:
    for path in garden.folder.rglob("*.png"):
        os.utime(path, (1, random_.randrange(2**30)))


def modes_changed(garden: Garden, random_: random.Random) -> None:
    for path in garden.folder.rglob("*"):
        if path.is_file():
            path.chmod(random_.choice([0o600, 0o640, 0o444]))


def colours_changed(garden: Garden, random_: random.Random) -> None:
    """What pictures are painted with."""
    garden.describe(palette=[[random_.randrange(256) for _ in range(3)] for _ in CLASSES])


def version_stamped(garden: Garden, random_: random.Random) -> None:
    """The cache says that another version of a package made it."""
    path = garden.run / "cache" / "data.zarr" / "zarr.json"
    group = json.loads(path.read_text(encoding="utf-8"))
    group["attributes"]["made_with"][random_.choice(["torch", "open_clip", "clipteacher"])] = "0.0.1"
    path.write_text(json.dumps(group), encoding="utf-8")


def moved(garden: Garden, random_: random.Random) -> None:
    """The data set lies elsewhere."""
    target = garden.folder / "elsewhere"
    target.mkdir()
    for name in ("dataset.yaml", "train", "train_masks", "test", "test_masks"):
        (garden.folder / name).rename(target / name)
    garden.settings.append(f"data.root={target}")


FAULTS: dict[str, Change] = {
    "a class renamed": class_renamed,
    "two classes swapped": classes_swapped,
    "a class added": class_added,
    "another split": split_changed,
    "the data set renamed": set_renamed,
    "reduce_zero_label set": ids_reduced,
    "another ignored id": ignored_id,
    "two values exchanged": values_exchanged,
    "fewer images listed": fewer_listed,
    "other masks named": other_masks,
    "fewer test images listed": fewer_tested,
    "a mask edited": mask_edited,
    "a test mask edited": test_mask_edited,
    "an image edited": image_edited,
    "a test image edited": test_image_edited,
    "two images swapped": images_swapped,
    "two masks swapped": masks_swapped,
    "an image added": image_added,
    "an image removed": image_removed,
    "a mask removed": mask_removed,
    "an image broken": image_broken,
    "a key of the config": key_changed,
    "another run's student": student_exchanged,
    "a damaged student": student_damaged,
    "no student": student_gone,
    "arrays gone": arrays_gone,
}
HARMLESS: dict[str, Change] = {
    "files touched": files_touched,
    "modes changed": modes_changed,
    "colours changed": colours_changed,
    "a version stamped": version_stamped,
    "the data set moved": moved,
}
# The cache keeps its rows where a run made from nothing would order them otherwise, so students differ.
OTHER_ROWS = ("an image added", "an image removed", "fewer images listed")


def _painted(path: Path, random_: random.Random, value: np.ndarray) -> None:
    pixels = np.array(Image.open(path))
    top, left = random_.randrange(SIDE // 2), random_.randrange(SIDE // 2)
    pixels[top : top + SIDE // 2, left : left + SIDE // 2] = value
    Image.fromarray(pixels).save(path)


def _swapped(one: Path, two: Path) -> None:
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)


# ---- what is asked of a changed run --------------------------------------------------------------------------------


@dataclass
class Said:
    """What a command left behind."""

    code: int
    text: str

    @property
    def is_line(self) -> bool:
        lines = [line for line in self.text.splitlines() if line.startswith("error: ")]
        return self.code == 2 and len(lines) == 1 and "Traceback" not in self.text

    @property
    def is_finding(self) -> bool:
        return self.code == 2 and "stale:" in self.text

    @property
    def is_silent(self) -> bool:
        """Whether a stage that had finished left it at that, with nothing said of the change."""
        return self.code == 0 and "nothing to do" in self.text and "is not what this student" not in self.text


class World:
    """A finished run that is copied, changed and asked again and again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sound = Garden(folder / "sound")
        _planted(self.sound.folder)
        for stage in STAGES:
            said = self.asked(stage, self.sound)
            if said.code:
                raise SystemExit(f"{stage} of the sound run: {said.text}")

    def changed(self, what: str, seed: int) -> Garden:
        """A copy with one change made."""
        garden = Garden(self.folder / "changed")
        shutil.rmtree(garden.folder, ignore_errors=True)
        shutil.copytree(self.sound.folder, garden.folder)
        _configured(garden.folder)
        (FAULTS | HARMLESS)[what](garden, random.Random(f"{what} {seed}"))
        return garden

    def tried(self, what: str, seed: int) -> str:
        """What went wrong with a change; "" when it was noticed, or makes no difference and none was made."""
        alone = {stage: self.asked(stage, self.changed(what, seed)) for stage in ("train", "eval", "verify")}
        garden = self.changed(what, seed)
        heard = {stage: self.asked(stage, garden) for stage in STAGES}
        for stage, said in (heard | {f"{stage} alone": said for stage, said in alone.items()}).items():
            is_fine = said.code == 0 or said.is_line or (stage == "verify alone" and said.code == 2)
            if not is_fine or "Traceback" in said.text:
                return f"{what} (seed {seed}): {stage} ended with {said.code}: {said.text[-800:]}"
        if any(said.code for said in heard.values()):  # refused: and no later stage goes on as if nothing were
            first = next(i for i, stage in enumerate(STAGES) if heard[stage].code)
            silent = [stage for stage in STAGES[first + 1 :] if heard[stage].is_silent]
            return f"{what} (seed {seed}): {STAGES[first]} refused, {silent} went on" if silent else ""
        fresh = self.fresh(what, seed)
        found = _results(garden)
        if found != fresh and what not in OTHER_ROWS:
            return f"{what} (seed {seed}): the result is not that of a run made from nothing: {_apart(found, fresh)}"
        sound = _results(self.sound)
        for stage, part in (("train", "weights"), ("eval", "metrics")):
            if alone[stage].is_silent and found is not None and found[part] != sound[part]:
                return f"{what} (seed {seed}): {stage}, run alone, said nothing"
        if what in HARMLESS and found != sound:
            return f"{what} (seed {seed}): something was made again: {_apart(found, sound)}"
        return ""

    def fresh(self, what: str, seed: int) -> dict[str, Any] | None:
        """The results of the changed data set and config, made from nothing; None where a stage refuses them."""
        garden = self.changed(what, seed)
        shutil.rmtree(garden.folder / "runs")
        for stage in STAGES:
            if self.asked(stage, garden).code:
                return None
        return _results(garden)

    def asked(self, stage: str, garden: Garden) -> Said:
        return command(stage, garden.config, garden.settings)


def command(stage: str, config: Path, settings: Sequence[str] = ()) -> Said:
    """`cli.py STAGE` in this process, nothing remembered but the teacher."""
    from accelerate.state import AcceleratorState

    import cli
    from pipeline.data import base

    base._data.cache_clear()
    AcceleratorState._reset_state(reset_partial_state=True)
    sys.argv = ["cli.py", stage, "--config", str(config), *(w for s in settings for w in ("--set", s))]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said), contextlib.chdir(ROOT):
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
    return Said(code, said.getvalue())


def _planted(folder: Path) -> None:
    """Images of two grounds and boxes of things, masks of ids, the description and the config."""
    rng = np.random.default_rng(0)
    for part, num in (("train", TRAIN), ("test", TEST)):
        (folder / part).mkdir(parents=True)
        (folder / f"{part}_masks").mkdir()
        for number in range(num):
            ids = np.zeros((SIDE, SIDE), np.uint8)
            ids[SIDE // 2 :] = 1 + number % 2
            for thing in (3, 4):
                top, left = rng.integers(0, SIDE - SIDE // 3, 2)
                ids[top : top + SIDE // 3, left : left + SIDE // 3] = thing
            noise = rng.integers(-20, 20, (SIDE, SIDE, 3))
            pixels = np.clip(np.array(COLOURS)[ids] + noise, 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{number:03}.png")
            Image.fromarray(ids).save(folder / f"{part}_masks" / f"{number:03}.png")
    (folder / "dataset.yaml").write_text(yaml.safe_dump(DESCRIPTION, sort_keys=False), encoding="utf-8")
    _configured(folder)


def _configured(folder: Path) -> None:
    """The config of a copy, whose paths are its own."""
    own = {"name": "garden", "runs": str(folder / "runs"), "data": {"kind": "folder", "root": str(folder)}}
    (folder / "run.yaml").write_text(yaml.safe_dump({**own, **SETTINGS}), encoding="utf-8")


def _results(garden: Garden) -> dict[str, Any] | None:
    """Scores and weights of a run; None where there are none."""
    from pipeline.learning.checkpoint import read_student

    try:
        metrics = json.loads((garden.run / "eval" / "metrics.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    _, tensors = read_student(garden.run / "train" / "student.safetensors")
    weights = {name: value.numpy().tobytes() for name, value in tensors.items()}
    return {"metrics": {key: value for key, value in metrics.items() if key != "made"}, "weights": weights}


def _apart(one: dict[str, Any] | None, two: dict[str, Any] | None) -> str:
    if one is None or two is None:
        return f"{'nothing' if one is None else 'a result'} against {'nothing' if two is None else 'a result'}"
    apart = [
        f"{part}.{key}"
        for part in one
        for key in dict.fromkeys([*one[part], *two[part]])
        if one[part].get(key) != two[part].get(key)
    ]
    return ", ".join(apart)[:300]
