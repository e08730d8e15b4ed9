"""A web server of a folder that reads ranges and breaks as it is told to."""

from __future__ import annotations

import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = Callable[[str, int, int], str | None]  # (path, start, how often this range was asked before) -> what happens


class Server(ThreadingHTTPServer):
    """`asked` lists (path, start, end) of every request for a range; `fault` decides what becomes of each."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked = folder, list[tuple[str, int, int]]()
        self.fault: Fault = lambda *_: None
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address) -> None:
        """A client that left is no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_) -> None:
        """Tests read what the clients say."""

    def do_GET(self) -> None:
        path = self.server.folder / self.path.lstrip("/")
        if not path.is_file():
            self.server.asked.append((self.path, 0, 0))
            self.send_error(404)
            return
        data, wanted = path.read_bytes(), re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start, end = (int(wanted[1]), int(wanted[2] or len(data) - 1) + 1) if wanted else (0, len(data))
        before = self.server.asked.count((self.path, start, end))
        self.server.asked.append((self.path, start, end))
        fault = self.server.fault(self.path, start, before)
        if fault == "503":
            self.send_error(503)
            return
        if start >= len(data) and wanted:
            self.send_error(416)
            return
        part = data if fault == "whole" else data[start:end]
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if fault in ("reset", "stall"):
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            if fault == "stall":
                time.sleep(2)
            else:  # an RST, not a FIN
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            return
        self.wfile.write(part)


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
