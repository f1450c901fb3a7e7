"""One command a stage; every stage reads the same YAML and meets the others only in the cache.

    python cli.py extract --config config/demo.yaml --set views.num=4

Importing this file loads no torch: each command imports its stage when it runs. A user's mistake
ends in one line and exit code 2; a traceback is a bug.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="CLIPTeacher: a frozen CLIP run once, cached, teaches any segmenter the classes it has no labels for.",
)

ConfigOption = Annotated[Path, typer.Option("--config", "-c", help="the run's YAML, or a preset by name")]
SetOption = Annotated[list[str], typer.Option("--set", "-s", help="override a key: train.lr=1e-4; may be repeated")]
LogOption = Annotated[Path | None, typer.Option("--log", help="write what is printed to this file too")]
WorkersOption = Annotated[
    int, typer.Option("--workers", min=0, help="dask processes on this machine; 0 runs in this one")
]
SchedulerOption = Annotated[str | None, typer.Option("--scheduler", help="a dask scheduler, tcp://host:port")]
# Groups of the commands, as --help shows them.
STAGES, USE, LOOK, DATA = "Stages of a run", "Use a student", "Look at a run", "Data and machine"
DEFAULT = Path("config/demo.yaml")
INTERRUPTED = 130  # exit code: 128 + SIGINT
# Typer's own family of errors about options, whether it brings its click or has the package.
ClickException: Any = next(kin for kin in typer.BadParameter.__mro__ if kin.__name__ == "ClickException")


def _finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is not a finite number.")
    return value


def _version(wanted: bool) -> None:
    if wanted:
        from pipeline.config import version

        typer.echo(f"clipteacher {version()}")
        raise typer.Exit


def _quiet(context: typer.Context, is_quiet: bool) -> None:
    if is_quiet and not context.resilient_parsing:
        from pipeline.running.console import quiet

        context.with_resource(quiet())


@app.callback()
def everywhere(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="print the version and end")
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            "-q",
            callback=_quiet,
            expose_value=False,
            help="no progress, only results, warnings and errors; before or after the command",
        ),
    ] = False,
) -> None:
    """The options of the program itself; --quiet is one of every command, too."""


def _echo(text: object, **options: Any) -> None:
    from pipeline.terminal import visible

    typer.echo(visible(text), **options)


def _load(config: Path, settings: list[str], log: Path | None = None, has_run: bool = False):
    """The config, or None beside a run folder, which has its own."""
    from pipeline.config import UserError, load
    from pipeline.running.console import log_to

    if has_run and (settings or config != DEFAULT):
        raise UserError("--config and --set are in the place of a run folder, which has its own config.yaml.")
    if log:
        log_to(log)
    return None if has_run else load(config, settings)


@app.command(rich_help_panel=STAGES)
def extract(
    config: ConfigOption = DEFAULT,
    set_: SetOption = [],  # noqa: B006 - typer copies it
    workers: WorkersOption = 0,
    scheduler: SchedulerOption = None,
    audit: Annotated[int, typer.Option(min=0, help="recompute this many random rows and compare, instead")] = 0,
    like: Annotated[
        Path | None, typer.Option(help="begin a new cache as this one, by hard links, if extraction is the same")
    ] = None,
    renew: Annotated[bool, typer.Option("--renew", help="make the shards again whose images have changed")] = False,
    log: LogOption = None,
) -> None:
    """Run the frozen teacher once over the training images: views, CLS, dense tokens, text features."""
    settings = _load(config, set_, log)
    if like:
        from pipeline.teaching.takeover import take_over

        take_over(like, settings)  # says whether it does
    from pipeline import extract as stage
    from pipeline.running.console import say

    stage.extract(settings, workers=workers, scheduler=scheduler, renew=renew)
    if audit:
        say(stage.audit(settings, audit))


@app.command(rich_help_panel=STAGES)
def cluster(
    config: ConfigOption = DEFAULT,
    set_: SetOption = [],  # noqa: B006
    workers: WorkersOption = 0,
    scheduler: SchedulerOption = None,
    log: LogOption = None,
) -> None:
    """Find potential objects in the ignored area: multi-scale K-means and mask fusion."""
    settings = _load(config, set_, log)
    from pipeline import cluster as stage

    stage.print_summary(stage.cluster(settings, workers=workers, scheduler=scheduler)["summary"])


@app.command(rich_help_panel=STAGES)
def cams(
    config: ConfigOption = DEFAULT,
    set_: SetOption = [],  # noqa: B006
    workers: WorkersOption = 0,
    scheduler: SchedulerOption = None,
    text: Annotated[list[str], typer.Option("--text", help="find this in --image, instead; may be repeated")] = [],  # noqa: B006
    image: Annotated[Path | None, typer.Option("--image", help="the image that --text is about")] = None,
    out: Annotated[Path, typer.Option(help="the picture that --text writes")] = Path("refined.png"),
    log: LogOption = None,
) -> None:
    """CLIP-ES: refined class activation maps from image-level labels, in place of cluster; or of free text."""
    settings = _load(config, set_, log)
    if text or image:
        from pipeline.config import ConfigError
        from pipeline.refer import refer

        if not text or image is None:
            raise ConfigError("--text and --image belong together: what to look for, and where.")
        refer(settings, text, image, out)
        return
    from pipeline import cams as stage
    from pipeline.teaching.seeds import print_summary

    print_summary(stage.cams(settings, workers=workers, scheduler=scheduler)["summary"])


@app.command(rich_help_panel=STAGES)
def prompts(
    config: ConfigOption = DEFAULT,
    set_: SetOption = [],  # noqa: B006
    templates: Annotated[
        list[str], typer.Option("--templates", help='a named set, or a template "a {} ..."; may be repeated')
    ] = ["clip80"],  # noqa: B006
    log: LogOption = None,
) -> None:
    """Rank prompt templates by CLIP-ES's sharpness on the cached images, and write the best into the run folder."""
    settings = _load(config, set_, log)
    from pipeline import prompts as stage

    stage.select_prompt(settings, templates)


