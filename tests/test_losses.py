"""Equations 3 and 6 to 10, focal and dice: by hand, then against the plain definition with its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.ops import closed_form, losses
from pipeline.ops.losses import IGNORE, combined_labels, competing, generate_loss, infonce, seen_only


@pytest.fixture(params=[losses, closed_form], ids=["plain", "fused"])
def ways(request):
    return request.param


# --- eq. 6: labels -------------------------------------------------------------------------------


def test_combined_labels_by_hand():
    # Classes 4 and 7 are seen, as ids 0 and 1. Image 0: the left token is mask 2, the right one annotated.
    # Image 1: masks 1 and 3; mask 3's pixels all have labels, so it gets no number.
    labels = torch.tensor([[[255, 255, 4, 7], [255, 4, 255, 7]], [[255, 255, 4, 4], [7, 255, 4, 4]]])
    pseudo = torch.tensor([[[2, 0]], [[1, 3]]], dtype=torch.uint8)
    result = combined_labels(labels.to(torch.uint8), pseudo, torch.tensor([4, 7]))
    assert result.ids.tolist() == [
        [[2, 2, 0, 1], [2, 0, IGNORE, 1]],  # the 255 under an annotated token stays ignored
        [[3, 3, 0, 0], [1, 3, 0, 0]],
    ]
    assert result.ids.dtype == torch.int64
    assert result.image_of_potential.tolist() == [0, 1]
    assert result.num_potential == 2


def test_ids_are_unique_in_the_batch_and_ordered_by_image_then_mask():
    labels = torch.full((2, 1, 3), 255)
    pseudo = torch.tensor([[[5, 1, 5]], [[1, 5, 9]]], dtype=torch.uint8)
    result = combined_labels(labels, pseudo, [0])
    assert result.ids.tolist() == [[[2, 1, 2]], [[3, 4, 5]]]
    assert result.image_of_potential.tolist() == [0, 0, 1, 1, 1]


def test_padding_and_unwritten_tokens_are_ignored():
    labels = torch.full((2, 1, 4), 255)
    pseudo = torch.tensor([[[255, 254, 253, 0]], [[255, 255, 255, 255]]], dtype=torch.uint8)
    result = combined_labels(labels, pseudo, [3])
    assert result.ids.tolist() == [[[IGNORE, IGNORE, 1, IGNORE]], [[IGNORE] * 4]]
    assert result.image_of_potential.tolist() == [0]


def test_unseen_labels_that_slip_through_are_treated_as_ignored():
    # Class 9 is not among the seen ones: it must not reach the loss as a label.
    result = combined_labels(torch.tensor([[[9, 3]]]), torch.tensor([[[1, 1]]], dtype=torch.uint8), [3])
    assert result.ids.tolist() == [[[1, 0]]]


def test_without_potential_objects_the_ignored_area_stays_ignored():
    labels, pseudo = torch.tensor([[[255, 3]]]), torch.tensor([[[1, 1]]], dtype=torch.uint8)
    result = combined_labels(labels, pseudo, [3], potential=False)
    assert result.ids.tolist() == [[[IGNORE, 0]]]
    assert result.num_potential == 0
    assert result.image_of_potential.shape == (0,)


def test_pseudo_labels_are_read_at_pixel_centres():
    # Two tokens over three pixels: centres at 1/6, 3/6 and 5/6; the middle one belongs to the second token.
    labels, pseudo = torch.full((1, 1, 3), 255), torch.tensor([[[1, 2]]], dtype=torch.uint8)
    assert combined_labels(labels, pseudo, [0]).ids.tolist() == [[[1, 2, 2]]]


def test_labels_of_another_batch_are_refused():
    with pytest.raises(ValueError, match="not one batch"):
        combined_labels(torch.zeros(2, 4, 4), torch.zeros(1, 2, 2, dtype=torch.uint8), [0])


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), num_images=st.integers(1, 4), num_seen=st.integers(0, 4))
def test_combined_labels_against_a_loop(seed, num_images, num_seen):
    generator = torch.Generator().manual_seed(seed)
    seen_ids = torch.randperm(6, generator=generator)[:num_seen]
    choice = torch.cat([seen_ids, torch.tensor([255])])
    labels = choice[torch.randint(len(choice), (num_images, 8, 8), generator=generator)]
    values = torch.tensor([0, 1, 2, 3, 58, 253, 255], dtype=torch.uint8)
    pseudo = values[torch.randint(len(values), (num_images, 4, 4), generator=generator)]
    result = combined_labels(labels, pseudo, seen_ids)
    numbers: dict[tuple[int, int], int] = {}
    for b in range(num_images):
        for y in range(8):
            for x in range(8):
                label, mask, got = (int(labels[b, y, x]), int(pseudo[b, y // 2, x // 2]), int(result.ids[b, y, x]))
                if label != 255:
                    assert int(seen_ids[got]) == label
                elif 0 < mask < 254:
                    assert numbers.setdefault((b, mask), got) == got
                else:
                    assert got == IGNORE
    order = [numbers[key] for key in sorted(numbers)]
    assert order == list(range(num_seen, num_seen + len(numbers)))
    assert result.image_of_potential.tolist() == [image for image, _ in sorted(numbers)]


def test_competing_by_hand():
    owner = torch.tensor([0, 1, 1])
    assert competing(owner, 2, 1) is None
    assert competing(owner, 2, 1, "image").tolist() == [[True, True, False, False], [True, False, True, True]]
    with pytest.raises(ValueError, match="'both'"):
        competing(owner, 2, 1, "both")


# --- eq. 3 ---------------------------------------------------------------------------------------

NO_BANK = (torch.zeros(0, 2), torch.zeros(0, dtype=torch.int64))


def test_infonce_by_hand():
    # s_0 = x, s_1 = y, predictions x and 45 degrees, tau = 1, lengths are to be normalised away.
    # i = 0: -log(e^1 / (e^1 + e^0)) = log(1 + e^-1) = 0.313262.
    # i = 1: both similarities are 0.7071, so -log(1/2) = 0.693147. Mean 0.503204.
    cls, predicted = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([[5.0, 0.0], [4.0, 4.0]])
    loss = infonce(cls, predicted, *NO_BANK, torch.tensor([0, 1]), 1.0)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2, abs=1e-6)


def test_the_bank_adds_negatives_and_the_temperature_divides():
    # One image, x = s = prediction, one bank entry y: -log(e^(1/t) / (e^(1/t) + e^0)) = log(1 + e^(-1/t)).
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 7.0]])
    for tau in (1.0, 0.5, 0.07):
        loss = infonce(x, x, y, torch.tensor([9]), torch.tensor([0]), tau)
        assert loss.item() == pytest.approx(math.log1p(math.exp(-1 / tau)), abs=1e-6)


def test_same_samples_and_empty_slots_are_no_negatives():
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    bank, samples = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([4, 4, 5])
    # i = 0 and 1 are sample 4, as is bank entry 0; entry 1 is empty. Left: themselves and y: log(1 + e^-1).
    # i = 2: against x, x and the bank's x: log(1 + 3 e^-1).
    loss = infonce(x, x, bank, torch.tensor([4, -1]), samples, 1.0)
    e = math.exp(-1)
    assert loss.item() == pytest.approx((2 * math.log(1 + e) + math.log(1 + 3 * e)) / 3, abs=1e-6)


def test_infonce_alone_is_zero_and_connected():
    predicted = torch.tensor([[1.0, 2.0]], requires_grad=True)
    loss = infonce(torch.tensor([[1.0, 0.0]]), predicted, *NO_BANK, torch.tensor([0]))
    assert loss.item() == 0
    loss.backward()
    assert predicted.grad is not None
    assert torch.isfinite(predicted.grad).all()
    none = torch.zeros(0, 2, requires_grad=True)
    assert infonce(none, none, *NO_BANK, torch.zeros(0, dtype=torch.int64)).item() == 0


# --- eq. 7 and 8 ---------------------------------------------------------------------------------


def test_centroids_by_hand(ways):
    # Id 0 at pixels 1 and 3 of image 0 and pixel 5 of image 1: mean (1 + 3 + 5) / 3 = 3; id 2 at 4 alone.
    features = torch.tensor([[[[1.0, 2.0, 3.0]]], [[[4.0, 5.0, 6.0]]]])  # (2, 1, 1, 3)
    features = torch.cat([features, 10 * features], dim=1)
    ids = torch.tensor([[[0, IGNORE, 0]], [[2, 0, IGNORE]]])
    mean, present = ways.centroids(features, ids, 3)
    assert mean.tolist() == [[3.0, 30.0], [0.0, 0.0], [4.0, 40.0]]
    assert present.tolist() == [True, False, True]


def test_gradient_of_a_centroid_is_spread_over_its_pixels(ways):
    features = torch.zeros(1, 1, 1, 3, requires_grad=True)
    mean, _ = ways.centroids(features, torch.tensor([[[0, 0, IGNORE]]]), 1)
    mean.sum().backward()
    assert features.grad is not None
    assert features.grad.flatten().tolist() == [0.5, 0.5, 0.0]


def test_centroids_of_nothing(ways):
    features = torch.ones(1, 4, 2, 2, requires_grad=True)
    mean, present = ways.centroids(features, torch.full((1, 2, 2), IGNORE), 3)
    assert (mean == 0).all()
    assert not present.any()
    assert ways.centroids(features, torch.full((1, 2, 2), IGNORE), 0)[0].shape == (0, 4)


def test_generate_loss_by_hand():
    # Ids 0, 2 and 3 are present, 0..2 are seen. Rows of generated: 0, 2, 3. Squares: |(1,0)|^2 = 1,
    # |(0,2) - (1,1)|^2 = 2: mean of two 1.5; the third row is a potential object.
    text = torch.tensor([[0.0, 0.0], [9.0, 9.0], [1.0, 1.0]])
    generated = torch.tensor([[1.0, 0.0], [0.0, 2.0], [50.0, 50.0]], requires_grad=True)
    loss = generate_loss(generated, text, torch.tensor([True, False, True, True]))
    assert loss.item() == 1.5
    loss.backward()
    assert generated.grad is not None
    assert generated.grad[2].tolist() == [0.0, 0.0]


def test_generate_loss_without_a_seen_class_is_zero_and_connected():
    generated = torch.ones(1, 2, requires_grad=True)
    loss = generate_loss(generated, torch.ones(2, 2), torch.tensor([False, False, True]))
    loss.backward()
    assert loss.item() == 0
    assert generated.grad is not None


# --- eq. 9 and 10 --------------------------------------------------------------------------------


def test_logits_by_hand(ways):
    features = torch.tensor([[[[1.0, 0.0]], [[0.0, 2.0]]]])  # pixels (1, 0) and (0, 2)
    x = ways.logits(features, torch.tensor([[3.0, 4.0]]), torch.tensor([[5.0, 6.0], [7.0, 8.0]]))
    assert x[0, :, 0].tolist() == [[3.0, 8.0], [5.0, 12.0], [7.0, 16.0]]
    assert ways.logits(features, torch.tensor([[3.0, 4.0]]), torch.zeros(0, 2)).shape == (1, 1, 1, 2)


def test_cross_entropy_by_hand(ways):
    # Pixel 0: logits 0, ln 3, id 1: -ln(3/4). Pixel 1: logits 0, 0, id 0: ln 2. Pixel 2 ignored.
    x = torch.tensor([[[[0.0, 0.0, 5.0]], [[math.log(3), 0.0, 5.0]]]])
    loss = ways.cross_entropy(x, torch.tensor([[[1, 0, IGNORE]]]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, abs=1e-6)


def test_cross_entropy_within_the_image(ways):
    # Three equal logits, the third belonging to another image: ln 2 instead of ln 3.
    x, ids = torch.zeros(1, 3, 1, 1, requires_grad=True), torch.tensor([[[0]]])
    assert ways.cross_entropy(x, ids).item() == pytest.approx(math.log(3))
    loss = ways.cross_entropy(x, ids, torch.tensor([[True, True, False]]))
    assert loss.item() == pytest.approx(math.log(2))
    loss.backward()
    assert x.grad is not None
    assert x.grad.flatten().tolist() == [-0.5, 0.5, 0.0]


# --- NEL -----------------------------------------------------------------------------------------


def test_focal_by_hand(ways):
    # Two pixels, one class, logits 0: so p = 1/2: ln 2 / 4 before alpha.
    # Pixel 0 positive: 0.25 of it; pixel 1 ignored, so negative: 0.75. Over two pixels, one mask: ln 2 / 8.
    ids = torch.tensor([[[0, IGNORE]]])
    focal, _ = ways.focal_and_dice(torch.zeros(1, 1, 1, 2), ids)
    assert focal.item() == pytest.approx(math.log(2) / 8, abs=1e-6)
    # A logit of ln 3: p = 3/4. Positive: 1/4 * (1/4)^2 * ln(4/3); negative: 3/4 * (3/4)^2 * ln 4.
    focal, _ = ways.focal_and_dice(torch.full((1, 1, 1, 2), math.log(3)), ids)
    expected = (math.log(4 / 3) / 64 + 27 / 64 * math.log(4)) / 2
    assert focal.item() == pytest.approx(expected, abs=1e-6)


def test_dice_by_hand(ways):
    # p = 1/2 everywhere, two of four pixels are the class: 1 - (2 * 1 + 1) / (2 + 2 + 1) = 0.4.
    x, ids = torch.zeros(1, 2, 1, 4), torch.tensor([[[0, 0, IGNORE, IGNORE]]])
    assert ways.focal_and_dice(x, ids)[1].item() == pytest.approx(0.4)  # class 1 is absent: left out
    # Class 1 at one pixel as well: 1 - (2 * 0.5 + 1) / (2 + 1 + 1) = 0.5; (0.4 + 0.5) / 2 masks.
    ids = torch.tensor([[[0, 0, 1, IGNORE]]])
    assert ways.focal_and_dice(x, ids)[1].item() == pytest.approx(0.45)
    assert ways.focal_and_dice(x, ids, torch.tensor(4.0))[1].item() == pytest.approx(0.225)


def test_count_masks_counts_classes_per_image(ways):
    ids = torch.tensor([[[0, 0, 2]], [[2, IGNORE, 2]], [[IGNORE] * 3]])
    assert ways.count_masks(ids, 3).item() == 3


def test_seen_only_turns_potential_objects_into_negatives():
    x, ids = seen_only(torch.arange(4.0).view(1, 4, 1, 1).expand(1, 4, 1, 3), torch.tensor([[[0, 3, IGNORE]]]), 2)
    assert x.shape == (1, 2, 1, 3)
    assert ids.tolist() == [[[0, IGNORE, IGNORE]]]


def plain_nel(x: Tensor, ids: Tensor, planes: Tensor, num_masks: float) -> tuple[Tensor, Tensor]:
    """ZegCLIP's definition, plane by plane with one-hot targets."""
    total_focal, total_dice = x.new_zeros(()), x.new_zeros(())
    for b in range(x.shape[0]):
        for k in range(x.shape[1]):
            if not planes[b, k]:
                continue
            plane, target = x[b, k].flatten(), (ids[b] == k).flatten().to(x.dtype)
            p = plane.sigmoid()
            entropy = F.binary_cross_entropy_with_logits(plane, target, reduction="none")
            p_target = p * target + (1 - p) * (1 - target)
            alpha = 0.25 * target + 0.75 * (1 - target)
            total_focal = total_focal + (alpha * (1 - p_target) ** 2 * entropy).mean()
            if target.any():
                total_dice = total_dice + 1 - (2 * (p * target).sum() + 1) / (p.sum() + target.sum() + 1)
    return total_focal / num_masks, total_dice / num_masks


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.5, 3.0, 20.0]), within_image=st.booleans())
def test_nel_agrees_with_the_plain_definition_and_its_gradients(seed, scale, within_image):
    generator = torch.Generator().manual_seed(seed)
    owner = torch.tensor([0, 0, 1])  # two seen classes, three potential objects of two images
    competes = competing(owner, 2, 2, "image" if within_image else "batch")
    ids = torch.randint(-1, 5, (2, 4, 6), generator=generator)
    own = competing(owner, 2, 2, "image")
    assert own is not None
    ids = torch.where((ids >= 0) & own.gather(1, ids.clamp(min=0).flatten(1)).view_as(ids), ids, IGNORE)
    x = (scale * torch.randn(2, 5, 4, 6, generator=generator)).requires_grad_()
    ids[0, 0, 0] = 0  # an all-ignored batch is another test's
    num_masks = losses.count_masks(ids, 5).item()
    plain = x.detach().double().requires_grad_()
    expected = plain_nel(plain, ids, torch.ones(2, 5).bool() if competes is None else competes, num_masks)
    slopes = [torch.autograd.grad(want, plain, retain_graph=True)[0].float() for want in expected]
    for ways in (losses, closed_form):
        found = ways.focal_and_dice(x, ids, competes=competes)
        for got, want, expected_slope in zip(found, expected, slopes, strict=True):
            assert got.item() == pytest.approx(want.item(), rel=1e-5, abs=1e-5)
            (slope,) = torch.autograd.grad(got, x, retain_graph=True)
            torch.testing.assert_close(slope, expected_slope, atol=1e-5, rtol=1e-5)


