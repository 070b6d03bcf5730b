"""What every installed plugin finds on this machine, asked in a process of its own.

Importing a plugin and calling its probe runs a stranger's code, which may raise, hang or end its process. So the one
who wants to know (`probe_all`) starts a helper, `python -m chipset.backends.probing`, that asks all plugins at once, a
thread each, and writes a JSON line as each begins and ends:

    {"name": "x", "stage": "import"}    {"name": "x", "stage": "probe", "summary": "…"}
    {"name": "x", "probe": {…}}         {"name": "x", "failure": "ImportError: …"}

and an empty line now and then. Where it ends, or falls silent because some native code keeps the interpreter's lock,
those that have not answered are asked again, each in a helper of its own, so that one of them spoils only its own row.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import EntryPoint
from typing import Any

from .entries import GROUP, TRACE_VARIABLE, ask_probe, load_plugin, said
from .errors import PluginError
from .plugin import Probe

BUDGET_S = 5.0
"""For all plugins together."""
SILENCE_S = 1.5
"""After which a helper that has spoken counts as stuck."""
HEARTBEAT_S = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """A row of the probe table: one entry point, and what came of it."""

    name: str
    distribution: str
    """That brought the entry point; "" where nobody knows."""
    version: str
    summary: str
    """Of PluginInfo; "" where the plugin could not be loaded."""
    probe: Probe | None
    """None: the plugin could not be loaded, or its probe gave no answer."""
    reason: str
    """Of the probe, or why there is none."""
    cure: str
    """"" where nothing is wrong, or nobody knows."""


def probe_all(
    entries: Mapping[str, EntryPoint],
    environment: Mapping[str, str],
    budget_s: float = BUDGET_S,
) -> Sequence[Finding]:
    """A row for each entry point, in their order, after `budget_s` at the most. Raises nothing of a plugin's."""
    survey = _Survey(entries, environment, time.monotonic() + budget_s)
    try:
        survey.run()
    finally:
        survey.end()
    late = f"did not answer within {budget_s:g} s"
    return [_finding(entry, survey.heard[name], late) for name, entry in entries.items()]


@dataclass(slots=True)
class _Heard:
    """What is known of one entry so far."""

    stage: str = "start"
    summary: str = ""
    probe: Probe | None = None
    failure: str = ""

    @property
    def answered(self) -> bool:
        return self.probe is not None or bool(self.failure)

    def take(self, message: Mapping[str, Any]) -> None:
        if not self.answered:
            self.stage = message.get("stage", self.stage)
            self.summary = message.get("summary", self.summary)
            self.failure = message.get("failure", "")
            if "probe" in message:
                self.probe = Probe(**message["probe"])


