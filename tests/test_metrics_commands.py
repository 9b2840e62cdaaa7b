"""The commands about runs, with the real TensorBoard: here, over a real sshd, out of a bucket."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import tensorboard_views
from cloud_services import Console, Outcome, S3Sync, main
from ssh_tunnel import Tunnel, open_listener
from tensorboard_views import RemoteTensorBoard, newest_run
from tests.conftest import SCRIPT, Run, needs
from tests.s3_servers import RcloneServer
from tests.servers import SSHServer, free_port, wait_until
from tests.test_tunnel import Link, settings
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

    def json_url(self) -> str:
        """The address in the document that it prints with --json, as far as that has come."""
        assert self.process.stdout is not None
        said = ""
        while not said.endswith("}\n"):
            said += (line := self.process.stdout.readline())
            assert line, said
        return str(json.loads(said)["url"])


def processes(text: str) -> list[int]:
    """The living processes with this in their command line."""
    words = ["ps", "-A", "-ww", "-o", "pid=,stat=,args="]
    table = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in table.splitlines()]
    return [int(pid) for pid, state, command in rows if text in command and "Z" not in state]


def fetched(url: str) -> bytes:
    """What answers there; nothing where none does, or a cut link ends the answer."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=10) as answer:
            return bytes(answer.read())
    except (OSError, http.client.HTTPException):
        return b""


def tags(url: str) -> set[str]:
    """The runs that a TensorBoard shows with scalars."""
    return set(json.loads(fetched(f"{url}/data/plugin/scalars/tags") or "[]"))


def is_gone(url: str) -> bool:
    return not fetched(url)


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


