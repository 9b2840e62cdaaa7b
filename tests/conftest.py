"""Shared by all tests: a small workspace, the command line as a process, trees to compare."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import cloud_services

SCRIPT = Path(cloud_services.__file__).resolve()
WORKSPACE_FILES = (
    "prepared/features/gold_train.csv",
    "prepared/features/gold_val.csv",
    "prepared/features/gold_test.csv",
    "raw_data/ticks/EURUSD/2023.csv",
    "raw_data/ticks/EURUSD/2024.csv",
    "raw_data/ticks/GBPUSD/2024.csv",
    "raw_data/ticks/notes.txt",
    "raw_data/cache/windows.npy",
    "models/checkpoints/last.ckpt",
    "models/metrics/run.json",
    "models/logs/events.out.tfevents",
    "prepared/scalers/scaler.pkl",
)
OLD = 1_700_000_000
HOSTILE_NAMES = (
    "with two  spaces.csv",
    'it\'s "quoted".csv',
    "$(touch pwned) `id` ${HOME}.csv",
    "line\nbreak.csv",
    "carriage\rreturn.csv",
    "back\\slash\\n.csv",
    "-rf --checkpoint=1",
    "\x1b[31mred\x07.csv",
    "*?[a].csv",
    "📈 тик.csv",
    "n" * 255,
    os.fsdecode(b"caf\xe9.csv"),
)

settings.register_profile(
    "tests",
    deadline=None,
    max_examples=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.load_profile("tests")


def file_names() -> st.SearchStrategy[str]:
    """Any name a Linux file may have, undecodable bytes included, that is no secret."""
    raw = st.binary(min_size=1, max_size=60) | st.text(min_size=1, max_size=40).map(
        lambda text: text.encode("utf-8", "replace")
    )
    cleaned = raw.map(lambda name: name.replace(b"/", b"\\").replace(b"\0", b"\n"))
    decoded = cleaned.filter(lambda name: name not in (b".", b"..")).map(os.fsdecode)
    return decoded.filter(lambda name: not cloud_services.secret_part(name))


def write_file(path: Path, content: bytes = b"content\n", mtime: int = OLD) -> Path:
    """Write a file, with the folders above it and a modification time in the past."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    os.utime(path, (mtime, mtime))
    return path


def make_workspace(root: Path) -> Path:
    """Write every kind of file a workspace may hold; each says its own name."""
    for number, name in enumerate(WORKSPACE_FILES):
        write_file(root / name, f"{name}\n".encode() * (number + 1), OLD + number)
    return root


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: a file's content, a link's target, None for a folder."""
    found: dict[str, bytes | None] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = os.fsencode(path.readlink())
        else:
            found[name] = path.read_bytes() if path.is_file() else None
    return found


def files(folder: Path) -> dict[str, bytes]:
    """The files below a folder, folders left out."""
    return {name: content for name, content in tree(folder).items() if content is not None}


def unpack_with_tar(
    archive: Path, into: Path, manifest: str = "training.sha256"
) -> dict[str, bytes]:
    """Unpack with plain tar, check with plain sha256sum; the files without the manifest."""
    into.mkdir(exist_ok=True)
    subprocess.run(["gzip", "-t"], stdin=archive.open("rb"), check=True)
    unpacked = subprocess.run(
        ["tar", "-xzf", archive, "-C", into], capture_output=True, text=True, check=False
    )
    assert (unpacked.returncode, unpacked.stderr) == (0, "")
    checked = subprocess.run(
        ["sha256sum", "--strict", "-c", manifest], cwd=into, capture_output=True, check=False
    )
    assert (checked.returncode, checked.stderr) == (0, b"")
    found = files(into)
    found.pop(manifest)
    return found


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the caller's settings, or writes into the caller's folder."""
    shells = ("PYTHONUNBUFFERED", "PYTHONIOENCODING", "NO_COLOR", "COLUMNS")
    for variable in [name for name in os.environ if name.startswith(("PAPERSPACE_", *shells))]:
        monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A small workspace in the current folder."""
    return make_workspace(tmp_path / "workspace")


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run() -> Run:
    """Call `python cloud_services.py` with arguments, in the current folder, without a terminal."""

    def call(
        *arguments: str | Path, python: tuple[str, ...] = (sys.executable,), **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*python, str(SCRIPT), *map(str, arguments)],
            env=os.environ | env, stdin=subprocess.DEVNULL, capture_output=True,
            encoding="utf-8", errors="surrogateescape", timeout=60, check=False,
        )  # fmt: skip

    return call


@pytest.fixture
def plain_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of an ordinary user; the test runs as that user, for root may read anything."""
    if os.geteuid():
        yield tmp_path
        return
    nobody = 65534
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        os.chown(name, nobody, nobody)
        monkeypatch.chdir(name)
        stack.callback(os.seteuid, 0)
        os.seteuid(nobody)
        yield Path(name)


@pytest.fixture(params=["isal", "gzip"])
def _engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once with isal, once as if it were not installed."""
    if request.param == "gzip":
        monkeypatch.setitem(sys.modules, "isal.igzip_threaded", None)
    else:
        pytest.importorskip("isal.igzip_threaded")
