"""Equations 1 and 2, the bank, and the adapter."""

import math
from typing import get_args

import pytest
import torch

from pipeline.config.schema import Adapter, Pooling
from pipeline.models.glm import CachedNegatives, ClsBank, of_length
from pipeline.models.vla import VARIANTS, VisualLanguageAdapter
from pipeline.ops.losses import POOLINGS, generate_loss, pooled

# --- pooling -------------------------------------------------------------------------------------


def test_attention_by_hand():
    # C = 4, so scores are divided by 2. s = (2, 0, 0, 0); positions have first channel ln 3 and 0:
    # scores ln 3 and 0, weights 3/4 and 1/4. Second channel 4 and 8: 3 + 2 = 5.
    cls = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    dense = torch.tensor([[[math.log(3), 0.0], [4.0, 8.0], [0.0, 0.0], [0.0, 0.0]]])  # (1, C, L)
    expected = torch.tensor([[0.75 * math.log(3), 5.0, 0.0, 0.0]])
    torch.testing.assert_close(pooled(cls, dense), expected)
    torch.testing.assert_close(pooled(cls, dense.view(1, 4, 1, 2)), expected)


def test_max_and_mean_by_hand():
    dense = torch.tensor([[[1.0, 5.0], [4.0, 0.0]]])
    cls = torch.zeros(1, 2)
    assert pooled(cls, dense, "max").tolist() == [[5.0, 4.0]]
    assert pooled(cls, dense, "mean").tolist() == [[3.0, 2.0]]
    assert pooled(cls, dense).tolist() == [[3.0, 2.0]]  # a CLS token of zeros attends evenly


def test_pooling_is_float32_and_checks_its_input():
    cls, dense = torch.randn(2, 8), torch.randn(2, 8, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        low = pooled(cls.half(), dense)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, pooled(cls.half().float(), dense))
    with pytest.raises(ValueError, match="'sum'"):
        pooled(cls, dense, "sum")
    with pytest.raises(ValueError, match="differ"):
        pooled(cls[:1], dense)


def test_the_length_of_the_cls_tokens_sharpens_attention_and_nothing_else():
    cls, dense = torch.randn(3, 8), torch.randn(3, 8, 4, 4)
    assert of_length(cls, None) is cls
    assert torch.allclose(of_length(cls, 5.0).norm(dim=1), torch.full((3,), 5.0))
    assert torch.allclose(of_length(7 * cls, 5.0), of_length(cls, 5.0))
    # Two positions, C = 4: scores s . r / 2 of 6 and 0 along s; the weight of the first is the logistic of 6 or, at
    # length 1 instead of 3, of 2.
    s, r = torch.tensor([[3.0, 0, 0, 0]]), torch.zeros(1, 4, 1, 2)
    r[0, 0, 0, 0] = 4.0
    for length, weight in ((None, 1 / (1 + math.exp(-6))), (1.0, 1 / (1 + math.exp(-2)))):
        assert pooled(of_length(s, length), r)[0, 0] == pytest.approx(4 * weight)
    tiny = pooled(of_length(cls, 1e-4), dense)
    assert torch.allclose(tiny, pooled(cls, dense, "mean"), atol=1e-3), "of no length it is the mean"


# --- bank ----------------------------------------------------------------------------------------


def valid(bank: ClsBank) -> list[tuple[float, int]]:
    tokens, samples = bank.entries()
    return [(float(t[0]), int(s)) for t, s in zip(tokens, samples, strict=True) if s >= 0]


def test_first_in_first_out():
    bank = ClsBank(iterations=2, batch=2, channels=1)
    assert valid(bank) == []
    for i in range(3):
        bank.push(torch.tensor([[i + 0.0], [i + 0.5]]), torch.tensor([2 * i, 2 * i + 1]))
    assert sorted(valid(bank)) == [(1.0, 2), (1.5, 3), (2.0, 4), (2.5, 5)]


def test_a_short_batch_leaves_no_remains_of_the_one_it_replaces():
    bank = ClsBank(iterations=1, batch=2, channels=1)
    bank.push(torch.tensor([[1.0], [2.0]]), torch.tensor([1, 2]))
    bank.push(torch.tensor([[3.0]]), torch.tensor([3]))
    assert valid(bank) == [(3.0, 3)]
    assert bank.entries()[0].tolist() == [[3.0], [0.0]]


def test_the_bank_is_in_the_checkpoint_and_continues_where_it_was():
    first, second = ClsBank(3, 2, 4), ClsBank(3, 2, 4)
    batches = [(torch.randn(2, 4), torch.tensor([i, i + 10])) for i in range(5)]
    for batch in batches[:4]:
        first.push(*batch)
    second.load_state_dict(first.state_dict())
    first.push(*batches[4])
    second.push(*batches[4])
    for left, right in zip(first.entries(), second.entries(), strict=True):
        assert torch.equal(left, right)


def test_bank_holds_no_graph_and_refuses_too_much():
    bank = ClsBank(2, 2, 4)
    bank.push(torch.randn(2, 4, requires_grad=True), torch.tensor([0, 1]))
    assert not bank.entries()[0].requires_grad
    assert list(bank.parameters()) == []
    with pytest.raises(ValueError, match="bank of 2 tokens of 4 channels"):
        bank.push(torch.randn(3, 4), torch.arange(3))
    with pytest.raises(ValueError, match="don't fit"):
        bank.push(torch.randn(2, 5), torch.arange(2))
    none = ClsBank(0, 2, 4)
    none.push(torch.randn(2, 4), torch.arange(2))
    assert none.entries()[0].shape == (0, 4)


