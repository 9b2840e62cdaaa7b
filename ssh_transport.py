"""SSH for cloud_services: a connection whose death is noticed, SFTP on many channels, scp, rsync.

`connect(settings)` gives the Store at the other end of an SSH connection; `rsync_send` and
`rsync_fetch` move one file by the system's rsync. cloud_services imports this file when a command
needs a server, and works without it for archives and mounted folders.
"""

from __future__ import annotations

import collections
import contextlib
import fnmatch
import glob
import importlib
import io
import logging
import os
import posixpath
import queue
import re
import shlex
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple, cast

from cloud_services import (
    CONNECT_SECONDS,
    KIB,
    MIB,
    SAME_COMMAND,
    SEGMENT_BYTES,
    SFTP_REQUEST_BYTES,
    AccessError,
    Advance,
    CloudError,
    ConnectError,
    DiskFullError,
    HostKeyError,
    IntegrityError,
    LateModule,
    LinkLostError,
    MissingPackageError,
    NotFoundError,
    Progress,
    RateLimiter,
    TransferError,
    UsageError,
    file_sha256,
    in_background,
    list_hint,
    local_errors,
    lock_part,
    need,
    open_for_update,
    port_number,
    printable,
)
from cloud_settings import SSHSettings
from transfers import (
    ContentCheck,
    FileInfo,
    FileSource,
    Lane,
    Moved,
    NoMoreSessionsError,
    Purpose,
    ReadBack,
    Segment,
    Sink,
    Source,
    Span,
    Store,
    _check_fetched,
    _compare,
    require_length,
    spans,
)

if TYPE_CHECKING:
    import paramiko

log = logging.getLogger("cloud_services")


# ── SSH: the connection ──────────────────────────────────────────────────────────────────────────


class Completed(NamedTuple):
    """A command that ran on the server."""

    status: int
    output: bytes
    errors: str


def load_paramiko() -> Any:
    """The package; of what it imports, invoke waits until a `Match exec` of ~/.ssh/config needs it.

    It takes longer than all the rest.
    """
    if "paramiko" in sys.modules or "invoke" in sys.modules:
        return need("paramiko")
    sys.modules["invoke"] = None  # type: ignore[assignment]  # as the import system writes "not here"
    try:
        paramiko = need("paramiko")
    finally:
        del sys.modules["invoke"]
    importlib.import_module("paramiko.config").invoke = LateModule("invoke")  # type: ignore[attr-defined]
    return paramiko


