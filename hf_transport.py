"""The Hugging Face Hub: listings, commits and downloads of one repository, exact or an error.

A satellite of cloud_services, imported when a command needs the Hub. Listings, files and commits go
over plain HTTP here: what is read is resumable and verified, what is written are bounded commits on
a known parent. Content too large for a commit is brought to the Hub's storage by huggingface_hub,
which knows LFS and Xet; it is imported when there is some.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import email.message
import functools
import hashlib
import http.client
import importlib
import importlib.util
import io
import json
import os
import re
import socket
import ssl
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextvars import ContextVar
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from cloud_services import (
    KIB,
    MIB,
    SAME_COMMAND,
    AccessError,
    Advance,
    CloudError,
    ConnectError,
    DiskFullError,
    IntegrityError,
    LinkLostError,
    NotFoundError,
    Progress,
    RefusedError,
    Step,
    T,
    TransferError,
    UsageError,
    __version__,
    free_space,
    human_bytes,
    in_background,
    local_errors,
    lock_part,
    log,
    need,
    open_for_update,
    part_name,
    printable,
    require_space,
    with_retries,
    write_all,
)
from cloud_settings import HubSettings
from hash_cache import HashCache

MAX_FILE_BYTES = 500_000_000_000
MAX_PLAIN_DOWNLOAD_BYTES = 50_000_000_000
MANY_FILES_A_FOLDER, MANY_FILES_A_REPO = 10_000, 100_000
"""The Hub's limits: https://huggingface.co/docs/hub/storage-limits"""

MAX_REGULAR_BYTES = 10_000_000
"""Larger files never go into a commit themselves, but into LFS or Xet storage."""

COMMIT_FILES, COMMIT_REGULAR_BYTES, COMMIT_BYTES = 500, 24_000_000, 4_000_000_000
"""One commit takes at most so many files, bytes in its own body, and bytes at all."""

READ_AT_ONCE_BYTES = MIB
"""A file of at most this size is read once, to be hashed and sent from memory."""

PREUPLOAD_FILES, SAMPLE_BYTES = 256, 512
"""The Hub is asked about so many files at once, and shown so much of each: its client's numbers."""

SEND_BYTES = 256 * KIB
"""A request's body goes in such pieces: the timeout is for each."""

DOWNLOAD_THREADS = 8
HASH_THREADS = 4
CSV_IN_LFS = "*.csv filter=lfs diff=lfs merge=lfs -text"
LFS_CSV_BYTES = 1_000_000
"""From this size on a CSV is worth keeping in Xet storage, where appending costs little."""

Headers = Mapping[str, str] | email.message.Message

# ── errors ───────────────────────────────────────────────────────────────────────────────────────


class ParentMovedError(LinkLostError):
    """Somebody else committed in between; a new look at the repository settles it."""


class ExistsError(TransferError):
    """The Hub has that repository already."""


class NoEntryError(NotFoundError):
    """The repository is there, a file or folder in it is not."""


class RateLimitedError(TransferError):
    """The Hub wants a pause of `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__("the Hub's rate limit is reached", SAME_COMMAND)
        self.seconds = seconds


def _status_error(
    settings: HubSettings, status: int, headers: Headers, text: str, url: str, doing: str
) -> CloudError:
    """What an answer with an HTTP error status means to one who is `doing` "read" or "write"."""
    said = _without_token(settings, headers.get("X-Error-Message") or text)[:300]
    if status == 429:
        return RateLimitedError(_pause_asked_for(headers))
    if status in (401, 403, 404, 410) and _origin(url) != _origin(settings.endpoint):
        # A signed address that has expired, most likely: the next attempt gets a new one.
        return LinkLostError(f"the Hub's storage has status {status}: {said}", SAME_COMMAND)
    return (
        _known_code(settings, headers.get("X-Error-Code") or "", status, said)
        or _refusal(settings, status, said, doing)
        or _passing_trouble(settings, status, said)
    )


def _known_code(settings: HubSettings, code: str, status: int, said: str) -> CloudError | None:
    """What the Hub's own error codes mean."""
    if code == "RepoNotFound" and (status != 401 or not settings.token):
        return _missing_repo(settings)
    if code == "GatedRepo":
        return AccessError(
            f"{settings.repo_id} is gated: its owner has to let you in",
            f"ask for access at {settings.endpoint}/{_prefix(settings)}{settings.repo_id}",
        )
    if code == "RevisionNotFound":
        return NotFoundError(
            f"{settings.repo_id} has no revision {printable(settings.revision)}",
            "check --revision: a branch, a tag or a commit",
        )
    if code == "EntryNotFound":
        return NoEntryError(f"{settings.repo_id}: {said or 'no such file'}")
    return None


def _refusal(settings: HubSettings, status: int, said: str, doing: str) -> CloudError | None:
    """What no second try would change."""
    where = f"{settings.endpoint}/settings/tokens"
    if status == 401:
        why = "does not accept the token" if settings.token else "asks for a token"
        return AccessError(f"{settings.endpoint} {why}", f"make one at {where}: export HF_TOKEN=…")
    if status == 403:
        return AccessError(
            f"the token may not {doing} {'to ' * (doing == 'write')}{settings.repo_id}:"
            f" {said or 'forbidden'}",
            f"make a token with the role '{doing}' at {where}: export HF_TOKEN=…",
        )
    if status == 404:
        return _missing_repo(settings)
    if status == 413:
        return RefusedError(f"the Hub refuses this as too large: {said}", "send smaller files")
    return None


def _passing_trouble(settings: HubSettings, status: int, said: str) -> CloudError:
    if status == 412:
        return ParentMovedError(f"somebody else changed {settings.repo_id} meanwhile", SAME_COMMAND)
    busy = status == 409 and "conflicting operation is in progress" in said
    passing = status >= 500 or status == 408 or busy
    kind = LinkLostError if passing else ExistsError if status == 409 else TransferError
    return kind(f"the Hub answers with status {status}: {said}", SAME_COMMAND)


def _missing_repo(settings: HubSettings) -> NotFoundError:
    name = f"the {settings.repo_type} {settings.repo_id}"
    if settings.token:
        return NotFoundError(
            f"{name} does not exist, or is private and this token cannot see it",
            "check --repo-id; an upload makes a missing one unless --no-create is given",
        )
    return NotFoundError(
        f"{name} does not exist, or is private and there is no token",
        "check --repo-id; for a private one: export HF_TOKEN=…",
    )


def _pause_asked_for(headers: Headers) -> float:
    """Seconds to wait, from Retry-After or `RateLimit: "api";r=0;t=55` (an IETF draft)."""
    after = headers.get("Retry-After") or ""
    reset = re.search(r"\bt=(\d+)", headers.get("RateLimit") or "")
    seconds = int(after) if after.isdecimal() else int(reset[1]) if reset else 60
    return float(min(max(seconds, 1), 3600))


_ours: ContextVar[bool] = ContextVar("_ours", default=False)
"""Whether a request of huggingface_hub is made for us, in this thread."""


@contextlib.contextmanager
def _client_errors(settings: HubSettings) -> Iterator[None]:
    """Turn what huggingface_hub raises into CloudErrors; what is unknown stays loud."""
    before = _ours.set(True)
    try:
        yield
    except CloudError:
        raise
    except Exception as error:
        translated = _translated(settings, error)
        if translated is None:
            raise
        raise translated from error
    finally:
        _ours.reset(before)


