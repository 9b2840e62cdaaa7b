"""Our packets under AES-GCM, judged by paramiko's own; other ciphers; key exchanges of our side."""

from __future__ import annotations

import itertools
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st
from paramiko.channel import Channel
from paramiko.message import Message
from paramiko.packet import NeedRekeyException, Packetizer

import cloud_services
import ssh_wire
from cloud_services import KIB, PaperspaceDownloader, PaperspaceUploader, write_at
from ssh_transport import STREAMED_BYTES
from ssh_wire import CHANNEL_DATA, BulkPacketizer, ReceivedData, SentData, send_some
from tests.servers import SSHServer
from tests.support import MIB, cli, document, flags, random_file, sha256

PACKET = 32 * KIB
messages = st.lists(
    st.binary(min_size=1, max_size=3000).filter(lambda data: data[0] != CHANNEL_DATA), max_size=5
)
contents = st.lists(st.integers(1, 3 * PACKET), max_size=4)


class Chopped:
    """A socket that brings no more than so many bytes at a time."""

    def __init__(self, sock: socket.socket, sizes: Iterable[int]) -> None:
        self._sock, self._sizes = sock, itertools.cycle(sizes)

    def recv(self, most: int) -> bytes:
        return self._sock.recv(min(most, next(self._sizes)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


class Pair:
    """Two ends of a connection under one key; `ours` sends or receives, `theirs` is paramiko's."""

    def __init__(self, sizes: Iterable[int] = (MIB,)) -> None:
        self.sockets = socket.socketpair()
        for sock in self.sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MIB)
            sock.settimeout(10)
        self.ours = BulkPacketizer(ssh_wire.LiveSocket(Chopped(self.sockets[0], sizes)))
        self.theirs = Packetizer(self.sockets[1])
        engine, nonce = AESGCM(os.urandom(16)), os.urandom(4) + bytes(5) + b"\xff\xff\xfe"
        for end in (self.ours, self.theirs):
            common: dict[str, Any] = {
                "block_engine": engine, "block_size": 16, "mac_engine": None, "mac_size": 16,
                "mac_key": None, "aead": True,
            }  # fmt: skip
            end.set_outbound_cipher(**common, iv_out=nonce)
            end.set_inbound_cipher(**common, iv_in=nonce)

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        for sock in self.sockets:
            sock.close()


def data_message(recipient: int, content: bytes) -> Message:
    message = Message()
    message.add_byte(bytes([CHANNEL_DATA]))
    message.add_int(recipient)
    message.add_string(content)
    return message


@given(texts=messages, sizes=contents)
def test_paramiko_reads_our_packets(texts: list[bytes], sizes: list[int]) -> None:
    with Pair() as pair:
        for text in texts:
            pair.ours.send_message(Message(text))
        for text in texts:
            kind, message = pair.theirs.read_message()
            assert bytes([kind]) + message.asbytes() == text
        for size in sizes:
            content = os.urandom(size)
            pair.ours.send_message(SentData(7, memoryview(content), PACKET))
            came = b""
            while len(came) < size:
                kind, message = pair.theirs.read_message()
                assert (kind, message.get_int()) == (CHANNEL_DATA, 7)
                piece = message.get_binary()
                assert len(piece) <= PACKET - 64
                came += piece
            assert came == content


@given(texts=messages, sizes=contents)
def test_we_read_paramikos_packets(texts: list[bytes], sizes: list[int]) -> None:
    with Pair() as pair:
        for text in texts:
            pair.theirs.send_message(Message(text))
            kind, message = pair.ours.read_message()
            assert bytes([kind]) + message.asbytes() == text
        for size in sizes:
            content = os.urandom(size)
            pair.theirs.send_message(data_message(9, content))
            kind, message = pair.ours.read_message()
            assert isinstance(message, ReceivedData)
            assert (kind, message.get_int(), message.get_binary()) == (CHANNEL_DATA, 9, content)


@given(
    sizes=st.lists(st.integers(0, 2 * PACKET), max_size=8),
    cuts=st.lists(st.integers(1, 3 * PACKET), min_size=1, max_size=5),
)
def test_content_for_our_pipes_never_meets_paramiko_and_all_else_does(
    sizes: list[int], cuts: list[int]
) -> None:
    with Pair(cuts) as pair:
        channel: Any = Channel(9)
        channel.transport = _Transport()
        channel.transport.packetizer = pair.ours
        pipe = ssh_wire.open_pipe(channel, pair.ours._live)
        sent = [os.urandom(size) for size in sizes]
        for content in sent:
            pair.theirs.send_message(data_message(9, content))
        for recipient in (8, 9):
            if recipient == 9:
                ssh_wire.close_pipe(channel)
            pair.theirs.send_message(data_message(recipient, b"other"))
            kind, message = pair.ours.read_message()
            assert (kind, message.get_int(), message.get_binary()) == (
                CHANNEL_DATA, recipient, b"other",
            )  # fmt: skip
        pipe.close()
        pieces = list(itertools.chain(*iter(pipe.take, [])))
        assert [bytes(piece) for piece in pieces] == sent


def content_pipe(pair: Pair, number: int) -> tuple[Any, ssh_wire.ContentPipe]:
    channel: Any = Channel(number)
    channel.transport = _Transport()
    channel.transport.packetizer = pair.ours
    return channel, ssh_wire.open_content_pipe(channel)


def blocks(pipe: ssh_wire.ContentPipe) -> Iterator[bytes]:
    """All blocks of a closed pipe, each as it was before the next was taken."""
    return (bytes(block) for block in iter(pipe.take, b""))


@given(
    sizes=st.lists(st.integers(0, 2 * PACKET), min_size=1, max_size=12),
    between=st.lists(st.sampled_from([b"", b"\x50", b"\x51" + bytes(3000)]), max_size=12),
    cuts=st.lists(st.integers(1, 3 * PACKET), min_size=1, max_size=5),
    block=st.integers(1, 5 * PACKET),
)
def test_what_is_expected_comes_in_large_blocks_and_all_else_goes_its_way(
    sizes: list[int], between: list[bytes], cuts: list[int], block: int
) -> None:
    sent, others = [os.urandom(size) for size in sizes], [text for text in between if text]
    with Pair(cuts) as pair, pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssh_wire.ContentPipe, "BLOCK_BYTES", block)
        channel, pipe = content_pipe(pair, 9)
        second = content_pipe(pair, 7)[1]
        for each in (pipe, second):
            each.expect(sum(sizes))
        for content, text in itertools.zip_longest(sent, between, fillvalue=b""):
            for number in (9, 7):
                pair.theirs.send_message(data_message(number, content))
            pair.theirs.send_message(data_message(8, b"nobody's"))
            if text:
                pair.theirs.send_message(Message(text))
        for text in others:
            while (came := pair.ours.read_message())[0] == CHANNEL_DATA:
                assert (came[1].get_int(), came[1].get_binary()) == (8, b"nobody's")
            assert bytes([came[0]]) + came[1].asbytes() == text
        pair.theirs.send_message(Message(b"\x52"))
        while pair.ours.read_message()[0] != 0x52:
            pass
        pipe.close()
        second.close()
        first_blocks = [*blocks(pipe)]
        assert b"".join(first_blocks) == b"".join(blocks(second)) == b"".join(sent)
        assert all(block <= len(piece) < block + 2 * PACKET for piece in first_blocks[:-1])
        assert pair.ours.content is second
        ssh_wire.close_pipe(channel)
        assert (pair.ours.content, [*pair.ours.pipes]) == (second, [7])


