"""What a person types and a script calls: exit codes, streams, questions, signals, help."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import json
import logging
import os
import pty
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

import cloud_services
from cloud_services import (
    COMMANDS,
    CloudError,
    ExitCode,
    PaperspaceDownloader,
    PaperspaceUploader,
    RefusedError,
    build_parser,
    completion_script,
    main,
    parse_size,
    printable,
)
from tests.conftest import HOSTILE_NAMES, SCRIPT, Run, files, make_workspace, tree, write_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CREATE = "create-training-archive"
RESULTS = "create-results-archive"
UPLOAD = ("upload-training", "--method", "local", "--path", "box/t.tar.gz")
ARCHIVE_COMMANDS = (CREATE, RESULTS, "extract-archive", "verify-archive")


def project() -> dict[str, str]:
    """An environment in which `import cloud_services` works from any folder."""
    return os.environ | {"PYTHONPATH": str(SCRIPT.parent), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Like `run`, but within this process."""
    before = signal.getsignal(signal.SIGTERM)

    def here(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        with monkeypatch.context() as patch, Path(os.devnull).open() as nobody:
            patch.setattr(sys, "stdin", nobody)
            for name, value in env.items():
                patch.setenv(name, value)
            code = main(arguments)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    yield here
    signal.signal(signal.SIGTERM, before)


def parts(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.endswith(".part")]


def one_error(result: subprocess.CompletedProcess[str]) -> tuple[str, str]:
    """The error and the hint: one line each, nothing else, and nothing on stdout."""
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) <= 2, result.stderr
    assert lines[0].startswith("error: ")
    assert all(line.startswith("hint: ") for line in lines[1:])
    return lines[0], lines[1] if len(lines) > 1 else ""


# ── every command, from packing to unpacking ─────────────────────────────────────────────────────


@pytest.mark.usefixtures("workspace")
def test_a_training_archive_goes_all_the_way(run: Run, tmp_path: Path) -> None:
    made = run(CREATE, "--include-ticks", "--no-ask-ticks", "--include-cache", "-o", "t.tar.gz")
    assert (made.returncode, made.stderr.splitlines()[-1][:6]) == (0, "next: ")
    for word in ("t.tar.gz", "files", "8", "bytes", "%", "/s", "sha256"):
        assert word in made.stdout
    verified = run("verify-archive", "t.tar.gz")
    assert verified.returncode == 0
    assert "every file matches training.sha256" in verified.stdout
    unpacked = run("extract-archive", "t.tar.gz", "--into", "into")
    assert unpacked.returncode == 0
    assert "unpacked in  into" in unpacked.stdout
    sha256 = {re.search(r"sha256 +(\w{64})", r.stdout)[1] for r in (made, verified, unpacked)}  # type: ignore[index]
    assert len(sha256) == 1
    assert set(files(tmp_path / "into")) - {"training.sha256"} == {
        f"workspace/{name}"
        for name in files(tmp_path / "workspace")
        if name.startswith(("prepared/f", "raw"))
    }


@pytest.mark.usefixtures("workspace")
def test_a_results_archive_goes_all_the_way(call: Run, tmp_path: Path) -> None:
    assert call(RESULTS, "--output", "r.tar.gz", "--exclude", "models/logs").returncode == 0
    assert "every file matches results.sha256" in call("verify-archive", "r.tar.gz").stdout
    assert call("extract-archive", "r.tar.gz", "--into", "into").returncode == 0
    assert set(files(tmp_path / "into")) == {
        "results.sha256", "workspace/models/checkpoints/last.ckpt",
        "workspace/models/metrics/run.json", "workspace/prepared/scalers/scaler.pkl",
    }  # fmt: skip


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(("command", "stem"), [(CREATE, "training_data"), (RESULTS, "results")])
def test_the_default_name_carries_date_and_time(
    call: Run, tmp_path: Path, command: str, stem: str
) -> None:
    assert call(command).returncode == 0
    [made] = tmp_path.glob("*.tar.gz")
    assert re.fullmatch(rf"{stem}_\d{{8}}_\d{{6}}\.tar\.gz", made.name)


def test_another_workspace_may_be_named(call: Run, tmp_path: Path) -> None:
    make_workspace(tmp_path / "other place/ws")
    result = call(CREATE, "--workspace", "other place/ws", "-o", "t.tar.gz")
    assert result.returncode == 0
    assert call("extract-archive", "t.tar.gz").returncode == 0
    assert (tmp_path / "workspace/prepared/features/gold_val.csv").is_file()


def test_an_archive_without_a_manifest_says_so(call: Run, tmp_path: Path) -> None:
    write_file(tmp_path / "file")
    subprocess.run(["tar", "-czf", "plain.tar.gz", "file"], cwd=tmp_path, check=True)
    result = call("verify-archive", "plain.tar.gz")
    assert result.returncode == 0
    assert "no manifest" in result.stdout
    assert json.loads(call("verify-archive", "plain.tar.gz", "--json").stdout)["manifest"] is None