def _translated(settings: HubSettings, error: BaseException) -> CloudError | None:
    hub = need("huggingface_hub")
    wire = _client_wire()
    response = getattr(error, "response", None)
    if response is not None:
        said = str(getattr(error, "server_message", "") or "")
        url = str(response.request.url)
        return _status_error(settings, response.status_code, response.headers, said, url, "write")
    if isinstance(error, hub.errors.OfflineModeIsEnabled):
        return ConnectError("HF_HUB_OFFLINE is set: nothing is sent", "unset HF_HUB_OFFLINE")
    if isinstance(error, wire.ConnectError):
        return _unreachable(settings, error, settings.endpoint)
    if isinstance(error, (wire.HTTPError, wire.TimeoutException)):
        return LinkLostError(f"lost the Hub: {_plain_text(settings, error)}", SAME_COMMAND)
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        with local_errors(str(error.filename)):
            raise error
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        cause = error.__cause__
        return cause if isinstance(cause, CloudError) else _translated(settings, cause)
    if isinstance(error, (RuntimeError, ConnectionError, TimeoutError)):  # hf_xet's own
        text = _plain_text(settings, error)
        return LinkLostError(f"the Hub's storage failed: {text}", SAME_COMMAND)
    if isinstance(error, ValueError) and "LFS" in str(error):
        text = _plain_text(settings, error)
        return TransferError(f"the Hub's storage refuses: {text}", SAME_COMMAND)
    return None


def _unreachable(settings: HubSettings, error: BaseException, where: str) -> ConnectError:
    return ConnectError(
        f"{printable(where)} cannot be reached: {_plain_text(settings, error)}",
        "check the network, and HF_ENDPOINT if it is set",
    )


def _plain_text(settings: HubSettings, error: BaseException) -> str:
    """An error's text without the token, and without the signed part of any address in it."""
    text = str(error) or type(error).__name__
    return _without_token(settings, re.sub(r"\?[^\s'\")]+", "?…", text.split("\n")[0]))[:300]


def _without_token(settings: HubSettings, text: str) -> str:
    """What somebody else said, for people to read: it may have been said with our token in it."""
    return printable(text.replace(settings.token, "…") if settings.token else text)


# ── reading over HTTP ────────────────────────────────────────────────────────────────────────────


class _Body(NamedTuple):
    """What a POST sends."""

    content: bytes
    kind: str = "application/json"

    def pieces(self) -> Iterator[bytes]:
        """The content, bit by bit."""
        for start in range(0, len(self.content), SEND_BYTES):
            yield self.content[start : start + SEND_BYTES]


