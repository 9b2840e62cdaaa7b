"""Keeps one kind of data in step with a repository on the Hub, in either direction.

A transfer is a plan with a reason for every file, then what the plan says, then a comparison of
what came of it. cloud_services names the kinds of data and their folders; hf_transport moves the
bytes. It imports this file when a hf-command runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import posixpath
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

from cloud_services import (
    FEATURE_FILES,
    HUB_RESULTS,
    AccessError,
    HubKind,
    IntegrityError,
    LeftOut,
    NotFoundError,
    Plan,
    PlannedFile,
    Progress,
    RefusedError,
    Step,
    amount_rows,
    cache_folder,
    excluded_by,
    folded,
    in_background,
    log,
    printable,
    secret_part,
    unsafe_name,
)
from cloud_settings import HubSettings
from hash_cache import HashCache, open_hash_cache
from hf_transport import (
    Download,
    Fetcher,
    HubRepo,
    RemoteFile,
    Upload,
    UploadPlan,
    UploadRun,
    compare_download,
    compare_upload,
    hash_ahead,
    require_client,
    require_within_limits,
)

# ── results ──────────────────────────────────────────────────────────────────────────────────────


class HubUploadResult(NamedTuple):
    """What an upload found and did; `commit` is where it can be seen."""

    repo_id: str
    url: str
    commit: str
    restore: str
    """The command line that fetches it."""
    steps: tuple[Step, ...]
    commits: int = 0
    sent_files: int = 0
    sent_bytes: int = 0
    deleted: int = 0
    left_out: tuple[LeftOut, ...] = ()
    dry_run: bool = False
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return True

    def rows(self) -> Iterator[tuple[str, str]]:
        """What a person wants to know, as labels and values."""
        if self.dry_run:
            yield "would go to", self.url
            return
        yield from (("repository", self.url), ("commit", self.commit))
        kept = _count(self.steps, "keep")
        if not self.commits:
            yield "nothing to do", f"all {kept:,} files are there already, unchanged"
            return
        yield from amount_rows(self.sent_files, self.sent_bytes, self.seconds)
        yield "commits", f"{self.commits}"
        if kept:
            yield "unchanged", f"{kept:,} files"
        if self.deleted:
            yield "removed", f"{self.deleted:,} files"
        yield "verified", "every file's hash as the Hub lists it"


class HubDownloadResult(NamedTuple):
    """What a download found and did; true when everything is here as it is on the Hub."""

    repo_id: str
    commit: str
    local_dir: Path
    steps: tuple[Step, ...]
    fetched_files: int = 0
    moved: int = 0
    """Bytes of this run alone."""
    failures: tuple[str, ...] = ()
    dry_run: bool = False
    compared_only: bool = False
    seconds: float = 0.0

    def __bool__(self) -> bool:
        return not self.failures

    def rows(self) -> Iterator[tuple[str, str]]:
        """What a person wants to know, as labels and values."""
        yield from (("repository", self.repo_id), ("commit", self.commit))
        yield "folder", printable(self.local_dir)
        if self.dry_run:
            return
        if self.fetched_files:
            yield from amount_rows(self.fetched_files, self.moved, self.seconds)
        if kept := _count(self.steps, "keep"):
            yield "unchanged", f"{kept:,} files"
        for failure in self.failures:
            yield "failed", printable(failure)
        if self:
            yield "verified", "every file's hash"


def _count(steps: Sequence[Step], action: str) -> int:
    return sum(step.action == action for step in steps)


# ── listings ─────────────────────────────────────────────────────────────────────────────────────


def files_at(
    repo: HubRepo, commit: str, hashes: HashCache, folder: str = ""
) -> Mapping[str, RemoteFile]:
    """The files of a folder at a commit, which never change: they are listed once."""
    remembered = hashes.listing(f"{repo.url}/{folder}", commit)
    with contextlib.suppress(TypeError):  # spoilt here: it is asked for again
        if remembered is not None:
            return {row[0]: RemoteFile(*row) for row in remembered}
    files = repo.files(commit, folder)
    remember_files(repo, commit, hashes, files, folder)
    return files


def remember_files(
    repo: HubRepo, commit: str, hashes: HashCache, files: Mapping[str, RemoteFile], folder: str = ""
) -> None:
    """Note what a commit holds, so that nobody has to list it again."""
    hashes.remember_listing(f"{repo.url}/{folder}", commit, files.values())


# ── uploads ──────────────────────────────────────────────────────────────────────────────────────


class _Seen(NamedTuple):
    """A repository at one commit."""

    commit: str
    files: Mapping[str, RemoteFile]
    tags: Mapping[str, str]
    """Name → commit; only asked for when a tag is to be made."""


class HubSender(NamedTuple):
    """Sends folders to one repository; the fields are those of HuggingFaceUploader()."""

    repo: HubRepo
    private: bool | None
    create: bool
    tag: str | None
    exclude: tuple[str, ...]
    delete: bool
    parquet: bool
    card: bool
    dry_run: bool
    progress: Progress
    approve: Callable[[UploadPlan], None] | None

    def send(
        self, kind: HubKind, make_plan: Callable[[], Plan], message: str,
        owned: tuple[str, ...] = (),
    ) -> HubUploadResult:  # fmt: skip
        """Compare, send and verify one kind of data; `owned` are the folders --delete may empty."""
        started = time.monotonic()
        with open_hash_cache() as hashes:
            looking = in_background(lambda: self._look(hashes))
            plan = _without_cache_folders(make_plan())
            hashes.load(plan.workspace)
            result = self._send(kind, plan, hashes, looking, message, owned or (kind.root,))
        return result._replace(
            left_out=plan.left_out, dry_run=self.dry_run, seconds=time.monotonic() - started
        )

    def _send(
        self, kind: HubKind, plan: Plan, hashes: HashCache, looking: Future[_Seen], message: str,
        owned: tuple[str, ...],
    ) -> HubUploadResult:  # fmt: skip
        uploads = self._uploads(plan, kind.root, hashes)
        if not self.dry_run:
            hash_ahead(uploads, hashes)
        seen = looking.result()
        require_within_limits(uploads, seen.files)
        goes = self._deletable(plan, owned)
        steps = compare_upload(uploads, seen.files, hashes, seen.commit, goes)
        self._require_free_tag(seen, steps.busy)
        result = HubUploadResult(
            self.repo.settings.repo_id, self.repo.url, steps.commit,
            _restore_line(kind.name, self.repo.settings), steps.steps,
        )  # fmt: skip
        if self.dry_run:
            return result
        if self.approve is not None:
            self.approve(steps)
        sent = set(steps.paths("send"))
        require_client(upload for upload in uploads if upload.path in sent)
        if not seen.commit:
            seen = self._create(hashes)
            steps = compare_upload(uploads, seen.files, hashes, seen.commit, goes)
        wants_card = self.card and (steps.busy or "README.md" not in seen.files)
        make_card = functools.partial(self._card, kind, plan, uploads, hashes)
        run = UploadRun(
            self.repo, uploads, hashes, message, make_card if wants_card else None, self.progress
        )
        commit = seen.commit
        if steps.busy or wants_card:
            commit = run.carry_out(steps, seen.files)
            remember_files(self.repo, commit, hashes, run.verify(commit))
        if self.tag and self.tag not in seen.tags:
            self.repo.call("create_tag", tag=self.tag, revision=commit, exist_ok=True)
        return result._replace(
            commit=commit, commits=len(run.commits), sent_files=run.sent_files,
            sent_bytes=run.sent_bytes, deleted=len(steps.paths("delete")),
        )  # fmt: skip

    def _uploads(self, plan: Plan, root: str, hashes: HashCache) -> list[Upload]:
        uploads = []
        folder = os.path.join(plan.workspace, "")
        for file in plan.files:
            below = file.below
            if self.parquet and below.endswith(".csv") and root != "workspace/":
                uploads += self._parquet_twin(file, root, hashes)
            else:
                uploads.append(Upload(root + below, folder + below, *file[2:]))
        return uploads

    def _parquet_twin(self, file: PlannedFile, root: str, hashes: HashCache) -> list[Upload]:
        """The parquet and schema of a CSV; made anew only when the CSV has other content."""
        from hub_cards import parquet_twin

        name = posixpath.basename(file.below).removesuffix(".csv")
        content = hashes.sha256(file.source)
        folder = cache_folder() / "parquet" / content[:2] / content
        paths = [folder / f"{name}.schema.json", folder / f"{name}.parquet"]
        if not all(path.is_file() for path in paths):
            parquet_twin(Path(file.source), folder, name, self.progress)
        stem = root + file.below.removesuffix(".csv")
        found = []
        for path in paths:
            status = path.stat()
            suffix = path.name.removeprefix(name)
            state = (status.st_size, status.st_mtime_ns, status.st_ino)
            found.append(Upload(stem + suffix, str(path), *state))
        return found

    def _deletable(self, plan: Plan, owned: tuple[str, ...]) -> Callable[[str], bool]:
        """Which files of the repository --delete may remove: ours, and not those left out here."""
        left_out = {file.name.removeprefix("workspace/") for file in plan.left_out}

        def goes(path: str) -> bool:
            root = next((folder for folder in owned if path.startswith(folder)), None)
            if not self.delete or root is None:
                return False
            below = path.removeprefix("workspace/" if root.startswith("workspace/") else root)
            excluded = any(excluded_by(below, pattern) for pattern in self.exclude)
            ours = not secret_part(below) and posixpath.basename(below) != ".gitkeep"
            return ours and not excluded and below not in left_out

        return goes

    def _look(self, hashes: HashCache) -> _Seen:
        """What the repository holds; nothing, when it or the branch has to be made."""
        if not self.repo.settings.token:
            raise AccessError(
                "an upload needs a Hugging Face token",
                f"make one at {self.repo.settings.endpoint}/settings/tokens: export HF_TOKEN=…",
            )
        try:
            private = self.repo.is_private()
            if self.private and not private:
                raise self._is_public()
            self.repo.require_writable()
            commit = self.repo.head()
        except NotFoundError:
            if not self.create:
                raise
            return _Seen("", {}, {})
        if self.private is False and private:
            log.warning(
                "%s is private and stays so: --public is for a new repository", self.repo.name
            )
        files = files_at(self.repo, commit, hashes)
        return _Seen(commit, files, self.repo.tags() if self.tag else {})

    def _require_free_tag(self, seen: _Seen, busy: bool) -> None:
        """A tag may name the commit that is there already, not one that is about to be left."""
        named = seen.tags.get(self.tag or "")
        if named and (busy or named != seen.commit):
            raise RefusedError(
                f"the tag {printable(self.tag)} names another commit of {self.repo.name}",
                "choose another --tag",
            )

    def _is_public(self) -> RefusedError:
        return RefusedError(
            f"{self.repo.settings.repo_id} is public; --private is for a new repository",
            "make it private in its settings on the Hub, or leave out --private",
        )

    def _create(self, hashes: HashCache) -> _Seen:
        """Make the repository, a private one unless asked otherwise, and the branch."""
        private = self.private is not False
        made = self.repo.create(private)
        if private and (made or self.private) and not self.repo.is_private():
            raise self._is_public()
        if self.repo.settings.revision != "main":
            self.repo.call("create_branch", branch=self.repo.settings.revision, exist_ok=True)
        commit = self.repo.head()
        return _Seen(commit, files_at(self.repo, commit, hashes), {})

    def _card(
        self, kind: HubKind, plan: Plan, uploads: Sequence[Upload], hashes: HashCache,
        existing: str | None,
    ) -> str:  # fmt: skip
        """README.md with what was sent, around the prose that is in the existing one."""
        from hub_cards import CardConfig, CardFile, csv_configs, merged_card

        tables = _tables(kind, plan, self.parquet)
        if kind.name == "features":
            configs = csv_configs(list(tables.values()))
        else:
            configs = [CardConfig("default", tables)] if tables else []
        files = [CardFile(u.path, u.size, u.sha256(hashes)) for u in uploads]
        return merged_card(
            existing, title=f"{kind.title}: {self.repo.settings.repo_id.partition('/')[2]}",
            summary=f"{kind.title} sent by cloud_services.", configs=configs, files=files,
            section=kind.name, restore=_restore_line(kind.name, self.repo.settings),
        )  # fmt: skip


def _tables(kind: HubKind, plan: Plan, parquet: bool) -> dict[str, str]:
    """What the Hub's viewer shall show: the name of a split or table → its path or pattern."""
    if kind.name == "training":
        splits = ("train", "validation", "test")
        return dict(zip(splits, (kind.root + name for name in FEATURE_FILES), strict=True))
    suffix = _table_suffix(plan, parquet)
    if kind.name == "ticks" and suffix:
        return {"train": f"{kind.root}**/*{suffix}"}
    if kind.name != "features":
        return {}
    names = (file.below for file in plan.files)
    tables = sorted(name.removesuffix(".csv") for name in names if name.endswith(".csv"))
    return {table: f"{kind.root}{table}{suffix}" for table in tables}


