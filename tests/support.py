"""What the tests share: the command line, small data, a trusted server, and a Hub."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests.local_hub import WRITE_TOKEN, LocalHub
from tests.servers import SSHServer, require

ROOT = Path(__file__).resolve().parents[1]
TOOL = [sys.executable, str(ROOT / "cloud_services.py")]
KIB, MIB = 1024, 1024 * 1024


def cli(
    *arguments: object, server: SSHServer | None = None, cwd: Path, **more: Any
) -> subprocess.CompletedProcess[str]:
    """Run one command line to its end, as that server's trusting client."""
    more.setdefault("env", environment(server))
    more.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(
        [*TOOL, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=120, **more
    )


def start_cli(*arguments: object, server: SSHServer | None, cwd: Path) -> subprocess.Popen[str]:
    """Start one command line, to be disturbed."""
    return subprocess.Popen(
        [*TOOL, *map(str, arguments)],
        cwd=cwd,
        env=environment(server),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def environment(server: SSHServer | None) -> dict[str, str]:
    """A clean environment; with a server, one whose home trusts it."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PAPERSPACE_")}
    return server.environment if server else clean


def flags(server: SSHServer, port: int | None = None) -> list[str]:
    """The connection flags for a server, or for a link in front of it."""
    words = ["--host", server.host, "--port", str(port or server.port)]
    return [*words, "--user", server.user, "--identity", str(server.identity)]


def document(done: subprocess.CompletedProcess[str]) -> Any:
    """The JSON document a command printed."""
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def random_bytes(count: int, seed: int = 1) -> bytes:
    """Bytes that do not compress, the same in every run."""
    return random.Random(seed).randbytes(count)


def random_file(path: Path, count: int, seed: int = 1) -> Path:
    """A file of such bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(random_bytes(count, seed))
    return path


def sha256(path: Path) -> str:
    """The SHA-256 of a file, by the standard library."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def workspace(folder: Path, feature_bytes: int = 20_000) -> Path:
    """A small workspace with everything in it."""
    root = folder / "workspace"
    for number, split in enumerate(("train", "val", "test")):
        random_file(root / f"prepared/features/gold_{split}.csv", feature_bytes, number)
    for number in range(3):
        random_file(root / f"raw_data/ticks/{number}.csv", 5_000, 10 + number)
    random_file(root / "raw_data/cache/bars.bin", 3_000, 20)
    random_file(root / "models/checkpoints/last.ckpt", 9_000, 30)
    random_file(root / "models/metrics/metrics.json", 500, 31)
    random_file(root / "models/logs/events.out.tfevents.1", 700, 32)
    random_file(root / "prepared/scalers/scaler.pkl", 800, 33)
    return root


def bare_server(folder: Path, *tools: str) -> SSHServer:
    """A server without SFTP whose commands find nothing but these tools and a shell."""
    places = folder / "tools"
    places.mkdir()
    for name in tools:
        os.symlink(require(name), places / name)
    os.symlink("/bin/sh", places / "sh")
    # A login shell may set its own PATH, so each command goes through a wrapper.
    wrapper = folder / "wrapper"
    run = 'exec /bin/sh -c "$SSH_ORIGINAL_COMMAND"'
    wrapper.write_text(f"#!/bin/sh\nPATH={places}; export PATH\n{run}\n")
    wrapper.chmod(0o755)
    server = SSHServer(folder / "bare", sftp=False)
    key = server.authorized_keys.read_text()
    server.authorized_keys.write_text(f'command="{wrapper}" {key}')
    return server


def parts(folder: Path) -> list[str]:
    """The unfinished files in a folder."""
    return [path.name for path in folder.iterdir() if path.name.endswith((".part", ".journal"))]


def wait_for(condition: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait until something is true; fail when it does not become so."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


# A command line in which no pause is longer than a moment; `time` runs on as always.
HURRIED = """
import sys, time
pause = time.sleep
time.sleep = lambda seconds: pause(min(seconds, 0.02))
sys.path.insert(0, sys.argv.pop(1))
import cloud_services, hf_transport
"""
RUN = "\nsys.exit(cloud_services.main(sys.argv[1:]))"


def hf(
    hub: LocalHub,
    *arguments: object,
    token: str | None = WRITE_TOKEN,
    env: Mapping[str, str] | None = None,
    hurried: bool | str = False,
    **more: Any,
) -> subprocess.CompletedProcess[str]:
    """Run one command line as a client of that Hub; `hurried` may hold lines to run before it."""
    if "input" not in more:
        more.setdefault("stdin", subprocess.DEVNULL)
    return subprocess.run(
        _hub_words(arguments, hurried), env=hub.env(token, **(env or {})), capture_output=True,
        encoding="utf-8", errors="surrogateescape", timeout=120, **more,
    )  # fmt: skip


def start_hf(
    hub: LocalHub, *arguments: object, hurried: bool | str = False
) -> subprocess.Popen[str]:
    """Start one command line as a client of that Hub, to be disturbed."""
    return subprocess.Popen(
        _hub_words(arguments, hurried),
        env=hub.env(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _hub_words(arguments: tuple[object, ...], hurried: bool | str) -> list[str]:
    words = TOOL
    if hurried:
        before = hurried if isinstance(hurried, str) else ""
        words = [sys.executable, "-c", HURRIED + before + RUN, str(ROOT)]
    return [*words, *map(str, arguments)]
