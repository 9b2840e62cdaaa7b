"""Archives are read to their end, compared with their manifest, and unpacked nowhere but below."""

from __future__ import annotations

import gzip
import hashlib
import os
import signal
import socket
import stat
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
    CloudError,
    DiskFullError,
    ExitCode,
    IntegrityError,
    NotFoundError,
    Progress,
    RefusedError,
    UsageError,
    create_archive,
    extract_archive,
    manifest_line,
    plan_results,
    plan_training,
    verify_archive,
)
from tests.conftest import (
    HOSTILE_NAMES,
    OLD,
    SCRIPT,
    file_names,
    files,
    make_workspace,
    tree,
    write_file,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

Entry = tuple[tarfile.TarInfo, bytes]


def entry(name: str, content: bytes = b"content", **fields: object) -> Entry:
    """One member of an archive made by hand, with any header fields."""
    info = tarfile.TarInfo(name)
    info.size, info.mtime = len(content), OLD
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def folder(name: str) -> Entry:
    return entry(name, b"", type=tarfile.DIRTYPE, mode=0o755)


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> Entry:
    return entry(name, b"", type=kind, linkname=target)


def manifest_of(*entries: Entry) -> Entry:
    lines = (manifest_line(hashlib.sha256(data).hexdigest(), info.name) for info, data in entries)
    return entry("training.sha256", b"".join(lines))


def tar_bytes(*entries: Entry, end: int = 2) -> bytes:
    """A tar whose headers say what we want, be it true or not."""
    blocks = []
    for info, content in entries:
        blocks += [info.tobuf(tarfile.GNU_FORMAT), content, bytes(-len(content) % 512)]
    return b"".join(blocks) + bytes(512 * end)


def archive_of(path: Path, *entries: Entry, end: int = 2) -> Path:
    return write_file(path, gzip.compress(tar_bytes(*entries, end=end), mtime=0))


def good_entries() -> list[Entry]:
    entries = [entry("workspace/a.csv", b"aaa" * 300), entry("workspace/b/c.csv", b"c" * 512)]
    return [*entries, manifest_of(*entries)]


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A good little archive, made by hand."""
    return archive_of(tmp_path / "archive.tar.gz", *good_entries())


@pytest.fixture
def into(tmp_path: Path) -> Path:
    """An empty folder to unpack into."""
    path = tmp_path / "into"
    path.mkdir()
    return path


both_engines = pytest.mark.usefixtures("_engine")


def refused(
    archive: Path, into: Path, kind: type[CloudError] = IntegrityError, match: str | None = None
) -> CloudError:
    """Neither verified nor unpacked, with an error that names the archive, and nothing written."""
    before = tree(into.parent)
    with pytest.raises(kind, match=match):
        verify_archive(archive)
    with pytest.raises(kind, match=match) as caught:
        extract_archive(archive, into)
    assert tree(into.parent) == before
    assert archive.name in str(caught.value)
    return caught.value


# ── what was packed comes back ───────────────────────────────────────────────────────────────────


@both_engines
def test_what_was_packed_comes_back(workspace: Path, tmp_path: Path, into: Path) -> None:
    for name in HOSTILE_NAMES:
        write_file(workspace / "models/metrics" / name, os.fsencode(name))
    plan = plan_results(workspace)
    made = create_archive(plan, tmp_path / "out.tar.gz")
    result = extract_archive(made.path, into)
    unpacked = files(into)
    assert set(unpacked) == {file.name for file in plan.files} | {"results.sha256"}
    assert all(unpacked[f.name] == Path(f.source).read_bytes() for f in plan.files)
    assert (result.manifest, result.sha256) == ("results.sha256", made.sha256)
    assert result.files == made.files + 1
    assert result.into == into
    assert bool(result)


@given(
    st.dictionaries(
        st.lists(file_names(), min_size=1, max_size=3).map("/".join),
        st.binary(max_size=2000),
        max_size=6,
    )
)
def test_any_tree_comes_back(content: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = make_workspace(Path(name, "workspace"))
        for file, data in content.items():
            path = root / "raw_data/ticks/tree" / file
            if not path.exists() and not any(above.is_file() for above in path.parents):
                write_file(path, data)
        create_archive(plan_training(root, True, True), Path(name, "out.tar.gz"))
        extract_archive(Path(name, "out.tar.gz"), Path(name, "into"))
        unpacked = files(Path(name, "into/workspace"))
        expected = files(root)
        assert unpacked == {n: c for n, c in expected.items() if n in unpacked}
        assert {n for n in expected if n.startswith("raw_data")} <= set(unpacked)


def test_times_come_back(workspace: Path, tmp_path: Path, into: Path) -> None:
    create_archive(plan_training(workspace, True), tmp_path / "out.tar.gz")
    extract_archive(tmp_path / "out.tar.gz", into)
    for name in files(into / "workspace"):
        expected = int((workspace / name).stat().st_mtime)
        assert (into / "workspace" / name).stat().st_mtime == expected


def test_verifying_writes_nothing_and_says_what_it_read(archive: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    result = verify_archive(archive)
    assert tree(tmp_path) == before
    assert result.sha256 == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert result.archive_bytes == archive.stat().st_size
    assert (result.files, result.manifest, result.into) == (3, "training.sha256", None)


def test_the_destination_is_made(archive: Path, tmp_path: Path) -> None:
    extract_archive(archive, tmp_path / "new/deeper")
    assert (tmp_path / "new/deeper/workspace/a.csv").read_bytes() == b"aaa" * 300


def test_unpacking_again_replaces_the_files(archive: Path, into: Path) -> None:
    write_file(into / "workspace/a.csv", b"old")
    write_file(into / "workspace/mine.csv", b"not in the archive")
    for _ in range(2):
        extract_archive(archive, into)
        assert (into / "workspace/a.csv").read_bytes() == b"aaa" * 300
    assert (into / "workspace/mine.csv").read_bytes() == b"not in the archive"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_are_plain_whatever_the_header_says(
    tmp_path: Path, into: Path, umask: int
) -> None:
    archive = archive_of(
        tmp_path / "a.tar.gz",
        entry("d/setuid", mode=0o6755, uid=12345, gid=12345, uname="root", gname="root"),
        entry("d/open", mode=0o1666),
        entry("d/closed", mode=0),
    )
    before = os.umask(umask)
    try:
        extract_archive(archive, into)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (into / "d").iterdir()}
    plain = 0o666 & ~umask
    assert modes == {"setuid": 0o777 & ~umask, "open": plain, "closed": plain}
    assert stat.S_IMODE((into / "d").stat().st_mode) == 0o777 & ~umask
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in into.rglob("*")}
    assert owners == {(os.geteuid(), os.getegid())}


# ── archives of other makers ─────────────────────────────────────────────────────────────────────


def foreign_tree(root: Path) -> Path:
    write_file(root / "workspace/a.csv", b"a")
    write_file(root / "workspace" / ("long" * 40) / ("name" * 40 + "é.csv"), b"long")
    (root / "workspace/empty").mkdir()
    return root


@both_engines
@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
@pytest.mark.parametrize("what", ["workspace", ".", "./workspace"])
def test_archives_of_plain_tar_are_accepted_with_folders_and_without_manifest(
    tmp_path: Path, into: Path, tar_format: str, what: str
) -> None:
    source = foreign_tree(tmp_path / "source")
    archive = tmp_path / "plain.tar.gz"
    subprocess.run(
        ["tar", f"--format={tar_format}", "-czf", archive, "-C", source, what], check=True
    )
    result = extract_archive(archive, into)
    assert result.manifest is None
    assert result.files == 2
    assert tree(into) == tree(source)


def test_a_manifest_made_by_sha256sum_counts(tmp_path: Path, into: Path) -> None:
    source = foreign_tree(tmp_path / "source")
    make = "find workspace -type f -exec sha256sum {} + > training.sha256"
    subprocess.run(["sh", "-c", make], cwd=source, check=True)
    archive = tmp_path / "plain.tar.gz"
    subprocess.run(
        ["tar", "-czf", archive, "-C", source, "training.sha256", "workspace"], check=True
    )
    assert extract_archive(archive, into).manifest == "training.sha256"


def test_a_manifest_in_a_folder_is_a_file_like_any_other(tmp_path: Path, into: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", entry("workspace/training.sha256", b"garbage"))
    assert extract_archive(archive, into).manifest is None
    assert (into / "workspace/training.sha256").read_bytes() == b"garbage"


def test_folders_before_or_after_their_files_are_the_same(tmp_path: Path, into: Path) -> None:
    archive = archive_of(
        tmp_path / "a.tar.gz", entry("a/b/c"), folder("a/b"), folder("a/"), folder("a"), folder("d")
    )
    extract_archive(archive, into)
    assert tree(into) == {"a": None, "a/b": None, "a/b/c": b"content", "d": None}


@both_engines
def test_the_padding_of_tapes_is_accepted(tmp_path: Path, into: Path) -> None:
    extract_archive(archive_of(tmp_path / "a.tar.gz", *good_entries(), end=20 * 16), into)
    assert len(files(into)) == 3


# ── damage ───────────────────────────────────────────────────────────────────────────────────────


@both_engines
@pytest.mark.parametrize("part", range(40))
def test_a_truncated_archive_is_refused(
    workspace: Path, tmp_path: Path, into: Path, part: int
) -> None:
    made = create_archive(plan_training(workspace, True), tmp_path / "out.tar.gz")
    content = made.path.read_bytes()
    cut = len(content) * part // 30 if part < 30 else len(content) - (40 - part)
    made.path.write_bytes(content[:cut])
    refused(made.path, into, match="truncated or altered")


@both_engines
@pytest.mark.parametrize("part", range(20))
def test_a_tar_truncated_inside_a_whole_gzip_is_refused(
    archive: Path, into: Path, part: int
) -> None:
    content = gzip.decompress(archive.read_bytes())
    last = content.rstrip(b"\0")
    places = [*(len(last) * part // 16 for part in range(16)), 512, 1024 + 512, 3072, len(last)]
    archive.write_bytes(gzip.compress(content[: places[part]]))
    refused(archive, into, match="truncated or altered")


@both_engines
@pytest.mark.parametrize("content", [b"", b"plain text\n" * 100, b"PK\3\4" + bytes(600)])
def test_what_is_no_gzip_is_refused(tmp_path: Path, into: Path, content: bytes) -> None:
    refused(write_file(tmp_path / "a.tar.gz", content), into, match="truncated or altered")


@both_engines
@pytest.mark.parametrize("content", [b"", b"plain text\n" * 100, gzip.compress(b"twice", mtime=0)])
def test_what_is_no_tar_inside_is_refused(tmp_path: Path, into: Path, content: bytes) -> None:
    archive = write_file(tmp_path / "a.tar.gz", gzip.compress(content))
    refused(archive, into, match="truncated or altered")


def test_a_tar_without_gzip_is_refused(tmp_path: Path, into: Path) -> None:
    refused(write_file(tmp_path / "a.tar.gz", tar_bytes(*good_entries())), into)


def harmless_or_refused(content: bytes, expected: dict[str, bytes]) -> None:
    """What cannot be noticed must not matter; what is noticed leaves nothing behind."""
    with tempfile.TemporaryDirectory() as name:
        into = Path(name, "into")
        into.mkdir()
        archive = write_file(Path(name, "a.tar.gz"), content)
        try:
            extract_archive(archive, into)
        except IntegrityError:
            assert tree(Path(name)) == {"a.tar.gz": content, "into": None}
        else:
            assert files(into) == expected


GOOD = {info.name: content for info, content in good_entries()}
GOOD_TAR = tar_bytes(*good_entries())
GOOD_GZIP = gzip.compress(GOOD_TAR, mtime=0)
NOISE = b"".join(hashlib.sha256(bytes([n])).digest() for n in range(64))
BARE_GZIP = gzip.compress(tar_bytes(entry("noise", NOISE)), mtime=0)


@both_engines
@given(st.integers(0, 8 * len(GOOD_GZIP) - 1))
def test_a_flipped_bit_in_the_gzip_is_noticed(bit: int) -> None:
    content = bytearray(GOOD_GZIP)
    content[bit // 8] ^= 1 << bit % 8
    harmless_or_refused(bytes(content), GOOD)


@both_engines
@given(st.integers(0, 8 * len(BARE_GZIP) - 1))
def test_without_a_manifest_the_checksum_of_gzip_notices_a_flipped_bit(bit: int) -> None:
    content = bytearray(BARE_GZIP)
    content[bit // 8] ^= 1 << bit % 8
    harmless_or_refused(bytes(content), {"noise": NOISE})


@both_engines
@given(st.integers(0, 8 * len(GOOD_TAR) - 1))
def test_a_flipped_bit_inside_the_tar_is_noticed(bit: int) -> None:
    content = bytearray(GOOD_TAR)
    content[bit // 8] ^= 1 << bit % 8
    harmless_or_refused(gzip.compress(bytes(content)), GOOD)


@both_engines
@pytest.mark.parametrize("place", [-8, -4, len(BARE_GZIP) // 2])
def test_a_wrong_checksum_a_wrong_length_and_wrong_content_are_refused(
    tmp_path: Path, into: Path, place: int
) -> None:
    content = bytearray(BARE_GZIP)
    content[place] ^= 1
    refused(write_file(tmp_path / "a.tar.gz", bytes(content)), into, match="truncated or altered")


@pytest.mark.parametrize("place", [b"aaa", b"ccc", b"workspace/b", b"ustar"])
def test_altered_content_name_header_and_manifest_are_refused(
    archive: Path, into: Path, place: bytes
) -> None:
    content = bytearray(GOOD_TAR)
    content[GOOD_TAR.index(place)] ^= 1
    archive.write_bytes(gzip.compress(bytes(content)))
    refused(archive, into)


@both_engines
@pytest.mark.parametrize(
    "trailing",
    [b"garbage", gzip.compress(b"second member", mtime=0), GOOD_GZIP, GOOD_GZIP[:20], b"\x1f\x8b"],
    ids=["garbage", "a second gzip", "a second archive", "half an archive", "a gzip's first bytes"],
)
def test_what_follows_the_end_is_refused(archive: Path, into: Path, trailing: bytes) -> None:
    archive.write_bytes(archive.read_bytes() + trailing)
    refused(archive, into, match="truncated or altered")


@both_engines
def test_endless_zeros_after_the_end_are_refused(tmp_path: Path, into: Path) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", *good_entries(), end=6 * 2048)
    refused(archive, into, match="something follows its end")


@both_engines
def test_bytes_after_the_tar_but_inside_the_gzip_are_refused(archive: Path, into: Path) -> None:
    archive.write_bytes(gzip.compress(GOOD_TAR + bytes(5000) + b"x" + bytes(5000)))
    refused(archive, into, match="something follows its end")


# ── the manifest ─────────────────────────────────────────────────────────────────────────────────


def test_a_missing_an_extra_and_a_renamed_member_are_refused(tmp_path: Path, into: Path) -> None:
    one, two, both = good_entries()
    renamed = entry("workspace/other.csv", one[1])
    for entries, what in (
        ([one, both], "missing: workspace/b/c.csv"),
        ([one, two, entry("extra"), both], "not in its manifest: extra"),
        ([renamed, two, both], "missing: workspace/a.csv"),
        ([entry(one[0].name, b"other"), two, both], "altered: workspace/a.csv"),
        ([both], "missing"),
    ):
        refused(archive_of(tmp_path / "a.tar.gz", *entries), into, match=what)


def test_the_manifest_may_come_first(tmp_path: Path, into: Path) -> None:
    one, two, both = good_entries()
    assert extract_archive(archive_of(tmp_path / "a.tar.gz", both, one, two), into).manifest


@pytest.mark.parametrize(
    "content",
    [
        b"garbage\n",
        b"\x00\xff\xfe" * 100,
        b"0" * 63 + b"  workspace/a.csv\n",
        b"g" * 64 + b"  workspace/a.csv\n",
        b"0" * 64 + b" workspace/a.csv\n",
        b"0" * 64 + b"  \n",
        b"#!/bin/sh\n",
    ],
)
def test_a_garbage_manifest_is_refused(tmp_path: Path, into: Path, content: bytes) -> None:
    entries = [entry("workspace/a.csv"), entry("training.sha256", content)]
    refused(archive_of(tmp_path / "a.tar.gz", *entries), into, match="manifest")


def test_two_manifests_are_refused(tmp_path: Path, into: Path) -> None:
    one = entry("workspace/a.csv")
    for second in ("results.sha256", "training.sha256"):
        other = entry(second, manifest_of(one)[1])
        refused(archive_of(tmp_path / "a.tar.gz", one, manifest_of(one), other), into)


@pytest.mark.parametrize("name", ["training.sha256", "results.sha256"])
def test_a_manifest_that_is_a_folder_or_a_link_does_not_stand_in_for_one(
    tmp_path: Path, into: Path, name: str
) -> None:
    made = archive_of(tmp_path / "a.tar.gz", entry("a"), folder(name))
    assert verify_archive(made).manifest is None
    refused(archive_of(tmp_path / "b.tar.gz", entry("a"), link(name, "a")), into)


# ── hostile members ──────────────────────────────────────────────────────────────────────────────

HOSTILE_MEMBERS: dict[str, list[Entry]] = {
    "absolute": [entry("/tmp/absolute")],
    "absolute folder": [folder("/tmp/absolute")],
    "parent": [entry("../outside")],
    "parent in the middle": [entry("workspace/../../outside")],
    "parent at the end": [folder("workspace/..")],
    "parent behind a dot": [entry("./../outside")],
    "symlink": [link("workspace/link", "a.csv")],
    "symlink outside": [link("workspace/link", "/etc/passwd")],
    "file through a symlink": [link("workspace/link", "/tmp"), entry("workspace/link/x")],
    "hardlink": [link("workspace/hard", "workspace/a.csv", tarfile.LNKTYPE)],
    "hardlink outside": [link("workspace/hard", "/etc/passwd", tarfile.LNKTYPE)],
    "fifo": [entry("workspace/pipe", b"", type=tarfile.FIFOTYPE)],
    "device": [entry("workspace/null", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3)],
    "block device": [entry("workspace/disk", b"", type=tarfile.BLKTYPE, devmajor=8)],
    "contiguous": [entry("workspace/cont", type=tarfile.CONTTYPE)],
    "unknown type": [entry("workspace/odd", type=b"Z")],
    "sparse": [entry("workspace/sparse", b"", type=tarfile.GNUTYPE_SPARSE)],
    "twice": [entry("workspace/twice", b"1"), entry("workspace/twice", b"2")],
    "twice, spelled otherwise": [entry("workspace/twice"), entry("./workspace//twice")],
    "a file and a folder": [entry("workspace/a"), folder("workspace/a")],
    "a folder, then a file": [folder("workspace/a"), entry("workspace/a")],
    "a file and a file below it": [entry("workspace/a"), entry("workspace/a/b")],
    "a file below a later file": [entry("workspace/a/b/c"), entry("workspace/a")],
    "no name": [entry("")],
    "a dot": [entry(".")],
}


@both_engines
@pytest.mark.parametrize("case", HOSTILE_MEMBERS)
@pytest.mark.parametrize("manifest", [True, False])
def test_a_hostile_member_is_refused_before_anything_is_written(
    tmp_path: Path, into: Path, case: str, manifest: bool
) -> None:
    entries = [entry("workspace/first.csv"), *HOSTILE_MEMBERS[case]]
    if manifest:
        entries.append(manifest_of(*entries))
    refused(archive_of(tmp_path / "a.tar.gz", *entries), into)


@pytest.mark.parametrize("tar_format", ["gnu", "posix"])
def test_sparse_files_links_pipes_and_sockets_of_real_tar_are_refused(
    tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch, tar_format: str
) -> None:
    source = tmp_path / "source"
    write_file(source / "real")
    with (source / "sparse").open("wb") as stream:
        stream.truncate(10 * MIB)
        stream.seek(5 * MIB)
        stream.write(b"data")
    (source / "soft").symlink_to("real")
    (source / "hard").hardlink_to(source / "real")
    os.mkfifo(source / "pipe")
    monkeypatch.chdir(source)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    archive = tmp_path / "a.tar.gz"
    for members in (["sparse"], ["soft"], ["real", "hard"], ["pipe"]):
        make = ["tar", "--sparse", f"--format={tar_format}", "-czf", str(archive), *members]
        subprocess.run(make, check=True, cwd=source)
        refused(archive, into, match="neither a regular file nor a folder")


def raw_header(info: tarfile.TarInfo, fields: dict[int, bytes]) -> bytes:
    """A header with fields overwritten at their offsets and a checksum that is right again."""
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT)[-512:])
    for offset, value in fields.items():
        header[offset : offset + len(value)] = value
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


FIELDS = {
    "mode": (100, 8), "uid": (108, 8), "size": (124, 12), "mtime": (136, 12), "type": (156, 1),
    "linkname": (157, 100), "magic": (257, 8), "prefix": (345, 155),
}  # fmt: skip


@given(st.dictionaries(st.sampled_from(sorted(FIELDS)), st.binary(min_size=1, max_size=12)))
def test_no_header_whatsoever_does_more_than_be_refused(fields: dict[str, bytes]) -> None:
    overwritten = {FIELDS[n][0]: value[: FIELDS[n][1]] for n, value in fields.items()}
    first, (info, content) = entry("first"), entry("workspace/a.csv", b"x" * 700)
    header = raw_header(info, overwritten)
    tar = tar_bytes(first, end=0) + header + content + bytes(-700 % 512) + bytes(1024)
    with tempfile.TemporaryDirectory() as name:
        archive = write_file(Path(name, "a.tar.gz"), gzip.compress(tar))
        into = Path(name, "into")
        into.mkdir()
        try:
            extract_archive(archive, into)
        except CloudError:
            assert tree(into) == {}
        assert {path.name for path in Path(name).iterdir()} == {"a.tar.gz", "into"}


@pytest.mark.parametrize(
    "mtime",
    [b"\x80" + b"\xff" * 11, b"\x80" + bytes(3) + b"\xff" * 8, b"\xff" * 12, b"\xff" + bytes(11)],
    ids=["huge", "large", "minus one", "huge and negative"],
)
def test_an_absurd_time_does_not_stop_halfway(tmp_path: Path, into: Path, mtime: bytes) -> None:
    info, content = entry("workspace/a.csv", b"")
    tar = tar_bytes(entry("first"), end=0) + raw_header(info, {136: mtime}) + content + bytes(1024)
    archive = write_file(tmp_path / "a.tar.gz", gzip.compress(tar))
    try:
        extract_archive(archive, into)
    except CloudError:
        assert tree(into) == {}
    else:
        assert set(files(into)) == {"first", "workspace/a.csv"}


def pax_record(key: str, value: str) -> bytes:
    body = f" {key}={value}\n".encode()
    length = len(body) + 1
    while len(str(length)) + len(body) != length:
        length = len(str(length)) + len(body)
    return str(length).encode() + body


HOSTILE_RECORDS = [
    {"mtime": "nan"}, {"mtime": "inf"}, {"mtime": "1e300"}, {"mtime": "-1e300"},
    {"path": "../outside"}, {"path": "/absolute"}, {"path": "a\0b"}, {"path": "x/" * 3000 + "y"},
    {"size": "-1"}, {"size": "-512"}, {"size": "1" + "0" * 30}, {"size": "9" * 5000},
    {"GNU.sparse.map": "x", "GNU.sparse.size": "y"},
    {"GNU.sparse.map": "0,1", "GNU.sparse.size": "7", "GNU.sparse.name": "sparse"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "7"},
    {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "x"},
]  # fmt: skip


@pytest.mark.parametrize("records", HOSTILE_RECORDS, ids=lambda r: str(r)[:60])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_hostile_pax_header_never_writes_halfway(
    tmp_path: Path, into: Path, records: dict[str, str], kind: bytes
) -> None:
    body = b"".join(pax_record(key, value) for key, value in records.items())
    entries = [entry("first"), entry("pax", body, type=kind), entry("workspace/a.csv")]
    archive = archive_of(tmp_path / "a.tar.gz", *entries)
    before = tree(tmp_path)
    try:
        extract_archive(archive, into)
    except CloudError:
        assert tree(tmp_path) == before
    else:
        assert set(files(into)) == {"first", "workspace/a.csv"}


@pytest.mark.parametrize(
    "body", [b"9" * 5000 + b" path=x\n", b"0 path=x\n", b"no number", b"5 a\n", b"99 path=x\n"]
)
def test_a_garbage_pax_header_is_refused(tmp_path: Path, into: Path, body: bytes) -> None:
    entries = [entry("first"), entry("pax", body, type=tarfile.XHDTYPE), entry("workspace/a.csv")]
    archive = archive_of(tmp_path / "a.tar.gz", *entries)
    before = tree(tmp_path)
    try:
        extract_archive(archive, into)
    except CloudError:
        assert tree(tmp_path) == before
    else:
        assert set(files(into)) == {"first", "workspace/a.csv"}


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [2**40, 2**33, 100 * MIB])
def test_a_header_that_claims_a_huge_size_is_refused(
    tmp_path: Path, into: Path, kind: bytes, size: int
) -> None:
    huge = entry("././@LongLink", b"x" * 512, type=kind, size=size)
    refused(archive_of(tmp_path / "a.tar.gz", entry("first"), huge), into, match="a header of")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_an_endless_chain_of_headers_is_refused(tmp_path: Path, into: Path, kind: bytes) -> None:
    body = pax_record("path", "x") if kind != tarfile.GNUTYPE_LONGNAME else b"x\0"
    chain = [entry("././@LongLink", body, type=kind)] * 5000
    refused(archive_of(tmp_path / "a.tar.gz", *chain, entry("workspace/a.csv")), into)


@pytest.mark.parametrize("depth", [300, 100_000])
def test_a_name_of_absurd_depth_is_refused(tmp_path: Path, into: Path, depth: int) -> None:
    name = ("d/" * depth + "file").encode() + b"\0"
    long_name = entry("././@LongLink", name, type=tarfile.GNUTYPE_LONGNAME)
    archive = archive_of(tmp_path / "a.tar.gz", entry("first"), long_name, entry("cut"))
    before = tree(tmp_path)
    try:
        extract_archive(archive, into)
    except CloudError:
        assert tree(tmp_path) == before
    else:
        assert (into / name[:-1].decode()).read_bytes() == b"content"


def test_a_component_too_long_for_the_disk_is_refused(tmp_path: Path, into: Path) -> None:
    name = b"workspace/" + b"n" * 256 + b"\0"
    long_name = entry("././@LongLink", name, type=tarfile.GNUTYPE_LONGNAME)
    archive = archive_of(tmp_path / "a.tar.gz", entry("first"), long_name, entry("cut"))
    with pytest.raises(CloudError, match=r"too long|refused"):
        extract_archive(archive, into)
    assert tree(into) == {}


def test_a_claimed_size_beyond_the_content_is_refused(tmp_path: Path, into: Path) -> None:
    liar = entry("workspace/liar", b"short", size=2**34)
    refused(archive_of(tmp_path / "a.tar.gz", entry("first"), liar), into)


def test_too_many_entries_are_refused(
    tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cloud_services, "MAX_MEMBERS", 10)
    archive = archive_of(tmp_path / "a.tar.gz", *(entry(f"file {n}") for n in range(11)))
    assert refused(archive, into, RefusedError).exit_code == ExitCode.REFUSED


def test_a_member_with_the_name_another_is_unpacked_under_is_not_lost(
    tmp_path: Path, into: Path
) -> None:
    hidden = cloud_services.part_name("file", "extract")
    entries = [entry(hidden, b"hidden"), entry("file", b"file"), entry("zz", b"last")]
    try:
        extract_archive(archive_of(tmp_path / "a.tar.gz", *entries), into)
    except CloudError:
        assert tree(into) == {}
    else:
        assert files(into) == {hidden: b"hidden", "file": b"file", "zz": b"last"}


# ── what is in the way at the destination ────────────────────────────────────────────────────────


@pytest.mark.parametrize("linked", ["workspace", "workspace/b"])
@pytest.mark.parametrize("target", ["elsewhere", "nowhere", "."])
def test_a_linked_parent_is_refused_before_anything_is_written(
    archive: Path, into: Path, linked: str, target: str
) -> None:
    elsewhere = into.parent / "elsewhere"
    elsewhere.mkdir()
    (into / linked).parent.mkdir(exist_ok=True)
    (into / linked).symlink_to(into if target == "." else into.parent / target)
    before = tree(into.parent)
    with pytest.raises(AccessError, match=linked) as caught:
        extract_archive(archive, into)
    assert "--into" in caught.value.hint
    assert tree(into.parent) == before


def test_the_destination_itself_may_be_a_link(archive: Path, into: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(into)
    extract_archive(archive, tmp_path / "link")
    assert files(into) == GOOD


@pytest.mark.parametrize("target", ["precious", "nowhere", "a.csv"])
def test_a_link_at_the_place_of_a_file_is_replaced_not_followed(
    archive: Path, into: Path, tmp_path: Path, target: str
) -> None:
    precious = write_file(tmp_path / "precious", b"precious")
    (into / "workspace").mkdir()
    (into / "workspace/a.csv").symlink_to(tmp_path / target if target != "a.csv" else target)
    extract_archive(archive, into)
    assert files(into) == GOOD
    assert not (into / "workspace/a.csv").is_symlink()
    assert precious.read_bytes() == b"precious"
    assert not (tmp_path / "nowhere").exists()


def test_a_link_at_the_hidden_name_of_a_file_is_not_followed(
    archive: Path, into: Path, tmp_path: Path
) -> None:
    precious = write_file(tmp_path / "precious", b"precious")
    (into / "workspace").mkdir()
    (into / "workspace" / cloud_services.part_name("a.csv", "extract")).symlink_to(precious)
    extract_archive(archive, into)
    assert files(into) == GOOD
    assert precious.read_bytes() == b"precious"


def test_a_hard_link_at_the_place_of_a_file_keeps_its_other_name(
    archive: Path, into: Path, tmp_path: Path
) -> None:
    precious = write_file(tmp_path / "precious", b"precious")
    (into / "workspace").mkdir()
    (into / "workspace/a.csv").hardlink_to(precious)
    extract_archive(archive, into)
    assert files(into) == GOOD
    assert precious.read_bytes() == b"precious"


def test_a_folder_at_the_place_of_a_file_is_refused_before_anything_is_written(
    archive: Path, into: Path
) -> None:
    (into / "workspace/b/c.csv").mkdir(parents=True)
    before = tree(into)
    with pytest.raises(UsageError, match=r"c\.csv is a folder"):
        extract_archive(archive, into)
    assert tree(into) == before


@pytest.mark.parametrize("kind", ["file", "link", "pipe"])
@pytest.mark.parametrize("explicit", [True, False])
def test_a_file_at_the_place_of_a_folder_is_refused_before_anything_is_written(
    tmp_path: Path, into: Path, kind: str, explicit: bool
) -> None:
    last = folder("workspace/z") if explicit else entry("workspace/z/file")
    archive = archive_of(tmp_path / "a.tar.gz", entry("workspace/first"), last)
    (into / "workspace").mkdir()
    blocker = into / "workspace/z"
    if kind == "file":
        blocker.touch()
    elif kind == "link":
        blocker.symlink_to(into)
    else:
        os.mkfifo(blocker)
    with pytest.raises(AccessError, match="workspace/z"):
        extract_archive(archive, into)
    assert [path.name for path in (into / "workspace").iterdir()] == ["z"]


def test_a_file_as_destination_is_a_usage_error(archive: Path, tmp_path: Path) -> None:
    write_file(tmp_path / "file")
    with pytest.raises(UsageError, match="not a folder") as caught:
        extract_archive(archive, tmp_path / "file")
    assert "--into" in caught.value.hint


def test_a_closed_destination_is_a_clear_error(plain_user: Path) -> None:
    archive = archive_of(plain_user / "a.tar.gz", *good_entries())
    (plain_user / "closed").mkdir(mode=0o500)
    (plain_user / "dark").mkdir(mode=0)
    for into in ("closed", "closed/deeper", "dark", "dark/deeper"):
        with pytest.raises(AccessError, match="permission denied"):
            extract_archive(archive, plain_user / into)


@pytest.mark.parametrize("kind", ["missing", "folder", "below a file"])
@pytest.mark.parametrize("command", [verify_archive, extract_archive])
def test_an_archive_that_is_none_is_a_clear_error(
    tmp_path: Path, archive: Path, kind: str, command: Callable[[Path], object]
) -> None:
    path = {"missing": tmp_path / "gone", "folder": tmp_path, "below a file": archive / "x"}[kind]
    with pytest.raises(UsageError if kind == "folder" else NotFoundError, match=path.name):
        command(path)


# ── full disks, changed and killed in the middle ─────────────────────────────────────────────────


def test_too_little_room_is_refused_before_anything_is_written(
    archive: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = sum(map(len, GOOD.values()))
    monkeypatch.setattr(cloud_services, "free_space", lambda _: needed - 1)
    with pytest.raises(DiskFullError, match="are needed") as caught:
        extract_archive(archive, into)
    assert caught.value.exit_code == ExitCode.TRANSFER
    assert tree(into) == {}
    monkeypatch.setattr(cloud_services, "free_space", lambda _: needed)
    extract_archive(archive, into)
    assert files(into) == GOOD


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB; only root can mount one."""
    path = tmp_path / "small disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(path)]
    if os.geteuid() or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk here; it takes root")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def test_a_disk_that_fills_meanwhile_leaves_old_files_and_no_part(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", entry("a", b"a" * 10), entry("b", b"b" * 100_000))
    write_file(small_disk / "b", b"old")
    with pytest.raises(DiskFullError, match="are needed"):
        extract_archive(archive, small_disk)
    monkeypatch.setattr(cloud_services, "free_space", lambda _: 10**9)
    with pytest.raises(DiskFullError, match="b: the disk is full"):
        extract_archive(archive, small_disk)
    assert files(small_disk) == {"a": b"a" * 10, "b": b"old"}