def _table_suffix(plan: Plan, parquet: bool) -> str:
    """How the names of the tables on the Hub end; empty: there are none."""
    names = [file.name for file in plan.files]
    if parquet and any(name.endswith(".csv") for name in names):
        return ".parquet"
    return next((s for s in (".csv", ".parquet") if any(n.endswith(s) for n in names)), "")


def _without_cache_folders(plan: Plan) -> Plan:
    """The plan without .cache folders, which `hf download` makes and the Hub takes from nobody."""
    if not any(".cache" in file.name for file in plan.files):
        return plan
    files = [file for file in plan.files if ".cache" not in file.below.split("/")]
    taken = set(files)
    left_out = [
        LeftOut(file.below, "the Hub takes no .cache folders")
        for file in plan.files
        if file not in taken
    ]
    return plan._replace(files=tuple(files), left_out=tuple(sorted([*plan.left_out, *left_out])))


def _restore_line(kind: str, settings: HubSettings) -> str:
    """The command line that fetches what an upload sent."""
    words = [f"python cloud_services.py hf-download-{kind} --repo-id {settings.repo_id}"]
    if settings.revision != "main":
        words.append(f"--revision {shlex.quote(settings.revision)}")
    if kind == HUB_RESULTS.name and settings.repo_type != "model":
        words.append(f"--repo-type {settings.repo_type}")
    return " ".join(words)