class SSHConnection:
    """An authenticated SSH connection whose death is noticed within `settings.timeout` seconds.

    Honours ~/.ssh/config, known_hosts, ssh-agent and encrypted keys. Raises ConnectError,
    HostKeyError or AccessError when it cannot be made.
    """

    def __init__(
        self, settings: SSHSettings, jump: SSHConnection | None = None, way: tuple[str, ...] = ()
    ) -> None:
        self.paramiko: Any = load_paramiko()
        logging.getLogger("paramiko").setLevel(logging.CRITICAL)  # its failures reach us as errors
        self.settings = settings
        self.config = ssh_config(settings.host)
        self.hostname: str = self.config["hostname"]
        self.port = settings.port or _configured_port("Port", self.config.get("port", "22"))
        self.user: str = settings.user or self.config.get("user") or _local_user()
        self.name = settings.host
        self.limiter = RateLimiter(settings.limit_rate)
        self.dead = False
        self.knows_host = False
        """The server's host key was accepted: what fails now is the login."""
        self.most_waiting = 8 * SEGMENT_BYTES
        """Bytes of requests that one lane has under way."""
        self._jump = jump
        self._way = (*way, settings.host)
        """The hosts whose ProxyJump led here, and this one."""
        self._proxy: subprocess.Popen[bytes] | None = None
        self._closed = threading.Event()
        self.make_room: Callable[[], None] = lambda: None
        self._tools_lock = threading.Lock()
        self._found_tools: str | None = None
        try:
            with ssh_errors(self):
                self._client = self._authenticated_client()
        except BaseException:
            self.close()
            raise
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def transport(self) -> paramiko.Transport:
        transport: paramiko.Transport | None = self._client.get_transport()
        if transport is None or not transport.is_active():
            raise self.lost()
        return transport

    def lost(self) -> LinkLostError:
        """The error for a link that broke."""
        silent = f"nothing was heard from it for {self.settings.timeout:g} s"
        why = silent if self.dead else "the connection broke"
        return LinkLostError(f"lost {self.name}: {why}", SAME_COMMAND)

    def identities(self) -> list[str]:
        """The private key files to try: the one asked for, else ~/.ssh/config's, else ssh's own."""
        if self.settings.identity:
            path = os.path.expanduser(self.settings.identity)
            if not os.path.isfile(path):
                raise NotFoundError(f"the key {printable(path)} does not exist", "check --identity")
            return [path]
        files = self.config.get("identityfile", DEFAULT_KEYS)
        return [path for path in map(os.path.expanduser, files) if os.path.isfile(path)]

    def run(self, script: str) -> Completed:
        """Run a POSIX shell script on the server and wait for its end.

        It gets no end of input: paramiko may send that after the server has closed the channel,
        and sshd ends the whole connection then.
        """
        with ssh_errors(self), contextlib.closing(self.open_command_session()) as channel:
            channel.exec_command(shell_command(script))
            output = b"".join(iter(lambda: channel.recv(MIB), b""))
            errors = b"".join(iter(lambda: channel.recv_stderr(MIB), b""))
            return Completed(channel.recv_exit_status(), output, printable_lines(errors))

    def open_session(
        self, timeout: float | None = None, window: int | None = None
    ) -> paramiko.Channel:
        """A new channel; `timeout` limits each wait on it, `window` is its receive window."""
        from ssh_wire import MOST_IN_PACKET

        transport = self.transport
        try:
            channel = transport.open_session(window, MOST_IN_PACKET, self.settings.timeout)
        except (self.paramiko.SSHException, EOFError, OSError) as error:
            if not transport.is_active():
                raise self.lost() from error
            raise NoMoreSessionsError(f"{self.name} refuses a further session") from error
        self.live_socket.hurries = False
        channel.settimeout(timeout)
        return channel

    def open_command_session(self) -> paramiko.Channel:
        """A channel for a command; where sessions are scarce, one that stands by is given up."""
        for pause in (0.1, 0.3, 1.0, None):
            try:
                return self.open_session()
            except NoMoreSessionsError:
                if pause is None:
                    raise
            self.make_room()
            time.sleep(pause)  # the server counts a session until its process has ended
        raise AssertionError("the last try returns or raises")

    @property
    def sha256_command(self) -> str:
        """What computes SHA-256 on the server; empty: nothing does, or it runs no commands."""
        found = {posixpath.basename(line) for line in self._tools.splitlines()}
        return next((run for word, run in SHA256_COMMANDS.items() if word in found), "")

    @property
    def _tools(self) -> str:
        with self._tools_lock:
            if self._found_tools is None:
                self._found_tools = self._find_tools()
            return self._found_tools

    @property
    def has_python(self) -> bool:
        """Whether the server runs Python programs."""
        return "python3 works" in self._tools

    def by_python(self, program: str, path: str, otherwise: str) -> str:
        """A script that runs a Python program about `path`, or other commands without a Python.

        One process that reads the file itself takes half the processor time of dd, a pipe and a
        hash, and does not start two of them a segment.
        """
        run = f"python3 -IS -c {shlex.quote(program)} {quoted(path)}"
        return run if self.has_python else otherwise

    def _find_tools(self) -> str:
        words = " ".join(SHA256_COMMANDS)
        python = (
            "python3 -IS -c 'import hashlib, os; os.sendfile' 2>/dev/null && echo python3 works"
        )
        try:
            with ssh_errors(self), contextlib.closing(self.open_command_session()) as channel:
                channel.settimeout(self.settings.timeout)
                channel.exec_command(
                    shell_command(
                        f"for tool in {words}; do command -v $tool; done; {python}; cat >/dev/null"
                    )
                )
                end_input(channel)
                return b"".join(iter(lambda: channel.recv(MIB), b"")).decode("utf-8", "replace")
        except LinkLostError:
            transport = self._client.get_transport()
            if self.dead or transport is None or not transport.is_active():
                raise
            return ""

    def close(self) -> None:
        """End the connection, and what it went through."""
        self._closed.set()
        if hasattr(self, "_client"):
            self._client.close()
        self._end_proxy()
        if self._jump:
            self._jump.close()

    def _end_proxy(self) -> None:
        proxy, self._proxy = self._proxy, None
        if proxy is None:
            return
        proxy.terminate()
        try:
            proxy.wait(5)
        except subprocess.TimeoutExpired:
            proxy.kill()
            proxy.wait()

    # ── how it comes about

    def _authenticated_client(self) -> paramiko.SSHClient:
        try:
            return self._connect(self.settings.passphrase)
        except self.paramiko.AuthenticationException:
            locked = self.locked_key()
            if locked is None or self.settings.passphrase or not self.settings.ask_passphrase:
                raise
            passphrase = self.settings.ask_passphrase(locked)
            self.settings = self.settings._replace(passphrase=passphrase)
            return self._connect(passphrase)

    def _connect(self, passphrase: str | None) -> paramiko.SSHClient:
        from ssh_wire import LiveSocket

        self._end_proxy()  # of a login without the passphrase
        client: paramiko.SSHClient = self.paramiko.SSHClient()
        self._host_keys = KnownHosts(self)
        client.set_missing_host_key_policy(self._host_keys)  # type: ignore[arg-type]
        self.live_socket = LiveSocket(self._open_socket())
        try:
            client.connect(
                self.hostname, self.port, self.user, key_filename=self.identities(),  # type: ignore[arg-type]  # a list is fine
                passphrase=passphrase, look_for_keys=False, sock=self.live_socket,  # type: ignore[arg-type]
                timeout=CONNECT_SECONDS, banner_timeout=CONNECT_SECONDS,
                auth_timeout=2 * CONNECT_SECONDS, transport_factory=self._make_transport,
            )  # fmt: skip
        except BaseException:
            client.close()
            raise
        return client

    def _make_transport(self, sock: Any, **options: Any) -> paramiko.Transport:
        from ssh_wire import BulkPacketizer

        transport: paramiko.Transport = self.paramiko.Transport(
            sock, packetizer_class=BulkPacketizer, **options
        )
        security = transport.get_security_options()
        fast = [cipher for cipher in security.ciphers if "gcm" in cipher]
        security.ciphers = (*fast, *(c for c in security.ciphers if c not in fast))
        known = self._host_keys.known_types()
        security.key_types = sorted(security.key_types, key=lambda kind: kind not in known)
        return transport

    def _open_socket(self) -> Any:
        if self._jump is None:
            self._jump = self._jump_host()
        if self._jump is not None:
            return self._jump.channel_to(self.hostname, self.port)
        command = self.config.get("proxycommand", "none")
        if command != "none":
            return self._through_command(command)
        sock = socket.create_connection((self.hostname, self.port), CONNECT_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _jump_host(self) -> SSHConnection | None:
        """The last of the hosts that ProxyJump names, each reached through the one before."""
        jump: SSHConnection | None = None
        for name in self.config.get("proxyjump", "none").split(","):
            if name == "none":
                continue
            user, _, host = name.strip().removeprefix("ssh://").rpartition("@")
            host, _, port = host.partition(":") if host.count(":") == 1 else (host, "", "")
            if jump is None:  # what is reached through another host follows no ProxyJump
                self._refuse_circle(host)
            settings = self.settings._replace(
                host=host, user=user or None,
                port=_configured_port("ProxyJump", port) if port else None,
                identity=None, host_key=None, passphrase=None,
            )  # fmt: skip
            jump = SSHConnection(settings, jump, self._way)
        return jump

    def _refuse_circle(self, host: str) -> None:
        if host in self._way:
            circle = " -> ".join((*self._way, host))
            raise AccessError(
                f"ProxyJump in ~/.ssh/config leads in a circle: {printable(circle)}",
                'put "ProxyJump none" into the block of the host that is reached directly',
            )

    def channel_to(self, hostname: str, port: int) -> paramiko.Channel:
        """A channel that this server connects to another one."""
        with ssh_errors(self):
            try:
                return self.transport.open_channel(
                    "direct-tcpip", (hostname, port), ("127.0.0.1", 0), timeout=CONNECT_SECONDS
                )
            except self.paramiko.ChannelException as error:
                there = f"{printable(hostname)}:{port}"
                raise ConnectError(
                    f"{self.name} cannot reach {there}: {printable(error.text)}",
                    "check --host and --port, and ProxyJump in ~/.ssh/config",
                ) from error

    def _through_command(self, command: str) -> Any:
        if os.name == "nt":
            return self.paramiko.ProxyCommand(command)
        ours, theirs = socket.socketpair()
        with theirs:
            self._proxy = subprocess.Popen(
                ["/bin/sh", "-c", f"exec {command}"],
                stdin=theirs.fileno(), stdout=theirs.fileno(), start_new_session=True,
            )  # fmt: skip
        return ours

    def locked_key(self) -> str | None:
        """The first key file that is encrypted and that the passphrase, if any, does not open."""
        return next((path for path in self.identities() if self._is_locked(path)), None)

    def _is_locked(self, path: str) -> bool:
        passphrase = self.settings.passphrase
        try:
            self.paramiko.PKey.from_path(path, passphrase.encode() if passphrase else None)
        except self.paramiko.PasswordRequiredException:
            return True
        except TypeError:  # paramiko's word for a missing passphrase, and for a needless one
            return passphrase is None
        except Exception:  # what else is wrong with it a passphrase mends only if there was one
            return passphrase is not None
        return False

    def _watch(self) -> None:
        """Ask for a sign of life when it is quiet; close a link that gives none."""
        patience = self.settings.timeout
        while not self._closed.wait(patience / 4):
            silent = time.monotonic() - self.live_socket.last_heard
            if silent > patience:
                self.dead = True
                self._client.close()
                return
            if silent > patience / 4:
                threading.Thread(target=self._ping, daemon=True).start()

    @property
    def round_trip(self) -> float:
        """Seconds from a request to its answer, as measured at the login."""
        packetizer: Any = self.transport.packetizer
        return float(packetizer.round_trip)

    def _ping(self) -> None:
        with contextlib.suppress(Exception):  # a link that cannot be asked is found by its silence
            self.transport.global_request("keepalive@openssh.com", wait=True)


DEFAULT_KEYS = ("~/.ssh/id_ed25519", "~/.ssh/id_ecdsa", "~/.ssh/id_rsa")


def end_input(channel: Any) -> None:
    """Tell a command that its input ends, never after the channel was closed.

    paramiko's shutdown_write lets go of the channel before it sends: its own thread may answer the
    server's close in between, and sshd ends a connection that names a closed channel.
    """
    with channel.lock:
        message = channel._send_eof()  # noqa: SLF001 - the only way to send under the lock
        if message is not None:
            channel.transport._send_user_message(message)  # noqa: SLF001


SHA256_COMMANDS = {
    "openssl": "openssl dgst -sha256 -r",  # first: it uses the processor's SHA instructions
    "sha256sum": "sha256sum",
    "shasum": "shasum -a 256",
}


def shell_command(script: str) -> bytes:
    """One command line that runs `script` in a POSIX shell, whatever the login shell is."""
    return os.fsencode(f"sh -c {shlex.quote(script)}")


def printable_lines(text: bytes) -> str:
    """Output of a server, made safe to show."""
    return "; ".join(
        printable(line) for line in text.decode("utf-8", "replace").splitlines() if line
    )


def _local_user() -> str:
    return str(need("getpass").getuser())


@contextlib.contextmanager
def ssh_errors(connection: SSHConnection) -> Iterator[None]:
    """Translate what paramiko and sockets raise into the errors a user understands."""
    try:
        yield
    except CloudError:
        raise
    except Exception as error:
        translated = _translate_ssh(connection, error)
        if translated is None:
            raise
        raise translated from error


def _translate_ssh(connection: SSHConnection, error: Exception) -> CloudError | None:
    """The error for an SSH failure; None: unknown, let it be loud."""
    paramiko = connection.paramiko
    broken = (paramiko.SSHException, EOFError, OSError)
    if connection.dead or (hasattr(connection, "_client") and isinstance(error, broken)):
        return connection.lost()
    if isinstance(error, (*broken, ValueError)):
        return _refused_login(connection, error) or _unreachable(connection, error)
    return None


def _refused_login(connection: SSHConnection, error: Exception) -> CloudError | None:
    """The error for a login that failed; None: it was something else."""
    refused = isinstance(error, connection.paramiko.AuthenticationException)
    passphrase = connection.settings.passphrase
    unreadable = isinstance(error, (connection.paramiko.SSHException, ValueError))
    about_file = isinstance(error, OSError) and error.filename is not None
    if (unreadable or about_file) and not refused and connection.knows_host:
        for path in connection.identities():
            if fault := _key_fault(connection, path):
                return AccessError(f"the key {printable(path)} cannot be used: {fault}", _use(path))
    if (refused or (unreadable and connection.knows_host)) and (locked := connection.locked_key()):
        return AccessError(
            f"the passphrase of {printable(locked)} {'is wrong' if passphrase else 'is needed'}",
            f"ssh-add {shlex.quote(locked)}",
        )
    if refused:
        return AccessError(
            f"{connection.name} refuses the login of {connection.user}: no offered key is accepted",
            _install_key(connection),
        )
    if "No authentication methods available" in str(error):  # paramiko has no class for it
        return AccessError(
            f"{connection.name} wants a key of {connection.user}, and there is none:"
            " no key file, and none in ssh-agent",
            _install_key(connection),
        )
    return None


def _install_key(connection: SSHConnection) -> str:
    return f"{_login(connection)}   (add --identity KEY, or install your key with ssh-copy-id)"


def _key_fault(connection: SSHConnection, path: str) -> str:
    """Why no passphrase makes a key file usable; empty: one might, or it needs none."""
    try:
        connection.paramiko.PKey.from_path(path)
    except (connection.paramiko.PasswordRequiredException, TypeError):
        return ""
    except OSError as error:
        return error.strerror or "it cannot be read"
    except Exception:  # each kind of damage has an error of its own
        public = path.endswith(".pub")
        return "it is the public half" if public else "it holds no private key that is known here"
    return ""


def _use(path: str) -> str:
    """What to do about a key file that cannot be used."""
    if path.endswith(".pub"):
        return f"give the private half: --identity {shlex.quote(path.removesuffix('.pub'))}"
    return "check --identity, or IdentityFile in ~/.ssh/config"


def _unreachable(connection: SSHConnection, error: Exception) -> CloudError:
    """The error for a connection that did not come about."""
    where = f"{connection.hostname}:{connection.port}"
    if isinstance(error, socket.gaierror):
        return ConnectError(
            f"the host {printable(connection.hostname)} does not resolve: {error.strerror}",
            "check --host, or PAPERSPACE_HOST in the environment or .env",
        )
    if isinstance(error, ConnectionRefusedError):
        return ConnectError(
            f"{where} refuses the connection",
            f"is the machine on, and is {connection.port} its SSH port? {_login(connection)}",
        )
    return ConnectError(
        f"cannot connect to {where}: {printable(error) or 'no answer'}",
        f"try: {_login(connection)}",
    )


def _login(connection: SSHConnection) -> str:
    user, host = shlex.quote(connection.user), shlex.quote(connection.hostname)
    return f"ssh -p {connection.port} {user}@{host}"


def ssh_config(host: str) -> dict[str, Any]:
    """What ~/.ssh/config and the system's ssh_config say about `host`, Include lines followed."""
    paramiko = load_paramiko()
    files = (os.path.expanduser("~/.ssh/config"), "/etc/ssh/ssh_config")
    try:
        text = "\n".join(line for file in files for line in _config_lines(file))
        found: dict[str, Any] = paramiko.SSHConfig.from_text(text).lookup(host)
    except (paramiko.ConfigParseError, ValueError) as error:  # ValueError: shlex, about a quote
        raise AccessError(f"~/.ssh/config cannot be read: {printable(error)}") from error
    return found


def _configured_port(setting: str, text: str) -> int:
    """The port that a setting of ~/.ssh/config names."""
    try:
        return port_number(text)
    except UsageError as error:
        raise AccessError(
            f"~/.ssh/config cannot be read: {setting} {printable(text)!r} is no port number"
        ) from error


def _config_lines(path: str, depth: int = 0) -> Iterator[str]:
    """The lines of an ssh_config file; an Include line is replaced by the files it names."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except (FileNotFoundError, PermissionError, IsADirectoryError):
        return
    for line in lines:
        include = re.fullmatch(r"\s*include[\s=]+(.+?)\s*", line, re.IGNORECASE)
        if not include or depth > 16:  # as deep as OpenSSH goes
            yield line
            continue
        for pattern in shlex.split(include[1]):
            full = os.path.join(os.path.dirname(path), os.path.expanduser(pattern))
            for file in sorted(glob.glob(full)):
                yield from _config_lines(file, depth + 1)


class KnownHosts:
    """Decides about host keys: known_hosts first, then a pinned fingerprint, then consent.

    A changed key is refused whatever the flags say; so is a key of another type than the known
    ones, which is how a changed key would slip through as a new one.
    """

    def __init__(self, connection: SSHConnection) -> None:
        config = connection.config
        name = config.get("hostkeyalias") or connection.hostname
        port = 22 if config.get("hostkeyalias") else connection.port
        self._connection = connection
        self.entry = name if port == 22 else f"[{name}]:{port}"
        user_files = config.get("userknownhostsfile", "~/.ssh/known_hosts").split()
        self.file = Path(os.path.expanduser(user_files[0]))
        self._known: list[paramiko.PKey] = []
        self._revoked: list[str] = []
        for file in (*user_files, "/etc/ssh/ssh_known_hosts"):
            self._read(Path(os.path.expanduser(file)))

    def _read(self, file: Path) -> None:
        hosts = self._connection.paramiko.hostkeys
        for line in self._lines(file):
            if line.startswith("@revoked"):
                self._revoked += line.split()[2:4]
                continue
            with contextlib.suppress(Exception):  # ssh skips malformed lines, too
                entry = hosts.HostKeyEntry.from_line(line)
                if entry and self._names_us(entry.hostnames):
                    self._known.append(entry.key)

    @staticmethod
    def _lines(file: Path) -> list[str]:
        try:
            with open(file, encoding="utf-8", errors="replace") as lines:
                return list(lines)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise AccessError(
                f"the known host keys in {printable(file)} cannot be read: {error.strerror}",
                f"ls -ld {shlex.quote(str(file))}",
            ) from error

    def _names_us(self, patterns: list[str]) -> bool:
        hash_host = self._connection.paramiko.HostKeys.hash_host
        hashed = any(p.startswith("|1|") and hash_host(self.entry, p) == p for p in patterns)
        plain = [p for p in patterns if not p.startswith(("|1|", "!"))]
        unwanted = [p[1:] for p in patterns if p.startswith("!")]
        escape = str.maketrans({"[": "[[]"})
        return hashed or (
            any(fnmatch.fnmatchcase(self.entry, p.translate(escape)) for p in plain)
            and not any(fnmatch.fnmatchcase(self.entry, p.translate(escape)) for p in unwanted)
        )

    def known_types(self) -> set[str]:
        """Signature algorithms to prefer, so that the server offers a key that is known."""
        names = {key.get_name() for key in self._known}
        return names | ({"rsa-sha2-512", "rsa-sha2-256"} if "ssh-rsa" in names else set())

    def missing_host_key(self, client: object, hostname: str, key: paramiko.PKey) -> None:
        """Accept the server's key by returning, or raise HostKeyError. (paramiko's name for it.)"""
        settings = self._connection.settings
        fingerprint = key.fingerprint
        shown = f"{self.entry} ({key.get_name()} {fingerprint})"
        if key.get_base64() in self._revoked:
            raise HostKeyError(f"the host key of {shown} is revoked in known_hosts")
        if self._known and key not in self._known:
            raise HostKeyError(
                f"the host key of {shown} has CHANGED: somebody may be listening in",
                f"if the server was really reinstalled: ssh-keygen -R {shlex.quote(self.entry)}",
            )
        if settings.host_key and settings.host_key != fingerprint:
            raise HostKeyError(
                f"the host key of {shown} is not the expected {settings.host_key}",
                "compare with: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub   (on the server)",
            )
        if self._known:
            self._connection.knows_host = True
            return
        if not (settings.accept_new_host_key or settings.host_key):
            raise HostKeyError(
                f"the host key of {shown} is unknown",
                f"if that is its fingerprint, add: --host-key {fingerprint}"
                "   (or --accept-new-host-key)",
            )
        self._remember(key)
        self._connection.knows_host = True

    def _remember(self, key: paramiko.PKey) -> None:
        with local_errors(self.file):
            self.file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with open(self.file, "a+b") as stream:
                stream.seek(0)
                content = stream.read()
                gap = "" if not content or content.endswith(b"\n") else "\n"
                stream.write(f"{gap}{self.entry} {key.get_name()} {key.get_base64()}\n".encode())
        log.warning(
            "remembered the host key of %s in %s: %s", self.entry, self.file, key.fingerprint
        )


# ── SSH: stores ──────────────────────────────────────────────────────────────────────────────────


class SSHStore(Store):
    """What both kinds of SSH servers share: what commands on the server make possible."""

    def __init__(self, connection: SSHConnection, send_lanes: int, receive_lanes: int) -> None:
        self.connection = connection
        self.name = connection.name
        self.send_lanes = connection.settings.streams or send_lanes
        self.receive_lanes = connection.settings.streams or receive_lanes

    def digests(self, path: str, size: int) -> list[str]:
        if not self.connection.sha256_command:
            return ReadBack(self, path).digests(size)
        done = self.connection.run(
            self.connection.by_python(
                HASH_SEGMENTS,
                path,
                f"i=0; while [ $i -lt {len(spans(size))} ]; do"
                f" dd if={quoted(path)} bs={SEGMENT_BYTES} skip=$i count=1 2>/dev/null"
                f" | {self.connection.sha256_command}; i=$((i+1)); done",
            )
        )
        found = re.findall(r"(?m)^[0-9a-f]{64}", done.output.decode("ascii", "replace"))
        return found[: len(spans(size))]

    def get_ready(self, lanes: int) -> None:
        in_background(lambda: self.can_hash)  # whoever needs the answer gets its error

    @property
    def can_hash(self) -> bool:
        return bool(self.connection.sha256_command)

    def check(self, path: str, growing: bool = False) -> ContentCheck:
        if not self.can_hash:
            return ReadBack(self, path)
        return (
            _GrowingCheck(self.connection, path)
            if growing
            else _CommandCheck(self.connection, path)
        )

    def require_unpacking(self) -> None:
        if not self.connection.sha256_command:
            raise AccessError(
                f"{self.name} runs no commands, so it cannot unpack", "leave out --extract"
            )

    def unpack(self, archive: str) -> None:
        folder, name = posixpath.split(archive)
        self.command(self._unpacking(folder or ".", name), f"unpack {printable(archive)}")

    def _unpacking(self, folder: str, name: str) -> str:
        """A script: unpack into a hidden folder, compare the manifest, and only then move all.

        tar's verbose list ends with the last member: our manifest.
        """
        unpack = f"tar --no-same-owner -xzvf {quoted('../' + name)}"
        return (
            f"cd {quoted(folder)} || exit; LC_ALL=C; export LC_ALL\n"
            'new=$(mktemp -d ./.cloud_services-unpack.XXXXXX) && cd "$new" || exit\n'
            "trap 'cd .. && rm -rf \"$new\"' EXIT; trap 'exit 1' HUP INT TERM\n"
            f"last=$({{ {unpack} || echo FAILED; }} | tail -n 1)\n"
            'case "$last" in (*.sha256) ;; (FAILED) exit 1;;'
            ' (*) echo "no manifest in it" >&2; exit 1;; esac\n'
            "check=sha256sum; command -v $check >/dev/null || check='shasum -a 256'\n"
            '$check -c "./$last" >/dev/null || exit\n'
            + self.connection.by_python(MOVE_UP, ".", MOVE_UP_WITHOUT_PYTHON)
        )

    def command(self, script: str, purpose: str) -> bytes:
        """Run a script that must succeed; return its output."""
        done = self.connection.run(script)
        if done.status == 0:
            return done.output
        raise command_error(self.name, purpose, done)

    def close(self) -> None:
        self.connection.close()


SHELL_ERRORS: dict[str, type[CloudError]] = {
    "No space left": DiskFullError,
    "quota exceeded": DiskFullError,
    "Wrote only": DiskFullError,  # tar, of a file that did not fit
    "Permission denied": AccessError,
    "Operation not permitted": AccessError,
    "Read-only file system": AccessError,
    "WARNING: ": IntegrityError,  # sha256sum -c: computed checksums did NOT match
    "FAILED": IntegrityError,
    "No such file": NotFoundError,
    "became shorter": IntegrityError,
    "no manifest in it": IntegrityError,
    "gzip: ": IntegrityError,
    "tar: ": IntegrityError,
    "File exists": UsageError,
}

SHELL_HINTS: dict[type[CloudError], str] = {
    DiskFullError: "free some space there, then " + SAME_COMMAND,
    AccessError: "choose another --path, or check the rights there",
    UsageError: "choose another --path",
    IntegrityError: SAME_COMMAND,
    TransferError: SAME_COMMAND,
}


def error_kind(words: str) -> type[CloudError]:
    """The kind of error that a program on the server speaks of."""
    return next((kind for text, kind in SHELL_ERRORS.items() if text in words), TransferError)


KILLED = -1
"""What paramiko gives for the exit status of a program that a signal ended."""


def command_error(name: str, purpose: str, done: Completed) -> CloudError:
    """The error for a command that failed on the server `name`."""
    if done.status == KILLED and not done.errors:
        return LinkLostError(
            f"lost {name}: the program to {purpose} was killed there", SAME_COMMAND
        )
    kind = error_kind(done.errors)
    why = done.errors or f"status {done.status}"
    return kind(f"{name} cannot {purpose}: {why}", SHELL_HINTS.get(kind, ""))


def quoted(path: str) -> str:
    """A path for a POSIX shell: quoted, and never taken for an option."""
    return shlex.quote("./" + path if path.startswith("-") else path)


HASH_LINES = f"""
import hashlib, sys
size = {SEGMENT_BYTES}
digest, file, buffer = hashlib.sha256(), None, memoryview(bytearray(size))
for line in iter(sys.stdin.readline, ""):
    skip, count = map(int, line.split())
    file = file or open(sys.argv[1], "rb", 0)
    file.seek(skip * size)
    for _ in range(count):
        digest.update(buffer[:file.readinto(buffer)])
