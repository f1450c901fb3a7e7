"""Options of the program itself: --version, --quiet before or after a command, and what completion offers."""

import pytest

from pipeline.config import version
from pipeline.running import console
from tests.conftest import is_one_line_error


def test_the_version(run_cli):
    done = run_cli("--version")
    assert (done.returncode, done.stdout.strip()) == (0, f"clipteacher {version()}")


@pytest.fixture
def extracted(tmp_path, run_cli):
    """Options of a tiny run whose extraction is done."""
    words = ["--set", f"runs={tmp_path}", "--set", "data.train=4", "--set", "teacher.batch=4"]
    assert run_cli("extract", *words).returncode == 0
    return words


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("word", ["-q", "--quiet"])
def test_quiet_leaves_out_what_goes_on(extracted, run_cli, before, word, tmp_path):
    log = tmp_path / "log.txt"
    command = [word, "extract"] if before else ["extract", word]
    done = run_cli(*command, *extracted, "--log", log)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "nothing to do" in log.read_text()  # a log has all of it
    assert "nothing to do" in run_cli("extract", *extracted).stderr


def test_quiet_shows_results_and_errors(extracted, run_cli):
    done = run_cli("cluster", "-q", *extracted)
    assert "pseudo labels: 4 views" in done.stderr
    assert "/s" not in done.stderr  # a bar's rate
    assert "images/s" in run_cli("extract", *extracted, "--set", "name=other").stderr
    assert is_one_line_error(run_cli("eval", "-q", *extracted), "`train` has not been completed")
    assert is_one_line_error(run_cli("-q", "nothing"), "No such command")


def test_quiet_ends_with_its_command(extracted, run_cli):
    run_cli("extract", "-q", *extracted)
    assert not console._is_quiet.get()


def test_each_command_offers_it(run_cli):
    import cli

    commands = cli._command(cli.app).commands
    assert len(commands) >= 16
    assert all("--quiet" in run_cli(command, "--help").stdout for command in commands)
