"""The fixed lists of training steps: for calibration, for development, and for the final test, sharing no sizes.

The test list was written before anything was fitted. Hidden width, sequence length and vocabulary of a test step occur in no
calibration step and no development step; changing it means starting the count of looked-at variants in `compare` anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from simtrain.core.strategy import Strategy


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One training step that is both run and predicted.

    Attributes:
        name: Unique among all lists.
        workload: Catalog name of the model family.
        sequence: Sequence length; 0 where the model has its own.
        strategy: As `Strategy.parse` reads it (micro-batch, optimizer, checkpointing, accumulation, precision).
        options: Options of the family (layers, hidden, heads, vocabulary, ...).
        attention: "fused", or "unfused" for a transformer that writes its scores out.
    """

    name: str
    workload: str
    sequence: int
    strategy: str
    options: Mapping[str, Any] = field(default_factory=dict)
    attention: Literal["fused", "unfused"] = "fused"

    def parsed(self) -> Strategy:
        """Returns the strategy."""
        return Strategy.parse(self.strategy)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data for JSON; `from_dict` reads it back."""
        return {
            "name": self.name,
            "workload": self.workload,
            "sequence": self.sequence,
            "strategy": self.strategy,
            "options": dict(self.options),
            "attention": self.attention,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainingStep:
        """Reads what `to_dict` wrote."""
        attention = data.get("attention", "fused")
        return cls(data["name"], data["workload"], int(data["sequence"]), data["strategy"], dict(data["options"]), attention)


GPT_POSITIONS = 1024
"""Positions of the family's models unless they are told otherwise."""


def gpt(name: str, shape: tuple[int, int, int, int], batch: tuple[int, int], optimizer: str, extra: str = "") -> TrainingStep:
    """Returns a step of a GPT-like model.

    Args:
        name: Of the step.
        shape: Layers, hidden width, heads and vocabulary.
        batch: Samples of a micro-batch and their sequence length.
        optimizer: As in a strategy.
        extra: Further strategy fields.
    """
    return _language_model(name, "gpt", shape, batch, optimizer, extra)


def llama(name: str, shape: tuple[int, int, int, int], batch: tuple[int, int], optimizer: str, extra: str = "") -> TrainingStep:
    """Returns a step of a Llama-like model: RMS norms, rotary embeddings, gates; see `gpt`."""
    return _language_model(name, "llama", shape, batch, optimizer, extra)


def _language_model(
    name: str, workload: str, shape: tuple[int, int, int, int], batch: tuple[int, int], optimizer: str, extra: str
) -> TrainingStep:
    layers, hidden, heads, vocabulary = shape
    micro_batch, sequence = batch
    strategy = f"micro_batch={micro_batch},optimizer={optimizer}" + (f",{extra}" if extra else "")
    options = {"layers": layers, "hidden": hidden, "heads": heads, "vocabulary": vocabulary}
    if sequence > GPT_POSITIONS or workload != "gpt":
        options["max_positions"] = max(sequence, GPT_POSITIONS)
    return TrainingStep(name, workload, sequence, strategy, options)


def image_model(name: str, workload: str, batch: int, optimizer: str, extra: str = "", **options: Any) -> TrainingStep:
    """Returns a step of a convolutional network or a vision transformer.

    Args:
        name: Of the step.
        workload: Catalog name.
        batch: Samples of a micro-batch.
        optimizer: As in a strategy.
        extra: Further strategy fields.
        options: Of the family.
    """
    strategy = f"micro_batch={batch},optimizer={optimizer}" + (f",{extra}" if extra else "")
    return TrainingStep(name, workload, 0, strategy, options)


