"""Checkpoints, logs, datasets and archives in a bucket: the classes and the commands."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import s3_checkpoints
from cloud_services import (
    CloudError,
    IntegrityError,
    NotFoundError,
    NothingYetError,
    RefusedError,
    S3Sync,
    UsageError,
)
from s3_checkpoints import Checkpoint, in_order, kept_by_prune, progress_in, read_name
from tests.conftest import SCRIPT, files, write_file
from tests.s3_servers import FaultProxy, MotoServer, RcloneServer, S3Server, wait_for
from tests.support import random_file, sha256

LARGE = 20_000_000
EARLY = "epoch=9-step=900-val_loss=0.5000.ckpt"
LATE = "epoch=10-step=1000-val_loss=0.7000.ckpt"


@pytest.fixture(scope="module", params=[RcloneServer, MotoServer], ids=["rclone", "moto"])
def server(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[S3Server]:
    """Each of the two servers, once for all tests."""
    with request.param(tmp_path_factory.mktemp(request.param.name)) as running:
        yield running


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: Any) -> Iterator[RcloneServer]:
    with RcloneServer(tmp_path_factory.mktemp("rclone_alone")) as running:
        yield running


@pytest.fixture(autouse=True)
def _settings(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of the test, and a prefix that no other test has, come from the environment."""
    name = next((n for n in ("server", "rclone") if n in request.fixturenames), None)
    if name is None:
        return
    running: S3Server = request.getfixturevalue(name)
    prefix = "".join(c if c.isalnum() else "-" for c in request.node.name)
    for variable, value in (running.env() | {"S3_BUCKET": running.bucket}).items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("S3_PREFIX", f"runs/{prefix}-{os.getpid()}")


def keys(sync: S3Sync) -> list[str]:
    """The keys below the prefix, without it."""
    folder = sync.bucket.key() + "/"
    return sorted(info.key.removeprefix(folder) for info in sync.bucket.list(folder))


def checkpoint(name: str, content: bytes) -> Path:
    return write_file(Path("run") / name, content)


def command(*words: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, words)], env=os.environ | env,
        stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", timeout=60, check=False,
    )  # fmt: skip


# ---------------------------------------------------------------------------
# Names and order
# ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "progress", "metrics"),
    [
        ("epoch=749-step=355500-val_loss=27.5963.ckpt", (749, 355500), {"val_loss": 27.5963}),
        ("epoch=1-step=2-val_loss=-0.50.ckpt", (1, 2), {"val_loss": -0.5}),
        ("epoch=1-step=2-loss=1.5e-05-v3.ckpt", (1, 2), {"loss": 1.5e-05}),
        ("epoch=0-step=10-v1.ckpt", (0, 10), {}),
        ("val/acc=0.91-epoch=3.ckpt", (3, None), {"acc": 0.91}),
        ("epoch=3-val_loss=nan.ckpt", (3, None), {}),
        ("last.ckpt", (None, None), {}),
    ],
)  # fmt: skip
def test_a_name_tells_epoch_step_and_metrics(
    name: str, progress: tuple[int | None, int | None], metrics: dict[str, float]
) -> None:
    told, numbers = read_name(name)
    assert (told.get("epoch"), told.get("step")) == progress
    assert numbers == metrics


