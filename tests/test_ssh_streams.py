"""Content past the server's SFTP: the programs by themselves, and over a real sshd."""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cloud_services import SEGMENT_BYTES, IntegrityError, LinkLostError
from cloud_settings import SSHSettings
from ssh_streams import SERVE, START, STORE, WINDOW_BYTES, StreamLane
from ssh_transport import STREAMED_BYTES, SFTPStore, connect
from tests.servers import SSHServer
from tests.support import MIB, cli, flags, parts, random_file, sha256, start_cli, wait_for
from transfers import Segment, Span, spans

LARGE = STREAMED_BYTES + 3 * SEGMENT_BYTES + 5


def request(offset: int, length: int) -> bytes:
    return struct.pack(">QI", offset, length)


def program(text: str, path: Path, given: bytes) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-c", text, path], input=given, capture_output=True)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SSHServer]:
    with SSHServer(tmp_path / "server") as running:
        yield running


@pytest.fixture
def seconds() -> float:
    """How long a store waits for what does not come."""
    return 10


@pytest.fixture
def store(
    server: SSHServer, seconds: float, monkeypatch: pytest.MonkeyPatch
) -> Iterator[SFTPStore]:
    monkeypatch.setenv("HOME", str(server.home))
    settings = SSHSettings(
        server.host,
        port=server.port,
        user=server.user,
        identity=str(server.identity),
        timeout=seconds,
    )
    with contextlib.closing(connect(settings)) as opened:
        assert isinstance(opened, SFTPStore)
        yield opened


