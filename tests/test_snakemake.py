"""Snakemake around the stages: odd words in every path, kills, and what its --config answers."""

import os
import signal
import subprocess
import sys
import time

import pytest

from pipeline.config import ConfigError, UserError, from_mapping
from pipeline.snakefile import check_paths, clear_dead_locks, options, shell_words, split_settings
from tests.conftest import ROOT, TINY, is_one_line_error

PARTS = ("Snakefile", "cli.py", "config", "profiles", "pipeline", "cache")
ODD = 'it\'s $(touch obeyed) [2024] "q"; & y #1: z'


@pytest.fixture
def clone(tmp_path):
    """The project in a folder whose name holds blanks, quotes and what a shell would run."""
    folder = tmp_path / ODD
    folder.mkdir()
    for part in PARTS:
        (folder / part).symlink_to(ROOT / part)
    return folder


def snakemake(clone, *words):
    return [sys.executable, "-m", "snakemake", "--cores", "1", *map(str, words)]


def run(clone, *words):
    return subprocess.run(snakemake(clone, *words), cwd=clone, capture_output=True, text=True, timeout=280)


def settings(folder, *more):
    """The tiny demo's extraction alone, as --config set=, and the target."""
    runs = str(folder / "runs").replace("'", "''")
    return (
        f"set=runs='{runs}' {' '.join([*TINY, *more])}",
        folder / "runs" / "demo" / "cache" / "extract.manifest.json",
    )


def test_paths_with_blanks_quotes_and_commands_killed_and_run_again(clone):
    """The same command goes on after Snakemake and its job were killed, and a shell obeys no name."""
    given, target = settings(clone)
    words = (target, "--config", given)
    begun = subprocess.Popen(snakemake(clone, *words), cwd=clone, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    log = clone / "runs" / "demo" / "logs" / "extract.log"
    while not log.exists():  # the job itself has begun
        assert begun.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    assert list((clone / ".snakemake" / "locks").glob("*.lock")), "a killed Snakemake leaves its lock"
    done = run(clone, *words)
    assert done.returncode == 0, done.stderr
    assert target.is_file()
    assert not list(clone.rglob("obeyed"))


def test_locks_of_the_living_stay(tmp_path):
    folder = tmp_path / ".snakemake"
    (folder / "locks").mkdir(parents=True)
    lock = folder / "locks" / "0.output.lock"
    lock.touch()
    first = clear_dead_locks(folder)
    assert not lock.exists()
    lock.touch()  # now the first one's own
    second = clear_dead_locks(folder)
    assert lock.exists()
    first.close()
    third = clear_dead_locks(folder)
    assert lock.exists(), "the second is alive"
    second.close()
    third.close()
    clear_dead_locks(folder).close()
    assert not lock.exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--config", "lr=1"], ["--config knows set, not 'lr'", "set='train.lr=1'"]),
        (["--config", "quick=true"], ["--config knows set, not 'quick'"]),
        (["--config", "set=runs='a{b}'"], ["runs", "braces"]),
        (["--configfile", "config/demo.yaml", "config/voc.yaml"], ["one --configfile", "voc.yaml"]),
    ],
)
def test_a_wrong_config_is_one_line(clone, words, says):
    assert is_one_line_error(run(clone, "-n", *words), *says)


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", ()),
        ("cluster.sizes=[3, 7] train.lr=1e-4", ("cluster.sizes=[3, 7]", "train.lr=1e-4")),
        ("data.root='/my data' train.lr=1e-4", ("data.root='/my data'", "train.lr=1e-4")),
        ("data.root=/my data [2024] it's name=x", ("data.root=/my data [2024] it's", "name=x")),
        ("text.templates=['a b=c {}', 'it''s x=1'] name=x", ("text.templates=['a b=c {}', 'it''s x=1']", "name=x")),
        ('data.root="/a b=1" name=x', ('data.root="/a b=1"', "name=x")),
        ("data.root=/a #1 name=x: y", ("data.root=/a #1", "name=x: y")),  # which YAML would cut, or take for a key
        ("a.b=", ("a.b=",)),
    ],
)
def test_settings_are_split_where_a_key_begins(text, pieces):
    assert split_settings(text) == pieces


