"""Limited keys of the storage server: what they may do, until when, how much, and their end."""

from __future__ import annotations

import contextlib
import functools
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud_jobs.storage import StorageKeys, StorageServer
from cloud_jobs.storage_keys import StorageKey
from cloud_services import AccessError, NotFoundError, UsageError
from tests.support import MIB, ROOT, random_bytes
from tests.test_storage import (
    BUCKET,
    SECRET,
    Raw,
    client_of,
    code_of,
    data_files,
    given_settings,
    wait_until,
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[StorageServer]:
    with StorageServer(given_settings(tmp_path / "store")) as running:
        root = client_of(running.url)
        for bucket in (BUCKET, "other"):
            root.create_bucket(Bucket=bucket)
            root.put_object(Bucket=bucket, Key="team/file", Body=b"team")
            root.put_object(Bucket=bucket, Key="private", Body=b"private")
        yield running


@pytest.fixture
def keys(server: StorageServer) -> Iterator[StorageKeys]:
    """As another process would open them, while the server runs."""
    opened = StorageKeys(server.settings.folder)
    yield opened
    opened.close()


def client_with(server: StorageServer, key: StorageKey) -> Any:
    assert key.secret_key
    return client_of(server.url, key.access_key, key.secret_key)


def test_a_key_reaches_its_prefix_and_nothing_else(
    server: StorageServer, keys: StorageKeys
) -> None:
    client = client_with(server, keys.create("team", BUCKET, "team/"))
    client.put_object(Bucket=BUCKET, Key="team/new", Body=b"new")
    assert client.get_object(Bucket=BUCKET, Key="team/file")["Body"].read() == b"team"
    listed = client.list_objects_v2(Bucket=BUCKET, Prefix="team/")
    assert [entry["Key"] for entry in listed["Contents"]] == ["team/file", "team/new"]
    assert [bucket["Name"] for bucket in client.list_buckets()["Buckets"]] == [BUCKET]
    client.head_bucket(Bucket=BUCKET)
    denied = code_of
    assert denied(client.get_object, Bucket=BUCKET, Key="private") == "AccessDenied"
    assert denied(client.put_object, Bucket=BUCKET, Key="teams", Body=b"") == "AccessDenied"
    assert denied(client.get_object, Bucket="other", Key="team/file") == "AccessDenied"
    assert denied(client.list_objects_v2, Bucket=BUCKET) == "AccessDenied"
    assert denied(client.list_objects_v2, Bucket=BUCKET, Prefix="tea") == "AccessDenied"
    assert denied(client.list_multipart_uploads, Bucket=BUCKET) == "AccessDenied"
    assert denied(client.head_bucket, Bucket="other") == "403"
    assert denied(client.create_bucket, Bucket="third") == "AccessDenied"
    assert denied(client.delete_bucket, Bucket=BUCKET) == "AccessDenied"
    assert denied(client.delete_object, Bucket=BUCKET, Key="team/new") == "AccessDenied"


def test_no_trick_with_a_path_leaves_the_prefix(server: StorageServer, keys: StorageKeys) -> None:
    key = keys.create("team", BUCKET, "team/")
    raw = Raw(server.url)
    assert key.secret_key
    for target in (
        "/bucket/team/../private", "/bucket/team/%2e%2e/private", "/bucket/team%2f..%2fprivate",
        "/bucket//private", "/bucket/./private", "/other/../bucket/private", "/bucket/team\\..\\private",
        "/api/cloud/storage/bucket/team/../private", "/bucket/team/..%5cprivate",
    ):  # fmt: skip
        reply = raw.call("GET", target, access=key.access_key, secret=key.secret_key)
        assert reply.code in ("AccessDenied", "NoSuchKey", "NoSuchBucket"), target
        assert b"private</" not in reply.body.replace(b"private</Resource>", b"")


@pytest.mark.parametrize("right", ["get", "put", "list", "delete"])
def test_a_key_has_only_the_rights_it_was_given(
    server: StorageServer, keys: StorageKeys, right: str
) -> None:
    client = client_with(server, keys.create("one", BUCKET, "", [right]))
    where = {"Bucket": BUCKET, "Key": "team/file"}
    attempts = {
        "get": functools.partial(client.get_object, **where),
        "put": functools.partial(client.put_object, **where, Body=b"x"),
        "list": functools.partial(client.list_objects_v2, Bucket=BUCKET),
        "delete": functools.partial(client.delete_object, **where),
    }
    for name, attempt in attempts.items():
        if name != right:
            assert code_of(attempt) == "AccessDenied", name
    attempts[right]()


def test_a_copy_needs_the_right_to_read_its_source(
    server: StorageServer, keys: StorageKeys
) -> None:
    client = client_with(server, keys.create("team", BUCKET, "team/"))
    copy = functools.partial(client.copy_object, Bucket=BUCKET, Key="team/copy")
    assert code_of(copy, CopySource=f"{BUCKET}/private") == "AccessDenied"
    assert code_of(copy, CopySource="other/team/file") == "AccessDenied"
    copy(CopySource=f"{BUCKET}/team/file")
    writer = client_with(server, keys.create("writer", BUCKET, "team/", ["put"]))
    denied = {"Bucket": BUCKET, "Key": "team/x", "CopySource": f"{BUCKET}/team/file"}
    assert code_of(writer.copy_object, **denied) == "AccessDenied"


def test_removing_many_says_for_each_what_was_not_allowed(
    server: StorageServer, keys: StorageKeys
) -> None:
    client = client_with(server, keys.create("team", BUCKET, "team/", ["delete"]))
    objects = [{"Key": "team/file"}, {"Key": "private"}]
    answer = client.delete_objects(Bucket=BUCKET, Delete={"Objects": objects})
    assert [entry["Key"] for entry in answer["Deleted"]] == ["team/file"]
    assert [(entry["Key"], entry["Code"]) for entry in answer["Errors"]] == [
        ("private", "AccessDenied")
    ]
    assert client_of(server.url).get_object(Bucket=BUCKET, Key="private")


def test_an_expired_key_is_told_so_and_a_wrong_secret_is_not(
    server: StorageServer, keys: StorageKeys
) -> None:
    key = keys.create("short", BUCKET, expires_in=1.0)
    client = client_with(server, key)
    client.list_objects_v2(Bucket=BUCKET)
    wait_until(lambda: keys.list()[0].expired)
    assert code_of(client.list_objects_v2, Bucket=BUCKET) == "ExpiredToken"
    wrong = client_of(server.url, key.access_key, "another-secret")
    assert code_of(wrong.list_objects_v2, Bucket=BUCKET) == "SignatureDoesNotMatch"


def stored_bytes(key: str, size: int) -> int:
    """What an object without metadata counts: content, key, and an empty list of headers."""
    return size + len(key) + len("[]")


def test_a_quota_counts_what_is_there(server: StorageServer, keys: StorageKeys) -> None:
    folder = server.settings.folder
    client = client_with(server, keys.create("limited", BUCKET, "team/", quota=MIB))
    put = functools.partial(client.put_object, Bucket=BUCKET)
    put(Key="team/a", Body=random_bytes(600_000))
    assert code_of(put, Key="team/b", Body=random_bytes(600_000)) == "QuotaExceeded"
    assert code_of(put, Key="team/b", Body=random_bytes(2 * MIB)) == "QuotaExceeded"
    assert data_files(folder) == 1
    put(Key="team/a", Body=random_bytes(700_000))  # in the place of the first
    assert code_of(client.get_object, Bucket=BUCKET, Key="team/b") == "NoSuchKey"
    copy = {"Bucket": BUCKET, "Key": "team/c", "CopySource": f"{BUCKET}/team/a"}
    assert code_of(client.copy_object, **copy) == "QuotaExceeded"
    client_of(server.url).delete_object(Bucket=BUCKET, Key="team/a")
    put(Key="team/b", Body=random_bytes(600_000))
    assert keys.list()[0].used == stored_bytes("team/b", 600_000)


def test_a_quota_counts_parts_and_uploads_that_were_given_up(
    server: StorageServer, keys: StorageKeys
) -> None:
    client = client_with(server, keys.create("limited", BUCKET, quota=12 * MIB))
    where = {"Bucket": BUCKET, "Key": "large"}
    entry = stored_bytes("large", 0)
    upload = client.create_multipart_upload(**where)["UploadId"]
    part = functools.partial(client.upload_part, **where, UploadId=upload)
    parts = [part(PartNumber=n, Body=random_bytes(5 * MIB))["ETag"] for n in (1, 2)]
    assert code_of(part, PartNumber=3, Body=random_bytes(5 * MIB)) == "QuotaExceeded"
    assert keys.list()[0].used == 10 * MIB + entry
    named = [{"PartNumber": n, "ETag": etag} for n, etag in enumerate(parts, 1)]
    client.complete_multipart_upload(**where, UploadId=upload, MultipartUpload={"Parts": named})
    assert keys.list()[0].used == 10 * MIB + entry
    upload = client.create_multipart_upload(**where)["UploadId"]
    client.upload_part(**where, UploadId=upload, PartNumber=1, Body=random_bytes(MIB))
    assert keys.list()[0].used == 11 * MIB + 2 * entry
    client.abort_multipart_upload(**where, UploadId=upload)
    assert keys.list()[0].used == 10 * MIB + entry


def test_a_quota_counts_keys_and_metadata_too(server: StorageServer, keys: StorageKeys) -> None:
    client = client_with(server, keys.create("limited", BUCKET, quota=20_000))
    put = functools.partial(client.put_object, Bucket=BUCKET)
    disposition = "inline; filename=" + "x" * 9000
    put(Key="one", Body=b"", Metadata={"note": "y" * 1900}, ContentDisposition=disposition)
    used = keys.list()[0].used
    assert 10_900 < used < 11_200
    assert code_of(put, Key="two", ContentDisposition=disposition) == "QuotaExceeded"
    begin = functools.partial(client.create_multipart_upload, Bucket=BUCKET, Key="many")
    assert code_of(begin, ContentDisposition=disposition) == "QuotaExceeded"
    upload = begin(ContentDisposition="inline; filename=" + "x" * 8000)["UploadId"]
    assert code_of(put, Key="k" * 1024) == "QuotaExceeded"
    client.abort_multipart_upload(Bucket=BUCKET, Key="many", UploadId=upload)
    assert keys.list()[0].used == used
    client_of(server.url).delete_object(Bucket=BUCKET, Key="one")
    assert keys.list()[0].used == 0


def test_uploads_that_come_at_once_share_what_is_left_of_a_quota(
    server: StorageServer, keys: StorageKeys
) -> None:
    key = keys.create("limited", BUCKET, quota=MIB)
    assert key.secret_key
    raw = Raw(server.url)

    def head(name: str) -> bytes:
        target = f"/{BUCKET}/{name}"
        signed = raw.sign(
            "PUT", target, {}, "UNSIGNED-PAYLOAD", key.secret_key or "", key.access_key
        )
        return raw.head("PUT", target, {**signed, "Content-Length": "700000"})

    with socket.create_connection(raw.address, 30) as first:
        first.sendall(head("first") + bytes(300_000))
        incoming = server.settings.folder / "incoming"
        wait_until(lambda: any(file.stat().st_size for file in incoming.iterdir()))
        assert b"QuotaExceeded" in raw.bytes(head("second") + bytes(700_000), whole=False)
        first.sendall(bytes(400_000))
        assert b" 200 " in first.recv(1000)
    assert b"QuotaExceeded" in raw.bytes(head("second") + bytes(700_000), whole=False)


def test_many_writers_do_not_pass_a_quota_together(
    server: StorageServer, keys: StorageKeys
) -> None:
    key = keys.create("limited", BUCKET, quota=500_100)
    codes: list[str] = []

    def write(number: int) -> None:
        client = client_with(server, key)
        try:
            client.put_object(Bucket=BUCKET, Key=f"n{number}", Body=random_bytes(100_000))
        except client.exceptions.ClientError as error:
            codes.append(error.response["Error"]["Code"])

    threads = [threading.Thread(target=write, args=(n,)) for n in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == ["QuotaExceeded"] * 4
    assert keys.list()[0].used == 5 * stored_bytes("n0", 100_000)


PROGRAM = """
import json, sys
from cloud_jobs.storage import StorageKeys
keys = StorageKeys(sys.argv[1])
if sys.argv[2] == "create":
    key = keys.create("far", "bucket", "team/")
    print(json.dumps([key.access_key, key.secret_key]))
else:
    keys.revoke("far")
"""


def elsewhere(folder: Path, word: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder), word], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_another_process_makes_and_revokes_keys_at_once(server: StorageServer) -> None:
    folder = server.settings.folder
    client = client_of(server.url, *json.loads(elsewhere(folder, "create")))
    client.put_object(Bucket=BUCKET, Key="team/x", Body=b"x")
    elsewhere(folder, "revoke")
    assert (
        code_of(client.put_object, Bucket=BUCKET, Key="team/x", Body=b"y") == "InvalidAccessKeyId"
    )
    assert client_of(server.url).get_object(Bucket=BUCKET, Key="team/x")["Body"].read() == b"x"


def test_a_key_that_is_revoked_while_its_upload_runs_stores_nothing(
    server: StorageServer, keys: StorageKeys
) -> None:
    key = keys.create("gone", BUCKET)

    class Slow:
        """A body that takes its time, and on whose way the key ends."""

        def __init__(self) -> None:
            self.blocks = iter([random_bytes(MIB)] * 3)

        def __iter__(self) -> Iterator[bytes]:
            yield next(self.blocks)
            time.sleep(0.2)
            keys.revoke("gone")
            yield from self.blocks

    raw = Raw(server.url)
    assert key.secret_key
    signed = raw.sign(
        "PUT", f"/{BUCKET}/slow", {}, "UNSIGNED-PAYLOAD", key.secret_key, key.access_key
    )
    connection = http.client.HTTPConnection(*raw.address)
    connection.request("PUT", f"/{BUCKET}/slow", Slow(), {**signed, "Content-Length": str(3 * MIB)})
    response = connection.getresponse()
    assert response.status == 403
    assert b"InvalidAccessKeyId" in response.read()
    connection.close()
    assert code_of(client_of(server.url).get_object, Bucket=BUCKET, Key="slow") == "NoSuchKey"
    wait_until(lambda: data_files(server.settings.folder) == 0)


def test_a_download_ends_when_its_key_is_revoked(server: StorageServer, keys: StorageKeys) -> None:
    size = 60 * MIB
    client_of(server.url).put_object(Bucket=BUCKET, Key="large", Body=bytes(size))
    key = keys.create("gone", BUCKET)
    assert key.secret_key
    raw = Raw(server.url)
    target = f"/{BUCKET}/large"
    signed = raw.sign("GET", target, {}, "UNSIGNED-PAYLOAD", key.secret_key, key.access_key)
    with socket.create_connection(raw.address, 30) as connection:
        connection.sendall(raw.head("GET", target, signed))
        got = len(connection.recv(1000))
        keys.revoke("gone")
        with contextlib.suppress(ConnectionResetError):
            while data := connection.recv(MIB):
                got += len(data)
    assert got < size - MIB


def test_a_seal_is_on_the_disk_before_anything_is_sealed_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, link = os.fsync, os.link

    def noting_fsync(descriptor: int) -> None:
        done.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def noting_link(source: Path, target: Path) -> None:
        done.append(f"{source} is {target}")
        link(source, target)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "link", noting_link)
    folder = tmp_path / "new" / "store"
    StorageKeys(folder).close()
    linked = next(step for step in done if step.endswith(f" is {folder / 'seal.key'}"))
    draft = linked.partition(" is ")[0]
    assert draft in done[: done.index(linked)]
    assert str(folder) in done[done.index(linked) :]
    assert {str(tmp_path), str(tmp_path / "new")} <= set(done)


