# The pipeline as a table of contents: every rule is one call of cli.py.
#   snakemake --cores all                                    the demo
#   snakemake --cores all --configfile config/voc.yaml       any other run, of either recipe
#   snakemake --cores all --config set="train.lr=1e-4"       the CLI's --set, several separated by spaces; quotes around
#       a value that needs them in YAML: set="data.root='my data' cluster.sizes=[3, 7]"
#   snakemake --cores 1 --report report.html                 Snakemake's own report, the run's page in it
#   snakemake ablations --cores all                          Tables 3, 4 and 5, three seeds; --config quick=true: one
#   snakemake transfer --cores all                           Table 2: the demo's three seeds on config/demo_other.yaml. A
#       training that is missing takes as long as the demo's own (minutes), an evaluation ten seconds. Others:
#       --configfile config/coco_stuff.yaml --config on=coco_stuff_to_context on_set="data.root=..."
#   snakemake figures --cores all                            Figures 5, 6 and 7 of the run: runs/<name>/figures/
#   snakemake ablations_more --cores all                     tables beyond the paper; says their time first, with -n only that;
#                                                            --config table=lambda,tau: some of them
#   snakemake paper --cores all                              all of the paper's: Tables 2 to 5, Figures 5 to 7, the run's report
# Outputs are the small manifests that a stage writes last; the Zarr folder and its ledger are not
# declared, since Snakemake deletes declared outputs before a rerun, and the resume state with them.
# Our profile, profiles/default, resumes what was killed.
import os
import re
import shlex
import sys

from pipeline.config import UserError, from_mapping, load, preset
from pipeline.running.table import labels_stage
from pipeline.evidence.more import announced
from pipeline.evidence.variants import (
    ABLATED,
    CONTRAST,
    EVERY,
    cache_runs,
    more_tables,
    only_clip_teacher,
    run_names,
    side_by_side,
    stage_triggers,
    transfer_trigger,
    variant_runs,
)
from pipeline.snakefile import check_paths, clear_dead_locks, options, shell_words
from pipeline.terminal import visible

# The run's YAML is read by us, strictly, and not by Snakemake, whose `config` we leave alone.
CONFIGS_GIVEN = list(map(str, workflow.overwrite_configfiles or ["config/demo.yaml"]))
CONFIG = CONFIGS_GIVEN[-1]
try:
    if len(CONFIGS_GIVEN) > 1:
        raise UserError(f"one --configfile is read, and there are {len(CONFIGS_GIVEN)}: {', '.join(CONFIGS_GIVEN)}.")
    GIVEN = options(workflow.config_settings.config, sys.argv)
    SETTINGS, QUICK, TABLE, ON, ON_SETTINGS = GIVEN.settings, GIVEN.quick, GIVEN.table, GIVEN.on, GIVEN.on_settings
    RUN, OTHER = load(CONFIG, SETTINGS), load(preset(ON), ON_SETTINGS)
    check_paths(RUN)
    MORE_TABLES = more_tables(RUN, TABLE)
    if {"contrast", "ablations", "ablations_more", "transfer", "paper"} & {*sys.argv}:
        only_clip_teacher(RUN)
except UserError as error:  # one line, no traceback
    print(f"error: {visible(' '.join(str(error).split()))}", file=sys.stderr)
    sys.exit(2)
ALIVE = clear_dead_locks() if workflow.is_main_process else None
# Run name -> its settings; the run itself comes first. OWN_CACHES: those that make a cache for some variants.
RUNS = variant_runs(RUN, SETTINGS, quick=QUICK, variants=EVERY)
OWN_CACHES = cache_runs(RUN, SETTINGS)
RAW = RUN.model_dump(mode="json", by_alias=True)
TRIGGERS = {run: stage_triggers(RAW, settings) for run, settings in (RUNS | OWN_CACHES).items()}
# The user's settings are no params: a job runs again when its trigger changes, and for nothing else.
SETS = shell_words(SETTINGS)
OWN = {run: shell_words(settings[len(SETTINGS) :]) for run, settings in (RUNS | OWN_CACHES).items()}
CACHE, OUT = RUN.manifest_folder.as_posix(), RUN.runs
# Where a run's labels are: its own settings say, or it is the run's cache.
CONFIGS = {run: from_mapping(RAW, settings) for run, settings in RUNS.items()}
# Of a cache at a URL the manifests lie with the run that made it.
CACHES = {
    run: CACHE if own.cache_path == RUN.cache_path else own.manifest_folder.as_posix() for run, own in CONFIGS.items()
}
if said := announced(RUN, sys.argv, TABLE, quick=QUICK):
    print(said, file=sys.stderr)

