"""What reaches a terminal: text of ours, in which names and contents of files are only shown, never obeyed."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.segment import Segment

# C0 and C1 controls but tab and line end, marks that turn the direction of writing, and halves of surrogate pairs,
# which Python has for bytes of a name that are no text, and no stream can write.
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    """The text with what a terminal would obey written as Python's escapes: \\x1b[31m."""
    return OBEYED.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


def as_called(text: str) -> str:
    """A message that names commands of cli.py, as the reader can type them: installed, the program is `clipteacher`."""
    is_script = Path(sys.argv[0]).stem == "clipteacher"
    return re.sub(r"\bcli\.py(?= )", "clipteacher", text) if is_script else text


def complain(error: object, code: int = 2) -> int:
    """Says a mistake in one line on standard error, and gives back the exit code."""
    print(f"error: {as_called(visible(' '.join(str(error).split())))}", file=sys.stderr)
    return code


class Terminal(Console):
    """A console that prints text as `visible` has it, in tables and trees too, and takes no brackets for markup."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "highlight": False, **options})

    def render(self, renderable: Any, options: Any = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            if segment.control is None and OBEYED.search(segment.text):
                yield Segment(visible(segment.text), segment.style)
            else:
                yield segment
