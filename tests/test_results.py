"""Result tables: means and spreads by hand, and what `contrast --keep` writes into a repository."""

import json
import re
from pathlib import Path

import pytest

from evidence.contrast import BEGIN, END, collect, keep_contrast, lift_of_glm, results_section
from evidence.scores import results_of
from evidence.variants import CONTRAST, Asked
from pipeline.config import UserError, load

ROOT = Path(__file__).parents[1]
MADE = {"date": "2026-01-02", "machine": "2 x a processor", "torch": "2.9", "revision": "abc"}


@pytest.fixture
def config(tmp_path):
    return load("config/demo.yaml", [f"runs={tmp_path}/runs"])


def evaluated(config, run: str, unseen: float) -> None:
    folder = config.run_path.with_name(run) / "eval"
    folder.mkdir(parents=True)
    scores = {"pAcc": 90.0, "mIoU_S": 50.0, "mIoU_U": unseen, "hIoU": 45.0}
    sweep = {"0.0": {"mIoU_U": unseen - 10, "hIoU": 30.0}, "1.5": {"mIoU_U": unseen, "hIoU": 45.0}}
    more = {"gamma": 1.5, "gamma_sweep": sweep, "num_images": 7, "fingerprint": f"id of {run}", "made": MADE}
    (folder / "metrics.json").write_text(json.dumps(scores | more))


def test_the_lift_by_hand(config):
    # Full 42 and 38: mean 40, std sqrt(8) = 2.83. Without 20 and 22: mean 21. The lift is 19.
    for run, unseen in (("demo", 42), ("demo-full-1", 38), ("demo-glm_off-0", 20)):
        evaluated(config, run, unseen)
    assert lift_of_glm(results_of(config)).verdict == "not resolved (one seed)"
    evaluated(config, "demo-glm_off-2", 22)
    results = results_of(config)
    assert {name: list(seeds) for name, seeds in results.items()} == {"full": [0, 1], "glm_off": [0, 2]}
    lift = lift_of_glm(results)
    assert (lift.difference, lift.spread) == pytest.approx((19, 8**0.5))
    section = results_section(results)
    assert "| full method | 2 | 90.0 ± 0.0 | 50.0 ± 0.0 | 40.0 ± 2.8 | 45.0 ± 0.0 |" in section
    assert "| full method | 30 / 30 | 40 / 45 |" in section
    assert "| without GLM | 11 / 30 | 21 / 45 |" in section
    assert "by +19.0 points, more than the larger spread, 2.8" in section


def test_keep_writes_metrics_readme_and_log_once(config, tmp_path):
    evaluated(config, "demo", 42)
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / "test-log.md").write_text("# log\n")
    (tmp_path / "README.md").write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n")
    keep_contrast(config, collect(config), tmp_path)
    once = [(tmp_path / name).read_text() for name in ("README.md", "evidence/test-log.md")]
    keep_contrast(config, collect(config), tmp_path)
    assert once == [(tmp_path / name).read_text() for name in ("README.md", "evidence/test-log.md")]
    assert once[0].startswith(f"above\n{BEGIN}\n7 test scenes")
    assert once[0].endswith(f"{END}\nbelow\n")
    assert "old" not in once[0]
    assert once[1].count("id of demo") == 1
    assert json.loads((tmp_path / "evidence/results/demo-full-0.json").read_text())["mIoU_U"] == 42


def test_keep_says_what_is_missing(config, tmp_path):
    with pytest.raises(UserError, match=r"Run `snakemake -s evidence/Snakefile contrast --cores all` first"):
        collect(config)
    evaluated(config, "demo", 42)
    (tmp_path / "README.md").write_text("no place\n")
    with pytest.raises(UserError, match="Put them where"):
        keep_contrast(config, collect(config), tmp_path)


def test_keep_never_writes_fewer_than_are_kept(config, tmp_path):
    evaluated(config, "demo", 42)
    kept = tmp_path / "evidence" / "results" / "demo-glm_off-1.json"
    kept.parent.mkdir(parents=True)
    kept.write_text("{}")
    (tmp_path / "README.md").write_text(f"{BEGIN}\nold\n{END}\n")
    with pytest.raises(UserError, match=r"drop 1 of 1 kept results, demo-glm_off-1 .*Run `snakemake .*contrast"):
        keep_contrast(config, collect(config), tmp_path)
    assert "old" in (tmp_path / "README.md").read_text()
    assert sorted(path.name for path in kept.parent.iterdir()) == ["demo-glm_off-1.json"]


def test_a_command_line_is_named_in_full():
    asked = Asked("config/my run.yaml", ("runs=/x y", "train.lr=1"), on="coco", on_settings=("data.root=/z",))
    assert asked.snakemake("transfer").endswith(
        "transfer --cores all --configfile 'config/my run.yaml' --config 'set=runs=/x y train.lr=1' on=coco "
        "on_set=data.root=/z"
    )
    assert asked.evidence("transfer") == (
        "python -m evidence transfer --config 'config/my run.yaml' --set 'runs=/x y' --set train.lr=1 --on coco "
        "--on-set data.root=/z"
    )


def test_readme_says_what_the_kept_results_say():
    """Every number of README's section is made from evidence/results/, with date, machine and revision."""
    results: dict[str, dict[int, dict]] = {}
    for contrast in CONTRAST:
        for path in sorted((ROOT / "evidence" / "results").glob(f"demo-{contrast}-[0-9].json")):
            results.setdefault(contrast, {})[int(path.stem[-1])] = json.loads(path.read_text())
    readme = (ROOT / "README.md").read_text()
    section = readme.split(f"{BEGIN}\n")[1].split(END)[0]
    assert section == results_section(results)
    assert {len(seeds) for seeds in results.values()} == {3}
    made = [m["made"] for seeds in results.values() for m in seeds.values()]
    assert all(
        f"{one['date']}, {one['machine']}, torch {one['torch']}, revision {one['revision']}" in section for one in made
    )


def test_readme_has_no_other_scores():
    """Outside that section a score stands only where it is said to be wanted, measured elsewhere or the paper's."""
    readme = (ROOT / "README.md").read_text()
    rest = readme.split(BEGIN)[0] + readme.split(END)[1]
    found = [line for line in rest.splitlines() if re.search(r"(IoU|pAcc)[^|]*\b\d", line)]
    assert all("What we wanted" in line for line in found), found
