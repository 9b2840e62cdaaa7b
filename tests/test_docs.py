"""The documentation is true: commands parse, examples run, links lead somewhere, tables fit."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

import cloud_services
import transfers
from cloud_services import CloudError, ExitCode, build_parser
from cloud_settings import S3_KEY_VARIABLES, S3_VARIABLES, SSH_VARIABLES, S3Settings
from docs.make_commands import PAGE, exit_code_meanings, render
from tests.conftest import files, write_file
from tests.local_hub import LocalHub
from tests.s3_servers import RcloneServer
from tests.support import ROOT, workspace

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
GUIDES = [page for page in PAGES if page.name != "CHANGELOG.md"]
SCRIPTS = sorted([*ROOT.glob("scripts/*.sh"), ROOT / ".ci/run"])
MODULES = sorted([*ROOT.glob("*.py"), *ROOT.glob("cloud_jobs/*.py")])
SOURCES = [module.read_text("utf-8") for module in MODULES]
SHELL_LANGUAGES = ("sh", "bash", "powershell")
COLUMNS = 100
SHELL_OPERATOR = re.compile(r"[();<>|&]+")


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in any of these languages."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def shell_words(text: str) -> list[str]:
    """The words of a shell line, operators apart, comments dropped."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


def calls(text: str) -> Iterator[list[str]]:
    """The arguments of each call of cloud_services.py in shell text, quoted scripts included."""
    for line in text.replace("\\\n", " ").splitlines():
        if "cloud_services.py" not in line:
            continue
        words = shell_words(line)
        for at, word in enumerate(words):
            if word == "cloud_services.py" and words[at - 1].split("\\")[-1].startswith("python"):
                rest = words[at + 1 :]
                ends = [n for n, word in enumerate(rest) if SHELL_OPERATOR.fullmatch(word)]
                yield [word for word in rest[: ends[0] if ends else None] if word != "$@"]
            elif " cloud_services.py " in word:
                yield from calls(word)


def documented_calls() -> list[tuple[str, list[str]]]:
    """Every call the documentation shows, in a block or in a sentence, with the page's name."""
    found = []
    for page in PAGES:
        inline = re.findall(r"`(python cloud_services\.py [^`]+)`", page.read_text("utf-8"))
        shown = [text.replace("\n", " ") for text in inline if "COMMAND" not in text]
        for text in [*blocks(page, *SHELL_LANGUAGES), *shown]:
            found += [(page.name, arguments) for arguments in calls(text)]
    return found


