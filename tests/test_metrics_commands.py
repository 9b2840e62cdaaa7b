"""The commands about runs, with the real TensorBoard: here, over a real sshd, out of a bucket."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from cloud_services import S3Sync
from tensorboard_views import newest_run
from tests.conftest import SCRIPT, Run, needs
from tests.s3_servers import RcloneServer
from tests.servers import SSHServer, free_port, wait_until
from training_metrics import TrainingMetrics

LOGS = Path("workspace/models/logs")


@pytest.fixture(autouse=True)
def _needs_tensorboard() -> None:
    needs("tensorboard")


def train(name: str, epochs: int = 3, root: Path = LOGS, **config: float) -> Path:
    """A run whose losses fall."""
    with TrainingMetrics(name, log_root=root, config=config) as metrics:
        for epoch in range(epochs):
            metrics.log_epoch(epoch, train_loss=1 / (epoch + 1), val_loss=2 / (epoch + 1))
    return newest_run(root)


class Running:
    """A command that runs until it is interrupted."""

    def __init__(self, *words: object, env: Mapping[str, str] = {}) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), *map(str, words)], env={**os.environ, **env},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def url(self) -> str:
        """The address that it prints first."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        match = re.search(r"http://\S+", line)
        assert match, line + (self.process.stderr.read() if self.process.stderr else "")
        return match[0]

    def interrupt(self) -> tuple[int, str]:
        """Ctrl-C; its exit code, and what it said on stderr."""
        self.process.send_signal(signal.SIGINT)
        _, errors = self.process.communicate(timeout=30)
        return self.process.returncode, errors

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()  # unlike a kill, it ends what it has started
        self.process.communicate(timeout=30)