class _Helper:
    """A process that was asked about some entries."""

    def __init__(
        self, entries: Sequence[EntryPoint], environment: Mapping[str, str], life_s: float
    ):
        request = {"entries": [(entry.name, entry.value) for entry in entries], "life_s": life_s}
        self.names = [entry.name for entry in entries]
        # while it starts it says nothing
        self.last_heard = math.inf
        self._partial = b""
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"{__package__}.probing", json.dumps(request)],
            # it finds whatever this process would find
            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=None if environment.get(TRACE_VARIABLE) else subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self.pipe = self._process.stdout.fileno()

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have come; None once there will be no more."""
        data = os.read(self.pipe, 1 << 16)
        if not data:
            return None
        self.last_heard = time.monotonic()
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [json.loads(line) for line in lines if line]

    def end(self) -> str:
        """Kill it and whatever it started; how it ended, in words."""
        assert self._process.stdout is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # one that a driver holds in the kernel does not even die of this
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0.5)
        self._process.stdout.close()
        code = self._process.returncode
        if code is not None and code < 0:
            return f"ended its process by a signal: {signal.strsignal(-code)}"
        return f"ended its process with code {code}"


class _Survey:
    """One helper for all entries, then one for each that is left over."""

    def __init__(
        self, entries: Mapping[str, EntryPoint], environment: Mapping[str, str], deadline: float
    ) -> None:
        self.heard = {name: _Heard() for name in entries}
        self._entries = entries
        self._environment = environment
        self._deadline = deadline
        self._selector = selectors.DefaultSelector()
        self._together: _Helper | None = None

    @property
    def _waiting(self) -> list[str]:
        return [name for name, heard in self.heard.items() if not heard.answered]

    def run(self) -> None:
        """Until every entry has answered or the time is over."""
        if self._entries:
            self._together = self._ask(list(self._entries))
        while self._waiting and (left := self._deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(left, HEARTBEAT_S)):
                self._hear(key.data)
            together = self._together
            if together and time.monotonic() - together.last_heard > SILENCE_S:
                self._separate()

    def end(self) -> None:
        """Leave no process behind."""
        for key in list(self._selector.get_map().values()):
            key.data.end()
        self._selector.close()

    def _ask(self, names: Sequence[str]) -> _Helper:
        entries = [self._entries[name] for name in names]
        life_s = self._deadline - time.monotonic()
        helper = _Helper(entries, self._environment, life_s)
        self._selector.register(helper.pipe, selectors.EVENT_READ, helper)
        return helper

    def _hear(self, helper: _Helper) -> None:
        messages = helper.read()
        for message in messages or ():
            self.heard[message["name"]].take(message)
        if messages is not None:
            return
        self._selector.unregister(helper.pipe)
        how = helper.end()
        if len(helper.names) == 1:
            heard = self.heard[helper.names[0]]
            heard.take({"failure": f"{how} ({heard.stage})"})
        elif helper is self._together:
            self._separate()

    def _separate(self) -> None:
        self._together = None
        for name in self._waiting:
            self._ask([name])


def _finding(entry: EntryPoint, heard: _Heard, late: str) -> Finding:
    distribution = entry.dist
    name = "" if distribution is None else distribution.name
    probe = heard.probe
    if probe is None:
        reason = heard.failure or f"{late} ({heard.stage})"
        cure = (
            f"take another version of {name or 'the package that brings it'}, uninstall it, or leave "
            "it out: CHIPSET_PLUGINS names the backends to load, such as CHIPSET_PLUGINS=cpu"
        )
    else:
        reason, cure = probe.reason, probe.cure
    return Finding(
        name=entry.name,
        distribution=name,
        version="" if distribution is None else distribution.version,
        summary=heard.summary,
        probe=probe,
        reason=reason,
        cure=cure,
    )


class _Answers:
    """The helper's side of the pipe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # whatever a plugin prints goes elsewhere
        self._pipe = os.dup(1)
        os.dup2(2, 1)

    def write(self, **message: object) -> None:
        line = json.dumps(message) if message else ""
        with self._lock:
            os.write(self._pipe, f"{line}\n".encode())

    def ask(self, entry: EntryPoint) -> None:
        """Import, probe, answer."""
        name = entry.name
        try:
            self.write(name=name, stage="import")
            plugin = load_plugin(entry, os.environ)
            self.write(name=name, stage="probe", summary=plugin.info.summary)
            self.write(name=name, probe=asdict(ask_probe(plugin)))
        except PluginError as error:
            self.write(name=name, failure=str(error))
        except Exception as error:  # of json: a field holds something else than its type says
            self.write(name=name, failure=f"what it found cannot be told: {said(error)}")


def main() -> None:
    """Answer the request that is the first argument."""
    request = json.loads(sys.argv[1])
    # the kernel ends it should whoever asked be gone, and though no line of Python may run by then
    signal.alarm(int(request["life_s"]) + 2)
    answers = _Answers()
    threads = [
        threading.Thread(target=answers.ask, args=(EntryPoint(name, value, GROUP),), daemon=True)
        for name, value in request["entries"]
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            answers.write()
            thread.join(HEARTBEAT_S)
    os._exit(0)


if __name__ == "__main__":
    main()
