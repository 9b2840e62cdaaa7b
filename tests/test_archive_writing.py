"""Archives that tar, gzip and sha256sum accept, the same for the same tree, whole or absent."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import shlex
import signal
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

import cloud_services
from cloud_services import (
    MIB,
    AccessError,
    ArchiveResult,
    CloudError,
    DiskFullError,
    ExitCode,
    IntegrityError,
    NotFoundError,
    Plan,
    Progress,
    RefusedError,
    UsageError,
    create_archive,
    manifest_line,
    pack,
    parse_manifest,
    part_name,
    plan_results,
    plan_training,
)
from tests import support
from tests.conftest import (
    HOSTILE_NAMES,
    OLD,
    SCRIPT,
    Run,
    file_names,
    files,
    make_workspace,
    tree,
    unpack_with_tar,
    write_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TICK = "raw_data/ticks/EURUSD/2023.csv"


def everything(workspace: Path) -> Plan:
    return plan_training(workspace, include_ticks=True, include_cache=True)


def packed(plan: Plan) -> bytes:
    out = io.BytesIO()
    result = pack(plan, out.write, Progress())
    assert result.sha256 == hashlib.sha256(out.getvalue()).hexdigest()
    assert result.archive_bytes == len(out.getvalue())
    return out.getvalue()


def members(archive: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.getmembers()


def patterned(size: int, seed: int = 0) -> bytes:
    """Bytes that differ at every place and with every seed."""
    block = b"".join(hashlib.sha256(f"{seed} {n}".encode()).digest() for n in range(2048))
    return (block * (size // len(block) + 1))[:size]


class Once(Progress):
    """Calls `act` when the first bytes of the wanted file have been read."""

    def __init__(self, act: Callable[[], object], after: int = 0) -> None:
        self.act, self.after, self.acted = act, after, False
        self.seen = 0
        self.begun: list[tuple[str, int | None]] = []
        self.ended = 0

    def begin(self, what: str, total: int | None) -> None:
        self.begun.append((what, total))

    def advance(self, count: int) -> None:
        self.seen += count
        if self.seen > self.after and not self.acted:
            self.acted = True
            self.act()

    def end(self) -> None:
        self.ended += 1


both_engines = pytest.mark.usefixtures("_engine")


# ── plain tools accept it ────────────────────────────────────────────────────────────────────────


@both_engines
def test_tar_and_sha256sum_accept_a_training_archive(workspace: Path, tmp_path: Path) -> None:
    result = create_archive(everything(workspace), tmp_path / "out.tar.gz")
    unpacked = unpack_with_tar(result.path, tmp_path / "unpacked")
    expected = files(tmp_path / "workspace")
    wanted = ("prepared/features", "raw_data")
    assert unpacked == {f"workspace/{n}": c for n, c in expected.items() if n.startswith(wanted)}


@both_engines
def test_tar_and_sha256sum_accept_a_results_archive(workspace: Path, tmp_path: Path) -> None:
    result = create_archive(plan_results(workspace), tmp_path / "out.tar.gz")
    unpacked = unpack_with_tar(result.path, tmp_path / "unpacked", "results.sha256")
    assert {name: len(content) for name, content in unpacked.items()} == {
        file.name: file.size for file in plan_results(workspace).files
    }


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
def test_tar_and_sha256sum_accept_a_hostile_name(
    workspace: Path, tmp_path: Path, name: str
) -> None:
    write_file(workspace / "raw_data/ticks" / name / "inside.csv", b"in a folder")
    write_file(workspace / "raw_data/ticks/sub" / name, b"as a file")
    create_archive(everything(workspace), tmp_path / "out.tar.gz")
    unpacked = unpack_with_tar(tmp_path / "out.tar.gz", tmp_path / "unpacked")
    assert unpacked[f"workspace/raw_data/ticks/{name}/inside.csv"] == b"in a folder"
    assert unpacked[f"workspace/raw_data/ticks/sub/{name}"] == b"as a file"
    assert not (tmp_path / "pwned").exists()


@given(st.sets(file_names(), min_size=1, max_size=5))
def test_tar_and_sha256sum_accept_any_names(names: set[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = make_workspace(Path(folder, "workspace"))
        for name in names:
            write_file(root / "raw_data/ticks" / name, os.fsencode(name))
        plan = plan_training(root, include_ticks=True)
        create_archive(plan, Path(folder, "out.tar.gz"))
        unpacked = unpack_with_tar(Path(folder, "out.tar.gz"), Path(folder, "unpacked"))
        for name in names:
            assert unpacked[f"workspace/raw_data/ticks/{name}"] == os.fsencode(name)


def test_the_manifest_is_what_sha256sum_itself_would_write(workspace: Path, tmp_path: Path) -> None:
    for name in HOSTILE_NAMES:
        write_file(workspace / "raw_data/ticks" / name, os.fsencode(name))
    plan = everything(workspace)
    create_archive(plan, tmp_path / "out.tar.gz")
    subprocess.run(["tar", "-xzf", "out.tar.gz", "training.sha256"], cwd=tmp_path, check=True)
    written = subprocess.run(
        ["sha256sum", "--", *(file.name for file in plan.files)],
        cwd=tmp_path, check=True, capture_output=True,
    )  # fmt: skip
    assert (tmp_path / "training.sha256").read_bytes() == written.stdout


@given(st.dictionaries(file_names(), st.binary(min_size=32, max_size=32).map(bytes.hex)))
def test_a_manifest_read_again_says_the_same(entries: dict[str, str]) -> None:
    content = b"".join(manifest_line(digest, name) for name, digest in entries.items())
    assert parse_manifest(content) == entries


@both_engines
@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, MIB - 1, MIB, MIB + 1, 2 * MIB + 512])
def test_files_of_awkward_sizes_arrive_whole(workspace: Path, tmp_path: Path, size: int) -> None:
    write_file(workspace / TICK, patterned(size))
    create_archive(everything(workspace), tmp_path / "out.tar.gz")
    unpacked = unpack_with_tar(tmp_path / "out.tar.gz", tmp_path / "unpacked")
    assert unpacked[f"workspace/{TICK}"] == patterned(size)


@pytest.mark.parametrize("mtime", [-86400, 0, 2**33, 2**35])
def test_files_from_before_1970_and_from_the_far_future_are_packed(
    workspace: Path, tmp_path: Path, mtime: int
) -> None:
    os.utime(workspace / TICK, (mtime, mtime))
    found = (workspace / TICK).stat().st_mtime
    create_archive(everything(workspace), tmp_path / "out.tar.gz")
    [info] = [m for m in members((tmp_path / "out.tar.gz").read_bytes()) if m.name.endswith(TICK)]
    assert info.mtime == max(0, found)


# ── same tree, same bytes ────────────────────────────────────────────────────────────────────────


@both_engines
def test_a_copied_tree_gives_the_same_bytes(workspace: Path, tmp_path: Path) -> None:
    before = packed(everything(workspace))
    subprocess.run(["cp", "-a", workspace, tmp_path / "another name"], check=True)
    assert packed(everything(tmp_path / "another name")) == before
    assert packed(everything(workspace)) == before


def test_neither_order_of_creation_nor_owner_nor_permissions_matter(
    workspace: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    for path in sorted((p for p in workspace.rglob("*") if p.is_file()), reverse=True):
        target = copy / path.relative_to(workspace)
        write_file(target, path.read_bytes(), int(path.stat().st_mtime))
        target.chmod(0o600)
        if os.geteuid() == 0:
            os.chown(target, 1234, 1234)
    assert packed(everything(copy)) == packed(everything(workspace))


@both_engines
def test_the_gzip_header_holds_neither_clock_nor_name(workspace: Path) -> None:
    header = packed(everything(workspace))[:10]
    assert header[:4] == b"\x1f\x8b\x08\x00"
    assert header[4:8] == bytes(4)


def test_the_number_of_processors_does_not_show_in_the_bytes(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("isal.igzip_threaded")
    write_file(workspace / TICK, patterned(3 * MIB))
    archives = set()
    for threads in (1, 2, 4):
        monkeypatch.setattr(cloud_services, "ISAL_THREADS", threads)
        archives.add(packed(everything(workspace)))
    assert len(archives) == 1


def test_a_different_byte_a_different_name_or_time_gives_other_bytes(workspace: Path) -> None:
    seen = {packed(everything(workspace))}
    write_file(workspace / TICK, b"other")
    seen.add(packed(everything(workspace)))
    os.utime(workspace / TICK, (OLD + 1, OLD + 1))
    seen.add(packed(everything(workspace)))
    (workspace / TICK).rename(workspace / "raw_data/ticks/renamed.csv")
    seen.add(packed(everything(workspace)))
    assert len(seen) == 4


# ── what members look like ───────────────────────────────────────────────────────────────────────


def test_members_are_plain_files_below_workspace_with_the_manifest_last(workspace: Path) -> None:
    (workspace / TICK).chmod(0o4751)
    found = members(packed(everything(workspace)))
    names = [info.name for info in found]
    assert names == [*(file.name for file in everything(workspace).files), "training.sha256"]
    assert all(name.startswith("workspace/") for name in names[:-1])
    assert all(info.isreg() for info in found)
    assert {(i.uid, i.gid, i.uname, i.gname) for i in found} == {(0, 0, "", "")}
    modes = {info.name: info.mode for info in found}
    assert modes.pop(f"workspace/{TICK}") == 0o755
    assert set(modes.values()) == {0o644}


def test_members_carry_the_time_their_files_were_written(workspace: Path) -> None:
    found = {info.name: info.mtime for info in members(packed(everything(workspace)))}
    newest = found.pop("training.sha256")
    assert found == {file.name: file.mtime_ns // 10**9 for file in everything(workspace).files}
    assert newest == max(found.values())


def test_the_result_says_what_was_packed(workspace: Path, tmp_path: Path) -> None:
    result = create_archive(everything(workspace), tmp_path / "out.tar.gz")
    content = (tmp_path / "out.tar.gz").read_bytes()
    assert isinstance(result, ArchiveResult)
    assert bool(result)
    assert (result.files, result.input_bytes) == (8, everything(workspace).total_bytes)
    assert result.archive_bytes == len(content)
    assert result.sha256 == hashlib.sha256(content).hexdigest()


def test_progress_hears_every_byte_once_and_its_end(workspace: Path, tmp_path: Path) -> None:
    progress = Once(lambda: None)
    plan = everything(workspace)
    create_archive(plan, tmp_path / "out.tar.gz", progress)
    assert progress.begun == [("packing", plan.total_bytes)]
    assert (progress.seen, progress.ended) == (plan.total_bytes, 1)


# ── files that change while they are packed ──────────────────────────────────────────────────────

ORIGINAL = patterned(2 * MIB + 300)


def append(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"more\n" * 100)


def truncate(path: Path) -> None:
    os.truncate(path, len(ORIGINAL) // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def rewrite(path: Path) -> None:
    with path.open("r+b") as stream:
        stream.write(patterned(len(ORIGINAL), seed=1))


def rewrite_and_grow(path: Path) -> None:
    rewrite(path)
    append(path)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"another file")
    other.replace(path)


def touch(path: Path) -> None:
    path.touch()


@pytest.fixture
def log_file(workspace: Path) -> Path:
    """A log of a few blocks that something else may still write to."""
    return write_file(workspace / "models/logs/events.out.tfevents", ORIGINAL)


@both_engines
@pytest.mark.parametrize("change", [append, replace, Path.unlink, touch], ids=lambda c: c.__name__)
def test_a_file_that_grows_is_packed_as_it_was_at_the_start(
    workspace: Path, tmp_path: Path, log_file: Path, change: Callable[[Path], None]
) -> None:
    plan = plan_results(workspace)
    before = sum(file.size for file in plan.files if "logs" not in file.name)
    first = next(i for i, file in enumerate(plan.files) if "logs" in file.name)
    progress = Once(lambda: change(log_file), after=sum(f.size for f in plan.files[:first]))
    result = create_archive(plan, tmp_path / "out.tar.gz", progress)
    assert progress.acted
    unpacked = unpack_with_tar(result.path, tmp_path / "unpacked", "results.sha256")
    assert unpacked["workspace/models/logs/events.out.tfevents"] == ORIGINAL
    assert result.input_bytes == before + len(ORIGINAL)


def test_a_file_that_grew_after_planning_is_packed_whole_and_counted_right(
    workspace: Path, tmp_path: Path, log_file: Path
) -> None:
    plan = plan_results(workspace)
    append(log_file)
    result = create_archive(plan, tmp_path / "out.tar.gz")
    unpacked = unpack_with_tar(result.path, tmp_path / "unpacked", "results.sha256")
    content = unpacked["workspace/models/logs/events.out.tfevents"]
    assert content.startswith(ORIGINAL)
    assert log_file.read_bytes().startswith(content)
    assert result.input_bytes == sum(map(len, unpacked.values()))


CHANGES = pytest.mark.parametrize(
    "change", [truncate, empty, rewrite, rewrite_and_grow], ids=lambda change: change.__name__
)


@both_engines
@CHANGES
def test_a_file_that_changes_otherwise_is_an_error_that_names_it(
    workspace: Path, tmp_path: Path, log_file: Path, change: Callable[[Path], None]
) -> None:
    output = write_file(tmp_path / "out.tar.gz", b"the old archive")
    plan = plan_results(workspace)
    first = next(i for i, file in enumerate(plan.files) if "logs" in file.name)
    progress = Once(lambda: change(log_file), after=sum(f.size for f in plan.files[:first]))
    with pytest.raises(IntegrityError, match=r"events\.out\.tfevents changed") as caught:
        create_archive(plan, output, progress)
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert progress.ended == 1
    assert output.read_bytes() == b"the old archive"
    assert set(files(tmp_path)) - {"out.tar.gz"} == {
        f"workspace/{name}" for name in files(workspace)
    }


@pytest.mark.parametrize("change", [truncate, empty, rewrite], ids=lambda change: change.__name__)
def test_a_file_that_changes_between_planning_and_packing_is_an_error_that_names_it(
    workspace: Path, tmp_path: Path, log_file: Path, change: Callable[[Path], None]
) -> None:
    plan = plan_results(workspace)
    change(log_file)
    with pytest.raises(IntegrityError, match=r"events\.out\.tfevents changed"):
        create_archive(plan, tmp_path / "out.tar.gz")
    assert not (tmp_path / "out.tar.gz").exists()


@pytest.mark.parametrize("name", ["plain.csv", "a b.csv", "ticks [2024].csv", "it's *.csv"])
def test_the_hint_of_a_changed_file_is_an_exclude_that_takes_it_out(
    workspace: Path, tmp_path: Path, name: str
) -> None:
    path = write_file(workspace / "raw_data/ticks" / name, ORIGINAL)
    plan = everything(workspace)
    os.truncate(path, 3)
    with pytest.raises(IntegrityError) as caught:
        create_archive(plan, tmp_path / "out.tar.gz")
    flag, pattern = shlex.split(caught.value.hint[caught.value.hint.index("--exclude") :])
    assert flag == "--exclude"
    again = plan_training(workspace, include_ticks=True, exclude=[pattern])
    assert [item.name for item in again.left_out] == [f"workspace/raw_data/ticks/{name}"]


def test_a_file_that_vanished_is_named(workspace: Path, tmp_path: Path) -> None:
    plan = everything(workspace)
    (workspace / TICK).unlink()
    with pytest.raises(NotFoundError, match=r"2023\.csv: does not exist"):
        create_archive(plan, tmp_path / "out.tar.gz")
    assert not list(tmp_path.glob("*.tar.gz*")) + list(tmp_path.glob(".*.part"))


def test_a_file_that_cannot_be_read_is_named(plain_user: Path) -> None:
    workspace = make_workspace(plain_user / "workspace")
    (workspace / TICK).chmod(0)
    with pytest.raises(AccessError, match=r"2023\.csv: permission denied"):
        create_archive(everything(workspace), plain_user / "out.tar.gz")
    assert [path.name for path in plain_user.iterdir()] == ["workspace"]


# ── the output: whole or absent ──────────────────────────────────────────────────────────────────


def test_an_existing_archive_is_replaced_only_at_the_end(workspace: Path, tmp_path: Path) -> None:
    output = write_file(tmp_path / "out.tar.gz", b"the old archive")
    plan = everything(workspace)
    seen: list[bytes] = []
    create_archive(
        plan, output, Once(lambda: seen.append(output.read_bytes()), plan.total_bytes - 1)
    )
    assert seen == [b"the old archive"]
    gzip.decompress(output.read_bytes())


def test_folders_above_the_output_are_made(workspace: Path, tmp_path: Path) -> None:
    result = create_archive(everything(workspace), tmp_path / "new/deeper/out.tar.gz")
    assert result.path.is_file()


@pytest.mark.parametrize("name", [f"{'n' * 248}.tar.gz", *HOSTILE_NAMES], ids=repr)
def test_the_output_may_have_any_name(workspace: Path, tmp_path: Path, name: str) -> None:
    result = create_archive(everything(workspace), tmp_path / "out" / name)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [name]
    gzip.decompress(result.path.read_bytes())


def test_a_folder_as_output_is_a_usage_error(workspace: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a folder") as caught:
        create_archive(everything(workspace), tmp_path)
    assert "--output" in caught.value.hint


@pytest.mark.parametrize("how", ["itself", "a symbolic link", "a hard link", "another path"])
def test_an_output_that_is_one_of_the_files_to_pack_is_refused(
    workspace: Path, tmp_path: Path, how: str
) -> None:
    checkpoint, output = workspace / "models/checkpoints/last.ckpt", tmp_path / "out.tar.gz"
    if how == "a symbolic link":
        output.symlink_to(checkpoint)
    elif how == "a hard link":
        output.hardlink_to(checkpoint)
    else:
        output = checkpoint if how == "itself" else workspace / "raw_data/../models" / TAIL
    before = tree(tmp_path)
    with pytest.raises(UsageError, match="is one of the files to pack") as refused:
        create_archive(plan_results(workspace), output)
    assert "--output" in refused.value.hint
    assert tree(tmp_path) == before


TAIL = "checkpoints/last.ckpt"


def test_a_file_that_is_not_packed_may_be_replaced_by_the_archive(workspace: Path) -> None:
    output = workspace / "raw_data/ticks/notes.txt"
    assert create_archive(plan_training(workspace), output)
    assert output.read_bytes().startswith(b"\x1f\x8b")


def test_an_output_below_a_file_is_a_clear_error(workspace: Path, tmp_path: Path) -> None:
    write_file(tmp_path / "file")
    for output in ("file/out.tar.gz", "file/deeper/out.tar.gz"):
        with pytest.raises(CloudError, match="file"):
            create_archive(everything(workspace), tmp_path / output)


def test_an_output_in_a_closed_folder_is_a_clear_error(plain_user: Path) -> None:
    workspace = make_workspace(plain_user / "workspace")
    (plain_user / "closed").mkdir(mode=0o500)
    (plain_user / "dark").mkdir(mode=0)
    for output in ("closed/out.tar.gz", "dark/out.tar.gz", "dark/deeper/out.tar.gz"):
        with pytest.raises(AccessError, match="permission denied"):
            create_archive(everything(workspace), plain_user / output)


def test_a_pipe_or_a_device_as_output_is_not_replaced_by_a_file(
    workspace: Path, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="pipe"):
        create_archive(everything(workspace), tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_planted_where_the_archive_grows_is_not_followed(
    workspace: Path, tmp_path: Path
) -> None:
    victim = write_file(tmp_path / "victim", b"precious")
    (tmp_path / part_name("out.tar.gz")).symlink_to(victim)
    with pytest.raises(RefusedError, match="symbolic link"):
        create_archive(everything(workspace), tmp_path / "out.tar.gz")
    assert victim.read_bytes() == b"precious"
    assert not (tmp_path / "out.tar.gz").exists()


@both_engines
def test_a_limit_on_the_file_size_leaves_the_old_archive(
    workspace: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write_file(workspace / TICK, patterned(MIB))
    output = write_file(tmp_path / "out.tar.gz", b"the old archive")
    block = "" if "isal" in request.node.name else "sys.modules['isal.igzip_threaded'] = None; "
    code = f"import sys; {block}import cloud_services as c; sys.exit(c.main(sys.argv[1:]))"
    limited = subprocess.run(
        ["bash", "-c", 'ulimit -f 16; exec "$@"', "-", sys.executable, "-c", code,
         "create-training-archive", "--include-ticks", "--no-ask-ticks", "-o", "out.tar.gz"],
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert limited.returncode == ExitCode.TRANSFER, limited.stderr
    assert "out.tar.gz: the file is too large" in limited.stderr
    assert "free some space" in limited.stderr
    assert "Traceback" not in limited.stderr
    assert output.read_bytes() == b"the old archive"
    assert not list(tmp_path.glob(".*.part"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB; only root can mount one."""
    folder = tmp_path / "small disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here; it takes root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@both_engines
