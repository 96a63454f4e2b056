"""The version stands in one place, and what is released names it."""

import re
import tomllib
from collections.abc import Callable
from typing import Any

import yaml

from tests.support.paths import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]


def test_the_command_says_the_version_of_the_package(tweetscore: Callable[..., Any]) -> None:
    assert tweetscore("--version").stdout == f"tweetscore {VERSION}\n"


def test_the_version_stands_nowhere_else_and_the_changelog_begins_with_it() -> None:
    assert re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1] == VERSION
    for folder in ("db", "training", "worker"):
        for path in (ROOT / folder).rglob("*.py"):
            assert "__version__ =" not in path.read_text(encoding="utf-8"), path


def test_the_workflow_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    assert "bash .ci/run" in [step.get("run") for step in workflow["jobs"]["ci"]["steps"]]
    assert ".venv/bin/pre-commit run --all-files" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
