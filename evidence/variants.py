"""One run and its variants: the same cache, seeds and budget, a part of the method taken away or exchanged.

The variants share the run's cache, so that the teacher and the clusters are computed once for all of them. Those that
change what is cached have a cache of their own, which takes over the teacher's part where that is the same.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import Config, UserError, as_mapping, digest, from_mapping
from pipeline.config.reading import Unreadable, read_yaml
from pipeline.data.words import SEVERAL

SNAKEMAKE = "snakemake -s evidence/Snakefile"  # as messages and pages name it
DEMO, DEMO_OTHER = ("demo", "demo_other")  # whose pages have no name in their file's; the demo's own other data set


@dataclass(frozen=True)
class Variant:
    """A row of a table: its name there, and what it changes."""

    label: str
    settings: tuple[str, ...] = ()

    @property
    def has_own_cache(self) -> bool:
        return any(setting.startswith(CACHE_SECTIONS) for setting in self.settings)


CACHE_SECTIONS = ("views.", "cluster.", "cache.")  # that say what is in a cache
NO_LENGTH = "train.glm_length=null"  # only attention knows how long a CLS token is
VARIANTS = {
    "full": Variant("full method"),
    "glm_off": Variant("without GLM", ("train.glm=off", NO_LENGTH)),
    "seen_only": Variant(
        "seen labels only (no GLM, no potential objects)", ("train.glm=off", NO_LENGTH, "train.potential=false")
    ),
    "nel_off": Variant("without focal and dice", ("train.nel=off",)),
    "ce_off": Variant("without cross-entropy", ("train.weights.ce=0",)),
    "generate_off": Variant("without L_generate", ("train.generate=false",)),
    "glm_max": Variant("GLM by max pooling", ("train.glm=max", NO_LENGTH)),
    "glm_mean": Variant("GLM by mean pooling", ("train.glm=mean", NO_LENGTH)),
    "vla_mlp": Variant("VLA an MLP", ("train.vla=mlp",)),
    "vla_original": Variant("no VLA, original features", ("train.vla=original",)),
}
# Beyond the paper: what it leaves open, and what only a cache makes possible.
MORE = {
    "lambda_0.7": Variant("lambda 0.7", ("cluster.threshold=0.7",)),
    "lambda_0.9": Variant("lambda 0.9", ("cluster.threshold=0.9",)),
    "sizes_3": Variant("3 x 3 windows alone", ("cluster.sizes=[3]",)),
    "sizes_7": Variant("7 x 7 windows alone", ("cluster.sizes=[7]",)),
    "window_tokens": Variant("windows of s tokens (other reading of eq. 4-5)", ("cluster.window=tokens",)),
    "iterations_1": Variant("one iteration of K-means", ("cluster.iterations=1",)),
    "iterations_5": Variant("five iterations of K-means", ("cluster.iterations=5",)),
    "euclidean": Variant("K-means with Euclidean distance", ("cluster.distance=euclidean",)),
    "length_own": Variant("CLS tokens as long as the teacher made them (eq. 1 as printed)", (NO_LENGTH,)),
    "tau_0.03": Variant("tau 0.03", ("train.tau=0.03",)),
    "tau_0.2": Variant("tau 0.2", ("train.tau=0.2",)),
    "bank_0": Variant("no bank, negatives from the batch", ("train.bank=0",)),
    "bank_8": Variant("bank of 8 iterations", ("train.bank=8",)),
    "bank_96": Variant("bank of 96 iterations: an epoch, all images, of the demo", ("train.bank=96",)),
    "negatives_192": Variant(
        "192 negatives from the whole cache: as many as the demo's bank of 24", ("train.negatives=192",)
    ),
    "negatives_768": Variant("768 negatives from the whole cache: the demo's every image", ("train.negatives=768",)),
    "potentials_image": Variant("potential objects of the image alone compete", ("train.potentials=image",)),
    "potentials_batch": Variant("potential objects of the batch compete (eq. 9)", ("train.potentials=batch",)),
    "nel_seen": Variant("focal and dice on seen classes", ("train.nel=seen",)),
    "nel_all": Variant("focal and dice on potential objects too", ("train.nel=all",)),
    "views_1": Variant("the first cached view alone", ("train.views=1",)),
    "views_2": Variant("the first two cached views", ("train.views=2",)),
    "views_4": Variant("four cached views", ("views.num=4",)),
    "views_8": Variant("eight cached views", ("views.num=8",)),
    "tokens_int8": Variant("tokens kept as int8", ("cache.tokens=int8",)),
}
EVERY = VARIANTS | MORE
GAMMA = "gamma"  # this table needs no training of its own: every evaluation sweeps gamma
MORE_TABLES: dict[str, tuple[str, ...]] = {
    "lambda": ("lambda_0.7", "lambda_0.9"),
    "windows": ("sizes_3", "sizes_7", "window_tokens"),
    "iterations": ("iterations_1", "iterations_5"),
    "distance": ("euclidean",),
    GAMMA: (),
    "length": ("length_own",),
    "tau": ("tau_0.03", "tau_0.2"),
    "bank": ("bank_0", "bank_8", "bank_96", "negatives_192", "negatives_768"),
    "potentials": ("potentials_image", "potentials_batch"),
    "nel": ("nel_seen", "nel_all"),
    "views": ("views_1", "views_2", "views_4", "views_8"),
    "tokens": ("tokens_int8",),  # streamed ones end in the same labels, bit for bit (docs/cache.md)
}
SEEDS = (0, 1, 2)
CONTRAST = ("full", "glm_off", "seen_only")  # what the paper's main claim rests on (Table 3)
# The paper's ablations and their hIoU on PASCAL Context, SegFormer-B0, 20k iterations.
TABLES: dict[str, dict[str, float]] = {
    "Table 3, components": {"full": 45.4, "nel_off": 44.6, "ce_off": 38.4, "glm_off": 13.2, "generate_off": 45.2},
    "Table 4, GLM": {"full": 45.4, "glm_max": 35.5, "glm_mean": 42.0},
    "Table 5, VLA": {"full": 45.4, "vla_mlp": 45.2, "vla_original": 45.1},
}
ABLATED = tuple(dict.fromkeys(variant for rows in TABLES.values() for variant in rows))
# One seed and a fifth of the iterations: to see that everything runs, not to see a difference.
QUICK_SEEDS, QUICK_SHARE = (0,), 5


@dataclass(frozen=True)
class Asked:
    """What a command line names beside its target, and its words again, for pages and messages."""

    config: str = ""  # "" for the demo's
    settings: tuple[str, ...] = ()
    quick: bool = False
    table: str = ""
    on: str = DEMO_OTHER
    on_settings: tuple[str, ...] = ()

    def snakemake(self, target: str) -> str:
        """The command that makes a table's runs."""
        given = {
            "set": " ".join(self.settings),
            "quick": "true" if self.quick else "",
            "table": self.table,
            "on": "" if self.on == DEMO_OTHER else self.on,
            "on_set": " ".join(self.on_settings),
        }
        words = [shlex.quote(f"{key}={value}") for key, value in given.items() if value]
        configfile = f" --configfile {shlex.quote(self.config)}" if self.config else ""
        return f"{SNAKEMAKE} {target} --cores all{configfile}{' --config ' if words else ''}{' '.join(words)}"

    def evidence(self, command: str) -> str:
        """The command that prints the table."""
        on = "" if self.on == DEMO_OTHER else self.on
        options = [("--config", self.config), *(("--set", setting) for setting in self.settings), ("--on", on)]
        options += [("--on-set", setting) for setting in self.on_settings]
        return f"python -m evidence {command}" + "".join(f" {key} {shlex.quote(v)}" for key, v in options if v)


