"""docs/extending.md as it stands: its net, its config and its commands, word for word."""

import re
import shlex
import textwrap

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "extending.md").read_text()


def block(language):
    (found,) = re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return found


def commands():
    """The indented lines that follow `Every command knows it:`."""
    indented = PAGE.partition("Every command knows it:\n\n")[2].partition("\n\n")[0]
    return [shlex.split(line)[2:] for line in textwrap.dedent(indented).splitlines()]


@pytest.fixture
def folder(tmp_path):
    """Where the reader works, with the folders of the checkout that the page names."""
    for name in ("config", "docs"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "mynets.py").write_text(block("python"))
    (tmp_path / "mine.yaml").write_text(block("yaml"))
    return tmp_path


def test_the_net_has_twenty_lines():
    assert len(block("python").strip().splitlines()) == 20


def test_the_page_runs_as_it_stands(folder, run_cli):
    assert [words[0] for words in commands()] == ["doctor", "extract", "cluster", "train", "eval", "predict", "export"]
    for words in commands():
        done = run_cli(*words, folder=folder)
        assert done.returncode == 0, (words, done.stderr)
    for made in ("runs/mine/eval/metrics.json", "predictions/scene.mask.png", "mine.onnx", "mine.text.npy"):
        assert (folder / made).is_file()