@app.command(rich_help_panel=STAGES)
def train(
    config: ConfigOption = DEFAULT,
    set_: SetOption = [],  # noqa: B006
    log: LogOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the plan, from ten steps in memory; write nothing")
    ] = False,
) -> None:
    """Train the student from the cache: GLM, VLA, cross-entropy, focal and dice. Resumes by itself."""
    from pipeline.running import processes

    settings = _load(config, set_, log if processes.is_main() else None)
    if (settings.train.processes or 1) > 1 and not dry_run and not processes.is_launched():
        processes.start(settings.train.processes)
        return
    from pipeline import train as stage

    if dry_run:
        stage.plan(settings)
    else:
        stage.train(settings)


@app.command(name="eval", rich_help_panel=STAGES)
def evaluate(
    config: ConfigOption = DEFAULT,
    set_: SetOption = [],  # noqa: B006
    on: Annotated[
        str | None, typer.Option("--on", help="another data set: a preset of config/ by name, or a YAML")
    ] = None,
    on_set: Annotated[
        list[str], typer.Option("--on-set", help="override a key of it: data.root=...; may be repeated")
    ] = [],  # noqa: B006
    log: LogOption = None,
) -> None:
    """Evaluate the student on the test images: pAcc, mIoU(S), mIoU(U), hIoU, per class, over gamma."""
    settings = _load(config, set_, log)
    from pipeline.config import ConfigError

    if on_set and on is None:
        raise ConfigError("--on-set belongs to --on: it changes the config named there.")
    other = None if on is None else _load(Path(on), on_set)
    from pipeline import evaluate as stage

    if other is None:
        stage.evaluate(settings)
    else:
        stage.evaluate_on(settings, other)