def template(node: ast.expr) -> str:
    """The text of a message as it is written, with … for each part that is only known later."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return template(node.left) + template(node.right)
    return "…"


def error_messages() -> dict[str, int]:
    """The message of each CloudError that the modules make, and the line where.

    Tables of vendor errors hold them as `_Rule(…, Kind, message, …)`, with {words} to be filled in.
    """
    kinds = {name for name, value in vars(cloud_services).items() if is_error_class(value)}
    found = {}
    for node in (node for source in SOURCES for node in ast.walk(ast.parse(source))):
        call = node if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else None
        maker = cast("ast.Name", call.func).id if call else ""
        if call and call.args and maker in kinds:
            found[template(call.args[0])] = call.lineno
        elif call and maker == "_Rule":
            after_kind = [isinstance(a, ast.Name) and a.id in kinds for a in call.args].index(True)
            message = re.sub(r"{\w+}", "…", template(call.args[after_kind + 1]))
            found[message] = call.lineno
    return {message: line for message, line in found.items() if message != "…"}


def is_error_class(value: object) -> bool:
    """Whether a name of the module is one of its errors."""
    return isinstance(value, type) and issubclass(value, CloudError)


def fragments(text: str) -> list[str]:
    """The parts of a message between its placeholders that are long enough to mean something."""
    return [part for part in map(str.strip, text.split("…")) if len(part.strip(" :,")) > 1]


def exit_code_tables(page: Path) -> list[dict[int, str]]:
    """The exit code tables of a page: code to meaning."""
    tables = re.findall(
        r"^\| Exit code \|.*\n\|[ -|]+\|\n((?:\|.*\n)+)", page.read_text("utf-8"), re.MULTILINE
    )
    return [
        {
            int(code): meaning
            for code, meaning in re.findall(r"^\| (\d+) \| ([^|]+?) \|", table, re.MULTILINE)
        }
        for table in tables
    ]


# ── commands ─────────────────────────────────────────────────────────────────────────────────────


def test_the_command_reference_is_what_the_parser_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: make docs"


def test_the_command_reference_does_not_depend_on_the_terminals_width(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = render()
    monkeypatch.setenv("COLUMNS", "40")
    assert render() == before


@pytest.mark.parametrize(("page", "arguments"), documented_calls())
def test_every_documented_command_line_parses(page: str, arguments: list[str]) -> None:
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        try:
            parsed = build_parser().parse_args(["3" if word == "N" else word for word in arguments])
        except SystemExit:
            pytest.fail(f"{page}: {shlex.join(arguments)}: {errors.getvalue().splitlines()[-1]}")
    assert isinstance(parsed, argparse.Namespace)


def test_every_command_appears_in_the_readme_and_in_a_documented_line() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = {word for _, arguments in documented_calls() for word in arguments}
    for name in cloud_services.COMMANDS:
        assert f"`{name}`" in readme
        assert name in shown


def test_every_flag_named_in_a_sentence_exists() -> None:
    options = {
        flag for entry in cloud_services.all_commands() for a in entry.arguments for flag in a.flags
    }
    options |= {"--json", "--quiet", "--verbose", "--yes", "--help", "--version"}
    for page in GUIDES:
        for text in re.findall(r"`(--[a-z0-9-]+)[^`]*`", page.read_text(encoding="utf-8")):
            assert text in options, f"{page.name}: {text}"


# ── messages, codes and settings ─────────────────────────────────────────────────────────────────


def entries() -> list[str]:
    """The messages that troubleshooting.md explains, in a heading or in its table."""
    page = (ROOT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    lines = re.findall(r"^### (.+)$|^\| (`.+?) \| \d", page, re.MULTILINE)
    return re.findall(r"`([^`]+)`", "\n".join("".join(line) for line in lines))


def covers(entry: str, message: str) -> bool:
    """Whether an entry is about a message; each may have a … where the other has words."""
    wide, narrow = (".*".join(map(re.escape, text.split("…"))) for text in (entry, message))
    general = 2 * len(entry.replace("…", "")) < len(message.replace("…", ""))
    return bool(re.fullmatch(narrow, entry) or (re.fullmatch(wide, message) and not general))


def test_every_error_message_has_an_entry_under_troubleshooting() -> None:
    known = entries()
    for message, line in error_messages().items():
        explained = any(covers(entry, message) for entry in known)
        assert explained or any(inner in message for inner in INNER), f"line {line}: {message}"


INNER = {"nobody takes the packed bytes any more", "has no SFTP subsystem"}
"""Caught inside: a user never reads them as errors."""


def test_every_entry_under_troubleshooting_is_a_message_of_the_module() -> None:
    nodes = (node for source in SOURCES for node in ast.walk(ast.parse(source)))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant)]
    source = "\n".join(text for text in texts if isinstance(text, str))
    for entry in entries():
        for part in fragments(entry):
            assert part in source, f"{entry!r}: {part!r} is said nowhere"


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_every_exit_code_in_the_docs_is_one(page: Path) -> None:
    for table in exit_code_tables(page):
        assert table == exit_code_meanings()
    codes = re.findall(r"[Ee]xit(?:s with)? (?:code )?(?:is then )?(\d+)", page.read_text("utf-8"))
    assert {int(code) for code in codes} <= {int(code) for code in ExitCode}


def test_the_exit_codes_are_explained_where_they_are_looked_for() -> None:
    assert set(exit_code_meanings()) == {int(code) for code in ExitCode}
    for name in ("commands.md", "paperspace.md", "troubleshooting.md"):
        assert len(exit_code_tables(ROOT / "docs" / name)) == 1


def test_the_example_settings_are_the_settings_there_are() -> None:
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    variables = {name for (name,) in SSH_VARIABLES.values()}
    assert set(re.findall(r"^(PAPERSPACE_\w+)=", example, re.MULTILINE)) == variables


def s3_variables() -> list[tuple[str, ...]]:
    """The variables of each S3 setting; several mean the same."""
    return [*S3_VARIABLES.values(), *S3_KEY_VARIABLES.values()]


def test_the_example_settings_have_every_s3_setting_once() -> None:
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    shown = re.findall(r"^((?:AWS|S3)_\w+)=", example, re.MULTILINE)
    for names in s3_variables():
        assert len(set(names) & set(shown)) == 1, names
    assert len(shown) == len(s3_variables())
    for name in ("ENABLE_S3_SYNC", "CHECKPOINT", "DOCKER_IMAGE"):
        assert f"\n{name}=" in example


def test_the_example_settings_change_nothing_before_they_are_filled_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = S3Settings.resolve(bucket="your-bucket")
    (tmp_path / ".env").write_text((ROOT / ".env.example").read_text("utf-8"), "utf-8")
    assert S3Settings.resolve(bucket="your-bucket") == plain


def test_every_variable_named_in_the_docs_is_a_setting() -> None:
    variables = {name for names in s3_variables() for name in names} | {"AWS_CA_BUNDLE"}
    variables |= {name for (name,) in SSH_VARIABLES.values()}
    for page in PAGES:
        named = re.findall(r"PAPERSPACE_[A-Z]+|\b(?:AWS|S3)_[A-Z]\w+", page.read_text("utf-8"))
        assert set(named) <= variables, page.name


def test_the_list_of_secrets_in_the_guide_is_complete() -> None:
    guide = (ROOT / "docs/paperspace.md").read_text(encoding="utf-8")
    paragraph = guide.partition("**Secrets never go in.**")[2].partition("No flag turns that off")[
        0
    ]
    assert set(re.findall(r"`([^`]+)`", paragraph)) == set(cloud_services.SECRET_NAMES)


# ── pages, code and scripts ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        other = (page.parent / name).resolve() if name else page
        assert other.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(other), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_examples(page: Path) -> list[str]:
    """The blocks in Python of a page; those about lightning only where that is installed."""
    there = importlib.util.find_spec("lightning") is not None
    return [block for block in blocks(page, "python") if there or "s3_callbacks" not in block]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_example_compiles_and_imports_what_exists(page: Path) -> None:
    for block in python_examples(page):
        for node in ast.walk(ast.parse(block, page.name)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{page.name}: {alias.name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_example_runs(
    page: Path, hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """Against folders of this machine and local servers: what the examples send goes there."""
    at_home_on(hub, tmp_path, monkeypatch)
    if page.name == "s3.md":
        training_with(request.getfixturevalue("bucket"), tmp_path, monkeypatch)
    storage = tmp_path / "storage"
    root = workspace(tmp_path)
    made = cloud_services.PaperspaceDownloader(workspace=root).create_results_archive(
        storage / "results_20260101.tar.gz"
    )
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / made.path.name).write_bytes(made.path.read_bytes())
    opened = transfers.open_store
    monkeypatch.setattr("transfers.open_store", lambda settings, *_: opened(settings, "local"))
    for block in python_examples(page):
        monkeypatch.setenv("PAPERSPACE_PATH", str(storage))
        code = block.replace("/storage/", f"{storage.as_posix()}/")
        exec(compile(code, page.name, "exec"), {})  # noqa: S102 - our own pages


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A Hub where the documented user has an account."""
    with LocalHub(tmp_path_factory.mktemp("hub")) as hub:
        hub.add_token("hf_username", "username")
        yield hub