@pytest.mark.parametrize("command", ["start-tensorboard", "start-tensorboard --host-ssh", "tunnel"])
def test_ctrl_c_is_a_good_end_from_the_moment_it_is_offered(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = []

    def interrupted_there(console: Console, outcome: Outcome) -> None:
        offered.append(outcome.rows[-1])
        raise KeyboardInterrupt

    monkeypatch.setattr(Console, "show_now", interrupted_there)
    logs = train("first", root=tmp_path / "logs")
    with box_with(tmp_path) as box:
        monkeypatch.setenv("HOME", str(box.home))
        words = ["start-tensorboard", "--logdir", str(logs), "--port", str(free_port())]
        if "--host-ssh" in command:
            words += [*map(str, reaching(box)), "--remote-port", str(free_port())]
        if command == "tunnel":
            words = ["tunnel", "--host", box.host, "--port", str(box.port), "--user", box.user]
            words += ["--identity", str(box.identity), "--remote-port", str(free_port())]
        assert main(words) == 0
    assert offered == [("to stop", "Ctrl-C")]


def test_all_shows_every_run(tmp_path: Path) -> None:
    names = {train("first").name, train("second").name}
    with Running("start-tensorboard", "--all", "--port", free_port()) as board:
        url = board.url()
        assert wait_until(lambda: tags(url) == names, 20)


def test_a_port_that_another_takes_before_tensorboard_does_is_passed_over_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train("first")
    with socket.create_server(("127.0.0.1", free_port())) as other:
        taken = other.getsockname()[1]
        choices = iter([("127.0.0.1", taken)])
        choose = tensorboard_views._free_address
        monkeypatch.setattr(
            tensorboard_views, "_free_address", lambda *asked: next(choices, None) or choose(*asked)
        )
        with tensorboard_views.TensorBoard(LOGS, taken) as board:
            assert board.port != taken
            assert wait_until(lambda: bool(tags(board.url)), 20)


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


REAL = f'exec {sys.executable} -m tensorboard.main "$@"'


def box_with(tmp_path: Path, tensorboard: str = REAL) -> SSHServer:
    """A server with this script as the program tensorboard."""
    tools = tmp_path / "bin"
    tools.mkdir()
    program = tools / "tensorboard"
    program.write_text(f"#!/bin/sh\n{tensorboard}\n")
    program.chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    return SSHServer(tmp_path / "box", config=[f'SetEnv PATH="{path}" HOME="{tmp_path}"'])


def test_logs_on_a_server_are_shown_here_and_nothing_is_left_there(
    tmp_path: Path,
) -> None:
    there = tmp_path / "there"
    train("remote", root=there)
    with box_with(tmp_path) as box:
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


def test_a_tensorboard_that_dies_on_the_server_is_said_in_one_line(tmp_path: Path) -> None:
    train("remote", root=tmp_path / "logs")
    script = f'echo "starting \\033[31m" >&2; {REAL.removeprefix("exec ")}; echo "died of boredom"'
    with box_with(tmp_path, script) as box:
        port = free_port()
        words = ["start-tensorboard", *reaching(box), "--logdir", tmp_path, "--port", free_port()]
        with Running(*words, "--remote-port", port, env=box.environment) as board:
            board.url()
            (real,) = processes(f"{sys.executable} -m tensorboard.main --logdir={tmp_path}")
            os.kill(real, signal.SIGKILL)
            _, errors = board.process.communicate(timeout=60)
    assert board.process.returncode == 1
    assert re.search(r"^error: TensorBoard ended on the server: .*died of boredom", errors)
    assert len(errors.splitlines()) <= 2
    assert "\033" not in errors


def test_a_tensorboard_of_somebody_else_that_ends_is_said(tmp_path: Path) -> None:
    train("remote", root=tmp_path / "logs")
    port = free_port()
    with (
        box_with(tmp_path) as box,
        Running("start-tensorboard", "--logdir", tmp_path / "logs", "--port", port) as other,
    ):
        other.url()
        words = ["start-tensorboard", *reaching(box), "--port", free_port(), "--remote-port", port]
        with Running(*words, env=box.environment) as board:
            board.url()
            other.interrupt()
            _, errors = board.process.communicate(timeout=60)
    assert board.process.returncode == 1
    assert "was running there already" in errors
    assert "error: TensorBoard ended on the server" in errors


@pytest.mark.parametrize(
    "script", [REAL, f"{REAL.removeprefix('exec ')}; :"], ids=["itself", "a script"]
)
@pytest.mark.parametrize("when", ["cut", "closed"])
def test_ctrl_c_leaves_nothing_running_there_even_during_a_cut(
    tmp_path: Path, when: str, script: str
) -> None:
    train("remote", root=tmp_path / "logs")
    with box_with(tmp_path, script) as box, contextlib.closing(Link(box.port)) as link:
        box.trust_port(link.port)
        port = free_port()
        words = ["start-tensorboard", *reaching(box), "--logdir", tmp_path / "logs"]
        words[words.index("--ssh-port") + 1] = link.port
        words += ["--port", free_port(), "--remote-port", port]
        with Running(*words, env=box.environment) as board:
            board.url()
            assert processes(f"--port={port}")
            if when == "cut":
                link.cut()
            code, errors = board.interrupt()
        assert code == 0, errors
        assert ("by itself" in errors) == (when == "cut"), errors
        assert wait_until(lambda: not processes(f"--port={port}"), 30)


def test_after_a_cut_tensorboard_is_started_there_again(tmp_path: Path) -> None:
    train("remote", root=tmp_path / "logs")
    with box_with(tmp_path) as box, contextlib.closing(Link(box.port)) as link:
        box.trust_port(link.port)
        port = free_port()
        words = ["start-tensorboard", *reaching(box), "--logdir", tmp_path / "logs"]
        words[words.index("--ssh-port") + 1] = link.port
        words += ["--port", free_port(), "--remote-port", port]
        with Running(*words, env=box.environment) as board:
            url = board.url()
            first = processes(f"--port={port}")
            link.cut()
            link.mend()
            assert wait_until(lambda: not is_gone(url), 60)
            assert wait_until(lambda: not set(processes(f"--port={port}")) & set(first), 30)
            assert wait_until(lambda: not is_gone(url), 60)
            assert board.interrupt()[0] == 0
        assert wait_until(lambda: not processes(f"--port={port}"), 30)


@pytest.mark.parametrize(
    ("script", "code", "error"),
    [
        (
            'printf "\\033[31mno module\\n%010000d\\n" 7 >&2; exit 1',
            1,
            r"does not start .*\\x1b.*0000",
        ),
        (
            'echo "ModuleNotFoundError: No module named tensorboard" >&2; exit 1',
            3,
            "does not start",
        ),
        (REAL, 2, "port .* is taken on the server by something else"),
    ],
    ids=["says why", "is not installed", "port is taken"],
)
def test_why_tensorboard_does_not_start_there_is_said(
    tmp_path: Path, script: str, code: int, error: str
) -> None:
    train("remote", root=tmp_path / "logs")
    with box_with(tmp_path, script) as box, socket.create_server(("127.0.0.1", 0)) as taken:
        words = ["start-tensorboard", *reaching(box), "--logdir", tmp_path / "logs"]
        words += ["--port", free_port(), "--remote-port", taken.getsockname()[1]]
        taken.settimeout(0.1)
        with Running(*words, env=box.environment) as board:
            _, errors = board.process.communicate(timeout=90)
    first, *hint = errors.splitlines()
    assert board.process.returncode == code, errors
    assert re.search(error, first), first[:500]
    assert len(first) < 1000
    assert ("--remote-port" in "".join(hint)) == (code == 2)


@pytest.mark.parametrize(
    "name", ["with two  spaces", 'it\'s "quoted" $(id)', "-logs", "line\nbreak", "~", "ты"]
)
@pytest.mark.parametrize("everything", [True, False], ids=["a folder", "its newest run"])
def test_odd_names_on_a_server_are_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, everything: bool
) -> None:
    home = tmp_path / "home"
    logs = home / name
    older, newer = train("older", root=logs), train("newer", root=logs)
    os.utime(next(older.iterdir()), (1e9, 1e9))
    shown = logs if everything else newer
    if not everything:
        newer.rename(logs / name)
        shown = logs / name
    with box_with(tmp_path) as box:
        for variable, value in box.environment.items():
            monkeypatch.setenv(variable, value)
        with Tunnel(settings(box), free_port(), open_listener(0)) as tunnel:
            board = RemoteTensorBoard(tunnel, 6006, str(logs), everything)
            assert board._folder_to_show() == str(shown)
            for typed in (f"home/{name}", f"~/home/{name}", f"./home/{name}"):
                board = RemoteTensorBoard(tunnel, 6006, typed, everything)
                assert board._folder_to_show() == str(shown), typed


