"""CLIPTeacher from Python: runs, masks, caches, training sets and the stages, as the command line has them.

    import clipteacher

    run = clipteacher.run("demo", until="eval")          # or clipteacher.load("runs/demo") of one that is there
    mask = run.predict("photo.jpg", names=["zebra", "sofa|couch"])
    mask.overlay().save("seen.png")

Mistakes that a user can mend are `UserError`s, what is wrong with a cache is a `CacheError`; neither ends the process.
Importing this loads neither torch nor zarr: each function loads what it needs. docs/python.md shows all of it.
"""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache.errors import CacheError
from pipeline.config import Config, ConfigError, UserError, as_mapping, from_mapping
from pipeline.config import load as _load_config
from pipeline.config import version as _version

if TYPE_CHECKING:
    import numpy as np
    import xarray
    from PIL import Image

    from cache.store import Store
    from pipeline.learning.segmenter import Segmenter
    from pipeline.learning.trainingset import TrainingSet
    from pipeline.looking.mask import Mask

__version__ = _version()
__all__ = [
    "Cache",
    "CacheError",
    "Config",
    "ConfigError",
    "Mask",
    "Run",
    "TrainingSet",
    "UserError",
    "load",
    "open_cache",
    "read_config",
    "run",
    "training_set",
]

