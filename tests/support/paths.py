"""Paths of the project, and of the tweets that benchmarks measure with."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
SAMPLE_TWEETS = ROOT / "training" / "sample" / "unlabelled.jsonl"


def tweets_file() -> Path:
    """Real tweets where they lie in or beside the project; else the sample's."""
    places = (folder / "shared" / "data" / "tweets-2011.jsonl" for folder in (ROOT.parent, ROOT))
    return next((path for path in places if path.is_file()), SAMPLE_TWEETS)