@given(
    st.integers(0, 10**9), st.integers(0, 10**12),
    st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
def test_any_number_in_a_name_is_read_as_it_was_written(epoch: int, step: int, loss: float) -> None:
    told, metrics = read_name(f"epoch={epoch}-step={step}-val_loss={loss}.ckpt")
    assert told == {"epoch": epoch, "step": step}
    assert metrics == {"val_loss": loss}


def made(name: str, mtime: float, etag: str = "", step: int | None = None) -> Checkpoint:
    told, metrics = read_name(name)
    reached = told.get("step", step)
    return Checkpoint(name, 7, mtime, told.get("epoch"), reached, metrics, name, etag or name)


def names(found: list[Checkpoint]) -> list[str]:
    return [one.name for one in found]


def test_epoch_9_comes_before_epoch_10_whatever_the_time() -> None:
    assert names(in_order([made(LATE, 1), made(EARLY, 2)])) == [EARLY, LATE]


def test_a_checkpoint_of_unknown_step_is_as_new_as_what_is_older() -> None:
    found = [made(EARLY, 1), made("last.ckpt", 2), made(LATE, 3)]
    assert names(in_order(found)) == [EARLY, "last.ckpt", LATE]
    assert names(in_order([*found[:2], made(LATE, 0)])) == [EARLY, LATE, "last.ckpt"]


def test_the_best_by_a_metric_is_the_lowest_unless_asked_otherwise() -> None:
    found = [made("a-loss=2-acc=0.5.ckpt", 1), made("b-loss=1-acc=0.1.ckpt", 2)]
    assert in_order(found, "loss")[-1].name.startswith("b")
    assert in_order(found, "acc:max")[-1].name.startswith("a")
    with pytest.raises(NotFoundError, match="f1"):
        in_order(found, "f1")
    with pytest.raises(UsageError):
        in_order(found, "loss:upwards")


def test_prune_keeps_the_newest_the_best_and_what_last_is() -> None:
    found = [made(f"step={n}-loss={n % 5}.ckpt", n, etag=str(n)) for n in range(1, 9)]
    found.append(made("last.ckpt", 20, etag="3"))
    kept = kept_by_prune(found, 2, "loss")
    newest, best = {"step=7-loss=2.ckpt", "step=8-loss=3.ckpt"}, {"step=5-loss=0.ckpt"}
    assert kept == newest | best | {"last.ckpt", "step=3-loss=3.ckpt"}


def test_a_file_tells_its_step_without_being_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'sprung'}",)

    import pickle

    content = {"epoch": 4, "global_step": 70_000, "state_dict": {}, "trap": Trap()}
    for protocol in range(1, 6):
        path = tmp_path / f"{protocol}.ckpt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(content, protocol))
        assert progress_in(path) == {"epoch": "4", "step": "70000"}
    assert not (tmp_path / "sprung").exists()


@given(st.binary(max_size=300))
def test_a_damaged_file_tells_nothing_and_hurts_nobody(content: bytes) -> None:
    path = Path("odd.ckpt")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
    progress_in(path)
    path.write_bytes(content)
    assert progress_in(path) == {}


# ---------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------


def test_a_checkpoint_goes_there_and_comes_back(server: S3Server) -> None:
    sync = S3Sync()
    path = random_file(Path("run") / LATE, LARGE, 1)
    sent = sync.upload_checkpoint(path)
    assert (sent.moved, sent.copied, sent.sha256) == (LARGE, False, sha256(path))
    again = sync.upload_checkpoint(path)
    assert (again.moved, again.copied) == (0, False)
    fetched = sync.download_checkpoint(LATE)
    assert fetched.path == Path("checkpoints") / LATE
    assert sha256(fetched.path) == sent.sha256
    assert sync.download_checkpoint(LATE).moved == 0


def test_what_is_there_under_another_name_is_copied_by_the_server(server: S3Server) -> None:
    with FaultProxy(server) as proxy:
        sync = S3Sync(endpoint_url=proxy.url)
        path = random_file(Path("run") / LATE, LARGE, 2)
        sync.upload_checkpoint(path)
        before = proxy.up
        last = path.with_name("last.ckpt")
        last.write_bytes(path.read_bytes())
        sent = sync.upload_checkpoint(last)
        assert (sent.moved, sent.copied) == (0, True)
        assert proxy.up == before
    sync = S3Sync()
    assert sha256(sync.download_checkpoint("last.ckpt").path) == sha256(path)
    newest = sync.list_checkpoints()[-1]
    assert (newest.name, newest.step) == ("last.ckpt", 1000)


def test_a_changed_last_checkpoint_replaces_the_old_one(server: S3Server) -> None:
    sync = S3Sync()
    for content in (b"first", b"other"):
        path = checkpoint("last.ckpt", content)
        os.utime(path)
        sync.upload_checkpoint(path)
    assert sync.download_checkpoint("last.ckpt").path.read_bytes() == b"other"


def test_the_latest_is_the_one_of_the_highest_step(server: S3Server) -> None:
    sync = S3Sync()
    sync.upload_checkpoint(checkpoint(LATE, b"late"))
    sync.upload_checkpoint(checkpoint(EARLY, b"early"))
    assert sync.download_latest().path.read_bytes() == b"late"
    assert sync.download_latest(by="val_loss").path.read_bytes() == b"early"
    assert [one.epoch for one in sync.list_checkpoints()] == [9, 10]


