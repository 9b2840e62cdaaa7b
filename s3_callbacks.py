"""Lightning callbacks for cloud_services: checkpoints and logs go to a bucket during a training.

    from s3_callbacks import S3CheckpointCallback, S3LogsCallback

    trainer = Trainer(callbacks=[S3CheckpointCallback(), S3LogsCallback()])

Both work with `lightning` and with `pytorch_lightning`. Without arguments they go by S3_BUCKET,
S3_PREFIX and the other settings of the environment and of `.env`; ENABLE_S3_SYNC=0 switches them
off. Everything is sent by a thread of its own, from rank zero. Storage that fails costs the
training nothing: it is said once, tried again, and what is missing in the end is listed, each file
with the command that sends it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import logging
import math
import os
import posixpath
import shlex
import signal
import threading
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cloud_services import (
    AccessError,
    CloudError,
    IntegrityError,
    MissingPackageError,
    Progress,
    RefusedError,
    TransferError,
    UsageError,
    dotenv_settings,
    printable,
)

if TYPE_CHECKING:
    from cloud_services import S3Sync

log = logging.getLogger("cloud_services")

GRACE_SECONDS = 300.0
"""So long the end of a training waits for what is still to be sent."""

SIGTERM_GRACE_SECONDS = 25.0
"""After a SIGTERM: Kubernetes, torchrun and Slurm kill after 30 s."""

LAST_CHANCE_SECONDS = 20.0
"""So long the end waits for storage that failed when it was last tried."""

LOOK_SECONDS, LONGEST_LOOK_SECONDS = 0.5, 10.0
"""A file is complete when two looks, so long apart, find it the same."""

FIRST_PAUSE, LONGEST_PAUSE = 15.0, 600.0
"""Between two tries of storage that fails."""

SHORT_PAUSE = 2.0
OWN_TRIES = 3
"""A file that fails by itself, because it changes all the time, say, is tried so often."""

LOGS_PAUSE, LOGS_SHARE = 5.0, 20
"""Logs are looked through at most every so many seconds, and for a twentieth of the time."""

ANNOUNCE_SECONDS = 5.0
INCOMPLETE = "it was not seen to be complete"
OFF = ("0", "false", "no", "off")


# ── lightning ────────────────────────────────────────────────────────────────────────────────────

PACKAGES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
COMPROMISED = ("2.6.2", "2.6.3")
"""Releases that steal credentials as soon as they are imported; PyPI has removed them."""


def require_sound_lightning() -> None:
    """Raise RefusedError, before anything is imported, when a compromised release is installed."""
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
            if version in COMPROMISED:
                raise RefusedError(
                    f"{package} {version} is a compromised release that steals credentials: "
                    "install another one, and change every key that this machine could read",
                    f"pip install '{package}!=2.6.2,!=2.6.3'",
                )


def _callback_class() -> type:
    """A Callback to every Lightning that is installed: each knows only its own class."""
    require_sound_lightning()
    bases = []
    for package, module in PACKAGES.items():
        if importlib.util.find_spec(package):
            try:
                bases.append(importlib.import_module(module).Callback)
            except Exception as error:  # one that is broken must not take the other one along
                log.info("%s cannot be imported: %s", module, error)
    return type("LightningCallback", tuple(bases), {}) if bases else object


if TYPE_CHECKING:
    _LightningCallback = object
else:
    _LightningCallback = _callback_class()


# ── sending in the background ────────────────────────────────────────────────────────────────────


class Version(NamedTuple):
    """What a file looked like; one that was written anew differs."""

    mtime_ns: int
    size: int
    inode: int


@dataclasses.dataclass
class Task:
    """A file or folder on its way to the bucket, and why it is not there yet."""

    path: Path
    version: Version
    due: float = 0.0
    tries: int = 0
    trouble: str = ""


Gather = Callable[[bool], "tuple[Iterable[tuple[Path, Version]], float | None]"]
"""Told whether the end has come: what is to be sent by now, and in how many seconds to ask again
(None: when it is woken)."""


class Courier:
    """Sends files from a thread of its own, whatever the storage does.

    The newest goes first: it is worth most when time runs out. A newer version of a file takes the
    place of one that waits. Storage that fails is tried again later, and said to fail once. A file
    that is gone by its turn was meant to go: `save_top_k` removes what is not among the best.
    """

    def __init__(self, name: str, gather: Gather, send: Callable[[Path], bool]) -> None:
        """`send` tells whether it has sent the file: it may find that another version is to go."""
        self.name = name
        self.defect = ""
        self.pulse = _Pulse()
        self.sent = 0
        self._gather, self._send = gather, send
        self._changed = threading.Condition()
        self._waiting: dict[Path, Task] = {}
        self._failed: dict[Path, Task] = {}
        self._thread: threading.Thread | None = None
        self._woken = self._closing = self._given_up = False
        self._outage: CloudError | None = None
        self._storage_due, self._pause = 0.0, FIRST_PAUSE
        self._patient_until = math.inf

    # ── from the training's thread

    def wake(self) -> None:
        """There may be something to send."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self.name, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Send what is left, then end. What failed gets one more chance."""
        with self._changed:
            self._closing = True
            self._storage_due, self._pause = 0.0, SHORT_PAUSE
            chance = LAST_CHANCE_SECONDS if self.sent else SHORT_PAUSE
            self._patient_until = 0.0 if self._outage else time.monotonic() + chance
            for task in self._waiting.values():
                task.due = 0.0
        self.pulse.beat()
        self.wake()

    @property
    def closed(self) -> bool:
        """Whether a training has ended it."""
        return self._closing

    def wait(self, seconds: float) -> bool:
        """Whether it has ended, after so many seconds at most."""
        assert self._thread is not None
        self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def hopeless(self) -> bool:
        """Whether the storage has failed, and nothing has moved for a while either."""
        idle = time.monotonic() - self.pulse.at
        return self._outage is not None and idle > LAST_CHANCE_SECONDS

    def give_up(self) -> None:
        """Begin nothing any more."""
        with self._changed:
            self._given_up = True
            self._changed.notify_all()

    def left(self) -> list[Task]:
        """What has not arrived, the oldest first."""
        with self._changed:
            tasks = [*self._failed.values(), *self._waiting.values()]
        there = [task for task in tasks if task.path.exists()]
        return sorted(there, key=lambda task: task.version)

    def take_over(self, other: Courier) -> None:
        """An earlier training's remains are sent along."""
        for task in other.left():
            self._waiting[task.path] = Task(task.path, task.version)

    # ── in its own thread

    def _run(self) -> None:
        try:
            while task := self._next():
                self._try(task)
        except Exception as error:
            log.exception("%s: nothing more is sent", self.name)
            self.defect = repr(error)

    def _next(self) -> Task | None:
        """The next one to send, as soon as there is one; None: it is over."""
        while True:
            found, again = self._gather(self._closing)
            with self._changed:
                for path, version in found:
                    self._put(path, version)
                task = self._ripe()
                if self._given_up or (task is None and self._over(again)):
                    return None
                if task and task.due <= time.monotonic():
                    return task
                if not self._woken:
                    self._changed.wait(self._nap(task, again))
                self._woken = False

    def _put(self, path: Path, version: Version) -> None:
        self._failed.pop(path, None)
        self._waiting.pop(path, None)
        self._waiting[path] = Task(path, version)

    def _ripe(self) -> Task | None:
        """The one to try next, with the time from which it may be tried."""
        tasks = [task for task in self._waiting.values() if task.due < math.inf]
        if not tasks:
            return None
        task = min(tasks, key=lambda task: (task.tries, -task.version.mtime_ns))
        task.due = max(task.due, self._storage_due)
        return task

    def _over(self, again: float | None) -> bool:
        return self._closing and again is None and not self._woken

    @staticmethod
    def _nap(task: Task | None, again: float | None) -> float | None:
        naps = [again] if again is not None else []
        naps += [max(0.0, task.due - time.monotonic())] if task else []
        return min(naps, default=None)

    def _try(self, task: Task) -> None:
        self.pulse.beat()
        try:
            sent = self._send(task.path)
        except CloudError as error:
            with self._changed:
                self._note_failure(task, error)
        except Exception as error:  # a defect is loud, and neither ends the training nor the thread
            log.exception("%s could not be sent", printable(task.path))
            with self._changed:
                self._set_aside(task, repr(error))
        else:
            with self._changed:
                self._drop(task)
                if sent:
                    self._note_success()

    def _note_success(self) -> None:
        self.sent += 1
        if self._outage:
            log.info("%s: the storage answers again", self.name)
            self._outage, self._pause = None, FIRST_PAUSE
            for waiting in self._waiting.values():
                waiting.tries = 0
        self._patient_until = time.monotonic() + LAST_CHANCE_SECONDS

    def _note_failure(self, task: Task, error: CloudError) -> None:
        task.tries += 1
        task.trouble = _told(error)
        if not task.path.exists():
            log.info("%s is gone again", printable(task.path))
            self._drop(task)
        elif _concerns_file(error):
            task.due = time.monotonic() + SHORT_PAUSE
            if task.tries >= OWN_TRIES:
                log.info("%s: %s", printable(task.path), task.trouble)
                self._set_aside(task, task.trouble)
        else:
            self._note_outage(task, error)

    def _note_outage(self, task: Task, error: CloudError) -> None:
        now = time.monotonic()
        if self._outage is None:
            log.warning(
                "%s: %s. The training goes on, and sending is tried again.",
                self.name, task.trouble,
            )  # fmt: skip
        self._outage = error
        if self._closing and not isinstance(error, TransferError):
            task.due = math.inf  # it answers, and refuses this one: the others may fare better
        elif self._closing and now > self._patient_until:
            self._given_up = True
        else:
            self._storage_due = now + self._pause
            self._pause = min(2 * self._pause, 2 * SHORT_PAUSE if self._closing else LONGEST_PAUSE)

    def _set_aside(self, task: Task, trouble: str) -> None:
        if self._drop(task):
            self._failed[task.path] = dataclasses.replace(task, trouble=trouble)

    def _drop(self, task: Task) -> bool:
        """Take a task out, unless a newer version of its file has taken its place."""
        return self._waiting.get(task.path) is task and bool(self._waiting.pop(task.path))


