"""Things that listen on loopback and are not what was asked for: a socket that says nothing, a web server."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc


@contextmanager
def answering(serve: Callable[[socket.socket], object]) -> Iterator[int]:
    """The port of a server that hands every connection to a function."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        kept: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                kept.append(connection)
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield int(listener.getsockname()[1])
        listener.shutdown(socket.SHUT_RDWR)
        for connection in kept:
            connection.close()


def silent() -> AbstractContextManager[int]:
    return answering(lambda connection: None)


def hanging_grpc() -> AbstractContextManager[int]:
    """A gRPC server that shakes hands, and then answers nothing: a head whose process hangs."""
    return answering(lambda connection: connection.sendall(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])))


@contextmanager
def other_grpc(refusal: grpc.StatusCode | None = None) -> Iterator[int]:
    """A gRPC server of another service; with `refusal`, one that refuses every call so."""

    class Refusing(grpc.GenericRpcHandler):  # type: ignore[misc]
        def service(self, _: object) -> Any:
            return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(refusal, "no"))

    handlers = () if refusal is None else (Refusing(),)
    server = grpc.server(ThreadPoolExecutor(2), handlers=handlers)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield int(port)
    server.stop(None)


@contextmanager
def web_server(body: bytes = b"hello", status: int = 200) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()
