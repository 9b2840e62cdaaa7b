"""Port forwarding for cloud_services: a port of this machine that leads to one of an SSH server.

It runs in this process, over the connection that transfers use, and needs no system program. After
a cut it connects anew by itself. cloud_services imports this file when a tunnel is asked for.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from cloud_services import (
    CONNECT_SECONDS,
    AccessError,
    CloudError,
    HostKeyError,
    LinkLostError,
    UsageError,
    printable,
)
from cloud_settings import SSHSettings
from ssh_transport import Completed, SSHConnection, end_input, shell_command, ssh_errors

LOOPBACK = "127.0.0.1"
BLOCK_BYTES = 64 * 1024
LOOK_SECONDS = 0.5
RECONNECT_PAUSES = (0.5, 1.0, 3.0, 9.0, 15.0)
"""Seconds before the tries to connect again; the last one is repeated without end."""
LOGIN_PAUSES = (5.0, 15.0, 30.0, 60.0)
"""Seconds before the tries after a login was refused that had worked before: a machine that starts
up lets nobody in for a while. They are few, as a server may lock out who tries too often."""
PORTS_TRIED = 50

log = logging.getLogger("cloud_services")


def open_listener(
    port: int, others: bool = False, host: str = LOOPBACK, flag: str = "--port"
) -> socket.socket:
    """A listening socket on this port; with `others`, on the next free one if it is taken.

    Port 0 is any that is free. Raises UsageError when there is none, or when `host` is no address
    of this machine; `flag` is what the port is called there.
    """
    last = min(65535, port + PORTS_TRIED) if others and port else port
    for candidate in range(port, last + 1):
        family, address = _address(host, candidate)
        listener = socket.socket(family)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(128)
        except PermissionError:
            listener.close()
            hint = f"use {flag} with one from 1024"
            raise AccessError(f"port {candidate} needs more rights", hint) from None
        except OSError as error:
            listener.close()
            if error.errno == errno.EADDRNOTAVAIL:
                raise _no_address(host) from error
            continue
        return listener
    raise UsageError(
        f"port {port} is taken on this machine", f"choose another, such as {flag} 16006"
    )


def _address(host: str, port: int) -> tuple[int, Any]:
    """The address family, and the address of a host as that wants it; the first of IPv4."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise _no_address(host) from error
    family, _, _, _, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)
    return family, address


def _no_address(host: str) -> UsageError:
    return UsageError(
        f"{printable(host)!r} is no address of this machine", "leave out --host, or use 0.0.0.0"
    )