class _Pulse(Progress):
    """When something last moved; called from any thread."""

    def __init__(self) -> None:
        self.at = time.monotonic()

    def beat(self) -> None:
        self.at = time.monotonic()

    def begin(self, what: str, total: int | None) -> None:
        self.beat()

    def advance(self, count: int) -> None:
        self.beat()


def _concerns_file(error: CloudError) -> bool:
    """Whether only this file cannot be sent, and not all others just as well."""
    local = isinstance(error, AccessError) and isinstance(error.__cause__, OSError)
    return local or isinstance(error, (IntegrityError, UsageError, RefusedError))


def _told(error: CloudError) -> str:
    return f"{error}; {error.hint}" if error.hint else str(error)


# ── the end of a training ────────────────────────────────────────────────────────────────────────


class Ending:
    """Waits until everything is sent, for a grace time; signals shorten it."""

    def __init__(self, couriers: Sequence[Courier], grace: float, after_sigterm: float) -> None:
        self._couriers = couriers
        self._after_sigterm = after_sigterm
        self._until = time.monotonic() + grace
        self._terminated = False
        self._announce_at = time.monotonic() + ANNOUNCE_SECONDS

    def wait(self, terminated: bool) -> bool:
        """Wait; whether a SIGTERM came meanwhile. `terminated`: one has come already."""
        if terminated:
            self._heard(signal.SIGTERM)
        with _hearing(self._heard):
            for courier in self._couriers:
                self._wait_for(courier)
        for courier in self._couriers:
            courier.give_up()
        return self._terminated and not terminated

    def _wait_for(self, courier: Courier) -> None:
        while not courier.wait(0.05):
            now = time.monotonic()
            if now > self._until or courier.hopeless:
                return
            if now > self._announce_at:
                self._announce_at = math.inf
                log.warning(
                    "%s: still sending, for %.0f s at most; Ctrl-C ends the wait",
                    courier.name, self._until - now,
                )  # fmt: skip

    def _heard(self, number: int) -> None:
        """The first SIGTERM shortens the wait, a second one or Ctrl-C ends it."""
        if number == signal.SIGINT or self._terminated:
            self._until = 0.0
        else:
            self._terminated = True
            self._until = min(self._until, time.monotonic() + self._after_sigterm)


