"""Explicit blocks read back, on their own and in a strategy; broken ones are refused with the fix."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

import simtrain as st
from simtrain.core.checkpoint import blocks_text, budget_bytes, parse_blocks
from simtrain.core.errors import StrategyError


@given(some.lists(some.tuples(some.integers(0, 3), some.integers(1, 5)), max_size=12, min_size=1))
def test_blocks_read_back(steps):
    blocks, at = [], 0
    for gap, length in steps:
        blocks.append((at + gap, at + gap + length))
        at += gap + length
    text = blocks_text(blocks)
    assert list(parse_blocks(text)) == blocks
    strategy = st.Strategy(data=2, checkpoint=text, precision="bf16-amp")
    assert st.Strategy.parse(str(strategy)) == strategy
    assert st.Strategy.from_toml(strategy.to_toml()) == strategy


def test_single_blocks_and_segments():
    assert parse_blocks("layers:0-2,8") == ((0, 1), (1, 2), (2, 3), (8, 9))
    assert parse_blocks("layers:[0-2],8") == ((0, 3), (8, 9))
    assert blocks_text([(0, 1), (1, 2), (3, 6), (6, 7)]) == "layers:0-1,[3-5],6"
    assert blocks_text([]) == "none"
    assert st.Strategy.parse("checkpoint=layers:0-3,8,data=2").data == 2


@pytest.mark.parametrize(
    "text", ["layers:", "layers:3-1", "layers:1,1", "layers:4,2", "layers:[2", "layers:a", "optimal:", "optimal:8", "best"]
)
def test_broken_choices_are_refused(text):
    with pytest.raises(StrategyError):
        st.Strategy(checkpoint=text)


def test_budgets():
    assert budget_bytes("optimal") is None
    assert budget_bytes("optimal:8GiB") == 8 * 2**30
