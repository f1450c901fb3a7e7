# The pipeline as a table of contents: every rule is one call of cli.py, and its name is a target.
#   snakemake --cores all                                    the demo
#   snakemake --cores all --configfile config/voc.yaml       any other run, of either recipe
#   snakemake --cores all --config set="train.lr=1e-4"       the CLI's --set, several separated by blanks; quotes around
#       a value that needs them in YAML: set="data.root='my data' cluster.sizes=[3, 7]"
#   snakemake figures --cores all                            Figures 5, 6 and 7 of the run: runs/<name>/figures/
#   snakemake --cores 1 --report report.html                 Snakemake's own report, the run's page in it
# The paper's tables, which compare many runs, are evidence/Snakefile's; it includes this one.
# Outputs are the small manifests that a stage writes last; the Zarr folder and its ledger are not
# declared, since Snakemake deletes declared outputs before a rerun, and the resume state with them.
# Our profile, profiles/default, resumes what was killed.
import os
import shlex
import sys

from pipeline.config import load
from pipeline.snakefile import (
    check_paths,
    clear_dead_locks,
    mistakes_end_it,
    one_config_file,
    options,
    shell_words,
    split_settings,
    stage_files,
    stage_triggers,
)

with mistakes_end_it():
    # The run's YAML is read by us, strictly, and not by Snakemake, whose `config` we leave alone.
    CONFIG = one_config_file(workflow.overwrite_configfiles)
    # Where evidence/Snakefile includes this one, its KNOWN says which other options there are.
    OPTIONS = options(workflow.config_settings.config_args, globals().get("KNOWN", ("set",)))
    SETTINGS = split_settings(OPTIONS.get("set", ""))
    RUN = load(CONFIG, SETTINGS)
    check_paths(RUN)
ALIVE = clear_dead_locks() if workflow.is_main_process else None
# A job runs again when its trigger changes, and for nothing else: the user's settings are no params.
TRIGGERS = stage_triggers(RUN)
CACHE, OUT = RUN.manifest_folder.as_posix(), f"{RUN.runs}/{RUN.name}"
# Stage -> the files that it stands on, and the one that it writes last: extract, cluster and cams, train, eval,
# report, figures, and what else the table of stages has (pipeline/running/table.py).
STAGES = stage_files(RUN)
SHOWN = {"report": "runs", "figures": "figures"}  # in Snakemake's own report, by category

# Every shell command begins with this: `cli STAGE` is cli.py with the run's config and the user's settings, each word
# quoted, since paths may hold blanks, quotes and what a shell would run. `set` is Snakemake's own, which a prefix
# replaces. A job ends with the Snakemake that started it, however that ends (pipeline/running/processes.py).
PYTHON = "python" if workflow.deployment_settings.deployment_method else shlex.quote(sys.executable)  # conda brings its own
ASKED = f"--config {shlex.quote(CONFIG)} {shell_words(SETTINGS)}"
PREFIX = f'set -euo pipefail; export CLIPTEACHER_PARENT={os.getpid()}; cli() ( stage=$1; shift; {PYTHON} cli.py $stage {ASKED} "$@" ); '
shell.prefix(PREFIX.replace("{", "{{").replace("}", "}}"))


localrules:
    all,


rule all:
    input:
        STAGES["report"][1],


for stage, (above, made) in STAGES.items():

    rule:
        name:
            stage
        input:
            above,
        output:
            report(made, category=SHOWN[stage], labels={"run": RUN.name}) if stage in SHOWN else made,
        params:
            stage=stage,
            trigger=TRIGGERS[stage],
        log:
            f"{OUT}/logs/{stage}.log",
        conda:
            "config/environment.yaml"
        threads: workflow.cores
        shell:
            "cli {params.stage} --log {log:q}"
