"""Real servers for the tests and the benchmarks, on loopback only.

A client is never judged by a server of its own making: `SSHServer` is the system's own sshd,
started in the foreground with keys made for the occasion, and `ssh_agent` the system's own agent.
Everything a server needs lives under the directory it is given and ends with its context manager.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NoReturn

LOOPBACK = "127.0.0.1"

# Debian's package for each program a test may ask for.
PACKAGES = {
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "scp": "openssh-client",
    "ssh-add": "openssh-client",
    "ssh-agent": "openssh-client",
    "ssh-keygen": "openssh-client",
}

# Servers are often installed where only root's PATH looks.
SYSTEM_FOLDERS = ("/usr/sbin", "/usr/local/sbin", "/sbin", "/opt/homebrew/sbin")


# ---------------------------------------------------------------------------
# Programs
# ---------------------------------------------------------------------------


def find_program(program: str) -> str | None:
    """The absolute path of a program on PATH or in a system folder, None without it."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *SYSTEM_FOLDERS])
    return shutil.which(program, path=path)


def require(program: str) -> str:
    """The absolute path of a program; without it the test is skipped, and in CI it fails."""
    found = find_program(program)
    if found is None:
        _give_up(f"{program} is not installed: apt-get install {PACKAGES.get(program, program)}")
    return found


def _give_up(reason: str) -> NoReturn:
    """End the running test: a failure where CI is set, else a skip; without pytest, exit."""
    try:
        import pytest
    except ImportError:
        raise SystemExit(reason) from None
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


# ---------------------------------------------------------------------------
# Ports and processes
# ---------------------------------------------------------------------------


PORTS_OF_A_WORKER = 1000
FIRST_PORT, MOST_WORKERS = 18_000, 14


def _ports() -> Iterator[int]:
    """The ports of this pytest-xdist worker, again and again, from one that differs each time.

    They lie below those that the system chooses (32768 and more on Linux): no other worker, no
    client and no server that asks for any port can take one between its choice and its use.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % MOST_WORKERS
    first = FIRST_PORT + worker * PORTS_OF_A_WORKER
    while True:
        begin = random.randrange(PORTS_OF_A_WORKER)
        for number in range(PORTS_OF_A_WORKER):
            yield first + (begin + number) % PORTS_OF_A_WORKER


_next_port = _ports()


def free_port() -> int:
    """A loopback port that nobody listened on a moment ago, and nobody else is about to."""
    for port in _next_port:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind((LOOPBACK, port))
            return port
    raise AssertionError  # it never ends


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether a condition became true within the given time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def descendants(pid: int) -> list[int]:
    """Every living process below a process, parents before their children."""
    table = subprocess.run(
        ["ps", "-A", "-o", "pid=", "-o", "ppid="], capture_output=True, text=True, check=True
    )
    children: dict[int, list[int]] = {}
    for line in table.stdout.splitlines():
        child, parent = map(int, line.split())
        children.setdefault(parent, []).append(child)
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(0), [])
        found += below
        waiting += below
    return found


def _kill(pids: Sequence[int]) -> None:
    """Kill processes by id; one that is gone already is fine."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


# ---------------------------------------------------------------------------
# Keys
# ---------------------------------------------------------------------------


def make_key(path: Path, passphrase: str = "", kind: str = "ed25519") -> Path:
    """Make a key pair (PATH and PATH.pub) and return the private half's path."""
    words = ["-q", "-t", kind, "-N", passphrase, "-C", "test", "-f", str(path)]
    subprocess.run([require("ssh-keygen"), *words], check=True, stdin=subprocess.DEVNULL)
    return path


def public_key(private: Path) -> str:
    """The public line that belongs to a private key file."""
    return Path(f"{private}.pub").read_text(encoding="ascii").strip()


def fingerprint_of(private: Path) -> str:
    """The SHA256:… fingerprint of a key, as ssh-keygen prints it."""
    words = [require("ssh-keygen"), "-l", "-f", f"{private}.pub"]
    shown = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return shown.split()[1]


# ---------------------------------------------------------------------------
# OpenSSH's server
# ---------------------------------------------------------------------------