def test_a_damaged_newest_falls_back_to_the_next_one(rclone: RcloneServer) -> None:
    sync = S3Sync()
    sync.upload_checkpoint(checkpoint(EARLY, b"early"))
    sync.upload_checkpoint(checkpoint(LATE, b"late" * 1000))
    with FaultProxy(rclone) as proxy:
        proxy.fail("flip_response", method="GET", path=LATE, after=50, times=10**6)
        done = command("s3-resume", AWS_ENDPOINT_URL=proxy.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"checkpoints/{EARLY}\n"
    assert LATE in done.stderr
    assert files(Path("checkpoints")) == {EARLY: b"early"}


def test_a_partial_newest_falls_back_to_the_next_one(server: S3Server) -> None:
    sync = S3Sync()
    path = Path("run") / LATE
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"x" * 5000)
    sync.upload_checkpoint(checkpoint(EARLY, b"early"))
    path.write_bytes(path.read_bytes()[:3000])  # as a copy looks that was cut off
    sync.upload_checkpoint(path)
    fetched = sync.resume()
    assert fetched.path.name == EARLY
    assert "its end is missing" in fetched.passed_over[0]


def test_when_none_is_sound_it_is_an_error_even_with_allow_fresh(rclone: RcloneServer) -> None:
    sync = S3Sync()
    sync.upload_checkpoint(checkpoint("last.ckpt", b""))
    with pytest.raises(IntegrityError, match="none of 1"):
        sync.resume()
    done = command("s3-resume", "--allow-fresh")
    assert (done.returncode, done.stdout) == (6, "")


def test_no_checkpoint_is_exit_4_or_a_fresh_start(rclone: RcloneServer) -> None:
    with pytest.raises(NothingYetError):
        S3Sync().resume()
    assert command("s3-resume").returncode == 4
    fresh = command("s3-resume", "--allow-fresh")
    assert (fresh.returncode, fresh.stdout) == (0, "\n")


def test_a_storage_that_is_away_is_never_a_fresh_start(rclone: RcloneServer) -> None:
    away = command("s3-resume", "--allow-fresh", AWS_ENDPOINT_URL="http://127.0.0.1:1")
    assert (away.returncode, away.stdout) == (7, "")
    missing = command("s3-resume", "--allow-fresh", "--bucket", "nobody-has-this")
    assert (missing.returncode, missing.stdout) == (4, "")


def test_a_path_in_checkpoint_passes_through(rclone: RcloneServer) -> None:
    path = checkpoint("mine.ckpt", b"mine")
    assert command("s3-resume", CHECKPOINT=str(path)).stdout == f"{path}\n"
    gone = command("s3-resume", CHECKPOINT="gone.ckpt")
    assert gone.returncode == 4
    assert "gone.ckpt" in gone.stderr


def test_prune_plans_first_and_removes_after_consent(server: S3Server) -> None:
    sync = S3Sync()
    for step in range(5):
        sync.upload_checkpoint(checkpoint(f"step={step}.ckpt", b"%d" % step))
    dry = S3Sync(dry_run=True).prune_checkpoints(2)
    assert dry.removed == ("step=0.ckpt", "step=1.ckpt", "step=2.ckpt")
    assert len(sync.list_checkpoints()) == 5
    assert command("s3-prune-checkpoints", "--keep", "2").returncode == 2  # nobody can answer
    done = command("s3-prune-checkpoints", "--keep", "2", "--yes", "--json")
    assert json.loads(done.stdout)["removed"] == list(dry.removed)
    assert names(sync.list_checkpoints()) == ["step=3.ckpt", "step=4.ckpt"]


def test_a_refusal_removes_nothing(server: S3Server) -> None:
    def refuse(_place: str, _names: Any) -> None:
        raise RefusedError("no")

    sync = S3Sync(approve=refuse)
    for step in range(3):
        sync.upload_checkpoint(checkpoint(f"step={step}.ckpt", b"%d" % step))
    with pytest.raises(RefusedError):
        sync.prune_checkpoints(1)
    assert len(sync.list_checkpoints()) == 3


def test_a_sharded_checkpoint_is_refused_with_a_way_out(rclone: RcloneServer) -> None:
    (Path("run") / "step=1.ckpt").mkdir(parents=True)
    done = command("s3-upload-checkpoint", "run/step=1.ckpt")
    assert done.returncode == 2
    assert "s3-upload-dataset" in done.stderr


