"""Dataset cards and parquet twins for cloud_services: what makes a Hub repository readable at once.

`merged_card` writes the README.md that `datasets.load_dataset(repo_id)` and the Hub's viewer go by,
into whatever README is there; `parquet_twin` makes a zstd parquet file of a CSV in which no value
is changed. cloud_services imports this file when an upload needs it, and works without it.
"""

from __future__ import annotations

import contextlib
import csv as csv_module
import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from cloud_services import (
    KIB,
    MIB,
    IntegrityError,
    MissingPackageError,
    Progress,
    UsageError,
    human_bytes,
    local_errors,
    need,
    printable,
    replacing,
    write_all,
)

# ── cards: what goes in ──────────────────────────────────────────────────────────────────────────

MAX_TABLE_ROWS = 200
"""A card with more files lists folders instead, so that it never gets huge."""

UNFIT_FOR_CONFIG_NAMES = r'[<>:/\\|?*"\x00-\x1f\x7f]'
"""What `datasets` refuses in the name of a config, and what no name should hold."""


@dataclass(frozen=True)
class CardFile:
    """One file of the repository, as the card's table shows it; `path` is its path there."""

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class CardConfig:
    """One dataset of the repository: each split's path or glob. The first one is the default."""

    name: str
    splits: Mapping[str, str]


def csv_configs(paths: Sequence[str]) -> list[CardConfig]:
    """One config per table, named after its file; for files whose columns differ.

    A name that two files share is lengthened by their folders, and made unique in any case.
    """
    stems = [PurePosixPath(path).stem for path in paths]
    configs: dict[str, CardConfig] = {}
    for path, stem in zip(paths, stems, strict=True):
        whole = stem if stems.count(stem) == 1 else str(PurePosixPath(path).with_suffix(""))
        name = first = re.sub(UNFIT_FOR_CONFIG_NAMES, "_", whole)
        number = 2
        while name in configs:
            name, number = f"{first}_{number}", number + 1
        configs[name] = CardConfig(name, {"train": literal_pattern(path)})
    return list(configs.values())


def literal_pattern(path: str) -> str:
    """`path` as a data_files pattern that matches this very path: `[`, `*`, `?` are no globs."""
    return glob.escape(path)


def merged_card(
    existing: str | None,
    *,
    title: str,
    summary: str,
    configs: Sequence[CardConfig],
    files: Sequence[CardFile],
    restore: str,
    section: str = "files",
) -> str:
    """The README.md of a repository: `existing` with our configs and our section in it.

    The metadata at the head names the configs, so that load_dataset and the viewer find the data;
    a section between two comments holds the summary, the command line that restores the files,
    and their checksums. Everything else stays as it is: prose to the byte, other metadata with
    its comments and order, other people's configs. Where the metadata already says the same, not
    one byte of it changes. Same input, same bytes; merging once more changes nothing.

    `datasets` reads every config of a repository by the file format of the first: let them all be
    CSV, or all parquet. `section` names ours among several in one README: each keeps its own
    configs, and takes out those that it wrote earlier and that are gone. Read and write the file
    without translating line ends. Raises IntegrityError when the metadata is no valid YAML.
    """
    if len({config.name for config in configs}) != len(configs):
        raise UsageError("two configs of the dataset card have the same name")
    text = (existing or "").removeprefix("\ufeff")  # a byte order mark hides the metadata
    newline = "\r\n" if re.match(r"[^\n]*\r\n", text) else "\n"
    front, body = _front_and_body(text)
    marks = _Marks.of(body, section)
    gone = marks.configs(body) - {config.name for config in configs}
    front = _merged_front(front, configs, gone, newline)
    lines = _section_lines(section, title, summary, configs, files, restore)
    return marks.put(front, body, lines, newline)


# ── cards: the section between our markers ───────────────────────────────────────────────────────

MARK = re.compile(
    r"^<!-- cloud-services: (?P<section>[^\s>]+) (?P<which>begin|end)\b(?:(?!-->)[^\r\n])*-->"
    r"[ \t]*(?=\r|\n|\Z)",
    re.MULTILINE,
)
MARKED_CONFIGS = re.compile(r"^<!-- configs: (\[.*\]) -->\r?$", re.MULTILINE)
STRAY_MARK = "<!-- -->"


class _Marks(NamedTuple):
    """Where our section stands in the body of a README; both None when it is to be appended."""

    begin: re.Match[str] | None
    end: re.Match[str] | None
    stray: tuple[re.Match[str], ...]

    @classmethod
    def of(cls, body: str, section: str) -> _Marks:
        """Only one begin that is followed by one end is a section; all else is damaged."""
        marks = list(MARK.finditer(body))
        ours = [mark for mark in marks if mark["section"] == section]
        if [mark["which"] for mark in ours] == ["begin", "end"]:
            begin, end = ours
            if marks.index(end) == marks.index(begin) + 1:
                return cls(begin, end, ())
        return cls(None, None, tuple(ours))

    def configs(self, body: str) -> set[str]:
        """The names of the configs that the section wrote when it was made."""
        if not self.begin or not self.end:
            return set()
        found = MARKED_CONFIGS.search(body, self.begin.end(), self.end.start())
        try:
            return set(map(str, json.loads(found[1]))) if found else set()
        except ValueError:
            return set()

    def put(self, front: str, body: str, lines: Iterable[str], newline: str) -> str:
        """The whole text with the section in its place, or at the end.

        Markers that somebody damaged become empty comments: what stands around them is prose.
        """
        section = newline.join(lines)
        if self.begin and self.end:
            return front + body[: self.begin.start()] + section + body[self.end.end() :]
        for mark in reversed(self.stray):
            body = body[: mark.start()] + STRAY_MARK + body[mark.end() :]
        text = front + body
        gap = next((2 - n for n in (2, 1) if text.endswith(newline * n)), 2) if text else 0
        return text + newline * gap + section + newline


