"""docs/plugins.md as steps: files to write, commands to run, and code that stands alone."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PAGE = Path(__file__).parents[2] / "docs/plugins.md"
_BLOCK = re.compile(
    r"^(?:`(?P<path>[^`\n]+)`\n\n)?(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One block of code of the page."""

    does: Literal["write", "run", "stand alone", "show"]
    text: str
    """Of the file; or commands, one a line."""
    path: str = ""
    """Of the file."""


def steps(page: Path = PAGE) -> list[Step]:
    """In the order of the page. A block behind a line that is nothing but a path is that file, whole."""
    return [_step(found) for found in _BLOCK.finditer(page.read_text(encoding="utf-8"))]


def write(step: Step, folder: Path) -> None:
    """The file of a step, in `folder`."""
    path = folder / step.path
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(step.text, encoding="utf-8")


def _step(found: re.Match[str]) -> Step:
    text, language = textwrap.dedent(found["text"]), found["language"]
    if found["path"]:
        return Step(does="write", text=text, path=found["path"])
    if language == "console":
        commands = [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]
        assert len(commands) == len(text.splitlines()), "a console block holds commands only"
        return Step(does="run", text="\n".join(commands))
    return Step(does="stand alone" if language == "python" else "show", text=text)
