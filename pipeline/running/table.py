"""The stages, as data: what each reads, what it stands on, what it writes and says when it ends. One entry a stage.

A stage that makes arrays shard by shard from what `extract` has left is a `ShardStage` (pipeline/running/shards.py) in
a file of its own, and an entry here. The command line, the ledger, `verify`, `inspect`, `doctor` and Snakemake know it
by its entry.
`config_fingerprint` says what a config asks of a stage (the Snakefile's trigger), `fingerprint` what the stage makes of
it: facts about the data included. Importing this loads neither torch nor any stage.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cache.ledger import MANIFEST
from cache.places import Place, place
from cache.records import Shape
from cache.schema import ARRAYS, ArraySpec
from pipeline.config import OPTIONS, Config, aside_keys, defaults, digest, settings_apart_from_defaults

STREAM = "stream"  # of cache.tokens: extraction clusters, and keeps no tokens
POOLED = "pooled"  # of it: their mean alone is kept
LABELS = "labels"  # in place of a stage's name: the one that makes the labels of the run's recipe
TOKENS = "tokens"  # in place of a stage's name: the one that makes the tokens that are clustered

ASKED = {"asked?": dict, "arrays?": [str]}
PSEUDO = {
    "views": int,
    "objects_per_view": float,
    "objects_histogram": {str: int},
    "coverage": float,
    "tokens_per_mask": float,
    "largest_mask_share": float,
    "purity": (float, None),
    "verdict?": [str],
}
MAPS = {
    **dict.fromkeys(("images", "maps", "empty", "untagged"), int),
    "seeds": ({str: {str: float}}, None),
    "refined?": float,
}
EXTRACTED = {"text?": str, "text_asked?": dict, "facts?": dict, "classes?": [str]}
TRAINED = {"iterations?": int, "student?": str, "classes?": [str], "unseen?": [str]}


def _nothing(config: Config) -> tuple[str, ...]:
    return ()


def _always(config: Config) -> bool:
    return True


def has_second_model(config: Config) -> bool:
    """Whether clustering has a model of its own whose tokens are kept; streamed ones are extraction's work."""
    is_asked = config.recipe == "clip_teacher" and config.cluster.teacher is not None
    return is_asked and config.cache.tokens not in (STREAM, POOLED)


@dataclass(frozen=True)
class Stage:
    """One stage.

    sections: of the config, whose content keys enter its fingerprint; or single keys of one, "section.key".
    upstream: the stage that it stands on; LABELS is `cluster` or `cams`, by recipe, TOKENS `encode` or `extract`.
    is_in: whether runs of a config have it.
    reads: of the data set beside the training images: "labels", "test".
    also: stages whose sections and `reads` count as well under a config.
    part_of: the stage that makes this one and keeps its manifest.
    recipe: the only one that it belongs to; of a stage of the cache, the one whose labels it makes.
    work: "module:Class" of a `ShardStage`, imported when it runs; other stages have a command of their own.
    specs: of the arrays it writes, if cache/schema.py doesn't have them.
    in_cache: it keeps its work in the cache, shard by shard.
    writes_last: the file that says it has ended, in the cache or in a folder of the run that has its name; without one,
        its manifest, NAME.manifest.json.
    says: the shape of what its manifest says beside what all say.
    needed: keys of it that the stage below can't do without.
    """

    name: str
    sections: tuple[str, ...]
    upstream: str | None
    reads: tuple[str, ...] = ()
    also: Callable[[Config], tuple[str, ...]] = _nothing
    is_in: Callable[[Config], bool] = _always
    part_of: str = ""
    recipe: str = ""
    work: str = ""
    help: str = ""
    specs: tuple[ArraySpec, ...] = ()
    in_cache: bool = False
    writes_last: str = ""
    says: Mapping[str, Shape] = field(default_factory=dict)
    needed: tuple[str, ...] = ("fingerprint", "content")

    @property
    def last(self) -> str:
        """Name of the file that says it has ended; "" for a part of another stage."""
        return "" if self.part_of else self.writes_last or f"{self.name}.manifest.json"

    def manifest(self, config: Config) -> Place:
        """Where it says that it has ended."""
        root = place(config.cache_path) if self.in_cache else config.run_path / self.name
        return root / self.last

    @property
    def shape(self) -> Shape:
        """Of its manifest."""
        return MANIFEST | ASKED | dict(self.says)

    @property
    def arrays(self) -> tuple[str, ...]:
        """Names of all arrays that it may write."""
        return tuple(name for name, spec in ARRAYS.items() if spec.stage == self.name)

    def arrays_of(self, config: Config) -> tuple[str, ...]:
        """Those that it writes under a config."""
        found: tuple[str, ...] = self.loaded().arrays(config)
        return found

    def loaded(self) -> Any:
        """An instance of the class that `work` names."""
        module, _, name = self.work.partition(":")
        return getattr(importlib.import_module(module), name)()


