"""docker-compose.yml and what it mounts: valid, and what they start works together, by their very commands."""

import json
import re
import shutil
import signal
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
import redis
import yaml
from celery import Celery

from tests.conftest import PATIENCE_SECONDS, wait_until, write_labelled
from tests.support.bench import wire
from tests.support.compose import COMPOSE, ROOT, Deployment
from worker.process.health import KINDS
from worker.settings import Settings, environment_name

OPS = ROOT / "worker" / "deploy"
RULES = yaml.safe_load((OPS / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
DASHBOARD = json.loads((OPS / "grafana-dashboard.json").read_text(encoding="utf-8"))
TARGETS = [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel["targets"]]
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool (Debian: prometheus) is missing")


def ran(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_SECONDS, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


# --- the files by themselves


@pytest.mark.parametrize("name", ["trainer", "trainer-cpu", "scorer", "scorer-cpu"])
def test_a_worker_ends_by_itself_before_docker_kills_it_and_names_settings_that_exist(name: str) -> None:
    service = COMPOSE["services"][name]
    assert service["profiles"] == (["cpu"] if name.endswith("cpu") else ["gpu"])
    assert ("deploy" in service) == (not name.endswith("cpu"))
    assert int(service["stop_grace_period"].rstrip("s")) > Settings.model_fields["grace_seconds"].default
    assert service["healthcheck"]["test"][:3] == ["CMD", "tweetscore", "health"]
    assert service["healthcheck"]["test"][3] in KINDS
    assert set(service["environment"]) <= {environment_name(field) for field in Settings.model_fields}


def test_every_image_of_others_has_its_version_and_no_password_stands_in_the_file() -> None:
    images = [service["image"] for service in COMPOSE["services"].values() if "build" not in service]
    assert len(images) == 4
    assert all(re.search(r":v?\d+\.\d+(\.\d+)?(-alpine)?$", image) for image in images)
    assert not re.search(r"(?i)password: [^/\n]+$", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE)
    assert all(
        service.get("ports", ["127.0.0.1:"])[0].startswith("127.0.0.1:") for service in COMPOSE["services"].values()
    )


def test_the_users_of_redis_are_those_of_the_documentation() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for user in ("producer", "worker"):
        said = re.search(rf"ACL SETUSER {user} on >PASSWORD (.+)$", page, re.MULTILINE)[1]  # type: ignore[index]
        script = (OPS / "redis.sh").read_text()
        made = re.search(rf"user {user} on #\$\(digest redis_{user}\) (.+)$", script, re.MULTILINE)[1]  # type: ignore[index]
        assert said == made


# --- alerts

HEALTHY = {
    'up{job="tweetscore",instance="a"}': "1+0x40",
    'tweetscore_worker{kind="scoring",state="idle",instance="a"}': "1+0x40",
    'tweetscore_model_version{instance="a"}': "3+0x40",
    'tweetscore_stream_length{instance="a"}': "10+0x40",
    'tweetscore_oldest_unscored_seconds{instance="a"}': "2+0x40",
    'tweetscore_broker_up{instance="a"}': "1+0x40",
    'tweetscore_database_up{instance="a"}': "1+0x40",
    'tweetscore_buried_total{instance="a"}': "5+0x40",
    'tweetscore_records_vanished_at_seconds{instance="a"}': "0+0x40",
    'tweetscore_jobs{state="failed",instance="a"}': "1+0x40",
    'tweetscore_jobs{state="queued",instance="a"}': "1+0x40",
    'tweetscore_jobs{state="running",instance="a"}': "1+0x40",
    'tweetscore_lease_losses_total{instance="a"}': "1+0x40",
    'tweetscore_padded_tokens_total{instance="a"}': "0+110x40",
    'tweetscore_tokens_total{instance="a"}': "0+100x40",
    'tweetscore_tweets_total{instance="a"}': "0+100x40",
    'tweetscore_passed_on_total{instance="a"}': "0+24x40",
    'tweetscore_planned_share{instance="a"}': "0.2+0x40",
    'tweetscore_live_accuracy_high{days="30",instance="a"}': "0.9+0x100",
    'tweetscore_test_accuracy{instance="a"}': "0.85+0x100",
    'tweetscore_expected_accuracy{instance="a"}': "0.8+0x100",
    'tweetscore_test_expected_accuracy{instance="a"}': "0.84+0x100",
    'tweetscore_drift_tweets{instance="a"}': "500+0x100",
    'tweetscore_psi{of="labels",instance="a"}': "0.27+0x100",
    'tweetscore_psi_chance{of="labels",instance="a"}': "0.03+0x100",
}
# Alert -> the series that brings it about alone, and how it runs from minute to minute.
SICK = {
    "WorkerDown": ('up{job="tweetscore",instance="a"}', "0+0x40"),
    "NoScorer": ('tweetscore_worker{kind="scoring",state="idle",instance="a"}', "_x40"),
    "NoChampion": ('tweetscore_model_version{instance="a"}', "0+0x40"),
    "FallingBehind": ('tweetscore_oldest_unscored_seconds{instance="a"}', "301+60x40"),
    "StreamFillsUp": ('tweetscore_stream_length{instance="a"}', "400001+0x40"),
    "BrokerAway": ('tweetscore_broker_up{instance="a"}', "0+0x40"),
    "DatabaseAway": ('tweetscore_database_up{instance="a"}', "0+0x40"),
    "DeadLetters": ('tweetscore_buried_total{instance="a"}', "5+0x30 6+0x10"),
    "RecordsVanished": ('tweetscore_records_vanished_at_seconds{instance="a"}', "0+0x30 1800+0x10"),
    "JobFailed": ('tweetscore_jobs{state="failed",instance="a"}', "1+0x30 2+0x10"),
    "JobWaits": ('tweetscore_jobs{state="running",instance="a"}', "0+0x40"),
    "LeaseLost": ('tweetscore_lease_losses_total{instance="a"}', "1+0x30 2+0x10"),
    "PaddingWasted": ('tweetscore_padded_tokens_total{instance="a"}', "0+200x90"),
    "CascadePassesOnMore": ('tweetscore_passed_on_total{instance="a"}', "0+26x90"),
    "LiveAccuracyFell": ('tweetscore_live_accuracy_high{days="30",instance="a"}', "0.84+0x100"),
    "ExpectedAccuracyFell": ('tweetscore_expected_accuracy{instance="a"}', "0.78+0x100"),
    "Drift": ('tweetscore_psi{of="labels",instance="a"}', "0.29+0x100"),
}


# Alerts that fire only after an hour or half of one.
SLOW = ("PaddingWasted", "CascadePassesOnMore", "LiveAccuracyFell", "ExpectedAccuracyFell", "Drift")


@needs_promtool
def test_each_alert_fires_for_its_own_reason_and_none_while_all_is_well(tmp_path: Path) -> None:
    assert set(SICK) == {rule["alert"] for rule in RULES}
    assert all(rule["annotations"]["do"].endswith(".") for rule in RULES)
    tests = []
    for alert, (name, values) in {"": ("", ""), **SICK}.items():
        series = {**HEALTHY, **({name: values} if name else {})}
        if alert in SLOW:
            series = {one: values.replace("x40", "x90") for one, values in series.items()}
        fires = [{"labels": f'{{alertname="{alert}"}}', "value": 1}] if alert else []
        tests.append(
            {
                "interval": "1m",
                "input_series": [{"series": one, "values": values} for one, values in series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": "80m" if alert in SLOW else "35m",
                        "exp_samples": fires,
                    }
                ],
            }
        )
    shutil.copy(OPS / "alerts.yml", tmp_path)
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"rule_files": ["alerts.yml"], "tests": tests}))
    ran("promtool", "check", "rules", str(OPS / "alerts.yml"))
    ran("promtool", "check", "config", str(OPS / "prometheus.yml"))
    ran("promtool", "test", "rules", str(tmp_path / "tests.yml"))


