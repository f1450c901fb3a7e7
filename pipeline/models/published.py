"""Weights as they are published, put into a net tensor by tensor: other prefixes, a classifier left over.

A file may be an encoder's alone (timm's, torchvision's) or a whole net's (torchvision's, one of your own); the names of
its tensors may begin otherwise than here (`backbone.`, nothing, smp's `encoder.model.`), and timm's encoders write
`stages.0` as `stages_0` where they give features. Names are compared without these differences, shapes as they are.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.models.dense import StudentError, said

WRAPPED = ("state_dict", "model_state_dict", "model")  # keys that training code keeps a state dict under
LEAST = 0.5  # of the encoder's numbers: with less a file is another net's
MOST_NAMED = 3  # tensors named in a line


def read_state(path: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a state dict that torch's safe loader reads.

    Raises: StudentError when it can't be read, or when a tensor isn't finite.
    """
    try:
        if path.endswith(".safetensors"):
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise StudentError(
            f"student.weights {path}: can't be read: {_reason(error)}. Want safetensors or a state dict."
        ) from None
    for key in WRAPPED:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    state = {str(k): v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, Mapping) else {}
    if not state:
        raise StudentError(f"student.weights {path}: holds no tensors by name. Want safetensors or a state dict.")
    bad = [name for name, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise StudentError(f"student.weights {path}: {bad[0]} holds values that aren't finite. Take another file.")
    return state


def _reason(error: Exception) -> str:
    """torch explains at length how to load pickles by force: of that only what is wrong."""
    return said(error).partition(" (1) In PyTorch")[0].partition(" Please")[0]


@dataclass
class Match:
    """Which tensor of a file goes into which of the net, both by name; `misshapen` fit by name alone."""

    pairs: dict[str, str]
    misshapen: list[str]
    left_out: list[str]


def match(net: nn.Module, state: Mapping[str, Tensor], is_encoder: Callable[[str], bool]) -> Match:
    """The renaming, one prefix for another, that fills most of the encoder."""
    own = {name: value for name, value in net.state_dict().items() if value.is_floating_point()}
    wanted = [name for name in own if is_encoder(name)]
    filled, best = (-1, -1), Match({}, [], list(state))
    for cut, put in product(_prefixes(state), _prefixes({name: own[name] for name in wanted})):
        index = {_plain(name.removeprefix(put)): name for name in own if name.startswith(put)}
        plain = {name: _plain(name.removeprefix(cut)) for name in state if name.startswith(cut)}
        named = {index[key]: name for name, key in plain.items() if key in index}
        pairs = {ours: theirs for ours, theirs in named.items() if own[ours].shape == state[theirs].shape}
        numbers = sum(own[name].numel() for name in pairs if is_encoder(name))
        if (numbers, len(named)) > filled:
            used = set(named.values())
            left = [name for name, value in state.items() if name not in used and value.is_floating_point()]
            filled, best = (numbers, len(named)), Match(pairs, sorted(named.keys() - pairs.keys()), left)
    return best


def _prefixes(state: Mapping[str, Tensor]) -> Iterator[str]:
    """Nothing, then each beginning up to a point that half of the numbers or more have in common."""
    yield ""
    total, depth, names = sum(value.numel() for value in state.values()), 1, list(state)
    while names:
        sizes: dict[str, int] = {}
        for name in names:
            head = ".".join(name.split(".")[:depth]) + "."
            sizes[head] = sizes.get(head, 0) + state[name].numel()
        common = [head for head, size in sizes.items() if 2 * size >= total]
        yield from common
        names = [name for name in names if name.count(".") > depth and any(name.startswith(head) for head in common)]
        depth += 1


def _plain(name: str) -> str:
    return name.replace(".", "_")


def load(
    net: nn.Module, state: Mapping[str, Tensor], found: Match, is_encoder: Callable[[str], bool], what: str
) -> str:
    """Copies what fits into the net; the line that says what was loaded, left out and is missing.

    `what` names the file, and the net, in the line: "student.weights a.pth". Raises: StudentError below LEAST.
    """
    own = net.state_dict()
    wanted = [name for name, value in own.items() if value.is_floating_point() and is_encoder(name)]
    missing = [name for name in wanted if name not in found.pairs and name not in found.misshapen]
    check_share(own, wanted, found, list(state), what)
    with torch.no_grad():
        for ours, theirs in found.pairs.items():
            own[ours].copy_(state[theirs])
    inside = sum(name in found.pairs for name in wanted)
    return line(what, inside, len(wanted), len(found.pairs) - inside, found.left_out, missing, found.misshapen)


def check_share(own: Mapping[str, Tensor], wanted: list[str], found: Match, theirs: list[str], what: str) -> None:
    """Raises: StudentError when less than LEAST of the encoder's numbers would be filled."""
    total = sum(own[name].numel() for name in wanted)
    filled = sum(own[name].numel() for name in wanted if name in found.pairs)
    if filled >= LEAST * total:
        return
    shapes = f"; of another shape: {_named(found.misshapen)}" if found.misshapen else ""
    raise StudentError(
        f"{what}: holds {100 * filled / total:.0f} % of the encoder, want {100 * LEAST:.0f} % at least (the net has "
        f"{_named(wanted)}, the file {_named(theirs)}{shapes}). Give the encoder's own file, or null."
    )


def line(
    what: str, inside: int, of: int, others: int, left_out: list[str], missing: list[str], misshapen: list[str]
) -> str:
    """What was loaded, left out and missing, on one line."""
    more = f" and {others} of the rest" if others else ""
    parts = [f"{what}: {inside} of {of} tensors of the encoder{more} loaded", f"left out: {_named(left_out)}"]
    parts.append(f"missing: {_named(missing)}")
    if misshapen:
        parts.append(f"of another shape, so drawn anew: {_named(misshapen)}")
    return "; ".join(parts)


def _named(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more if names else "none"