@app.command(rich_help_panel=USE)
def predict(
    images: Annotated[
        list[str],
        typer.Argument(help="files, folders, patterns ('photos/**/*.jpg'), or - for a list on standard input"),
    ],
    run: Annotated[Path, typer.Option(help="a run folder or a checkpoint")] = Path("runs/demo"),
    names: Annotated[
        str | None,
        typer.Option(
            help='class names, synonyms by |: "sofa|couch,cat"; default: the run\'s. A name with a comma is one of the '
            "run's, or in double quotes: '\"road, street\",water'"
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for overlays and masks; a folder's structure is kept in it")] = Path(
        "predictions"
    ),
    gamma: Annotated[
        float | None,
        typer.Option(
            callback=_finite, help="added to the logits of names never labelled in training; default: the run's"
        ),
    ] = None,
    reject: Annotated[
        float | None,
        typer.Option(
            callback=_finite,
            help="'none of these', the mask's largest value, where the best name's score is below this; the score is "
            "the sigmoid of its logit with gamma, 0 to 1 (a learned classifier's: the largest softmax)",
        ),
    ] = None,
    mode: Annotated[
        str | None, typer.Option(help="whole, or slide for finer detail in large images; default: the run's")
    ] = None,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="also NAME.probabilities.npy: float16 (K, H, W), softmax")
    ] = False,
) -> None:
    """Segment any images with any class names: overlays with a legend, and indexed masks. Resumes by itself."""
    from pipeline import predict as stage
    from pipeline.data.inputs import pictures
    from pipeline.running.console import say

    wanted = stage.Wanted(names, gamma, reject, mode, probabilities)
    found = pictures(images, sys.stdin, results=stage.RESULTS, tell=lambda line: say(f"predict: {line}"))
    # A bar on a terminal draws what is printed above itself, and would take it from a pipe.
    paper = None if sys.stdout.isatty() else sys.stdout
    for overlay, mask in stage.predict(run, found, out, wanted):
        _echo(f"{overlay}  {mask}", file=paper)


@app.command(rich_help_panel=USE)
def demo(
    run: Annotated[Path, typer.Argument(help="a run folder or a checkpoint")],
    host: Annotated[
        str, typer.Option(help="address to bind; beyond this machine (0.0.0.0: all of its own) with a token")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port")] = 7860,
) -> None:
    """Open a page on this machine: an image, any names, and what is found. Needs `make page`."""
    from pipeline import demo as stage

    stage.serve(run, host, port)


@app.command(rich_help_panel=USE)
def export(
    run: Annotated[Path, typer.Argument(help="a run folder or a checkpoint")],
    out: Annotated[Path, typer.Option(help="the file to write")] = Path("student.onnx"),
    size: Annotated[
        int | None, typer.Option(help="fix height and width, for students that need it; default: any")
    ] = None,
) -> None:
    """Write the student as ONNX: sides of multiples of 32, any classes (text features are an input), no CLIP."""
    from pipeline import export as stage

    stage.export(run, out, size)


@app.command(rich_help_panel=LOOK)
def inspect(
    run: Annotated[Path, typer.Argument(help="a run folder")],
    image: Annotated[str | None, typer.Option("--image", help="only this sample")] = None,
    class_: Annotated[str | None, typer.Option("--class", help="only images that hold this class")] = None,
    png: Annotated[Path | None, typer.Option("--png", help="write the panels as one PNG instead of the report")] = None,
    export: Annotated[
        Path | None, typer.Option("--export", help="write pseudo labels, or CLIP-ES's masks, as indexed PNGs")
    ] = None,
    shard: Annotated[
        int | None, typer.Option("--shard", help="print one shard instead: samples, sizes, checksums, origin")
    ] = None,
) -> None:
    """Look into a run: the cache's tree, and an HTML report of labels, pseudo labels and predictions."""
    from pipeline import report as stage

    stage.inspect(run, image=image, class_name=class_, png=png, export=export, shard=shard)


@app.command(rich_help_panel=LOOK)
def report(
    runs: Annotated[list[Path] | None, typer.Argument(help="run folders, side by side; or --config")] = None,
    config: ConfigOption = DEFAULT,
    set_: SetOption = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="the page to write, of run folders")] = None,
    log: LogOption = None,
) -> None:
    """Write a run's HTML report: runs/<name>/report/index.html; or one page of several runs side by side."""
    settings = _load(config, set_, log, has_run=bool(runs))
    from pipeline import report as stage

    if runs:
        stage.report_runs(runs, out)
    elif out:
        raise stage.UserError("--out belongs to run folders: `cli.py report runs/demo --out page.html`.")
    else:
        stage.report(settings)