# Every shell command begins with this: `cli STAGE` is cli.py with the run's config and the user's settings.
# `set` is Snakemake's own, which a prefix replaces.
# Every word is quoted: paths may hold blanks, quotes and what a shell would run.
PYTHON = "python" if workflow.deployment_settings.deployment_method else shlex.quote(sys.executable)  # conda brings its own
# A job ends with the Snakemake that started it, however that ends (pipeline/running/processes.py).
PREFIX = f'set -euo pipefail; export CLIPTEACHER_PARENT={os.getpid()}; cli() ( stage=$1; shift; {PYTHON} cli.py $stage --config {shlex.quote(CONFIG)} {SETS} "$@" ); '
shell.prefix(PREFIX.replace("{", "{{").replace("}", "}}"))


wildcard_constraints:
    run="|".join(map(re.escape, RUNS)),
    made="|".join(map(re.escape, OWN_CACHES)),


localrules:
    all,
    contrast,
    ablations,
    ablations_more,
    transfer,
    figures,
    paper,


rule all:
    input:
        f"{OUT}/{RUN.name}/report/index.html",


rule contrast:
    input:
        expand("{out}/{run}/eval/metrics.json", out=OUT, run=run_names(RUN, CONTRAST)),


rule ablations:
    input:
        expand("{out}/{run}/eval/metrics.json", out=OUT, run=run_names(RUN, ABLATED, quick=QUICK)),


rule ablations_more:
    input:
        [
            f"{OUT}/{run}/eval/metrics.json"
            for variants in MORE_TABLES.values()
            for run in run_names(RUN, variants, quick=QUICK)
        ],


rule transfer:
    input:
        expand("{out}/{run}/eval-on-{on}/metrics.json", out=OUT, run=run_names(RUN, ["full"]), on=OTHER.name),
    params:
        on=ON,
    log:
        f"{OUT}/{RUN.name}/logs/transfer-{OTHER.name}.log",
    conda:
        "config/environment.yaml"
    shell:
        "cli transfer --on {params.on:q} | tee {log:q}"


rule figures:
    input:
        expand("{out}/{run}/figures/clusters.png", out=OUT, run=RUN.name),


rule paper:
    input:
        rules.all.input,
        rules.ablations.input,
        rules.transfer.input,
        rules.figures.input,


rule extract:
    output:
        f"{CACHE}/extract.manifest.json",
    params:
        trigger=TRIGGERS[RUN.name]["extract"],
    log:
        f"{OUT}/{RUN.name}/logs/extract.log",
    conda:
        "config/environment.yaml"
    threads: workflow.cores
    shell:
        "cli extract --log {log:q}"


rule cluster:
    input:
        rules.extract.output,
    output:
        f"{CACHE}/cluster.manifest.json",
    params:
        trigger=TRIGGERS[RUN.name]["cluster"],
    log:
        f"{OUT}/{RUN.name}/logs/cluster.log",
    conda:
        "config/environment.yaml"
    threads: workflow.cores
    shell:
        "cli cluster --log {log:q}"


rule extract_like:
    input:
        rules.extract.output,
    output:
        f"{OUT}/{{made}}/cache/extract.manifest.json",
    params:
        own=lambda wildcards: OWN[wildcards.made],
        trigger=lambda wildcards: TRIGGERS[wildcards.made]["extract"],
    log:
        f"{OUT}/{{made}}/logs/extract.log",
    conda:
        "config/environment.yaml"
    threads: workflow.cores
    shell:
        "cli extract {params.own} --like \"$(dirname {input:q})\" --log {log:q}"


