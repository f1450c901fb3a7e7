"""Result tables of finished runs: printed, and kept in the repository, from their metrics.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cache.errors import CacheError
from cache.files import write_text
from cache.ledger import read_manifest
from pipeline.config import Config, UserError
from pipeline.evidence.contrasts import Contrast, contrast
from pipeline.evidence.pages import Table, console, keep_metrics, made_where
from pipeline.evidence.variants import CONTRAST, EVERY, QUICK_SEEDS, SEEDS, only_clip_teacher, run_name
from pipeline.looking.facts import SCORES, found_metrics

KEYS, HEADS = tuple(SCORES), tuple(SCORES.values())
# What evaluations that share a table have in common.
ALIKE = (
    "gamma",
    "num_images",
    "unseen",
    "mode",
    "flip",
    "scales",
    "stride",
    "several_names",
)


def read_metrics(path: Path) -> dict[str, Any] | None:
    """The metrics of an evaluation, or None when there are none that can be read."""
    try:
        return found_metrics(path)
    except CacheError:
        return None


def stale(run: Path, metrics: Mapping[str, Any]) -> str:
    """A mark where the student that was evaluated is no longer the run's: " (stale: ...)", else nothing."""
    trained = read_manifest(run / "train" / "train.manifest.json")
    if trained is None:
        return " (stale: the run's training has not ended)" if (run / "train").is_dir() else ""
    return "" if metrics.get("student") == trained.get("fingerprint") else " (stale: of another student)"


def result_table(results: dict[str, dict[str, Any]]) -> Table:
    """Run by run: pAcc, mIoU(S), mIoU(U), hIoU in percent at the configured gamma; pAcc, mIoU of closed sets."""
    is_closed = all(result.get("unseen") == [] for result in results.values())
    keys, heads = (KEYS[:2], ("run", "pAcc", "mIoU")) if is_closed else (KEYS, ("run", *HEADS, "gamma"))
    lines = []
    for name, result in results.items():
        values = ["-" if (value := result[key]) is None else f"{value:.1f}" for key in keys]
        lines.append([name, *values] if is_closed else [name, *values, f"{result['gamma']:g}"])
    left_out = {name: said for name, result in results.items() if (said := _scored(result))}
    title = "test images, percent"
    if len(results) == 1 and left_out:
        title += f"; {next(iter(left_out.values()))} classes scored"
    elif left_out:  # what isn't a mean over all classes says so beside its name
        title += "; (classes scored)"
        lines = [[f"{name} ({left_out[name]})" if name in left_out else name, *line] for name, *line in lines]
    return Table(title, heads, lines)


def _scored(result: Mapping[str, Any]) -> str:
    """How many classes have a score, "" where all have, or an older evaluation didn't count them."""
    groups = result.get("scored") or {}
    if all(group["occur"] == group["classes"] for group in groups.values()):
        return ""
    said = []
    for name, group in groups.items():
        if group["classes"]:
            absent = group["scored"] - group["occur"]  # predicted where they aren't: 0 in the mean
            more = f" ({absent} without a test pixel)" if absent else ""
            said.append(f"{group['scored']} of {group['classes']} {name}{more}")
    return ", ".join(said)


def print_results(runs: Sequence[Path]) -> None:
    """The table of the runs that were evaluated, and where the first one's report lies."""
    names = [run.name for run in runs]
    labels = {run: run.name if names.count(run.name) == 1 else run.as_posix() for run in runs}
    found = {}
    for run, label in labels.items():
        if (m := read_metrics(run / "eval" / "metrics.json")) is not None:
            found[f"{label}{stale(run, m)}"] = m
    for run, label in labels.items():
        for path in sorted(run.glob("eval-on-*/metrics.json")):
            if (m := read_metrics(path)) is not None:
                found[f"{label} on {path.parent.name.removeprefix('eval-on-')}{stale(run, m)}"] = m
    if not found:
        raise UserError(
            f"none of {', '.join(map(str, runs))} holds eval/metrics.json. Run `cli.py eval` first."
        )
    out = console()
    out.print(result_table(found).drawn())
    for run in runs:
        page = run / "report" / "index.html"
        if page.is_file():
            out.print(f"report: {page.as_posix()}")


Results = dict[str, dict[int, dict[str, Any]]]  # by contrast and seed, the metrics


def results_of(config: Config, variants: Iterable[str] = CONTRAST, *, quick: bool = False) -> Results:
    """The metrics of the variants' runs that were evaluated, in the order given and of the seeds.

    Raises: UserError for another recipe, and for evaluations that can't share a table.
    """
    only_clip_teacher(config)
    found: Results = {}
    for variant in variants:
        for seed in QUICK_SEEDS if quick else SEEDS:
            run = Path(config.runs) / run_name(config, variant, seed, quick=quick)
            if (metrics := read_metrics(run / "eval" / "metrics.json")) is not None:
                found.setdefault(variant, {})[seed] = metrics
    check_alike(config, [metrics for seeds in found.values() for metrics in seeds.values()])
    return found


