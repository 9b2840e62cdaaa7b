"""The clients people have, unmodified, against the storage server in a process of its own."""

from __future__ import annotations

import importlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cloud_services import S3Sync
from tests.s3_servers import find_tool
from tests.support import MIB, random_bytes, random_file
from tests.test_storage import ACCESS, SECRET, Process, client_of

LARGE = 20 * MIB + 17


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with Process(tmp_path_factory.mktemp("store"), fsync=False) as running:
        yield running


def environment(url: str, home: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("AWS_", "S3_", "RCLONE_"))}
    return clean | {
        "HOME": str(home), "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1", "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": url,
        "S3_ENDPOINT_URL": url, "AWS_EC2_METADATA_DISABLED": "true",
        "RCLONE_CONFIG_X_TYPE": "s3", "RCLONE_CONFIG_X_PROVIDER": "Other",
        "RCLONE_CONFIG_X_ENDPOINT": url, "RCLONE_CONFIG_X_ENV_AUTH": "true",
        "RCLONE_CONFIG_X_REGION": "us-east-1",
    }  # fmt: skip


class Client:
    """What every client can do, in its own way."""

    def __init__(self, url: str, bucket: str, home: Path) -> None:
        self.url, self.bucket = url, bucket
        self.environment = environment(url, home)

    def run(self, *words: object) -> str:
        done = subprocess.run(
            list(map(str, words)), env=self.environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def make_bucket(self) -> None: ...
    def put(self, file: Path, key: str) -> None: ...
    def get(self, key: str, file: Path) -> None: ...
    def list(self, prefix: str) -> set[str]:
        raise NotImplementedError

    def sync_up(self, folder: Path, prefix: str) -> None: ...
    def sync_down(self, prefix: str, folder: Path) -> None: ...
    def copy(self, source: str, target: str) -> None: ...
    def delete(self, key: str) -> None: ...
    def remove_all(self, prefix: str) -> None: ...


class Boto3(Client):
    def __init__(self, url: str, bucket: str, home: Path) -> None:
        super().__init__(url, bucket, home)
        self.client = client_of(url, config=None)

    def make_bucket(self) -> None:
        self.client.create_bucket(Bucket=self.bucket)

    def put(self, file: Path, key: str) -> None:
        self.client.upload_file(str(file), self.bucket, key)

    def get(self, key: str, file: Path) -> None:
        self.client.download_file(self.bucket, key, str(file))

    def list(self, prefix: str) -> set[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=prefix, PaginationConfig={"PageSize": 7}
        )
        return {entry["Key"] for page in pages for entry in page.get("Contents", ())}

    def sync_up(self, folder: Path, prefix: str) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.put(file, f"{prefix}/{file.relative_to(folder).as_posix()}")

    def sync_down(self, prefix: str, folder: Path) -> None:
        for key in self.list(prefix + "/"):
            target = folder / key.removeprefix(prefix + "/")
            target.parent.mkdir(parents=True, exist_ok=True)
            self.get(key, target)

    def copy(self, source: str, target: str) -> None:
        self.client.copy({"Bucket": self.bucket, "Key": source}, self.bucket, target)

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=self.bucket, Key=key)

    def remove_all(self, prefix: str) -> None:
        keys = [{"Key": key} for key in self.list(prefix)]
        assert "Errors" not in self.client.delete_objects(
            Bucket=self.bucket, Delete={"Objects": keys}
        )


