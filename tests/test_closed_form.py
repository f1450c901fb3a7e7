"""The written-out gradients against autograd's on the plain formulas, in float64, in chunks that don't divide."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.glm import pooled, pooled_and_dense
from pipeline.ops import closed_form
from pipeline.ops.losses import (
    IGNORE,
    centroids,
    centroids_and_features,
    competing,
    count_masks,
    cross_entropy,
    focal_and_dice,
    logits,
)

FORMATS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setitem(closed_form.CHUNK_ELEMENTS, "cpu", 50)  # 7 positions of 7 ids; 30 positions


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def some_ids(low: int = -2, high: int = 7) -> Tensor:
    ids = torch.randint(low, high, (3, 5, 6), generator=torch.Generator().manual_seed(1))
    return ids.where(ids >= 0, IGNORE)


def agree(got: Tensor, inputs: list[Tensor], wanted: Tensor, plain: list[Tensor]) -> None:
    """Values and gradients, for a random weighting of the outputs."""
    torch.testing.assert_close(got, wanted.float(), atol=1e-5, rtol=1e-5)
    weight = draw(*got.shape, seed=9)
    slopes = torch.autograd.grad((got * weight).sum(), inputs)
    expected = torch.autograd.grad((wanted * weight.double()).sum(), plain)
    for slope, want in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, want.float(), atol=1e-5, rtol=1e-5)


def twins(value: Tensor, layout: torch.memory_format = torch.contiguous_format) -> tuple[Tensor, Tensor]:
    """A float32 leaf in the memory format asked for, and its float64 twin."""
    leaf = value.contiguous(memory_format=layout) if value.ndim == 4 else value.clone()
    return leaf.requires_grad_(), value.double().requires_grad_()


@FORMATS
def test_logits(layout):
    features, wide = twins(draw(3, 8, 5, 6), layout)
    potential, wide_potential = twins(draw(3, 8, seed=3))
    text = draw(4, 8, seed=2)
    got = logits(features, text, potential)
    wanted = torch.einsum("bchw,kc->bkhw", wide, torch.cat([text.double(), wide_potential]))
    agree(got, [features, potential], wanted, [wide, wide_potential])
    (slope,) = torch.autograd.grad(logits(features, text, potential).sum(), features)
    assert slope.stride() == features.stride()


@FORMATS
def test_centroids(layout):
    features, wide = twins(draw(3, 8, 5, 6), layout)
    ids = some_ids(high=6)
    got, present = centroids(features, ids, 7)
    one_hot = F.one_hot(ids.where(ids >= 0, 7), 8)[..., :7].double()
    wanted = torch.einsum("bchw,bhwk->kc", wide, one_hot) / one_hot.sum((0, 1, 2)).clamp(min=1)[:, None]
    agree(got, [features], wanted, [wide])
    assert present.tolist() == [True] * 6 + [False]


@FORMATS
def test_attention(layout):
    features, wide = twins(draw(3, 8, 5, 6), layout)
    cls = draw(3, 8, seed=2, scale=3)
    weight = (torch.einsum("bc,bchw->bhw", cls.double(), wide) / 8**0.5).flatten(1).softmax(1)
    wanted = torch.einsum("bl,bcl->bc", weight, wide.flatten(2))
    agree(pooled(cls, features), [features], wanted, [wide])


@FORMATS
@pytest.mark.parametrize("last", ["sum", "product", "only the last", "none"])
def test_terms_in_a_row_are_terms_side_by_side(layout, last):
    """Attention, then centroids, then what uses the features last: its slope, which the others add to in place."""
    features, wide = twins(draw(3, 8, 5, 6), layout)
    cls, ids, weight = draw(3, 8, seed=2), some_ids(high=6), draw(3, 8, 5, 6, seed=4)
    uses = {  # a slope that is one expanded number, one of its own array, ...
        "sum": lambda x: x.sum(),
        "product": lambda x: (x * weight.to(x.dtype)).sum(),
        "only the last": lambda x: (x * weight.to(x.dtype)).sum(),
        "none": lambda x: x.detach().sum(),
    }
    first, handed_on = pooled_and_dense(cls, features)
    second, _, handed_on = centroids_and_features(handed_on, ids, 7)
    found = (first.sum() + second.square().sum()) * (last != "only the last") + uses[last](handed_on)
    attention = (torch.einsum("bc,bchw->bhw", cls.double(), wide) / 8**0.5).flatten(1).softmax(1)
    one_hot = F.one_hot(ids.where(ids >= 0, 7), 8)[..., :7].double()
    means = torch.einsum("bchw,bhwk->kc", wide, one_hot) / one_hot.sum((0, 1, 2)).clamp(min=1)[:, None]
    wanted = torch.einsum("bl,bcl->bc", attention, wide.flatten(2)).sum() + means.square().sum()
    agree(found, [features], wanted * (last != "only the last") + uses[last](wide), [wide])
    (slope,) = torch.autograd.grad(uses["product"](pooled_and_dense(cls, features)[1]), features)
    assert torch.equal(slope, weight), "a term that isn't in the loss changes nothing"


@FORMATS
@pytest.mark.parametrize("within_image", [False, True])
def test_cross_entropy(layout, within_image):
    x, wide = twins(draw(3, 7, 5, 6, scale=5), layout)
    planes = competing(torch.tensor([0, 1, 1, 2]), 3, 3, "image") if within_image else None
    ids = some_ids(high=3)
    masked = wide if planes is None else wide.masked_fill(~planes[:, :, None, None], -torch.inf)
    agree(cross_entropy(x, ids, planes), [x], F.cross_entropy(masked, ids), [wide])


@FORMATS
@pytest.mark.parametrize("within_image", [False, True])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_focal_and_dice(layout, within_image, scale):
    x, wide = twins(draw(3, 7, 5, 6, scale=scale), layout)
    planes = competing(torch.tensor([0, 1, 1, 2]), 3, 3, "image") if within_image else None
    ids = some_ids(high=3)
    g = F.one_hot(ids.where(ids >= 0, 7), 8)[..., :7].permute(0, 3, 1, 2).double()
    p = wide.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(wide, g, reduction="none")
    terms = (0.25 * g + 0.75 * (1 - g)) * (1 - p * g - (1 - p) * (1 - g)) ** 2 * entropy
    kept = torch.ones(3, 7).double() if planes is None else planes.double()
    present = g.amax((2, 3))
    scores = 1 - (2 * (p * g).sum((2, 3)) + 1) / (p.sum((2, 3)) + g.sum((2, 3)) + 1)
    wanted = torch.stack([(terms.mean((2, 3)) * kept).sum(), (scores * present).sum()]) / present.sum()
    num_masks = count_masks(ids, 7)
    agree(torch.stack(focal_and_dice(x, ids, num_masks, planes)), [x], wanted, [wide])


def test_logits_in_half_precision_keep_their_type_and_lose_only_their_rounding():
    x, ids = draw(3, 7, 5, 6, scale=3).bfloat16().requires_grad_(), some_ids()
    twin = x.detach().float().requires_grad_()
    for loss in (cross_entropy, lambda a, b: sum(focal_and_dice(a, b))):
        got, wanted = loss(x, ids), loss(twin, ids)
        assert got.dtype == torch.float32
        assert got.item() == wanted.item(), "computed in float32 from the same values"
        (slope,), (expected,) = torch.autograd.grad(got, x), torch.autograd.grad(wanted, twin)
        assert slope.dtype == torch.bfloat16
        torch.testing.assert_close(slope.float(), expected, atol=1e-6, rtol=2**-7)


def test_no_plane_is_kept_but_the_logits():
    """What backward holds on to: the logits themselves and arrays of one value a pixel."""
    x, ids = draw(3, 7, 5, 6).requires_grad_(), some_ids()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        cross_entropy(x, ids)
        focal_and_dice(x, ids)
    large = {t.data_ptr() for t in kept if t.numel() >= x.numel()}
    assert large == {x.data_ptr()}
