"""Uploads and downloads over a real sshd: whole, resumed, cut, killed, frozen, full, corrupted."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

import cloud_services
import transfers
from benchmarks.link import Link
from tests.conftest import SCRIPT
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
)  # fmt: skip

SEGMENT = 4 * MIB
# The tests think in pieces of 4 MiB; the tool cuts finer.


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SSHServer]:
    with SSHServer(tmp_path / "server") as running:
        yield running


@pytest.fixture(params=["sftp", "no sftp", "no commands", "no python"])
def any_server(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[SSHServer]:
    kind = request.param
    if kind == "no python":
        with bare_server(
            tmp_path, "dd", "sha256sum", "mkdir", "mv", "stat", "df", "scp", "rm", "cat"
        ) as bare:
            yield bare
        return
    with SSHServer(
        tmp_path / "any", sftp=kind != "no sftp", commands=kind != "no commands"
    ) as running:
        yield running


@pytest.fixture
def link(server: SSHServer) -> Iterator[Link]:
    with Link(server.port) as running:
        server.trust_port(running.port)
        yield running


# ── whole


def test_an_upload_arrives_verified_and_can_be_downloaded_again(
    any_server: SSHServer, tmp_path: Path
) -> None:
    workspace(tmp_path)
    archive = tmp_path / "t.tar.gz"
    cli("create-training-archive", "-o", archive, cwd=tmp_path)
    target = any_server.storage / "deep" / "folder"
    sent = document(
        cli("--json", "upload-training", *flags(any_server), "--path", target, "--archive", archive,
            server=any_server, cwd=tmp_path)
    )  # fmt: skip
    assert sha256(target / "t.tar.gz") == sha256(archive) == sent["sha256"]
    assert "SHA-256" in sent["check"]
    assert parts(target) == []
    back = document(
        cli("--json", "download-results", *flags(any_server), "--path", target / "t.tar.gz",
            "--local-path", "new/here", server=any_server, cwd=tmp_path)
    )  # fmt: skip
    assert sha256(tmp_path / "new/here/t.tar.gz") == sha256(archive)
    assert parts(tmp_path / "new/here") == []
    expected = "the archive's own manifest" if not any_server.commands else "SHA-256"
    assert expected in back["files"][0]["check"]


@pytest.mark.parametrize("size", [0, 1, SEGMENT - 1, SEGMENT, SEGMENT + 1, 3 * SEGMENT + 12345])
@pytest.mark.parametrize("streams", [1, 3])
def test_files_of_every_size_make_the_round_trip(
    server: SSHServer, tmp_path: Path, size: int, streams: int
) -> None:
    file = random_file(tmp_path / "data.bin", size)
    common = [*flags(server), "--streams", streams]
    sent = cli(
        "upload-training",
        *common,
        "--path",
        server.storage,
        "--archive",
        file,
        server=server,
        cwd=tmp_path,
    )
    assert sent.returncode == 0, sent.stderr
    back = cli("download-results", *common, "--path", server.storage / "data.bin", "--local-path", "back",
               server=server, cwd=tmp_path)  # fmt: skip
    assert back.returncode == 0, back.stderr
    assert sha256(file) == sha256(server.storage / "data.bin") == sha256(tmp_path / "back/data.bin")


def test_a_workspace_is_packed_and_sent_in_one_pass_without_a_local_copy(
    server: SSHServer, tmp_path: Path
) -> None:
    workspace(tmp_path, 2 * MIB)
    (tmp_path / ".cache").mkdir()
    before = sorted(path.name for path in tmp_path.iterdir())
    sent = document(
        cli("--json", "upload-training", *flags(server), "--path", f"{server.storage}/", "--include-ticks",
            "--no-ask-ticks", "--include-cache", "--extract", server=server, cwd=tmp_path)
    )  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    archive = Path(sent["target"])
    assert sent["sha256"] == sha256(archive) == sent["packed"]["sha256"]
    for file in (tmp_path / "workspace").rglob("*.csv"):
        assert file.read_bytes() == (server.storage / file.relative_to(tmp_path)).read_bytes()
    checked = subprocess.run(
        ["sha256sum", "-c", "training.sha256"], cwd=server.storage, check=False
    )
    assert checked.returncode == 0


def test_the_packed_stream_is_the_archive_that_create_makes(
    server: SSHServer, tmp_path: Path
) -> None:
    workspace(tmp_path, MIB)
    made = document(cli("--json", "create-training-archive", "-o", "a.tar.gz", cwd=tmp_path))
    sent = document(
        cli("--json", "upload-training", *flags(server), "--path", server.storage / "named.tar.gz",
            server=server, cwd=tmp_path)
    )  # fmt: skip
    assert sent["sha256"] == made["sha256"] == sha256(server.storage / "named.tar.gz")


def test_a_file_that_is_there_already_is_not_sent_again(server: SSHServer, tmp_path: Path) -> None:
    file = random_file(tmp_path / "data.bin", MIB)
    command = [
        "--json",
        "upload-training",
        *flags(server),
        "--path",
        server.storage,
        "--archive",
        file,
    ]
    assert document(cli(*command, server=server, cwd=tmp_path))["moved"] == MIB
    assert document(cli(*command, server=server, cwd=tmp_path))["moved"] == 0
    fetch = [
        "--json",
        "download-results",
        *flags(server),
        "--path",
        server.storage / "data.bin",
        "--local-path",
        "b",
    ]
    assert document(cli(*fetch, server=server, cwd=tmp_path))["files"][0]["moved"] == MIB
    assert document(cli(*fetch, server=server, cwd=tmp_path))["files"][0]["moved"] == 0


def test_a_server_without_sftp_is_served_by_scp_and_says_so(tmp_path: Path) -> None:
    with SSHServer(tmp_path / "old", sftp=False) as server:
        file = random_file(tmp_path / "data.bin", 2 * SEGMENT + 7)
        sent = cli("upload-training", *flags(server), "--path", server.storage, "--archive", file, "--streams", 3,
                   server=server, cwd=tmp_path)  # fmt: skip
        assert sent.returncode == 0, sent.stderr
        assert "no SFTP subsystem: using the old scp protocol" in sent.stderr
        assert sha256(server.storage / "data.bin") == sha256(file)
        assert os.listdir(server.storage) == ["data.bin"]


def test_key_exchanges_in_the_middle_of_a_transfer_do_no_harm(tmp_path: Path) -> None:
    with SSHServer(tmp_path / "rekey", config=["RekeyLimit 2M"]) as server:
        file = random_file(tmp_path / "data.bin", 40 * MIB)
        for _ in range(2):
            sent = cli("upload-training", *flags(server), "--path", server.storage, "--archive", file,
                       "--streams", 8, server=server, cwd=tmp_path)  # fmt: skip
            assert sent.returncode == 0, sent.stderr
            back = cli("download-results", *flags(server), "--path", server.storage / "data.bin",
                       "--local-path", "back", "--streams", 8, server=server, cwd=tmp_path)  # fmt: skip
            assert back.returncode == 0, back.stderr
            assert sha256(tmp_path / "back/data.bin") == sha256(file)
            (server.storage / "data.bin").unlink()
            (tmp_path / "back/data.bin").unlink()


def test_a_server_that_allows_few_sessions_is_used_as_far_as_it_goes(tmp_path: Path) -> None:
    with SSHServer(tmp_path / "few", config=["MaxSessions 3"]) as server:
        file = random_file(tmp_path / "data.bin", 5 * SEGMENT)
        sent = cli("upload-training", *flags(server), "--path", server.storage, "--archive", file,
                   "--streams", 8, server=server, cwd=tmp_path)  # fmt: skip
        assert sent.returncode == 0, sent.stderr
        assert sha256(server.storage / "data.bin") == sha256(file)


def test_a_rate_limit_holds_over_all_streams(server: SSHServer, tmp_path: Path) -> None:
    file = random_file(tmp_path / "data.bin", 3 * MIB)
    sent = document(
        cli("--json", "upload-training", *flags(server), "--path", server.storage, "--archive", file,
            "--streams", 4, "--limit-rate", "1M", server=server, cwd=tmp_path)
    )  # fmt: skip
    assert sent["seconds"] > 2.5
    back = document(
        cli("--json", "download-results", *flags(server), "--path", server.storage / "data.bin", "--local-path",
            "b", "--limit-rate", "1M", server=server, cwd=tmp_path)
    )  # fmt: skip
    assert back["files"][0]["seconds"] > 2.5


@pytest.mark.parametrize("sessions", [2, 3, 10])
def test_a_small_file_goes_through_however_few_sessions_there_are(
    tmp_path: Path, sessions: int
) -> None:
    with SSHServer(tmp_path / "few", config=[f"MaxSessions {sessions}"]) as server:
        file = random_file(tmp_path / "small.bin", 1000)
        for streams in ([], ["--streams", "16"]):
            sent = cli("upload-training", *flags(server), "--path", server.storage, "--archive", file, *streams,
                       server=server, cwd=tmp_path)  # fmt: skip
            assert sent.returncode == 0, sent.stderr
            back = cli("download-results", *flags(server), "--path", server.storage / "small.bin", *streams,
                       "--local-path", "b", server=server, cwd=tmp_path)  # fmt: skip
            assert back.returncode == 0, back.stderr
            assert (
                sha256(server.storage / "small.bin")
                == sha256(tmp_path / "b/small.bin")
                == sha256(file)
            )
            (server.storage / "small.bin").unlink()
            (tmp_path / "b/small.bin").unlink()


def test_a_missing_sftp_program_on_the_server_means_scp(tmp_path: Path) -> None:
    with SSHServer(
        tmp_path / "s", sftp=False, config=["Subsystem sftp /nonexistent/sftp-server"]
    ) as server:
        file = random_file(tmp_path / "f.bin", 1000)
        sent = cli("upload-training", *flags(server), "--path", server.storage, "--archive", file,
                   server=server, cwd=tmp_path)  # fmt: skip
        assert sent.returncode == 0, sent.stderr
        assert "using the old scp protocol" in sent.stderr
        assert sha256(server.storage / "f.bin") == sha256(file)


def test_a_lane_that_fails_in_its_work_is_an_error_not_a_refusal() -> None:
    """Otherwise the segment it had taken would be missing without a word."""

    class Lane:
        def close(self) -> None:
            pass

    def work(lane: object, jobs: Iterator[int]) -> None:
        if next(jobs, None) == 0:
            raise transfers.NoMoreSessionsError("no session in the middle")
        for _ in jobs:
            pass

    with pytest.raises(transfers.NoMoreSessionsError):
        transfers.run_lanes(Lane, 3, range(10), work)  # type: ignore[arg-type]


# ── interrupted


def killed_upload(server: SSHServer, file: Path, after: int, cwd: Path) -> None:
    """Start an upload, and kill it once `after` bytes are on the server."""
    process = start_cli(
        "upload-training", *flags(server), "--path", server.storage, "--archive", file,
        "--streams", 3, "--limit-rate", "20M", server=server, cwd=cwd,
    )  # fmt: skip
    wait_for(lambda: any(p.stat().st_blocks * 512 >= after for p in server.storage.glob(".*.part")))
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_an_upload_killed_halfway_continues_and_sends_only_the_rest(
    any_server: SSHServer, tmp_path: Path
) -> None:
    file = random_file(tmp_path / "data.bin", 10 * SEGMENT)
    killed_upload(any_server, file, 5 * SEGMENT, tmp_path)
    assert len(parts(any_server.storage)) == 1
    assert not (any_server.storage / "data.bin").exists()
    done = document(
        cli("--json", "upload-training", *flags(any_server), "--path", any_server.storage, "--archive", file,
            server=any_server, cwd=tmp_path)
    )  # fmt: skip
    assert 0 < done["moved"] <= 9 * SEGMENT
    assert sha256(any_server.storage / "data.bin") == sha256(file)
    assert parts(any_server.storage) == []


def test_a_killed_packing_upload_continues_though_the_name_has_a_new_time(
    server: SSHServer, tmp_path: Path
) -> None:
    workspace(tmp_path, 8 * MIB)
    upload = ["upload-training", *flags(server), "--path", server.storage]
    process = start_cli(*upload, "--limit-rate", "10M", server=server, cwd=tmp_path)
    wait_for(
        lambda: any(p.stat().st_blocks * 512 >= 3 * SEGMENT for p in server.storage.glob(".*.part"))
    )
    process.kill()
    process.communicate()
    done = document(cli("--json", *upload, server=server, cwd=tmp_path))
    assert done["moved"] < done["size"] - SEGMENT
    assert sha256(Path(done["target"])) == done["sha256"]
    assert parts(server.storage) == []


def test_a_download_killed_halfway_continues_and_fetches_only_the_rest(
    any_server: SSHServer, tmp_path: Path
) -> None:
    file = random_file(any_server.storage / "r.bin", 8 * SEGMENT)
    fetch = [
        "download-results",
        *flags(any_server),
        "--path",
        file,
        "--local-path",
        "b",
        "--streams",
        2,
    ]
    process = start_cli(*fetch, "--limit-rate", "12M", server=any_server, cwd=tmp_path)
    journal = tmp_path / "b"
    wait_for(lambda: any(p.read_text().count("\n") > 12 for p in journal.glob(".*.journal")))
    process.kill()
    process.communicate()
    assert not (tmp_path / "b/r.bin").exists()
    done = document(cli("--json", *fetch, server=any_server, cwd=tmp_path))["files"][0]
    assert 0 < done["moved"] <= 6 * SEGMENT
    assert sha256(tmp_path / "b/r.bin") == sha256(file)
    assert parts(tmp_path / "b") == []


def test_a_flipped_bit_in_what_arrived_before_is_sent_again(
    server: SSHServer, tmp_path: Path
) -> None:
    file = random_file(tmp_path / "data.bin", 10 * SEGMENT)
    killed_upload(server, file, 5 * SEGMENT, tmp_path)
    part = server.storage / parts(server.storage)[0]
    with part.open("r+b") as stream:
        stream.seek(100)
        stream.write(bytes([stream.read(1)[0] ^ 1]))
    done = cli(
        "upload-training",
        *flags(server),
        "--path",
        server.storage,
        "--archive",
        file,
        server=server,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert sha256(server.storage / "data.bin") == sha256(file)


def test_a_flipped_bit_in_a_half_downloaded_file_is_fetched_again(
    server: SSHServer, tmp_path: Path
) -> None:
    file = random_file(server.storage / "r.bin", 8 * SEGMENT)
    fetch = [
        "download-results",
        *flags(server),
        "--path",
        file,
        "--local-path",
        "b",
        "--streams",
        1,
    ]
    process = start_cli(*fetch, "--limit-rate", "12M", server=server, cwd=tmp_path)
    wait_for(
        lambda: any(p.read_text().count("\n") > 12 for p in (tmp_path / "b").glob(".*.journal"))
    )
    process.kill()
    process.communicate()
    part = next(p for p in (tmp_path / "b").iterdir() if p.name.endswith(".part"))
    with part.open("r+b") as stream:
        stream.write(b"x")
    done = cli(*fetch, server=server, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sha256(tmp_path / "b/r.bin") == sha256(file)


@pytest.mark.parametrize("suffix", ["", ".journal"])
def test_a_link_planted_where_a_file_arrives_is_not_followed(
    any_server: SSHServer, tmp_path: Path, suffix: str
) -> None:
    file = random_file(any_server.storage / "m.ckpt", 10_000)
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    planted = tmp_path / "b" / (cloud_services.part_name("m.ckpt") + suffix)
    planted.parent.mkdir()
    planted.symlink_to(victim)
    words = "download-results", *flags(any_server), "--path", file, "--local-path", "b"
    done = cli(*words, server=any_server, cwd=tmp_path)
    assert done.returncode == 10, done.stderr
    assert "symbolic link" in done.stderr
    assert victim.read_bytes() == b"precious"


def test_a_journal_without_its_part_is_not_believed(any_server: SSHServer, tmp_path: Path) -> None:
    file = random_file(any_server.storage / "m.ckpt", 3 * cloud_services.SEGMENT_BYTES)
    status = file.stat()
    journal = tmp_path / "b" / (cloud_services.part_name("m.ckpt") + ".journal")
    journal.parent.mkdir()
    header = f"{status.st_size} {int(status.st_mtime)} {cloud_services.SEGMENT_BYTES}"
    journal.write_text(f"{header}\n0 -\n1 {'0' * 64}\n2\n9 -\n")
    done = cli(
        "download-results",
        *flags(any_server),
        "--path",
        file,
        "--local-path",
        "b",
        server=any_server,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert sha256(tmp_path / "b/m.ckpt") == sha256(file)


def test_a_remote_file_that_changed_since_is_fetched_from_the_start(
    server: SSHServer, tmp_path: Path
) -> None:
    file = random_file(server.storage / "r.bin", 6 * SEGMENT)
    fetch = [
        "download-results",
        *flags(server),
        "--path",
        file,
        "--local-path",
        "b",
        "--streams",
        1,
    ]
    process = start_cli(*fetch, "--limit-rate", "12M", server=server, cwd=tmp_path)
    wait_for(
        lambda: any(p.read_text().count("\n") > 8 for p in (tmp_path / "b").glob(".*.journal"))
    )
    process.kill()
    process.communicate()
    random_file(file, 6 * SEGMENT, seed=2)
    os.utime(file, (1, 1))
    done = document(cli("--json", *fetch, server=server, cwd=tmp_path))["files"][0]
    assert done["moved"] == 6 * SEGMENT
    assert sha256(tmp_path / "b/r.bin") == sha256(file)


def test_a_cut_link_is_mended_within_the_same_command(
    server: SSHServer, link: Link, tmp_path: Path
) -> None:
    file = random_file(tmp_path / "data.bin", 20 * SEGMENT)
    link.cut_after(15 * SEGMENT)
    sent = cli("--json", "upload-training", *flags(server, link.port), "--path", server.storage,
               "--archive", file, server=server, cwd=tmp_path)  # fmt: skip
    assert document(sent)["size"] == file.stat().st_size
    assert "trying again" in sent.stderr
    assert sha256(server.storage / "data.bin") == sha256(file)
    assert link.bytes_up < 28 * SEGMENT
    link.cut_after(15 * SEGMENT)
    got = cli("--json", "download-results", *flags(server, link.port), "--path", server.storage / "data.bin",
              "--local-path", "b", server=server, cwd=tmp_path)  # fmt: skip
    assert document(got)["files"][0]["size"] == file.stat().st_size
    assert sha256(tmp_path / "b/data.bin") == sha256(file)
    assert link.bytes_down < 28 * SEGMENT


def test_killed_sessions_on_the_server_are_mended_too(server: SSHServer, tmp_path: Path) -> None:
    file = random_file(tmp_path / "data.bin", 8 * SEGMENT)
    process = start_cli("upload-training", *flags(server), "--path", server.storage, "--archive", file,
                        "--limit-rate", "20M", server=server, cwd=tmp_path)  # fmt: skip
    wait_for(
        lambda: any(p.stat().st_blocks * 512 >= 2 * SEGMENT for p in server.storage.glob(".*.part"))
    )
    server.kill_sessions()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert sha256(server.storage / "data.bin") == sha256(file)


@pytest.mark.parametrize("direction", ["up", "down"])
def test_a_frozen_link_is_an_error_in_bounded_time(
    server: SSHServer, link: Link, tmp_path: Path, direction: str
) -> None:
    file = random_file(tmp_path / "data.bin", 8 * SEGMENT)
    random_file(server.storage / "r.bin", 8 * SEGMENT)
    command = (
        ["upload-training", "--path", server.storage, "--archive", file]
        if direction == "up"
        else ["download-results", "--path", server.storage / "r.bin", "--local-path", "b"]
    )
    process = start_cli(*command, *flags(server, link.port), "--timeout", 2, "--limit-rate", "8M",
                        server=server, cwd=tmp_path)  # fmt: skip
    wait_for(lambda: max(link.bytes_up, link.bytes_down) > 2 * SEGMENT)
    link.freeze()
    _, errors = process.communicate(timeout=110)
    assert process.returncode == 7, errors
    assert "error: " in errors
    assert "hint: run the same command again" in errors or "hint: try: ssh" in errors
    assert not (server.storage / "data.bin").exists()
    assert not (tmp_path / "b/r.bin").exists()
    link.thaw()


def test_what_the_server_holds_wrongly_is_never_given_its_name(
    server: SSHServer, tmp_path: Path
) -> None:
    """Somebody writes into the .part while it arrives: the check finds it, a second run mends it."""
    file = random_file(tmp_path / "data.bin", 6 * SEGMENT)
    old = random_file(server.storage / "data.bin", 100, seed=9)
    before = sha256(old)
    upload = [
        "upload-training",
        *flags(server),
        "--path",
        server.storage,
        "--archive",
        file,
        "--streams",
        1,
    ]
    process = start_cli(*upload, "--limit-rate", "12M", server=server, cwd=tmp_path)
    # The newest segment is not hashed yet when it is damaged.
    wait_for(lambda: any(p.stat().st_size >= 4 * SEGMENT for p in server.storage.glob(".*.part")))
    part = next(iter(server.storage.glob(".*.part")))
    with part.open("r+b") as stream:
        stream.seek(part.stat().st_size - 1000)
        stream.write(b"damage")
    process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the damage was overwritten by the transfer itself")
    assert process.returncode == 6
    assert sha256(server.storage / "data.bin") == before
    again = document(cli("--json", *upload, server=server, cwd=tmp_path))
    assert again["moved"] <= SEGMENT
    assert sha256(server.storage / "data.bin") == sha256(file)


def test_a_full_disk_on_the_server_is_named_and_keeps_the_old_file(tmp_path: Path) -> None:
    with SSHServer(tmp_path / "server") as server, small_disk(server.storage, "24M"):
        old = random_file(server.storage / "data.bin", 100)
        before = sha256(old)
        file = random_file(tmp_path / "data.bin", 40 * MIB)
        upload = ["upload-training", *flags(server), "--path", server.storage]
        known = cli(*upload, "--archive", file, server=server, cwd=tmp_path)
        assert (known.returncode, "free" in known.stderr) == (7, True), known.stderr
        assert parts(server.storage) == []
        workspace(tmp_path, 12 * MIB)
        unknown = cli(*upload, server=server, cwd=tmp_path)
        assert unknown.returncode == 7, unknown.stderr
        assert "full" in unknown.stderr
        assert sha256(old) == before


@pytest.mark.parametrize("method", ["scp", "rsync"])
@pytest.mark.parametrize("below", ["", "new"])
def test_a_read_only_file_system_on_the_server_is_no_matter_of_trying_again(
    server: SSHServer, tmp_path: Path, method: str, below: str
) -> None:
    require("rsync")
    file = random_file(tmp_path / "data.bin", 1000)
    with small_disk(server.storage, "24M,ro"):
        sent = cli("upload-training", *flags(server), "--method", method, "--archive", file,
                   "--path", server.storage / below, server=server, cwd=tmp_path)  # fmt: skip
    assert sent.returncode == 5, sent.stderr
    assert "Read-only file system" in sent.stderr
    assert "hint: choose another --path, or check the rights there\n" in sent.stderr


def test_a_disk_on_the_server_that_takes_no_further_file_is_named(
    server: SSHServer, tmp_path: Path
) -> None:
    file = random_file(tmp_path / "data.bin", 1000)
    with small_disk(server.storage, "24M,nr_inodes=1"):
        sent = cli("upload-training", *flags(server), "--path", server.storage, "--archive", file,
                   server=server, cwd=tmp_path)  # fmt: skip
    assert sent.returncode == 7, sent.stderr
    assert "No space left" in sent.stderr
    assert "hint: free some space there" in sent.stderr


@pytest.mark.parametrize(
    ("commands", "code", "why"), [(True, 2, "File exists"), (False, 7, "answers: Failure")]
)
def test_a_shell_tells_what_sftp_leaves_out(
    tmp_path: Path, commands: bool, code: int, why: str
) -> None:
    file = random_file(tmp_path / "data.bin", 1000)
    with SSHServer(tmp_path / "server", commands=commands) as server:
        (server.storage / "in").symlink_to("nowhere")
        sent = cli("upload-training", *flags(server), "--path", server.storage / "in",
                   "--archive", file, server=server, cwd=tmp_path)  # fmt: skip
    assert (sent.returncode, why in sent.stderr) == (code, True), sent.stderr


def test_a_full_disk_here_is_named_and_keeps_the_old_file(
    server: SSHServer, tmp_path: Path
) -> None:
    random_file(server.storage / "r.bin", 40 * MIB)
    here = tmp_path / "here"
    here.mkdir()
    with small_disk(here, "24M"):
        old = random_file(here / "r.bin", 100)
        before = sha256(old)
        done = cli("download-results", *flags(server), "--path", server.storage / "r.bin", "--local-path", here,
                   server=server, cwd=tmp_path)  # fmt: skip
        assert (done.returncode, "free" in done.stderr) == (7, True), done.stderr
        assert sha256(old) == before


def test_a_file_that_changes_while_it_is_fetched_is_refused_even_where_no_command_runs(
    tmp_path: Path,
) -> None:
    with SSHServer(tmp_path / "s", commands=False) as server:
        file = random_file(server.storage / "m.ckpt", 3 * SEGMENT)
        os.utime(file, (1_000_000_000, 1_000_000_000))
        words = ["download-results", *flags(server), "--path", file, "--local-path", "b"]
        fetching = start_cli(*words, "--limit-rate", "3M", server=server, cwd=tmp_path)
        wait_for(lambda: any((tmp_path / "b").glob(".*.journal")))
        random_file(file, 3 * SEGMENT, seed=2)
        _, errors = fetching.communicate(timeout=60)
        assert (fetching.returncode, "changed on" in errors) == (6, True), errors
        assert cli(*words, server=server, cwd=tmp_path).returncode == 0
        assert sha256(tmp_path / "b/m.ckpt") == sha256(file)


# ── two at once, and names that are taken


def test_a_second_upload_of_one_workspace_into_one_folder_is_refused_while_the_first_runs(
    any_server: SSHServer, tmp_path: Path
) -> None:
    workspace(tmp_path, 4 * MIB)
    words = ["upload-training", *flags(any_server), "--path", any_server.storage]
    first = start_cli(*words, "--limit-rate", "300K", server=any_server, cwd=tmp_path)
    wait_for(lambda: parts(any_server.storage) != [])
    second = cli(*words, "--include-ticks", "--no-ask-ticks", server=any_server, cwd=tmp_path)
    assert (second.returncode, "another run is writing" in second.stderr) == (10, True)
    elsewhere = cli(*words[:-1], any_server.storage / "b", server=any_server, cwd=tmp_path)
    assert elsewhere.returncode == 0, elsewhere.stderr
    first.kill()
    first.communicate()
    done = document(cli("--json", *words, server=any_server, cwd=tmp_path))
    assert sha256(Path(done["target"])) == done["sha256"]


def test_a_lock_that_its_last_owner_has_just_removed_holds_nobody_off_and_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    take = cloud_services.lock_part

    def take_late(stream: IO[bytes], target: str | Path) -> None:
        for lock in tmp_path.rglob("*.lock"):
            lock.unlink()
        take(stream, target)

    monkeypatch.setattr(transfers, "lock_part", take_late)
    with (
        pytest.raises(cloud_services.RefusedError, match="another run"),
        transfers.only_run("here", "t"),
    ):
        pytest.fail("it was taken")
    monkeypatch.setattr(transfers, "lock_part", take)
    with transfers.only_run("here", "t"):
        assert list(tmp_path.rglob("*.lock"))
    assert not list(tmp_path.rglob("*.lock"))


def test_where_nothing_can_be_noted_an_upload_goes_on_with_a_warning(tmp_path: Path) -> None:
    workspace(tmp_path)
    (tmp_path / "file").touch()
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "upload-training", "--method", "local", "--path", "there"],
        cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "a second run at the same time would not be noticed" in done.stderr


@pytest.mark.parametrize("kind", ["sftp", "no sftp", "no commands", "local", "no links"])
def test_two_archives_of_the_same_second_both_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name = "training_data_20261231_235959.tar.gz"
    monkeypatch.setattr(cloud_services, "timestamped", lambda stem: name)
    if kind == "no links":
        monkeypatch.setattr(os, "link", refused_link)
    with SSHServer(
        tmp_path / "s", sftp=kind != "no sftp", commands=kind != "no commands"
    ) as server:
        monkeypatch.setenv("HOME", str(server.home))
        sent = []
        for box in ("one", "two", "three"):
            root = workspace(tmp_path / box, 10_000)
            random_file(root / "prepared/features/gold_test.csv", 1000, seed=len(box))
            uploader = cloud_services.PaperspaceUploader(
                server.host, str(server.storage), server.user, port=server.port,
                identity=str(server.identity), workspace=root,
            )  # fmt: skip
            method = "local" if kind in ("local", "no links") else "scp"
            sent.append(uploader.upload_paperspace_training_data(method=method))
        assert [Path(one.target).name for one in sent] == [
            name, "training_data_20270101_000000.tar.gz", "training_data_20270101_000001.tar.gz",
        ]  # fmt: skip
        assert [sha256(Path(one.target)) for one in sent] == [one.sha256 for one in sent]
        assert len(list(server.storage.iterdir())) == 3


def refused_link(*_: object) -> None:
    raise PermissionError("made up: this file system knows no links")


def test_an_archive_made_in_the_same_second_replaces_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        cloud_services, "timestamped", lambda stem: f"{stem}_20261231_235959.tar.gz"
    )
    uploader = cloud_services.PaperspaceUploader(workspace=workspace(tmp_path))
    made = [uploader.create_paperspace_training_archive().path.name for _ in range(2)]
    assert made == ["training_data_20261231_235959.tar.gz", "training_data_20270101_000000.tar.gz"]


# ── unpacking there


@pytest.mark.parametrize("python", [True, False])
def test_unpacking_there_replaces_files_only_by_verified_ones(tmp_path: Path, python: bool) -> None:
    tools = ["tar", "gzip", "sha256sum", "find", "mktemp", "mkdir", "mv", "rm", "ln", "tail", "scp"]
    box = (
        SSHServer(tmp_path / "box")
        if python
        else bare_server(tmp_path, *tools, "df", "stat", "cat", "dd")
    )
    workspace(tmp_path, 50_000)
    with box as server:
        words = ["upload-training", *flags(server), "--path", server.storage, "--extract"]
        first = cli(*words, server=server, cwd=tmp_path)
        assert first.returncode == 0, first.stderr
        old = server.storage / "workspace/prepared/features/gold_val.csv"
        before = sha256(old)
        bad = tmp_path / "bad.tar.gz"
        write_archive_with_a_wrong_manifest(bad, {"gold_val.csv": b"new", "gold_more.csv": b"more"})
        broken = cli(*words, "--archive", bad, server=server, cwd=tmp_path)
        assert (broken.returncode, sha256(old)) == (6, before), broken.stderr
        assert "hint: send an archive that create-training-archive has made" in broken.stderr
        assert not (old.parent / "gold_more.csv").exists()
        random_file(tmp_path / "workspace/prepared/features/gold_val.csv", 70_000, seed=3)
        again = cli(*words, server=server, cwd=tmp_path)
        assert again.returncode == 0, again.stderr
        assert (
            old.read_bytes() == (tmp_path / "workspace/prepared/features/gold_val.csv").read_bytes()
        )
        assert not list(server.storage.glob(".cloud_services*"))


def write_archive_with_a_wrong_manifest(path: Path, files: dict[str, bytes]) -> None:
    lines = "".join(f"{'0' * 64}  workspace/prepared/features/{name}\n" for name in files)
    members = {f"workspace/prepared/features/{name}": data for name, data in files.items()}
    with tarfile.open(path, "w:gz") as tar:
        for name, data in {**members, "training.sha256": lines.encode()}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def test_unpacking_onto_a_full_disk_leaves_what_was_there(
    server: SSHServer, tmp_path: Path
) -> None:
    workspace(tmp_path, 50_000)
    words = ["upload-training", *flags(server), "--path", server.storage, "--extract"]
    with small_disk(server.storage, "24M"):
        assert cli(*words, server=server, cwd=tmp_path).returncode == 0
        old = server.storage / "workspace/prepared/features/gold_val.csv"
        before = sha256(old)
        for split in ("train", "val", "test"):
            (tmp_path / f"workspace/prepared/features/gold_{split}.csv").write_bytes(
                bytes(10 * MIB)
            )
        full = cli(*words, server=server, cwd=tmp_path)
        assert (full.returncode, sha256(old)) == (7, before), full.stderr
        assert "the archive has arrived, whole. free some space, then: ssh" in full.stderr
        assert not list(server.storage.glob(".cloud_services*"))


class small_disk:  # noqa: N801 - reads as a context, as tmp_path does
    """A tiny file system in a folder; only root can mount one."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder, self.size = folder, size

    def __enter__(self) -> None:
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", str(self.folder)]
        if (
            os.getuid() != 0
            or subprocess.run(mount, check=False, capture_output=True).returncode != 0
        ):
            pytest.skip("mounting a small disk needs root")

    def __exit__(self, *exc: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.folder)], check=True)


@pytest.mark.parametrize(
    "size", [0, 5, cloud_services.SEGMENT_BYTES, 5 * cloud_services.SEGMENT_BYTES + 1]
)
@pytest.mark.parametrize("patient", [True, False])
def test_what_was_hashed_ahead_is_neither_lost_nor_counted_twice(
    tmp_path: Path, size: int, patient: bool
) -> None:
    file = random_file(tmp_path / "data.bin", size)
    source, stack = transfers.FileSource(file), contextlib.ExitStack()
    with stack:
        source.hash_ahead(stack)
        if patient:
            source._ahead._thread.join()
        store, target = transfers.LocalStore(), str(tmp_path / "there/data.bin")
        _, moved = transfers.deliver(store, source, target, cloud_services.Progress())
    assert moved.sha256 == sha256(file) == sha256(Path(target))