class Aws(Client):
    def s3(self, *words: object) -> str:
        return self.run(find_tool("aws"), "s3", *words)

    def place(self, key: str) -> str:
        return f"s3://{self.bucket}/{key}"

    def make_bucket(self) -> None:
        self.s3("mb", f"s3://{self.bucket}")

    def put(self, file: Path, key: str) -> None:
        self.s3("cp", file, self.place(key))

    def get(self, key: str, file: Path) -> None:
        self.s3("cp", self.place(key), file)

    def list(self, prefix: str) -> set[str]:
        lines = self.s3("ls", "--recursive", self.place(prefix)).splitlines()
        return {line.split(maxsplit=3)[3] for line in lines}

    def sync_up(self, folder: Path, prefix: str) -> None:
        self.s3("sync", folder, self.place(prefix))
        assert self.s3("sync", folder, self.place(prefix)) == ""

    def sync_down(self, prefix: str, folder: Path) -> None:
        self.s3("sync", self.place(prefix), folder)

    def copy(self, source: str, target: str) -> None:
        self.s3("cp", self.place(source), self.place(target))

    def delete(self, key: str) -> None:
        self.s3("rm", self.place(key))

    def remove_all(self, prefix: str) -> None:
        self.s3("rm", "--recursive", self.place(prefix))


class S5cmd(Aws):
    def s3(self, *words: object) -> str:
        return self.run(find_tool("s5cmd"), *words)

    def put(self, file: Path, key: str) -> None:
        self.s3("cp", "--part-size", 5, file, self.place(key))

    def list(self, prefix: str) -> set[str]:
        lines = self.s3("ls", self.place(prefix) + "*").splitlines()
        folder = prefix.rpartition("/")[0]
        names = (line.split(maxsplit=3)[3] for line in lines)
        return {f"{folder}/{name}" if folder else name for name in names}

    def sync_up(self, folder: Path, prefix: str) -> None:
        self.s3("sync", f"{folder}/", self.place(prefix) + "/")
        assert self.s3("sync", f"{folder}/", self.place(prefix) + "/") == ""

    def sync_down(self, prefix: str, folder: Path) -> None:
        self.s3("sync", self.place(prefix) + "/*", f"{folder}/")

    def remove_all(self, prefix: str) -> None:
        self.s3("rm", self.place(prefix) + "*")


class Rclone(Client):
    def rclone(self, *words: object) -> str:
        return self.run(find_tool("rclone"), "--config", "", *words)

    def place(self, key: str) -> str:
        return f"x:{self.bucket}/{key}"

    def make_bucket(self) -> None:
        self.rclone("mkdir", f"x:{self.bucket}")

    def put(self, file: Path, key: str) -> None:
        self.rclone("copyto", "--s3-upload-cutoff", "8M", file, self.place(key))

    def get(self, key: str, file: Path) -> None:
        self.rclone("copyto", self.place(key), file)

    def list(self, prefix: str) -> set[str]:
        names = self.rclone("lsf", "-R", "--files-only", f"x:{self.bucket}").splitlines()
        return {name for name in names if name.startswith(prefix)}

    def sync_up(self, folder: Path, prefix: str) -> None:
        self.rclone("sync", folder, self.place(prefix))
        self.rclone("check", folder, self.place(prefix))

    def sync_down(self, prefix: str, folder: Path) -> None:
        self.rclone("sync", self.place(prefix), folder)

    def copy(self, source: str, target: str) -> None:
        self.rclone("copyto", self.place(source), self.place(target))

    def delete(self, key: str) -> None:
        self.rclone("deletefile", self.place(key))

    def remove_all(self, prefix: str) -> None:
        self.rclone("delete", self.place(prefix))


class Obstore(Boto3):
    def __init__(self, url: str, bucket: str, home: Path) -> None:
        super().__init__(url, bucket, home)
        self.obstore: Any = pytest.importorskip("obstore")
        self.store: Any = importlib.import_module("obstore.store").S3Store(
            bucket, endpoint=url, access_key_id=ACCESS, secret_access_key=SECRET,
            region="us-east-1", client_options={"allow_http": True},
        )  # fmt: skip

    def put(self, file: Path, key: str) -> None:
        self.obstore.put(self.store, key, file)

    def get(self, key: str, file: Path) -> None:
        file.write_bytes(self.obstore.get(self.store, key).bytes())

    def list(self, prefix: str) -> set[str]:
        # Its prefixes are whole segments of the path.
        return {entry["path"] for page in self.obstore.list(self.store, prefix) for entry in page}

    def copy(self, source: str, target: str) -> None:
        self.obstore.copy(self.store, source, target)

    def delete(self, key: str) -> None:
        self.obstore.delete(self.store, key)

    def remove_all(self, prefix: str) -> None:
        self.obstore.delete(self.store, sorted(self.list(prefix)))


