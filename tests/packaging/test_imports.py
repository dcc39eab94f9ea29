"""Which package may import which, read from the source with ast."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from t2i import families

REPOSITORY = Path(__file__).parents[2]
FOLDERS = {"t2i": "t2i", "t2i_cli": "cli", "t2i_conf": "conf", "t2i_pipelines": "data_pipelines"}
# Imports point from a higher layer to a lower one.
LAYERS = (
    {
        "errors",
        "few",
        "files",
        "weight_file",
        "schema",
        "data_config",
        "config",
        "interfaces",
        "planned",
        "t2i",
    },
    {"nn"},
    {"diffusion", "adversarial", "codes"},
    {"launch", "training", "data", "text"},
    {"families", "generation", "evaluation", "interop", "planning", "serving"},
    {"cli", "data_pipelines", "conf"},
)
# In one layer, only these: what configures or is asked for raises errors, training reads batches and names a run as its
# job, the command line makes data, planning and interop build whatever networks a family has (through its record),
# serving draws.
SIDEWAYS = {
    ("schema", "errors"),
    ("interfaces", "schema"),
    ("weight_file", "errors"),
    ("data_config", "schema"),
    ("config", "schema"),
    ("config", "data_config"),
    ("config", "errors"),
    ("training", "data"),
    ("training", "launch"),
    ("cli", "data_pipelines"),
    ("planning", "families"),
    ("interop", "families"),
    ("serving", "generation"),
}


@dataclass(frozen=True)
class Import:
    """One import statement's target: a module of ours in full, or the top-level name of another package."""

    importer: str
    target: str
    only_for_types: bool
    relative: bool
    line: int

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.target}"


def python_files() -> dict[str, Path]:
    """Our modules by their full name; packages by the package's name."""
    files = {}
    for package, folder in FOLDERS.items():
        for path in sorted((REPOSITORY / folder).rglob("*.py")):
            parts = [package, *path.relative_to(REPOSITORY / folder).with_suffix("").parts]
            files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return files