@contextlib.contextmanager
def _hearing(heard: Callable[[int], None]) -> Iterator[None]:
    """Tell `heard` of the signals that would end the process. Only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda n, _frame: heard(n)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


# ── what both callbacks have in common ───────────────────────────────────────────────────────────


class S3Callback(_LightningCallback):
    """Settings, the courier's life from the start of a fit to its end, and the report."""

    folder = ""
    """Where things go below the prefix of the settings."""
    command = ""
    """What sends by hand that which is missing in the end."""
    method = ("", "")
    """The same as a method of S3Sync, and its argument for a full key."""

    def __init__(
        self, s3_bucket: str | None = None, s3_prefix: str | None = None,
        endpoint_url: str | None = None, region: str | None = None, *,
        profile: str | None = None, limit_rate: int | None = None,
        grace: float = GRACE_SECONDS, sigterm_grace: float = SIGTERM_GRACE_SECONDS,
    ) -> None:  # fmt: skip
        """Settings that are not given come from the environment, then from `.env`.

        `s3_prefix` is the folder itself, as in "project/checkpoints"; without it things go to
        "checkpoints" or "logs" below S3_PREFIX. `limit_rate` is in bytes per second. The end of a
        fit waits `grace` seconds at most for what is still to be sent, `sigterm_grace` after a
        SIGTERM. Raises a CloudError when settings are missing: then, and not after a week.
        """
        super().__init__()
        self.courier: Courier | None = None
        self.grace, self.sigterm_grace = grace, sigterm_grace
        self._sync: S3Sync | None = None
        self._reset()
        self._given: dict[str, Any] = {
            "bucket": s3_bucket, "endpoint_url": endpoint_url, "region": region,
            "profile": profile, "limit_rate": limit_rate,
        }  # fmt: skip
        self.s3_prefix = s3_prefix
        self.enabled = _enabled()
        if self.enabled:
            try:
                self._open()
            except CloudError as error:  # no command line is there to show the hint
                raise type(error)(_told(error), error.hint) from error

    def _open(self) -> None:
        """Find bucket and credentials; nothing is asked of the server."""
        if _LightningCallback is object and not TYPE_CHECKING:
            raise MissingPackageError(
                "the Python package lightning is not installed", "pip install lightning"
            )
        from cloud_services import S3Sync
        from cloud_settings import S3Settings

        words = {name: value for name, value in self._given.items() if name != "limit_rate"}
        settings = S3Settings.resolve(**words, prefix=self.s3_prefix)
        given = self.s3_prefix is not None
        self.key = settings.prefix if given else settings.key(self.folder)
        self.place = f"s3://{settings.bucket}/{self.key}"
        above, name = posixpath.split(self.key)
        self._above = above if name == self.folder else self.key
        self._pulse = _Pulse()
        self._sync = S3Sync(prefix=self._above, progress=self._pulse, **self._given)

    @property
    def sync(self) -> S3Sync:
        """The way into the bucket; opened again in a process that a launcher has started."""
        if self._sync is None:
            self._open()
        assert self._sync is not None
        return self._sync

    @property
    def missing(self) -> tuple[Path, ...]:
        """What has not arrived in the bucket."""
        return tuple(task.path for task in self.left())

    def left(self) -> list[Task]:
        """What has not arrived, and why."""
        return self.courier.left() if self.courier else []

    def __getstate__(self) -> dict[str, Any]:
        """Launchers send callbacks to other processes: without thread and connections."""
        return {**self.__dict__, "courier": None, "_sync": None, "_pulse": None}

    # ── hooks

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Move to the end: then every hook comes after that of the ModelCheckpoints.

        Lightning itself puts them behind all other callbacks. The list is replaced, not changed,
        because it is just being gone through.
        """
        if self.enabled and stage == "fit":
            others = [callback for callback in trainer.callbacks if callback is not self]
            trainer.callbacks = [*others, self]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Note what is there already; only rank zero sends."""
        if self.enabled and trainer.is_global_zero:
            name = f"{self.folder} to {self.place}"
            courier = Courier(name, self._gather, self._send)
            if self.courier is not None:
                courier.take_over(self.courier)
            self.sync  # noqa: B018 - opens the bucket in a process that a launcher has started
            courier.pulse = self._pulse
            self._begin(trainer)
            self.courier = courier

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """The training ends early: send what is left, the last checkpoint above all."""
        terminated = type(exception).__name__ == "SIGTERMException"
        _finish(trainer, terminated or bool(getattr(trainer, "received_sigterm", False)))

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """The training is over: send what is left."""
        if stage == "fit":
            _finish(trainer, bool(getattr(trainer, "received_sigterm", False)))

    # ── for the two kinds

    def _reset(self) -> None:
        """Nothing was seen yet."""

    def _begin(self, trainer: Any) -> None:
        raise NotImplementedError

    def _gather(self, closing: bool) -> tuple[Iterable[tuple[Path, Version]], float | None]:
        raise NotImplementedError

    def _send(self, path: Path) -> bool:
        raise NotImplementedError

    def _key_of(self, path: Path) -> str:
        raise NotImplementedError

    def _more_words(self, path: Path) -> list[str]:
        """What the command needs beside the path to find the same key."""
        return []

    def prepare_end(self, trainer: Any) -> None:
        """Find out what is still to be sent."""

    # ── the report

    def report(self) -> None:
        """Say what is missing, and how to send it."""
        assert self.courier is not None
        left = self.left()
        if self.courier.defect:
            log.error("%s: sending broke off: %s", self.courier.name, self.courier.defect)
        if not left:
            log.info("%s: nothing is missing, sent %d times", self.courier.name, self.courier.sent)
            return
        troubles = [task.trouble for task in left if task.trouble not in ("", INCOMPLETE)]
        why = troubles[-1] if troubles else "there was no time left"
        lines = [
            f"  {self._by_hand(task.path)}" + f"  # {INCOMPLETE}" * (task.trouble == INCOMPLETE)
            for task in left
        ]
        log.warning(
            "%d missing of the %s: %s. To send them:\n%s",
            len(left), self.courier.name, why, "\n".join(lines),
        )  # fmt: skip

    def _by_hand(self, path: Path) -> str:
        """The command that sends a file or folder to where the callback would have sent it."""
        key = self._key_of(path)
        given = {name: value for name, value in self._given.items() if value}
        given.pop("limit_rate", None)
        if posixpath.dirname(key) == posixpath.join(self._above, self.folder):
            if self.s3_prefix is not None:
                given["prefix"] = self._above
            flags = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
            words = [self.command, str(path), *self._more_words(path), *sum(flags, ())]
            return printable(shlex.join(["python", "cloud_services.py", *words]))
        settings = ", ".join(f"{name}={value!r}" for name, value in given.items())
        method, word = self.method
        code = f"S3Sync({settings}).{method}({str(path)!r}, {word}={key!r})"
        return shlex.join(["python", "-c", f"from cloud_services import S3Sync; {code}"])


