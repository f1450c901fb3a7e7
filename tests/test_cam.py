"""CLIP-ES's maps: each step on a case worked out by hand, and all of them against one class at a time by definition."""

import pytest
import torch
from torch.nn.functional import interpolate, normalize

from pipeline.models.explain import explain
from pipeline.models.teacher import Teacher
from pipeline.ops.cam import activation_maps, affinity, box_masks, min_max, refined
from pipeline.ops.masks import class_scores, mask_and_confidence, thresholded


def test_a_map_by_hand():
    # Two patches, two channels. Gradients (1, 0) and (3, -2): channel weights 2 and -1. Activations (1, 1) and
    # (2, 5): sums 2*1 - 1 = 1 and 2*2 - 5 = -1, cut to 1 and 0.
    activations = torch.tensor([[[1.0, 1], [2, 5]]])
    gradients = torch.tensor([[[[1.0, 0], [3, -2]]]])
    assert activation_maps(activations, gradients).tolist() == [[[1, 0]]]
    assert min_max(torch.tensor([[1.0, 3, 2], [4, 4, 4]])).tolist() == [[0, 1, 0.5], [0, 0, 0]]


def test_affinity_by_hand():
    # One round on [[1, 3], [1, 1]]: columns sum to 2 and 4: [[1/2, 3/4], [1/2, 1/4]]; rows sum to 5/4 and 3/4:
    # [[2/5, 3/5], [2/3, 1/3]]; symmetric: off the diagonal (3/5 + 2/3) / 2 = 19/30.
    half = torch.tensor([[2 / 5, 19 / 30], [19 / 30, 1 / 3]])
    found = affinity(torch.tensor([[[1.0, 3], [1, 1]]]), 1)
    assert torch.allclose(found[0], half @ half)
    many = affinity(torch.rand(3, 20, 20), 30)
    assert torch.allclose(many.sum(1), torch.ones(3, 20), atol=1e-4)  # doubly stochastic, so is its square


def test_boxes_by_hand():
    drawn = """
        9 0 0 0 0 0
        0 9 0 0 0 8
        0 0 0 0 8 0
        0 0 4 0 8 0
        3 0 0 0 0 0"""
    boxed = """
        1 1 0 0 0 0
        1 1 0 0 1 1
        0 0 0 0 1 1
        0 0 1 0 1 1
        0 0 0 0 0 0"""
    maps, wanted = (
        torch.tensor([[float(v) for v in row.split()] for row in text.split("\n")[1:]]) for text in (drawn, boxed)
    )
    # Diagonal neighbours are one part; 4 is above 0.4 * 9 = 3.6, 3 is not. Each part has its own box.
    assert torch.equal(box_masks(maps, 0.4), wanted.bool())
    several = torch.stack([maps, maps.flip(0), torch.zeros_like(maps)]).view(1, 3, 5, 6)
    assert torch.equal(box_masks(several, 0.4)[0, 1], wanted.bool().flip(0))
    assert not box_masks(several, 0.4)[0, 2].any()  # an empty CAM has no box
    assert box_masks(torch.ones(3, 4), 0.4).all()


def test_boxes_of_a_spiral_are_one_box():
    spiral = torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]])
    assert box_masks(spiral, 0.5).all()


def test_refinement_masks_columns():
    generator = torch.Generator().manual_seed(0)
    maps, alike = torch.rand(2, 3, 12, generator=generator), torch.rand(2, 12, 12, generator=generator)
    boxes = torch.rand(2, 3, 12, generator=generator) > 0.4
    found = refined(maps, alike, boxes)
    for image in range(2):
        for k in range(3):
            plain = (alike[image] * boxes[image, k][None, :]) @ maps[image, k]
            assert torch.allclose(found[image, k], (plain - plain.min()) / (plain.max() - plain.min()), atol=1e-6)


# --- masks ---------------------------------------------------------------------------------------


def test_masks_by_hand():
    # Maps 0.8 and 0.4 in one pixel: background (1 - 0.8)^2 = 0.04; the sum is 1.24.
    cam = torch.tensor([[[0.8]], [[0.4]]])
    scores = class_scores(cam, (1, 1), 2)
    assert torch.allclose(scores.flatten(), torch.tensor([0.04, 0.8, 0.4]) / 1.24)
    ids, confidence = mask_and_confidence(cam, [7, 3], 0, (1, 1), 2)
    assert (ids.item(), confidence.item()) == (7, pytest.approx(0.8 / 1.24))
    ids, confidence = mask_and_confidence(torch.zeros(1, 2, 2), [7], 0, (3, 3), 1)  # an empty CAM
    assert (ids == 0).all()
    assert (confidence == 1).all()
    ids, confidence = mask_and_confidence(torch.zeros(0, 2, 2), [], 0, (3, 5), 1)  # no class at all
    assert ids.shape == confidence.shape == (3, 5)
    assert (ids == 0).all()
    assert (confidence == 1).all()
    with pytest.raises(ValueError, match="1 maps for 2 classes"):
        mask_and_confidence(torch.zeros(1, 2, 2), [1, 2], 0, (3, 3), 1)


