"""How to reach an SSH server, the Hugging Face Hub and an S3 bucket.

A value comes from an argument, then the environment, then `.env`, then the default. What cannot be
used is a UsageError or AccessError before anything is asked of a server. `repr` hides secrets.
cloud_services imports this file when a service is used; it needs nothing beside the standard
library.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from cloud_services import (
    HUB_REPO_TYPES,
    STALL_SECONDS,
    AccessError,
    UsageError,
    dotenv_settings,
    parse_count,
    parse_seconds,
    parse_size,
    port_number,
    possible_path,
    printable,
)

MAX_ATTEMPTS = 5
ENDPOINT = re.compile(r"https?://(\[[0-9a-fA-F:.]+\]|[^/\s@:?#\[\]]+)(:\d{1,5})?(/[^\s@?#]*)?")


Variables = Mapping[str, tuple[str, ...]]
"""The environment variables of a setting, by its name; several mean the same."""

HIDDEN = {
    "passphrase", "ask_passphrase", "token", "access_key_id", "secret_access_key", "session_token"
}  # fmt: skip


def _found(
    variables: Variables, given: Mapping[str, Any], dotenv: Mapping[str, str]
) -> dict[str, Any]:
    """The given values, and for the others what the environment or `.env` say."""
    values = {name: value for name, value in given.items() if value is not None}
    for name, several in variables.items():
        said = (source.get(variable) for source in (os.environ, dotenv) for variable in several)
        if name not in values and (value := next(filter(None, said), None)):
            values[name] = value.strip()
    return values


def _shown(settings: Any) -> str:
    """A repr without secrets."""
    fields = settings._asdict().items()
    shown = ", ".join(f"{name}={value!r}" for name, value in fields if name not in HIDDEN)
    return f"{type(settings).__name__}({shown})"


# ── SSH ──────────────────────────────────────────────────────────────────────────────────────────


SSH_VARIABLES: Variables = {
    name: (f"PAPERSPACE_{name.upper()}",)
    for name in ("host", "path", "user", "port", "identity", "passphrase")
}
SSH_VALUES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("host", "user", "host_key"), str),
    "port": port_number,
    "path": possible_path,
    "identity": possible_path,
    "streams": lambda count: parse_count(str(count)),
    "limit_rate": lambda rate: parse_size(str(rate)),
    "timeout": lambda seconds: parse_seconds(str(seconds)),
}
"""How a value is read; from Python it may be a number, too."""


class SSHSettings(NamedTuple):
    """How to reach a server. None means: as ~/.ssh/config or the default says."""

    host: str = "paperspace.com"
    path: str = "/storage/"
    user: str | None = None
    port: int | None = None
    identity: str | None = None
    passphrase: str | None = None
    streams: int | None = None
    """Parallel SFTP channels; None: as the direction and the round-trip time ask for."""
    limit_rate: int | None = None
    """Bytes per second, over all streams."""
    accept_new_host_key: bool = False
    host_key: str | None = None
    """The expected host key's fingerprint, as ssh-keygen -l prints it: SHA256:…"""
    timeout: float = STALL_SECONDS
    """Seconds without any sign of life after which the link counts as dead."""
    ask_passphrase: Callable[[str], str] | None = None
    """Called with a key's path when it is encrypted and no agent holds it."""

    @classmethod
    def resolve(cls, **given: Any) -> SSHSettings:
        """Settings from `given` arguments, then the environment, then `.env`, then defaults."""
        values = _found(SSH_VARIABLES, given, dotenv_settings())
        if "@" in (host := str(values.get("host", ""))):
            user, values["host"] = host.rsplit("@", 1)
            values["user"] = given.get("user") or user
        for name in values.keys() & SSH_VALUES.keys():
            values[name] = SSH_VALUES[name](values[name])
        return cls(**values).checked()

    def __repr__(self) -> str:
        return _shown(self)

    def checked(self) -> SSHSettings:
        """Itself. Raises UsageError or AccessError for what cannot be used."""
        for name, value in (("host", self.host), ("user", self.user)):
            if value is not None and not re.fullmatch(r"[\w.:%+][\w.:%+@$-]*", value):
                raise UsageError(
                    f"{printable(value)!r} is no valid {name} name",
                    f"use --{name} with a plain name, such as gpu.example.com",
                )
        if self.host_key is not None and not self.host_key.startswith("SHA256:"):
            raise UsageError(
                f"--host-key takes SHA256:…, not {printable(self.host_key)!r}",
                "ask the server's owner for: ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub",
            )
        if not self.path:
            raise UsageError("--path is empty", "use --path /storage/")
        return self


