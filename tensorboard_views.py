"""TensorBoard for cloud_services: here, on an SSH server, or over logs that are in a bucket.

It is TensorBoard's own program that is started and stopped; this file finds what to show, a port
that is free, and waits until it answers. cloud_services imports it when start-tensorboard runs.
"""

from __future__ import annotations

import contextlib
import fnmatch
import http.client
import ipaddress
import json
import logging
import os
import posixpath
import re
import shlex
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from cloud_services import (
    SAME_COMMAND,
    CloudError,
    LinkLostError,
    MissingPackageError,
    NotFoundError,
    S3Sync,
    UsageError,
    local_errors,
    printable,
    require_installed,
)
from ssh_transport import quoted
from ssh_tunnel import LOOPBACK, Tunnel, open_listener

EVENT_FILES = "events.out.tfevents.*"
OWN_SCREEN = ("darwin", "win32")
AGAIN = "run the same command again"
START_SECONDS = 60.0
LOOK_SECONDS = 0.2
OTHER_SECONDS, MOST_MISSES = 5.0, 3
"""One that somebody else started is looked at so often, and may give no answer so many times."""
LAST_BYTES = 64 * 1024
MOST_LINES, LONGEST_LINE = 3, 200
"""So much is shown of what a program said last."""

log = logging.getLogger("cloud_services")


def newest_run(logs: str | Path) -> Path:
    """The folder below `logs` whose event file was written last. Raises NotFoundError."""
    with local_errors(logs):
        os.listdir(logs)
    found = [(written, path) for path in _event_files(logs) if (written := _written(path))]
    if not found:
        raise NotFoundError(
            f"there are no TensorBoard logs in {printable(logs)}",
            "train first, or name another folder with --logdir",
        )
    return max(found)[1].parent


def _event_files(logs: str | Path) -> Iterator[Path]:
    """What may be one by its name; folders that cannot be read are passed over."""
    for folder, _, files in os.walk(logs):
        yield from (Path(folder, name) for name in fnmatch.filter(files, EVENT_FILES))


def _written(path: Path) -> int:
    """When a file was written; 0 for what is none, or cannot be asked."""
    with contextlib.suppress(OSError):
        status = path.stat()
        return status.st_mtime_ns if stat.S_ISREG(status.st_mode) else 0
    return 0


def require_logs(folder: str | Path) -> Path:
    """The folder, when there is any event file below it. Raises NotFoundError."""
    newest_run(folder)
    return Path(folder)


class TensorBoard:
    """A TensorBoard of this machine; use it with `with`. Raises MissingPackageError, CloudError."""

    def __init__(self, logs: Path, port: int, host: str = "localhost") -> None:
        """A port that is taken becomes the next free one, 0 any; `url` says which when it runs.

        host: a name or an address of this machine; 0.0.0.0 or :: are all of its addresses.
        """
        require_installed("tensorboard")
        self._host, self._wanted = host, port
        self._logs = _as_argument(str(logs))
        self._said = tempfile.TemporaryFile()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TensorBoard:
        try:
            self._start()
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def _start(self) -> None:
        address, self.port = _free_address(self._host, self._wanted)
        self.url = f"http://{_browsable(self._host, address)}:{self.port}"
        self._probed = f"http://{_browsable(address, address)}:{self.port}"
        self.is_open = not _ip(address).is_loopback
        """Whether other machines can reach it."""
        command = [
            sys.executable, "-m", "tensorboard.main", f"--logdir={self._logs}", f"--host={address}",
            f"--port={self.port}", "--reload_interval=5",
        ]  # fmt: skip
        self._said.truncate(self._said.seek(0))
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said,
            start_new_session=True,
        )  # fmt: skip

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.stop()

    def _wait_until_it_answers(self) -> None:
        until = time.monotonic() + START_SECONDS
        while not _is_same_place(shown_by(self._probed), self._logs):
            if self._lost_its_port():
                self._start()
            self.wait(LOOK_SECONDS)
            if time.monotonic() > until:
                raise CloudError(f"TensorBoard does not answer: {self._last_words()}")

    def _has_ended(self) -> bool:
        return self._process is None or self._process.poll() is not None

    def _lost_its_port(self) -> bool:
        """Whether it ended because another program listened there before it did."""
        return self._has_ended() and _free_address(self._host, self.port)[1] != self.port

    def wait(self, seconds: float) -> bool:
        """Wait; True. Raises CloudError when it has ended."""
        time.sleep(seconds)
        if self._has_ended():
            raise CloudError(f"TensorBoard ended: {self._last_words()}", AGAIN)
        return True

    def _last_words(self) -> str:
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - LAST_BYTES))
        return last_words(self._said.read())

    def stop(self) -> None:
        """End it."""
        process, self._process = self._process, None
        if process is not None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._said.close()


