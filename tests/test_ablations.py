"""The paper's tables beside ours: verdicts by hand, run names, and what is written."""

import json
import re
import subprocess
import sys

import pytest
from PIL import Image

from evidence.ablations import collect, rows
from evidence.more import announced, cache_seconds, foretold
from evidence.variants import (
    ABLATED,
    CONTRAST,
    EVERY,
    MORE,
    MORE_TABLES,
    TABLES,
    VARIANTS,
    Asked,
    cache_runs,
    more_tables,
    own_cache,
    run_names,
    variant_runs,
    varied,
    yes_or_no,
)
from evidence.verdicts import AS_PAPER, OPPOSITE, RESOLVED, UNRESOLVED, Contrast
from pipeline.config import UserError, from_mapping, load
from pipeline.running.table import config_fingerprint
from pipeline.snakefile import stage_triggers
from pipeline.teaching.takeover import take_over
from tests.conftest import ROOT, TINY, is_one_line_error

SNAKEMAKE = [sys.executable, "-m", "snakemake", "-s", "evidence/Snakefile"]


def results(**hious):
    return {variant: {i: {"hIoU": v} for i, v in enumerate(values)} for variant, values in hious.items()}


def test_verdicts_by_hand():
    table = TABLES["Table 3, components"]
    # full: mean 50, std 1. Without GLM: 30, std 2, so -20 > 2 and the paper's sign (-32.2). Without cross-entropy
    # 55, std 1: +5, the paper says -7. Without L_generate 49, std 3: -1 is less than 3.
    found = rows(
        table, results(full=[49, 50, 51], glm_off=[28, 30, 32], ce_off=[54, 55, 56], generate_off=[46, 49, 52])
    )
    assert [(row.variant, row.contrast, row.paper) for row in found] == [
        ("full", None, 45.4),
        ("ce_off", Contrast(5, 1, OPPOSITE), 38.4),
        ("glm_off", Contrast(-20, 2, AS_PAPER), 13.2),
        ("generate_off", Contrast(-1, 3, UNRESOLVED), 45.2),
    ]
    assert [row.paper_difference for row in found[1:]] == pytest.approx([-7.0, -32.2, -0.2])
    (_, alone) = rows(table, results(full=[50, 51], glm_off=[20]))
    assert alone.contrast.verdict == "not resolved (one seed)"
    assert rows(table, results(glm_off=[20])) == []


def test_beyond_the_paper_a_difference_is_resolved_or_not():
    found = rows(
        dict.fromkeys(("full", "tau_0.2", "bank_0")),
        results(full=[49, 50, 51], **{"tau_0.2": [59, 60], "bank_0": [50]}),
    )
    assert [row.contrast.verdict for row in found[1:]] == [RESOLVED, "not resolved (one seed)"]
    (_, near) = rows(dict.fromkeys(("full", "bank_0")), results(full=[49, 50, 51], bank_0=[49, 51]))
    assert near.contrast.verdict == UNRESOLVED


def test_every_variant_is_a_config_of_its_own_on_one_cache():
    config = load("config/demo.yaml", ["train.lr=0.001"])
    runs = variant_runs(config)
    assert set(runs) == set(run_names(config, VARIANTS))
    configs = {name: varied(config, settings) for name, settings in runs.items()}
    assert {c.cache_path for c in configs.values()} == {config.cache_path}
    assert {c.train.lr for c in configs.values()} == {0.001}
    assert configs["demo-vla_mlp-2"].train.vla == "mlp"
    assert configs["demo-vla_mlp-2"].train.seed == 2
    sections = {json.dumps(c.train.model_dump(mode="json"), sort_keys=True) for c in configs.values()}
    assert len(sections) == len(runs) == 3 * len(VARIANTS)
    assert set(run_names(config, CONTRAST)) < set(runs)


def test_quick_runs_are_fewer_shorter_and_of_other_names():
    config = load("config/demo.yaml")
    quick = variant_runs(config, quick=True)
    names = run_names(config, ABLATED, quick=True)
    assert names[0] == "demo-quick-full-0"
    assert set(names) < set(quick)
    assert f"train.iterations={config.train.iterations // 5}" in quick["demo-quick-vla_mlp-0"]