def _section_lines(
    section: str,
    title: str,
    summary: str,
    configs: Sequence[CardConfig],
    files: Sequence[CardFile],
    restore: str,
) -> list[str]:
    command = printable(restore)
    command = f" {command}" if command.startswith("<!") else command  # never one of our marks
    fence = "`" * max(3, *(1 + len(run) for run in re.findall("`+", command)), 3)
    names = json.dumps([config.name for config in configs])
    for hidden in "<>-":
        names = names.replace(hidden, f"\\u{ord(hidden):04x}")
    return [
        f"<!-- cloud-services: {section} begin, made by every upload: write above or below -->",
        *([f"<!-- configs: {names} -->"] if configs else []),
        f"## {_one_line(title)}",
        "",
        _one_line(summary),
        "",
        f"{fence}sh",
        command,
        fence,
        "",
        *_table(sorted(files, key=lambda file: file.path)),
        f"<!-- cloud-services: {section} end -->",
    ]


def _one_line(text: str) -> str:
    """Markdown of one paragraph that opens no comment."""
    return printable(" ".join(text.split())).replace("<!", "&lt;!")


def _table(files: Sequence[CardFile]) -> Iterator[str]:
    if not files:
        return
    total = human_bytes(sum(file.size for file in files))
    yield f"{len(files)} file{'s' * (len(files) != 1)}, {total}."
    if len(files) > MAX_TABLE_ROWS:
        yield "The checksum of a row is that of its files' `sha256sum` lines in order:"
        yield "`sha256sum FOLDER/* | LC_ALL=C sort | sha256sum`, in the root of the repository."
        yield from ("", "| Folder | Files | Bytes | SHA-256 |", "| --- | ---: | ---: | --- |")
        for folder, inside in _by_folder(files).items():
            size = sum(file.size for file in inside)
            yield f"| {_code(folder)} | {len(inside)} | {size} | {_code(sums_sha256(inside))} |"
    else:
        yield from ("", "| File | Bytes | SHA-256 |", "| --- | ---: | --- |")
        for file in files:
            yield f"| {_code(file.path)} | {file.size} | {_code(file.sha256)} |"
    yield ""


def _by_folder(files: Sequence[CardFile]) -> dict[str, list[CardFile]]:
    """Files by their folder; folders deep down are taken together until they fit on a card."""
    folders = [PurePosixPath(file.path).parent.parts for file in files]
    for depth in range(max(map(len, folders)), -1, -1):
        groups: dict[str, list[CardFile]] = {}
        for file, parts in zip(files, folders, strict=True):
            groups.setdefault("/".join(parts[:depth]) or ".", []).append(file)
        if len(groups) <= MAX_TABLE_ROWS:
            break
    return dict(sorted(groups.items()))


def sums_sha256(files: Iterable[CardFile]) -> str:
    """What `sha256sum FILES | LC_ALL=C sort | sha256sum` prints, in the repository's root."""
    lines = []
    for file in files:
        name = os.fsencode(file.path)
        quoted = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n").replace(b"\r", b"\\r")
        mark = b"\\" if quoted != name else b""
        lines.append(mark + file.sha256.encode() + b"  " + quoted + b"\n")
    return hashlib.sha256(b"".join(sorted(lines))).hexdigest()


def _code(text: str) -> str:
    """`text` as code in the cell of a table, whatever it holds."""
    if re.fullmatch(r"[^\s`|\\<>](?:[^`|\\<>]*[^\s`|\\<>])?", text) and text.isprintable():
        return f"`{text}`"
    plain = re.sub(r"[^\w /.-]|_", lambda found: f"&#{ord(found[0])};", printable(text))
    return f"<code>{plain}</code>"


# ── cards: the metadata at the head ──────────────────────────────────────────────────────────────

FRONT_MATTER = re.compile(
    r"(\s*---)[ \t]*(\r\n|\r|\n)([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$))"
)
"""As huggingface_hub finds it, apart from the blanks after the first line, which hide it there."""

EMPTY_FRONT_MATTER = re.compile(r"(\s*---)[ \t]*(\r\n|\r|\n)()(---[ \t]*(?:\r\n|\n|$))")
PLAIN_IN_YAML = re.compile(r"[A-Za-z_][\w./*-]*", re.ASCII)
WORDS_IN_YAML = ("y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf")
BROKEN_CARD_HINT = "mend README.md on the Hub, or leave the card alone with --no-card"


def _front_and_body(text: str) -> tuple[str, str]:
    found = FRONT_MATTER.match(text) or EMPTY_FRONT_MATTER.match(text)
    end = found.end() if found else 0
    return text[:end], text[end:]


def _merged_front(front: str, configs: Sequence[CardConfig], gone: set[str], newline: str) -> str:
    """The metadata with its two fences, after the configs were put in."""
    found = FRONT_MATTER.fullmatch(front) or EMPTY_FRONT_MATTER.fullmatch(front)
    if not found:
        made = _Metadata("", newline).merged(configs, gone)
        return f"---{newline}{made}{newline}---{newline}" if made else ""
    opening, first_end, text, closing = found.groups()
    lines_before = opening.count("\n") + 1
    made = _Metadata(text, newline, lines_before).merged(configs, gone)
    if made == text:
        return opening + first_end + text + closing
    if not closing.startswith(("\r", "\n")):
        closing = newline + closing
    return opening + first_end + made + closing


