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
    """Serves ranges of the content, of each at most so many bytes before the connection breaks.

    `said` is what it says of a range, where that is not what it is, and `status` what it answers with.
    """

    at_once: int
    more: bytes
    said: str | None
    status: int
    ranges: list[tuple[int, int]]

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        assert asked is not None
        begin, end = int(asked[1]), int(asked[2]) + 1
        self.ranges.append((begin, end))
        part = CONTENT[begin:end] + self.more
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(part)))
        said = f"bytes {begin}-{end - 1}/{len(CONTENT)}" if self.said is None else self.said
        if said:
            self.send_header("Content-Range", said)
        self.end_headers()
        self.wfile.write(part[: self.at_once])
        self.close_connection = True


Make = Callable[..., tuple[RemoteFile, type[Server]]]


@pytest.fixture
def make() -> Iterator[Make]:
    """What starts a server, and gives its file."""
    servers = []

    def started(
        at_once: int, more: bytes = b"", *, said: str | None = None, status: int = 206
    ) -> tuple[RemoteFile, type[Server]]:
        own = {"at_once": at_once, "more": more, "said": said, "status": status, "ranges": []}
        handler = type("OwnServer", (Server,), own)
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


@pytest.mark.parametrize("size", [str(len(CONTENT)), "*"])
def test_a_part_of_the_range_is_taken_and_the_rest_asked_for(size: str, make: Make) -> None:
    file, server = make(4, said=f"bytes 20-23/{size}")
    buffer = bytearray(10)
    with pytest.raises(BadInput, match="is given in other parts than asked for"):  # the rest is not from 20
        file.read_at(20, memoryview(buffer))
    assert bytes(buffer) == CONTENT[20:24] + bytes(6)
    assert server.ranges == [(20, 30), (24, 30)]


@pytest.mark.parametrize(
    "said",
    [
        "",
        f"bytes 0-9/{len(CONTENT)}",
        f"bytes 20-30/{len(CONTENT)}",
        f"bytes 20-19/{len(CONTENT)}",
        f"bytes 20-29/{len(CONTENT) + 1}",
        f"bytes */{len(CONTENT)}",
        "bytes 20-29/" + "9" * 5000,
        f"items 20-29/{len(CONTENT)}",
    ],
)
def test_another_range_than_was_asked_for_is_refused_at_once(said: str, make: Make) -> None:
    file, server = make(len(CONTENT), said=said)
    buffer = bytearray(10)
    with pytest.raises(BadInput, match="org/name/w: is given in other parts than asked for"):
        file.read_at(20, memoryview(buffer))
    assert not any(buffer)
    assert len(server.ranges) == 1


@pytest.mark.parametrize(("status", "times"), [(401, 1), (403, 1), (404, 1), (500, 3), (503, 3)])
def test_only_what_may_change_is_asked_for_again(status: int, times: int, make: Make) -> None:
    file, server = make(len(CONTENT), status=status)
    with pytest.raises(BadInput, match=f"org/name/w: cannot be read .*{status}") as refused:
        file.read_at(0, memoryview(bytearray(10)))
    assert len(server.ranges) == times
    assert ("hf auth login" in str(refused.value)) == (times == 1)