def test_tables_are_written_from_metrics(tmp_path, run_evidence):
    config = load("config/demo.yaml", [f"runs={tmp_path}/runs"])
    with pytest.raises(
        UserError,
        match=r"no run of 'demo' is evaluated yet. Run `snakemake -s evidence/Snakefile ablations --cores all` first",
    ):
        collect(config)
    made = {"date": "2026-01-02", "machine": "2 x a processor", "torch": "2.9", "revision": "abc"}
    for run, value in (("demo", 40.0), ("demo-full-1", 44.0), ("demo-glm_max-0", 30), ("demo-glm_max-1", 31)):
        folder = config.run_path.with_name(run) / "eval"
        folder.mkdir(parents=True)
        scores = {"pAcc": 90.0, "mIoU_S": 50.0, "mIoU_U": value, "hIoU": value}
        more = {"gamma": 1.5, "gamma_sweep": {}, "num_images": 7, "fingerprint": run, "made": made}
        (folder / "metrics.json").write_text(json.dumps(scores | more))
    collect(config).keep(tmp_path)
    path = tmp_path / "evidence" / "ablations.md"
    page = path.read_text()
    assert "![hIoU against the full method's](ablations.png)" in page
    with Image.open(path.with_suffix(".png")) as picture:
        assert picture.width > 600
    assert "| full method | 2 | 50.0 ± 0.0 | 42.0 ± 2.8 | 42.0 ± 2.8 |  | 45.4 |  |  |" in page
    assert "| 30.5 ± 0.7 | -11.5 | 35.5 | -9.9 | as in the paper |" in page
    assert json.loads((tmp_path / "evidence/results/demo-glm_max-1.json").read_text())["hIoU"] == 31
    path.write_text(page.replace("42.0 ± 2.8", "old") + "\n## What it says\n\nMax loses places.\n")
    collect(config).keep(tmp_path)  # numbers are written anew, words stay, the log has each evaluation once
    assert path.read_text() == page + "\n## What it says\n\nMax loses places.\n"
    log = (tmp_path / "evidence/test-log.md").read_text()
    assert log.count("| demo-glm_max-1 | abc | 50.0 / 31.0 / 31.0 |") == 1
    done = run_evidence("ablations", "--set", f"runs={tmp_path}/runs")
    assert done.returncode == 0, done.stderr
    assert re.search(r"GLM by max pooling +│ 2 +│ .*│ 30.5 ± 0.7 +│ -11.5", done.stdout), "no number is left out"
    with pytest.raises(
        UserError, match=r"no variant of 'demo' .*ablations_more --cores all --config table=lambda,tau` first"
    ):
        collect(config, Asked(table="lambda,tau"), more=True)
    assert is_one_line_error(run_evidence("ablations", "--quick", "--keep"), "leave out --quick")


def test_what_can_not_share_a_table_is_refused(tmp_path):
    config = load("config/demo.yaml", [f"runs={tmp_path}/runs"])

    def evaluated(run, **more):
        folder = config.run_path.with_name(run) / "eval"
        folder.mkdir(parents=True, exist_ok=True)
        scores = {"pAcc": 90.0, "mIoU_S": 50.0, "mIoU_U": 40.0, "hIoU": 45.0, "gamma": 1.5, "num_images": 7}
        (folder / "metrics.json").write_text(json.dumps(scores | {"gamma_sweep": {}} | more))

    evaluated("demo")
    evaluated("demo-full-1", gamma=0)
    with pytest.raises(UserError, match=r"evaluated with gamma 1.5 and 0"):
        collect(config)
    evaluated("demo-full-1", gamma_sweep={"0": {"mIoU_U": 1.0, "hIoU": 2.0}})
    with pytest.raises(UserError, match=r"other eval.gamma_sweep"):
        collect(config)
    evaluated("demo-full-1", mIoU_U=None, hIoU=None)
    with pytest.raises(UserError, match=r"data.unseen"):
        collect(config)
    with pytest.raises(UserError, match="demo_clip_es is clip_es"):
        collect(load("config/demo_clip_es.yaml", [f"runs={tmp_path}/runs"]))


# ---- beyond the paper --------------------------------------------------------------------------


