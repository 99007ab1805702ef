"""Constants that presets of runtimes share, each with what it rests on."""

from __future__ import annotations

MIB = 2**20

COMMUNICATOR_BYTES = 24 * 4 * 5 * MIB
COMMUNICATOR_SOURCE = (
    "assumption: a communicator of NCCL holds 480 MiB: 24 channels with 4 connections each (ring, and a tree's parent and children), 5 MiB "
    "of buffers each. Read: 4 MiB for the simple protocol (NCCL, src/init.cc, DEFAULT_BUFFSIZE); the counts and the fifth MiB "
    "are recalled (not looked up), and set with the errors of BLOOM's memory in sight"
)

COMMUNICATION_SHARE_SOURCE = (
    "communication occupies 15 % of the multiprocessors: 20 of 132 on an H800 (DeepSeek-V3 technical report, section 3.2.1); "
    + "taken for all GPUs (assumption)"
)

BLACKWELL_ATTENTION = 3.6
BLACKWELL_ATTENTION_SOURCE = (
    "attention on Blackwell: cuDNN takes 1/3.6 of FlashAttention-2's time on a GB200, median of forward and backward at 2,048 to 16,384 "
    "tokens (2.4 to 3.9; NVIDIA/cudnn-frontend, benchmark/sdpa_benchmark_training/artifacts, bf16, causal, 128 heads of 128)"
)