print(digest.hexdigest())
"""
"""Hashes a growing file: standard input names what is complete, as lines "skip count"."""

HASH_SEGMENTS = f"""
import hashlib, sys
with open(sys.argv[1], "rb") as file:
    for data in iter(lambda: file.read({SEGMENT_BYTES}), b""):
        print(hashlib.sha256(data).hexdigest())
"""
"""Hashes each segment of a file."""


MOVE_UP = """
import os, sys
for folder, folders, files in os.walk(sys.argv[1]):
    there = os.path.join("..", folder)
    os.makedirs(there, exist_ok=True)
    links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
    for name in files + links:
        os.replace(os.path.join(folder, name), os.path.join(there, name))
"""
"""Moves a tree into the folder above, file by file."""

MOVE_UP_WITHOUT_PYTHON = (
    "find . -type d -exec sh -c 'cd .. && mkdir -p \"$@\"' sh {} + &&"
    " find . ! -type d -exec"
    ' sh -c \'for f; do mv -f "$f" "../$f" || exit; done\' sh {} +'
)


class _CommandCheck:
    """Hashes a file on the server, by one command that runs while the transfer does."""

    how = "SHA-256 computed on the server"

    def __init__(self, connection: SSHConnection, path: str) -> None:
        self._connection, self._path = connection, path
        self.has_session = threading.Event()
        """Set once it has opened its session, or failed to."""
        self._answer = in_background(self._hash)

    def ready(self, segments: int) -> None:
        """The file was complete from the start."""

    def result(self, size: int) -> str:
        return self._answer.result()

    def _script(self) -> str:
        return f"{self._connection.sha256_command} < {quoted(self._path)}"

    def _hash(self) -> str:
        with ssh_errors(self._connection), contextlib.closing(self._open()) as channel:
            channel.exec_command(shell_command(self._script()))
            self._feed(channel)
            answer = b"".join(iter(lambda: channel.recv(MIB), b"")).decode("ascii", "replace")
        found = re.findall(r"(?m)^[0-9a-f]{64}", answer)
        if not found:
            raise TransferError("the server did not answer with a SHA-256", SAME_COMMAND)
        return str(found[-1])

    def _open(self) -> paramiko.Channel:
        try:
            return self._connection.open_command_session()
        finally:
            self.has_session.set()

    def abandon(self) -> None:
        """Nothing waits for more."""

    def _feed(self, channel: paramiko.Channel) -> None:
        """The command needs no input."""


class _GrowingCheck(_CommandCheck):
    """Hashes a file on the server while it arrives: the server reads what is complete so far.

    One shell loop reads lines "skip count" and feeds those segments of the file to one hash. The
    newest segment is held back until the end, as a stale longer file may still be cut there.
    """

    BATCH = 16  # segments a dd, so that few processes start

    def __init__(self, connection: SSHConnection, path: str) -> None:
        self._asked = 0
        self._input: queue.Queue[bytes] = queue.Queue()
        super().__init__(connection, path)

    def _feed(self, channel: paramiko.Channel) -> None:
        for line in iter(self._input.get, b""):
            channel.sendall(line)
        end_input(channel)

    def _script(self) -> str:
        loop = (
            f"while read -r skip count; do dd if={quoted(self._path)} bs={SEGMENT_BYTES} skip=$skip"
            f" count=$count 2>/dev/null; done | {self._connection.sha256_command}"
        )
        return self._connection.by_python(HASH_LINES, self._path, loop)

    def ready(self, segments: int) -> None:
        if segments - 1 >= self._asked + self.BATCH:
            self._ask(segments - 1)

    def result(self, size: int) -> str:
        self._ask(len(spans(size)))
        self._input.put(b"")
        return super().result(size)

    def abandon(self) -> None:
        self._input.put(b"")

    def _ask(self, segments: int) -> None:
        self._input.put(b"%d %d\n" % (self._asked, segments - self._asked))
        self._asked = segments


class NoSFTPError(AccessError):
    """The server has no SFTP subsystem."""


class SFTPFailureError(TransferError):
    """The server failed for a reason that SFTP has no number for."""


@contextlib.contextmanager
def reasons(connection: SSHConnection, script: str, purpose: str) -> Iterator[None]:
    """Where SFTP fails without a reason, let a shell do the same and say why."""
    try:
        yield
    except SFTPFailureError as error:
        done = None
        with contextlib.suppress(CloudError):  # asking must not hide what went wrong
            if connection.sha256_command:
                done = connection.run(f"LC_ALL=C; export LC_ALL; {script}")
        if done is None or done.status <= 0:
            raise
        raise command_error(connection.name, purpose, done) from error


NEAR_SECONDS = 0.005
"""A server that answers within this is in the same house: processors are the limit there."""
STREAMED_BYTES = 16 * MIB
"""Content that is worth a program of its own on such a server."""


class SFTPStore(SSHStore):
    """A server with the SFTP subsystem: ranges, several channels, no command needed."""

    def __init__(self, connection: SSHConnection, purpose: Purpose = "look") -> None:
        near = connection.round_trip < NEAR_SECONDS
        if near and purpose == "send":  # little memory stays in the processor's cache
            connection.most_waiting = 2 * SEGMENT_BYTES
        # Going there, sshd's window of 2 MiB a channel is the limit; coming back, ours is larger.
        super().__init__(connection, *((3, 1) if near else (9, 4)))
        self._may_stream = near and not connection.settings.streams
        self._check: ContentCheck | None = None
        self._control_is_free = True
        self._standby: list[Future[_SFTPChannel]] = []
        self._lock = threading.Lock()
        connection.make_room = self._give_up_a_lane
        channel = connection.open_session(connection.settings.timeout, _SFTPChannel.WINDOW_BYTES)
        if purpose != "look":
            self.get_ready(self.send_lanes if purpose == "send" else self.receive_lanes)
        try:
            self._control = _SFTPChannel(connection, channel)
        except BaseException:
            while self._standby:
                self._give_up_a_lane()
            raise

    @property
    def control(self) -> _SFTPChannel:
        """The channel for everything but content; a new one when a lane on it has failed."""
        if self._control.closed:
            # The failed lanes may still count as sessions: the patient way.
            channel = self.connection.open_command_session()
            channel.settimeout(self.connection.settings.timeout)
            self._control = _SFTPChannel(self.connection, channel)
        return self._control

    def get_ready(self, lanes: int) -> None:
        super().get_ready(lanes)
        while len(self._standby) < lanes - 1 and not self._may_stream:
            self._standby.append(in_background(lambda: _SFTPChannel(self.connection)))

    def _give_up_a_lane(self) -> None:
        while self._standby:
            with contextlib.suppress(CloudError, IndexError):
                self._standby.pop().result().close()
                break

    def check(self, path: str, growing: bool = False) -> ContentCheck:
        self._check = super().check(path, growing)
        return self._check

    def lane(self, path: str, writing: bool, expected: int) -> Lane:
        """Past SFTP, or on a channel of it.

        The last lane shares the control channel: a server grants ten sessions (MaxSessions).
        """
        if self._may_stream and expected >= STREAMED_BYTES and self.connection.has_python:
            with contextlib.suppress(NoMoreSessionsError):
                return self._stream(path, writing)
        while True:
            with self._lock:
                standby = self._standby.pop() if self._standby else None
                shared = standby is None and self._control_is_free
                self._control_is_free = self._control_is_free and not shared
            if standby is None or not isinstance(standby.exception(), NoMoreSessionsError):
                break
        if shared:
            return _SFTPLane(self.control, path, writing, self._control_came_back)
        channel = standby.result() if standby else _SFTPChannel(self.connection)
        return _SFTPLane(channel, path, writing)

    def _stream(self, path: str, writing: bool) -> Lane:
        from ssh_streams import StreamLane

        if isinstance(self._check, _CommandCheck):
            self._check.has_session.wait()  # it comes first where sessions are scarce
        return StreamLane(self.connection, path, writing)

    def _control_came_back(self) -> None:
        self._control_is_free = True

    def infos(self, *paths: str) -> list[FileInfo | None]:
        for path in paths:
            self.control.request(SFTP.STAT, self.control.string(path))
        return self._found(paths)

    def survey(self, folder: str, *paths: str) -> tuple[list[FileInfo | None], int | None]:
        control = self.control
        for path in (folder, *paths):
            control.request(SFTP.STAT, control.string(path))
        knows_space = self._request_space(folder)
        found, free = self._found((folder, *paths)), None
        if knows_space:
            kind, answer = control.answer()
            free = self._free(answer) if kind == SFTP.EXTENDED_REPLY else None
        return found, free

    def _found(self, paths: Iterable[str]) -> list[FileInfo | None]:
        """The answers to requests about `paths`."""
        control = self.control
        found: list[FileInfo | None] = []
        for path in paths:
            kind, answer = control.answer()
            if kind == SFTP.STATUS and answer.status() == SFTP.NO_SUCH_FILE:
                found.append(None)
            else:
                found.append(control.expect(SFTP.ATTRS, kind, answer, path).file_info(path))
        return found

    def entries(self, folder: str) -> list[FileInfo]:
        control = self.control
        handle = control.ask(SFTP.OPENDIR, control.string(folder), SFTP.HANDLE, folder).rest()
        found: list[FileInfo] = []
        links: list[str] = []
        while True:
            control.request(SFTP.READDIR, handle)
            kind, answer = control.answer()
            if kind == SFTP.STATUS and answer.status() == SFTP.EOF:
                break
            answer = control.expect(SFTP.NAME, kind, answer, folder)
            for _ in range(answer.number()):
                info = self._entry(folder, answer)
                if answer.is_link:
                    links.append(info.path)
                elif posixpath.basename(info.path) not in (".", ".."):
                    found.append(info)
        control.ask(SFTP.CLOSE, handle, SFTP.STATUS, folder)
        return found + [info for info in self.infos(*links) if info is not None]

    def _entry(self, folder: str, answer: _Answer) -> FileInfo:
        name = os.fsdecode(answer.string())
        answer.string()  # the same as ls -l shows it
        if "/" in name or "\0" in name:
            raise IntegrityError(f"{self.name} lists a hostile file name: {printable(name)!r}")
        return answer.file_info(posixpath.join(folder, name) if folder != "." else name)

    def make_folder(self, folder: str) -> None:
        control = self.control
        (info,) = self.infos(folder)
        if info is None:
            if above := posixpath.dirname(folder.rstrip("/")):
                self.make_folder(above)
            request = control.string(folder) + struct.pack(">I", 0)  # no attributes
            purpose = f"make the folder {printable(folder)}"
            with reasons(self.connection, f"mkdir -p {quoted(folder)}", purpose):
                control.ask(SFTP.MKDIR, request, SFTP.STATUS, folder)
        elif not info.is_folder:
            raise UsageError(
                f"{printable(folder)} on {self.name} is not a folder", "choose another --path"
            )

    def free_bytes(self, folder: str) -> int | None:
        if not self._request_space(folder):
            return None
        kind, answer = self.control.answer()
        return self._free(self.control.expect(SFTP.EXTENDED_REPLY, kind, answer, folder))

    def _request_space(self, folder: str) -> bool:
        """Ask for the free space, if the server can tell it."""
        control = self.control
        if b"statvfs@openssh.com" not in control.extensions:
            return False
        control.request(
            SFTP.EXTENDED, control.string("statvfs@openssh.com"), control.string(folder)
        )
        return True

    @staticmethod
    def _free(answer: _Answer) -> int:
        _, unit, _, _, free, *_ = answer.longs(11)
        return unit * free

    def truncate(self, path: str, size: int) -> None:
        control = self.control
        attributes = struct.pack(">IQ", SFTP.ATTR_SIZE, size)
        control.ask(SFTP.SETSTAT, control.string(path) + attributes, SFTP.STATUS, path)

    def replace(self, part: str, target: str) -> None:
        control = self.control
        names = control.string(part) + control.string(target)
        if b"posix-rename@openssh.com" in control.extensions:
            request = control.string("posix-rename@openssh.com") + names
            control.ask(SFTP.EXTENDED, request, SFTP.STATUS, target)
            return
        if self.info(target) is not None:  # plain SFTP renames onto nothing only
            control.ask(SFTP.REMOVE, control.string(target), SFTP.STATUS, target)
        control.ask(SFTP.RENAME, names, SFTP.STATUS, target)

    def rename_new(self, part: str, target: str) -> bool:
        if self.info(target) is not None:
            return False
        names = self.control.string(part) + self.control.string(target)
        try:  # plain SFTP renames onto nothing only
            self.control.ask(SFTP.RENAME, names, SFTP.STATUS, target)
        except LinkLostError:
            raise
        except CloudError:
            if self.info(target) is None:
                raise
            return False
        return True


class SFTP:
    """Numbers of SFTP version 3 (draft-ietf-secsh-filexfer-02)."""

    INIT, VERSION, OPEN, CLOSE, READ, WRITE = 1, 2, 3, 4, 5, 6
    SETSTAT, OPENDIR, READDIR, REMOVE, MKDIR, STAT, RENAME = 9, 11, 12, 13, 14, 17, 18
    STATUS, HANDLE, DATA, NAME, ATTRS, EXTENDED, EXTENDED_REPLY = 101, 102, 103, 104, 105, 200, 201
    EOF, NO_SUCH_FILE, PERMISSION_DENIED, FAILURE = 1, 2, 3, 4
    OPEN_READ, OPEN_WRITE_CREATE = 0x01, 0x02 | 0x08
    ATTR_SIZE, ATTR_OWNER, ATTR_MODE, ATTR_TIMES = 0x01, 0x02, 0x04, 0x08


class _Answer:
    """The payload of an SFTP packet, read field by field."""

    is_link = False

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def _take(self, layout: str) -> tuple[int, ...]:
        fields = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return fields

    def number(self) -> int:
        return self._take(">I")[0]

    def longs(self, count: int) -> tuple[int, ...]:
        return self._take(f">{count}Q")

    def string(self) -> bytes:
        length = self.number()
        self._at += length
        return self._data[self._at - length : self._at]

    def rest(self) -> bytes:
        return self._data[self._at :]

    def status(self) -> int:
        return int(struct.unpack_from(">I", self._data, self._at)[0])

    def file_info(self, path: str) -> FileInfo:
        flags = self.number()
        size = self.longs(1)[0] if flags & SFTP.ATTR_SIZE else 0
        self._at += 8 if flags & SFTP.ATTR_OWNER else 0
        mode = self.number() if flags & SFTP.ATTR_MODE else 0
        _, mtime = self._take(">II") if flags & SFTP.ATTR_TIMES else (0, 0)
        for _ in range(2 * self.number() if flags & 0x80000000 else 0):
            self.string()
        self.is_link = stat.S_ISLNK(mode)
        return FileInfo(path, size, mtime, stat.S_ISDIR(mode))


class ChannelReader:
    """What comes on a channel, without copies; the end of it is a lost link."""

    def __init__(self, connection: SSHConnection, channel: paramiko.Channel) -> None:
        import ssh_wire

        self._connection, self._channel = connection, channel
        self._wire = ssh_wire
        self._pipe = ssh_wire.open_pipe(channel, connection.live_socket)
        self._received: collections.deque[bytes | memoryview] = collections.deque()

    def has_some(self) -> bool:
        """Whether reading would not wait."""
        return bool(self._received) or self._pipe.has_some()

    def read(self, count: int) -> bytes:
        """Exactly `count` bytes."""
        return b"".join(self.pieces(count))

    def read_some(self, most: int) -> bytes:
        """At least one byte, and at most `most`."""
        return b"".join(self._some(most))

    def pieces(self, count: int) -> list[bytes | memoryview]:
        """Exactly `count` bytes, in pieces as they came."""
        found: list[bytes | memoryview] = []
        while count:
            some = self._some(count)
            found += some
            count -= sum(map(len, some))
        return found

    def _some(self, most: int) -> list[bytes | memoryview]:
        """At least one byte and at most `most`, in pieces as they came."""
        if not self._received:
            with ssh_errors(self._connection):
                self._received.extend(self._wire.receive_some(self._channel, self._pipe))
            if not self._received:
                raise self._connection.lost()
        found: list[bytes | memoryview] = []
        while most and self._received:
            piece = self._received.popleft()
            if len(piece) > most:
                self._received.appendleft(memoryview(piece)[most:])
                piece = memoryview(piece)[:most]
            found.append(piece)
            most -= len(piece)
        return found

    def skip_past(self, mark: bytes) -> None:
        """Read up to the end of `mark`."""
        seen = b""
        while not seen.endswith(mark):
            seen = (seen + self.read(1))[-len(mark) :]

    def close(self) -> None:
        """Close the channel, in the thread that used it.

        A channel that the garbage collector closes inside paramiko's own thread during a key
        exchange blocks the connection for 30 seconds.
        """
        with contextlib.suppress(Exception):
            self._wire.close_pipe(self._channel)
            self._channel.close()


class _SFTPChannel:
    """One channel that speaks SFTP version 3, with as many requests under way as one likes.

    paramiko's own client waits for each answer and sends 32 KiB at a time; here requests are as
    large as the server allows, and follow each other without waiting.
    """

    WINDOW_BYTES = 32 * MIB

    def __init__(self, connection: SSHConnection, channel: paramiko.Channel | None = None) -> None:
        import ssh_wire

        self.connection = connection
        self._send_some = ssh_wire.send_some
        self._unwanted: set[int] = set()  # requests whose answers nobody waits for
        self._channel = channel or connection.open_session(
            connection.settings.timeout, self.WINDOW_BYTES
        )
        self._reader = ChannelReader(connection, self._channel)
        self.read, self.pieces = self._reader.read, self._reader.pieces
        self.has_answers = self._reader.has_some
        self._last_id = 0
        self.closed = False
        with ssh_errors(connection):
            try:
                self._channel.invoke_subsystem("sftp")
            except connection.paramiko.SSHException as error:
                if not connection.transport.is_active():
                    raise
                raise NoSFTPError(f"{connection.name} has no SFTP subsystem") from error
        self._send(struct.pack(">IBI", 5, SFTP.INIT, 3))
        self.extensions = self._version()
        # 32 KiB is what every server takes; OpenSSH names its limits extension since it takes 255.
        large = b"limits@openssh.com" in self.extensions
        self.step = SFTP_REQUEST_BYTES if large else 32 * KIB

    def _version(self) -> bytes:
        """What the server says of itself, its extensions among it."""
        name = self.connection.name
        try:
            length, kind, _ = self.header()
        except LinkLostError as error:
            if not self.connection.transport.is_active():
                raise
            raise NoSFTPError(f"{name} has an SFTP subsystem that does not start") from error
        if kind != SFTP.VERSION or length > 256 * KIB:
            raise NoSFTPError(f"{name} does not answer in SFTP: does a shell start-up file print?")
        return self.read(length)

    @staticmethod
    def string(text: str | bytes) -> bytes:
        data = os.fsencode(text)
        return struct.pack(">I", len(data)) + data

    def request(self, kind: int, *payload: bytes | memoryview) -> int:
        """Send a request and return its number, without waiting."""
        self._send(self._head(kind, sum(map(len, payload))), *payload)
        return self._last_id

    def _head(self, kind: int, length: int) -> bytes:
        """The start of a request with so many bytes, which gets the next number."""
        self._last_id = (self._last_id + 1) & 0xFFFFFFFF
        return struct.pack(">IBI", length + 5, kind, self._last_id)

    def request_all(self, kind: int, payloads: Sequence[bytes]) -> list[int]:
        """Send several requests at once and return their numbers, without waiting."""
        packets, numbers = [], []
        for payload in payloads:
            packets += [self._head(kind, len(payload)), payload]
            numbers.append(self._last_id)
        self._send(*packets)
        return numbers

    def answer(self) -> tuple[int, _Answer]:
        """The next packet: its kind, and what follows the request's number."""
        length, kind, _ = self.header()
        return kind, _Answer(self.read(length))

    def ask(self, kind: int, payload: bytes, expected: int, path: str) -> _Answer:
        """A request about `path` that is answered before anything else happens."""
        self.request(kind, payload)
        return self.expect(expected, *self.answer(), path)

    def expect(self, expected: int, kind: int, answer: _Answer, path: str) -> _Answer:
        """The answer, if it is of the expected kind and no failure; else its error."""
        if kind == SFTP.STATUS and (expected != SFTP.STATUS or answer.status() != 0):
            raise self.error(answer, path)
        if kind != expected:
            raise TransferError(f"{self.connection.name} answers out of turn: {kind}", SAME_COMMAND)
        return answer

    def error(self, answer: _Answer, path: str) -> CloudError:
        """What a status answer means for `path`."""
        status, text = answer.number(), printable(answer.string())
        shown = f"{printable(path)} on {self.connection.name}"
        if status == SFTP.EOF:
            return IntegrityError(f"{shown} became shorter while it was read", SAME_COMMAND)
        if status == SFTP.NO_SUCH_FILE:
            return NotFoundError(f"{shown} does not exist", list_hint(path))
        if status == SFTP.PERMISSION_DENIED:
            return AccessError(
                f"{shown}: permission denied", "choose another --path, or check the rights there"
            )
        kind = SFTPFailureError if status == SFTP.FAILURE else TransferError
        return kind(f"{shown}: the server answers: {text}", SAME_COMMAND)

    def forget(self, kind: int, payload: bytes) -> None:
        """Send a request whose answer changes nothing."""
        self._unwanted.add(self.request(kind, payload))

    def header(self) -> tuple[int, int, int]:
        """Length of the rest, kind, and number of the request of the next packet."""
        while True:
            length, kind, request = struct.unpack(">IBI", self.read(9))
            if request not in self._unwanted:
                return length - 5, kind, request
            self._unwanted.remove(request)
            self.read(length - 5)

    def number(self) -> int:
        """A 32-bit number of the packet that is being read."""
        return int(struct.unpack(">I", self.read(4))[0])

    def close(self) -> None:
        """Close it in the thread that used it."""
        self.closed = True
        self._reader.close()

    def _send(self, *packet: bytes | memoryview) -> None:
        rest = memoryview(b"".join(packet))
        with ssh_errors(self.connection):
            while rest:
                rest = rest[self._send_some(self._channel, rest) :]


