"""The paper's main claim, what GLM adds on unseen classes: printed, and the demo's kept in README."""

from __future__ import annotations

from pathlib import Path

from cache.files import write_text
from evidence.pages import keep_metrics, made_where, markdown, refuse_to_lose
from evidence.scores import Results, results_of, row_of, sweep_table
from evidence.variants import CONTRAST, DEMO, EVERY, THE_DEMO, Asked
from evidence.verdicts import Contrast, contrast
from pipeline.config import Config, UserError
from pipeline.looking.results import HEADS, KEYS, Table, console

README = Path("README.md")
BEGIN, END = "<!-- results: written by `python -m evidence contrast --keep` -->", "<!-- end of results -->"


def lift_of_glm(results: Results) -> Contrast | None:
    """By how many points of mIoU(U) the full method leads the one without GLM; None unless both were run."""
    full, without = ([m["mIoU_U"] for m in results.get(name, {}).values()] for name in ("full", "glm_off"))
    return contrast(full, without) if full and without else None


def collect(config: Config, asked: Asked = THE_DEMO) -> Results:
    """What was evaluated. Raises: UserError when nothing was, or it can't share a table."""
    if not (results := results_of(config)):
        raise UserError(f"no contrast run of {config.name!r} is evaluated. Run `{asked.snakemake('contrast')}` first.")
    return results


def print_contrast(results: Results) -> None:
    """The contrast's table: means and standard deviations over the seeds that were run, and GLM's lift."""
    out = console()
    lines = [row_of(EVERY[c].label, seeds) for c, seeds in results.items()]
    out.print(Table("mean ± std over seeds", ("training", "seeds", *HEADS), lines).drawn())
    if (lift := lift_of_glm(results)) is not None:
        spread = "" if lift.spread is None else f"; the larger spread is {lift.spread:.1f}"
        out.print(f"GLM lifts mIoU(U) by {lift.difference:+.1f} points{spread}: {lift.verdict}")


def keep_contrast(config: Config, results: Results, root: Path = Path(), asked: Asked = THE_DEMO) -> None:
    """Copies the contrast's metrics into evidence/results/, and writes README's section and the test log from them.

    Raises: UserError when kept results are not among them, or README has no place for the section.
    """
    if config.name != DEMO:
        raise UserError(
            f"--keep writes README's section, which is the demo's, and this is {config.name!r}. Leave it out."
        )
    readme = root / README
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{readme}: has no lines {BEGIN!r} and {END!r}. Put them where the results belong.")
    refuse_to_lose(config.name, CONTRAST, results, root, asked.snakemake("contrast"))
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
        "standard deviation over the training seeds. metrics.json of every run is in evidence/results/, the",
        "evaluations are logged in evidence/test-log.md.",
        f"{made_where(m for seeds in results.values() for m in seeds.values())}.",
        "",
        *markdown(Table("", ("training", "seeds", *HEADS), rows)),
    ]
    if 0 in results.get("full", {}):
        own = ", ".join(f"{head} {results['full'][0][key]:.1f}" for head, key in zip(HEADS, KEYS, strict=True))
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
        lines += ["", *markdown(sweep_table(results))]
    return "\n".join(lines) + "\n"
