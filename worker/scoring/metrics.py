"""Prometheus metrics that the scoring route updates. `metrics_endpoint.py` serves them."""

from math import nan

from prometheus_client import Counter, Gauge, Histogram

from worker.scoring.window import STAGES, Window

# Seconds: from under a millisecond, which a read takes, to a window of long texts on a slow CPU.
BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)

windows = Counter("tweetscore_windows", "windows committed")
tweets = Counter("tweetscore_tweets", "tweets scored and committed")
buried = Counter("tweetscore_buried", "records put into dead_letters")
tokens = Counter("tweetscore_tokens", "tokens of the texts scored")
padded_tokens = Counter("tweetscore_padded_tokens", "tokens that the device processed, padding included")
padding = Gauge("tweetscore_padding_ratio", "padded tokens over tokens of the last window; 1: no padding")
passed_on = Counter("tweetscore_passed_on", "tweets that the student of a cascade passed on to the teacher")
planned_share = Gauge(
    "tweetscore_planned_share", "share of tweets that the champion, a cascade, is to pass on, else NaN"
)
planned_share.set(nan)
shadow_tweets = Counter("tweetscore_shadow_tweets", "tweets that the challenger scored and committed")
shadow_dropped = Counter(
    "tweetscore_shadow_dropped",
    "tweets of its share that it did not score, by reason",
    ["reason"],
)
stages = Histogram("tweetscore_stage_seconds", "seconds of a window in a stage", ["stage"], buckets=BUCKETS)
for stage in STAGES:
    stages.labels(stage)  # exported from the start, so that rates can be computed
for reason in ("busy", "failed"):
    shadow_dropped.labels(reason)


def count(window: Window) -> None:
    """Add a committed window."""
    windows.inc()
    tweets.inc(len(window.tweets))
    buried.inc(len(window.dead))
    for stage in STAGES:
        stages.labels(stage).observe(window.ms[f"{stage}_ms"] / 1000)
    planned_share.set(nan if window.model.planned_share is None else window.model.planned_share)
    if window.scores is not None and window.scores.passed_on is not None:
        passed_on.inc(window.scores.passed_on)
    if window.scores is not None and window.scores.tokens:
        tokens.inc(window.scores.tokens)
        padded_tokens.inc(window.scores.padded_tokens)
        padding.set(window.scores.padded_tokens / window.scores.tokens)