_ENTRIES = (
    Stage(
        "extract",
        ("data", "teacher", "views", "cache"),
        None,
        also=lambda config: ("cluster",) if config.cache.tokens == STREAM else (),
        in_cache=True,
        says=EXTRACTED,
        needed=("fingerprint", "content", "text"),
    ),
    # Renewed alone when class names or templates change.
    Stage("text", ("text",), "extract", part_of="extract"),
    Stage(
        "encode",
        ("cluster.teacher", "cluster.teacher_weights"),
        "extract",
        is_in=has_second_model,
        work="pipeline.encode:Encoding",
        help="Run cluster.teacher, a second model for clustering alone, over the views that extract has drawn.",
        in_cache=True,
        says={"summary?": {"views": int}},
    ),
    Stage(
        "cluster",
        ("data", "cluster"),
        TOKENS,
        reads=("labels",),
        also=lambda config: ("cams",) if config.cluster.named_above is not None else (),
        recipe="clip_teacher",
        work="pipeline.cluster:Clustering",
        in_cache=True,
        says={"summary?": PSEUDO},
    ),
    Stage(
        "cams",
        ("data", "cams"),
        "extract",
        reads=("labels",),
        recipe="clip_es",
        work="pipeline.cams:ActivationMaps",
        in_cache=True,
        says={"summary?": MAPS},
    ),
    Stage(
        "train",
        ("data", "text", "student", "train"),
        LABELS,
        reads=("labels",),
        says=TRAINED,
        needed=("fingerprint", "student"),
    ),
    Stage("eval", ("data", "eval"), "train", reads=("labels", "test"), writes_last="metrics.json"),
    Stage("report", ("report",), "eval", writes_last="index.html"),
    Stage("figures", ("report",), "eval", recipe="clip_teacher", writes_last="clusters.png"),
)
STAGES = {stage.name: stage for stage in _ENTRIES}
ARRAYS.update({spec.name: spec for stage in _ENTRIES for spec in stage.specs})
# The stages that keep their work in the cache, shard by shard.
IN_CACHE = tuple(name for name, stage in STAGES.items() if stage.in_cache)


def labels_stage(config: Config) -> str:
    """Which stage makes the labels that training reads."""
    return next(name for name in IN_CACHE if STAGES[name].recipe == config.recipe)


def is_of(config: Config, name: str) -> bool:
    """Whether a run of this config has the stage."""
    return STAGES[name].recipe in ("", config.recipe) and STAGES[name].is_in(config)


def parts_of(name: str) -> tuple[str, ...]:
    """The stages that one makes and keeps the manifest of."""
    return tuple(part.name for part in STAGES.values() if part.part_of == name)


def in_cache(config: Config) -> tuple[str, ...]:
    """The stages of the cache that a run of this recipe has: others' labels, and what stands on these, apart."""
    found = list[str]()
    for name in IN_CACHE:  # in the order of the table: from the ground up
        if is_of(config, name) and above(config, name) in (None, *found):
            found.append(name)
    return tuple(found)