CLIENTS: dict[str, type[Client]] = {
    "boto3": Boto3, "aws": Aws, "s5cmd": S5cmd, "rclone": Rclone, "obstore": Obstore,
}  # fmt: skip


@pytest.fixture(params=CLIENTS)
def client(request: pytest.FixtureRequest, server: Process, tmp_path: Path) -> Client:
    made = CLIENTS[request.param](server.url, f"bucket-of-{request.param}", tmp_path)
    boto = client_of(server.url)
    if made.bucket not in {bucket["Name"] for bucket in boto.list_buckets()["Buckets"]}:
        made.make_bucket()
    return made


def stored(server: Process, client: Client, key: str) -> bytes:
    return bytes(client_of(server.url).get_object(Bucket=client.bucket, Key=key)["Body"].read())


def test_a_client_puts_gets_copies_and_deletes(
    server: Process, client: Client, tmp_path: Path
) -> None:
    for size in (0, 1000, LARGE):
        file = random_file(tmp_path / "sent", size)
        client.put(file, "files/one")
        assert stored(server, client, "files/one") == random_bytes(size)
        client.get("files/one", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == random_bytes(size)
        client.copy("files/one", "files/two")
        assert client.list("files/") == {"files/one", "files/two"}
        client.delete("files/one")
        assert client.list("files/") == {"files/two"}
        assert stored(server, client, "files/two") == random_bytes(size)
        (tmp_path / "back").unlink()


def test_a_client_sends_large_files_in_parts(
    server: Process, client: Client, tmp_path: Path
) -> None:
    client.put(random_file(tmp_path / "sent", LARGE), "large")
    head = client_of(server.url).head_object(Bucket=client.bucket, Key="large")
    assert "-" in head["ETag"]
    assert head["ContentLength"] == LARGE


def test_a_client_syncs_a_folder(server: Process, client: Client, tmp_path: Path) -> None:
    names = [f"{n // 5}/name {n} é+&.bin" for n in range(20)]
    for number, name in enumerate(names):
        random_file(tmp_path / "sent" / name, 100 + number, number)
    client.sync_up(tmp_path / "sent", "tree")
    assert client.list("tree/") == {f"tree/{name}" for name in names}
    (tmp_path / "back").mkdir()
    client.sync_down("tree", tmp_path / "back")
    for number, name in enumerate(names):
        assert (tmp_path / "back" / name).read_bytes() == random_bytes(100 + number, number)
    client.remove_all("tree/")
    assert not client_of(server.url).list_objects_v2(Bucket=client.bucket, Prefix="tree/")[
        "KeyCount"
    ]


def test_our_own_client_brings_a_checkpoint_and_a_dataset(
    server: Process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(server.url, tmp_path).items():
        monkeypatch.setenv(name, value)
    client_of(server.url).create_bucket(Bucket="ours")
    sync = S3Sync("ours", "run")
    file = random_file(tmp_path / "model.ckpt", LARGE)
    assert sync.upload_checkpoint(file)
    twin = tmp_path / "last.ckpt"
    os.link(file, twin)
    assert sync.upload_checkpoint(twin)
    body = client_of(server.url).get_object(Bucket="ours", Key="run/checkpoints/last.ckpt")["Body"]
    assert body.read() == random_bytes(LARGE)
    for number in range(30):
        random_file(tmp_path / "set" / f"{number}.bin", 3000, number)
    assert sync.upload_dataset(tmp_path / "set", "small")
    assert sync.download_dataset("small", tmp_path / "back")
    assert (tmp_path / "back" / "7.bin").read_bytes() == random_bytes(3000, 7)