@pytest.mark.parametrize("name", ["plain.tar.gz", "it's $(touch pwned) a.tar.gz", "-dash.tar.gz"])
@pytest.mark.usefixtures("workspace")
def test_the_next_command_can_be_typed_as_printed(run: Run, tmp_path: Path, name: str) -> None:
    run(CREATE, "-o", f"./{name}")
    printed = run("verify-archive", f"./{name}").stderr.splitlines()[-1]
    line = printed.removeprefix("next: python cloud_services.py")
    assert line != printed
    typed = f"{shlex.quote(sys.executable)} {shlex.quote(str(SCRIPT))}{line}"
    done = subprocess.run(["bash", "-c", typed], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "workspace/prepared/features/gold_val.csv").is_file()
    assert not (tmp_path / "pwned").exists()


# ── errors: one line, a hint, an exit code ───────────────────────────────────────────────────────


def archives(folder: Path) -> None:
    write_file(folder / "noise", bytes(range(256)) * 20)
    subprocess.run(["tar", "-czf", "whole.tar.gz", "noise"], cwd=folder, check=True)
    whole = (folder / "whole.tar.gz").read_bytes()
    write_file(folder / "cut.tar.gz", whole[: len(whole) // 2])
    write_file(folder / "broken.tar.gz", b"\x1f\x8b\x08\x00garbage")


def without_features(folder: Path) -> None:
    make_workspace(folder / "workspace")
    (folder / "workspace/prepared/features/gold_test.csv").unlink()


def with_workspace(folder: Path) -> None:
    make_workspace(folder / "workspace")


def nothing(folder: Path) -> None:
    assert folder.is_dir()


class Bad(NamedTuple):
    """Bad input: what is there, what is typed, and what it leads to."""

    prepare: Callable[[Path], None]
    command: list[str]
    code: ExitCode
    error: str
    hint: str


ERRORS = [
    Bad(nothing, [CREATE], ExitCode.NOT_FOUND, "workspace", "--workspace"),
    Bad(nothing, [RESULTS], ExitCode.NOT_FOUND, "workspace", "--workspace"),
    Bad(without_features, [CREATE], ExitCode.NOT_FOUND, "gold_test.csv", "prepare_gold_data.py"),
    Bad(with_workspace, [CREATE, "--exclude", "*.csv"], ExitCode.USAGE, "mandatory", ""),
    Bad(with_workspace, [CREATE, "--include-ticks"], ExitCode.USAGE, "tick", "--no-ask-ticks"),
    Bad(with_workspace, [CREATE, "-o", "workspace"], ExitCode.USAGE, "is a folder", "--output"),
    Bad(with_workspace, [CREATE, "-o", "n" * 256], ExitCode.USAGE, "too long", ""),
    Bad(nothing, ["verify-archive", "gone.tar.gz"], ExitCode.NOT_FOUND, "gone.tar.gz", ""),
    Bad(nothing, ["extract-archive", "gone.tar.gz"], ExitCode.NOT_FOUND, "gone.tar.gz", ""),
    Bad(with_workspace, ["verify-archive", "workspace"], ExitCode.USAGE, "is a folder", ""),
    Bad(archives, ["verify-archive", "broken.tar.gz"], ExitCode.INTEGRITY, "altered", "again"),
    Bad(archives, ["extract-archive", "broken.tar.gz"], ExitCode.INTEGRITY, "altered", "again"),
    Bad(archives, ["verify-archive", "cut.tar.gz"], ExitCode.INTEGRITY, "truncated", "again"),
    Bad(archives, ["extract-archive", "whole.tar.gz", "--into", "noise"], ExitCode.USAGE,
        "noise", "--into"),
]  # fmt: skip
BAD_INPUT = pytest.mark.parametrize("bad", ERRORS, ids=lambda bad: " ".join(bad.command)[:60])


@BAD_INPUT
def test_bad_input_gets_one_clear_line_a_hint_and_an_exit_code(
    run: Run, tmp_path: Path, bad: Bad
) -> None:
    bad.prepare(tmp_path)
    before = tree(tmp_path)
    result = run(*bad.command)
    said, advised = one_error(result)
    assert result.returncode == bad.code
    assert bad.error in said
    assert bad.hint in advised
    assert tree(tmp_path) == before


@BAD_INPUT
def test_with_json_an_error_is_one_document_too(call: Run, tmp_path: Path, bad: Bad) -> None:
    bad.prepare(tmp_path)
    result = call(*bad.command, "--json")
    document = json.loads(result.stdout)
    assert set(document) == {"error", "hint", "exit_code"}
    assert document["exit_code"] == result.returncode == bad.code
    assert bad.error in document["error"]
    assert bad.hint in document["hint"]


def test_an_unreadable_archive_is_exit_5(
    plain_user: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_file(plain_user / "a.tar.gz").chmod(0)
    assert main(["verify-archive", str(plain_user / "a.tar.gz")]) == ExitCode.ACCESS
    assert "permission denied" in capsys.readouterr().err


def test_a_full_disk_is_exit_7(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([CREATE, "-q", "--workspace", str(workspace), "-o", "t.tar.gz"]) == 0
    monkeypatch.setattr(cloud_services, "free_space", lambda _: 10)
    assert main(["extract-archive", "t.tar.gz", "--into", "into"]) == ExitCode.TRANSFER
    assert "free some space" in capsys.readouterr().err


def test_an_unknown_exception_stays_loud(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cloud_services, "verify_archive", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["verify-archive", "x"])


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["no-such-command"], [CREATE, "--no-such-flag"], [CREATE, "surplus"],
        ["verify-archive"], ["extract-archive"], ["extract-archive", "a", "b"],
        [CREATE, "--output"], ["completion", "fish"], ["completion"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_wrong_command_line_is_exit_2(call: Run, tmp_path: Path, arguments: list[str]) -> None:
    result = call(*arguments)
    assert (result.returncode, result.stdout) == (ExitCode.USAGE, "")
    assert "usage: cloud_services.py" in result.stderr
    assert tree(tmp_path) == {}


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    "arguments",
    [["upload-training", "--method", "local", "--path", "box", "--archive", ""],
     ["download-results", "--method", "local", "--path", ""],
     ["s3-upload-training", "--bucket", "b", "--archive", ""], [CREATE, "-o", ""],
     [RESULTS, "--workspace="], ["verify-archive", ""], ["extract-archive", "a", "--into", ""],
     ["list-remote-files", "--identity", ""], ["list-runs", "--logs", ""], ["wandb-sync", ""]],
    ids=" ".join,
)  # fmt: skip
def test_a_path_from_an_unset_variable_is_exit_2_not_the_default(
    call: Run, tmp_path: Path, arguments: list[str]
) -> None:
    before = tree(tmp_path)
    result = call(*arguments)
    assert (result.returncode, result.stdout) == (ExitCode.USAGE, "")
    assert "the path is empty" in result.stderr
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    "arguments",
    [[CREATE, "--include-t"], [CREATE, "--dry"], [CREATE, "--out", "x"], ["--js", CREATE],
     ["create-training", "-o", "x"], ["extract-archive", "a", "--int", "b"]],
    ids=" ".join,
)  # fmt: skip
def test_abbreviations_are_refused(call: Run, tmp_path: Path, arguments: list[str]) -> None:
    assert call(*arguments).returncode == ExitCode.USAGE
    assert list(tmp_path.iterdir()) == [tmp_path / "workspace"]


def test_settings_for_the_server_do_not_matter_to_archives(call: Run, workspace: Path) -> None:
    assert workspace.is_dir()
    result = call(
        CREATE, "-o", "t.tar.gz", PAPERSPACE_PORT="none", PAPERSPACE_HOST="-oProxyCommand=x"
    )
    assert result.returncode == 0, result.stderr


# ── flags before and after, quiet, json, dry run ─────────────────────────────────────────────────


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("before", [True, False])
def test_common_flags_stand_before_or_after_the_subcommand(run: Run, before: bool) -> None:
    flags = ["--json", "-q", "-v", "-y"]
    command = [CREATE, "--include-ticks", "-o", "t.tar.gz"]
    result = run(*flags, *command) if before else run(*command, *flags)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["files"] == 7
    assert result.stderr == ""


@pytest.mark.usefixtures("workspace")
def test_json_is_one_document_with_everything_in_it(call: Run, tmp_path: Path) -> None:
    write_file(tmp_path / "workspace/raw_data/ticks/.env")
    made = json.loads(call(CREATE, "--include-ticks", "--yes", "-o", "t.tar.gz", "--json").stdout)
    assert (made["path"], made["files"], made["manifest"]) == ("t.tar.gz", 7, "training.sha256")
    assert made["archive_bytes"] == (tmp_path / "t.tar.gz").stat().st_size
    assert [item["name"] for item in made["left_out"]] == ["workspace/raw_data/ticks/.env"]
    assert "secret" in made["left_out"][0]["reason"]
    checked = json.loads(call("verify-archive", "t.tar.gz", "--json").stdout)
    assert (checked["sha256"], checked["into"]) == (made["sha256"], None)
    unpacked = json.loads(call("extract-archive", "t.tar.gz", "--into", "i", "--json").stdout)
    assert (unpacked["into"], unpacked["files"], unpacked["bytes"] > made["input_bytes"]) == (
        "i",
        8,
        True,
    )


@pytest.mark.usefixtures("workspace")
def test_quiet_says_nothing_when_all_is_well(call: Run) -> None:
    for command in (
        [CREATE, "-o", "t.tar.gz"], [RESULTS, "-o", "r.tar.gz"], ["verify-archive", "t.tar.gz"],
        ["extract-archive", "t.tar.gz", "--into", "into"],
    ):  # fmt: skip
        result = call(*command, "-q")
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert "error: " in call("verify-archive", "gone", "-q").stderr


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("command", "files_"), [([CREATE, "--include-ticks", "--include-cache"], 8), ([RESULTS], 4)]
)
def test_a_dry_run_lists_everything_and_writes_nothing(
    call: Run, tmp_path: Path, command: list[str], files_: int
) -> None:
    write_file(tmp_path / "workspace/raw_data/ticks/.env")
    write_file(tmp_path / "workspace/models/logs/id_rsa")
    before = tree(tmp_path)
    result = call(*command, "--dry-run", "-o", "deep/out.tar.gz", "--exclude", "last*")
    files_ -= RESULTS in command
    assert (result.returncode, result.stderr) == (0, "")
    planned = re.findall(r"^ +\d+  (workspace/.+)$", result.stdout, re.MULTILINE)
    assert len(planned) == files_
    assert "secret" in result.stdout
    assert "deep/out.tar.gz" in result.stdout
    document = json.loads(call(*command, "--dry-run", "--json", "--exclude", "last*").stdout)
    assert [file["name"] for file in document["files"]] == planned
    assert document["bytes"] == sum(file["size"] for file in document["files"])
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("workspace")
def test_what_was_left_out_is_told_on_stderr(call: Run, tmp_path: Path) -> None:
    for number in range(30):
        write_file(tmp_path / f"workspace/raw_data/ticks/{number}.pem")
    result = call(CREATE, "--include-ticks", "--yes", "-o", "t.tar.gz")
    told = [line for line in result.stderr.splitlines() if line.startswith("left out: ")]
    assert len(told) == 21
    assert "10 more" in told[-1]
    assert "left out" not in result.stdout


# ── the question about ticks ─────────────────────────────────────────────────────────────────────


TERMINAL = """if True:
    import fcntl, os, signal, sys, termios
    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that control-C arrives
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""


def at_a_terminal(answer: bytes, *arguments: str, **env: str) -> tuple[int, str]:
    """Run a command at a terminal and answer its question; the exit code and what it showed."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", TERMINAL, str(SCRIPT), *arguments],
        stdin=theirs, stdout=theirs, stderr=theirs, env=os.environ | {"NO_COLOR": "1"} | env,
    ) as process:  # fmt: skip
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # the terminal's other end is gone
            while block := os.read(ours, 1 << 16):
                shown += block
                if shown.endswith(b"[Y/n] "):
                    os.write(ours, answer)
    os.close(ours)
    return process.returncode, shown.decode()


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("answer", ["", "y", "Y", "yes", "YES", "да", "Д", " y "])
def test_enter_and_yes_in_two_languages_mean_yes(tmp_path: Path, answer: str) -> None:
    code, shown = at_a_terminal(f"{answer}\n".encode(), CREATE, "--include-ticks", "-o", "t.tar.gz")
    assert code == 0
    assert re.search(r"Include 4 tick files, \d+ B\? \[Y/n\] ", shown)
    subprocess.run(["tar", "-xzf", "t.tar.gz"], check=True)
    manifest = (tmp_path / "training.sha256").read_text()
    assert manifest.count("raw_data/ticks/") == 4


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("answer", ["n", "no", "нет", "N", "maybe", "\x1b[A"])
def test_anything_else_packs_without_ticks(tmp_path: Path, answer: str) -> None:
    code, shown = at_a_terminal(
        f"{answer}\n".encode(), CREATE, "--include-ticks", "--include-cache", "-o", "t.tar.gz"
    )
    assert code == 0
    assert "packing without ticks" in shown
    subprocess.run(["tar", "-xzf", "t.tar.gz"], check=True)
    manifest = (tmp_path / "training.sha256").read_text()
    assert "ticks" not in manifest
    assert "raw_data/cache/" in manifest


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    ("key", "code"), [(b"\x04", ExitCode.REFUSED), (b"\x03", ExitCode.INTERRUPTED)]
)
def test_end_of_input_and_control_c_at_the_question_do_nothing(
    tmp_path: Path, key: bytes, code: ExitCode
) -> None:
    before = tree(tmp_path)
    got, shown = at_a_terminal(key, CREATE, "--include-ticks", "-o", "t.tar.gz")
    assert got == code, shown
    assert tree(tmp_path) == before


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("flag", ["--no-ask-ticks", "--yes", "-y", "--dry-run"])
def test_a_flag_answers_the_question(flag: str) -> None:
    code, shown = at_a_terminal(b"n\n", CREATE, "--include-ticks", flag, "-o", "t.tar.gz")
    assert code == 0
    assert "[Y/n]" not in shown


