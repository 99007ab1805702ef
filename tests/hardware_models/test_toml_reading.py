"""A broken file is refused with file, line, field and fix, in our words."""

from pathlib import Path

import pytest

from hardware_models.catalog import file_readers
from simtrain.core import catalog as core_catalog
from simtrain.core.errors import CatalogError, UnknownNameError
from simtrain.core.hardware import ValueKind

DEVICE = """name = "Card"
device_class = "gpu"
vendor = "NVIDIA"
compute_model = "gpu"
memory_technology = "GDDR6"
host_link = "pcie4-x16"
peer_link = ""

[numbers]
year = ["2023", "specification", "sheet"]
peak_fp32 = ["30 TFLOP/s", "specification", "sheet"]
memory_capacity = ["24 GiB", "specification", "sheet"]
memory_bandwidth = ["300 GB/s", "specification", "sheet"]
multiprocessors = ["58", "specification", "sheet"]
lanes_per_multiprocessor = ["128", "specification", "sheet"]
clock = ["2040 MHz", "specification", "sheet"]
cache = ["48 MiB", "specification", "sheet"]
power = ["72 W", "specification", "sheet"]
idle_power = ["10 W", "assumption", "sheet"]
price = ["0.8 USD/h", "specification", "sheet"]

[sources]
sheet = "Data sheet of the card"
"""

LINK = """name = "wire"
[numbers]
bandwidth = ["1 GB/s", "specification", "s"]
efficiency = ["0.9", "assumption", "s"]
latency = ["1 us", "assumption", "s"]
[sources]
s = "Somewhere"
"""

CLUSTER = """name = "mine"
structure = "me"
[[nodes]]
devices = ["2x A100-SXM4-80GB", "V100-SXM2-16GB"]
host_link = "pcie4-x16"
count = 2
[[nodes]]
devices = ["1x card.toml"]
host_link = "pcie3-x16"
host = "Ryzen 9 5950X"
nic = "ethernet-10g"
[numbers]
host_power = ["100 W", "assumption", "me"]
host_memory = ["32 GiB", "measurement", "me"]
[sources]
me = "My own machine"
"""


def _refusal(tmp_path, kind, text):
    path = tmp_path / f"{kind}.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CatalogError) as caught:
        file_readers()[kind](path)
    message = str(caught.value)
    assert str(path) in message
    for word in ("pydantic", "Traceback", "validation error", "ValidationError"):
        assert word not in message
    return message


def test_a_good_device_reads(tmp_path):
    path = tmp_path / "card.toml"
    path.write_text(DEVICE + '[profile]\nlaunch_s = ["3 us", "measurement", "sheet"]\n', encoding="utf-8")
    device = core_catalog.device(str(path))
    assert device.memory.capacity_bytes == 24 * 2**30
    assert device.profile == {"launch_s": pytest.approx(3e-6)}
    assert device.provenance["profile.launch_s"].kind == "measurement"


BAD_DEVICES = [
    ('clock = ["2040 MHz"', 'clock = ["2040"', 16, "numbers.clock", "no unit"),
    ('clock = ["2040 MHz"', 'clock = ["2040 GB"', 16, "numbers.clock", "does not fit"),
    ('power = ["72 W"', 'power = ["-72 W"', 18, "numbers.power", "above zero"),
    ('price = ["0.8', 'price = ["-0.8', 20, "numbers.price", "must not be negative"),
    ('multiprocessors = ["58"', 'multiprocessors = ["58.5"', 14, "numbers.multiprocessors", "whole number"),
    ('"10 W", "assumption"', '"10 W", "assumed"', 19, "numbers.idle_power", "did you mean 'assumption'"),
    ('"48 MiB", "specification", "sheet"', '"48 MiB", "specification", "shet"', 17, "numbers.cache", "did you mean 'sheet'"),
    ('"48 MiB", "specification", "sheet"', '"48 MiB", "specification", "blog"', 17, "numbers.cache", 'add blog = "..."'),
    ('cache = ["48 MiB", "specification", "sheet"]', 'cache = "48 MiB"', 17, "numbers.cache", "must be written as"),
    ('cache = ["48 MiB", "specification", "sheet"]\n', "", 9, "numbers.cache", "missing: add cache = "),
    ("cache =", "cashe =", 17, "numbers.cashe", "did you mean 'cache'"),
    ("memory_technology =", "memory_tecnology =", 5, "memory_tecnology", "did you mean 'memory_technology'"),
    ('vendor = "NVIDIA"', "vendor = 3", 3, "vendor", "text in quotes"),
    ('device_class = "gpu"', 'device_class = "gpuu"', 2, "device_class", "'gpuu' is not one of"),
    ('vendor = "NVIDIA"\n', "", 1, "vendor", "missing: add vendor"),
    ("[sources]", '[profile]\nlaunch_s = ["3", "measurement", "sheet"]\n[sources]', 23, "profile.launch_s", "no unit"),
    ("[sources]", '[profile]\nlaunch_s = ["3 us", "measurement", "blog"]\n[sources]', 23, "profile.launch_s", "not in [sources]"),
]


