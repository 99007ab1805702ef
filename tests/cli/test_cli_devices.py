import pytest

from simtrain.core import catalog


def names(run_json, *argv):
    code, data = run_json("devices", *argv)
    assert code == 0
    return {d["name"] for d in data["devices"]}


def test_filters_keep_what_meets_every_condition(run_json):
    tpus = names(run_json, "--class", "systolic", "--vendor", "google")
    assert tpus == {n for n in catalog.names("devices") if n.startswith("TPU")}
    large = names(run_json, "--class", "gpu", "--memory-min", "100 GiB", "--precision", "fp8", "--since", 2024)
    assert {"B200-SXM-180GB", "MI325X-256GB"} <= large
    assert all(catalog.device(n).memory.capacity_bytes >= 100 * 2**30 for n in large)
    assert all(catalog.device(n).memory.bandwidth_bytes_per_s >= 4e12 for n in names(run_json, "--bandwidth-min", "4 TB/s"))
    assert names(run_json, "sxm4", "--memory-min", "60 GiB") == {"A100-SXM4-80GB", "A800-SXM4-80GB"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--vendor", "nvida"), "did you mean 'NVIDIA'"),
        (("--class", "gpuu"), "did you mean 'gpu'"),
        (("--precision", "int3"), "unknown precision 'int3'"),
        (("--memory-min", "40"), "has no unit"),
        (("--class", "cpu", "--precision", "fp8"), "no device meets all conditions"),
        (("--compare", "a100"), "at least two devices"),
        (("h100", "--compare", "a100,h100"), "either a name or --compare"),
        (("--roofline", "r.txt"), "must end in .png"),
    ],
)
def test_what_cannot_be_done_is_said(run, argv, message):
    code, out, err = run("devices", *argv)
    assert (code, out) == (2, "")
    assert message in err


def test_devices_are_compared_side_by_side(run, run_json):
    code, out, _ = run("devices", "--compare", "a100-sxm-80g,h100-sxm,tpu-v5p")
    assert code == 0
    (line,) = (line for line in out.splitlines() if line.startswith(" memory.bandwidth"))
    assert "2.04 TB/s" in line
    assert "3.35 TB/s (1.64x)" in line
    assert "array_rows" in out
    assert len(names(run_json, "--compare", "a100-sxm-80g,h100-sxm,tpu-v5p")) == 3


def test_rooflines_are_drawn(run, tmp_path):
    path = tmp_path / "r.png"
    code, _, err = run("devices", "--vendor", "google", "--roofline", path)
    assert code == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    assert f"wrote {path}" in err
