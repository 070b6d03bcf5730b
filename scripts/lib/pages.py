"""The pages that are made of code and data, by path: `scripts/docs` writes them, and tests compare."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]


def pages() -> dict[Path, Callable[[], str]]:
    """What each page should hold; imported late, for some need the tests' own modules."""
    sys.path.insert(0, str(ROOT))  # for tests/, which is not installed
    from contract_page import page as contract
    from contract_surface import snapshot
    from matrix_page import page as hardware
    from mutations_page import page as conformance
    from tests.core.models.page import page as models

    return {
        ROOT / "docs/conformance.md": conformance,
        ROOT / "docs/contract.md": contract,
        ROOT / "docs/hardware.md": hardware,
        ROOT / "docs/models.md": models,
        ROOT / "tests/backends/contract_surface.txt": snapshot,
    }


def main() -> None:
    """Write those that differ, and say which."""
    for path, make in pages().items():
        text = make()
        if not path.exists() or path.read_text() != text:
            path.write_text(text)
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
