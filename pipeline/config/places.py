"""Where a path that a config names is looked for, and where the presets are.

A checkout keeps the presets in config/, an installed package in pipeline/presets (setup.py makes one of the other).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

CHECKOUT = "config"  # the folder of the presets in a checkout; paths in presets and documents begin with it
NOT_PRESETS = ("environment",)  # a YAML in it that is no run's
_INSTALLED, _SOURCE = (Path(__file__).resolve().parents[up] / name for up, name in ((1, "presets"), (2, CHECKOUT)))


def presets_folder() -> Path:
    """The folder of the presets that came with this program."""
    return _INSTALLED if _INSTALLED.is_dir() else _SOURCE


def where_is(path: str | Path, near: Path | None = None) -> Path:
    """A relative path of a config where it is: below `near`, in the working directory, or among the presets.

    `near` is the folder that a run was made in. What begins with config/ may be of the presets. A path that is in none
    of them comes back as it is.
    """
    return next((place for place in _looked_at(Path(path), near) if place.exists()), Path(path))


def looked_in(near: Path | None) -> str:
    """The folders that `where_is` looks in, in words."""
    return f"{near} (where the run was made) and in {Path.cwd()}" if near else f"{Path.cwd()}"


def _looked_at(path: Path, near: Path | None) -> Iterator[Path]:
    if near is not None and not path.is_absolute():
        yield near / path
    yield path
    if len(path.parts) > 1 and path.parts[0] == CHECKOUT:
        yield presets_folder().joinpath(*path.parts[1:])


def config_file(name_or_path: str | Path) -> Path:
    """The file of a config: a path, or the name of one in the working directory, or of a preset.

    `demo` is demo.yaml or config/demo.yaml of the working directory, else the preset. What is nowhere comes back as
    a path that doesn't exist.
    """
    path = Path(name_or_path)
    if path.is_file() or len(path.parts) != 1:
        return path if path.is_file() else where_is(path)
    named = path if path.suffix else path.with_name(f"{path.name}.yaml")
    inside = where_is(Path(CHECKOUT) / named)
    if named.is_file():
        return named
    return inside if inside.is_file() or not path.suffix else path


def preset_names() -> list[str]:
    """The names of the presets that came with this program."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml") if path.stem not in NOT_PRESETS)