THE_DEMO = Asked()


def run_name(config: Config, variant: str, seed: int, *, quick: bool = False) -> str:
    """The run of one variant and seed; the run itself stands for its own seed of the full method."""
    if quick:
        return f"{config.name}-quick-{variant}-{seed}"
    is_itself = not EVERY[variant].settings and seed == config.train.seed
    return config.name if is_itself else f"{config.name}-{variant}-{seed}"


def run_names(config: Config, variants: Iterable[str], *, quick: bool = False) -> list[str]:
    """The runs of some variants, all seeds."""
    seeds = QUICK_SEEDS if quick else SEEDS
    return [run_name(config, variant, seed, quick=quick) for variant in variants for seed in seeds]


def variant_runs(
    config: Config, *, quick: bool = False, variants: Mapping[str, Variant] = VARIANTS
) -> dict[str, tuple[str, ...]]:
    """Run names and what each sets beyond the run: itself, then each variant and seed, on its cache or their own."""
    runs: dict[str, tuple[str, ...]] = {config.name: ()}
    shorter = (f"train.iterations={max(config.train.iterations // QUICK_SHARE, 1)}",) if quick else ()
    for variant, changed in variants.items():
        cache = own_cache(config, variant) or config.cache_path
        for seed in QUICK_SEEDS if quick else SEEDS:
            name = run_name(config, variant, seed, quick=quick)
            where = text_setting("cache.path", cache.as_posix() if isinstance(cache, Path) else cache)
            own = (*changed.settings, *shorter, text_setting("name", name), where, f"train.seed={seed}")
            runs.setdefault(name, own)
    return runs


