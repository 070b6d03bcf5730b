"""docs/contract.md, made of the contract's docstrings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

from contract_surface import EACH_STEP, PARENT_HALF, WORKER_HALF, Member, members, module_doc

from chipset.backends.plugin import API_VERSION

HEAD = """\
# The contract

<!-- Written by scripts/docs from the docstrings of backends/; a test keeps it so. -->

Version {version}. *required* marks what a plugin must give; the rest has a default. How to prove that a plugin
keeps it: [conformance.md](conformance.md).

{package}
"""
PARTS = (
    ("The parent half", PARENT_HALF),
    ("What crosses the border each step", EACH_STEP),
    ("The worker half", WORKER_HALF),
)


def page() -> str:
    """The whole of it."""
    version = ".".join(map(str, API_VERSION))
    text = HEAD.format(version=version, package=_prose(module_doc("__init__")))
    for title, modules in PARTS:
        text += f"\n## {title}\n"
        for module in modules:
            text += f"\n### {module}\n\n{_prose(module_doc(module))}\n"
            text += "".join(_shown(members((module,))))
    return text


def _shown(found: Iterable[Member]) -> Iterable[str]:
    was_field = False
    for member in found:
        is_field = member.kind == "field"
        if is_field and not was_field:
            yield "\n"
        was_field = is_field
        if member.kind == "class":
            yield f"\n#### `{member.signature}`\n\n{_prose(member.doc)}\n"
        elif member.kind == "field":
            required = ", *required*" if member.is_required else ""
            doc = f": {' '.join(member.doc.split())}" if member.doc else ""
            yield f"- `{member.signature}`{required}{doc}\n"
        elif member.kind == "constant":
            yield f"\n`{member.signature}`\n\n{_prose(member.doc)}\n"
        else:
            required = " · *required*" if member.is_required else ""
            yield f"\n**`{member.signature}`**{required}\n\n{_prose(member.doc)}\n"


def _prose(doc: str) -> str:
    """Paragraphs as they are; what is drawn with indentation becomes a block of its own."""
    parts = []
    for paragraph in re.split(r"\n\s*\n", doc):
        lines = paragraph.splitlines()
        drawn = [
            line for line in lines if line.startswith("    ") or "├──" in line or "└──" in line
        ]
        if drawn and len(drawn) == len(lines):
            parts.append(f"```\n{textwrap.dedent(paragraph)}\n```")
        elif drawn:
            first = lines.index(drawn[0])
            parts.append("\n".join(lines[:first]))
            parts.append("```\n" + textwrap.dedent("\n".join(lines[first:])) + "\n```")
        else:
            parts.append(paragraph)
    return "\n\n".join(filter(None, parts))
