"""Blocks of flash attention on a CPU."""

from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.cpu_attention import KEY_BLOCK, blocks_and_scores, query_block


@settings(max_examples=80, deadline=None)
@given(queries=st.integers(1, 1500), keys=st.integers(1, 1500), causal=st.booleans())
def test_scores_lie_between_what_is_needed_and_the_square(queries, keys, causal):
    blocks, scores = blocks_and_scores(queries, keys, causal=causal)
    needed = sum(min(i + 1, keys) for i in range(queries)) if causal else queries * keys
    assert needed <= scores <= queries * keys
    assert blocks <= -(-queries // query_block(queries)) * -(-keys // KEY_BLOCK)
    if not causal:
        assert scores == queries * keys


def test_long_causal_attention_approaches_the_triangle():
    _, scores = blocks_and_scores(65536, 65536, causal=True)
    assert 0.5 < scores / 65536**2 < 0.51


def test_blocks_of_queries_grow_with_the_sequence():
    assert [query_block(s) for s in (1, 191, 192, 767, 768)] == [32, 32, 64, 64, 256]
