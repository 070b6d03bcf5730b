"""The kit: every promise of the contract, and the engine's text beside cpu's."""

from chipset.backends.conformance import BackendConformance
from chipset.core.conformance import EngineConformance


class TestContract(BackendConformance):
    backend = "abacus"
    is_quick = True


class TestEngine(EngineConformance):
    backend = "abacus"
    is_quick = True
