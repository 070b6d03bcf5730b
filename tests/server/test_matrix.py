"""`chipset matrix`: the same claims as a table, as Markdown and as JSON."""

import json
import subprocess
import sys

import pytest

from chipset.backends.errors import UnknownBackend
from chipset.backends.matrix import Counts, Evidence, Matrix, source_hash
from chipset.server.matrix import Proof, proofs, render

ROWS = Matrix.load().rows


def report(**fields: object) -> Evidence:
    given = {
        "backend": "cpu", "level": "hardware", "commit": "0123abc", "date": "2026-01-31", "device": "abacus",
        "command": "count", "counts": Counts(passed=1, failed=0, skipped=0),
        "sources": source_hash("chipset.plugins.cpu"), "chipset": "0.1.0", "torch": "2.13.0",
    }  # fmt: skip
    return Evidence(**given | fields)


def test_the_overview_names_every_backend_and_what_it_stands_on() -> None:
    lines = render(None, "table").splitlines()
    assert lines[0].split()[:2] == ["backend", "evidence"]
    for row in ROWS.values():
        assert any(line.split()[:2] == [row.name, row.levels[0]] for line in lines)


def test_one_backend_is_shown_with_every_claim() -> None:
    text = render("cpu", "table")
    assert len([line for line in text.splitlines() if line]) == 2 + 1 + sum(
        max(1, len(cell)) for cell in ROWS["cpu"].cells.values()
    )
    assert "gguf Q4_1 native" in text
    assert "docker/cpu.Dockerfile" in text


def test_a_narrow_terminal_wraps_and_loses_nothing() -> None:
    text = render("cpu", "table", 60)
    assert max(map(len, text.splitlines())) <= 60
    assert set(render("cpu", "table").split()) == set(text.split())


def test_markdown_has_as_many_cells_in_every_line() -> None:
    for block in render("sim-tpu", "md").split("\n\n"):
        assert len({line.count("|") for line in block.splitlines()}) == 1


def test_json_holds_every_row_with_its_proofs() -> None:
    everything = json.loads(render(None, "json"))
    assert list(everything) == list(ROWS)
    one = json.loads(render("cpu", "json"))
    assert one == everything["cpu"]
    assert one["dtypes"] == {"hardware": ["float32", "bfloat16"]}
    assert [proof["level"] for proof in one["proofs"]] == ["hardware"]


def test_an_unknown_backend_is_refused_with_those_there_are() -> None:
    with pytest.raises(UnknownBackend, match=r"'abacus'.*cpu, cuda"):
        render("abacus", "table")


CPU = {"cpu": "chipset.plugins.cpu"}


@pytest.mark.parametrize(
    ("fields", "plugins", "state"),
    [
        (None, CPU, "missing"),
        ({}, CPU, "fresh"),
        ({"sources": "0" * 64}, CPU, "stale"),
        ({"counts": Counts(passed=9, failed=1, skipped=0)}, CPU, "failed"),
        ({}, {}, "unknown"),
        ({}, {"cpu": "no_such_module"}, "unknown"),
    ],
)
def test_a_proof_is_as_good_as_its_report_and_as_old_as_the_code(
    fields: dict[str, object] | None, plugins: dict[str, str], state: str
) -> None:
    found = None if fields is None else report(**fields)
    [proof] = proofs(ROWS["cpu"], plugins, lambda backend, level: found)
    assert proof == Proof(level="hardware", state=state, report=found)


def test_what_claims_nothing_needs_no_proof() -> None:
    assert proofs(ROWS["cuda"], {}) == []


def test_the_command_prints_it_and_imports_no_torch() -> None:
    code = (
        "import sys\nfrom chipset.server.cli import main\n"
        "try:\n    main(['matrix', '--backend', 'cpu', '--format', 'json'])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "print([name for name in ('torch', 'transformers') if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["name"] == "cpu"
    assert done.stderr.strip() == "[]"


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    program = "from chipset.server.cli import main; main(['matrix', '--format', 'json'])"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert process.stderr.read() == ""
    assert process.returncode == 0
