"""Offline runs that the real wandb has written: found, told apart, and handed to its own program."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import wandb_runs
from cloud_services import AccessError, NotFoundError, main
from tests.conftest import needs
from tests.servers import wait_until
from wandb_runs import OfflineRun, find_runs, has_exit, send_run, wandb_program

TRAINING = """
import os, sys, time
import wandb
run = wandb.init(project="p", dir=".", settings=wandb.Settings(silent=True))
for step in range(5):
    run.log({"loss": 1 / (step + 1)})
print("logged", flush=True)
if sys.argv[1:] == ["waits"]:
    time.sleep(120)
run.finish()
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    needs("wandb")
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


def train(*words: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINING, *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "logged\n"
    return process


@pytest.fixture
def finished() -> OfflineRun:
    assert train().wait(60) == 0
    [run] = find_runs(["wandb"])
    return run


@pytest.fixture
def training() -> Iterator[subprocess.Popen[str]]:
    process = train("waits")
    yield process
    process.kill()
    process.wait()


def stand_in(script: str) -> str:
    """A program in the place of wandb: the service it talks to cannot be reached here."""
    path = Path("bin/wandb").absolute()
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_run_that_ended_is_finished(finished: OfflineRun) -> None:
    assert finished.state == "finished"
    assert finished.size > 1000


def test_a_run_that_is_being_written_is_running_however_quiet_it_is(
    training: subprocess.Popen[str],
) -> None:
    [run] = find_runs(["wandb"])
    assert run.state == "running"
    make_old(run)
    assert find_runs(["wandb"])[0].state == "running"


def make_old(run: OfflineRun) -> None:
    long_ago = time.time() - 86_400
    for path in run.folder.rglob("*"):
        os.utime(path, (long_ago, long_ago))


def test_a_run_whose_process_died_is_interrupted(training: subprocess.Popen[str]) -> None:
    [run] = find_runs(["wandb"])
    training.kill()
    training.wait()

    def is_interrupted() -> bool:
        make_old(run)  # W&B's own process may write a last time
        return find_runs(["wandb"])[0].state == "interrupted"

    assert wait_until(is_interrupted, 30)


def test_runs_are_found_below_several_folders_and_once_only(finished: OfflineRun) -> None:
    assert [run.run_id for run in find_runs([".", "wandb", finished.folder])] == [finished.run_id]


def test_no_runs_are_an_error_that_says_where_it_looked() -> None:
    Path("empty").mkdir()
    with pytest.raises(NotFoundError, match="in empty"):
        find_runs(["empty"])


def test_without_a_login_the_real_program_sends_nothing_and_says_how(finished: OfflineRun) -> None:
    with pytest.raises(AccessError, match="no API key") as caught:
        send_run(finished, wandb_program())
    assert "wandb login" in caught.value.hint
    assert find_runs(["wandb"])[0].state == "finished"


def test_a_run_that_was_taken_is_sent_and_not_sent_again(finished: OfflineRun) -> None:
    taken = stand_in('touch "$2/$(basename "$2"/run-*.wandb).synced"; echo taken')
    assert send_run(finished, taken)
    assert find_runs(["wandb"])[0].state == "sent"


def test_wandb_sync_shows_the_states_after_it_has_sent(
    finished: OfflineRun, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = stand_in('touch "$2/$(basename "$2"/run-*.wandb).synced"; echo taken')
    monkeypatch.setattr(wandb_runs, "wandb_program", lambda: taken)
    assert main(["wandb-sync", "wandb"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^sent +wandb/offline-run-", said, re.MULTILINE)
    assert "finished" not in said
    assert main(["wandb-sync", "wandb", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["state"] == "sent"


def test_settings_of_wandb_in_dotenv_reach_its_program_and_no_others(
    finished: OfflineRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path(".env").write_text(
        "WANDB_API_KEY=from-dotenv\nWANDB_ENTITY=team\nWANDB_MODE=offline\nHF_TOKEN=other\n"
    )
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("WANDB_ENTITY", "mine")
    program = stand_in('env > seen; echo "$@" > words; exit 1')
    assert not send_run(finished, program)
    seen = Path("seen").read_text().splitlines()
    assert "WANDB_API_KEY=from-dotenv" in seen
    assert "WANDB_ENTITY=mine" in seen
    assert not [line for line in seen if line.startswith(("WANDB_MODE=", "HF_TOKEN="))]
    assert "from-dotenv" not in Path("words").read_text()


def test_a_folder_that_begins_with_a_dash_is_no_option(finished: OfflineRun) -> None:
    Path("-x").mkdir()
    finished.folder.rename(Path("-x") / finished.folder.name)
    [moved] = find_runs(["-x"])
    send_run(moved, stand_in('echo "$2" > words; exit 1'))
    assert Path("words").read_text().startswith("/")


@pytest.mark.parametrize("script", ["echo no network >&2; exit 1", "echo done"])
def test_a_run_that_was_not_taken_is_never_called_sent(finished: OfflineRun, script: str) -> None:
    done = send_run(finished, stand_in(script))
    assert not done
    assert finished.run_id in str(done.error)
    assert find_runs(["wandb"])[0].state == "finished"


def test_a_file_that_is_cut_anywhere_is_not_finished(finished: OfflineRun, tmp_path: Path) -> None:
    [log] = finished.folder.glob("*.wandb")
    content = log.read_bytes()
    assert has_exit(log)
    cut = tmp_path / "cut.wandb"
    for length in range(0, len(content), 37):
        cut.write_bytes(content[:length])
        assert not has_exit(cut)


@given(st.binary(max_size=400))
def test_any_bytes_are_no_reason_to_fail(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "run.wandb"
    path.write_bytes(b":W&B\xe1\xbe\x00" + data)
    has_exit(path)
