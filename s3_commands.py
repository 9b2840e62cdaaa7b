"""The commands about S3 storage: checkpoints, logs, datasets, archives and Docker images."""

from __future__ import annotations

import argparse
import os
import posixpath
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_services import (
    DRY_RUN,
    EXCLUDE,
    S3,
    TICKS,
    WORKSPACE,
    Argument,
    Console,
    ExitCode,
    NotFoundError,
    NothingYetError,
    Outcome,
    Plan,
    S3Sync,
    Terminated,
    TransferError,
    UsageError,
    agreed_training_plan,
    amount_rows,
    checked,
    command,
    dotenv_settings,
    file_outcome,
    human_bytes,
    list_left_out,
    local_dir_flag,
    log,
    parse_seconds,
    plan_outcome,
    plan_results,
    printable,
    s3_sync,
    shell_word,
    step_lines,
)

if TYPE_CHECKING:
    from docker_images import ImageStore
    from s3_checkpoints import Checkpoint
    from s3_results import S3Fetched, S3Mirrored, S3Sent

BY = Argument(
    "--by", default="step", metavar="ORDER",
    help="step, time, or a metric in the names: val_loss is lowest, val_acc:max highest"
    " (default: step)",
)  # fmt: skip
INCLUDE = Argument(
    "--include", action="append", default=[], metavar="GLOB", help="only these; repeatable"
)
CHECKSUM = Argument(
    "--checksum", action="store_true",
    help="trust no remembered digest: read every file, ask every object",
)  # fmt: skip
EXTRACT = Argument("--extract", action="store_true", help="unpack it there once it is verified")
ARCHIVE = Argument("--archive", metavar="FILE", help="send this archive instead of packing")
ARCHIVE_NAME = Argument("name", nargs="?", metavar="NAME", help="an archive (default: the newest)")


def _partial_unless(complete: bool) -> ExitCode:
    return ExitCode.DONE if complete else ExitCode.PARTIAL


def _s3_outcome(result: S3Sent | S3Fetched | S3Mirrored) -> Outcome:
    return Outcome(result, [*result.rows()], exit_code=_partial_unless(bool(result)))


# ── checkpoints ──────────────────────────────────────────────────────────────────────────────────


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise UsageError(f"{printable(text)!r} is no number from 1 on")
    return int(text)


@command("s3-upload-checkpoint", Argument("file", metavar="FILE", help="the checkpoint"), *S3)
def s3_upload_checkpoint(args: argparse.Namespace, console: Console) -> Outcome:
    """Store a checkpoint in the bucket as checkpoints/<name>.

    Unchanged content is not sent, and content that is there under another name (last.ckpt) is
    copied by the server. A large file continues where an earlier run stopped.
    """
    return _s3_outcome(s3_sync(args, console).upload_checkpoint(args.file))


@command("s3-list-checkpoints", *S3)
def s3_list_checkpoints(args: argparse.Namespace, console: Console) -> Outcome:
    """List the checkpoints in the bucket, the newest last: time, size, name, epoch, step, metrics.

    Step and epoch come from the name, or from the file itself when it was sent from here.
    """
    found = s3_sync(args, console).list_checkpoints()
    width = max((len(str(one.size)) for one in found), default=0)
    lines = [
        f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(one.mtime))}  {one.size:>{width}}  "
        f"{printable(one.name)}{_progress_text(one)}"
        for one in found
    ]
    if not found:
        console.note("no checkpoints yet")
    return Outcome({"checkpoints": found}, lines=lines)


def _progress_text(one: Checkpoint) -> str:
    """What a checkpoint's own name leaves unsaid."""
    known = {"epoch": one.epoch, "step": one.step, **one.metrics}
    shown = (f"{label} {value:g}" for label, value in known.items() if value is not None)
    return "".join(f"  {word}" for word in shown)


@command(
    "s3-download-checkpoint",
    Argument("name", metavar="NAME", help="its name, as s3-list-checkpoints shows it"),
    local_dir_flag("checkpoints"), *S3,
)  # fmt: skip
def s3_download_checkpoint(args: argparse.Namespace, console: Console) -> Outcome:
    """Fetch one checkpoint; it gets its name after its SHA-256 was compared."""
    return _s3_outcome(s3_sync(args, console).download_checkpoint(args.name, args.local_dir))


