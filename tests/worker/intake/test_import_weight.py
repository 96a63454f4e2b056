"""What a process loads before it does anything: a look at the jobs does not wait for torch, nor scoring for plots or
tables, and `--help` loads the command line alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from worker.cli.main import PANELS, app

COMMAND = {
    "torch", "transformers", "celery", "numpy", "pandas", "scipy", "sklearn", "psycopg", "alembic", "streamlit",
    "sqlalchemy", "pydantic_settings", "redis", "valkey", "fsspec", "optuna",
}  # fmt: skip
SCORER = {
    "pandas", "scipy", "sklearn", "matplotlib", "tensorboard", "openvino", "nncf", "alembic", "streamlit", "botocore",
    "optuna",
}  # fmt: skip


def commands(command: typer.core.TyperGroup, *names: str) -> list[tuple[list[str], typer.core.TyperCommand]]:
    """Every command and group below one, with the words that name it."""
    found = []
    for name, child in command.commands.items():
        found.append(([*names, name], child))
        if isinstance(child, typer.core.TyperGroup):
            found += commands(child, *names, name)
    return found


@pytest.mark.parametrize(
    ("modules", "needed", "unneeded"),
    [
        ("worker", "worker", COMMAND | {"typer", "pydantic"}),
        ("worker.cli.main", "typer", COMMAND),
        (
            "worker.app, worker.tasks, worker.scoring.champion, worker.scoring.pipeline, training.data.dataset",
            "torch",
            SCORER,
        ),
    ],
)
def test_a_process_loads_only_what_it_is_for(modules: str, needed: str, unneeded: set[str]) -> None:
    program = f"import sys, {modules}; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(ended.stdout.split())
    assert needed in loaded
    assert not loaded & unneeded


def test_help_of_every_command_loads_the_command_line_alone() -> None:
    asked = [[], *(words for words, _ in commands(get_command(app)))]
    program = f"""import contextlib, io, sys
from worker.cli.main import app
for words in {asked!r}:
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        app([*words, "--help"], standalone_mode=False)
    assert "Usage:" in shown.getvalue(), words
print(*sys.modules)"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(ended.stdout.split())
    assert not loaded & (COMMAND | {"rich.progress"})
    assert {name for name in loaded if name.startswith(("db.", "training.", "worker."))} == {
        "db.errors", "worker.cli", "worker.cli.main", "worker.cli.data", "worker.cli.db", "worker.cli.dead_letters",
        "worker.cli.imports", "worker.cli.jobs", "worker.cli.planning",
        "worker.cli.planning.plan", "worker.cli.labelling", "worker.cli.labelling.labels",
        "worker.cli.labelling.review", "worker.cli.models", "worker.cli.quality", "worker.cli.top",
        "worker.cli.tweets", "worker.cli.webhook", "worker.cli.output", "worker.cli.training",
        "worker.cli.training.adapt", "worker.cli.training.distil",
        "worker.cli.training.job_output", "worker.cli.training.submitted", "worker.cli.training.train",
        "worker.cli.training.tune",
        "worker.errors", "worker.intake", "worker.intake.job_progress", "worker.engines",
        "worker.engines.engine_choice",
    }  # fmt: skip


def test_help_lists_every_command_in_a_group_and_explains_every_option() -> None:
    group = get_command(app)
    assert set(group.list_commands(None)) == set(group.commands)
    assert list(PANELS) == ["Run", "Train", "Score", "Ask", "Operate"]
    for words, command in commands(group):
        assert command.help, words
        assert [option.name for option in command.params if not option.help and option.name != "help"] == [], words


def test_importing_the_celery_application_touches_no_disk(tmp_path: Path) -> None:
    """Every file that is opened for writing, and every folder that is made, raises an audit event."""
    program = """import sys
writes = []
def note(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & 3:
        writes.append(arguments[0])
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.chmod"):
        writes.append(arguments[0])
sys.dont_write_bytecode = True
sys.addaudithook(note)
import worker.app
print(writes)"""
    environment = {**os.environ, "TWEETSCORE_HOME": str(tmp_path / ("long" * 25))}
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert (ended.stdout.strip(), (tmp_path / ("long" * 25)).exists()) == ("[]", False)