def check_alike(config: Config, found: Sequence[Mapping[str, Any]]) -> None:
    """Raises: UserError where evaluations differ in what must not, or a score is missing."""
    if any(metrics[key] is None for metrics in found for key in KEYS):
        raise UserError(
            f"{config.name!r} has no seen or no unseen class that was scored, and these tables want both. Name a split "
            "in its config (data.unseen or data.split); `cli.py results` prints what there is."
        )
    for key in ALIKE:
        values = list(dict.fromkeys(json.dumps(metrics.get(key)) for metrics in found))
        if len(values) > 1:
            raise UserError(
                f"runs of {config.name!r} were evaluated with {key} {values[0]} and {values[1]}: no average. Run "
                "`cli.py eval` of all with one config."
            )
    if len({tuple(metrics.get("gamma_sweep") or ()) for metrics in found}) > 1:
        raise UserError(
            f"runs of {config.name!r} were evaluated with other eval.gamma_sweep. Evaluate all with one."
        )


def mean_and_spread(seeds: Mapping[int, Mapping[str, Any]], key: str) -> str:
    values = [metrics[key] for metrics in seeds.values()]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def row_of(label: str, seeds: Mapping[int, Mapping[str, Any]], keys: Sequence[str] = KEYS) -> list[str]:
    """A table's line: label, number of seeds, mean and spread of each score."""
    return [label, str(len(seeds)), *(mean_and_spread(seeds, key) for key in keys)]


def lift_of_glm(results: Results) -> Contrast | None:
    """By how many points of mIoU(U) the full method leads the one without GLM; None unless both were run."""
    full, without = ([m["mIoU_U"] for m in results.get(name, {}).values()] for name in ("full", "glm_off"))
    return contrast(full, without) if full and without else None


def print_contrast(config: Config) -> None:
    """The contrast's table: means and standard deviations over the seeds that were run, and GLM's lift."""
    results = results_of(config)
    if not results:
        raise UserError(
            f"no contrast run of {config.name!r} is evaluated. Run `snakemake contrast --cores all` with its config "
            "first."
        )
    out = console()
    lines = [row_of(EVERY[c].label, seeds) for c, seeds in results.items()]
    out.print(Table("mean ± std over seeds", ("training", "seeds", *HEADS), lines).drawn())
    if (lift := lift_of_glm(results)) is not None:
        spread = "" if lift.spread is None else f"; the larger spread is {lift.spread:.1f}"
        out.print(f"GLM lifts mIoU(U) by {lift.difference:+.1f} points{spread}: {lift.verdict}")


# --- what stands in the repository ----------------------------------------------------------------

README, DEMO = Path("README.md"), "demo"
BEGIN, END = "<!-- results: written by `cli.py contrast --keep` -->", "<!-- end of results -->"


def keep_contrast(config: Config, root: Path = Path()) -> None:
    """Copies the contrast's metrics into docs/results/, and writes README's section and the test log from them.

    Raises: UserError when nothing was evaluated, or README has no place for the section.
    """
    results = results_of(config)
    if not results:
        raise UserError(f"no contrast run of {config.name!r} is evaluated. Run `make demo-contrast` first.")
    if config.name != DEMO:
        raise UserError(
            f"--keep writes README's section, which is the demo's, and this is {config.name!r}. Leave it out."
        )
    readme = root / README
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{readme}: has no lines {BEGIN!r} and {END!r}. Put them where the results belong.")
    keep_metrics(config.name, results, root)
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    write_text(readme, f"{before}{BEGIN}\n{results_section(results)}{END}{after}")


def results_section(results: Results) -> str:
    """README's words and table for a contrast, all numbers from its metrics.json files."""
    first = next(iter(next(iter(results.values())).values()))
    rows = [row_of(EVERY[c].label, seeds) for c, seeds in results.items()]
    lines = [
        f"{first['num_images']} test scenes whose seed was fixed before any training, gamma {first['gamma']:g}, "
        "percent; mean ±",
        "standard deviation over the training seeds. metrics.json of every run is in docs/results/, the evaluations",
        "are logged in docs/test-log.md.",
        f"{made_where(m for seeds in results.values() for m in seeds.values())}.",
        "",
        *Table("", ("training", "seeds", *HEADS), rows).markdown(),
    ]
    if 0 in results.get("full", {}):
        own = ", ".join(
            f"{head} {results['full'][0][key]:.1f}" for head, key in zip(HEADS, KEYS, strict=True)
        )
        lines += ["", f"    make demo             # the full method's first seed: {own}"]
        lines += ["    make demo-contrast    # the whole table"]
    lift = lift_of_glm(results)
    if lift is not None and lift.spread is not None:
        word = "more" if abs(lift.difference) > lift.spread else "not more"
        lines += [
            "",
            f"GLM changes mIoU(U) by {lift.difference:+.1f} points, {word} than the larger spread, "
            f"{lift.spread:.1f} (the paper's",
            "Table 3, on PASCAL Context: 8.6 to 50.7).",
        ]
    if all(m["gamma_sweep"] for seeds in results.values() for m in seeds.values()):
        lines += ["", *sweep_table(results).markdown()]
    return "\n".join(lines) + "\n"


def sweep_table(results: Results, title: str = "") -> Table:
    """mIoU(U) and hIoU by gamma, means over the seeds: shown as a sweep, nothing is chosen from it."""
    gammas = list(next(iter(next(iter(results.values())).values()))["gamma_sweep"])
    lines = []
    for variant, seeds in results.items():
        sweeps = [metrics["gamma_sweep"] for metrics in seeds.values()]
        means = [[statistics.mean(sweep[g][key] for sweep in sweeps) for key in KEYS[2:]] for g in gammas]
        lines.append([EVERY[variant].label, *(f"{unseen:.0f} / {both:.0f}" for unseen, both in means)])
    return Table(title, ("mIoU(U) / hIoU at gamma", *gammas), lines)