class _Edit(NamedTuple):
    """Replace a span of the text."""

    start: int
    end: int
    text: str


class _Metadata:
    """The YAML at the head of a README, edited as text so that comments and order stay.

    Every edit is read again and compared with what it should say; where it does not, the
    metadata is written anew from its nodes, which keeps all but comments and layout.
    """

    def __init__(self, text: str, newline: str, lines_before: int = 0) -> None:
        self.yaml: Any = need("yaml", "pyyaml")
        self.text, self.newline, self.lines_before = text, newline, lines_before
        self.root = self._compose(text)
        pairs = self.root.value if self.root else []
        found = [pair for pair in pairs if pair[0].value == "configs"]
        if len(found) > 1:
            raise self._broken("the key configs is there twice")
        self.key: Any = found[0][0] if found else None
        self.value: Any = found[0][1] if found else None
        self.entries = self._entries()

    def merged(self, configs: Sequence[CardConfig], gone: set[str]) -> str:
        """The text after our configs were put in and those that are gone were taken out."""
        try:
            return self._merged(self._wanted(configs, gone), gone)
        except RecursionError as error:
            raise self._broken("it is nested too deeply, or in itself") from error

    def _merged(self, ours: Mapping[str, Any], gone: set[str]) -> str:
        slots = self._slots(ours, gone)
        after = [slot for slot in slots if slot is not None]
        after += [node for name, node in ours.items() if name not in map(_name, self.entries)]
        expected = self._expected(after)
        if expected == self._said(self.root):
            return self.text
        for edit in (self._edited, self._rewritten):
            with contextlib.suppress(self.yaml.YAMLError, _CannotEditError):
                made = str(edit(slots, after))
                if self._said(self._load(made)) == expected:
                    return made
        raise self._broken("its configs cannot be edited")

    # Reading

    def _load(self, text: str) -> Any:
        return self.yaml.compose(text, Loader=self.yaml.SafeLoader)

    def _compose(self, text: str) -> Any:
        """The root node, or None when there is nothing; anything but a mapping is an error."""
        try:
            self.yaml.safe_load(text)  # finds what only the values show: dates, tags, odd keys
            root = self._load(text)
        except self.yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            line = f"line {mark.line + 1 + self.lines_before}: " if mark else ""
            what = getattr(error, "problem", None) or getattr(error, "reason", None) or error
            raise self._broken(f"{line}{what}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise self._broken(str(error)) from error
        if root is None or isinstance(root, self.yaml.MappingNode):
            return root
        if root.tag == "tag:yaml.org,2002:null":
            return None
        raise self._broken("it is no list of names and values")

    def _entries(self) -> list[Any]:
        if self.value is None or self.value.tag == "tag:yaml.org,2002:null":
            return []
        if isinstance(self.value, self.yaml.SequenceNode):
            return list(self.value.value)
        raise self._broken("configs is no list")

    def _broken(self, why: str) -> IntegrityError:
        return IntegrityError(
            f"the metadata at the head of README.md is broken: {printable(why)}", BROKEN_CARD_HINT
        )

    # What it should say

    def _wanted(self, configs: Sequence[CardConfig], gone: set[str]) -> dict[str, Any]:
        """Our entries as nodes. One config of all is the default, and never two of them."""
        names = {config.name for config in configs}
        others = [e for e in self.entries if _name(e) not in names | gone]
        taken = any(_name(e) == "default" or _is_default(e) for e in others)
        several = len(others) + len(configs) > 1
        marked = several and not taken and "default" not in names
        return {
            config.name: self._entry(config, default=marked and config is configs[0])
            for config in configs
        }

    def _entry(self, config: CardConfig, default: bool) -> Any:
        splits = [
            self._mapping({"split": self._scalar(split), "path": self._scalar(path)})
            for split, path in config.splits.items()
        ]
        pairs = {"config_name": self._scalar(config.name)}
        if default:
            pairs["default"] = self.yaml.ScalarNode("tag:yaml.org,2002:bool", "true")
        return self._mapping(pairs | {"data_files": self._list(splits)})

    def _scalar(self, text: str) -> Any:
        """A string that YAML 1.1 and 1.2 take for a string."""
        bare = PLAIN_IN_YAML.fullmatch(text) and text.lower() not in WORDS_IN_YAML
        return self.yaml.ScalarNode("tag:yaml.org,2002:str", text, style=None if bare else '"')

    def _mapping(self, pairs: Mapping[str, Any]) -> Any:
        nodes = [(self._scalar(name), node) for name, node in pairs.items()]
        return self.yaml.MappingNode("tag:yaml.org,2002:map", nodes, flow_style=False)

    def _list(self, nodes: list[Any]) -> Any:
        return self.yaml.SequenceNode("tag:yaml.org,2002:seq", nodes, flow_style=False)

    def _slots(self, ours: Mapping[str, Any], gone: set[str]) -> list[Any]:
        """For each entry that is there what stays in its place: itself, ours, or None."""
        slots: list[Any] = []
        seen: set[str] = set()
        for entry in self.entries:
            name = _name(entry)
            if name in gone or (name in ours and name in seen):
                slots.append(None)
            elif name in ours and self._plain(entry) != self._plain(ours[name]):
                slots.append(ours[name])
            else:
                slots.append(entry)
            seen.add(name)
        return slots

    def _expected(self, entries: list[Any]) -> Any:
        pairs = [(key, value) for key, value in self._pairs() if key is not self.key]
        said = [(self._plain(key), self._plain(value)) for key, value in pairs]
        return said, [self._plain(entry) for entry in entries]

    def _said(self, root: Any) -> Any:
        pairs = root.value if root else []
        others = [(self._plain(k), self._plain(v)) for k, v in pairs if k.value != "configs"]
        lists = [v.value for k, v in pairs if k.value == "configs"]
        entries = lists[0] if lists and isinstance(lists[0], list) else []
        return others, [self._plain(entry) for entry in entries]

    def _pairs(self) -> list[tuple[Any, Any]]:
        return list(self.root.value) if self.root else []

    def _plain(self, node: Any) -> Any:
        """What a node says, without its layout; the order of a mapping's keys says nothing."""
        if isinstance(node, self.yaml.MappingNode):
            pairs = [(self._plain(key), self._plain(value)) for key, value in node.value]
            return node.tag, sorted(pairs, key=repr)
        if isinstance(node, self.yaml.SequenceNode):
            return node.tag, [self._plain(item) for item in node.value]
        return node.tag, node.value

    # Writing

    def _edited(self, slots: list[Any], after: list[Any]) -> str:
        """The text with only the configs changed."""
        if self.value is None:
            column = self.root.start_mark.column if self.root else 0
            block = f"{' ' * column}configs:{self.newline}{self._block(after, column)}"
            return self.text + (self.newline if self.text.strip() else "") + block
        edits = self._edits(slots, after)
        text = self.text
        for edit in sorted(edits, reverse=True):
            text = text[: edit.start] + edit.text + text[edit.end :]
        return text

    def _edits(self, slots: list[Any], after: list[Any]) -> list[_Edit]:
        column, end = self.key.start_mark.column, self._end(self.value)
        if not after:
            return [_Edit(*self._lines(self.key.start_mark.index, end), "")]
        if not self.entries or self.value.flow_style:
            block = self.newline + self._block(after, column)
            return [_Edit(self.value.start_mark.index, end, block)]
        column = self.value.start_mark.column
        edits = []
        for dash, entry, slot in zip(self._dashes(), self.entries, slots, strict=True):
            if slot is None:
                edits.append(_Edit(*self._lines(dash, self._end(entry)), ""))
            elif slot is not entry:
                block = self._block([slot], column).lstrip(" ")
                edits.append(_Edit(dash, self._end(entry), block))
        added = after[sum(slot is not None for slot in slots) :]
        if added:
            at = self._lines(end, end)[1]
            edits.append(_Edit(at, at, self.newline + self._block(added, column)))
        return edits

    def _rewritten(self, _slots: list[Any], after: list[Any]) -> str:
        """The metadata written from its nodes."""
        pairs = [(key, value) for key, value in self._pairs() if key is not self.key]
        at = self._pairs().index((self.key, self.value)) if self.key else len(pairs)
        if after:
            pairs.insert(at, (self._scalar("configs"), self._list(after)))
        root = self.yaml.MappingNode("tag:yaml.org,2002:map", pairs, flow_style=False)
        return self._serialized(root)

    def _block(self, entries: list[Any], column: int) -> str:
        lines = self._serialized(self._list(entries)).split(self.newline)
        return self.newline.join(" " * column + line if line else line for line in lines)

    def _serialized(self, node: Any) -> str:
        text = self.yaml.serialize(
            node, Dumper=self.yaml.SafeDumper, allow_unicode=True, width=2**31
        )
        return self.newline.join(str(text).rstrip("\n").split("\n"))

    # Places in the text

    def _dashes(self) -> list[int]:
        """Where the entries' own dashes are."""
        start, end = self.value.start_mark, self.value.end_mark
        found = [
            token.start_mark.index
            for token in self.yaml.scan(self.text, Loader=self.yaml.SafeLoader)
            if isinstance(token, self.yaml.BlockEntryToken)
            and token.start_mark.column == start.column
            and start.index <= token.start_mark.index <= end.index
        ]
        if len(found) != len(self.entries):
            raise _CannotEditError
        return found

    def _end(self, node: Any) -> int:
        """Where what a node says ends, without the comments and empty lines that follow."""
        if not isinstance(node, self.yaml.ScalarNode) and not node.flow_style:
            children = [part for pair in node.value for part in _parts(pair)]
            return max((self._end(child) for child in children), default=node.start_mark.index)
        start, end = int(node.start_mark.index), int(node.end_mark.index)
        return start + len(self.text[start:end].rstrip())

    def _lines(self, start: int, end: int) -> tuple[int, int]:
        """The span of whole lines around one: with the line end before it, if there is one."""
        first = self.text.rfind("\n", 0, start)
        first -= self.text[:first].endswith("\r") if first > 0 else 0
        last = re.compile(r"\r?\n|\Z").search(self.text, end)
        assert last
        return max(first, 0), last.start() if first >= 0 else last.end()


class _CannotEditError(Exception):
    """The metadata's layout is beyond an edit in place."""


def _parts(pair: Any) -> tuple[Any, ...]:
    return pair if isinstance(pair, tuple) else (pair,)


def _pair_value(entry: Any, name: str) -> str:
    pairs = entry.value if isinstance(entry.value, list) else []
    values = [p[1].value for p in pairs if isinstance(p, tuple) and p[0].value == name]
    return values[-1] if values and isinstance(values[-1], str) else ""


def _name(entry: Any) -> str:
    """The config_name of an entry of the configs; empty when it has none."""
    return _pair_value(entry, "config_name")


def _is_default(entry: Any) -> bool:
    return _pair_value(entry, "default").lower() in ("true", "yes", "on")


# ── parquet: reading a CSV as text ───────────────────────────────────────────────────────────────

PYARROW_VERSION = 21
"""The first pyarrow that writes content-defined chunks."""

BLOCK_BYTES = 4 * MIB
"""A CSV is read in blocks of this size; no row may be longer."""

MAX_HEADER = MIB
CSV_HINT = "mend the file, or upload it as it is, without --parquet"
LAST_ROW = "\x04the end\x04"
"""Put after the last row of a CSV: a quote that was never closed would swallow it."""


class _Header(NamedTuple):
    """The first row of a CSV: its names as they stand there, and the bytes before the second."""

    names: tuple[str, ...]
    size: int

    @property
    def keys(self) -> list[str]:
        """What the columns are called while they are read, for their names may be anything."""
        return [f"c{number}" for number in range(len(self.names))]

    @property
    def columns(self) -> list[str]:
        """Distinct names that are not empty, the same that pandas.read_csv gives."""
        names = [name or f"Unnamed: {number}" for number, name in enumerate(self.names)]
        taken = set(names)
        seen: set[str] = set()
        for number, name in enumerate(names):
            if name in seen:
                count = 1
                while f"{name}.{count}" in taken:
                    count += 1
                names[number] = f"{name}.{count}"
                taken.add(names[number])
            seen.add(name)
        return names


class _Rows:
    """The bytes of a CSV as pyarrow's reader gets them: a header and a last row of our own."""

    closed = False

    def __init__(self, stream: IO[bytes], header: _Header, progress: Progress) -> None:
        self._stream, self._progress = stream, progress
        self._digest = hashlib.sha256()
        self.size = 0
        self._before = (",".join(header.keys) + "\n").encode()
        self._after = (",".join([LAST_ROW] * len(header.names)) + "\n").encode()
        self._take(header.size)
        self._last = b"\n"

    @property
    def sha256(self) -> str:
        """The checksum of what was read, which is the whole file in the end."""
        return self._digest.hexdigest()

    def read(self, count: int) -> bytes:
        """The next bytes: `count` of them up to the end, or a few less.

        None but the last block ends with a carriage return: pyarrow drops a line feed that begins
        the next one, even between quotes.
        """
        data, self._before = self._before, b""
        while len(data) < count and self._after:
            block = self._take(count - len(data))
            if not block:
                block = (b"" if self._last in b"\r\n" else b"\n") + self._after
                self._after = b""
            data += block
        end = len(data[:count].rstrip(b"\r")) or count
        self._before = data[end:]
        return data[:end]

    def _take(self, count: int) -> bytes:
        block = self._stream.read(count)
        self._digest.update(block)
        self.size += len(block)
        self._last = block[-1:] or self._last
        self._progress.advance(len(block))
        return block


def _read_header(path: Path) -> _Header:
    used = 0
    with open(path, "rb") as raw:
        mark = 3 if raw.read(3) == b"\xef\xbb\xbf" else 0
        raw.seek(mark)
        text = io.TextIOWrapper(raw, "utf-8", newline="")

        def lines() -> Iterator[str]:
            nonlocal used
            while line := text.readline(MAX_HEADER):
                used += len(line.encode())
                if used >= MAX_HEADER:
                    raise csv_module.Error("the first row is too long: is a quote left open?")
                yield line

        try:
            names = next(filter(None, csv_module.reader(lines(), strict=True)), None)
        except csv_module.Error as error:
            raise _bad_csv(path, 1, str(error)) from error
        except UnicodeDecodeError as error:
            raise _explained(path, None) from error
    if names is None:
        raise IntegrityError(f"{printable(path)} is empty: it has not even a header", CSV_HINT)
    return _Header(tuple(names), mark + used)


@contextlib.contextmanager
def _batches(path: Path, header: _Header, rows: _Rows) -> Iterator[Iterator[Any]]:
    """The rows as record batches of strings; a missing value is null, `""` is an empty string."""
    pyarrow, reader = _pyarrow(), need("pyarrow.csv")
    options = (
        reader.ReadOptions(block_size=BLOCK_BYTES),
        reader.ParseOptions(
            newlines_in_values=True,
            ignore_empty_lines=len(header.names) > 1,  # a value is missing where there is only one
        ),
        reader.ConvertOptions(
            column_types=dict.fromkeys(header.keys, pyarrow.string()),
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
        ),
    )
    try:
        with reader.open_csv(pyarrow.PythonFile(rows, "r"), *options) as batches:
            yield _without_last_row(batches, path, header)
    except pyarrow.ArrowInvalid as error:
        raise _explained(path, header, str(error)) from error


def _without_last_row(batches: Iterable[Any], path: Path, header: _Header) -> Iterator[Any]:
    held: Any = None
    for batch in batches:
        if batch.num_rows and held is not None:
            yield held
        held = batch if batch.num_rows else held
    last = held.slice(held.num_rows - 1).to_pylist()[0] if held is not None else {}
    if any(value != LAST_ROW for value in last.values()) or not last:
        raise _explained(path, header)
    yield held.slice(0, held.num_rows - 1)


def _pyarrow() -> Any:
    pyarrow = need("pyarrow", f"pyarrow>={PYARROW_VERSION}")
    if int(pyarrow.__version__.split(".")[0]) < PYARROW_VERSION:
        raise MissingPackageError(
            f"--parquet needs pyarrow {PYARROW_VERSION} or newer, not {pyarrow.__version__}",
            f"pip install 'pyarrow>={PYARROW_VERSION}'",
        )
    return pyarrow


# ── parquet: what is wrong with a CSV ────────────────────────────────────────────────────────────

PLAIN_FIELD = re.compile(r"[^,\r\n]*")
QUOTED_FIELD = re.compile(r'(?:[^"]+|"")*')


def _explained(path: Path, header: _Header | None, otherwise: str = "") -> IntegrityError:
    """Read a CSV that pyarrow did not take once more, slowly, to find the line that is wrong."""
    columns = len(header.names) if header else 0
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        found = _first_bad_line(iter(functools.partial(text.readline, BLOCK_BYTES), ""), columns)
    if found:
        return _bad_csv(path, *found)
    return IntegrityError(
        f"{printable(path)} changed while it was read, or cannot be read: {printable(otherwise)}",
        "run the same command again when nobody writes to it, or leave out --parquet",
    )


def _bad_csv(path: Path, line: int, what: str) -> IntegrityError:
    return IntegrityError(f"{printable(path)}, line {line}: {printable(what)}", CSV_HINT)


def _first_bad_line(lines: Iterable[str], columns: int) -> tuple[int, str] | None:
    """The number of the first line that is no good, and what is wrong; None when all are.

    `columns` is 0 as long as the header is not known: then only the encoding counts.
    """
    commas = first = size = 0
    quoted = False
    for number, line in enumerate(lines, 1):
        if not line.isascii() and any("\udc80" <= char <= "\udcff" for char in line):
            return number, "it is not UTF-8"
        if not columns or (not quoted and not line.strip("\r\n")):
            continue
        if not quoted:
            commas, first, size = 0, number, 0
        more, quoted = _commas(line, quoted)
        commas, size = commas + more, size + len(line.encode())
        if size >= BLOCK_BYTES:
            break
        if not quoted and commas + 1 != columns:
            return first, f"{_count(commas + 1)} where the header has {_count(columns)}"
    if size >= BLOCK_BYTES:
        return first, f"the row is longer than {human_bytes(BLOCK_BYTES)}: is a quote left open?"
    return (first, "a quote is left open in this row") if quoted else None


def _commas(line: str, quoted: bool) -> tuple[int, bool]:
    """How many commas separate fields in a line, and whether a quote is still open at its end."""
    at = commas = 0
    while True:
        if not quoted and line.startswith('"', at):
            quoted, at = True, at + 1
        if quoted:
            inside = QUOTED_FIELD.match(line, at)
            at = inside.end() if inside else at
            if at == len(line):
                return commas, True
            quoted, at = False, at + 1
        plain = PLAIN_FIELD.match(line, at)
        at = plain.end() if plain else at
        if not line.startswith(",", at):
            return commas, False
        commas, at = commas + 1, at + 1


def _count(fields: int) -> str:
    return f"{fields} field{'s' * (fields != 1)}"


# ── parquet: which type a column has ─────────────────────────────────────────────────────────────

INTEGERS_AS_TEXT = r"^(0|-?[1-9][0-9]*)$"
FLOATS_AS_TEXT = r"^(-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|nan|-?inf)$"
SURE_DIGITS = 15
"""A decimal number of so many digits survives a float64, whatever they are."""

SURE_EXPONENTS = r"^-?[0-9](\.[0-9]{1,14})?[eE][+-]?([0-9]{1,2}|[12][0-9]{2})$"
TIME_LAYOUTS = tuple((between, zone) for between in (" ", "T") for zone in ("", "Z", r"\+00:00"))
TIME_UNITS = (
    ("ms", 3, "[1-9][0-9]{3}"),
    ("us", 6, "[1-9][0-9]{3}"),
    ("ns", 9, "(1[7-9]|2[01])[0-9]{2}"),  # beyond 1677 and 2262 pyarrow 21 wraps around
)
"""How many digits a second may have, and which years there are."""


class _Kind(NamedTuple):
    """A type that a column of strings may have, and whether values survive it."""

    name: str
    arrow: Callable[[], Any]
    keeps: Callable[[Any], bool]
    """Takes an array of strings without nulls. It may raise ArrowInvalid for: no."""


def _kinds() -> list[_Kind]:
    """All types there are, in the order in which they are tried; text is what remains."""
    arrow = _pyarrow()
    kinds = [
        _Kind("int64", arrow.int64, _keeps_integers),
        _Kind("float64", arrow.float64, _keeps_floats),
        *(
            _Kind("bool", arrow.bool_, functools.partial(_keeps_words, words))
            for words in (("True", "False"), ("true", "false"))
        ),
    ]
    for (between, zone), (unit, digits, years) in itertools.product(TIME_LAYOUTS, TIME_UNITS):
        form = rf"^{years}-\d\d-\d\d{between}\d\d:\d\d:\d\d(\.\d{{1,{digits}}})?{zone}$"
        make = functools.partial(arrow.timestamp, unit, "UTC" if zone else None)
        name = f"timestamp[{unit}{', tz=UTC' if zone else ''}]"
        kinds.append(_Kind(name, make, functools.partial(_keeps_times, form, make)))
    return kinds


def _keeps_integers(values: Any) -> bool:
    compute = need("pyarrow.compute")
    if not _all_match(values, INTEGERS_AS_TEXT):
        return False
    compute.cast(values, "int64")
    return True


def _keeps_floats(values: Any) -> bool:
    """Whether each number's shortest form as a float64 has the very digits that it had as text."""
    compute = need("pyarrow.compute")
    if not _all_match(values, FLOATS_AS_TEXT):
        return False
    shown = compute.cast(compute.cast(values, "float64"), "string")
    exponent = compute.match_substring_regex(values, "[eE]")
    short = compute.less_equal(compute.binary_length(values), SURE_DIGITS)
    sure = compute.or_(compute.equal(values, shown), compute.and_not(short, exponent))
    sure = compute.or_(sure, compute.match_substring_regex(values, SURE_EXPONENTS))
    return all(map(_is_kept, values.filter(compute.invert(sure)).to_pylist()))


def _is_kept(text: str) -> bool:
    try:
        return text in ("nan", "inf", "-inf") or Decimal(text) == Decimal(repr(float(text)))
    except ArithmeticError:  # an exponent beyond even Decimal
        return False


def _keeps_words(words: tuple[str, ...], values: Any) -> bool:
    compute = need("pyarrow.compute")
    return bool(compute.all(compute.is_in(values, need("pyarrow").array(words))).as_py())


def _keeps_times(form: str, arrow: Callable[[], Any], values: Any) -> bool:
    if not _all_match(values, form):
        return False
    need("pyarrow.compute").cast(values, arrow())
    return True


def _all_match(values: Any, pattern: str) -> bool:
    compute = need("pyarrow.compute")
    return bool(compute.all(compute.match_substring_regex(values, pattern)).as_py())


@dataclass
class _Column:
    """What is known of a column after some of its blocks."""

    kinds: list[_Kind]
    missing: bool = False
    valued: bool = False

    def add(self, values: Any) -> None:
        """Take out the types that do not keep all of these values."""
        self.missing = self.missing or values.null_count > 0
        values = values.drop_null()
        if len(values):
            self.valued = True
            self.kinds = [kind for kind in self.kinds if _survive(kind, values)]


def _survive(kind: _Kind, values: Any) -> bool:
    try:
        # The first value settles it mostly, without looking at the others.
        return kind.keeps(values.slice(0, 1)) and kind.keeps(values)
    except need("pyarrow").ArrowInvalid:
        return False


@dataclass
class _Survey:
    """What the first pass over a CSV found."""

    csv: Path
    header: _Header
    columns: list[_Column]
    rows: int = 0
    size: int = 0
    sha256: str = ""


def _surveyed(csv: Path, progress: Progress) -> _Survey:
    kinds = _kinds()
    header = _read_header(csv)
    survey = _Survey(csv, header, [_Column(kinds) for _ in header.names])
    with open(csv, "rb") as stream, _in_threads() as each:
        rows = _Rows(stream, header, progress)
        with _batches(csv, header, rows) as batches:
            for batch in batches:
                each(_Column.add, survey.columns, batch.columns)
                survey.rows += batch.num_rows
    survey.size, survey.sha256 = rows.size, rows.sha256
    return survey


@contextlib.contextmanager
def _in_threads() -> Iterator[Callable[..., list[Any]]]:
    """A `map` over columns on all cores, whose results come in order."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield lambda work, *columns: list(pool.map(work, *columns))


# ── parquet: writing ─────────────────────────────────────────────────────────────────────────────

GROUP_VALUES = 256 * KIB
"""About so many values make a row group. Where one ends is decided by the content of its rows, so
that an insert changes one or two groups and leaves the others the same to the byte."""

MAX_GROUP_BYTES = 256 * MIB
ZSTD_LEVEL = 3  # measured on ticks: a quarter smaller than level 1 in the same time


@dataclass(frozen=True)
class ParquetTwin:
    """A CSV as parquet, and what its columns are."""

    parquet: Path
    schema: Path
    rows: int


def parquet_twin(csv: Path, into: Path, name: str, progress: Progress) -> ParquetTwin:
    """Write `into/name.parquet`, in which each value of `csv` is what it is there.

    A column becomes int64, float64, bool or timestamp only when every value of it survives: its
    digits, sign and spelling can be told from the number. Otherwise it stays text: 007, +5, 1e400,
    NA, numbers with more digits than a float64 holds, dates without a time. What may differ is
    layout: 1.50 and 1.5, 1e3 and 1000.0 are the same float. A missing value (nothing between the
    commas) is null, `""` an empty string, `nan` the float NaN. Columns without a name, or with the
    name of another, are called as pandas.read_csv calls them. Blank lines hold no row, except in
    a file of one column, where they are missing values.

    `into/name.schema.json` lists the columns with their types, and the size and SHA-256 of the
    CSV. The same CSV makes the same bytes with the same pyarrow; the schema's with any.

    `pandas.read_parquet(path)` reads it, and makes floats of integers where some are missing;
    with dtype_backend="pyarrow" they stay integers. `datasets.load_dataset("parquet",
    data_files=path)` reads it, with null as None.

    The CSV is read twice, in blocks, so that memory does not grow with it. Raises IntegrityError
    with file and line for a row with too few or too many fields, a quote that is left open, text
    that is not UTF-8, an empty file, and MissingPackageError without pyarrow 21 or newer.
    """
    return parquet_twins([(csv, name)], into, progress)[0]


def parquet_twins(
    tables: Sequence[tuple[Path, str]], into: Path, progress: Progress
) -> list[ParquetTwin]:
    """The twins of CSVs that are read together, as by one glob: (file, name) each.

    Columns of the same name get the same type in all of them: one that keeps every value.
    """
    _pyarrow()
    surveys, twins = [], []
    for csv, _ in tables:
        with _step(progress, f"reading {csv.name}", csv):
            surveys.append(_surveyed(csv, progress))
    settled = _settled(surveys)
    for survey, (csv, name) in zip(surveys, tables, strict=True):
        with _step(progress, f"writing {name}.parquet", csv):
            twins.append(_written(survey, settled, into, name, progress))
    return twins


@contextlib.contextmanager
def _step(progress: Progress, what: str, csv: Path) -> Iterator[None]:
    with local_errors(csv):
        progress.begin(printable(what), csv.stat().st_size)
        try:
            yield
        finally:
            progress.end()


def _settled(surveys: Sequence[_Survey]) -> dict[str, _Kind | None]:
    """The type of each column by its name; None is text, and so is a column without a value."""
    kinds: dict[str, list[_Kind]] = {}
    valued: set[str] = set()
    for survey in surveys:
        for name, column in zip(survey.header.columns, survey.columns, strict=True):
            before = kinds.get(name, column.kinds)
            possible = {kind.name for kind in column.kinds}
            kinds[name] = [kind for kind in before if kind.name in possible]
            valued |= {name} if column.valued else set()
    return {name: left[0] if left and name in valued else None for name, left in kinds.items()}


def _written(
    survey: _Survey, settled: Mapping[str, _Kind | None], into: Path, name: str, progress: Progress
) -> ParquetTwin:
    arrow, parquet = _pyarrow(), need("pyarrow.parquet")
    kinds = {column: settled[column] for column in survey.header.columns}
    types = {column: kind.arrow() if kind else arrow.string() for column, kind in kinds.items()}
    twin = ParquetTwin(into / f"{name}.parquet", into / f"{name}.schema.json", survey.rows)
    with replacing(twin.parquet) as raw, open(survey.csv, "rb") as stream:
        rows = _Rows(stream, survey.header, progress)
        sink = io.BufferedWriter(cast(io.RawIOBase, raw), MIB)
        with parquet.ParquetWriter(
            sink,
            arrow.schema(types.items()),
            compression="zstd",
            compression_level=ZSTD_LEVEL,
            use_content_defined_chunking=True,
            use_dictionary=[column for column, kind in kinds.items() if kind is None],
            write_page_index=True,
        ) as writer:
            for group in _row_groups(_typed(survey, rows, types), len(types)):
                writer.write_table(group, row_group_size=max(1, group.num_rows))
        if (rows.size, rows.sha256) != (survey.size, survey.sha256):
            raise _explained(survey.csv, survey.header)
        sink.flush()
        sink.detach()
    with replacing(twin.schema) as raw:
        write_all(raw, _schema_json(survey, kinds).encode())
    return twin


def _typed(survey: _Survey, rows: _Rows, types: Mapping[str, Any]) -> Iterator[Any]:
    """The batches of the second pass, in their types and under their names."""
    arrow, compute = _pyarrow(), need("pyarrow.compute")
    with _in_threads() as each, _batches(survey.csv, survey.header, rows) as batches:
        for batch in batches:
            columns = each(compute.cast, batch.columns, types.values())
            yield arrow.RecordBatch.from_arrays(columns, names=list(types))


def _row_groups(batches: Iterable[Any], columns: int) -> Iterator[Any]:
    """Tables of about GROUP_VALUES values that end where the content says so."""
    arrow = _pyarrow()
    usual = max(1, GROUP_VALUES // columns)
    held: list[Any] = []
    count = size = 0

    def taken() -> Any:
        nonlocal held, count, size
        table = arrow.Table.from_batches(held).combine_chunks()
        held, count, size = [], 0, 0
        return table

    for batch in batches:
        start = 0
        for end, is_cut in _cuts(batch, usual):
            while start < end:
                piece = batch.slice(start, min(end - start, 4 * usual - count))
                held.append(piece)
                start, count, size = start + len(piece), count + len(piece), size + piece.nbytes
                is_end = is_cut and start == end and count >= usual // 4
                if is_end or count >= 4 * usual or size >= MAX_GROUP_BYTES:
                    yield taken()
    if held:
        yield taken()


def _cuts(batch: Any, usual: int) -> list[tuple[int, bool]]:
    """Where a row group may end: after one row in `usual`, chosen by what the rows say."""
    arrow, compute = _pyarrow(), need("pyarrow.compute")
    zero, factor, shift, half, limit = (
        arrow.scalar(number, arrow.uint64())
        for number in (0, 0x9E3779B97F4A7C15, 29, 32, 2**32 // usual)
    )
    mixed = zero
    for column in batch.columns:
        mixed = compute.multiply(compute.add(mixed, _as_numbers(column)), factor)
        mixed = compute.bit_wise_xor(mixed, compute.shift_right(mixed, shift))
    mixed = compute.multiply(mixed, factor)
    chosen = compute.less(compute.shift_right(mixed, half), limit)
    ends = [row + 1 for row in compute.indices_nonzero(chosen).to_pylist()]
    return [*((end, True) for end in ends), (len(batch), False)]


def _as_numbers(column: Any) -> Any:
    """A number for each value: its bits, or the length of a text."""
    arrow, compute = _pyarrow(), need("pyarrow.compute")
    if column.type == arrow.string():
        column = compute.cast(compute.binary_length(column), "uint64")
    elif column.type == arrow.bool_():
        column = compute.cast(column, "uint64")
    else:
        column = column.view(arrow.uint64())
    return compute.fill_null(column, 0)


def _schema_json(survey: _Survey, kinds: Mapping[str, _Kind | None]) -> str:
    """What was converted and how, one column a line; independent of pyarrow's version."""
    lines = []
    known = zip(survey.header.names, survey.columns, kinds.items(), strict=True)
    for header, column, (name, kind) in known:
        facts: dict[str, Any] = {"name": name, "type": kind.name if kind else "string"}
        facts |= {"nullable": column.missing} | ({"header": header} if header != name else {})
        lines.append(json.dumps(facts))
    source = json.dumps({"bytes": survey.size, "sha256": survey.sha256})
    columns = ",\n  ".join(lines)
    return (
        f'{{\n "source": {source},\n "rows": {survey.rows},\n "columns": [\n  {columns}\n ]\n}}\n'
    )
