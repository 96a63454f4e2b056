"""Power failure: a trace of system calls shows when a worker syncs its commits to the disk."""

import re
import shutil
import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.support.bench import wire
from tests.support.commands import Command
from tests.support.world import World, on_sqlite

STRACE = [
    "strace", "-f", "-y", "-s", "64", "--seccomp-bpf", "-e", "signal=none",
    "-e", "trace=fsync,fdatasync,pwrite64,write,writev,sendto,sendmsg",
]  # fmt: skip
COMMIT_ONCE = """
import os, sys
from sqlalchemy import text
from db.session import open_database
with open_database(sys.argv[1]).begin() as session:
    session.execute(text("CREATE TABLE t (a)"))
os.write(1, b"committed")
os._exit(0)
"""
CALL = re.compile(r"(\d+) +(?:<\.\.\. )?(\w+)(?:\(\d+<([^>]*)>)?(.*)")


def _may_trace() -> bool:
    return shutil.which("strace") is not None and not subprocess.run([*STRACE, "true"], capture_output=True).returncode


needs_strace = pytest.mark.skipif(not _may_trace(), reason="strace (Debian: strace) is missing, or may not trace here")


def acknowledged_too_early(trace: str, wal: str) -> tuple[int, list[str]]:
    """How many XACKs a worker sent, and those that left before their thread's commit was on disk.

    A commit is on disk when a sync of the write-ahead log returned after the last write to it.
    """
    sent, early = 0, []
    written: dict[str, bool | None] = defaultdict(lambda: None)  # thread -> None: no commit, True: synced
    syncing: set[str] = set()
    for line in trace.splitlines():
        found = CALL.match(line)
        if found is None:
            continue
        thread, call, file, rest = found.groups()
        if call in ("fsync", "fdatasync"):
            if file == wal:
                syncing.add(thread)
            if thread in syncing and rest.endswith("= 0"):
                syncing.remove(thread)
                written[thread] = True
        elif call == "pwrite64" and file == wal:
            written[thread] = False
        elif r"\r\nXACK\r\n" in rest:
            sent += 1
            if written[thread] is not True:
                early.append(line)
            written[thread] = None
    return sent, early


@pytest.mark.slow
@needs_strace
@on_sqlite
def test_no_acknowledgement_leaves_before_its_commit_is_on_disk(world: World, tmp_path: Path) -> None:
    trace, database = tmp_path / "trace", Path(world.database.engine.url.database or "")
    running = Command(tmp_path / "log", world.given, "worker", "score", under=[*STRACE, "-o", str(trace)])
    try:
        for first, last in ((0, 1), (1, 600), (600, 601)):
            world.stream.publish([wire(i, f"雨{i}") for i in range(first, last)])
            wait_until(lambda last=last: world.predictions() == last or running.process.poll() is not None)
            world.drained()
        [worker] = [child for child in running.family() if child.ppid() == running.process.pid]
        worker.send_signal(signal.SIGTERM)
        assert running.process.wait(PATIENCE_SECONDS) == 0, running.said()
    finally:
        running.end()
    sent, early = acknowledged_too_early(trace.read_text(errors="replace"), f"{database}-wal")
    assert sent >= 3
    assert early == []


@needs_strace
def test_the_first_commit_into_a_new_log_also_syncs_the_folder_that_names_it(tmp_path: Path) -> None:
    """Without this the file with the commit may be missing after a power failure."""
    trace, folder = tmp_path / "trace", tmp_path / "home"
    command = [*STRACE, "-o", str(trace), sys.executable, "-c", COMMIT_ONCE, f"sqlite:///{folder}/new.db"]
    subprocess.run(command, check=True, timeout=PATIENCE_SECONDS, stdout=subprocess.DEVNULL)
    before, done, _ = trace.read_text(errors="replace").partition(', "committed"')
    assert done
    calls = re.findall(r"(fsync|fdatasync|pwrite64)\(\d+<([^>]*)>", before)
    begun = calls.index(("pwrite64", f"{folder}/new.db-wal"))
    assert str(folder) in [file for call, file in calls[begun:] if call != "pwrite64"]
    assert calls[-1] == ("fdatasync", f"{folder}/new.db-wal")