def test_thresholds_by_hand():
    cam = torch.tensor([[[0.8, 0.3]], [[0.4, 0.2]]])
    assert thresholded(cam, [7, 3], 0, (1, 2), 0.35).tolist() == [[7, 0]]
    assert thresholded(cam, [7, 3], 0, (1, 2), 0.9).tolist() == [[0, 0]]
    assert thresholded(torch.zeros(0, 1, 2), [], 0, (1, 2), 0.5).tolist() == [[0, 0]]


# --- the teacher, explained ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher():
    loaded = Teacher.load("local-dir:config/demo_teacher", None, image_size=None)
    loaded.model.visual.output_tokens = True  # of open_clip's own forward, which tests compare with
    return loaded


@pytest.fixture(scope="module")
def drawn(teacher):
    """Two images of 64 x 64, three and one class of theirs, four background names."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    foreground = normalize(torch.randn(2, 3, teacher.channels, generator=generator), dim=-1)
    background = normalize(torch.randn(4, teacher.channels, generator=generator), dim=-1)
    present = torch.tensor([[True, True, True], [True, False, False]])
    return images, foreground, present, background


def by_definition(teacher, image, features, target):
    """Activation, gradient and score of one class of one image, through open_clip's own forward, with a hook."""
    visual, kept = teacher.model.visual, []

    def hook(module, inputs, output):
        kept.append(output.detach().requires_grad_(True))
        return kept[0]

    handle = visual.transformer.resblocks[-1].ln_1.register_forward_hook(hook)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (teacher.mean, teacher.std))
    _, tokens = visual((image[None].float() / 255 - mean) / std)
    handle.remove()
    feature = normalize(tokens.mean(1) @ visual.proj, dim=-1)
    score = (teacher.model.logit_scale.exp() * feature @ features.T).softmax(1)[0, target]
    (gradient,) = torch.autograd.grad(score, kept[0])
    return kept[0][0, 1:].detach(), gradient[0, 1:], score.detach()


def test_the_batch_is_one_class_at_a_time_by_definition(teacher, drawn):
    images, foreground, present, background = drawn
    found = explain(teacher, images, foreground, present, background, blocks=3)
    maps = activation_maps(found.activations, found.gradients)
    for image in range(2):
        features = torch.cat([foreground[image][present[image]], background])
        for k in range(int(present[image].sum())):
            activation, gradient, score = by_definition(teacher, images[image], features, k)
            assert torch.allclose(found.activations[image], activation, atol=1e-4)
            assert torch.allclose(found.gradients[k, image], gradient, atol=1e-4 * float(gradient.abs().max()))
            assert found.scores[image, k] == pytest.approx(float(score), abs=1e-4)
            plain = (activation * gradient.mean(0)).sum(1).relu()  # (L,)
            if plain.max() > plain.min():
                plain = (plain - plain.min()) / (plain.max() - plain.min())
            assert torch.allclose(maps[image, k], plain, atol=1e-4)
    assert (found.gradients[1:, 1] == 0).all()


def test_attention_is_the_blocks_own(teacher, drawn):
    images, foreground, present, background = drawn
    visual, entered = teacher.model.visual, []
    handles = [
        block.ln_1.register_forward_hook(lambda module, inputs, output: entered.append(output))
        for block in visual.transformer.resblocks
    ]
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (teacher.mean, teacher.std))
    with torch.no_grad():
        visual((images.float() / 255 - mean) / std)
    for handle in handles:
        handle.remove()
    own = [
        block.attn(x, x, x, need_weights=True, average_attn_weights=True)[1][:, 1:, 1:].detach()
        for block, x in zip(visual.transformer.resblocks, entered, strict=True)
    ]
    for blocks in (1, 3, 4, 8):  # the tiny teacher has four
        found = explain(teacher, images, foreground, present, background, blocks)
        assert torch.allclose(found.attention, torch.stack(own[-blocks:]).mean(0), atol=1e-5)


def test_an_image_of_another_shape_has_positions_of_its_own_grid(teacher, drawn):
    """Against open_clip's forward with the interpolated positions put into the model."""
    _, foreground, present, background = drawn
    images = torch.randint(0, 256, (2, 3, 48, 96), dtype=torch.uint8)
    found = explain(teacher, images, foreground, present, background, 3)
    visual = teacher.model.visual
    kept = visual.positional_embedding
    grid = interpolate(kept[1:].T.reshape(1, -1, 8, 8), (6, 12), mode="bilinear")
    visual.positional_embedding = torch.nn.Parameter(torch.cat([kept[:1], grid.flatten(2)[0].T]), requires_grad=False)
    try:
        activation, _, score = by_definition(teacher, images[0], torch.cat([foreground[0], background]), 1)
    finally:
        visual.positional_embedding = kept
    assert torch.allclose(found.activations[0], activation, atol=1e-4)
    assert found.scores[0, 1] == pytest.approx(float(score), abs=1e-4)
    with pytest.raises(ValueError, match="multiples of the patch, 8"):
        explain(teacher, images[..., :50], foreground, present, background, 3)