# Classes that need numpy or torch, by where they are: loaded when they are named.
_LATER = {"Mask": "pipeline.looking.mask", "TrainingSet": "pipeline.learning.trainingset"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module 'clipteacher' has no attribute {name!r}")


# ---- runs ----------------------------------------------------------------------------------------


def load(run: str | os.PathLike[str]) -> Run:
    """A run by its folder, wherever that lies, or a student by its file; loads no weights yet.

    >>> clipteacher.load("runs/demo").classes[:4]
    ('grass', 'sand', 'water', 'brick')

    Raises: UserError where there is neither.
    """
    from pipeline.running.manifests import located, run_config

    path = Path(run).expanduser()
    if (path / "config.yaml").is_file() or not path.exists():
        return Run(path, located(run_config(path), path))
    from pipeline.learning.checkpoint import load_student, student_file

    return Run(path, load_student(student_file(path))[1].config)


class Run:
    """A run, half done or finished: what it was asked for, what it knows, and its student to ask.

    path: its folder, or a student's file. config: its settings, frozen; relative paths are those seen from here.
    """

    def __init__(self, path: Path, config: Config) -> None:
        self.path, self.config = path, config

    @property
    def _is_folder(self) -> bool:
        """Whether it is a run's folder; a student by itself says nothing of its run's other files."""
        return (self.path / "config.yaml").is_file()

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """The names of its classes, by id: the student's, else the cache's, else the data set's.

        Raises: DataError where none of the three is here.
        """
        if not self._is_folder:
            return self.segmenter.checkpoint.classes
        from pipeline.data.base import data_of
        from pipeline.running.manifests import found_manifest

        for stage in ("train", "extract"):
            if names := (found_manifest(self.config, stage) or {}).get("classes"):
                return tuple(names)

        return data_of(self.config.data).classes

    @property
    def metrics(self) -> dict[str, Any] | None:
        """What `eval` wrote, as in metrics.json: pAcc, mIoU_S, mIoU_U, hIoU, per_class, ... in percent; None before.

        >>> sorted(clipteacher.load("runs/demo").metrics["gamma_sweep"])[:3]
        ['0.0', '0.5', '1.0']

        Raises: StaleCache where another student than the run's was evaluated.
        """
        from cache.errors import StaleCache
        from pipeline.looking import facts
        from pipeline.looking.results import stale

        path = facts.metrics_path(self.config)
        metrics = facts.found_metrics(path) if self._is_folder else None
        if metrics is not None and (mark := stale(self.config.run_path, metrics)):
            raise StaleCache(f"{path}:{mark}. Run `cli.py eval` again.")
        return metrics

    @property
    def cache(self) -> Cache:
        """Its cache. Raises: MissingCache; UserError for a student by itself."""
        if not self._is_folder:
            raise UserError(f"{self.path}: a student by itself has no cache. Use open_cache with its folder.")
        return open_cache(self.config.cache_path)

    @property
    def segmenter(self) -> Segmenter:
        """The student, loaded once and anew when its file has changed, on the GPU where there is one.

        Raises: CheckpointError where nothing is trained.
        """
        from pipeline.learning.checkpoint import student_file
        from pipeline.learning.segmenter import Segmenter

        file = student_file(self.path)
        stamp = (file, file.stat().st_mtime_ns)
        if self._loaded is None or self._loaded[0] != stamp:
            self._loaded = (stamp, Segmenter(self.path))
        return self._loaded[1]

    _loaded: tuple[tuple[Path, int], Segmenter] | None = None

    def predict(
        self,
        image: str | os.PathLike[str] | Image.Image | np.ndarray,
        names: str | Iterable[str | Sequence[str]] | None = None,
        *,
        gamma: float | None = None,
        reject: float | None = None,
        mode: str | None = None,
    ) -> Mask:
        """Segments an image with any names: a `Mask` of ids that follow `names`, -1 where all were rejected.

        image: a path, a PIL image (both turned upright by EXIF) or an array (H, W, 3) uint8, RGB. names: one by one,
        synonyms of one by |, or in one text with commas; None: the run's classes. gamma (added to the logits of names
        never labelled in training), reject (a score, 0 to 1) and mode (whole, slide) are `cli.py predict`'s; None: the
        run's. Words that aren't the run's classes are read by the teacher's text encoder, loaded once: its relative
        path is looked for where the run was made, then in the working directory.

        >>> mask = clipteacher.load("runs/demo").predict(image, names=["zebra", "sofa|couch"])
        >>> mask.shape, mask.names, mask.probabilities.shape
        ((120, 160), ('zebra', 'sofa'), (2, 120, 160))

        Raises: UserError for an image or names that can't be used, and a teacher that isn't there.
        """
        import numpy as np

        from pipeline.data.inputs import pixels_of
        from pipeline.learning.segmenter import check, listed_names, parsed_names
        from pipeline.looking.mask import Mask

        check(reject, mode, gamma)
        pixels, segmenter = pixels_of(image), self.segmenter
        size, own = (pixels.shape[0], pixels.shape[1]), segmenter.checkpoint.classes
        if names is not None:
            names = parsed_names(names, own) if isinstance(names, str) else listed_names(names, own)
        asked = segmenter.ask(names)
        scores = segmenter.scores([pixels], asked, gamma, mode)[0]

        def probabilities() -> np.ndarray:
            found = np.empty((len(asked.names), *size), np.float32)
            segmenter.decide(scores, size, probabilities=found, asked=asked)
            return found

        return Mask(segmenter.decide(scores, size, reject, asked=asked), asked.titles, pixels, probabilities)

    def __repr__(self) -> str:
        from pipeline.looking.facts import SCORES
        from pipeline.running.manifests import found_manifest
        from pipeline.running.table import in_cache

        try:
            stages = (*in_cache(self.config), "train") if self._is_folder else ()
            done = [stage for stage in stages if found_manifest(self.config, stage)]
            said = [f"{', '.join(done)} done" if done else "nothing done" if stages else "a student by itself"]
            if metrics := self.metrics:
                said += [f"{title} {value:.1f}" for key, title in SCORES.items() if (value := metrics[key]) is not None]
            said.insert(0, f"{len(self.classes)} classes")
        except (UserError, CacheError, OSError) as error:
            said = [str(error)]
        return f"<Run {str(self.path)!r}: {', '.join(said)}>"


# ---- caches --------------------------------------------------------------------------------------


def open_cache(path: str | os.PathLike[str]) -> Cache:
    """The cache in a folder or at an fsspec URL; reads no array yet.

    >>> cache = clipteacher.open_cache("runs/demo/cache")
    >>> cache.rows[:2], cache.pseudo("train-00001").shape
    (('train-00000', 'train-00001'), (1, 16, 16))

    Raises: MissingCache, StaleCache (of another version), CorruptShard.
    """
    from cache.store import Store

    return Cache(Store.open(os.path.expanduser(path)))


class Cache:
    """What the teacher saw, image by image. docs/cache.md has the arrays.

    Axes: V views of an image, view 0 the whole of it; h, w the token grid; C the teacher's channels.
    """

    def __init__(self, store: Store) -> None:
        self.store = store

    @cached_property
    def rows(self) -> tuple[str, ...]:
        """The sample ids, row by row."""
        return tuple(self.store.samples)

    @cached_property
    def usable(self) -> tuple[str, ...]:
        """Those of the images that are extracted, neither quarantined nor gone from the data set."""
        status = self.store.read_whole("status")
        return tuple(name for name, code in zip(self.rows, status, strict=True) if code == 0)

    @property
    def arrays(self) -> tuple[str, ...]:
        """The names of the arrays that are there."""
        return tuple(self.store.arrays)

    def read(self, array: str, sample: str) -> np.ndarray:
        """An image's row of an array, as it is kept. Raises: UserError (no such image, not usable), MissingCache."""
        import numpy as np

        if sample not in self._row_of:
            near = difflib.get_close_matches(sample, self.rows, 3, 0.0)
            raise UserError(f"{self.store.path}: caches no image {sample!r}; near it are {', '.join(near)}.")
        row = np.array([self._row_of[sample]])
        if (code := int(self.store.read_rows("status", row)[0])) != 0:
            why = {1: "is quarantined: it can't be read", 2: "is no longer in the data set"}
            raise UserError(f"{self.store.path}: image {sample!r} {why.get(code, 'is not extracted yet')}.")
        return self.store.read_rows(array, row)[0]

    def tokens(self, sample: str) -> np.ndarray:
        """An image's dense tokens, not normalised: (V, h, w, C) float32. Raises: as read."""
        import numpy as np

        tokens = self.read("tokens", sample).astype(np.float32)
        if self.store.has("token_scale"):  # kept as int8, see ops/quantise.py
            tokens *= self.read("token_scale", sample)[..., None]
        return tokens

    def cls(self, sample: str) -> np.ndarray:
        """An image's CLS tokens, not normalised: (V, C) float32. Raises: as read."""
        import numpy as np

        return self.read("cls", sample).astype(np.float32)

    def pseudo(self, sample: str) -> np.ndarray:
        """Its pseudo labels: (V, h, w) uint8, 0 annotated, 1 and on potential objects, 255 padding. Raises: as read."""
        return self.read("pseudo", sample)

    def boxes(self, sample: str) -> np.ndarray:
        """Its views: (V, 4) float32, x0, y0, x1, y1 in pixels of the image. Raises: as read."""
        return self.read("view", sample)

    def to_xarray(self) -> xarray.Dataset:
        """All arrays with named axes, read when they are used; N goes by sample ids, K by class names.

        >>> clipteacher.open_cache("runs/demo/cache").to_xarray().cls.sel(N="train-00001").dims
        ('V', 'C')

        Raises: UserError without the package xarray.
        """
        try:
            import xarray
        except ImportError as error:
            raise UserError(f"to_xarray needs a package ({error}): pip install 'clipteacher[xarray]'.") from None
        found = xarray.open_zarr(str(self.store.data), consolidated=False, mask_and_scale=False)
        names = {"N": list(self.rows), "K": list(self.store.attributes.get("classes") or [])}
        fitting = {axis: names[axis] for axis in names if found.sizes.get(axis) == len(names[axis])}
        return found.drop_vars("sample", errors="ignore").assign_coords(fitting)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.rows)}

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        return f"<Cache {str(self.store.path)!r}: {len(self)} images, {', '.join(self.arrays)}>"


