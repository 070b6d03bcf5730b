"""Which packages this installation wants, and which it has; nothing is imported to find out."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

from ..backends.matrix import release

DISTRIBUTION = "chipset"
OPTIONAL = frozenset({"transformers"})
"""Of the packages that only an extra wants, those that a person would ask about."""

_REQUIREMENT = re.compile(
    r"(?P<name>[\w.-]+)(\[.*?\])?\s*(>=(?P<least>[\w.]+))?[^;]*(;(?P<marker>.*))?"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Package:
    """A dependency of this distribution."""

    name: str
    installed: str | None
    wanted: str
    """Such as ">=2.9"."""
    optional: bool
    fits: bool


def installed_version(package: str) -> str | None:
    """Of a distribution, or of python; None where it is not installed."""
    if package == "python":
        return platform.python_version()
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def required_packages() -> Sequence[Package]:
    """What the distribution's own metadata asks for; nothing where it runs without being installed."""
    try:
        return list(_packages(metadata.requires(DISTRIBUTION) or ()))
    except metadata.PackageNotFoundError:
        return ()


def _packages(requirements: Sequence[str]) -> Iterator[Package]:
    for requirement in requirements:
        found = _REQUIREMENT.match(requirement)
        if found is None:
            continue
        name, least, marker = found["name"], found["least"] or "0", found["marker"] or ""
        optional = "extra ==" in marker
        if optional and name not in OPTIONAL:
            continue
        installed = installed_version(name)
        yield Package(
            name=name,
            installed=installed,
            wanted=f">={least}",
            optional=optional,
            fits=optional if installed is None else release(installed) >= release(least),
        )
