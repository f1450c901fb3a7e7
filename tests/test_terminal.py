"""Names and contents of files are shown on a terminal, and never obeyed."""

import io
import re

import pytest
from rich.table import Table
from rich.tree import Tree

from pipeline.running import console
from pipeline.terminal import Terminal, visible
from tests.conftest import ROOT, is_one_line_error

ODD = "\x1b[31mred\x1b]0;title\x07 \x9b2J\r over\x08\x7f \u202egpj.exe \udc80 [red] [/]"
OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800-\udfff]")


def test_visible():
    assert visible("a\x1b[31mb\x00\x9b\udc80\u202e") == r"a\x1b[31mb\x00\x9b\udc80\u202e"
    assert visible("ä 日本 [x] \t\n") == "ä 日本 [x] \t\n"


@pytest.mark.parametrize("shown", ["text", "table", "tree"])
def test_a_console_shows_what_is_odd(shown):
    out = io.StringIO()
    what = {"text": ODD, "table": Table(ODD, title=ODD), "tree": Tree(ODD)}[shown]
    if shown == "table":
        what.add_row(ODD)
    Terminal(file=out, width=300).print(what)
    assert not OBEYED.search(out.getvalue())
    assert r"\x1b[31mred" in out.getvalue()
    assert "[red] [/]" in out.getvalue(), "brackets are no markup"


def test_what_is_said_goes_so_to_terminal_and_log(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(console, "_log", [])
    out = io.StringIO()
    monkeypatch.setattr(console, "console", Terminal(file=out, soft_wrap=True))
    console.log_to(tmp_path / "log")
    console.say(f"predict: {ODD}\nerror: none of ours")
    for text in (out.getvalue(), (tmp_path / "log").read_text(encoding="utf-8")):
        assert not OBEYED.search(text)
        assert len(text.splitlines()) == 1


def test_errors_show_names(run_cli, tmp_path):
    done = run_cli("train", "--config", tmp_path / "a\x1b[31mb\nerror: c.yaml")
    assert is_one_line_error(done, r"a\x1b[31mb error: c.yaml")
    assert not OBEYED.search(done.stderr)
    done = run_cli("train", "--config", ROOT / "config" / "demo.yaml", "--set", "tr\x1b[31main.lr=1")
    assert is_one_line_error(done)
    assert not OBEYED.search(done.stderr)