# ---- training sets and stages --------------------------------------------------------------------

Source = str | os.PathLike[str] | Mapping[str, Any] | Config


def read_config(config: Source, settings: Mapping[str, Any] | Iterable[str] = ()) -> Config:
    """The settings of a run: of a preset by name, a YAML by path, a mapping, or a config; with `settings` applied.

    settings: {"train.lr": 1e-4}, or as --set has them, ["train.lr=1e-4"].

    >>> clipteacher.read_config("demo", {"train.lr": 1e-4}).train.lr
    0.0001

    Raises: ConfigError.
    """
    if isinstance(settings, Mapping):
        settings = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
    elif isinstance(settings, str):
        settings = [settings]
    if isinstance(config, Config):
        settings = list(settings)
        found = from_mapping(as_mapping(config), settings) if settings else config
        near = config.teacher.near
    elif isinstance(config, Mapping):
        found, near = from_mapping(config, settings), None
    else:
        found, near = _load_config(Path(config).expanduser(), settings), None
    return found.made_in(near or Path.cwd())


def training_set(config: Source) -> TrainingSet:
    """The training items of an extracted and clustered run, as a torch data set with integer indices.

    >>> dataset = clipteacher.training_set(clipteacher.load("runs/demo").config)
    >>> dataset[0]["image"].shape
    torch.Size([3, 128, 128])

    Raises: MissingCache, StaleCache, CorruptShard, DataError.
    """
    from pipeline.data.base import forget_data
    from pipeline.learning.trainingset import TrainingSet

    forget_data()
    return TrainingSet(read_config(config))


