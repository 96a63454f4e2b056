"""A soak: `tweetscore up` with three scoring workers under a steady load, while parts of it are killed.

The load is half of the capacity that is measured first. Real processes: `up` owns the embedded server and the workers,
and restarts what dies; producers publish through `worker.publish`; every tweet is looked up in SQL before retention
deletes it. Nothing here deletes: a worker runs its maintenance when it starts, and one starts after every kill.
"""

import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

from db import migrate, registry
from db.models import DeadLetter, ModelVersion, ScoringWindow
from db.session import open_database
from tests.benchmarks.models import LABELS, starter_artifact
from tests.conftest import PATIENCE_SECONDS, wait_until
from tests.soak.ledger import Ledger
from tests.soak.memory import Memory
from tests.soak.plan import KILLED_SCORERS, PRODUCERS, REPEATED, SCORERS, Plan
from tests.soak.probe import Probe
from tests.soak.producer import Snowflakes, made_at, sample_tweets
from tests.soak.table import Minute, memory_by_minute, memory_table, minutes_table
from tests.support.bench import wire
from tests.support.commands import Command, command
from tests.support.paths import ROOT
from tests.support.world import World
from worker.connections import model_store
from worker.engines.engine_choice import saved_choices
from worker.errors import StreamError
from worker.process.supervisor import child_environment
from worker.settings import load_settings
from worker.stream import embedded_valkey

SAMPLE_EVERY_SECONDS = 5.0
CAPACITY_ROUNDS = 3
CAPACITY_MACHINE = 1_001
# A tweet this young is not missed yet.
YOUNG_SECONDS = 2.0


def make_world(home: Path, database_url: str, plan: Plan) -> World:
    """A migrated database with two versions of the starter; the first is the champion."""
    given = {
        "home": home, "database_url": database_url, "scorers": SCORERS, "min_idle_seconds": plan.min_idle_seconds,
        "retention_days": plan.retention_seconds / 86_400,
    }  # fmt: skip
    database = open_database(database_url)
    migrate.upgrade(database)
    store = model_store(load_settings(**given)).folder
    sha256 = starter_artifact(store / "starter-1")
    shutil.copytree(store / "starter-1", store / "starter-2")
    with database.begin() as session:
        for number in (1, 2):
            version = ModelVersion(
                base_model="starter", artifact_url=(store / f"starter-{number}").as_uri(), sha256=sha256,
                labels=LABELS, cleaner_version="1",
            )  # fmt: skip
            registry.add_version(session, version, [], [], [])
        registry.assign(session, registry.CHAMPION, 1)
    return World(given, database, f"unix://{embedded_valkey.socket_path(home)}", 1)


