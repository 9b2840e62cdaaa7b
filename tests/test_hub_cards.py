"""Dataset cards and parquet twins, judged by `datasets`, huggingface_hub, csv and pandas."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import hub_cards
from cloud_services import (
    ExitCode,
    IntegrityError,
    MissingPackageError,
    NotFoundError,
    Progress,
    RefusedError,
    UsageError,
    lock_part,
    need,
    open_for_update,
    part_name,
)
from hub_cards import (
    CardConfig,
    CardFile,
    csv_configs,
    literal_pattern,
    merged_card,
    parquet_twin,
    parquet_twins,
)
from tests.conftest import HOSTILE_NAMES
from tests.local_hub import LocalHub

TICKS = CardConfig("ticks", {"train": "ticks/**/*.csv"})
TRAINING = CardConfig(
    "default",
    {
        "train": "workspace/prepared/features/gold_train.csv",
        "validation": "workspace/prepared/features/gold_val.csv",
        "test": "workspace/prepared/features/gold_test.csv",
    },
)
FILE = CardFile("ticks/2024.csv", 12, "ab" * 32)
RESTORE = "python cloud_services.py hf-download-ticks --repo-id tester/ticks"


def installed(module: str) -> None:
    """Skip without a module, and fail in CI."""
    if importlib.util.find_spec(module) is None:
        give_up = pytest.fail if os.environ.get("CI") else pytest.skip
        give_up(f"{module} is not installed: pip install {module}")


def card(
    existing: str | None = None,
    configs: Sequence[CardConfig] = (TICKS,),
    files: Sequence[CardFile] = (FILE,),
    **more: Any,
) -> str:
    """A card with ordinary words in it."""
    words = {"title": "Tick data", "summary": "Bids and asks.", "restore": RESTORE}
    return merged_card(existing, configs=configs, files=files, **(words | more))


def metadata(text: str) -> dict[str, Any]:
    """The metadata as huggingface_hub reads it."""
    installed("huggingface_hub")
    found = need("huggingface_hub.repocard").REGEX_YAML_BLOCK.search(text)
    return dict(need("yaml").safe_load(found[2]) or {}) if found else {}


def entries(text: str) -> dict[str, Any]:
    """The entries of the configs by their names."""
    return {entry["config_name"]: entry for entry in metadata(text)["configs"]}


def table(text: str) -> list[list[str]]:
    """The cells of the card's table, as GitHub's Markdown divides them."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [re.split(r"(?<!\\)\|", row.strip())[1:-1] for row in rows]
    return [[cell.strip() for cell in row] for row in cells[2:]]


# ── cards: what a README says ────────────────────────────────────────────────────────────────────


def test_a_new_card_names_the_data_the_command_and_every_file() -> None:
    text = card(None, [TRAINING], [CardFile("b.csv", 2, "b" * 64), CardFile("a.csv", 1, "a" * 64)])
    assert metadata(text) == {
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": split, "path": path} for split, path in TRAINING.splits.items()
                ],
            }
        ]
    }
    assert f"```sh\n{RESTORE}\n```" in text
    assert table(text) == [["`a.csv`", "1", f"`{'a' * 64}`"], ["`b.csv`", "2", f"`{'b' * 64}`"]]
    assert "2 files, 3 B." in text
    assert card(text, [TRAINING], []) != text


def test_the_first_of_several_configs_is_the_default_and_a_lone_one_says_nothing() -> None:
    second = CardConfig("news", {"train": "news/*.csv"})
    assert entries(card(configs=[TICKS, second]))["ticks"]["default"] is True
    assert "default" not in entries(card(configs=[TICKS, second]))["news"]
    assert "default" not in entries(card())["ticks"]
    assert all(
        "default" not in entry for entry in entries(card(configs=[TICKS, TRAINING])).values()
    )


def test_there_is_never_a_second_default() -> None:
    theirs = "---\nconfigs:\n- config_name: x\n  data_files: x.csv\n  default: true\n---\n"
    assert "default" not in entries(card(theirs))["ticks"]
    named = theirs.replace("x\n  data", "default\n  data").replace("  default: true\n", "")
    assert "default" not in entries(card(named))["ticks"]
    assert entries(card(theirs.replace("  default: true\n", "")))["ticks"]["default"] is True


def test_the_metadata_keeps_its_comments_its_order_and_other_peoples_configs() -> None:
    before = textwrap.dedent("""\
        ---
        # chosen with care
        license: mit   # not apache
        configs:
          # the news are not ours
          - config_name: news
            data_files: "news.csv"   # one file
          - {config_name: ticks, data_files: old.csv}  # ours
          # nor is this
          - config_name: 'last'
            data_files:
            - split: train
              path: [a.csv,
                     b.csv]

        # the end of the list
        size_categories: [1K<n<10K]
        date: 2024-02-30x
        ---
        # Prose
        """)
    expected = before.replace(
        "- {config_name: ticks, data_files: old.csv}",
        "- config_name: ticks\n    default: true\n    data_files:\n"
        '    - split: train\n      path: "ticks/**/*.csv"',
    ).replace('"ticks/**/*.csv"', "ticks/**/*.csv")
    assert card(before).startswith(expected)
    assert list(metadata(card(before))) == ["license", "configs", "size_categories", "date"]


def test_a_new_config_goes_to_the_end_of_the_list_and_nothing_else_moves() -> None:
    before = "---\nconfigs:\n- config_name: x\n  data_files: x.csv # theirs\n\n# more\nlicense: mit\n---\n"
    added = (
        "- config_name: ticks\n  default: true\n  data_files:\n"
        "  - split: train\n    path: ticks/**/*.csv\n"
    )
    assert card(before).startswith(before.replace("# theirs\n", f"# theirs\n{added}"))


@pytest.mark.parametrize(
    "before",
    [
        'configs: [{config_name: "ticks", data_files: [{path: ticks/**/*.csv, split: train}]}]',
        "configs:\n   -\n      data_files:\n         -  path: 'ticks/**/*.csv' # all\n            split: train\n      config_name: ticks\nlicense: mit",
    ],
)  # fmt: skip
def test_metadata_that_says_the_same_is_not_touched(before: str) -> None:
    front = f"---\n{before}\n---  \n"
    assert card(front).startswith(front)


