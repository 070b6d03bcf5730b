"""A Hugging Face hub on this machine: the three calls that downloading makes, with faults on request."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPO = "org/model"


@dataclass
class FakeHub:
    """What the server has and how it misbehaves; change it between requests."""

    url: str = ""
    repo: str = REPO
    files: dict[str, bytes] = field(default_factory=dict)
    commit: str = "a" * 40
    gated: bool = False
    delay_s: float = 0.0
    cut_after: int | None = None
    """Bytes of a file's body after which the connection stays open and silent."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path and Range of each."""
    reached_cut: threading.Event = field(default_factory=threading.Event)
    closing: threading.Event = field(default_factory=threading.Event)

    def reset(self) -> None:
        """As good as new, at the same address."""
        self.closing.set()
        self.__dict__ |= FakeHub(url=self.url).__dict__

    def paths(self, method: str) -> list[str]:
        """Of all requests by this method."""
        return [path for asked, path, _ in self.requests if asked == method]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve until the block ends."""
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.state
        hub.requests.append((self.command, self.path, self.headers.get("Range")))
        time.sleep(hub.delay_s)
        path = self.path.split("?")[0]
        if path in (f"/api/models/{hub.repo}", f"/api/models/{hub.repo}/revision/main"):
            self._listing()
        elif path.startswith(f"/api/models/{hub.repo}/revision/"):
            self._error(404, "RevisionNotFound")
        elif path.startswith("/api/models/"):
            self._error(404, "RepoNotFound")
        elif hub.gated:
            self._error(403, "GatedRepo")
        else:
            self._file(path.removeprefix(f"/{hub.repo}/resolve/{hub.commit}/"))

    def _error(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _listing(self) -> None:
        siblings = [
            {"rfilename": name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            for name, data in self.state.files.items()
        ]
        body = json.dumps(
            {"id": self.state.repo, "sha": self.state.commit, "siblings": siblings}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _file(self, name: str) -> None:
        hub = self.state
        if name not in hub.files:
            self._error(404, "EntryNotFound")
            return
        data = hub.files[name]
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        body = data[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.cut_after is not None and len(body) > hub.cut_after:
            self.wfile.write(body[: hub.cut_after])
            self.wfile.flush()
            hub.reached_cut.set()
            hub.closing.wait()
            self.close_connection = True
            return
        self.wfile.write(body)
