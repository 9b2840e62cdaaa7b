"""Port forwarding over a real sshd: content, many at once, cut links, ends on either side."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import ssh_tunnel
from cloud_services import AccessError, ConnectError, HostKeyError, UsageError
from cloud_settings import SSHSettings
from ssh_tunnel import Tunnel, open_listener
from tests.servers import LOOPBACK, SSHServer, free_port, wait_until


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SSHServer]:
    with SSHServer(tmp_path / "server") as running:
        for name, value in running.environment.items():
            monkeypatch.setenv(name, value)
        yield running


def settings(server: SSHServer, **more: object) -> SSHSettings:
    known = {"host": server.host, "user": server.user, "port": server.port, "timeout": 5.0}
    return SSHSettings.resolve(**{**known, "identity": str(server.identity), **more})


class Echo:
    """Answers with what it got, in capitals, and counts its guests."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.guests = 0
        self.present = 0
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                guest, _ = self._listener.accept()
                self.guests += 1
                threading.Thread(target=self._answer, args=(guest,), daemon=True).start()

    def _answer(self, guest: socket.socket) -> None:
        self.present += 1
        with guest, contextlib.suppress(OSError):
            while data := guest.recv(65536):
                guest.sendall(data.upper())
        self.present -= 1

    def close(self) -> None:
        self._listener.close()


class Link:
    """A way to a port of this machine that can be cut, and let through again."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server((LOOPBACK, 0))
        self.port = int(self._listener.getsockname()[1])
        self._open = True
        self._ends: list[socket.socket] = []
        self._lock = threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                guest, _ = self._listener.accept()
                with self._lock:
                    self._let_in(guest)

    def _let_in(self, guest: socket.socket) -> None:
        try:
            if not self._open:
                raise ConnectionRefusedError
            server = socket.create_connection((LOOPBACK, self._target))
        except OSError:
            guest.close()
            return
        self._ends += [guest, server]
        for one, other in ((guest, server), (server, guest)):
            threading.Thread(target=self._pass_on, args=(one, other), daemon=True).start()

    @staticmethod
    def _pass_on(one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(65536):
                other.sendall(data)
        for end in (one, other):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End what goes through it, and let nothing through."""
        with self._lock:
            self._open = False
            for end in self._ends:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def mend(self) -> None:
        self._open = True

    def close(self) -> None:
        self.cut()
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    running = Echo()
    yield running
    running.close()


def exchange(port: int, text: bytes) -> bytes:
    """What comes back for a text whose end is told."""
    with socket.create_connection(("127.0.0.1", port), 20) as link:
        threading.Thread(target=_send, args=(link, text), daemon=True).start()
        got = bytearray()
        with contextlib.suppress(ConnectionResetError):  # a link that is refused has an end, too
            while data := link.recv(65536):
                got += data
        return bytes(got)


def _send(link: socket.socket, text: bytes) -> None:
    with contextlib.suppress(OSError):
        link.sendall(text)
        link.shutdown(socket.SHUT_WR)


def test_what_goes_in_comes_back_whole(server: SSHServer, echo: Echo) -> None:
    text = os.urandom(3_000_000).hex().encode()
    with Tunnel(settings(server), echo.port, open_listener(0)) as tunnel:
        got = exchange(tunnel.local_port, text)
    assert hashlib.sha256(got).digest() == hashlib.sha256(text.upper()).digest()


def test_many_connections_go_through_at_once(server: SSHServer, echo: Echo) -> None:
    with Tunnel(settings(server), echo.port, open_listener(0)) as tunnel:
        found: list[bytes] = []
        guests = [
            threading.Thread(
                target=lambda: found.append(exchange(tunnel.local_port, b"a" * 50_000))
            )
            for _ in range(12)
        ]
        for guest in guests:
            guest.start()
        for guest in guests:
            guest.join(30)
    assert found == [b"A" * 50_000] * 12
    assert echo.guests == 12


def test_a_web_page_comes_through_and_its_server_closes_first(
    server: SSHServer, tmp_path: Path
) -> None:
    (tmp_path / "page.html").write_text("a curve")
    handler = lambda *a: http.server.SimpleHTTPRequestHandler(*a, directory=str(tmp_path))  # noqa: E731
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        with Tunnel(settings(server), site.server_port, open_listener(0)) as tunnel:
            request = b"GET /page.html HTTP/1.0\r\n\r\n"
            assert exchange(tunnel.local_port, request).endswith(b"a curve")
        site.shutdown()


def test_after_a_cut_it_connects_again_and_says_so(server: SSHServer, echo: Echo) -> None:
    told: list[str] = []
    with Tunnel(settings(server), echo.port, open_listener(0), told=told.append) as tunnel:
        assert exchange(tunnel.local_port, b"one") == b"ONE"
        server.stop()
        assert wait_until(lambda: any("trying again" in line for line in told), 20)
        server.start()
        assert wait_until(lambda: any("again" in line for line in told[1:]), 40), told
        assert exchange(tunnel.local_port, b"two") == b"TWO"


def test_a_connection_during_a_cut_waits_for_the_link(server: SSHServer, echo: Echo) -> None:
    with Tunnel(settings(server), echo.port, open_listener(0), told=lambda _: None) as tunnel:
        server.kill_sessions()
        assert exchange(tunnel.local_port, b"patience") == b"PATIENCE"


