"""The S3 transport against `rclone serve s3` and moto, through a proxy that spoils requests."""

from __future__ import annotations

import contextlib
import datetime as dt
import errno
import hashlib
import http.client
import itertools
import logging
import os
import random
import signal
import socket
import socketserver
import ssl
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import s3_transport as s3
import s3_wire
from cloud_services import (
    SAME_COMMAND,
    AccessError,
    CloudError,
    ConnectError,
    DiskFullError,
    IntegrityError,
    LinkLostError,
    NotFoundError,
    Progress,
    RateLimiter,
    RefusedError,
    TransferError,
    UsageError,
    in_background,
    part_name,
)
from cloud_settings import S3Settings
from tests.s3_servers import (
    KEY_ID,
    REGION,
    SECRET,
    FaultProxy,
    MotoServer,
    RcloneServer,
    S3Server,
    cutting_relay,
    endless_listing,
    silent_port,
    wait_for,
)
from tests.servers import free_port, require
from tests.support import ROOT, parts, random_bytes, random_file, sha256

MIB = 1024 * 1024
LARGE = 20 * MIB + 12_345  # three parts, two ranges
KILLS = int(os.environ.get("S3_KILLS", "20"))
ALWAYS = 10**6


# ---------------------------------------------------------------------------
# Fixtures
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[RcloneServer, MotoServer], ids=["rclone", "moto"])
def server(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[S3Server]:
    """Each of the two servers, once for all tests."""
    with request.param(tmp_path_factory.mktemp(request.param.name)) as running:
        yield running


@pytest.fixture(scope="module")
def rclone(tmp_path_factory: Any) -> Iterator[RcloneServer]:
    """The server that checks signatures and digests."""
    with RcloneServer(tmp_path_factory.mktemp("rclone_alone")) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the caller's, and short pauses."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "S3_")) and n != "S3_KILLS"]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "no_such_file"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(s3, "FIRST_PAUSE", 0.01)


class Counter(Progress):
    """Adds up what it hears."""

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def advance(self, count: int) -> None:
        with self._lock:
            self.total += count


NUMBERS = itertools.count()


def open_bucket(url: str, progress: Progress | None = None, **more: Any) -> s3.Bucket:
    """A bucket at an endpoint, with a prefix that no other test has."""
    more.setdefault("prefix", f"test{next(NUMBERS)}-{os.getpid()}")
    given = {"access_key_id": KEY_ID, "secret_access_key": SECRET, "region": REGION} | more
    settings = S3Settings.resolve(bucket="bucket", endpoint_url=url, **given)
    return s3.Bucket(settings, progress)


@pytest.fixture
def bucket(server: S3Server) -> s3.Bucket:
    """The bucket, without anything in between."""
    return open_bucket(server.url)


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    """A proxy in front of the server."""
    with FaultProxy(server) as running:
        yield running


@pytest.fixture
def spoiled(proxy: FaultProxy) -> s3.Bucket:
    """The bucket, seen through the proxy; its stall timeout is short."""
    return open_bucket(proxy.url, timeout=3)


def unfinished(server: S3Server, bucket: s3.Bucket) -> list[str]:
    """Multipart uploads that nobody completed or gave up."""
    return [key for key in server.uploads() if key.startswith(bucket.settings.prefix)]


def sound(server: S3Server, key: str) -> bool:
    """Whether the stored content is what its own metadata says."""
    answer = server.client().head_object(Bucket="bucket", Key=key)
    noted = {name.lower(): value for name, value in answer["Metadata"].items()}["sha256"]
    return str(noted) == hashlib.sha256(server.content(key) or b"").hexdigest()


# ---------------------------------------------------------------------------
# There and back
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 100_000, 8 * MIB, 8 * MIB + 1, LARGE])
def test_a_file_of_any_size_comes_back_as_it_was(
    server: S3Server, bucket: s3.Bucket, tmp_path: Path, size: int
) -> None:
    file = random_file(tmp_path / "a.bin", size, size)
    counter = bucket.progress = Counter()
    sent = bucket.put_file(file, bucket.key("a.bin"))
    assert (sent.size, sent.moved, sent.sha256) == (size, size, sha256(file))
    assert counter.total == size
    assert server.content(bucket.key("a.bin")) == file.read_bytes()
    back = bucket.get_file(bucket.key("a.bin"), tmp_path / "new" / "b.bin")
    assert (tmp_path / "new" / "b.bin").read_bytes() == file.read_bytes()
    assert (back.moved, back.sha256, back.check) == (size, sent.sha256, s3.SHA256_CHECK)
    assert counter.total == 2 * size
    assert not parts(tmp_path / "new")
    assert not unfinished(server, bucket)


def test_content_that_is_there_already_is_not_sent_or_fetched_again(
    proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path
) -> None:
    for size in (1000, LARGE):
        file = random_file(tmp_path / "a.bin", size)
        spoiled.put_file(file, spoiled.key("a"))
        proxy.forget()
        assert spoiled.put_file(file, spoiled.key("a")).moved == 0
        assert spoiled.get_file(spoiled.key("a"), file).moved == 0
        assert (proxy.up, proxy.down) == (0, 0)


def test_every_object_carries_its_digest_and_time(
    server: S3Server, bucket: s3.Bucket, tmp_path: Path
) -> None:
    for size in (1000, LARGE):
        file = random_file(tmp_path / "a.bin", size)
        bucket.put_file(file, bucket.key("a"))
        assert sound(server, bucket.key("a"))
        head = bucket.head(bucket.key("a"))
        assert head.sha256 == sha256(file)
        assert float(head.metadata["mtime"]) == pytest.approx(file.stat().st_mtime, abs=1e-3)


def test_thousands_of_small_files_and_a_large_one_travel_together(
    server: S3Server, bucket: s3.Bucket, tmp_path: Path
) -> None:
    count = 1100 if server.name == "rclone" else 150
    wanted = {f"{n % 7}/f{n}": random_bytes(n, n) for n in range(count)}
    wanted["large"] = random_bytes(9 * MIB)
    for name, content in wanted.items():
        path = tmp_path / "from" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    items = [(tmp_path / "from" / name, bucket.key(name)) for name in wanted]
    assert all(outcome.stored for outcome in bucket.put_many(items))
    listed = {info.key: info for info in bucket.list(bucket.key() + "/")}
    assert {key: info.size for key, info in listed.items()} == {
        bucket.key(name): len(content) for name, content in wanted.items()
    }
    into = tmp_path / "into"
    named = ((info, into / s3.local_name(key, bucket.key() + "/")) for key, info in listed.items())
    outcomes = list(bucket.get_many(named))
    assert all(outcome.stored and outcome.stored.check == s3.SHA256_CHECK for outcome in outcomes)
    assert {
        str(p.relative_to(into)): p.read_bytes() for p in into.rglob("*") if p.is_file()
    } == wanted


def test_one_bad_item_among_many_is_reported_and_the_others_arrive(
    bucket: s3.Bucket, tmp_path: Path
) -> None:
    good = random_file(tmp_path / "good", 1000)
    items = [(good, bucket.key("1")), (tmp_path / "none", bucket.key("2")), (good, bucket.key("3"))]
    outcomes = {outcome.key: outcome for outcome in bucket.put_many(items)}
    assert isinstance(outcomes[bucket.key("2")].error, NotFoundError)
    assert outcomes[bucket.key("1")].stored
    assert outcomes[bucket.key("3")].stored
    info = next(bucket.list(bucket.key("1")))
    gone = info._replace(key=bucket.key("gone"))
    found = {o.key: o for o in bucket.get_many([(info, tmp_path / "1"), (gone, tmp_path / "g")])}
    assert found[info.key].stored
    assert isinstance(found[gone.key].error, NotFoundError)
    assert not (tmp_path / "g").exists()
    assert not parts(tmp_path)


def test_a_stream_of_unknown_size_is_stored_without_a_copy_on_disk(
    server: S3Server, bucket: s3.Bucket
) -> None:
    for count in (0, 3, 40):
        blocks = [random_bytes(1_000_003, n) for n in range(count)]
        stored = bucket.put_stream(iter(blocks), bucket.key("stream"), {"kind": "image"})
        assert server.content(bucket.key("stream")) == b"".join(blocks)
        assert stored.sha256 == hashlib.sha256(b"".join(blocks)).hexdigest()
        head = bucket.head(bucket.key("stream"))
        assert (head.sha256, head.metadata["kind"]) == (stored.sha256, "image")
        assert stored.etag == head.etag
        assert b"".join(bucket.get_stream(bucket.key("stream"))) == b"".join(blocks)
    assert not unfinished(server, bucket)


def test_a_stream_that_fails_leaves_what_was_there(server: S3Server, bucket: s3.Bucket) -> None:
    bucket.put_bytes(b"old", bucket.key("stream"))

    def failing() -> Iterator[bytes]:
        yield random_bytes(40 * MIB)
        raise OSError(errno.EPIPE, "docker has died")

    with pytest.raises(OSError, match="docker has died"):
        bucket.put_stream(failing(), bucket.key("stream"))
    assert server.content(bucket.key("stream")) == b"old"
    assert not unfinished(server, bucket)


def test_a_resumable_stream_sends_only_what_is_missing_or_another(
    server: S3Server, proxy: FaultProxy
) -> None:
    bucket = open_bucket(proxy.url, timeout=3, max_attempts=1, max_concurrency=1)
    blocks = [random_bytes(16 * MIB, n) for n in range(5)]
    proxy.fail("cut_request", method="PUT", skip=3, after=MIB)
    with pytest.raises(LinkLostError):
        bucket.put_stream(blocks, bucket.key("s"), resumable=True)
    blocks[1:] = [random_bytes(16 * MIB, 9)]  # shorter, and the second part is another one
    try:
        stored = bucket.put_stream(blocks, bucket.key("s"), resumable=True)
        assert stored.moved == 16 * MIB
    except AccessError:
        assert server.name == "rclone"  # it replaces no part that others have followed
        bucket.put_stream(blocks, bucket.key("s"), resumable=True)
    assert server.content(bucket.key("s")) == b"".join(blocks)
    assert sound(server, bucket.key("s"))
    assert not unfinished(server, bucket)


def test_a_copy_moves_nothing_and_keeps_the_digest(
    proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path
) -> None:
    file = random_file(tmp_path / "a", LARGE)
    sent = spoiled.put_file(file, spoiled.key("epoch=1.ckpt"))
    proxy.forget()
    copied = spoiled.copy(spoiled.key("epoch=1.ckpt"), spoiled.key("last.ckpt"))
    assert (copied.sha256, copied.size) == (sent.sha256, LARGE)
    assert (proxy.up, proxy.down < 10_000) == (0, True)