class _SFTPLane:
    """One SFTP channel with one open file."""

    def __init__(
        self,
        channel: _SFTPChannel,
        path: str,
        writing: bool,
        give_back: Callable[[], None] | None = None,
    ) -> None:
        self._sftp, self._path, self._give_back = channel, path, give_back
        self._most_waiting = channel.connection.most_waiting
        self._idle = True
        self._limiter = channel.connection.limiter
        flags = SFTP.OPEN_WRITE_CREATE if writing else SFTP.OPEN_READ
        request = channel.string(path) + struct.pack(">II", flags, 0)
        there, purpose = quoted(path), f"{'write' if writing else 'read'} {printable(path)}"
        with reasons(channel.connection, f": {'>>' if writing else '<'} {there}", purpose):
            self._handle = channel.ask(SFTP.OPEN, request, SFTP.HANDLE, path).rest()

    def send(
        self, segments: Iterable[Segment], arrived: Callable[[int], None], advance: Advance
    ) -> None:
        waiting: dict[int, Span] = {}  # request → segment, bytes
        unconfirmed: dict[int, int] = {}  # segment → bytes
        sftp, self._idle = self._sftp, False
        for number, data in segments:
            unconfirmed[number] = len(data)
            for start in range(0, len(data), sftp.step):
                block = memoryview(data)[start : start + sftp.step]
                self._limiter.take(len(block))
                head = struct.pack(">QI", number * SEGMENT_BYTES + start, len(block))
                request = sftp.request(SFTP.WRITE, self._handle, head, block)
                waiting[request] = Span(number, len(block))
                while sftp.has_answers() or sum(unconfirmed.values()) > self._most_waiting:
                    self._confirm(waiting, unconfirmed, arrived, advance)
        while waiting:
            self._confirm(waiting, unconfirmed, arrived, advance)
        self._idle = True

    def _confirm(
        self, waiting: dict[int, Span], unconfirmed: dict[int, int],
        arrived: Callable[[int], None], advance: Advance,
    ) -> None:  # fmt: skip
        """Take one answer to a write."""
        length, kind, request = self._sftp.header()
        answer = _Answer(self._sftp.read(length))
        self._sftp.expect(SFTP.STATUS, kind, answer, self._path)
        number, count = waiting.pop(request)
        advance(count)
        unconfirmed[number] -= count
        if not unconfirmed[number]:
            del unconfirmed[number]
            arrived(number)

    def receive(self, spans: Iterable[Span], sink: Sink, advance: Advance) -> None:
        wanted = iter(spans)
        requests: dict[int, Span] = {}  # request → offset in the file, bytes
        missing: dict[int, int] = {}  # segment → bytes that have not come yet
        self._idle = False
        while True:
            while sum(missing.values()) < self._most_waiting and (span := next(wanted, None)):
                missing[span.number] = span.length
                self._request_reads(span.number * SEGMENT_BYTES, span.length, requests)
            if not missing:
                break
            offset, length = self._take_data(requests, sink, advance)
            number = offset // SEGMENT_BYTES
            missing[number] -= length
            if not missing[number]:
                del missing[number]
                sink.arrived(number)
        self._idle = True

    def _request_reads(self, offset: int, length: int, requests: dict[int, Span]) -> None:
        step, end = self._sftp.step, offset + length
        reads = [Span(at, min(step, end - at)) for at in range(offset, end, step)]
        payloads = [self._handle + struct.pack(">QI", *read) for read in reads]
        requests.update(zip(self._sftp.request_all(SFTP.READ, payloads), reads, strict=True))

    def _take_data(
        self, requests: dict[int, Span], sink: Sink, advance: Advance
    ) -> tuple[int, int]:
        """Pass one answer to a read on to `sink`; ask again for what a short answer left out."""
        sftp = self._sftp
        rest, kind, request = sftp.header()
        offset, wanted = requests.pop(request)
        if kind != SFTP.DATA:
            sftp.expect(SFTP.DATA, kind, _Answer(sftp.read(rest)), self._path)
        length = sftp.number()
        if not 0 < length <= wanted:
            raise TransferError(
                f"{sftp.connection.name} sends {length} bytes for {wanted}", SAME_COMMAND
            )
        self._limiter.take(length)
        pieces = sftp.pieces(length)
        if length < wanted:
            self._request_reads(offset + length, wanted - length, requests)
        sink.write(offset, *pieces)
        advance(length)
        return offset, length

    def close(self) -> None:
        if self._give_back is None or not self._idle:
            self._sftp.close()
        else:
            self._sftp.forget(SFTP.CLOSE, self._handle)
        if self._give_back is not None:
            self._give_back()