def test_nobody_listening_there_ends_the_connection_and_not_the_tunnel(
    server: SSHServer, echo: Echo
) -> None:
    told: list[str] = []
    nowhere = free_port()
    with Tunnel(settings(server), nowhere, open_listener(0), told=told.append) as tunnel:
        assert exchange(tunnel.local_port, b"hello") == b""
        assert any("cannot reach" in line for line in told)
        tunnel.wait(0.1)
        assert tunnel.run("echo still here").output == b"still here\n"


def test_a_host_key_that_changed_meanwhile_ends_the_tunnel(
    server: SSHServer, echo: Echo, tmp_path: Path
) -> None:
    with Tunnel(settings(server), echo.port, open_listener(0), told=lambda _: None) as tunnel:
        server.stop()
        with SSHServer(tmp_path / "impostor", port=server.port), pytest.raises(HostKeyError):
            until_it_fails(tunnel)


def until_it_fails(tunnel: Tunnel) -> None:
    for _ in range(60):
        tunnel.wait(0.5)


def test_a_server_that_is_not_there_is_an_error_at_once(server: SSHServer) -> None:
    listener = open_listener(0)
    with pytest.raises(ConnectError), Tunnel(settings(server, port=free_port()), 1, listener):
        pass
    assert listener.fileno() == -1


def test_a_taken_port_is_refused_or_the_next_one_is_used() -> None:
    with open_listener(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is taken"):
            open_listener(port)
        with open_listener(port, others=True) as other:
            assert other.getsockname()[1] > port


@pytest.mark.skipif(os.geteuid() == 0, reason="root may use every port")
def test_a_port_that_needs_more_rights_is_refused() -> None:
    with pytest.raises(AccessError):
        open_listener(80)


def test_a_client_that_resets_its_connection_leaves_nothing_behind(
    server: SSHServer, echo: Echo
) -> None:
    with Tunnel(settings(server), echo.port, open_listener(0)) as tunnel:
        link = socket.create_connection((LOOPBACK, tunnel.local_port), 10)
        link.sendall(b"x")
        assert link.recv(1) == b"X"
        link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        link.close()
        assert wait_until(lambda: echo.guests == 1 and echo.present == 0, 20)
        assert exchange(tunnel.local_port, b"and on") == b"AND ON"


def test_a_tunnel_that_nobody_listens_to_ends(server: SSHServer, echo: Echo) -> None:
    def broken(_text: str) -> None:
        raise BrokenPipeError

    with Tunnel(settings(server), echo.port, open_listener(0), told=broken) as tunnel:
        assert tunnel.wait(0.1)
        server.kill_sessions()
        assert wait_until(lambda: not tunnel.wait(0.1), 20)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssh_tunnel, "RECONNECT_PAUSES", (0.1,))
    monkeypatch.setattr(ssh_tunnel, "LOGIN_PAUSES", (0.2, 0.2, 0.2))


@pytest.mark.usefixtures("hurried")
def test_a_login_that_is_refused_while_the_server_starts_is_tried_again(
    server: SSHServer, echo: Echo
) -> None:
    told: list[str] = []
    with Tunnel(settings(server), echo.port, open_listener(0), told=told.append) as tunnel:
        known = server.authorized_keys.read_text()
        server.authorized_keys.write_text("")
        server.kill_sessions()
        assert wait_until(lambda: any("refuses the login" in line for line in told), 30)
        server.authorized_keys.write_text(known)
        assert wait_until(lambda: "again" in told[-1] and "connected" in told[-1], 30), told
        assert exchange(tunnel.local_port, b"in") == b"IN"


@pytest.mark.usefixtures("hurried")
def test_a_login_that_stays_refused_ends_the_tunnel(server: SSHServer, echo: Echo) -> None:
    with Tunnel(settings(server), echo.port, open_listener(0), told=lambda _: None) as tunnel:
        server.authorized_keys.write_text("")
        server.kill_sessions()
        with pytest.raises(AccessError, match="refuses the login"):
            until_it_fails(tunnel)


def test_an_unknown_failure_of_the_tunnel_is_loud(
    server: SSHServer, echo: Echo, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Tunnel(settings(server), echo.port, open_listener(0), told=lambda _: None) as tunnel:
        monkeypatch.setattr(ssh_tunnel, "SSHConnection", None)
        server.kill_sessions()
        with pytest.raises(TypeError):
            until_it_fails(tunnel)


def test_a_listener_is_where_it_was_asked_to_be() -> None:
    with open_listener(0, host="0.0.0.0") as everywhere:  # noqa: S104
        assert everywhere.getsockname()[0] == "0.0.0.0"  # noqa: S104
    for host in ("203.0.113.7", "no such host", "host.invalid"):
        with pytest.raises(UsageError, match="is no address of this machine"):
            open_listener(0, host=host)


def test_closing_ends_what_goes_through(server: SSHServer, echo: Echo) -> None:
    tunnel = Tunnel(settings(server), echo.port, open_listener(0))
    with tunnel:
        port = tunnel.local_port
        link = socket.create_connection(("127.0.0.1", tunnel.local_port), 10)
        link.sendall(b"x")
        assert link.recv(1) == b"X"
    assert link.recv(1) == b""
    link.close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", port), 5)
