"""Workers that torchrun started: the handshake, and two nodes on one machine."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from chipset.backends.reference.rendezvous import serve as serve_store
from chipset.core.conformance.traffic import serve
from chipset.core.errors import WorkerDied
from chipset.core.executors.torchrun import Offer, gather, join, offer_store, read_offer
from chipset.core.nodes import Nodes
from chipset.core.startup import start_engine

from .two_nodes import ARRIVALS, launch

SCRIPT = Path(__file__).with_name("two_nodes.py")
ENVIRONMENTS = [{}, {"A": "1"}, {"A": "2"}]


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Three, whose launcher's store is here."""
    store, address = serve_store(10)
    port = urlsplit(address).port
    assert port is not None
    yield Nodes(rank=0, num_ranks=3, ranks_per_host=1, address="127.0.0.1", port=port)
    del store


class Gathering:
    """An engine that waits for its workers, in a thread."""

    def __init__(self, nodes: Nodes) -> None:
        self.links: dict[int, socket.socket] = {}
        self._thread = threading.Thread(target=self._run, args=(nodes,))
        self._thread.start()

    def _run(self, nodes: Nodes) -> None:
        self.links = gather(nodes, ENVIRONMENTS)

    def end(self) -> dict[int, socket.socket]:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.links


def test_those_who_know_the_secret_are_let_in_as_their_rank(nodes: Nodes) -> None:
    gathering = Gathering(nodes)
    offer = read_offer(offer_store(nodes))
    assert offer.address == "127.0.0.1"
    for rank in (2, 1):
        connection, environment = join(offer, rank)
        assert environment == {"A": str(rank)}
        connection.sendall(b"%d" % rank)
        connection.close()
    links = gathering.end()
    assert {rank: link.recv(9) for rank, link in links.items()} == {1: b"1", 2: b"2"}
    for link in links.values():
        link.close()


def test_strangers_are_turned_away(nodes: Nodes) -> None:
    gathering = Gathering(nodes)
    offer = read_offer(offer_store(nodes))
    stranger = Offer(offer.address, offer.port, b"guessed")
    with pytest.raises(OSError):
        join(stranger, 1)
    with pytest.raises(OSError):
        join(offer, 7)
    with socket.create_connection((offer.address, offer.port)) as noisy:
        noisy.sendall(bytes(range(100)))
        noisy.settimeout(10)
        with suppress(ConnectionResetError):
            while noisy.recv(64):
                pass
    first, _ = join(offer, 1)
    with pytest.raises(OSError):
        join(offer, 1)
    second, _ = join(offer, 2)
    for one in (first, second, *gathering.end().values()):
        one.close()


def test_the_next_engine_makes_an_offer_of_its_own(nodes: Nodes) -> None:
    offers = []
    for _ in range(2):
        gathering = Gathering(replace(nodes, num_ranks=2))
        while (offer := read_offer(offer_store(nodes))) in offers:
            pass
        offers.append(offer)
        join(offer, 1)[0].close()
        gathering.end()[1].close()
    assert offers[0].secret != offers[1].secret


def test_a_rank_that_does_not_come_is_named(nodes: Nodes) -> None:
    with pytest.raises(WorkerDied, match=r"ranks \[1, 2\] did not come"):
        gather(nodes, ENVIRONMENTS, join_s=1.0)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_two_nodes_give_the_text_of_one_and_go_on_after_a_loss(tmp_path: Path) -> None:
    engine = start_engine(launch(tmp_path / "here"), lambda *_: None)
    answers = serve(engine, ARRIVALS)
    engine.close()
    port, agents = free_port(), []
    commands = ([str(SCRIPT), str(tmp_path / "there")], ["-m", "chipset", "serve"])
    for rank, command in enumerate(commands):
        agents.append(
            subprocess.Popen(
                [
                    sys.executable, "-m", "torch.distributed.run", "--nnodes", "2",
                    "--node-rank", str(rank), "--nproc-per-node", "1",
                    "--master-addr", "127.0.0.1", "--master-port", str(port), *command,
                ],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        )  # fmt: skip
    try:
        told = [agent.communicate(timeout=240) for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait()
    assert [agent.returncode for agent in agents] == [0, 0], told
    seen = json.loads(told[0][0].splitlines()[-1])
    assert seen["lost"] == "worker 0 ended: killed by SIGKILL"
    assert seen["ranks"] == 2
    assert seen["ids"] == [answers[n].ids for n in sorted(answers)]