@pytest.mark.parametrize(
    "front",
    [
        "{license: mit, configs: [{config_name: x, data_files: x.csv}]}",
        "license: mit\nconfigs: null # none yet\ntags: [a]",
        "license: mit\nconfigs:",
        "license: mit\nconfigs: []",
        "license: mit\nconfigs: &c\n- &x\n  config_name: ticks\n  data_files: &f a.csv\ntags: [*f]",
        "license: mit\nconfigs:\n- config_name: x\n  data_files: x.csv\n- config_name: ticks\n- config_name: ticks",
        "license: mit\ntext: |+\n  kept\n",
        "---\nlicense: mit\n...",
        "# nothing but a comment",
        "  license: mit\n  configs:\n  - config_name: ticks\n    data_files: |\n      x.csv\n  tags: [a]",
        "license: mit\nconfigs:\n- 7\n- config_name: [x]\n- [config_name, ticks]",
    ],
)  # fmt: skip
def test_metadata_of_any_layout_takes_our_config_and_loses_nothing(front: str) -> None:
    before = f"---\n{front}\n---\nprose\n"
    after = card(before)
    said, says = metadata(before), metadata(after)
    ours = says["configs"][[_name(e) for e in says["configs"]].index("ticks")]
    assert ours["data_files"] == [{"split": "train", "path": "ticks/**/*.csv"}]
    others = [entry for entry in says.pop("configs") if _name(entry) != "ticks"]
    assert others == [entry for entry in said.pop("configs", None) or [] if _name(entry) != "ticks"]
    assert list(says.items()) == list(said.items())
    assert "\n---\nprose\n" in after
    assert card(after) == after


def _name(entry: Any) -> Any:
    return entry.get("config_name") if isinstance(entry, dict) else None


@pytest.mark.parametrize(
    ("front", "words"),
    [
        ("license: [mit", "line 2"),
        ("a: 1\n\tb: 2", "line 3"),
        ("- a\n- b", "no list of names"),
        ("words", "no list of names"),
        ("a: 1\n...\nb: 2", "line 4"),
        ("configs: everything", "configs is no list"),
        ("configs: []\nconfigs: []", "twice"),
        ("date: 2024-13-45", "month"),
        ("a: !!python/object:os.system x", "line 2"),
        ("a: &a [*a]\nconfigs: *a", "nested"),
        ("a: \x07", "not allowed"),
    ],
)
def test_broken_metadata_is_an_error_that_says_where(front: str, words: str) -> None:
    with pytest.raises(IntegrityError, match=re.escape(words)) as caught:
        card(f"---\n{front}\n---\nprose\n")
    assert "--no-card" in caught.value.hint
    assert caught.value.exit_code == ExitCode.INTEGRITY
    assert "\n" not in str(caught.value)


def test_prose_without_metadata_gets_some_and_stays_as_it_is() -> None:
    for prose in ("# Gold\n\n  two  spaces\t\n", "Gold", "---\nno metadata, a line\n", "\r\n\nx"):
        after = card(prose)
        assert prose in after
        assert list(metadata(after)) == ["configs"]


def test_a_readme_with_windows_line_ends_gets_no_others() -> None:
    after = card("---\r\nlicense: mit\r\n---\r\n# Gold\r\n")
    assert after.startswith("---\r\nlicense: mit\r\nconfigs:\r\n")
    assert not re.search(r"(?<!\r)\n", after)
    assert card(after, configs=[TICKS, TRAINING]).count("\r\n") == card(
        after.replace("\r\n", "\n"), configs=[TICKS, TRAINING]
    ).count("\n")


def test_what_hides_the_metadata_from_the_client_goes() -> None:
    assert metadata(card("\ufeff--- \nlicense: mit\n---\n# Gold\n"))["license"] == "mit"


def test_the_section_is_replaced_where_it_stands() -> None:
    first = card("# Gold\n")
    around = first.replace("# Gold\n", "# Gold\n\nabove\n") + "\nbelow\n"
    again = card(around, files=[CardFile("new.csv", 5, "c" * 64)])
    assert again.startswith(first[: first.index("# Gold")] + "# Gold\n\nabove\n")
    assert again.endswith("end -->\n\nbelow\n")
    assert [row[0] for row in table(again)] == ["`new.csv`"]


@pytest.mark.parametrize("damage", ["no begin", "no end", "twice", "swapped", "another inside"])
def test_damaged_markers_never_cost_prose(damage: str) -> None:
    whole = card("# Gold\n")
    begin, end = (match[0] for match in hub_cards.MARK.finditer(whole))
    text = {
        "no begin": whole.replace(begin, "mine"),
        "no end": whole.replace(end, "mine"),
        "twice": whole + "mine\n" + whole[whole.index(begin) :],
        "swapped": whole.replace(begin, "%").replace(end, begin).replace("%", end) + "mine",
        "another inside": whole.replace(end, begin.replace("files", "news") + "\nmine\n" + end),
    }[damage]
    after = card(text + "\nand mine too\n")
    assert "mine" in after
    assert "and mine too\n" in after
    assert after.count(begin) == after.count(end) == 1
    assert card(after) == after


def test_sections_of_several_uploads_live_in_one_card_and_take_out_only_their_own_configs() -> None:
    features = csv_configs(["analysis-of-features/a.csv", "analysis-of-features/b.csv"])
    both = card(card(section="ticks"), features, section="features", title="Features")
    assert set(entries(both)) == {"ticks", "a", "b"}
    assert "## Tick data" in both
    assert "## Features" in both
    less = card(both, features[:1], section="features", title="Features")
    assert set(entries(less)) == {"ticks", "a"}
    assert "configs" not in metadata(card(card(), [])) or not metadata(card(card(), []))["configs"]