def test_a_folder_with_an_odd_name_is_shown_from_a_server(tmp_path: Path) -> None:
    name = "-it's a\nlog"
    train("remote", root=tmp_path / name)
    with box_with(tmp_path) as box:
        words = ["start-tensorboard", *reaching(box), f"--logdir={name}", "--port", free_port()]
        with Running(*words, "--remote-port", free_port(), env=box.environment) as board:
            url = board.url()
            assert wait_until(lambda: len(tags(url)) == 1, 30)


FLAGS_THAT_DO_NOT_FIT = [
    ("--s3", "--host-ssh", "box"),
    ("--s3", "--logdir", "logs"),
    ("--s3", "--all"),
    ("--all", "--logdir", "logs"),
    ("--host", "::", "--host-ssh", "box"),
    ("--remote-port", "6007"),
    ("--ssh-port", "22"),
    ("--user", "me"),
    ("--identity", "key"),
    ("--accept-new-host-key",),
    ("--run", "one"),
    ("--refresh", "5"),
    ("--bucket", "b"),
    ("--bucket", "b", "--host-ssh", "box"),
    ("--limit-rate", "1M", "--host-ssh", "box"),
    ("--remote-port", "6007", "--s3"),
    ("--timeout", "5"),
]


@pytest.mark.parametrize("words", FLAGS_THAT_DO_NOT_FIT, ids=" ".join)
def test_flags_that_would_do_nothing_are_a_usage_error(run: Run, words: tuple[str, ...]) -> None:
    train("first", epochs=1)
    done = run("start-tensorboard", *words)
    assert done.returncode == 2, done.stderr
    assert words[0] in done.stderr
    assert re.search("exclude each other|means nothing without", done.stderr)


