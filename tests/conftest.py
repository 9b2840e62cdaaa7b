"""Shared by all tests: a small workspace, the command line as a process, trees to compare."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

import cloud_services
from tests.local_hub import LocalHub

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


ANALYSIS_FILES = (
    "feature_statistics.csv",
    "feature_importance.csv",
    "outliers_analysis.csv",
    "feature_by_class_statistics.csv",
    "feature_analysis_report.html",
    "plots/distributions/returns.png",
    "plots/by_class/returns.png",
)


def make_hub_workspace(root: Path) -> Path:
    """A workspace with all that goes to a Hub: texts for git, other names for LFS or Xet."""
    for number, name in enumerate(ANALYSIS_FILES):
        content = b"feature,mean\nreturns,%d\n" % number
        write_file(root / "analysis-of-features" / name, content, OLD + number)
    return make_workspace(root)


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


def pytest_configure() -> None:
    """Whoever started the tests may ignore Ctrl-C; the programs under test must not inherit it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees the caller's settings, or writes into the caller's folder."""
    shells = ("PYTHONUNBUFFERED", "PYTHONIOENCODING", "NO_COLOR", "COLUMNS")
    foreign = ("PAPERSPACE_", "HF_", "HUGGING", "AWS_", "S3_", "CHECKPOINT", "DOCKER_", *shells)
    own = ("S3_KILLS",)
    for variable in [n for n in os.environ if n.startswith(foreign) and n not in own]:
        monkeypatch.delenv(variable)
    logger = logging.getLogger("cloud_services")  # as it is before main() has run in this process
    monkeypatch.setattr(logger, "propagate", True)
    logger.setLevel(logging.NOTSET)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / ".cache"))
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


# ── Hubs: one of each mode for all tests of a process, as new for each test ─────────────────────


def needs(module: str) -> None:
    """Skip without a module, and fail in CI; it is not imported: hf_xet writes logs then."""
    if importlib.util.find_spec(module) is None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(f"{module} is not installed: pip install {module}")


@pytest.fixture(scope="session")
def lfs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A Hub that takes large files by LFS."""
    needs("huggingface_hub")
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture(scope="session")
def xet_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A Hub that takes large files by Xet."""
    needs("huggingface_hub")
    needs("hf_xet")
    with LocalHub(tmp_path_factory.mktemp("hub"), xet=True) as hub:
        yield hub


def as_new(hub: LocalHub) -> LocalHub:
    """A Hub without the faults, limits and notes of an earlier test."""
    hub.clear_faults()
    hub.clear_requests()
    for sort in ("api", "resolvers", "commits", "whoami"):
        hub.limit(sort, 1_000_000)
    hub.settings(part_bytes=20_000_000, link_seconds=3600)
    return hub


@pytest.fixture
def hub(lfs_server: LocalHub) -> LocalHub:
    return as_new(lfs_server)


@pytest.fixture
def xet_hub(xet_server: LocalHub) -> LocalHub:
    return as_new(xet_server)


@pytest.fixture(params=["lfs", "xet"])
def any_hub(request: pytest.FixtureRequest) -> LocalHub:
    """Once with LFS, once with Xet."""
    server: LocalHub = request.getfixturevalue(f"{request.param}_server")
    return as_new(server)


@pytest.fixture
def repo(request: pytest.FixtureRequest) -> str:
    """The name of a repository of this test's own."""
    return f"tester/{hashlib.sha256(request.node.nodeid.encode()).hexdigest()[:12]}"
