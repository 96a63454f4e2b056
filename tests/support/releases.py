"""The next release: this code with one more migration, in this process or as a copy of the tree.

No test waits for a real second migration: the last released schema is always upgraded to one that exists only here.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config

from db import compatibility, migrate
from db.compatibility import MIGRATIONS, newest_revision
from db.session import Database
from tests.conftest import PATIENCE_SECONDS
from tests.support.paths import ROOT
from worker.process.supervisor import child_environment
from worker.settings import Settings

LINKED_BYTES = 1_000_000
# The next number that a migration may have.
NEXT = next(
    number
    for number in (f"{int(newest_revision()) + step:04d}" for step in (1, 2))
    if number != compatibility.DEVELOPMENT_OLDEST_CODE
)

MIGRATION = '''"""One more."""

import sqlalchemy as sa
from alembic import op

revision = "{next}"
down_revision = "{newest}"
branch_labels = None
depends_on = None


def upgrade() -> None:
    {up}


def downgrade() -> None:
    {down}
'''
# Older code keeps working: the column has a default.
EXPANDS = (
    'op.add_column("tweets", sa.Column("mood", sa.Text(), nullable=False, server_default="unknown"))',
    'op.drop_column("tweets", "mood")',
)
# Both break older code, and neither records that.
DEMANDS = ('op.add_column("tweets", sa.Column("mood", sa.Text(), nullable=False))', EXPANDS[1])
RENAMES = (
    'op.execute("ALTER TABLE tweets RENAME COLUMN lang TO language")',
    'op.execute("ALTER TABLE tweets RENAME COLUMN language TO lang")',
)
OLDEST_CODE = "op.execute(\"UPDATE schema_compatibility SET oldest_code = '{}'\")"
# Renames a column that older code uses, and raises the oldest code.
CONTRACTS = (
    f"{RENAMES[0]}\n    {OLDEST_CODE.format(NEXT)}",
    f"{RENAMES[1]}\n    {OLDEST_CODE.format(newest_revision())}",
)


@contextmanager
def next_chain(
    folder: Path, migration: tuple[str, str], oldest_schema: str = compatibility.OLDEST_SCHEMA
) -> Iterator[Path]:
    """Make this process use a copy of the migrations that ends with `NEXT`, and require `oldest_schema` or newer."""
    chain = folder / "migrations"
    shutil.copytree(MIGRATIONS, chain, ignore=shutil.ignore_patterns("__pycache__"))
    _write_migration(chain, migration)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compatibility, "MIGRATIONS", chain)
        patch.setattr(migrate, "MIGRATIONS", chain)
        patch.setattr(compatibility, "OLDEST_SCHEMA", oldest_schema)
        newest_revision.cache_clear()
        try:
            yield chain
        finally:
            newest_revision.cache_clear()


@dataclass(frozen=True)
class Release:
    """A copy of the code whose newest migration is `NEXT`."""

    tree: Path

    def run(self, settings: Settings, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run `python -m COMMAND` with this code."""
        given = {"PYTHONPATH": str(self.tree), "DATABASE_URL": settings.sql_url, "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, timeout=PATIENCE_SECONDS, cwd=self.tree,
            env={**os.environ, **child_environment(settings), **given},
        )  # fmt: skip

    def upgrades(self, settings: Settings) -> None:
        done = self.run(settings, "worker.cli.main", "db", "upgrade")
        assert (done.returncode, f"has schema {NEXT}" in done.stdout) == (0, True), done.stderr

    def downgrades(self, settings: Settings) -> None:
        done = self.run(settings, "alembic", "downgrade", newest_revision())
        assert done.returncode == 0, done.stderr

    @contextmanager
    def as_code(self, patch: Any) -> Iterator[None]:
        """Make processes that are started in the block run this code."""
        with patch.context() as within:
            within.setenv("PYTHONPATH", str(self.tree))
            yield


def next_release(tree: Path, migration: tuple[str, str], change: Callable[[Path], None] = lambda tree: None) -> Release:
    """Copy the code to `tree`, add a migration of (up, down), and `change` its files."""
    for package in ("db", "training", "worker"):
        shutil.copytree(ROOT / package, tree / package, copy_function=_copy)
    shutil.copy(ROOT / "pyproject.toml", tree)
    _write_migration(tree / "db" / "migrations", migration)
    change(tree)
    return Release(tree)


def _write_migration(chain: Path, migration: tuple[str, str]) -> None:
    up, down = migration
    written = MIGRATION.format(next=NEXT, newest=newest_revision(), up=up, down=down)
    (chain / "versions" / f"{NEXT}_more.py").write_text(written)


def with_mood(tree: Path) -> None:
    """Change the code to require the column of `EXPANDS` and to store another value than its default."""
    edit(tree / "db" / "compatibility.py", r'OLDEST_SCHEMA = "\d+"', f'OLDEST_SCHEMA = "{NEXT}"')
    edit(
        tree / "db" / "models.py",
        r"(    replied_to_id: [^#]+?\n    \)\n)",
        r'\1    mood: Mapped[str] = mapped_column(default="?")\n',
    )
    edit(tree / "worker" / "scoring" / "window.py", r'("text": \[.*\],)', r'\1 "mood": ["seen"] * len(tweets),')


def edit(path: Path, pattern: str, by: str) -> None:
    changed, count = re.subn(pattern, by, path.read_text(encoding="utf-8"))
    assert count == 1, f"{pattern} is {count} times in {path}"
    path.write_text(changed, encoding="utf-8")


def _copy(source: str, target: str) -> None:
    """Link large files; copy the others, compiled ones too, so that the copy starts as fast."""
    if Path(source).stat().st_size > LINKED_BYTES:
        Path(target).symlink_to(source)
    else:
        shutil.copy2(source, target)


def config(migrations: Path) -> Config:
    made = Config()
    made.set_main_option("script_location", str(migrations))
    return made


def upgrade_to(database: Database, revision: str, migrations: Path = MIGRATIONS) -> None:
    with database.engine.begin() as connection:
        given = config(migrations)
        given.attributes["connection"] = connection
        command.upgrade(given, revision)