def at_home_on(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the documented user, in a folder with a full workspace."""
    for name, value in hub.env("hf_username", XDG_CACHE_HOME=str(folder / "cache")).items():
        monkeypatch.setenv(name, value)
    if "huggingface_hub" in sys.modules:  # it has read its settings already
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", not hub.xet)
    monkeypatch.chdir(folder)
    root = workspace(folder)
    for name in ("raw_data/ticks/2024-01.csv", "raw_data/cache/a.bin", "models/metrics/m.json"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("time,bid,ask\n1,2,3\n")
    analysis = root / "analysis-of-features"
    analysis.mkdir()
    (analysis / "feature_statistics.csv").write_text("feature,mean\na,1\n")


def test_every_command_line_of_the_hub_guide_runs(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_home_on(hub, tmp_path, monkeypatch)
    lines = [words for page, words in documented_calls() if page == "huggingface.md"]
    assert len(lines) > 10
    for words in lines:
        assert cloud_services.main(words) == 0, words


NEWEST = "epoch=749-step=355500-val_loss=27.5963.ckpt"


@pytest.fixture
def bucket(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RcloneServer]:
    """The documented bucket, with a few checkpoints of an earlier day."""
    with RcloneServer(tmp_path_factory.mktemp("s3"), "your-bucket") as server:
        for epoch in range(1, 5):
            name = f"epoch={epoch}-step={epoch * 500}-val_loss={30 + epoch}.0.ckpt"
            server.put(f"piper-training/felix_mirage/checkpoints/{name}", name.encode())
        yield server


def training_with(server: RcloneServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be in the middle of the documented training."""
    for name, value in server.env().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("S3_PREFIX", "piper-training/felix_mirage")
    monkeypatch.chdir(folder)
    for name in (
        f"lightning_logs/version_3/checkpoints/{NEWEST}",
        "lightning_logs/version_3/checkpoints/last.ckpt",
    ):
        write_file(folder / name, b"the newest weights")
    for name in (
        "lightning_logs/version_3/events.out.tfevents.1705334400.hostname.12345.0",
        "lightning_logs/version_3/hparams.yaml",
        "felix_mirage/config.json", "felix_mirage/dataset.jsonl", "felix_mirage/wavs/1.wav",
    ):  # fmt: skip
        write_file(folder / name, name.encode())
    with tarfile.open(folder / "logs_version_3.tar.gz", "w:gz") as archive:
        archive.add(folder / "lightning_logs/version_3", "lightning_logs/version_3")


def test_every_command_line_of_the_s3_guide_runs(
    bucket: RcloneServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of the page. What watches is interrupted when it waits."""
    workspace(tmp_path)
    training_with(bucket, tmp_path, monkeypatch)
    wait = time.sleep

    def interrupted(seconds: float) -> None:
        if seconds == 60:
            raise KeyboardInterrupt
        wait(seconds)

    monkeypatch.setattr("time.sleep", interrupted)
    lines = [words for page, words in documented_calls() if page == "s3.md"]
    lines = [words for words in lines if not words[0].startswith("docker-")]
    assert len({words[0] for words in lines if words[0].startswith("s3-")}) == 15
    for words in lines:
        assert cloud_services.main(words) == (130 if "--watch" in words else 0), words
    below = "piper-training/felix_mirage/"
    names = [key.removeprefix(below) for key in bucket.all_keys() if key.startswith(below)]
    assert {name.split("/")[0] for name in names} - {".cloud_services"} == layout_folders()
    assert f"checkpoints/{NEWEST}" in names
    assert "checkpoints/epoch=1-step=500-val_loss=31.0.ckpt" not in names
    assert files(tmp_path / "data/felix_mirage") == files(tmp_path / "felix_mirage")


def layout_folders() -> set[str]:
    """The folders of the bucket as the guide shows them, without that of the images."""
    page = (ROOT / "docs/s3.md").read_text(encoding="utf-8")
    return set(re.findall(r"^[├└]── ([a-z-]+)/$", page, re.MULTILINE)) - {"docker-images"}


def test_every_script_named_in_the_docs_is_there() -> None:
    for page in GUIDES:
        for name in re.findall(r"\bscripts/\w+\.(?:sh|py)\b", page.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{page.name}: {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_shell_example_is_accepted_by_its_shell(page: Path) -> None:
    for shell in ("sh", "bash"):
        for block in blocks(page, shell):
            checked = subprocess.run(
                [shell, "-n"], input=block, capture_output=True, text=True, check=False
            )
            assert checked.returncode == 0, f"{page.name}: {checked.stderr}\n{block}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_every_script_is_accepted_by_its_shell(script: Path) -> None:
    shell = "bash" if "bash" in script.read_text(encoding="utf-8").split("\n")[0] else "sh"
    checked = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


@pytest.fixture
def send_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The guide's script in a folder with a workspace, where `python` is this one."""
    (script,) = (b for b in blocks(ROOT / "docs/paperspace.md", "sh") if b.startswith("#!"))
    workspace(tmp_path)
    (tmp_path / "cloud_services.py").symlink_to(ROOT / "cloud_services.py")
    programs = tmp_path / "programs"
    programs.mkdir()
    python = programs / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PAUSE", "0.01")
    (tmp_path / "send.sh").write_text(script)
    return tmp_path / "send.sh"


def test_the_guides_script_sends_and_prints_the_hash(send_script: Path, tmp_path: Path) -> None:
    words = ["sh", str(send_script), "--method", "local", "--path", str(tmp_path / "storage")]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (archive,) = (tmp_path / "storage").glob("training_data_*.tar.gz")
    assert done.stdout.strip() == cloud_services.file_sha256(archive)


def test_the_guides_script_tries_five_times_and_no_other_error_twice(
    send_script: Path, tmp_path: Path
) -> None:
    counter = tmp_path / "programs/python"
    counter.write_text('#!/bin/sh\necho >> tries; [ "$1" = -c ] || exit "$STATUS"\n')
    for status, tries in ((7, 5), (8, 1)):
        (tmp_path / "tries").unlink(missing_ok=True)
        environment = os.environ | {"STATUS": str(status)}
        done = subprocess.run(["sh", send_script], cwd=tmp_path, env=environment, check=False)
        assert (done.returncode, len((tmp_path / "tries").read_text())) == (status, tries)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_prose_is_wrapped_at_100_columns(page: Path) -> None:
    generated = page == PAGE
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        assert generated or line.startswith("|") or len(line) <= COLUMNS, f"{page.name}:{number}"
