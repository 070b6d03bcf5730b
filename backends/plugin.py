"""The parent half of a plugin: read by the API and engine process, with no SDK, no device and no torch.

Order at start: probe, capabilities, worker_plan, (the core cuts the model: ModelSpec), resolve, shapes; then in each
worker create, load, budget (all ranks together), allocate, warm_up, freeze.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .capabilities import Capabilities
from .errors import Incompatible
from .options import EngineOptions, ModelSpec, ParallelOptions, ResolvedOptions, SamplingParams
from .shapes import ShapePolicy

if TYPE_CHECKING:
    from .backend import Backend

API_VERSION = (0, 10)
"""Major and minor of this contract. Until 1.0 only a plugin of the same minor is loaded."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PluginInfo:
    """Who a plugin is."""

    name: str
    """What --backend takes."""
    api_version: tuple[int, int]
    """Of the contract that it was built for: API_VERSION at that time."""
    distribution: str
    """The package that brings it."""
    summary: str
    """A few words for tables."""
    environment: tuple[str, ...] = ()
    """Variables it reads."""
    options: tuple[str, ...] = ()
    """Names it takes in EngineOptions.backend_options."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """What is on this machine. Found by device nodes, sysfs, PCI, NVML: never by importing an SDK."""

    available: bool
    """Whether the backend would start here."""
    num_devices: int
    """Usable ones, of this host."""
    reason: str
    """Always filled: "found /dev/neuron0..15, but package torch-neuronx is missing"."""
    cure: str = ""
    """What to do where it is not available: "install the driver, version 1.24 or newer"."""
    found_hardware: bool = False
    """There, though perhaps not usable: `auto` then stops with the reason."""
    architecture: str = ""
    """"sm_90", "gfx942", "gaudi3", "trn2", "v6e", "avx512_bf16"."""
    priority: int = 0
    """Among those available, the highest wins `auto`."""
    simulated: bool = False
    """Never chosen by `auto`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerSpec:
    """One process to start. Executors (in process, spawn, torchrun, Ray) only read it."""

    rank: int
    """Of all workers, from 0."""
    local_rank: int
    """Among those of its host."""
    host: int
    """Index into the hosts that worker_plan was given."""
    devices: tuple[int, ...]
    """Several under SPMD."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set before the process imports anything."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """All that a worker is told; sent by the engine process, so nothing is decided twice."""

    plugin: str
    """PluginInfo.name"""
    worker: WorkerSpec
    """This one."""
    world_size: int
    """Workers in all."""
    rendezvous: str
    """tcp://host:port of a torch.distributed.TCPStore that the core keeps open while the workers live; "" for one."""
    groups: Mapping[str, tuple[int, ...]]
    """By name the ranks, ascending, that this one communicates with, itself among them: "tensor"."""
    capabilities: Capabilities
    """What the parent half said; the worker refuses what its device cannot honour."""
    options: ResolvedOptions
    """What resolve gave."""
    model: ModelSpec
    """As this rank holds it."""
    shapes: ShapePolicy
    """What shapes gave; the worker pads nothing itself."""
    cache_dir: str | None = None
    """For compiled graphs."""


class Plugin(ABC):
    """Importing it imports no SDK; calling anything but create touches no device."""

    info: PluginInfo
    """Constant."""

    @abstractmethod
    def probe(self) -> Probe:
        """What this machine has for this backend."""

    @abstractmethod
    def capabilities(self, probe: Probe) -> Capabilities:
        """What the probed devices can do."""

    @abstractmethod
    def resolve(
        self, options: EngineOptions, model: ModelSpec, capabilities: Capabilities
    ) -> ResolvedOptions:
        """Fill what the user left open. Raises Incompatible; changes nothing silently. Pure."""

    @abstractmethod
    def shapes(self, options: ResolvedOptions, model: ModelSpec) -> ShapePolicy:
        """How steps are composed and padded."""

    def check_request(
        self,
        sampling: SamplingParams,
        features: frozenset[str],
        options: ResolvedOptions,
        capabilities: Capabilities,
    ) -> str | None:
        """Why this request cannot be honoured (becomes a 4xx), or None.

        `features`: what it needs beside its SamplingParams (bitmask, targets).
        """
        missing = (sampling.features | features) - capabilities.features
        if missing:
            return f"backend {self.info.name} does not serve {', '.join(sorted(missing))}"
        if (sampling.num_logprobs or 0) > options.max_logprobs:
            return f"at most {options.max_logprobs} logprobs a token are served"
        if len(sampling.logit_bias) > options.max_logit_bias:
            return f"at most {options.max_logit_bias} logit_bias entries are served"
        return None

    def worker_plan(
        self, parallel: ParallelOptions, hosts: Sequence[Probe]
    ) -> Sequence[WorkerSpec]:
        """One process a device, ranks packed host by host. Raises Incompatible when there are too few devices."""
        wanted = parallel.tensor * parallel.pipeline
        devices = [(h, d) for h, probe in enumerate(hosts) for d in range(probe.num_devices)]
        if wanted > len(devices):
            raise Incompatible(
                f"{wanted} devices wanted, {len(devices)} found; lower the number of shards"
            )
        return [
            WorkerSpec(rank=rank, local_rank=device, host=host, devices=(device,))
            for rank, (host, device) in enumerate(devices[:wanted])
        ]

    @abstractmethod
    def create(self, launch: Launch) -> Backend:
        """Runs in the worker: imports the SDK, opens the device, joins the process groups.

        Raises Incompatible if the device that it opened cannot honour launch.capabilities.
        """
