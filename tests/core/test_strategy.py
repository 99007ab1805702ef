import pytest
from hypothesis import given
from hypothesis import strategies as some

from simtrain.core.errors import InputError, StrategyError, UnknownNameError
from simtrain.core.precision import PRECISIONS
from simtrain.core.runtimes import runtime
from simtrain.core.strategy import (
    OPTIMIZERS,
    ReplicaGroup,
    ReplicaTemplate,
    StageTemplate,
    Strategy,
    checkpoint_segment,
)

degrees = some.integers(1, 4096)
strategies = some.builds(
    Strategy,
    data=degrees,
    micro_batch=degrees,
    accumulation=degrees,
    tensor=degrees,
    pipeline=some.integers(1, 64),
    context=degrees,
    expert=degrees,
    zero=some.integers(0, 3),
    precision=some.sampled_from(sorted(PRECISIONS)),
    optimizer=some.sampled_from(sorted(OPTIMIZERS)),
    checkpoint=some.sampled_from(["none", "full", "sqrt", "selective", "selective-op"]) | some.integers(1, 99).map("every:{}".format),
    compression=some.sampled_from(["none", "16-bit", "8-bit", "1-bit", "zero++", "topk:0.01"])
    | some.integers(1, 32).map("powersgd:{}".format),
    low_communication=some.just("") | some.integers(1, 999).map("diloco:{}".format) | some.integers(1, 999).map("local-sgd:{}".format),
)


@given(strategies)
def test_text_is_read_back(strategy):
    assert Strategy.parse(str(strategy)) == strategy


@given(strategies)
def test_toml_is_read_back(strategy):
    assert Strategy.from_toml(strategy.to_toml()) == strategy


@given(strategies)
def test_the_batch_and_the_ranks_are_products(s):
    assert s.global_batch == s.data * s.micro_batch * s.accumulation
    assert s.ranks == s.data * s.tensor * s.context * s.pipeline


def test_text_names_only_what_differs_from_the_defaults():
    assert str(Strategy(data=4, precision="fp16-amp")) == "data=4,precision=fp16-amp"
    assert str(Strategy()) == "data=1"


@given(some.lists(some.integers(1, 99), min_size=2, max_size=16), some.booleans())
def test_cuts_are_read_back(counts, ends):
    blocks = (0, *counts[1:-1], 0) if ends else tuple(counts)
    strategy = Strategy(pipeline=len(blocks), cuts="-".join(map(str, blocks)))
    assert strategy.blocks_per_chunk == blocks
    assert Strategy.parse(str(strategy)) == strategy
    assert Strategy.from_toml(strategy.to_toml()) == strategy


