"""Content of a file through a small program on the server, past the server's SFTP.

A satellite of ssh_transport, for a server next door, where processors are the limit: OpenSSH's SFTP
server takes more than a third of the processor time. Measured with OpenSSH 9.2, AES-GCM and
both ends on one machine: 2.8 core-seconds a GiB through it, 1.8 past it. The program is given to
the server's Python when a lane opens, and nothing of it stays there.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import shlex
import struct
from collections.abc import Callable, Iterable, Iterator

import ssh_wire
from cloud_services import (
    KIB,
    MIB,
    SEGMENT_BYTES,
    Advance,
    CloudError,
    LinkLostError,
    printable,
)
from ssh_transport import (
    ChannelReader,
    Completed,
    SSHConnection,
    command_error,
    end_input,
    printable_lines,
    quoted,
    shell_command,
    ssh_errors,
)
from transfers import Segment, Sink, Span

WINDOW_BYTES = 4 * MIB
"""What may be on its way here: more would leave the processor's cache before it is read."""
PIPE_BYTES = 256 * KIB
"""What the server's pipe holds between its program and its sshd; Linux grants 64 KiB unasked."""
AHEAD = 16
"""Segments that are asked for ahead."""
ACKNOWLEDGED = 8
"""Segments that the server reports written at once."""
START = b"\ncloud-services: content follows\n"
"""What a program says first: whatever a shell's start-up files print comes before it."""

_BEGIN = f"""
import errno, os, struct, sys
def enlarge(pipe):
    try:
        import fcntl
        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, {PIPE_BYTES})
    except (AttributeError, ImportError, OSError):
        pass
"""

SERVE = f"""{_BEGIN}
def send(at, count):
    try:
        return os.sendfile(1, file, at, count)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSOCK, errno.EOPNOTSUPP):
            raise
    return os.write(1, os.pread(file, min(count, {PIPE_BYTES}), at))
try:
    file = os.open(sys.argv[1], os.O_RDONLY)
    enlarge(1)
    os.write(1, {START!r})
    for head in iter(lambda: sys.stdin.buffer.read(12), b""):
        at, count = struct.unpack(">QI", head)
        while count:
            sent = send(at, count)
            if not sent:
                sys.exit("the file became shorter")
            at, count = at + sent, count - sent
except OSError as error:
    sys.exit(error.strerror)
"""
"""Sends the spans of a file that its input names, each by offset and length."""

STORE = f"""{_BEGIN}
def exactly(count):
    data = b""
    while len(data) < count:
        more = os.read(0, count - len(data))
        if not more:
            break
        data += more
    return data
def store(at, count):
    data, done = os.read(0, min(count, {PIPE_BYTES})), 0
    while done < len(data):
        done += os.pwrite(file, data[done:], at + done)
    return done
try:
    file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT, 0o666)
    enlarge(0)
    os.write(1, {START!r})
    pending = 0
    for head in iter(lambda: exactly(12), b""):
        at, count = struct.unpack(">QI", head)
        while count:
            stored = store(at, count)
            if not stored:
                sys.exit("the content ends early")
            at, count = at + stored, count - stored
        pending += 1
        if pending == {ACKNOWLEDGED}:
            os.write(1, b"." * pending)
            pending = 0
    os.write(1, b"." * pending)
except OSError as error:
    sys.exit(error.strerror)
"""
"""Stores spans that come in its input, each after its offset and length; a dot for each one."""


class StreamLane:
    """One program on the server with one open file: a lane in one direction.

    Raises NoMoreSessionsError when the server opens no further session.
    """

    def __init__(self, connection: SSHConnection, path: str, writing: bool) -> None:
        self._connection = connection
        self._purpose = f"{'write' if writing else 'read'} {printable(path)}"
        self._channel = connection.open_session(connection.settings.timeout, WINDOW_BYTES)
        self._answers = ChannelReader(connection, self._channel)
        program = shlex.quote(STORE if writing else SERVE)
        try:
            self._start(f"exec python3 -IS -c {program} {quoted(path)}")
        except BaseException:
            self.close()
            raise

    def _start(self, script: str) -> None:
        with self._failures():
            self._channel.exec_command(shell_command(script))
            self._answers.skip_past(START)

    def send(
        self, segments: Iterable[Segment], arrived: Callable[[int], None], advance: Advance
    ) -> None:
        sent: collections.deque[int] = collections.deque()  # what the server has not reported yet
        for number, data in segments:
            self._write(_span(number, len(data)))
            for start in range(0, len(data), ssh_wire.MOST_AT_ONCE):
                block = memoryview(data)[start : start + ssh_wire.MOST_AT_ONCE]
                self._connection.limiter.take(len(block))
                self._write(block)
                advance(len(block))
            sent.append(number)
            while sent and self._answers.has_some():
                self._confirm(sent, arrived)
        with self._failures():
            end_input(self._channel)
        while sent:
            self._confirm(sent, arrived)

    def _confirm(self, sent: collections.deque[int], arrived: Callable[[int], None]) -> None:
        with self._failures():
            reported = len(self._answers.read_some(len(sent)))
        for _ in range(reported):
            arrived(sent.popleft())

    def receive(self, spans: Iterable[Span], sink: Sink, advance: Advance) -> None:
        pipe = ssh_wire.open_content_pipe(self._channel)
        most = ssh_wire.MOST_AT_ONCE if self._connection.settings.limit_rate else SEGMENT_BYTES
        block = memoryview(b"")
        for span in self._asked_ahead(spans, pipe):
            place = span.number * SEGMENT_BYTES
            end = place + span.length
            while place < end:
                block = block or self._next_block(pipe)
                count = min(most, end - place)
                piece, block = block[:count], block[count:]
                self._connection.limiter.take(len(piece))
                sink.write(place, piece)
                advance(len(piece))
                place += len(piece)
            sink.arrived(span.number)

    def _asked_ahead(self, spans: Iterable[Span], pipe: ssh_wire.ContentPipe) -> Iterator[Span]:
        """The spans, of which the server always knows a few more."""
        wanted = iter(spans)
        asked: collections.deque[Span] = collections.deque()
        while True:
            if len(asked) < AHEAD:
                more = list(itertools.islice(wanted, AHEAD))
                pipe.expect(sum(span.length for span in more))
                self._write(b"".join(_span(*span) for span in more))
                asked += more
            if not asked:
                return
            yield asked.popleft()

    def _next_block(self, pipe: ssh_wire.ContentPipe) -> memoryview:
        with self._failures():
            block = ssh_wire.receive_block(self._channel, pipe)
            if not block:
                raise self._connection.lost()
            return block

    def close(self) -> None:
        self._answers.close()

    def _write(self, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        with self._failures():
            while rest:
                rest = rest[ssh_wire.send_some(self._channel, rest) :]

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Where the program has ended, let it say why; else the link is lost."""
        try:
            with ssh_errors(self._connection):
                yield
        except LinkLostError:
            over = self._channel.closed or self._channel.eof_received
            if not over or not self._connection.transport.is_active():
                raise
            raise self._end() from None

    def _end(self) -> CloudError:
        """The error for a program that ended too early."""
        with ssh_errors(self._connection):
            errors = b"".join(iter(lambda: self._channel.recv_stderr(MIB), b""))
            done = Completed(self._channel.recv_exit_status(), b"", printable_lines(errors))
        return command_error(self._connection.name, self._purpose, done)


def _span(number: int, length: int) -> bytes:
    """How the programs are told of a segment."""
    return struct.pack(">QI", number * SEGMENT_BYTES, length)
