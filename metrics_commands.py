"""The commands about training runs: curves in a browser, tables of runs, and W&B's offline runs."""

from __future__ import annotations

import argparse
import contextlib
import posixpath
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cloud_services import (
    CONNECTION,
    S3,
    SHOWN,
    Argument,
    CloudError,
    Console,
    ExitCode,
    NotFoundError,
    Outcome,
    PaperspaceDownloader,
    UnreadStream,
    UsageError,
    checked,
    command,
    connection_settings,
    human_bytes,
    parse_seconds,
    port_number,
    printable,
    s3_sync,
)

if TYPE_CHECKING:
    from wandb_runs import OfflineRun

LOGS = "workspace/models/logs"
TENSORBOARD_PORT = 6006
REFRESH_SECONDS = 30.0
LOGS_FLAG = Argument(
    "--logs", default=LOGS, metavar="DIR", help=f"where the runs are (default: {LOGS})"
)


# ── tables ───────────────────────────────────────────────────────────────────────────────────────


@command("list-runs", LOGS_FLAG)
def list_runs(args: argparse.Namespace, _console: Console) -> Outcome:
    """List the training runs below a logs folder.

    With the time they began, steps, last and best loss and accuracy, duration and size. A run whose
    files changed a moment ago is shown as growing.
    """
    import metrics_runs

    runs = metrics_runs.list_runs(args.logs)
    table = metrics_runs.runs_table(runs)
    return Outcome([run.document() for run in runs], lines=list(_table(table)))


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        cells = [f"{first[0]:<{first[1]}}", *(f"{cell:>{width}}" for cell, width in others)]
        yield "  ".join(cells).rstrip()


@command(
    "compare-runs",
    Argument("runs", nargs="+", metavar="RUN", help="names as list-runs shows them"),
    Argument("--plot", metavar="FILE", help="draw the curves into FILE.png or FILE.html"),
    LOGS_FLAG,
)
def compare_runs(args: argparse.Namespace, _console: Console) -> Outcome:
    """Compare training runs side by side: final and best metrics, and settings that differ."""
    import metrics_runs

    if args.plot:
        metrics_runs.require_plot_name(args.plot)
    comparison = metrics_runs.compare_runs(args.logs, args.runs)
    rows = []
    if args.plot:
        plot = metrics_runs.plot_runs(comparison.runs, args.plot)
        rows = [("curves", printable(plot.path))]
    return Outcome(comparison.document(), rows, list(_table(comparison.table())))


# ── TensorBoard ──────────────────────────────────────────────────────────────────────────────────


@command(
    "start-tensorboard",
    Argument("--logdir", metavar="DIR", help=f"what to show (default: newest run in {LOGS})"),
    Argument("--all", action="store_true", help="show every run, not only the newest"),
    Argument(
        "--port", type=checked(port_number), default=TENSORBOARD_PORT, metavar="PORT",
        help="the port here; the next free one if it is taken (default: 6006)",
    ),
    Argument(
        "--host",
        help="the address to listen on; 0.0.0.0 is open to everybody (default: localhost)",
    ),
    Argument("--open", action="store_true", help="open a browser"),
    Argument(
        "--host-ssh", metavar="HOST",
        help="show the logs of this server, through a tunnel; --user, --identity, … as for uploads",
    ),
    Argument(
        "--remote-port", type=checked(port_number), metavar="PORT",
        help="with --host-ssh: TensorBoard's port there (default: 6006)",
    ),
    Argument("--ssh-port", type=checked(port_number), metavar="PORT", help="the SSH port there"),
    Argument("--s3", action="store_true", help="show the logs in the bucket, kept in step"),
    Argument("--run", metavar="NAME", help="with --s3: only this run"),
    Argument(
        "--refresh", type=checked(parse_seconds), metavar="SECONDS",
        help="with --s3: look at the bucket so often (default: 30)",
    ),
    *(a for a in CONNECTION if a.flags[0] not in ("--host", "--port", "--timeout")), *S3,
)  # fmt: skip
def start_tensorboard(args: argparse.Namespace, console: Console) -> Outcome:
    """Show training curves with TensorBoard.

    It shows the newest run until it is interrupted: of this machine, of a server over SSH, or of a
    bucket.
    """
    _require_flags_that_fit(args)
    with contextlib.ExitStack() as stack:
        if args.host_ssh:
            return _remote_tensorboard(args, console, stack)
        return _local_tensorboard(args, console, stack)