def _enabled() -> bool:
    """Whether ENABLE_S3_SYNC allows it; so it does when it is not set."""
    value = os.environ.get("ENABLE_S3_SYNC")
    if value is None:
        value = dotenv_settings().get("ENABLE_S3_SYNC", "1")
    return value.strip().lower() not in OFF


def _finish(trainer: Any, terminated: bool) -> None:
    """End all our callbacks of a trainer together, so that they share one grace time."""
    ours = [
        callback for callback in trainer.callbacks
        if isinstance(callback, S3Callback) and callback.courier and not callback.courier.closed
    ]  # fmt: skip
    couriers = [callback.courier for callback in ours if callback.courier]
    if not couriers:
        return
    came = False
    try:
        came = _end(trainer, ours, couriers, terminated)
    except Exception:  # a defect of ours is loud, and not the training's
        log.exception("not everything may have arrived in the bucket")
    if came:  # whoever sent it wants more than a shorter wait
        signal.raise_signal(signal.SIGTERM)


def _end(
    trainer: Any, ours: Sequence[S3Callback], couriers: Sequence[Courier], terminated: bool
) -> bool:
    """Wait, and report; whether a SIGTERM came meanwhile."""
    for callback in ours:
        callback.prepare_end(trainer)
    for courier in couriers:
        courier.close()
    grace = max(callback.grace for callback in ours)
    ending = Ending(couriers, grace, max(callback.sigterm_grace for callback in ours))
    came = ending.wait(terminated)
    for callback in ours:
        callback.report()
    return came


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────