@pytest.mark.usefixtures("workspace")
def test_without_ticks_nothing_is_asked() -> None:
    for flags in ([], ["--no-ask-ticks"], ["--include-cache"]):
        code, shown = at_a_terminal(b"n\n", CREATE, *flags, "-o", "t.tar.gz")
        assert code == 0
        assert "[Y/n]" not in shown


# ── color, hostile names, closed streams ─────────────────────────────────────────────────────────


def test_errors_are_red_on_a_terminal_unless_no_color_is_set() -> None:
    assert "\033[31m" in at_a_terminal(b"", "verify-archive", "gone", NO_COLOR="")[1]
    assert "\033" not in at_a_terminal(b"", "verify-archive", "gone", NO_COLOR="1")[1]


def control_characters(text: str) -> list[str]:
    return [c for c in text if not c.isprintable() and c != "\n"]


HOSTILE = "\x1b[31m\x1b]0;pwned\x07\r\n\u202e\x9b.csv"


@pytest.mark.usefixtures("workspace")
def test_no_control_character_of_a_name_reaches_the_terminal(call: Run, tmp_path: Path) -> None:
    write_file(tmp_path / "workspace/raw_data/ticks" / HOSTILE)
    write_file(tmp_path / "workspace/raw_data/ticks" / f"{HOSTILE}.pem")
    (tmp_path / "workspace/models/metrics" / HOSTILE).symlink_to("nowhere")
    archive = f"{HOSTILE[:-4]}.tar.gz"
    for command, code in (
        ([CREATE, "--include-ticks", "--dry-run"], 0),
        ([CREATE, "--include-ticks", "--yes", "-o", archive], 0),
        ([CREATE, "--include-ticks", "--dry-run", "--exclude", f"*{HOSTILE}*"], 0),
        ([CREATE, "--include-ticks", "--yes", "--exclude", "\x1b*", "-o", archive], 0),
        ([RESULTS, "--dry-run"], 0),
        ([RESULTS, "-o", f"to {archive}"], 0),
        (["verify-archive", archive], 0),
        (["extract-archive", archive, "--into", HOSTILE], 0),
        (["verify-archive", HOSTILE], 2),
        (["verify-archive", HOSTILE + "gone"], 4),
        ([CREATE, "--workspace", HOSTILE + "gone"], 4),
    ):
        result = call(*command)
        assert result.returncode == code, result.stderr
        assert control_characters(result.stdout) == control_characters(result.stderr) == []
        assert "pwned" in result.stdout + result.stderr
        document = call("--json", *command).stdout
        assert control_characters(document) == []
        json.loads(document)