def test_spaces_and_trailing_commas_do_not_matter():
    assert Strategy.parse(" data = 4 , zero=1, ") == Strategy(data=4, zero=1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data", "'data' is not of the form field=value"),
        ("dta=4", "a strategy has no field 'dta': did you mean 'data'?"),
        ("microbatch=4", "did you mean 'micro_batch'?"),
        ("qqq=4", "a strategy has no field 'qqq': allowed: data, micro_batch"),
        ("plan=1", "a strategy has no field 'plan'"),
        ("data=two", "data must be a whole number, not 'two'"),
        ("data=2.5", "data must be a whole number, not '2.5'"),
        ("data=0", "data must be a whole number of at least 1, not 0"),
        ("data=-1", "data must be a whole number of at least 1, not -1"),
        ("zero=4", "zero must be 0, 1, 2 or 3, not 4"),
        ("data=2,data=4", "data is given twice: 2 and 4"),
        ("checkpoint=every:0", "checkpoint must be none, full, sqrt, selective or every:K"),
        ("checkpoint=every:²", "checkpoint must be none, full, sqrt, selective or every:K"),
        ("checkpoint=some", "not 'some'"),
        ("pipeline=2,cuts=2,2", "'2' is not of the form field=value"),
        ("pipeline=2,cuts=2-", "cuts must be numbers of blocks joined by '-', such as 2-4-4-2, not '2-'"),
        ("pipeline=2,cuts=-2-2", "not '-2-2'"),
        ("pipeline=3,cuts=2-0-2", "leaves a chunk in the middle empty"),
        ("pipeline=3,cuts=2-2", "names 2 chunks, which pipeline=3 does not divide into"),
        ("pipeline=2,chunks=2,cuts=2-2", "names 2 chunks, which pipeline=2 x chunks=2 does not divide into"),
    ],
)
def test_a_mistyped_strategy_says_what_is_wrong(text, message):
    with pytest.raises(StrategyError) as caught:
        Strategy.parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("precision=fp16", "unknown precision 'fp16': did you mean 'fp16-amp' or"),
        ("optimizer=adamv", "unknown optimizer 'adamv': did you mean 'adam"),
        ("context_style=zigzag", "unknown context style 'zigzag'"),
    ],
)
def test_unknown_names_in_a_strategy_suggest_the_nearest(text, message):
    with pytest.raises(UnknownNameError) as caught:
        Strategy.parse(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ("data = ", "strategy is not valid TOML"),
        ("data = 4.0", "data must be a whole number of at least 1, not 4.0"),
        ("data = true", "data must be a whole number of at least 1, not True"),
        ("zero = 1.0", "zero must be 0, 1, 2 or 3, not 1.0"),
        ("precision = 16", "precision must be text, not 16"),
        ("optimizer = ['adamw']", "optimizer must be text, not ['adamw']"),
        ("checkpoint = 2", "checkpoint must be text, not 2"),
        ("[data]\nx = 1", "data must be a whole number"),
    ],
)
def test_a_broken_strategy_file_says_what_is_wrong(toml, message):
    with pytest.raises(StrategyError) as caught:
        Strategy.from_toml(toml)
    assert message in str(caught.value)


MIXED = Strategy(
    precision="fp16-amp",
    plan=(
        ReplicaGroup(ReplicaTemplate((StageTemplate(device="a100", tensor=2),), micro_batch=8), copies=2, micro_batches=3),
        ReplicaGroup(ReplicaTemplate((StageTemplate("v100", (0, 6)), StageTemplate("v100", (6, -1))), micro_batch=2), 1, 4),
    ),
)


def test_a_plan_of_replicas_overrides_the_sugar():
    assert MIXED.replicas == MIXED.plan
    assert MIXED.global_batch == 8 * 2 * 3 + 2 * 1 * 4
    assert MIXED.ranks == 2 * 2 + 2


def test_a_plan_of_replicas_is_shown_and_not_written_as_toml():
    assert str(MIXED) == (
        "precision=fp16-amp,plan=2x(a100[0:end], 3 micro-batches of 8) + 1x(v100[0:6] | v100[6:end], 4 micro-batches of 2)"
    )
    with pytest.raises(StrategyError, match="no TOML form"):
        MIXED.to_toml()


def test_the_sugar_stands_for_one_template_copied():
    (group,) = Strategy(data=4, micro_batch=2, accumulation=3, tensor=2, pipeline=2).replicas
    assert (group.copies, group.micro_batches, group.template.micro_batch) == (4, 3, 2)
    assert [s.tensor for s in group.template.stages] == [2, 2]


def test_with_changes_a_copy():
    base = Strategy(data=4)
    assert base.with_(zero=1) == Strategy(data=4, zero=1)
    assert base.zero == 0


@pytest.mark.parametrize(
    ("checkpoint", "depth", "segment"),
    [("none", 12, 0), ("full", 12, 1), ("sqrt", 12, 3), ("sqrt", 1, 1), ("sqrt", 0, 1), ("every:4", 12, 4)],
)
def test_checkpointing_recomputes_segments(checkpoint, depth, segment):
    assert checkpoint_segment(checkpoint, depth) == segment


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"fused_attention": "false"}, "fused_attention is True or False, not 'false'"),
        ({"launch_s": "16 us"}, "launch_s is a finite number, not '16 us'"),
        ({"launch_s": float("inf")}, "launch_s is a finite number"),
        ({"bucket_bytes": True}, "bucket_bytes is a finite number"),
    ],
)
def test_behaviours_of_a_runtime_keep_their_kind(changed, told):
    with pytest.raises(InputError, match=told):
        runtime("torch-eager").with_(**changed)