@pytest.mark.parametrize(("old", "new", "line", "field", "fix"), BAD_DEVICES, ids=[f"{b[3]}-{b[4]}" for b in BAD_DEVICES])
def test_a_broken_device_names_line_field_and_fix(tmp_path, old, new, line, field, fix):
    assert old in DEVICE
    message = _refusal(tmp_path, "device", DEVICE.replace(old, new))
    assert any(f"line {line}, field {field}:" in row and fix in row for row in message.splitlines()), message


def test_all_problems_are_reported_at_once(tmp_path):
    message = _refusal(tmp_path, "device", DEVICE.replace('"72 W"', '"72"').replace('"48 MiB"', '"48"'))
    assert len(message.splitlines()) == 2


def test_broken_toml_names_the_line(tmp_path):
    message = _refusal(tmp_path, "device", DEVICE.replace("year = [", "year = "))
    assert "not valid TOML" in message
    assert "line 10" in message


def test_a_missing_file_is_said_so(tmp_path):
    with pytest.raises(CatalogError, match="no such"):
        core_catalog.device(str(tmp_path / "none.toml"))


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "fix"),
    [('"0.9"', '"1.2"', 4, "numbers.efficiency", "at most 1"), ('"0.9"', '"90 %"', 4, "numbers.efficiency", "does not fit")],
)
def test_a_broken_link_names_line_field_and_fix(tmp_path, old, new, line, field, fix):
    message = _refusal(tmp_path, "link", LINK.replace(old, new))
    assert f"line {line}, field {field}:" in message
    assert fix in message


def test_a_good_cluster_mixes_devices_and_reads_files_beside_it(tmp_path):
    (tmp_path / "card.toml").write_text(DEVICE, encoding="utf-8")
    (tmp_path / "mine.toml").write_text(CLUSTER, encoding="utf-8")
    cluster = core_catalog.cluster(str(tmp_path / "mine.toml"))
    assert [len(n.devices) for n in cluster.nodes] == [3, 3, 1]
    assert cluster.nodes[2].devices[0].name == "Card"
    assert cluster.nodes[2].host.memory.capacity_bytes == 32 * 2**30
    assert cluster.provenance["structure"].source == "My own machine"


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "fix"),
    [
        ("pcie3-x16", "pcie3-x17", 9, "nodes.1.host_link", "did you mean 'pcie3-x16'"),
        ("2x A100-SXM4-80GB", "2x A100-SXM4-81GB", 4, "nodes.0.devices", "A100-SXM4-80GB"),
        ("2x A100-SXM4-80GB", "0x A100-SXM4-80GB", 4, "nodes.0.devices", "at least one device"),
        ("count = 2", "count = 0", 6, "nodes.0.count", "too small"),
        ("count = 2", "coun = 2", 6, "nodes.0.coun", "did you mean 'count'"),
        ('structure = "me"', 'structure = "you"', 2, "structure", "not in [sources]"),
    ],
)
def test_a_broken_cluster_names_line_field_and_fix(tmp_path, old, new, line, field, fix):
    (tmp_path / "card.toml").write_text(DEVICE, encoding="utf-8")
    message = _refusal(tmp_path, "cluster", CLUSTER.replace(old, new))
    assert f"line {line}, field {field}:" in message, message
    assert fix in message


@pytest.mark.parametrize("junk", ["3", "-1.5", "true", '"x"', "[]", "{}", '["1 GB", "specification"]', '["", "", ""]', "1979-05-27"])
@pytest.mark.parametrize(("kind", "text"), [("device", DEVICE), ("link", LINK), ("cluster", CLUSTER)])
def test_junk_in_any_field_is_refused_or_read_but_never_crashes(tmp_path, kind, text, junk):
    (tmp_path / "card.toml").write_text(DEVICE, encoding="utf-8")
    rows = text.splitlines()
    refused = []
    for i, row in enumerate(rows):
        if " = " in row:
            path = tmp_path / f"{kind}.toml"
            path.write_text("\n".join([*rows[:i], f"{row.split(' = ')[0]} = {junk}", *rows[i + 1 :]]), encoding="utf-8")
            try:
                file_readers()[kind](path)
            except CatalogError as error:
                refused.append((i + 1, str(error)))
    # A source key that went missing is reported where it is used, every other field on its own line.
    assert all(f", line {line}, field " in message or "[sources]" in message for line, message in refused)
    assert refused