@dataclass
class Soak:
    """One run. `faults` are sentences on what should not be; `report()` is complete at any time."""

    world: World
    plan: Plan
    postgresql: int | None  # the process id of its server
    rate: float | None  # tweets a second; None for half of the measured capacity
    table: Path
    capacity: float = 0.0
    began: float = 0.0
    kills: int = 0
    server_kills: int = 0
    promotions: int = 0
    scored: int = 0  # by all windows: tweets that were scored again count again
    champion: int = 1
    promoting: Command | None = None
    minutes: dict[int, Minute] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    producers: dict[int, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def run(self) -> None:
        """Everything in order. Raises what stops it; what is wrong but does not is in `faults`."""
        files = [self.world.settings.home / f"accepted-{number}" for number in range(1, PRODUCERS + 1)]
        self.ledger, self.probe = Ledger(self.world.database, files), Probe(self.world.stream, self.world.database)
        log = self.world.settings.logs
        with command(log / "up.log", self.world.given, "up") as self.up, self._killing_orphans():
            self.memory = Memory(self.up.process.pid, {}, self.postgresql)
            try:
                self.up.says("Press Ctrl-C to stop.")
                self._make_ready()
                self._measure_capacity()
                with self._producing(files):
                    self._load()
                self._end()
            finally:
                self.write_table()

    @contextmanager
    def _killing_orphans(self) -> Iterator[None]:
        """End what `up` has started, should the run break off: killed itself it would leave its server behind."""
        try:
            yield
        finally:
            if self.up.process.poll() is None:
                self.up.send(signal.SIGTERM)
                self.up.ended()

    # --- before the load

    def _make_ready(self) -> None:
        """Let both versions score, with the engine that a trial has chosen, on every worker."""
        artifacts = [model_store(self.world.settings).folder / f"starter-{number}" for number in (1, 2)]
        ids = Snowflakes(CAPACITY_MACHINE)

        def ready(version: int) -> bool:
            if self.world.stream.depth().idle:
                self._publish([ids.next() for _ in range(8)])
            scored = {row["worker"] for row in self.world.rows(ScoringWindow) if row["model_version_id"] == version}
            return len(scored) >= SCORERS and bool(saved_choices(artifacts[version - 1], self.world.settings.engines))

        wait_until(lambda: ready(1), every=0.2)
        assert self._promote(2).ended() == 0
        wait_until(lambda: ready(2), every=0.2)
        assert self._promote(1).ended() == 0
        self.world.drained()

    def _measure_capacity(self) -> None:
        """Tweets a second from the first XADD of a burst until the stream is empty: the median of a few bursts."""
        ids, measured = Snowflakes(CAPACITY_MACHINE), []
        for _ in range(CAPACITY_ROUNDS):
            burst = [ids.next() for _ in range(self.plan.capacity_tweets)]
            began = time.monotonic()
            self._publish(burst)
            wait_until(lambda: self.world.stream.depth().idle, every=0.05)
            measured.append(len(burst) / (time.monotonic() - began))
        self.capacity = statistics.median(measured)
        self.rate = self.rate or self.capacity / 2

    def _publish(self, ids: list[int]) -> None:
        samples = sample_tweets()
        self.world.stream.publish([wire(str(id_), samples[id_ % len(samples)]["text"]) for id_ in ids])
        self.ledger.add(ids)

    @contextmanager
    def _producing(self, files: list[Path]) -> Iterator[None]:
        environment = {**os.environ, **child_environment(self.world.settings)}
        with ExitStack() as stack:
            for number, path in enumerate(files, start=1):
                rate, delay = f"{(self.rate or 0) / PRODUCERS}", f"{self.plan.longest_delay}"
                log = stack.enter_context((self.world.settings.logs / f"producer-{number}.log").open("ab"))
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.soak.producer", "--number", str(number), "--rate", rate,
                     "--repeated", str(REPEATED), "--longest-delay", delay, "--accepted", str(path)],
                    cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                )  # fmt: skip
                self.producers[number] = process
                stack.callback(process.wait, PATIENCE_SECONDS)
                stack.callback(process.terminate)
            wait_until(lambda: all(path.exists() or not self._produces() for path in files))
            self.began = self.ledger.began = time.time()
            self.memory.producers = {process.pid: f"producer {n}" for n, process in self.producers.items()}
            self.probe.start()
            stack.callback(self.probe.end)
            yield

    def _produces(self) -> bool:
        return all(process.poll() is None for process in self.producers.values())

    # --- under load

    @property
    def seconds(self) -> float:
        return time.time() - self.began

    @property
    def minute(self) -> Minute:
        number = int(self.seconds // 60)
        return self.minutes.setdefault(number, Minute(number))

    def _load(self) -> None:
        """Sample, check and cause the events, each when it is due."""
        events, sample_at, check_at = self.plan.events(), 0.0, self.plan.check_every
        while self.seconds < self.plan.seconds:
            if not self._produces():
                self.faults.append("a producer ended")
                return
            if self.up.process.poll() is not None:
                self.faults.append("`tweetscore up` ended")
                return
            if events and events[0].at_seconds <= self.seconds and self._cause(events[0].kind):
                events.pop(0)
            self._look_at_promotion()
            if self._too_much():
                return
            if sample_at <= self.seconds:
                sample_at = self.seconds + SAMPLE_EVERY_SECONDS
                self._sample()
            if check_at <= self.seconds:
                check_at += self.plan.check_every
                self._check()
            time.sleep(0.2)

    def _too_much(self) -> bool:
        """Whether so many tweets wait that retention would delete their rows before they are seen: nothing is lost
        then, but nothing could be shown either."""
        most = (self.rate or 0) * self.plan.retention_seconds / 2
        if too_much := self.minute.depth > most:
            self.faults.append(f"over {most:,.0f} tweets wait: the machine has other work; give a lower --soak-rate")
        return too_much

    def _cause(self, kind: str) -> bool:
        """Whether the event took place; else it is tried again. Does not wait: each row has to be seen in time."""
        if kind == "kill":
            number = 1 + self.kills % KILLED_SCORERS
            if (pid := self.memory.scorers().get(number)) is None:
                return False  # it is being started again
            os.kill(pid, signal.SIGKILL)
            self.kills += 1
            self.minute.events.append(f"scorer {number} killed")
        elif kind == "server":
            os.kill(int(self.world.raw.info("server")["process_id"]), signal.SIGKILL)
            self.server_kills += 1
            self.minute.events.append("server killed")
        else:
            if self.promoting is not None:
                return False
            self.promoting = self._promote(3 - self.champion)
        return True

    def _look_at_promotion(self) -> None:
        if self.promoting is not None and self.promoting.process.poll() is not None:
            assert self.promoting.ended() == 0, self.promoting.said()
            self.champion, self.promoting = 3 - self.champion, None
            self.promotions += 1
            self.minute.events.append(f"model {self.champion} promoted")

    def _promote(self, version: int) -> Command:
        log = self.world.settings.logs / "promote.log"
        return Command(log, self.world.given, "models", "promote", str(version))

    def _sample(self) -> None:
        self.minute.memory |= self.memory.sample(self.seconds)
        try:
            depth = self.world.stream.depth()
        except (StreamError, redis.RedisError):
            return  # the server was killed a moment ago
        self.minute.depth = max(self.minute.depth, (depth.lag or 0) + depth.pending)

    def _check(self, older_than_seconds: float = YOUNG_SECONDS) -> None:
        self.ledger.add(self.probe.take_accepted())
        self.ledger.tick_off(older_than_seconds)
        self.minute.stored, self.scored = self.ledger.stored(), self.ledger.scored()
        self.write_table()

    # --- after the load

    def _end(self) -> None:
        wait_until(lambda: self.promoting is None or self.promoting.process.poll() is not None)
        self._look_at_promotion()
        self.world.drained()
        self._check(older_than_seconds=0)
        self._compare()
        self.up.send(signal.SIGTERM)
        if (code := self.up.ended()) != 0:
            self.faults.append(f"`tweetscore up` ended with {code}")

    def _compare(self) -> None:
        """Add a fault for everything that is not as it should be. The stream is empty."""
        expected = [event.kind for event in self.plan.events()]
        dead = self.world.count(DeadLetter)
        counts: dict[str, tuple[Any, Any]] = {
            "accepted tweets without a row": (len(self.ledger.waiting), 0),
            "pairs of tweet and model version with two rows": (self.ledger.doubled_rows(), 0),
            "stored tweets that nobody published": (self.ledger.stray_rows(), 0),
            "dead letters": (dead, 0),
            "kills of scorers": (self.kills, expected.count("kill")),
            "kills of the server": (self.server_kills, 1),
            "promotions": (self.promotions, expected.count("promotion")),
            "model versions that scored": (sorted(self.ledger.versions), [1, 2]),
        }  # fmt: skip
        self.faults += [f"{what}: {seen}, not {right}" for what, (seen, right) in counts.items() if seen != right]
        if self.ledger.waiting:
            ages = sorted(round(made_at(id_) - self.began) for id_ in self.ledger.waiting)
            self.faults.append(f"they were made between second {ages[0]} and second {ages[-1]}")
        if self.plan.seconds > 1.5 * self.plan.retention_seconds and not self._deleted():
            self.faults.append("retention deleted nothing")
        if self.plan.full:  # in a few minutes caches still fill
            trends = self.memory.trends(self.plan.warm_up_seconds)
            self.faults += [f"the memory of {trend.name} grows" for trend in trends if not trend.flat]

    def _deleted(self) -> int:
        """As of the last check."""
        return self.ledger.accepted - len(self.ledger.waiting) - self.minutes[max(self.minutes)].stored

    # --- the table

    def _filled_minutes(self) -> list[Minute]:
        ledger = self.ledger
        visible: dict[int, list[float]] = {}
        for at, ms in list(self.probe.visible_ms):
            visible.setdefault(int((at - self.began) // 60), []).append(ms)
        for number, minute in self.minutes.items():
            minute.pushed, minute.repeats, minute.rows = (
                ledger.pushed[number],
                ledger.repeats[number],
                ledger.rows[number],
            )
            minute.latency_ms, minute.visible_ms = ledger.latency_ms[number], visible.get(number, [])
        return [self.minutes[number] for number in sorted(self.minutes)]

    def report(self) -> str:
        ledger, kind = self.ledger, self.world.database.engine.dialect.name
        repeats = sum(ledger.repeats.values())
        summary = (
            f"{self.seconds / 60:.0f} minutes on {kind}: {self.rate or 0:,.0f} tweets/s of a capacity of "
            f"{self.capacity:,.0f}; {ledger.accepted:,} tweets published, {repeats:,} of them again; "
            f"{self.kills} kills of scorers, {self.server_kills} of the server, {self.promotions} promotions; "
            f"{len(ledger.waiting):,} without a row, {sum(ledger.versions.values()):,} rows seen, {self.scored:,} "
            f"tweets scored, {self._deleted() if self.minutes else 0:,} deleted by retention\n"
        )
        faults = "".join(f"- {fault}\n" for fault in self.faults)
        trends = memory_table(self.memory.trends(self.plan.warm_up_seconds))
        minutes = self._filled_minutes()
        return "\n".join(
            [summary, *([faults] if faults else []), minutes_table(minutes), trends, memory_by_minute(minutes)]
        )

    def write_table(self) -> None:
        self.table.write_text(self.report(), encoding="utf-8")