def test_a_content_pipe_that_was_closed_takes_nothing_more() -> None:
    with Pair() as pair:
        channel, pipe = content_pipe(pair, 9)
        assert [pair.ours.content] == [pipe]
        ssh_wire.close_pipe(channel)
        assert [pair.ours.content, pair.ours.pipes] == [None, {}]
        pair.theirs.send_message(data_message(9, b"late"))
        kind, message = pair.ours.read_message()
        assert (kind, message.get_int(), message.get_binary()) == (CHANNEL_DATA, 9, b"late")


def test_a_block_stays_as_it_is_until_the_next_is_taken_and_then_its_memory_is_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ssh_wire.ContentPipe, "BLOCK_BYTES", 4)
    pipe = ssh_wire.ContentPipe(9)
    lent = []  # kept, so that no two of them can be at one place by chance
    pipe.feed(b"aaaa")
    for letter in b"bcdef":
        block = pipe.take(0)
        lent.append(block.obj)
        pipe.feed(bytes([letter]) * 4)
        assert block == bytes([letter - 1]) * 4
    assert len(set(map(id, lent))) == 3


def test_content_of_any_cipher_fills_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_wire.ContentPipe, "BLOCK_BYTES", 5)
    pipe = ssh_wire.ContentPipe(9)
    pipe.feed(b"")
    pipe.expect(3)
    pipe.feed(b"abc")
    pipe.feed(b"")  # which is not the end
    pipe.expect(8)
    pipe.feed(b"defghij")
    pipe.feed(b"k")
    pipe.close()
    assert [*blocks(pipe)] == [b"abc", b"defghij", b"k"]
    assert not pipe.take()