@pytest.mark.parametrize("text", ["train", "train a=1", "a=b' 'c=d"])
def test_text_that_is_no_setting(text):
    with pytest.raises(UserError, match=r"section\.key=value"):
        split_settings(text)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("batch=4", "'teacher.batch=4' .or cams.batch, train.batch, eval.batch"),
        ("sett=a=1", "knows set, not 'sett'; the nearest is 'set'"),
        ("nowhere=1", "section.key=value"),
        ("eval={gamma: 3}", "section.key=value"),
    ],
)
def test_a_key_that_config_does_not_know(word, says):
    with pytest.raises(UserError, match=says):
        options([word])


@pytest.mark.parametrize("text", ["'a=b' c=d", "'a=b", "\"a=b'"])
def test_quotes_that_are_not_around_a_value(text):
    with pytest.raises(UserError, match="around the value"):
        split_settings(options([f"set={text}"])["set"])


def test_options_are_as_they_were_typed():
    words = ["set=a.b=1 c.d='x y'", "quick=True", "on_set=data.root=/x #1: 2"]
    found = options(words, ("set", "quick", "on_set"))
    assert found == {"set": "a.b=1 c.d='x y'", "quick": "True", "on_set": "data.root=/x #1: 2"}
    assert options(["set='a.b=1 c.d=2'"]) == options(["set=a.b=9", 'set="a.b=1 c.d=2"']) == {"set": "a.b=1 c.d=2"}
    assert options([]) == {}


def test_no_command_line_is_read():
    """Snakemake hands over what it was given, whoever starts it."""
    for file in (ROOT / "Snakefile", ROOT / "evidence" / "Snakefile", ROOT / "pipeline" / "snakefile.py"):
        assert "sys.argv" not in file.read_text()
    assert len((ROOT / "Snakefile").read_text().splitlines()) < 100


@pytest.mark.parametrize("value", ["it's", "$(touch x)", 'a "b" `c`', "plain", "a\\b", "*;&|<>"])
def test_a_shell_hands_settings_on_as_they_are(value):
    words = shell_words([f"data.root={value}"])
    said = subprocess.run(["bash", "-c", f"printf '%s\\n' {words}"], capture_output=True, text=True, check=True)
    assert said.stdout.splitlines() == ["--set", f"data.root={value}"]


def test_braces_in_paths_are_for_snakemake_alone():
    check_paths(from_mapping({"runs": "it's $x [1]"}))
    for raw in ({"runs": "a{b}"}, {"cache": {"path": "a{b"}}):
        with pytest.raises(UserError, match="wildcards"):
            check_paths(from_mapping(raw))


@pytest.mark.parametrize("name", ["..", "a.", "a b", "a/b", "x" * 201, "a\n", ""])
def test_names_that_no_run_has(name):
    with pytest.raises(ConfigError, match="name"):
        from_mapping({"name": name})


@pytest.mark.parametrize("path", ["", " ", " a", "a\0b", "a\nb", "a\x1b[31m", "x" * 201, "a/" + "ä" * 101])
@pytest.mark.parametrize("raw", [lambda path: {"runs": path}, lambda path: {"cache": {"path": path}}])
def test_paths_that_no_folder_has(raw, path):
    with pytest.raises(ConfigError, match=r"runs|cache\.path"):
        from_mapping(raw(path))


def test_runs_lie_on_a_disk():
    with pytest.raises(ConfigError, match="URL"):
        from_mapping({"runs": "s3://bucket/runs"})
    assert from_mapping({"cache": {"path": "s3://bucket/cache"}}).cache_path == "s3://bucket/cache"


def test_the_home_folder_is_not_called_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = from_mapping({"runs": "~/runs", "cache": {"path": "~/cache"}})
    assert (config.runs, str(config.cache_path)) == ("/home/somebody/runs", "/home/somebody/cache")