class ShellStore(SSHStore):
    """A server without SFTP: the old scp protocol through the scp package, the rest by commands.

    scp moves whole files only, so each segment goes as a small file that dd then puts in its
    place; a download reads its ranges with dd.
    """

    def __init__(self, connection: SSHConnection) -> None:
        super().__init__(connection, 8, 8)
        self._scp: Any = need("scp")
        if not connection.sha256_command:
            raise AccessError(f"{self.name} offers neither SFTP nor the commands that scp needs")

    def infos(self, *paths: str) -> list[FileInfo | None]:
        return [self._look(path) for path in paths]

    def _look(self, path: str) -> FileInfo | None:
        quoted_path = quoted(path)
        output = self.command(
            f"[ -e {quoted_path} ] || exit 0; {_stat_script(quoted_path)}",
            f"look at {printable(path)}",
        )
        return _parse_stat(path, output.decode()) if output.strip() else None

    def entries(self, folder: str) -> list[FileInfo]:
        output = self.command(
            f'cd {quoted(folder)} || exit; for f in * .[!.]* ..?*; do [ -e "$f" ] || continue; '
            + _stat_script('"./$f"') + r"""; printf '%s\0' "$f"; done""",
            f"list {printable(folder)}",
        )  # fmt: skip
        infos = []
        for record in output.split(b"\0")[:-1]:
            numbers, _, name = os.fsdecode(record).partition("\n")
            path = posixpath.join(folder, name) if folder != "." else name
            infos.append(_parse_stat(path, numbers))
        return infos

    def make_folder(self, folder: str) -> None:
        self.command(f"mkdir -p {quoted(folder)}", f"make the folder {printable(folder)}")

    def free_bytes(self, folder: str) -> int | None:
        done = self.connection.run(f"df -Pk {quoted(folder)}")
        match = re.search(rb"(\d+)\s+\d+%", done.output)
        return int(match[1]) * KIB if match else None

    def lane(self, path: str, writing: bool, expected: int) -> Lane:
        return _ShellLane(self, path)

    def truncate(self, path: str, size: int) -> None:
        self.command(
            f"dd if=/dev/null of={quoted(path)} bs=1 count=0 seek={size} 2>/dev/null", "cut a file"
        )

    def replace(self, part: str, target: str) -> None:
        self.command(f"mv -f {quoted(part)} {quoted(target)}", f"rename to {printable(target)}")

    def rename_new(self, part: str, target: str) -> bool:
        old, new = quoted(part), quoted(target)
        said = self.command(
            f"if ln {old} {new} 2>/dev/null; then rm -f {old};"
            f" elif [ -e {new} ] || [ -h {new} ]; then echo taken; else mv {old} {new}; fi",
            f"rename to {printable(target)}",
        )
        return said.strip() != b"taken"

    def scp_client(self) -> Any:
        """A client of the old scp protocol on this connection."""
        transport = self.connection.transport
        return self._scp.SCPClient(
            transport, buff_size=32 * KIB, socket_timeout=self.connection.settings.timeout
        )


