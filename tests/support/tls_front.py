"""TLS in front of a PostgreSQL built without it: answer SSLRequest as the server would, then forward everything."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

SSL_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"


class TLSFront:
    """
    A TLS listener on loopback. Uses threads, because asyncio does not send the alert to a client that it refuses.

    Args:
        socket_file: PostgreSQL's Unix socket.
        context: The server's certificate and key; None for a server without TLS. May be replaced while it runs.
    """

    def __init__(self, socket_file: Path, context: ssl.SSLContext | None) -> None:
        self._socket_file = socket_file
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.context = context
        self.port = self._listener.getsockname()[1]

    @contextlib.contextmanager
    def running(self) -> Iterator[TLSFront]:
        """Listen for the duration of the block."""
        threading.Thread(target=self._accept, daemon=True).start()
        try:
            yield self
        finally:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.callback(lambda: client.close())
            server.connect(str(self._socket_file))
            first = client.recv(8, socket.MSG_WAITALL)
            if first == SSL_REQUEST:
                client.sendall(b"N" if self.context is None else b"S")
                if self.context is not None:
                    client = self.context.wrap_socket(client, server_side=True, do_handshake_on_connect=False)
                    _handshake(client)
            else:
                server.sendall(first)
            _forward(client, server)


def _handshake(client: ssl.SSLSocket) -> None:
    try:
        client.do_handshake()
    except ssl.SSLError:
        # Read until the client closes: closing with unread data would reset the connection before it reads the alert.
        socket.socket.shutdown(client, socket.SHUT_WR)
        while os.read(client.fileno(), 65536):
            pass
        raise


def _forward(client: socket.socket, server: socket.socket) -> None:
    while True:
        pending = isinstance(client, ssl.SSLSocket) and client.pending()
        readable = [client] if pending else select.select([client, server], [], [])[0]
        for source in readable:
            data = source.recv(65536)
            if not data:
                return
            (server if source is client else client).sendall(data)
