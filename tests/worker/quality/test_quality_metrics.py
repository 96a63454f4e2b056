"""The gauges of live quality on `/metrics`."""

from math import isnan

from tests.conftest import wait_until
from tests.support.bench import Bench
from tests.support.quality import label, scored, version_tested
from tests.support.rows import assign
from tests.support.scraped import looked
from worker.process.metrics_endpoint import WorkerCollector
from worker.process.quality_metrics import QualityMetrics, gauges
from worker.quality.live_quality import measure


def test_gauges_are_measured_beside_the_scrapes_and_kept_for_ten_minutes(lite: Bench) -> None:
    database = lite.database
    champion = version_tested(database, [{"predicted": "negative"}] * 3, {"accuracy": 0.75})
    assign(database, champion)
    ids = scored(database, champion, 0, ["positive"] * 4, probability=0.875)
    scored(database, champion, 3, ["negative"])  # too old for the gauges of drift
    label(database, {ids[0]: "positive", ids[1]: "negative"})
    first = WorkerCollector("scoring", lambda: "idle", lambda: None, lite.stream, database)
    wait_until(lambda: ("test_accuracy", "") in looked(first))
    found = looked(first)
    assert (found["live_accuracy", "7"], found["live_labels", "30"], found["test_accuracy", ""]) == (0.5, 2, 0.75)
    assert found["live_accuracy_low", "7"] < 0.5 < found["live_accuracy_high", "7"]
    assert (found["expected_accuracy", ""], found["test_expected_accuracy", ""]) == (0.875, 0.75)
    assert (found["drift_tweets", ""], found["psi", "labels"] > 1) == (4, True)
    assert found["psi_chance", "labels"] == 1 / 4 + 1 / 3
    label(database, {ids[2]: "positive"})
    rested = QualityMetrics(database, refresh_seconds=0)
    wait_until(lambda: any(m.samples[0].value == 3 for m in rested.collect() if m.name == "tweetscore_live_labels"))
    assert looked(first)["live_labels", "30"] == 2
    trainer = WorkerCollector("training", lambda: "idle", lambda: None, lite.stream, database)
    assert ("test_accuracy", "") not in looked(trainer)


def test_a_figure_that_is_not_known_is_nan(lite: Bench) -> None:
    assign(lite.database, version_tested(lite.database, []))
    families = {family.name: family.samples for family in gauges(measure(lite.database))}
    values = [sample.value for name, samples in families.items() for sample in samples if "accuracy" in name]
    assert len(values) == 3 * 2 + 3
    assert all(map(isnan, values))
    assert families["tweetscore_psi"] == []