class _Wire:
    """HTTP requests: each thread keeps its connections, the token goes to the Hub alone."""

    REDIRECTS = 5
    PAUSES = 20

    def __init__(self, settings: HubSettings) -> None:
        self._settings = settings
        self._own = threading.local()
        self._hold_until = 0.0

    @contextlib.contextmanager
    def get(
        self, url: str, start: int = 0, body: _Body | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        """The answer to a GET, from the byte `start` on, or to a POST of `body`; after redirects.

        Raises what the status means. A connection whose answer was not read to its end is closed.
        """
        headers = {"Range": f"bytes={start}-"} if start else {}
        connection, response = self._follow(url, headers, body)
        try:
            yield response
        except BaseException:
            connection.close()
            raise
        if not response.isclosed():
            connection.close()

    def json(
        self, url: str, document: Mapping[str, Any] | None = None
    ) -> tuple[Any, email.message.Message]:
        """A JSON document and its headers, in answer to a document if there is one; patiently."""
        body = None if document is None else _Body(json.dumps(document).encode())
        return self._parsed(self.patiently(lambda: self._read(url, body)))

    def json_once(self, url: str, body: _Body | None = None) -> Any:
        """A JSON document that is asked for once: only a rate limit is sat out."""
        return self._parsed(self.in_turn(lambda: self._read(url, body)))[0]

    def _read(self, url: str, body: _Body | None = None) -> tuple[bytes, email.message.Message]:
        with self.get(url, body=body) as response, self.reading():
            return response.read(), response.headers

    def _parsed(
        self, answer: tuple[bytes, email.message.Message]
    ) -> tuple[Any, email.message.Message]:
        with self.understanding():
            return json.loads(answer[0]), answer[1]

    @contextlib.contextmanager
    def understanding(self) -> Iterator[None]:
        """Around looking into a document: one of another shape is none of the Hub's."""
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise TransferError(
                f"{self._settings.endpoint} does not answer as the Hub does",
                "check HF_ENDPOINT, and whether a proxy or a login page is in between",
            ) from error

    def succeeds(self, url: str) -> None:
        """Ask, and raise what the answer's status means; patiently."""
        self.patiently(lambda: self._read(url))

    def patiently(self, attempt: Callable[[], T]) -> T:
        """Call `attempt`; again after a lost link, and after the pause that the Hub asks for."""
        return self.in_turn(lambda: with_retries(attempt))

    def in_turn(self, attempt: Callable[[], T]) -> T:
        """Call `attempt`; again after the pause that the Hub asks for, but not for ever."""
        for _ in range(self.PAUSES):
            self.wait_for_turn()
            try:
                return attempt()
            except RateLimitedError as error:
                self.hold(error.seconds)
        raise TransferError("the Hub's rate limit stays reached", SAME_COMMAND)

    def hold(self, seconds: float) -> None:
        """Let every thread pause so long."""
        self._hold_until = max(self._hold_until, time.monotonic() + seconds)

    def wait_for_turn(self) -> None:
        """Sit out a pause that the Hub asked for, counting down in the log."""
        left = self._hold_until - time.monotonic()
        while left > 0:
            log.warning("the Hub's rate limit is reached: going on in %.0f s", left)
            time.sleep(min(left, 10))
            left = self._hold_until - time.monotonic()

    def _follow(
        self, url: str, headers: Mapping[str, str], body: _Body | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        redirects = (301, 302, 303, 307, 308) if body is None else (307, 308)
        for _ in range(self.REDIRECTS):
            connection, response = self._send(url, headers, body)
            try:
                with self.reading():
                    if response.status not in redirects:
                        self._require_success(response, url, "read" if body is None else "write")
                        return connection, response
                    response.read()
            except BaseException:
                connection.close()
                raise
            with self.understanding():
                url = urllib.parse.urljoin(url, response.headers.get("Location") or "")
        raise TransferError("the Hub redirects in circles", SAME_COMMAND)

    def _require_success(self, response: http.client.HTTPResponse, url: str, doing: str) -> None:
        remaining = re.search(r"\br=0\b", response.headers.get("RateLimit") or "")
        if remaining:
            self.hold(_pause_asked_for(response.headers))
        if response.status < 300:
            return
        text = response.read(64 * 1024)
        with contextlib.suppress(ValueError, AttributeError):
            text = str(json.loads(text).get("error", "")).encode()
        said = text.decode("utf-8", "replace")
        doing = "write" if url.endswith("/auth-check/write") else doing
        raise _status_error(self._settings, response.status, response.headers, said, url, doing)

    def _send(
        self, url: str, more: Mapping[str, str], body: _Body | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        """One request over this thread's connection; a stale one is replaced once."""
        with self.understanding():
            parts, origin = urllib.parse.urlsplit(url), _origin(url)
        headers = {
            "Accept-Encoding": "identity", "User-Agent": f"cloud_services/{__version__}", **more
        }  # fmt: skip
        if self._settings.token and origin == _origin(self._settings.endpoint):
            headers["Authorization"] = f"Bearer {self._settings.token}"
        if body is not None:
            headers |= {"Content-Type": body.kind, "Content-Length": str(len(body.content))}
        method, pieces = ("GET", None) if body is None else ("POST", body.pieces)
        target = parts.path + (f"?{parts.query}" if parts.query else "")
        fresh = False
        while True:
            connection = self._connections.get(origin)
            if connection is None:
                connection, fresh = self._connect(parts.scheme, parts.netloc), True
            try:
                connection.request(method, target, pieces and pieces(), headers)
                return connection, connection.getresponse()
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                self._connections.pop(origin, None)
                if fresh or isinstance(error, TimeoutError):
                    raise self._lost(error) from error

    @property
    def _connections(self) -> dict[str, http.client.HTTPConnection]:
        if not hasattr(self._own, "connections"):
            self._own.connections = {}
        connections: dict[str, http.client.HTTPConnection] = self._own.connections
        return connections

    def _connect(self, scheme: str, netloc: str) -> http.client.HTTPConnection:
        try:
            connection = _open_connection(scheme, netloc, self._settings.timeout)
            connection.connect()
            connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            where = f"{scheme}://{netloc.rpartition('@')[2]}"
            raise _unreachable(self._settings, error, where) from error
        self._connections[f"{scheme}://{netloc}"] = connection
        return connection

    def _lost(self, error: BaseException) -> LinkLostError:
        if isinstance(error, TimeoutError):
            silent = f"nothing was heard for {self._settings.timeout:g} s"
            return LinkLostError(f"lost the Hub: {silent}", SAME_COMMAND)
        return LinkLostError(f"lost the Hub: {_plain_text(self._settings, error)}", SAME_COMMAND)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Around reading an answer's body: a broken link is a lost link."""
        try:
            yield
        except (ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException) as error:
            raise self._lost(error) from error


def _origin(url: str) -> str:
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def _open_connection(scheme: str, netloc: str, timeout: float) -> http.client.HTTPConnection:
    """A connection to an origin, through the proxy that the environment names for it."""
    proxy = _proxy(scheme, netloc)
    where = proxy.netloc.rpartition("@")[2] if proxy else netloc
    connection = (
        http.client.HTTPSConnection(where, timeout=timeout, context=_tls_context())
        if scheme == "https"
        else http.client.HTTPConnection(where, timeout=timeout)
    )
    if proxy:
        connection.set_tunnel(netloc, headers=_proxy_login(proxy))
    return connection


def _proxy(scheme: str, netloc: str) -> urllib.parse.SplitResult | None:
    if not {f"{scheme}_proxy", "all_proxy"} & {name.lower() for name in os.environ}:
        return None
    request = importlib.import_module("urllib.request")
    host = urllib.parse.urlsplit(f"//{netloc}").hostname
    proxies = request.getproxies_environment()
    address = proxies.get(scheme) or proxies.get("all")
    if not address or request.proxy_bypass_environment(host, proxies):
        return None
    return urllib.parse.urlsplit(address if "://" in address else f"http://{address}")


def _proxy_login(proxy: urllib.parse.SplitResult) -> dict[str, str]:
    if not proxy.username:
        return {}
    user, word = map(urllib.parse.unquote, (proxy.username, proxy.password or ""))
    encode = importlib.import_module("base64").b64encode
    return {"Proxy-Authorization": f"Basic {encode(f'{user}:{word}'.encode()).decode()}"}


def _tls_context() -> ssl.SSLContext:
    """The system's certificates, and certifi's where it is installed."""
    context = ssl.create_default_context()
    if importlib.util.find_spec("certifi") and not os.environ.get("SSL_CERT_FILE"):
        context.load_verify_locations(importlib.import_module("certifi").where())
    return context


# ── the repository ───────────────────────────────────────────────────────────────────────────────


class RemoteFile(NamedTuple):
    """A file of a repository at one commit, and the digest the Hub knows it by."""

    path: str
    size: int
    git_oid: str
    sha256: str
    """Empty for a file that lies in git itself."""

    def is_same(self, local: str | Path, hashes: HashCache) -> bool:
        """Whether a local file has this content."""
        if os.path.getsize(local) != self.size:
            return False
        if self.sha256:
            return hashes.sha256(local) == self.sha256
        return hashes.git_oid(local) == self.git_oid

    @property
    def digest(self) -> str:
        """What names its content."""
        return self.sha256 or self.git_oid


def _prefix(settings: HubSettings) -> str:
    return "" if settings.repo_type == "model" else f"{settings.repo_type}s/"


class HubRepo:
    """One repository on the Hub. Nothing is asked before the first method is called."""

    def __init__(self, settings: HubSettings) -> None:
        self.settings = settings._replace(endpoint=settings.endpoint.rstrip("/"))
        self.wire = _Wire(self.settings)
        self.name = settings.repo_id
        self.url = f"{self.settings.endpoint}/{_prefix(settings)}{settings.repo_id}"
        self._api_url = f"{self.settings.endpoint}/api/{settings.repo_type}s/{settings.repo_id}"
        if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
            raise ConnectError(
                "HF_HUB_OFFLINE is set: the Hub is not asked", "unset HF_HUB_OFFLINE"
            )

    def is_private(self) -> bool:
        """Whether not everybody may read it. Raises NotFoundError when there is none."""
        with self.wire.understanding():
            return bool(self.wire.json(f"{self._api_url}?expand=private")[0]["private"])

    def head(self) -> str:
        """The commit that the revision names now."""
        revision = urllib.parse.quote(self.settings.revision, safe="")
        document = self.wire.json(f"{self._api_url}/revision/{revision}?expand=sha")[0]
        with self.wire.understanding():
            return str(document["sha"])

    def files(self, commit: str, folder: str = "") -> dict[str, RemoteFile]:
        """Every file at a commit, by its path; or those of one folder, which ends in a slash.

        A folder that is missing holds none. Listings come in pages of a thousand, one after the
        other; of a long one everything is asked for at once, and believed when it is proven.
        """
        place = f"/{urllib.parse.quote(folder.rstrip('/'))}" if folder else ""
        try:
            rows, following = self._page(self._tree_url(commit, place, "true"))
        except NoEntryError:
            if not folder:
                raise
            return {}
        if following and (proven := self._proven_files(commit, folder)):
            return proven
        found = self._files_in(rows)
        while following:
            rows, following = self._page(following)
            found.update(self._files_in(rows))
        return found

    def _tree_url(self, commit: str, place: str, recursive: str) -> str:
        return f"{self._api_url}/tree/{commit}{place}?recursive={recursive}&expand=false"

    def _page(self, url: str) -> tuple[list[Any], str]:
        """One page of a listing, and the address of the next; empty: there is none."""
        rows, headers = self.wire.json(url)
        with self.wire.understanding():
            if not isinstance(rows, list):
                raise TypeError(type(rows))
        found = re.search(r'<([^>]+)>;\s*rel="next"', headers.get("Link") or "")
        following = urllib.parse.urljoin(url, found[1]) if found else ""
        if following and _origin(following) != _origin(self._api_url):
            raise TransferError("the Hub's listing leads to another host")
        return rows, following

    def _files_in(self, rows: Sequence[Any]) -> dict[str, RemoteFile]:
        with self.wire.understanding():
            files = (_remote_file(row) for row in rows if row["type"] == "file")
            return {file.path: file for file in files}

    def _proven_files(self, commit: str, folder: str) -> dict[str, RemoteFile]:
        """All files from the one document that names them all; nothing, unless it is complete.

        The Hub may cut that document short. Git's id of a folder tells: it is a hash over all that
        the folder holds, and the short listing of the root has it.
        """
        try:
            document = self.wire.json_once(f"{self._api_url}/revision/{commit}?blobs=true")
            with self.wire.understanding():
                files = [_sibling(row) for row in document["siblings"]]
                ids = git_ids(files)
            rows, following = self._page(self._tree_url(commit, "", "false"))
            with self.wire.understanding():
                listed = {str(row["path"]): row["oid"] for row in rows}
        except CloudError as error:
            log.info("%s is listed page by page: %s", self.name, error)
            return {}
        found = {path: oid for path, oid in ids.items() if path and "/" not in path}
        top = folder.partition("/")[0]
        complete = found.get(top) == listed.get(top) if top else found == listed and not following
        if not complete:
            log.info("%s is listed page by page: its short listing is not complete", self.name)
            return {}
        return {file.path: file for file in files if file.path.startswith(folder)}

    def read(self, path: str, commit: str) -> bytes:
        """The content of a small file."""

        def attempt() -> bytes:
            with self.wire.get(self.file_url(path, commit)) as response, self.wire.reading():
                return response.read()

        return self.wire.patiently(attempt)

    def file_url(self, path: str, commit: str) -> str:
        """Where a file's content at a commit is."""
        return f"{self.url}/resolve/{commit}/{urllib.parse.quote(path)}"

    def create(self, private: bool) -> bool:
        """Make the repository, unless it exists; say whether it is new."""
        owner, _, name = self.name.partition("/")
        document = {
            "type": self.settings.repo_type, "name": name, "organization": owner,
            "visibility": "private" if private else "public",
        }  # fmt: skip
        try:
            self.wire.json(f"{self.settings.endpoint}/api/repos/create", document)
        except ExistsError:
            return False
        return True

    def places_of(self, contents: Mapping[str, bytes]) -> dict[str, str]:
        """Where the Hub wants each content: in the commit ("regular"), in its storage, or nowhere.

        Nowhere, an empty string, is where its .gitignore puts them.
        """
        revision = urllib.parse.quote(self.settings.revision, safe="")
        paths, places = list(contents), {}
        for start in range(0, len(paths), PREUPLOAD_FILES):
            some = paths[start : start + PREUPLOAD_FILES]
            asked = {"files": [_sample(path, contents[path]) for path in some]}
            answer, _ = self.wire.json(f"{self._api_url}/preupload/{revision}", asked)
            with self.wire.understanding():
                for file in answer["files"]:
                    mode = "regular" if not contents[file["path"]] else str(file["uploadMode"])
                    places[file["path"]] = "" if file["shouldIgnore"] else mode
        return places

    def commit(self, changes: Sequence[Change], message: str, parent: str) -> str:
        """Make one commit on `parent`; return its id. Raises ParentMovedError, LinkLostError."""
        header = {"summary": message, "description": "", "parentCommit": parent}
        lines = [Change.of("header", header).line, *(change.line for change in changes)]
        body = _Body(b"".join(lines), "application/x-ndjson")
        revision = urllib.parse.quote(self.settings.revision, safe="")
        url = f"{self._api_url}/commit/{revision}"
        # In a thread, and so over a connection, of its own: none that may have gone stale.
        made = in_background(lambda: self.wire.json_once(url, body)).result()
        with self.wire.understanding():
            return str(made["commitOid"])

    def require_valid_card(self, content: bytes) -> None:
        """Raise TransferError with what the Hub says about a card that it would not take."""
        text = content.decode("utf-8", "replace")
        document = {"content": text, "repoType": self.settings.repo_type}
        self.wire.json(f"{self.settings.endpoint}/api/validate-yaml", document)

    def require_writable(self) -> None:
        """Raise AccessError unless the token may write here."""
        self.wire.succeeds(f"{self._api_url}/auth-check/write")

    # What this file does not know how to do goes through huggingface_hub.

    @cached_property
    def api(self) -> Any:
        """huggingface_hub's own client, with a timeout, which it does not have by itself."""
        hub = need("huggingface_hub")
        _limit_waiting(self.settings.timeout)
        seconds = f"{max(1, round(self.settings.timeout))}s"
        os.environ.setdefault("HF_XET_CLIENT_READ_TIMEOUT", seconds)  # hf_xet's own: 120 s
        importlib.import_module("logging").getLogger("huggingface_hub").setLevel("CRITICAL")
        return hub.HfApi(
            self.settings.endpoint, token=self.settings.token or False,
            library_name="cloud_services", library_version=__version__,
        )  # fmt: skip

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the client about this repository, patiently."""
        return self.wire.patiently(lambda: self.call_once(method, *args, **options))

    def call_once(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method of the client about this repository; only a rate limit is sat out."""

        def ask() -> Any:
            with _client_errors(self.settings):
                return getattr(self.api, method)(
                    self.name, *args, repo_type=self.settings.repo_type, **options
                )

        # Not in this thread: the client waits for all its own threads after a Ctrl-C.
        return self.wire.in_turn(lambda: _awaited(in_background(ask)))

    def tags(self) -> dict[str, str]:
        """The commit that each tag names."""
        tags = self.wire.json(f"{self._api_url}/refs")[0]["tags"]
        return {tag["name"]: tag["targetCommit"] for tag in tags}


WAKE_SECONDS = 0.5


def _awaited(future: Future[T]) -> T:
    """The result of a future. A Ctrl-C that comes just before the waiting begins wakes nobody."""
    while not wait([future], WAKE_SECONDS).done:
        pass
    return future.result()


class Change(NamedTuple):
    """What a commit says about one file, and who counts how many bytes when it is made."""

    line: bytes
    size: int = 0
    advance: Advance | None = None

    @classmethod
    def of(
        cls, key: str, value: Mapping[str, Any], size: int = 0, advance: Advance | None = None
    ) -> Change:
        """One line of a commit, in the Hub's own words."""
        return cls(b"%b\n" % json.dumps({"key": key, "value": value}).encode(), size, advance)

    @classmethod
    def content(cls, path: str, content: bytes, advance: Advance | None = None) -> Change:
        """A file whose content travels in the commit."""
        encoded = base64.b64encode(content).decode()
        value = {"content": encoded, "path": path, "encoding": "base64"}
        return cls.of("file", value, len(content), advance)

    def finish(self) -> None:
        """It is made: all of it has gone."""
        if self.advance is not None:
            self.advance(self.size)


def _sample(path: str, content: bytes) -> dict[str, Any]:
    """What the Hub wants to know of a content before it says where that goes."""
    sample = base64.b64encode(content[:SAMPLE_BYTES]).decode()
    return {"path": path, "sample": sample, "size": len(content)}


def _remote_file(entry: Mapping[str, Any]) -> RemoteFile:
    path, oid = str(entry["path"]), str(entry["oid"])
    if lfs := entry.get("lfs"):
        return RemoteFile(path, int(lfs["size"]), oid, str(lfs["oid"]))
    return RemoteFile(path, int(entry["size"]), oid, "")


def _sibling(row: Mapping[str, Any]) -> RemoteFile:
    """A file as the document about a repository describes it."""
    path, oid = str(row["rfilename"]), str(row["blobId"])
    if lfs := row.get("lfs"):
        return RemoteFile(path, int(lfs["size"]), oid, str(lfs["sha256"]))
    return RemoteFile(path, int(row["size"]), oid, "")


def git_ids(files: Iterable[RemoteFile]) -> dict[str, str]:
    """The id that git gives each file and folder: a folder's is a hash over all that it holds.

    Files count as plain ones: with programs or links among them the ids are others.
    """
    ids = {file.path: file.git_oid for file in files}
    trees: dict[str, list[tuple[bytes, bytes]]] = {}
    for path, oid in ids.items():
        folder, _, name = path.rpartition("/")
        trees.setdefault(folder, []).append(_tree_entry(name, b"100644", oid))
    parents = {parent for folder in trees for parent in _parents(folder)}
    for path in sorted({*trees, *parents} - {""}, key=lambda path: -path.count("/")):
        tree = b"".join(entry for _, entry in sorted(trees[path]))
        header = b"tree %d\0" % len(tree)
        ids[path] = hashlib.sha1(header + tree, usedforsecurity=False).hexdigest()
        folder, _, name = path.rpartition("/")
        trees.setdefault(folder, []).append(_tree_entry(name, b"40000", ids[path]))
    return ids


def _tree_entry(name: str, mode: bytes, oid: str) -> tuple[bytes, bytes]:
    """What git sorts an entry of a folder by, and the entry."""
    order = f"{name}/" if mode == b"40000" else name
    return order.encode(), b"%b %b\0%b" % (mode, name.encode(), bytes.fromhex(oid))


def _parents(folder: str) -> Iterator[str]:
    while folder := folder.rpartition("/")[0]:
        yield folder


def _limit_waiting(timeout: float) -> None:
    """Give the client's HTTP sessions a timeout; whoever made a factory of their own keeps it."""
    hub = need("huggingface_hub")
    internals = importlib.import_module("huggingface_hub.utils._http")
    make = getattr(internals, "_GLOBAL_CLIENT_FACTORY", internals.default_client_factory)
    if getattr(make, "limits_waiting", False):
        return

    def make_with_timeout() -> Any:
        client = make()
        if client.timeout == type(client.timeout)(None):
            client.timeout = timeout
        client.event_hooks["response"].append(_hear_rate_limit)
        return client

    make_with_timeout.limits_waiting = True  # type: ignore[attr-defined]
    hub.set_client_factory(make_with_timeout)


def _hear_rate_limit(response: Any) -> None:
    """The client would wait by itself, in silence; here the pause is seen and kept by all."""
    if response.status_code == 429 and _ours.get():
        raise RateLimitedError(_pause_asked_for(response.headers))


# ── uploading ────────────────────────────────────────────────────────────────────────────────────


class Upload(NamedTuple):
    """A local file and where it goes: sizes in bytes, the time it had when it was planned."""

    path: str
    source: str
    size: int
    mtime_ns: int
    inode: int

    def is_same(self, there: RemoteFile, hashes: HashCache) -> bool:
        """Whether the Hub has this content; read only when it is not remembered."""
        if there.size != self.size:
            return False
        kind, digest = ("sha256", there.sha256) if there.sha256 else ("git", there.git_oid)
        known = hashes.remembered(self.source, kind, self.size, self.mtime_ns, self.inode)
        return known == digest if known else there.is_same(self.source, hashes)

    def sha256(self, hashes: HashCache) -> str:
        """The SHA-256 of the content; read only when it is not remembered."""
        known = hashes.remembered(self.source, "sha256", self.size, self.mtime_ns, self.inode)
        return known or hashes.sha256(self.source)


class UploadPlan(NamedTuple):
    """The difference between local files and a repository at one commit."""

    steps: tuple[Step, ...]
    commit: str
    """Empty: the repository does not exist yet."""

    @property
    def busy(self) -> bool:
        """Whether there is anything to send or to delete."""
        return any(step.action in ("send", "delete") for step in self.steps)

    def paths(self, action: str) -> list[str]:
        """The paths of all steps with this action, sorted."""
        return [step.path for step in self.steps if step.action == action]

    def bytes(self, action: str) -> int:
        """The bytes of all steps with this action."""
        return sum(step.size for step in self.steps if step.action == action)


def compare_upload(
    uploads: Sequence[Upload], remote: Mapping[str, RemoteFile], hashes: HashCache, commit: str,
    goes: Callable[[str], bool],
) -> UploadPlan:  # fmt: skip
    """Decide about each file; `goes` says whether a remote file is to be deleted when local is not.

    send: new or changed · keep: unchanged · delete: gone locally.
    """
    steps = []
    for upload in uploads:
        there = remote.get(upload.path)
        if there is None:
            steps.append(Step(upload.path, upload.size, "send", "new"))
        elif not upload.is_same(there, hashes):
            steps.append(Step(upload.path, upload.size, "send", "changed"))
        else:
            steps.append(Step(upload.path, upload.size, "keep", "unchanged"))
    local = {upload.path for upload in uploads}
    steps += [
        Step(path, file.size, "delete", "gone locally")
        for path, file in remote.items()
        if path not in local and goes(path)
    ]
    return UploadPlan(tuple(sorted(steps)), commit)


def _is_text(path: str) -> bool:
    """Whether a name has only characters, and no bytes that are none."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def require_within_limits(uploads: Sequence[Upload], remote: Mapping[str, RemoteFile]) -> None:
    """Raise RefusedError for what the Hub never takes; warn about what it discourages."""
    paths = {upload.path for upload in uploads} | set(remote)
    for upload in uploads:
        if upload.size > MAX_FILE_BYTES:
            raise RefusedError(
                f"{printable(upload.source)} has {human_bytes(upload.size)}; the Hub takes files of"
                " up to 500 GB",
                "split it, or leave it out with --exclude",
            )
        if not upload.path.isascii() and not _is_text(upload.path):
            raise UsageError(
                f"{printable(upload.source)}: the Hub takes names in UTF-8 only",
                "rename it, or leave it out with --exclude",
            )
    if len(paths) > MANY_FILES_A_FOLDER:
        _warn_about_many(paths)


def _warn_about_many(paths: Iterable[str]) -> None:
    folders = collections.Counter(path.rpartition("/")[0] for path in paths)
    for folder, count in folders.items():
        if count > MANY_FILES_A_FOLDER:
            log.warning(
                "%s would hold %d files; the Hub asks for at most 10,000 a folder", folder, count
            )
    if folders.total() > MANY_FILES_A_REPO:
        log.warning("the repository would hold %d files; the Hub asks for 100,000", folders.total())


class UploadRun:
    """Brings a repository to what a plan says, in bounded commits, each on a known parent.

    Whatever goes wrong, a new look at the repository tells what arrived: nothing is sent twice, and
    a commit whose answer was lost is not made again.
    """

    def __init__(
        self, repo: HubRepo, uploads: Sequence[Upload], hashes: HashCache, message: str,
        card: Callable[[str | None], str] | None, progress: Progress,
    ) -> None:  # fmt: skip
        """`card` makes the new README.md from the old one, once every digest is known."""
        self._repo, self._hashes, self._message, self._card = repo, hashes, message, card
        self._uploads = {upload.path: upload for upload in uploads}
        self._progress = progress
        self._most_files = COMMIT_FILES
        self._unanswered: tuple[str, Sequence[Upload]] = ("", ())
        self.commits: list[str] = []
        self.sent_files = 0
        self.sent_bytes = 0

    def carry_out(self, plan: UploadPlan, remote: Mapping[str, RemoteFile]) -> str:
        """Send and delete what the plan says about the files it saw; return the last commit."""
        deletions = plan.paths("delete")
        first = [(plan, remote)]
        count = len(plan.paths("send"))
        self._progress.begin(f"sending {count:,} files", plan.bytes("send"))
        try:
            return with_retries(
                lambda: self._attempt(*(first.pop() if first else self._look()), deletions)
            )
        finally:
            self._progress.end()

    def _look(self) -> tuple[UploadPlan, Mapping[str, RemoteFile]]:
        head = self._repo.head()
        remote = self._repo.files(head)
        uploads = tuple(self._uploads.values())
        plan = compare_upload(uploads, remote, self._hashes, head, lambda _: False)
        self._count_unanswered(plan)
        return plan, remote

    def _attempt(
        self, plan: UploadPlan, remote: Mapping[str, RemoteFile], deletions: Sequence[str]
    ) -> str:
        rest = [self._uploads[path] for path in plan.paths("send")]
        head = self._declare_csv(plan.commit, remote, rest)
        *batches, last = list(self._batches(rest)) or [[]]
        committing = in_background(lambda: head)
        for batch in batches:
            changes = self._beside(committing, functools.partial(self._prepared, batch))
            commit = functools.partial(self._commit, changes, batch, committing.result())
            committing = in_background(commit)

        def prepare_last() -> list[Change]:
            changes = self._prepared(last)
            goes = (path for path in deletions if path in remote)
            changes += [Change.of("deletedFile", {"path": path}) for path in goes]
            return changes + self._new_card(plan.commit, remote)

        changes = self._beside(committing, prepare_last)
        return self._commit(changes, last, committing.result())

    def _batches(self, uploads: Iterable[Upload]) -> Iterator[list[Upload]]:
        batch: list[Upload] = []
        regular = total = 0
        for upload in uploads:
            small = upload.size if upload.size < MAX_REGULAR_BYTES else 0
            full = len(batch) >= self._most_files or total + upload.size > COMMIT_BYTES
            if batch and (full or regular + small > COMMIT_REGULAR_BYTES):
                yield batch
                batch, regular, total = [], 0, 0
            batch.append(upload)
            regular, total = regular + small, total + upload.size
        if batch:
            yield batch

    @staticmethod
    def _beside(committing: Future[str], prepare: Callable[[], list[Change]]) -> list[Change]:
        """Prepare a commit while the one before is made: neither has to wait for the other."""
        try:
            return prepare()
        except CloudError:
            wait([committing])  # the next attempt looks at what it has made
            raise

    def _prepared(self, batch: Sequence[Upload]) -> list[Change]:
        """What a commit says about files; larger content is in the Hub's storage by then."""
        contents = {upload.path: self._read(upload) for upload in batch if _is_small(upload)}
        places = self._repo.places_of(contents)
        changes = [
            Change.content(path, contents[path], self._progress.advance)
            for path, place in places.items()
            if place == "regular"
        ]
        stored = [upload for upload in batch if places.get(upload.path, "lfs") == "lfs"]
        return changes + self._stored(stored, contents) if stored else changes

    def _read(self, upload: Upload) -> bytes:
        """The content of a small file, read once, to be hashed and sent."""
        with local_errors(upload.source), open(upload.source, "rb", buffering=0) as stream:
            content = stream.readall()
            status = self._require_unchanged(upload, stream.fileno())
        git = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
        git.update(content)
        sha256 = hashlib.sha256(content).hexdigest()
        self._hashes.remember_digests(upload.source, status, sha256, git.hexdigest())
        return content

    def _stored(self, batch: Sequence[Upload], contents: Mapping[str, bytes]) -> list[Change]:
        """Bring files to the Hub's storage, and say what a commit has to say about them."""
        make = _operation_class()
        with _client_errors(self._repo.settings):
            operations = [self._operation(make, upload, contents) for upload in batch]
        large = [pair for pair in zip(batch, operations, strict=True) if not _is_small(pair[0])]
        try:
            self._send_large(operations)
        except TransferError:
            for upload, _ in large:  # the storage refuses what is not what was announced
                self._require_unchanged(upload)
            raise
        for upload, operation in large:
            status, info = self._require_unchanged(upload), operation.upload_info
            if getattr(info, "is_hashed", True):  # needs no second reading
                self._hashes.remember(upload.source, "sha256", status, info.sha256.hex())
        return [_change_of(one) for one in operations if not getattr(one, "_should_ignore", False)]

    def _operation(
        self, make: Callable[..., Any], upload: Upload, contents: Mapping[str, bytes]
    ) -> Any:
        """What the client adds to a commit."""
        if _is_small(upload):
            operation = make(upload.path, contents[upload.path])
        else:
            self._require_unchanged(upload)
            operation = make(upload.path, _as_it_is(upload.source))
            if not sends_by_xet():  # which hashes what it sends
                known = self._hashes.sha256(upload.source)
                operation.upload_info.sha256 = bytes.fromhex(known)
        operation.advance = self._progress.advance
        return operation

    def _send_large(self, operations: Sequence[Any]) -> None:
        """Bring large contents to the Hub's storage."""
        revision = self._repo.settings.revision
        try:
            with _xet_progress(self._progress.advance), _larger_pieces():
                self._repo.call_once("preupload_lfs_files", additions=operations, revision=revision)
        except Exception:
            raise
        except BaseException:  # Ctrl-C: Xet would go on in its own threads
            with contextlib.suppress(ImportError, AttributeError):
                importlib.import_module("huggingface_hub.utils._xet").abort_xet_session()
            raise

    @staticmethod
    def _require_unchanged(upload: Upload, descriptor: int | None = None) -> os.stat_result:
        """Nothing torn goes into a commit."""
        with local_errors(upload.source):
            status = os.stat(upload.source if descriptor is None else descriptor)
        if (status.st_size, status.st_mtime_ns) != (upload.size, upload.mtime_ns):
            raise IntegrityError(
                f"{printable(upload.source)} changed while it was sent",
                "wait until nothing writes to it, then run the same command again",
            )
        return status

    def _commit(self, changes: Sequence[Change], batch: Sequence[Upload], parent: str) -> str:
        if not changes:
            return parent
        try:
            commit = self._repo.commit(changes, self._message, parent)
        except ParentMovedError:
            raise
        except LinkLostError:
            self._most_files = max(50, self._most_files // 2)  # a commit may have been too large
            self._unanswered = parent, batch
            raise
        self._count(commit, batch)
        for change in changes:
            change.finish()
        return commit

    def _count(self, commit: str, batch: Sequence[Upload]) -> None:
        self.commits.append(commit)
        self.sent_files += len(batch)
        self.sent_bytes += sum(upload.size for upload in batch)

    def _count_unanswered(self, plan: UploadPlan) -> None:
        """A commit whose answer was lost may have been made all the same."""
        (parent, batch), self._unanswered = self._unanswered, ("", ())
        there = {upload.path for upload in batch} <= set(plan.paths("keep"))
        if parent and plan.commit != parent and there:
            self._count(plan.commit, batch)

    def _declare_csv(
        self, head: str, remote: Mapping[str, RemoteFile], rest: Sequence[Upload]
    ) -> str:
        """Have large CSVs kept as LFS/Xet before the first of them goes, if they are not yet."""
        if not any(u.path.endswith(".csv") and u.size >= LFS_CSV_BYTES for u in rest):
            return head
        there = ".gitattributes" in remote
        text = self._repo.read(".gitattributes", head).decode("utf-8", "replace") if there else ""
        if re.search(r"(?m)^\*\.csv\s.*filter=lfs", text):
            return head
        text += "" if not text or text.endswith("\n") else "\n"
        content = f"{text}{CSV_IN_LFS}\n".encode()
        return self._commit([Change.content(".gitattributes", content)], (), head)

    def _new_card(self, commit: str, remote: Mapping[str, RemoteFile]) -> list[Change]:
        if self._card is None:
            return []
        there = "README.md" in remote
        old = self._repo.read("README.md", commit) if there else None
        text = old.decode("utf-8", "surrogateescape") if old is not None else None
        new = self._card(text)
        if new == text:
            return []
        content = new.encode("utf-8", "surrogateescape")
        self._repo.require_valid_card(content)
        return [Change.content("README.md", content)]

    def verify(self, commit: str) -> Mapping[str, RemoteFile]:
        """List the repository again and compare every file. Raises IntegrityError."""
        remote = self._repo.files(commit)
        for upload in self._uploads.values():
            there = remote.get(upload.path)
            if there is None:
                raise IntegrityError(
                    f"{printable(upload.path)} is not in {self._repo.name} after the upload",
                    "look whether the repository's .gitignore leaves it out",
                )
            if not upload.is_same(there, self._hashes):
                raise IntegrityError(
                    f"{printable(upload.path)} in {self._repo.name} is not what was sent",
                    "run the same command again",
                )
        return remote


def sends_by_xet() -> bool:
    """Whether huggingface_hub will send large contents by Xet; asked before it is imported."""
    off = os.environ.get("HF_HUB_DISABLE_XET", "").upper() in ("1", "TRUE", "YES", "ON")
    return not off and importlib.util.find_spec("hf_xet") is not None


def hash_ahead(uploads: Sequence[Upload], hashes: HashCache) -> None:
    """Begin to hash large files: LFS wants to know a content before it is sent."""
    large = [upload.source for upload in uploads if not _is_small(upload)]
    if large and not sends_by_xet():
        jobs = iter(large)
        for _ in range(min(HASH_THREADS, len(large))):
            in_background(lambda: [hashes.sha256(source) for source in jobs])


def require_client(uploads: Iterable[Upload]) -> None:
    """Import huggingface_hub if files need it: a broken one is told before anything is sent."""
    if any(not _is_small(upload) for upload in uploads):
        need("huggingface_hub")


def _is_small(upload: Upload) -> bool:
    return upload.size <= READ_AT_ONCE_BYTES


def _as_it_is(path: str) -> str:
    """A path that still leads there once the client has shortened it and filled in homes."""
    if not path.startswith("~") and ".." not in path:
        return path
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)


def _operation_class() -> Any:
    """huggingface_hub's CommitOperationAdd, with its reading counted."""
    base = need("huggingface_hub").CommitOperationAdd

    class CountedAddition(base):  # type: ignore[misc, valid-type]
        advance: Advance = staticmethod(lambda count: None)
        counted = 0

        def as_file(self, with_tqdm: bool = False) -> Any:
            """The content to read; with_tqdm says that it is read to be sent."""
            if not with_tqdm or not isinstance(self.path_or_fileobj, str):
                return super().as_file()
            return contextlib.closing(_CountedFile(self.path_or_fileobj, self.count_up_to))

        def count_up_to(self, position: int) -> None:
            """Bytes up to `position` have gone; what goes a second time counts once."""
            if position > self.counted:
                self.advance(position - self.counted)
                self.counted = position

        def finish(self, size: int) -> None:
            """All of it has gone, one way or the other."""
            if not _counts_xet(self):
                self.count_up_to(size)

    return CountedAddition


def _change_of(operation: Any) -> Change:
    """What a commit says about what the client has brought to the Hub's storage, or has not."""
    path, info = operation.path_in_repo, operation.upload_info
    if getattr(operation, "_upload_mode", None) != "lfs":  # larger text
        with operation.as_file() as stream:
            return Change.content(path, stream.read(), operation.finish)
    value = {"path": path, "algo": "sha256", "oid": info.sha256.hex(), "size": info.size}
    return Change.of("lfsFile", value, info.size, operation.finish)


def _counts_xet(operation: Any) -> bool:
    """Whether Xet's own progress has counted this file."""
    runtime = importlib.import_module("huggingface_hub.utils._runtime")
    large = getattr(operation, "_upload_mode", None) == "lfs"
    return large and bool(runtime.is_xet_available())


class _CountedFile(io.FileIO):
    """A file that tells how far it was read."""

    def __init__(self, path: str, position: Callable[[int], None]) -> None:
        super().__init__(path, "rb")
        self._position = position

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(-1 if size is None else size) or b""
        self._position(self.tell())
        return data


@contextlib.contextmanager
def _larger_pieces() -> Iterator[None]:
    """Have the client read files in pieces of SEND_BYTES: each takes as long as its own of 64 kB.

    The client offers no other way; where a version lacks the name, it does as it would by itself.
    """
    wire = _client_wire()
    content = importlib.import_module(f"{wire.__name__}._content")
    stream: Any = getattr(content, "IteratorByteStream", None)
    original = getattr(stream, "CHUNK_SIZE", None)
    if original is None:
        yield
        return
    stream.CHUNK_SIZE = SEND_BYTES
    try:
        yield
    finally:
        stream.CHUNK_SIZE = original


def _client_wire() -> Any:
    """The HTTP library of huggingface_hub."""
    client: Any = importlib.import_module("huggingface_hub.utils._http")
    return getattr(client, "httpx2", None) or client.httpx  # 2.x and 1.x


@contextlib.contextmanager
def _xet_progress(advance: Advance) -> Iterator[None]:
    """Hear how far Xet's uploads are, in place of the client's own bars; silence all others.

    The client offers no other way; where a version lacks the names replaced here, the progress of
    large files is seen only when they are done.
    """
    bars: Any = importlib.import_module("huggingface_hub.utils")
    asking: Any = importlib.import_module("huggingface_hub._commit_api")
    askers = [m for m in (bars, asking) if hasattr(m, "are_progress_bars_disabled")]  # 2.x and 1.x
    reporters: Any = importlib.import_module("huggingface_hub.utils._xet_progress_reporting")

    class Reporter:
        """Counts the bytes that Xet has processed."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self._done = 0

        def update_progress(self, report: Any, *_: Any) -> None:
            done = int(getattr(report, "total_bytes_completed", 0))
            advance(max(0, done - self._done))
            self._done = max(self._done, done)

        def close(self, *_: Any) -> None:
            """Nothing is left open."""

    original = reporters.XetUploadProgressReporter
    disabled = bars.are_progress_bars_disabled
    reporters.XetUploadProgressReporter = Reporter
    bars.disable_progress_bars()
    for module in askers:
        module.are_progress_bars_disabled = lambda *_: False
    try:
        yield
    finally:
        reporters.XetUploadProgressReporter = original
        for module in askers:
            module.are_progress_bars_disabled = disabled


# ── downloading ──────────────────────────────────────────────────────────────────────────────────


class Download(NamedTuple):
    """A remote file and where it goes."""

    remote: RemoteFile
    target: Path


def compare_download(downloads: Sequence[Download], hashes: HashCache, force: bool) -> list[Step]:
    """Decide about each file.

    fetch: missing here, an older download, or force · keep: the same content · refuse: changed
    here since it was downloaded, or never downloaded.
    """
    steps = []
    for remote, target in downloads:
        action, reason = "fetch", "new"
        if target.is_dir():
            action, reason = "refuse", "a folder is in its place"
        elif target.is_symlink() or target.exists():
            action, reason = _about_existing(remote, target, hashes, force)
        steps.append(Step(remote.path, remote.size, action, reason))
    return steps


def _about_existing(
    remote: RemoteFile, target: Path, hashes: HashCache, force: bool
) -> tuple[str, str]:
    with local_errors(target):
        if target.is_file() and remote.is_same(target, hashes):
            return "keep", "unchanged"
        if force:
            return "fetch", "changed, and --force"
        received = hashes.received(target)
        if target.is_file() and any(d in _digests(target, hashes, d) for d in received):
            return "fetch", "changed on the Hub"
    return "refuse", "changed here" if received else "another content is here"


def _digests(target: Path, hashes: HashCache, like: str) -> tuple[str, ...]:
    return (hashes.sha256(target) if len(like) == 64 else hashes.git_oid(target),)


class HeldError(RefusedError):
    """Another run is writing this file."""


class Fetcher:
    """Brings files of one commit here: .part, content check, rename; several at a time."""

    def __init__(self, repo: HubRepo, commit: str, hashes: HashCache, progress: Progress) -> None:
        self._repo, self._commit, self._hashes, self._progress = repo, commit, hashes, progress
        self._lock = threading.Lock()
        self._stopped = False
        self._ending: CloudError | None = None
        self._lost = 0
        self._found: dict[Path, tuple[int, ...]] = {}
        self.moved = 0
        self.failures: list[tuple[Download, CloudError]] = []

    def fetch(self, downloads: Sequence[Download]) -> None:
        """Fetch all; one that fails does not stop the others. Raises what they would all meet."""
        if not downloads:
            return
        parents = sorted({download.target.parent for download in downloads})
        for folder in parents:
            with local_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        total = sum(download.remote.size for download in downloads)
        held = sum(self._held(download) for download in downloads)
        require_space(free_space(parents[0]), total - held, parents[0])
        self._found = {download.target: _state(download.target) for download in downloads}
        jobs = iter(downloads)
        self._progress.begin(f"fetching {len(downloads):,} files", total)
        try:
            threads = min(DOWNLOAD_THREADS, len(downloads))
            workers = [in_background(lambda: self._work(jobs)) for _ in range(threads)]
            for worker in workers:
                worker.result()
            self._look_again()
        finally:
            self._stopped = True
            self._progress.end()
        if self._ending is not None:
            raise self._ending
        self._sweep(downloads)

    def _look_again(self) -> None:
        """What another run was writing may be complete by now."""
        held = [download for download, error in self.failures if isinstance(error, HeldError)]
        self.failures = [one for one in self.failures if not isinstance(one[1], HeldError)]
        for remote, target in held if self._ending is None else ():
            try:
                if not _is_there(remote, target, self._hashes):
                    self._fetch(Download(remote, target))
            except CloudError as error:
                self.failures.append((Download(remote, target), error))

    def _sweep(self, downloads: Sequence[Download]) -> None:
        """Remove what earlier runs left unfinished of other contents; what a run holds stays."""
        needed = {self._part(download) for download, _ in self.failures}
        stems: dict[Path, set[str]] = {}
        for _, target in downloads:
            stems.setdefault(target.parent, set()).add(_PART_KEY.sub("", part_name(target.name)))
        for folder, ours in stems.items():
            for part in set(folder.glob(".*.part")) - needed:
                if _PART_KEY.sub("", part.name) in ours:
                    _remove_unless_held(part)

    def _work(self, jobs: Iterator[Download]) -> None:
        while not self._stopped:
            with self._lock:
                download = next(jobs, None)
            if download is None:
                return
            try:
                self._repo.wire.patiently(lambda: self._fetch(download))  # noqa: B023 - used at once
                self._lost = 0
            except CloudError as error:
                self._note_failure(download, error)
            except BaseException:
                self._stopped = True
                raise

    def _note_failure(self, download: Download, error: CloudError) -> None:
        """Stop all when the others would fail as well: there is no room, no leave, or no Hub."""
        with self._lock:
            self.failures.append((download, error))
            self._lost += isinstance(error, LinkLostError)
            for_all = isinstance(error, (DiskFullError, AccessError, ConnectError))
            if not self._stopped and (for_all or self._lost >= DOWNLOAD_THREADS):
                self._stopped, self._ending = True, error

    @staticmethod
    def _part(download: Download) -> Path:
        target = download.target
        return target.with_name(part_name(target.name, download.remote.digest))

    def _held(self, download: Download) -> int:
        with contextlib.suppress(OSError):
            return os.stat(self._part(download)).st_size
        return 0

    def _fetch(self, download: Download) -> None:
        """Fetch one file, from where an earlier run stopped."""
        remote, target = download
        if remote.size > MAX_PLAIN_DOWNLOAD_BYTES:
            raise RefusedError(
                f"{printable(remote.path)} has {human_bytes(remote.size)}; the Hub serves at most"
                " 50 GB over plain HTTP",
                f"hf download {self._repo.name} {printable(remote.path)}",
            )
        part = self._part(download)
        with local_errors(target), open_for_update(part) as stream:
            try:
                lock_part(stream, target)
            except RefusedError as error:
                raise HeldError(str(error), error.hint) from error
            if not _has_name(stream, part):  # the run that held the lock has finished it
                self._fetch(download)
                return
            if not self._fill(stream, remote) and not self._fill(stream, remote):
                raise IntegrityError(
                    f"{printable(remote.path)} arrived with other content than the Hub lists",
                    "run the same command again: it starts this file anew",
                )
            if remote.size >= MIB:
                os.fsync(stream.fileno())
            self._require_as_found(download)
            self._hashes.remember_received(target, remote.digest, arriving=True)
            os.replace(part, target)  # killed here, the file is known all the same
            status = os.fstat(stream.fileno())
        kind = "sha256" if remote.sha256 else "git"
        self._hashes.remember(target, kind, status, remote.digest)
        self._hashes.remember_received(target, remote.digest)

    def _require_as_found(self, download: Download) -> None:
        remote, target = download
        if _state(target) == self._found[target] or _is_there(remote, target, self._hashes):
            return
        raise RefusedError(
            f"{printable(target)} was changed here while its replacement was fetched",
            "add --force to replace it",
        )

    def _fill(self, stream: Any, remote: RemoteFile) -> bool:
        """Complete the file; say whether its content is right, or nothing of it is kept."""
        digest = _digest_of(remote)
        held = min(os.fstat(stream.fileno()).st_size, remote.size)
        buffer = bytearray(MIB)
        stream.seek(0)
        for start in range(0, held, MIB):
            view = memoryview(buffer)[: min(MIB, held - start)]
            digest.update(view[: stream.readinto(view)])
        self._progress.advance(held)
        stream.truncate(held)
        try:
            if held < remote.size:
                held = self._receive(stream, remote, held, digest, buffer)
        except BaseException:
            self._progress.advance(-stream.tell())  # the next attempt counts what is there again
            raise
        right = bool(digest.hexdigest() == remote.digest)
        if not right:
            self._progress.advance(-held)
            stream.truncate(0)
        return right

    def _receive(
        self, stream: Any, remote: RemoteFile, at: int, digest: Any, buffer: bytearray
    ) -> int:
        """Read the rest of a file from byte `at` on; returns how much is there now."""
        wire, start = self._repo.wire, at
        with wire.get(self._repo.file_url(remote.path, self._commit), at) as response:
            if at and not _answers_from(response, at):
                stream.truncate(0)  # the next attempt asks for all of it
                raise LinkLostError("the Hub answers with another range", SAME_COMMAND)
            view = memoryview(buffer)
            while at < remote.size:
                if self._stopped:
                    raise TransferError("stopped", SAME_COMMAND)
                with wire.reading():
                    count = response.readinto(view[: min(MIB, remote.size - at)])
                if not count:
                    raise LinkLostError("lost the Hub: the answer is cut short", SAME_COMMAND)
                write_all(stream, view[:count])
                digest.update(view[:count])
                at += count
                self._progress.advance(count)
            with wire.reading():
                if response.read(1):
                    raise IntegrityError(
                        f"{printable(remote.path)} is longer than the Hub lists", SAME_COMMAND
                    )
        with self._lock:
            self.moved += at - start
        return at


def _remove_unless_held(part: Path) -> None:
    with contextlib.suppress(OSError, RefusedError), open_for_update(part) as stream:
        lock_part(stream, part)
        part.unlink()


_PART_KEY = re.compile(r"\.[0-9a-f]{12}\.part$")


def _state(path: Path) -> tuple[int, ...]:
    """What changes with a file; empty where there is none."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        status = os.lstat(path)
        return status.st_size, status.st_mtime_ns, status.st_ino
    return ()


def _is_there(remote: RemoteFile, target: Path, hashes: HashCache) -> bool:
    with local_errors(target):
        return target.is_file() and remote.is_same(target, hashes)


def _has_name(stream: Any, path: Path) -> bool:
    """Whether an open file still has this name."""
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(stream.fileno()), os.stat(path))
    return False


def _answers_from(response: http.client.HTTPResponse, start: int) -> bool:
    given = response.headers.get("Content-Range") or ""
    return response.status == 206 and given.startswith(f"bytes {start}-")


def _digest_of(remote: RemoteFile) -> Any:
    if remote.sha256:
        return hashlib.sha256()
    digest = hashlib.sha1(usedforsecurity=False)
    digest.update(b"blob %d\0" % remote.size)
    return digest
