"""Reading config.json with suspicion: every value is checked for type and bounds, and errors name file and key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ..errors import ModelFormatError

MAX_BYTES: Final = 16 * 2**20
"""Real ones hold some kilobytes; longrope's factors are the longest part."""


class Fields:
    """One JSON object. `source` is what errors call it: a path, or path and key of a nested object."""

    def __init__(self, values: Mapping[str, object], source: str) -> None:
        self._values = values
        self.source = source

    @classmethod
    def load(cls, path: Path) -> Fields:
        """Raises ModelFormatError."""
        try:
            if path.stat().st_size > MAX_BYTES:
                raise ModelFormatError(
                    f"{path} is larger than {MAX_BYTES} bytes; fetch the model anew"
                )
            values = json.loads(path.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ModelFormatError(
                f"{path} cannot be read ({error}); fetch the model anew"
            ) from error
        if not isinstance(values, dict):
            raise ModelFormatError(f"{path} holds no JSON object; fetch the model anew")
        return cls(values, str(path))

    def has(self, key: str) -> bool:
        """Whether the key is there and not null."""
        return self._values.get(key) is not None

    def is_absent(self, key: str) -> bool:
        """Whether the key is not there at all, for the few where null means something else."""
        return key not in self._values

    def keys(self) -> tuple[str, ...]:
        """All that are there, null ones too."""
        return tuple(self._values)

    def replaced(self, **values: object) -> Fields:
        """The same object with some values of ours."""
        return Fields({**self._values, **values}, self.source)

    def values(self, **changed: object) -> dict[str, object]:
        """A copy of the object, with some values of ours."""
        return {**self._values, **changed}

    def value(self, key: str) -> object:
        """As it stands; None when absent."""
        return self._values.get(key)

    def wrong(self, key: str, must: str) -> ModelFormatError:
        """The error for a key whose value is not what it must be."""
        if key not in self._values:
            return ModelFormatError(
                f"{self.source}: {key} is missing and must be {must}; fetch the model anew"
            )
        shown = repr(self._values[key])
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        return ModelFormatError(
            f"{self.source}: {key} is {shown} and must be {must}; fetch the model anew"
        )

    def first(self, *keys: str) -> str:
        """The first of several spellings of a key that is there, else the first of all."""
        return next((key for key in keys if self.has(key)), keys[0])

    def integer(self, key: str, *, high: int, low: int = 1, default: int | None = None) -> int:
        """A whole number within bounds; `default` where the key is absent or null."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def number(self, key: str, *, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        number = _positive(value)
        if number is None:
            raise self.wrong(key, "a finite number above 0")
        return number

    def boolean(self, key: str, *, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, *, default: str | None = None) -> str:
        """A string."""
        value = self._values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of strings; empty where the key is absent."""
        value = self._values.get(key)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.wrong(key, "a list of strings")
        return tuple(value)

    def numbers(self, key: str, *, length: int) -> tuple[float, ...]:
        """A list of `length` finite numbers above 0."""
        value = self._values.get(key)
        found = [_positive(item) for item in value] if isinstance(value, list) else []
        numbers = tuple(number for number in found if number is not None)
        if len(found) != length or len(numbers) != length:
            raise self.wrong(key, f"a list of {length} finite numbers above 0")
        return numbers

    def ids(self, key: str, *, vocab_size: int) -> tuple[int, ...]:
        """Token ids: one, a list, or none. Ids outside the vocabulary can never be drawn and are left out."""
        value = self._values.get(key)
        items: Sequence[object] = (
            value if isinstance(value, list) else [] if value is None else [value]
        )
        if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
            raise self.wrong(key, "a token id or a list of them")
        return tuple(item for item in items if isinstance(item, int) and 0 <= item < vocab_size)

    def section(self, key: str) -> Fields | None:
        """A nested object; None where the key is absent or null."""
        value = self._values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.wrong(key, "an object")
        return Fields(value, f"{self.source}: {key}")


def _positive(value: object) -> float | None:
    """None for anything but a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # an integer too large for a float
        return None
    return number if math.isfinite(number) and number > 0 else None
