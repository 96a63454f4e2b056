"""The layout that docs/architecture.md describes: sub-packages in layers, imports that only point down, small files."""

import ast
import importlib.util
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.paths import ROOT

# Lowest first. A module imports from its own layer and from those below it.
LAYERS = [
    "db",
    "training.errors", "training.failpoint", "training.config",
    "training.store", "training.text", "training.data", "training.model", "training.evaluation", "training.reporting",
    "training.loop", "training.tuning", "training.jobs",
    "worker.errors", "worker.exit_codes", "worker.engine_names",
    "worker.secret_files", "worker.stream", "worker.setting_values", "worker.settings", "worker.settings_page",
    "worker.connections", "worker.app",
    "worker.engines", "worker.scoring", "worker.plan",
    "worker.quality", "worker.intake", "worker.maintenance", "worker.labelling",
    "worker.process",
    "worker.tasks",
    "worker.console", "worker.cli",
    "worker",
]  # fmt: skip
LONGEST_FILE, LONGEST_FUNCTION, LARGEST_FOLDER = 400, 60, 16


def sources() -> dict[str, Path]:
    """Every module of the product but the migrations, which import nothing of ours."""
    found = {}
    for package in ("db", "training", "worker"):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            if "versions" not in path.parts:
                found[name] = path
    return found


MODULES = sources()


def layer_of(module: str) -> str:
    """The longest layer that the module lies in; `worker` stands for its `__init__` alone."""
    inside = [layer for layer in LAYERS if module == layer or (module.startswith(f"{layer}.") and layer != "worker")]
    assert inside, f"{module} belongs to no layer; name it in LAYERS or move it"
    return max(inside, key=len)


def imports_of(path: Path) -> Iterator[str]:
    """The project's modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                target = full if full in MODULES else node.module
                if target in MODULES:
                    yield target


ARROWS = sorted({(module, target) for module, path in MODULES.items() for target in imports_of(path)})


def test_imports_point_down_only() -> None:
    upward = [
        f"{module} -> {target}"
        for module, target in ARROWS
        if LAYERS.index(layer_of(target)) > LAYERS.index(layer_of(module))
    ]
    assert len(ARROWS) > 300
    assert upward == []


def test_no_two_modules_import_each_other_in_a_circle() -> None:
    graph: dict[str, set[str]] = {module: set() for module in MODULES}
    for module, target in ARROWS:
        graph[module].add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_init_files_are_empty_so_that_importing_a_part_loads_that_part() -> None:
    full = [
        module
        for module, path in MODULES.items()
        if path.name == "__init__.py" and path.read_text(encoding="utf-8").strip()
    ]
    assert full == ["worker"]  # its three public functions


def test_only_the_settings_read_the_environment() -> None:
    readers = [module for module, path in MODULES.items() if "os.environ" in path.read_text(encoding="utf-8")]
    # Alembic's own command has no settings; a child process gets its parent's process id.
    assert readers == ["db.migrations.env", "worker.process.supervisor", "worker.process.worker_process"]


def test_files_functions_and_folders_stay_small() -> None:
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES.values()}
    large = [f"{path}" for path, count in lines.items() if count > LONGEST_FILE]
    long = [
        f"{path}:{node.name}"
        for path in MODULES.values()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= LONGEST_FUNCTION
    ]
    folders: dict[Path, int] = {}
    for path in MODULES.values():
        if path.name != "__init__.py":
            folders[path.parent] = folders.get(path.parent, 0) + 1
    crowded = [f"{folder}: {count}" for folder, count in folders.items() if count > LARGEST_FOLDER]
    assert (large, long, crowded) == ([], [], [])


def test_every_layer_exists() -> None:
    missing = [layer for layer in LAYERS if importlib.util.find_spec(layer) is None]
    assert missing == []