# --- all of it together


class Running:
    """What was done once with all services up, for the tests below to look at."""

    def __init__(self, deployment: Deployment) -> None:
        self.deployment = deployment
        deployment.start_redis()
        deployment.start_postgres()
        self.migrated = [deployment.run(*deployment.command("migrate"), service="migrate") for _ in range(2)]
        for number in (1, 2):
            deployment.start("scorer-cpu", number=number)
        for service in ("trainer-cpu", "tensorboard", "flower"):
            deployment.start(service)
        self.trained = deployment.run(
            "tweetscore",
            "train",
            str(write_labelled(deployment.folder / "labelled.csv")),
            "--epochs",
            "1",
            "--wait",
            "--json",
        )
        self.promoted = deployment.run("tweetscore", "models", "promote", "1")
        publisher = {
            "REDIS_URL": deployment.inside("redis://producer@redis:6379/0"),
            "REDIS_PASSWORD_FILE": str(deployment.folder / "secrets" / "redis_producer"),
        }
        lines = "".join(wire(i, f"今日は嬉しい{i}").decode() + "\n" for i in range(300))
        self.pushed = deployment.run("tweetscore", "push", "-", stdin=lines, **publisher)
        with self.connect("reader") as reader:
            count = "SELECT count(*) FROM v_predictions_current"
            wait_until(lambda: reader.execute(count).fetchone() == (300,))

    def ask(self, sql: str) -> list[dict[str, Any]]:
        done = self.deployment.run("tweetscore", "query", sql, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def connect(self, role: str, password: str | None = None) -> "psycopg.Connection[Any]":
        deployment = self.deployment
        return psycopg.connect(
            host="127.0.0.1", port=deployment.ports["postgres:5432"], user=f"tweetscore_{role}", dbname="tweetscore",
            password=password or deployment.password[f"db_{role}"], autocommit=True,
        )  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with ExitStack() as stack, pytest.MonkeyPatch.context() as clean:
        for name in [environment_name(field) for field in Settings.model_fields]:
            clean.delenv(name, raising=False)
        yield Running(Deployment(tmp_path_factory.mktemp("compose") / "up", stack))


def page(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=PATIENCE_SECONDS) as answer:
        return str(answer.read().decode())


@pytest.mark.slow
def test_tweets_pushed_by_the_producer_are_scored_and_read_by_the_reader(running: Running) -> None:
    for done in (*running.migrated, running.trained, running.promoted, running.pushed):
        assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(running.trained.stdout)["state"] == "succeeded"
    assert running.ask("SELECT count(*) AS n FROM v_predictions_current") == [{"n": 300}]
    assert running.ask("SELECT current_user AS me") == [{"me": "tweetscore_reader"}]
    [once] = running.ask("SELECT count(*) AS n, sum(tweets) AS tweets FROM scoring_windows")
    assert once["tweets"] == 300
    for service in ("redis", "scorer-cpu", "trainer-cpu"):
        if service == "redis" and shutil.which("redis-cli") is None:
            continue
        assert running.deployment.healthy(service), service


@pytest.mark.slow
def test_the_roles_may_do_what_they_must_and_no_more(running: Running) -> None:
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        running.connect("worker", "wrong")
    forbidden = {
        "reader": (
            "DELETE FROM tweets",
            "SET default_transaction_read_only = off; DELETE FROM tweets",
            "CREATE TABLE a (b int)",
        ),
        "worker": ("DROP TABLE tweets", "CREATE TABLE a (b int)", "DELETE FROM alembic_version", "TRUNCATE tweets"),
    }
    for role, statements in forbidden.items():
        with running.connect(role) as connection:
            for sql in statements:
                with pytest.raises(psycopg.Error, match=r"permission denied|read-only|must be owner"):
                    connection.execute(sql)
    port, password = running.deployment.ports["redis:6379"], running.deployment.password
    with pytest.raises(redis.AuthenticationError):
        redis.Redis(port=port).ping()
    with (
        redis.Redis(port=port, username="producer", password=password["redis_producer"]) as producer,
        pytest.raises(redis.exceptions.NoPermissionError),
    ):
        producer.xlen("tweets")
    with redis.Redis(port=port, username="worker", password=password["redis_worker"]) as client:
        kept = client.info("persistence")["aof_enabled"], client.info("memory")["maxmemory_policy"]
        assert kept == (1, "noeviction")


@pytest.mark.slow
def test_a_worker_that_may_not_bring_the_schema_says_who_can(running: Running) -> None:
    with running.connect("owner") as connection:
        connection.execute("CREATE SCHEMA IF NOT EXISTS empty AUTHORIZATION tweetscore_owner")
        connection.execute("GRANT USAGE ON SCHEMA empty TO tweetscore_worker")
    url = running.deployment.environment("scorer-cpu")["DATABASE_URL"]
    done = running.deployment.run(
        "tweetscore", "jobs", "list", service="scorer-cpu", DATABASE_URL=f"{url}?options=-csearch_path%3Dempty"
    )
    assert done.returncode == 2
    assert "tweetscore db upgrade" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_flower_and_tensorboard_answer(running: Running) -> None:
    ports = running.deployment.ports
    for port in ("6006", "5555"):
        wait_until(lambda port=port: _up(ports[port]), every=0.5)
    wait_until(lambda: json.loads(page(ports["6006"], "/data/runs")) == ["job-1"], every=0.5)
    assert page(ports["5555"], "/workers").count("score-") >= 2


@pytest.mark.slow
def test_a_job_that_failed_is_a_failed_task_in_flower_and_its_sender_is_told_why(running: Running) -> None:
    port, password = running.deployment.ports["redis:6379"], running.deployment.password["redis_worker"]
    url = f"redis://worker:{password}@127.0.0.1:{port}/0"
    wait_until(lambda: _up(running.deployment.ports["5555"]), every=0.5)
    client = Celery(broker=url, backend=url)
    asked = client.send_task("worker.tasks.train", queue="training", kwargs={"dataset": "/etc/passwd"})
    with pytest.raises(Exception, match="lies outside the folders this worker may read"):
        asked.get(timeout=PATIENCE_SECONDS)
    shown = f"/task/{asked.id}"
    wait_until(lambda: "FAILURE" in page(running.deployment.ports["5555"], shown), every=0.5)


def _up(port: int) -> bool:
    try:
        page(port, "/")
    except OSError:
        return False
    return True


SAMPLE_RANGE = "BETWEEN now() - interval '1 day' AND now() + interval '1 day'"


@pytest.mark.slow
@pytest.mark.parametrize(("title", "target"), [t for t in TARGETS if "rawSql" in t[1]])
def test_every_question_of_the_dashboard_has_an_answer(running: Running, title: str, target: dict[str, Any]) -> None:
    sql = re.sub(r"\$__timeFilter\((\w+)\)", rf"\1 {SAMPLE_RANGE}", target["rawSql"])
    assert "$__" not in sql
    with running.connect("reader") as reader:
        found = reader.execute(sql)  # type: ignore[arg-type]
        names = [column.name for column in found.description or ()]
        rows = found.fetchall()
    if target["format"] == "time_series":
        assert names[0] == "time"
    assert rows or "v_low_confidence" in sql, title  # a model may be sure of everything


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus (Debian) is missing")
def test_prometheus_finds_every_worker_and_all_that_is_asked_of_it(running: Running) -> None:
    deployment = running.deployment
    config = yaml.safe_load((OPS / "prometheus.yml").read_text())
    [job] = config["scrape_configs"]
    [names] = job.pop("dns_sd_configs")
    assert set(names["names"]) == {"scorer", "scorer-cpu", "trainer", "trainer-cpu"}
    assert str(names["port"]) == COMPOSE["services"]["scorer"]["environment"]["TWEETSCORE_METRICS_PORT"]
    # In containers each worker has the same port; here the three took one after the other.
    job["static_configs"] = [{"targets": [f"127.0.0.1:{deployment.metrics_port + i}" for i in range(3)]}]
    config["global"]["scrape_interval"] = "1s"
    (deployment.folder / "etc").mkdir()
    (deployment.folder / "etc" / "prometheus.yml").write_text(yaml.safe_dump(config))
    shutil.copy(OPS / "alerts.yml", deployment.folder / "etc")
    port = deployment.ports["9090"]
    deployment.start("prometheus", f"--web.listen-address=127.0.0.1:{port}")

    def asked(expression: str) -> list[Any]:
        answer = json.loads(page(port, f"/api/v1/query?query={urllib.parse.quote(expression)}"))
        assert answer["status"] == "success", expression
        return answer["data"]["result"]

    wait_until(lambda: _up(port), every=0.2)
    wait_until(lambda: len(asked('up{job="tweetscore"} == 1')) == 3, every=0.5)
    wait_until(lambda: len(asked("rate(tweetscore_tweets_total[10s])")) == 3, every=0.5)
    for title, target in TARGETS:
        if "expr" in target:
            assert asked(target["expr"].replace("5m", "10s")), title
    named = {name for rule in RULES for name in re.findall(r"tweetscore_\w+", rule["expr"])}
    for name in named:
        wait_until(lambda name=name: asked(name), every=0.5)  # those of quality are measured after the first scrape
    assert len(json.loads(page(port, "/api/v1/rules"))["data"]["groups"][0]["rules"]) == len(RULES)


@pytest.mark.slow
def test_the_workers_role_deletes_tweets_and_rewrites_their_files_or_says_that_it_may_not(running: Running) -> None:
    delete = ("tweetscore", "delete", "--json", "--tweet-id")
    with running.connect("owner") as owner:
        may = owner.info.server_version >= 170_000
        done = running.deployment.run(*delete, "7")
        assert (done.returncode, json.loads(done.stdout)["tweets"]) == (0 if may else 1, 1), done.stderr
        if may:  # and as a server that has no MAINTAIN to grant
            owner.execute("REVOKE MAINTAIN ON ALL TABLES IN SCHEMA public FROM tweetscore_worker")
        done = running.deployment.run(*delete, "8")
        assert (done.returncode, len(json.loads(done.stdout)["not_rewritten"])) == (1, 1), done.stderr
        assert "tweetscore_worker may not VACUUM them" in done.stderr
    assert running.deployment.run(*delete, "9", service="migrate").returncode == 0


@pytest.mark.slow
def test_everything_ends_when_told_to(running: Running) -> None:
    """The last: the workers end by themselves, with nothing left to score."""
    ended = {}
    for name, process in running.deployment.processes.items():
        if name.startswith(("scorer", "trainer")):
            process.send_signal(signal.SIGTERM)
            ended[name] = process
    assert {name: process.wait(PATIENCE_SECONDS) for name, process in ended.items()} == dict.fromkeys(ended, 0)
    password = running.deployment.password["redis_worker"]
    with redis.Redis(port=running.deployment.ports["redis:6379"], username="worker", password=password) as client:
        assert client.xlen("tweets") == 0
