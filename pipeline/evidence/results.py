"""Result tables of finished runs: printed, and kept in the repository, from their metrics.json."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.config import Config, UserError
from pipeline.evidence.variants import CONTRAST, QUICK_SEEDS, SEEDS, VARIANTS, run_name

KEYS = ("pAcc", "mIoU_S", "mIoU_U", "hIoU")


def read_metrics(path: Path) -> dict[str, Any] | None:
    """The metrics of an evaluation, or None when there are none that can be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def result_table(results: dict[str, dict[str, Any]]) -> Table:
    """Run by run: pAcc, mIoU(S), mIoU(U), hIoU in percent at the configured gamma; pAcc, mIoU of closed sets."""
    if all(result.get("unseen") == [] for result in results.values()):
        table = Table("run", "pAcc", "mIoU", title="test images, percent")
        for name, result in results.items():
            table.add_row(name, *("-" if (v := result[key]) is None else f"{v:.1f}" for key in KEYS[:2]))
        return table
    table = Table("run", "pAcc", "mIoU(S)", "mIoU(U)", "hIoU", "gamma", title="test images, percent")
    for name, result in results.items():
        values = (result[key] for key in ("pAcc", "mIoU_S", "mIoU_U", "hIoU"))
        table.add_row(name, *("-" if v is None else f"{v:.1f}" for v in values), f"{result['gamma']:g}")
    return table


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
    out = Console(highlight=False, soft_wrap=True)
    out.print(result_table(found))
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


def lift_of_glm(results: Results) -> tuple[float, float] | None:
    """By how many points of mIoU(U) the full method leads the one without GLM, and the larger spread.

    None unless both have at least two seeds: without a spread nothing can be said.
    """
    sides = [[m["mIoU_U"] for m in results.get(name, {}).values()] for name in ("full", "glm_off")]
    if min(map(len, sides)) < 2:
        return None
    full, without = sides
    spread = max(statistics.stdev(full), statistics.stdev(without))
    return statistics.mean(full) - statistics.mean(without), spread


def print_contrast(config: Config) -> None:
    """The contrast's table: means and standard deviations over the seeds that were run, and GLM's lift."""
    results = results_of(config)
    if not results:
        raise UserError(f"no contrast run of {config.name!r} is evaluated. Run `make demo-contrast` first.")
    table = Table("training", "seeds", "pAcc", "mIoU(S)", "mIoU(U)", "hIoU", title="mean ± std over seeds")
    for contrast, seeds in results.items():
        table.add_row(contrast, str(len(seeds)), *(mean_and_spread(seeds, key) for key in KEYS))
    out = Console(highlight=False, soft_wrap=True)
    out.print(table)
    if (found := lift_of_glm(results)) is not None:
        lift, spread = found
        word = "shown" if lift > spread else "not resolved"
        out.print(f"GLM lifts mIoU(U) by {lift:+.1f} points; the larger spread is {spread:.1f}: {word}")


# --- what stands in the repository ----------------------------------------------------------------

KEPT, README, TEST_LOG = Path("docs/results"), Path("README.md"), Path("docs/test-log.md")
BEGIN, END = "<!-- results: written by `cli.py contrast --keep` -->", "<!-- end of results -->"


def keep_contrast(config: Config, root: Path = Path()) -> None:
    """Copies the contrast's metrics into docs/results/, and writes README's section and the test log from them.

    Raises: UserError when nothing was evaluated, or README has no place for the section.
    """
    results = results_of(config)
    if not results:
        raise UserError(f"no contrast run of {config.name!r} is evaluated. Run `make demo-contrast` first.")
    readme, log = root / README, root / TEST_LOG
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{readme}: has no lines {BEGIN!r} and {END!r}. Put them where the results belong.")
    (root / KEPT).mkdir(parents=True, exist_ok=True)
    logged = log.read_text(encoding="utf-8")
    for contrast, seeds in results.items():
        for seed, metrics in seeds.items():
            name = f"{config.name}-{contrast}-{seed}"
            (root / KEPT / f"{name}.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
            if metrics["fingerprint"] not in logged:
                made, scores = metrics["made"], " / ".join(f"{metrics[key]:.1f}" for key in KEYS[1:])
                logged += f"| {made['date']} | {name} | {made['revision']} | {scores} | {metrics['fingerprint']} |\n"
    log.write_text(logged, encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{results_section(results)}{END}{after}", encoding="utf-8")


def results_section(results: Results) -> str:
    """README's words and table for a contrast, all numbers from its metrics.json files."""
    first = next(iter(next(iter(results.values())).values()))
    made, num = first["made"], first["num_images"]
    lines = [
        f"{num} test scenes whose seed was fixed before any training, gamma {first['gamma']:g}, percent; mean ±",
        "standard deviation over the training seeds. metrics.json of every run is in docs/results/, the evaluations",
        "are logged in docs/test-log.md.",
        f"{made['date']}, {made['machine']}, torch {made['torch']}, revision {made['revision']}.",
        "",
        "| training | seeds | pAcc | mIoU(S) | mIoU(U) | hIoU |",
        "|---|---|---|---|---|---|",
    ]
    for contrast, seeds in results.items():
        cells = " | ".join(mean_and_spread(seeds, key) for key in KEYS)
        lines.append(f"| {VARIANTS[contrast].label} | {len(seeds)} | {cells} |")
    if 0 in results.get("full", {}):
        own = ", ".join(f"{key} {results['full'][0][key]:.1f}" for key in KEYS)
        lines += ["", f"    make demo             # the first seed: {own}"]
        lines += ["    make demo-contrast    # the whole table"]
    if (found := lift_of_glm(results)) is not None:
        lift, spread = found
        word = "more" if lift > spread else "not more"
        lines += [
            "",
            f"GLM lifts mIoU(U) by {lift:+.1f} points, {word} than the larger spread, {spread:.1f} (the paper's",
            "Table 3, on PASCAL Context: 8.6 to 50.7).",
        ]
    return "\n".join([*lines, *sweep_lines(results)]) + "\n"


def sweep_lines(results: Results) -> list[str]:
    """mIoU(U) and hIoU by gamma, means over the seeds: shown as a sweep, nothing is chosen from it."""
    sweeps = {c: [m["gamma_sweep"] for m in seeds.values()] for c, seeds in results.items()}
    if not all(sweep for parts in sweeps.values() for sweep in parts):
        return []
    gammas = list(next(iter(sweeps.values()))[0])
    lines = ["", f"| mIoU(U) / hIoU at gamma | {' | '.join(gammas)} |", "|---" * (len(gammas) + 1) + "|"]
    for contrast, parts in sweeps.items():
        means = [[statistics.mean(part[g][key] for part in parts) for key in KEYS[2:]] for g in gammas]
        cells = " | ".join(f"{unseen:.0f} / {both:.0f}" for unseen, both in means)
        lines.append(f"| {VARIANTS[contrast].label} | {cells} |")
    return lines
