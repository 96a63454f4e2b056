"""The version stands in one place, and what is released names it."""

import http.server
import json
import re
import runpy
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
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


def test_the_audit_names_what_was_withdrawn_and_what_is_quarantined(tmp_path: Path) -> None:
    """An index of four projects; a fifth package is not in it."""

    def file(name: str, yanked: bool | str = False) -> dict[str, Any]:
        return {"filename": name, "url": name, "hashes": {}, "yanked": yanked}

    projects: dict[str, dict[str, Any]] = {
        "good": {"files": [file("good-1.0.tar.gz", "too early"), file("good-2.0.tar.gz")]},
        "withdrawn": {"files": [file("withdrawn-1.0-py3-none-any.whl", "it loses rows"), file("withdrawn-2.0.tar.gz")]},
        "half": {"files": [file("half-1.0.tar.gz", True), file("half-1.0-py3-none-any.whl")]},
        "seized": {"files": [], "project-status": {"status": "quarantined"}},
    }

    class Index(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            project = projects.get(self.path.strip("/"))
            self.send_response(200 if project else 404)
            self.send_header("Content-Type", "application/vnd.pypi.simple.v1+json")
            self.end_headers()
            name = self.path.strip("/")
            self.wfile.write(json.dumps({"meta": {"api-version": "1.4"}, "name": name, **(project or {})}).encode())

        def log_message(self, *_: Any) -> None:
            pass

    audit = runpy.run_path(str(ROOT / ".ci" / "audit.py"))["audit"]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Index) as server:
        threading.Thread(target=server.serve_forever).start()
        installed = {"good": "2.0", "withdrawn": "1.0.0", "half": "1.0", "seized": "3", "ours": "0.1.0"}
        found = audit(installed, f"http://127.0.0.1:{server.server_port}/")
        server.shutdown()
    assert found == ["seized is quarantined: no reason is given", "withdrawn 1.0.0 was withdrawn: it loses rows"]