def test_variants_beyond_the_paper_have_caches_of_their_own_where_they_change_them():
    config = load("config/demo.yaml", ["train.lr=0.001"])
    assert set(MORE) == {variant for variants in MORE_TABLES.values() for variant in variants}
    runs, caches = variant_runs(config, variants=EVERY), cache_runs(config)
    for variant in MORE:
        own, trained = own_cache(config, variant), varied(config, runs[f"demo-{variant}-1"])
        assert trained.cache_path == (own or config.cache_path)
        assert trained.train.lr == 0.001
        if own:
            made = varied(config, caches[own.parent.name])
            assert made.cache_path == own == made.run_path / "cache"
            # Training there finds just the labels that it asks for.
            assert config_fingerprint(made, "cluster") == config_fingerprint(trained, "cluster")
            assert config_fingerprint(made, "cluster") != config_fingerprint(config, "cluster")
        else:
            assert config_fingerprint(trained, "cluster") == config_fingerprint(config, "cluster")


def test_what_the_run_is_already_is_no_variant():
    # The demo's focal and dice cover seen classes, and its potential objects are the batch's.
    tables = more_tables(load("config/demo.yaml"))
    assert tables["nel"] == ("full", "nel_all")
    assert tables["potentials"] == ("full", "potentials_image")
    assert more_tables(load("config/demo.yaml", ["train.nel=all"]), "nel") == {"nel": ("full", "nel_seen")}
    # It has one cached view, of which there is no second; four views have a first, and are no variant of themselves.
    assert tables["views"] == ("full", "views_4", "views_8")
    narrowed = more_tables(load("config/demo.yaml", ["train.views=1"]))
    assert narrowed["lambda"] == ("full", "lambda_0.7", "lambda_0.9"), (
        "a config of its own train.views has variants too"
    )
    assert more_tables(load("config/demo.yaml", ["views.num=4"]))["views"] == ("full", "views_1", "views_2", "views_8")
    assert list(more_tables(load("config/demo.yaml"), "tau,lambda")) == ["lambda", "tau"]
    with pytest.raises(UserError, match="'lamda': there are lambda"):
        more_tables(load("config/demo.yaml"), "tau,lamda")


def test_the_time_by_hand(tmp_path, capsys):
    config = load("config/demo.yaml", [f"runs={tmp_path}/runs", "views.num=2"])
    assert "is known once demo itself is trained" in foretold(config, "lambda")
    folder = config.run_path / "train"
    folder.mkdir(parents=True)
    (folder / "train.manifest.json").write_text(json.dumps({"iterations": 2}))
    (folder / "losses.jsonl").write_text(json.dumps({"iteration": 2, "time/elapsed_s": 50.0}) + "\n")
    entry = {"shard": 0, "rows": [0, 8], "fingerprint": "f", "digests": {}}
    for stage, seconds in (("extract", 30.0), ("cluster", 4.0)):
        ledger = config.cache_path / "ledger" / stage
        ledger.mkdir(parents=True)
        (ledger / "00000.json").write_text(json.dumps(entry | {"seconds": seconds}))
    # Lambda: full, 0.7 and 0.9, three seeds each: 9 trainings of 50 s, and two clusterings of 4 s.
    wanted = announced(config, "lambda")
    assert len(wanted) == 9
    assert f"{tmp_path}/runs/demo-lambda_0.7-2/eval/metrics.json" in wanted
    said = capsys.readouterr().err
    assert "9 of 9 trainings and 2 of 2 caches" in said
    assert "8 min and 8.0 s one after the other" in said
    assert cache_seconds(config, "views_8") == (30 + 4) * 8 / 2  # other views: the teacher again, four times as many
    assert cache_seconds(config, "tokens_int8") == 34
    assert "3 of 3 trainings" in foretold(config, "lambda", quick=True)
    assert "30.0 s and" in foretold(config, "lambda", quick=True)  # three of a fifth of the iterations
    done = config.run_path / "eval"
    done.mkdir()
    (done / "metrics.json").write_text("{}")
    assert "8 of 9 trainings" in foretold(config, "lambda")