@app.command(rich_help_panel=LOOK)
def figures(
    run: Annotated[Path | None, typer.Argument(help="a run folder; or --config")] = None,
    config: ConfigOption = DEFAULT,
    set_: SetOption = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="folder; default: figures/ of the run")] = None,
    log: LogOption = None,
) -> None:
    """Draw the paper's Figures 5, 6 and 7 of a run, and what clustering found, as small PNGs."""
    settings = _load(config, set_, log, has_run=run is not None)
    from pipeline import report as stage

    stage.draw_figures(settings if run is None else stage.config_of(run), out)


@app.command(rich_help_panel=DATA)
def verify(config: ConfigOption = DEFAULT, set_: SetOption = []) -> None:  # noqa: B006
    """Check a cache: checksums, coverage, finiteness, fingerprints. Exit code 2 when something is found."""
    settings = _load(config, set_)
    from pipeline.verify import verify as check

    findings = check(settings)
    for finding in findings:
        _echo(f"{finding.kind}: {finding}")
    if findings:
        _echo(f"{len(findings)} findings in {settings.cache_path}", err=True)
        raise typer.Exit(2)
    _echo(f"{settings.cache_path}: sound")


@app.command(rich_help_panel=DATA)
def prepare(
    kind: Annotated[
        str, typer.Argument(help="voc, context, context459, coco14, ade847: as published; folder: a tool's export")
    ],
    root: Annotated[
        Path | None,
        typer.Option("--root", help="the data set's folder, the data.root of a config; of folder: beside the export"),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--source", help="voc: SBD's folder; context: the JSON, or the folder of .mat (of context459)"),
    ] = None,
    coco: Annotated[Path | None, typer.Option("--coco", help="folder: instances as COCO's JSON")] = None,
    colours: Annotated[
        Path | None, typer.Option("--colours", help="folder: a map of masks' colours, YAML or CVAT's labelmap.txt")
    ] = None,
    binary: Annotated[
        str | None, typer.Option("--binary", help="folder: masks of 0 and 255, which is this class")
    ] = None,
    label_studio: Annotated[
        Path | None, typer.Option("--label-studio", help="folder: Label Studio's brush PNGs, beside --tasks")
    ] = None,
    supervisely: Annotated[Path | None, typer.Option("--supervisely", help="folder: a project of Supervisely")] = None,
    roboflow: Annotated[Path | None, typer.Option("--roboflow", help="folder: an export of Roboflow")] = None,
    images: Annotated[Path | None, typer.Option("--images", help="the folder of the images, which stay there")] = None,
    masks: Annotated[Path | None, typer.Option("--masks", help="the folder of the masks")] = None,
    mask_suffix: Annotated[str, typer.Option("--mask-suffix", help="what masks' names have before their ending")] = "",
    tasks: Annotated[Path | None, typer.Option("--tasks", help="Label Studio's export as JSON")] = None,
    part: Annotated[str, typer.Option("--part", help="train or test: what the images are for")] = "train",
    test: Annotated[float, typer.Option("--test", help="hold out this share of the images for testing")] = 0.0,
    background: Annotated[
        bool, typer.Option("--background", help="what nothing is drawn on is a class, background, not unlabelled")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what another export has made there")] = False,
) -> None:
    """Convert published annotations, or a labelling tool's export, to indexed masks and lists. Resumes by itself."""
    from pipeline import prepare as stage
    from pipeline.data.asked import Asked

    asked = Asked(
        coco=coco,
        colours=colours,
        binary=binary,
        label_studio=label_studio,
        supervisely=supervisely,
        roboflow=roboflow,
        images=images,
        masks=masks,
        tasks=tasks,
        mask_suffix=mask_suffix,
        part=part,
        test=test,
        background=background,
    )
    if kind != "folder":
        if asked != Asked() or overwrite:
            raise stage.DataError(
                f"prepare {kind}: takes --root and --source; the other options are those of `folder`."
            )
        stage.prepare(kind, root, source)
        return
    if source:
        raise stage.DataError(
            "prepare folder: --source is nothing for it; name the export by its format, as by --coco."
        )
    path = stage.prepare_folder(asked, root, overwrite=overwrite)
    from pipeline.doctor import examine_folder

    complaints = examine_folder(path)
    for complaint in complaints:
        _echo(str(complaint))
    if complaints:
        raise typer.Exit(2)


@app.command(rich_help_panel=DATA)
def doctor(
    config: ConfigOption = DEFAULT,
    set_: SetOption = [],  # noqa: B006
    dry: Annotated[bool, typer.Option("--dry", help="look at no data set; counts from the config")] = False,
    every: Annotated[bool, typer.Option("--all", help="open every image and mask, not 64 of each part")] = False,
) -> None:
    """Say what a run will cost, and what of machine and data would stop or spoil it. Exit code 2 if anything."""
    settings = _load(config, set_)
    from pipeline.doctor import SAMPLE
    from pipeline.doctor import doctor as examine

    complaints = examine(settings, dry=dry, most=sys.maxsize if every else SAMPLE)
    for complaint in complaints:
        _echo(str(complaint))
    if complaints:
        raise typer.Exit(2)


@app.command(rich_help_panel=LOOK)
def results(runs: Annotated[list[Path], typer.Argument(help="run folders; those not evaluated are left out")]) -> None:
    """Print the result table of one or more runs."""
    from pipeline.looking.results import print_results

    print_results(runs)


def _add_stages() -> None:
    """The standard command of each stage of the table that has none here."""
    from pipeline.running import table

    known = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    for entry in table.STAGES.values():
        if entry.work and entry.name not in known:
            app.command(entry.name, help=entry.help, rich_help_panel=STAGES)(_standard(entry.name))


def _standard(name: str) -> Any:
    def command(
        config: ConfigOption = DEFAULT,
        set_: SetOption = [],  # noqa: B006
        workers: WorkersOption = 0,
        scheduler: SchedulerOption = None,
        log: LogOption = None,
    ) -> None:
        settings = _load(config, set_, log)
        from pipeline.running.console import say
        from pipeline.running.shards import run_stage

        summary = run_stage(name, settings, workers=workers, scheduler=scheduler)["summary"]
        say(f"{name}: {', '.join(f'{value} {key}' for key, value in summary.items())}")

    return command


def main(commands: typer.Typer = app) -> None:
    """Runs a command line of `commands`: these, or those of `python -m evidence`."""
    from cache.errors import CacheError
    from pipeline.config import UserError
    from pipeline.running.processes import end_with_parent
    from pipeline.terminal import complain

    end_with_parent()
    if commands is app:
        _add_stages()
    try:
        done = _command(commands)(standalone_mode=False)  # an exit code, or what a command returns
        code = done if isinstance(done, int) else 0
    except (UserError, CacheError) as error:
        code = complain(error)
    except OSError as error:  # disk full, no permission: the system's word and the path it names
        code = complain(f"{error.filename or 'writing'}: {error.strerror or error}. Make room or mend permissions.")
    except ClickException as error:
        code = _misused(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except typer.Abort:  # the input ended
        code = complain("standard input ended before the command did.")
    sys.exit(complain("interrupted; the same command resumes.", INTERRUPTED) if code == INTERRUPTED else code)


def _command(commands: typer.Typer | Any) -> Any:
    """What click runs, --quiet an option of each command and not of the program alone; else what is called as it is."""
    if not isinstance(commands, typer.Typer):
        return commands
    group: Any = typer.main.get_command(commands)
    quiet = next(option for option in group.params if option.name == "quiet")
    for command in group.commands.values():
        command.params.append(quiet)
    return group


def _misused(error: Any) -> int:
    """A command or an option that isn't there, or a value that doesn't fit it. Without any, help has been printed."""
    from pipeline.terminal import complain

    if type(error).__name__ != "NoArgsIsHelpError":
        said = error.format_message().rstrip(".")
        where = error.ctx.command_path if getattr(error, "ctx", None) else "cli.py"
        complain(f"{said}{'' if said.endswith('?') else '.'} `{where} --help` says what there is.")
    return error.exit_code


if __name__ == "__main__":
    main()
