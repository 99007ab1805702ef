import pytest

from simtrain.core import catalog
from simtrain.core.errors import CatalogError, UnknownNameError
from simtrain.core.hardware import Device, Link
from simtrain.core.workload import Workload


class _Entry:
    """What `importlib.metadata.entry_points` hands out."""

    def __init__(self, name, load):
        self.name, self.value, self._load = name, f"{name}.catalog:items", load

    def load(self):
        return self._load()


@pytest.fixture
def fresh_catalogs():
    def clear():
        catalog._items.cache_clear()
        catalog._by_folded.cache_clear()

    clear()
    yield
    clear()


@pytest.mark.parametrize("group", ["devices", "links", "clusters", "compute_models", "workloads"])
def test_every_catalog_holds_something_sorted(group):
    names = catalog.names(group)
    assert names
    assert list(names) == sorted(names)


@pytest.mark.parametrize("name", ["rtx-3090", "RTX 3090", "rtx3090"])
def test_case_spaces_and_hyphens_do_not_matter(name):
    assert catalog.device(name) is catalog.device("RTX3090-24GB")


def test_items_have_their_own_kind():
    assert isinstance(catalog.device("rtx-3090"), Device)
    assert isinstance(catalog.link("pcie4-x16"), Link)
    assert isinstance(catalog.workload("gpt2-small"), Workload)
    assert catalog.compute_model(catalog.device("rtx-3090").compute_model).sources(catalog.device("rtx-3090"))


def test_a_workload_takes_a_sequence_length():
    assert catalog.workload("gpt2-small", seq_len=128).sequence == 128


@pytest.mark.parametrize(
    ("find", "kind", "name", "near"),
    [
        (catalog.device, "device", "rtx-309", "RTX3090-24GB"),
        (catalog.link, "link", "pcie4x16x", "pcie4-x16"),
        (catalog.workload, "workload", "gpt2-smal", "gpt2-small"),
        (catalog.compute_model, "compute model", "gpuu", "gpu"),
        (catalog.cluster, "device", "4x rtx-3091", "RTX3090-24GB"),
    ],
)
def test_unknown_names_suggest_the_nearest(find, kind, name, near):
    with pytest.raises(UnknownNameError) as caught:
        find(name)
    assert str(caught.value).startswith(f"unknown {kind} ")
    assert near in caught.value.suggestions


@pytest.mark.parametrize("find", [catalog.device, catalog.cluster])
def test_a_missing_file_is_named(find, tmp_path):
    with pytest.raises(CatalogError, match=r"mine\.toml: there is no such (device|cluster) file"):
        find(str(tmp_path / "mine.toml"))


def test_a_catalog_that_cannot_be_imported_names_the_package_that_may_be_shadowed(monkeypatch, fresh_catalogs):
    def load():
        raise ModuleNotFoundError("No module named 'broken.catalog'")

    monkeypatch.setattr(catalog, "entry_points", lambda group: [_Entry("broken", load)])
    with pytest.raises(CatalogError, match=r"'broken'.*may shadow the package 'broken'"):
        catalog.names("devices")


def test_without_a_reader_for_files_that_is_said(monkeypatch, fresh_catalogs):
    monkeypatch.setattr(catalog, "entry_points", lambda group: [])
    with pytest.raises(CatalogError, match="no installed package reads device files"):
        catalog.device("mine.toml")


def test_an_error_inside_a_catalog_is_not_taken_for_an_unknown_name(monkeypatch, fresh_catalogs):
    def provider():
        raise KeyError("a defect of the provider")

    monkeypatch.setattr(catalog, "entry_points", lambda group: [_Entry("broken", lambda: provider)])
    with pytest.raises(KeyError, match="a defect of the provider"):
        catalog.device("rtx-3090")