CALIBRATION_STEPS = (
    gpt("cal-deep-narrow", (8, 128, 4, 2500), (8, 96), "adamw"),
    gpt("cal-long", (5, 160, 5, 1500), (2, 512), "sgd"),
    gpt("cal-many-samples", (6, 224, 7, 3000), (6, 80), "sgd"),
    gpt("cal-square", (4, 240, 5, 3500), (4, 144), "adamw"),
    gpt("cal-deep", (10, 288, 6, 5000), (2, 112), "adamw"),
    gpt("cal-vocabulary", (3, 336, 7, 12000), (2, 224), "adamw"),
    gpt("cal-few-tokens", (4, 416, 13, 15000), (1, 160), "adamw"),
    gpt("cal-wide", (2, 544, 17, 6000), (2, 192), "sgd"),
    gpt("cal-widest", (2, 704, 11, 7000), (2, 48), "adamw"),
    gpt("cal-large-heads", (4, 304, 4, 4000), (3, 180), "adamw"),
    gpt("cal-bf16-narrow", (8, 128, 4, 2500), (8, 96), "sgd", "precision=bf16-amp"),
    gpt("cal-bf16-long", (5, 160, 5, 1500), (2, 512), "sgd", "precision=bf16-amp"),
    gpt("cal-bf16-square", (4, 240, 5, 3500), (4, 144), "adamw", "precision=bf16-amp"),
    gpt("cal-bf16-vocabulary", (3, 336, 7, 12000), (2, 224), "adamw", "precision=bf16-amp"),
    gpt("cal-bf16-wide", (2, 544, 17, 6000), (4, 192), "sgd", "precision=bf16-amp"),
    gpt("cal-bf16-small-heads", (6, 224, 14, 3000), (6, 80), "sgd", "precision=bf16-amp"),
    gpt("cal-bf16-large-heads", (2, 704, 11, 7000), (4, 112), "sgd", "precision=bf16-amp"),
    gpt("cal-bf16-two-heads", (6, 128, 2, 2500), (6, 176), "sgd", "precision=bf16-amp"),
    gpt("cal-bf16-twelve-heads", (2, 768, 12, 2600), (2, 152), "sgd", "precision=bf16-amp"),
    llama("cal-llama-deep", (6, 160, 4, 2700), (6, 84), "sgd"),
    llama("cal-llama-wide", (2, 528, 8, 4600), (3, 168), "adamw"),
    llama("cal-llama-bf16", (4, 312, 6, 3300), (4, 118), "sgd", "precision=bf16-amp"),
    llama("cal-llama-bf16-wide", (2, 528, 8, 4600), (3, 168), "sgd", "precision=bf16-amp"),
    image_model("cal-resnet18-small", "resnet18-cifar", 6, "sgd"),
    image_model("cal-resnet50-small", "resnet50-cifar", 3, "sgd"),
    image_model("cal-resnet18", "resnet18", 3, "sgd-momentum", image_size=96, classes=10),
    image_model("cal-resnet50", "resnet50", 2, "sgd", image_size=96, classes=10),
    image_model("cal-resnet34", "resnet34", 4, "adamw", image_size=48, classes=10),
    image_model("cal-resnet18-batch", "resnet18-cifar", 11, "sgd"),
    image_model("cal-resnet34-batch", "resnet34", 5, "sgd", image_size=80, classes=10),
    image_model("cal-resnet50-batch", "resnet50", 8, "sgd", image_size=56, classes=10),
    image_model("cal-vit-narrow", "vit", 6, "sgd", layers=6, hidden=128, heads=2, patch=8, image_size=104, classes=10),
    image_model("cal-vit-wide", "vit", 6, "sgd", layers=2, hidden=768, heads=12, patch=16, image_size=112, classes=10),
    image_model("cal-vit", "vit", 6, "sgd", layers=4, hidden=160, heads=5, patch=8, image_size=72, classes=10),
    gpt("cal-recompute", (6, 224, 7, 3000), (4, 80), "sgd", "checkpoint=full"),
    gpt("cal-recompute-two", (8, 128, 4, 2500), (8, 96), "sgd", "checkpoint=every:2"),
)
"""Measured by `simtrain calibrate`; the only measurements that constants are fitted to."""

DEVELOPMENT_STEPS = (
    gpt("dev-a", (3, 352, 11, 4500), (4, 120), "adamw"),
    gpt("dev-b", (6, 208, 13, 2200), (4, 320), "sgd"),
    gpt("dev-c", (2, 480, 10, 11000), (2, 208), "adamw"),
    gpt("dev-d", (6, 272, 17, 3200), (4, 104), "adamw", "checkpoint=full"),
    gpt("dev-e", (3, 176, 11, 5500), (4, 88), "adamw", "accumulation=3"),
    gpt("dev-f", (6, 144, 3, 1800), (8, 136), "adamw", "checkpoint=every:3"),
    gpt("dev-g", (2, 608, 19, 1200), (2, 152), "sgd"),
    gpt("dev-h", (6, 272, 17, 3200), (4, 104), "adamw", "precision=bf16-amp"),
    gpt("dev-i", (3, 352, 11, 4500), (4, 120), "sgd", "precision=bf16-amp"),
    gpt("dev-j", (6, 208, 13, 2200), (4, 320), "sgd", "precision=bf16-amp,checkpoint=full"),
)
"""Looked at freely while the harness was developed."""

