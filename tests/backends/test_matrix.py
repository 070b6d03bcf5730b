"""The matrix says no more than was seen: its form, its claims against the plugins, and the reports behind them."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import yaml
from matrix_page import page

from chipset.backends.matrix import (
    LEVELS,
    MATRIX,
    PACKAGE,
    REPORTS,
    Counts,
    Evidence,
    Matrix,
    Window,
    report_path,
    source_hash,
)
from chipset.backends.options import BACKENDS
from chipset.backends.registry import Registry

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((PACKAGE / "backends" / "hw_matrix.schema.json").read_text())
ROWS = Matrix.load().rows
CLAIMS = [(row.name, level) for row in ROWS.values() for level in row.levels if level != "none"]
REPORT = Evidence(
    backend="cpu",
    level="hardware",
    commit="0123abc",
    date="2026-01-31",
    device="an abacus",
    command="chipset conformance --backend cpu",
    counts=Counts(passed=3, failed=0, skipped=1),
    sources="0" * 64,
    chipset="0.1.0",
    torch="2.13.0+cpu",
)


def document():
    return yaml.safe_load(MATRIX.read_text())


def check(value, part=None):
    schema = SCHEMA if part is None else SCHEMA | {"$ref": f"#/$defs/{part}"}
    if part is not None:
        schema = {key: schema[key] for key in ("$schema", "$defs", "$ref")}
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)


def test_the_schema_is_one_and_the_matrix_follows_it():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    check(document())


WRONG = {
    "an unknown level": (("dtypes",), {"seen once": ["float32"]}),
    "an unknown dtype": (("dtypes",), {"hardware": ["float31"]}),
    "an unknown variant": (("attention",), {"hardware": ["sideways"]}),
    "a claim without a level": (("dtypes",), ["float32"]),
    "an unknown way with a format": (("quantization", "hardware"), {"awq": "maybe"}),
    "a block of no tokens": (("block_sizes",), {"hardware": [0]}),
    "a version that is a number": (("versions", "hardware", "torch"), {"from": 2.13, "below": 3}),
    "an open window": (("versions", "hardware", "torch"), {"from": "2.13"}),
    "a yes that YAML takes for a truth": (
        ("image",),
        {"none": {"licences": [], "redistributable": True}},
    ),
    "a cell that nobody knows": (("speed",), {"hardware": ["fast"]}),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_schema_refuses(case):
    path, value = WRONG[case]
    wrong = copy.deepcopy(document())
    place = wrong["backends"]["cpu"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(wrong)


@pytest.mark.parametrize("cell", ROWS["cpu"].cells)
def test_the_schema_wants_every_cell(cell):
    wrong = document()
    del wrong["backends"]["cpu"][cell]
    with pytest.raises(jsonschema.ValidationError, match=cell):
        check(wrong)


def test_the_schema_names_the_levels():
    assert SCHEMA["$defs"]["level"]["enum"] == list(LEVELS)


def test_every_planned_backend_has_its_row():
    assert set(BACKENDS) <= set(ROWS)


@pytest.mark.parametrize(("backend", "level"), CLAIMS)
def test_every_claim_has_a_committed_green_report(backend, level):
    path = report_path(backend, level, ROOT / "docs" / "evidence")
    assert path.is_file(), f"{path.name} is missing: claim less, or run what writes it"
    check(json.loads(path.read_text()), "report")
    report = Evidence.read(path)
    assert (report.backend, report.level) == (backend, level)
    assert report.green, report.counts
    assert "--quick" not in report.command, "a part of the kit proves a part of the claims"
    assert not report.commit.endswith("-dirty"), "of code that nobody has"


def test_no_report_is_without_a_claim():
    reports = {path.stem for path in REPORTS.glob("*.json")}
    assert reports <= {f"{backend}-{level}" for backend, level in CLAIMS}


@pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if row.simulated], ids=lambda r: r.name
)
def test_a_simulator_claims_to_be_nothing_else(row):
    assert set(row.levels) <= {"simulated", "none"}
    assert "proves the engine and the contract only" in row.summary


@pytest.mark.parametrize(
    "row", [row for row in ROWS.values() if not row.simulated], ids=lambda r: r.name
)
def test_nothing_else_claims_to_be_simulated(row):
    assert "sim-" not in row.name


@pytest.mark.parametrize("name", [n for n in ROWS if n in Registry.discover(environment={}).names])
def test_the_row_of_an_installed_plugin_is_what_its_capabilities_say(name):
    registry = Registry.discover(environment={})
    plugin = registry.load(name)
    probe = plugin.probe()
    able, row = plugin.capabilities(probe), ROWS[name]

    def claimed(cell):
        return [one for values in row.cells[cell].values() for one in values]

    assert row.simulated == probe.simulated
    assert set(claimed("dtypes")) == able.dtypes
    assert set(claimed("kv_dtypes")) == able.kv_dtypes - {"auto"}
    assert set(claimed("attention")) == able.attention | {"causal"}
    assert claimed("block_sizes") == list(able.block_sizes)
    assert set(claimed("collectives")) == able.collectives
    assert claimed("graphs") == [able.graphs]


@pytest.mark.parametrize("row", ROWS.values(), ids=lambda row: row.name)
def test_an_image_that_is_named_is_there(row):
    for image in row.image.values():
        assert image.file is None or (ROOT / image.file).is_file()


def test_levels_are_those_that_something_stands_on_strongest_first():
    row = ROWS["cpu"]
    assert row.levels == ("hardware",)
    more = replace(
        row, graphs={"none": ("capture",), "simulated": ("compile",)}, shapes={"emulated": ()}
    )
    assert more.levels == ("hardware", "simulated")
    assert ROWS["cuda"].levels == ("none",)


@pytest.mark.parametrize(
    ("version", "is_in"),
    [("2.13.0+cpu", True), ("2.13", True), ("2.14.0rc1", False), ("2.9.1", False), ("3", False)],
)
def test_a_window_goes_by_the_numbers_of_a_release(version, is_in):
    assert Window(start="2.13", below="2.14").holds(version) is is_in


def test_a_report_comes_back_as_it_was_written(tmp_path):
    path = report_path("cpu", "hardware", tmp_path / "new")
    REPORT.write(path)
    assert path.name == "cpu-hardware.json"
    assert Evidence.read(path) == REPORT
    assert Evidence.find("cpu", "hardware", tmp_path / "new") == REPORT
    assert Evidence.find("cpu", "emulated", tmp_path) is None
    check(json.loads(path.read_text()), "report")


@pytest.mark.parametrize("counts", [(0, 0, 5), (5, 1, 0)])
def test_a_report_of_nothing_or_of_failures_is_not_green(counts):
    passed, failed, skipped = counts
    report = replace(REPORT, counts=Counts(passed=passed, failed=failed, skipped=skipped))
    assert REPORT.green
    assert not report.green


def test_a_report_is_stale_once_the_code_is_another(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "some_vendor" / "plugin"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").write_text("raise ImportError('not to be imported')")
    (package / "notes.md").write_text("no code")
    report = replace(REPORT, sources=source_hash("some_vendor.plugin"))
    assert not report.stale("some_vendor.plugin")
    (package / "notes.md").write_text("still no code")
    assert not report.stale("some_vendor.plugin")
    (package / "kernel.cpp").write_text("int x;")
    assert report.stale("some_vendor.plugin")


def test_the_hash_covers_the_contract_and_the_plugin_and_nothing_more(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    alone = tmp_path / "alone.py"
    alone.write_text("x = 1")
    before = source_hash("alone")
    (tmp_path / "neighbour.py").write_text("y = 1")
    assert source_hash("alone") == before
    alone.write_text("x = 2")
    assert source_hash("alone") != before
    assert source_hash("chipset.plugins.cpu") == source_hash("chipset.plugins.cpu.plugin")
    assert source_hash("chipset.plugins.cpu") != source_hash("chipset.plugins.sim")
    with pytest.raises(ModuleNotFoundError):
        source_hash("chipset.plugins.abacus")


def test_the_page_is_made_from_the_matrix():
    assert (ROOT / "docs" / "hardware.md").read_text(encoding="utf-8") == page()