HOSTILE = (
    *(name for name in HOSTILE_NAMES if name.isascii() or "📈" in name),
    "a|b\\|c`d``e```.csv",
    " leading and trailing ",
    "x -->\n<!-- cloud-services: files end -->",
    "<!-- cloud-services: files end -->",
    "<script>alert(1)</script>.csv",
    "**bold** _em_ [a](b) &amp; $x$.csv",
    '"quoted": yes # no comment.csv',
    "no",
    "1e3",
    "0o17",
    "~",
    "é\u2028\x85\u200d\ufeff.csv",
)


def test_hostile_names_break_neither_table_nor_markers_nor_metadata() -> None:
    files = [CardFile(name, size, "f" * 64) for size, name in enumerate(HOSTILE)]
    configs = csv_configs(HOSTILE)
    text = card(
        "# Gold\n", configs, files, title="T\n<!-- x", summary="a\n\n<!-- b", restore="```\n<!-- c"
    )
    rows = table(text)
    assert [len(row) for row in rows] == [3] * len(files)
    assert sorted(int(row[1]) for row in rows) == list(range(len(files)))
    assert [mark["which"] for mark in hub_cards.MARK.finditer(text)] == ["begin", "end"]
    assert not re.search(r"<(?!/?code>)", text[text.index("| File") :].split("\n\n")[0])
    assert list(entries(text)) == [config.name for config in configs]
    paths = [entry["data_files"][0]["path"] for entry in entries(text).values()]
    assert paths == list(map(literal_pattern, HOSTILE))
    assert card("# Gold\n", configs, files) == card(
        card("# Gold\n", configs, files), configs, files
    )


def test_configs_are_named_after_their_files_and_never_share_a_name() -> None:
    names = ["f/a.csv", "f/b?.csv", "f/b*.csv", "g/a.csv", "plain.csv"]
    assert [config.name for config in csv_configs(names)] == ["f_a", "b_", "b__2", "g_a", "plain"]
    with pytest.raises(UsageError):
        card(configs=[TICKS, TICKS])


def test_a_card_of_many_files_lists_folders_whose_checksums_sha256sum_confirms(
    tmp_path: Path,
) -> None:
    names = [f"ticks/{pair}/{n}.csv" for pair in ("EUR", "GBP") for n in range(120)]
    names += ["top.csv", "ticks/EUR/back\\slash.csv", "ticks/EUR/line\nbreak.csv"]
    files = []
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
        files.append(CardFile(name, len(name), hashlib.sha256(name.encode()).hexdigest()))
    text = card(files=files)
    rows = {row[0].strip("`"): row[1:] for row in table(text)}
    assert {folder: int(row[0]) for folder, row in rows.items()} == {
        ".": 1, "ticks/EUR": 122, "ticks/GBP": 120
    }  # fmt: skip
    recipe = re.search(r"`(sha256sum FOLDER/\*.*)`", text)
    assert recipe
    for folder in ("ticks/EUR", "ticks/GBP"):
        done = subprocess.run(
            ["sh", "-c", recipe[1].replace("FOLDER", folder)],
            cwd=tmp_path, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split()[0] == rows[folder][2].strip("`")
    assert len(text) < 3000


def test_a_card_stays_small_however_deep_and_many_the_folders_are() -> None:
    files = [CardFile(f"a/{n % 300}/{n}/x.csv", 1, "0" * 64) for n in range(3000)]
    text = card(files=files)
    assert table(text)[0][:2] == ["`a`", "3000"]
    assert len(text) < 2000


# ── cards: properties ────────────────────────────────────────────────────────────────────────────

MARK_LINES = tuple(
    f"<!-- cloud-services: {section} {which} -->"
    for section in ("files", "other")
    for which in ("begin", "end")
)
LINES = st.sampled_from(
    (*MARK_LINES, *MARK_LINES[:2], "# Gold", "", "", "---", "```", "<!--", "-->", "  text  ",
     "| a | b |", '<!-- configs: ["x"] -->', "configs:", f"see {MARK_LINES[0]} there", "...")
) | st.text(max_size=12)  # fmt: skip
NAMES = st.text(min_size=1, max_size=12) | st.sampled_from(HOSTILE)
CONFIGS = st.lists(
    st.builds(
        CardConfig,
        NAMES,
        st.dictionaries(st.sampled_from(("train", "validation", "test")), NAMES, min_size=1),
    ),
    max_size=3,
    unique_by=lambda config: config.name,
)
FILES = st.lists(st.builds(CardFile, NAMES, st.integers(0, 10**13), st.just("0" * 64)), max_size=4)
SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=10)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3)
)


@st.composite
def readmes(draw: st.DrawFn) -> str:
    """Any prose, with marks of ours in any order, below any metadata or none."""
    end = draw(st.sampled_from(("\n", "\r\n")))
    prose = end.join(draw(st.lists(LINES, max_size=12))) + draw(st.sampled_from(("", end)))
    return draw(fronts(end)) + prose


@st.composite
def fronts(draw: st.DrawFn, end: str) -> str:
    if draw(st.booleans()):
        return ""
    keys = st.sampled_from(("license", "tags", "é", "no", "default")) | st.text(max_size=5)
    said: dict[str, Any] = draw(st.dictionaries(keys.filter(lambda k: k != "configs"), VALUES))
    theirs = draw(st.lists(st.tuples(NAMES, st.dictionaries(keys, VALUES, max_size=2)), max_size=3))
    named: list[dict[str, Any]] = [{"config_name": name, **entry} for name, entry in theirs]
    there: bool = draw(st.booleans())
    if named or there:
        said["configs"] = named
    said = dict(draw(st.permutations(list(said.items()))))
    text = need("yaml").safe_dump(
        said, sort_keys=False, allow_unicode=draw(st.booleans()),
        default_flow_style=draw(st.sampled_from((None, True, False))),
        indent=draw(st.sampled_from((2, 4))), default_style=draw(st.sampled_from((None, '"'))),
    )  # fmt: skip
    lines = text.removesuffix("\n").split("\n")
    if draw(st.booleans()):
        lines = [*lines, "# a comment"]
    return end.join(["---", *lines, "---", ""])


