"""Bins: every row once, within the capacity, few and alike in cost; a row too long is an error."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from agentsdpo.errors import LearnError
from agentsdpo.learn.pack import RowCost, pack, row_cost

COST = RowCost(linear=100.0, quadratic=1.0)


@given(lengths=st.lists(st.integers(1, 1000), min_size=1, max_size=60), extra=st.integers(0, 3000))
def test_every_row_once_within_the_capacity_and_in_few_bins(lengths: list[int], extra: int) -> None:
    capacity = max(lengths) + extra
    bins = pack(lengths, capacity, COST)
    assert sorted(i for rows in bins for i in rows) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in rows) <= capacity for rows in bins)
    least = -(-sum(lengths) // capacity)
    assert len(bins) <= 11 * least / 9 + 1  # the bound of first-fit decreasing, over what no packing can beat
    assert bins == pack(lengths, capacity, COST)


def test_bins_are_alike_in_cost_not_in_tokens() -> None:
    """One long branch costs as much as many short ones of five times its tokens, since attention is quadratic."""
    lengths = [1000] + [100] * 60
    bins = pack(lengths, 6000, COST)
    costs = sorted(sum(COST(lengths[i]) for i in rows) for rows in bins)
    assert len(bins) == 2
    assert costs[-1] / costs[0] < 1.05
    assert sorted(sum(lengths[i] for i in rows) for rows in bins) == [1300, 5700]


def test_the_cost_is_that_of_the_model_s_body_and_attention() -> None:
    shape = Qwen3Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    for tied in (True, False):
        model = Qwen3ForCausalLM(Qwen3Config(**{**shape.to_dict(), "tie_word_embeddings": tied}))
        body = sum(p.numel() for p in model.model.parameters()) - 50 * 32
        assert row_cost(model) == RowCost(2.0 * body, 2.0 * 4 * 16 * 2)


def test_a_branch_longer_than_a_forward_is_an_error() -> None:
    with pytest.raises(LearnError, match=r"a branch has 901 tokens.*forward_tokens is 900; set .* to 901 or more"):
        pack([5, 901, 7], 900, COST)
    assert pack([], 900, COST) == []