@pytest.mark.parametrize("name", ["../evil.ckpt", "/etc/evil.ckpt", "a/../../evil.ckpt"])
def test_a_hostile_name_writes_nothing_outside(rclone: RcloneServer, name: str) -> None:
    with pytest.raises(CloudError):
        S3Sync().download_checkpoint(name)
    assert not list(Path().rglob("evil.ckpt*"))


# ---------------------------------------------------------------------------
# Logs and datasets
# ---------------------------------------------------------------------------


def dataset() -> Path:
    for number in range(12):
        write_file(Path(f"felix/wavs/{number}.wav"), b"%d" % number * 1000)
    write_file(Path("felix/config.json"), b"{}")
    random_file(Path("felix/dataset.jsonl"), 9_000_000, 4)
    write_file(Path("felix/.env"), b"SECRET=1")
    return Path("felix")


def test_a_dataset_is_mirrored_and_restored(server: S3Server) -> None:
    sync, folder = S3Sync(), dataset()
    first = sync.upload_dataset(folder)
    assert (first.sent, first.unchanged, bool(first)) == (14, 0, True)
    assert [one.name for one in first.left_out] == [".env"]
    assert (sync.upload_dataset(folder).sent, sync.upload_dataset(folder).unchanged) == (0, 14)
    wanted = {name: data for name, data in files(folder).items() if name != ".env"}
    fetched = sync.download_dataset(local_dir="copy")
    assert files(Path("copy")) == wanted
    assert fetched.sent == 14
    assert sync.download_dataset("felix", "copy").sent == 0


def test_content_counts_and_not_time(server: S3Server) -> None:
    sync, folder = S3Sync(), dataset()
    sync.upload_dataset(folder)
    write_file(folder / "wavs/3.wav", b"x" * 1000, mtime=1)  # same size, older
    os.utime(folder / "wavs/4.wav", (2_000_000_000, 2_000_000_000))
    assert [s.path for s in sync.upload_dataset(folder).steps if s.action == "send"] == [
        "wavs/3.wav"
    ]


def test_nothing_changed_asks_for_no_single_object(server: S3Server) -> None:
    sync, folder = S3Sync(), dataset()
    sync.upload_dataset(folder)
    sync.upload_dataset(folder)  # rclone lists large objects with another ETag than it answered
    with FaultProxy(server) as proxy:
        assert S3Sync(endpoint_url=proxy.url).upload_dataset(folder).sent == 0
        asked = [one.operation + one.path for one in proxy.log]
        assert len(asked) <= 4, asked


def test_an_index_that_is_lost_or_damaged_costs_requests_only(server: S3Server) -> None:
    sync, folder = S3Sync(), dataset()
    sync.upload_dataset(folder)
    index = sync.bucket.key("datasets/felix/.cloud_services/index.gz")
    sync.bucket.put_bytes(b"no index at all", index)
    assert sync.upload_dataset(folder).sent == 0
    assert all(one.error is None for one in sync.bucket.delete([index]))
    assert sync.upload_dataset(folder).sent == 0


def test_an_index_that_lies_is_found_out_by_the_listing(server: S3Server) -> None:
    sync, folder = S3Sync(), dataset()
    sync.upload_dataset(folder)
    sync.bucket.put_bytes(b"7" * 1000, sync.bucket.key("datasets/felix/wavs/3.wav"))
    sent = sync.upload_dataset(folder)
    assert [s.path for s in sent.steps if s.action == "send"] == ["wavs/3.wav"]


def test_objects_of_another_tool_are_compared_by_what_they_have(server: S3Server) -> None:
    sync, folder = S3Sync(), dataset()
    client = server.client()
    key = sync.bucket.key("datasets/felix")
    for name, content in files(folder).items():
        if name != ".env":
            client.put_object(Bucket=server.bucket, Key=f"{key}/{name}", Body=content)
    assert sync.upload_dataset(folder).sent == 0
    assert sync.download_dataset(local_dir="copy").failures == ()
    assert sync.download_dataset(local_dir="copy").sent == 0


def test_large_objects_of_another_tool_are_fetched_once(server: S3Server) -> None:
    sync, path = S3Sync(), random_file(Path("big/data.bin"), 20_000_000, 5)
    key = sync.bucket.key("datasets/big/data.bin")
    server.client().upload_file(str(path), server.bucket, key)
    first = sync.download_dataset("big", "copy")
    assert (first.sent, len(first.checks)) == (1, 1)
    assert first.checks[0].startswith("MD5")  # the weaker check is named
    again = sync.download_dataset("big", "copy")
    assert (again.sent, again.unchanged) == (0, 1)
    assert sync.upload_dataset("copy", "big").sent == 0