def outside(text: str) -> str:
    """The prose of a README: what is neither metadata nor ours, told line by line."""
    found = need("huggingface_hub.repocard").REGEX_YAML_BLOCK.search(text)
    found = found or re.match(r"\s*---\r?\n---(\r?\n|\Z)", text)  # metadata with nothing in it
    lines = (text[found.end() :] if found else text).split("\n")
    marks = [n for n, line in enumerate(lines) if line.startswith("<!-- cloud-services: ")]
    ours = [n for n in marks if lines[n].startswith("<!-- cloud-services: files")]
    begins = ["begin" in lines[n] for n in ours]
    if begins == [True, False] and not any(ours[0] < n < ours[1] for n in marks):
        lines[ours[0] : ours[1] + 1] = [""]
    else:
        for n in ours:
            lines[n] = "<!-- -->" + "\r" * lines[n].endswith("\r")
    return "\n".join(lines)


@given(readmes(), CONFIGS, FILES, st.text(max_size=20), st.text(max_size=20))
def test_any_readme_keeps_prose_and_metadata_and_merging_again_changes_nothing(
    before: str, configs: list[CardConfig], files: list[CardFile], words: str, restore: str
) -> None:
    installed("huggingface_hub")
    try:
        after = card(before, configs, files, summary=words, title=words, restore=restore)
    except IntegrityError:
        with pytest.raises((need("yaml").YAMLError, ValueError, TypeError)):
            metadata(before)
        assume(False)
    assert card(after, configs, files, summary=words, title=words, restore=restore) == after
    kept, was = outside(after), outside(before)
    assert kept.strip("\r\n").startswith(was.strip("\r\n")) or was in kept
    assert kept.replace(was, "", 1).strip("\r\n") == ""
    said, says = metadata(before), metadata(after)
    theirs = list(said.pop("configs", None) or [])
    names = {config.name for config in configs}
    now = says.pop("configs", None) or []
    assert list(says.items()) == list(said.items())
    assert [e for e in now if e["config_name"] not in names] == [
        entry for entry in theirs if entry["config_name"] not in names
    ]
    ours = {entry["config_name"]: entry["data_files"] for entry in now if _name(entry) in names}
    assert ours == {
        config.name: [{"split": s, "path": p} for s, p in config.splits.items()]
        for config in configs
    }


@given(readmes(), CONFIGS)
def test_metadata_is_left_to_the_byte_when_it_says_the_same(
    before: str, configs: list[CardConfig]
) -> None:
    installed("huggingface_hub")
    with contextlib.suppress(IntegrityError):
        after = card(before, configs)
        front = after[: after.index("\n---") if configs else 0]
        assert card(after, configs, [FILE, FILE], title="Other").startswith(front)


# ── parquet: what a column becomes ───────────────────────────────────────────────────────────────


