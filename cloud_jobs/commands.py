"""The commands of the local cloud: serve, storage-key and quickstart."""

from __future__ import annotations

import argparse
import contextlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_services import (
    SHOWN,
    Argument,
    Console,
    Outcome,
    UsageError,
    checked,
    command,
    human_bytes,
    parse_size,
    port_number,
    printable,
)

if TYPE_CHECKING:
    from cloud_jobs.storage import StorageKey, StorageServer, StorageSettings

STORAGE_DIR = Argument(
    "--storage-dir", default="~/.cloud_services/storage", metavar="DIR",
    help="where the server keeps everything (default: ~/.cloud_services/storage)",
)  # fmt: skip
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(text: str) -> float:
    """A time such as 90s, 30m, 12h or 7d, in seconds."""
    match = re.fullmatch(r"(\d{1,6})([smhd])", text.strip())
    if not match or not int(match[1]):
        raise UsageError(f"{printable(text)!r} is no time; write for example 12h")
    return float(int(match[1]) * SECONDS[match[2]])


def _port_or_any(text: str) -> int:
    return 0 if text == "0" else port_number(text)


@command(
    "serve",
    Argument("--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)"),
    Argument("--port", type=checked(_port_or_any), default=9000, help="0: any (default: 9000)"),
    STORAGE_DIR,
    Argument(
        "--bucket", action="append", default=[], metavar="NAME",
        help="make this bucket if it is missing; repeatable",
    ),
    Argument("--access-key", metavar="ID", help="the key to accept (default: made at first start)"),
    Argument("--secret-key", metavar="SECRET", help="its secret; - reads it from standard input"),
    Argument("--allow-remote", action="store_true", help="let others reach it, at --host"),
    Argument(
        "--allowed-host", action="append", default=[], metavar="NAME",
        help="a further name by which clients call this server; repeatable",
    ),
    Argument("--certificate", metavar="FILE", help="serve https with this certificate, PEM"),
    Argument("--certificate-key", metavar="FILE", help="the key of the certificate, PEM"),
    Argument(
        "--no-fsync", action="store_true",
        help="for throwaway storage: what was written last may be lost in a power cut",
    ),
)  # fmt: skip
def serve(args: argparse.Namespace, console: Console) -> Outcome:
    """Serve S3 from a folder of this machine, until it is interrupted.

    Any S3 client works with it. The key is made at the first start, its secret shown once, and kept
    for the next start. Keys that may do less: storage-key create.
    """
    from cloud_jobs.storage import StorageSettings
    from cloud_jobs.storage import serve as serve_until_stopped

    settings = StorageSettings(
        storage_dir=args.storage_dir, host=args.host, port=args.port, access_key=args.access_key,
        secret_key=_given_secret(args, console), allow_remote=args.allow_remote,
        allowed_hosts=tuple(args.allowed_host), fsync=not args.no_fsync,
        certificate=args.certificate, certificate_key=args.certificate_key,
    )  # fmt: skip
    if settings.allow_remote and settings.opens:
        console.note(settings.opens)

    def started(server: StorageServer) -> None:
        try:
            for bucket in args.bucket:
                server.make_bucket(bucket)
        finally:  # whatever went wrong: a secret is shown only once
            console.show_now(_serving(server, settings))

    serve_until_stopped(settings, started)
    return SHOWN


def _given_secret(args: argparse.Namespace, console: Console) -> str | None:
    if args.secret_key == "-":  # noqa: S105 - no password, but the word for standard input
        return sys.stdin.readline().strip() if sys.stdin else ""
    if args.secret_key:
        console.note("--secret-key is visible to other users of this machine: use --secret-key -")
    return str(args.secret_key) if args.secret_key else None


def _serving(server: StorageServer, settings: StorageSettings) -> Outcome:
    document = {"endpoint": server.url, "access_key": server.access_key}
    rows = [("endpoint", server.url), ("access key", server.access_key)]
    if server.new_key:
        document["secret_key"] = server.secret_key
        rows.append(("secret key", f"{server.secret_key} (shown only now)"))
    rows += [("storage", printable(settings.folder)), ("to stop", "Ctrl-C")]
    return Outcome(document, rows)