def test_delete_removes_only_what_is_gone_and_only_on_request(server: S3Server) -> None:
    sync, folder = S3Sync(), dataset()
    sync.upload_dataset(folder)
    (folder / "wavs/3.wav").unlink()
    assert sync.upload_dataset(folder).deleted == 0
    assert S3Sync(dry_run=True).upload_dataset(folder, delete=True).deleted == 0
    assert "datasets/felix/wavs/3.wav" in keys(sync)
    assert sync.upload_dataset(folder, delete=True, exclude=["wavs"]).deleted == 0
    assert sync.upload_dataset(folder, delete=True).deleted == 1
    assert "datasets/felix/wavs/3.wav" not in keys(sync)
    write_file(folder / "new.txt")
    assert sync.download_dataset(delete=True).deleted == 1
    assert not (folder / "new.txt").exists()
    assert (folder / ".env").exists()  # secrets are nobody's to remove


def test_nothing_is_deleted_while_something_has_not_arrived(rclone: RcloneServer) -> None:
    sync, folder = S3Sync(), dataset()
    sync.upload_dataset(folder)
    os.rename(folder / "wavs/3.wav", folder / "wavs/33.wav")
    with FaultProxy(rclone) as proxy:
        proxy.fail("flip_request", method="PUT", path="wavs/33.wav", after=10, times=10**6)
        send = "s3-upload-dataset", folder, "--delete", "--yes"
        done = command(*send, AWS_ENDPOINT_URL=proxy.url)
        assert done.returncode == 9, done.stderr
        assert "1 to delete stay" in done.stdout
        assert "datasets/felix/wavs/3.wav" in keys(sync)
        assert sync.upload_dataset(folder, delete=True).deleted == 1
        write_file(folder / "local.txt")
        proxy.fail("flip_response", method="GET", path="wavs/5.wav", after=10, times=10**6)
        (folder / "wavs/5.wav").unlink()
        fetch = "s3-download-dataset", "felix", "--local-dir", folder, "--delete", "--yes"
        done = command(*fetch, AWS_ENDPOINT_URL=proxy.url)
    assert done.returncode == 9, done.stderr
    assert (folder / "local.txt").exists()


def test_include_and_exclude_choose_on_both_sides(server: S3Server) -> None:
    sync, folder = S3Sync(), dataset()
    assert sync.upload_dataset(folder, include=["*.wav"], exclude=["3.wav"]).sent == 11
    assert sync.download_dataset(local_dir="copy", include=["4.wav"]).sent == 1
    assert list(files(Path("copy"))) == ["wavs/4.wav"]


def test_checksum_trusts_no_memory(rclone: RcloneServer) -> None:
    sync, folder = S3Sync(), dataset()
    old = time.time() - 100
    for path in folder.rglob("*.wav"):
        os.utime(path, (old, old))
    sync.upload_dataset(folder)
    path = folder / "wavs/3.wav"
    status = path.stat()
    with path.open("r+b") as stream:  # a change that size, time and inode do not tell
        stream.write(b"x")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert sync.upload_dataset(folder).sent == 0
    assert sync.upload_dataset(folder, checksum=True).sent == 1


def test_one_failure_does_not_stop_the_others_and_is_exit_9(rclone: RcloneServer) -> None:
    folder = dataset()
    with FaultProxy(rclone) as proxy:
        proxy.fail("flip_request", method="PUT", path="wavs/5.wav", after=10, times=10**6)
        done = command("s3-upload-dataset", folder, AWS_ENDPOINT_URL=proxy.url)
    assert done.returncode == 9, done.stderr
    assert "wavs/5.wav" in done.stdout
    sync = S3Sync()
    assert len(keys(sync)) == 13
    assert command("s3-upload-dataset", folder).returncode == 0
    assert len(keys(sync)) == 14


def test_a_killed_mirror_continues_and_sends_nothing_twice(rclone: RcloneServer) -> None:
    folder = Path("many")
    for number in range(400):
        write_file(folder / f"{number}.bin", b"%d" % number * 500)
    with FaultProxy(rclone) as proxy:
        env = os.environ | {"AWS_ENDPOINT_URL": proxy.url}
        process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "s3-upload-dataset", str(folder)], env=env,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda: sum(one.method == "PUT" for one in proxy.log) > 100)
        process.send_signal(signal.SIGKILL)
        process.wait()
    sync = S3Sync()
    arrived = len(keys(sync))
    assert 0 < arrived < 400
    done = sync.upload_dataset(folder)
    assert (done.sent, done.unchanged) == (400 - arrived, arrived)
    assert sync.download_dataset("many", "copy").sent == 400
    assert files(Path("copy")) == files(folder)


