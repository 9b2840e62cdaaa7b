"""Port forwarding for cloud_services: a port of this machine that leads to one of an SSH server.

It runs in this process, over the connection that transfers use, and needs no system program. After
a cut it connects anew by itself. cloud_services imports this file when a tunnel is asked for.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
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
from ssh_transport import Completed, SSHConnection, end_input

LOOPBACK = "127.0.0.1"
BLOCK_BYTES = 64 * 1024
LOOK_SECONDS = 0.5
RECONNECT_PAUSES = (0.5, 1.0, 3.0, 9.0, 15.0)
"""Seconds before the tries to connect again; the last one is repeated without end."""
PORTS_TRIED = 50

log = logging.getLogger("cloud_services")


def open_listener(port: int, others: bool = False) -> socket.socket:
    """A listening socket on this loopback port; with `others`, on the next free one if it is taken.

    Port 0 is any that is free. Raises UsageError when there is none.
    """
    last = min(65535, port + PORTS_TRIED) if others and port else port
    for candidate in range(port, last + 1):
        listener = socket.socket()
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((LOOPBACK, candidate))
            listener.listen(128)
        except PermissionError:
            listener.close()
            raise AccessError(f"port {candidate} needs more rights", "use one from 1024") from None
        except OSError:
            listener.close()
            continue
        return listener
    raise UsageError(f"port {port} is taken on this machine", "choose another, such as 16006")


class Tunnel:
    """Hands each connection to a local port on to a port that the SSH server can reach.

    Use it with `with`. The first connection is made at the start and raises what SSHConnection
    does; a later cut is told by `told`, and mended.
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
        self._failure: CloudError | None = None
        self._last_said = ""
        self.quiet = False
        """Say nothing about single connections: somebody is still waiting for the other end."""

    @property
    def local_port(self) -> int:
        """The port here."""
        return int(self._listener.getsockname()[1])

    @property
    def url(self) -> str:
        """Where a browser of this machine goes."""
        return f"http://localhost:{self.local_port}"

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
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def run(self, script: str) -> Completed:
        """Run a shell script on the server. Raises LinkLostError while the link is broken."""
        return self._linked().run(script)

    def wait(self, seconds: float) -> None:
        """Wait; raise what made the tunnel end for good."""
        self._closed.wait(seconds)
        if self._failure is not None:
            raise self._failure

    # ── keeping the connection

    def _linked(self) -> SSHConnection:
        connection = self._connection
        if connection is None:
            raise LinkLostError(f"there is no connection to {printable(self._settings.host)}")
        return connection

    def _keep_connected(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            connection = self._connection
            if connection is None or _is_alive(connection):
                continue
            self._connection = None
            connection.close()
            self._told(f"lost the connection to {printable(self._settings.host)}: trying again")
            self._reconnect()

    def _reconnect(self) -> None:
        tries = 0
        while not self._closed.wait(RECONNECT_PAUSES[min(tries, len(RECONNECT_PAUSES) - 1)]):
            tries += 1
            try:
                connection = SSHConnection(self._settings)
            except (AccessError, HostKeyError, UsageError) as error:
                self._failure = error
                self._closed.set()
                return
            except CloudError as error:
                log.info("try %d: %s", tries, error)
                continue
            with self._lock:
                if self._closed.is_set():
                    connection.close()
                    return
                self._connection = connection
            self._told(f"connected to {printable(self._settings.host)} again")
            return

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
                if str(error) != self._last_said and not self.quiet:
                    self._told(str(error))
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
    with contextlib.suppress(OSError, EOFError):
        while data := client.recv(BLOCK_BYTES):
            channel.sendall(data)
        end_input(channel)


def _bring_down(channel: Any, client: socket.socket) -> None:
    with contextlib.suppress(OSError, EOFError):
        while data := channel.recv(BLOCK_BYTES):
            client.sendall(data)
        client.shutdown(socket.SHUT_WR)
