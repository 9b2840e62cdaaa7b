"""Images in a bucket, with podman as it is and with a docker of the test's own making."""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pytest

import docker_images
import s3_transport as s3
from cloud_services import (
    NOTES_FOLDER,
    AccessError,
    CloudError,
    ConnectError,
    DiskFullError,
    IntegrityError,
    MissingPackageError,
    NotFoundError,
    Progress,
    RefusedError,
    TransferError,
    UsageError,
    cache_folder,
    lock_part,
)
from cloud_settings import S3Settings
from docker_images import HELD_BYTES, ImageName, ImageStore
from tests.s3_servers import KEY_ID, REGION, SECRET, FaultProxy, RcloneServer, wait_for
from tests.servers import find_program, require, wait_until
from tests.support import MIB, ROOT, random_bytes

IMAGE = "example.com/team/piper-train:v1"
PODMAN = find_program("podman")
FORMS = pytest.mark.parametrize("layers", [False, True], ids=["archive", "layers"])

# ---------------------------------------------------------------------------
# The bucket
# ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: Any) -> Iterator[RcloneServer]:
    with RcloneServer(tmp_path_factory.mktemp("rclone")) as running:
        yield running


@pytest.fixture
def proxy(server: RcloneServer) -> Iterator[FaultProxy]:
    with FaultProxy(server) as running:
        yield running


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the caller's, short pauses, and temporary files where the test sees them."""
    for name in [n for n in os.environ if n.startswith(("AWS_", "S3_", "DOCKER_", "CONTAINER"))]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "no_such_file"))
    monkeypatch.setattr(s3, "FIRST_PAUSE", 0.01)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("PATH", str(tmp_path / "no_such_folder"))


NUMBERS = itertools.count()


def open_bucket(url: str, prefix: str = "") -> s3.Bucket:
    """A bucket at an endpoint, with a prefix that no other test has."""
    settings = S3Settings.resolve(
        bucket="bucket", endpoint_url=url, access_key_id=KEY_ID, secret_access_key=SECRET,
        region=REGION, timeout=5.0, prefix=prefix or f"test{next(NUMBERS)}-{os.getpid()}",
    )  # fmt: skip
    return s3.Bucket(settings)


@pytest.fixture
def bucket(proxy: FaultProxy) -> s3.Bucket:
    """The bucket, seen through the proxy."""
    return open_bucket(proxy.url)


def store(bucket: s3.Bucket, **more: Any) -> ImageStore:
    return ImageStore(bucket, bucket.key("docker-images"), **more)


def names(bucket: s3.Bucket) -> list[str]:
    """What is stored for images, without the layers."""
    start = bucket.key("docker-images") + "/"
    found = [info.key.removeprefix(start) for info in bucket.list(start)]
    return sorted(name for name in found if not name.startswith("layers/"))


def layer_keys(bucket: s3.Bucket) -> list[str]:
    return [info.key for info in bucket.list(bucket.key("docker-images", "layers"))]


def nothing_is_left(server: RcloneServer, tmp_path: Path) -> bool:
    """No unfinished uploads, and no temporary files."""
    return not server.uploads() and not list((tmp_path / "scratch").iterdir())


# ---------------------------------------------------------------------------
# podman, with a storage of its own
# ---------------------------------------------------------------------------


