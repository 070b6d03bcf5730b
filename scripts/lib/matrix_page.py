"""docs/hardware.md, made from hw_matrix.yaml."""

from chipset.backends.matrix import LEVELS, Matrix, Row
from chipset.server.matrix import DETAILS, details
from chipset.server.tables import markdown

HEAD = """\
# Hardware

What each backend does, and how we know. This page is made from [`hw_matrix.yaml`](../hw_matrix.yaml) by `scripts/docs`;
change it there. `chipset matrix` shows the same, with the date, the device and the age of each report.

No row says more than was seen. What stands behind a claim is a report in [`evidence/`](evidence/), written by the
command that it names; a test fails where a claim has none, or one with a failure in it.
"""


def page() -> str:
    """The whole of it, without any word on how old a report is: that changes with every line of code."""
    levels = markdown(("level", "what was seen"), list(LEVELS.items()))
    rows = list(Matrix.load().rows.values())
    overview = [(row.name, row.summary, ", ".join(row.levels), _reports(row)) for row in rows]
    parts = [
        HEAD.rstrip(),
        "## Levels of evidence",
        levels,
        "## Backends",
        markdown(("backend", "what", "evidence", "report"), overview),
    ]
    for row in rows:
        if row.levels != ("none",):
            parts += [f"## {row.name}", _sentence(row), markdown(DETAILS, details(row))]
    return "\n\n".join(parts) + "\n"


def _reports(row: Row) -> str:
    names = [f"{row.name}-{level}.json" for level in row.levels if level != "none"]
    return ", ".join(f"[{name}](evidence/{name})" for name in names)


def _sentence(row: Row) -> str:
    text = f"{row.summary[0].upper()}{row.summary[1:]}."
    if row.simulated:
        text += " Selected by name only, never by `auto`."
    return text
