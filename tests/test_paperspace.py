"""The Paperspace classes and commands as a user meets them: the guide's lines, names, folders, errors."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cloud_services
import transfers
from cloud_services import PaperspaceDownloader, PaperspaceUploader
from cloud_settings import SSHSettings
from tests.servers import SSHServer
from tests.support import (
    ROOT,
    cli,
    document,
    environment,
    flags,
    parts,
    random_file,
    sha256,
    workspace,
)

HOSTILE = [
    "sp ace", "quo'te\"s", "$(touch evil)", "`touch evil`", "-rf", "--help", "new\nline", "smile🙂", "a;b|c&d",
    "star*[x]?", "back\\slash", "tab\there", "~", "%s%n", "é" * 127, "x" * 255, "\x1b[31mred", "#hash", "..x",
]  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[SSHServer]:
    with SSHServer(tmp_path / "server") as running:
        yield running


# ── the guide's command lines, as printed


GUIDE = r"""
python cloud_services.py create-training-archive
python cloud_services.py create-training-archive --output my_training_data.tar.gz
python cloud_services.py create-training-archive --include-ticks
python cloud_services.py create-training-archive --include-ticks --no-ask-ticks
python cloud_services.py create-training-archive --include-cache
python cloud_services.py create-training-archive \
  --output training_full.tar.gz \
  --include-ticks \
  --include-cache \
  --no-ask-ticks
python cloud_services.py upload-training \
  --host your-paperspace-host \
  --path /storage/
python cloud_services.py upload-training \
  --host your-paperspace-host \
  --path /storage/ \
  --user paperspace
python cloud_services.py upload-training \
  --host your-paperspace-host \
  --path /storage/ \
  --method rsync
python cloud_services.py upload-training \
  --host your-paperspace-host \
  --path /storage/ \
  --include-ticks
python cloud_services.py list-remote-files \
  --host your-paperspace-host \
  --path /storage/
python cloud_services.py create-results-archive
python cloud_services.py create-results-archive --output results_20240101.tar.gz
python cloud_services.py download-results \
  --host your-paperspace-host \
  --path /storage/results_20240101.tar.gz \
  --local-path ./
python cloud_services.py download-results \
  --host your-paperspace-host \
  --path /storage/results_20240101.tar.gz \
  --method rsync \
  --local-path ./results/
python cloud_services.py download-results \
  --host your-paperspace-host \
  --path /storage/results_*.tar.gz