# ── Hugging Face ─────────────────────────────────────────────────────────────────────────────────


HUB_VARIABLES: Variables = {"token": ("HF_TOKEN",), "endpoint": ("HF_ENDPOINT",)}


class HubSettings(NamedTuple):
    """Which repository on the Hugging Face Hub, and who asks for it."""

    repo_id: str
    repo_type: str = "dataset"
    token: str | None = None
    endpoint: str = "https://huggingface.co"
    revision: str = "main"
    """A branch; for downloads also a tag or a commit."""
    timeout: float = STALL_SECONDS
    """Seconds without a byte after which a request counts as dead."""

    @classmethod
    def resolve(cls, **given: Any) -> HubSettings:
        """Settings from `given` arguments, then the environment, `.env`, the stored login."""
        values = _found(HUB_VARIABLES, given, dotenv_settings())
        values["token"] = values.get("token") or _stored_hub_token()
        return cls(**values).checked()

    def __repr__(self) -> str:
        return _shown(self)

    def checked(self) -> HubSettings:
        """Itself. Raises UsageError or AccessError for what cannot be used."""
        if not re.fullmatch(r"[\w.-]{1,96}/[\w.-]{1,96}", self.repo_id, re.ASCII) or re.search(
            r"\.\.|--|(^|/)[.-]|[.-](/|$)|\.git$", self.repo_id
        ):
            raise UsageError(
                f"{printable(self.repo_id)!r} is no repository id",
                "write it as username/dataset-name",
            )
        if self.repo_type not in HUB_REPO_TYPES:
            raise UsageError(f"--repo-type is one of {', '.join(HUB_REPO_TYPES)}")
        if self.token is not None and not re.fullmatch(r"[\x21-\x7e]+", self.token):
            raise AccessError(
                "the Hugging Face token holds characters that no token has",
                "copy it again from your Hugging Face settings",
            )
        if not _is_web_address(self.endpoint):
            raise AccessError(
                "HF_ENDPOINT is no http address of a Hub",
                "unset HF_ENDPOINT, or set it to https://host",
            )
        return self


def _is_web_address(text: str) -> bool:
    """Whether it names a host over http, with a port at most: no login, no oddities."""
    return bool(re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?(/[\w./-]*)?", text))


def _stored_hub_token() -> str | None:
    """The token that `hf auth login` stored."""
    home = os.environ.get("HF_HOME") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache"),
        "huggingface",
    )
    path = os.environ.get("HF_TOKEN_PATH") or os.path.join(os.path.expanduser(home), "token")
    with contextlib.suppress(OSError):
        return Path(path).read_text(encoding="utf-8", errors="replace").strip() or None
    return None


# ── S3 ───────────────────────────────────────────────────────────────────────────────────────────


S3_VARIABLES: Variables = {
    "bucket": ("S3_BUCKET",),
    "prefix": ("S3_PREFIX",),
    "endpoint_url": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "region": ("AWS_REGION", "AWS_DEFAULT_REGION"),
    "profile": ("AWS_PROFILE",),
    "max_concurrency": ("AWS_S3_MAX_CONCURRENCY",),
    "max_attempts": ("AWS_MAX_ATTEMPTS",),
    "retry_mode": ("AWS_RETRY_MODE",),
}
S3_KEY_VARIABLES: Variables = {
    name: (f"AWS_{name.upper()}",)
    for name in ("access_key_id", "secret_access_key", "session_token")
}


