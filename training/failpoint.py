"""Failpoints: named places on both routes where a process can be made to end, sleep or fail. For rehearsing faults.

Nothing is armed unless the setting TWEETSCORE_FAILPOINTS names a point:

    NAME=ACTION[@N][~TEXT][, ...]       forwarded=kill@3, tokenised=kill~毒, epoch=pause:5

ACTION is `kill` (SIGKILL), `stop` (SIGSTOP until somebody sends SIGCONT), `fail` (raises `FailpointReached`), `full`
(raises `MemoryError`) or `pause:SECONDS`. With @N only the Nth passing counts, with ~TEXT only those whose texts hold
TEXT.
"""

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass

from db.errors import shown
from training.errors import BadConfig

log = logging.getLogger(__name__)

# In the order of the route; what has been done when a process comes by.
TWEET_POINTS = {
    "read": "records were delivered",
    "tokenised": "texts are token ids",
    "forwarding": "a window comes to the device",
    "forwarded": "the model has spoken, nothing is stored",
    "stored": "rows are written, not committed",
    "committed": "rows are committed, nothing is acknowledged",
    "acked": "records are acknowledged, the stream is not trimmed",
    "trimmed": "the window is done",
}
JOB_POINTS = {
    "claimed": "the job is leased",
    "split": "the dataset is read and cut",
    "stepped": "an optimizer step was made",
    "validated": "an epoch was trained and validated, nothing of it is saved",
    "best": "the best weights are saved, no checkpoint knows of them",
    "draft": "files of a checkpoint, of best weights or of an artifact are written, not renamed to their place",
    "checkpointed": "the checkpoint is whole, SQL does not know the epoch",
    "recorded": "the epoch's figures are in SQL",
    "evaluated": "the test rows were predicted",
    "artifact": "the artifact is in the store, no row names it",
    "registered": "model and job are committed",
}
# Passed now and then, on neither route's straight way.
OTHER_POINTS = {
    "baseline": "a baseline is about to be fitted, its name as text",
    "counted": "a suspect record was counted and is scored alone next",
    "device": "a batch is about to be run on the device",
    "starting": "a worker begins to start",
    "taken": "a Celery message to a training worker was taken from its queue, nothing is kept of it",
    "accepted": "what such a message asks for is in SQL, Celery has not seen it",
}
POINTS = TWEET_POINTS | JOB_POINTS | OTHER_POINTS

RULE = re.compile(
    r"(?P<name>\w+)=(?P<action>kill|stop|fail|full|pause:(?P<seconds>\d+(\.\d+)?))(@(?P<nth>[1-9]\d*))?(~(?P<text>.+))?",
    re.ASCII,
)


class FailpointReached(RuntimeError):
    """Raised where a failpoint is armed with `fail`."""


@dataclass
class Rule:
    action: str
    seconds: float
    nth: int | None
    text: str | None
    passed: int = 0


_armed: dict[str, Rule] = {}
_counting = threading.Lock()


def parse(spec: str) -> dict[str, Rule]:
    """What a setting names; raises `BadConfig` for anything but the form above."""
    rules = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        found = RULE.fullmatch(part)
        if found is None or found["name"] not in POINTS:
            raise BadConfig(
                f"{shown(part)} is no failpoint; write NAME=ACTION[@N][~TEXT], ACTION one of kill, stop, fail, full "
                f"and pause:SECONDS, NAME one of {', '.join(POINTS)}"
            )
        rules[found["name"]] = Rule(
            found["action"].partition(":")[0],
            float(found["seconds"] or 0),
            int(found["nth"]) if found["nth"] else None,
            found["text"],
        )
    return rules


def arm(spec: str) -> None:
    """Arm what `spec` names in this process and nothing else; an empty one disarms all."""
    rules = parse(spec)
    with _counting:
        _armed.clear()
        _armed.update(rules)
    if rules:
        log.warning("failpoints are armed, this process will misbehave: %s", ", ".join(rules))


def passing(name: str, texts: Iterable[str] = ()) -> None:
    """A process comes by `name`, with `texts` in hand: mostly nothing happens. `texts` are looked at only if armed."""
    rule = _armed.get(name)
    if rule is None or (rule.text is not None and not any(rule.text in text for text in texts)):
        return
    with _counting:
        rule.passed += 1
        due = rule.nth is None or rule.passed == rule.nth
    if due:
        _act(name, rule)


def _act(name: str, rule: Rule) -> None:
    log.warning("failpoint %s: %s", name, rule.action)
    if rule.action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif rule.action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif rule.action == "fail":
        raise FailpointReached(f"failpoint {name}")
    elif rule.action == "full":
        raise MemoryError(f"failpoint {name}")
    else:
        time.sleep(rule.seconds)