TEST_STEPS = (
    gpt("test-small", (2, 192, 6, 2048), (16, 64), "adamw"),
    gpt("test-base", (4, 384, 6, 8192), (4, 128), "adamw"),
    gpt("test-deep", (12, 192, 3, 4096), (4, 128), "sgd"),
    gpt("test-vocabulary", (6, 384, 12, 16000), (2, 256), "adamw"),
    gpt("test-wide", (2, 640, 10, 8000), (2, 128), "adamw"),
    gpt("test-long", (8, 320, 5, 4096), (2, 384), "sgd"),
    gpt("test-shallow", (3, 576, 9, 10000), (4, 64), "sgd"),
    gpt("test-batch", (10, 256, 4, 2048), (8, 64), "adamw"),
    gpt("test-checkpoint-full", (8, 256, 8, 8000), (4, 128), "adamw", "checkpoint=full"),
    gpt("test-checkpoint-two", (8, 192, 6, 4096), (8, 128), "sgd", "checkpoint=every:2"),
    gpt("test-accumulation", (4, 256, 4, 4096), (2, 128), "adamw", "accumulation=4"),
    gpt("test-one-sample", (6, 512, 8, 4096), (1, 256), "adamw"),
    gpt("test-head", (4, 448, 7, 16384), (4, 64), "adamw"),
)
"""The final test. No constant and no choice of form may be made on it."""

MATCHED_STEPS = (
    gpt("gpt-base", (5, 368, 8, 7168), (4, 136), "adamw"),
    gpt("gpt-deep", (14, 184, 4, 4224), (4, 132), "sgd"),
    gpt("gpt-long", (4, 296, 4, 3584), (2, 456), "adamw"),
    gpt("gpt-wide", (2, 624, 8, 9216), (3, 124), "sgd"),
    gpt("gpt-checkpoint", (8, 264, 4, 6400), (4, 140), "adamw", "checkpoint=full"),
    gpt("gpt-segments", (9, 232, 4, 4800), (4, 148), "sgd", "checkpoint=every:3"),
    gpt("gpt-accumulation", (4, 280, 5, 4352), (2, 156), "adamw", "accumulation=3"),
    gpt("gpt-bf16", (6, 384, 6, 8704), (4, 172), "adamw", "precision=bf16-amp"),
    gpt("gpt-bf16-wide", (3, 640, 10, 5632), (4, 116), "sgd", "precision=bf16-amp"),
    gpt("gpt-bf16-checkpoint", (8, 320, 5, 5376), (4, 164), "sgd", "precision=bf16-amp,checkpoint=full"),
    llama("llama-base", (4, 256, 8, 4608), (6, 130), "sgd"),
    llama("llama-wide", (3, 392, 4, 3400), (4, 102), "adamw"),
    llama("llama-bf16", (5, 328, 4, 5200), (4, 146), "sgd", "precision=bf16-amp"),
    image_model("resnet18-cifar", "resnet18-cifar", 14, "sgd-momentum"),
    image_model("resnet18-128", "resnet18", 4, "sgd", image_size=128),
    image_model("resnet34-64", "resnet34", 6, "adamw", image_size=64, classes=100),
    image_model("resnet50-cifar", "resnet50-cifar", 7, "sgd"),
    image_model("resnet50-64", "resnet50", 6, "sgd-momentum", image_size=64, classes=100),
    image_model("resnet50-128", "resnet50", 3, "adamw", image_size=128, classes=100),
    image_model("vit-small-patches", "vit", 4, "adamw", layers=6, hidden=192, heads=3, patch=8, image_size=96, classes=100),
    image_model("vit-wide", "vit", 5, "sgd", layers=4, hidden=384, heads=6, patch=16, image_size=160, classes=100),
    image_model("vit-checkpoint", "vit", 4, "sgd", "checkpoint=full", layers=8, hidden=256, heads=4, patch=8, image_size=88, classes=10),
)
"""Matched runs over families, written before anything was fitted to convolutions, bf16 or recomputation."""

REFERENCE_STEPS = (
    gpt("reference-gpt-3x200", (3, 200, 5, 2900), (4, 108), "adamw"),
    image_model("reference-resnet18-56", "resnet18", 3, "sgd", image_size=56, classes=10),
)
"""Timed beside every measured step, to tell how fast the machine is then: see `validation.reference`.

Neither model occurs at this size in another list. A change of one needs another name: profiles know their reference by it.
"""

QUICK_TEST_NAMES = ("test-small", "test-deep", "test-head", "test-checkpoint-full", "test-accumulation")
"""The subset that `--quick` runs."""


def quick_test_steps() -> tuple[TrainingStep, ...]:
    """Returns the subset of the test list that `--quick` runs."""
    return tuple(step for step in TEST_STEPS if step.name in QUICK_TEST_NAMES)


def quick_calibration_steps() -> tuple[TrainingStep, ...]:
    """Returns the calibration steps that `--quick` needs: GPTs in fp32, with and without checkpointing."""
    return tuple(s for s in CALIBRATION_STEPS if s.workload == "gpt" and s.parsed().precision == "fp32")
