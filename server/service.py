"""Service: what the routes reach. Nothing until the model is loaded, nothing more once the server ends."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from ..core.errors import EngineDied
from ..core.files import ModelFiles
from ..core.messages import Stats
from .errors import NotReady
from .generation import Generator
from .limits import Admission, Limits, Ticket
from .metrics import Metrics
from .ports import Engine, TextTokenizer
from .settings import ServerSettings


class State(Enum):
    """Of the server as /ready sees it."""

    LOADING = "loading"
    READY = "ready"
    RESTARTING = "the engine is started anew"
    ENDING = "ending"
    DEAD = "dead"


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """A model that is being served."""

    files: ModelFiles
    generator: Generator
    created: int
    """Unix seconds at which it became ready."""

    @property
    def limits(self) -> Limits:
        """Of its requests."""
        return self.generator.limits


class Service:
    """One server's state: it changes only here."""

    def __init__(self, settings: ServerSettings) -> None:
        self.settings = settings
        self.state = State.LOADING
        self.admission = Admission(settings.max_concurrent_requests)
        self.metrics = Metrics(self._stats, self._model_name)
        self._model: Model | None = None

    def open(
        self, files: ModelFiles, engine: Engine, tokenizer: TextTokenizer, *, created: int
    ) -> None:
        """Serve this model from now on. Raises Incompatible where limits and model disagree."""
        limits = Limits.derive(self.settings, engine.ready, tokenizer.vocab_size)
        generator = Generator(engine, tokenizer, limits, self.metrics)
        self._model = Model(files=files, generator=generator, created=created)
        self.state = State.READY

    def interrupted(self) -> None:
        """The engine ended; those who wait keep their place, and nobody joins them."""
        self.metrics.restarted()
        if self.state is State.READY:
            self.state = State.RESTARTING

    def resumed(self) -> None:
        """There is an engine again."""
        if self.state is State.RESTARTING:
            self.state = State.READY

    def end(self, *, dead: bool = False) -> None:
        """Take no more requests; those that run go on."""
        self.state = State.DEAD if dead else State.ENDING

    def model(self) -> Model:
        """What is served. Raises NotReady, or EngineDied once the engine is gone."""
        if self.state is State.DEAD:
            raise EngineDied("the engine process ended")
        if self.state is State.ENDING:
            raise NotReady("the server is ending")
        if self.state is State.RESTARTING:
            raise NotReady("the engine is started anew; try again later")
        if self._model is None:
            raise NotReady("the model is being loaded")
        return self._model

    @property
    def compute_type(self) -> str:
        """TGI's name for the hardware: number of devices and kind."""
        if self._model is None:
            return "none"
        ready = self._model.generator.engine.ready
        return f"{len(ready.rank_weight_bytes) or 1}-{ready.backend}"

    def admit(self, count: int = 1) -> Ticket:
        """The right to run `count` requests. Raises Overloaded, NotReady, EngineDied."""
        self.model()
        return self.admission.admit(count)

    def _stats(self) -> Stats | None:
        return self._model.generator.engine.stats if self._model else None

    def _model_name(self) -> str:
        return self._model.files.name if self._model else ""
