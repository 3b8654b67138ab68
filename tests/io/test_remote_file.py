"""Ranges of a file on a server, whose connections break, and which may send other bytes than it was asked for."""

from __future__ import annotations

import pickle
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from compressor.errors import BadInput
from compressor.io.remote_file import RemoteFile

CONTENT = bytes(range(256)) * 8


class Server(BaseHTTPRequestHandler):
    """Serves ranges of the content, of each at most so many bytes before the connection breaks."""

    at_once: int
    more: bytes
    ranges: list[tuple[int, int]]

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert asked is not None
        begin, end = int(asked[1]), int(asked[2]) + 1
        self.ranges.append((begin, end))
        part = CONTENT[begin:end] + self.more
        self.send_response(206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part[: self.at_once])
        self.close_connection = True


Make = Callable[..., tuple[RemoteFile, type[Server]]]


@pytest.fixture
def make() -> Iterator[Make]:
    """What starts a server, and gives its file."""
    servers = []

    def started(at_once: int, more: bytes = b"") -> tuple[RemoteFile, type[Server]]:
        handler = type("OwnServer", (Server,), {"at_once": at_once, "more": more, "ranges": []})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        servers.append((server, thread))
        return RemoteFile(f"http://127.0.0.1:{server.server_port}/w", len(CONTENT), "org/name/w"), handler

    yield started
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def test_any_range_is_what_the_file_has_there_and_no_more_is_asked_for(make: Make) -> None:
    file, server = make(len(CONTENT))
    file = pickle.loads(pickle.dumps(file))  # as another process gets it
    for begin, size in ((0, 1), (300, 700), (len(CONTENT) - 5, 5)):
        buffer = bytearray(size)
        file.read_at(begin, memoryview(buffer))
        assert bytes(buffer) == CONTENT[begin : begin + size]
        assert server.ranges.pop() == (begin, begin + size)
        assert not server.ranges


def test_a_connection_that_breaks_is_taken_up_where_it_was(make: Make) -> None:
    file, server = make(400)
    buffer = bytearray(1000)
    file.read_at(50, memoryview(buffer))
    assert bytes(buffer) == CONTENT[50:1050]
    assert [begin for begin, _ in server.ranges] == [50, 450, 850]


def test_one_that_gives_nothing_is_given_up(make: Make) -> None:
    file, server = make(0)
    with pytest.raises(BadInput, match="org/name/w: cannot be read"):
        file.read_at(0, memoryview(bytearray(10)))
    assert len(server.ranges) == 3


def test_more_than_was_asked_for_is_refused(make: Make) -> None:
    file, _ = make(len(CONTENT), b"more")
    with pytest.raises(BadInput, match="sends more than was asked for"):
        file.read_at(0, memoryview(bytearray(10)))
