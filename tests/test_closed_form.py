"""The two implementations of the losses, plain and with gradients written out, in chunks that don't divide."""

import inspect
from types import FunctionType

import pytest
import torch
from torch import Tensor

from pipeline.config import Train
from pipeline.learning.objective import LOSSES, Learner, closed_set_terms, loss_terms
from pipeline.models.glm import ClsBank
from pipeline.models.vla import VisualLanguageAdapter
from pipeline.ops import closed_form, losses
from pipeline.ops.losses import IGNORE, competing

FORMATS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-8}  # softplus is exact to 2e-9 only
B, C, H, W, SEEN, POTENTIAL = 3, 8, 5, 6, 3, 4
K = SEEN + POTENTIAL
OWNERS = torch.tensor([0, 1, 1, 2])  # the image of each potential object


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setitem(closed_form.CHUNK_ELEMENTS, "cpu", 50)  # 7 positions of 7 ids; 30 positions


def draw(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_ids(high: int) -> Tensor:
    ids = torch.randint(-2, high, (B, H, W), generator=torch.Generator().manual_seed(1))
    return ids.where(ids >= 0, IGNORE)


def own_ids() -> Tensor:
    """Random ones, potential objects in their own image only."""
    ids, own = random_ids(K), competing(OWNERS, B, SEEN, "image")
    return ids.where(own.gather(1, ids.clamp(min=0).flatten(1)).view_as(ids), IGNORE)


IDS = {
    "random": own_ids(),
    "no potential object": random_ids(SEEN),
    "one class": torch.full((B, H, W), 1),
    "one pixel": torch.full((B, H, W), IGNORE),
    "all ignored": torch.full((B, H, W), IGNORE),
}
IDS["one pixel"][1, 2, 3] = 0
EDGES = pytest.mark.parametrize("ids", IDS.values(), ids=IDS)


def agree(name: str, inputs: list[Tensor], *rest: object) -> None:
    """Both values and both gradients, for a random weighting of the outputs; floating inputs come first."""
    found = []
    for way in LOSSES.values():
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        values = getattr(way, name)(*leaves, *rest)
        values = torch.stack(values) if isinstance(values, tuple) and values[1].ndim == 0 else values
        values, others = (values[0], values[1:]) if isinstance(values, tuple) else (values, ())
        weight = draw(*values.shape, seed=9).to(values.dtype)
        gradients = torch.autograd.grad((values * weight).sum(), leaves, materialize_grads=True)
        assert all(g.isfinite().all() for g in gradients)
        found.append((values, *others, *gradients))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        limit = TOLERANCE[inputs[0].dtype]
        torch.testing.assert_close(one, other, atol=limit, rtol=limit)


def laid_out(value: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return value.to(dtype).contiguous(memory_format=layout)


def test_both_have_the_same_names_and_signatures():
    assert tuple(LOSSES.values()) == (losses, closed_form)
    names = {
        name
        for name, value in vars(closed_form).items()
        if isinstance(value, FunctionType) and value.__module__ == closed_form.__name__ and name in vars(losses)
    }
    assert names == {"pooled", "centroids", "logits", "cross_entropy", "count_masks", "focal_and_dice"}
    for name in names:
        found = inspect.signature(getattr(closed_form, name), eval_str=True)
        assert found == inspect.signature(getattr(losses, name), eval_str=True), name


@FORMATS
@TYPES
@pytest.mark.parametrize("how", ["attention", "max", "mean"])
def test_pooled(layout, dtype, how):
    cls, features = draw(B, C, seed=2, scale=3).to(dtype), laid_out(draw(B, C, H, W), dtype, layout)
    for shaped in (features, features.flatten(2)):
        found = []
        for way in LOSSES.values():
            leaf = shaped.detach().requires_grad_()
            value = way.pooled(cls, leaf, how)
            found.append((value, *torch.autograd.grad((value * cls).sum(), leaf)))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@FORMATS
@TYPES
@EDGES
def test_centroids(layout, dtype, ids):
    agree("centroids", [laid_out(draw(B, C, H, W), dtype, layout)], ids, K)


@FORMATS
@TYPES
@pytest.mark.parametrize("num_potential", [0, POTENTIAL])
def test_logits(layout, dtype, num_potential):
    features, text = laid_out(draw(B, C, H, W), dtype, layout), draw(SEEN, C, seed=2).to(dtype)
    potential = draw(num_potential, C, seed=3).to(dtype).requires_grad_()
    found = []
    for way in LOSSES.values():
        leaf = features.detach().requires_grad_()
        value = way.logits(leaf, text, potential)
        weight = draw(*value.shape, seed=9).to(dtype)
        found.append((value, *torch.autograd.grad((value * weight).sum(), [leaf, potential])))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert found[1][1].stride() == features.stride()


@FORMATS
@TYPES
@EDGES
@pytest.mark.parametrize("potentials", ["batch", "image"])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_cross_entropy_focal_and_dice(layout, dtype, ids, potentials, scale):
    x = laid_out(draw(B, K, H, W, scale=scale), dtype, layout)
    competes = competing(OWNERS, B, SEEN, potentials)
    agree("cross_entropy", [x], ids, competes)
    for num_masks in (None, torch.tensor(0.5), torch.tensor(7.0)):
        agree("focal_and_dice", [x], ids, num_masks, competes)
    assert losses.count_masks(ids, K) == closed_form.count_masks(ids, K)


@FORMATS
def test_gradients_are_those_of_finite_differences(layout):
    """In float64, of the written-out ones; the plain ones are autograd's own."""
    double = torch.float64
    features = laid_out(draw(B, C, H, W), double, layout).requires_grad_()
    x = laid_out(draw(B, K, H, W), double, layout).requires_grad_()
    text, potential = draw(SEEN, C, seed=2), draw(POTENTIAL, C, seed=3).requires_grad_()
    cls, ids, competes = draw(B, C, seed=4), own_ids(), competing(OWNERS, B, SEEN, "image")
    for function, inputs in (
        (lambda f: closed_form.pooled(cls, f), [features]),
        (lambda f: closed_form.centroids(f, ids, K)[0], [features]),
        (lambda f, p: closed_form.logits(f, text, p), [features, potential]),
        (lambda a: closed_form.cross_entropy(a, ids, competes), [x]),
        (lambda a: closed_form.focal_and_dice(a, ids, None, competes), [x]),
    ):
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@FORMATS
def test_no_gradient_that_autograd_hands_over_is_written_into(layout):
    """torch counts the writes into a tensor, those too that leave its values as they were."""
    features, x = (laid_out(draw(B, n, H, W), torch.float32, layout).requires_grad_() for n in (C, K))
    text, potential = draw(SEEN, C, seed=2).float(), draw(POTENTIAL, C, seed=3).float().requires_grad_()
    ids, competes = own_ids(), competing(OWNERS, B, SEEN, "image")
    for function, *inputs in (
        (closed_form.AttentionPool, draw(B, C, seed=4).float(), features),
        (closed_form.Logits, features, text, potential),
        (closed_form.SoftmaxEntropy, x, ids, competes),
        (closed_form.SigmoidSums, x, ids, competes),
    ):
        found = function.apply(*inputs)
        values = found if isinstance(found, tuple) else (found,)
        handed_over = [torch.randn_like(value) for value in values]
        before = [gradient._version for gradient in handed_over]
        leaves = [value for value in inputs if value is not None and value.requires_grad]
        torch.autograd.grad(values, leaves, handed_over)
        assert [gradient._version for gradient in handed_over] == before, function.__name__


@pytest.mark.parametrize("name", ["cross_entropy", "focal_and_dice"])
def test_logits_in_half_precision_keep_their_type_and_lose_only_their_rounding(name):
    x, ids = draw(B, K, H, W, scale=3).bfloat16().requires_grad_(), own_ids()
    twin = x.detach().float().requires_grad_()
    for way in LOSSES.values():
        loss = getattr(way, name)
        got, wanted = (sum(v) if isinstance(v, tuple) else v for v in (loss(x, ids), loss(twin, ids)))
        assert got.dtype == torch.float32
        assert got.item() == wanted.item(), "computed in float32 from the same values"
        (gradient,), (expected,) = torch.autograd.grad(got, x), torch.autograd.grad(wanted, twin)
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), expected, atol=1e-6, rtol=2**-7)


