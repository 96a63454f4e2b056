"""A filled database for the console, with tweets that try to be more than text."""

import json
import random
import shutil
from datetime import UTC, datetime, timedelta
from typing import Any

from db import predictions, registry
from db.models import Label
from db.session import Database
from tests.support.rows import assign, letter_row, make_version, write

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
LABELS = ["negative", "neutral", "positive"]
HOSTILE = (
    "<img src=x onerror=\"document.title='taken'\"> 映画が良い & 楽しい",
    "![x](http://example.invalid/pixel.png) [押す](http://example.invalid/) **太い** $x^2$ :material/home: :red[赤]",
    '=HYPERLINK("http://example.invalid/";"押す")',
    "\u202eこれは逆向き\u202c と <script>document.title='taken'</script>",
)
TOPICS = ("映画", "天気", "<b>電車</b>", None)
TEXTS = (
    "今日は朝から雨が降っていて電車も少し遅れていた",
    "駅前の新しいパン屋さんで買ったカレーパンがとても美味しくて元気が出た",
    "急な仕事が入ってしまって残念",
    "録画したドラマの続きを見ながらゆっくり過ごしたい",
    "明日は晴れるといいなあ",
)


def fill(database: Database, tweets: int = 400, days: float = 7.0, now: datetime | None = None) -> int:
    """`tweets` tweets over the last `days`, scored by a champion and an older model. Returns the champion's id."""
    now, rng = now or datetime.now(UTC), random.Random(1)
    older = make_version(database, {("accuracy", ""): 0.8, ("f1_macro", ""): 0.7})
    champion = make_version(database, {("accuracy", ""): 0.9, ("f1_macro", ""): 0.8})
    with database.begin() as session:
        for version in (older, champion):
            registry.get(session, version).labels = LABELS
    assign(database, champion)
    rows: list[dict[str, Any]] = []
    scored: list[dict[str, Any]] = []
    for i in range(tweets):
        at = now - timedelta(days=days) * (1 - i / tweets) ** 2 - timedelta(minutes=5)
        text = HOSTILE[i // 10 % 4] if i % 10 == 0 else f"{rng.choice(TEXTS)}。{i}"
        rows.append(
            {
                "tweet_id": f"{1_700_000_000_000_000_000 + i}", "text": text, "author_id": f"{1000 + i % 7}",
                "lang": "ja", "topic": rng.choices(TOPICS, (5, 4, 2, 1))[0],
                "tweet_created_at": at if i % 3 else None, "received_at": at,
            }
        )  # fmt: skip
        for version in (older, champion):
            scored.append(_scored(rng, rows[-1]["tweet_id"], version, at))
    write(database, rows, scored)
    with database.begin() as session:
        for i in range(0, tweets, 20):
            session.add(
                Label(tweet_id=rows[i]["tweet_id"], label=rng.choice(LABELS), annotator="花子", source="review", at=now)
            )
        predictions.bury(
            session,
            [
                letter_row("1-0", reason="text is <b>missing</b>", payload=json.dumps({"id": "9"}).encode()),
                letter_row("2-0", reason="not JSON", payload=b"\xff<script>document.title='taken'</script>"),
            ],
        )
        for i in range(30):
            window: dict[str, Any] = dict.fromkeys(("read_ms", "tokenise_ms", "forward_ms", "store_ms"), 2.0)
            window |= {"worker": "score-host-1", "model_version_id": champion, "tweets": 60, "buried": 0, "tokens": 900}
            at = now - timedelta(minutes=i)
            predictions.add_window(session, {**window, "padded_tokens": 990, "started_at": at})
    return champion


def _scored(rng: random.Random, tweet_id: str, version: int, at: datetime) -> dict[str, Any]:
    shares = [rng.random() ** 3 + 0.02 for _ in LABELS]
    probabilities = {label: share / sum(shares) for label, share in zip(LABELS, shares, strict=True)}
    label = max(probabilities, key=lambda name: probabilities[name])
    return {
        "tweet_id": tweet_id, "model_version_id": version, "label": label, "probability": probabilities[label],
        "score_signed": probabilities["positive"] - probabilities["negative"], "probabilities": probabilities,
        "scored_at": at + timedelta(seconds=1),
    }  # fmt: skip