def test_negatives_from_the_cache_are_new_each_iteration_and_the_same_when_resumed():
    tokens = torch.arange(24.0).reshape(4, 3, 2).half()  # 4 rows of 3 views
    rows = torch.tensor([7, 9, 10, 12])
    first, again, other = (CachedNegatives(5, tokens, rows, seed) for seed in (0, 0, 1))
    drawn = []
    for _ in range(3):
        found, samples = first.entries()
        assert found.dtype == torch.float32
        assert found.shape == (5, 2)
        assert len({tuple(token.tolist()) for token in found}) == 5, "a token was drawn twice"
        for token, sample in zip(found, samples, strict=True):
            assert (tokens[rows.tolist().index(int(sample))] == token.half()).all(1).any()
        assert torch.equal(found, first.entries()[0]), "the same iteration, the same negatives"
        drawn.append(found)
        first.push(torch.randn(2, 2), torch.tensor([7, 9]))
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], other.entries()[0])
    again.load_state_dict(first.state_dict())
    assert torch.equal(first.entries()[0], again.entries()[0])
    assert sum(value.numel() for value in first.state_dict().values()) == 1, "checkpoints don't hold the cache"
    with pytest.raises(ValueError, match="13 negatives are wanted, and 12"):
        CachedNegatives(13, tokens, rows, 0)


def test_all_tokens_are_drawn_in_the_end():
    negatives = CachedNegatives(2, torch.arange(8.0).reshape(8, 1, 1), torch.arange(8), 3)
    seen = set()
    for _ in range(40):
        seen |= set(negatives.entries()[1].tolist())
        negatives.push(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    assert seen == set(range(8))


# --- adapter -------------------------------------------------------------------------------------


def adapter(variant: str = "transformer", channels: int = 64) -> VisualLanguageAdapter:
    torch.manual_seed(0)
    return VisualLanguageAdapter(channels, variant)


def test_the_schema_has_the_words_of_the_tables():
    assert get_args(Pooling) == tuple(POOLINGS)
    assert get_args(Adapter) == tuple(VARIANTS)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("num", [0, 1, 7])
def test_any_number_of_ids(variant, num):
    model = adapter(variant)
    means = torch.randn(num, 64, requires_grad=True)
    generated = model(means, torch.randn(3, 64))
    assert generated.shape == (num, 64)
    loss = generate_loss(generated, torch.randn(4, 64), torch.arange(9) < num)
    loss.backward()
    assert torch.isfinite(loss)
    for parameter in model.parameters():  # none is left out: a data-parallel run would hang
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()


def test_generated_features_start_with_the_length_of_text_features():
    # A layer norm's output has mean square 1, so with a gain of 1 / sqrt(C) unit length, whatever comes in.
    model = adapter(channels=128)
    for scale in (0.01, 1.0, 100.0):
        generated = model(scale * torch.randn(5, 128), torch.randn(2, 128))
        torch.testing.assert_close(generated.norm(dim=1), torch.ones(5), atol=1e-3, rtol=0)
    text = torch.nn.functional.normalize(torch.randn(5, 128), dim=1)
    assert generate_loss(generated, text, torch.ones(5, dtype=torch.bool)).item() < 4  # (1 + 1)^2 at most


def test_keys_are_directions_and_matter():
    model, means, cls = adapter(), torch.randn(4, 64), torch.randn(3, 64)
    torch.testing.assert_close(model(means, cls), model(means, 7 * cls))
    torch.testing.assert_close(model(means, cls), model(means, cls.flip(0)))  # a set of keys, not a sequence
    assert (model(means, cls) - model(means, -cls)).abs().max() > 1e-4


def test_queries_are_a_set_that_sees_itself():
    model, means, cls = adapter(), torch.randn(4, 64), torch.randn(3, 64)
    torch.testing.assert_close(model(means.flip(0), cls), model(means, cls).flip(0), atol=1e-5, rtol=1e-4)
    assert (model(means[:2], cls) - model(means, cls)[:2]).abs().max() > 1e-4


def test_layers_start_with_weights_of_their_own():
    first, second = adapter().adapter.decoder.layers
    assert not torch.equal(first.linear1.weight, second.linear1.weight)


def test_original_is_the_mean_and_mlp_looks_at_nothing_else():
    means, cls = torch.randn(4, 64), torch.randn(3, 64)
    assert torch.equal(adapter("original")(means, cls), means)
    mlp = adapter("mlp")
    assert torch.equal(mlp(means, cls), mlp(means, -cls))


def test_adapter_errors():
    with pytest.raises(ValueError, match="'rnn'"):
        VisualLanguageAdapter(64, "rnn")
    with pytest.raises(ValueError, match="8 heads don't divide 60"):
        VisualLanguageAdapter(60)
    assert VisualLanguageAdapter(60, num_heads=6, num_layers=1)(torch.randn(2, 60), torch.randn(1, 60)).shape == (2, 60)
    with pytest.raises(ValueError, match="64 channels wanted"):
        adapter()(torch.randn(2, 32), torch.randn(2, 64))


def test_the_adapter_learns_text_features():
    # Four means, four unit targets: a few steps must lower eq. 8 from about 2 to near 0.
    model = adapter()
    generator = torch.Generator().manual_seed(1)
    means, cls = torch.randn(4, 64, generator=generator), torch.randn(2, 64, generator=generator)
    text = torch.nn.functional.normalize(torch.randn(4, 64, generator=generator), dim=1)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-3)
    losses = []
    for _ in range(60):
        loss = generate_loss(model(means, cls), text, torch.ones(4, dtype=torch.bool))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert 1 < losses[0] < 4
    assert losses[-1] < 0.2
