"""The ledger against the allocator of real steps, where tensors without values cannot tell: they never add gradients in place."""

import pytest

from simtrain.core import catalog
from simtrain.core.runtimes import runtime
from simtrain.core.strategy import Strategy
from simtrain.step.workspace import ONEDNN_PRODUCT_BYTES
from tests.step.books import ledger_of
from validation.allocation_peak import allocation_peak_bytes
from validation.memory_worker import Trainer
from validation.steps import TrainingStep
from validation.training import Training

WIDE = {"layers": 2, "hidden": 128, "heads": 4, "max_positions": 16, "vocabulary": 2048}
"""The table outweighs everything, so that memory peaks where its two gradients meet."""


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "how", ["fp32", "bf16-amp", "fp32,accumulation=2", "fp32,checkpoint=full", "bf16-amp,accumulation=2", "bf16-amp,checkpoint=full"]
)
def test_the_two_gradients_of_a_tied_weight_meet_as_in_a_real_step(tied: bool, how: str) -> None:
    options = WIDE | {"tied_head": tied}
    text = f"micro_batch=1,optimizer=sgd,precision={how}"

    def run() -> None:
        training = Training(TrainingStep("tied", "gpt", 16, text, options))
        for _ in range(2):
            training.step()

    book = ledger_of(catalog.workload("gpt", seq_len=16, **options), Strategy.parse(text), runtime("torch-eager-cpu"))
    peak = allocation_peak_bytes(run)
    inside = ONEDNN_PRODUCT_BYTES if how == "bf16-amp,accumulation=2" else 0  # memory peaks in a product, whose scratch is not counted
    assert peak - inside < 1.005 * book.moments[book.peak].sum() < 1.01 * peak


@pytest.mark.parametrize("checkpoint", ["none", "selective", "full"])
def test_unfused_attention_that_is_recomputed_peaks_as_in_a_real_step(checkpoint: str) -> None:
    options = {"layers": 6, "hidden": 64, "heads": 4, "vocabulary": 200, "max_positions": 128}
    text, unfused = "micro_batch=4,optimizer=sgd", runtime("torch-eager-cpu").with_(fused_attention=False)
    trainer = Trainer(TrainingStep("unfused", "gpt", 128, text, options, "unfused"), checkpoint)
    for _ in range(2):
        trainer.step()
    book = ledger_of(catalog.workload("gpt", seq_len=128, **options), Strategy.parse(text).with_(checkpoint=checkpoint), unfused)
    # every checkpoint keeps the state of the random numbers, 5,056 bytes on a CPU, which is not counted
    assert 0 <= trainer.peak_bytes() - float(book.moments[book.peak].sum()) <= 6 * 5056 + 256