WITH_SSH = ("--remote-port", "--ssh-port", *(a.flags[0] for a in CONNECTION))
WITH_S3 = ("--run", "--refresh", *(a.flags[0] for a in S3))
EXCLUDING = (("--s3", "--host-ssh"), ("--s3", "--logdir"), ("--s3", "--all"), ("--logdir", "--all"),
             ("--host", "--host-ssh"))  # fmt: skip


def _require_flags_that_fit(args: argparse.Namespace) -> None:
    """Raise UsageError for a flag that would have no effect."""

    def given(flag: str) -> bool:
        return bool(getattr(args, flag.removeprefix("--").replace("-", "_"), None))

    for one, other in EXCLUDING:
        if given(one) and given(other):
            raise UsageError(f"{one} and {other} exclude each other", "choose one of them")
    fits = {"--host", "--port"}  # those of this machine, not the server's
    fits.update(WITH_SSH if args.host_ssh else (), WITH_S3 if args.s3 else ())
    for flag in sorted({*WITH_SSH, *WITH_S3} - fits):
        if given(flag):
            where = [word for word, flags in (("--host-ssh", WITH_SSH), ("--s3", WITH_S3))
                     if flag in flags]  # fmt: skip
            needed = " or ".join(where)
            raise UsageError(f"{flag} means nothing without {needed}", f"add {needed}")


def _local_tensorboard(
    args: argparse.Namespace, console: Console, stack: contextlib.ExitStack
) -> Outcome:
    from tensorboard_views import TensorBoard, mirrored_logs, newest_run, require_logs

    if args.s3:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tensorboard-")))
        sync = s3_sync(args, console)
        seconds = args.refresh or REFRESH_SECONDS
        logs = stack.enter_context(mirrored_logs(sync, folder, args.run, seconds))
    elif args.logdir or args.all:
        logs = require_logs(args.logdir or LOGS)
    else:
        logs = newest_run(LOGS)
    board = stack.enter_context(TensorBoard(logs, args.port, args.host or "localhost"))
    _until_ctrl_c(
        lambda: _show(args, console, board.url, str(logs), board.is_open), lambda: board.wait(1)
    )
    return SHOWN


def _remote_tensorboard(
    args: argparse.Namespace, console: Console, stack: contextlib.ExitStack
) -> Outcome:
    from ssh_tunnel import Tunnel, open_listener
    from tensorboard_views import RemoteTensorBoard

    given = connection_settings(args, console) | {"host": args.host_ssh, "port": args.ssh_port}
    remote_port = args.remote_port or TENSORBOARD_PORT
    with _flags_in_hints():
        settings = PaperspaceDownloader(**given).settings
    listener = open_listener(args.port, others=True)
    with _flags_in_hints():
        tunnel = Tunnel(settings, remote_port, listener, told=_teller(console))
        stack.enter_context(tunnel)
    logs = args.logdir or posixpath.join(settings.path, LOGS)
    everything = bool(args.all or args.logdir)
    remote = stack.enter_context(RemoteTensorBoard(tunnel, remote_port, logs, everything))
    if not remote.is_ours:
        console.note("TensorBoard was running there already; it shows what it was started with")
    _until_ctrl_c(
        lambda: _show(args, console, tunnel.url, f"{settings.host}:{remote.shows}"),
        lambda: remote.wait(1),
    )
    return SHOWN


HINTED = {"--host": "--host-ssh", "--port": "--ssh-port"}


@contextlib.contextmanager
def _flags_in_hints() -> Iterator[None]:
    """Let hints about a server name the flags of start-tensorboard, where some are other ones."""
    try:
        yield
    except CloudError as error:
        error.hint = re.sub(r"--\w[\w-]*", lambda flag: HINTED.get(flag[0], flag[0]), error.hint)
        raise


def _teller(console: Console) -> Callable[[str], None]:
    """What a tunnel has to say goes to stderr; OSError when nobody reads that any more."""

    def tell(text: str) -> None:
        console.note(text)
        if isinstance(sys.stderr, UnreadStream) and sys.stderr.lost:
            raise sys.stderr.lost

    return tell