@command(
    "storage-key",
    Argument("action", choices=("create", "list", "revoke")),
    Argument("name", nargs="?", metavar="NAME", help="the key's name"),
    Argument("--bucket", help="create: the bucket it may use"),
    Argument("--prefix", default="", help="create: only keys that begin like this"),
    Argument(
        "--rights", default="get,put,list", metavar="LIST",
        help="create: of get, put, list, delete (default: get,put,list)",
    ),
    Argument(
        "--expires-in", type=checked(parse_duration), metavar="TIME",
        help="create: such as 30m, 12h or 7d (default: never)",
    ),
    Argument(
        "--quota", type=checked(parse_size), metavar="SIZE",
        help="create: at most this much of what it stored may be there, such as 20G",
    ),
    STORAGE_DIR,
)  # fmt: skip
def storage_key(args: argparse.Namespace, _console: Console) -> Outcome:
    """Make, list or revoke keys of serve that may do less: one bucket, one prefix, for a time.

    A secret is shown only when its key is made. A key that is revoked ends at once, also while the
    server runs.
    """
    from cloud_jobs.storage import StorageKeys

    if args.action != "list" and not args.name:
        raise UsageError(
            f"storage-key {args.action} needs a name",
            f"python cloud_services.py storage-key {args.action} gpu-box --bucket models",
        )
    with contextlib.closing(StorageKeys(args.storage_dir)) as keys:
        if args.action == "list":
            found = keys.list()
            lines = [f"{key.access_key}  {key.name}: {_limits(key)}" for key in found]
            return Outcome({"keys": [_document(key) for key in found]}, lines=lines)
        if args.action == "revoke":
            key = keys.revoke(args.name)
            return Outcome(_document(key), [("revoked", key.name), ("access key", key.access_key)])
        if not args.bucket:
            raise UsageError(
                "storage-key create needs a bucket", "name the only one it may use with --bucket"
            )
        rights = [word.strip() for word in args.rights.split(",")]
        key = keys.create(args.name, args.bucket, args.prefix, rights, args.expires_in, args.quota)
    rows = [("name", key.name), ("access key", key.access_key)]
    rows += [("secret key", f"{key.secret_key} (shown only now)"), ("may", _limits(key))]
    return Outcome(_document(key) | {"secret_key": key.secret_key}, rows)


def _limits(key: StorageKey) -> str:
    text = f"{', '.join(key.rights)} in {key.bucket}/{printable(key.prefix)}"
    if key.quota is not None:
        text += f", {human_bytes(key.used)} of {human_bytes(key.quota)}"
    if key.expires is not None:
        text += f", {'until' if not key.expired else 'ended'} {key.expires:%Y-%m-%d %H:%M} UTC"
    return text


def _document(key: StorageKey) -> dict[str, object]:
    return {
        "name": key.name, "access_key": key.access_key, "bucket": key.bucket,
        "prefix": key.prefix, "rights": key.rights, "quota": key.quota, "used": key.used,
        "expires": key.expires and key.expires.isoformat(), "expired": key.expired,
    }  # fmt: skip


@command(
    "quickstart",
    Argument("--keep", action="store_true", help="keep the folder with all that was made"),
)
def quickstart(args: argparse.Namespace, console: Console) -> Outcome:
    """Try the whole way of the data on this machine, without an account or a network.

    A sample workspace is packed, sent to an S3 endpoint that runs only meanwhile, fetched again and
    compared byte by byte. Nothing is left behind unless --keep is given.
    """
    from cloud_jobs.quickstart import DoneStep, following_commands, quickstart

    folder = Path(tempfile.mkdtemp(prefix="cloud_services-quickstart-"))
    try:
        result = quickstart(folder, lambda step: console.note(f"done: {step.title}"))
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)
    lines = [DoneStep.head(), *(step.row() for step in result.steps), ""]
    lines += ["In the bucket:"]
    lines += [f"{human_bytes(one.size):>10}  {printable(one.key)}" for one in result.objects]
    lines += ["", "The same with your own host, repository and bucket:", *following_commands()]
    rows = [("kept in", printable(folder))] if args.keep else []
    return Outcome(result, rows, lines)
