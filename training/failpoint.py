"""Failpoints: named points of both routes at which a process can be killed, paused or made to fail, for fault tests.

No failpoint is active unless the setting TWEETSCORE_FAILPOINTS names it:

    NAME=ACTION[@N][~TEXT][, ...]       forwarded=kill@3, tokenised=kill~毒, validated=pause:5

ACTION is `kill` (SIGKILL), `stop` (SIGSTOP, until SIGCONT), `fail` (raises `FailpointReached`), `full` (raises
`MemoryError`) or `pause:SECONDS`. `@N` triggers only the Nth time. `~TEXT` triggers only for texts that contain TEXT.
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

# Name -> the state of the work when the process reaches the point. In the order of the route.
TWEET_POINTS = {
    "read": "records are delivered to this consumer",
    "tokenised": "texts are converted to token ids",
    "forwarding": "a window is about to run on the device",
    "forwarded": "the window is scored, nothing is stored",
    "stored": "rows are written, not committed",
    "committed": "rows are committed, records are not acknowledged",
    "acked": "records are acknowledged, the stream is not trimmed",
    "trimmed": "the stream is trimmed, the window is finished",
}
JOB_POINTS = {
    "claimed": "the job is leased",
    "split": "the dataset is read and split",
    "stepped": "an optimizer step is finished",
    "validated": "an epoch is trained and validated, not saved",
    "best": "the best weights are saved, no checkpoint refers to them",
    "draft": "files of a checkpoint, of best weights or of an artifact are written, not yet renamed into place",
    "checkpointed": "the checkpoint is saved, the epoch is not in the database",
    "recorded": "the epoch's figures are in the database",
    "evaluated": "the test rows are predicted",
    "artifact": "the artifact is in the store, not registered in the database",
    "registered": "the model version and the finished job are committed",
}
# Points that are reached only in some cases.
OTHER_POINTS = {
    "baseline": "a baseline is about to be fitted; its name is the text",
    "counted": "a suspect record's attempt is counted, it is scored alone next",
    "folded": "the predictions of a fold are saved, its checkpoints still exist",
    "device": "a batch is about to run on the device",
    "answering": "a device is asked whether it still computes",
    "labelled": "the labels that a model gave to a chunk of rows are stored beside the checkpoints",
    "shadowing": "the challenger is about to score a share of the tweets of stored windows",
    "shadowed": "the challenger has scored them, nothing is stored",
    "starting": "a worker process begins to start",
    "taken": "a training worker took a Celery message from its queue, nothing is stored",
    "accepted": "the message's request is in the database, Celery has not received the message",
}
POINTS = TWEET_POINTS | JOB_POINTS | OTHER_POINTS

RULE = re.compile(
    r"(?P<name>\w+)=(?P<action>kill|stop|fail|full|pause:(?P<seconds>\d+(\.\d+)?))(@(?P<nth>[1-9]\d*))?(~(?P<text>.+))?",
    re.ASCII,
)


class FailpointReached(RuntimeError):
    """Raised at a failpoint with the action `fail`."""


@dataclass
class Rule:
    """One parsed failpoint; `passed` counts how often it was reached."""

    action: str
    seconds: float
    nth: int | None
    text: str | None
    passed: int = 0


_armed: dict[str, Rule] = {}
_counting = threading.Lock()


def parse(spec: str) -> dict[str, Rule]:
    """Parse a setting to name -> rule. Raises `BadConfig` when it does not have the form above."""
    rules = {}
    for part in filter(None, (part.strip() for part in spec.split(","))):
        found = RULE.fullmatch(part)
        if found is None or found["name"] not in POINTS:
            raise BadConfig(
                f"{shown(part)} is not a failpoint; write NAME=ACTION[@N][~TEXT], ACTION one of kill, stop, fail, full "
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
    """Activate the failpoints of `spec` in this process and no others. An empty `spec` deactivates all."""
    rules = parse(spec)
    with _counting:
        _armed.clear()
        _armed.update(rules)
    if rules:
        log.warning("failpoints are active, this process will fail on purpose: %s", ", ".join(rules))


def passing(name: str, texts: Iterable[str] = ()) -> None:
    """Mark that the process reaches the failpoint `name`; run its action if it is active.

    `texts` are the texts being processed, for `~TEXT`. They are read only when the failpoint is active.
    """
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