def _stat_script(path: str) -> str:
    """Prints kind, size and time of a file: with GNU's or busybox's stat, or with BSD's."""
    return (
        f"if [ -d {path} ]; then printf 'd '; else printf 'f '; fi; "
        f"stat -L -c '%s %Y' {path} 2>/dev/null || stat -L -f '%z %m' {path}"
    )


def _parse_stat(path: str, line: str) -> FileInfo:
    kind, size, mtime = line.split()
    return FileInfo(path, int(size), int(mtime), kind == "d")


class _ShellLane:
    def __init__(self, store: ShellStore, path: str) -> None:
        self._store, self._path = store, path

    def send(
        self, segments: Iterable[Segment], arrived: Callable[[int], None], advance: Advance
    ) -> None:
        connection, path = self._store.connection, quoted(self._path)
        self._store.command(f": >> {path}", f"write {printable(self._path)}")
        for index, data in segments:
            connection.limiter.take(len(data))
            self._put_piece(f"{self._path}.{index}", data)
            piece = quoted(f"{self._path}.{index}")
            self._store.command(
                f"dd if={piece} of={path} bs={SEGMENT_BYTES} seek={index} conv=notrunc 2>/dev/null"
                f" && rm {piece}",
                f"write {printable(self._path)}",
            )
            advance(len(data))
            arrived(index)

    def _put_piece(self, name: str, data: bytes | bytearray) -> None:
        connection = self._store.connection
        with ssh_errors(connection), scp_errors(self._store, self._path):
            client = self._store.scp_client()
            client.channel = connection.open_command_session()
            client.putfo(io.BytesIO(data), name, size=len(data))

    def receive(self, spans: Iterable[Span], sink: Sink, advance: Advance) -> None:
        for index, length in spans:
            self._store.connection.limiter.take(length)
            script = (
                f"dd if={quoted(self._path)} bs={SEGMENT_BYTES} skip={index} count=1 2>/dev/null"
            )
            data = self._store.command(script, f"read {printable(self._path)}")
            require_length(data, length, self._path)
            sink.write(index * SEGMENT_BYTES, data)
            advance(length)
            sink.arrived(index)

    def close(self) -> None:
        """Nothing stays open between two segments."""


