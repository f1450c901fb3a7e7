"""Global learning module beside its loss: how long CLS tokens are, and where eq. 3's extra negatives come from.

Axes: B images, C channels, M bank entries. No trainable parameter in this file.
"""

from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

EMPTY = -1  # sample index of a slot that holds nothing


def of_length(cls: Tensor, length: float | None) -> Tensor:
    """CLS tokens for eq. 1, made this long or left as the teacher made them (None): (..., C).

    CLIP's own loss doesn't know how long its features are; eq. 1's softmax is the sharper the longer they are.
    """
    return cls if length is None else length * normalize(cls.float(), dim=-1)


def attention_over_largest(cls: Tensor, dense: Tensor, length: float | None) -> Tensor:
    """Eq. 1's weights over their largest, for a picture: cls (C,), dense (C, H, W) -> (H, W), 0 to 1."""
    score = torch.einsum("c,chw->hw", of_length(cls, length), dense) / sqrt(len(cls))
    return (score - score.max()).exp()


class ClsBank(nn.Module):
    """The CLS tokens of the last iterations, first in, first out: the extra negatives of eq. 3.

    Compute the loss, then push, then update the student: the current tokens are never in the bank
    while their own loss is computed. Buffers, so a checkpoint restores it.

    iterations: how many are kept (the paper's n = 24; 0 is no bank); batch: the largest number of tokens
    pushed at once (under several processes: the gathered batch); channels: C.
    """

    tokens: Tensor
    samples: Tensor
    num_pushed: Tensor

    def __init__(self, iterations: int, batch: int, channels: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(iterations, batch, channels))
        self.register_buffer("samples", torch.full((iterations, batch), EMPTY, dtype=torch.int64))
        self.register_buffer("num_pushed", torch.zeros((), dtype=torch.int64))

    def entries(self) -> tuple[Tensor, Tensor]:
        """All slots: tokens (M, C) and sample indices (M,), M = iterations * batch; -1 where nothing is."""
        return self.tokens.flatten(0, 1), self.samples.flatten()

    @torch.no_grad()
    def push(self, cls: Tensor, samples: Tensor) -> None:
        """Replace the oldest iteration by this one; a short batch leaves the rest of its slots empty.

        Shapes: cls (B, C) with B <= batch, samples (B,) int64, not negative.
        Raises: ValueError for more tokens than slots, or other shapes.
        """
        iterations, batch, channels = self.tokens.shape
        if cls.shape != (len(samples), channels) or len(samples) > batch:
            raise ValueError(
                f"cls {tuple(cls.shape)} and samples {tuple(samples.shape)} don't fit a bank of "
                f"{batch} tokens of {channels} channels an iteration."
            )
        if iterations == 0:
            return
        slot = int(self.num_pushed) % iterations
        self.tokens[slot].zero_()
        self.samples[slot].fill_(EMPTY)
        self.tokens[slot, : len(cls)] = cls
        self.samples[slot, : len(cls)] = samples
        self.num_pushed += 1


class CachedNegatives(nn.Module):
    """In place of the bank: `number` CLS tokens drawn anew each iteration from all that are cached.

    A bank forgets what is older than n iterations; the cache has every image at any time. Entries are a function of
    (seed, iterations so far), so that a resumed run draws what an uninterrupted one does.

    tokens: (R, V, C), kept in their own precision; samples: (R,) int64, the rows they belong to.
    Raises: ValueError when there are fewer than `number`.
    """

    table: Tensor
    rows: Tensor
    num_pushed: Tensor

    def __init__(self, number: int, tokens: Tensor, samples: Tensor, seed: int) -> None:
        super().__init__()
        rows, views, _ = tokens.shape
        if number > rows * views:
            raise ValueError(f"{number} negatives are wanted, and {rows * views} CLS tokens are cached.")
        self.number, self.seed = number, seed
        self.register_buffer("table", tokens.flatten(0, 1), persistent=False)  # checkpoints don't repeat the cache
        self.register_buffer("rows", samples.repeat_interleave(views), persistent=False)
        self.register_buffer("num_pushed", torch.zeros((), dtype=torch.int64))

    def entries(self) -> tuple[Tensor, Tensor]:
        """This iteration's: tokens (M, C) float32, sample indices (M,), M = number, none twice."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, int(self.num_pushed)]))
        drawn = torch.from_numpy(rng.choice(len(self.table), self.number, replace=False, shuffle=False))
        drawn = drawn.to(self.table.device)
        return self.table[drawn].float(), self.rows[drawn]

    @torch.no_grad()
    def push(self, cls: Tensor, samples: Tensor) -> None:
        """An iteration is over; its tokens are in the cache already. Shapes as ClsBank's."""
        self.num_pushed += 1