class Podman:
    """podman with a storage below a folder; `use` makes it the only engine on the PATH."""

    def __init__(self, folder: Path) -> None:
        if PODMAN is None:
            require("podman")
        self.tools = folder / "tools"
        self.tools.mkdir(parents=True)
        self._run = tempfile.TemporaryDirectory(dir="/tmp")  # podman wants a short path
        config = folder / "containers.conf"
        config.write_text('[engine]\nlock_type = "file"\nevents_logger = "none"\n')
        flags = f"--storage-driver vfs --root {folder}/root --runroot {self._run.name}"
        (self.tools / "podman").write_text(
            "#!/bin/sh\nPATH=/usr/sbin:/usr/bin:/sbin:/bin\nexport PATH\n"
            f"CONTAINERS_CONF={config}\nexport CONTAINERS_CONF\n"
            f"exec {PODMAN or 'false'} "
            f'{flags} --tmpdir {folder}/tmp "$@"\n'
        )
        (self.tools / "podman").chmod(0o755)

    def run(self, *words: str | Path) -> str:
        done = subprocess.run(
            [self.tools / "podman", *words], capture_output=True, text=True, timeout=60,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def build(self, image: str, folder: Path, *contents: bytes) -> str:
        """Make an image with a layer for each of the contents; its id."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["FROM scratch"]
        for number, content in enumerate(contents):
            (folder / f"file{number}").write_bytes(content)
            os.utime(folder / f"file{number}", (0, 0))
            lines.append(f"COPY file{number} /file{number}")
        (folder / "Dockerfile").write_text("\n".join([*lines, 'CMD ["/file0"]', ""]))
        self.run("build", "-q", "--layers", "--isolation", "chroot", "-t", image, folder)
        return self.id(image)

    def id(self, image: str) -> str:
        return self.run("image", "inspect", "--format", "{{.Id}}", image)

    def images(self) -> list[str]:
        listed = self.run("images", "--noheading", "--format", "{{.Repository}}:{{.Tag}}")
        return sorted(listed.split())

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(self.tools))

    def close(self) -> None:
        self._run.cleanup()


BASE = random_bytes(700_000, 1)


@pytest.fixture(scope="module")
def builder(tmp_path_factory: Any) -> Iterator[Podman]:
    """podman with two images whose lower layer is the same."""
    folder = tmp_path_factory.mktemp("builder")
    podman = Podman(folder)
    podman.build(IMAGE, folder / "v1", BASE, random_bytes(50_000, 2))
    podman.build(f"{IMAGE[:-2]}v2", folder / "v2", BASE, random_bytes(60_000, 3))
    yield podman
    podman.close()


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Podman]:
    """Another machine: podman without any image."""
    podman = Podman(tmp_path / "other")
    yield podman
    podman.close()


@FORMS
def test_an_image_of_podman_is_the_same_on_another_machine(
    server: RcloneServer, bucket: s3.Bucket, builder: Podman, other: Podman, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, layers: bool,
) -> None:  # fmt: skip
    builder.use(monkeypatch)
    sent = store(bucket).export(IMAGE, layers=layers)
    assert sent
    assert sent.key == bucket.key("docker-images", "piper-train-v1") + (
        ".layers.json" if layers else ".tar.gz"
    )
    assert (sent.image, sent.layers, sent.sent_layers) == (IMAGE, 2 * layers, 2 * layers)
    other.use(monkeypatch)
    back = store(bucket).load(IMAGE)
    assert (back.image, back.key, back.engine, bool(back)) == (IMAGE, sent.key, "podman", True)
    assert back.size == sent.size
    assert other.images() == [IMAGE]
    assert other.id(IMAGE) == builder.id(IMAGE)
    saved = other.run("save", "-o", tmp_path / "again.tar", IMAGE)
    assert (tmp_path / "again.tar").stat().st_size > 700_000, saved
    assert nothing_is_left(server, tmp_path)


def test_the_archive_is_what_docker_save_and_gzip_make(
    server: RcloneServer, bucket: s3.Bucket, builder: Podman, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    builder.use(monkeypatch)
    sent = store(bucket).export(IMAGE)
    content = server.content(sent.key)
    assert content is not None
    assert (sent.size, sent.moved) == (len(content), len(content))
    assert sent.sha256 == hashlib.sha256(content).hexdigest()
    assert content[:8] == b"\x1f\x8b\x08\x00\x00\x00\x00\x00"  # no name, no clock
    builder.run("save", "-o", tmp_path / "saved.tar", IMAGE)
    assert gzip.decompress(content) == (tmp_path / "saved.tar").read_bytes()
    assert bucket.head(sent.key).metadata["image"] == IMAGE


@FORMS
def test_an_image_that_is_there_already_is_not_sent_again(
    proxy: FaultProxy, bucket: s3.Bucket, builder: Podman, monkeypatch: pytest.MonkeyPatch,
    layers: bool,
) -> None:  # fmt: skip
    builder.use(monkeypatch)
    first = store(bucket).export(IMAGE, layers=layers)
    proxy.forget()
    again = store(bucket).export(IMAGE, layers=layers)
    assert (again.moved, again.sent_layers, proxy.up) == (0, 0, 0)
    assert (again.size, again.sha256, again.layers) == (first.size, first.sha256, first.layers)


def test_after_a_change_in_the_top_layer_only_that_layer_is_sent(
    proxy: FaultProxy, bucket: s3.Bucket, builder: Podman, other: Podman,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    builder.use(monkeypatch)
    assert store(bucket).export(IMAGE, layers=True).moved > 750_000
    proxy.forget()
    second = store(bucket).export(f"{IMAGE[:-2]}v2", layers=True)
    assert (second.layers, second.sent_layers) == (2, 1)
    assert 60_000 < second.moved == proxy.up < 66_000
    assert len(layer_keys(bucket)) == 3
    other.use(monkeypatch)
    store(bucket).load(f"{IMAGE[:-2]}v2")
    assert other.id(f"{IMAGE[:-2]}v2") == builder.id(f"{IMAGE[:-2]}v2")


@FORMS
def test_a_flipped_bit_on_the_way_back_loads_nothing(
    proxy: FaultProxy, bucket: s3.Bucket, builder: Podman, other: Podman, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, layers: bool,
) -> None:  # fmt: skip
    builder.use(monkeypatch)
    store(bucket).export(IMAGE, layers=layers)
    other.use(monkeypatch)
    proxy.fail("flip_response", method="GET", path=r"tar\.gz|/sha256/\w", after=30_000)
    with pytest.raises(IntegrityError):
        store(bucket).load(IMAGE)
    assert other.images() == []
    assert not list((tmp_path / "scratch").iterdir())
    assert store(bucket).load(IMAGE)
    assert other.images() == [IMAGE]


def test_podman_is_asked_for_an_image_it_does_not_have(
    bucket: s3.Bucket, other: Podman, monkeypatch: pytest.MonkeyPatch
) -> None:
    other.use(monkeypatch)
    with pytest.raises(NotFoundError, match="podman has no image example") as e:
        store(bucket).export("example.com/nobody")
    assert e.value.hint == "what it has shows: podman images"
    assert e.value.exit_code == 4
    assert names(bucket) == []


# ---------------------------------------------------------------------------
# docker, as far as it matters: it saves and loads OCI layouts since version 25
# ---------------------------------------------------------------------------

FAKE_DOCKER = r"""#!{python} -IS
import hashlib, json, os, signal, sys, tarfile, time
state = {state!r}
words = sys.argv[1:]
with open(state + "/log", "a") as log:
    log.write(json.dumps(words) + "\n")
def path(image): return state + "/" + hashlib.sha256(image.encode()).hexdigest() + ".tar"
def order(name, default=None):
    try: return json.load(open(state + "/orders")).get(name, default)
    except FileNotFoundError: return default
def die(text): sys.stderr.write(text + "\n"); sys.exit(1)
def facts(file):
    with tarfile.open(file) as tar:
        return json.load(tar.extractfile("manifest.json"))[0]
if words[0] in ("save", "load"):
    open(state + "/pid", "w").write(str(os.getpid()))
if order("down"):
    die(order("down"))
if words == ["version"]:
    print("fine")
elif words[:2] == ["image", "inspect"]:
    file = path(words[-1])
    if not os.path.exists(file):
        die("Error response from daemon: No such image: " + words[-1])
    config = facts(file)["Config"].rpartition("/")[2].partition(".")[0]
    print("sha256:" + config, os.path.getsize(file))
elif words[0] == "tag":
    os.link(path(words[1]), path(words[2]))
elif words[0] == "save":
    sent, cut = 0, order("save_cut", 1 << 60)
    with open(path(words[1]), "rb") as file:
        file.seek(order("save_from", 0))
        while sent < cut and (block := file.read(min(65536, cut - sent))):
            sys.stdout.buffer.write(block)
            sys.stdout.buffer.flush()
            sent += len(block)
    while order("save_stalls"):
        time.sleep(0.05)
        sys.stdout.buffer.write(b"\0")
        sys.stdout.buffer.flush()
    if order("save_says"):
        die(order("save_says"))
elif words[0] == "load":
    if order("stubborn"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    most = order("load_cut", 1 << 60)
    with open(state + "/incoming", "wb", 0) as file:
        while file.tell() < most and (block := sys.stdin.buffer.read1(65536)):
            file.write(block)
    if order("load_says"):
        die(order("load_says"))
    if most < 1 << 60:
        sys.exit(0)
    open(state + "/saw_the_end", "w").close()
    image = facts(state + "/incoming")
    for tag in image["RepoTags"] or ["sha256:" + image["Config"].rpartition("/")[2]]:
        os.replace(state + "/incoming", path(tag))
        print("Loaded image" + (" ID" if not image["RepoTags"] else "") + ": " + tag)
"""


class Docker:
    """A program named docker that keeps images as files; `order` tells it how to fail."""

    def __init__(self, folder: Path) -> None:
        self.state, self.tools = folder / "state", folder / "tools"
        self.state.mkdir(parents=True)
        self.tools.mkdir()
        text = FAKE_DOCKER.replace("{python}", sys.executable)
        (self.tools / "docker").write_text(text.replace("{state!r}", repr(str(self.state))))
        (self.tools / "docker").chmod(0o755)

    def path(self, image: str) -> Path:
        return self.state / f"{hashlib.sha256(image.encode()).hexdigest()}.tar"

    def has(self, image: str) -> bool:
        return self.path(image).exists()

    def give(self, image: str, *layers: bytes) -> bytes:
        """Let it have an image; the tar file that `docker save` makes of it."""
        content = oci_tar(image, layers)
        self.path(image).write_bytes(content)
        return content

    def order(self, **orders: Any) -> None:
        (self.state / "orders").write_text(json.dumps(orders))

    def calls(self) -> list[list[str]]:
        """The command lines it got."""
        log = self.state / "log"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def runs(self) -> bool:
        """Whether its last `save` or `load` still runs: a question may, it ends by itself."""
        assert wait_until(lambda: bool((self.state / "pid").read_text()))
        pid = int((self.state / "pid").read_text())
        state = Path(f"/proc/{pid}/stat")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return state.read_text().rpartition(")")[2].split()[0] != "Z"
        return False

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(self.tools))


def layer(name: str, content: bytes) -> bytes:
    """A layer with one file in it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def oci_tar(image: str, layers: tuple[bytes, ...]) -> bytes:
    """What `docker save` of version 25 and later writes: an OCI layout, and docker's manifest."""
    digests = [hashlib.sha256(content).hexdigest() for content in layers]
    config = json.dumps({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["/a"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{one}" for one in digests]},
    }).encode()  # fmt: skip
    kind = "application/vnd.oci.image."

    def described(media_type: str, content: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": kind + "manifest.v1+json",
        "config": described(kind + "config.v1+json", config),
        "layers": [described(kind + "layer.v1.tar", content) for content in layers],
    }).encode()  # fmt: skip
    blobs = {hashlib.sha256(one).hexdigest(): one for one in (config, manifest, *layers)}
    tag = None if "@" in image else image
    entry = described(kind + "manifest.v1+json", manifest)
    if tag:
        entry["annotations"] = {
            "io.containerd.image.name": tag,
            "org.opencontainers.image.ref.name": tag.rpartition(":")[2],
        }
    index = {"schemaVersion": 2, "manifests": [entry]}
    docker = [{
        "Config": f"blobs/sha256/{hashlib.sha256(config).hexdigest()}",
        "RepoTags": [tag] if tag else None,
        "Layers": [f"blobs/sha256/{one}" for one in digests],
    }]  # fmt: skip
    texts = {
        "index.json": index,
        "manifest.json": docker,
        "oci-layout": {"imageLayoutVersion": "1.0.0"},
    }
    entries = {f"blobs/sha256/{digest}": content for digest, content in sorted(blobs.items())}
    entries |= {name: json.dumps(content).encode() for name, content in texts.items()}
    return tar_of({"blobs": None, "blobs/sha256": None, **entries})


def tar_of(entries: dict[str, bytes | None]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.TarFile(fileobj=buffer, mode="w") as tar:
        for name, content in entries.items():
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
    content = buffer.getvalue().rstrip(b"\0")
    return content + bytes(-len(content) % 512 + 1024)  # Go writes two blocks of zeros, no more


LAYERS = (layer("a", random_bytes(400_000, 1)), layer("b", b"text\n" * 40_000))


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Docker:
    """The machine that has the image."""
    docker = Docker(tmp_path / "docker")
    docker.give(IMAGE, *LAYERS)
    docker.use(monkeypatch)
    return docker


@pytest.fixture
def target(tmp_path: Path) -> Docker:
    """The machine that wants it."""
    return Docker(tmp_path / "target")


@FORMS
def test_an_oci_layout_of_docker_comes_back_with_the_same_content(
    bucket: s3.Bucket, docker: Docker, target: Docker, monkeypatch: pytest.MonkeyPatch,
    layers: bool,
) -> None:  # fmt: skip
    sent = store(bucket).export(IMAGE, layers=layers)
    assert sent.layers == sent.sent_layers == 2 * layers
    target.use(monkeypatch)
    back = store(bucket).load(IMAGE)
    assert (back.engine, back.image) == ("docker", IMAGE)
    assert contents(target.path(IMAGE)) == contents(docker.path(IMAGE))


def contents(path: Path) -> list[tuple[str, bytes | None]]:
    with tarfile.open(path) as tar:
        files = [(info.name, tar.extractfile(info)) for info in tar]
        return [(name, file.read() if file else None) for name, file in files]


@FORMS
def test_what_docker_has_saved_podman_can_load(
    bucket: s3.Bucket, docker: Docker, other: Podman, monkeypatch: pytest.MonkeyPatch,
    layers: bool,
) -> None:  # fmt: skip
    store(bucket).export(IMAGE, layers=layers)
    other.use(monkeypatch)
    assert store(bucket).load(IMAGE).engine == "podman"
    assert IMAGE in other.images()


def test_layers_are_compressed_unless_they_are_already(
    server: RcloneServer, bucket: s3.Bucket, docker: Docker, target: Docker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    packed = gzip.compress(layer("c", random_bytes(2 * MIB, 4)), 1, mtime=0)
    docker.give(IMAGE, LAYERS[1], packed)
    sent = store(bucket).export(IMAGE, layers=True)
    start = bucket.key("docker-images", "layers", "sha256") + "/"
    plain = hashlib.sha256(LAYERS[1]).hexdigest()
    keys = [f"{start}{plain}.gz", f"{start}{hashlib.sha256(packed).hexdigest()}"]
    assert sorted(layer_keys(bucket)) == sorted(keys)
    assert gzip.decompress(server.content(keys[0]) or b"") == LAYERS[1]
    assert server.content(keys[1]) == packed
    assert sent.size < len(packed) + len(LAYERS[1]) // 10
    target.use(monkeypatch)
    store(bucket).load(IMAGE)
    assert contents(target.path(IMAGE)) == contents(docker.path(IMAGE))


def test_images_share_layers_whatever_their_names(
    proxy: FaultProxy, bucket: s3.Bucket, docker: Docker
) -> None:
    docker.give("elsewhere/other:x", LAYERS[0], layer("c", b"c" * 9000))
    store(bucket).export(IMAGE, layers=True)
    sent = store(bucket).export("elsewhere/other:x", layers=True)
    assert (sent.layers, sent.sent_layers) == (2, 1)
    assert len(layer_keys(bucket)) == 3


def test_a_layer_that_was_lost_or_cut_is_sent_again(
    server: RcloneServer, bucket: s3.Bucket, docker: Docker
) -> None:
    first = store(bucket).export(IMAGE, layers=True)
    gone, cut = layer_keys(bucket)
    server.client().delete_object(Bucket="bucket", Key=gone)
    server.put(cut, (server.content(cut) or b"")[:-5])
    with pytest.raises(IntegrityError, match=r"a layer of .* is missing or incomplete"):
        store(bucket).load(IMAGE)
    again = store(bucket).export(IMAGE, layers=True)
    assert (again.sent_layers, again.sha256) == (2, first.sha256)
    assert store(bucket).export(IMAGE, layers=True).sent_layers == 0


def test_a_layer_that_is_another_one_in_the_bucket_is_noticed(
    server: RcloneServer, bucket: s3.Bucket, docker: Docker, target: Docker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    store(bucket).export(IMAGE, layers=True)
    key = bucket.key("docker-images", "layers", "sha256", hashlib.sha256(LAYERS[1]).hexdigest())
    content = bytearray(server.content(f"{key}.gz") or b"")
    content[-5] ^= 1  # in the size that the gzip file ends with; the server's own MD5 fits it
    server.put(f"{key}.gz", bytes(content))
    target.use(monkeypatch)
    with pytest.raises(IntegrityError):
        store(bucket).load(IMAGE)
    other = gzip.compress(LAYERS[1][:-1] + b"x", 1)
    server.put(f"{key}.gz", (other + bytes(len(content)))[: len(content)])
    with pytest.raises(IntegrityError):
        store(bucket).load(IMAGE)
    assert not target.has(IMAGE)


def test_a_saved_layer_that_is_not_what_its_name_says_is_not_stored(
    bucket: s3.Bucket, docker: Docker
) -> None:
    saved = docker.path(IMAGE).read_bytes()
    at = saved.index(LAYERS[1][2000:2100])
    docker.path(IMAGE).write_bytes(saved[:at] + b"X" + saved[at + 1 :])
    with pytest.raises(IntegrityError, match="is not what its name says"):
        store(bucket).export(IMAGE, layers=True)
    assert hashlib.sha256(LAYERS[1]).hexdigest() not in str(layer_keys(bucket))
    assert names(bucket) == []


@FORMS
def test_a_flipped_bit_never_reaches_the_end_of_docker_load(
    proxy: FaultProxy, bucket: s3.Bucket, docker: Docker, target: Docker,
    monkeypatch: pytest.MonkeyPatch, layers: bool,
) -> None:  # fmt: skip
    docker.give(IMAGE, layer("a", random_bytes(3 * MIB, 9)))
    store(bucket).export(IMAGE, layers=layers)
    target.use(monkeypatch)
    target.order(stubborn=True)
    monkeypatch.setattr(docker_images, "ENDING_SECONDS", 0.3)
    proxy.fail("flip_response", method="GET", path=r"tar\.gz|/sha256/\w", after=2 * MIB)
    with pytest.raises(IntegrityError):
        store(bucket).load(IMAGE)
    assert not target.has(IMAGE)
    assert not (target.state / "saw_the_end").exists()
    assert not target.runs()
    got = (target.state / "incoming").stat().st_size
    assert got <= docker.path(IMAGE).stat().st_size - HELD_BYTES


def test_the_end_is_held_back_until_all_of_it_is_verified() -> None:
    blocks = [random_bytes(size, size) for size in (1, 70_000, 3 * MIB, 512, 9)]
    assert b"".join(docker_images._held_back(iter(blocks))) == b"".join(blocks)

    def damaged() -> Iterator[bytes]:
        yield from blocks
        raise IntegrityError("damaged")

    got = bytearray()

    def take() -> None:
        for block in docker_images._held_back(damaged()):
            got.extend(block)

    with pytest.raises(IntegrityError):
        take()
    assert 2 * MIB < len(got) <= sum(map(len, blocks)) - HELD_BYTES
    assert HELD_BYTES % 512


# ---------------------------------------------------------------------------
# gzip, read as a stream
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("isal", [True, False])
def test_every_gzip_file_is_read_and_every_damage_noticed(
    monkeypatch: pytest.MonkeyPatch, isal: bool
) -> None:
    if not isal:
        monkeypatch.setitem(sys.modules, "isal.isal_zlib", None)

    def read(content: bytes, step: int = 100_000) -> bytes:
        blocks = (content[at : at + step] for at in range(0, len(content), step))
        return b"".join(docker_images._decompressed(blocks, "x"))

    for data in (b"", b"x", bytes(MIB), bytes(9 * MIB), random_bytes(300_000)):
        packed = gzip.compress(data, 1)
        assert read(packed) == read(packed + bytes(2000)) == data
        assert read(packed + bytes(600) + packed, 97) == read(packed * 2) == data * 2
        changed = packed[:-6] + bytes([packed[-6] ^ 1]) + packed[-5:]
        for damaged in (b"", packed[:5], packed[:-1], packed + b"junk", changed, b"no gzip file"):
            with pytest.raises(IntegrityError):
                read(damaged)


def test_what_another_tool_has_stored_is_loaded_and_the_weaker_check_is_named(
    server: RcloneServer, bucket: s3.Bucket, docker: Docker, target: Docker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    key = bucket.key("docker-images", "piper-train-v1.tar.gz")
    server.put(key, gzip.compress(docker.path(IMAGE).read_bytes()))
    target.use(monkeypatch)
    loaded = store(bucket).load(IMAGE)
    assert "another tool" in loaded.check
    assert target.has(IMAGE)


# ---------------------------------------------------------------------------
# Killed, cut, full, refused
# ---------------------------------------------------------------------------

EXPORT = """
import sys
sys.path.insert(0, {root!r})
import cloud_services, cloud_settings, docker_images, s3_transport
settings = cloud_settings.S3Settings.resolve(bucket="bucket", endpoint_url={url!r}, prefix={prefix!r},
    region={region!r}, access_key_id={key!r}, secret_access_key={secret!r})
store = docker_images.ImageStore(s3_transport.Bucket(settings), settings.key("docker-images"))
"""


def child(bucket: s3.Bucket, server_url: str, lines: str, env: dict[str, str] | None = None) -> Any:
    """A process of its own that has a store and runs these lines."""
    words = EXPORT.format(
        root=str(ROOT), url=server_url, prefix=bucket.settings.prefix, region=REGION, key=KEY_ID,
        secret=SECRET,
    )  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", words + lines], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env={**os.environ, **(env or {})},
    )  # fmt: skip


@FORMS
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_export_leaves_nothing_at_the_final_key_and_the_next_one_works(
    server: RcloneServer, bucket: s3.Bucket, docker: Docker, tmp_path: Path, layers: bool,
    number: signal.Signals,
) -> None:  # fmt: skip
    big = layer("big", random_bytes(40 * MIB, 5))
    saved = docker.give(IMAGE, LAYERS[0], big)
    docker.order(save_cut=saved.index(big) + 36 * MIB, save_stalls=True)
    running = child(bucket, server.url, f"store.export({IMAGE!r}, layers={layers})")
    scratch = tmp_path / "scratch"
    if layers:
        wait_for(lambda: any(p.stat().st_size > 30 * MIB for p in scratch.rglob("layer")))
    else:
        wait_for(lambda: bool(server.uploads()))
        time.sleep(0.3)
    running.send_signal(number)
    running.communicate(timeout=20)
    assert names(bucket) == []
    wait_for(lambda: not docker.runs())
    if number == signal.SIGINT:
        assert nothing_is_left(server, tmp_path)
    held = len(layer_keys(bucket))
    docker.order()
    again = store(bucket).export(IMAGE, layers=layers)
    assert again.sent_layers == (2 - held if layers else 0)
    assert len(names(bucket)) == 1
    for upload in server.uploads():
        server.client().abort_multipart_upload(
            Bucket="bucket", Key=upload,
            UploadId=server.client().list_multipart_uploads(Bucket="bucket")["Uploads"][0]["UploadId"],
        )  # fmt: skip


def test_what_a_killed_run_has_left_is_removed_by_a_later_one(
    bucket: s3.Bucket, docker: Docker, tmp_path: Path
) -> None:
    scratch = tmp_path / "scratch"
    old, fresh, busy, foreign = (scratch / f"{name}x" for name in (
        "cloud_services-image-old", "cloud_services-image-fresh", "cloud_services-image-busy", "other",
    ))  # fmt: skip
    for folder in (old, fresh, busy, foreign):
        folder.mkdir()
        (folder / "lock").touch()
        (folder / "layer").write_bytes(b"large")
        if folder != fresh:
            os.utime(folder, (0, 0))
    with (busy / "lock").open("wb") as lock:
        lock_part(lock, busy)
        store(bucket).export(IMAGE, layers=True)
    assert sorted(scratch.iterdir()) == sorted([fresh, busy, foreign])


def noted_parts() -> int:
    """How many parts of uploads are known to be sent, and need not be sent again."""
    journals = (cache_folder() / NOTES_FOLDER).glob("*.journal")
    return sum(path.read_bytes().count(b"\npart ") for path in journals)


def test_a_large_layer_continues_where_a_killed_export_stopped(
    server: RcloneServer, proxy: FaultProxy, bucket: s3.Bucket, docker: Docker
) -> None:
    docker.give(IMAGE, layer("big", random_bytes(40 * MIB, 5)))
    proxy.fail("delay", method="PUT", path="partNumber=5", times=99, seconds=30)
    running = child(bucket, proxy.url, f"store.export({IMAGE!r}, layers=True)")
    wait_for(lambda: noted_parts() >= 4)  # one may be the small last one
    running.kill()
    running.communicate(timeout=20)
    assert layer_keys(bucket) == []
    proxy.forget()
    again = store(bucket).export(IMAGE, layers=True)
    assert again.sent_layers == 1
    assert again.moved == proxy.up - sum(s.up for s in proxy.seen("POST uploadId")) < 20 * MIB
    assert not server.uploads()


@FORMS
@pytest.mark.parametrize("megabytes", [1, 36])
def test_an_engine_that_dies_half_way_changes_nothing(
    server: RcloneServer, bucket: s3.Bucket, docker: Docker, tmp_path: Path, layers: bool,
    megabytes: int,
) -> None:  # fmt: skip
    first = store(bucket).export(IMAGE, layers=layers)
    before = server.content(first.key)
    docker.give(IMAGE, layer("big", random_bytes(40 * MIB, 5)))
    docker.order(save_cut=megabytes * MIB, save_says="write /dev/stdout: something broke")
    with pytest.raises(TransferError, match=r"docker save failed \(exit code 1\).*something broke"):
        store(bucket).export(IMAGE, layers=layers)
    assert server.content(first.key) == before
    assert nothing_is_left(server, tmp_path)


@FORMS
def test_a_saved_image_that_ends_too_early_is_not_stored_though_docker_says_it_went_well(
    server: RcloneServer, bucket: s3.Bucket, docker: Docker, tmp_path: Path, layers: bool
) -> None:
    saved = docker.path(IMAGE).stat().st_size
    ends = () if layers else (saved - 512, saved - 7)  # there only zeros are missing
    for cut in (512 * 300, 512 * 300 + 7, saved - 1024, *ends):
        docker.order(save_cut=cut)
        with pytest.raises(IntegrityError):
            store(bucket).export(IMAGE, layers=layers)
        assert names(bucket) == []
    assert nothing_is_left(server, tmp_path)


@FORMS
def test_when_the_storage_fails_docker_save_ends(
    server: RcloneServer, proxy: FaultProxy, bucket: s3.Bucket, docker: Docker, tmp_path: Path,
    layers: bool,
) -> None:  # fmt: skip
    docker.give(IMAGE, layer("big", random_bytes(40 * MIB, 5)), LAYERS[0])
    proxy.fail("status", method="PUT", times=99, status=403, code="AccessDenied")
    with pytest.raises(AccessError):
        store(bucket).export(IMAGE, layers=layers)
    assert not docker.runs()
    assert names(bucket) == []
    assert nothing_is_left(server, tmp_path)


@FORMS
def test_when_docker_load_dies_fetching_ends(
    bucket: s3.Bucket, docker: Docker, target: Docker, monkeypatch: pytest.MonkeyPatch,
    layers: bool,
) -> None:  # fmt: skip
    docker.give(IMAGE, layer("big", random_bytes(20 * MIB, 5)))
    store(bucket).export(IMAGE, layers=layers)
    target.use(monkeypatch)
    target.order(load_cut=MIB, load_says="write /blobs/x: no space left on device")
    with pytest.raises(DiskFullError, match=r"the disk of docker is full.*no space left"):
        store(bucket).load(IMAGE)
    target.order(load_cut=MIB)
    with pytest.raises(TransferError, match="docker load ended before it had read the image"):
        store(bucket).load(IMAGE)
    target.order()
    assert store(bucket).load(IMAGE)


def test_an_image_that_changes_while_it_is_exported_is_not_stored(
    bucket: s3.Bucket, docker: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = docker_images._Engine.look
    for layers in (False, True):
        ids = itertools.count(10)
        monkeypatch.setattr(
            docker_images._Engine,
            "look",
            lambda self, image, ids=ids: (f"{next(ids)}" * 32, look(self, image)[1]),
        )
        with pytest.raises(IntegrityError, match="changed while it was exported"):
            store(bucket).export(IMAGE, layers=layers)
    assert names(bucket) == []


def test_a_full_disk_is_told_with_what_to_do(
    bucket: s3.Bucket, docker: Docker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stream: IO[bytes], data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path))

    monkeypatch.setattr(docker_images, "write_all", full)
    with pytest.raises(DiskFullError, match="the disk is full") as caught:
        store(bucket).export(IMAGE, layers=True)
    assert "TMPDIR" in caught.value.hint
    assert not list((tmp_path / "scratch").iterdir())
    assert not docker.runs()


@FORMS
def test_memory_stays_flat_however_large_the_image(
    server: RcloneServer, bucket: s3.Bucket, docker: Docker, layers: bool
) -> None:
    docker.give(IMAGE, layer("large", random_bytes(MIB) * 100 + bytes(200 * MIB)))
    lines = (
        f"store.export({IMAGE!r}, layers={layers})\n"
        f"import os; os.unlink({str(docker.path(IMAGE))!r})\n"
        f"store.load({IMAGE!r})\n"
        "print(open('/proc/self/status').read().partition('VmHWM:')[2].split()[0])"
    )
    running = child(bucket, server.url, lines)
    out, err = running.communicate(timeout=90)
    assert running.returncode == 0, err
    assert int(out) < (200 if layers else 270) * 1024  # a stream goes in parts of 16 MiB
    assert docker.has(IMAGE)
    docker.path(IMAGE).unlink()
    for key in (*layer_keys(bucket), *(bucket.key("docker-images", n) for n in names(bucket))):
        server.client().delete_object(Bucket="bucket", Key=key)


# ---------------------------------------------------------------------------
# Engines that are not there, or not willing
# ---------------------------------------------------------------------------

DOWN = "Cannot connect to the Docker daemon at unix:///var/run/docker.sock. Is the docker daemon running?"
DENIED = "permission denied while trying to connect to the Docker daemon socket at unix:///x.sock"


def test_without_docker_and_podman_there_is_a_line_that_says_how_to_get_them(
    bucket: s3.Bucket,
) -> None:
    for engine, said in ((None, "neither docker nor podman is"), ("podman", "podman is not")):
        with pytest.raises(MissingPackageError, match=said) as caught:
            store(bucket, engine=engine).export(IMAGE)
        assert caught.value.exit_code == 3
        assert "apt-get install podman" in caught.value.hint
    assert store(bucket).list() == []


@pytest.mark.parametrize(
    ("said", "kind", "hint"),
    [(DOWN, ConnectError, "systemctl start docker"), (DENIED, AccessError, "usermod -aG docker")],
)
def test_a_docker_that_does_not_answer_is_told_with_what_to_do(
    bucket: s3.Bucket, docker: Docker, said: str, kind: type[CloudError], hint: str
) -> None:
    docker.order(down=said)
    with pytest.raises(kind) as caught:
        store(bucket).export(IMAGE)
    assert said[:20] in str(caught.value)
    assert hint in caught.value.hint
    assert names(bucket) == []


def test_where_docker_does_not_answer_podman_is_used(
    bucket: s3.Bucket, docker: Docker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    second = Docker(tmp_path / "second")
    second.give(IMAGE, *LAYERS)
    shutil.copy(second.tools / "docker", docker.tools / "podman")
    assert store(bucket).export(IMAGE)
    assert ["save", IMAGE] in docker.calls()
    docker.order(down=DOWN)
    assert store(bucket).export(IMAGE, layers=True)
    assert ["save", IMAGE] in second.calls()
    assert "podman is used: docker is installed, but" in caplog.text
    with pytest.raises(ConnectError):
        store(bucket, engine="docker").export(IMAGE)
    with pytest.raises(UsageError):
        store(bucket, engine="rm").export(IMAGE)


def test_a_docker_that_never_answers_is_not_waited_for(
    bucket: s3.Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools = tmp_path / "slow"
    tools.mkdir()
    (tools / "docker").write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    (tools / "docker").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(docker_images, "ANSWER_SECONDS", 0.2)
    with pytest.raises(ConnectError, match=r"docker has not answered for 0\.2 s"):
        store(bucket).export(IMAGE)


def test_an_unknown_image_is_not_found_here_or_there(bucket: s3.Bucket, docker: Docker) -> None:
    with pytest.raises(NotFoundError, match="docker has no image nobody:latest") as caught:
        store(bucket).export("nobody")
    assert "docker images" in caught.value.hint
    for layers in (None, True, False):
        with pytest.raises(NotFoundError, match="the bucket has no image nobody:latest") as caught:
            store(bucket).load("nobody", layers=layers)
        assert "docker-list" in caught.value.hint


# ---------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------

DIGEST = "ab" * 32


@pytest.mark.parametrize(
    ("text", "full", "stem"),
    [
        (
            "ghcr.io/zudva/piper-train:latest",
            "ghcr.io/zudva/piper-train:latest",
            "piper-train-latest",
        ),
        ("piper-train", "piper-train:latest", "piper-train-latest"),
        ("localhost:5000/a/b.c_d:1.2-x_Y", "localhost:5000/a/b.c_d:1.2-x_Y", "b.c_d-1.2-x_Y"),
        ("localhost:5000/a", "localhost:5000/a:latest", "a-latest"),
        (f"x/y@sha256:{DIGEST}", f"x/y@sha256:{DIGEST}", "y-sha256-abababababab"),
        (f"x/y:1@sha256:{DIGEST}", f"x/y:1@sha256:{DIGEST}", "y-sha256-abababababab"),
        (f"sha256:{DIGEST}", f"sha256:{DIGEST}", f"sha256-{DIGEST}"),
    ],
)
def test_the_key_of_an_image_comes_from_its_name_and_tag(text: str, full: str, stem: str) -> None:
    name = ImageName.parse(text)
    assert (name.full, name.stem) == (full, stem)


@pytest.mark.parametrize(
    "text",
    [
        "", "-rf", "--help", "a b", "../../etc/passwd", "a:../b", "a/../b", "/a", "a/", "a:", ":b",
        "$(touch pwned)", "`id`", "a;b", "a\nb", "a\0b", "UPPER/Case:x/y", "a//b", "a:b:c", "a@sha256:12",
        "тест", "a" * 401, "a:" + "b" * 129, "a\x1b[31m", "*", "a:v1\n",
    ],
)  # fmt: skip
def test_hostile_names_reach_neither_docker_nor_the_bucket(
    proxy: FaultProxy, bucket: s3.Bucket, docker: Docker, text: str
) -> None:
    for work in (store(bucket).export, store(bucket).load):
        with pytest.raises(UsageError, match="is no name of an image"):
            work(text)
    assert docker.calls() == []
    assert proxy.log == []


def test_a_hostile_name_in_the_bucket_never_becomes_an_argument(
    server: RcloneServer, bucket: s3.Bucket, docker: Docker, target: Docker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    content = gzip.compress(docker.path(IMAGE).read_bytes())
    key = bucket.key("docker-images", "piper-train-v1.tar.gz")
    server.put(key, content, Metadata={"image": "--privileged/piper-train:v1"})
    target.use(monkeypatch)
    with pytest.raises(NotFoundError):
        store(bucket).load("piper-train:v1")
    assert target.calls() == []


def test_an_image_without_a_tag_or_by_digest_comes_back(
    bucket: s3.Bucket, docker: Docker, target: Docker, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_digest = f"example.com/a@sha256:{DIGEST}"
    docker.give("example.com/a:latest", *LAYERS)
    docker.give(by_digest, *LAYERS)
    store(bucket).export("example.com/a")
    store(bucket).export(by_digest, layers=True)
    assert names(bucket) == ["a-latest.tar.gz", "a-sha256-abababababab.layers.json"]
    target.use(monkeypatch)
    assert store(bucket).load("example.com/a").image == "example.com/a:latest"
    loaded = store(bucket).load(by_digest).image
    assert loaded.startswith("sha256:")
    assert target.has(loaded)


@FORMS
def test_another_image_with_the_same_key_is_neither_replaced_nor_loaded(
    bucket: s3.Bucket, docker: Docker, layers: bool
) -> None:
    docker.give("elsewhere/piper-train:v1", *LAYERS)
    sent = store(bucket).export(IMAGE, layers=layers)
    with pytest.raises(RefusedError, match=f"holds another image, {IMAGE}"):
        store(bucket).export("elsewhere/piper-train:v1", layers=layers)
    with pytest.raises(NotFoundError, match=f"holds {IMAGE}, not elsewhere"):
        store(bucket).load("elsewhere/piper-train:v1")
    assert bucket.head(sent.key)
    assert store(bucket, dry_run=True).load("piper-train:v1").key == sent.key


def test_the_list_shows_both_forms_and_what_others_have_put_there(
    server: RcloneServer, bucket: s3.Bucket, docker: Docker, caplog: pytest.LogCaptureFixture
) -> None:
    docker.give("a/my-image:1-2", *LAYERS)
    archive = store(bucket).export(IMAGE)
    layered = store(bucket).export(IMAGE, layers=True)
    dashed = store(bucket).export("a/my-image:1-2")
    server.put(bucket.key("docker-images", "old-thing-latest.tar.gz"), b"12345")
    server.put(bucket.key("docker-images", "broken-x.layers.json"), b'{"format": 1}')
    server.put(bucket.key("docker-images", "notes.txt"), b"no image")
    listed = store(bucket).list()
    shown = [(one.name, one.tag, one.form, one.size, one.image) for one in listed]
    assert sorted(shown) == sorted([
        ("piper-train", "v1", "archive", archive.size, IMAGE),
        ("piper-train", "v1", "layers", layered.size, IMAGE),
        ("my-image", "1-2", "archive", dashed.size, "a/my-image:1-2"),
        ("old-thing", "latest", "archive", 5, ""),
    ])  # fmt: skip
    assert {one.key for one in listed} >= {archive.key, layered.key}
    assert all(abs(one.mtime - time.time()) < 300 for one in listed)
    assert "broken-x.layers.json does not describe an image" in caplog.text


def test_the_newer_form_is_loaded_unless_one_is_asked_for(
    bucket: s3.Bucket, docker: Docker
) -> None:
    look = store(bucket, dry_run=True)
    layered = store(bucket).export(IMAGE, layers=True)
    assert look.load(IMAGE).key == layered.key
    time.sleep(1.1)  # the resolution of a server's clock
    archive = store(bucket).export(IMAGE)
    assert look.load(IMAGE).key == archive.key
    assert look.load(IMAGE, layers=True).key == layered.key
    assert look.load(IMAGE, layers=False).key == archive.key


# ---------------------------------------------------------------------------
# What comes from elsewhere is data
# ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "evil\x1b[31m"])
def test_a_saved_image_with_a_hostile_entry_is_refused(
    bucket: s3.Bucket, docker: Docker, tmp_path: Path, name: str
) -> None:
    content = docker.path(IMAGE).read_bytes()
    evil = tar_of({name: b"evil"})[:1024]
    docker.path(IMAGE).write_bytes(evil + content)
    with pytest.raises(IntegrityError, match="an entry that it must not"):
        store(bucket).export(IMAGE, layers=True)
    assert names(bucket) == []
    assert not [path for path in tmp_path.rglob("*") if "evil" in path.name]


def test_a_saved_image_that_is_no_tar_file_is_refused_and_docker_ends(
    bucket: s3.Bucket, docker: Docker
) -> None:
    content = docker.path(IMAGE).read_bytes()
    for start in (0, 1024):  # `image inspect` of the test's docker needs the sound one
        docker.order(save_from=len(content))
        docker.path(IMAGE).write_bytes(content + content[:start] + random_bytes(5 * MIB))
        with pytest.raises(IntegrityError, match="docker save wrote is no complete image"):
            store(bucket).export(IMAGE, layers=True)
        assert not docker.runs()
    assert names(bucket) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d["members"].append(["../evil", "text", "x"]),
        lambda d: d["members"].append(["evil", "link", "../../etc/passwd"]),
        lambda d: d["members"].append(["evil", "link", "/etc/passwd"]),
        lambda d: d["members"].append(["evil", "device", "x"]),
        lambda d: d["members"].append(["evil", "blob", "0" * 64]),
        lambda d: d["members"].append("evil"),
        lambda d: d["blobs"].append(["../../" + "a" * 58, 1, 1, "gzip"]),
        lambda d: d["blobs"].append(["a" * 64, 1, 1, "zip"]),
        lambda d: d["blobs"].append(["a" * 64, -1, 1, "gzip"]),
        lambda d: d["blobs"].append(["a" * 64, 1, 1, "gzip"]),
        lambda d: d["blobs"][0].__setitem__(1, 5),
        lambda d: d["members"].clear(),
        lambda d: d["members"].__delitem__(slice(0, 5)),
        lambda d: d.pop("members"),
        lambda d: d.__setitem__("format", "something else"),
    ],
)
def test_a_document_that_somebody_has_altered_loads_nothing(
    server: RcloneServer, bucket: s3.Bucket, docker: Docker, target: Docker,
    monkeypatch: pytest.MonkeyPatch, change: Callable[[Any], Any],
) -> None:  # fmt: skip
    sent = store(bucket).export(IMAGE, layers=True)
    document = json.loads(server.content(sent.key) or b"")
    change(document)
    server.put(sent.key, json.dumps(document).encode())
    target.use(monkeypatch)
    with pytest.raises(IntegrityError):
        store(bucket).load(IMAGE)
    assert not target.has(IMAGE)
    assert not (target.state / "saw_the_end").exists()


def test_a_document_that_makes_no_sense_is_replaced_by_the_next_export(
    server: RcloneServer, bucket: s3.Bucket, docker: Docker
) -> None:
    sent = store(bucket).export(IMAGE, layers=True)
    good = server.content(sent.key)
    server.put(sent.key, b"[]")
    again = store(bucket).export(IMAGE, layers=True)
    assert (again.sent_layers, again.sha256) == (0, sent.sha256)
    assert server.content(sent.key) == good


# ---------------------------------------------------------------------------
# Asking only
# ---------------------------------------------------------------------------


@FORMS
def test_a_dry_run_sends_and_loads_nothing(
    proxy: FaultProxy, bucket: s3.Bucket, docker: Docker, layers: bool
) -> None:
    planned = store(bucket, dry_run=True).export(IMAGE, layers=layers)
    assert (planned.moved, planned.layers, planned.sent_layers) == (0, 2 * layers, 2 * layers)
    assert planned.size > 500_000
    assert proxy.up == 0
    assert names(bucket) == []
    sent = store(bucket).export(IMAGE, layers=layers)
    assert planned.key == sent.key
    asked = len(docker.calls())
    found = store(bucket, dry_run=True).load(IMAGE)
    assert (found.key, found.size, found.moved, found.engine) == (sent.key, sent.size, 0, "")
    assert len(docker.calls()) == asked


def test_the_progress_hears_of_every_byte(bucket: s3.Bucket, docker: Docker) -> None:
    class Counter(Progress):
        total, steps = 0, 0

        def begin(self, what: str, total: int | None) -> None:
            self.steps += 1

        def advance(self, count: int) -> None:
            self.total += count

        def end(self) -> None:
            self.steps -= 1

    counter = Counter()
    sent = store(bucket, progress=counter).export(IMAGE)
    assert (counter.total, counter.steps) == (sent.size, 0)
    store(bucket, progress=counter).load(IMAGE)
    assert (counter.total, counter.steps) == (2 * sent.size, 0)
    counter = Counter()
    sent = store(bucket, progress=counter).export(IMAGE, layers=True)
    read = sum(map(len, LAYERS))
    assert (counter.total, counter.steps) == (read + sent.size, 0)


def test_no_secret_is_in_a_command_line(bucket: s3.Bucket, docker: Docker) -> None:
    store(bucket).export(IMAGE)
    store(bucket).export(IMAGE, layers=True)
    assert docker.calls()
    assert not [
        word for call in docker.calls() for word in call if SECRET in word or KEY_ID in word
    ]


# ---------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------


def test_the_script_of_the_guide_exports_lists_and_loads(
    server: RcloneServer, builder: Podman, other: Podman, tmp_path: Path
) -> None:
    """From end to end, with nothing of ours in between: script, command line, podman, server."""

    def call(podman: Podman, *words: str) -> Any:
        env = {**os.environ, **server.env(), "DOCKER_IMAGE": IMAGE, "S3_PREFIX": "cli"}
        env["PATH"] = os.pathsep.join([str(podman.tools), str(tools)])
        done = subprocess.run(
            [ROOT / "scripts" / "docker_to_s3.sh", *words, "--json"], env=env, cwd=tmp_path,
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    tools = tmp_path / "tools"  # a PATH without the docker that a machine may have
    tools.mkdir()
    for name in ("sh", "dirname", "readlink"):
        (tools / name).symlink_to(shutil.which(name, path="/usr/bin:/bin") or name)
    (tools / "python3").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (tools / "python3").chmod(0o755)
    sent = call(builder, "export")
    assert sent["key"] == "cli/docker-images/piper-train-v1.tar.gz"
    assert call(builder, "export", "--layers")["sent_layers"] == 2
    listed = call(other, "list")
    assert IMAGE in json.dumps(listed)
    assert call(other, "load")["image"] == IMAGE
    assert other.id(IMAGE) == builder.id(IMAGE)
