"""Result tables of finished runs: printed, and kept in the repository, from their metrics.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import Config, UserError
from pipeline.evidence.contrasts import Contrast, contrast
from pipeline.evidence.pages import Table, console, keep_metrics, made_where
from pipeline.evidence.variants import CONTRAST, QUICK_SEEDS, SEEDS, VARIANTS, run_name

KEYS = ("pAcc", "mIoU_S", "mIoU_U", "hIoU")
HEADS = ("pAcc", "mIoU(S)", "mIoU(U)", "hIoU")


def read_metrics(path: Path) -> dict[str, Any] | None:
    """The metrics of an evaluation, or None when there are none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def result_table(results: dict[str, dict[str, Any]]) -> Table:
    """Run by run: pAcc, mIoU(S), mIoU(U), hIoU in percent at the configured gamma; pAcc, mIoU of closed sets."""
    is_closed = all(result.get("unseen") == [] for result in results.values())
    keys, heads = (KEYS[:2], ("run", "pAcc", "mIoU")) if is_closed else (KEYS, ("run", *HEADS, "gamma"))
    lines = []
    for name, result in results.items():
        values = ["-" if (value := result[key]) is None else f"{value:.1f}" for key in keys]
        lines.append([name, *values] if is_closed else [name, *values, f"{result['gamma']:g}"])
    return Table("test images, percent", heads, lines)


def print_results(runs: Sequence[Path]) -> None:
    """The table of the runs that were evaluated, and where the first one's report lies."""
    found = {run.name: m for run in runs if (m := read_metrics(run / "eval" / "metrics.json")) is not None}
    for path in (path for run in runs for path in sorted(run.glob("eval-on-*/metrics.json"))):
        if (m := read_metrics(path)) is not None:
            found[f"{path.parts[-3]} on {path.parent.name.removeprefix('eval-on-')}"] = m
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
    """The metrics of the variants' runs that were evaluated, in the order given and of the seeds."""
    found: Results = {}
    for variant in variants:
        for seed in QUICK_SEEDS if quick else SEEDS:
            run = Path(config.runs) / run_name(config, variant, seed, quick=quick)
            if (metrics := read_metrics(run / "eval" / "metrics.json")) is not None:
                found.setdefault(variant, {})[seed] = metrics
    return found


def mean_and_spread(seeds: dict[int, dict[str, Any]], key: str) -> str:
    values = [metrics[key] for metrics in seeds.values()]
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def lift_of_glm(results: Results) -> Contrast | None:
    """By how many points of mIoU(U) the full method leads the one without GLM; None unless both were run."""
    full, without = ([m["mIoU_U"] for m in results.get(name, {}).values()] for name in ("full", "glm_off"))
    return contrast(full, without) if full and without else None


def print_contrast(config: Config) -> None:
    """The contrast's table: means and standard deviations over the seeds that were run, and GLM's lift."""
    results = results_of(config)
    if not results:
        raise UserError(f"no contrast run of {config.name!r} is evaluated. Run `make demo-contrast` first.")
    out = console()
    lines = [
        [c, str(len(seeds)), *(mean_and_spread(seeds, key) for key in KEYS)] for c, seeds in results.items()
    ]
    out.print(Table("mean ± std over seeds", ("training", "seeds", *HEADS), lines).drawn())
    if (lift := lift_of_glm(results)) is not None:
        spread = "" if lift.spread is None else f"; the larger spread is {lift.spread:.1f}"
        out.print(f"GLM lifts mIoU(U) by {lift.difference:+.1f} points{spread}: {lift.verdict}")


# --- what stands in the repository ----------------------------------------------------------------

README = Path("README.md")
BEGIN, END = "<!-- results: written by `cli.py contrast --keep` -->", "<!-- end of results -->"


def keep_contrast(config: Config, root: Path = Path()) -> None:
    """Copies the contrast's metrics into docs/results/, and writes README's section and the test log from them.

    Raises: UserError when nothing was evaluated, or README has no place for the section.
    """
    results = results_of(config)
    if not results:
        raise UserError(f"no contrast run of {config.name!r} is evaluated. Run `make demo-contrast` first.")
    readme = root / README
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{readme}: has no lines {BEGIN!r} and {END!r}. Put them where the results belong.")
    keep_metrics(
        {f"{config.name}-{c}-{seed}": m for c, seeds in results.items() for seed, m in seeds.items()}, root
    )
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{results_section(results)}{END}{after}", encoding="utf-8")


def results_section(results: Results) -> str:
    """README's words and table for a contrast, all numbers from its metrics.json files."""
    first = next(iter(next(iter(results.values())).values()))
    rows = [
        [VARIANTS[c].label, str(len(seeds)), *(mean_and_spread(seeds, key) for key in KEYS)]
        for c, seeds in results.items()
    ]
    lines = [
        f"{first['num_images']} test scenes whose seed was fixed before any training, gamma {first['gamma']:g}, "
        "percent; mean ±",
        "standard deviation over the training seeds. metrics.json of every run is in docs/results/, the evaluations",
        "are logged in docs/test-log.md.",
        f"{made_where(first)}.",
        "",
        *Table("", ("training", "seeds", *HEADS), rows).markdown(),
    ]
    if 0 in results.get("full", {}):
        own = ", ".join(f"{key} {results['full'][0][key]:.1f}" for key in KEYS)
        lines += ["", f"    make demo             # the first seed: {own}"]
        lines += ["    make demo-contrast    # the whole table"]
    lift = lift_of_glm(results)
    if lift is not None and lift.spread is not None:
        word = "more" if lift.difference > lift.spread else "not more"
        lines += [
            "",
            f"GLM lifts mIoU(U) by {lift.difference:+.1f} points, {word} than the larger spread, {lift.spread:.1f} "
            "(the paper's",
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
        lines.append([VARIANTS[variant].label, *(f"{unseen:.0f} / {both:.0f}" for unseen, both in means)])
    return Table(title, ("mIoU(U) / hIoU at gamma", *gammas), lines)
