"""What may not be committed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
MACHINE_PATH = re.compile(r"(^|[^A-Za-z0-9_.])/(work|root|opt)/[a-z]", re.MULTILINE)
MAX_LINES = 400
VERSION_HEADING = re.compile(r"^## \[?(Unreleased|\d+\.\d+\.\d+)\]?", re.MULTILINE)


@pytest.fixture(scope="module")
def committed() -> dict[str, str]:
    """The text of every file that git tracks or would add."""
    command = ["git", "-C", str(REPOSITORY), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files are committed")
    texts = {}
    for name in filter(None, listed.stdout.split("\0")):
        try:
            texts[name] = (REPOSITORY / name).read_text()
        except (UnicodeDecodeError, OSError):
            continue  # pictures; files that are deleted but not yet committed
    assert "pyproject.toml" in texts
    return texts


def test_no_path_of_a_developers_machine(committed):
    wrong = [
        f"{name}:{text.count(chr(10), 0, found.start()) + 1}"
        for name, text in committed.items()
        for found in MACHINE_PATH.finditer(text)
    ]
    assert not wrong


def test_the_pattern_finds_such_paths():
    for place in ("work", "root", "opt"):
        assert MACHINE_PATH.search(f"/{place}/" + "main")
        assert MACHINE_PATH.search(f'open("/{place}/' + 'main/file")')
        assert not MACHINE_PATH.search(f"runs/{place}/" + "main")
        assert not MACHINE_PATH.search(f"../{place}/" + "main")


def test_python_files_fit_one_sitting(committed):
    lengths = {name: text.count("\n") for name, text in committed.items() if name.endswith(".py")}
    assert {name: lines for name, lines in lengths.items() if lines > MAX_LINES} == {}


def test_nothing_that_runs_leave_behind(committed):
    left = [
        name for name in committed if re.search(r"\.(log|ckpt|safetensors|pt|pyc)$|^(runs|build|dist)/", name)
    ]
    assert not left


def test_changelog_has_versions():
    path = REPOSITORY / "CHANGELOG.md"
    if not path.is_file():
        pytest.skip("there is no CHANGELOG.md yet")
    assert VERSION_HEADING.search(path.read_text())
