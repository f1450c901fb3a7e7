"""Algorithm 1 by hand and against its literal form; the maps made of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.ops.fusion import fuse, mask_centroids, pseudo_map, purity, similar_pairs


def matrix(*pairs: tuple[int, int], num: int) -> torch.Tensor:
    similar = torch.eye(num, dtype=torch.bool)
    for a, b in pairs:
        similar[a, b] = similar[b, a] = True
    return similar


def all_alive(num: int) -> torch.Tensor:
    return torch.ones(num, dtype=torch.bool)


# --- Algorithm 1 ---------------------------------------------------------------------------------


def test_merging_is_not_transitive():
    # a ~ b and b ~ c: a takes b, then c, whose only neighbour is used, stays alone.
    assert fuse(matrix((0, 1), (1, 2), num=3), all_alive(3)).tolist() == [1, 1, 2]
    # In the order b, a, c the same centres are one mask.
    assert fuse(matrix((0, 1), (0, 2), num=3), all_alive(3)).tolist() == [1, 1, 1]


def test_used_masks_are_not_used_again():
    # 0 takes 2; 1 ~ 2 comes too late; 1 takes 3; 4 is left.
    assert fuse(matrix((0, 2), (1, 2), (1, 3), (3, 4), num=5), all_alive(5)).tolist() == [1, 2, 1, 2, 3]


def test_dead_centres_belong_to_no_mask():
    similar = matrix((0, 1), (1, 2), num=3)
    assert fuse(similar, torch.tensor([False, True, True])).tolist() == [0, 1, 1]
    assert fuse(similar, torch.tensor([True, False, True])).tolist() == [1, 0, 2]
    assert fuse(similar, torch.zeros(3, dtype=torch.bool)).tolist() == [0, 0, 0]
    assert fuse(torch.zeros(0, 0, dtype=torch.bool), torch.zeros(0, dtype=torch.bool)).tolist() == []


def literal(similarity: list[list[float]], threshold: float) -> list[int]:
    """Algorithm 1 on the similarity matrix itself, retiring all that were merged (method section 3.3)."""
    s = [row[:] for row in similarity]
    num = len(s)
    group, count = [0] * num, 0
    while num and max(max(row) for row in s) >= threshold:
        # The diagonal is exactly 1 and nothing exceeds it: the first row that still has its own.
        index = next(i for i in range(num) if s[i][i] == max(max(row) for row in s))
        members = [j for j in range(num) if s[index][j] > threshold]
        count += 1
        for j in members:
            group[j] = count
            for k in range(num):
                s[j][k] = s[k][j] = -100
    return group


@settings(max_examples=60, deadline=None)
@given(num=st.integers(0, 12), seed=st.integers(0, 10_000), threshold=st.sampled_from([0.2, 0.5, 0.8]))
def test_agrees_with_the_literal_algorithm(num, seed, threshold):
    generator = torch.Generator().manual_seed(seed)
    s = torch.rand(num, num, generator=generator).mul(0.999)
    s = torch.maximum(s, s.T).fill_diagonal_(1.0)
    assert fuse(s > threshold, all_alive(num)).tolist() == literal(s.tolist(), threshold)


@settings(max_examples=60, deadline=None)
@given(num=st.integers(1, 20), seed=st.integers(0, 10_000))
def test_every_living_centre_is_in_exactly_one_mask_with_its_seed(num, seed):
    generator = torch.Generator().manual_seed(seed)
    similar = torch.rand(num, num, generator=generator) < 0.3
    similar = similar | similar.T | torch.eye(num, dtype=torch.bool)
    alive = torch.rand(num, generator=generator) < 0.7
    group = fuse(similar, alive)
    assert torch.equal(group > 0, alive)
    for g in range(1, int(group.max()) + 1):  # ids are dense, seeds come in order
        members = (group == g).nonzero()[:, 0]
        assert len(members)
        assert bool(similar[members[0], members].all())
    firsts = [int((group == g).nonzero()[0]) for g in range(1, int(group.max()) + 1)]
    assert firsts == sorted(firsts)


def test_similar_pairs_by_hand():
    # Inner products: ab = 0.6, bc = 0.8, ac = 0: at 0.6 only bc exceeds; strictly, so ab doesn't.
    a, b, c = [1.0, 0.0], [0.6, 0.8], [0.0, 1.0]
    similar = similar_pairs(torch.tensor([[a, b, c]]), all_alive(3)[None], 0.6)
    assert similar[0].tolist() == [[True, False, False], [False, True, True], [False, True, True]]
    # All of ab, bc, bb are 0.5: at 0.5 nobody but oneself, at 0.4 the neighbours.
    halves = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]]])
    assert torch.equal(similar_pairs(halves, all_alive(3)[None], 0.5)[0], torch.eye(3, dtype=torch.bool))
    assert similar_pairs(halves, all_alive(3)[None], 0.4)[0].tolist() == [
        [True, True, False],
        [True, True, True],
        [False, True, True],
    ]
    assert similar_pairs(torch.zeros(1, 0, 2), all_alive(0)[None], 0.5).shape == (1, 0, 0)
    # Length 0.9 would leave a diagonal of 0.81 under 0.9; it counts as 1. A dead centre is similar to nobody.
    centres = torch.tensor([[[0.9, 0.0], [0.0, 0.9]]])
    assert similar_pairs(centres, torch.tensor([[True, False]]), 0.9)[0].tolist() == [[True, False], [False, False]]


# --- maps ----------------------------------------------------------------------------------------


def test_pseudo_map_by_hand():
    state = torch.tensor([[0, 1, 1], [1, 2, 2]], dtype=torch.uint8)
    assign = torch.tensor([[-1, 2, 0], [3, -1, -1]])
    group = torch.tensor([1, 0, 2, 1])
    expected = [[0, 2, 1], [1, 255, 255]]
    assert pseudo_map(assign, group, state).tolist() == expected
    assert pseudo_map(assign.flatten(), group, state).tolist() == expected
    assert pseudo_map(assign, group, state).dtype == torch.uint8


def test_pseudo_map_refuses_an_ignored_token_without_a_mask():
    state = torch.ones(1, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="no living centre"):
        pseudo_map(torch.tensor([0, -1]), torch.tensor([1]), state)
    with pytest.raises(ValueError, match="no living centre"):
        pseudo_map(torch.tensor([0, 1]), torch.tensor([1, 0]), state)
    with pytest.raises(ValueError, match="300 masks"):
        pseudo_map(torch.tensor([0, 0]), torch.tensor([300]), state)


def test_pseudo_map_with_nothing_ignored():
    state = torch.tensor([[0, 2]], dtype=torch.uint8)
    assert pseudo_map(torch.tensor([-1, -1]), torch.zeros(3, dtype=torch.int64), state).tolist() == [[0, 255]]


def test_mask_centroids_by_hand():
    tokens = torch.tensor([[[1.0, 0.0], [3.0, 2.0]], [[5.0, 5.0], [9.0, 9.0]]])
    pseudo = torch.tensor([[1, 1], [3, 255]], dtype=torch.uint8)
    centroids = mask_centroids(tokens.half(), pseudo, 4)
    assert centroids[0].tolist() == [2.0, 1.0]
    assert centroids[1].isnan().all()
    assert centroids[3].isnan().all()
    assert centroids[2].tolist() == [5.0, 5.0]


def test_purity_by_hand():
    # Mask 1: classes 7, 7, 300 -> 2 of 3. Mask 2: class 300 -> 1 of 1. Annotated, padding and no label don't count.
    pseudo = torch.tensor([[1, 1, 1, 2], [2, 0, 255, 255]], dtype=torch.uint8)
    labels = torch.tensor([[7, 7, 300, 300], [-1, 3, 3, -1]], dtype=torch.int16)
    assert purity(pseudo, labels) == (3, 4)
    assert purity(torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(2, 2, dtype=torch.uint8)) == (0, 0)


def test_purity_reads_fine_labels_at_patch_centres():
    pseudo = torch.tensor([[1, 1]], dtype=torch.uint8)
    labels = torch.zeros(4, 8, dtype=torch.uint8)
    labels[2, 2], labels[2, 6] = 5, 6
    assert purity(pseudo, labels) == (1, 2)
    labels[2, 6] = 5
    assert purity(pseudo, labels) == (2, 2)
    with pytest.raises(ValueError, match="multiple"):
        purity(pseudo, labels[:, :7])
