"""What a strategy moves, as text and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as some

import simtrain as st
from simtrain.core.errors import StrategyError
from simtrain.core.offload import Offload, parse_offload, with_blocks


def test_parts_go_to_the_host_unless_they_say_otherwise():
    assert parse_offload("none") == Offload()
    assert parse_offload("optimizer:nvme+gradients") == Offload(optimizer="nvme", gradients="host")
    assert parse_offload("activations(0-2,8):nvme") == Offload(activations="nvme", blocks=frozenset({0, 1, 2, 8}))
    assert not Offload().anything


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("optimzer", "did you mean 'optimizer'"),
        ("optimizer:nvm", "did you mean 'nvme'"),
        ("optimizer+optimizer", "given twice"),
        ("gradients", "use offload=optimizer+gradients"),
        ("optimizer+parameters", "use offload=optimizer+gradients+parameters"),
        ("optimizer(0-3)", "only activations are moved by blocks"),
        ("activations(3-1)", "must ascend"),
        ("activations(x)", "neither a block"),
        ("", "is no part"),
        ("optimizer+delayed", "use offload=optimizer+gradients+delayed"),
        ("optimizer+gradients+delay", "did you mean 'delayed'"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_fix(text, said):
    with pytest.raises(StrategyError, match="offload=") as caught:
        parse_offload(text)
    assert said in str(caught.value)


@given(some.sets(some.integers(0, 60), min_size=1))
def test_a_strategy_with_named_blocks_reads_its_own_text(blocks):
    how = st.Strategy(offload=with_blocks("optimizer:nvme+activations", blocks), micro_batch=3)
    assert how.moved.blocks == blocks
    assert how.moved.optimizer == "nvme"
    assert st.Strategy.parse(str(how)) == how
    assert st.Strategy.from_toml(how.to_toml()) == how


def test_no_blocks_leave_no_activations():
    assert with_blocks("activations", []) == "none"
    assert with_blocks("optimizer+activations:nvme", [1]) == "optimizer+activations(1):nvme"