def test_several_datasets_are_not_guessed_among(rclone: RcloneServer) -> None:
    sync = S3Sync()
    for name in ("a", "b"):
        sync.upload_dataset(write_file(Path(name) / "x.txt").parent)
    with pytest.raises(UsageError, match="2 datasets"):
        sync.download_dataset()
    with pytest.raises(NotFoundError):
        sync.download_dataset("c")


def test_hostile_keys_stay_outside(server: S3Server) -> None:
    sync = S3Sync()
    sync.upload_dataset(write_file(Path("good/x.txt")).parent)
    key = sync.bucket.key("datasets/good")
    try:
        sync.bucket.put_bytes(b"evil", f"{key}/a/../../../../evil.txt")
    except CloudError:
        pytest.skip("this server takes no such key")
    result = sync.download_dataset("good", "inner/most/copy")
    assert not [path for path in Path().rglob("evil*") if "good" not in path.parts]
    assert files(Path("inner/most/copy")) == {"x.txt": b"content\n"}
    assert not result


def test_a_log_that_grows_while_it_is_sent_arrives_as_it_was(rclone: RcloneServer) -> None:
    log = write_file(Path("lightning_logs/version_3/events.out.tfevents.1"), b"0123456789" * 1000)
    write_file(Path("lightning_logs/version_3/checkpoints/x.ckpt"))
    stop = threading.Event()

    def grow() -> None:
        with log.open("ab", buffering=0) as stream:
            while not stop.is_set():
                stream.write(b"0123456789")

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        for _ in range(5):
            assert S3Sync().upload_logs("lightning_logs/version_3")
    finally:
        stop.set()
        writer.join()
    S3Sync().download_logs("version_3")
    held = Path("logs/version_3/events.out.tfevents.1").read_bytes()
    assert log.read_bytes().startswith(held)
    assert len(held) >= 10_000
    assert list(files(Path("logs"))) == ["version_3/events.out.tfevents.1"]


def test_watch_keeps_in_step_until_interrupted_and_sends_the_rest(rclone: RcloneServer) -> None:
    log = write_file(Path("logs_of/run/events.1"), b"first")
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), "s3-upload-logs", str(log.parent), "--watch", "1"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    sync = S3Sync()
    key = sync.bucket.key("logs/run/events.1")

    def holds(content: bytes) -> bool:
        head = sync.bucket.find(key)
        return head is not None and head.sha256 == hashlib.sha256(content).hexdigest()

    wait_for(lambda: holds(b"first"))
    log.write_bytes(b"second")
    wait_for(lambda: holds(b"second"))
    log.write_bytes(b"the last words")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130, said
    assert holds(b"the last words"), said


# ---------------------------------------------------------------------------
# Archives and the check-up
# ---------------------------------------------------------------------------


def test_training_data_goes_through_a_bucket_and_unpacks(server: S3Server, workspace: Path) -> None:
    sent = command("s3-upload-training", "--include-ticks", "--no-ask-ticks", "--json")
    assert sent.returncode == 0, sent.stderr
    assert json.loads(sent.stdout)["moved"] > 0
    done = command("s3-download-training", "--local-dir", "box", "--extract")
    assert done.returncode == 0, done.stderr
    there = files(Path("box/workspace"))
    assert (
        there["prepared/features/gold_train.csv"]
        == (workspace / "prepared/features/gold_train.csv").read_bytes()
    )
    assert "raw_data/ticks/notes.txt" in there


