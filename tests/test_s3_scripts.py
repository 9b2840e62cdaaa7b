"""The shell scripts: which command line they call, from anywhere, and what they return."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.servers import require
from tests.support import ROOT

DOCKER, SYNC = "docker_to_s3.sh", "s3_sync.sh"
COMMANDS = [
    (DOCKER, "export", "docker-export"), (DOCKER, "load", "docker-load"),
    (DOCKER, "list", "docker-list"), (SYNC, "upload-checkpoint", "s3-upload-checkpoint"),
    (SYNC, "list-checkpoints", "s3-list-checkpoints"),
    (SYNC, "download-checkpoint", "s3-download-checkpoint"),
    (SYNC, "download-latest", "s3-download-latest"), (SYNC, "upload-logs", "s3-upload-logs"),
    (SYNC, "upload-dataset", "s3-upload-dataset"),
    (SYNC, "download-dataset", "s3-download-dataset"),
]  # fmt: skip
HOSTILE = [
    "two  words", "$(touch pwned)", "`id`", "*", "", "line\nbreak", "-n", "--", "it's", 'a"b', "\\n",
]  # fmt: skip
STUB = """
import json, os, sys
print(json.dumps([sys.argv[1:], os.environ.get("WITH", ""), os.getcwd(), os.environ.get("FROM_DOTENV")]))
sys.exit(int(os.environ.get("CODE", "0")))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the scripts beside a cloud_services.py that only tells how it was called."""
    root = tmp_path / "a project's folder"
    (root / "scripts").mkdir(parents=True)
    for name in (DOCKER, SYNC):
        shutil.copy(ROOT / "scripts" / name, root / "scripts" / name)
    (root / "cloud_services.py").write_text(STUB)
    return root


def run(script: Path, *words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **more.pop("env", {})}
    return subprocess.run([script, *words], capture_output=True, text=True, env=env, **more)


def called(done: subprocess.CompletedProcess[str]) -> Any:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(("script", "word", "command"), COMMANDS)
def test_every_word_calls_its_command_with_all_that_follows(
    project: Path, tmp_path: Path, script: str, word: str, command: str
) -> None:
    done = run(project / "scripts" / script, word, *HOSTILE, cwd=tmp_path)
    assert called(done)[0] == [command, *HOSTILE]
    assert called(done)[2] == str(tmp_path)  # relative paths stay what they were
    assert called(run(project / "scripts" / script, word))[0] == [command]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("code", [1, 2, 4, 7, 130])
def test_the_exit_code_is_kept(project: Path, code: int) -> None:
    for script, word in ((DOCKER, "list"), (SYNC, "download-latest")):
        assert run(project / "scripts" / script, word, env={"CODE": str(code)}).returncode == code


@pytest.mark.parametrize("script", [DOCKER, SYNC])
@pytest.mark.parametrize(
    "words", [(), ("",), ("help",), ("--help",), ("EXPORT",), ("s3-check",), ("list ",), ("-x",)]
)
def test_anything_else_is_a_usage_error_that_names_the_commands(
    project: Path, script: str, words: tuple[str, ...]
) -> None:
    done = run(project / "scripts" / script, *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"usage: {script}")
    for word in [word for name, word, _ in COMMANDS if name == script]:
        assert word in done.stderr


@pytest.mark.parametrize(("script", "word"), [(DOCKER, "list"), (SYNC, "list-checkpoints")])
def test_they_are_found_through_symbolic_links_and_from_any_folder(
    project: Path, tmp_path: Path, script: str, word: str
) -> None:
    (tmp_path / "bin").mkdir()
    first, second = tmp_path / "bin" / "first", tmp_path / "second"
    first.symlink_to(os.path.relpath(project / "scripts" / script, first.parent))
    second.symlink_to(first)
    env = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "CDPATH": "/usr:/"}
    for path, folder in ((second, "/"), (Path("./second"), tmp_path), (Path("second"), "/")):
        assert called(run(path, word, cwd=folder, env=env))[0][0].endswith(word)
    words = ["sh", script, word]
    done = subprocess.run(words, capture_output=True, text=True, cwd=project / "scripts")
    assert called(done)[0][0].endswith(word)


@pytest.mark.parametrize(("script", "word"), [(DOCKER, "list"), (SYNC, "list-checkpoints")])
def test_the_python_of_the_project_is_used_where_there_is_one(
    project: Path, script: str, word: str
) -> None:
    assert called(run(project / "scripts" / script, word))[1] == ""
    python = project / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nWITH=venv exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    assert called(run(project / "scripts" / script, word))[1] == "venv"


@pytest.mark.parametrize(("script", "word"), [(DOCKER, "list"), (SYNC, "list-checkpoints")])
def test_dotenv_is_never_executed(project: Path, tmp_path: Path, script: str, word: str) -> None:
    for folder in (project, tmp_path):
        (folder / ".env").write_text("FROM_DOTENV=1\ntouch pwned\n")
    assert called(run(project / "scripts" / script, word, cwd=tmp_path))[3] is None
    assert not [*tmp_path.rglob("pwned")]


def test_they_can_be_called_as_they_are() -> None:
    assert all(os.access(ROOT / "scripts" / name, os.X_OK) for name in (DOCKER, SYNC))


def test_they_are_clean_for_shellcheck() -> None:
    words = [require("shellcheck"), *(str(ROOT / "scripts" / name) for name in (DOCKER, SYNC))]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
