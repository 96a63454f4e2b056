"""What a challenger costs the champion: `python -m tests.benchmarks.shadow [--base] [--rounds N] [--tweets N]`.

Two systems with the same champion and challenger, one with share 0 and one with `--share`, measured alternately in one
run: tweets a second from a full stream to the committed rows, and the milliseconds of single tweets that arrive while
the challenger scores the ones before. Prints median, least and greatest of the ratios.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from db import registry
from db.models import ModelVersion
from tests.benchmarks.models import LABELS, base_artifact, starter_artifact
from tests.benchmarks.system import System, tweets
from tests.support.paths import tweets_file

# Between two single tweets, so that the challenger's work on the last ones overlaps with the next.
PAUSE_SECONDS = 0.02


def assign_challenger(system: System) -> int:
    """Register the champion's artifact again, as the challenger; returns its version."""
    with system.database.begin() as session:
        champion = registry.get(session, system.version_id)
        twin = ModelVersion(
            base_model="challenger", artifact_url=champion.artifact_url, sha256=champion.sha256, labels=champion.labels,
            cleaner_version=champion.cleaner_version,
        )  # fmt: skip
        registry.add_version(session, twin, [], [], [])
        registry.assign(session, registry.CHALLENGER, twin.id)
        return twin.id


def shadow_rows(system: System, version: int) -> int:
    return int(system.look.value("SELECT count(*) FROM predictions WHERE model_version_id = ?", version))


def wait_for_challenger(system: System, version: int, source: Path) -> None:
    """Send tweets until the challenger has scored one."""
    while not shadow_rows(system, version):
        system.score(tweets(50, source))
        time.sleep(0.5)


def throughput(system: System, count: int, source: Path) -> float:
    return count / system.score(tweets(count, source))


def latency_ms(system: System, count: int, source: Path) -> float:
    """Median milliseconds of single tweets, one after the other."""
    found = []
    for payload in tweets(count, source):
        found.append(1000 * system.latency(payload))
        time.sleep(PAUSE_SECONDS)
    return statistics.median(found)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    source = tweets_file()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tweetscore-")))
        artifact = scratch / "models" / "model"
        sha256 = base_artifact(artifact) if options.base else starter_artifact(artifact)
        systems, versions = [], []
        for share in (0.0, options.share):
            environment = {"TWEETSCORE_SHADOW_SHARE": str(share)}
            home = scratch / f"home-{share}"
            system = stack.enter_context(System(home, artifact, sha256, LABELS, environment=environment))
            systems.append(system)
            versions.append(assign_challenger(system))
        without, beside = systems
        wait_for_challenger(beside, versions[1], source)
        without.score(tweets(50, source))
        measures: dict[str, Callable[[System], float]] = {
            "tweets a second, full stream": lambda system: throughput(system, options.tweets, source),
            "ms of a single tweet": lambda system: latency_ms(system, options.single_tweets, source),
        }
        for name, measure in measures.items():
            before = shadow_rows(beside, versions[1])
            pairs: list[tuple[float, float]] = []
            for number in range(options.rounds):
                order = (without, beside) if number % 2 else (beside, without)
                found = {id(system): measure(system) for system in order}
                pairs.append((found[id(without)], found[id(beside)]))
            ratios = [with_it / without_it for without_it, with_it in pairs]
            alone, shared = (statistics.median(column) for column in zip(*pairs, strict=True))
            print(
                f"{name}: share 0 {alone:.1f}, share {options.share:g} {shared:.1f}; ratio "
                f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f}); the challenger scored "
                f"{shadow_rows(beside, versions[1]) - before:,} tweets meanwhile",
                flush=True,
            )
        if shadow_rows(without, versions[0]):
            raise AssertionError("the challenger scored with share 0")
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.shadow", description=__doc__)
    parser.add_argument("--base", action="store_true", help="a model of BERT-base size instead of the starter's")
    parser.add_argument("--share", type=float, default=0.1, help="the challenger's share")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tweets", type=int, default=4_000)
    parser.add_argument("--single-tweets", type=int, default=100)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
