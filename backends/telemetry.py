"""What a backend tells of itself while it runs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext


class Telemetry:
    """The default tells nothing and costs next to nothing."""

    def span(self, name: str) -> AbstractContextManager[None]:  # noqa: ARG002
        """A range in the vendor's profiler around a part of a step: prepare, model, draw or step."""
        return nullcontext()

    def counters(self) -> Mapping[str, float]:
        """Figures since create(), by name, such as compiles, compiles_after_freeze, graph_bytes, bytes_to_device.

        Asked for a few times a second; must not wait for the device.
        """
        return {}