def _until_ctrl_c(show: Callable[[], None], look: Callable[[], bool]) -> None:
    """The way such a command ends well, from the moment on that it shows how to end it.

    `look` says whether to go on, and raises what is wrong.
    """
    with contextlib.suppress(KeyboardInterrupt):
        show()
        while look():
            pass


def _show(
    args: argparse.Namespace, console: Console, url: str, logs: str, is_open: bool = False
) -> None:
    """Say where it is; the command itself ends only when it is interrupted."""
    if (port := int(url.rpartition(":")[2])) != args.port:
        console.note(f"port {args.port} is taken: {port} is used")
    rows = [("TensorBoard", url), ("shows", printable(logs))]
    if is_open:
        rows.append(("open to", "all who can reach this machine: TensorBoard asks for no password"))
    rows.append(("to stop", "Ctrl-C"))
    console.show_now(Outcome({"url": url, "logs": logs, "open_to_network": is_open}, rows))
    if args.open:
        from tensorboard_views import opened_in_browser

        opened_in_browser(url)


@command(
    "tunnel",
    *CONNECTION,
    Argument(
        "--remote-port", type=checked(port_number), required=True, metavar="N",
        help="the port there, on the server's own loopback",
    ),
    Argument(
        "--local-port", type=checked(port_number), metavar="PORT",
        help="the port here (default: the same number)",
    ),
)  # fmt: skip
def tunnel(args: argparse.Namespace, console: Console) -> Outcome:
    """Forward a port of this machine over SSH to a port of the server.

    It runs until it is interrupted, and connects again after a cut. Only this machine can use it.
    """
    from ssh_tunnel import Tunnel, open_listener

    settings = PaperspaceDownloader(**connection_settings(args, console)).settings
    listener = open_listener(args.local_port or args.remote_port, flag="--local-port")
    with Tunnel(settings, args.remote_port, listener, told=_teller(console)) as running:
        there = f"{settings.host}, port {args.remote_port}"
        rows = [("here", running.url), ("leads to", there), ("to stop", "Ctrl-C")]
        document = {"url": running.url, "host": settings.host, "remote_port": args.remote_port}
        outcome = Outcome(document, rows)
        _until_ctrl_c(lambda: console.show_now(outcome), lambda: running.wait(1))
    return SHOWN


# ── W&B ──────────────────────────────────────────────────────────────────────────────────────────


@command(
    "wandb-sync",
    Argument(
        "folders", nargs="*", metavar="DIR", help=f"where to look (default: {LOGS} and wandb)"
    ),
    Argument("--include-running", action="store_true", help="send runs that are still written"),
    Argument("--dry-run", action="store_true", help="only show what would be sent"),
)
def wandb_sync(args: argparse.Namespace, console: Console) -> Outcome:
    """Send offline runs to Weights & Biases.

    Runs that have finished, or whose process died, are sent by W&B's own program; one that is still
    being written is left alone.
    """
    from wandb_runs import again, find_runs, send_run, wandb_program

    places = args.folders or [place for place in (LOGS, "wandb") if Path(place).is_dir()]
    if not places:
        raise NotFoundError(
            f"there is neither {LOGS} nor wandb here", "name the folder that holds the runs"
        )
    runs = find_runs(places)
    wanted = ("finished", "interrupted", *(["running"] if args.include_running else []))
    goes = [run for run in runs if run.state in wanted]
    if args.dry_run or not goes:
        rows = [] if args.dry_run else [("nothing to do", "no run is to be sent")]
        return Outcome({"runs": runs, "sent": [], "failed": []}, rows, _state_lines(runs))
    program = wandb_program()
    done = []
    for run in goes:
        console.note(f"sending {printable(run.run_id)}, {human_bytes(run.size)}")
        done.append(send_run(run, program))
    failed = [one for one in done if not one]
    rows = [("sent", f"{len(done) - len(failed)} runs")]
    rows += [("failed", printable(one.error)) for one in failed]
    runs = [again(run) for run in runs]
    document = {
        "runs": runs, "sent": [one.run.run_id for one in done if one],
        "failed": [one.run.run_id for one in failed],
    }  # fmt: skip
    exit_code = ExitCode.PARTIAL if failed else ExitCode.DONE
    return Outcome(document, rows, _state_lines(runs), exit_code=exit_code)


def _state_lines(runs: Sequence[OfflineRun]) -> list[str]:
    return [f"{run.state:<11}  {printable(run.folder)}" for run in runs]
