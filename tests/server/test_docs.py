"""docs/serving.md says what the code does."""

import re
from pathlib import Path

import pytest

from chipset.backends import errors as backend_errors
from chipset.backends.errors import ChipsetError
from chipset.core import errors as core_errors
from chipset.server import cli
from chipset.server import errors as server_errors
from chipset.server.app import create_app
from chipset.server.metrics import STATS, Metrics
from chipset.server.parser import CommandLine
from chipset.server.service import Service
from chipset.server.settings import ServerSettings, flags

from .fakes import stats

TEXT = Path(__file__).parents[2].joinpath("docs/serving.md").read_text(encoding="utf-8")


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its head."""
    section = TEXT.split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_flag_has_its_row_and_no_row_is_invented() -> None:
    expected = [
        [
            ", ".join(f"`{name}`" for name in flag.names),
            f"`{flag.variable}`",
            "–" if flag.default in (None, False) else f"`{flag.default}`",
            flag.help,
        ]
        for _, flag in flags()
    ]
    assert rows("Flags of `serve`") == expected


def test_every_command_is_shown() -> None:
    shown = re.findall(r"^chipset (\w+)", TEXT, re.MULTILINE)
    assert shown == list(CommandLine().commands)


def test_every_route_is_listed() -> None:
    paths = create_app(Service(ServerSettings())).openapi()["paths"]
    routes = {f"`{method.upper()} {path}`" for path, one in paths.items() for method in one}
    assert {row[0] for row in rows("Routes")} == routes


def test_every_exit_code_is_listed() -> None:
    classes = {
        found
        for module in (core_errors, backend_errors, server_errors)
        for found in vars(module).values()
        if isinstance(found, type) and issubclass(found, ChipsetError)
    }
    codes = {found.exit_code for found in classes}
    codes |= {0, cli.EXIT_BUG, cli.EXIT_USAGE, cli.EXIT_INTERRUPTED}
    assert {int(row[0]) for row in rows("Ending")} == codes


def test_every_metric_is_listed() -> None:
    metrics = Metrics(lambda: stats(), lambda: "m")
    metrics.failed("validation")
    exposed = {
        line.split(" ")[2]
        for line in metrics.exposition().decode().splitlines()
        if line.startswith("# TYPE")
    }
    # the client library's own moments of creation are none of ours
    exposed = {name for name in exposed if not name.endswith("_created")}
    assert {row[0].strip("`") for row in rows("Metrics")} == exposed
    assert len(exposed) >= len(STATS)


@pytest.mark.parametrize("row", server_errors.TABLE, ids=lambda row: row[0].__name__)
def test_every_error_is_listed_with_its_status_and_type(
    row: tuple[type[BaseException], server_errors.ErrorRow],
) -> None:
    _, one = row
    native = f"{one.native_status} `{one.native_type}`"
    openai = f"{one.openai_status} `{one.openai_type}`"
    assert any(cells[1] == native and cells[2].startswith(openai) for cells in rows("Errors"))
