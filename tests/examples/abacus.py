"""Where the example of a plugin lies, and how it is installed without a package registry."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2] / "examples/plugins/chipset-abacus"


def installed(folder: Path) -> Path:
    """A folder for PYTHONPATH in which the abacus is an installed distribution, as pip would leave an editable one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    info = folder / f"chipset_abacus-{project['version']}.dist-info"
    info.mkdir(parents=True)
    named = f"Name: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\n{named}")
    for group, entries in project["entry-points"].items():
        lines = [f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())]
        (info / "entry_points.txt").write_text("\n".join(lines))
    (folder / "chipset_abacus").symlink_to(ROOT / "src/chipset_abacus")
    return folder
