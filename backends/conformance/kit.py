"""All suites below the engine as one class."""

from __future__ import annotations

from .attention import AttentionSuite
from .collectives import CollectivesSuite
from .kv_cache import KVCacheSuite
from .ops import OpsSuite
from .plugin import PluginSuite
from .quantization import LinearSuite
from .quantization_packed import PackedSuite
from .sampler import SamplerSuite
from .shapes import ShapesSuite
from .slots import SlotsSuite
from .steps import StepsSuite


class BackendConformance(
    PluginSuite,
    ShapesSuite,
    AttentionSuite,
    KVCacheSuite,
    SlotsSuite,
    LinearSuite,
    PackedSuite,
    OpsSuite,
    CollectivesSuite,
    SamplerSuite,
    StepsSuite,
):
    """Subclass it as `Test...`, and name an installed backend or override `make_plugin`."""