def _free_address(host: str, port: int) -> tuple[str, int]:
    """An address of a host, and a port that is free there, and at localhost: TensorBoard asks."""
    while True:
        with contextlib.closing(open_listener(port, others=True, host=host)) as listener:
            address, found = listener.getsockname()[:2]
        with socket.socket() as probe:
            if probe.connect_ex((LOOPBACK, found)):
                return str(address), int(found)
        port = found + 1 if port else 0


def _as_argument(folder: str) -> str:
    """A folder that TensorBoard takes for neither an option nor somebody's home."""
    return f"./{folder}" if folder.startswith(("-", "~")) else folder


def _browsable(host: str, address: str) -> str:
    """What a browser of this machine calls a host with this address."""
    ip = _ip(address)
    if ip.is_unspecified:
        return LOOPBACK if ip.version == 4 else "[::1]"
    return f"[{host}]" if ":" in host else host


def _ip(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.partition("%")[0])


def shown_by(url: str) -> str:
    """What the TensorBoard at this address shows; empty: none answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/data/environment", timeout=5) as answer:
            said = json.loads(answer.read(LAST_BYTES))
    except (OSError, ValueError, http.client.HTTPException):  # it may be anything that listens
        return ""
    location = said.get("data_location", "") if isinstance(said, dict) else ""
    return str(location)


def _is_same_place(one: str, other: str) -> bool:
    """Whether two folders are the same, as far as letters tell that JSON may have mangled."""
    plain = [re.sub(r"[^ -~]+", "?", folder) for folder in (one, other)]
    return plain[0] == plain[1]


def last_words(said: bytes) -> str:
    """The last lines of a program that tell something, in one line of bounded length."""
    lines = [line.strip() for line in said.decode("utf-8", "replace").splitlines()]
    told = [line[:LONGEST_LINE] for line in lines if line and not line.startswith("Traceback")]
    return printable("; ".join(told[-MOST_LINES:])) or "it said nothing"


# ── on a server ──────────────────────────────────────────────────────────────────────────────────

# The shell there has TensorBoard as its child, and passes on what that says. Every few seconds it
# writes a line: when that fails, or nobody takes it any more, the connection has gone, and with it
# goes TensorBoard. So nothing is left running there, however this side ends. Where there is setsid
# it leads a group of processes: the program may be a script that runs the real one.
RUN_THERE = """
tool=$(command -v tensorboard) || tool='python3 -m tensorboard.main'
$(command -v setsid) $tool --logdir={logs} --host={host} --port={port} --reload_interval=5 \\
    </dev/null 2>&1 &
board=$!
end() {{ kill -TERM -$board || kill $board; }}
trap '' PIPE
trap end HUP TERM
echo "{started} $board"
while kill -0 $board; do echo || end; sleep 2; done 2>/dev/null
wait $board
echo "{ended} $?"
"""
STARTED, ENDED = "cloud_services: TensorBoard is process", "cloud_services: TensorBoard ended with"

END_THERE = """
is_ours() {{ case $(ps -o args= -p {pid} || tr '\\0' ' ' </proc/{pid}/cmdline) in
    (*tensorboard*) true ;; (*) false ;; esac; }} 2>/dev/null
tries=0
while is_ours && [ $tries -lt 20 ]; do
    kill -TERM -{pid} || kill {pid}; sleep 0.3; tries=$((tries + 1))