class Watch:
    """Finds the checkpoints that were completely written, without asking the training.

    Two looks must find a file the same: it may be written by another thread (AsyncCheckpointIO).
    A torch file must also have its end. While Lightning saves, nothing counts as complete.
    """

    def __init__(self) -> None:
        self.saving = False
        self.roots: dict[Path, Path] = {}
        """Each folder with checkpoints, and the one their names count from."""
        self.expected: tuple[Path, ...] = ()
        """Files that were saved last; a thread may not have written them yet."""
        self._suffix: tuple[str, ...] = (".ckpt",)
        self._known: dict[Path, Version] = {}
        self._arrived: dict[Path, Version] = {}
        self._fresh: dict[Path, tuple[Version, float]] = {}
        self._asked_at = 0.0
        self._warned: set[str] = set()

    def note(self, callbacks: Iterable[Any]) -> None:
        """Learn from ModelCheckpoints where they write."""
        expected = []
        for callback in callbacks:
            root = getattr(callback, "dirpath", None)
            if not root:
                continue
            if "://" in str(root):
                self._warn_once("far", f"{root} is not on this machine: nothing is sent from there")
                continue
            self._note_paths(Path(root).absolute(), callback)
            suffix = str(getattr(callback, "FILE_EXTENSION", "") or ".ckpt")
            if suffix not in self._suffix:
                self._suffix += (suffix,)
            last = Path(getattr(callback, "_last_checkpoint_saved", "")).absolute()
            if last.parent in self.roots and last.name.endswith(self._suffix):
                expected.append(last)
        self.expected = tuple(expected)
        self._asked_at = time.monotonic()

    def _note_paths(self, root: Path, callback: Any) -> None:
        """The folder itself, and those below it that a metric named a/b makes."""
        roots = dict(self.roots)
        roots.setdefault(root, root)
        names = ("_last_checkpoint_saved", "last_model_path", "best_model_path")
        paths = [getattr(callback, name, "") for name in names]
        for path in (*paths, *getattr(callback, "best_k_models", ())):
            above = Path(path).parent
            if path and root in above.parents:
                roots.setdefault(above, root)
        self.roots = roots

    def note_known(self) -> None:
        """What is there by now is not of this training."""
        for path, version in self._there().items():
            if path not in self._known:
                self._known[path] = self._arrived[path] = version

    def look(self, closing: bool) -> tuple[list[tuple[Path, Version]], float | None]:
        """The files that are complete, and in how many seconds to look again."""
        if self.saving:
            return [], LOOK_SECONDS
        now, there = time.monotonic(), self._there()
        fresh = {
            path: version for path, version in there.items() if self._known.get(path) != version
        }
        seen = self._fresh
        since = {
            path: seen[path] if path in seen and seen[path][0] == version else (version, now)
            for path, version in fresh.items()
        }
        ready = {
            path: version for path, (version, first) in since.items()
            if now - first >= LOOK_SECONDS and not self.saving and _has_end(path)
        }  # fmt: skip
        self._known.update(ready)
        self._fresh = {path: about for path, about in since.items() if path not in ready}
        return list(ready.items()), self._next_look(now, closing)

    def _next_look(self, now: float, closing: bool) -> float | None:
        times = [since for _, since in self._fresh.values()]
        if any(self._absent()):
            times.append(self._asked_at)
        if not times:
            return None
        age = now - max(times)
        if closing and age > LONGEST_LOOK_SECONDS:
            return None
        return max(LOOK_SECONDS, min(age / 4, 1.0 if closing else LONGEST_LOOK_SECONDS))

    def _absent(self) -> Iterator[Path]:
        """What was saved, and was never seen."""
        for path in self.expected:
            if path not in self._known and path not in self._fresh and not path.is_dir():
                yield path

    def found(self, path: Path) -> Version | None:
        """What a file looked like when it was found complete; None: it does not look so any more.

        It was removed then, or is being written anew, and will be found again.
        """
        with contextlib.suppress(OSError):
            version = _version(path.stat())
            return version if self._known.get(path) == version else None
        return None

    def note_arrived(self, path: Path, version: Version) -> None:
        """The bucket holds this version."""
        self._arrived[path] = version

    def left(self) -> list[Task]:
        """What is there, or should be, and has not arrived."""
        there = self._there()
        there |= {path: Version(0, 0, 0) for path in self._absent() if path not in there}
        return [
            Task(path, version, trouble="" if self._known.get(path) == version else INCOMPLETE)
            for path, version in there.items()
            if self._arrived.get(path) != version
        ]

    def name(self, path: Path) -> str:
        """What a checkpoint is called in the bucket."""
        return path.relative_to(self.roots[path.parent]).as_posix()

    def _there(self) -> dict[Path, Version]:
        """The checkpoints in all folders, and what they look like."""
        found: dict[Path, Version] = {}
        for folder in self.roots:
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith(self._suffix) and not entry.name.startswith("."):
                        with contextlib.suppress(OSError):
                            found |= self._look_at(entry)
        return found

    def _look_at(self, entry: os.DirEntry[str]) -> dict[Path, Version]:
        if entry.is_dir():
            self._warn_once(
                "folder",
                f"{entry.path} is a folder: sharded checkpoints are not supported, and not sent; "
                f"python cloud_services.py s3-upload-dataset {shlex.quote(entry.path)} sends one",
            )
            return {}
        return {Path(entry.path): _version(entry.stat())}

    def _warn_once(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s", printable(text))


def _version(status: os.stat_result) -> Version:
    return Version(status.st_mtime_ns, status.st_size, status.st_ino)


def _has_end(path: Path) -> bool:
    """Whether a file is not empty and, as the zip file that torch writes, not cut off."""
    try:
        with open(path, "rb") as stream:
            start = stream.read(2)
            return bool(start) and (start != b"PK" or zipfile.is_zipfile(stream))
    except OSError:
        return False


class S3CheckpointCallback(S3Callback):
    """Sends every checkpoint that Lightning writes to a bucket, as soon as it is complete.

        trainer = Trainer(callbacks=[S3CheckpointCallback(
            s3_bucket="your-bucket", s3_prefix="project/checkpoints", endpoint_url="https://…",
        )])

    The ModelCheckpoints of the trainer decide what is written and what it is called. What was in
    their folders before is left alone, and so is what `trainer.save_checkpoint` writes elsewhere.
    """  # fmt: skip

    folder, command = "checkpoints", "s3-upload-checkpoint"
    method = ("upload_checkpoint", "key")

    def _reset(self) -> None:
        self._watch = Watch()
        self._state: list[tuple[Any, ...]] = []
        self._owners: dict[str, Path] = {}
        self._names: dict[Path, str] = {}

    def left(self) -> list[Task]:
        known = {task.path: task for task in super().left()}
        on_disk = self._watch.left() if self.courier else []
        return [task if task.trouble else known.get(task.path, task) for task in on_disk]

    def _begin(self, trainer: Any) -> None:
        self._watch.saving = False
        self._watch.note(trainer.checkpoint_callbacks)
        self._watch.note_known()
        self._state = _saved_last(trainer)
        self._owners.clear()
        self._names.clear()

    def _gather(self, closing: bool) -> tuple[Iterable[tuple[Path, Version]], float | None]:
        found, again = self._watch.look(closing)
        for path, _ in found:  # in the order of the ModelCheckpoints
            self._name(path)
        return found, again

    def _send(self, path: Path) -> bool:
        version = self._watch.found(path)
        if version is not None:
            self.sync.upload_checkpoint(path, key=self._key_of(path))
            self._watch.note_arrived(path, version)
        return version is not None

    def _key_of(self, path: Path) -> str:
        return f"{self.key}/{self._name(path)}".lstrip("/")

    def _name(self, path: Path) -> str:
        """Its name; one that a file of another folder has already gets the folder's in front."""
        if path not in self._names:
            name, above = self._watch.name(path), path.parent
            while self._owners.setdefault(name, path) != path:
                name, above = f"{above.name}/{name}", above.parent
            if name != self._watch.name(path):
                log.warning("%s is sent as %s", *map(printable, (path, name)))
            self._names[path] = name
        return self._names[path]

    # ── hooks

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Lightning is about to write: until the next hook no file counts as complete."""
        self._watch.saving = self.courier is not None

    def on_train_batch_end(self, trainer: Any, *_about: Any, **_more: Any) -> None:
        """After each step: a comparison of what ModelCheckpoints remember, and no more."""
        if self.courier is not None and self._state != (state := _saved_last(trainer)):
            self._state = state
            self._look(trainer)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """The ModelCheckpoints have written what they write at the end of an epoch."""
        self._look(trainer)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """The ModelCheckpoints have written what they write after a validation."""
        self._look(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The ModelCheckpoints have written what they write in the end."""
        self._look(trainer)

    def prepare_end(self, trainer: Any) -> None:
        self._look(trainer)

    def _look(self, trainer: Any) -> None:
        if self.courier is not None:
            self._watch.saving = False
            self._watch.note(trainer.checkpoint_callbacks)
            self.courier.wake()


def _saved_last(trainer: Any) -> list[tuple[Any, ...]]:
    """What changes in the ModelCheckpoints whenever one of them saves."""
    names = ("_last_global_step_saved", "_last_checkpoint_saved", "last_model_path")
    return [
        tuple(getattr(callback, name, None) for name in names)
        for callback in trainer.checkpoint_callbacks
    ]


# ── logs ─────────────────────────────────────────────────────────────────────────────────────────


class S3LogsCallback(S3Callback):
    """Mirrors the loggers' folders to a bucket after each epoch, without checkpoints.

        trainer = Trainer(callbacks=[S3LogsCallback(
            s3_bucket="your-bucket", s3_prefix="project/logs", endpoint_url="https://…",
        )])

    Each goes to a folder of its own name, such as version_3. Loggers that write no folder of their
    own (`log_dir`) have nothing to mirror.
    """  # fmt: skip

    folder, command = "logs", "s3-upload-logs"
    method = ("upload_logs", "prefix")

    def _reset(self) -> None:
        self._runs: dict[Path, str] = {}
        self._writers: list[Any] = []
        self._wanted = False
        self._free_at = 0.0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_writers": []}

    def left(self) -> list[Task]:
        wanted = [path for path in self._runs if _has_files(path)] if self._wanted else []
        tasks = [*(Task(path, Version(0, 0, 0)) for path in wanted), *super().left()]
        return list({task.path: task for task in tasks}.values())

    def _begin(self, trainer: Any) -> None:
        self._runs = _log_folders(trainer.loggers)
        self._writers = [
            writer for logger in trainer.loggers if hasattr(logger, "log_dir")
            if callable(getattr(writer := getattr(logger, "experiment", None), "flush", None))
        ]  # fmt: skip
        if not self._runs:
            log.warning("no logger writes to a folder of its own: no logs are sent")

    def _gather(self, closing: bool) -> tuple[Iterable[tuple[Path, Version]], float | None]:
        pause = self._free_at - time.monotonic()
        if self._wanted and (closing or pause <= 0):
            self._wanted = False
            version = Version(time.time_ns(), 0, 0)
            return [(folder, version) for folder in self._runs if _has_files(folder)], None
        return (), pause if self._wanted else None

    def _send(self, path: Path) -> bool:
        started = time.monotonic()
        for writer in self._writers:
            writer.flush()
        try:
            done = self.sync.upload_logs(path, prefix=self._key_of(path))
        finally:
            now = time.monotonic()
            self._free_at = now + max(LOGS_PAUSE, LOGS_SHARE * (now - started))
        if not done:
            raise IntegrityError(f"{len(done.failures)} logs did not arrive: {done.failures[0]}")
        return True

    def _key_of(self, path: Path) -> str:
        return f"{self.key}/{self._runs[path]}".lstrip("/")

    def _more_words(self, path: Path) -> list[str]:
        return [] if self._runs[path] == path.name else [self._runs[path]]

    # ── hooks

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Mirror, unless it was done a moment ago."""
        if self.courier is not None:
            self._wanted = True
            self.courier.wake()

    def prepare_end(self, trainer: Any) -> None:
        for logger in trainer.loggers:
            with contextlib.suppress(Exception):  # Lightning saves it once more, and says why not
                logger.save()
        self._wanted = True


def _has_files(folder: Path) -> bool:
    """A logger makes its folder early, and may write nothing to it for a while."""
    left_out = (".ckpt", ".tmp", ".part")
    return any(path.suffix not in left_out and path.is_file() for path in folder.rglob("*"))


def _log_folders(loggers: Iterable[Any]) -> dict[Path, str]:
    """The folders that loggers write to, each with the name of its run; never the current one."""
    runs: dict[Path, str] = {}
    for logger in loggers:
        given = getattr(logger, "log_dir", None)
        if not given or "://" in str(given):
            continue
        folder = Path(given).absolute()
        if folder in (Path.cwd(), *Path.cwd().parents):
            log.warning(
                "%s holds more than logs: they are not sent; give the logger a name",
                printable(folder),
            )
            continue
        run, above = folder.name, folder.parent
        while run in runs.values() and folder not in runs:
            run, above = f"{above.name}-{run}", above.parent
        runs.setdefault(folder, run)
    return runs