def imports_of(source: str, module: str, is_package: bool, known: set[str]) -> Iterator[Import]:
    """Every import in `source`, wherever it stands."""

    def visit(node: ast.AST, only_for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                target = alias.name if alias.name in known else alias.name.partition(".")[0]
                yield Import(module, target, only_for_types, False, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if is_package else module.rpartition(".")[0]
                base = importlib.util.resolve_name("." * node.level + base, package)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                target = full if full in known else base if base in known else base.partition(".")[0]
                yield Import(module, target, only_for_types, bool(node.level), node.lineno)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.body:
                yield from visit(child, True)
            for child in node.orelse:
                yield from visit(child, only_for_types)
        else:
            for child in ast.iter_child_nodes(node):
                yield from visit(child, only_for_types)

    yield from visit(ast.parse(source), False)


FILES = python_files()
IMPORTS = [
    found
    for name, path in FILES.items()
    for found in imports_of(path.read_text(), name, path.name == "__init__.py", set(FILES))
]


def package_of(module: str) -> str:
    """The package of one of our modules: "training", "families", "cli", ..."""
    top, *rest = module.split(".")
    if top != "t2i":
        return FOLDERS[top]
    return rest[0] if rest else "t2i"


def layer_of(package: str) -> int:
    layers = [number for number, packages in enumerate(LAYERS) if package in packages]
    assert layers, f"{package} has no layer: add it to LAYERS and to the architecture page"
    return layers[0]


def family_of(module: str) -> str | None:
    parts = module.split(".")
    return (
        parts[2] if parts[:2] == ["t2i", "families"] and parts[2:] and parts[2] in families.names() else None
    )


def goes_up(found: Import) -> bool:
    here, there = package_of(found.importer), package_of(found.target)
    return here != there and (here, there) not in SIDEWAYS and layer_of(there) >= layer_of(here)


def between_ours() -> list[Import]:
    return [found for found in IMPORTS if found.target in FILES]


def outside(*packages: str) -> list[Import]:
    return [found for found in IMPORTS if found.target in packages]


def reached_from(module: str) -> dict[str, str]:
    """All that importing `module` may import, ours and others', each with the import that led there."""
    reached: dict[str, str] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        parents = [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 1)]
        steps = [
            (found.target, str(found))
            for found in IMPORTS
            if found.importer == name and not found.only_for_types
        ]
        for target, because in [*steps, *((parent, f"{name} lies in {parent}") for parent in parents)]:
            if target not in reached:
                reached[target] = because
                if target in FILES:
                    waiting.append(target)
    return reached


PLAIN_TORCH = [
    name
    for name in FILES
    if package_of(name) in ("nn", "diffusion", "adversarial", "codes")
    or (family_of(name) and name.split(".")[-1] not in ("stage", "generator", "config"))
]


def test_every_package_has_a_layer():
    for module in FILES:
        layer_of(package_of(module))


def test_imports_point_down():
    wrong = [str(found) for found in between_ours() if goes_up(found)]
    assert not wrong


def test_families_never_import_one_another():
    wrong = [
        str(found)
        for found in between_ours()
        if family_of(found.importer)
        and family_of(found.target)
        and family_of(found.importer) != family_of(found.target)
    ]
    assert not wrong


def test_what_shares_families_knows_none_of_them():
    """The table of families, and the packages beside it, stay as they are when a family moves in."""
    wrong = [
        str(found) for found in between_ours() if family_of(found.target) and not family_of(found.importer)
    ]
    assert not wrong


def looks_up(node: ast.AST) -> bool:
    """Whether a family is got by a name that stands in the code, or a module by any name."""
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    constant = bool(node.args) and isinstance(node.args[0], ast.Constant)
    return called.endswith("import_module") or (called == "families.get" and constant)


def test_nothing_reaches_a_family_by_its_name():
    """Converting finds families by what they offer."""
    wrong = [
        f"{module}:{node.lineno} has {ast.unparse(node)}"  # type: ignore[attr-defined]
        for module, path in FILES.items()
        if package_of(module) == "interop"
        for node in ast.walk(ast.parse(path.read_text()))
        if looks_up(node)
    ]
    assert not wrong


@pytest.mark.parametrize("module", PLAIN_TORCH)
def test_models_and_losses_are_plain_torch(module):
    """Neither they nor anything that they import, at any distance."""
    reached = reached_from(module)
    assert {name: reached[name] for name in ("lightning", "hydra", "omegaconf") if name in reached} == {}


def test_only_training_knows_lightning():
    wrong = [str(found) for found in outside("lightning") if package_of(found.importer) != "training"]
    assert not wrong


@pytest.mark.parametrize("family", [name for name in families.names() if families.get(name).generator])
def test_sampling_from_a_checkpoint_never_imports_lightning(family):
    code = (
        f"import sys; from t2i import families; families.get({family!r}).load_generator(); "
        "import t2i.generation.text_to_image, t2i.training.checkpoint, t2i.training.run_folder, t2i_cli.sample; "
        "sys.exit('lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_command_line_knows_hydra():
    wrong = [str(found) for found in outside("hydra") if package_of(found.importer) != "cli"]
    assert not wrong
    # Run folders hold what Hydra composed, in the YAML that OmegaConf reads (1e-4 is a number there).
    wrong = [
        str(found)
        for found in outside("omegaconf", "yaml")
        if package_of(found.importer) != "cli" and found.importer != "t2i.training.run_folder"
    ]
    assert not wrong


def speaks_to_a_person(node: ast.AST) -> bool:
    return (isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "input")) or (
        isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.argv"
    )


def test_only_the_command_line_reads_arguments_and_prints():
    wrong = [str(found) for found in outside("argparse") if package_of(found.importer) != "cli"]
    for module, path in FILES.items():
        if package_of(module) != "cli":
            for node in ast.walk(ast.parse(path.read_text())):
                if speaks_to_a_person(node):
                    wrong.append(f"{module}:{node.lineno} has {ast.unparse(node)}")  # type: ignore[attr-defined]
    assert not wrong


def docstrings(tree: ast.Module) -> set[int]:
    """The ids of the nodes that are docstrings."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    firsts = [node.body[0] for node in ast.walk(tree) if isinstance(node, owners) and node.body]
    return {id(first.value) for first in firsts if isinstance(first, ast.Expr)}


def test_no_family_is_named_where_all_are_served():
    """Help texts give examples: nothing else in these folders says the name of a family or a stage."""
    stages = [stage for name in families.names() for stage in families.get(name).stages]
    names = {*families.names(), *stages} - {"parti"}  # which is a suite of prompts too
    chosen = re.compile(rf"\b(?:stage|family)=(?:{'|'.join(names)})\b")
    packages = {"cli", "data_pipelines", "evaluation", "generation", "planning"}
    helps = {"t2i_cli.main", "t2i_cli.train_help", "t2i_cli.data"}
    wrong = []
    for module, path in FILES.items():
        if package_of(module) in packages and module not in helps:
            tree = ast.parse(path.read_text())
            said = docstrings(tree)
            texts = [
                each for each in ast.walk(tree) if isinstance(each, ast.Constant) and id(each) not in said
            ]
            wrong += [
                f"{module}:{each.lineno} says {each.value!r}"
                for each in texts
                if isinstance(each.value, str) and (each.value in names or chosen.search(each.value))
            ]
    assert not wrong


def test_renamed_packages_import_siblings_relatively():
    """cli/ is t2i_cli only once it is installed."""
    wrong = [
        str(found)
        for found in between_ours()
        if package_of(found.importer) in ("cli", "data_pipelines")
        and package_of(found.target) == package_of(found.importer)
        and not found.relative
    ]
    assert not wrong


def test_the_walk_sees_what_there_is():
    """The rules above would hold of an empty list too."""
    edges = {(found.importer, found.target) for found in IMPORTS}
    assert ("t2i.training.fit", "lightning") in edges
    assert ("t2i.training.fit", "t2i.training.run_folder") in edges
    assert ("t2i_pipelines.sources.shapes", "t2i_pipelines.shard_writer") in edges  # relative
    assert ("t2i_cli.generators", "t2i.training.checkpoint") in edges  # inside a function
    assert ("t2i_cli.train", "hydra") in edges
    assert "t2i.families.autoencoder.losses" in PLAIN_TORCH
    assert "lightning" in reached_from("t2i.families.autoencoder.stage")


def test_the_walk_reads_every_form_of_import():
    source = """
from __future__ import annotations
import os.path, t2i.nn.norm
from t2i import families
from ..nn import attention as a, norm
from .loader import build_loader
if TYPE_CHECKING:
    from lightning.pytorch import Trainer
else:
    import hydra.errors
def late():
    try:
        from omegaconf import OmegaConf
    except ImportError:
        pass
"""
    known = {"t2i", "t2i.nn", "t2i.nn.norm", "t2i.nn.attention", "t2i.families", "t2i.data.loader"}
    found = list(imports_of(source, "t2i.data.reader", False, known))
    assert [(i.target, i.only_for_types) for i in found] == [
        ("__future__", False),
        ("os", False),
        ("t2i.nn.norm", False),
        ("t2i.families", False),
        ("t2i.nn.attention", False),
        ("t2i.nn.norm", False),
        ("t2i.data.loader", False),
        ("lightning", True),
        ("hydra", False),
        ("omegaconf", False),
    ]


@pytest.mark.parametrize(
    ("importer", "target", "wrong"),
    [
        ("t2i.nn.norm", "t2i.training.ema", True),
        ("t2i.config", "t2i.interfaces", True),
        ("t2i.data.reader", "t2i.training.fit", True),
        ("t2i.generation.text_to_image", "t2i.families", True),
        ("t2i.evaluation.report", "t2i.families.autoencoder.codec", True),
        ("t2i.training.fit", "t2i_cli.console", True),
        ("t2i.training.fit", "t2i.data.loader", False),
        ("t2i.families.autoencoder.model", "t2i.nn.norm", False),
        ("t2i.adversarial.losses", "t2i.families.autoencoder.losses", True),
        ("t2i_cli.embedded", "t2i_pipelines.sources.shapes", False),
        ("t2i_pipelines.sources.shapes", "t2i.evaluation.shapes", False),
    ],
)
def test_up_and_down(importer, target, wrong):
    assert goes_up(Import(importer, target, False, False, 1)) == wrong


@pytest.mark.parametrize("family", families.names())
def test_a_familys_configuration_imports_no_torch(family):
    """So that a wrong key is reported before torch is loaded."""
    code = f"import sys, t2i.families.{family}.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