@contextlib.contextmanager
def scp_errors(store: ShellStore, path: str) -> Iterator[None]:
    """Translate what the scp package raises."""
    scp = need("scp")
    try:
        yield
    except scp.SCPException as error:
        message = f"scp cannot write {printable(path)} on {store.name}: {printable(error)}"
        kind = error_kind(str(error))
        raise kind(message, SHELL_HINTS.get(kind, "")) from error


def connect(settings: SSHSettings, purpose: Purpose = "look") -> Store:
    """The store at the other end of an SSH connection: by SFTP, or where there is none by scp."""
    connection = SSHConnection(settings)
    try:
        try:
            return SFTPStore(connection, purpose)
        except NoSFTPError as error:
            store = ShellStore(connection)
            log.warning("%s: using the old scp protocol", error)
            return store
    except BaseException:
        connection.close()
        raise


# ── rsync ────────────────────────────────────────────────────────────────────────────────────────


def rsync_send(
    store: Store, source: Source, part: str, held_bytes: int, progress: Progress
) -> Moved:
    """The counterpart of send_segments: the system's rsync over the system's ssh.

    What `part` holds already, rsync finds out by itself.
    """
    del held_bytes
    if not isinstance(store, SSHStore) or not isinstance(source, FileSource):
        raise UsageError("rsync sends a file to a server; for a folder here use --method local")
    if not store.can_hash:
        raise AccessError(
            f"{store.name} runs no commands, and rsync needs one there", "use --method scp"
        )
    digest = file_sha256(source.path)
    progress.begin("sending", source.size)
    try:
        moved = _run_rsync(
            store, _local_argument(source.path), _remote_argument(store, part), progress
        )
    finally:
        progress.end()
    how = _compare(store, store.check(part), part, source.total, digest)
    return Moved(source.total, moved, digest, how)