def test_a_full_disk_leaves_the_old_archive(workspace: Path, small_disk: Path) -> None:
    write_file(workspace / TICK, patterned(8 * MIB) + os.urandom(MIB))
    output = write_file(small_disk / "out.tar.gz", b"the old archive")
    with pytest.raises(DiskFullError, match=r"out\.tar\.gz: the disk is full"):
        create_archive(everything(workspace), output)
    assert tree(small_disk) == {"out.tar.gz": b"the old archive"}


def test_killed_in_the_middle_the_old_archive_stays(workspace: Path, tmp_path: Path) -> None:
    write_file(workspace / TICK, patterned(2 * MIB))
    output = write_file(tmp_path / "out.tar.gz", b"the old archive")
    code = """if True:
        import sys, time, cloud_services as c
        class Stuck(c.Progress):
            def advance(self, count):
                if count > 1000:
                    print("packing", flush=True)
                    time.sleep(60)
        c.create_archive(c.plan_training("workspace", True), "out.tar.gz", Stuck())"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == b"packing\n"
        process.send_signal(signal.SIGKILL)
    assert output.read_bytes() == b"the old archive"
    create_archive(everything(workspace), output)
    assert len(unpack_with_tar(output, tmp_path / "unpacked")) == 8


def test_too_little_room_is_only_a_warning_because_the_archive_is_smaller(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(cloud_services, "free_space", lambda _: 10)
    monkeypatch.setattr(cloud_services.log, "propagate", True)
    caplog.set_level("WARNING", cloud_services.log.name)
    create_archive(everything(workspace), tmp_path / "out.tar.gz")
    assert "less room" in caplog.text


# ── with less installed ──────────────────────────────────────────────────────────────────────────

BARE = (sys.executable, "-S", "-E")


def bare_commands(run: Run, tmp_path: Path) -> Path:
    """Create, verify and extract on a Python that has the standard library alone."""
    lacking = subprocess.run([*BARE, "-c", "import paramiko"], capture_output=True, check=False)
    assert b"ModuleNotFoundError" in lacking.stderr
    for arguments in (
        ["create-training-archive", "-o", "out.tar.gz", "--include-ticks", "--no-ask-ticks"],
        ["create-results-archive", "-o", "results.tar.gz"],
        ["verify-archive", "out.tar.gz"],
        ["extract-archive", "out.tar.gz", "--into", "into"],
    ):
        result = run(*arguments, python=BARE)
        assert result.returncode == 0, result.stderr
    return tmp_path / "into"


def test_archive_commands_work_on_a_bare_python(workspace: Path, tmp_path: Path, run: Run) -> None:
    into = bare_commands(run, tmp_path)
    assert (
        unpack_with_tar(tmp_path / "out.tar.gz", tmp_path / "by tar").items() <= files(into).items()
    )
    assert (into / "workspace" / TICK).read_bytes() == (workspace / TICK).read_bytes()


@pytest.mark.usefixtures("workspace")
def test_archive_commands_work_on_a_bare_python_beside_a_dotenv(tmp_path: Path, run: Run) -> None:
    write_file(tmp_path / ".env", b"PAPERSPACE_HOST=gpu.example.com\n")
    bare_commands(run, tmp_path)


def test_both_compressors_pack_the_same_content(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("isal.igzip_threaded")
    write_file(workspace / TICK, patterned(MIB + 5))
    with_isal = packed(everything(workspace))
    monkeypatch.setitem(sys.modules, "isal.igzip_threaded", None)
    without = packed(everything(workspace))
    assert with_isal != without
    assert gzip.decompress(with_isal) == gzip.decompress(without)


@pytest.mark.parametrize("short", [1, 5, 3000])
def test_an_archive_that_is_cut_in_its_last_bytes_is_an_error(tmp_path: Path, short: int) -> None:
    """The last write may succeed in part; a file one byte short must not get the name."""
    support.workspace(tmp_path, 50_000)
    made = support.cli("--json", "create-training-archive", "-o", "w.tar.gz", cwd=tmp_path)
    limit = support.document(made)["archive_bytes"] - short
    program = (
        "import resource, sys, cloud_services\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "sys.exit(cloud_services.main(['create-training-archive', '-o', 'cut.tar.gz']))"
    )
    env = {**support.environment(None), "PYTHONPATH": str(support.ROOT)}
    env["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 7, done.stderr
    assert not (tmp_path / "cut.tar.gz").exists()
    assert support.parts(tmp_path) == []