@pytest.mark.usefixtures("workspace")
def test_an_altered_archive_with_hostile_names_is_reported_safely(
    call: Run, tmp_path: Path
) -> None:
    write_file(tmp_path / "workspace/raw_data/ticks" / HOSTILE, b"original")
    call(CREATE, "--include-ticks", "--yes", "-o", "t.tar.gz")
    content = gzip.decompress((tmp_path / "t.tar.gz").read_bytes())
    for old, new in ((b"original", b"modified"), (b"0000644\0", b"garbage\0")):
        write_file(tmp_path / "t.tar.gz", gzip.compress(content.replace(old, new)))
        said, _ = one_error(call("verify-archive", "t.tar.gz"))
        assert control_characters(said) == []


def test_an_error_and_its_hint_are_shown_safely_whatever_they_hold(
    call: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise CloudError(f"error {HOSTILE}", f"hint {HOSTILE}")

    monkeypatch.setattr(cloud_services, "verify_archive", fail)
    said, advised = one_error(call("verify-archive", "x"))
    assert control_characters(said + advised) == []
    document = json.loads(call("verify-archive", "x", "--json").stdout)
    assert (document["error"], document["hint"]) == (f"error {HOSTILE}", f"hint {HOSTILE}")


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1251"])
def test_a_terminal_of_few_letters_gets_names_escaped_not_a_traceback(
    run: Run, tmp_path: Path, encoding: str
) -> None:
    write_file(tmp_path / "workspace/raw_data/ticks/📈 тик é.csv")
    for command in ([CREATE, "--include-ticks", "--dry-run"], ["--help"], [CREATE, "--help"]):
        result = run(*command, PYTHONIOENCODING=encoding)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=repr)