class Counter(Progress):
    """Counts what is told, and how often steps begin and end."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, int | None]] = []
        self.done = self.open = 0
        self._lock = threading.Lock()

    def begin(self, what: str, total: int | None) -> None:
        self.steps.append((what, total))
        self.open += 1

    def advance(self, count: int) -> None:
        with self._lock:
            self.done += count

    def end(self) -> None:
        self.open -= 1


@pytest.fixture(autouse=True)
def _libraries(request: pytest.FixtureRequest) -> None:
    if "parquet" in request.node.name or "csv" in request.node.name:
        installed("pyarrow")


def twin_of(folder: Path, text: str | bytes, name: str = "t") -> hub_cards.ParquetTwin:
    folder.mkdir(exist_ok=True)
    source = folder / f"{name}.csv"
    source.write_bytes(text.encode() if isinstance(text, str) else text)
    return parquet_twin(source, folder / "out", name, Progress())


def read(twin: hub_cards.ParquetTwin) -> Any:
    return need("pyarrow.parquet").read_table(twin.parquet)


def column(folder: Path, *cells: str) -> tuple[str, list[Any]]:
    """The type and the values of a column of cells, written as they stand here."""
    twin = twin_of(folder, "x,y\n" + "".join(f"{cell},.\n" for cell in cells))
    facts = json.loads(twin.schema.read_text())["columns"][0]
    table = read(twin)
    values = [
        value.value
        if facts["type"].startswith("timestamp[ns") and value.is_valid
        else value.as_py()
        for value in table["x"]
    ]
    assert facts["nullable"] == (None in values)
    assert str(table.schema.field("x").type).replace("double", "float64") == facts["type"]
    return facts["type"], values


@pytest.mark.parametrize(
    ("cells", "kind", "values"),
    [
        (("1", "-20", "0"), "int64", [1, -20, 0]),
        (("9223372036854775807", "-9223372036854775808", ""), "int64", [2**63 - 1, -(2**63), None]),
        (('"5"', "6"), "int64", [5, 6]),
        (("1.50", "2", "-0.0", "1e5"), "float64", [1.5, 2.0, -0.0, 100000.0]),
        (("0.1", "0.30000000000000004", "5e-324"), "float64", [0.1, 0.30000000000000004, 5e-324]),
        (("1.0701000", "1.7976931348623157e308"), "float64", [1.0701, 1.7976931348623157e308]),
        (("1.5", "", "inf", "-inf"), "float64", [1.5, None, math.inf, -math.inf]),
        (("True", "False", ""), "bool", [True, False, None]),
        (("true", "false"), "bool", [True, False]),
        (
            ("2024-01-02 03:04:05", "2024-01-02 03:04:05.678"),
            "timestamp[ms]",
            [datetime(2024, 1, 2, 3, 4, 5), datetime(2024, 1, 2, 3, 4, 5, 678000)],
        ),
        (("2024-01-02T03:04:05.000001", ""), "timestamp[us]", [datetime(2024, 1, 2, 3, 4, 5, 1), None]),
        (("1970-01-01 00:00:01.000000001",), "timestamp[ns]", [1_000_000_001]),
        (
            ("2024-01-02 03:04:05+00:00",),
            "timestamp[ms, tz=UTC]",
            [datetime(2024, 1, 2, 3, 4, 5, tzinfo=timezone.utc)],
        ),
    ],
)  # fmt: skip
def test_a_csv_column_gets_a_type_when_every_value_survives(
    tmp_path: Path, cells: tuple[str, ...], kind: str, values: list[Any]
) -> None:
    found, now = column(tmp_path, *cells)
    assert found == kind
    assert now == values
    assert list(map(str, now)) == list(map(str, values))  # tells -0.0 from 0.0


@pytest.mark.parametrize(
    "cells",
    [
        ("007", "8"), ("+5",), ("1_000",), ("0x10",), (" 5",), ("5 ",), ("5.",), (".5",), ("1,5",),
        ("01.5",), ("1e400",), ("1e99999999999999999999",), ("1e-99999999999999999999",), ("1e-400",), ("9223372036854775808.5",), ("12345678901234567890",),
        ("0.1000000000000000055511151231257827",), ("1.234567890123456789",), ("NaN", "1.0"),
        ("NA", "1"), ("null", "1"), ("1", "x"), ("1.5", "True"), ("True", "true"), ("TRUE",),
        ("-nan",), ("Infinity",), ("+inf",), ("2024-01-02",), ("2024-01-02 03:04",), ("１",),
        ("2024-02-30 00:00:00",), ("2024-01-02 03:04:60",), ("2024-01-02 03:04:05+02:00",),
        ("2024-01-02 03:04:05", "2024-01-02T03:04:05"), ("2024-01-02 03:04:05", "1"),
        ("1600-01-01 00:00:00.000000001",), ("0000-01-01 00:00:00",), ("12024-01-02 00:00:00",), ("2024-01-02 03:04:05Z", "2024-01-02 03:04:05"),
        ("1\n2",),
    ],
)  # fmt: skip
def test_a_csv_column_with_one_value_that_would_change_stays_text(
    tmp_path: Path, cells: tuple[str, ...]
) -> None:
    assert column(tmp_path, *(f'"{cell}"' for cell in cells)) == ("string", list(cells))


def test_minus_zero_is_no_integer_in_parquet(tmp_path: Path) -> None:
    assert column(tmp_path, "-0", "3")[0] == "float64"


def test_missing_empty_na_and_nan_stay_apart_in_parquet(tmp_path: Path) -> None:
    assert column(tmp_path, "", '""', "NA", "nan") == ("string", [None, "", "NA", "nan"])
    assert column(tmp_path, "", "")[0] == "string"
    assert column(tmp_path, "1", '""') == ("string", ["1", ""])
    kind, values = column(tmp_path, "nan", "", "1.5")
    assert (kind, math.isnan(values[0]), values[1:]) == ("float64", True, [None, 1.5])


def test_a_type_is_settled_by_the_last_block_of_a_csv_as_well(tmp_path: Path) -> None:
    rows = [str(n) for n in range(50_000)]
    with mock.patch.object(hub_cards, "BLOCK_BYTES", 4096):
        assert column(tmp_path, *rows)[0] == "int64"
        assert column(tmp_path, *rows, "1.5")[0] == "float64"
        assert column(tmp_path, *rows, "07")[1][-2:] == ["49999", "07"]


def test_columns_of_parquet_are_called_as_pandas_calls_them(tmp_path: Path) -> None:
    installed("pandas")
    head = ',a,a,,a.1,"new\nline","q""x, y",a\r\n'
    twin = twin_of(tmp_path, "\ufeff\r\n" + head + "1,2,3,4,5,6,7,8\r\n")
    assert (
        read(twin).to_pylist()[0] == need("pandas").read_csv(tmp_path / "t.csv").iloc[0].to_dict()
    )
    facts = json.loads(twin.schema.read_text())["columns"]
    names = [fact.get("header", fact["name"]) for fact in facts]
    assert names == ["", "a", "a", "", "a.1", "new\nline", 'q"x, y', "a"]


def test_the_schema_says_what_parquet_holds_and_what_it_was_made_of(tmp_path: Path) -> None:
    text = "time,bid,note\n2024-01-02 03:04:05.678,1.0701,\n2024-01-02 03:04:06,1.0702,ok\n"
    twin = twin_of(tmp_path, text)
    assert twin.rows == 2
    assert json.loads(twin.schema.read_text()) == {
        "source": {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()},
        "rows": 2,
        "columns": [
            {"name": "time", "type": "timestamp[ms]", "nullable": False},
            {"name": "bid", "type": "float64", "nullable": False},
            {"name": "note", "type": "string", "nullable": True},
        ],
    }


def test_a_csv_of_a_header_alone_makes_parquet_without_rows(tmp_path: Path) -> None:
    for text in ("a,b", "a,b\n", "a,b\r\n\r\n\n"):
        twin = twin_of(tmp_path, text)
        assert (twin.rows, read(twin).num_rows) == (0, 0)
        assert read(twin).schema.names == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        (b"a,b\n1,2\n\n1\n", 4, "1 field where the header has 2 fields"),
        (b"a,b\n1,2,3\n", 2, "3 fields where the header has 2 fields"),
        (b'a,b\n"x\ny",2\n"x\ny"z",3,4\n', 4, "3 fields"),
        (b'a,b\r\n"1""",2\r\n3,"4\r\n5,6\r\n', 3, "a quote is left open"),
        (b'a\n1\n"2\n3\n', 3, "a quote is left open"),
        (b'a,b\n1,"', 2, "a quote is left open"),
        (b"a,b\r1,2\r\xff,4\r", 3, "not UTF-8"),
        (b'a,b\n"1\n2",\xe9\n', 3, "not UTF-8"),
        (b"a,\xff\n1,2\n", 1, "not UTF-8"),
        (b'a,"b\n1,2\n', 1, "unexpected end of data"),
        ("a,b\n1,2\n".encode("utf-16"), 1, "not UTF-8"),
    ],
)
def test_a_csv_that_is_no_table_makes_no_parquet_but_an_error_with_file_and_line(
    tmp_path: Path, text: bytes, line: int, words: str
) -> None:
    with pytest.raises(IntegrityError, match=re.escape(f"t.csv, line {line}: ")) as caught:
        twin_of(tmp_path, text)
    assert words in str(caught.value)
    assert "without --parquet" in caught.value.hint
    assert not any((tmp_path / "out").glob("*"))