@dataclass
class SSHServer:
    """OpenSSH's sshd on a loopback port, for one user with one key; start it with `with`.

    `sftp=False` leaves the SFTP subsystem out, `commands=False` allows nothing but SFTP.
    `config` holds further sshd_config lines, which win over the ones written here.
    `host_key` reuses a host key, `port` a port (0: any free one).
    Both stay the same over stop() and start().
    """

    root: Path
    sftp: bool = True
    commands: bool = True
    config: Sequence[str] = ()
    host_key: Path | None = None
    port: int = 0
    host: str = field(default=LOOPBACK, init=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        """Make the folders and the keys, and choose a port."""
        self.sshd = require("sshd")
        self.root = self.root.resolve()
        self.log = self.root / "sshd.log"
        self.storage = self.root / "storage"
        self.home = self.root / "home"
        self.remote_home = self.root / "remote_home"
        self.authorized_keys = self.root / "authorized_keys"
        self.known_hosts = self.home / ".ssh" / "known_hosts"
        self.storage.mkdir(parents=True, exist_ok=True)
        self.remote_home.mkdir(exist_ok=True)
        self.known_hosts.parent.mkdir(parents=True, exist_ok=True)
        self.known_hosts.parent.chmod(0o700)
        self.identity = make_key(_fresh(self.root / "client_key"))
        if self.host_key is None:
            self.host_key = make_key(_fresh(self.root / "host_key"))
        self._port_is_fixed = self.port != 0
        self._set_port(self.port or free_port())
        self.authorize(public_key(self.identity))

    def __enter__(self) -> SSHServer:
        """Start listening."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the listener and every session."""
        self.stop()

    # What a client needs to know -------------------------------------------

    @property
    def user(self) -> str:
        """The account to log in as: the one that runs the test."""
        import pwd

        return pwd.getpwuid(os.getuid()).pw_name

    @property
    def fingerprint(self) -> str:
        """The host key's SHA256:… fingerprint."""
        assert self.host_key is not None
        return fingerprint_of(self.host_key)

    @property
    def known_hosts_line(self) -> str:
        """The line that makes a client trust this server."""
        return self.known_hosts_line_at(self.port)

    @property
    def environment(self) -> dict[str, str]:
        """The environment for a client: a home that knows this server, no agent, no settings."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PAPERSPACE_")}
        clean.pop("SSH_AUTH_SOCK", None)
        clean["HOME"] = str(self.home)
        return clean

    @property
    def log_text(self) -> str:
        """What the server has logged so far, over all starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def known_hosts_line_at(self, port: int) -> str:
        """The known_hosts line for this server's key behind another port, a proxy's say."""
        assert self.host_key is not None
        kind, key = public_key(self.host_key).split()[:2]
        return f"[{self.host}]:{port} {kind} {key}"

    def trust_port(self, port: int) -> None:
        """Let the client's home know this server behind another port too."""
        with self.known_hosts.open("a", encoding="ascii") as lines:
            lines.write(self.known_hosts_line_at(port) + "\n")

    def authorize(self, public_key_text: str) -> None:
        """Accept one more client key from now on."""
        with self.authorized_keys.open("a", encoding="utf-8") as lines:
            lines.write(public_key_text.strip() + "\n")
        self.authorized_keys.chmod(0o600)

    # Life and death --------------------------------------------------------

    def start(self) -> None:
        """Listen, and return once the server answers; a lost race for the port is run again."""
        for _ in range(5):
            if self._start_once():
                return
            if self._port_is_fixed or "Address already in use" not in self.log_text:
                break
            self._set_port(free_port())
        raise RuntimeError(f"sshd did not start on port {self.port}:\n{self.log_text[-2000:]}")

    def stop(self) -> None:
        """Kill the listener and every session it forked; stopping twice is fine."""
        if self._process is None:
            return
        if self._process.poll() is None:
            # A stopped listener forks nothing while its sessions are listed.
            self._process.send_signal(signal.SIGSTOP)
            _kill([self._process.pid, *descendants(self._process.pid)])
        self._process.wait()
        self._process = None

    def sessions(self) -> list[int]:
        """The processes of the live sessions."""
        assert self._process is not None, "the server is not running"
        return descendants(self._process.pid)

    def kill_sessions(self) -> int:
        """Kill the live sessions, keep listening, and say how many processes ended."""
        sessions = self.sessions()
        _kill(sessions)
        return len(sessions)

    def _start_once(self) -> bool:
        """Start the process once; False when it ended instead of answering."""
        if os.getuid() == 0:
            Path("/run/sshd").mkdir(mode=0o755, parents=True, exist_ok=True)
        config = self.root / "sshd_config"
        config.write_text("\n".join(self._config_lines()) + "\n", encoding="utf-8")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.sshd, "-D", "-e", "-f", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        if wait_until(self._answers_or_ended) and self._process.poll() is None:
            return True
        self.stop()
        return False

    def _answers_or_ended(self) -> bool:
        """Whether waiting is over: the server sent its banner, or the process is gone."""
        assert self._process is not None
        if self._process.poll() is not None:
            return True
        try:
            with socket.create_connection((self.host, self.port), timeout=5) as probe:
                return probe.recv(4) == b"SSH-"
        except OSError:
            return False

    def _set_port(self, port: int) -> None:
        """Use this port, and let the client's home know the server there."""
        self.port = port
        self.known_hosts.write_text(self.known_hosts_line + "\n", encoding="ascii")

    def _config_lines(self) -> list[str]:
        """sshd_config: the caller's lines first, for sshd keeps the first value it reads."""
        extra = list(self.config)
        match = next((i for i, line in enumerate(extra) if line.startswith("Match")), len(extra))
        lines = [
            *extra[:match],
            f"ListenAddress {self.host}:{self.port}",
            f"HostKey {_quoted(self.host_key)}",
            f"AuthorizedKeysFile {_quoted(self.authorized_keys).replace('%', '%%')}",
            # A shell's start-up files are the machine's own business, not the test's.
            f'SetEnv HOME="{self.remote_home}"',
            "PidFile none",
            "StrictModes no",
            "UsePAM no",
            "PubkeyAuthentication yes",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PrintMotd no",
            "UseDNS no",
            "MaxStartups 100",
            "LogLevel VERBOSE",
        ]
        lines += ["Subsystem sftp internal-sftp"] if self.sftp else []
        lines += [] if self.commands else ["ForceCommand internal-sftp"]
        lines += ["PerSourcePenalties no"] if _openssh_version() >= (9, 8) else []
        return lines + extra[match:]


def _fresh(path: Path) -> Path:
    """A key path with nothing in the way, so that ssh-keygen does not ask."""
    path.unlink(missing_ok=True)
    return path


def _quoted(path: Path | None) -> str:
    """A path as one word of sshd_config."""
    return f'"{path}"'


def _openssh_version() -> tuple[int, int]:
    """The installed OpenSSH's version, (0, 0) for another ssh."""
    shown = subprocess.run(
        [require("ssh"), "-V"], capture_output=True, text=True, check=True
    ).stderr
    found = re.search(r"OpenSSH_(\d+)\.(\d+)", shown)
    return (int(found[1]), int(found[2])) if found else (0, 0)


# ---------------------------------------------------------------------------
# OpenSSH's agent
# ---------------------------------------------------------------------------


@contextlib.contextmanager
def ssh_agent(*keys: Path) -> Iterator[str]:
    """An ssh-agent that holds these (unencrypted) keys; yields the value for SSH_AUTH_SOCK."""
    # A socket's path must be short, so it does not go below the test's own folder.
    folder = Path(tempfile.mkdtemp(prefix="agent"))
    address = folder / "socket"
    agent = subprocess.Popen(
        [require("ssh-agent"), "-D", "-a", str(address)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        if not wait_until(address.exists):
            raise RuntimeError("ssh-agent did not start")
        environment = {**os.environ, "SSH_AUTH_SOCK": str(address)}
        for key in keys:
            words = [require("ssh-add"), "-q", str(key)]
            subprocess.run(words, env=environment, check=True, stdin=subprocess.DEVNULL)
        yield str(address)
    finally:
        agent.kill()
        agent.wait()
        shutil.rmtree(folder, ignore_errors=True)