class Received:
    """A sink that keeps all in memory."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.segments: list[int] = []

    def write(self, offset: int, *pieces: bytes | memoryview) -> None:
        assert offset == len(self.content)
        self.content += b"".join(pieces)

    def arrived(self, index: int) -> None:
        self.segments.append(index)


# ── the programs by themselves


def test_the_serving_program_sends_the_spans_it_is_asked_for(tmp_path: Path) -> None:
    content = random_file(tmp_path / "f", 2 * MIB).read_bytes()
    done = program(SERVE, tmp_path / "f", request(MIB, 1000) + request(5, MIB))
    assert done.stdout == START + content[MIB : MIB + 1000] + content[5 : MIB + 5]


def test_the_serving_program_reads_where_the_kernel_cannot_send(tmp_path: Path) -> None:
    content = random_file(tmp_path / "f", MIB).read_bytes()
    with open(tmp_path / "out", "ab") as out:  # sendfile(2) refuses a file opened to append
        subprocess.run([sys.executable, "-c", SERVE, tmp_path / "f"], input=request(7, MIB - 7),
                       stdout=out, check=True)  # fmt: skip
    assert (tmp_path / "out").read_bytes() == START + content[7:]


@pytest.mark.parametrize(
    ("text", "given", "why"),
    [
        (SERVE, request(0, 11), "the file became shorter"),
        (STORE, request(0, 11) + b"ten bytes.", "the content ends early"),
    ],
)
def test_a_program_that_cannot_go_on_says_why(
    tmp_path: Path, text: str, given: bytes, why: str
) -> None:
    (tmp_path / "f").write_bytes(b"ten bytes.")
    done = program(text, tmp_path / "f", given)
    assert (done.returncode, done.stderr.decode().strip()) == (1, why)


@pytest.mark.parametrize("text", [SERVE, STORE])
def test_a_program_without_its_file_says_so(tmp_path: Path, text: str) -> None:
    done = program(text, tmp_path / "nowhere" / "f", b"")
    assert (done.returncode, done.stderr) == (1, b"No such file or directory\n")


def test_the_storing_program_reports_every_span_and_shortens_nothing(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 30)
    given = b"".join(request(2 * i, 1) + b"%d" % i for i in range(10))
    done = program(STORE, tmp_path / "f", given)
    assert done.stdout == START + b"." * 10
    assert (tmp_path / "f").read_bytes() == b"0x1x2x3x4x5x6x7x8x9x" + b"x" * 10


# ── over sshd


def test_large_content_goes_past_sftp_and_small_content_does_not(
    server: SSHServer, store: SFTPStore
) -> None:
    path = str(server.storage / "f")
    for expected, streams in ((STREAMED_BYTES, True), (STREAMED_BYTES - 1, False)):
        with contextlib.closing(store.lane(path, True, expected)) as lane:
            assert isinstance(lane, StreamLane) == streams


def test_segments_in_any_order_arrive_in_their_places(server: SSHServer, store: SFTPStore) -> None:
    path = server.storage / "f"
    blocks = [os.urandom(SEGMENT_BYTES), os.urandom(SEGMENT_BYTES), os.urandom(77)]
    there: list[int] = []
    advanced: list[int] = []
    with contextlib.closing(store.lane(str(path), True, LARGE)) as lane:
        segments = [Segment(i, blocks[i]) for i in (2, 0, 1)]
        lane.send(segments, there.append, advanced.append)
    assert path.read_bytes() == b"".join(blocks)
    assert there == [2, 0, 1]
    assert sum(advanced) == path.stat().st_size
    sink = Received()
    with contextlib.closing(store.lane(str(path), False, LARGE)) as lane:
        spans = [Span(i, len(block)) for i, block in enumerate(blocks)]
        lane.receive(iter(spans), sink, advanced.append)
    assert bytes(sink.content) == b"".join(blocks)
    assert sink.segments == [0, 1, 2]


def test_more_than_the_window_comes_without_a_stall(server: SSHServer, store: SFTPStore) -> None:
    size = 3 * WINDOW_BYTES + 7
    path = random_file(server.storage / "f", size)
    sink = Received()
    with contextlib.closing(store.lane(str(path), False, LARGE)) as lane:
        lane.receive(iter(spans(size)), sink, lambda count: None)
    assert bytes(sink.content) == path.read_bytes()


def signal_programs(server: SSHServer, sort: signal.Signals) -> None:
    """Send a signal to the programs that content goes through."""
    for pid in server.sessions():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
            if b"F_SETPIPE_SZ" in Path("/proc", str(pid), "cmdline").read_bytes():
                os.kill(pid, sort)


class Disturbing(Received):
    """A sink that sends a signal to the program on the server once it has something."""

    def __init__(self, server: SSHServer, sort: signal.Signals) -> None:
        super().__init__()
        self._server, self._sort = server, sort

    def arrived(self, index: int) -> None:
        super().arrived(index)
        signal_programs(self._server, self._sort)


@pytest.mark.parametrize("seconds", [2])
def test_a_program_that_stands_still_is_noticed(server: SSHServer, store: SFTPStore) -> None:
    path = random_file(server.storage / "f", LARGE)
    sink = Disturbing(server, signal.SIGSTOP)
    lane = store.lane(str(path), False, LARGE)
    with contextlib.closing(lane), pytest.raises(LinkLostError):
        lane.receive(iter(spans(LARGE)), sink, lambda count: None)
    assert len(sink.segments) >= 1
    assert path.read_bytes().startswith(sink.content)


@pytest.mark.parametrize("sort", [signal.SIGTERM, signal.SIGKILL])
def test_an_upload_whose_program_is_killed_on_the_server_connects_again(
    server: SSHServer, tmp_path: Path, sort: signal.Signals
) -> None:
    file = random_file(tmp_path / "large.bin", LARGE)
    upload = start_cli("upload-training", *flags(server), "--path", server.storage, "--archive", file,
                       "--limit-rate", "8M", server=server, cwd=tmp_path)  # fmt: skip
    wait_for(lambda: any(part.stat().st_size > MIB for part in server.storage.glob(".*.part")))
    signal_programs(server, sort)
    _, errors = upload.communicate(timeout=60)
    assert (upload.returncode, "trying again" in errors) == (0, True), errors
    assert sha256(server.storage / "large.bin") == sha256(file)


def test_a_program_that_is_killed_while_it_serves_counts_as_a_lost_link(
    server: SSHServer, store: SFTPStore
) -> None:
    path = random_file(server.storage / "f", 4 * LARGE)
    lane = store.lane(str(path), False, LARGE)
    with (
        contextlib.closing(lane),
        pytest.raises(LinkLostError, match="was killed there"),
    ):
        lane.receive(iter(spans(4 * LARGE)), Disturbing(server, signal.SIGTERM), lambda count: None)


def test_a_file_that_became_shorter_is_an_error_that_says_so(
    server: SSHServer, store: SFTPStore
) -> None:
    path = random_file(server.storage / "f", MIB)
    spans, sink = [Span(0, SEGMENT_BYTES), Span(1, SEGMENT_BYTES)], Received()
    lane = store.lane(str(path), False, LARGE)
    with contextlib.closing(lane), pytest.raises(IntegrityError, match="became shorter"):
        lane.receive(iter(spans), sink, lambda count: None)


@pytest.mark.parametrize("sessions", [2, 3, 4, 10])
def test_a_large_file_goes_through_however_few_sessions_there_are(
    tmp_path: Path, sessions: int
) -> None:
    with SSHServer(tmp_path / "s", config=[f"MaxSessions {sessions}"]) as server:
        go_and_come(server, tmp_path)


def test_what_the_shells_start_up_files_print_is_no_content(
    server: SSHServer, tmp_path: Path
) -> None:
    (server.remote_home / ".bashrc").write_text("echo welcome to the box\n")
    go_and_come(server, tmp_path)


def test_a_server_whose_python_does_not_work_is_served_by_sftp(tmp_path: Path) -> None:
    broken = tmp_path / "bin" / "python3"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    path = f"{broken.parent}:{os.environ['PATH']}"
    with SSHServer(tmp_path / "s", config=[f'SetEnv HOME="{tmp_path}" PATH="{path}"']) as server:
        go_and_come(server, tmp_path)


def go_and_come(server: SSHServer, tmp_path: Path) -> None:
    """Send a large file and bring it back, by the commands."""
    file = random_file(tmp_path / "large.bin", LARGE)
    sent = cli("upload-training", *flags(server), "--path", server.storage, "--archive", file,
               server=server, cwd=tmp_path)  # fmt: skip
    assert (sent.returncode, "trying again" in sent.stderr) == (0, False), sent.stderr
    assert sha256(server.storage / "large.bin") == sha256(file)
    back = cli("download-results", *flags(server), "--path", server.storage / "large.bin",
               "--local-path", "back", server=server, cwd=tmp_path)  # fmt: skip
    assert (back.returncode, "trying again" in back.stderr) == (0, False), back.stderr
    assert sha256(tmp_path / "back" / "large.bin") == sha256(file)
    assert parts(server.storage) == []