def test_content_that_comes_slowly_is_waited_for_and_none_is_not() -> None:
    pipe = ssh_wire.ContentPipe(9)
    pipe.expect(6)

    def trickle() -> None:
        for _ in range(6):
            time.sleep(0.2)
            pipe.feed(b"x")

    feeder = threading.Thread(target=trickle)
    feeder.start()
    assert pipe.take(timeout=0.6) == b"x" * 6
    feeder.join()
    with pytest.raises(TimeoutError):
        pipe.take(timeout=0.01)


@given(position=st.integers(4, 200))
def test_a_flipped_bit_never_reaches_the_content(position: int) -> None:
    with Pair() as pair:
        pipe = content_pipe(pair, 9)[1]
        pipe.expect(400)
        for byte in b"ab":
            pair.theirs.send_message(data_message(9, bytes([byte]) * 200))
        packets = bytearray(pair.sockets[0].recv(4 * KIB))
        packets[len(packets) // 2 + position] ^= 1
        pair.sockets[1].send(packets)
        with pytest.raises(InvalidTag):
            pair.ours.read_message()
        pipe.close()
        assert not pipe.take()


def test_a_packet_that_promises_more_content_than_it_has_brings_what_it_has() -> None:
    with Pair() as pair:
        pipe = content_pipe(pair, 9)[1]
        pipe.expect(40)
        pair.theirs.send_message(Message(data_message(9, b"x" * 40).asbytes()[:-30]))
        pair.theirs.send_message(data_message(9, b"y" * 30))
        pair.theirs.send_message(Message(b"\x50"))
        assert pair.ours.read_message()[0] == 0x50
        assert pipe.take(0) == b"x" * 10 + b"y" * 30


def test_a_key_exchange_that_is_due_is_told_between_two_pieces_of_content() -> None:
    with Pair() as pair:
        pair.ours.REKEY_BYTES = 3 * PACKET
        pipe = pair.ours.pipes[9] = ssh_wire.ChunkPipe(pair.ours._live)
        for _ in range(5):
            pair.theirs.send_message(data_message(9, bytes(PACKET)))
        pair.theirs.send_message(Message(b"\x50"))
        told = 0
        while True:
            try:
                assert pair.ours.read_message()[0] == 0x50
                break
            except NeedRekeyException:
                told += 1
        assert told == 3  # after the third, and as long as nobody sees to it
        pipe.close()
        assert sum(map(len, itertools.chain(*iter(pipe.take, [])))) == 5 * PACKET


@given(position=st.integers(0, 199))
def test_a_flipped_bit_is_never_taken_for_a_message(position: int) -> None:
    with Pair() as pair:
        pair.theirs.send_message(Message(b"\x50" + bytes(180)))
        packet = bytearray(pair.sockets[0].recv(4 * KIB))
        packet[4 + position % (len(packet) - 4)] ^= 1
        pair.sockets[1].send(packet)
        with pytest.raises(InvalidTag):
            pair.ours.read_message()


class _Transport:
    """Keeps what a channel sends."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def _send_user_message(self, message: Any) -> None:
        self.sent.append(message)


@given(length=st.integers(1, MIB), window=st.integers(1, MIB), packet=st.integers(65, 64 * KIB))
def test_never_more_is_sent_than_the_window_grants(length: int, window: int, packet: int) -> None:
    channel: Any = Channel(1)
    channel.transport = transport = _Transport()
    channel.remote_chanid, channel.out_window_size, channel.out_max_packet_size = 5, window, packet
    data = os.urandom(length)
    count = send_some(channel, memoryview(data))
    assert count == min(length, window, ssh_wire.MOST_AT_ONCE)
    assert channel.out_window_size == window - count
    pieces = [piece for sent in transport.sent for piece in sent.payloads()]
    assert b"".join(bytes(content) for _, content in pieces) == data[:count]
    assert all(len(content) <= packet - 64 for _, content in pieces)


def test_a_closed_channel_takes_nothing() -> None:
    channel: Any = Channel(1)
    channel.transport = _Transport()
    channel.closed = True
    with pytest.raises(OSError, match="closed"):
        send_some(channel, memoryview(b"late"))


@pytest.fixture(params=["aes256-ctr", "aes256-gcm@openssh.com"])
def server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SSHServer]:
    with SSHServer(tmp_path / "server", config=[f"Ciphers {request.param}"]) as running:
        yield running


def test_every_cipher_brings_a_file_there_and_back(server: SSHServer, tmp_path: Path) -> None:
    file = random_file(tmp_path / "data.bin", STREAMED_BYTES + 5)
    sent = document(
        cli("--json", "upload-training", *flags(server), "--path", server.storage, "--archive", file,
            "--streams", 3, server=server, cwd=tmp_path)
    )  # fmt: skip
    assert sent["sha256"] == sha256(server.storage / "data.bin") == sha256(file)
    back = cli("download-results", *flags(server), "--path", server.storage / "data.bin",
               "--local-path", "back", server=server, cwd=tmp_path)  # fmt: skip
    assert (back.returncode, "trying again" in back.stderr) == (0, False), back.stderr
    assert sha256(tmp_path / "back/data.bin") == sha256(file)


def test_keys_are_exchanged_again_before_too_much_was_sealed_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanges = 0
    real = BulkPacketizer.set_outbound_cipher

    def counted(self: BulkPacketizer, *args: Any, **options: Any) -> None:
        nonlocal exchanges
        exchanges += 1
        real(self, *args, **options)

    monkeypatch.setattr(BulkPacketizer, "REKEY_BYTES", 4 * MIB)
    monkeypatch.setattr(BulkPacketizer, "set_outbound_cipher", counted)
    file = random_file(tmp_path / "data.bin", 30 * MIB)
    with SSHServer(tmp_path / "server") as server:
        monkeypatch.setenv("HOME", str(server.home))
        where: dict[str, Any] = {
            "user": server.user,
            "port": server.port,
            "identity": str(server.identity),
        }
        PaperspaceUploader(server.host, str(server.storage), **where).upload_training_data(file)
        assert exchanges >= 4
        exchanges = 0
        PaperspaceDownloader(server.host, str(server.storage), **where).download_results(
            str(server.storage / "data.bin"), tmp_path / "back"
        )
        assert exchanges >= 4
    assert sha256(tmp_path / "back/data.bin") == sha256(file)


class _Bytes:
    """A socket whose content comes in the given pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self._pieces = [*pieces]

    def recv(self, _most: int) -> bytes:
        return self._pieces.pop(0)


def test_what_came_for_a_channel_is_passed_on_before_more_is_waited_for() -> None:
    live = ssh_wire.LiveSocket(_Bytes(b"ab", b"c"))
    pipe = ssh_wire.ChunkPipe(live)
    assert live.recv(1) == b"a"
    pipe.feed(b"first")
    assert live.recv(1) == b"b"  # it was here already: nobody is woken yet
    pipe.feed(b"second")
    assert not pipe.has_some()
    assert live.recv(1) == b"c"
    assert pipe.has_some()
    assert pipe.take() == [b"first", b"second"]
    with pytest.raises(TimeoutError):
        pipe.take(timeout=0.01)


def test_what_came_before_the_end_of_a_channel_is_read_before_it() -> None:
    pipe = ssh_wire.ChunkPipe(ssh_wire.LiveSocket(_Bytes()))
    pipe.feed(b"last")
    pipe.close()
    assert [pipe.take() for _ in range(4)] == [[b"last"], [], [], []]


class _Noting(socket.socket):
    """A socket that notes the options which are set on it."""

    def __init__(self, family: socket.AddressFamily) -> None:
        super().__init__(family)
        self.noted: list[tuple[int, int]] = []

    def setsockopt(self, level: int, option: int, *value: Any) -> None:
        self.noted.append((level, option))
        super().setsockopt(level, option, *value)


@pytest.mark.skipif(not hasattr(socket, "TCP_QUICKACK"), reason="Linux only")
def test_what_comes_is_acknowledged_at_once_until_it_is_told_that_this_helps_no_more() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, _Noting(socket.AF_INET) as ours:
        ours.connect(server.getsockname())
        with server.accept()[0] as theirs:
            live = ssh_wire.LiveSocket(ours)
            theirs.sendall(b"ab")
            assert live.recv(1) + live.recv(1) == b"ab"
            assert ours.noted == [(socket.IPPROTO_TCP, socket.TCP_QUICKACK)]
            live.hurries = False
            theirs.sendall(b"c")
            assert live.recv(1) == b"c"
    assert len(ours.noted) == 1


@pytest.mark.skipif(os.name == "nt", reason="no Unix sockets")
def test_a_socket_that_acknowledges_nothing_is_left_alone() -> None:
    with _Noting(socket.AF_UNIX) as ours:
        assert not ssh_wire.LiveSocket(ours).hurries
    assert not ssh_wire.LiveSocket(_Bytes()).hurries


@pytest.mark.parametrize("way", ["all", "short", "many", "no pwritev"])
@given(pieces=st.lists(st.binary(max_size=40), max_size=20), start=st.integers(0, 9))
def test_pieces_end_up_one_after_the_other_however_they_are_written(
    way: str, pieces: list[bytes], start: int
) -> None:
    write = os.pwritev
    with tempfile.TemporaryFile(buffering=0) as file, pytest.MonkeyPatch.context() as patch:
        if way == "short":
            patch.setattr(os, "pwritev", lambda fd, some, at: write(fd, [b"".join(some)[:7]], at))
        elif way == "many":
            patch.setattr(cloud_services, "MOST_PIECES", 3)
        elif way == "no pwritev":
            patch.delattr(os, "pwritev")
        file.write(b"-" * 9)
        write_at(file, threading.Lock(), start, *pieces)
        whole = os.pread(file.fileno(), 2000, 0)
    content = b"".join(pieces)
    assert whole == (b"-" * start + content).ljust(9, b"-")


@given(pieces=st.lists(st.integers(1, 200), min_size=1, max_size=20))
def test_the_window_is_opened_again_by_what_was_taken(pieces: list[int]) -> None:
    channel: Any = Channel(1)
    channel.transport, channel.remote_chanid, channel.active = _Transport(), 5, True
    channel.in_window_threshold = 100
    pipe = ssh_wire.ChunkPipe(ssh_wire.LiveSocket(_Bytes()))
    for length in pieces:
        pipe.feed(bytes(length))
        pipe._pass_on()
    while pipe.has_some():
        ssh_wire.receive_some(channel, pipe)
    opened = 0
    for message in channel.transport.sent:
        message.rewind()
        assert (message.get_byte(), message.get_int()) == (b"\x5d", 5)
        opened += message.get_int()
    assert sum(pieces) - 100 <= opened <= sum(pieces)
    assert opened + channel.in_window_sofar == sum(pieces)
