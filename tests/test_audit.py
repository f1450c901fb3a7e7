"""Pins and floors agree; `make audit` (.ci/audit.py): what it makes of pip-audit's answers, and of none.

pip-audit itself is a stand-in.
"""

import json
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.conftest import ROOT

HOLE = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["2.0"], "description": ""}
KNOWN = {"name": "jinja2", "version": "3.1.0", "vulns": [HOLE]}


def audited(tmp_path, *answers):
    """Exit code and words, where pip-audit answers these one after another; None: it fails."""
    for number, answer in enumerate(answers):
        if answer is not None:
            (tmp_path / f"{number}.json").write_text(json.dumps({"dependencies": answer}))
    tool = tmp_path / "pip-audit"
    tool.write_text(
        f"#!/bin/sh\ncd {tmp_path}\nnumber=$(ls asked-* 2>/dev/null | wc -l)\ntouch asked-$number\n"
        'while [ "$1" != -o ]; do shift; done\ncp $number.json "$2"\n'
    )
    tool.chmod(0o755)
    (tmp_path / "constraints.txt").write_text("a==1.0\n")
    words = [sys.executable, ROOT / ".ci" / "audit.py", tool, tmp_path / "constraints.txt"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stdout


def test_a_pinned_version_with_a_hole_fails(tmp_path):
    code, said = audited(tmp_path, [KNOWN], [{"name": "a", "version": "1.0", "vulns": [HOLE]}])
    assert code == 1
    assert "a 1.0: PYSEC-1 (CVE-1), mended in 2.0" in said


@pytest.mark.parametrize("skipped", [[], [{"name": "b", "skip_reason": "not found"}]])
def test_without_holes_it_passes_and_names_what_it_knows_nothing_of(tmp_path, skipped):
    code, said = audited(tmp_path, [KNOWN], [{"name": "a", "version": "1.0", "vulns": []}, *skipped])
    assert code == 0
    assert "0 known vulnerabilities" in said
    assert ("of b" if skipped else "of none") in said


@pytest.mark.parametrize("answer", [None, [{"name": "jinja2", "skip_reason": "not found"}]], ids=["fails", "no data"])
def test_without_data_it_says_so_and_passes(tmp_path, answer):
    code, said = audited(tmp_path, answer)
    assert code == 0
    assert "no data" in said
    assert "SECURITY.md" in said


def test_an_answer_that_fails_after_the_first_is_no_pass(tmp_path):
    assert audited(tmp_path, [KNOWN], None)[0] == 1


def pins(name):
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {one.name.lower().replace("_", "-"): str(one.specifier) for one in map(Requirement, lines)}


def wanted():
    """What pyproject.toml asks for, extras included."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return [Requirement(one) for some in lists for one in some]


def test_pins_keep_the_floors_and_the_page_has_its_own():
    core, page = pins("constraints.txt"), pins("requirements-page.txt")
    assert all(pin.startswith("==") for pin in (*core.values(), *page.values()))
    assert not set(core) & set(page)
    assert "gradio" in page
    checked = []
    for one in wanted():
        name = one.name.lower().replace("_", "-")
        if name in core:
            assert core[name].removeprefix("==") in one.specifier, one
            checked.append(name)
    assert {"torch", "pillow", "numcodecs", "fsspec", "dask", "onnx"} <= set(checked)


@pytest.mark.parametrize(
    ("package", "refused"),
    [
        *(
            ("torch", "2.9.1"),
            ("torch", "2.10.0"),
            ("numcodecs", "0.16.3"),
            ("numcodecs", "0.17.0"),
            ("pillow", "12.3.0"),
        ),
        *(("fsspec", "2026.4.0"), ("dask", "2025.12.0"), ("jinja2", "3.1.5"), ("onnx", "1.20.1"), ("s3fs", "2026.4.0")),
    ],
)
def test_versions_with_known_holes_are_not_admitted(package, refused):
    found = [one for one in wanted() if one.name == package]
    assert found
    assert not any(refused in one.specifier for one in found)
