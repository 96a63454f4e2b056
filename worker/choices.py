"""What was found when engines were tried on a model: read by people and by the next worker. Light to import."""

import json
from dataclasses import dataclass
from pathlib import Path

CHOICE = "choice.json"


@dataclass(frozen=True)
class Trial:
    """One engine's figures. `agreement` is the share of rows with the labels of float32 torch, 0..1."""

    engine: str
    says: str
    serves: bool = False
    tweets_per_second: float | None = None
    agreement: float | None = None
    mean_difference: float | None = None


@dataclass(frozen=True)
class Choice:
    """The engine that serves a model on some hardware, the token budget found for it, and all that was tried."""

    engine: str
    token_budget: int
    hardware: str
    trials: list[Trial]

    @property
    def why(self) -> str:
        return next((trial.says for trial in self.trials if trial.serves), "")


def engines_folder(artifact: Path) -> Path:
    """Beside the artifact, whose own files never change."""
    return artifact.with_name(f"{artifact.name}.engines")


def spare_folder(artifact: Path, spare: Path) -> Path:
    """The same below another folder, where the artifact's own cannot be written."""
    return spare / engines_folder(artifact).name


def read_choice(folder: Path) -> Choice | None:
    try:
        written = json.loads((folder / CHOICE).read_text(encoding="utf-8"))
        return Choice(**{**written, "trials": [Trial(**trial) for trial in written["trials"]]})
    except (OSError, ValueError, TypeError, KeyError):
        return None  # never made, or by another version: made again


def kept_choices(artifact: Path, spare: Path) -> list[Choice]:
    """Of every machine that served this artifact from here."""
    folders = (engines_folder(artifact), spare_folder(artifact, spare))
    found = [read_choice(path) for folder in folders for path in sorted(folder.glob("[!.]*"))]
    return [choice for choice in found if choice is not None]