done 2>/dev/null
"""
"""Ends a process if it is still the one that was started: another may have its number by now."""

NEWEST = 'n=$1; for f; do if [ "$f" -nt "$n" ]; then n=$f; fi; done; printf "%s\\0" "$n"'
FIND_THERE = """
unset CDPATH; cd; cd {folder} 2>/dev/null || exit
printf '%s\\0' "$PWD"
find . -type f -name {pattern} -exec sh -c {newest} sh {{}} + | xargs -0 sh -c {newest} sh
"""
"""The folder's full name, then the file in it that was written last. A name may hold anything, so
each ends with a NUL; find may call the inner shell several times, hence the second round."""


class RemoteTensorBoard:
    """The TensorBoard at the other end of a tunnel: the one that runs there, or one we start.

    Use it with `with`. What it started ends with it, and with the connection; after a cut it is
    started again.
    """

    def __init__(self, tunnel: Tunnel, port: int, logs: str, everything: bool) -> None:
        """logs: the folder there; the newest run in it is shown, or with `everything` all."""
        self._tunnel, self._port = tunnel, port
        self._logs, self._everything = logs, everything
        self._program: _Program | None = None
        self._next_look, self._misses = 0.0, 0
        self.shows = logs

    @property
    def is_ours(self) -> bool:
        """Whether it was started by us; otherwise it was running there."""
        return self._program is not None

    def __enter__(self) -> RemoteTensorBoard:
        try:
            with self._tunnel.silenced():
                self.shows = shown_by(self._tunnel.probed)
            if not self.shows:
                self.shows = self._folder_to_show()
                self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.stop()

    def wait(self, seconds: float) -> bool:
        """Wait; False when the tunnel has ended. Raises CloudError when TensorBoard has."""
        if not self._tunnel.wait(seconds):
            return False
        program = self._program
        if program is None:
            self._look_at_the_other()
            return True
        if not program.is_over():
            return True
        if program.status is not None:
            raise CloudError(f"TensorBoard ended on the server: {program.last_words()}", AGAIN)
        if self._tunnel.is_linked:  # again: it has ended with its connection
            with contextlib.suppress(LinkLostError):
                self._end(program.pid)
                self._start()
        return True

    def _look_at_the_other(self) -> None:
        """Raise when the one that was running there before us is gone."""
        if time.monotonic() < self._next_look or not self._tunnel.is_linked:
            return
        with self._tunnel.silenced():
            there = shown_by(self._tunnel.probed) or not self._tunnel.is_linked
        self._misses = 0 if there else self._misses + 1
        self._next_look = time.monotonic() + (LOOK_SECONDS if self._misses else OTHER_SECONDS)
        if self._misses > MOST_MISSES:
            raise CloudError("TensorBoard ended on the server: it was not started from here", AGAIN)

    def _start(self) -> None:
        script = RUN_THERE.format(
            logs=shlex.quote(self.shows), host=LOOPBACK, port=self._port, started=STARTED,
            ended=ENDED,
        )  # fmt: skip
        self._program = program = _Program(self._tunnel.start(script))
        until = time.monotonic() + START_SECONDS
        with self._tunnel.silenced():
            while not _is_same_place(shown_by(self._tunnel.probed), self.shows):
                self._tunnel.wait(LOOK_SECONDS)
                if program.is_over():
                    raise self._not_started(program)
                if time.monotonic() > until:
                    raise CloudError(f"TensorBoard does not answer: {program.last_words()}")

    def _not_started(self, program: _Program) -> CloudError:
        """Why it ended at once."""
        said = program.last_words()
        if program.status is None:
            return LinkLostError("the connection broke while TensorBoard started", SAME_COMMAND)
        if "could not bind" in said or "already in use" in said:
            return UsageError(
                f"port {self._port} is taken on the server by something else",
                f"choose another there: --remote-port {self._port % 65535 + 1}",
            )
        if program.status == "127" or "No module named" in said:
            hint = "there: pip install tensorboard"
            return MissingPackageError(f"TensorBoard does not start on the server: {said}", hint)
        return CloudError(f"TensorBoard does not start on the server: {said}")

    def _folder_to_show(self) -> str:
        """The full name of the folder there, or of that of the newest run in it."""
        script = FIND_THERE.format(
            folder=_there(self._logs), pattern=shlex.quote(EVENT_FILES), newest=shlex.quote(NEWEST)
        )
        found = self._tunnel.run(script)
        names = os.fsdecode(found.output).split("\0")
        if len(names) < 3 or not names[1]:
            raise NotFoundError(
                f"there are no TensorBoard logs in {printable(self._logs)} on the server",
                "name the folder there with --logdir",
            )
        newest = posixpath.normpath(posixpath.join(names[0], posixpath.dirname(names[1])))
        return names[0] if self._everything else newest

    def _end(self, pid: str) -> None:
        if pid:
            self._tunnel.run(END_THERE.format(pid=pid))

    def stop(self) -> None:
        """End what was started; say so when that cannot be done at once."""
        program, self._program = self._program, None
        if program is None:
            return
        try:
            if program.status is None:
                self._end(program.pid)
        except CloudError as error:
            log.warning(
                "%s: TensorBoard ends there by itself when the server notices that the connection"
                " has gone; at once with, there: kill %s", error, program.pid,
            )  # fmt: skip
        finally:
            program.close()


def _there(folder: str) -> str:
    """A folder as a word of the shell there, where ~ is the home."""
    if folder == "~" or folder.startswith("~/"):
        return '"$HOME"' + shlex.quote(folder[1:])
    return quoted(folder)


class _Program:
    """What runs in a channel: its process, its end, and what it said last."""

    def __init__(self, channel: Any) -> None:
        self.pid = ""
        self.status: str | None = None
        """What it ended with; None while it runs, and when only its connection has ended."""
        self._channel = channel
        self._said = b""
        self._thread = threading.Thread(target=self._listen, name="said-there", daemon=True)
        self._thread.start()

    def is_over(self) -> bool:
        """Whether it, or its connection, has ended."""
        return not self._thread.is_alive()

    def last_words(self) -> str:
        """The end of what it said."""
        return last_words(self._said)

    def close(self) -> None:
        """Let go of it; over there that is noticed."""
        self._channel.close()

    def _listen(self) -> None:
        rest = b""
        with contextlib.suppress(OSError, EOFError):
            while data := self._channel.recv(LAST_BYTES):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._hear(line)
                rest = rest[-LAST_BYTES:]
        self._hear(rest)

    def _hear(self, line: bytes) -> None:
        words = line.decode("utf-8", "replace").strip()
        if words.startswith(STARTED):
            self.pid = "".join(filter(str.isdecimal, words.rpartition(" ")[2]))
        elif words.startswith(ENDED):
            self.status = words.rpartition(" ")[2]
        elif words:
            self._said = (self._said + line + b"\n")[-LAST_BYTES:]


# ── from a bucket ────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def mirrored_logs(sync: S3Sync, folder: Path, run: str | None, seconds: float) -> Iterator[Path]:
    """A folder that keeps in step with the logs in the bucket, looked at every so many seconds."""
    sync.download_logs(run, folder)
    stopped = threading.Event()

    def keep_in_step() -> None:
        told = ""
        while not stopped.wait(seconds):
            try:
                said = "; ".join(map(printable, sync.download_logs(run, folder).failures))
            except (CloudError, OSError) as error:  # a token that has expired may be renewed
                said = printable(error)
            if said and said != told:
                log.warning("%s", said)
            told = said

    worker = threading.Thread(target=keep_in_step, name="logs-from-s3", daemon=True)
    worker.start()
    try:
        yield folder / run if run else folder
    finally:
        stopped.set()
        worker.join(5)


def opened_in_browser(url: str) -> None:
    """Show a page, where there is a browser."""
    import webbrowser

    if not (
        os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") or sys.platform in OWN_SCREEN
    ):
        log.warning("no display: open %s yourself", url)
        return
    webbrowser.open(url)
