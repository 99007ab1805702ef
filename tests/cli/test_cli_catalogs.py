import dataclasses

import pytest

from simtrain.core import catalog
from simtrain.core.hardware import Cluster, Device


@pytest.mark.parametrize("group", ["devices", "clusters", "workloads"])
def test_everything_in_a_catalog_is_listed(run, run_json, group):
    code, out, err = run(group)
    assert (code, err) == (0, "")
    code, data = run_json(group)
    assert code == 0
    names = [item["name"] for item in data[group]]
    assert sorted(names) == sorted(catalog.names(group))
    assert all(name in out for name in names)


def test_one_device_shows_the_source_of_every_number(run, run_json):
    _, out, _ = run("devices", "rtx-3090")
    _, data = run_json("devices", "rtx-3090")
    (device,) = data["devices"]
    assert device.keys() == {f.name for f in dataclasses.fields(Device)}
    assert device["memory"]["capacity_bytes"] == 24 * 2**30
    for name, origin in device["provenance"].items():
        assert name in out
        assert origin.keys() == {"kind", "source"}
        assert origin["source"]


def test_one_cluster_shows_its_links(run, run_json):
    assert "Link pcie4-x4 (per direction)" in run("clusters", "4x rtx-3090")[1]
    _, data = run_json("clusters", "2x a100-sxm-80g")
    (cluster,) = data["clusters"]
    assert cluster.keys() == {f.name for f in dataclasses.fields(Cluster)} | {"size"}
    assert cluster["size"] == 2
    assert cluster["assumptions"]


def test_one_workload_shows_its_layers(run, run_json):
    assert "Layers" in run("workloads", "gpt2-small")[1]
    _, data = run_json("workloads", "gpt2-small", "--seq-len", 128)
    (workload,) = data["workloads"]
    assert workload["sequence"] == 128
    assert workload["parameter_count"] == 124_439_808
    assert sum(layer["repeats"] for layer in workload["layers"]) == workload["depth"]
    total = sum(layer["repeats"] * layer["flops_per_sample"] for layer in workload["layers"])
    assert total == pytest.approx(workload["model_flops_per_sample"])


def test_a_part_of_a_name_filters(run_json):
    _, data = run_json("devices", "sxm")
    names = [d["name"] for d in data["devices"]]
    assert len(names) > 1
    assert all("SXM" in name for name in names)


def test_a_device_file_of_ones_own_is_shown(run_json, tmp_path):
    import pathlib

    import hardware_models

    source = pathlib.Path(hardware_models.__path__[0]) / "devices" / "a100-pcie-40gb.toml"
    mine = tmp_path / "mine.toml"
    mine.write_text(source.read_text().replace('"A100-PCIe-40GB"', '"Mine"').replace('"40 GiB"', '"48 GiB"'))
    code, data = run_json("devices", mine)
    assert code == 0
    assert data["devices"][0]["memory"]["capacity_bytes"] == 48 * 2**30


def test_a_device_file_without_units_is_read_aloud(run, tmp_path):
    import pathlib

    import hardware_models

    source = pathlib.Path(hardware_models.__path__[0]) / "devices" / "a100-pcie-40gb.toml"
    mine = tmp_path / "mine.toml"
    mine.write_text(source.read_text().replace('"40 GiB"', '"40"'))
    code, out, err = run("devices", mine)
    assert (code, out) == (2, "")
    assert "mine.toml" in err
    assert "memory_capacity" in err
    assert "has no unit: expected a size, such as '80 GiB'" in err


@pytest.mark.parametrize(("group", "kind"), [("devices", "device"), ("workloads", "workload")])
def test_an_unknown_name_is_refused(run, group, kind):
    code, out, err = run(group, "zzzzzz")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: unknown {kind} 'zzzzzz': known: ")


def test_show_env_names_versions_machine_catalogs_and_runtimes(run, run_json):
    assert "torch-eager" in run("show-env")[1]
    _, data = run_json("show-env")
    assert data.keys() == {"versions", "machine", "catalogs", "runtimes"}
    assert data["machine"].keys() == {"cpu", "cores", "usable_cores", "memory_bytes", "system"}
    assert data["machine"]["memory_bytes"] > 2**30
    assert data["catalogs"]["devices"] == len(catalog.names("devices"))
    assert {"python", "numpy", "simpy", "pydantic", "torch"} <= data["versions"].keys()
    assert "torch-eager" in data["runtimes"]


def test_show_env_on_a_machine_that_hides_itself(monkeypatch):
    import pathlib

    from simtrain.cli import environment

    read = pathlib.Path.read_text

    def hidden(path, *args, **kwargs):
        if not isinstance(path, pathlib.Path) or str(path).startswith("/proc"):
            raise OSError
        return read(path, *args, **kwargs)

    monkeypatch.setattr(pathlib.Path, "read_text", hidden)
    monkeypatch.setattr("os.sysconf", hidden)
    machine = environment.environment()["machine"]
    assert machine["memory_bytes"] is None
    assert machine["cpu"]
