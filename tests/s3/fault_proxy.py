"""A proxy between client and server that does to connections what networks do."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

UNAVAILABLE = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"

_EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
EXPIRED = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s" % (
    len(_EXPIRED),
    _EXPIRED,
)


@dataclass
class Fault:
    """What happens to the next `times` requests whose first line `applies` to.

    lost: the server does it, the reply never arrives. refused: `reply` at once, by default 503. cut: the
    connection breaks after `after_bytes` of the reply. cut_up: it breaks after that many bytes of the
    request. drip: the reply comes in small pieces with pauses.
    """

    kind: str
    times: int
    applies: Callable[[bytes], object] = lambda line: True
    after_bytes: int = 0
    reply: bytes = UNAVAILABLE
    struck: int = 0


@dataclass
class FaultProxy:
    """Forwards to a port on loopback, one thread a connection and direction."""

    backend: int
    faults: list[Fault] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _choose(self, line: bytes) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.struck < fault.times and fault.applies(line):
                    fault.struck += 1
                    return fault
        return None

    def _serve(self, client: socket.socket) -> None:
        """Each connection carries one request at a time, so the fault of the newest request rules."""
        state: dict[str, Fault | None] = {"fault": None}
        try:
            server = socket.create_connection(("127.0.0.1", self.backend))
        except OSError:
            client.close()
            return
        down = threading.Thread(target=self._downwards, args=(server, client, state), daemon=True)
        down.start()
        sent = 0
        try:
            while data := client.recv(1 << 16):
                if _begins_request(data):
                    sent, state["fault"] = 0, self._choose(data.split(b"\r\n", 1)[0])
                fault = state["fault"]
                sent += len(data)
                if fault and fault.kind == "refused":
                    client.sendall(fault.reply)
                    break
                if fault and fault.kind == "cut_up" and sent > fault.after_bytes:
                    break
                server.sendall(data)
        except OSError:
            pass
        _close(client, server)

    def _downwards(
        self, server: socket.socket, client: socket.socket, state: dict[str, Fault | None]
    ) -> None:
        arrived = 0
        last: Fault | None = None
        try:
            while data := server.recv(1 << 16):
                fault = state["fault"]
                arrived = len(data) if fault is not last else arrived + len(data)
                last = fault
                if data.startswith(b"HTTP/1.1 100"):
                    client.sendall(data)
                elif fault and fault.kind == "lost":
                    break
                elif fault and fault.kind == "cut" and arrived > fault.after_bytes:
                    client.sendall(data[: max(len(data) - (arrived - fault.after_bytes), 0)])
                    break
                elif fault and fault.kind == "drip":
                    _drip(client, data)
                else:
                    client.sendall(data)
        except OSError:
            pass
        _close(client, server)


def _begins_request(data: bytes) -> bool:
    return data.split(b" ", 1)[0] in (b"GET", b"PUT", b"POST", b"HEAD", b"DELETE")


def _drip(client: socket.socket, data: bytes) -> None:
    for start in range(0, len(data), 1 << 13):
        client.sendall(data[start : start + (1 << 13)])
        time.sleep(0.002)


def _close(*sockets: socket.socket) -> None:
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()
