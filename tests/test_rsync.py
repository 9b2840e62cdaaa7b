"""Method rsync: the system's rsync over the system's ssh, with the connection's own settings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import transfers
from cloud_services import AccessError, CloudError, DiskFullError, TransferError, part_name
from ssh_transport import error_kind
from tests.servers import SSHServer, require
from tests.support import (
    MIB,
    bare_server,
    cli,
    document,
    flags,
    parts,
    random_file,
    sha256,
    start_cli,
    wait_for,
    workspace,
)

HOSTILE = [
    "sp ace",
    "quo'te\"s",
    "$(touch evil)",
    "-dash",
    "new\nline",
    "smile🙂",
    "semi;colon",
    "star*",
    "b\\s",
]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SSHServer]:
    require("rsync")
    with SSHServer(tmp_path / "server") as running:
        yield running


def test_a_workspace_goes_there_and_results_come_back(server: SSHServer, tmp_path: Path) -> None:
    workspace(tmp_path)
    sent = document(
        cli("--json", "upload-training", *flags(server), "--method", "rsync", "--path", server.storage / "in",
            "--extract", server=server, cwd=tmp_path)
    )  # fmt: skip
    assert sha256(Path(sent["target"])) == sent["sha256"]
    assert sent["check"] == "SHA-256 computed on the server"
    assert (server.storage / "in/workspace/prepared/features/gold_val.csv").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".upload")] == []
    back = document(
        cli("--json", "download-results", *flags(server), "--method", "rsync", "--path", sent["target"],
            "--local-path", "./results/", server=server, cwd=tmp_path)
    )  # fmt: skip
    assert sha256(Path(tmp_path, back["files"][0]["target"])) == sent["sha256"]
    assert parts(server.storage / "in") == parts(tmp_path / "results") == []


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_only_names(server: SSHServer, tmp_path: Path, name: str) -> None:
    file = random_file(tmp_path / "local" / name, 1000)
    sent = cli("upload-training", *flags(server), "--method", "rsync", f"--path={server.storage}/{name}/",
               f"--archive={file}", server=server, cwd=tmp_path)  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    there = server.storage / name / name
    assert sha256(there) == sha256(file)
    back = cli("download-results", *flags(server), "--method", "rsync", f"--path={there}",
               f"--local-path=back {name}", server=server, cwd=tmp_path)  # fmt: skip
    assert back.returncode == 0, back.stderr
    assert sha256(tmp_path / f"back {name}" / name) == sha256(file)
    assert not list(tmp_path.rglob("evil"))


def test_a_killed_upload_continues(server: SSHServer, tmp_path: Path) -> None:
    file = random_file(tmp_path / "data.bin", 24 * MIB)
    upload = [
        "upload-training",
        *flags(server),
        "--method",
        "rsync",
        "--path",
        server.storage,
        "--archive",
        file,
    ]
    process = start_cli(*upload, "--limit-rate", "8M", server=server, cwd=tmp_path)
    wait_for(lambda: any(p.stat().st_size > 8 * MIB for p in server.storage.glob(".*.part")))
    process.kill()
    process.communicate()
    assert not (server.storage / "data.bin").exists()
    wait_for(lambda: server.kill_sessions() == 0)
    done = document(cli("--json", *upload, server=server, cwd=tmp_path))
    assert 0 < done["moved"] < 17 * MIB
    assert sha256(server.storage / "data.bin") == sha256(file)


def test_a_killed_download_continues(server: SSHServer, tmp_path: Path) -> None:
    file = random_file(server.storage / "r.bin", 24 * MIB)
    fetch = [
        "download-results",
        *flags(server),
        "--method",
        "rsync",
        "--path",
        file,
        "--local-path",
        "b",
    ]
    process = start_cli(*fetch, "--limit-rate", "8M", server=server, cwd=tmp_path)
    wait_for(lambda: any(p.stat().st_size > 8 * MIB for p in (tmp_path / "b").glob(".*.part")))
    process.kill()
    process.communicate()
    wait_for(lambda: server.kill_sessions() == 0)
    done = document(cli("--json", *fetch, server=server, cwd=tmp_path))["files"][0]
    assert 0 < done["moved"] < 17 * MIB
    assert sha256(tmp_path / "b/r.bin") == sha256(file)


def test_a_damaged_leftover_of_the_same_size_and_time_is_repaired(
    server: SSHServer, tmp_path: Path
) -> None:
    file = random_file(tmp_path / "data.bin", 300_000)
    part = server.storage / transfers.FileSource(file).part_name
    part.write_bytes(bytes(300_000))
    os.utime(part, ns=(file.stat().st_mtime_ns, file.stat().st_mtime_ns))
    sent = cli("upload-training", *flags(server), "--method", "rsync", "--path", server.storage, "--archive", file,
               server=server, cwd=tmp_path)  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    assert sha256(server.storage / "data.bin") == sha256(file)


def test_progress_reaches_a_pipe_as_lines(server: SSHServer, tmp_path: Path) -> None:
    file = random_file(tmp_path / "data.bin", 14 * MIB)
    sent = cli("upload-training", *flags(server), "--method", "rsync", "--path", server.storage, "--archive", file,
               "--limit-rate", "2M", server=server, cwd=tmp_path)  # fmt: skip
    assert sent.returncode == 0, sent.stderr
    assert "sending: " in sent.stderr
    assert " s left" in sent.stderr


def test_a_host_key_that_was_only_pinned_is_enough(server: SSHServer, tmp_path: Path) -> None:
    server.known_hosts.unlink()
    file = random_file(tmp_path / "f.bin", 1000)
    sent = cli("upload-training", *flags(server), "--host-key", server.fingerprint, "--method", "rsync",
               "--path", server.storage, "--archive", file, server=server, cwd=tmp_path)  # fmt: skip
    assert sent.returncode == 0, sent.stderr


def test_without_rsync_here_it_says_so_before_anything_is_packed(
    server: SSHServer, tmp_path: Path
) -> None:
    workspace(tmp_path)
    env = {**server.environment, "PATH": str(tmp_path / "empty")}
    done = cli(
        "upload-training",
        *flags(server),
        "--method",
        "rsync",
        "--path",
        server.storage,
        cwd=tmp_path,
        env=env,
    )
    assert done.returncode == 3
    assert "rsync is not installed here" in done.stderr
    assert list(server.storage.iterdir()) == []


def test_without_rsync_there_it_says_so(tmp_path: Path) -> None:
    require("rsync")
    with bare_server(tmp_path, "dd", "sha256sum", "mkdir", "mv", "stat", "df", "cat") as server:
        file = random_file(tmp_path / "f.bin", 1000)
        done = cli("upload-training", *flags(server), "--method", "rsync", "--path", server.storage,
                   "--archive", file, server=server, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert "rsync is not installed on" in done.stderr


def test_a_missing_remote_file_is_exit_4(server: SSHServer, tmp_path: Path) -> None:
    done = cli("download-results", *flags(server), "--method", "rsync", "--path", server.storage / "no.tar.gz",
               server=server, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 4


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ('rsync: [receiver] open "f" failed: Operation not permitted (1)', AccessError),
        ("rsync: write failed: Disk quota exceeded (122)", DiskFullError),
        ("rsync error: error in rsync protocol data stream (code 12)", TransferError),
    ],
)
def test_the_words_of_rsync_decide_the_kind_of_error(words: str, kind: type[CloudError]) -> None:
    assert error_kind(words) is kind


def test_a_folder_here_that_takes_no_file_is_named(server: SSHServer, tmp_path: Path) -> None:
    empty = random_file(server.storage / "empty.bin", 0)
    nowhere = "/sys"  # not even root makes a file there
    done = cli("download-results", *flags(server), "--method", "rsync", "--path", empty,
               "--local-path", nowhere, server=server, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 5, done.stderr
    assert f"error: {nowhere}/" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_where_the_unfinished_file_should_be_is_named(
    server: SSHServer, tmp_path: Path
) -> None:
    file = random_file(server.storage / "r.bin", 1000)
    part = tmp_path / "back" / part_name("r.bin")
    part.mkdir(parents=True)
    done = cli("download-results", *flags(server), "--method", "rsync", "--path", file,
               "--local-path", part.parent, server=server, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: {part}: is a folder\n"