def test_snakemake_plans_them_and_says_the_time():
    command = [*SNAKEMAKE, "ablations_more", "--cores", "1", "-n", "--quiet", "rules"]
    done = subprocess.run(
        [*command, "--config", "table=lambda", "quick=true", "set=name=nosuchrun"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "ablations_more: 3 of 3 trainings and 2 of 2 caches" in done.stderr
    said = done.stdout + done.stderr
    for job, count in (("extract", 1), ("cluster", 1), ("extract_like", 2), ("cluster_own", 2), ("train_variant", 3)):
        assert any(line.split() == [job, str(count)] for line in said.splitlines()), (job, said)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config", "table=lamda"], "table 'lamda': there are lambda"),
        (["--config", "set=train.lr=abc"], "train.lr = 'abc'"),
        (["--config", "name=foo"], "--config knows set, quick, table, on and on_set"),
        (["--config", "eval={gamma: 3}"], "--config set='section.key=value ...'"),
        (["--config", "quick=ture"], "quick=ture: want true or false"),
        (["--config", "on_set=train"], "section.key=value"),
        (["--configfile", "config/demo_clip_es.yaml"], "demo_clip_es is clip_es"),
    ],
)
def test_snakemake_answers_a_mistake_in_one_line(words, says):
    command = [*SNAKEMAKE, "ablations_more", "--cores", "1", "-n", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert says in line
    assert "Traceback" not in done.stderr
    assert 'File "' not in done.stderr


def test_options_of_snakemake_that_are_true_or_false():
    assert [yes_or_no(given, "quick") for given in ({}, {"quick": ""}, {"quick": "True"}, {"quick": "false"})] == [
        False,
        False,
        True,
        False,
    ]
    with pytest.raises(UserError, match="true or false"):
        yes_or_no({"quick": "ture"}, "quick")


def test_another_lambda_end_to_end(cached_demo, run_cli, run_evidence, tmp_path):
    """The settings that Snakemake hands on: the teacher's part taken over, clustered anew, trained and evaluated."""
    base = [f"runs={tmp_path}/runs", *TINY, f"cache.path={cached_demo}"]
    config = load(ROOT / "config" / "demo.yaml", base)

    def stage(name, settings, *more):
        words = [word for setting in settings for word in ("--set", setting)]
        done = run_cli(name, "--config", ROOT / "config" / "demo.yaml", *words, *more)
        assert done.returncode == 0, done.stderr
        return done.stderr

    before = {path: path.read_bytes() for path in cached_demo.rglob("*") if path.is_file()}
    own = [*base, *cache_runs(config)["demo-cache-lambda_0.7"]]
    said = stage("extract", own, "--like", cached_demo)
    assert "takes over" in said
    assert "nothing to do" in said
    cache = own_cache(config, "lambda_0.7")
    shard = next(p for p in (cache / "data.zarr" / "tokens").rglob("*") if p.is_file() and p.name != "zarr.json")
    assert shard.samefile(cached_demo / shard.relative_to(cache))  # hard links
    assert not (cache / "data.zarr" / "pseudo").exists()
    stage("cluster", own)
    runs = variant_runs(config, quick=True, variants=EVERY)
    for run in ("demo-quick-lambda_0.7-0", "demo-quick-full-0"):
        stage("train", [*base, *runs[run]])
        stage("eval", [*base, *runs[run]])
    assert before == {path: path.read_bytes() for path in cached_demo.rglob("*") if path.is_file()}
    done = run_evidence("ablations", *(w for s in base for w in ("--set", s)), "--table", "lambda", "--quick")
    assert done.returncode == 0, done.stderr
    assert "lambda 0.7" in done.stdout
    assert "not resolved (one seed)" in done.stdout
    done = run_evidence("ablations", *(w for s in base for w in ("--set", s)), "--table", "gamma", "--quick")
    assert "mIoU(U) / hIoU at gamma" in done.stdout
    assert "full method" in done.stdout
    wrong = run_evidence("ablations", "--table", "lamda")
    assert wrong.returncode == 2


def test_nothing_is_taken_over_that_was_extracted_otherwise(cached_demo, tiny, tmp_path):
    other = tiny(f"cache.path={tmp_path}/other", "views.num=3")
    assert not take_over(cached_demo, other)
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="no finished extraction"):
        take_over(tmp_path / "nowhere", other)
    same = tiny(f"cache.path={tmp_path}/same")
    (tmp_path / "same").mkdir()  # as Snakemake does before a job writes into it
    assert take_over(cached_demo, same)
    assert not take_over(cached_demo, same)  # it is there


def test_another_place_of_the_data_is_looked_at_again():
    """Snakemake asks the stages that read it, which keep a moved data set's work and refuse another one's."""
    raw = {"data": {"kind": "voc", "root": "/a"}}
    here, there = (stage_triggers(from_mapping(raw, more)) for more in ([], ["data.root=/b"]))
    assert {stage for stage in here if here[stage] != there[stage]} == {"extract", "cluster", "cams", "eval"}
