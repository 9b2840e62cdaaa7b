"""What the calls of S3Sync return: what arrived, how it was verified, what failed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cloud_services import LeftOut, Step, amount_rows, printable


class S3Sent(NamedTuple):
    """An object that holds what it should; `moved` bytes were sent for it in this run."""

    source: str
    key: str
    size: int
    moved: int
    copied: bool
    """The content was in the bucket under another name: the server copied it."""
    sha256: str
    check: str
    seconds: float
    left_out: tuple[LeftOut, ...] = ()

    def __bool__(self) -> bool:
        return True

    def rows(self) -> Iterator[tuple[str, str]]:
        """What a person wants to know, as labels and values."""
        yield from (("from", printable(self.source)), ("to", printable(self.key)))
        if self.copied:
            yield "copied", "on the server: the content was there under another name"
        elif not self.moved:
            yield "nothing to do", "the same content is there already"
        else:
            yield from amount_rows(1, self.moved, self.seconds)
        yield from (("sha256", self.sha256), ("verified", self.check))


class S3Fetched(NamedTuple):
    """A file that holds what the object holds; `moved` bytes were fetched for it in this run."""

    key: str
    path: Path
    size: int
    moved: int
    sha256: str
    check: str
    seconds: float
    passed_over: tuple[str, ...] = ()
    """What would have come first, and why it was of no use."""
    extracted: str | None = None

    def __bool__(self) -> bool:
        return True

    def rows(self) -> Iterator[tuple[str, str]]:
        """What a person wants to know, as labels and values."""
        yield from (("from", printable(self.key)), ("to", printable(self.path)))
        for why in self.passed_over:
            yield "passed over", printable(why)
        if self.moved:
            yield from amount_rows(1, self.moved, self.seconds)
        else:
            yield "nothing to do", "the same content is here already"
        if self.extracted:
            yield "unpacked in", printable(self.extracted)
        yield from (("sha256", self.sha256), ("verified", self.check))


class S3Mirrored(NamedTuple):
    """How a folder and a prefix were made the same; true when nothing failed."""

    place: str
    folder: Path
    steps: tuple[Step, ...]
    sent: int = 0
    moved: int = 0
    """Bytes; `sent` counts files, in either direction."""
    deleted: int = 0
    failures: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    """How what was moved was verified, each way once."""
    left_out: tuple[LeftOut, ...] = ()
    dry_run: bool = False
    seconds: float = 0.0

    @property
    def unchanged(self) -> int:
        """Files that were the same already."""
        return sum(step.action == "keep" for step in self.steps)

    def __bool__(self) -> bool:
        return not self.failures

    def rows(self) -> Iterator[tuple[str, str]]:
        """What a person wants to know, as labels and values."""
        yield from (("bucket", printable(self.place)), ("folder", printable(self.folder)))
        if self.dry_run:
            return
        if self.sent:
            yield from amount_rows(self.sent, self.moved, self.seconds)
        if self.unchanged:
            yield "unchanged", f"{self.unchanged:,} files"
        if self.deleted:
            yield "removed", f"{self.deleted:,} files"
        for failure in self.failures:
            yield "failed", printable(failure)
        for check in self.checks:
            yield "verified", check
        if self and not self.sent and not self.deleted:
            yield "nothing to do", "the same content is on both sides"


class S3Pruned(NamedTuple):
    """Which checkpoints stay, and which went (with `dry_run`: would go)."""

    kept: tuple[str, ...]
    removed: tuple[str, ...]
    freed: int
    failures: tuple[str, ...] = ()
    dry_run: bool = False

    def __bool__(self) -> bool:
        return not self.failures