class AtUnpacking(Progress):
    """Acts between the two readings of an archive."""

    def __init__(self, act: Callable[[], object]) -> None:
        self.act = act

    def begin(self, what: str, total: int | None) -> None:
        if what == "unpacking":
            self.act()


@pytest.mark.parametrize("names", [["first"], ["first", "second", "third"], ["second", "first"]])
def test_an_archive_rewritten_between_the_readings_is_noticed(
    tmp_path: Path, into: Path, names: list[str]
) -> None:
    archive = archive_of(tmp_path / "a.tar.gz", entry("first", b"1"), entry("second", b"2"))
    other = [entry(name, b"x") for name in names]
    with pytest.raises(IntegrityError, match="changed while it was unpacked"):
        extract_archive(archive, into, AtUnpacking(lambda: archive_of(archive, *other)))
    assert all(content in (b"1", b"2") for content in files(into).values())


@pytest.mark.parametrize("blocks", range(1, 6))
def test_killed_in_the_middle_every_file_is_either_old_or_new(
    tmp_path: Path, into: Path, blocks: int
) -> None:
    new = {"a": b"new a" * 100, "b": b"new b" * (MIB // 2), "c": b"new c" * 100}
    archive = archive_of(tmp_path / "a.tar.gz", *(entry(n, data) for n, data in new.items()))
    for name in new:
        write_file(into / name, b"old")
    code = """if True:
        import sys, time, cloud_services as c
        class Stuck(c.Progress):
            left = None
            def begin(self, what, total):
                if what == "unpacking":
                    self.left = int(sys.argv[1])
            def advance(self, count):
                if self.left is not None:
                    self.left -= 1
                    if not self.left:
                        print("unpacking", flush=True)
                        time.sleep(60)
        c.extract_archive("a.tar.gz", "into", Stuck())"""
    with subprocess.Popen(
        [sys.executable, "-c", code, str(blocks)], stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(SCRIPT.parent)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        line = process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert line == b"unpacking\n"
    for name, content in new.items():
        assert (into / name).read_bytes() in (b"old", content)
    assert (into / "c").read_bytes() == b"old"
    extract_archive(archive, into)
    assert files(into) == new
