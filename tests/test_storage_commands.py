"""serve, storage-key and quickstart as a user types them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud_jobs import storage
from cloud_jobs.commands import parse_duration
from cloud_jobs.quickstart import quickstart
from cloud_services import AccessError, S3Sync, UsageError, main
from tests.conftest import SCRIPT, Run
from tests.support import random_file, sha256


class Serving:
    """`cloud_services.py serve --json`, until it is stopped."""

    def __init__(self, *words: str, secret: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), "serve", "--port", "0", "--json", *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{secret}\n")
        self.process.stdin.close()
        lines = iter(self.process.stdout.readline, "")
        text = ""
        for line in lines:
            text += line
            if line == "}\n":
                break
        self.said: dict[str, str] = json.loads(text)

    def __enter__(self) -> Serving:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(30)

    def sync(self, key: dict[str, str], prefix: str = "") -> S3Sync:
        return S3Sync(
            "models", prefix, self.said["endpoint"], "us-east-1", timeout=10,
            access_key_id=key["access_key"], secret_access_key=key["secret_key"],
        )  # fmt: skip


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Serving]:
    with Serving("--storage-dir", "storage", "--bucket", "models") as serving:
        yield serving


def made_key(run: Run, *words: str) -> dict[str, Any]:
    done = run("storage-key", "create", *words, "--storage-dir", "storage", "--json")
    assert done.returncode == 0, done.stderr
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def test_what_was_stored_is_there_after_a_restart_and_the_secret_is_shown_once(
    served: Serving, tmp_path: Path
) -> None:
    file = random_file(tmp_path / "model.ckpt", 20_000_000)
    served.sync(served.said, "runs").upload_checkpoint(file)
    assert served.stop() == 0
    with Serving("--storage-dir", "storage") as again:
        assert "secret_key" not in again.said
        key = {**again.said, "secret_key": served.said["secret_key"]}
        fetched = again.sync(key, "runs").download_checkpoint("model.ckpt", tmp_path / "back")
    assert sha256(fetched.path) == sha256(file)
    secret = served.said["secret_key"].encode()
    kept = [path for path in (tmp_path / "storage").rglob("*") if path.is_file()]
    assert not any(secret in path.read_bytes() for path in kept)
    assert (tmp_path / "storage").stat().st_mode & 0o077 == 0


def test_a_limited_key_writes_below_its_prefix_only_and_ends_when_it_is_revoked(
    served: Serving, run: Run, tmp_path: Path
) -> None:
    key = made_key(run, "gpu-box", "--bucket", "models", "--prefix", "runs/", "--expires-in", "7d")
    file = random_file(tmp_path / "model.ckpt", 1000)
    assert served.sync(key, "runs/one").upload_checkpoint(file)
    with pytest.raises(AccessError):
        served.sync(key, "elsewhere").upload_checkpoint(file)
    listed = run("storage-key", "list", "--storage-dir", "storage")
    assert "gpu-box: get, put, list in models/runs/" in listed.stdout
    assert key["secret_key"] not in listed.stdout
    assert run("storage-key", "revoke", "gpu-box", "--storage-dir", "storage").returncode == 0
    with pytest.raises(AccessError):
        served.sync(key, "runs/one").upload_checkpoint(random_file(tmp_path / "b.ckpt", 1000))


def test_a_given_secret_comes_by_standard_input(tmp_path: Path) -> None:
    secret = "a-secret-of-ones-own-0123"
    words = ["--storage-dir", "storage", "--bucket", "models", "--access-key", "OWNKEY"]
    with Serving(*words, "--secret-key", "-", secret=secret) as serving:
        assert "secret_key" not in serving.said
        key = {"access_key": "OWNKEY", "secret_key": secret}
        assert serving.sync(key).upload_checkpoint(random_file(tmp_path / "a.ckpt", 100))
    with Serving(*words, "--secret-key", secret) as visible:
        visible.stop()
        assert visible.process.stderr is not None
        assert "--secret-key is visible to other users" in visible.process.stderr.read()


def test_the_address_is_told_when_the_buckets_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    told: list[str] = []

    def serve_for_a_moment(
        settings: storage.StorageSettings, started: Callable[[storage.StorageServer], None]
    ) -> None:
        with storage.StorageServer(settings) as server:
            make_bucket = server.make_bucket

            def make_and_look(name: str) -> None:
                make_bucket(name)
                told.append(capsys.readouterr().out)

            monkeypatch.setattr(server, "make_bucket", make_and_look)
            started(server)

    monkeypatch.setattr(storage, "serve", serve_for_a_moment)
    folder = str(tmp_path / "storage")
    buckets = ["--bucket", "models", "--bucket", "ticks"]
    assert main(["serve", "--port", "0", "--storage-dir", folder, *buckets]) == 0
    assert told == ["", ""]
    assert "shown only now" in capsys.readouterr().out


def test_a_new_secret_is_shown_even_where_a_bucket_cannot_be_made(run: Run) -> None:
    done = run("serve", "--port", "0", "--storage-dir", "storage", "--bucket", "Models")
    assert (done.returncode, "shown only now" in done.stdout) == (2, True)
    assert "'Models' is no name for a bucket" in done.stderr


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["serve", "--host", "192.0.2.1"], 10, "is not loopback"),
        (["serve", "--access-key", "ONLY"], 2, "belong together"),
        (["storage-key", "create"], 2, "needs a name"),
        (["storage-key", "create", "gpu-box"], 2, "needs a bucket"),
        (["storage-key", "create", "a", "--bucket", "b", "--rights", "fly"], 2, "fly"),
        (["storage-key", "revoke", "nobody"], 4, "nobody"),
    ],
)
def test_what_makes_no_sense_is_one_line_and_a_hint(
    run: Run, words: list[str], code: int, said: str
) -> None:
    done = run(*words, "--storage-dir", "storage")
    assert done.returncode == code, done.stderr
    error, *hints = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert said in error + "".join(hints)
    assert hints[0].startswith("hint: ")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("12h", 43200), ("7d", 604800)]
)
def test_times_are_read(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "7", "d", "0d", "-1h", "1w", "1.5h"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)


def test_the_quick_start_tells_its_story_and_leaves_nothing_behind(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    done = run("quickstart", TMPDIR=str(place), http_proxy="http://127.0.0.1:1", HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    for words in ("s3-upload-training", "copied by the server", "0 files sent", "files identical"):
        assert words in done.stdout
    assert "demo/checkpoints/last.ckpt" in done.stdout
    assert list(place.iterdir()) == []
    assert not (tmp_path / ".cache").exists()


def test_the_quick_start_keeps_its_folder_on_request(run: Run, tmp_path: Path) -> None:
    place = tmp_path / "temporary"
    place.mkdir()
    done = run("quickstart", "--keep", "--json", TMPDIR=str(place))
    assert done.returncode == 0, done.stderr
    kept = json.loads(done.stdout)["folder"]
    assert Path(kept, "box", "workspace", "prepared").is_dir()
    assert [str(path) for path in place.iterdir()] == [kept]


def test_the_quick_start_notices_content_that_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloud_services import IntegrityError

    monkeypatch.setattr("filecmp.cmp", lambda *_a, **_k: False)
    with pytest.raises(IntegrityError, match="is not what"):
        quickstart(tmp_path / "run", lambda _step: None)
    assert os.environ.get("NO_PROXY") is None