class S3Settings(NamedTuple):
    """Which bucket, and how to reach it. None means: as boto3's own chain or the default says."""

    bucket: str = ""
    prefix: str = ""
    endpoint_url: str | None = None
    region: str | None = None
    profile: str | None = None
    max_concurrency: int | None = None
    """Requests under way at once; None: as the size of the objects asks for."""
    max_attempts: int = MAX_ATTEMPTS
    retry_mode: str | None = None
    """All modes wait ever longer, by chance, and all requests slow down when one is told to."""
    limit_rate: int | None = None
    """Bytes per second, over all connections."""
    timeout: float = STALL_SECONDS
    """Seconds without a byte after which a connection counts as dead."""
    access_key_id: str | None = None
    """Only from an argument or `.env`: what the environment holds boto3 finds itself."""
    secret_access_key: str | None = None
    session_token: str | None = None

    @classmethod
    def resolve(cls, **given: Any) -> S3Settings:
        """Settings from `given` arguments, then the environment, then `.env`, then defaults."""
        dotenv = dotenv_settings()
        if str(given.get("bucket") or "").startswith("s3://"):  # a whole address, as it was given
            given["prefix"] = given.get("prefix") or ""
        values = _found(S3_VARIABLES, given, dotenv)
        chosen = given.get("profile") or any(
            os.environ.get(name) for name in ("AWS_PROFILE", "AWS_ACCESS_KEY_ID")
        )
        if not chosen and "access_key_id" not in values:
            for name, (variable,) in S3_KEY_VARIABLES.items():
                values[name] = dotenv.get(variable) or None
        for name in ("max_concurrency", "max_attempts"):
            if name in values:
                values[name] = _count(values[name], name)
        return cls(**values).placed().checked()

    def __repr__(self) -> str:
        return _shown(self)

    def placed(self) -> S3Settings:
        """With bucket and prefix taken from s3://bucket/folder."""
        if not self.bucket.startswith("s3://"):
            return self._replace(prefix=self.prefix.strip("/"))
        bucket, _, folder = self.bucket.removeprefix("s3://").partition("/")
        prefix = posixpath.join(folder, self.prefix.strip("/"))
        return self._replace(bucket=bucket, prefix=prefix.strip("/"))

    def checked(self) -> S3Settings:
        """Itself. Raises UsageError or AccessError for what cannot be used."""
        if not self.bucket:
            raise UsageError("no bucket is named", "name one with --bucket, or S3_BUCKET in .env")
        if not re.fullmatch(r"arn:[\w:/.-]+|[A-Za-z0-9][\w.-]{1,254}", self.bucket):
            raise UsageError(
                f"{printable(self.bucket)!r} is no bucket name", "use --bucket with a plain name"
            )
        if self.endpoint_url and not _is_endpoint(self.endpoint_url):
            shown = re.sub(r"(?<=//)[^/]*@", "…@", printable(self.endpoint_url))
            raise UsageError(
                f"{shown!r} is no endpoint", "use --endpoint-url https://… (AWS_ENDPOINT_URL)"
            )
        if self.retry_mode not in (None, "legacy", "standard", "adaptive"):
            raise UsageError(
                f"{printable(self.retry_mode)!r} is no retry mode", "use AWS_RETRY_MODE=standard"
            )
        if self.limit_rate is not None and self.limit_rate <= 0:
            raise UsageError("a rate limit must be positive", "use --limit-rate 10M")
        if self.timeout <= 0:
            raise UsageError("a timeout must be positive", f"use --timeout {STALL_SECONDS:g}")
        return self

    def key(self, *names: str) -> str:
        """The full key of a name below the prefix."""
        return "/".join(filter(None, (self.prefix, *names)))


def _is_endpoint(url: str) -> bool:
    with contextlib.suppress(ValueError):  # a port beyond 65535
        return bool(ENDPOINT.fullmatch(url)) and urlsplit(url).port != 0
    return False


def _count(text: object, name: str) -> int:
    if str(text).isdecimal() and 0 < int(str(text)) <= 1000:
        return int(str(text))
    raise UsageError(f"{printable(text)!r} is no value for {name}", "use a number from 1 to 1000")