def side_by_side() -> bool:
    """Whether variants train at the same time, a core each: without a GPU two small students on two cores end sooner
    than one after the other on both (5 minutes a pair of the demo's, 3.5 each). On a GPU one at a time.
    """
    return not shutil.which("nvidia-smi")


def own_cache(config: Config, variant: str) -> Path | None:
    """The cache of a variant that changes what is cached, of all its seeds; None for those on the run's."""
    if not EVERY[variant].has_own_cache:
        return None
    return Path(config.runs) / f"{config.name}-cache-{variant}" / "cache"


def cache_runs(config: Config) -> dict[str, tuple[str, ...]]:
    """The runs that only make such caches, and what each sets beyond the run."""
    found = {}
    for variant, changed in MORE.items():
        if (cache := own_cache(config, variant)) is not None:
            name = cache.parent.name
            where = text_setting("cache.path", cache.as_posix())
            found[name] = (*changed.settings, text_setting("name", name), where)
    return found


def text_setting(key: str, text: str) -> str:
    """A setting that reads back as this text: in quotes where YAML would find something else in it."""
    try:
        is_plain = read_yaml(text, where=key) == text
    except Unreadable:
        is_plain = False
    return f"{key}={text if is_plain else json.dumps(text, ensure_ascii=False)}"


def varied(config: Config, settings: Iterable[str]) -> Config:
    """The config with some settings changed."""
    return from_mapping(as_mapping(config), settings)


def more_tables(config: Config, only: str = "") -> dict[str, tuple[str, ...]]:
    """The tables beyond the paper, or those named (`lambda,tau`), without variants that are what the run is already.

    Raises: UserError for a table that isn't there.
    """
    wanted = only.split(",") if only else list(MORE_TABLES)
    if strange := [table for table in wanted if table not in MORE_TABLES]:
        raise UserError(f"table {strange[0]!r}: there are {', '.join(MORE_TABLES)}.")
    return {
        table: ("full", *(name for name in names if _differs(varied(config, MORE[name].settings), config)))
        for table, names in MORE_TABLES.items()
        if table in wanted
    }


def _differs(other: Config, config: Config) -> bool:
    """Whether training would: the first two of two cached views are all of them, of one there are no two."""
    first = other.train.views
    if first is not None and first != config.train.views and first >= other.views.num:
        return False
    return other != config


def only_clip_teacher(config: Config) -> None:
    """Raises: UserError for another recipe, whose losses know none of the parts that variants take away."""
    if config.recipe != "clip_teacher":
        raise UserError(
            f"these tables vary parts of recipe clip_teacher; {config.name} is {config.recipe}. `cli.py results` "
            "prints its scores."
        )


def yes_or_no(options: Mapping[str, str], key: str) -> bool:
    """An option of `snakemake --config` that is true or false, false if it isn't given. Raises: UserError."""
    text = options.get(key, "").lower()
    if text not in ("", "true", "false"):
        raise UserError(f"--config {key}={options[key]}: want true or false.")
    return text == "true"


def transfer_trigger(of_eval: str, other: Config) -> str:
    """The same of an evaluation on another config's data set: of it, data and text count."""
    return digest(
        [of_eval, other.name, other.data.model_dump(mode="json"), other.text.model_dump(mode="json"), SEVERAL]
    )
