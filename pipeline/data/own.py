"""A data set of one's own, `data.kind: mypackage.module:Class`, derived from base.DataSet (docs/data.md).

The module is found as Python finds it, or in the working directory. Before any work the class, its constructor's
options and one sample are compared with the interface, so that what is missing is said by name.
"""

from __future__ import annotations

import functools
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from pipeline.data.base import PARTS, DataError, DataSet, Sample, options_of, unknown
from pipeline.ops.labels import IGNORE, LABEL

SHARED = ("root", "limit", "unseen", "split")  # options that mean what they mean in all data sets; others: data.options
SEE = "docs/data.md says what a data set needs"
Made = TypeVar("Made")


def own_data_set(kind: str, options: Mapping[str, Any]) -> DataSet:
    """An instance of the class `module:Class`. Raises: DataError, one line on what can't be imported or is missing."""
    factory = _imported(kind)
    given = _options(kind, factory, options)
    data = _called(kind, "constructor", lambda: factory(**given))
    _check(kind, data)
    return data


def _imported(kind: str) -> type[DataSet]:
    module, _, name = kind.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise DataError(f"data.kind {kind!r}: want package.module:Class, as Python imports it.")
    if not {"", os.getcwd()} & set(sys.path):  # last: it hides nothing that is installed
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a module may do anything when it is imported
        raise DataError(
            f"data.kind {kind!r}: {module} can't be imported in {os.getcwd()}: {_told(error)}. Correct the name, or "
            "run in the folder that the module lies in."
        ) from None
    if not isinstance(found, type) or not issubclass(found, DataSet):
        what = f"has no {name}" if found is None else f"{name} is {_described(found)}"
        raise DataError(
            f"data.kind {kind!r}: {module} {what}; want a class derived from pipeline.data.base.DataSet. {SEE}."
        )
    if missing := sorted(found.__abstractmethods__):
        raise DataError(f"data.kind {kind!r}: {name} lacks {', '.join(f'{m}()' for m in missing)}. {SEE}.")
    return found


def _options(kind: str, factory: type[DataSet], options: Mapping[str, Any]) -> dict[str, Any]:
    """What the constructor is called with: those of SHARED, and all below `options`. Raises: DataError."""
    own = options.get("options") or {}
    if not isinstance(own, Mapping):
        raise DataError(f"data.options is {own!r}; want a mapping of {kind}'s own options.")
    shared = {name: value for name, value in options.items() if name != "options"}
    for name in shared:
        if name not in SHARED:
            raise DataError(
                f"data.{name}: {kind} is a data set of your own, whose options are in a mapping: write "
                f"options: {{{name}: ...}}; beside it there may be {', '.join(SHARED)}."
            )
    if both := set(own) & set(shared):
        raise DataError(f"data.options.{min(both)}: stands in data.{min(both)}, too. Leave one of them out.")
    given = {**shared, **{str(name): value for name, value in own.items()}}
    known = options_of(factory)
    for name in given:
        if name not in known:
            raise unknown(f"data: {kind}'s constructor takes no", name, known)
    for name, parameter in known.items():
        is_many = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if parameter.default is parameter.empty and name not in given and not is_many:
            where = f"data.{name}" if name in SHARED else f"data.options.{name}"
            raise DataError(f"{where} is missing, and {kind} needs it; it takes {', '.join(known)}.")
    return given


def _check(kind: str, data: DataSet) -> None:
    """Compares what the methods give with the interface, on the first sample of a part that can be listed."""
    if not hasattr(data, "_by_id"):
        raise DataError(f"data.kind {kind!r}: its __init__ must call super().__init__(classes=[...]). {SEE}.")
    for part in PARTS:
        try:
            found = _called(kind, f"samples({part!r})", functools.partial(data.samples, part))
        except NotOfInterface:
            raise
        except DataError:
            continue  # a part that isn't there: whoever needs it says so
        _refuse(kind, f"samples({part!r})", _wrong_samples(found))
        for sample in found[:1]:
            _check_sample(kind, data, sample)


def _check_sample(kind: str, data: DataSet, sample: Sample) -> None:
    shapes = {}
    for name, wrong in CHECKS.items():
        what = f"{name}({sample.id!r})"
        try:
            value = _called(kind, what, functools.partial(getattr(data, name), sample))
        except NotOfInterface:
            raise
        except DataError:
            continue  # this file is broken or missing: the stage that reads it knows what to do
        _refuse(kind, what, wrong(data, value))
        shapes[name] = getattr(value, "shape", ())[:2]
    if shapes.get("labels") and shapes.get("image") and shapes["labels"] != shapes["image"]:
        said = f"is of shape {shapes['labels']}, and the image of {shapes['image']}; want one label a pixel"
        _refuse(kind, f"labels({sample.id!r})", said)


class NotOfInterface(DataError):
    """A data set of one's own doesn't do what the interface says."""


def _refuse(kind: str, what: str, wrong: str) -> None:
    if wrong:
        raise NotOfInterface(f"data.kind {kind!r}: {what} {wrong}. {SEE}.")


def _called(kind: str, what: str, call: Callable[[], Made]) -> Made:
    """What foreign code gives. Raises: DataError as it does, NotOfInterface for any other exception, with its place."""
    try:
        return call()
    except DataError:
        raise
    except Exception as error:
        raise NotOfInterface(f"data.kind {kind!r}: {what} fails: {_told(error)}. Correct it.") from None


def _told(error: Exception) -> str:
    """An exception in one line, and where it was raised."""
    said = " ".join(str(error).split())[:200]
    last = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" ({last[0].filename}, line {last[0].lineno})" if last and "importlib" not in last[0].filename else ""
    return f"{type(error).__name__}: {said}{place}"


def _described(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of shape {value.shape}, {value.dtype}"
    return f"{type(value).__name__} {value!r}"[:100]


def _wrong_samples(found: object) -> str:
    if not isinstance(found, list) or not all(isinstance(sample, Sample) for sample in found):
        return f"gives {_described(found)}; want a list of pipeline.data.base.Sample"
    if not found:
        return "gives no sample; want at least one, or DataError for a part that isn't there"
    ids = [sample.id for sample in found]
    if not all(isinstance(i, str) and i for i in ids):
        return f"gives the id {next(i for i in ids if not isinstance(i, str) or not i)!r}; want text"
    if len(set(ids)) < len(ids):
        return f"gives the id {next(i for n, i in enumerate(ids) if i in ids[:n])!r} twice; want each sample once"
    return ""


def _wrong_image(data: DataSet, value: object) -> str:
    is_one = isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] == 3 and value.dtype == np.uint8
    return "" if is_one else f"gives {_described(value)}; want RGB of shape (H, W, 3), uint8"


def _wrong_labels(data: DataSet, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype != LABEL:
        return f"gives {_described(value)}; want ids of shape (H, W), int16, or None"
    num = len(data.classes)
    if value.size and (value.min() < IGNORE or value.max() >= num):
        return f"gives ids from {value.min()} to {value.max()}; want 0 to {num - 1}, and {IGNORE} without a class"
    return ""


def _wrong_stamp(data: DataSet, value: object) -> str:
    return "" if isinstance(value, str) and value else f"gives {_described(value)}; want text that follows the content"


CHECKS = {"image": _wrong_image, "labels": _wrong_labels, "stamp": _wrong_stamp, "mask_stamp": _wrong_stamp}
