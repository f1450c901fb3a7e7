"""What a user gets without a checkout: the wheel, its presets, and both ways in, from an empty folder."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

SMALL = ["data.train=4", "data.test=2", "train.iterations=2", "train.warmup=1", "train.batch=2", "train.tracker=none"]
SMALL += ["student.encoder=tu-resnet10t", "report.images=2"]
SOURCES = (
    "pipeline",
    "cache",
    "config",
    "cli.py",
    "clipteacher.py",
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the sources: a build leaves folders beside them."""
    folder = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", "out", "."]
    subprocess.run(pip, cwd=folder, check=True)
    (built,) = (folder / "out").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel in a folder of its own, and how to run something with it: run(cwd, *words) -> what it left behind."""
    site = tmp_path_factory.mktemp("in stalled") / "site"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(pip, check=True)

    def run(cwd: Path, *words: object) -> subprocess.CompletedProcess[str]:
        command = [str(site / "bin" / "clipteacher"), *map(str, words)]
        if words and words[0] == "python":
            command = [sys.executable, *map(str, words[1:])]
        env = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)

    return run


def test_the_wheel_holds_all_modules_and_presets_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    code = {p.relative_to(ROOT).as_posix() for top in ("pipeline", "cache") for p in ROOT.glob(f"{top}/**/*.py")}
    code |= {p.relative_to(ROOT).as_posix() for p in ROOT.glob("pipeline/**/*.j2")}
    presets = {f"pipeline/presets/{p.name}" for p in ROOT.glob("config/*.yaml") if p.stem != "environment"}
    teacher = ("bpe.txt.gz", "open_clip_config.json", "open_clip_model.safetensors")
    presets |= {f"pipeline/presets/demo_teacher/{name}" for name in teacher}
    assert names == code | presets | {"cli.py", "clipteacher.py"}


def test_it_works_in_an_empty_folder(installed, tmp_path):
    """Its name has a blank; no file of a checkout is near."""
    folder = tmp_path / "an empty folder"
    folder.mkdir()
    settings = [word for setting in SMALL for word in ("--set", setting)]
    assert installed(folder, "--version").stdout.startswith("clipteacher ")
    done = installed(folder, "extract", "--config", "demo", *settings)
    assert done.returncode == 0, done.stderr
    shutil.copy(ROOT / "docs" / "scene.png", folder)
    code = "import clipteacher; print(clipteacher.__file__); clipteacher.run('demo', until='train', settings="
    code += f"{SMALL}, quiet=True); print(clipteacher.load('runs/demo').predict('scene.png', names=['sofa|couch']))"
    done = installed(folder, "python", "-c", code)
    assert done.returncode == 0, done.stderr
    where, mask = done.stdout.splitlines()
    assert "in stalled" in where
    assert mask.endswith("sofa 100 %>")
    done = installed(folder, "predict", "scene.png", "--names", "zebra,sofa|couch")
    assert done.returncode == 0, done.stderr
    assert (folder / "predictions" / "scene.mask.png").is_file()


def test_its_errors_name_its_own_command(installed, tmp_path):
    done = installed(tmp_path, "train", "--config", "demo")
    assert done.returncode == 2
    assert "Run `clipteacher cluster` first." in done.stderr
    done = installed(tmp_path, "train", "--config", "dmeo")
    assert done.returncode == 2
    assert "There are the presets ade20k, " in done.stderr


def test_the_shell_completes_it(installed, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setenv("_CLIPTEACHER_COMPLETE", "complete_bash")
        patched.setenv("COMP_WORDS", "clipteacher ex")
        patched.setenv("COMP_CWORD", "1")
        done = installed(tmp_path)
    assert done.stdout.split() == ["extract", "export"], done.stderr
    # The shell is named here: found by itself, it is the one that started the tests, make's sh for example.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    done = installed(tmp_path, "--show-completion", "bash")
    assert "_CLIPTEACHER_COMPLETE=complete_bash" in done.stdout, done.stderr