def test_printable_text_is_safe_and_still_tells_names_apart(name: str) -> None:
    assert control_characters(printable(name)) == []
    printable(name).encode()
    assert printable(f"{name}a") != printable(f"{name}b")
    assert printable(os.fsencode(name)) == printable(name)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize(
    "command",
    [[CREATE, "--dry-run"], ["completion", "bash"], ["--help"], ["--version"], [CREATE, "--help"],
     [CREATE, "-o", "t.tar.gz"], ["verify-archive", "gone", "--json"]],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize("buffering", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_a_reader_that_has_seen_enough_is_no_error(
    command: list[str], buffering: tuple[str, ...]
) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = subprocess.run(
        [sys.executable, *buffering, str(SCRIPT), *command], stdout=writing,
        stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    os.close(writing)
    assert b"Traceback" not in result.stderr
    assert b"Exception" not in result.stderr
    assert b"Errno" not in result.stderr
    assert result.returncode == (4 if "gone" in command else 0)


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("redirect", [">&-", "2>&-", "<&-"])
def test_a_stream_that_is_closed_from_the_start_is_no_error(tmp_path: Path, redirect: str) -> None:
    result = subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "-", sys.executable, str(SCRIPT), CREATE,
         "-o", "t.tar.gz"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    gzip.decompress((tmp_path / "t.tar.gz").read_bytes())


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("buffering", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("flags", [["--dry-run"], [], ["--json"], ["--help"]], ids=" ".join)
def test_a_result_that_cannot_be_printed_is_lost_and_nothing_else(
    tmp_path: Path, flags: list[str], buffering: tuple[str, ...]
) -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, *buffering, str(SCRIPT), *UPLOAD, *flags], stdout=full,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    if flags != ["--help"] or not buffering:  # argparse itself forgives an unbuffered one
        assert result.returncode == ExitCode.UNEXPECTED
        said, advised = result.stderr.splitlines()
        assert said == "error: the result could not be printed: the disk is full"
        assert "is done" in advised
    if flags in ([], ["--json"]):
        gzip.decompress((tmp_path / "box/t.tar.gz").read_bytes())


def test_an_error_whose_document_cannot_be_printed_is_still_one_clear_line() -> None:
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            [sys.executable, str(SCRIPT), "verify-archive", "gone", "--json"], stdout=full,
            stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert result.returncode == ExitCode.NOT_FOUND
    assert result.stderr == "error: gone: does not exist\n"


TALKATIVE = """if True:
    import sys
    import cloud_services
    cloud_services.LineProgress.INTERVAL_SECONDS = 0.0
    sys.exit(cloud_services.main())"""


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("buffering", [(), ("-u",)], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("where", ["a closed pipe", "a full disk"])
@pytest.mark.parametrize(
    ("command", "code"),
    [((CREATE, "-o", "box/t.tar.gz"), 0), (UPLOAD, 0), (("verify-archive", "gone"), 4),
     (("list-remote-files", "--host", "127.0.0.1", "--port", "1"), 7), (("no-such-command",), 2)],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_stderr_that_nobody_can_read_ends_no_work_and_alters_no_exit_code(
    tmp_path: Path, command: tuple[str, ...], code: int, where: str, buffering: tuple[str, ...]
) -> None:
    unread = os.open("/dev/full", os.O_WRONLY)
    if where == "a closed pipe":
        os.close(unread)
        reading, unread = os.pipe()
        os.close(reading)
    done = subprocess.run(
        [sys.executable, *buffering, "-c", TALKATIVE, *command], stderr=unread,
        stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, env=project(), check=False,
    )  # fmt: skip
    os.close(unread)
    assert done.returncode == code
    if code == 0:
        assert b"sha256" in done.stdout
        gzip.decompress((tmp_path / "box/t.tar.gz").read_bytes())


# ── signals ──────────────────────────────────────────────────────────────────────────────────────

STUCK = """if True:
    import signal, sys, threading, time
    import cloud_services
    class Stuck(cloud_services.Progress):
        def advance(self, count):
            if threading.current_thread() is threading.main_thread():
                print("stuck", file=sys.stderr, flush=True)
                time.sleep(60)
    cloud_services.Console.progress = lambda console: Stuck()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(cloud_services.main())"""


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("without", ["", "isal.igzip_threaded"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("command", [CREATE, "extract-archive"])
def test_a_signal_cleans_up_and_says_so(
    call: Run, tmp_path: Path, number: signal.Signals, command: str, without: str
) -> None:
    arguments = [CREATE, "-o", "t.tar.gz"]
    if command == "extract-archive":
        call(*arguments)
        arguments = [command, "t.tar.gz", "--into", "into"]
    else:
        write_file(tmp_path / "t.tar.gz", b"the old archive")
    before = files(tmp_path)
    program = f"import sys; sys.modules[{without!r}] = None\n{STUCK}" if without else STUCK
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=project(),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline() == "stuck\n"
        process.send_signal(number)
        rest = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert rest[0] == ""
    assert len(rest[1].splitlines()) == 1, rest[1]
    assert files(tmp_path) == before
    assert parts(tmp_path) == []


@pytest.mark.usefixtures("workspace")
@pytest.mark.parametrize("ignored", [False, True], ids=["a terminal is closed", "under nohup"])
def test_a_closed_terminal_is_a_sigterm_unless_that_is_ignored(
    tmp_path: Path, ignored: bool
) -> None:
    before = files(tmp_path)
    setting = "signal.SIG_IGN" if ignored else "signal.SIG_DFL"
    program = f"import signal; signal.signal(signal.SIGHUP, {setting})\n{STUCK}"
    with subprocess.Popen(
        [sys.executable, "-c", program, CREATE, "-o", "t.tar.gz"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=project(),
    ) as process:  # fmt: skip
        assert process.stderr is not None
        assert process.stderr.readline() == "stuck\n"
        for _ in range(2):  # from the shell, and from the terminal
            process.send_signal(signal.SIGHUP)
        if ignored:
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(0.5)
            process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=30)
    assert process.returncode == ExitCode.TERMINATED
    assert said.startswith("terminated; ")
    assert "Traceback" not in said
    assert files(tmp_path) == before


@pytest.mark.usefixtures("workspace")
def test_a_terminal_that_is_really_closed_leaves_nothing_behind(tmp_path: Path) -> None:
    before = files(tmp_path)
    master, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", ON_TERMINAL + STUCK, CREATE, "-o", "t.tar.gz"],
        stdin=terminal, stdout=terminal, stderr=terminal, env=project(), start_new_session=True,
    )  # fmt: skip
    os.close(terminal)
    said = b""
    while b"stuck" not in said:
        said += os.read(master, 1000)
    os.close(master)
    assert process.wait(30) == ExitCode.TERMINATED
    assert files(tmp_path) == before


ON_TERMINAL = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_main_leaves_its_callers_signal_handlers_alone(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    try:
        main(["verify-archive", "gone"])
        assert signal.getsignal(number) == before
    finally:
        signal.signal(number, before)


# ── help, flags, completion ──────────────────────────────────────────────────────────────────────

PROMISED: dict[str, dict[str, str | None]] = {
    CREATE: {
        "--output": "training_data_YYYYMMDD_HHMMSS.tar.gz", "-o": None, "--include-ticks": None,
        "--include-cache": None, "--no-ask-ticks": None, "--workspace": "workspace",
        "--exclude": None, "--dry-run": None,
    },
    RESULTS: {
        "--output": "results_YYYYMMDD_HHMMSS.tar.gz", "-o": None, "--workspace": "workspace",
        "--exclude": None, "--dry-run": None,
    },
    "extract-archive": {"ARCHIVE": None, "--into": "."},
    "verify-archive": {"ARCHIVE": None},
}  # fmt: skip


def subparsers() -> dict[str, argparse.ArgumentParser]:
    [action] = [a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)]
    return dict(action.choices)


@pytest.mark.parametrize("command", ARCHIVE_COMMANDS)
def test_every_promised_flag_exists_with_its_default(command: str) -> None:
    text = " ".join(subparsers()[command].format_help().split())
    for flag, default in PROMISED[command].items():
        assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text), flag
        if default:
            assert f"(default: {default})" in text


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_goes_to_stdout_and_says_what_the_command_does(call: Run, command: str) -> None:
    result = call(*([command] if command else []), "--help", COLUMNS="100")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: cloud_services.py {command}".rstrip())
    for word in COMMANDS if not command else ("--help", "--json", "--quiet", "--verbose", "--yes"):
        assert word in result.stdout
    if command:
        assert (COMMANDS[command].loaded().run.__doc__ or "").split("\n")[0] in result.stdout


def test_what_is_listed_of_each_command_is_what_its_own_help_begins_with(call: Run) -> None:
    listed = " ".join(call("--help", COLUMNS="100").stdout.split())
    for entry in cloud_services.all_commands():
        assert f"{entry.name} {' '.join(entry.summary.split())}" in listed


@pytest.mark.parametrize("before", [["-h"], ["--help"], ["-qh"], ["--json", "-h"]])
def test_help_before_a_command_is_that_of_all_commands(call: Run, before: list[str]) -> None:
    result = call(*before, "verify-archive")
    assert result.returncode == 0
    assert result.stdout == call("--help").stdout
    assert all(name in result.stdout for name in COMMANDS)


def test_help_after_a_command_is_that_of_the_command(call: Run) -> None:
    result = call("--json", "verify-archive", "-h")
    assert result.stdout.startswith("usage: cloud_services.py verify-archive")


def test_help_prints_no_setting_of_the_environment(call: Run) -> None:
    for command in COMMANDS:
        result = call(
            command,
            "--help",
            PAPERSPACE_HOST="canary.example",
            PAPERSPACE_PASSPHRASE="canary",
        )
        assert "canary" not in result.stdout


def test_the_version_is_printed(call: Run) -> None:
    assert call("--version").stdout == f"cloud_services.py {cloud_services.__version__}\n"


def complete(*words: str, shell: str = "bash") -> list[str]:
    """What bash offers after typing `words`, the last of them unfinished."""
    script = 'eval "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _cloud_services; '
    printed = subprocess.run(
        ["bash", "-c", script + 'printf "%s\\n" "${COMPREPLY[@]}"', "-", script_for(shell), *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert printed.stderr == ""
    return printed.stdout.split("\n")[:-1]


@functools.cache
def script_for(shell: str) -> str:
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "completion", shell],
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_completion_script_is_valid_shell(shell: str, tmp_path: Path) -> None:
    checker = shutil.which(shell) or "bash"
    path = write_file(tmp_path / "completion", script_for(shell).encode())
    subprocess.run([checker, "-n", path], check=True)


def test_completion_offers_commands_flags_and_files(tmp_path: Path) -> None:
    assert complete("cloud_services.py", "create-") == [CREATE, RESULTS]
    assert complete("cloud_services.py", "") == list(COMMANDS)
    assert complete("cloud_services.py", "--json", "veri") == ["verify-archive"]
    assert complete("cloud_services.py", CREATE, "--include-") == [
        "--include-cache",
        "--include-ticks",
    ]
    assert complete("cloud_services.py", "verify-archive", "--include-") == [""]
    write_file(tmp_path / "archive one.tar.gz")
    assert complete("cloud_services.py", "verify-archive", "arch") == ["archive one.tar.gz"]


def test_completion_knows_every_flag_of_every_command() -> None:
    for name, parser in subparsers().items():
        known = {option for action in parser._actions for option in action.option_strings}
        offered = set(complete("cloud_services.py", name, "-"))
        assert {option for option in known if option.startswith("--")} <= offered


def test_the_file_alone_completes_what_is_there_and_says_what_is_not(
    tmp_path: Path, run: Run
) -> None:
    copy = tmp_path / "box/cloud_services.py"
    copy.parent.mkdir()
    copy.write_bytes(SCRIPT.read_bytes())
    clean = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", str(copy), "completion", "bash"], env=clean, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{CREATE}) options=" in done.stdout
    assert "list-runs" not in done.stdout
    (line,) = done.stderr.splitlines()
    assert re.search("left out, .*list-runs.*quickstart", line)
    library = "import cloud_services as c; c.build_parser().parse_args(['list-runs'])"
    subprocess.run([sys.executable, "-c", library], env=clean, cwd=copy.parent, check=True)


def test_completion_is_registered_for_the_ways_to_call_it() -> None:
    script = completion_script("bash", {"verify-archive": ["--json"]})
    shown = subprocess.run(
        ["bash", "-c", 'eval "$1"; complete -p cloud-services cloud_services.py', "-", script],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.count("_cloud_services") == 2


# ── one module, many doors ───────────────────────────────────────────────────────────────────────


def test_run_as_a_script_it_uses_the_classes_others_import(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise RefusedError("raised by the importable copy")

    monkeypatch.setattr(cloud_services, "verify_archive", refuse)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "verify-archive", "x"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == ExitCode.REFUSED
    assert "raised by the importable copy" in capsys.readouterr().err


def test_the_module_works_alone_in_any_folder(workspace: Path, tmp_path: Path, run: Run) -> None:
    assert workspace.is_dir()
    shutil.copy(SCRIPT, tmp_path / "cloud_services.py")
    result = subprocess.run(
        [sys.executable, "cloud_services.py", CREATE, "-o", "t.tar.gz"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert run("verify-archive", "t.tar.gz").returncode == 0


def test_a_python_that_trusts_no_folder_runs_it_too(run: Run) -> None:
    for python in ((sys.executable, "-I"), (sys.executable, "-I", "-S")):
        result = run("--version", python=python)
        assert result.returncode == 0, result.stderr


class NobodyToAsk:
    """A standard input that must not be touched."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"standard input was touched: {name}")


def test_library_calls_ask_nothing_and_print_nothing(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "stdin", NobodyToAsk())
    write_file(workspace / "raw_data/ticks/.env")
    uploader = PaperspaceUploader(workspace=workspace)
    downloader = PaperspaceDownloader(workspace=workspace)
    made = uploader.create_paperspace_training_archive(tmp_path / "t.tar.gz", include_ticks=True)
    assert made
    assert [item.name for item in made.left_out] == ["workspace/raw_data/ticks/.env"]
    assert made.sha256 == uploader.create_training_archive(tmp_path / "u.tar.gz", True).sha256
    assert downloader.create_paperspace_results_archive(tmp_path / "r.tar.gz")
    assert downloader.create_results_archive(tmp_path / "s.tar.gz", exclude=["models/logs"])
    assert cloud_services.verify_archive(tmp_path / "t.tar.gz")
    with pytest.raises(CloudError):
        uploader.create_training_archive(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_library_calls_make_up_the_default_name(workspace: Path, tmp_path: Path) -> None:
    made = PaperspaceUploader(workspace=workspace).create_training_archive()
    assert re.fullmatch(r"training_data_\d{8}_\d{6}\.tar\.gz", made.path.name)
    made = PaperspaceDownloader(workspace=workspace).create_results_archive()
    assert re.fullmatch(r"results_\d{8}_\d{6}\.tar\.gz", made.path.name)
    assert len(list(tmp_path.glob("*.tar.gz"))) == 2


def test_importing_the_module_has_no_side_effects(tmp_path: Path) -> None:
    code = (
        "import logging, signal, sys; before = signal.getsignal(signal.SIGTERM); "
        "import cloud_services; assert signal.getsignal(signal.SIGTERM) == before; "
        "assert not logging.getLogger().handlers and not cloud_services.log.handlers; "
        "heavy = {'paramiko', 'scp', 'tqdm', 'dotenv', 'isal', 'boto3'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=project(), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert tree(tmp_path) == {}


@pytest.mark.usefixtures("workspace")
def test_verbose_and_quiet_set_how_much_is_logged(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, level in (([], logging.WARNING), (["-v"], logging.DEBUG), (["-q"], logging.ERROR)):
        main([CREATE, "--dry-run", *flags])
        assert cloud_services.log.level == level
    assert capsys.readouterr().err == ""


# ── small parsers ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "size"),
    [("1", 1), ("500", 500), ("64K", 65536), ("20M", 20 << 20), ("20m", 20 << 20),
     ("1.5G", 3 << 29), ("2T", 2 << 40), ("20MB", 20 << 20), ("20MiB", 20 << 20), (" 7 ", 7)],
)  # fmt: skip
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "M", "20X", "1e6", "0.1", "20 20", "∞", "٣x"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(CloudError, match="is no size"):
        parse_size(text)