def test_hints_name_flags_that_the_command_has(run: Run) -> None:
    done = run("start-tensorboard", "--host-ssh", "host.invalid", "--port", str(free_port()))
    assert done.returncode == 7
    assert "check --host-ssh," in done.stderr
    taken = str(free_port())
    with socket.create_server(("127.0.0.1", int(taken))):
        done = run("tunnel", "--host", "host.invalid", "--remote-port", taken)
    assert done.returncode == 2
    assert "--local-port" in done.stderr


ALL_IPV4 = "0.0.0.0"  # noqa: S104 - TensorBoard listens there for a moment


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.parametrize(
    ("host", "shown"),
    [("localhost", "localhost"), (ALL_IPV4, "127.0.0.1"), ("127.0.0.2", "127.0.0.2"),
     ("::1", "[::1]"), ("::", "[::1]")],
)  # fmt: skip
def test_the_address_that_is_printed_opens_whatever_it_listens_on(host: str, shown: str) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    train("first")
    with Running("start-tensorboard", "-q", "--host", host, "--port", free_port()) as board:
        url = board.url()
        assert re.fullmatch(rf"http://{re.escape(shown)}:\d+", url)
        assert wait_until(lambda: tags(url) == {"."}, 20)
        assert board.process.stdout is not None
        board.process.send_signal(signal.SIGINT)
        said = board.process.stdout.read()
        assert board.process.wait(30) == 0
    assert ("open to  " in said) == (host in (ALL_IPV4, "::"))


def test_the_address_of_another_machine_is_refused(run: Run) -> None:
    train("first")
    done = run("start-tensorboard", "--host", "203.0.113.7")
    assert done.returncode == 2
    assert "no address of this machine" in done.stderr


@pytest.mark.parametrize("where", ["127.0.0.1", "127.0.0.2"])
def test_a_port_is_passed_over_that_is_taken_at_the_address_or_for_tensorboard(where: str) -> None:
    """TensorBoard takes no port on which anything answers at localhost."""
    train("first")
    with socket.create_server((where, 0)) as taken:
        port = taken.getsockname()[1]
        with Running("start-tensorboard", "--host", "127.0.0.2", "--port", port) as board:
            url = board.url()
            assert re.fullmatch(r"http://127\.0\.0\.2:\d+", url)
            assert not url.endswith(f":{port}")
            assert f"port {port} is taken" in board.interrupt()[1]


@pytest.mark.parametrize("ignored", [False, True], ids=["a terminal is closed", "under nohup"])
def test_a_closed_terminal_leaves_no_tensorboard_behind(ignored: bool) -> None:
    train("first")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        board = Running("start-tensorboard", "--port", free_port())
    finally:
        signal.signal(signal.SIGHUP, before)
    with board:
        url = board.url()
        board.process.send_signal(signal.SIGHUP)
        board.process.send_signal(signal.SIGHUP)  # from the shell, and from the terminal
        if ignored:
            assert not is_gone(url)
            board.process.terminate()
        assert board.process.wait(30) == 143
        assert is_gone(url)


def test_with_json_there_is_one_document_even_when_it_fails_later() -> None:
    train("first")
    port = free_port()
    with Running("start-tensorboard", "--json", "--port", port) as board:
        board.json_url()
        for pid in processes(f"--port={port}"):
            os.kill(pid, signal.SIGKILL)
        rest, errors = board.process.communicate(timeout=30)
    assert (board.process.returncode, rest) == (1, "")
    assert errors.startswith("error: TensorBoard ended")


def test_a_tunnel_whose_output_nobody_reads_ends_well(server: SSHServer) -> None:
    words = ["tunnel", "--host", server.host, "--port", server.port, "--user", server.user]
    words += ["--identity", str(server.identity), "--remote-port", free_port()]
    with Running(*words, "--local-port", free_port(), env=server.environment) as tunnel:
        tunnel.url()
        assert tunnel.process.stderr is not None
        tunnel.process.stderr.close()
        tunnel.process.stderr = None
        server.kill_sessions()
        assert tunnel.process.wait(30) == 0


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
            assert wait_until(lambda: not is_gone(url), 20)
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