@command("s3-download-latest", BY, local_dir_flag("checkpoints"), *S3)
def s3_download_latest(args: argparse.Namespace, console: Console) -> Outcome:
    """Fetch the checkpoint of the highest step, or the best by --by.

    A damaged or partial one is passed over, and named.
    """
    return _s3_outcome(s3_sync(args, console).download_latest(args.local_dir, args.by))


@command(
    "s3-prune-checkpoints",
    Argument(
        "--keep", type=checked(_count), required=True, metavar="N", help="keep the newest N"
    ),
    Argument("--by", default="", metavar="METRIC", help="keep the best by this metric, too"),
    DRY_RUN, *S3,
)  # fmt: skip
def s3_prune_checkpoints(args: argparse.Namespace, console: Console) -> Outcome:
    """Remove old checkpoints from the bucket, after a question.

    The newest N stay, the best by --by, and whatever last.ckpt holds.
    """
    result = s3_sync(args, console).prune_checkpoints(args.keep, args.by)
    verb = "would be removed" if result.dry_run else "removed"
    lines = [f"{verb}  {printable(name)}" for name in result.removed]
    rows = [("kept", f"{len(result.kept)} checkpoints"), (verb, f"{len(result.removed)}")]
    rows.append(("room", human_bytes(result.freed)))
    rows += [("failed", printable(failure)) for failure in result.failures]
    return Outcome(result, rows, lines, exit_code=_partial_unless(bool(result)))


@command(
    "s3-resume",
    Argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT",
        help="s3, or a path that is taken as it is (CHECKPOINT; default: s3)",
    ),
    BY, local_dir_flag("checkpoints"),
    Argument(
        "--allow-fresh", action="store_true",
        help="print an empty line when there is no checkpoint yet",
    ),
    *S3,
)  # fmt: skip
def s3_resume(args: argparse.Namespace, console: Console) -> Outcome:
    """Print the path of the checkpoint to resume from, fetching it if needed.

    For scripts: python train.py --ckpt "$(python cloud_services.py s3-resume --allow-fresh)". A
    damaged or partial checkpoint is passed over for the next; when none is left, it is an error.
    """
    chosen = args.checkpoint or os.environ.get("CHECKPOINT") or dotenv_settings().get("CHECKPOINT")
    if chosen and chosen != "s3":
        if not os.path.exists(chosen):
            raise NotFoundError(
                f"the checkpoint {printable(chosen)} does not exist",
                "name another in CHECKPOINT, or CHECKPOINT=s3",
            )
        return Outcome({"path": chosen}, lines=[chosen])
    try:
        fetched = s3_sync(args, console).download_latest(args.local_dir, args.by)
    except NothingYetError:
        if not args.allow_fresh:
            raise
        console.note("no checkpoint yet: a fresh start")
        return Outcome({"path": None}, lines=[""])
    return Outcome(fetched, lines=[str(fetched.path)])


# ── logs and datasets ────────────────────────────────────────────────────────────────────────────


@command(
    "s3-upload-logs",
    Argument("folder", metavar="DIR", help="the logs of one run, such as lightning_logs/version_3"),
    Argument("--run", metavar="NAME", help="the run (default: the folder's name)"),
    Argument(
        "--watch", type=checked(parse_seconds), metavar="SECONDS",
        help="look again every so often, until interrupted",
    ),
    DRY_RUN, *S3,
)  # fmt: skip
def s3_upload_logs(args: argparse.Namespace, console: Console) -> Outcome:
    """Mirror the TensorBoard logs of a run to logs/<run>/ in the bucket.

    A file that grows meanwhile is sent as it was at one moment. Checkpoints and *.tmp stay out.
    """
    sync = s3_sync(args, console)
    if not args.watch:
        return _s3_mirror_outcome(sync.upload_logs(args.folder, args.run), console)
    try:
        while True:
            _look_once(sync, args, console)
            time.sleep(args.watch)
    except (KeyboardInterrupt, Terminated):  # what was written last goes as well
        _look_once(sync, args, console)
        raise


def _look_once(sync: S3Sync, args: argparse.Namespace, console: Console) -> None:
    """Send what is new; a storage that is away may be back by the next time."""
    try:
        result = sync.upload_logs(args.folder, args.run)
    except TransferError as error:
        log.warning("%s", error)
        return
    for failure in result.failures:
        log.warning("%s", printable(failure))
    if result.sent:
        amount = f"{human_bytes(result.moved)} in files: {result.sent:,}"
        console.note(f"{time.strftime('%H:%M:%S')} sent {amount}, to {result.place}")


