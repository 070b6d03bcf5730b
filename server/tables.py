"""Tables as text: aligned columns for people, pipes for Markdown."""

from __future__ import annotations

import io
from collections.abc import Sequence

Rows = Sequence[Sequence[str]]
LONG_WORD = 12
"""Letters that a column always has room for."""


def aligned(head: Sequence[str], rows: Rows, width: int | None) -> str:
    """Columns side by side, wrapped to `width` characters; None: as wide as they are."""
    # rich takes 0.1 s to import
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, name in enumerate(head):
        # no word is cut that is not very long
        words = [word for row in rows for word in row[index].split()]
        table.add_column(
            name, min_width=min(LONG_WORD, max(map(len, words), default=0)), overflow="fold"
        )
    for row in rows:
        table.add_row(*map(Text, row))
    if width is None:
        width = 2 * sum(max(len(row[i]) + 2 for row in (head, *rows)) for i in range(len(head)))
    text = io.StringIO()
    Console(file=text, width=width).print(table)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def markdown(head: Sequence[str], rows: Rows) -> str:
    """A table in Markdown; what is empty is shown as a dash."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell or "–" for cell in line) + " |" for line in lines)
