"""A net of one's own as the student: `student.arch: <module>:<Class>`, imported from where the command is run.

The class is called with `channels` and student.options, and its code stays where it is: a saved student names it.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import os
import re
import sys
import traceback
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from torch import nn

from pipeline.config import Student, UserError
from pipeline.models.dense import DenseStudent, StudentError, parts_of, said
from pipeline.models.published import load, match, read_state

SPEC = re.compile(r"([^\W\d]\w*(?:\.[^\W\d]\w*)*):([^\W\d]\w*)")  # as entry points are written
USUAL_PARTS = ("encoder", "backbone")  # what nets call their encoder
GIVEN = ("channels",)  # no option: it follows from the teacher, or the classes
_SOURCES: dict[type, str | None] = {}  # of the classes built in this process


def own_student(section: Student, channels: int, pretrained: bool, origin: dict[str, Any]) -> DenseStudent:
    """Imports the class and calls it. `origin`: what a saved student knows of its code.

    Raises: StudentError when the module can't be imported, the class isn't there or isn't a torch.nn.Module, or it
    doesn't take its arguments.
    """
    cls = _imported(section.arch)
    net = _called(cls, section, channels)
    source = _source(cls)
    parts = parts_of(net, section, USUAL_PARTS)
    student = DenseStudent(
        net,
        section.mean,
        section.std,
        encoder_parts=parts,
        origin={"source": source} if source else {},
        is_foreign=True,
    )
    if source != _hash_of(cls):
        student.notes.append(
            f"{inspect.getsourcefile(cls)}: has changed since this Python imported it, and its code from before is "
            "what runs; start Python anew for the new one"
        )
    if origin.get("source", source) != source:
        student.notes.append(f"{inspect.getsourcefile(cls)}: has changed since this student was trained with it")
    if pretrained and section.weights is not None:
        student.notes.append(load_published(student, section))
    return student


def load_published(student: DenseStudent, section: Student) -> str:
    """Fills a net from student.weights, names as published; a net without an encoder counts as a whole."""
    assert section.weights is not None
    state = read_state(section.weights)
    is_encoder = student.is_encoder if student.encoder_parts else lambda name: True
    found = match(student.net, state, is_encoder)
    return load(student.net, state, found, is_encoder, f"student.weights {section.weights} into {section.arch}")


def _imported(arch: str) -> type[nn.Module]:
    what = f"student.arch {arch}"
    spec = SPEC.fullmatch(arch)
    if spec is None:
        raise StudentError(f"{what}: want <module>:<Class>, such as mypackage.nets:Net.")
    module, name = spec[1], spec[2]
    here = os.getcwd()
    importlib.invalidate_caches()  # a notebook may have written the module a moment ago
    sys.path.insert(0, here)  # as for `python -m`, not only below cli.py's folder
    try:
        found = importlib.import_module(module)
    except UserError:
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise StudentError(f"{what}: importing {module} fails: {placed(error)}. Install it, or mend it.") from None
        raise StudentError(
            f"{what}: there is no module {error.name!r}, neither in the working directory {here} nor among installed "
            "packages. Run this from the folder that holds it, or put that folder into PYTHONPATH."
        ) from None
    except (Exception, SystemExit) as error:  # whatever a module does at its top
        raise StudentError(f"{what}: importing {module} fails: {placed(error)}.") from None
    finally:
        sys.path.remove(here)
        if here not in sys.path:
            sys.path.append(here)  # for what the net imports later; last, so that it hides no package from others
    _check_place(what, module, here)
    cls = getattr(found, name, None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        nets = [
            key
            for key, value in vars(found).items()
            if isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == found.__name__
        ]
        wrong = f"has no {name}" if cls is None else f"{name} is no class of torch.nn.Module"
        where = getattr(found, "__file__", None) or module
        raise StudentError(f"{what}: {where}: {wrong}. Its nets are {', '.join(nets) or 'none'}.")
    return cls


def _check_place(what: str, module: str, here: str) -> None:
    """Raises: StudentError where the working directory has another module of the name than the one imported before."""
    top = module.partition(".")[0]
    spec = PathFinder.find_spec(top, [here])
    imported = getattr(sys.modules[top], "__file__", None)
    if spec is not None and spec.origin and imported and os.path.realpath(spec.origin) != os.path.realpath(imported):
        raise StudentError(
            f"{what}: {top} was imported from {imported} before, and {spec.origin} of the working directory has the "
            "same name. Start Python anew there, or rename one of them."
        )


def _called(cls: type[nn.Module], section: Student, channels: int) -> nn.Module:
    """An instance. Raises: StudentError naming the argument that the class doesn't take, or lacks."""
    what = f"student.arch {section.arch}"
    if given := [key for key in GIVEN if key in section.options]:
        raise StudentError(f"student.options {given[0]}: is set by the teacher's channels. Leave it out.")
    arguments = {"channels": channels, **section.options}
    signature = inspect.signature(cls)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise StudentError(
            f"{what}: {said(error)}. It is called with channels and student.options, and takes "
            f"{', '.join(signature.parameters) or 'none'}."
        ) from None
    try:
        return cls(**arguments)
    except (Exception, SystemExit) as error:
        raise StudentError(f"{what}: building it fails: {placed(error)}. Change student.options, or the net.") from None


def placed(error: BaseException) -> str:
    """An error of somebody's code on one line: its type, its text, and where in a file that isn't a package's."""
    text = said(error) if isinstance(error, Exception) else str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "site-packages" not in frame.filename]
    own = [frame for frame in frames if not _is_ours(frame.filename)]
    if isinstance(error, SyntaxError) and error.filename:
        return f"{type(error).__name__}: {text}"  # says where itself
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
    return f"{type(error).__name__}: {text}{where}"


def _is_ours(file: str) -> bool:
    """Of this program, or of Python's import machinery."""
    return file.startswith("<frozen") or Path(__file__).parents[1] in Path(file).parents


def _source(cls: type) -> str | None:
    """A hash of the file that the class stands in, as it was when the class was first asked for."""
    return _SOURCES.setdefault(cls, _hash_of(cls))


def _hash_of(cls: type) -> str | None:
    """A hash of the file that a class stands in; None of one without a file."""
    try:
        file = inspect.getsourcefile(cls)
        return None if file is None else hashlib.blake2b(Path(file).read_bytes(), digest_size=8).hexdigest()
    except (OSError, TypeError):
        return None