@command(
    "s3-download-logs",
    Argument("run", nargs="?", metavar="RUN", help="one run (default: all)"),
    Argument("--delete", action="store_true", help="remove files here that are gone there; asks"),
    local_dir_flag("logs"), DRY_RUN, *S3,
)  # fmt: skip
def s3_download_logs(args: argparse.Namespace, console: Console) -> Outcome:
    """Fetch the logs of one run, or of all, into a folder for TensorBoard."""
    result = s3_sync(args, console).download_logs(args.run, args.local_dir, args.delete)
    return _s3_mirror_outcome(result, console)


@command(
    "s3-upload-dataset",
    Argument("folder", metavar="DIR", help="the dataset here"),
    Argument("--name", metavar="NAME", help="its name there (default: the folder's)"),
    INCLUDE, EXCLUDE,
    Argument("--delete", action="store_true", help="remove objects that are gone here; asks first"),
    CHECKSUM, DRY_RUN, *S3,
)  # fmt: skip
def s3_upload_dataset(args: argparse.Namespace, console: Console) -> Outcome:
    """Mirror a folder to datasets/<name>/ in the bucket.

    What differs is decided by size and SHA-256, not by time. Secrets stay out. The same command
    continues what was interrupted.
    """
    result = s3_sync(args, console).upload_dataset(
        args.folder, args.name, include=args.include, exclude=args.exclude, delete=args.delete,
        checksum=args.checksum,
    )  # fmt: skip
    return _s3_mirror_outcome(result, console)


@command(
    "s3-download-dataset",
    Argument("name", nargs="?", metavar="NAME", help="the dataset (default: the only one there)"),
    Argument("--local-dir", metavar="DIR", help="the folder here (default: the dataset's name)"),
    INCLUDE, EXCLUDE,
    Argument("--delete", action="store_true", help="remove files here that are gone there; asks"),
    CHECKSUM, DRY_RUN, *S3,
)  # fmt: skip
def s3_download_dataset(args: argparse.Namespace, console: Console) -> Outcome:
    """Mirror datasets/<name>/ of the bucket into a folder here."""
    result = s3_sync(args, console).download_dataset(
        args.name, args.local_dir, include=args.include, exclude=args.exclude, delete=args.delete,
        checksum=args.checksum,
    )  # fmt: skip
    return _s3_mirror_outcome(result, console)


def _s3_mirror_outcome(result: S3Mirrored, console: Console) -> Outcome:
    list_left_out(result.left_out, console)
    lines = step_lines(result.steps) if result.dry_run else ()
    return _s3_outcome(result)._replace(lines=lines)


# ── archives ─────────────────────────────────────────────────────────────────────────────────────


@command("s3-upload-training", *TICKS, WORKSPACE, EXCLUDE, ARCHIVE, DRY_RUN, *S3)
def s3_upload_training(args: argparse.Namespace, console: Console) -> Outcome:
    """Pack the training data and store it in training/, in one pass; or store an archive."""
    sync = s3_sync(args, console)
    archive = Path(args.archive) if args.archive else agreed_training_plan(args, console)
    return _s3_archive_outcome(sync, archive, "training", console)


@command("s3-upload-results", WORKSPACE, EXCLUDE, ARCHIVE, DRY_RUN, *S3)
def s3_upload_results(args: argparse.Namespace, console: Console) -> Outcome:
    """Pack the results and store them in results/, in one pass; or store an archive."""
    sync = s3_sync(args, console)
    archive = Path(args.archive) if args.archive else plan_results(args.workspace, args.exclude)
    return _s3_archive_outcome(sync, archive, "results", console)


@command("s3-download-training", ARCHIVE_NAME, local_dir_flag("."), EXTRACT, *S3)
def s3_download_training(args: argparse.Namespace, console: Console) -> Outcome:
    """Fetch a training archive from training/: the newest, or the one named."""
    sync = s3_sync(args, console)
    return _s3_outcome(sync.download_training_data(args.name, args.local_dir, args.extract))


@command("s3-download-results", ARCHIVE_NAME, local_dir_flag("."), EXTRACT, *S3)
def s3_download_results(args: argparse.Namespace, console: Console) -> Outcome:
    """Fetch a results archive from results/: the newest, or the one named."""
    sync = s3_sync(args, console)
    return _s3_outcome(sync.download_results(args.name, args.local_dir, args.extract))


