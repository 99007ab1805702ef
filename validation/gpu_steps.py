"""The fixed lists of training steps for GPUs: for calibration, for the test and for matched pairs of recomputation, sharing no sizes.

Written before anything was measured on a GPU. All fit 16 GiB. Hidden width, sequence length and vocabulary of a test step occur in no
calibration step; changing the test list means starting the count of looked-at variants in `compare` anew.
"""

from __future__ import annotations

from validation.steps import gpt, image_model

GPU_CALIBRATION_STEPS = (
    gpt("cal-fp32", (6, 768, 12, 20000), (8, 512), "adamw"),
    gpt("cal-fp32-wide", (4, 1280, 10, 8000), (4, 640), "sgd"),
    gpt("cal-tf32", (8, 1024, 16, 24000), (8, 512), "adamw", "precision=tf32"),
    gpt("cal-tf32-wide", (4, 1536, 12, 12000), (4, 896), "sgd", "precision=tf32"),
    gpt("cal-bf16", (12, 768, 12, 32000), (16, 512), "adamw", "precision=bf16-amp"),
    gpt("cal-bf16-large", (6, 1792, 14, 16000), (8, 768), "adamw", "precision=bf16-amp"),
    gpt("cal-bf16-wide", (4, 2560, 20, 10000), (8, 640), "sgd", "precision=bf16-amp"),
    gpt("cal-bf16-widest", (3, 4096, 32, 8000), (4, 1024), "sgd", "precision=bf16-amp"),
    gpt("cal-bf16-vocabulary", (4, 1152, 18, 40000), (6, 1024), "adamw", "precision=bf16-amp"),
    gpt("cal-bf16-long", (6, 1024, 8, 6000), (2, 4096), "sgd", "precision=bf16-amp"),
    gpt("cal-bf16-narrow", (12, 512, 8, 8000), (16, 256), "adamw", "precision=bf16-amp"),
    gpt("cal-fp16", (8, 1024, 16, 24000), (8, 512), "sgd", "precision=fp16-amp"),
    gpt("cal-fp16-large", (6, 1792, 14, 16000), (8, 768), "adamw", "precision=fp16-amp"),
    image_model("cal-resnet34-fp32", "resnet34", 64, "sgd", image_size=176),
    image_model("cal-resnet18-tf32", "resnet18", 160, "sgd-momentum", "precision=tf32"),
    image_model("cal-resnet50-cifar-tf32", "resnet50-cifar", 192, "adamw", "precision=tf32"),
    image_model("cal-resnet50", "resnet50", 64, "sgd-momentum", "precision=bf16-amp"),
    image_model("cal-resnet50-small", "resnet50", 96, "adamw", "precision=bf16-amp", image_size=160),
    image_model("cal-resnet18-cifar", "resnet18-cifar", 384, "sgd", "precision=bf16-amp"),
    image_model("cal-resnet34-fp16", "resnet34", 96, "sgd-momentum", "precision=fp16-amp"),
    image_model("cal-vit-tf32", "vit", 48, "sgd", "precision=tf32", layers=6, hidden=1280, heads=20, patch=16, image_size=224),
    image_model("cal-vit", "vit", 64, "adamw", "precision=bf16-amp", layers=12, hidden=768, heads=12, patch=16, image_size=224),
    gpt("cal-recompute", (8, 1024, 16, 24000), (8, 512), "adamw", "precision=bf16-amp,checkpoint=full"),
    gpt("cal-host", (24, 64, 2, 1000), (1, 64), "sgd"),
    gpt("cal-host-adamw", (16, 96, 3, 2000), (1, 96), "adamw"),
    gpt("cal-host-bf16", (16, 128, 2, 1500), (1, 128), "adamw", "precision=bf16-amp"),
)
"""Measured by `simtrain calibrate --device cuda`; the only measurements that constants are fitted to."""

GPU_GPT_STEPS = (
    gpt("gpt-bf16", (12, 896, 14, 28000), (8, 448), "adamw", "precision=bf16-amp"),
    gpt("gpt-bf16-wide", (4, 3072, 24, 12800), (4, 576), "sgd", "precision=bf16-amp"),
    gpt("gpt-bf16-long", (6, 1408, 11, 9600), (2, 2560), "adamw", "precision=bf16-amp"),
    gpt("gpt-bf16-deep", (24, 640, 10, 18000), (8, 384), "adamw", "precision=bf16-amp"),
    gpt("gpt-bf16-small", (6, 320, 5, 5000), (4, 160), "adamw", "precision=bf16-amp"),
    gpt("gpt-fp16", (8, 1344, 21, 22400), (4, 832), "adamw", "precision=fp16-amp"),
    gpt("gpt-tf32", (8, 1216, 19, 14400), (4, 704), "adamw", "precision=tf32"),
    gpt("gpt-fp32", (6, 960, 15, 11200), (4, 480), "sgd"),
    gpt("gpt-checkpoint", (12, 1472, 23, 17600), (4, 736), "sgd", "precision=bf16-amp,checkpoint=full"),
    gpt("gpt-segments", (9, 1600, 25, 15200), (4, 960), "sgd", "precision=bf16-amp,checkpoint=every:3"),
    gpt("gpt-accumulation", (8, 832, 13, 26000), (4, 320), "adamw", "precision=bf16-amp,accumulation=4"),
)
GPU_TEST_STEPS = (
    *GPU_GPT_STEPS,
    image_model("resnet18", "resnet18", 96, "sgd", "precision=bf16-amp", image_size=192),
    image_model("resnet34-tf32", "resnet34", 128, "adamw", "precision=tf32", image_size=128, classes=100),
    image_model("resnet50-fp32", "resnet50", 40, "sgd-momentum", image_size=208),
    image_model("resnet50", "resnet50", 80, "sgd-momentum", "precision=bf16-amp", image_size=192),
    image_model("resnet50-cifar-fp16", "resnet50-cifar", 256, "sgd", "precision=fp16-amp"),
    image_model("vit-small", "vit", 128, "adamw", "precision=bf16-amp", layers=12, hidden=384, heads=6, patch=16, image_size=192),
    image_model("vit-large", "vit", 32, "adamw", "precision=bf16-amp", layers=12, hidden=1024, heads=16, patch=16, image_size=240),
    image_model(
        "vit-checkpoint", "vit", 48, "sgd", "precision=tf32,checkpoint=full", layers=10, hidden=640, heads=10, patch=16, image_size=208
    ),
)
"""The test on GPUs. No constant and no choice of form may be made on it."""

GPU_MEMORY_STEPS = (
    gpt("gpt-small-head", (12, 1056, 8, 6400), (8, 416), "sgd"),
    gpt("gpt-deep", (24, 608, 8, 5120), (8, 352), "adamw"),
    gpt("gpt-logits", (4, 736, 8, 48000), (8, 288), "sgd"),
    image_model("resnet50", "resnet50", 32, "sgd", image_size=224, recomputable=True),
    image_model("vit", "vit", 32, "sgd", layers=10, hidden=704, heads=11, patch=16, image_size=224),
)
"""Matched pairs of recomputation on GPUs; no constant rests on them."""

QUICK_GPU_NAMES = ("cal-bf16", "cal-bf16-narrow", "cal-host-bf16")
"""The calibration steps that `--quick` runs on a GPU."""
