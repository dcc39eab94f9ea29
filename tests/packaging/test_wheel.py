"""What `pip install` gets: every package, every configuration file, and no generic top-level name."""

from __future__ import annotations

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS = {"t2i": "t2i", "t2i_cli": "cli", "t2i_conf": "conf", "t2i_pipelines": "data_pipelines"}


def on_disk(suffix: str) -> set[str]:
    """The files of our folders with that suffix, by their path in the wheel."""
    return {
        f"{package}/{path.relative_to(REPOSITORY / folder).as_posix()}"
        for package, folder in FOLDERS.items()
        for path in (REPOSITORY / folder).rglob(f"*{suffix}")
    }


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory) -> set[str]:
    """The names in a wheel built from a copy, so that nothing of an earlier build slips in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for folder in FOLDERS.values():
        shutil.copytree(REPOSITORY / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    # 20 lines for each folder of conf/ would be the first thing that a newcomer sees.
    assert "would be ignored" not in built.stdout + built.stderr
    (wheel,) = out.glob("*.whl")
    return {name for name in zipfile.ZipFile(wheel).namelist() if not name.endswith("/")}


def test_packages_are_the_folders_with_an_init():
    """setuptools leaves a package that the list forgets out of the wheel, without a word."""
    found = {name.removesuffix("/__init__.py").replace("/", ".") for name in on_disk("__init__.py")}
    assert sorted(SETUPTOOLS["packages"]) == sorted(found)


def test_every_module_lies_in_a_package():
    """But what another program is given: its folder's name is none that Python imports."""
    packages = {name.replace(".", "/") for name in SETUPTOOLS["packages"]}
    modules = {name for name in on_disk(".py") if "-" not in name}
    assert {name for name in modules if name.rpartition("/")[0] not in packages} == set()


def test_renamed_packages_lead_to_their_folders():
    """In an editable install every package of a renamed folder needs its own line."""
    for name in SETUPTOOLS["packages"]:
        top, _, rest = name.partition(".")
        folder = "/".join([FOLDERS[top], *rest.split(".")] if rest else [FOLDERS[top]])
        if top != "t2i":
            assert SETUPTOOLS["package-dir"][name] == folder


def test_top_level_names(wheel_files):
    top = {name.partition("/")[0] for name in wheel_files}
    (info,) = [name for name in top if name.endswith(".dist-info")]
    assert top - {info} == set(FOLDERS)


def test_all_modules_are_in_the_wheel(wheel_files):
    assert {name for name in wheel_files if name.endswith(".py")} == on_disk(".py")


def test_all_configuration_is_in_the_wheel(wheel_files):
    expected = on_disk(".yaml")
    assert "t2i_conf/train.yaml" in expected
    assert "t2i_conf/stage/ldm.yaml" in expected
    assert {name for name in wheel_files if name.endswith(".yaml")} == expected


def test_entry_point_and_licence(wheel_files):
    assert PYPROJECT["project"]["scripts"] == {"t2i": "t2i_cli.main:main"}
    assert any(name.endswith("/entry_points.txt") for name in wheel_files)
    assert any(name.endswith("/licenses/LICENSE") for name in wheel_files)


def test_releases_of_lightning_that_were_malicious_are_excluded():
    """GHSA-w37p-236h-pfx3."""
    (lightning,) = [Requirement(each) for each in PYPROJECT["project"]["dependencies"] if "lightning" in each]
    assert "2.6.1" in lightning.specifier
    assert "2.6.6" in lightning.specifier
    for malicious in ("2.6.2", "2.6.3"):
        assert malicious not in lightning.specifier


def installed_with(requirements: list[str]) -> set[str]:
    """The distributions that pip installs for these, with what they need themselves."""
    found: set[str] = set()
    waiting = [Requirement(each) for each in requirements]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        wanted = [{"extra": extra} for extra in (*requirement.extras, "")]
        if name in found or not (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            continue
        found.add(name)
        needs = [Requirement(each) for each in importlib.metadata.requires(name) or ()]
        for need in needs:
            if need.marker is None or any(need.marker.evaluate(each) for each in wanted):
                need.marker = None
                waiting.append(need)
    return found


def imported_at_once(node: ast.AST) -> Iterator[str]:
    """Top-level names that a module imports as soon as it is imported itself."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield (child.module or "").partition(".")[0] if not child.level else "t2i"
        elif not (
            isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
        ):
            yield from imported_at_once(child)


def test_what_modules_import_is_installed_without_extras():
    """But for the page of `t2i serve`, which has an extra, and the plug-in, which runs within GIMP."""
    project, packages = PYPROJECT["project"], importlib.metadata.packages_distributions()
    always = installed_with(project["dependencies"])
    assert {"torch", "tokenizers"} <= always
    assert "gradio" not in always
    with_page = always | installed_with(project["optional-dependencies"]["serve"])
    for folder in FOLDERS.values():
        for path in (REPOSITORY / folder).rglob("*.py"):
            if "gimp" in path.parts:
                continue
            there = with_page if "serving" in path.parts else always
            for name in (
                {*imported_at_once(ast.parse(path.read_text()))} - sys.stdlib_module_names - {*FOLDERS}
            ):
                assert there.intersection(map(canonicalize_name, packages[name])), (path, name)