def test_keys_are_listed_without_secrets_and_sealed_on_disk(
    server: StorageServer, keys: StorageKeys
) -> None:
    made = keys.create("b", BUCKET, "p/", ["list", "get"], expires_in=3600, quota=10)
    keys.create("a", BUCKET)
    listed = keys.list()
    assert [key.name for key in listed] == ["a", "b"]
    assert listed[1] == type(made)(**{**vars(made), "secret_key": None})
    assert listed[1].rights == ("get", "list")
    assert made.secret_key
    assert made.secret_key not in repr(made)
    assert made.secret_key not in repr(listed)
    folder = server.settings.folder
    for path in folder.iterdir():
        if path.is_file():
            assert made.secret_key.encode() not in path.read_bytes()
            assert path.stat().st_mode & 0o077 == 0, path


def test_keys_cannot_be_opened_with_another_seal(tmp_path: Path) -> None:
    keys = StorageKeys(tmp_path)
    made = keys.create("one", BUCKET)
    keys.close()
    (tmp_path / "seal.key").write_bytes(bytes(32))
    again = StorageKeys(tmp_path)
    with pytest.raises(AccessError, match=r"seal\.key"):
        again.find(made.access_key)
    again.close()
    (tmp_path / "seal.key").write_bytes(b"short")
    with pytest.raises(AccessError, match="damaged"):
        StorageKeys(tmp_path)


