"""Another release of this code: a copy of its tree with one more migration, run in processes of its own."""

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

from db.compatibility import newest_revision
from tests.conftest import PATIENCE_SECONDS
from worker.processes import child_environment
from worker.settings import Settings

ROOT = Path(__file__).parent.parent
LINKED_BYTES = 1_000_000
NEXT = f"{int(newest_revision()) + 1:04d}"

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
# Old code goes on beside it: what it does not know has a default.
EXPANDS = (
    'op.add_column("tweets", sa.Column("mood", sa.Text(), nullable=False, server_default="unknown"))',
    'op.drop_column("tweets", "mood")',
)
# What old code stores has another name now, and the database says so.
CONTRACTS = (
    'op.execute("ALTER TABLE tweets RENAME COLUMN lang TO language")\n'
    f"    op.execute(\"UPDATE schema_compatibility SET oldest_code = '{NEXT}'\")",
    'op.execute("ALTER TABLE tweets RENAME COLUMN language TO lang")\n'
    "    op.execute(\"UPDATE schema_compatibility SET oldest_code = '0005'\")",
)


@dataclass(frozen=True)
class Release:
    """A tree of code whose newest migration is `NEXT`."""

    tree: Path

    def run(self, settings: Settings, *command: str) -> "subprocess.CompletedProcess[str]":
        """`python -m COMMAND` of this release."""
        given = {"PYTHONPATH": str(self.tree), "DATABASE_URL": settings.sql_url, "COLUMNS": "200"}
        return subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True, timeout=PATIENCE_SECONDS, cwd=self.tree,
            env={**os.environ, **child_environment(settings), **given},
        )  # fmt: skip

    def upgrades(self, settings: Settings) -> None:
        done = self.run(settings, "worker.cli", "db", "upgrade")
        assert (done.returncode, f"has schema {NEXT}" in done.stdout) == (0, True), done.stderr

    def downgrades(self, settings: Settings) -> None:
        done = self.run(settings, "alembic", "downgrade", newest_revision())
        assert done.returncode == 0, done.stderr

    @contextmanager
    def as_code(self, patch: Any) -> Iterator[None]:
        """Processes that are started in the block run this code."""
        with patch.context() as within:
            within.setenv("PYTHONPATH", str(self.tree))
            yield


def next_release(tree: Path, migration: tuple[str, str], change: Callable[[Path], None] = lambda tree: None) -> Release:
    """This tree once more below `tree`, with a migration that goes (up, down), and a `change` to its files."""
    for package in ("db", "training", "worker"):
        shutil.copytree(ROOT / package, tree / package, copy_function=_copy)
    shutil.copy(ROOT / "pyproject.toml", tree)
    up, down = migration
    written = MIGRATION.format(next=NEXT, newest=newest_revision(), up=up, down=down)
    (tree / "db" / "migrations" / "versions" / f"{NEXT}_more.py").write_text(written)
    change(tree)
    return Release(tree)


def with_mood(tree: Path) -> None:
    """Code that needs the column of `EXPANDS`, and stores another mood than its default."""
    edit(tree / "db" / "compatibility.py", r'OLDEST_SCHEMA = "\d+"', f'OLDEST_SCHEMA = "{NEXT}"')
    edit(
        tree / "db" / "models.py",
        r"(    replied_to_id: .*\n)",
        r'\1    mood: Mapped[str] = mapped_column(default="?")\n',
    )
    edit(tree / "worker" / "window.py", r'("text": tweet.text,)', r'\1 "mood": "seen",')


def edit(path: Path, pattern: str, by: str) -> None:
    changed, count = re.subn(pattern, by, path.read_text(encoding="utf-8"))
    assert count == 1, f"{pattern} is {count} times in {path}"
    path.write_text(changed, encoding="utf-8")


def _copy(source: str, target: str) -> None:
    """Weights are linked; compiled files come along, so that the copy starts as soon."""
    if Path(source).stat().st_size > LINKED_BYTES:
        Path(target).symlink_to(source)
    else:
        shutil.copy2(source, target)
