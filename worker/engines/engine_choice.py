"""The result of a trial of engines: `choice.json`, read by people and by the next worker. Imports no torch."""

import json
from dataclasses import dataclass
from pathlib import Path

CHOICE = "choice.json"
# More would only delay the first rows: a CPU is as fast with 512.
CPU_WINDOW_TWEETS = 4096


@dataclass(frozen=True)
class Trial:
    """Figures of one engine. `agreement` is the share of rows with the same labels as float32 torch, 0..1."""

    engine: str
    verdict: str
    serves: bool = False
    tweets_per_second: float | None = None
    agreement: float | None = None
    mean_difference: float | None = None


@dataclass(frozen=True)
class Choice:
    """The engine chosen for a model on some hardware, and every engine that was tried.

    `token_budget` limits the tokens of a forward, and `window_tweets` the tweets of a window.
    """

    engine: str
    token_budget: int
    hardware: str
    trials: list[Trial]
    window_tweets: int = CPU_WINDOW_TWEETS

    @property
    def reason(self) -> str:
        return next((trial.verdict for trial in self.trials if trial.serves), "")


def engines_folder(artifact: Path) -> Path:
    """The folder of an artifact's engines. It is separate because the files of an artifact never change."""
    return artifact.with_name(f"{artifact.name}.engines")


def fallback_folder(artifact: Path, base: Path) -> Path:
    """The folder below `base` for an artifact whose store cannot be written."""
    return base / engines_folder(artifact).name


def read_choice(folder: Path) -> Choice | None:
    """None when the folder holds no choice, or one that another release wrote: the engines are tried again."""
    try:
        written = json.loads((folder / CHOICE).read_text(encoding="utf-8"))
        return Choice(**{**written, "trials": [Trial(**trial) for trial in written["trials"]]})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def saved_choices(artifact: Path, fallback: Path) -> list[Choice]:
    """The saved choices for an artifact, one for each kind of machine that served it from this store."""
    folders = (engines_folder(artifact), fallback_folder(artifact, fallback))
    found = [read_choice(path) for folder in folders for path in sorted(folder.glob("[!.]*"))]
    return [choice for choice in found if choice is not None]