"""


@pytest.mark.parametrize("line", re.split(r"\n(?=python )", GUIDE.strip()))
def test_every_command_line_of_the_guide_runs_as_printed(
    server: SSHServer, tmp_path: Path, line: str
) -> None:
    """On a terminal where Enter is pressed at a question. Only /storage and the login are the test's."""
    workspace(tmp_path)
    random_file(server.storage / "results_20240101.tar.gz", 1000)
    (server.home / ".ssh/config").write_text(
        f"Host your-paperspace-host\n  HostName {server.host}\n  Port {server.port}\n"
        f"  User {server.user}\n  IdentityFile {server.identity}\n"
    )
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tmp_path / "bin/python").chmod(0o755)
    (tmp_path / "cloud_services.py").symlink_to(ROOT / "cloud_services.py")
    line = line.replace("/storage/", f"{server.storage}/").replace(
        "--user paperspace", f"--user {server.user}"
    )
    env = {**server.environment, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    status, shown = on_a_terminal(["sh", "-c", line], tmp_path, env, answer=b"\n")
    assert status == 0, shown
    assert b"Traceback" not in shown
    assert b"next: " in shown or b"list-remote-files" in line.encode()


def on_a_terminal(
    command: list[str], cwd: Path, env: dict[str, str], answer: bytes
) -> tuple[int, bytes]:
    """Run a command on a pseudo-terminal, answering one question."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(cwd)
        os.execvpe(command[0], command, env)
    shown, asked = b"", False
    while True:
        try:
            chunk = os.read(terminal, 4096)
        except OSError:
            break
        shown += chunk
        if not chunk:
            break
        if b"[Y/n]" in shown and not asked:
            asked = True
            os.write(terminal, answer)
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), shown


def test_the_guide_s_unpacking_works_on_the_server(server: SSHServer, tmp_path: Path) -> None:
    workspace(tmp_path)
    sent = cli(
        "upload-training",
        *flags(server),
        "--path",
        f"{server.storage}/",
        server=server,
        cwd=tmp_path,
    )
    assert sent.returncode == 0, sent.stderr
    line = "tar -xzf training_data_*.tar.gz && sha256sum -c training.sha256"
    done = subprocess.run(
        ["sh", "-c", line], cwd=server.storage, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": OK") == 3


# ── the classes


def test_the_guide_s_python_runs_as_printed(
    server: SSHServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    workspace(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    (server.home / ".ssh/config").write_text(
        f"Host paperspace.com\n  HostName {server.host}\n  Port {server.port}\n"
        f"  User {server.user}\n  IdentityFile {server.identity}\n"
    )
    storage = f"{server.storage}/"
    uploader = PaperspaceUploader(host="paperspace.com", path=storage)
    assert uploader.create_paperspace_training_archive("training_data.tar.gz", include_ticks=True)
    assert uploader.upload_paperspace_training_data("training_data.tar.gz", method="scp")
    downloader = PaperspaceDownloader(host="paperspace.com", path=storage)
    assert downloader.create_paperspace_results_archive("results.tar.gz")
    shutil.copy("results.tar.gz", storage)
    (tmp_path / "results.tar.gz").unlink()
    assert downloader.download_paperspace_results(f"{storage}results.tar.gz", local_path="./")
    names = [Path(info.path).name for info in downloader.list_paperspace_files()]
    assert names == ["results.tar.gz", "training_data.tar.gz"]
    assert tarfile.is_tarfile("results.tar.gz")
    assert capfd.readouterr() == ("", "")


def test_the_old_method_names_are_aliases() -> None:
    for cls, old in ((PaperspaceUploader, "create_training_archive upload_training_data list_files"),
                     (PaperspaceDownloader, "create_results_archive download_results list_files")):  # fmt: skip
        for name in old.split():
            verb, _, rest = name.partition("_")
            assert getattr(cls, name) is getattr(cls, f"{verb}_paperspace_{rest}")


def test_library_errors_are_exceptions_with_an_exit_code_and_a_hint(tmp_path: Path) -> None:
    with pytest.raises(cloud_services.NotFoundError) as caught:
        PaperspaceUploader("x.invalid", workspace=tmp_path).create_training_archive("a.tar.gz")
    assert caught.value.exit_code == 4
    assert caught.value.hint
    with pytest.raises(cloud_services.UsageError):
        PaperspaceUploader("x.invalid", workspace=workspace(tmp_path)).upload_training_data(
            method="carrier-pigeon"
        )


def test_without_an_archive_the_three_features_are_sent(tmp_path: Path) -> None:
    root = workspace(tmp_path)
    result = PaperspaceUploader(path=str(tmp_path / "disk"), workspace=root).upload_training_data(
        method="local"
    )
    assert result
    assert result.packed
    assert result.packed.files == 3
    with tarfile.open(result.target) as archive:
        assert len(archive.getnames()) == 4


# ── names


@pytest.mark.parametrize("kind", ["sftp", "no sftp", "no commands", "local"])
def test_hostile_names_are_only_names(tmp_path: Path, kind: str) -> None:
    with SSHServer(
        tmp_path / "s", sftp=kind != "no sftp", commands=kind != "no commands"
    ) as server:
        connection = ["--method", "local"] if kind == "local" else flags(server)
        for name in HOSTILE:
            file = random_file(tmp_path / "local" / name, 300)
            sent = cli("upload-training", *connection, f"--path={server.storage}/{name}/", f"--archive={file}",
                       server=server, cwd=tmp_path)  # fmt: skip
            assert sent.returncode == 0, (name, sent.stderr)
            there = server.storage / name / name
            assert sha256(there) == sha256(file), name
            back = cli("download-results", *connection, f"--path={there}", "--local-path", tmp_path / "back" / name,
                       server=server, cwd=tmp_path)  # fmt: skip
            assert back.returncode == 0, (name, back.stderr)
            assert sha256(tmp_path / "back" / name / name) == sha256(file), name
            shown = cli(
                "list-remote-files",
                *connection,
                f"--path={there.parent}",
                server=server,
                cwd=tmp_path,
            )
            assert shown.returncode == 0, (name, shown.stderr)
            assert "\x1b" not in shown.stdout
            assert len(shown.stdout.splitlines()) == 1
            assert os.listdir(there.parent) == [name]
    assert not list(tmp_path.rglob("evil"))


def test_relative_names_that_look_like_options_are_only_names(
    server: SSHServer, tmp_path: Path
) -> None:
    file = random_file(tmp_path / "-rf", 300)
    sent = cli(
        "upload-training",
        *flags(server),
        "--path=-dash",
        "--archive=-rf",
        server=server,
        cwd=tmp_path,
    )
    assert sent.returncode == 0, sent.stderr
    home = Path(document(cli("--json", "list-remote-files", *flags(server), "--path=-dash", server=server,
                             cwd=tmp_path))["files"][0]["path"])  # fmt: skip
    assert home == Path("-dash/-rf")
    back = cli(
        "download-results",
        *flags(server),
        "--path=-dash/-rf",
        "--local-path=-back",
        server=server,
        cwd=tmp_path,
    )
    assert back.returncode == 0, back.stderr
    assert sha256(tmp_path / "-back/-rf") == sha256(file)
    shutil.rmtree(Path.home() / "-dash", ignore_errors=True)
    shutil.rmtree(server.remote_home / "-dash", ignore_errors=True)


names = st.text(
    st.characters(exclude_characters="/\0", codec="utf-8"), min_size=1, max_size=60
).filter(lambda name: name not in (".", "..") and len(name.encode()) <= 255)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(name=names)
def test_any_name_makes_the_round_trip(tmp_path: Path, name: str) -> None:
    base = tmp_path / "local"
    shutil.rmtree(base, ignore_errors=True)
    file = random_file(base / name, 50)
    uploader = PaperspaceUploader(path=str(tmp_path / "disk"))
    # An existing folder named *.tar.gz would be taken for the archive's own name.
    assert uploader.upload_training_data(file, method="local")
    store = transfers.LocalStore()
    found = store.find(f"{tmp_path}/disk/{name}")
    assert [info.path for info in found] == [f"{tmp_path}/disk/{name}"]
    back = PaperspaceDownloader().download_results(found[0].path, base / "back", method="local")
    assert back
    assert sha256(Path(back.files[0].target)) == sha256(file)
    shutil.rmtree(tmp_path / "disk")


def test_part_names_fit_in_255_bytes_and_differ() -> None:
    for name in ("x" * 255, "é" * 127, "🙂" * 63, "a"):
        part = cloud_services.part_name(name)
        assert len(os.fsencode(part + ".journal")) <= 255
    assert cloud_services.part_name("x" * 250 + "1") != cloud_services.part_name("x" * 250 + "2")


# ── listing and choosing


def test_listing_shows_folders_files_and_globs(server: SSHServer, tmp_path: Path) -> None:
    for number, name in enumerate(["a_1.tar.gz", "a_2.tar.gz", "b.txt"]):
        random_file(server.storage / "runs" / name, 10 + number)
        os.utime(server.storage / "runs" / name, (1_700_000_000, 1_700_000_000))
    (server.storage / "runs/folder").mkdir()
    (server.storage / "runs/dead link").symlink_to("nowhere")
    (server.storage / "runs/live link").symlink_to("b.txt")
    listing = ["--json", "list-remote-files", *flags(server), "--path"]

    def paths(path: object) -> list[str]:
        found = document(cli(*listing, path, server=server, cwd=tmp_path))["files"]
        return [os.path.relpath(info["path"], server.storage) for info in found]

    everything = [
        "runs/a_1.tar.gz",
        "runs/a_2.tar.gz",
        "runs/b.txt",
        "runs/folder",
        "runs/live link",
    ]
    assert paths(server.storage / "runs") == everything
    assert paths(f"{server.storage}/runs/") == everything
    assert paths(f"{server.storage}/r*/a_*.tar.gz") == ["runs/a_1.tar.gz", "runs/a_2.tar.gz"]
    assert paths(f"{server.storage}/runs/b.txt") == ["runs/b.txt"]
    plain = cli(
        "list-remote-files",
        *flags(server),
        "--path",
        server.storage / "runs/a_*",
        server=server,
        cwd=tmp_path,
    )
    assert re.fullmatch(
        r"(\d+  2023-11-1\d \d\d:\d\d:\d\d  /.*/a_[12]\.tar\.gz\n){2}", plain.stdout
    )


def test_a_glob_fetches_every_match_and_newest_only_one(server: SSHServer, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        file = random_file(server.storage / f"results_{number}.tar.gz", 100, number)
        os.utime(file, (1_700_000_000 - number, 1_700_000_000 - number))
    (server.storage / "results_folder.tar.gz").mkdir()
    fetch = [
        "--json",
        "download-results",
        *flags(server),
        "--path",
        f"{server.storage}/results_*.tar.gz",
    ]
    done = document(cli(*fetch, "--local-path", "all", server=server, cwd=tmp_path))
    assert [Path(file["target"]).name for file in done["files"]] == [
        f"results_{n}.tar.gz" for n in (1, 2, 3)
    ]
    done = document(cli(*fetch, "--newest", "--local-path", "one", server=server, cwd=tmp_path))
    assert os.listdir(tmp_path / "one") == ["results_1.tar.gz"]
    dry = document(cli(*fetch, "--dry-run", "--local-path", "none", server=server, cwd=tmp_path))
    assert len(dry["files"]) == 3
    assert not (tmp_path / "none").exists()


def test_matches_of_one_name_in_several_folders_never_replace_each_other(
    server: SSHServer, tmp_path: Path
) -> None:
    for run in ("a", "b"):
        random_file(server.storage / f"run_{run}/results.tar.gz", 100, ord(run))
    done = cli("download-results", *flags(server), "--path", f"{server.storage}/run_*/results.tar.gz",
               server=server, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "several matches are called results.tar.gz" in done.stderr
    assert not (tmp_path / "results.tar.gz").exists()


def test_one_match_that_fails_does_not_stop_the_others(server: SSHServer, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        random_file(server.storage / f"r{number}.bin", 100, number)
    (tmp_path / "here/r2.bin").mkdir(parents=True)
    done = cli("--json", "download-results", *flags(server), "--path", f"{server.storage}/r*.bin", "--local-path", "here",
               server=server, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 9
    result = json.loads(done.stdout)
    assert [Path(file["target"]).name for file in result["files"]] == ["r1.bin", "r3.bin"]
    assert len(result["failures"]) == 1
    assert "r2.bin" in result["failures"][0]


@pytest.mark.parametrize("kind", ["sftp", "no sftp", "no commands", "local"])
def test_nothing_there_is_exit_4_with_the_command_that_looks(tmp_path: Path, kind: str) -> None:
    with SSHServer(
        tmp_path / "s", sftp=kind != "no sftp", commands=kind != "no commands"
    ) as server:
        connection = ["--method", "local"] if kind == "local" else flags(server)
        for command in ("download-results", "list-remote-files"):
            for path in ("no.tar.gz", "no_*.tar.gz", "no/such/folder/x", "no/*/x*"):
                done = cli(
                    command,
                    *connection,
                    "--path",
                    server.storage / path,
                    server=server,
                    cwd=tmp_path,
                )
                assert done.returncode == 4, done.stderr
                assert "hint: python cloud_services.py list-remote-files --path" in done.stderr


def test_a_folder_is_no_file_to_download(server: SSHServer, tmp_path: Path) -> None:
    done = cli(
        "download-results", *flags(server), "--path", server.storage, server=server, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "results_*.tar.gz" in done.stderr


# ── the mounted folder


def test_a_mounted_folder_gets_the_same_check_and_rename(tmp_path: Path) -> None:
    workspace(tmp_path)
    sent = document(
        cli(
            "--json",
            "upload-training",
            "--method",
            "local",
            "--path",
            "disk/deep/",
            "--extract",
            cwd=tmp_path,
        )
    )
    assert sent["check"] == "SHA-256 of the file, read again"
    assert sha256(tmp_path / sent["target"]) == sent["sha256"]
    assert (tmp_path / "disk/deep/workspace/prepared/features/gold_val.csv").exists()
    assert parts(tmp_path / "disk/deep") == []


def test_a_local_upload_that_was_interrupted_continues(tmp_path: Path) -> None:
    file = random_file(tmp_path / "data.bin", 10 * cloud_services.SEGMENT_BYTES)
    disk = tmp_path / "disk"
    disk.mkdir()
    part = disk / transfers.FileSource(file).part_name
    part.write_bytes(file.read_bytes()[: 4 * cloud_services.SEGMENT_BYTES + 5] + b"rubbish")
    result = PaperspaceUploader(path=str(disk)).upload_training_data(file, method="local")
    assert result.moved == 6 * cloud_services.SEGMENT_BYTES
    assert sha256(disk / "data.bin") == sha256(file)


def test_a_longer_leftover_is_cut(server: SSHServer, tmp_path: Path) -> None:
    file = random_file(tmp_path / "data.bin", 3 * cloud_services.SEGMENT_BYTES + 10)
    for folder, connection in (
        (server.storage, flags(server)),
        (tmp_path / "disk", ["--method", "local"]),
    ):
        folder.mkdir(exist_ok=True)
        (folder / transfers.FileSource(file).part_name).write_bytes(
            file.read_bytes() + b"x" * 5_000_000
        )
        done = cli(
            "upload-training",
            *connection,
            "--path",
            folder,
            "--archive",
            file,
            server=server,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        assert sha256(folder / "data.bin") == sha256(file)


# ── errors


def test_two_runs_that_write_one_file_do_not_mix(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    workspace(tmp_path)
    part = tmp_path / cloud_services.part_name("a.tar.gz")
    with part.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        done = cli("create-training-archive", "-o", "a.tar.gz", cwd=tmp_path)
        assert done.returncode == 10, done.stderr
        assert "another run is writing a.tar.gz" in done.stderr
        assert part.exists()
    assert cli("create-training-archive", "-o", "a.tar.gz", cwd=tmp_path).returncode == 0
    assert parts(tmp_path) == []


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def test_an_archive_may_have_a_name_that_the_locale_cannot_show(tmp_path: Path) -> None:
    workspace(tmp_path)
    words = ("create-training-archive", "-o", "ä тик.tar.gz")
    done = cli(*words, cwd=tmp_path, env=environment(None) | ASCII)
    assert done.returncode == 0, done.stderr
    assert cli("verify-archive", "ä тик.tar.gz", cwd=tmp_path).returncode == 0
    assert parts(tmp_path) == []


def test_a_name_from_python_that_the_locale_cannot_write_is_a_usage_error(tmp_path: Path) -> None:
    workspace(tmp_path)
    code = "import cloud_services as c; c.PaperspaceUploader().create_training_archive('\\xe4')"
    env = environment(None) | ASCII | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    last = done.stderr.splitlines()[-1]
    assert last.startswith("cloud_services.UsageError: "), done.stderr
    assert last.endswith("has letters that this locale lacks")


@pytest.mark.parametrize("how", ["sftp", "no sftp", "no commands", "local"])
def test_files_may_have_names_that_the_locale_cannot_show(tmp_path: Path, how: str) -> None:
    names = ["r_a", "r_ü", "r_🙂"]
    with SSHServer(
        tmp_path / "server", sftp=how != "no sftp", commands=how != "no commands"
    ) as server:
        for name in names:
            (server.storage / name).write_text(name)
        done = cli(
            "download-results", "--path", server.storage / "r_*", "--local-path", "here",
            *(["--method", "local"] if how == "local" else flags(server)),
            cwd=tmp_path, env=environment(server) | ASCII,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "here")) == names


def test_no_passphrase_reaches_a_child_or_a_file(tmp_path: Path) -> None:
    settings = SSHSettings.resolve(host="h", passphrase="hunter2")
    assert settings.passphrase == "hunter2"
    uploader = PaperspaceUploader("h", passphrase="hunter2")
    assert "hunter2" not in repr(settings) + repr(vars(uploader))


def test_a_path_nobody_may_write_is_exit_5(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("logging in as somebody else needs root")
    with (
        tempfile.TemporaryDirectory() as keys,
        SSHServer(
            tmp_path / "s", commands=False, config=[f"AuthorizedKeysFile {keys}/keys"]
        ) as server,
    ):
        # The other user's sshd has to read it, and may not enter the test's own folder.
        Path(keys).chmod(0o755)
        shutil.copy(server.authorized_keys, f"{keys}/keys")
        Path(keys, "keys").chmod(0o644)
        file = random_file(tmp_path / "f.bin", 100)
        words = [
            "--host",
            server.host,
            "--port",
            server.port,
            "--user",
            "nobody",
            "--identity",
            server.identity,
        ]
        for path in ("/usr/share", "/root/x/y"):
            done = cli(
                "upload-training",
                *words,
                "--path",
                path,
                "--archive",
                file,
                server=server,
                cwd=tmp_path,
            )
            assert (done.returncode, "permission denied" in done.stderr) == (5, True), done.stderr


def test_a_file_where_a_folder_should_be_is_named(server: SSHServer, tmp_path: Path) -> None:
    random_file(server.storage / "file", 10)
    file = random_file(tmp_path / "f.bin", 100)
    done = cli("upload-training", *flags(server), "--path", server.storage / "file/deeper", "--archive", file,
               server=server, cwd=tmp_path)  # fmt: skip
    assert done.returncode in (2, 4, 7), done.stderr
    assert "file" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("archive", ["missing.tar.gz", "folder"])
def test_an_archive_that_is_no_file_is_refused_before_connecting(
    tmp_path: Path, archive: str
) -> None:
    (tmp_path / "folder").mkdir()
    done = cli(
        "upload-training", "--host", "no-such-host.invalid", "--archive", archive, cwd=tmp_path
    )
    assert done.returncode in (2, 4)
    assert archive in done.stderr


def test_extract_is_refused_where_no_command_runs(tmp_path: Path) -> None:
    workspace(tmp_path)
    with SSHServer(tmp_path / "s", commands=False) as server:
        done = cli(
            "upload-training",
            *flags(server),
            "--path",
            server.storage,
            "--extract",
            server=server,
            cwd=tmp_path,
        )
        assert done.returncode == 5
        assert "--extract" in done.stderr
        assert list(server.storage.iterdir()) == []


def test_an_altered_archive_is_not_unpacked_quietly_there(
    server: SSHServer, tmp_path: Path
) -> None:
    archive = random_file(tmp_path / "t.tar.gz", 5000)
    done = cli("upload-training", *flags(server), "--path", server.storage, "--archive", archive, "--extract",
               server=server, cwd=tmp_path)  # fmt: skip
    assert done.returncode != 0
    assert "cannot unpack" in done.stderr


def test_a_dry_run_sends_nothing_and_asks_nothing(tmp_path: Path) -> None:
    root = workspace(tmp_path)
    (root / "raw_data/ticks/.env").write_text("SECRET=1")
    command = ["upload-training", "--host", "no-such-host.invalid", "--include-ticks", "--dry-run"]
    done = cli(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "workspace/raw_data/ticks/.env (secret: the name matches .env*)" in done.stdout
    plan = document(cli("--json", *command, cwd=tmp_path))
    assert len(plan["files"]) == 6
    assert plan["left_out"][0]["reason"] == "secret: the name matches .env*"
    assert (
        document(
            cli(
                "--json", *command, "--archive", root / "models/checkpoints/last.ckpt", cwd=tmp_path
            )
        )["bytes"]
        == 9000
    )


def test_ticks_without_a_terminal_are_a_usage_error(tmp_path: Path) -> None:
    workspace(tmp_path)
    done = cli("upload-training", "--host", "no-such-host.invalid", "--include-ticks", cwd=tmp_path)
    assert done.returncode == 2
    assert "--no-ask-ticks" in done.stderr


def test_a_missing_package_is_named_before_anything_is_packed(tmp_path: Path) -> None:
    workspace(tmp_path)
    program = (
        "import sys; sys.modules['paramiko'] = None; sys.path.insert(0, sys.argv.pop(1))\n"
        "import cloud_services; cloud_services.pack = None; sys.exit(cloud_services.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(ROOT), "upload-training", "--host", "h"],
        cwd=tmp_path, env=environment(None), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 3
    assert "hint: pip install paramiko" in done.stderr
