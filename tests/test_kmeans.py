"""Lloyd's K-means by hand, against a naive loop, and torch against FAISS."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ops.fusion import similar_pairs
from pipeline.ops.kmeans import Clusters, lloyd, lloyd_at_once, window_centres
from pipeline.ops.kmeans_faiss import device_name, lloyd_faiss

BACKENDS = {
    "torch": lloyd,
    "at once": lambda *views: lloyd_at_once(*views, *([] if len(views) > 4 else [20])),
    "faiss": lloyd_faiss,
}
backend = pytest.mark.parametrize("run", BACKENDS.values(), ids=BACKENDS)


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane, one a row."""
    angles = torch.tensor(degrees) * math.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def one(tokens, centres, run, active=None, alive=None, iterations=20) -> Clusters:
    """A batch of one view, everything active and alive unless said otherwise."""
    active = torch.ones(len(tokens), dtype=torch.bool) if active is None else torch.tensor(active)
    alive = torch.ones(len(centres), dtype=torch.bool) if alive is None else torch.tensor(alive)
    return run(tokens[None], active[None], centres[None], alive[None], iterations)


# --- by hand -------------------------------------------------------------------------------------


@backend
def test_four_points(run):
    # From 20 and 60 degrees: 0 and 10 are nearer to 20; 70 and 90 nearer to 60. Means at 5 and 80; the second
    # step changes nothing, so two assignment steps.
    result = one(at(0, 10, 70, 90), at(20, 60), run)
    assert result.assign.tolist() == [[0, 0, 1, 1]]
    torch.testing.assert_close(result.centres[0], at(5, 80))
    assert result.alive.tolist() == [[True, True]]
    assert result.num_iterations.tolist() == [2]


@backend
def test_a_point_changes_sides(run):
    # From 0 and 60: 28 goes to 0 (28 < 32) with 0; 60 alone: means 14 and 60. Then 28 stays (14 < 32).
    # With 40 as well: 40 goes to 60 (20 < 40): means 14 and 50; 28 is 14 from one, 22 from the other: stays.
    # From 0 and 40 instead: 28, 40, 60 go to 40 (12 < 28): means 0 and ~42.7; nothing changes.
    assert one(at(0, 28, 40, 60), at(0, 60), run).assign.tolist() == [[0, 0, 1, 1]]
    assert one(at(0, 28, 40, 60), at(0, 40), run).assign.tolist() == [[0, 1, 1, 1]]
    # From 0 and 33 with 0, 10, 20, 60: 20 goes to 33 (13 < 20) with 60: means 5 and 40; then 20 is 15 from 5,
    # 20 from 40: it changes sides; means 10 and 60; the third step confirms.
    result = one(at(0, 10, 20, 60), at(0, 33), run)
    assert result.assign.tolist() == [[0, 0, 0, 1]]
    assert result.num_iterations.tolist() == [3]
    torch.testing.assert_close(result.centres[0], at(10, 60))


@backend
def test_an_empty_centre_is_dropped_and_stays_dropped(run):
    # Nobody goes to 180 in the first step, and centre 1 keeps its index.
    result = one(at(0, 10, 70, 90), at(20, 180, 60), run)
    assert result.assign.tolist() == [[0, 0, 2, 2]]
    assert result.alive.tolist() == [[True, False, True]]
    assert (result.centres[0, 1] == 0).all()


@backend
def test_ties_go_to_the_lower_index(run):
    # (1, 0) and (0, 1) are equally near to 45 degrees; exactly representable scores make the tie exact.
    token = torch.tensor([[0.5, 0.5]])
    result = one(token, torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]]), run)
    assert result.assign.tolist() == [[0]]
    assert result.alive.tolist() == [[True, False, False]]


@backend
def test_repeated_centres_lose_every_tie(run):
    # At this width the products of equal columns do differ in their last bit.
    tokens, active, centres, _ = random_views(seed=4, length=1024, channels=512, num_centres=29)
    twice = torch.cat([centres, centres], dim=1)
    result = run(tokens, active, twice, torch.ones(3, 58, dtype=torch.bool), 1)
    assert not result.alive[:, 29:].any()
    assert torch.equal(result.assign, run(tokens, active, centres, torch.ones(3, 29, dtype=torch.bool), 1).assign)


@backend
def test_a_dead_centre_takes_nobody(run):
    result = one(at(0, 10), at(0, 40), run, alive=[False, True])
    assert result.assign.tolist() == [[1, 1]]
    assert result.alive.tolist() == [[False, True]]


@backend
def test_inactive_tokens_have_no_say(run):
    result = one(at(0, 10, 50), at(20, 60), run, active=[True, True, False])
    assert result.assign.tolist() == [[0, 0, -1]]
    torch.testing.assert_close(result.centres[0, 0], at(5)[0])
    assert result.alive.tolist() == [[True, False]]


