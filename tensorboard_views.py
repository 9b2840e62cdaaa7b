"""TensorBoard for cloud_services: here, on an SSH server, or over logs that are in a bucket.

It is TensorBoard's own program that is started and stopped; this file finds what to show, a port
that is free, and waits until it answers. cloud_services imports it when start-tensorboard runs.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import posixpath
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from cloud_services import (
    CloudError,
    MissingPackageError,
    NotFoundError,
    S3Sync,
    local_errors,
    printable,
    require_installed,
)
from ssh_tunnel import LOOPBACK, Tunnel, open_listener

EVENT_FILES = "events.out.tfevents.*"
OWN_SCREEN = ("darwin", "win32")
START_SECONDS = 60.0
LOOK_SECONDS = 0.2

log = logging.getLogger("cloud_services")


def newest_run(logs: str | Path) -> Path:
    """The folder below `logs` whose event file was written last. Raises NotFoundError."""
    with local_errors(logs):
        files = (path for path in Path(logs).rglob(EVENT_FILES) if path.is_file())
        found = [(path.stat().st_mtime_ns, path) for path in files]
    if not found:
        raise NotFoundError(
            f"there are no TensorBoard logs in {printable(logs)}",
            "train first, or name another folder with --logdir",
        )
    return max(found)[1].parent


def require_logs(folder: str | Path) -> Path:
    """The folder, when there is any event file below it. Raises NotFoundError."""
    newest_run(folder)
    return Path(folder)


class TensorBoard:
    """A TensorBoard of this machine; use it with `with`. Raises MissingPackageError, CloudError."""

    def __init__(self, logs: Path, port: int, host: str = "localhost") -> None:
        """port: taken, it becomes the next free one; 0 is any."""
        require_installed("tensorboard")
        with contextlib.closing(open_listener(port, others=True)) as listener:
            self.port = int(listener.getsockname()[1])
        self._logs = str(logs)
        self._command = [
            sys.executable, "-m", "tensorboard.main", "--logdir", str(logs), "--host", host,
            "--port", str(self.port), "--reload_interval", "5",
        ]  # fmt: skip
        self.url = f"http://{host}:{self.port}"
        self._said = tempfile.TemporaryFile()
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> TensorBoard:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=self._said, stderr=self._said,
            start_new_session=True,
        )  # fmt: skip
        try:
            self._wait_until_it_answers()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.stop()

    def _wait_until_it_answers(self) -> None:
        until = time.monotonic() + START_SECONDS
        while shown_by(self.port) != self._logs:
            self.wait(LOOK_SECONDS)  # raises when ours has ended: another took the port meanwhile
            if time.monotonic() > until:
                raise CloudError(f"TensorBoard does not answer: {self._last_words()}")

    def wait(self, seconds: float) -> None:
        """Wait; raise CloudError when it has ended."""
        time.sleep(seconds)
        if self._process is None or self._process.poll() is not None:
            raise CloudError(f"TensorBoard ended: {self._last_words()}", "pip install tensorboard")

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = self._said.read()[-4000:].decode("utf-8", "replace").splitlines()
        return printable(
            next((line for line in reversed(lines) if line.strip()), "it said nothing")
        )

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


def shown_by(port: int) -> str:
    """What the TensorBoard on this loopback port shows; empty: none answers."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{LOOPBACK}:{port}/data/environment", timeout=5) as answer:
            said = json.load(answer)
    except (OSError, ValueError, http.client.HTTPException):  # it may be anything that listens
        return ""
    location = said.get("data_location", "") if isinstance(said, dict) else ""
    return str(location)


# ── on a server ──────────────────────────────────────────────────────────────────────────────────


class RemoteTensorBoard:
    """The TensorBoard at the other end of a tunnel: the one that runs there, or one we start.

    Use it with `with`; what it started it stops in the end.
    """

    def __init__(self, tunnel: Tunnel, port: int, logs: str, everything: bool) -> None:
        """logs: the folder there; the newest run in it is shown, or with `everything` all."""
        self._tunnel, self._port = tunnel, port
        self._logs, self._everything = logs, everything
        self.pid = ""
        """The process that was started there; empty: none was."""
        self.shows = logs

    def __enter__(self) -> RemoteTensorBoard:
        self._tunnel.quiet = True
        try:
            self.shows = shown_by(self._tunnel.local_port)
            if not self.shows:
                self._start()
        except BaseException:
            self.stop()
            raise
        finally:
            self._tunnel.quiet = False
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.stop()

    def _start(self) -> None:
        newest = self._newest_run()
        self.shows = self._logs if self._everything else newest
        done = self._tunnel.run(
            "tool=$(command -v tensorboard) || tool='python3 -m tensorboard.main';"
            f" nohup $tool --logdir {shlex.quote(self.shows)} --host {LOOPBACK}"
            f" --port {self._port} --reload_interval 5 </dev/null >/dev/null 2>&1 & echo $!"
        )
        self.pid = done.output.decode("ascii", "replace").strip()
        until = time.monotonic() + START_SECONDS
        while shown_by(self._tunnel.local_port) != self.shows:
            if time.monotonic() > until or not self._runs():
                raise MissingPackageError(
                    "TensorBoard does not start on the server", "there: pip install tensorboard"
                )
            self._tunnel.wait(LOOK_SECONDS)

    def _runs(self) -> bool:
        return self.pid.isdecimal() and self._tunnel.run(f"kill -0 {self.pid}").status == 0

    def _newest_run(self) -> str:
        found = self._tunnel.run(
            f"cd {shlex.quote(self._logs)} && find . -name {shlex.quote(EVENT_FILES)}"
            " -exec ls -t {} + | head -n 1"
        )
        newest = found.output.decode("utf-8", "surrogateescape").rstrip("\n")
        if not newest:
            raise NotFoundError(
                f"there are no TensorBoard logs in {printable(self._logs)} on the server",
                "name the folder there with --logdir",
            )
        return posixpath.normpath(posixpath.join(self._logs, posixpath.dirname(newest)))

    def stop(self) -> None:
        """End what was started; say so when that is not possible."""
        pid, self.pid = self.pid, ""
        if not pid.isdecimal():
            return
        try:
            self._tunnel.run(f"kill {pid}")
        except CloudError as error:
            log.warning("TensorBoard still runs there as process %s: %s", pid, error)


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
            except CloudError as error:  # a token that has expired may be renewed
                said = str(error)
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
