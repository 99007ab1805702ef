"""Workspaces of libraries of matrix products, against the defaults that PyTorch's source states."""

import pytest

import simtrain as st
from simtrain.step.workspace import blas_bytes

MIB = 1024 * 1024


@pytest.mark.parametrize(
    ("name", "bytes_per_handle"),
    [
        ("rtx-3090", 8_519_680),
        ("a100-sxm-80g", 8_519_680),
        ("l40s", 8_519_680),
        *((name, 32 * MIB) for name in ("h100-sxm", "h100-pcie", "h200", "h800", "gh200")),
        *((name, 8_519_680) for name in ("b200", "gb200", "b300", "gb300")),
        ("mi250x", 32 * MIB),
        ("radeon-rx-7900-xtx-24gb", 32 * MIB),
        *((name, 128 * MIB) for name in ("mi300x", "mi325x", "mi355x")),
        ("tpu-v4", 0),
        ("cpu-core", 0),
    ],
)
def test_one_handle_takes_what_the_library_defaults_to(name: str, bytes_per_handle: int) -> None:
    assert blas_bytes(st.device(name)) == bytes_per_handle


def test_the_threads_of_forward_and_autograd_have_one_each() -> None:
    kinds = [st.schedule("gpt2-small", f"1x {name}", "micro_batch=1").memory.by_kind_bytes for name in ("a100-sxm-80g", "h100-sxm")]
    assert kinds[1]["workspace"] - kinds[0]["workspace"] == 2 * (32 * MIB - 8_519_680)
