"""A local S3-compatible server over one folder: the storage of `cloud_services.py serve`.

    with StorageServer(StorageSettings(storage_dir="/data/s3", port=0)) as server:
        client = boto3.client("s3", endpoint_url=server.url, ...)

It serves S3 at `/` and the same at `/api/cloud/storage/{bucket}/{key}`, to signed requests only.
What is acknowledged is on the disk. It listens on loopback unless told otherwise.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from cloud_jobs.object_store import ObjectStore
from cloud_jobs.s3_requests import ALIAS, Hosts
from cloud_jobs.storage_keys import (
    DEFAULT_RIGHTS,
    RIGHTS,
    Credential,
    StorageKey,
    StorageKeys,
    check_given_key,
)
from cloud_services import (
    AccessError,
    CloudError,
    RefusedError,
    UsageError,
    local_errors,
    need,
    printable,
)

if TYPE_CHECKING:
    import uvicorn

    from cloud_jobs.s3_service import S3Service

__all__ = [
    "ALIAS", "DEFAULT_RIGHTS", "RIGHTS", "StorageKey", "StorageKeys", "StorageServer",
    "StorageSettings", "serve",
]  # fmt: skip

log = logging.getLogger("cloud_services.storage")

START_SECONDS = 30.0
STOP_SECONDS = 30.0
"""A request that runs when the server stops has so long to end."""

BACKLOG = 1024


@dataclass(frozen=True)
class StorageSettings:
    """How to serve. Without keys the folder's own are used, or made at the first start."""

    storage_dir: str | Path = "~/.cloud_services/storage"
    host: str = "127.0.0.1"
    port: int = 9000
    """0: one that is free."""
    access_key: str | None = None
    secret_key: str | None = field(default=None, repr=False)
    allow_remote: bool = False
    allowed_hosts: tuple[str, ...] = ()
    """Further names by which clients call the server; `bucket.name` addresses a bucket."""
    fsync: bool = True
    """False: what was written last may be lost when the machine, not the program, stops."""
    certificate: str | Path | None = None
    """A file in PEM form, and the file of its key: then the server speaks https only."""
    certificate_key: str | Path | None = None

    @property
    def folder(self) -> Path:
        """Where everything is kept."""
        return Path(self.storage_dir).expanduser()

    @property
    def is_remote(self) -> bool:
        """Whether others than this machine can reach it."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host.lower() != "localhost"

    @property
    def opens(self) -> str:
        """What it means to listen where others can reach it; "" on loopback."""
        if not self.is_remote:
            return ""
        plain = "" if self.certificate else ", and without https all of it can be read on the way"
        return (
            f"every machine that reaches {printable(self.host)}:{self.port} can try keys there; who"
            f" has one reads and writes what it allows{plain}"
        )

    def check(self) -> None:
        """UsageError or RefusedError for settings that make no sense or open too much."""
        if not 0 <= self.port < 65536:
            raise UsageError(f"{self.port} is no port number", "use --port 9000")
        if (self.access_key is None) != (self.secret_key is None):
            raise UsageError(
                "an access key and a secret key belong together",
                "give both --access-key and --secret-key, or neither",
            )
        if self.access_key is not None and self.secret_key is not None:
            check_given_key(self.access_key, self.secret_key)
        if (self.certificate is None) != (self.certificate_key is None):
            raise UsageError(
                "a certificate and its key belong together",
                "give both --certificate and --certificate-key",
            )
        if self.is_remote and not self.allow_remote:
            raise RefusedError(
                f"{printable(self.host)} is not loopback: {self.opens}",
                "add --allow-remote if that is what you want, or use --host 127.0.0.1",
            )


class StorageServer:
    """The server, in a thread of this process; use it with `with`, or `start` and `stop` it.

    Raises MissingPackageError, UsageError for a port that is taken, AccessError for a folder or a
    certificate that cannot be used, RefusedError for a folder that another server has open.
    """

    def __init__(self, settings: StorageSettings) -> None:
        """Nothing is opened yet."""
        settings.check()
        for module in ("uvicorn", "httptools", "cryptography", "awscrt"):
            need(module)
        self.settings = settings
        self.new_key = False
        """Whether the key was made by this start: then it is to be shown, once."""
        self.port = settings.port
        self._root: Credential | None = None
        self._open = contextlib.ExitStack()
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._store: ObjectStore | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.cut_off: tuple[str, ...] = ()
        """The requests that the last stop did not wait for any longer: method and path of each."""

    @property
    def url(self) -> str:
        """The endpoint for clients on this machine."""
        host = self.settings.host
        if host in ("0.0.0.0", "::", ""):  # noqa: S104 - that is where it listens, not whom to call
            host = "127.0.0.1"
        scheme = "https" if self.settings.certificate else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def access_key(self) -> str:
        """The name of the key that may do all."""
        return self._credential.access_key

    @property
    def secret_key(self) -> str:
        """Its secret."""
        return self._credential.secret_key

    def start(self) -> None:
        """Open the folder and listen; returns when requests are answered.

        A start that fails leaves nothing open.
        """
        self.cut_off = ()
        with contextlib.ExitStack() as opening:
            listener = opening.enter_context(contextlib.closing(_listen(self.settings)))
            self.port = int(listener.getsockname()[1])
            config = self._config()
            store = ObjectStore(self.settings.folder, self.settings.fsync)
            opening.callback(store.close)
            keys = StorageKeys(self.settings.folder)
            opening.callback(keys.close)
            service = self._service(store, keys)
            opening.callback(service.close)
            self._run(config, listener, service)
            self._open = opening.pop_all()

    def make_bucket(self, name: str) -> None:
        """Make a bucket where there is none of that name; UsageError for what is no name."""
        from cloud_jobs import object_changes
        from cloud_jobs.s3_errors import S3Error
        from cloud_jobs.s3_requests import check_bucket_name

        async def make(store: ObjectStore) -> None:
            await store.write(object_changes.create_bucket(name))

        try:
            check_bucket_name(name)
            store, loop = self._inside()
            asyncio.run_coroutine_threadsafe(make(store), loop).result()
        except S3Error as error:
            if error.code != "BucketAlreadyOwnedByYou":
                raise UsageError(
                    f"{printable(name)!r} is no name for a bucket",
                    "use 3 to 63 of the letters a-z, digits, '.' and '-'",
                ) from error

    def stop(self, force: bool = False) -> None:
        """Take no more requests, finish those that run, close the folder.

        What is not over after STOP_SECONDS is cut off, and named in a warning and in `cut_off`.
        force: those that run are cut off at once. Raises CloudError where the server had ended
        before.
        """
        if self._server is not None and self._thread is not None:
            self._server.force_exit = force
            self._server.should_exit = True
            self._thread.join()
        self._server = self._thread = self._store = self._loop = None
        self._open.close()
        if self._failure is not None:
            raise CloudError("the server ended by an error of its own") from self._failure

    @property
    def running(self) -> bool:
        """Whether it answers."""
        return self._thread is not None and self._thread.is_alive()

    def hurry(self) -> None:
        """Let a `stop` in another thread wait for no request any longer."""
        if self._server is not None:
            self._server.force_exit = True

    def __enter__(self) -> StorageServer:
        """Listen."""
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish what runs, and end."""
        self.stop()

    # inside

    def _inside(self) -> tuple[ObjectStore, asyncio.AbstractEventLoop]:
        if self._store is None or self._loop is None:
            raise _not_started()
        return self._store, self._loop

    @property
    def _credential(self) -> Credential:
        if self._root is None:
            raise _not_started()
        return self._root

    def _service(self, store: ObjectStore, keys: StorageKeys) -> S3Service:
        from cloud_jobs import s3_buckets, s3_multipart, s3_objects  # noqa: F401 - they register
        from cloud_jobs.s3_service import S3Service

        settings = self.settings
        if settings.access_key is not None and settings.secret_key is not None:
            self._root = Credential(settings.access_key, settings.secret_key)
        else:
            self._root, self.new_key = keys.root()
        names = [settings.host, *settings.allowed_hosts]
        if settings.is_remote:
            names.append(socket.gethostname())
        return S3Service(store, keys, self._root, Hosts(filter(None, names), settings.is_remote))

    def _config(self) -> uvicorn.Config:
        import uvicorn

        from cloud_jobs.s3_protocol import S3Protocol

        certificate, key = self.settings.certificate, self.settings.certificate_key
        config = uvicorn.Config(
            _no_app, http=S3Protocol, ws="none", lifespan="off", access_log=False, log_config=None,
            server_header=False, proxy_headers=False, backlog=BACKLOG, timeout_keep_alive=60,
            ssl_certfile=certificate and os.fspath(certificate),
            ssl_keyfile=key and os.fspath(key),
        )  # fmt: skip
        try:
            with local_errors(str(certificate)):
                config.load()
        except ssl.SSLError as error:
            raise AccessError(
                f"{printable(certificate)} and {printable(key)} are no certificate and its key",
                "give both in PEM form",
            ) from error
        return config

    def _run(self, config: uvicorn.Config, listener: socket.socket, service: S3Service) -> None:
        import uvicorn

        config.loaded_app = service
        server = self._server = uvicorn.Server(config)

        async def run() -> None:
            self._store, self._loop = service.store, asyncio.get_running_loop()
            await service.reap()
            watching = [
                asyncio.ensure_future(service.watch(server.server_state.connections)),
                asyncio.ensure_future(self._limit_stop(server, service)),
            ]
            try:
                await server.serve(sockets=[listener])
            finally:
                for task in watching:
                    task.cancel()
                await self._cut_off(server, service)

        def in_thread() -> None:
            try:
                _run_on(config, run)
            except BaseException as error:
                self._failure = error

        self._thread = threading.Thread(target=in_thread, name="storage-server", daemon=True)
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                self._give_up_start(server, self._thread)
            time.sleep(0.002)

    def _give_up_start(self, server: uvicorn.Server, thread: threading.Thread) -> NoReturn:
        server.should_exit = server.force_exit = True
        thread.join()
        failure, self._failure = self._failure, None
        self._server = self._thread = self._store = self._loop = None
        raise CloudError("the server did not start") from failure

    async def _limit_stop(self, server: uvicorn.Server, service: S3Service) -> None:
        """Once a stop was asked for, cut off what is not over in time, or at once where told to."""
        while not server.should_exit:
            await asyncio.sleep(0.1)
        deadline = time.monotonic() + STOP_SECONDS
        while not server.force_exit and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        await self._cut_off(server, service)
        server.force_exit = True

    async def _cut_off(self, server: uvicorn.Server, service: S3Service) -> None:
        """End what still runs, and give it a moment to notice."""
        cut = service.cut_off()
        for shown in cut:
            log.warning("cut off by the stop of the server: %s", shown)
        self.cut_off += cut
        left = list(server.server_state.connections)
        for connection in left:
            transport: Any = connection.transport
            transport.abort()
        if cut or left:
            await asyncio.sleep(0.1)


