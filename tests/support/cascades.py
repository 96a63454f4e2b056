"""A student and a teacher, untrained and small: the student is the teacher with noise, so it errs where it is unsure.

Their labels are in different orders and their cleaners differ, so the teacher must read the tweets themselves. Rows are
labelled as the teacher labels them, which makes its macro-F1 1.
"""

import copy
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from db import registry
from db.models import ModelVersion
from db.session import Database
from tests.conftest import LABELS
from tests.support.classifiers import spread
from training.config import make_config
from training.data.sample import LABELLED
from training.data.table_file import open_table
from training.loop.logits import logits_of
from training.model.artifact import load_artifact, make_spec, save_artifact
from training.model.base_model import BaseModelFolder
from training.model.classifier import Classifier, build_model
from training.store.cache import Cache
from training.store.store import Store
from training.text.cleaning import clean
from training.text.tokenizer import TextEncoder, load_tokenizer
from worker.engines.engine_choice import Choice
from worker.engines.engines import TorchEngine
from worker.intake.make_cascade import MadeCascade, make_cascade
from worker.scoring.scoring_model import ScoringModel
from worker.settings import Settings

CPU = torch.device("cpu")
NOISE = 0.5
LOGIT_SPREAD = 3.0


@dataclass(frozen=True)
class Pair:
    """Two registered versions in the model store of `settings`, and a labelled file."""

    settings: Settings
    database: Database
    student: int
    teacher: int
    file: Path

    def model(self, version_id: int) -> ScoringModel:
        """One of them alone, on float32 torch."""
        with self.database.read() as session:
            version = registry.get(session, version_id)
        folder = Store(self.settings.home / "models", Cache(Path("/nowhere"), 0)).place(
            version.artifact_url, version.sha256
        )
        return scoring(version, folder)

    def cascade(self, keep: float = 0.9, bound: str = "estimate") -> MadeCascade:
        return make_cascade(self.settings, self.database, self.student, self.teacher, keep, bound, str(self.file))


def scoring(version: ModelVersion, folder: Path) -> ScoringModel:
    artifact = load_artifact(folder, version.sha256)
    engine = TorchEngine(artifact.model, CPU, torch.float32)
    return ScoringModel(version.id, artifact, engine, Choice(engine.name, 512, "", []))


def tweets(count: int) -> list[str]:
    """Different texts of the sample, with marks that the two cleaners treat differently."""
    with open_table(str(LABELLED)) as table:
        texts = [row["text"] for _, row in table.rows()]
    return [f"#猫{text}！！！！！" for text in random.Random(0).sample(sorted(set(texts)), count)]


def _classifier(model: Classifier) -> Any:
    return next(module for name, module in model.named_modules() if name.endswith("classifier"))


def make_pair(settings: Settings, database: Database, encoder: Path, rows: int = 300) -> Pair:
    """Save and register both, and label tweets."""
    base, store = BaseModelFolder(str(encoder), encoder), settings.home / "models"
    configs = {
        "teacher": make_config("fast", base_model=str(encoder), cleaner="2"),
        "student": make_config("fast", base_model=str(encoder), cleaner="1"),
    }
    tokenizer = load_tokenizer(encoder)
    teacher = build_model(base, len(LABELS), configs["teacher"])
    spread(teacher.network)
    texts = tweets(rows)
    ids = TextEncoder(tokenizer)([clean(text) for text in texts], teacher.config.max_length)
    student = copy.deepcopy(teacher)
    torch.manual_seed(5)
    with torch.no_grad():
        noisy = _classifier(student)
        noisy.weight.add_(NOISE * noisy.weight.std() * torch.randn_like(noisy.weight))
        for model in (teacher, student):  # each label is given about as often
            logits = logits_of(model, ids, tokenizer.pad_token_id, CPU)
            scale = LOGIT_SPREAD / float((logits - logits.mean(axis=0)).std())
            _classifier(model).weight.mul_(scale)
            _classifier(model).bias.copy_(torch.from_numpy(-scale * logits.mean(axis=0)))
        for parameter in noisy.parameters():
            parameter.copy_(parameter.flip(0))
    found: dict[str, ModelVersion] = {}
    for name, model in (("student", student), ("teacher", teacher)):
        labels = LABELS if name == "teacher" else LABELS[::-1]
        config = model.config.model_copy(update={"cleaner": configs[name].cleaner})
        sha256 = save_artifact(store / name, model, tokenizer, make_spec(labels, config, base, tokenizer, 2.0))
        version = ModelVersion(
            base_model=name, artifact_url=(store / name).as_uri(), sha256=sha256, labels=labels,
            cleaner_version=config.cleaner, temperature=2.0,
        )  # fmt: skip
        with database.begin() as session:
            found[name] = registry.add_version(session, version, [], [], [])
    scored = scoring(found["teacher"], store / "teacher").score(texts)
    file = settings.home / "labelled.csv"
    lines = [f'{row["label"]},"{text}"' for row, text in zip(scored, texts, strict=True) if '"' not in text]
    file.write_text("label,text\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return Pair(settings, database, found["student"].id, found["teacher"].id, file)