def above(config: Config, name: str) -> str | None:
    """The stage that one stands on."""
    upstream = STAGES[name].upstream
    if upstream == TOKENS:
        return "encode" if has_second_model(config) else "extract"
    return labels_stage(config) if upstream == LABELS else upstream


def all_above(config: Config, name: str) -> tuple[str, ...]:
    """The stage that one stands on, the one under that, and so on."""
    over = above(config, name)
    return () if over is None else (over, *all_above(config, over))


def below(name: str) -> tuple[str, ...]:
    """The stages of the cache that stand on one, itself first."""
    found = [name]
    for other in IN_CACHE:
        upstream = STAGES[other].upstream
        is_on_labels = upstream == LABELS and any(STAGES[made].recipe for made in found)
        if upstream in found or is_on_labels or (upstream == TOKENS and {"extract", "encode"} & {*found}):
            found.append(other)
    return tuple(found)


# ---- what a config asks of a stage, as a fingerprint ------------------------------------------------------

# A key at its default is in no fingerprint, so that a new version with one more key finds finished work finished.
# So a default that changes, or a key that gets another meaning, must raise this: then everything is made again.
MEANING = 3
SAMPLES = "samples"  # what options bear on that say which samples there are: no content where these are a fact


def asked(config: Config, stage: str, *, apart_from: str = "") -> dict[str, Any]:
    """What the config asks of `stage` itself: dotted key -> value, without keys at their defaults.

    `apart_from`: what options of the data set bear on that are left out, SAMPLES.
    """
    entries = [STAGES[name] for name in (stage, *STAGES[stage].also(config))]
    sections = {section for entry in entries for section in entry.sections}
    hidden = aside_keys() | {f"data.{option}" for option in _hidden_options(config, stage, apart_from)}
    return {
        key: value
        for key, value in settings_apart_from_defaults(config).items()
        if {key, key.partition(".")[0]} & sections and key not in hidden
    }


def data_options(config: Config, stage: str) -> dict[str, Any]:
    """The data set's options that bear on what a stage makes of one sample."""
    hidden = _hidden_options(config, stage, SAMPLES)
    return {name: value for name, value in config.data.options().items() if name not in hidden}


def _hidden_options(config: Config, stage: str, apart_from: str) -> set[str]:
    names = (stage, *STAGES[stage].also(config))
    seen = {"all", SAMPLES, *(part for name in names for part in STAGES[name].reads)} - {apart_from}
    return {name for name, option in OPTIONS.items() if option.bears_on not in seen}


def config_fingerprint(config: Config, stage: str, *, apart_from: str = "") -> str:
    """Identity of what the config asks of `stage`: what it reads itself, and the same of all stages above it."""
    upstream = above(config, stage)
    over = config_fingerprint(config, upstream, apart_from=apart_from) if upstream else MEANING
    return digest([stage, asked(config, stage, apart_from=apart_from), over])


def fingerprint(config: Config, stage: str, upstream: str | None, facts: Mapping[str, Any]) -> str:
    """Identity of what `stage` makes: config, the fingerprint found upstream, and facts about the data.

    Options that only say which samples there are don't count; the samples are a fact.
    """
    return digest([config_fingerprint(config, stage, apart_from=SAMPLES), upstream, dict(facts)])


def difference(was: Mapping[str, Any], now: Mapping[str, Any], limit: int = 3) -> str:
    """The first keys in which two `asked` differ, with both values; "" where they don't."""
    usual = defaults()
    keys = [key for key in dict.fromkeys([*now, *was]) if was.get(key) != now.get(key)]
    said = [
        f"{key} was {was.get(key, usual.get(key))!r} and is {now.get(key, usual.get(key))!r}" for key in keys[:limit]
    ]
    return "; ".join(said) + (f"; and {len(keys) - limit} more" if len(keys) > limit else "")