@pytest.mark.parametrize(
    "words",
    [
        {"name": ""}, {"name": "with space"}, {"name": "root"}, {"bucket": "UPPER"}, {"bucket": ""},
        {"prefix": "x" * 1025}, {"rights": ["fly"]}, {"rights": []}, {"expires_in": 0},
        {"quota": -1},
    ],
)  # fmt: skip
def test_limits_that_make_no_sense_are_refused(tmp_path: Path, words: dict[str, Any]) -> None:
    keys = StorageKeys(tmp_path)
    with pytest.raises(UsageError):
        keys.create(**{"name": "one", "bucket": BUCKET, **words})
    assert keys.list() == ()
    keys.close()


def test_a_name_is_taken_once_and_revoked_by_name_or_key(tmp_path: Path) -> None:
    keys = StorageKeys(tmp_path)
    first = keys.create("one", BUCKET)
    with pytest.raises(UsageError, match="already"):
        keys.create("one", BUCKET)
    assert keys.revoke(first.access_key).name == "one"
    with pytest.raises(NotFoundError):
        keys.revoke("one")
    assert keys.create("one", BUCKET).access_key != first.access_key
    root, _ = keys.root()
    with pytest.raises(NotFoundError):
        keys.revoke(root.access_key)
    keys.close()


def test_a_given_root_key_takes_the_place_of_the_folders_own(tmp_path: Path) -> None:
    keys = StorageKeys(tmp_path)
    stored, made = keys.root()
    assert made
    assert keys.root() == (stored, False)
    keys.close()
    with StorageServer(given_settings(tmp_path)) as running:
        assert running.secret_key == SECRET
        old = client_of(running.url, stored.access_key, stored.secret_key)
        assert code_of(old.list_buckets) == "InvalidAccessKeyId"