def _s3_archive_outcome(sync: S3Sync, archive: Path | Plan, kind: str, console: Console) -> Outcome:
    if sync.dry_run:
        where = sync.place(sync.bucket.key(kind))
        if isinstance(archive, Plan):
            return plan_outcome(archive, where)
        return file_outcome(archive, where)
    result = sync.upload_archive(archive, kind)
    list_left_out(result.left_out, console)
    name = shell_word(posixpath.basename(result.key))
    following = f"python cloud_services.py s3-download-{kind} {name} --extract"
    return _s3_outcome(result)._replace(next_command=following)


# ── the bucket itself ────────────────────────────────────────────────────────────────────────────


@command("s3-check", *S3)
def s3_check(args: argparse.Namespace, console: Console) -> Outcome:
    """Try out credentials, endpoint, clock, rights, and what the server supports.

    Each line that fails says what to do about it. One small object is written, and removed where
    that is allowed.
    """
    checks = list(s3_sync(args, console).check())
    marks = {True: "ok", False: "FAILED", None: "without"}
    lines = []
    for check in checks:
        lines.append(f"{marks[check.ok]:<8} {check.name:<12} {printable(check.detail)}")
        if check.remedy and check.ok is not True:
            lines.append(f"{'':<8} {'':<12} {printable(check.remedy)}")
    failed = any(check.ok is False for check in checks)
    code = ExitCode.ACCESS if failed else ExitCode.DONE
    return Outcome({"checks": checks}, lines=lines, exit_code=code)


# ── images ───────────────────────────────────────────────────────────────────────────────────────

IMAGE = Argument("--image", metavar="NAME", help="the image, such as app:latest (DOCKER_IMAGE)")


@command(
    "docker-export", IMAGE,
    Argument("--layers", action="store_true", help="store layers by digest: only new ones go"),
    DRY_RUN, *S3,
)  # fmt: skip
def docker_export(args: argparse.Namespace, console: Console) -> Outcome:
    """Store a Docker or podman image in docker-images/, without a file of its size on the way."""
    image = _image(args)
    result = _image_store(args, console).export(image, args.layers)
    rows = [("image", printable(result.image)), ("object", printable(result.key))]
    if args.dry_run:
        rows[1] = ("would go to", printable(result.key))
        return Outcome(result, rows)
    if result.moved:
        rows += amount_rows(max(1, result.sent_layers), result.moved, result.seconds)
    else:
        rows.append(("nothing to do", "the same image is there already"))
    restore = f"python cloud_services.py docker-load --image {shell_word(image)}"
    return Outcome(result, rows, next_command=restore)


@command(
    "docker-load", IMAGE,
    Argument(
        "--layers", action="store_true", default=None,
        help="load what docker-export --layers stored (default: whichever is newer)",
    ),
    *S3,
)  # fmt: skip
def docker_load(args: argparse.Namespace, console: Console) -> Outcome:
    """Load an image from docker-images/ into Docker or podman; damaged content never arrives."""
    result = _image_store(args, console).load(_image(args), args.layers)
    rows = [("image", printable(result.image)), ("object", printable(result.key))]
    if result.moved:
        rows += [("into", result.engine), *amount_rows(1, result.moved, result.seconds)]
    else:
        rows.append(("nothing to do", "the same image is here already"))
    rows.append(("verified", result.check))
    return Outcome(result, rows)


@command("docker-list", *S3)
def docker_list(args: argparse.Namespace, console: Console) -> Outcome:
    """List the images in docker-images/: time, size, form, name."""
    found = _image_store(args, console).list()
    lines = [
        f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(one.mtime))}  {one.size:>12}  "
        f"{one.form:<8}  {printable(one.image or f'{one.name}:{one.tag}')}"
        for one in found
    ]
    return Outcome({"images": found}, lines=lines)


def _image(args: argparse.Namespace) -> str:
    image = args.image or os.environ.get("DOCKER_IMAGE") or dotenv_settings().get("DOCKER_IMAGE")
    if not image:
        raise UsageError("no image is named", "name one with --image, or DOCKER_IMAGE in .env")
    return image


def _image_store(args: argparse.Namespace, console: Console) -> ImageStore:
    from docker_images import ImageStore

    bucket = s3_sync(args, console).bucket
    return ImageStore(
        bucket, bucket.key("docker-images"), console.progress(),
        dry_run=getattr(args, "dry_run", False),
    )  # fmt: skip
