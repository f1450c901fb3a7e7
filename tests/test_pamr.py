"""Pixel-adaptive refinement: three pixels by hand, the definition pixel by pixel, and what it keeps."""

import math

import pytest
import torch

from pipeline.ops.pamr import DILATIONS, affinities, refine


def test_three_flat_pixels_by_hand():
    # One row of three, so the row above and the row below repeat it. Flat: the 8 neighbours count alike.
    # The first pixel's are, edge repeated: 3 + 2 times itself and 3 times the second; the middle one's: 3 times
    # the first, 2 times itself, 3 times the third.
    image = torch.full((3, 1, 3), 7, dtype=torch.uint8)
    found = refine(image, torch.tensor([[[1.0, 0, 0]], [[0, 1, 1]]]), dilations=(1,), rounds=1)
    assert torch.allclose(found, torch.tensor([[[5, 3, 0]], [[3, 5, 8]]]) / 8)
    # Once more: 5/8 * 5/8 + 3/8 * 3/8, then 3/8 * 5/8 + 2/8 * 3/8 + 0, then 3/8 * 3/8.
    again = refine(image, torch.tensor([[[1.0, 0, 0]]]), dilations=(1,), rounds=2)
    assert torch.allclose(again, torch.tensor([[[34, 21, 9]]]) / 64)


def test_an_edge_by_hand():
    # Black, black, white. Around the middle: three times 0, three times 0, three times 255; variance
    # (9 * 3 * 255^2 - (3 * 255)^2) / (9 * 8) = 16256.25, deviation 127.5. A difference of 255 is two deviations, in
    # units of 0.1: -20. The third pixel's deviation is the same (six times 255, three times 0), the first one's is 0.
    image = torch.tensor([0, 0, 255], dtype=torch.uint8).expand(3, 1, 3)
    found = refine(image, torch.tensor([[[0.0, 0, 1]]]), dilations=(1,), rounds=1)
    far = math.exp(-20)
    wanted = torch.tensor([0, 3 * far / (5 + 3 * far), 5 / (5 + 3 * far)])
    assert torch.allclose(found.flatten(), wanted, rtol=1e-4)


def test_colours_are_averaged_by_hand():
    # Only red differs: -20 in one colour of three, 0 in the others, a mean of -20 / 3.
    image = torch.zeros(3, 1, 3, dtype=torch.uint8)
    image[0, 0, 2] = 255
    found = refine(image, torch.tensor([[[0.0, 0, 1]]]), dilations=(1,), rounds=1)
    far = math.exp(-20 / 3)
    assert found[0, 0, 1].item() == pytest.approx(3 * far / (5 + 3 * far), rel=1e-4)


def by_definition(image, scores, dilations, rounds):
    """The same with one pixel at a time."""
    pixels, (height, width) = image.double(), image.shape[1:]

    def at(maps, y, x):
        return maps[:, min(max(y, 0), height - 1), min(max(x, 0), width - 1)]

    found = scores.double()
    for _ in range(rounds):
        new = torch.zeros_like(found)
        for y in range(height):
            for x in range(width):
                steps = [(d * i, d * j) for d in dilations for i in (-1, 0, 1) for j in (-1, 0, 1)]
                window = torch.stack([at(pixels, y + i, x + j) for i, j in steps])  # (9 |D|, 3)
                deviation = window.std(0)
                around = [(i, j) for i, j in steps if (i, j) != (0, 0)]
                logits = torch.stack(
                    [
                        -((pixels[:, y, x] - at(pixels, y + i, x + j)).abs() / (0.1 * deviation + 1e-8)).mean()
                        for i, j in around
                    ]
                )
                values = torch.stack([at(found, y + i, x + j) for i, j in around])  # (P, n + 1)
                new[:, y, x] = logits.softmax(0) @ values
        found = new
    return found.float()


def test_it_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, 7, 5), generator=generator, dtype=torch.uint8)
    image[:, :4, :3] = 90  # part of it flat, where the deviation is small or 0
    scores = torch.rand(3, 7, 5, generator=generator)
    for dilations, rounds in (((1,), 1), ((1, 2, 9), 3)):  # 9 reaches beyond the image from everywhere
        found = refine(image, scores, dilations=dilations, rounds=rounds)
        assert torch.allclose(found, by_definition(image, scores, dilations, rounds), atol=1e-5)


def test_scores_keep_their_sum_and_follow_the_image():
    generator = torch.Generator().manual_seed(1)
    image = torch.full((3, 40, 50), 40)
    image[:, :, 23:] = 200
    image = (image + torch.randint(-8, 9, image.shape, generator=generator)).to(torch.uint8)
    scores = torch.rand(2, 40, 50, generator=generator) * 0.2
    scores[0, :, :20] += 1  # the scores' edge is at 20, the image's at 23
    scores[1, :, 20:] += 1
    scores /= scores.sum(0)
    found = refine(image, scores)
    assert torch.allclose(found.sum(0), torch.ones(40, 50), atol=1e-4)
    truth = torch.arange(50).expand(40, 50) >= 23
    assert ((scores.argmax(0) == 1) != truth).sum() == 3 * 40
    assert torch.equal(found.argmax(0) == 1, truth)
    assert affinities(image, DILATIONS).shape == (48, 40, 50)


def test_it_wants_one_size_and_bytes():
    image = torch.zeros(3, 4, 6, dtype=torch.uint8)
    with pytest.raises(ValueError, match="differ in size"):
        refine(image, torch.zeros(2, 6, 4))
    with pytest.raises(ValueError, match="uint8 wanted"):
        refine(image.float(), torch.zeros(2, 4, 6))


@pytest.mark.gpu
def test_the_gpu_agrees():
    generator = torch.Generator().manual_seed(2)
    image = torch.randint(0, 256, (3, 60, 80), generator=generator, dtype=torch.uint8)
    scores = torch.rand(3, 60, 80, generator=generator)
    assert torch.allclose(refine(image, scores.cuda()).cpu(), refine(image, scores), atol=1e-4)