def tags(url: str) -> set[str]:
    """The runs that a TensorBoard shows with scalars."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"{url}/data/plugin/scalars/tags", timeout=10) as answer:
        return set(json.load(answer))


def is_gone(url: str) -> bool:
    try:
        tags(url)
    except OSError:
        return True
    return False


def test_the_newest_run_is_shown_until_ctrl_c(tmp_path: Path) -> None:
    train("first")
    time.sleep(0.01)
    newest = train("second")
    with Running("start-tensorboard", "--port", free_port()) as board:
        url = board.url()
        assert wait_until(lambda: tags(url) == {"."}, 20)
        code, errors = board.interrupt()
    assert code == 0, errors
    assert is_gone(url)
    assert newest.name.startswith("second")


def test_all_shows_every_run(tmp_path: Path) -> None:
    names = {train("first").name, train("second").name}
    with Running("start-tensorboard", "--all", "--port", free_port()) as board:
        url = board.url()
        assert wait_until(lambda: tags(url) == names, 20)


def test_a_taken_port_is_passed_over_and_said() -> None:
    train("first")
    port = free_port()
    with (
        Running("start-tensorboard", "--port", port) as one,
        Running("start-tensorboard", "--port", (one.url(), port)[1]) as other,
    ):
        assert other.url() != f"http://localhost:{port}"
        assert f"port {port} is taken" in other.interrupt()[1]


@pytest.mark.parametrize("words", [(), ("--all",), ("--logdir", "elsewhere")])
def test_no_logs_are_a_clear_error(run: Run, words: tuple[str, ...]) -> None:
    done = run("start-tensorboard", *words)
    assert done.returncode == 4
    assert "does not exist" in done.stderr or "no TensorBoard logs" in done.stderr
    assert len(done.stderr.splitlines()) <= 2


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SSHServer]:
    with SSHServer(tmp_path / "server") as running:
        yield running


def reaching(server: SSHServer) -> list[object]:
    return ["--host-ssh", server.host, "--ssh-port", server.port, "--user", server.user,
            "--identity", server.identity]  # fmt: skip


def test_logs_on_a_server_are_shown_here_and_nothing_is_left_there(
    server: SSHServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = tmp_path / "there"
    train("remote", root=there)
    tools = tmp_path / "bin"
    tools.mkdir()
    program = tools / "tensorboard"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m tensorboard.main "$@"\n')
    program.chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    with SSHServer(tmp_path / "box", config=[f'SetEnv PATH="{path}" HOME="{tmp_path}"']) as box:
        remote_port = free_port()
        words = ["start-tensorboard", *reaching(box), "--port", free_port()]
        words += ["--remote-port", remote_port, "--logdir", there]
        with Running(*words, env=box.environment) as board:
            url = board.url()
            assert wait_until(lambda: len(tags(url)) == 1, 30)
            box.kill_sessions()  # a cut: what is shown comes back by itself
            assert wait_until(lambda: not is_gone(url), 30)
            code, errors = board.interrupt()
        assert code == 0, errors
        assert is_gone(url)
        assert wait_until(lambda: is_gone(f"http://127.0.0.1:{remote_port}"), 10), errors


def test_a_server_without_tensorboard_says_what_to_install_there(
    server: SSHServer, tmp_path: Path
) -> None:
    train("remote", root=tmp_path / "logs")
    with SSHServer(tmp_path / "box", config=['SetEnv PATH="/usr/bin:/bin"']) as box:
        words = ["start-tensorboard", *reaching(box), "--logdir", tmp_path, "--port", free_port()]
        with Running(*words, "--remote-port", free_port(), env=box.environment) as board:
            _, errors = board.process.communicate(timeout=60)
            assert board.process.returncode == 3, errors
    assert "there: pip install tensorboard" in errors


def test_runs_that_only_exist_in_the_bucket_are_mirrored_and_refreshed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RcloneServer(tmp_path / "s3") as storage:
        for name, value in (storage.env() | {"S3_BUCKET": storage.bucket}).items():
            monkeypatch.setenv(name, value)
        first = train("first", root=tmp_path / "runs")
        S3Sync().upload_logs(first)
        words = ("start-tensorboard", "--s3", "--refresh", "1", "--port", free_port())
        with Running(*words) as board:
            url = board.url()
            assert wait_until(lambda: tags(url) == {first.name}, 30)
            second = train("second", root=tmp_path / "runs")
            S3Sync().upload_logs(second)
            assert wait_until(lambda: tags(url) == {first.name, second.name}, 40)


def test_a_tunnel_alone_forwards_and_ends_with_ctrl_c(server: SSHServer, tmp_path: Path) -> None:
    site = subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(port := free_port())],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        words = ["tunnel", "--host", server.host, "--port", server.port, "--user", server.user]
        words += ["--identity", str(server.identity), "--remote-port", port]
        with Running(*words, "--local-port", free_port(), env=server.environment) as tunnel:
            url = tunnel.url()
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

            def answers() -> bool:
                with opener.open(url, timeout=10) as answer:
                    return bool(answer.status == 200)

            assert wait_until(answers, 20)
            assert tunnel.interrupt()[0] == 0
    finally:
        site.kill()
        site.wait()


def test_runs_are_listed_and_compared(run: Run) -> None:
    one, other = train("first", 3, rate=0.1), train("second", 5, rate=0.2)
    done = run("list-runs")
    assert done.returncode == 0, done.stderr
    assert one.name in done.stdout
    assert "0.4" in next(line for line in done.stdout.splitlines() if other.name in line)
    listed = json.loads(run("list-runs", "--json").stdout)
    assert {entry["name"] for entry in listed} == {one.name, other.name}
    done = run("compare-runs", one.name, other.name, "--plot", "curves.html")
    assert done.returncode == 0, done.stderr
    assert "rate" in done.stdout
    assert "<svg" in Path("curves.html").read_text("utf-8")


def test_an_unknown_run_is_named_with_those_there_are(run: Run) -> None:
    train("first")
    done = run("compare-runs", "frist", "second")
    assert done.returncode == 4
    assert "hint:" in done.stderr


def test_wandb_sync_without_runs_says_where_it_looked(run: Run) -> None:
    done = run("wandb-sync")
    assert done.returncode == 4
    assert "workspace/models/logs" in done.stderr