@backend
def test_one_token_and_no_token(run):
    tokens, centres = at(0, 10, 50).repeat(2, 1, 1), at(20, 60, 90).repeat(2, 1, 1)
    active = torch.tensor([[False, False, True], [False, False, False]])
    alive = torch.tensor([[True, True, True], [False, False, False]])
    result = run(tokens, active, centres, alive)
    assert result.assign.tolist() == [[-1, -1, 1], [-1, -1, -1]]
    assert result.alive.tolist() == [[False, True, False], [False, False, False]]
    torch.testing.assert_close(result.centres[0, 1], at(50)[0])
    assert result.num_iterations.tolist() == [2, 1]


@backend
def test_an_empty_batch(run):
    result = run(torch.zeros(0, 4, 2), torch.zeros(0, 4).bool(), torch.zeros(0, 3, 2), torch.zeros(0, 3).bool())
    assert result.assign.shape == (0, 4)


@backend
@pytest.mark.parametrize("iterations", [1, 2, 5])
def test_centres_are_the_means_of_the_assignment_returned(run, iterations):
    tokens, active, centres, alive = random_views(seed=1)
    result = run(tokens, active, centres, alive, iterations)
    assert result.num_iterations.max() <= iterations
    for view in range(len(tokens)):
        for k in range(centres.shape[1]):
            members = tokens[view][result.assign[view] == k]
            assert bool(result.alive[view, k]) == (len(members) > 0)
            if len(members):
                expected = F.normalize(members.sum(0), dim=0)
                torch.testing.assert_close(result.centres[view, k], expected, atol=1e-5, rtol=0)


@backend
def test_inputs_are_left_alone_and_checked(run):
    tokens, active, centres, alive = random_views(seed=2)
    before = centres.clone(), alive.clone()
    run(tokens, active, centres, alive)
    assert torch.equal(centres, before[0])
    assert torch.equal(alive, before[1])
    with pytest.raises(ValueError, match="no living centre"):
        run(tokens, active, centres, torch.zeros_like(alive))
    with pytest.raises(ValueError, match="at least 1"):
        run(tokens, active, centres, alive, 0)
    with pytest.raises(ValueError, match="wanted"):
        run(tokens[:, :, :3], active, centres, alive)


# --- agreement -----------------------------------------------------------------------------------


def random_views(seed: int, num: int = 3, length: int = 60, channels: int = 16, num_centres: int = 9):
    generator = torch.Generator().manual_seed(seed)
    tokens = F.normalize(torch.randn(num, length, channels, generator=generator), dim=2)
    centres = F.normalize(torch.randn(num, num_centres, channels, generator=generator), dim=2)
    active = torch.rand(num, length, generator=generator) < torch.tensor([1.0, 0.5, 0.05])[:num, None]
    alive = torch.rand(num, num_centres, generator=generator) < 0.9
    alive[:, 0] = True
    return tokens, active, centres, alive


def naive(tokens, active, centres, alive, iterations):
    """One view, written as the method says it, one token at a time."""
    centres, alive, assign = centres.clone(), alive.clone(), [-1] * len(tokens)
    for _ in range(iterations):
        step = []
        for token, is_active in zip(tokens, active, strict=True):
            scores = [float(token @ c) if lives else -math.inf for c, lives in zip(centres, alive, strict=True)]
            step.append(scores.index(max(scores)) if is_active else -1)
        for k in range(len(centres)):
            members = tokens[[i for i, a in enumerate(step) if a == k]]
            alive[k] = len(members) > 0
            centres[k] = F.normalize(members.sum(0), dim=0) if len(members) else 0
        if step == assign:
            break
        assign = step
    return assign


@backend
@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_the_naive_loop(run, seed):
    tokens, active, centres, alive = random_views(seed)
    result = run(tokens, active, centres, alive)
    for view in range(len(tokens)):
        assert result.assign[view].tolist() == naive(tokens[view], active[view], centres[view], alive[view], 20)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 80), num_centres=st.integers(1, 30))
def test_torch_and_faiss_agree(seed, length, num_centres):
    views = random_views(seed, length=length, num_centres=num_centres)
    ours, theirs = lloyd(*views), lloyd_faiss(*views)
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)


def test_torch_and_faiss_agree_on_a_real_grid():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 64, 4, 4, generator=generator)
    grid = F.interpolate(coarse, (32, 32), mode="bilinear") + 0.3 * torch.randn(2, 64, 32, 32, generator=generator)
    tokens = F.normalize(grid.permute(0, 2, 3, 1), dim=3)  # (2, 32, 32, 64)
    state = torch.ones(2, 32, 32, dtype=torch.uint8)
    state[0, :10], state[1, :, 20:] = 0, 2
    centres, alive = window_centres(tokens, state)
    views = (tokens.flatten(1, 2), (state == 1).flatten(1), centres, alive)
    ours, theirs = lloyd(*views), lloyd_faiss(*views)
    assert torch.equal(ours.assign, theirs.assign)
    assert torch.equal(ours.alive, theirs.alive)
    similar = [similar_pairs(found.centres, found.alive, 0.5) for found in (ours, theirs)]
    assert torch.equal(*similar)


