"""The README tells the truth: what it names exists, and what exists it names."""

import re
from pathlib import Path

from sqlalchemy import inspect
from typer.main import get_command

from db.models import Base
from db.session import Database
from worker.cli import app
from worker.settings import Settings, environment_name

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    return README.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


def test_the_file_tree_is_the_tree_of_files() -> None:
    named = set(re.findall(r"^    (\S+)", section("Files"), re.MULTILINE))
    there = {
        path.relative_to(ROOT).as_posix()
        for folder in ("db", "training", "worker")
        for path in (ROOT / folder).glob("*.py")
        if path.name != "__init__.py"
    }
    assert {name for name in named if name.endswith(".py")} == there
    assert all((ROOT / name).exists() for name in named)


def test_the_settings_table_has_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `([A-Z_]+)` \| `?([^|`]*?)`? \|", section("Settings"), re.MULTILINE))
    expected = {
        environment_name(name): "" if field.default in (None, ()) else str(field.default)
        for name, field in Settings.model_fields.items()
    }
    assert {name: default.strip() for name, default in rows.items()} == expected


def test_the_schema_names_every_table_and_column() -> None:
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| ([a-z0-9_, ]+) \|", section("Schema"), re.MULTILINE))
    for name, table in Base.metadata.tables.items():
        assert rows[name].split(", ") == [column.name for column in table.columns]


def test_the_schema_names_every_view_and_column(database: Database) -> None:
    rows = dict(re.findall(r"^\| `(v_[a-z_]+)` \| ([a-z0-9_, ]+) \|", section("Schema"), re.MULTILINE))
    found = inspect(database.engine)
    assert rows == {view: ", ".join(c["name"] for c in found.get_columns(view)) for view in found.get_view_names()}
    explained = section("Schema").partition("| column of a view |")[2].partition("\n\n")[0]
    named = {name for line in explained.splitlines() for name in re.findall(r"`(\w+)`", line.split(" | ")[0])}
    assert named == {name for columns in rows.values() for name in columns.split(", ")}


def test_every_command_it_shows_exists() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    shown = set(re.findall(r"^    tweetscore (\w+)", README, re.MULTILINE))
    assert shown
    assert shown <= set(commands)
    assert {"list", "show", "retry", "drop"} <= set(commands["dead"].commands)
    assert {"list", "show", "cancel", "retry"} <= set(commands["jobs"].commands)
    assert {"list", "show", "compare", "promote", "rollback", "delete"} <= set(commands["models"].commands)


def test_the_test_line_is_the_one_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    pattern = re.search(r"grep -oP \"(.+)\" README", script)[1]  # type: ignore[index]
    found = re.findall(pattern.replace(r"\K", ""), README, re.MULTILINE)
    assert len(found) == 1