# ── downloads ────────────────────────────────────────────────────────────────────────────────────


class HubReceiver(NamedTuple):
    """Fetches folders of one repository; the fields are those of HuggingFaceDownloader()."""

    repo: HubRepo
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    force: bool
    verify: bool
    dry_run: bool
    progress: Progress

    def receive(self, kind: HubKind, folder: Path) -> HubDownloadResult:
        """Compare, fetch and verify one kind of data, all of it from one commit."""
        started = time.monotonic()
        commit = self.repo.head()
        with open_hash_cache() as hashes:
            downloads = self._wanted(kind, folder, files_at(self.repo, commit, hashes, kind.root))
            hashes.load(folder)
            steps = compare_download(downloads, hashes, self.force)
            result = HubDownloadResult(
                self.repo.settings.repo_id, commit, folder, tuple(steps), dry_run=self.dry_run,
                seconds=time.monotonic() - started,
            )  # fmt: skip
            if self.verify:
                wrong = [f"{s.path}: {_difference(s)}" for s in steps if s.action != "keep"]
                return result._replace(failures=tuple(wrong), compared_only=True)
            if self.dry_run:
                return result
            _require_no_local_change(steps, folder)
            fetcher = Fetcher(self.repo, commit, hashes, self.progress)
            todo = [d for d, s in zip(downloads, steps, strict=True) if s.action == "fetch"]
            fetcher.fetch(todo)
        if fetcher.failures and (len(todo) == 1 or len(fetcher.failures) == len(todo)):
            raise fetcher.failures[0][1]
        return result._replace(
            fetched_files=len(todo) - len(fetcher.failures), moved=fetcher.moved,
            failures=tuple(f"{d.remote.path}: {error}" for d, error in fetcher.failures),
            seconds=time.monotonic() - started,
        )  # fmt: skip

    def _wanted(
        self, kind: HubKind, folder: Path, remote: Mapping[str, RemoteFile]
    ) -> list[Download]:
        """The files of this kind that the patterns let through, each with its place here."""
        wanted: dict[str, Download] = {}
        for path, file in sorted(remote.items()):
            name = kind.local_name(path)
            if not name or not self._let_through(name):
                continue
            if reason := unsafe_name(name):
                raise IntegrityError(f"{self.repo.settings.repo_id}: {printable(path)!r} {reason}")
            if folded(name) in wanted:
                raise IntegrityError(
                    f"{self.repo.settings.repo_id}: two files become {printable(name)} here",
                    "fetch them one by one with --include, each into its own --local-dir",
                )
            wanted[folded(name)] = Download(file, folder / name)
        if not wanted:
            kinds = ", ".join(f"{remote}…" for remote, _ in kind.places)
            chosen = " that the patterns let through" if self.include or self.exclude else ""
            raise NotFoundError(
                f"{self.repo.settings.repo_id} holds no {kind.title.lower()}{chosen} ({kinds})",
                f"look at {self.repo.url}",
            )
        return list(wanted.values())

    def _let_through(self, name: str) -> bool:
        if posixpath.basename(name) == ".gitkeep":
            return False
        included = not self.include or any(excluded_by(name, p) for p in self.include)
        return included and not any(excluded_by(name, p) for p in self.exclude)


def _difference(step: Step) -> str:
    return "missing here" if step.reason == "new" else "differs"


def _require_no_local_change(steps: Sequence[Step], folder: Path) -> None:
    refused = [step for step in steps if step.action == "refuse"]
    if refused:
        more = f" and {len(refused) - 1} more files" if len(refused) > 1 else ""
        raise RefusedError(
            f"{printable(refused[0].path)}{more} would replace local content in {printable(folder)}"
            f" ({refused[0].reason}); nothing was fetched",
            "add --force to replace it, or --exclude to leave it",
        )