class Tunnel:
    """Hands each connection to a local port on to a port that the SSH server can reach.

    Use it with `with`. The first connection is made at the start and raises what SSHConnection
    does; a later cut is told by `told`, and mended. When `told` raises OSError, as nobody reads it
    any more, the tunnel ends.
    """

    def __init__(
        self, settings: SSHSettings, remote_port: int, listener: socket.socket, *,
        remote_host: str = LOOPBACK, told: Callable[[str], None] = log.warning,
    ) -> None:  # fmt: skip
        self._settings, self._target = settings, (remote_host, remote_port)
        self._listener, self._told = listener, told
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._connection: SSHConnection | None = None
        self._failure: Exception | None = None
        self._last_said = ""
        self._silent = False

    @property
    def local_port(self) -> int:
        """The port here."""
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        """Where a browser of this machine goes."""
        return f"http://localhost:{self.local_port}"

    @property
    def probed(self) -> str:
        """The same, whatever else answers to the name localhost."""
        return f"http://{LOOPBACK}:{self.local_port}"

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """Say nothing about single connections: it is not yet sure that anything is there."""
        self._silent = True
        try:
            yield
        finally:
            self._silent = False

    def __enter__(self) -> Tunnel:
        try:
            self._connection = SSHConnection(self._settings)
        except BaseException:
            self._listener.close()
            raise
        for work in (self._accept, self._keep_connected):
            threading.Thread(target=work, name=f"tunnel{work.__name__}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()

    def close(self) -> None:
        """End it, with all that goes through it."""
        self._closed.set()
        # Closing alone does not wake a thread that waits in accept().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def run(self, script: str) -> Completed:
        """Run a shell script on the server. Raises LinkLostError while the link is broken."""
        return self._linked().run(script)

    def start(self, script: str) -> Any:
        """The channel of a shell script that runs on, on the server; close it in the end.

        What it writes, errors included, comes out of the channel. Raises as run() does.
        """
        connection = self._linked()
        with ssh_errors(connection):
            channel = connection.open_command_session()
            channel.set_combine_stderr(True)
            channel.exec_command(shell_command(script))
            return channel

    @property
    def is_linked(self) -> bool:
        """Whether there is a connection just now."""
        connection = self._connection
        return connection is not None and _is_alive(connection)

    def wait(self, seconds: float) -> bool:
        """Wait; False when the tunnel has ended. Raises what made it end for good."""
        ended = self._closed.wait(seconds)
        if self._failure is not None:
            raise self._failure
        return not ended

    def tell(self, text: str) -> None:
        """Say something to whoever started the tunnel."""
        try:
            self._told(text)
        except OSError:  # a closed pipe, a closed terminal
            self._closed.set()

    # ── keeping the connection

    def _linked(self) -> SSHConnection:
        connection = self._connection
        if connection is None:
            raise LinkLostError(f"there is no connection to {printable(self._settings.host)}")
        return connection

    def _keep_connected(self) -> None:
        try:
            self._watch_link()
        except Exception as error:  # whoever waits gets it: a thread's own end is not noticed
            self._failure = error
            self._closed.set()

    def _watch_link(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            connection = self._connection
            if connection is None or _is_alive(connection):
                continue
            self._connection = None
            connection.close()
            self.tell(f"lost the connection to {printable(self._settings.host)}: trying again")
            self._reconnect()

    def _reconnect(self) -> None:
        """Connect again; raise what no further try can change."""
        pauses = itertools.chain(RECONNECT_PAUSES, itertools.repeat(RECONNECT_PAUSES[-1]))
        login_pauses = iter(LOGIN_PAUSES)
        pause = next(pauses)
        while not self._closed.wait(pause):
            try:
                connection = SSHConnection(self._settings)
            except (HostKeyError, UsageError):
                raise
            except AccessError as error:
                pause = next(login_pauses, 0.0)
                if not pause:
                    raise
                self.tell(f"{error}; trying again in {pause:.0f} s")
            except CloudError as error:
                pause = next(pauses)
                log.info("%s", error)
            else:
                self._take(connection)
                return

    def _take(self, connection: SSHConnection) -> None:
        with self._lock:
            if self._closed.is_set():
                connection.close()
                return
            self._connection = connection
        self.tell(f"connected to {printable(self._settings.host)} again")

    # ── handing on

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client:
            try:
                channel = self._channel()
            except CloudError as error:
                if str(error) != self._last_said and not self._silent:
                    self.tell(str(error))
                    self._last_said = str(error)
                return
            self._last_said = ""
            with contextlib.closing(channel):
                upwards = threading.Thread(target=_send_up, args=(client, channel), daemon=True)
                upwards.start()
                _bring_down(channel, client)
                with contextlib.suppress(OSError):  # what waits for more from the client ends
                    client.shutdown(socket.SHUT_RD)
                upwards.join()

    def _channel(self) -> Any:
        """A channel to the target; while the link is being mended, a little patience."""
        until = time.monotonic() + CONNECT_SECONDS
        while True:
            try:
                return self._linked().channel_to(*self._target)
            except LinkLostError:
                if time.monotonic() > until or self._closed.wait(LOOK_SECONDS):
                    raise


def _is_alive(connection: SSHConnection) -> bool:
    try:
        return bool(connection.transport.is_active())
    except LinkLostError:
        return False


def _send_up(client: socket.socket, channel: Any) -> None:
    try:
        while data := client.recv(BLOCK_BYTES):
            channel.sendall(data)
        end_input(channel)
    except (OSError, EOFError):  # no end of input, but of the client: it wants no answer either
        channel.close()


def _bring_down(channel: Any, client: socket.socket) -> None:
    with contextlib.suppress(OSError, EOFError):
        while data := channel.recv(BLOCK_BYTES):
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)
