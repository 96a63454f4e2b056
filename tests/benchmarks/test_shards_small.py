"""The benchmark of shards runs, and its figures are those of tweets that went through the stream."""

import json
from pathlib import Path

from tests.benchmarks.shards import LAYOUTS, main


def test_every_layout_moves_tweets_and_reports_the_cpu_time_of_its_servers(tmp_path: Path) -> None:
    assert main(["--seconds", "0.5", "--rounds", "1", "--json", str(tmp_path / "shards.json")]) == 0
    found = json.loads((tmp_path / "shards.json").read_text())["layouts"]
    assert list(found) == list(LAYOUTS)
    for layout in found.values():
        assert layout["tweets_per_second"] > 0
        assert layout["server_limit_tweets_per_second"] > 0
    assert found["one key"]["over_one_key"] == 1