def _not_started() -> UsageError:
    return UsageError("the server has not been started", "use it with `with`")


def serve(settings: StorageSettings, started: Callable[[StorageServer], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish the requests that run; again: do not wait.

    started: called when requests are answered, to show address and key. Main thread only.
    """
    server = StorageServer(settings)
    asked = threading.Event()

    def on_signal(_number: int, _frame: Any) -> None:
        if asked.is_set():
            server.hurry()
        asked.set()

    with _handling(on_signal):
        server.start()
        try:
            started(server)
            while server.running and not asked.wait(0.5):
                pass
        finally:
            stopping = threading.Thread(target=server.stop, name="storage-stop")
            stopping.start()
            while stopping.is_alive():  # a plain join would keep the second signal waiting
                stopping.join(0.2)


@contextlib.contextmanager
def _handling(on_signal: Callable[[int, Any], None]) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listen(settings: StorageSettings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise _listen_error(settings, error) from error
    listener.setblocking(False)
    return listener


def _listen_error(settings: StorageSettings, error: OSError) -> CloudError:
    where = f"{printable(settings.host)}:{settings.port}"
    if error.errno == errno.EADDRINUSE:
        return UsageError(
            f"{where} is taken: another program listens there", "choose another --port"
        )
    if error.errno == errno.EACCES:
        return AccessError(f"{where}: permission denied", "choose a --port above 1023")
    return UsageError(f"{where} cannot be listened on: {error.strerror or error}", "check --host")


def _run_on(config: uvicorn.Config, run: Callable[[], Any]) -> None:
    """Run on uvloop where it is installed, as uvicorn would; it is no need."""
    factory: Any = config.get_loop_factory()
    loop = factory() if factory else asyncio.new_event_loop()
    try:
        loop.run_until_complete(run())
    finally:
        loop.run_until_complete(_cancel(asyncio.all_tasks(loop)))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    """What still runs ends now."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _no_app(scope: Any, receive: Any, send: Any) -> None:
    """Stands where the application will be."""