def rsync_fetch(store: Store, remote: FileInfo, part: Path, progress: Progress) -> Moved:
    """The counterpart of fetch_segments: the system's rsync over the system's ssh."""
    if not isinstance(store, SSHStore):
        raise UsageError("rsync fetches from a server; for a folder here use --method local")
    if not store.can_hash:
        raise AccessError(
            f"{store.name} runs no commands, and rsync needs one there", "use --method scp"
        )
    check = store.check(remote.path)
    progress.begin("fetching", remote.size)
    try:
        with local_errors(part):
            stream = open_for_update(part)
        with stream:
            lock_part(stream, part)
            origin, destination = _remote_argument(store, remote.path), _local_argument(part)
            moved = _run_rsync(store, origin, destination, progress)
    finally:
        progress.end()
    digest = file_sha256(part)
    try:
        how = _check_fetched(store, check, remote, part, digest)
    except IntegrityError:
        part.unlink(missing_ok=True)
        raise
    return Moved(remote.size, moved, digest, how)


def _local_argument(path: Path) -> str:
    return os.path.abspath(path)  # never an option, never host:path


def _remote_argument(store: SSHStore, path: str) -> str:
    hostname = store.connection.hostname
    host = f"[{hostname}]" if ":" in hostname else hostname
    return f"{host}:{'./' + path if path.startswith('-') else path}"


def _run_rsync(store: SSHStore, origin: str, destination: str, progress: Progress) -> int:
    """Run rsync, showing its progress; return the bytes it moved. Continues a partial file."""
    program = shutil.which("rsync")
    if program is None:
        raise MissingPackageError(
            "rsync is not installed here", "apt-get install rsync, or use --method scp"
        )
    settings = store.connection.settings
    limit = [f"--bwlimit={max(1, settings.limit_rate // KIB)}"] if settings.limit_rate else []
    with _rsync_shell(store.connection) as shell:
        command = [
            program, "-s", "--ignore-times", "--inplace", "--partial", "--no-whole-file", "--times",
            "--stats", "--info=progress2", f"--timeout={max(1, round(settings.timeout))}", *limit,
            "-e", shell, "--", origin, destination,
        ]  # fmt: skip
        with subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
        ) as process:  # fmt: skip
            try:
                output = _follow_rsync(process, progress)
            except BaseException:
                process.terminate()
                raise
        if process.returncode != 0:
            raise _rsync_error(store, process.returncode, output.errors)
    sent = re.search(rb"Literal data: ([\d,.]+)", output.output)
    return int(re.sub(rb"\D", b"", sent[1])) if sent else 0


def _follow_rsync(process: subprocess.Popen[bytes], progress: Progress) -> Completed:
    errors: list[bytes] = []
    stdout, stderr = cast("IO[bytes]", process.stdout), cast("IO[bytes]", process.stderr)
    reader = threading.Thread(target=lambda: errors.append(stderr.read()), daemon=True)
    reader.start()
    output, done = b"", 0
    for chunk in iter(lambda: os.read(stdout.fileno(), 64 * KIB), b""):
        output = (output + chunk)[-64 * KIB :]
        if counts := re.findall(rb"\s([\d,]+)\s+\d+%", chunk):
            now = int(counts[-1].replace(b",", b""))
            progress.advance(now - done)
            done = now
    reader.join()
    return Completed(process.wait(), output, printable_lines(b"".join(errors)))


@contextlib.contextmanager
def _rsync_shell(connection: SSHConnection) -> Iterator[str]:
    """The ssh command line for rsync -e: the connection's settings and the very key it verified."""
    if shutil.which("ssh") is None:
        raise MissingPackageError(
            "ssh is not installed here", "apt-get install openssh-client, or use --method scp"
        )
    key = connection.transport.get_remote_server_key()
    with tempfile.TemporaryDirectory(prefix="cloud_services-") as folder:
        known_hosts = Path(folder, "known_hosts")
        known_hosts.write_text(f"server {key.get_name()} {key.get_base64()}\n")
        options = {
            "UserKnownHostsFile": known_hosts, "GlobalKnownHostsFile": os.devnull,
            "HostKeyAlias": "server", "StrictHostKeyChecking": "yes", "UpdateHostKeys": "no",
            "ServerAliveInterval": max(1, round(connection.settings.timeout / 3)),
            "ConnectTimeout": round(CONNECT_SECONDS), "LogLevel": "ERROR",
            "BatchMode": "no" if connection.settings.ask_passphrase else "yes",
        }  # fmt: skip
        for name in ("proxyjump", "proxycommand"):
            if connection.config.get(name, "none") != "none":
                options[name] = connection.config[name]
        words = ["ssh", "-p", str(connection.port), "-l", connection.user]
        for identity in connection.identities():
            words += ["-i", identity]
        for name, value in options.items():
            words += ["-o", f"{name}={value}"]
        yield " ".join(_rsync_quoted(word) for word in words)


def _rsync_quoted(word: str) -> str:
    """A word of rsync's -e: it knows quotes, doubled inside, and no other escape (rsync(1))."""
    return "'" + word.replace("'", "''") + "'" if re.search(r"[\s'\"]", word) else word


def _rsync_error(store: SSHStore, status: int, errors: str) -> CloudError:
    """Rsync's exit values (rsync(1)) as errors."""
    if "command not found" in errors or "rsync: not found" in errors or status == 127:
        return MissingPackageError(
            f"rsync is not installed on {store.name}", "install it there, or use --method scp"
        )
    if (kind := error_kind(errors)) is not TransferError:
        return kind(f"rsync: {errors}", SHELL_HINTS.get(kind, ""))
    if status in (10, 12, 30, 35, 255):
        return LinkLostError(
            f"rsync lost {store.name}: {errors or f'status {status}'}", SAME_COMMAND
        )
    return TransferError(f"rsync failed with status {status}: {errors}", SAME_COMMAND)
