"""README.md, CONTRIBUTING.md and docs/ match the code: commands parse, names exist, links lead somewhere."""

import ast
import importlib.util
import inspect
import re
import shlex
import tomllib
from collections.abc import Iterator

import click
import pytest
from markdown_it import MarkdownIt
from typer.main import get_command

import worker
from tests.support.faults import FAULTS
from tests.support.pages import PAGES, section
from tests.support.paths import ROOT
from worker.app import make_app
from worker.cli.main import app
from worker.settings import Settings, environment_name

README = PAGES["README.md"]
README_BYTES = 12_000
each_page = pytest.mark.parametrize("page", PAGES)


def code(page: str) -> Iterator[str]:
    """Every block of code of a page, indented or fenced."""
    for token in MarkdownIt().parse(PAGES[page]):
        if token.type in ("code_block", "fence"):
            yield token.content


# --- commands


def shown_commands(page: str) -> list[list[str]]:
    """The arguments of every `tweetscore` command in a page's blocks of code."""
    pattern = r"^(?:[A-Z_]+=\S+ )*(?:docker compose exec \S+ )?tweetscore (.+)$"
    lines = [line for block in code(page) for line in re.findall(pattern, block, re.MULTILINE)]
    return [shlex.split(line, comments=True) for line in lines]


def leaf(arguments: list[str]) -> tuple[click.Command, str, list[str]]:
    """The command that the arguments name, its full name, and what is left for it."""
    command, name, rest = get_command(app), [], list(arguments)
    while hasattr(command, "commands"):
        assert rest, f"tweetscore {' '.join(name)} is a group; the page names none of its commands"
        assert rest[0] in command.commands, f"there is no command tweetscore {' '.join([*name, rest[0]])}"
        command = command.commands[rest[0]]
        name.append(rest.pop(0))
    return command, " ".join(name), rest


@each_page
def test_every_command_it_shows_parses(page: str) -> None:
    for arguments in shown_commands(page):
        if not arguments[0].startswith("-"):
            command, name, rest = leaf(arguments)
            command.make_context(name, rest)


@each_page
def test_every_command_named_in_its_text_exists(page: str) -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    for words in re.findall(r"`tweetscore ((?:[a-z]+[ `-]?)+)", PAGES[page]):
        first, *others = words.rstrip("`").split()
        assert first in commands, words
        if others and hasattr(commands[first], "commands"):
            assert others[0] in commands[first].commands, words


def test_every_command_is_shown_in_a_page() -> None:
    def names(command: click.Command, name: str) -> Iterator[str]:
        if hasattr(command, "commands"):
            for child, found in command.commands.items():
                yield from names(found, f"{name} {child}".strip())
        else:
            yield name

    shown = {leaf(arguments)[1] for page in PAGES for arguments in shown_commands(page) if arguments[0][0] != "-"}
    assert set(names(get_command(app), "")) - shown == {"demo"}  # the README's first line runs it


def test_the_test_line_is_the_one_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -oP \"(.+)\" README", script)[1]  # type: ignore[index]
    found = re.findall(pattern.replace(r"\K", ""), README, re.MULTILINE)
    assert len(found) == 1


@each_page
def test_every_python_module_it_runs_exists(page: str) -> None:
    for module in re.findall(r"python -m ([\w.]+)", PAGES[page]):
        assert module == "venv" or importlib.util.find_spec(module), module


# --- Python


@each_page
def test_every_call_of_the_package_in_its_code_fits_the_function(page: str) -> None:
    for block in code(page):
        if "import worker" not in block:
            continue
        for call in (node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)):
            if isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "worker":
                function = getattr(worker, call.func.attr)
                inspect.signature(function).bind(*call.args, **{str(key.arg): key.value for key in call.keywords})


@each_page
def test_every_task_it_names_is_registered(page: str) -> None:
    registered = make_app(Settings())
    registered.loader.import_default_modules()
    for task in re.findall(r"\"(worker\.tasks\.\w+)\"", PAGES[page]):
        assert task in registered.conf.task_routes, task


# --- names


@each_page
def test_every_setting_it_names_exists(page: str) -> None:
    known = {environment_name(field) for field in Settings.model_fields}
    assert set(re.findall(r"\bTWEETSCORE_[A-Z]\w*", PAGES[page])) <= known


@each_page
def test_every_file_of_the_tests_and_of_db_that_it_names_exists(page: str) -> None:
    for path in re.findall(r"\b((?:tests|db)/[\w/]+\.py)\b", PAGES[page]):
        assert (ROOT / path).exists(), path


def test_every_extra_named_in_the_pages_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    named = {extra for page in PAGES.values() for extra in re.findall(r"tweetscore\[([\w-]+)\]", page)}
    assert named <= set(extras)


def test_every_fault_and_test_file_in_the_table_of_faults_exists() -> None:
    cells = re.findall(r"\| ([^|]+) \|$", section("What happens when something fails", "docs/faults.md"), re.MULTILINE)
    named = [name.strip(" `") for cell in cells if cell != "tests" for name in cell.split(",")]
    assert sorted(int(name) for name in named if name.isdigit()) >= list(range(1, FAULTS + 1))
    files = {path.name for path in (ROOT / "tests").rglob("test_*.py")}
    assert {name for name in named if not name.isdigit()} <= files


def test_the_figures_of_the_readme_are_those_of_the_benchmarks() -> None:
    rows = [row for row in section("Figures").splitlines() if row.startswith("| ") and "demo" not in row]
    figures = {figure for row in rows for figure in re.findall(r"\d[\d,]*(?:\.\d+)?", row)}
    assert len(figures) > 5
    assert {figure for figure in figures if figure not in PAGES["docs/benchmarks.md"]} == set()


# --- pages


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= README_BYTES


def anchor(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@each_page
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if target.startswith(("http://", "https://")):
            continue
        name, _, fragment = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), target


def test_every_page_of_docs_is_linked_from_the_readme() -> None:
    assert {page for page in PAGES if page != "README.md"} <= set(re.findall(r"\]\(([^)#]+)\)", README))
