"""Which suites of the kit answer for which area of mistakes, and the mistakes of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from chipset.backends.conformance.attention import AttentionSuite
from chipset.backends.conformance.collectives import CollectivesSuite
from chipset.backends.conformance.kv_cache import KVCacheSuite
from chipset.backends.conformance.ops import OpsSuite
from chipset.backends.conformance.plugin import PluginSuite
from chipset.backends.conformance.quantization import LinearSuite
from chipset.backends.conformance.quantization_packed import PackedSuite
from chipset.backends.conformance.sampler import SamplerSuite
from chipset.backends.conformance.shapes import ShapesSuite
from chipset.backends.conformance.slots import SlotsSuite
from chipset.backends.conformance.steps import StepsSuite
from chipset.backends.conformance.suite import Suite

from .mutation import Area, Mutation
from .mutations import (
    attention,
    collectives,
    kv_cache,
    linear,
    ops,
    plugin,
    quantization,
    sampling,
    shapes,
    steps,
)

SUITES: Mapping[Area, tuple[type[Suite], ...]] = {
    "attention": (AttentionSuite,),
    "kv_cache": (KVCacheSuite, SlotsSuite),
    "shapes": (ShapesSuite,),
    "steps": (StepsSuite,),
    "sampling": (SamplerSuite,),
    "ops": (OpsSuite,),
    "collectives": (CollectivesSuite,),
    "linear": (LinearSuite,),
    "quantization": (PackedSuite,),
    "plugin": (PluginSuite,),
}
MUTATIONS: Sequence[Mutation] = (
    *attention.MUTATIONS,
    *kv_cache.MUTATIONS,
    *shapes.MUTATIONS,
    *steps.MUTATIONS,
    *sampling.MUTATIONS,
    *ops.MUTATIONS,
    *collectives.MUTATIONS,
    *linear.MUTATIONS,
    *quantization.MUTATIONS,
    *plugin.MUTATIONS,
)