def test_an_error_late_in_a_long_csv_names_its_line_too(tmp_path: Path) -> None:
    rows = ['1,"two\nlines"\n'] * 5000
    with mock.patch.object(hub_cards, "BLOCK_BYTES", 4096):
        with pytest.raises(IntegrityError, match="line 10002: 3 fields"):
            twin_of(tmp_path, "a,b\n" + "".join([*rows, "1,2,3\n", *rows]))
        with pytest.raises(IntegrityError, match="line 10002: a quote is left open"):
            twin_of(tmp_path, "a,b\n" + "".join([*rows, '1,"2\n', "1,2\n" * 9]))
        with pytest.raises(
            IntegrityError, match=r"line 3: the row is longer than 4\.1 kB: is a quote"
        ):
            twin_of(tmp_path, "a,b\n1,2\n" + "x" * 20000 + ",2\n")


@pytest.mark.parametrize("text", ["", "\n\n\r\n", "\ufeff", "\ufeff\n"])
def test_an_empty_csv_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(IntegrityError, match=r"t\.csv is empty"):
        twin_of(tmp_path, text)


def test_a_csv_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        parquet_twin(tmp_path / "none.csv", tmp_path, "none", Progress())


def test_a_csv_that_changes_between_the_passes_makes_no_parquet(tmp_path: Path) -> None:
    source = tmp_path / "t.csv"

    class Meddler(Counter):
        change = ""

        def begin(self, what: str, total: int | None) -> None:
            super().begin(what, total)
            if len(self.steps) == 2:
                source.write_text(self.change)

    meddler = Meddler()
    for meddler.change in ("a,b\n1,3\n", "a,b\nx,2\n", "a,b\n", "a,b\n1,2\n3,4\n", "b,a\n1,2\n"):
        source.write_text("a,b\n1,2\n")
        meddler.steps.clear()
        with pytest.raises(IntegrityError, match="changed while it was read"):
            parquet_twin(source, tmp_path / "out", "t", meddler)
        assert not any((tmp_path / "out").glob("*"))


def test_an_old_parquet_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    twin = twin_of(tmp_path, "a\n1\n")
    before = twin.parquet.read_bytes(), twin.schema.read_bytes()
    part = twin.parquet.with_name(part_name(twin.parquet.name))
    with open_for_update(part) as stream:
        lock_part(stream, twin.parquet)
        with pytest.raises(RefusedError, match="another run"):
            twin_of(tmp_path, "a\n2\n")
    with pytest.raises(IntegrityError):
        twin_of(tmp_path, "a\n2\n3,4\n")
    assert (twin.parquet.read_bytes(), twin.schema.read_bytes()) == before


def test_without_a_new_enough_pyarrow_parquet_says_which_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(need("pyarrow"), "__version__", "20.0.0")
    with pytest.raises(MissingPackageError, match="21 or newer, not 20") as caught:
        twin_of(tmp_path, "a\n1\n")
    assert caught.value.hint == "pip install 'pyarrow>=21'"
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingPackageError, match="not installed"):
        twin_of(tmp_path, "a\n1\n")


def test_progress_of_parquet_counts_the_csv_twice(tmp_path: Path) -> None:
    source = tmp_path / "t.csv"
    source.write_text("a,b\n" + "1,2\n" * 5000)
    told = Counter()
    parquet_twin(source, tmp_path, "t", told)
    size = source.stat().st_size
    assert told.steps == [("reading t.csv", size), ("writing t.parquet", size)]
    assert (told.done, told.open) == (2 * size, 0)


def test_parquet_of_csvs_that_belong_together_has_one_type_for_each_column(tmp_path: Path) -> None:
    texts = {
        "2023": "a,b,t,c\n1,,2023-01-01 00:00:00.5,true\n",
        "2024": "a,b,t,c\n1.5,2,2024-01-01T00:00:00.000001,True\n",
        "2025": "c,a\nFalse,2\n",
    }
    for name, text in texts.items():
        (tmp_path / f"{name}.csv").write_text(text)
    paths = [(tmp_path / f"{name}.csv", f"y/{name}") for name in texts]
    twins = parquet_twins(paths, tmp_path / "out", Progress())
    kinds = [{f.name: str(f.type) for f in read(twin).schema} for twin in twins]
    assert kinds[0] == kinds[1] == {"a": "double", "b": "int64", "t": "timestamp[us]", "c": "bool"}
    assert kinds[2] == {"c": "bool", "a": "double"}
    assert twins[2].parquet == tmp_path / "out/y/2025.parquet"


# ── parquet: faithful, the same again, and cheap to change ───────────────────────────────────────

CELLS = st.sampled_from(
    ("", '""', "0", "1", "-1", "007", "+5", "1.0", "1.50", "0.1", "-0", "1e5", "1E-7", "1e400",
     "nan", "NaN", "NA", "inf", "true", "True", "False", "2024-01-02 03:04:05", '"a,b"', '"a\nb"',
     '"a\r\nb"', 'a"b', '"a""b"', '"a"b', "é", "\ufeff", " ", "\t", "9007199254740993",
     "0.30000000000000004", "123456789.123456789", "2024-01-02 03:04:05.5", "1600-01-01 00:00:00")
)  # fmt: skip
TEXTS = st.text(st.characters(exclude_characters='\r\n",\0', codec="utf-8"), max_size=8)
NUMBERS = (
    st.integers().map(str)
    | st.floats(allow_nan=False, allow_infinity=False).map(repr)
    | st.decimals(allow_nan=False, allow_infinity=False, places=5).map(str)
    | st.integers(-(10**6), 10**6).map(str)
)
TIMES = st.datetimes(datetime(1, 1, 1), datetime(9999, 12, 31)).map(str)


@st.composite
def tables(draw: st.DrawFn) -> str:
    """A CSV whose columns hold one sort of cell each, mostly."""
    sorts = (CELLS, TEXTS, NUMBERS, TIMES, CELLS | NUMBERS, st.sampled_from(("", "1", "2.50")))
    chosen = draw(st.lists(st.sampled_from(sorts), min_size=1, max_size=4))
    rows = draw(st.lists(st.tuples(*chosen), max_size=30))
    end = draw(st.sampled_from(("\n", "\r\n", "\r")))
    head = [f"c{number}" for number in range(len(chosen))]
    return end.join(map(",".join, [head, *rows])) + draw(st.sampled_from(("", end)))