def test_nothing_is_kept_but_the_logits():
    """What backward holds on to: the logits themselves and arrays of one value a pixel."""
    x, ids = draw(B, K, H, W).float().requires_grad_(), own_ids()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        closed_form.cross_entropy(x, ids)
        closed_form.focal_and_dice(x, ids)
    large = {t.data_ptr() for t in kept if t.numel() >= x.numel()}
    assert large == {x.data_ptr()}


@FORMATS
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"potentials": "image"},
        {"nel": "seen", "potential_ce": False},
        {"loss_grid": "full", "glm": "mean"},
        {"potential": False, "generate": False, "glm": "off"},
    ],
    ids=str,
)
def test_the_objective_is_the_same_text_for_both(layout, changes):
    """Every term, and the gradients of their sum at the student's features and the adapter's weights."""
    channels, generator = 16, torch.Generator().manual_seed(5)
    labels = torch.randint(0, SEEN + 1, (B, 16, 16), generator=generator)
    batch = {
        "labels": labels.where(labels < SEEN, 255).to(torch.uint8),
        "pseudo": torch.randint(0, 4, (B, 4, 4), generator=generator).to(torch.uint8),
        "cls": draw(B, channels, seed=6).float(),
        "sample": torch.arange(B),
    }
    vla = VisualLanguageAdapter(channels)
    found = []
    for name in LOSSES:
        text = torch.nn.functional.normalize(draw(SEEN, channels, seed=7).float(), dim=1)
        learner = Learner(None, vla, ClsBank(2, B, channels), text, torch.arange(SEEN))
        dense = laid_out(draw(B, channels, 8, 8), torch.float32, layout).requires_grad_()
        terms, counts = loss_terms(Train(losses=name, **changes), learner, dense, batch)
        leaves = [dense, *vla.parameters()]
        gradients = torch.autograd.grad(sum(terms.values()), leaves, materialize_grads=True)
        terms = {name: value.detach() for name, value in terms.items()}
        found.append(({name: float(value) for name, value in (terms | counts).items()}, gradients))
    (one, gradients), (other, expected) = found
    assert one == pytest.approx(other, rel=1e-4)
    for gradient, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, wanted, atol=1e-5, rtol=1e-3)


def test_the_closed_set_objective_is_the_same_text_for_both():
    labels = torch.tensor([[[0, 4], [255, 4]]], dtype=torch.uint8)
    learner = Learner(None, torch.nn.Identity(), ClsBank(0, 1, C), draw(2, C).float(), torch.tensor([0, 4]))
    dense = draw(1, C, 2, 2, seed=3).float()
    plain, fused = (
        closed_set_terms(Train(losses=name), learner, dense, {"labels": labels})[0]["ce"] for name in LOSSES
    )
    torch.testing.assert_close(plain, fused)
