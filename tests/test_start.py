"""What a process loads before it does anything: a look at the jobs does not wait for torch, nor scoring for plots or
tables."""

import subprocess
import sys

import pytest

COMMAND = {"torch", "transformers", "celery", "numpy", "pandas", "scipy", "sklearn", "psycopg", "alembic", "datasette"}
CLIENT = COMMAND | {"sqlalchemy", "pydantic", "redis"}
SCORER = {"pandas", "scipy", "sklearn", "matplotlib", "tensorboard", "nncf", "alembic", "datasette", "botocore"}


@pytest.mark.parametrize(
    ("modules", "needed", "unneeded"),
    [
        ("worker", "worker", CLIENT),
        ("worker.cli", "typer", COMMAND),
        ("worker.app, worker.tasks, worker.champion, worker.pipeline, training.dataset", "openvino", SCORER),
    ],
)
def test_a_process_loads_only_what_it_is_for(modules: str, needed: str, unneeded: set[str]) -> None:
    program = f"import sys, {modules}; print(*sys.modules)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(ended.stdout.split())
    assert needed in loaded
    assert not loaded & unneeded