def says_the_same(cell: str, value: Any) -> bool:
    """Whether a value of the parquet file tells the cell that csv read."""
    if value is None:
        return cell == ""
    if isinstance(value, bool):
        return cell in (str(value), str(value).lower())
    if isinstance(value, int):
        return cell == str(value)
    if isinstance(value, datetime):
        return datetime.fromisoformat(cell.ljust(26, "0") if "." in cell else cell) == value
    if isinstance(value, float):
        if not math.isfinite(value):
            return cell == repr(value)
        return Decimal(cell).compare_total(Decimal(repr(value))) == 0 or (
            Decimal(cell) == Decimal(repr(value))
            and math.copysign(1, value) == (-1 if cell.startswith("-") else 1)
        )
    return bool(cell == value)


@given(tables(), st.integers(300, 700))
def test_parquet_holds_what_csv_reads(
    tmp_path_factory: pytest.TempPathFactory, text: str, block: int
) -> None:
    folder = tmp_path_factory.mktemp("t")
    (folder / "t.csv").write_bytes(text.encode())
    with (folder / "t.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))[1:]
    width = len(text.splitlines()[0].split(","))
    expected = [row or [""] for row in rows if row or width == 1]
    with mock.patch.object(hub_cards, "BLOCK_BYTES", block):
        twin = parquet_twin(folder / "t.csv", folder, "t", Progress())
    values = [list(row.values()) for row in read(twin).to_pylist()]
    assert len(values) == len(expected) == twin.rows
    for row, cells in zip(values, expected, strict=True):
        assert all(map(says_the_same, cells, row)), (row, cells)


def test_line_ends_between_quotes_survive_wherever_a_block_of_the_csv_ends(tmp_path: Path) -> None:
    cells = [f"{'x' * (number % 7)}\r\n\r\ny" for number in range(200)]
    text = "a,b\r\n" + "".join(f'1,"{cell}"\r\n' for cell in cells)
    for block in range(64, 80):
        with mock.patch.object(hub_cards, "BLOCK_BYTES", block):
            assert read(twin_of(tmp_path, text))["b"].to_pylist() == cells


def ticks(rows: int, seed: int = 1) -> list[str]:
    """Lines of tick data without notes, the same in every run."""
    chance = random.Random(seed)
    bid, at, lines = 1900.0, 1_700_000_000_000, []
    for _ in range(rows):
        bid, at = bid + chance.gauss(0, 0.05), at + chance.randrange(20, 900)
        when = datetime.fromtimestamp(at / 1000, timezone.utc).strftime("%Y-%m-%d %H:%M:%S.%f")
        lines.append(f"{when[:-3]},{bid:.3f},{bid + 0.3:.3f},{chance.randrange(1, 20)},\n")
    return lines


def groups(twin: hub_cards.ParquetTwin) -> dict[str, int]:
    """The row groups of a file: the SHA-256 of each one's bytes, and their number."""
    found = need("pyarrow.parquet").ParquetFile(twin.parquet).metadata
    content, hashes = twin.parquet.read_bytes(), {}
    for number in range(found.num_row_groups):
        row_group = found.row_group(number)
        columns = [row_group.column(n) for n in range(row_group.num_columns)]
        spans = [(c.dictionary_page_offset or c.data_page_offset, c.total_compressed_size) for c in columns]  # fmt: skip
        data = b"".join(content[start : start + size] for start, size in spans)
        hashes[hashlib.sha256(data).hexdigest()] = len(data)
    return hashes


def test_the_same_csv_makes_the_same_parquet_however_it_is_read(tmp_path: Path) -> None:
    text = "time,bid,ask,volume,note\n" + "".join(ticks(20_000))
    first = twin_of(tmp_path / "a", text)
    with mock.patch.object(hub_cards, "BLOCK_BYTES", 64 * 1024):
        second = twin_of(tmp_path / "b", text)
    assert first.parquet.read_bytes() == second.parquet.read_bytes()
    assert first.schema.read_bytes() == second.schema.read_bytes()


def test_rows_inserted_into_a_csv_leave_most_of_the_parquet_as_it_was(tmp_path: Path) -> None:
    lines, more = ticks(60_000), ticks(500, seed=2)
    head = "time,bid,ask,volume,note\n"
    with mock.patch.object(hub_cards, "GROUP_VALUES", 8 * 1024):
        before = groups(twin_of(tmp_path, head + "".join(lines)))
        assert len(before) > 16
        for at in (100, 30_000, 60_000):
            text = head + "".join(lines[:at] + more + lines[at:])
            after = groups(twin_of(tmp_path, text))
            same = sum(size for digest, size in after.items() if digest in before)
            assert same > 0.7 * sum(after.values()), at


def test_parquet_row_groups_of_rows_that_are_all_the_same_stay_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mock.patch.object(hub_cards, "GROUP_VALUES", 2048):
        twin = twin_of(tmp_path, "a,b\n" + "1,x\n" * 30_000)
        sizes = _group_rows(twin)
        assert sum(sizes) == 30_000
        assert max(sizes) == 4096
        monkeypatch.setattr(hub_cards, "MAX_GROUP_BYTES", 2048)
        monkeypatch.setattr(hub_cards, "BLOCK_BYTES", 4096)
        assert max(_group_rows(twin_of(tmp_path, "a,b\n" + "1,x\n" * 30_000))) < 4096


def _group_rows(twin: hub_cards.ParquetTwin) -> list[int]:
    found = need("pyarrow.parquet").ParquetFile(twin.parquet).metadata
    return [found.row_group(n).num_rows for n in range(found.num_row_groups)]


# ── load_dataset ─────────────────────────────────────────────────────────────────────────────────

LOAD = """
import json, sys
from datasets import get_dataset_config_names, get_dataset_default_config_name, load_dataset
repo, *names = sys.argv[1:]
shown = {"configs": get_dataset_config_names(repo), "default": get_dataset_default_config_name(repo)}
for name in names or [None]:
    loaded = load_dataset(repo, name) if name else load_dataset(repo)
    shown[name or ""] = {split: rows.to_list() for split, rows in loaded.items()}
print("RESULT" + json.dumps(shown, default=str))
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    installed("datasets")
    installed("huggingface_hub")
    with LocalHub(tmp_path_factory.mktemp("hub")) as running:
        yield running


def loaded(hub: LocalHub, folder: Path, repo: str, *names: str) -> Any:
    """What load_dataset finds in a repository, run by itself with caches of its own."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, repo, *names],
        env=hub.env(HF_HOME=str(folder / "home"), HF_DATASETS_CACHE=str(folder / "cache")),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.split("RESULT")[1])