rule cluster_own:
    input:
        rules.extract_like.output,
    output:
        f"{OUT}/{{made}}/cache/cluster.manifest.json",
    params:
        own=lambda wildcards: OWN[wildcards.made],
        trigger=lambda wildcards: TRIGGERS[wildcards.made]["cluster"],
    log:
        f"{OUT}/{{made}}/logs/cluster.log",
    conda:
        "config/environment.yaml"
    threads: workflow.cores
    shell:
        "cli cluster {params.own} --log {log:q}"


rule cams:
    input:
        rules.extract.output,
    output:
        f"{CACHE}/cams.manifest.json",
    params:
        trigger=TRIGGERS[RUN.name]["cams"],
    log:
        f"{OUT}/{RUN.name}/logs/cams.log",
    conda:
        "config/environment.yaml"
    threads: workflow.cores
    shell:
        "cli cams --log {log:q}"


rule train:
    input:
        lambda wildcards: f"{CACHES[wildcards.run]}/{labels_stage(RUN)}.manifest.json",
        lambda wildcards: f"{CACHES[wildcards.run]}/extract.manifest.json",
    output:
        f"{OUT}/{{run}}/train/train.manifest.json",
    params:
        own=lambda wildcards: OWN[wildcards.run],
        trigger=lambda wildcards: TRIGGERS[wildcards.run]["train"],
    log:
        f"{OUT}/{{run}}/logs/train.log",
    conda:
        "config/environment.yaml"
    threads: lambda wildcards: 1 if side_by_side() and wildcards.run != RUN.name else workflow.cores
    shell:
        "cli train {params.own} $([ {threads} = 1 ] && echo --set train.threads=1) --log {log:q}"


rule eval:
    input:
        rules.train.output,
    output:
        f"{OUT}/{{run}}/eval/metrics.json",
    params:
        own=lambda wildcards: OWN[wildcards.run],
        trigger=lambda wildcards: TRIGGERS[wildcards.run]["eval"],
    log:
        f"{OUT}/{{run}}/logs/eval.log",
    conda:
        "config/environment.yaml"
    threads: workflow.cores
    shell:
        "cli eval {params.own} --log {log:q}"


rule eval_on:
    input:
        rules.train.output,
    output:
        f"{OUT}/{{run}}/eval-on-{OTHER.name}/metrics.json",
    params:
        own=lambda wildcards: OWN[wildcards.run],
        on=" ".join(["--on", shlex.quote(ON), shell_words(ON_SETTINGS, "--on-set")]).strip(),
        trigger=lambda wildcards: transfer_trigger(TRIGGERS[wildcards.run]["eval"], OTHER),
    log:
        f"{OUT}/{{run}}/logs/eval-on-{OTHER.name}.log",
    conda:
        "config/environment.yaml"
    threads: workflow.cores
    shell:
        "cli eval {params.own} {params.on} --log {log:q}"


rule report:
    input:
        rules.eval.output,
    output:
        report(f"{OUT}/{{run}}/report/index.html", category="runs", labels={"run": "{run}"}),
    params:
        own=lambda wildcards: OWN[wildcards.run],
        trigger=lambda wildcards: TRIGGERS[wildcards.run]["report"],
    log:
        f"{OUT}/{{run}}/logs/report.log",
    conda:
        "config/environment.yaml"
    threads: workflow.cores
    shell:
        "cli report {params.own} --log {log:q}"


rule draw:
    input:
        rules.eval.output,
    output:
        report(f"{OUT}/{{run}}/figures/clusters.png", category="figures", labels={"run": "{run}"}),
    params:
        own=lambda wildcards: OWN[wildcards.run],
        trigger=lambda wildcards: TRIGGERS[wildcards.run]["report"],
    log:
        f"{OUT}/{{run}}/logs/figures.log",
    conda:
        "config/environment.yaml"
    threads: workflow.cores
    shell:
        "cli figures {params.own} --log {log:q}"
