"""The Lightning callbacks: real trainings in processes of their own, against `rclone serve s3`."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import json
import logging
import os
import pickle
import re
import shlex
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import s3_callbacks
from cloud_services import CloudError, IntegrityError, LinkLostError, RefusedError, UsageError
from s3_callbacks import Courier, S3CheckpointCallback, S3LogsCallback, Version, Watch
from tests.conftest import needs
from tests.s3_servers import FaultProxy, RcloneServer, wait_for
from tests.servers import free_port
from tests.support import ROOT, random_file, sha256

EVERY_STEP = {"dirpath": "ckpt", "every_n_train_steps": 1, "save_top_k": -1, "save_last": True}
EVERY_OTHER = {**EVERY_STEP, "every_n_train_steps": 2}
SAVE_OTHER = {"uploads": {}, "checkpoints": [EVERY_OTHER]}


# ---------------------------------------------------------------------------
# Trainings
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[RcloneServer]:
    """One server for all tests; each has a prefix of its own."""
    needs("lightning")
    with RcloneServer(tmp_path_factory.mktemp("callbacks")) as running:
        yield running


@pytest.fixture
def proxy(server: RcloneServer) -> Iterator[FaultProxy]:
    """A proxy that spoils requests on demand."""
    with FaultProxy(server) as running:
        yield running


@dataclass
class Training:
    """One training in a folder of its own, with its own prefix in the bucket."""

    server: RcloneServer
    folder: Path
    url: str = ""

    @property
    def prefix(self) -> str:
        return hashlib.sha256(str(self.folder).encode()).hexdigest()[:12]

    def environment(self, **more: str) -> dict[str, str]:
        """Nothing of the caller's but the way to the server."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "S3_"))}
        ours = {"S3_PREFIX": self.prefix, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        return {**clean, **self.server.env(self.url), **ours, **more}

    def start(self, about: dict[str, Any], **more: str) -> subprocess.Popen[str]:
        """Begin a training, to be disturbed."""
        self.folder.mkdir(exist_ok=True)
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tests/lightning_run.py"), json.dumps(about)],
            cwd=self.folder, env=self.environment(**more), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def run(self, about: dict[str, Any], **more: str) -> Trained:
        """Train to the end."""
        return ended(self.start(about, **more))

    def reach(self, name: str, rank: int = 0) -> None:
        """Wait until this process of the training is at the step that has this name."""
        wait_for((self.folder / f"{name}.{rank}.reached").exists, 60)

    def go_on(self, name: str, rank: int = 0) -> None:
        (self.folder / f"{name}.{rank}.go").touch()

    def files(self) -> dict[str, Path]:
        """The checkpoints on the disk."""
        folder = self.folder / "ckpt"
        found = sorted(folder.rglob("*.ckpt"))
        return {str(path.relative_to(folder)): path for path in found}

    def stored(self, folder: str = "checkpoints") -> dict[str, str]:
        """The SHA-256 of what is in the bucket, by name."""
        start = f"{self.prefix}/{folder}/"
        names = (key.removeprefix(start) for key in self.server.all_keys() if key.startswith(start))
        return {name: self.digest(start + name) for name in names if "cloud_services" not in name}

    def digest(self, key: str) -> str:
        content = self.server.content(key)
        assert content is not None
        return hashlib.sha256(content).hexdigest()

    def require_all_stored(self, count: int) -> None:
        """Every checkpoint on the disk is in the bucket, with this very content."""
        written = self.written()
        assert len(written) == count, sorted(written)
        assert {name: self.stored().get(name) for name in written} == written

    def written(self) -> dict[str, str]:
        """The SHA-256 of each checkpoint on the disk, by name."""
        return {name: sha256(path) for name, path in self.files().items()}


@dataclass
class Trained:
    """How a training ended."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        assert self.status == 0, self.err
        return dict(json.loads(self.out))

    @property
    def complaints(self) -> list[str]:
        """What our callbacks said."""
        words = ("checkpoints to s3", "logs to s3", "missing of", "sent", "Traceback")
        return [line for line in self.err.splitlines() if any(word in line for word in words)]


def heard(process: subprocess.Popen[str], words: str) -> None:
    """Wait until a training has said this on stderr."""
    assert process.stderr is not None
    assert any(words in line for line in iter(process.stderr.readline, "")), words


def ended(process: subprocess.Popen[str], seconds: float = 100) -> Trained:
    """Wait for the end of a training."""
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return Trained(process.returncode, out, err)


@pytest.fixture
def training(server: RcloneServer, tmp_path: Path) -> Training:
    return Training(server, tmp_path / "run")


@pytest.fixture
def disturbed(server: RcloneServer, proxy: FaultProxy, tmp_path: Path) -> Training:
    """A training whose requests go through the proxy."""
    return Training(server, tmp_path / "run", proxy.url)


@pytest.fixture(scope="module")
def plain(server: RcloneServer, tmp_path_factory: Any) -> tuple[Training, Trained]:
    """The training of most tests, with callbacks that ENABLE_S3_SYNC=0 switches off."""
    alone = Training(server, tmp_path_factory.mktemp("plain") / "run")
    done = alone.run({**SAVE_OTHER, "logs": {}}, ENABLE_S3_SYNC="0")
    return alone, done


# ---------------------------------------------------------------------------
# What must arrive
# ---------------------------------------------------------------------------


def test_every_checkpoint_and_the_logs_are_in_the_bucket_that_the_environment_names(
    training: Training,
) -> None:
    needs("tensorboard")
    writers = [EVERY_OTHER, {**EVERY_OTHER, "monitor": "loss"}]
    about = {"uploads": {}, "logs": {}, "logger": "TensorBoardLogger", "checkpoints": writers}
    done = training.run(about)
    assert (done.document["missing"], done.complaints) == ([], [])
    names = set(training.files())
    assert {"last.ckpt", "last-v1.ckpt", "epoch=0-step=2.ckpt", "epoch=0-step=2-v1.ckpt"} <= names
    training.require_all_stored(10)
    logs = training.folder / "runs/lightning_logs/version_0"
    for path in logs.iterdir():
        assert training.stored("logs/version_0")[path.name] == sha256(path)
    assert len(training.stored("logs/version_0")) == 2  # the events and hparams.yaml
    assert done.document["threads"] == ["MainThread"]


def test_the_arguments_of_the_guide_name_bucket_and_folders_for_pytorch_lightning(
    training: Training,
) -> None:
    needs("pytorch_lightning")
    given = {"s3_bucket": training.server.bucket, "endpoint_url": training.server.url}
    about: dict[str, Any] = {
        **SAVE_OTHER, "package": "pytorch_lightning", "logger": "CSVLogger",
        "uploads": {**given, "s3_prefix": f"{training.prefix}/mine/checkpoints"},
        "logs": {**given, "s3_prefix": f"{training.prefix}/mine/logs"},
    }  # fmt: skip
    done = training.run(about, S3_BUCKET="", S3_PREFIX="elsewhere", AWS_ENDPOINT_URL="")
    assert (done.document["missing"], done.complaints) == ([], [])
    assert training.stored("mine/checkpoints") == training.written()
    metrics = training.folder / "runs/lightning_logs/version_0/metrics.csv"
    assert training.stored("mine/logs/version_0")["metrics.csv"] == sha256(metrics)
    assert not [key for key in training.server.all_keys() if key.startswith("elsewhere")]


def test_a_run_resumed_from_the_bucket_continues_at_the_right_step(
    training: Training, tmp_path: Path
) -> None:
    assert training.run({**SAVE_OTHER, "epochs": 1}).status == 0
    content = training.server.content(f"{training.prefix}/checkpoints/last.ckpt")
    assert content is not None
    fetched = tmp_path / "fetched.ckpt"
    fetched.write_bytes(content)
    again = Training(training.server, tmp_path / "again")
    done = again.run({**SAVE_OTHER, "epochs": 2, "ckpt_path": str(fetched)})
    assert (done.document["first_step"], done.document["step"]) == (4, 8)
    again.require_all_stored(3)


TWO_PROCESSES = {**SAVE_OTHER, "devices": 2, "batches": 16, "meet": {"4": "term"}}


def test_two_processes_send_each_checkpoint_once_even_when_they_are_terminated(
    disturbed: Training, proxy: FaultProxy
) -> None:
    process = disturbed.start(TWO_PROCESSES)
    for rank in range(2):
        disturbed.reach("term", rank)
    process.send_signal(signal.SIGTERM)
    done = ended(process)
    assert (done.status, done.complaints) == (0, [])
    disturbed.require_all_stored(3)
    named = [seen.path for seen in proxy.seen("PUT") if "step=" in seen.path]
    assert len(named) == len(set(named)) == 2


def test_what_was_written_arrives_even_when_lightning_hangs_in_its_handler_of_sigterm(
    disturbed: Training, proxy: FaultProxy
) -> None:
    proxy.fail("delay", method="PUT", seconds=3, times=10**6)
    process = disturbed.start(TWO_PROCESSES)
    for rank in range(2):
        disturbed.reach("term", rank)
    disturbed.go_on("term", 1)  # into a step that it cannot end alone: no handler runs meanwhile
    process.send_signal(signal.SIGTERM)
    try:
        wait_for(lambda: disturbed.stored() == disturbed.written(), 60)
        disturbed.require_all_stored(3)
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_checkpoints_written_by_another_thread_arrive_complete(training: Training) -> None:
    done = training.run({**SAVE_OTHER, "async_io": True, "width": 200_000, "epochs": 1})
    assert (done.document["missing"], done.complaints) == ([], [])
    training.require_all_stored(3)


def test_equal_names_in_two_folders_and_names_with_a_slash_stay_apart(training: Training) -> None:
    linked = {"filename": "{step}", "dirpath": "ckpt/a", "save_last": "link"}
    slash = {"filename": "{epoch}/{step}", "dirpath": "ckpt/b", "save_last": True}
    writers = [linked, {**slash, "monitor": "loss"}]
    done = training.run({"uploads": {}, "checkpoints": writers, "epochs": 1})
    assert done.document["missing"] == []
    files = training.written()
    assert training.stored() == {
        "step=4.ckpt": files["a/step=4.ckpt"],
        "last.ckpt": files["a/step=4.ckpt"],
        "epoch=0/step=4.ckpt": files["b/epoch=0/step=4.ckpt"],
        "b/last.ckpt": files["b/last.ckpt"],
    }


def test_a_newer_last_checkpoint_replaces_the_one_that_waits_and_removed_ones_are_forgotten(
    disturbed: Training, proxy: FaultProxy
) -> None:
    proxy.fail("delay", method="PUT", seconds=2)
    writer = {**EVERY_STEP, "save_top_k": 1}  # only the newest stays
    done = disturbed.run({
        "uploads": {}, "checkpoints": [writer], "batches": 20, "epochs": 1, "step_seconds": 0.05,
    })  # fmt: skip
    assert (done.document["missing"], done.complaints) == ([], [])
    disturbed.require_all_stored(2)
    sent = [seen.path for seen in proxy.seen("PUT")]
    assert len([path for path in sent if path.endswith("last.ckpt")]) <= 3
    assert len(sent) < 8  # of 40 that were written


# ---------------------------------------------------------------------------
# Storage that fails
# ---------------------------------------------------------------------------


def test_dead_storage_costs_a_training_one_warning_and_a_report(
    training: Training, plain: tuple[Training, Trained]
) -> None:
    reference = plain[1].document
    done = training.run(SAVE_OTHER, AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}")
    assert (done.document["weights"], done.document["step"]) == (reference["weights"], 8)
    assert done.document["seconds"] < reference["seconds"] + 5
    assert done.err.count("The training goes on") == 1
    assert "5 missing of the checkpoints" in done.err
    assert set(done.document["missing"]) == {str(p.resolve()) for p in training.files().values()}
    for path in training.files().values():
        assert f"python cloud_services.py s3-upload-checkpoint {shlex.quote(str(path))}" in done.err


def test_storage_that_dies_half_way_leaves_commands_that_send_the_rest(
    plain: tuple[Training, Trained], tmp_path: Path
) -> None:
    with RcloneServer(tmp_path / "server") as server:
        training = Training(server, tmp_path / "run")
        given = {"s3_bucket": server.bucket, "s3_prefix": f"{training.prefix}/checkpoints"}
        process = training.start({
            **SAVE_OTHER, "uploads": given, "meet": {"5": "half"},
            "constants": {"LAST_CHANCE_SECONDS": 3},
        })  # fmt: skip
        training.reach("half")
        wait_for(lambda: {"epoch=0-step=2.ckpt", "epoch=0-step=4.ckpt"} <= set(training.stored()))
        server.stop()
        training.go_on("half")
        done = ended(process)
        assert done.document["weights"] == plain[1].document["weights"]
        assert done.err.count("The training goes on") == 1
        server.start()
        commands = re.findall(r"^  python (cloud_services.py .+)", done.err, re.MULTILINE)
        assert len(commands) == 3  # two that were not sent, and the last one
        for line in commands:
            words = [sys.executable, *shlex.split(line)]
            environment = training.environment(S3_BUCKET="", S3_PREFIX="")
            subprocess.run(words, cwd=ROOT, env=environment, check=True, capture_output=True)
        training.require_all_stored(5)


def test_storage_that_comes_back_gets_what_it_missed(tmp_path: Path) -> None:
    needs("lightning")
    server = RcloneServer(tmp_path / "server")
    server.port = free_port()
    training = Training(server, tmp_path / "run")
    process = training.start({
        **SAVE_OTHER, "meet": {"4": "back", "7": "end"}, "constants": {"FIRST_PAUSE": 0.1},
    })  # fmt: skip
    training.reach("back")
    heard(process, "The training goes on")
    with server:
        training.go_on("back")
        training.reach("end")
        wait_for(lambda: {"epoch=0-step=2.ckpt", "epoch=1-step=6.ckpt"} <= set(training.stored()))
        training.go_on("end")
        done = ended(process)
        assert done.document["missing"] == []
        assert "The training goes on" not in done.err  # it was said once
        training.require_all_stored(5)


def test_storage_that_never_answers_is_not_waited_for_longer_than_the_grace_time(
    disturbed: Training, proxy: FaultProxy
) -> None:
    proxy.fail("delay", seconds=3600, times=10**6)
    done = disturbed.run({**SAVE_OTHER, "uploads": {"grace": 2}})
    assert done.document["seconds"] < 6
    assert "there was no time left" in done.err
    assert len(done.document["missing"]) == 5


# ---------------------------------------------------------------------------
# Early ends
# ---------------------------------------------------------------------------


def test_what_was_written_while_an_upload_hung_is_reported_too(
    disturbed: Training, proxy: FaultProxy
) -> None:
    proxy.fail("delay", seconds=3600, times=10**6)
    process = disturbed.start({**SAVE_OTHER, "uploads": {"grace": 1}, "meet": {"3": "hung"}})
    disturbed.reach("hung")
    wait_for(lambda: bool(proxy.log))
    disturbed.go_on("hung")
    assert len(ended(process).document["missing"]) == 5


def test_an_exception_ends_the_training_as_ever_after_everything_was_sent(
    disturbed: Training, proxy: FaultProxy
) -> None:
    proxy.fail("delay", method="PUT", seconds=1, times=10**6)
    writer = {**EVERY_OTHER, "save_on_exception": True}
    done = disturbed.run({"uploads": {}, "checkpoints": [writer], "break_at": 5})
    assert done.status == 1
    assert "ZeroDivisionError: made up" in done.err.splitlines()[-1]
    assert "epoch=1-step=5.ckpt" in disturbed.stored()
    disturbed.require_all_stored(4)


def test_a_second_training_of_the_same_trainer_sends_what_the_first_one_could_not(
    tmp_path: Path,
) -> None:
    needs("lightning")
    server = RcloneServer(tmp_path / "server")
    server.port = free_port()
    training = Training(server, tmp_path / "run")
    process = training.start({**SAVE_OTHER, "fits": 2, "epochs": 1, "meet": {"4": "second"}})
    training.reach("second")
    with server:
        training.go_on("second")
        done = ended(process)
        assert done.document["missing"] == []
        assert "3 missing of the checkpoints" in done.err
        training.require_all_stored(5)


def test_after_a_sigterm_what_was_written_is_sent(disturbed: Training, proxy: FaultProxy) -> None:
    proxy.fail("delay", method="PUT", seconds=1, times=10**6)
    process = disturbed.start({**SAVE_OTHER, "meet": {"4": "term"}})
    disturbed.reach("term")
    process.send_signal(signal.SIGTERM)
    done = ended(process)
    assert (done.status, done.complaints) == (0, [])  # Lightning's own: SIGTERM is no failure
    disturbed.require_all_stored(3)


def test_a_second_sigterm_ends_the_wait_with_a_report(
    disturbed: Training, proxy: FaultProxy
) -> None:
    proxy.fail("delay", method="PUT", seconds=3600, times=10**6)
    process = disturbed.start({
        **SAVE_OTHER, "meet": {"4": "term"}, "constants": {"ANNOUNCE_SECONDS": 0.3},
    })  # fmt: skip
    disturbed.reach("term")
    process.send_signal(signal.SIGTERM)
    heard(process, "still sending")
    process.send_signal(signal.SIGTERM)
    done = ended(process, 15)
    assert done.status == 0
    assert "3 missing of the checkpoints" in done.err


def test_a_sigterm_during_the_last_wait_shortens_it_and_then_ends_the_process(
    disturbed: Training, proxy: FaultProxy
) -> None:
    proxy.fail("delay", method="PUT", seconds=3600, times=10**6)
    process = disturbed.start({
        **SAVE_OTHER, "uploads": {"sigterm_grace": 0.5}, "constants": {"ANNOUNCE_SECONDS": 0.3},
    })  # fmt: skip
    heard(process, "still sending")
    process.send_signal(signal.SIGTERM)
    done = ended(process, 15)
    assert done.status == -signal.SIGTERM
    assert "5 missing of the checkpoints" in done.err


def test_ctrl_c_ends_the_last_wait_and_leaves_the_training_as_it_is(
    disturbed: Training, proxy: FaultProxy
) -> None:
    proxy.fail("delay", method="PUT", seconds=3600, times=10**6)
    process = disturbed.start({**SAVE_OTHER, "constants": {"ANNOUNCE_SECONDS": 0.3}})
    heard(process, "still sending")
    process.send_signal(signal.SIGINT)
    done = ended(process, 15)
    assert done.document["step"] == 8
    assert "5 missing of the checkpoints" in done.err


# ---------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------


def test_enable_s3_sync_0_makes_them_inert(plain: tuple[Training, Trained]) -> None:
    training, done = plain
    assert done.document["modules"] == []
    assert done.document["threads"] == ["MainThread"]
    assert (training.stored(), len(training.files()), done.complaints) == ({}, 5, [])


@pytest.fixture
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that name a bucket, for callbacks that never ask it."""
    needs("lightning")
    settings = {"S3_BUCKET": "bucket", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "key"}
    for name, value in {**settings, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("word", ["0", "false", "No", " off "])
def test_enable_s3_sync_is_read_from_env_files_too(
    word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("lightning")
    monkeypatch.delenv("ENABLE_S3_SYNC", raising=False)
    Path(".env").write_text(f"ENABLE_S3_SYNC='{word}'\n")
    assert not S3CheckpointCallback().enabled
    assert not S3LogsCallback().enabled


def test_missing_settings_end_a_training_before_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    needs("lightning")
    for name in [name for name in os.environ if name.startswith(("AWS_", "S3_"))]:
        monkeypatch.delenv(name)
    with pytest.raises(UsageError, match=r"no bucket is named.*S3_BUCKET in \.env"):
        S3CheckpointCallback()


@pytest.mark.usefixtures("_settings")
def test_launchers_may_send_them_to_other_processes() -> None:
    for kind in (S3CheckpointCallback, S3LogsCallback):
        there = pickle.loads(pickle.dumps(kind(s3_prefix="p/x")))  # noqa: S301 - our own
        assert (there.key, there.courier) == ("p/x", None)
        assert there.sync.bucket.name == "s3://bucket"


@pytest.mark.usefixtures("_settings")
def test_they_are_callbacks_to_every_lightning_that_is_installed() -> None:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        needs(name.split(".")[0])
        module = importlib.import_module(name)
        assert isinstance(S3LogsCallback(), module.Callback)
        assert isinstance(S3CheckpointCallback(), module.Callback)
        assert not isinstance(S3CheckpointCallback(), module.callbacks.Checkpoint)


@pytest.mark.parametrize("given", ["{}/checkpoints", "{}/elsewhere", "{}/x/checkpoints"])
def test_the_command_of_the_report_sends_a_file_to_where_it_belongs(
    given: str, training: Training, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in training.environment().items():
        monkeypatch.setenv(name, value)
    given = given.format(training.prefix)
    callback = S3CheckpointCallback(s3_bucket=training.server.bucket, s3_prefix=given)
    path = random_file(folder / "it's $(a) file.ckpt", 1000)
    callback._watch.note([Writer(folder)])
    line = callback._by_hand(path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("S3_BUCKET")
    script = line.replace("python cloud_services.py", f"python {ROOT}/cloud_services.py")
    script = script.replace("python ", f"{sys.executable} ", 1)
    subprocess.run(["sh", "-c", script], check=True, capture_output=True)
    assert training.digest(f"{given}/{path.name}") == sha256(path)


@pytest.mark.parametrize("package", ["lightning", "pytorch_lightning"])
def test_a_compromised_lightning_is_refused_before_it_is_imported(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name == package:
            return "2.6.2"
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib, "import_module", None)
    with pytest.raises(RefusedError, match=f"{package} 2.6.2 is a compromised release"):
        s3_callbacks._callback_class()


# ---------------------------------------------------------------------------
# Complete files
# ---------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(s3_callbacks, "LOOK_SECONDS", 0.01)
    path = tmp_path / "ckpt"
    path.mkdir()
    return path


class Writer:
    """What a ModelCheckpoint tells of itself."""

    def __init__(self, folder: Path) -> None:
        self.dirpath = str(folder)
        self._last_checkpoint_saved = ""


def watch_over(folder: Path) -> Watch:
    watch = Watch()
    watch.note([Writer(folder)])
    watch.note_known()
    return watch


def looks(watch: Watch) -> list[str]:
    """The names that two looks find complete."""
    watch.look(False)
    time.sleep(0.02)
    return [path.name for path, _ in watch.look(False)[0]]


def test_a_file_counts_as_complete_only_with_its_end(folder: Path) -> None:
    watch = watch_over(folder)
    path = folder / "a.ckpt"
    with zipfile.ZipFile(folder / "whole", "w") as archive:
        archive.writestr("data", b"x" * 1000)
    content = (folder / "whole").read_bytes()
    path.write_bytes(b"")
    assert looks(watch) == []
    path.write_bytes(content[:-30])
    assert looks(watch) == []
    assert [(task.path, task.trouble) for task in watch.left()] == [(path, s3_callbacks.INCOMPLETE)]
    path.write_bytes(content)
    assert looks(watch) == ["a.ckpt"]
    assert (looks(watch), [task.trouble for task in watch.left()]) == ([], [""])
    version = watch.found(path)
    assert version is not None
    watch.note_arrived(path, version)
    assert watch.left() == []


def test_nothing_counts_as_complete_while_lightning_saves(folder: Path) -> None:
    watch = watch_over(folder)
    (folder / "a.ckpt").write_bytes(b"content")
    watch.saving = True
    assert looks(watch) == []
    watch.saving = False
    assert looks(watch) == ["a.ckpt"]


def test_a_file_that_keeps_changing_waits(folder: Path) -> None:
    watch = watch_over(folder)
    for number in range(3):
        (folder / "a.ckpt").write_bytes(b"content" * (number + 1))
        watch.look(False)
        time.sleep(0.02)
        (folder / "a.ckpt").write_bytes(b"other" * (number + 2))
        assert watch.look(False)[0] == []
    assert looks(watch) == ["a.ckpt"]


def test_what_was_there_before_is_left_alone_until_it_is_written_anew(folder: Path) -> None:
    (folder / "last.ckpt").write_bytes(b"of an earlier run")
    watch = watch_over(folder)
    assert looks(watch) == []
    (folder / "last.ckpt").write_bytes(b"of this run")
    assert looks(watch) == ["last.ckpt"]


def test_hidden_and_foreign_names_are_no_checkpoints(folder: Path) -> None:
    watch = watch_over(folder)
    for name in (".lr_find.ckpt", "a.ckpt.tmp", "a.tmp", "notes.txt"):
        (folder / name).write_bytes(b"content")
    assert looks(watch) == []


def test_a_checkpoint_in_pieces_is_said_to_be_unsupported_once(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    watch = watch_over(folder)
    (folder / "a.ckpt").mkdir()
    (folder / "b.ckpt").mkdir()
    with caplog.at_level(logging.WARNING, "cloud_services"):
        assert (looks(watch), looks(watch)) == ([], [])
    assert caplog.text.count("and not sent") == 1


def test_a_file_that_is_written_anew_while_it_waits_is_not_sent_half(folder: Path) -> None:
    watch = watch_over(folder)
    (folder / "a.ckpt").write_bytes(b"content")
    assert looks(watch) == ["a.ckpt"]
    assert watch.found(folder / "a.ckpt")
    (folder / "a.ckpt").write_bytes(b"PK of the next one")
    assert not watch.found(folder / "a.ckpt")
    assert [task.path.name for task in watch.left()] == ["a.ckpt"]
    (folder / "a.ckpt").unlink()
    assert not watch.found(folder / "a.ckpt")
    assert watch.left() == []


def test_a_file_that_is_to_come_is_waited_for(folder: Path) -> None:
    watch = watch_over(folder)
    writer = Writer(folder)
    writer._last_checkpoint_saved = str(folder / "late.ckpt")
    watch.note([writer])
    assert watch.look(False)[1] is not None
    assert [task.path.name for task in watch.left()] == ["late.ckpt"]
    (folder / "late.ckpt").write_bytes(b"content")
    assert looks(watch) == ["late.ckpt"]
    assert watch.look(False)[1] is None


# ---------------------------------------------------------------------------
# The courier
# ---------------------------------------------------------------------------


class Road:
    """Files to send, and a storage that fails as told."""

    def __init__(self, folder: Path, *names: str) -> None:
        self.found = []
        self.sent: list[str] = []
        self.errors: dict[str, list[CloudError]] = {}
        for number, name in enumerate(names):
            path = folder / name
            path.write_bytes(b"content")
            self.found.append((path, Version(number, 7, number)))
        self.courier = Courier("files to s3://bucket", self.gather, self.send)

    def gather(self, closing: bool) -> tuple[list[tuple[Path, Version]], None]:
        found, self.found = self.found, []
        return found, None

    def send(self, path: Path) -> bool:
        if self.errors.get(path.name):
            raise self.errors[path.name].pop(0)
        self.sent.append(path.name)
        return True

    def end(self) -> list[str]:
        """Send what is left; the names that did not arrive."""
        self.courier.close()
        assert self.courier.wait(20)
        return [task.path.name for task in self.courier.left()]


@pytest.fixture
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FIRST_PAUSE", "SHORT_PAUSE"):
        monkeypatch.setattr(s3_callbacks, name, 0.01)


def test_the_newest_goes_first(tmp_path: Path) -> None:
    road = Road(tmp_path, "old", "older", "new")
    assert road.end() == []
    assert road.sent == ["new", "older", "old"]


@pytest.mark.usefixtures("_hurried")
def test_a_file_that_fails_by_itself_does_not_hold_up_the_others(tmp_path: Path) -> None:
    road = Road(tmp_path, "a", "changing", "broken")
    road.errors = {
        "changing": [IntegrityError("it changed while it was sent")],
        "broken": [IntegrityError("no luck")] * 10,
    }
    assert road.end() == ["broken"]
    assert road.sent == ["a", "changing"]
    assert road.courier.left()[0].trouble == "no luck"


@pytest.mark.usefixtures("_hurried")
def test_a_lost_link_in_the_end_is_tried_again(tmp_path: Path) -> None:
    road = Road(tmp_path, "a", "b")
    road.errors = {"b": [LinkLostError("lost")] * 3}
    assert road.end() == []


@pytest.mark.usefixtures("_hurried")
def test_a_file_that_is_gone_by_its_turn_is_forgotten(tmp_path: Path) -> None:
    road = Road(tmp_path, "a")
    road.errors = {"a": [LinkLostError("lost")]}
    (tmp_path / "a").unlink()
    assert (road.end(), road.sent) == ([], [])


def test_an_unknown_exception_is_loud_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    road = Road(tmp_path, "good", "bad")
    road.errors = {"bad": [ValueError("a defect")]}  # type: ignore[list-item] # on purpose
    assert road.end() == ["bad"]
    assert road.sent == ["good"]
    assert "ValueError: a defect" in caplog.text