def test_a_confident_right_answer_leaves_no_rounding_behind(ways):
    # Logits of 15 where the class is, -15 elsewhere: the loss is about e^-45, below what a sum
    # of all negatives less the positives could resolve.
    ids = torch.randint(0, 3, (2, 32, 32), generator=torch.Generator().manual_seed(0))
    x = torch.where(F.one_hot(ids, 3).permute(0, 3, 1, 2).bool(), 15.0, -15.0)
    assert 0 <= ways.focal_and_dice(x, ids)[0].item() < 1e-15


# --- nothing to act on, and mixed precision ------------------------------------------------------


@pytest.mark.parametrize("name", ["cross_entropy", "focal_and_dice"])
def test_an_all_ignored_batch_is_zero_and_connected(ways, name):
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    values = getattr(ways, name)(x, torch.full((2, 4, 4), IGNORE))
    for value in values if isinstance(values, tuple) else (values,):
        (gradient,) = torch.autograd.grad(value, x, retain_graph=True)
        assert value.item() == 0
        assert (gradient == 0).all()


def test_num_masks_of_all_processes_may_be_below_one(ways):
    x, ids = torch.zeros(1, 1, 1, 1), torch.tensor([[[0]]])
    assert ways.focal_and_dice(x, ids, torch.tensor(0.5)) == ways.focal_and_dice(x, ids, torch.tensor(1.0))


def test_losses_are_float32_under_autocast(ways):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 8, 4, 4, generator=generator).requires_grad_()
    text, potential = torch.randn(3, 8, generator=generator), torch.randn(2, 8, generator=generator)
    ids = torch.randint(0, 5, (2, 4, 4), generator=generator)
    cls, samples = torch.randn(2, 8, generator=generator), torch.arange(2)
    bank = torch.randn(6, 8, generator=generator), torch.arange(6) + 10
    exact = infonce(cls, features.mean((2, 3)), *bank, samples)
    with torch.autocast("cpu", torch.bfloat16):
        x = ways.logits(features, text, potential)
        assert x.dtype == torch.bfloat16
        mean, present = ways.centroids(features, ids, 5)
        values = [
            ways.cross_entropy(x, ids),
            *ways.focal_and_dice(x, ids),
            generate_loss(mean[present], text, present),
            infonce(cls, features.mean((2, 3)), *bank, samples),
        ]
    assert all(value.dtype == torch.float32 for value in values)
    assert values[-1].item() == pytest.approx(exact.item(), abs=1e-6)
    sum(values).backward()
    assert features.grad is not None
    assert torch.isfinite(features.grad).all()