@pytest.mark.parametrize("text", ["", "numbers = 3\nsources = 4", "nodes = 5\nname = 'x'", "nodes = [1]", '"a b" = 1'])
@pytest.mark.parametrize("kind", ["device", "link", "cluster"])
def test_files_of_the_wrong_shape_are_refused(tmp_path, kind, text):
    assert "field" in _refusal(tmp_path, kind, text)


NETWORKED = CLUSTER.replace("[numbers]", '[network]\nkind = "fat-tree"\nnodes_per_group = 2\nsource = "me"\n[numbers]').replace(
    'host_memory = ["32', 'oversubscription = ["2", "measurement", "me"]\nhost_memory = ["32'
)


def test_a_network_reads_with_its_origin(tmp_path):
    (tmp_path / "card.toml").write_text(DEVICE, encoding="utf-8")
    (tmp_path / "mine.toml").write_text(NETWORKED, encoding="utf-8")
    cluster = core_catalog.cluster(str(tmp_path / "mine.toml"))
    assert (cluster.network.kind, cluster.network.nodes_per_group, cluster.network.oversubscription) == ("fat-tree", 2, 2.0)
    assert cluster.provenance["network.oversubscription"].kind == "measurement"
    assert cluster.provenance["network"].source == "My own machine"


@pytest.mark.parametrize(
    ("old", "new", "field", "fix"),
    [
        ('"fat-tree"', '"fattree"', "network.kind", "did you mean 'fat-tree'"),
        ('"fat-tree"', '"torus"\ndimensions = [2, 2]', "network.dimensions", "multiply to 7"),
        ("nodes_per_group = 2", "", "network.kind", "nodes_per_group of at least 1"),
        ("nodes_per_group", "nodes_per_groop", "network.nodes_per_groop", "nodes_per_group"),
        ('source = "me"', 'source = "you"', "network.source", "not in [sources]"),
        ('[network]\nkind = "fat-tree"\nnodes_per_group = 2\nsource = "me"', "", "numbers.oversubscription", "add [network]"),
    ],
)
def test_a_broken_network_names_field_and_fix(tmp_path, old, new, field, fix):
    (tmp_path / "card.toml").write_text(DEVICE, encoding="utf-8")
    message = _refusal(tmp_path, "cluster", NETWORKED.replace(old, new))
    assert f"field {field}:" in message, message
    assert fix in message


def documented():
    text = (Path(__file__).parents[2] / "docs" / "adding_a_device.md").read_text(encoding="utf-8")
    return text.split("```toml\n")[1].split("```")[0]


def test_dotted_keys_of_the_documented_form_are_found_in_their_line(tmp_path):
    text = documented().replace('"3 TB/s"', '"3 TB"')
    (tmp_path / "wrong.toml").write_text(text, encoding="utf-8")
    line = 1 + next(i for i, row in enumerate(text.splitlines()) if '"3 TB"' in row)
    with pytest.raises(CatalogError, match=f"line {line}, field numbers.memory_bandwidth"):
        core_catalog.device(str(tmp_path / "wrong.toml"))


def test_a_compute_model_that_does_not_exist_is_refused_at_once(tmp_path):
    (tmp_path / "wrong.toml").write_text('compute_model = "gppu"\n' + documented(), encoding="utf-8")
    with pytest.raises(UnknownNameError, match="compute model 'gppu': did you mean 'gpu'"):
        core_catalog.device(str(tmp_path / "wrong.toml"))


def test_what_a_device_file_leaves_out_is_assumed_and_said(tmp_path):
    short = "".join(
        line for line in DEVICE.splitlines(keepends=True) if not line.startswith(("compute_model", "peer_link", "idle_power", "price"))
    )
    path = tmp_path / "card.toml"
    path.write_text(short)
    found = core_catalog.device(str(path))
    assert (found.compute_model, found.peer_link) == ("gpu", "")
    assert (found.idle_power_w, found.price_usd_per_hour) == (7.2, 0.0)
    for name in ("idle_power_w", "price_usd_per_hour"):
        assert found.provenance[name].kind is ValueKind.ASSUMPTION
        assert found.provenance[name].source.startswith("Not stated in the file")