def run(
    config: Source,
    until: str = "eval",
    *,
    settings: Mapping[str, Any] | Iterable[str] = (),
    workers: int = 0,
    scheduler: str | None = None,
    quiet: bool = False,
) -> Run:
    """Does the stages of a run up to `until` that aren't done yet, as `cli.py` does them, and returns the run.

    until: extract, encode (of a config with cluster.teacher), cluster (cams in recipe clip_es), train, eval, report,
    figures. workers, scheduler: those of `cli.py extract`. quiet: no progress, only results and warnings. A stage that
    was interrupted resumes. Where `workers` or `train.workers` start processes, a script needs
    `if __name__ == "__main__":` around its calls.

    >>> clipteacher.run("demo", until="train", quiet=True).config.train.seed
    0

    Raises: UserError, CacheError.
    """
    from pipeline.data.base import forget_data
    from pipeline.running import console

    asked = read_config(config, settings)
    from_mapping(as_mapping(asked), where=str(asked.run_path))  # a folder may have been given a name no run can have
    todo = _stages(asked, until)
    forget_data()
    with console.quiet(quiet):
        for stage in todo:
            _DOORS.get(stage, _shards)(stage, asked, workers, scheduler, quiet)
    return load(asked.run_path)


def _stages(config: Config, until: str) -> list[str]:
    """The stages up to one. Raises: UserError for one that there isn't, or isn't in the run's recipe."""
    from pipeline.running.table import STAGES, all_above, is_of

    known = [name for name, stage in STAGES.items() if stage.last and is_of(config, name)]
    if until not in known:
        raise UserError(f"until {until!r}: a run of recipe {config.recipe} has the stages {', '.join(known)}.")
    return [*reversed(all_above(config, until)), until]


def _extract(stage: str, config: Config, workers: int, scheduler: str | None, quiet: bool) -> None:
    from pipeline.extract import extract

    extract(config, workers=workers, scheduler=scheduler)


def _shards(stage: str, config: Config, workers: int, scheduler: str | None, quiet: bool) -> None:
    """A stage of the table that makes arrays shard by shard, and what its command prints at the end."""
    from pipeline.running.shards import run_stage

    manifest = run_stage(stage, config, workers=workers, scheduler=scheduler)
    if stage in _SUMMARIES:
        module, _, name = _SUMMARIES[stage].partition(":")
        getattr(importlib.import_module(module), name)(manifest["summary"])


def _train(stage: str, config: Config, workers: int, scheduler: str | None, quiet: bool) -> None:
    from pipeline.running import processes

    if (config.train.processes or 1) > 1 and not processes.is_launched():
        _train_in_processes(config, quiet)
        return
    import torch

    from pipeline.train import train

    threads = torch.get_num_threads()
    try:
        train(config)
    finally:
        torch.set_num_threads(threads)  # train.threads is the training's, not the session's


def _train_in_processes(config: Config, quiet: bool) -> None:
    """`cli.py train` with this config, as the processes that it asks for. Raises: UserError when one fails."""
    import cli
    from pipeline.config.reading import yaml_text
    from pipeline.running import processes

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml_text(as_mapping(config)), encoding="utf-8")
        command = [sys.executable, cli.__file__, "train", "--config", str(file), *["--quiet"] * quiet]
        try:
            processes.start(config.train.processes or 1, command)
        except SystemExit as ended:  # a process of its own has said why
            raise UserError(
                f"train: one of {config.train.processes} processes ended with code {ended.code}; what it said is above."
            ) from None


def _eval(stage: str, config: Config, workers: int, scheduler: str | None, quiet: bool) -> None:
    from pipeline.evaluate import evaluate

    evaluate(config)


def _report(stage: str, config: Config, workers: int, scheduler: str | None, quiet: bool) -> None:
    from pipeline.report import draw_figures, report

    draw: dict[str, Callable[[Config], Any]] = {"report": report, "figures": draw_figures}
    draw[stage](config)


_SUMMARIES = {"cluster": "pipeline.cluster:print_summary", "cams": "pipeline.teaching.seeds:print_summary"}
_DOORS: dict[str, Callable[[str, Config, int, str | None, bool], None]] = {
    "extract": _extract,
    "train": _train,
    "eval": _eval,
    "report": _report,
    "figures": _report,
}
