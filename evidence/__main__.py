"""Tables of many runs beside the paper's: what `snakemake -s evidence/Snakefile` has trained and evaluated.

    python -m evidence contrast --config config/demo.yaml

Options, errors and exit codes are those of cli.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from cli import DEFAULT, ConfigOption, SetOption, everywhere, main
from evidence.variants import DEMO_OTHER, Asked
from pipeline.config import UserError, load

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="The paper's tables, and those beyond it, from the runs of evidence/Snakefile.",
)
app.callback()(everywhere)


@app.command()
def contrast(
    config: ConfigOption = DEFAULT,
    set_: SetOption = [],  # noqa: B006 - typer copies it
    keep: Annotated[
        bool, typer.Option("--keep", help="write evidence/results/, evidence/test-log.md and README's table")
    ] = False,
) -> None:
    """Print the contrast table: with GLM, without GLM, seen labels only; means and spreads over seeds."""
    from evidence.contrast import collect, keep_contrast, print_contrast

    settings, asked = load(config, set_), _asked(config, set_)
    results = collect(settings, asked)
    print_contrast(results)
    if keep:
        keep_contrast(settings, results, asked=asked)


@app.command()
def ablations(
    config: ConfigOption = DEFAULT,
    set_: SetOption = [],  # noqa: B006
    quick: Annotated[bool, typer.Option("--quick", help="those of `snakemake ... quick=true`")] = False,
    more: Annotated[bool, typer.Option("--more", help="the tables beyond the paper instead")] = False,
    table: Annotated[str, typer.Option(help="some of these: lambda,windows,tau, ...")] = "",
    keep: Annotated[
        bool, typer.Option("--keep", help="write evidence/ablations.md (or -more.md) and evidence/results/")
    ] = False,
) -> None:
    """Print the paper's Tables 3, 4 and 5 beside ours, and whether each contrast has the paper's sign."""
    from evidence.ablations import collect

    settings = load(config, set_)
    if keep and (quick or table):
        raise UserError("--keep writes whole pages, of full runs: leave out --quick and --table.")
    found = collect(settings, _asked(config, set_, quick=quick, table=table), more=more or bool(table))
    found.show()
    if keep:
        found.keep()


@app.command()
def transfer(
    config: ConfigOption = DEFAULT,
    set_: SetOption = [],  # noqa: B006
    on: Annotated[str, typer.Option("--on", help="the other data set, as eval's")] = DEMO_OTHER,
    on_set: Annotated[list[str], typer.Option("--on-set", help="override a key of it, as eval's")] = [],  # noqa: B006
    keep: Annotated[bool, typer.Option("--keep", help="write evidence/transfer.md and evidence/results/")] = False,
) -> None:
    """Print the paper's Table 2 beside ours: one data set's students on another, and each contrast's sign."""
    from evidence.transfer import collect

    asked = _asked(config, set_, on=on, on_settings=tuple(on_set))
    found = collect(load(config, set_), load(on, on_set), asked)
    found.show()
    if keep:
        found.keep()


def _asked(config: Path, settings: list[str], **options: Any) -> Asked:
    return Asked("" if config == DEFAULT else config.as_posix(), tuple(settings), **options)


if __name__ == "__main__":
    main(app)
