"""Where torchrun started the processes: how an engine on rank 0 and the workers on all the others find each other.

engine ── Offer ──▶ the launcher's store ──▶ worker: connects, proves that it knows the secret, gets its environment

Each engine makes an offer of its own, so that workers find the next one after it. Across hosts nothing is encrypted,
as nothing is between ranks: run it on a network of its own.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta

import msgspec
from torch._C._distributed_c10d import TCPStore

from ..errors import WorkerDied
from ..nodes import KEY, Nodes

JOIN_S = 120.0
"""For all workers to come."""
HANDSHAKE_S = 5.0
_NONCE_BYTES = 32
_PROOF_BYTES = 36
"""Rank and HMAC."""


class Offer(msgspec.Struct, frozen=True):
    """Where an engine waits for its workers."""

    address: str
    port: int
    secret: bytes
    """Also what tells this engine from the one before."""


def offer_store(nodes: Nodes) -> TCPStore:
    """The launcher's own. Raises torch's DistError where it is gone."""
    return TCPStore(nodes.address, nodes.port, is_master=False, timeout=timedelta(seconds=JOIN_S))


def read_offer(store: TCPStore) -> Offer:
    """The last one that was made; waits for the first."""
    return msgspec.json.decode(store.get(KEY), type=Offer)


def gather(
    nodes: Nodes, environments: Sequence[Mapping[str, str]], *, join_s: float = JOIN_S
) -> dict[int, socket.socket]:
    """Links to all ranks but 0, each told which variables to set. Raises WorkerDied where one does not come."""
    found: dict[int, socket.socket] = {}
    with socket.create_server((nodes.address, 0)) as listening:
        offer = Offer(nodes.address, listening.getsockname()[1], secrets.token_bytes(32))
        offer_store(nodes).set(KEY, msgspec.json.encode(offer).decode())
        deadline = time.monotonic() + join_s
        while len(found) < nodes.num_ranks - 1:
            listening.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                absent = sorted(set(range(1, nodes.num_ranks)) - set(found))
                for one in found.values():
                    one.close()
                raise WorkerDied(f"ranks {absent} did not come within {join_s:.0f} s") from None
            rank = _welcome(connection, offer.secret, environments, set(found))
            if rank is None:
                connection.close()
            else:
                found[rank] = connection
    return found


def join(offer: Offer, rank: int) -> tuple[socket.socket, dict[str, str]]:
    """A link to the engine, and the variables to set in the worker. Raises OSError."""
    connection = socket.create_connection((offer.address, offer.port), timeout=HANDSHAKE_S)
    try:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        nonce = _receive(connection, _NONCE_BYTES)
        connection.sendall(_proof(offer.secret, nonce, rank))
        # it answers once the engine has looked at it
        connection.settimeout(JOIN_S)
        length = int.from_bytes(_receive(connection, 4), "little")
        environment = msgspec.json.decode(_receive(connection, length), type=dict[str, str])
    except BaseException:
        connection.close()
        raise
    return connection, environment


def _welcome(
    connection: socket.socket,
    secret: bytes,
    environments: Sequence[Mapping[str, str]],
    taken: set[int],
) -> int | None:
    """The rank that came, if it knows the secret; None: nobody who belongs here."""
    with suppress(OSError):
        connection.settimeout(HANDSHAKE_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        connection.sendall(nonce)
        proof = _receive(connection, _PROOF_BYTES)
        rank = int.from_bytes(proof[:4], "little")
        is_known = hmac.compare_digest(proof, _proof(secret, nonce, rank))
        if is_known and 0 < rank < len(environments) and rank not in taken:
            told = msgspec.json.encode(environments[rank])
            connection.sendall(len(told).to_bytes(4, "little") + told)
            return rank
    return None


def _proof(secret: bytes, nonce: bytes, rank: int) -> bytes:
    said = rank.to_bytes(4, "little")
    return said + hmac.digest(secret, nonce + said, "sha256")


def _receive(connection: socket.socket, count: int) -> bytes:
    """Exactly so many bytes: what follows belongs to somebody else."""
    parts = b""
    while len(parts) < count:
        part = connection.recv(count - len(parts))
        if not part:
            raise ConnectionError("the other side hung up")
        parts += part
    return parts
