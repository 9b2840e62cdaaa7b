"""The commands about the Hugging Face Hub: ticks, training data, features, results, both ways."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, cast

from cloud_services import (
    DRY_RUN,
    EXCLUDE,
    HUB_REPO_TYPES,
    WORKSPACE,
    Argument,
    Console,
    ExitCode,
    HuggingFaceDownloader,
    HuggingFaceUploader,
    Outcome,
    RefusedError,
    UsageError,
    command,
    list_left_out,
    local_dir_flag,
    printable,
    step_lines,
)

if TYPE_CHECKING:
    from hf_transport import UploadPlan
    from hub_sync import HubDownloadResult, HubUploadResult

REPO = Argument("--repo-id", required=True, metavar="USER/NAME", help="the repository on the Hub")
TOKEN = Argument(
    "--token", help="a Hugging Face token, or - to read it from standard input (HF_TOKEN)"
)
REPO_TYPE = Argument(
    "--repo-type",
    choices=HUB_REPO_TYPES,
    default="model",
    help="kind of repository (default: model)",
)
HUB_UPLOAD = (
    REPO, TOKEN,
    Argument(
        "--private", action="store_true", default=None,
        help="make a missing repository a private one (the default); refuse a public one",
    ),
    Argument(
        "--public", dest="private", action="store_false", help="make a missing repository public"
    ),
    Argument("--no-create", action="store_true", help="fail when the repository is missing"),
    Argument("--revision", metavar="BRANCH", help="the branch to write to (default: main)"),
    Argument("--tag", metavar="NAME", help="give the final commit this name"),
    EXCLUDE,
    Argument(
        "--delete", action="store_true", help="remove files there that are gone here; asks first"
    ),
    Argument("--no-card", action="store_true", help="leave README.md as it is"),
    DRY_RUN,
)  # fmt: skip
PARQUET = Argument(
    "--parquet", action="store_true", help="send CSVs as zstd parquet, with a schema beside each"
)
HUB_DOWNLOAD = (
    REPO, TOKEN,
    Argument("--revision", metavar="NAME", help="a branch, tag or commit (default: main)"),
    Argument(
        "--include", action="append", default=[], metavar="GLOB",
        help="fetch only these; repeatable",
    ),
    EXCLUDE,
    Argument("--force", action="store_true", help="replace files that were changed here"),
    Argument("--verify", action="store_true", help="compare only, fetch nothing"),
    DRY_RUN,
)  # fmt: skip


def _message(default: str) -> Argument:
    return Argument(
        "--commit-message", default=default, metavar="TEXT", help=f'(default: "{default}")'
    )


def _given_token(args: argparse.Namespace, console: Console) -> str | None:
    if args.token == "-":  # noqa: S105 - no password, but the word for standard input
        token = sys.stdin.readline().strip() if sys.stdin else ""
        if not token:
            raise UsageError(
                "--token - got no token on standard input", "echo $TOKEN | … --token -"
            )
        return token
    if args.token:
        console.note("--token is visible to other users of this machine: HF_TOKEN is not")
    return cast("str | None", args.token)


# ── uploads ──────────────────────────────────────────────────────────────────────────────────────


@command(
    "hf-upload-ticks", *HUB_UPLOAD, PARQUET,
    Argument(
        "--ticks-dir", default="workspace/raw_data/ticks", metavar="DIR",
        help="the ticks here (default: workspace/raw_data/ticks)",
    ),
    _message("Upload tick data"),
)  # fmt: skip
def hf_upload_ticks(args: argparse.Namespace, console: Console) -> Outcome:
    """Send tick data to a dataset repository on the Hugging Face Hub.

    Only what is new or changed is sent; in the end every file is compared. When it is interrupted,
    the same command continues.
    """
    uploader = _hub_uploader(args, console)
    return _hub_upload_outcome(
        uploader.upload_hf_ticks(args.ticks_dir, args.commit_message), console
    )


@command(
    "hf-upload-training", *HUB_UPLOAD, WORKSPACE,
    Argument(
        "--include-scalers", action="store_true", default=True, help="include scalers (the default)"
    ),
    Argument(
        "--no-scalers", dest="include_scalers", action="store_false", help="leave out the scalers"
    ),
    Argument("--include-cache", action="store_true", help="include raw_data/cache/"),
    _message("Upload training data"),
)  # fmt: skip
def hf_upload_training(args: argparse.Namespace, console: Console) -> Outcome:
    """Send the three feature files and the scalers to a dataset repository on the Hub."""
    result = _hub_uploader(args, console).upload_hf_training_data(
        args.include_scalers, args.include_cache, args.commit_message
    )
    return _hub_upload_outcome(result, console)


@command(
    "hf-upload-features", *HUB_UPLOAD, PARQUET,
    Argument(
        "--analysis-dir", default="workspace/analysis-of-features", metavar="DIR",
        help="the analysis here (default: workspace/analysis-of-features)",
    ),
    _message("Upload feature analysis results"),
)  # fmt: skip
def hf_upload_features(args: argparse.Namespace, console: Console) -> Outcome:
    """Send the results of a feature analysis to a dataset repository on the Hub."""
    result = _hub_uploader(args, console).upload_hf_feature_analysis(
        args.analysis_dir, args.commit_message
    )
    return _hub_upload_outcome(result, console)


@command(
    "hf-upload-results", *HUB_UPLOAD, REPO_TYPE, WORKSPACE, _message("Upload training results")
)
def hf_upload_results(args: argparse.Namespace, console: Console) -> Outcome:
    """Send checkpoints, metrics and scalers to a models repository on the Hub."""
    result = _hub_uploader(args, console).upload_hf_results(args.commit_message)
    return _hub_upload_outcome(result, console)


def _hub_uploader(args: argparse.Namespace, console: Console) -> HuggingFaceUploader:
    def approve(plan: UploadPlan) -> None:
        gone = plan.paths("delete")
        for path in gone[:20]:
            console.note(f"to be removed from {args.repo_id}: {printable(path)}")
        question = f"Remove {len(gone)} files from {args.repo_id} that are gone here?"
        if gone and not console.ask(question, "--yes"):
            raise RefusedError("nothing was sent or removed", "leave out --delete")

    return HuggingFaceUploader(
        args.repo_id, _given_token(args, console),
        repo_type=getattr(args, "repo_type", "dataset"), revision=args.revision,
        private=args.private, create=not args.no_create, tag=args.tag, exclude=args.exclude,
        delete=args.delete, parquet=getattr(args, "parquet", False), card=not args.no_card,
        dry_run=args.dry_run, workspace=getattr(args, "workspace", "workspace"),
        progress=console.progress(), approve=approve,
    )  # fmt: skip


def _hub_upload_outcome(result: HubUploadResult, console: Console) -> Outcome:
    list_left_out(result.left_out, console)
    if result.dry_run:
        return Outcome(result, [*result.rows()], step_lines(result.steps))
    return Outcome(result, [*result.rows()], next_command=result.restore)


# ── downloads ────────────────────────────────────────────────────────────────────────────────────


@command("hf-download-ticks", *HUB_DOWNLOAD, local_dir_flag("workspace/raw_data/ticks"))
def hf_download_ticks(args: argparse.Namespace, console: Console) -> Outcome:
    """Fetch tick data from a dataset repository on the Hugging Face Hub.

    Everything comes from one commit, and each file gets its name after its hash was compared. What
    was changed here is not replaced without --force. The same command continues what was
    interrupted.
    """
    return _hub_download_outcome(_hub_downloader(args, console).download_hf_ticks(args.local_dir))


@command("hf-download-training", *HUB_DOWNLOAD, local_dir_flag("workspace"))
def hf_download_training(args: argparse.Namespace, console: Console) -> Outcome:
    """Fetch training data from the Hub into a workspace."""
    downloader = _hub_downloader(args, console)
    return _hub_download_outcome(downloader.download_hf_training_data(args.local_dir))


@command("hf-download-features", *HUB_DOWNLOAD, local_dir_flag("workspace/analysis-of-features"))
def hf_download_features(args: argparse.Namespace, console: Console) -> Outcome:
    """Fetch the results of a feature analysis from the Hub."""
    downloader = _hub_downloader(args, console)
    return _hub_download_outcome(downloader.download_hf_feature_analysis(args.local_dir))


@command("hf-download-results", *HUB_DOWNLOAD, REPO_TYPE, local_dir_flag("workspace"))
def hf_download_results(args: argparse.Namespace, console: Console) -> Outcome:
    """Fetch checkpoints, metrics and scalers from a models repository on the Hub."""
    return _hub_download_outcome(_hub_downloader(args, console).download_hf_results(args.local_dir))


def _hub_downloader(args: argparse.Namespace, console: Console) -> HuggingFaceDownloader:
    return HuggingFaceDownloader(
        args.repo_id, _given_token(args, console),
        repo_type=getattr(args, "repo_type", "dataset"), revision=args.revision,
        include=args.include, exclude=args.exclude, force=args.force, verify=args.verify,
        dry_run=args.dry_run, progress=console.progress(),
    )  # fmt: skip


def _hub_download_outcome(result: HubDownloadResult) -> Outcome:
    lines = step_lines(result.steps) if result.dry_run else ()
    failed = ExitCode.INTEGRITY if result.compared_only else ExitCode.PARTIAL
    return Outcome(result, [*result.rows()], lines, exit_code=ExitCode.DONE if result else failed)
