"""A fresh environment away from the checkout, with chipset and the abacus as anybody would install them."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from . import abacus

CHECKOUT = Path(__file__).parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Whose torch brings no gigabytes of CUDA."""


@dataclass(frozen=True, kw_only=True)
class Fresh:
    """A virtual environment, and a folder to work in."""

    venv: Path
    work: Path

    @classmethod
    def make(cls, folder: Path, work: Path) -> Fresh:
        """Wheels are built and installed with all that they depend on; torch first, of the CPU. Takes minutes."""
        made = cls(venv=folder / "venv", work=work)
        if not made.venv.exists():
            subprocess.run([sys.executable, "-m", "venv", made.venv], check=True)
        wheels = work / "wheels"
        made.pip("wheel", "--no-deps", "--wheel-dir", wheels, CHECKOUT, abacus.ROOT)
        constrained = ("install", "-c", CHECKOUT / "constraints.txt")
        index = ("--extra-index-url", CPU_INDEX) if _answers(f"{CPU_INDEX}/torch/") else ()
        made.pip(*constrained, *index, "torch")
        (chipset,) = wheels.glob("chipset-*.whl")
        (other,) = wheels.glob("chipset_abacus-*.whl")
        made.pip(*constrained, f"chipset[conformance] @ {chipset.as_uri()}", other)
        # an older wheel of the same version may be there
        made.pip("install", "--no-deps", "--force-reinstall", chipset, other)
        return made

    @property
    def environment(self) -> dict[str, str]:
        """As after `source venv/bin/activate`; nothing of the checkout's environment is left."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
        return kept | {"PATH": f"{self.venv / 'bin'}{os.pathsep}{os.environ['PATH']}"}

    def pip(self, *arguments: str | Path) -> None:
        """Raises CalledProcessError."""
        quiet = ("-m", "pip", "--quiet", "--disable-pip-version-check")
        subprocess.run([self.venv / "bin/python", *quiet, *arguments], check=True, cwd=self.work)

    def run(self, command: str, *, folder: Path | None = None) -> str:
        """What a command of the shell says, on both channels. Raises AssertionError with it where it fails."""
        done = subprocess.run(
            command,
            shell=True,
            cwd=folder or self.work,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}"
        return done.stdout


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        return False
    return True