def publish(
    hub: LocalHub, repo: str, files: dict[str, bytes], configs: Sequence[CardConfig], before: str
) -> None:
    """Put files and their card into a repository that has a README already."""
    hub.create_repo(repo)
    hub.commit(repo, {"README.md": before.encode()})
    sent = [CardFile(p, len(b), hashlib.sha256(b).hexdigest()) for p, b in files.items()]
    text = card(hub.read(repo, "README.md").decode(), configs, sent)
    hub.commit(repo, files | {"README.md": text.encode()})


def test_load_dataset_finds_the_splits_of_the_training_data(hub: LocalHub, tmp_path: Path) -> None:
    repo = "tester/training"
    files = {
        path: f"time,f1,label\n2024-01-0{number},{number}.5,{number}\n".encode()
        for number, path in enumerate(TRAINING.splits.values(), 1)
    }
    extra = {"workspace/prepared/scalers/scaler.csv": b"mean\n1\n", "notes.csv": b"x,y\n1,2\n"}
    before = "---\r\nlicense: mit # ours\r\n---\r\n# Gold\r\n\r\nOur prose.\r\n"
    publish(hub, repo, files | extra, [TRAINING], before)
    assert hub.read(repo, "README.md").startswith(before[: before.index("---\r\n#")].encode())
    found = loaded(hub, tmp_path, repo)
    assert found["configs"] == ["default"]
    assert {split: [row["f1"] for row in rows] for split, rows in found[""].items()} == {
        "train": [1.5], "validation": [2.5], "test": [3.5]
    }  # fmt: skip


def test_load_dataset_finds_each_table_of_the_feature_analysis(
    hub: LocalHub, tmp_path: Path
) -> None:
    repo = "tester/features"
    files = {
        "analysis-of-features/feature_statistics.csv": b",mean,std\nf1,0.5,1\n",
        "analysis-of-features/feature_importance.csv": b"feature,mutual_info\nf1,0.25\nf2,0.5\n",
        "analysis-of-features/outliers [iqr] #1.csv": b"feature,outliers,share\nf1,3,0.01\n",
        "analysis-of-features/feature_analysis_report.html": b"<html></html>",
    }
    configs = csv_configs([name for name in files if name.endswith(".csv")])
    names = [config.name for config in configs]
    assert names == ["feature_statistics", "feature_importance", "outliers [iqr] #1"]
    publish(hub, repo, files, configs, "# Analysis\n\nNo metadata here.\n")
    found = loaded(hub, tmp_path, repo, *names)
    assert (found["configs"], found["default"]) == (names, names[0])
    assert found[names[0]]["train"] == [{"Unnamed: 0": "f1", "mean": 0.5, "std": 1}]
    assert [row["mutual_info"] for row in found[names[1]]["train"]] == [0.25, 0.5]
    assert found[names[2]]["train"][0]["outliers"] == 3


def test_load_dataset_reads_ticks_by_a_glob_beside_somebody_elses_config(
    hub: LocalHub, tmp_path: Path
) -> None:
    files = {
        "ticks/EURUSD/2023.csv": b"time,bid,volume\n2023-01-02 00:00:00.5,1.07010,1\n",
        "ticks/GBPUSD/2023.csv": b"time,bid,volume\n2023-01-03 00:00:00,1.27,2\n",
        "notes.csv": b"n\n1\n",
    }
    before = "---\nconfigs:\n- config_name: notes # theirs\n  data_files: notes.csv\n---\nProse.\n"
    publish(hub, "tester/ticks", files, [TICKS], before)
    found = loaded(hub, tmp_path, "tester/ticks", "ticks", "notes")
    assert (found["configs"], found["default"]) == (["notes", "ticks"], "ticks")
    assert [row["bid"] for row in found["ticks"]["train"]] == [1.0701, 1.27]
    assert found["notes"]["train"] == [{"n": 1}]


def test_load_dataset_reads_the_parquet_of_csvs_that_it_refuses_together(
    hub: LocalHub, tmp_path: Path
) -> None:
    sources = {
        "2023": "time,bid,volume\n2023-01-02 00:00:00.5,1.07010,1\n",
        "2024": "time,bid,volume\n2024-01-02 00:00:00,2,\n2024-01-03 00:00:00,2,7.5\n",
    }
    for year, text in sources.items():
        (tmp_path / f"{year}.csv").write_text(text)
    paths = [(tmp_path / f"{year}.csv", f"ticks/{year}") for year in sources]
    twins = parquet_twins(paths, tmp_path, Progress())
    made = [path for twin in twins for path in (twin.parquet, twin.schema)]
    files = {path.relative_to(tmp_path).as_posix(): path.read_bytes() for path in made}
    config = dataclasses.replace(TICKS, splits={"train": "ticks/**/*.parquet"})
    publish(hub, "tester/parquet", files, [config], "# Ticks\n\nProse.\n")
    rows = loaded(hub, tmp_path, "tester/parquet")[""]["train"]
    assert [row | {"time": row["time"][:21]} for row in rows] == [
        {"time": "2023-01-02 00:00:00.5", "bid": 1.0701, "volume": 1.0},
        {"time": "2024-01-02 00:00:00", "bid": 2.0, "volume": None},
        {"time": "2024-01-03 00:00:00", "bid": 2.0, "volume": 7.5},
    ]