def test_batching_changes_nothing():
    views = random_views(seed=5)
    together = lloyd(*views)
    for view in range(3):
        alone = lloyd(*(value[view : view + 1] for value in views))
        assert torch.equal(alone.assign[0], together.assign[view])
        assert torch.equal(alone.num_iterations[0], together.num_iterations[view])


# --- windows -------------------------------------------------------------------------------------


def test_window_centres_by_hand():
    # 2 x 2 tokens, scales 1 and 2: the mean direction of all four, then each token itself, row-major.
    tokens = at(0, 0, 90, 90).view(1, 2, 2, 2)
    centres, alive = window_centres(tokens, torch.zeros(1, 2, 2, dtype=torch.uint8), (1, 2))
    torch.testing.assert_close(centres[0], at(45, 0, 0, 90, 90))
    assert alive.all()


def test_padding_is_no_part_of_a_window():
    # The lower row is padding: the whole grid's centre is the upper row's, and two windows are not alive.
    tokens = at(0, 20, 90, 90).view(1, 2, 2, 2)
    state = torch.tensor([[[0, 1], [2, 2]]], dtype=torch.uint8)
    centres, alive = window_centres(tokens, state, (1, 2))
    torch.testing.assert_close(centres[0, :3], at(10, 0, 20))
    assert alive.tolist() == [[True, True, True, False, False]]
    _, alive = window_centres(tokens, torch.full((1, 2, 2), 2, dtype=torch.uint8), (1, 2))
    assert not alive.any()


def test_the_papers_grid_has_58_centres_and_a_grid_smaller_than_its_windows_works():
    tokens = F.normalize(torch.randn(1, 32, 32, 4, generator=torch.Generator().manual_seed(0)), dim=3)
    centres, _ = window_centres(tokens, torch.ones(1, 32, 32, dtype=torch.uint8))
    assert centres.shape == (1, 58, 4)
    # Three windows over 32: rows 0..10, 10..21, 21..31 (adaptive pooling overlaps by a row).
    expected = F.normalize(tokens[0, :11, 10:22].sum((0, 1)), dim=0)
    torch.testing.assert_close(centres[0, 1], expected)
    small = tokens[:, :4, :4]
    centres, alive = window_centres(small, torch.ones(1, 4, 4, dtype=torch.uint8))
    assert centres.shape == (1, 58, 4)
    assert alive.all()
    assert lloyd(small.flatten(1, 2), torch.ones(1, 16).bool(), centres, alive).alive.sum() <= 16


def test_windows_of_tokens():
    # Windows of 2 x 2 on a 3 x 3 grid: 2 x 2 windows, the last row and column cut off at the edge.
    degrees = [0, 20, 40, 20, 40, 60, 80, 80, 10]
    tokens = at(*degrees).view(1, 3, 3, 2)
    centres, alive = window_centres(tokens, torch.ones(1, 3, 3, dtype=torch.uint8), (2,), "tokens")
    # (0, 20, 20, 40) -> 20; (40, 60) -> 50; (80, 80) -> 80; (10) -> 10
    torch.testing.assert_close(centres[0], at(20, 50, 80, 10))
    assert alive.all()
    with pytest.raises(ValueError, match="'rows'"):
        window_centres(tokens, torch.ones(1, 3, 3, dtype=torch.uint8), (2,), "rows")
    with pytest.raises(ValueError, match="wanted"):
        window_centres(tokens, torch.ones(1, 2, 3, dtype=torch.uint8))


# --- FAISS ---------------------------------------------------------------------------------------


def test_a_gpu_that_is_not_there_is_said_not_faked():
    assert device_name() == "cpu"
    if device_name(gpu=True) == "cpu":
        with pytest.raises(ValueError, match="faiss sees no GPU"):
            lloyd_faiss(*random_views(0), gpu=True)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu():
    views = random_views(seed=3)
    expected = lloyd(*views)
    on_gpu = lloyd(*(value.cuda() for value in views))
    assert torch.equal(on_gpu.assign.cpu(), expected.assign)
    if device_name(gpu=True) != "cpu":
        assert torch.equal(lloyd_faiss(*views, gpu=True).assign, expected.assign)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), length=st.integers(1, 200), num_centres=st.integers(1, 30))
def test_skipping_sure_tokens_changes_nothing(seed, length, num_centres):
    # `lloyd_at_once` looks at every token in every iteration.
    views = random_views(seed, length=length, channels=4, num_centres=num_centres)
    for iterations in (1, 2, 3, 20):
        for left, right in zip(lloyd(*views, iterations), lloyd_at_once(*views, iterations), strict=True):
            torch.testing.assert_close(left, right, atol=1e-6, rtol=0)