def test_a_killed_archive_upload_sends_only_the_rest(rclone: RcloneServer) -> None:
    for number, split in enumerate(("train", "val", "test")):
        random_file(Path(f"workspace/prepared/features/gold_{split}.csv"), 30_000_000, number)
    words = [sys.executable, str(SCRIPT), "s3-upload-training"]
    with FaultProxy(rclone) as proxy:
        process = subprocess.Popen(
            [*words, "--limit-rate", "40M"], env=os.environ | {"AWS_ENDPOINT_URL": proxy.url},
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        wait_for(lambda: sum(one.status == 200 for one in proxy.seen("PUT part")) >= 3)
        process.kill()
        process.wait()
        proxy.forget()
        done = command("s3-upload-training", "--json", AWS_ENDPOINT_URL=proxy.url)
        assert done.returncode == 0, done.stderr
        assert proxy.up < 75_000_000  # of 90 million
    sent = json.loads(done.stdout)
    assert sent["moved"] < 75_000_000
    assert [key for key in keys(S3Sync()) if key.startswith("training/")] == [
        sent["key"].removeprefix(S3Sync().bucket.key() + "/")
    ]
    uploads = rclone.client().list_multipart_uploads(Bucket=rclone.bucket).get("Uploads", [])
    assert not [one for one in uploads if one["Key"] == sent["key"]]
    fetched = S3Sync().download_training_data(local_dir="box", extract=True)
    assert sha256(fetched.path) == sent["sha256"]
    original = Path("workspace/prepared/features/gold_train.csv")
    assert sha256(Path("box") / original) == sha256(original)


def test_results_come_back_the_newest_first(server: S3Server, workspace: Path) -> None:
    for name in ("results_1.tar.gz", "results_2.tar.gz"):
        assert command("create-results-archive", "-o", name).returncode == 0
        assert command("s3-upload-results", "--archive", name).returncode == 0
        time.sleep(1.1)  # listings tell whole seconds
    assert command("s3-download-results", "--local-dir", "back").returncode == 0
    assert list(files(Path("back"))) == ["results_2.tar.gz"]
    assert command("s3-download-results", "results_1.tar.gz", "--extract").returncode == 0
    assert command("s3-download-results", "nothing.tar.gz").returncode == 4


def test_a_dry_run_sends_nothing(rclone: RcloneServer, workspace: Path) -> None:
    dataset()
    for words in (
        ("s3-upload-training",), ("s3-upload-results",), ("s3-upload-dataset", "felix"),
        ("s3-upload-logs", "felix"),
    ):  # fmt: skip
        assert command(*words, "--dry-run").returncode == 0
    assert keys(S3Sync()) == []


def test_the_check_up_says_what_works_and_how_to_mend_the_rest(rclone: RcloneServer) -> None:
    good = command("s3-check")
    assert good.returncode == 0, good.stdout
    assert "FAILED" not in good.stdout
    bad = command("s3-check", "--json", AWS_SECRET_ACCESS_KEY="wrong")
    assert bad.returncode == 5
    failed = [check for check in json.loads(bad.stdout)["checks"] if check["ok"] is False]
    assert failed
    assert all(check["remedy"] for check in failed)
    assert command("s3-check", AWS_ENDPOINT_URL="http://127.0.0.1:1").returncode != 0


def test_without_a_folder_for_notes_a_large_upload_says_so_and_a_small_one_works(
    rclone: RcloneServer,
) -> None:
    Path("blocked").write_bytes(b"")
    blocked = {"XDG_CACHE_HOME": str(Path("blocked").absolute())}
    large = random_file(Path("large.ckpt"), LARGE)
    done = command("s3-upload-checkpoint", large, **blocked)
    assert done.returncode == 5, done.stderr
    assert "uploads cannot be made" in done.stderr
    assert "XDG_CACHE_HOME=" in done.stderr
    done = command("s3-upload-checkpoint", checkpoint("small.ckpt", b"few bytes"), **blocked)
    assert done.returncode == 0, done.stderr


def test_secrets_show_up_nowhere(rclone: RcloneServer) -> None:
    secret = "q8Hn3-not-to-be-seen"
    for words in (("s3-check", "-v"), ("s3-list-checkpoints", "-v", "--json")):
        done = command(*words, AWS_SECRET_ACCESS_KEY=secret)
        assert done.returncode
        assert secret not in done.stdout + done.stderr
    assert secret not in repr(S3Sync(secret_access_key=secret, access_key_id="x").bucket.settings)


def test_only_what_is_a_checkpoint_is_listed(server: S3Server) -> None:
    sync = S3Sync()
    sync.bucket.put_bytes(b"x", sync.bucket.key("checkpoints/notes.txt"))
    sync.upload_checkpoint(checkpoint(EARLY, b"early"))
    assert names(sync.list_checkpoints()) == [EARLY]
    assert set(s3_checkpoints.SUFFIXES) >= {".ckpt", ".pt"}