def test_an_object_too_large_for_one_copy_is_copied_in_pieces(
    server: S3Server, bucket: s3.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "MAX_COPY_BYTES", 10 * MIB)
    monkeypatch.setattr(s3, "COPY_PART_BYTES", 6 * MIB)
    sent = bucket.put_file(random_file(tmp_path / "a", LARGE), bucket.key("a"))
    try:
        copied = bucket.copy(bucket.key("a"), bucket.key("b"))
    except CloudError:
        assert server.name == "rclone"  # it knows no UploadPartCopy
        assert not unfinished(server, bucket)
        pytest.skip("rclone serve s3 copies no parts")
    assert (copied.sha256, copied.size) == (sent.sha256, LARGE)
    assert sound(server, bucket.key("b"))


def test_deleting_takes_many_keys_and_minds_no_missing_one(bucket: s3.Bucket) -> None:
    keys = [bucket.key(str(n)) for n in range(30)]
    for key in keys:
        bucket.put_bytes(b"x", key)
    assert len(list(bucket.delete([*keys, bucket.key("none")]))) == 31
    assert not list(bucket.list(bucket.key()))


def test_the_check_up_finds_everything_in_order(server: S3Server, bucket: s3.Bucket) -> None:
    lines = list(bucket.check())
    assert [line for line in lines if not line.ok] == []
    names = "credentials endpoint list put get metadata ranges digests copy multipart delete"
    assert [line.name for line in lines] == names.split()
    assert not [key for key in server.all_keys() if key.startswith(bucket.key())]


def test_the_check_up_names_what_the_minimal_policy_forbids(
    proxy: FaultProxy, spoiled: s3.Bucket
) -> None:
    proxy.fail("status", method="DELETE", status=403, code="AccessDenied", times=ALWAYS)
    line = list(spoiled.check())[-1]
    assert (line.name, line.ok) == ("delete", None)
    assert "s3:DeleteObject" in line.detail
    assert "prune" in line.detail


def test_a_listing_leaves_our_own_notes_out(bucket: s3.Bucket) -> None:
    bucket.put_bytes(b"x", bucket.key("a"))
    bucket.put_bytes(b"x", bucket.key(s3.HIDDEN_FOLDER, "index.gz"))
    assert [info.key for info in bucket.list(bucket.key())] == [bucket.key("a")]


# ---------------------------------------------------------------------------
# The index
# ---------------------------------------------------------------------------


def test_the_index_knows_contents_by_the_listing_alone(bucket: s3.Bucket, tmp_path: Path) -> None:
    index = s3.load_index(bucket, bucket.key())
    assert len(index) == 0
    files = [(random_file(tmp_path / str(n), 100 + n, n), bucket.key(str(n))) for n in range(9)]
    for outcome in bucket.put_many(files):
        assert outcome.stored
        index.note(outcome.key, *outcome.stored[4:5], outcome.stored.size, outcome.stored.sha256)
    s3.save_index(bucket, bucket.key(), index)
    again = s3.load_index(bucket, bucket.key())
    known = {info.key: again.sha256(info) for info in bucket.list(bucket.key())}
    assert known == {key: sha256(path) for path, key in files}
    bucket.put_bytes(b"by somebody else", files[0][1])
    changed = next(info for info in bucket.list(files[0][1]))
    assert again.sha256(changed) == ""


entries = st.dictionaries(
    st.text(min_size=1),
    st.builds(
        s3.Known, st.from_regex(r"\A[0-9a-f]{32}(-[0-9]+)?\Z"), st.integers(0, 2**40),
        st.from_regex(r"\A[0-9a-f]{64}\Z"),
    ),
)  # fmt: skip


@given(entries)
def test_an_index_survives_its_journey(known: dict[str, s3.Known]) -> None:
    index = s3.Index(known)
    assert s3.Index.parse(index.dump()).dump() == index.dump()


@given(entries, st.data())
def test_a_damaged_index_is_an_empty_or_a_smaller_one(
    known: dict[str, s3.Known], data: st.DataObject
) -> None:
    content = bytearray(s3.Index(known).dump())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    assert len(s3.Index.parse(bytes(content))) <= len(known)


# ---------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------

KEYS = (
    "with two  spaces", "ünïcödé 📈 тик", "?query=1&x#fragment", "100%25+plus~tilde", "back\\slash",
    "a=b;c,d@e:f!$'()*", "n" * 200 + "/" + "m" * 200, "Case", "case", "-dash", "'quoted\"",
    "<tag>&amp;", "tab\there", "nul\0byte", " blanks ",
)  # fmt: skip


def test_keys_of_all_kinds_come_back_by_their_names(
    server: S3Server, bucket: s3.Bucket, tmp_path: Path
) -> None:
    for number, name in enumerate(KEYS):
        bucket.put_bytes(str(number).encode(), bucket.key(name))
        assert server.content(bucket.key(name)) == str(number).encode(), name
        assert bucket.get_bytes(bucket.key(name)) == str(number).encode(), name
    assert sorted(i.key for i in bucket.list(bucket.key())) == sorted(map(bucket.key, KEYS))
    copied = bucket.copy(bucket.key(KEYS[1]), bucket.key(KEYS[2]))
    assert bucket.get_bytes(copied.key) == b"1"


def test_the_longest_key_a_server_takes_works_and_a_longer_one_is_a_clear_error(
    server: S3Server,
) -> None:
    bucket = open_bucket(server.url, prefix="")
    key = "/".join(["k" * 200] * 5) + "/" + "k" * 19
    assert len(key) == 1024
    bucket.put_bytes(b"long", key)
    assert bucket.get_bytes(key) == b"long"
    if server.name == "rclone":
        with pytest.raises(CloudError):
            bucket.put_bytes(b"longer", key + "k" * 300)


@pytest.mark.parametrize(
    "name",
    ["../up", "a/../../up", "/lead", "a//b", "./a", "a/./b", "line\nbreak", "..", "caf\udce9"],
)
def test_keys_that_some_servers_refuse_are_stored_or_a_clear_error(
    bucket: s3.Bucket, name: str
) -> None:
    key = f"{bucket.key('x')}/{name}"
    stored = None
    with contextlib.suppress(UsageError, NotFoundError):
        stored = bucket.put_bytes(b"x", key)
    assert stored is None or bucket.get_bytes(key) == b"x"
    assert len(list(bucket.list(bucket.key() + "/"))) <= 1


@pytest.mark.parametrize(
    "key", ["", "../up", "a/../../up", "/etc/passwd", "a//b", "./a", "folder/", "a/..", "n" * 256,
            "nul\0", ".a.0123456789ab.part"],
)  # fmt: skip
def test_a_hostile_key_gets_no_path(key: str) -> None:
    with pytest.raises(RefusedError, match="left out"):
        s3.local_name(f"prefix/{key}", "prefix/")


@given(
    st.text(max_size=80) | st.lists(st.sampled_from(["..", ".", "", "a", "~", "\\"])).map("/".join)
)
@example("..")
def test_no_key_leads_out_of_the_folder(key: str) -> None:
    with contextlib.suppress(RefusedError):
        path = os.path.normpath(os.path.join("/base/folder", s3.local_name(key)))
        assert path.startswith("/base/folder/")


# ---------------------------------------------------------------------------
# Objects of other tools
# ---------------------------------------------------------------------------


def test_an_object_of_another_tool_is_verified_by_its_etag(
    server: S3Server, proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path
) -> None:
    content = random_bytes(LARGE)
    server.put(spoiled.key("theirs"), content)
    stored = spoiled.get_file(spoiled.key("theirs"), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content
    assert "MD5 of the content" in stored.check
    proxy.fail("flip_response", method="GET", after=1000)
    with pytest.raises(IntegrityError):
        spoiled.get_file(spoiled.key("theirs"), tmp_path / "b")
    assert not (tmp_path / "b").exists()
    info = next(spoiled.list(spoiled.key("theirs")))._replace(size=1)  # the way of small ones
    proxy.fail("flip_response", method="GET", after=1000, times=ALWAYS)
    [outcome] = spoiled.get_many([(info, tmp_path / "c")])
    assert isinstance(outcome.error, IntegrityError)
    assert not (tmp_path / "c").exists()


def test_the_parts_of_another_tools_upload_are_verified_or_the_weak_check_is_named(
    server: S3Server, bucket: s3.Bucket, tmp_path: Path
) -> None:
    client, key = server.client(), bucket.key("theirs")
    content = random_bytes(13 * MIB)
    upload = client.create_multipart_upload(Bucket="bucket", Key=key)["UploadId"]
    done = []
    for number, start in enumerate(range(0, len(content), 5 * MIB), 1):
        part = client.upload_part(
            Bucket="bucket", Key=key, UploadId=upload, PartNumber=number,
            Body=content[start : start + 5 * MIB],
        )  # fmt: skip
        done.append({"PartNumber": number, "ETag": part["ETag"]})
    client.complete_multipart_upload(
        Bucket="bucket", Key=key, UploadId=upload, MultipartUpload={"Parts": done}
    )
    stored = bucket.get_file(key, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == content
    assert "MD5" in stored.check or "size only" in stored.check
    assert bucket.put_file(tmp_path / "a", key).moved == len(content)  # it had no digest yet


def test_where_there_is_no_digest_the_weak_check_is_named_and_no_piece_is_trusted(
    proxy: FaultProxy, tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = open_bucket(proxy.url, timeout=3, max_attempts=1, max_concurrency=1)
    monkeypatch.setattr(s3, "_is_md5", lambda etag: False)  # as it is with keys of the server's own
    content = random_bytes(LARGE)
    server.put(bucket.key("a"), content)
    proxy.fail("cut_response", method="GET", after=5 * MIB)
    with pytest.raises(LinkLostError):
        bucket.get_file(bucket.key("a"), tmp_path / "a")
    stored = bucket.get_file(bucket.key("a"), tmp_path / "a")
    assert (stored.moved, "size only" in stored.check) == (LARGE, True)
    assert (tmp_path / "a").read_bytes() == content


@given(st.binary(max_size=200), st.integers(1, 50))
def test_the_etag_of_parts_is_computed_as_s3_does(content: bytes, size: int) -> None:
    hasher = s3._PartsMD5(size)
    for start in range(0, len(content), 7):
        hasher.update(content[start : start + 7])
    pieces = [content[start : start + size] for start in range(0, len(content), size)]
    digests = b"".join(hashlib.md5(piece).digest() for piece in pieces)  # noqa: S324
    assert hasher.hexdigest() == f"{hashlib.md5(digests).hexdigest()}-{len(pieces)}"  # noqa: S324


# ---------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5000, LARGE])
def test_a_bit_flipped_on_the_way_back_is_an_integrity_error_and_no_file(
    proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path, size: int
) -> None:
    file = random_file(tmp_path / "a", size)
    spoiled.put_file(file, spoiled.key("a"))
    (tmp_path / "into").mkdir()
    proxy.fail("flip_response", method="GET", after=4321)
    with pytest.raises(IntegrityError) as caught:
        spoiled.get_file(spoiled.key("a"), tmp_path / "into" / "a")
    assert caught.value.exit_code == 6
    assert list((tmp_path / "into").iterdir()) == []
    assert spoiled.get_file(spoiled.key("a"), tmp_path / "into" / "a").sha256 == sha256(file)
    proxy.fail("flip_response", method="GET", after=4321)
    with pytest.raises(IntegrityError):
        b"".join(spoiled.get_stream(spoiled.key("a")))


@pytest.mark.parametrize("size", [5000, LARGE])
def test_a_bit_flipped_on_the_way_there_is_noticed_and_sent_again(
    server: S3Server, proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path, size: int
) -> None:
    file, counter = random_file(tmp_path / "a", size), Counter()
    spoiled.progress = counter
    rule = proxy.fail("flip_request", method="PUT", path=spoiled.key("a"), after=4321)
    stored = spoiled.put_file(file, spoiled.key("a"))
    assert rule.hits == 1
    assert stored.sha256 == sha256(file)
    assert server.content(spoiled.key("a")) == file.read_bytes()
    assert counter.total == size
    assert proxy.up < 3 * size  # rclone ends an upload with its first bad part


@pytest.mark.parametrize("size", [5000, LARGE])
def test_a_way_that_always_damages_is_an_integrity_error_and_no_object(
    server: S3Server, proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path, size: int
) -> None:
    path = spoiled.key("a")
    proxy.fail("flip_request", method="PUT", path=path, after=4321, times=ALWAYS)
    with pytest.raises((IntegrityError, LinkLostError)) as caught:
        spoiled.put_file(random_file(tmp_path / "a", size), spoiled.key("a"))
    if server.name == "moto" or size == 5000:  # rclone ends an upload with its first bad part
        assert "altered on its way" in str(caught.value)
        assert caught.value.exit_code == 6
        assert not unfinished(server, spoiled)
    assert server.content(spoiled.key("a")) is None


def test_damage_that_the_server_refuses_leaves_the_old_object_alone(rclone: RcloneServer) -> None:
    with FaultProxy(rclone) as proxy:
        bucket = open_bucket(proxy.url, max_attempts=2)
        bucket.put_bytes(b"old", bucket.key("a"))
        proxy.fail("flip_request", method="PUT", path=bucket.key("a"), times=ALWAYS)
        with pytest.raises(IntegrityError):
            bucket.put_bytes(b"new", bucket.key("a"))
    assert rclone.content(bucket.key("a")) == b"old"


def test_damage_does_not_stay_when_the_link_breaks_after_it(
    server: S3Server, proxy: FaultProxy
) -> None:
    bucket = open_bucket(proxy.url, max_attempts=2)
    proxy.fail("flip_request", method="PUT", path=bucket.key("a"))
    proxy.fail("cut_request", method="PUT", path=bucket.key("a"), times=ALWAYS)
    with pytest.raises(LinkLostError):
        bucket.put_bytes(b"new", bucket.key("a"))
    assert server.content(bucket.key("a")) is None


def test_what_somebody_else_has_stored_over_the_damage_stays(
    server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket = open_bucket(proxy.url, max_attempts=2)
    key = bucket.key("a")
    proxy.fail("flip_request", method="PUT", path=key)
    proxy.fail("status", method="PUT", path=key, status=403, code="AccessDenied")
    monkeypatch.setattr(s3._Server, "_pause", lambda *arguments: server.put(key, b"theirs"))
    with pytest.raises(AccessError):
        bucket.put_bytes(b"new", key)
    assert server.content(key) == b"theirs"


def test_damage_that_stayed_under_a_right_note_is_sent_anew(
    server: S3Server, bucket: s3.Bucket, tmp_path: Path
) -> None:
    file = random_file(tmp_path / "a", 5000)
    server.put(bucket.key("a"), random_bytes(5000, 2), Metadata={"sha256": sha256(file)})
    assert bucket.put_file(file, bucket.key("a")).moved == 5000
    assert server.content(bucket.key("a")) == file.read_bytes()


def test_a_part_is_only_trusted_for_what_was_sent(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    bucket = open_bucket(proxy.url, timeout=3, max_attempts=1, max_concurrency=1)
    file = random_file(tmp_path / "a", LARGE)
    proxy.fail("cut_request", method="PUT", skip=2, after=MIB)
    with pytest.raises(LinkLostError):
        bucket.put_file(file, bucket.key("a"))
    [journal] = (tmp_path / "cache").rglob("*.journal")
    lines = journal.read_text().splitlines()
    journal.write_text("\n".join([*lines[:-1], lines[-1][:-4] + "0 .", "part 3 unfini"]))
    assert bucket.put_file(file, bucket.key("a")).moved == LARGE - 8 * MIB
    assert sound(server, bucket.key("a"))


def test_an_object_that_changes_while_it_is_fetched_is_an_integrity_error(
    server: S3Server, proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path
) -> None:
    spoiled.put_bytes(random_bytes(LARGE, 1), spoiled.key("a"))
    head = spoiled.head(spoiled.key("a"))
    spoiled.put_bytes(random_bytes(LARGE, 2), spoiled.key("a"))
    with pytest.raises(IntegrityError, match="changed"):
        spoiled.get_file(spoiled.key("a"), tmp_path / "a", head=head)
    assert not (tmp_path / "a").exists()
    assert not parts(tmp_path)


def test_a_resumed_download_of_damaged_pieces_starts_anew_by_itself(
    proxy: FaultProxy, tmp_path: Path, server: S3Server
) -> None:
    bucket = open_bucket(proxy.url, timeout=3, max_attempts=1, max_concurrency=1)
    content = random_bytes(LARGE)
    server.put(bucket.key("a"), content, Metadata={"sha256": hashlib.sha256(content).hexdigest()})
    proxy.fail("cut_response", method="GET", after=5 * MIB)
    with pytest.raises(LinkLostError):
        bucket.get_file(bucket.key("a"), tmp_path / "a")
    [part] = [path for path in tmp_path.iterdir() if path.suffix == ".part"]
    with part.open("r+b") as stream:
        stream.write(b"damage")
    assert bucket.get_file(bucket.key("a"), tmp_path / "a").moved == LARGE
    assert (tmp_path / "a").read_bytes() == content


# ---------------------------------------------------------------------------
# Files that change
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("size", [5000, LARGE])
def test_a_file_that_changes_while_it_is_sent_is_an_error_and_the_old_object_stays(
    server: S3Server, proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path, size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    spoiled.put_bytes(b"old", spoiled.key("a"))
    file = random_file(tmp_path / "a", size)
    find = s3._Server.find

    def grow(self: s3._Server, key: str) -> s3.ObjectHead | None:
        with file.open("ab") as stream:
            stream.write(b"more")
        return find(self, key)

    monkeypatch.setattr(s3._Server, "find", grow)
    with pytest.raises(IntegrityError, match="changed while it was sent"):
        spoiled.put_file(file, spoiled.key("a"))
    monkeypatch.undo()
    assert server.content(spoiled.key("a")) == b"old"
    assert not unfinished(server, spoiled)


def test_a_change_that_leaves_size_and_time_alone_is_noticed_too(
    server: S3Server, bucket: s3.Bucket, tmp_path: Path
) -> None:
    file = random_file(tmp_path / "a", LARGE)
    with pytest.raises(IntegrityError, match="changed while it was sent"):
        bucket.put_file(file, bucket.key("a"), sha256="0" * 64)  # as an old cache would have it
    assert server.content(bucket.key("a")) is None
    assert not unfinished(server, bucket)


def test_when_the_file_changed_since_the_old_upload_is_given_up(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    bucket = open_bucket(proxy.url, timeout=3, max_attempts=1, max_concurrency=1)
    file = random_file(tmp_path / "a", LARGE)
    proxy.fail("cut_request", method="PUT", skip=1, after=MIB)
    with pytest.raises(LinkLostError):
        bucket.put_file(file, bucket.key("a"))
    assert len(unfinished(server, bucket)) == 1
    random_file(file, LARGE, seed=2)
    assert bucket.put_file(file, bucket.key("a")).moved == LARGE
    assert sound(server, bucket.key("a"))
    assert not unfinished(server, bucket)


# ---------------------------------------------------------------------------
# Broken links and busy servers
# ---------------------------------------------------------------------------

TROUBLES: list[dict[str, Any]] = [
    {"fault": "status", "status": 503, "code": "SlowDown"},
    {"fault": "status", "status": 500, "code": "InternalError"},
    {"fault": "status", "status": 429, "code": "TooManyRequests"},
    {"fault": "status", "status": 400, "code": "RequestTimeout"},
    {"fault": "error_200", "code": "InternalError"},
    {"fault": "drop"},
    {"fault": "cut_response", "after": 100},
    {"fault": "cut_request", "after": 100},
    {"fault": "stall", "after": 100, "seconds": 3},
]


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda t: t.get("code") or t["fault"])
def test_trouble_that_passes_is_waited_out(
    server: S3Server, proxy: FaultProxy, tmp_path: Path, trouble: dict[str, Any]
) -> None:
    bucket = open_bucket(proxy.url, counter := Counter(), timeout=0.5)
    trouble = {"times": 2, **trouble}
    fault = trouble.pop("fault")
    for size in (5000, 9 * MIB):
        file, name = random_file(tmp_path / "a", size, size), bucket.key(str(size))
        counter.total = 0
        for method, path in (("PUT", name), ("POST", name), ("HEAD", name), ("GET", name)):
            if method == "HEAD" and trouble.get("status") == 400:
                continue  # such an answer has no body to name its code
            proxy.fail(fault, method=method, path=path, **trouble)
        proxy.fail(fault, method="GET", path="list-type", **trouble)
        assert bucket.put_file(file, name).sha256 == sha256(file)
        assert server.content(name) == file.read_bytes()
        assert bucket.get_file(name, tmp_path / "b").moved == size
        assert (tmp_path / "b").read_bytes() == file.read_bytes()
        (tmp_path / "b").unlink()
        assert counter.total == 2 * size
        assert [info.key for info in bucket.list(name)] == [name]
    assert not unfinished(server, bucket)


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda t: t.get("code") or t["fault"])
def test_a_copy_waits_trouble_out_too(
    server: S3Server, proxy: FaultProxy, trouble: dict[str, Any]
) -> None:
    bucket = open_bucket(proxy.url, timeout=0.5)
    bucket.put_bytes(random_bytes(5000), bucket.key("a"))
    trouble = {**trouble, "after": 0}
    rule = proxy.fail(trouble.pop("fault"), method="PUT", path=bucket.key("b"), **trouble)
    bucket.copy(bucket.key("a"), bucket.key("b"))
    assert rule.hits == 1
    assert sound(server, bucket.key("b"))


PORTAL: dict[str, Any] = {
    "fault": "error_200",
    "code": "",
    "message": "<html>Welcome</html>",
    "times": ALWAYS,
}


def test_a_page_of_somebody_else_is_no_success(proxy: FaultProxy, tmp_path: Path) -> None:
    bucket = open_bucket(proxy.url, max_attempts=2)
    bucket.put_bytes(b"x" * 1000, bucket.key("a"))
    file = random_file(tmp_path / "b", LARGE)
    actions: list[Callable[[], object]] = [
        lambda: list(bucket.list()), lambda: bucket.put_bytes(b"y", bucket.key("a")),
        lambda: bucket.copy(bucket.key("a"), bucket.key("c")), lambda: bucket.head(bucket.key("a")),
        lambda: bucket.put_file(file, bucket.key("b")), lambda: bucket.get_bytes(bucket.key("a")),
    ]  # fmt: skip
    proxy.fail(**PORTAL)
    for action in actions:
        with pytest.raises(LinkLostError):
            action()
    for method in ("PUT|POST", "POST"):
        proxy.rules.clear()
        proxy.fail(method=method, **PORTAL)
        with pytest.raises(LinkLostError):
            bucket.put_file(file, bucket.key("b"))
    proxy.rules.clear()
    assert bucket.find(bucket.key("b")) is None


def test_an_object_of_equal_size_is_not_taken_for_a_completed_upload(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    bucket = open_bucket(proxy.url, max_attempts=2)
    server.put(bucket.key("a"), random_bytes(LARGE, 2))
    proxy.fail(method="POST", path="uploadId", **PORTAL)
    with pytest.raises(LinkLostError):
        bucket.put_file(random_file(tmp_path / "a", LARGE), bucket.key("a"))


def test_a_listing_that_cannot_go_on_is_an_error(proxy: FaultProxy) -> None:
    half = "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>"
    proxy.fail("error_200", code="", message=half)
    with pytest.raises(TransferError, match="lists only a part"):
        list(open_bucket(proxy.url).list())


def test_when_one_part_cannot_be_sent_the_others_stop(
    proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", MIB)
    bucket = open_bucket(proxy.url, max_concurrency=2)
    proxy.fail("status", method="PUT", path="partNumber=2&", status=403, code="AccessDenied")
    with pytest.raises(AccessError, match="s3:PutObject"):
        bucket.put_file(random_file(tmp_path / "a", 30 * MIB), bucket.key("a"))
    assert len(proxy.seen("PUT part")) < 10


def test_a_refusal_is_not_tried_again(proxy: FaultProxy, spoiled: s3.Bucket) -> None:
    for status, code in ((403, "AccessDenied"), (401, "Unauthorized"), (404, "NoSuchKey")):
        proxy.forget()
        proxy.fail("status", status=status, code=code, times=ALWAYS)
        with pytest.raises(CloudError):
            spoiled.put_bytes(b"x", spoiled.key("a"))
        assert len(proxy.log) == 1


def test_trouble_that_stays_is_a_lost_link_after_as_many_tries_as_were_asked_for(
    proxy: FaultProxy,
) -> None:
    bucket = open_bucket(proxy.url, max_attempts=3)
    proxy.fail("status", status=500, code="InternalError", times=ALWAYS)
    with pytest.raises(TransferError) as caught:
        bucket.put_bytes(b"x", bucket.key("a"))
    assert len(proxy.log) == 3
    assert caught.value.hint == SAME_COMMAND
    assert caught.value.exit_code == 7


def test_silence_is_a_lost_link(proxy: FaultProxy) -> None:
    bucket = open_bucket(proxy.url, max_attempts=2, timeout=0.3)
    bucket.put_bytes(b"x" * 1000, bucket.key("a"))
    proxy.fail("stall", method="GET", times=ALWAYS, seconds=30)
    with pytest.raises(LinkLostError, match="nothing was heard"):
        bucket.get_bytes(bucket.key("a"))


def test_a_whole_object_in_place_of_a_range_is_refused_and_asked_for_again(
    server: S3Server, proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path
) -> None:
    if server.name == "rclone":
        pytest.skip("it notices that a signed header is missing")
    spoiled.put_file(random_file(tmp_path / "a", LARGE), spoiled.key("a"))
    rule = proxy.fail("whole", method="GET", times=2)
    spoiled.get_file(spoiled.key("a"), tmp_path / "b")
    assert rule.hits == 2
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_the_lost_answer_to_a_completion_is_settled_by_looking(
    server: S3Server, proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path
) -> None:
    file = random_file(tmp_path / "a", LARGE)
    proxy.fail("drop", method="POST", path="uploadId")
    assert spoiled.put_file(file, spoiled.key("a")).moved == LARGE
    assert len(proxy.seen("POST uploadId")) == 1
    assert len(proxy.seen("PUT part")) == 3
    assert sound(server, spoiled.key("a"))


def test_an_upload_that_the_server_has_forgotten_starts_anew(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    bucket = open_bucket(proxy.url, timeout=3, max_attempts=1, max_concurrency=1)
    file = random_file(tmp_path / "a", LARGE)
    proxy.fail("cut_request", method="PUT", skip=2, after=MIB)
    with pytest.raises(LinkLostError):
        bucket.put_file(file, bucket.key("a"))
    proxy.fail("status", method="PUT", status=404, code="NoSuchUpload")
    assert bucket.put_file(file, bucket.key("a")).sha256 == sha256(file)
    assert sound(server, bucket.key("a"))


def test_what_was_cut_off_is_continued_with_the_same_upload(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    bucket = open_bucket(proxy.url, timeout=3, max_attempts=1, max_concurrency=1)
    file = random_file(tmp_path / "a", LARGE)
    proxy.fail("cut_request", method="PUT", skip=2, after=MIB)
    with pytest.raises(LinkLostError):
        bucket.put_file(file, bucket.key("a"))
    before = {seen.query["uploadId"] for seen in proxy.seen("PUT part")}
    proxy.forget()
    assert bucket.put_file(file, bucket.key("a")).moved == LARGE - 16 * MIB
    assert {seen.query["uploadId"] for seen in proxy.seen("PUT part")} == before
    assert not proxy.seen("POST uploads")
    assert sound(server, bucket.key("a"))
    proxy.fail("cut_response", method="GET", after=10 * MIB)
    with pytest.raises(LinkLostError):
        bucket.get_file(bucket.key("a"), tmp_path / "b")
    proxy.forget()
    bucket.get_file(bucket.key("a"), tmp_path / "b")
    assert proxy.down <= LARGE - 6 * MIB  # a reset loses what a socket holds
    assert sha256(tmp_path / "b") == sha256(file)


def test_the_minimal_policy_is_enough_to_send_resume_and_fetch(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    bucket = open_bucket(proxy.url, timeout=3, max_attempts=1, max_concurrency=1)
    denied = {"status": 403, "code": "AccessDenied", "times": ALWAYS}
    for method, path in (("DELETE", ""), ("GET", r"\?uploads"), ("GET", "uploadId=")):
        proxy.fail("status", method=method, path=path, **denied)
    file = random_file(tmp_path / "a", LARGE)
    proxy.fail("cut_request", method="PUT", skip=1, after=MIB)
    with pytest.raises(LinkLostError):
        bucket.put_file(file, bucket.key("a"))
    assert bucket.put_file(file, bucket.key("a")).moved == LARGE - 8 * MIB
    bucket.put_stream([random_bytes(20 * MIB)], bucket.key("s"))
    bucket.copy(bucket.key("a"), bucket.key("b"))
    bucket.get_file(bucket.key("b"), tmp_path / "b")
    assert sha256(tmp_path / "b") == sha256(file)
    assert not unfinished(server, bucket)


def test_two_runs_do_not_send_the_same_file_to_the_same_key(
    proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path
) -> None:
    file = random_file(tmp_path / "a", LARGE)
    rule = proxy.fail("delay", method="POST", path="uploads", seconds=1.0)
    first = threading.Thread(target=spoiled.put_file, args=(file, spoiled.key("a")))
    first.start()
    wait_for(lambda: rule.hits > 0)
    with pytest.raises(RefusedError, match="another run"):
        spoiled.put_file(file, spoiled.key("a"))
    first.join()
    assert spoiled.head(spoiled.key("a")).sha256 == sha256(file)


@pytest.mark.parametrize("size", [5000, LARGE])
def test_of_two_machines_that_send_to_one_key_at_once_one_wins_whole(
    server: S3Server, tmp_path: Path, size: int
) -> None:
    key, sides = f"race-{size}-{os.getpid()}", []
    for name in ("1", "2"):
        file = random_file(tmp_path / name, size, int(name))
        action = f"bucket.put_file({str(file)!r}, {key!r})"
        sides.append(start_side(action, server.url, server, tmp_path / f"cache{name}"))
    errors = [side.communicate(timeout=60)[1] for side in sides]
    assert 0 in [side.returncode for side in sides], errors
    assert all(not error or "is not what was sent" in error for error in errors), errors
    assert sound(server, key)
    assert server.content(key) in [(tmp_path / name).read_bytes() for name in ("1", "2")]
    assert key not in server.uploads()


@pytest.mark.parametrize("size", [5000, LARGE])
def test_two_runs_do_not_fetch_into_the_same_file(
    server: S3Server, proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path, size: int
) -> None:
    server.put(spoiled.key("a"), content := random_bytes(size))
    info = next(spoiled.list(spoiled.key("a")))
    rule = proxy.fail("delay", method="GET", path=spoiled.key("a"), seconds=1.0)

    def fetch() -> s3.Outcome:
        [outcome] = spoiled.get_many([(info, tmp_path / "a")])
        return outcome

    first = in_background(fetch)
    wait_for(lambda: rule.hits > 0)
    second = fetch()
    assert isinstance(second.error, RefusedError), second
    assert first.result().stored
    assert (tmp_path / "a").read_bytes() == content
    assert not parts(tmp_path)


# ---------------------------------------------------------------------------
# Many small objects
# ---------------------------------------------------------------------------


def many(server: S3Server, bucket: s3.Bucket, count: int) -> dict[s3.ObjectInfo, bytes]:
    """Small objects, each with its digest noted, and what they hold."""
    wanted = {bucket.key(f"{n % 3}/f{n}"): random_bytes(5000 + n, n) for n in range(count)}
    for key, content in wanted.items():
        bucket.put_bytes(content, key)
    return {info: wanted[info.key] for info in bucket.list(bucket.key() + "/")}


def test_of_many_the_one_that_was_damaged_on_the_way_back_is_an_error_and_no_file(
    server: S3Server, proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path
) -> None:
    wanted = many(server, spoiled, 40)
    bad = spoiled.key("1/f7")
    proxy.fail("flip_response", method="GET", path=bad, after=4321)
    items = [(info, tmp_path / s3.local_name(info.key, spoiled.key() + "/")) for info in wanted]
    counter = spoiled.progress = Counter()
    outcomes = {outcome.key: outcome for outcome in spoiled.get_many(items)}
    assert isinstance(outcomes[bad].error, IntegrityError)
    assert [key for key, outcome in outcomes.items() if outcome.error] == [bad]
    here = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert here == {path: wanted[info] for info, path in items if info.key != bad}
    assert counter.total == sum(map(len, here.values()))


def test_of_many_the_one_that_was_damaged_on_the_way_there_is_sent_again(
    server: S3Server, proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path
) -> None:
    files = {spoiled.key(str(n)): random_file(tmp_path / str(n), 5000, n) for n in range(20)}
    rule = proxy.fail("flip_request", method="PUT", path=spoiled.key("7"), after=4321)
    always = proxy.fail(
        "flip_request", method="PUT", path=spoiled.key("9"), after=4321, times=ALWAYS
    )
    outcomes = {o.key: o for o in spoiled.put_many((path, key) for key, path in files.items())}
    assert (rule.hits, always.hits) == (1, 5)
    assert isinstance(outcomes.pop(spoiled.key("9")).error, IntegrityError)
    assert server.content(spoiled.key("9")) is None
    for key, outcome in outcomes.items():
        assert outcome.stored
        assert server.content(key) == files[key].read_bytes()


@pytest.mark.parametrize("failures", [3, 14])
def test_of_many_those_at_which_the_server_failed_come_last_and_hold_nobody_up(
    proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    failures: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(s3, "MOST_PUT_OFF", 10)
    if failures <= 10:
        monkeypatch.delattr(s3._Server, "_pause")
    else:  # one beyond the ten may fail again where it is tried at once
        monkeypatch.setattr(s3._Server, "_pause", lambda *_: None)
    files = {spoiled.key(str(n)): random_file(tmp_path / str(n), 50, n) for n in range(200)}
    counter = spoiled.progress = Counter()
    for method in ("PUT", "GET"):
        infos = list(spoiled.list(spoiled.key()))
        where = {info: tmp_path / "to" / info.key for info in infos}
        rule = proxy.fail(
            "status", method=method, path=spoiled.key(), times=failures, status=500,
            code="InternalError",
        )  # fmt: skip
        if method == "PUT":
            done = list(spoiled.put_many((path, key) for key, path in files.items()))
        else:
            done = list(spoiled.get_many(where.items()))
        assert rule.hits == failures
        assert all(outcome.stored for outcome in done)
        assert {outcome.key for outcome in done} == set(files)
        failed = {seen.path for seen in proxy.seen(method) if seen.status == 500}
        last = [outcome.key for outcome in done[-min(failures, 10) :]]
        assert all(any(path.endswith(f"/{key}") for path in failed) for key in last)
    assert all((tmp_path / "to" / key).read_bytes() == files[key].read_bytes() for key in files)
    assert counter.total == 2 * 200 * 50


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[http.client.HTTPConnection]:
    """All connections that were opened so far."""
    connections: list[http.client.HTTPConnection] = []
    connect = s3_wire.Access.connect

    def noted(access: s3_wire.Access) -> http.client.HTTPConnection:
        connections.append(connect(access))
        return connections[-1]

    monkeypatch.setattr(s3_wire.Access, "connect", noted)
    return connections


def test_many_small_objects_travel_over_a_few_kept_connections_without_a_question(
    proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path,
    opened: list[http.client.HTTPConnection],
) -> None:  # fmt: skip
    files = [(random_file(tmp_path / str(n), 100, n), spoiled.key(str(n))) for n in range(300)]
    assert all(outcome.stored for outcome in spoiled.put_many(files))
    infos = list(spoiled.list(spoiled.key()))
    assert all(o.stored for o in spoiled.get_many((i, tmp_path / "to" / i.key) for i in infos))
    assert len(opened) <= 1 + max(s3.SMALL_FETCHES)
    assert {(seen.operation, seen.status) for seen in proxy.log} == {
        ("PUT", 200), ("GET list-type", 200), ("GET", 200),
    }  # fmt: skip
    assert (len(proxy.seen("PUT")), len(proxy.seen("GET"))) == (300, 300)


def test_connections_are_kept_after_refusals_and_for_all_pieces_of_a_stream(
    proxy: FaultProxy, spoiled: s3.Bucket, opened: list[http.client.HTTPConnection]
) -> None:
    for _ in range(5):
        assert spoiled.find(spoiled.key("nothing")) is None
    assert len(opened) == 1
    content = random_bytes(60_000_000, 1)
    spoiled.put_bytes(content, spoiled.key("large"))
    assert b"".join(spoiled.get_stream(spoiled.key("large"))) == content
    assert len(proxy.seen("GET")) == 8
    assert len(opened) <= 1 + s3.STREAM_LANES


def test_kept_connections_that_the_server_has_closed_meanwhile_are_not_missed(
    proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path,
    opened: list[http.client.HTTPConnection],
) -> None:  # fmt: skip
    files = [(random_file(tmp_path / str(n), 100, n), spoiled.key(str(n))) for n in range(100)]
    assert all(outcome.stored for outcome in spoiled.put_many(files))
    for connection in opened:
        connection.sock.shutdown(socket.SHUT_RDWR)
    before = len(opened)
    assert spoiled.get_bytes(spoiled.key("7")) == files[7][0].read_bytes()
    assert len(opened) == before + 1
    assert len(proxy.seen("GET")) == 1


def test_requests_sent_ahead_on_closed_connections_are_sent_again(
    server: S3Server, proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path,
    opened: list[http.client.HTTPConnection],
) -> None:  # fmt: skip
    files = [(random_file(tmp_path / str(n), 100, n), spoiled.key(str(n))) for n in range(40)]
    for again in range(2):
        assert all(outcome.stored for outcome in spoiled.put_many(files))
        for connection in opened:
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        infos = list(spoiled.list(spoiled.key()))
        for connection in opened:
            with contextlib.suppress(OSError, AttributeError):
                connection.sock.shutdown(socket.SHUT_RDWR)
        pairs = [(info, tmp_path / f"to{again}" / info.key) for info in infos]
        assert all(outcome.stored for outcome in spoiled.get_many(pairs))
        assert len(pairs) == 40
        assert all(path.read_bytes() == server.content(info.key) for info, path in pairs)


def test_small_medium_and_large_files_travel_together(
    server: S3Server, bucket: s3.Bucket, tmp_path: Path
) -> None:
    edges = 0, 1, s3.SMALL_BYTES, s3.SMALL_BYTES + 1, s3.PART_BYTES, s3.PART_BYTES + 1
    files = [
        (random_file(tmp_path / f"{size}.{n}", size, size + n), bucket.key(f"{size}.{n}"))
        for size in edges for n in range(3)
    ]  # fmt: skip
    sent = {outcome.key: outcome.stored for outcome in bucket.put_many(files)}
    assert sorted(sent) == sorted(key for _, key in files)
    assert all(server.content(key) == path.read_bytes() for path, key in files)
    infos = list(bucket.list(bucket.key()))
    got = list(bucket.get_many((info, tmp_path / "to" / Path(info.key).name) for info in infos))
    assert len(got) == len(files)
    for path, key in files:
        assert (tmp_path / "to" / Path(key).name).read_bytes() == path.read_bytes()


def test_a_process_after_a_fork_uses_connections_of_its_own(
    spoiled: s3.Bucket, opened: list[http.client.HTTPConnection]
) -> None:
    spoiled.put_bytes(b"content", spoiled.key("a"))
    child = os.fork()
    if not child:
        sound = spoiled.get_bytes(spoiled.key("a")) == b"content" and len(opened) == 2
        os._exit(0 if sound else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert spoiled.get_bytes(spoiled.key("a")) == b"content"
    assert len(opened) == 1


def test_a_slow_server_is_asked_for_more_at_once(bucket: s3.Bucket) -> None:
    wire = bucket._server._wire
    lanes = []
    for wire.answer_seconds in (None, 0.0001, 0.002, 0.02, 5.0):
        lanes.append(bucket._server.lanes(3, 32))
    assert lanes == [3, 3, 7, 32, 32]
    bucket._server.settings = bucket._server.settings._replace(max_concurrency=10)
    assert (bucket._server.lanes(3, 32), bucket._server.by_distance(1, 8, 0.005)) == (10, 8)


def test_a_link_in_the_place_of_a_file_is_replaced_and_never_followed(
    server: S3Server, bucket: s3.Bucket, tmp_path: Path
) -> None:
    [(info, content)] = many(server, bucket, 1).items()
    other = random_file(tmp_path / "other", 10)
    before = other.read_bytes()
    for target in (other, tmp_path / "nowhere", tmp_path):
        link = tmp_path / "link"
        link.symlink_to(target)
        [outcome] = bucket.get_many([(info, link)])
        assert outcome.stored
        assert not link.is_symlink()
        assert link.read_bytes() == content
        link.unlink()
    assert other.read_bytes() == before
    assert not (tmp_path / "nowhere").exists()


def test_what_a_killed_run_left_of_a_small_file_is_not_taken_for_a_part_of_it(
    server: S3Server, bucket: s3.Bucket, tmp_path: Path
) -> None:
    [(info, content)] = many(server, bucket, 1).items()
    part = tmp_path / part_name("a", f"{bucket._server.place}/{info.key}")
    part.write_bytes(random_bytes(20_000))
    [outcome] = bucket.get_many([(info, tmp_path / "a")])
    assert outcome.stored
    assert (tmp_path / "a").read_bytes() == content
    assert not part.exists()


def test_an_answer_that_ends_early_is_asked_for_again_from_its_start(
    server: S3Server, proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path
) -> None:
    [(info, content)] = many(server, spoiled, 1).items()
    counter = spoiled.progress = Counter()
    rule = proxy.fail("cut_response", method="GET", path=info.key, after=3000, times=2)
    [outcome] = spoiled.get_many([(info, tmp_path / "a")])
    assert outcome.stored
    assert (tmp_path / "a").read_bytes() == content
    assert (rule.hits, counter.total) == (2, len(content))


# ---------------------------------------------------------------------------
# Answers of all kinds
# ---------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\n"
LISTING = b"<ListBucketResult><Contents><Key>%s</Key><ETag>e</ETag><Size>1</Size><LastModified>\
2026-01-01T00:00:00Z</LastModified></Contents></ListBucketResult>"


@contextlib.contextmanager
def server_that_says(*answers: bytes) -> Iterator[str]:
    """The address of a server that gives these answers, one to each request, and hangs up."""
    left = list(answers)

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while left and self.rfile.readline():
                while self.rfile.readline() not in (b"\r\n", b""):
                    pass
                answer = left.pop(0)
                self.wfile.write(answer)
                if b"ength" not in answer and b"hunked" not in answer:
                    return

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        threading.Thread(target=listener.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_address[1]}"
        listener.shutdown()


@pytest.mark.parametrize(
    "head",
    [
        OK + b"content-length: %d\r\n\r\n%s",
        OK + b"CONTENT-LENGTH:   %d  \r\nConnection: close\r\n\r\n%s",
        OK + b"X-Bytes: %d\r\n\r\n%s",
        b"HTTP/1.0 200\r\nX-Bytes: %d\r\n\r\n%s",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: %d\r\n\r\n%s",
        OK + b"Content-Length: %d\r\n\r\n%smore than that\r\n",
    ],
    ids=["plain", "blanks", "no length", "old", "go on", "more"],
)
def test_an_answer_is_understood_in_all_ways_it_can_be_told(head: bytes) -> None:
    text = LISTING % b"one"
    with server_that_says(head % (len(text), text), head % (len(text), text)) as url:
        bucket = open_bucket(url, timeout=3, max_attempts=1)
        for _ in range(2):
            assert [info.key for info in bucket.list()] == ["one"]


def test_an_answer_in_chunks_is_put_together() -> None:
    text = LISTING % (b"k" * 300_000)
    pieces = [text[:1], text[1:70_000], text[70_000:]]
    chunks = b"".join(b"%X;note=1\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    answer = OK + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\nTrailer: 1\r\n\r\n"
    with server_that_says(answer, answer) as url:
        bucket = open_bucket(url, timeout=3, max_attempts=1)
        for _ in range(2):
            assert [len(info.key) for info in bucket.list()] == [300_000]


@pytest.mark.parametrize(
    "answer",
    [
        b"", b"HTTP/1.1", b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"HTTP/1.1 2000 OK\r\n\r\n",
        OK + b"Content-Length: -1\r\n\r\n", OK + b"Content-Length: ten\r\n\r\n",
        OK + b"Content-Length: 999\r\n\r\n" + LISTING, OK + b"X: " + b"x" * 2**20,
        OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", LISTING,
        OK + b"Transfer-Encoding: chunked\r\n\r\n%X\r\n%s" % (len(LISTING) + 1, LISTING),
    ],
)  # fmt: skip
def test_an_answer_that_makes_no_sense_is_a_lost_link(answer: bytes) -> None:
    with server_that_says(answer) as url, pytest.raises(LinkLostError):
        list(open_bucket(url, timeout=3, max_attempts=1).list())


def test_no_header_can_smuggle_another_one_in(bucket: s3.Bucket) -> None:
    request = s3_wire.S3Request("GET", "a", {"if-match": '"etag"\r\nx-amz-acl: public-read'})
    with pytest.raises(ValueError, match="end of a line"):
        s3_wire.Wire._head(bucket._server.access, request, 0)


# ---------------------------------------------------------------------------
# Killed at any moment
# ---------------------------------------------------------------------------

SIDE = """
import sys
sys.path.insert(0, {root!r})
import s3_transport as s3
import s3_wire
from cloud_settings import S3Settings
bucket = s3.Bucket(S3Settings.resolve(bucket="bucket", limit_rate=100_000_000))
print("ready", flush=True)
{action}
"""


def start_side(
    action: str, url: str, server: S3Server, cache: Path, **env: str
) -> subprocess.Popen[str]:
    """Another process that does one thing with the bucket; it has found its keys when we go on."""
    code = SIDE.format(root=str(ROOT), action=action)
    environment = {**os.environ, **server.env(url), "XDG_CACHE_HOME": str(cache), **env}
    child = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n", child.communicate()[1]
    return child


def finish(child: subprocess.Popen[str], code: int = 0) -> None:
    """Wait for the end of a process, and for this exit code."""
    errors = child.communicate(timeout=60)[1]
    assert child.returncode == code, errors


class KillLoop:
    """Kills runs at random moments, each continuing the one before, until so many were killed."""

    def __init__(self, start: Callable[[int], subprocess.Popen[str]], seed: int) -> None:
        self._start = start
        self._source = random.Random(seed)
        self.kills = 0

    def rounds(self, seconds: float) -> Iterator[tuple[int, int]]:
        """Numbers of transfers that came to their end, each with the kills it has survived."""
        for number in itertools.count():
            before = self.kills
            while not self._ends(number, seconds):
                self.kills += 1
            yield number, self.kills - before
            if self.kills >= KILLS:
                return

    def _ends(self, number: int, seconds: float) -> bool:
        child = self._start(number)
        if self.kills < KILLS:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(self._source.uniform(0, seconds))
            child.kill()
        errors = child.communicate(timeout=60)[1]
        assert child.returncode in (0, -signal.SIGKILL), errors
        return child.returncode == 0


def test_uploads_killed_at_random_moments_end_in_the_same_content(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    size, cache = 40 * MIB + 5, tmp_path / "cache"
    file, key = random_file(tmp_path / "a", size), f"killed-up-{os.getpid()}"
    loop = KillLoop(
        lambda number: start_side(
            f"bucket.put_file({str(file)!r}, '{key}-{number}')", proxy.url, server, cache
        ), seed=1,
    )  # fmt: skip
    for number, kills in loop.rounds(0.5):
        assert server.content(f"{key}-{number}") == file.read_bytes()
        assert not [name for name in server.uploads() if name.startswith(key)]
        # At most what was under way at each kill is sent again.
        assert proxy.up <= size + kills * s3.SEND_LANES * s3.PART_BYTES + 100_000
        proxy.forget()
        server.client().delete_object(Bucket="bucket", Key=f"{key}-{number}")
    assert loop.kills == KILLS
    assert not list(cache.rglob("*.journal"))


def test_downloads_killed_at_random_moments_end_in_the_same_content(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    size, into = 40 * MIB + 5, tmp_path / "into"
    content, key = random_bytes(size), f"killed-down-{os.getpid()}"
    server.put(key, content, Metadata={"sha256": hashlib.sha256(content).hexdigest()})
    into.mkdir()
    loop = KillLoop(
        lambda number: start_side(
            f"bucket.get_file({key!r}, {str(into / 'a')!r})", proxy.url, server, tmp_path / "cache"
        ), seed=2,
    )  # fmt: skip
    for _, kills in loop.rounds(0.5):
        assert (into / "a").read_bytes() == content
        assert [path.name for path in into.iterdir()] == ["a"]
        # Beyond a piece of a segment per lane, sockets hold what was sent and never read.
        assert proxy.down <= size + kills * s3.FETCH_LANES[1] * 8 * MIB
        proxy.forget()
        (into / "a").unlink()
    assert loop.kills == KILLS


def test_a_stream_killed_on_its_way_leaves_nothing_once_it_was_sent_again(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    key = f"killed-stream-{os.getpid()}"
    action = f"bucket.put_stream((bytes([n % 251]) * 1_000_000 for n in range(50)), {key!r})"
    rule = proxy.fail("delay", method="PUT", skip=1, seconds=30, times=ALWAYS)
    child = start_side(action, proxy.url, server, tmp_path / "cache")
    wait_for(lambda: rule.hits > 0)
    child.kill()
    child.communicate()
    assert key in server.uploads()
    proxy.forget()
    finish(start_side(action, proxy.url, server, tmp_path / "cache"))
    assert server.content(key) == b"".join(bytes([n % 251]) * 1_000_000 for n in range(50))
    assert key not in server.uploads()


def test_what_ctrl_c_interrupts_goes_on_where_it_stopped(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    file, key = random_file(tmp_path / "a", 40 * MIB), f"interrupted-{os.getpid()}"
    up = f"print(bucket.put_file({str(file)!r}, {key!r}).moved)"
    down = f"print(bucket.get_file({key!r}, {str(tmp_path / 'b')!r}).moved)"
    for action, method in ((up, "PUT"), (down, "GET")):
        rule = proxy.fail("stall" if action is down else "delay", method=method, skip=2,
                          after=5 * MIB, seconds=30, times=ALWAYS)  # fmt: skip
        child = start_side(
            action, proxy.url, server, tmp_path / "cache", AWS_S3_MAX_CONCURRENCY="1"
        )
        wait_for(lambda rule=rule: rule.hits > 0)  # type: ignore[misc]
        time.sleep(0.3)
        child.send_signal(signal.SIGINT)
        finish(child, -signal.SIGINT)
        assert not (tmp_path / "b").exists()
        proxy.forget()
        child = start_side(action, proxy.url, server, tmp_path / "cache")
        moved = int(child.communicate(timeout=60)[0])
        assert 0 < moved <= 24 * MIB
    assert sound(server, key)
    assert sha256(tmp_path / "b") == sha256(file)
    assert not parts(tmp_path)


def test_a_mirror_killed_at_random_moments_ends_complete(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    files = {f"f{n}": random_bytes(20_000 + n, n) for n in range(300)}
    (tmp_path / "from").mkdir()
    for name, content in files.items():
        (tmp_path / "from" / name).write_bytes(content)
    prefix = f"killed-many-{os.getpid()}"
    action = (
        "import pathlib\n"
        f"there = {{i.key for i in bucket.list({prefix!r} + '/')}}\n"
        f"names = [(p, {prefix!r} + '/' + p.name) for p in pathlib.Path("
        f"{str(tmp_path / 'from')!r}).iterdir()]\n"
        "for o in bucket.put_many([n for n in names if n[1] not in there]): assert o.stored\n"
    )
    loop = KillLoop(lambda _: start_side(action, proxy.url, server, tmp_path / "cache"), seed=3)
    next(loop.rounds(0.3))
    stored = {key for key in server.all_keys() if key.startswith(prefix)}
    assert stored == {f"{prefix}/{name}" for name in files}
    into = tmp_path / "into"
    bucket = open_bucket(server.url, prefix=prefix)
    named = ((i, into / s3.local_name(i.key, f"{prefix}/")) for i in bucket.list(f"{prefix}/"))
    assert all(outcome.stored for outcome in bucket.get_many(named))
    assert {path.name: path.read_bytes() for path in into.iterdir()} == files


# ---------------------------------------------------------------------------
# What a user reads
# ---------------------------------------------------------------------------

REFUSALS: list[tuple[int, str, type[CloudError], str, str]] = [
    (403, "AccessDenied", AccessError, "s3:PutObject is not allowed", "s3-check"),
    (403, "InvalidAccessKeyId", AccessError, "does not know the access key", "AWS_ACCESS_KEY_ID"),
    (403, "SignatureDoesNotMatch", AccessError, "the secret key is not the one", "AWS_SECRET"),
    (403, "RequestTimeTooSkewed", AccessError, "clock of this machine is wrong", "timedatectl"),
    (400, "ExpiredToken", AccessError, "token has expired", "aws sso login"),
    (404, "NoSuchBucket", NotFoundError, "bucket bucket does not exist", "--bucket"),
    (301, "PermanentRedirect", AccessError, "is not in the region", "--region"),
    (507, "XMinioStorageFull", DiskFullError, "is full", "free some"),
    (501, "NotImplemented", AccessError, "does not support PutObject", ""),
    (400, "KeyTooLongError", UsageError, "refuses", "another name"),
    (403, "InvalidObjectState", AccessError, "archived", "restore"),
    (418, "Teapot", TransferError, "Teapot", "again"),
]


@pytest.mark.parametrize(("status", "code", "kind", "message", "hint"), REFUSALS)
def test_a_refusal_is_told_in_a_clear_line_with_the_next_step(
    proxy: FaultProxy, spoiled: s3.Bucket, status: int, code: str, kind: type[CloudError],
    message: str, hint: str,
) -> None:  # fmt: skip
    proxy.fail("status", status=status, code=code, times=ALWAYS)
    with pytest.raises(kind) as caught:
        spoiled.put_bytes(b"x", spoiled.key("a"))
    assert type(caught.value) is kind
    assert message in str(caught.value)
    assert hint in caught.value.hint
    assert caught.value.__cause__ is not None
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value) + repr(caught.value.__cause__) + repr(spoiled.settings)


def test_a_wrong_secret_is_told_from_a_wrong_key(rclone: RcloneServer) -> None:
    wrong = open_bucket(rclone.url, secret_access_key="wrong-one")
    with pytest.raises(AccessError, match=r"secret key is not the one of .*the clock is right"):
        wrong.put_bytes(b"x", "a")
    quoted = open_bucket(rclone.url, secret_access_key=f" {SECRET}")
    with pytest.raises(AccessError, match="blanks or quotes around it"):
        quoted.put_bytes(b"x", "a")
    amazon = open_bucket(rclone.url, access_key_id="AKIAIOSFODNN7EXAMPLE")
    with pytest.raises(AccessError, match=r"does not know the access key AKIA…MPLE|is of AWS"):
        amazon.put_bytes(b"x", "a")


def all_actions(bucket: s3.Bucket, file: Path) -> dict[str, Callable[[], object]]:
    """Everything that asks the server, and the right it takes."""
    return {
        "s3:ListBucket": lambda: list(bucket.list()),
        "s3:PutObject": lambda: bucket.put_bytes(b"x", "a"),
        "s3:GetObject": lambda: bucket.get_file("a", file.with_name("new")),
        "s3:GetObject ": lambda: bucket.put_file(file, "a"),
        "s3:GetObject  ": lambda: bucket.get_bytes("a"),
    }


def test_all_that_fails_for_a_wrong_key_says_so(rclone: RcloneServer, tmp_path: Path) -> None:
    file = random_file(tmp_path / "a", 10)
    for action in all_actions(open_bucket(rclone.url, secret_access_key="no"), file).values():
        with pytest.raises(AccessError, match="secret key is not the one"):
            action()
    for action in all_actions(open_bucket(rclone.url, access_key_id="OTHER"), file).values():
        with pytest.raises(AccessError, match="does not know the access key"):
            action()


def test_a_wrong_clock_is_told_with_its_error(
    rclone: RcloneServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, gmtime = time.time, time.gmtime
    monkeypatch.setattr(time, "time", lambda: now() - 3600)
    monkeypatch.setattr(time, "gmtime", lambda *seconds: gmtime(*(seconds or [now() - 3600])))
    actions = all_actions(open_bucket(rclone.url), random_file(tmp_path / "a", 10))
    for action in actions.values():
        with pytest.raises(
            AccessError, match=r"clock of this machine is wrong: 3[56]\d\d s behind"
        ):
            action()


def test_a_denial_names_the_right_that_is_missing(
    server: S3Server, proxy: FaultProxy, tmp_path: Path
) -> None:
    bucket, file = open_bucket(proxy.url), random_file(tmp_path / "a", 10)
    server.put("a", b"x")
    for right, action in all_actions(bucket, file).items():
        proxy.rules.clear()
        proxy.fail("status", status=403, code="AccessDenied", times=ALWAYS)
        with pytest.raises(AccessError, match=right.strip() + " is not allowed"):
            action()
    proxy.rules.clear()
    proxy.fail("status", method="DELETE", status=403, code="AccessDenied", times=ALWAYS)
    with pytest.raises(AccessError, match="s3:DeleteObject is not allowed"):
        list(bucket.delete(["a"]))


def test_a_bucket_that_does_not_exist_is_said_to_be_missing(
    server: S3Server, tmp_path: Path
) -> None:
    settings = S3Settings.resolve(
        bucket="no-such-bucket", endpoint_url=server.url, region=REGION,
        access_key_id=KEY_ID, secret_access_key=SECRET,
    )  # fmt: skip
    for action in all_actions(s3.Bucket(settings), random_file(tmp_path / "a", 10)).values():
        with pytest.raises(NotFoundError, match="the bucket no-such-bucket does not exist"):
            action()


def test_a_server_behind_a_wall_cannot_be_reached_and_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_wire, "CONNECT_SECONDS", 0.2)
    with silent_port() as port:
        bucket, started = open_bucket(f"http://127.0.0.1:{port}"), time.monotonic()
        with pytest.raises(ConnectError, match="cannot be reached"):
            bucket.put_bytes(b"x", "a")
        assert time.monotonic() - started < 1


def test_no_secret_is_in_a_message_or_a_log(
    proxy: FaultProxy, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.DEBUG)
    token = "session-token-not-a-real-one"
    bucket = open_bucket(proxy.url, session_token=token, max_attempts=2)
    texts = [repr(bucket.settings), repr(bucket._server.access.credentials), repr(vars(bucket))]
    for fault in ("status", "drop", "error_200"):
        for action in all_actions(bucket, random_file(tmp_path / "a", 9 * MIB)).values():
            proxy.rules.clear()
            proxy.fail(fault, message=f"made up: {KEY_ID}", times=ALWAYS)
            with pytest.raises(CloudError) as caught:
                action()
            texts += [*traceback.format_exception(caught.value), caught.value.hint]
    assert any(token in seen.headers.values() for seen in proxy.log)
    told = "\n".join([*texts, caplog.text])
    assert SECRET not in told
    assert token not in told
    with pytest.raises(UsageError) as caught:
        open_bucket("https://user:password@host")
    assert "password" not in str(caught.value)


def test_a_server_that_cannot_be_reached_fails_at_once() -> None:
    bucket = open_bucket(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ConnectError, match="cannot be reached") as caught:
        bucket.put_bytes(b"x", "a")
    assert "--endpoint-url" in caught.value.hint


def test_the_region_that_the_server_names_is_followed(
    proxy: FaultProxy, spoiled: s3.Bucket
) -> None:
    proxy.fail(
        "status", status=400, code="AuthorizationHeaderMalformed",
        message="wrong</Message><Region>eu-central-1</Region><Message>",
    )  # fmt: skip
    spoiled.put_bytes(b"x", spoiled.key("a"))
    assert "eu-central-1" in proxy.log[-1].headers["authorization"]


def test_a_region_that_the_server_names_again_and_again_is_an_error(
    proxy: FaultProxy, spoiled: s3.Bucket
) -> None:
    proxy.fail(
        "status", status=400, code="AuthorizationHeaderMalformed", times=ALWAYS,
        message="wrong</Message><Region>eu-central-1</Region><Message>",
    )  # fmt: skip
    with pytest.raises(AccessError, match="is not in the region"):
        spoiled.put_bytes(b"x", spoiled.key("a"))
    assert len(proxy.log) == 2


def test_a_download_for_which_there_is_no_room_does_not_start(
    proxy: FaultProxy, spoiled: s3.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoiled.put_bytes(random_bytes(5000), spoiled.key("a"))
    monkeypatch.setattr(s3, "free_space", lambda path: 4999)
    with pytest.raises(DiskFullError, match="5 kB free"):
        spoiled.get_file(spoiled.key("a"), tmp_path / "a")
    assert proxy.down == 0


def test_a_folder_that_may_not_be_written_fails_for_its_own_files_only(
    server: S3Server, plain_user: Path
) -> None:
    bucket = open_bucket(server.url)
    bucket.put_bytes(b"x", bucket.key("a"))
    (plain_user / "shut").mkdir(mode=0o500)
    [info] = bucket.list(bucket.key() + "/")
    items = [(info, plain_user / "shut" / "a"), (info, plain_user / "open" / "a")]
    shut, fine = sorted(bucket.get_many(items), key=lambda outcome: outcome.path, reverse=True)
    assert isinstance(shut.error, AccessError)
    assert "permission denied" in str(shut.error)
    assert fine.stored


def test_a_full_disk_is_told_and_the_download_can_go_on(
    bucket: s3.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = random_file(tmp_path / "a", LARGE)
    bucket.put_file(file, bucket.key("a"))

    def full(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(DiskFullError, match="disk is full") as caught:
        bucket.get_file(bucket.key("a"), tmp_path / "b")
    assert isinstance(caught.value.__cause__, OSError)
    monkeypatch.undo()
    assert not (tmp_path / "b").exists()
    assert bucket.get_file(bucket.key("a"), tmp_path / "b").sha256 == sha256(file)
    info = next(bucket.list(bucket.key("a")))._replace(size=1)  # the way of small ones
    monkeypatch.setattr(s3, "write_all", full)
    with pytest.raises(DiskFullError, match="disk is full"):
        list(bucket.get_many([(info, tmp_path / "c")]))
    assert not (tmp_path / "c").exists()
    assert not parts(tmp_path)


def test_a_missing_object_a_folder_and_a_missing_file_are_clear_errors(
    bucket: s3.Bucket, tmp_path: Path
) -> None:
    with pytest.raises(NotFoundError, match="does not exist"):
        bucket.get_file(bucket.key("none"), tmp_path / "a")
    with pytest.raises(NotFoundError, match="does not exist"):
        bucket.put_file(tmp_path / "none", bucket.key("a"))
    with pytest.raises(UsageError, match="not a regular file"):
        bucket.put_file(tmp_path, bucket.key("a"))
    bucket.put_bytes(b"x", bucket.key("a"))
    with pytest.raises(UsageError, match="is a folder"):
        bucket.get_file(bucket.key("a"), tmp_path)


# ---------------------------------------------------------------------------
# Settings
# ---------------------------------------------------------------------------


def test_a_flag_wins_over_the_environment_and_that_over_dotenv(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text(
        "S3_BUCKET=dotenv\nS3_PREFIX=/runs/\nAWS_ENDPOINT_URL=http://dotenv\n"
        "AWS_ACCESS_KEY_ID=dotenv-id\nAWS_SECRET_ACCESS_KEY=dotenv-secret\n"
        "AWS_MAX_ATTEMPTS=9\nAWS_S3_MAX_CONCURRENCY=7\nAWS_RETRY_MODE=adaptive\n"
    )
    settings = S3Settings.resolve()
    assert (settings.bucket, settings.prefix) == ("dotenv", "runs")
    assert settings.key("a", "b") == "runs/a/b"
    assert (settings.max_attempts, settings.max_concurrency) == (9, 7)
    assert settings.secret_access_key == "dotenv-secret"
    monkeypatch.setenv("S3_BUCKET", "environment")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "environment-id")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://s3-only")
    settings = S3Settings.resolve()
    assert settings.bucket == "environment"
    assert settings.endpoint_url == "http://s3-only"
    assert settings.access_key_id is None  # keys of two places are never mixed
    assert S3Settings.resolve(bucket="s3://flag/deep", prefix="er").key("x") == "deep/er/x"


@pytest.mark.parametrize(
    "given", [{"bucket": ""}, {"bucket": "a b"}, {"bucket": "b", "endpoint_url": "host:9000"},
              {"bucket": "b", "endpoint_url": "http://host:99999"}, {"bucket": "b", "limit_rate": 0},
              {"bucket": "b", "max_concurrency": "many"}, {"bucket": "b", "max_attempts": "0"},
              {"bucket": "b", "retry_mode": "wild"}, {"bucket": "b", "timeout": 0}],
)  # fmt: skip
def test_settings_that_make_no_sense_are_usage_errors(given: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        S3Settings.resolve(**given)
    assert caught.value.hint


def test_without_keys_the_error_says_where_they_could_come_from(tmp_path: Path) -> None:
    settings = S3Settings.resolve(bucket="bucket", endpoint_url="http://127.0.0.1:1")
    with pytest.raises(AccessError, match="no credentials") as caught:
        s3.Bucket(settings)
    assert "AWS_ACCESS_KEY_ID" in caught.value.hint
    with pytest.raises(AccessError, match="nobody"):
        s3.Bucket(S3Settings.resolve(bucket="bucket", profile="nobody"))


def test_a_profile_and_a_config_file_are_boto3s_own_business(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(
        f"[profile work]\nregion = {REGION}\nendpoint_url = {server.url}\n"
        f"aws_access_key_id = {KEY_ID}\naws_secret_access_key = {SECRET}\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    bucket = s3.Bucket(S3Settings.resolve(bucket="bucket", profile="work", prefix="profile"))
    bucket.put_bytes(b"x", bucket.key("a"))
    assert server.content("profile/a") == b"x"


def test_on_aws_the_host_is_amazons(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = S3Settings.resolve(
        bucket="mine", region="eu-west-1", access_key_id="AKIDAKIDAKIDAKID", secret_access_key="s"
    )
    access = s3_wire.Access(settings)
    assert (access.host, access.secure) == ("mine.s3.eu-west-1.amazonaws.com", True)
    assert access.path("a b/c") == "/a%20b/c"


def test_our_signature_is_the_one_that_botocore_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    auth: Any = importlib.import_module("botocore.auth")
    awsrequest: Any = importlib.import_module("botocore.awsrequest")
    keys: Any = importlib.import_module("botocore.credentials").Credentials
    settings = S3Settings.resolve(
        bucket="bucket", region="eu-west-1", endpoint_url="https://host.example",
        access_key_id="AKID", secret_access_key="SECRET", session_token="TOKEN",
    )  # fmt: skip
    access = s3_wire.Access(settings)
    request = s3_wire.S3Request(
        "PUT", "a b/ü+%", {"x-amz-meta-a": "1", "content-md5": "abc"},
        (("uploadId", "x/y+z"), ("partNumber", "3")), s3_wire.UNSIGNED,
    )  # fmt: skip
    path, query = access.path(request.key), s3_wire.query_string(request.query)
    ours = access.signed(request, path, query)
    theirs = awsrequest.AWSRequest(
        "PUT", f"https://host.example{path}?{query}",
        headers={"x-amz-meta-a": "1", "content-md5": "abc"},
    )  # fmt: skip
    theirs.context["payload_signing_enabled"] = False
    theirs.context["client_config"] = None
    now = ours["x-amz-date"]
    monkeypatch.setattr(
        auth, "get_current_datetime", lambda *_, **__: dt.datetime.strptime(now, "%Y%m%dT%H%M%SZ"),
        raising=False,
    )  # fmt: skip
    auth.S3SigV4Auth(keys("AKID", "SECRET", "TOKEN"), "s3", "eu-west-1").add_auth(theirs)
    assert ours["authorization"] == theirs.headers["Authorization"]


def test_the_rate_limit_sees_every_byte(bucket: s3.Bucket, tmp_path: Path) -> None:
    taken = []

    class Meter(RateLimiter):
        def take(self, count: int) -> None:
            taken.append(count)

    metered = s3.Bucket(bucket.settings, limiter=Meter(None))
    file = random_file(tmp_path / "a", LARGE)
    metered.put_file(file, bucket.key("a"))
    assert LARGE <= sum(taken) < LARGE + 10_000
    taken.clear()
    metered.get_file(bucket.key("a"), tmp_path / "b")
    assert LARGE <= sum(taken) < LARGE + 10_000


def test_many_items_are_pulled_as_they_are_needed(bucket: s3.Bucket, tmp_path: Path) -> None:
    file = random_file(tmp_path / "a", 10)
    pulled = itertools.count()

    def endless() -> Iterator[tuple[Path, str]]:
        while True:
            yield file, bucket.key(str(next(pulled)))

    outcomes = bucket.put_many(endless())
    for _ in range(50):
        outcome = next(outcomes)
        assert outcome.stored
    outcomes.close()  # type: ignore[attr-defined]  # it is a generator
    assert next(pulled) < 5000


def test_a_limited_rate_is_kept_in_both_directions(bucket: s3.Bucket, tmp_path: Path) -> None:
    limited = s3.Bucket(bucket.settings._replace(limit_rate=20_000_000))
    file = random_file(tmp_path / "a", 10_000_000)
    actions: list[Callable[[], object]] = [
        lambda: limited.put_file(file, bucket.key("a")),
        lambda: limited.get_file(bucket.key("a"), tmp_path / "b"),
    ]
    for action in actions:
        started = time.monotonic()
        action()
        assert time.monotonic() - started > 0.35


def test_a_hundred_thousand_objects_are_listed_in_flat_memory(
    rclone: RcloneServer, tmp_path: Path
) -> None:
    action = (
        "import resource\n"
        "used = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "infos = bucket.list()\n"
        "first, before = next(infos), used()\n"
        "print(first.key, 1 + sum(1 for _ in infos), used() - before)"
    )
    with endless_listing(100_000) as url:
        child = start_side(action, url, rclone, tmp_path)
        key, count, grown = child.communicate(timeout=60)[0].split()
    assert (key, int(count)) == ("folder/0000000.bin", 100_000)
    assert int(grown) < 8 * MIB


# ---------------------------------------------------------------------------
# TLS
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secure(tmp_path_factory: Any) -> Iterator[RcloneServer]:
    """A server with a certificate that nobody has heard of."""
    server = RcloneServer(tmp_path_factory.mktemp("rclone_tls"))
    server.certificate = server.root / "cert.pem", server.root / "key.pem"
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=me"
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", str(server.certificate[0])]
    subprocess.run(
        [require("openssl"), *words.split(), *more, "-keyout", str(server.certificate[1])],
        check=True, capture_output=True,
    )  # fmt: skip
    with server:
        yield server


def test_an_unknown_certificate_is_refused_until_its_authority_is_named(
    secure: RcloneServer, rclone: RcloneServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert secure.certificate
    url = f"https://127.0.0.1:{secure.port}"
    with pytest.raises(AccessError, match=r"certificate of .* is not trusted") as caught:
        open_bucket(url).put_bytes(b"x", "a")
    assert "AWS_CA_BUNDLE" in caught.value.hint
    monkeypatch.setenv("AWS_CA_BUNDLE", str(secure.certificate[0]))
    open_bucket(url).put_bytes(b"x", "a")
    with pytest.raises(ConnectError, match="cannot be reached"):  # no TLS there
        open_bucket(f"https://127.0.0.1:{rclone.port}").put_bytes(b"x", "a")


def test_a_cut_in_the_middle_of_tls_is_waited_out(
    secure: RcloneServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert secure.certificate
    monkeypatch.setenv("AWS_CA_BUNDLE", str(secure.certificate[0]))
    file = random_file(tmp_path / "a", LARGE)
    for after in (100_000, 3 * MIB):
        with cutting_relay(secure.port, after, times=4) as port:
            bucket = open_bucket(f"https://127.0.0.1:{port}", timeout=3)
            bucket.put_file(file, bucket.key("a"))
        with cutting_relay(secure.port, after, times=4) as port:
            bucket = open_bucket(
                f"https://127.0.0.1:{port}", timeout=3, prefix=bucket.settings.prefix
            )
            (tmp_path / "b").unlink(missing_ok=True)
            bucket.get_file(bucket.key("a"), tmp_path / "b")
        assert sha256(tmp_path / "b") == sha256(file)


def test_an_error_of_tls_counts_as_a_broken_link_and_not_as_a_wrong_certificate(
    server: S3Server, bucket: s3.Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put_bytes(b"x", bucket.key("a"))
    read, errors = s3_wire.Wire._receive, [ssl.SSLError("BAD_RECORD_MAC"), ssl.SSLEOFError("EOF")]

    def fail(self: s3_wire.Wire, *arguments: Any) -> None:
        if errors:
            raise errors.pop()
        read(self, *arguments)

    monkeypatch.setattr(s3_wire.Wire, "_receive", fail)
    assert bucket.get_bytes(bucket.key("a")) == b"x"
    assert not errors
