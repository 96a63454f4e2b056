"""SetFit as a peer of the benchmark of labels: few-shot fine-tuning of a sentence encoder, in its own environment."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from training.evaluation.decisions import Floats

# setfit 1.1 needs transformers 4, so it cannot share the project's environment.
PINS = ("setfit==1.1.3", "torch==2.13.0", "transformers==4.48.3", "fugashi", "ipadic")
PROGRAM = """
import json, sys
asked = json.load(sys.stdin)
from datasets import Dataset
from sentence_transformers import SentenceTransformer, models
from setfit import SetFitModel, Trainer, TrainingArguments
from sklearn.linear_model import LogisticRegression

word = models.Transformer(asked["folder"])
body = SentenceTransformer(modules=[word, models.Pooling(word.get_word_embedding_dimension())], device="cpu")
model = SetFitModel(model_body=body, model_head=LogisticRegression(max_iter=1000), labels=asked["labels"])
data = Dataset.from_dict({"text": asked["texts"], "label": asked["targets"]})
arguments = TrainingArguments(
    batch_size=16, num_epochs=1, max_steps=asked["steps"], seed=asked["seed"], output_dir=asked["scratch"],
    report_to="none", save_strategy="no",
)
Trainer(model=model, args=arguments, train_dataset=data).train()
probabilities = model.predict_proba(asked["test"], as_numpy=True)
print(json.dumps({"answer": probabilities.tolist(), "classes": [int(c) for c in model.model_head.classes_]}))
"""
# SetFit pairs all texts with each other; with more labels it would train for hours on two cores.
STEPS = 200


class CannotInstall(RuntimeError):
    """SetFit does not install on this machine."""


@cache
def environment() -> Path:
    """The Python of an environment with SetFit. Raises `CannotInstall`."""
    folder = Path(tempfile.gettempdir()) / "tweetscore-setfit"
    python = folder / "bin" / "python"
    if (folder / "ready").exists():
        return python
    for command in ([sys.executable, "-m", "venv", str(folder)], [str(python), "-m", "pip", "install", "-q", *PINS]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CannotInstall(f"it does not install: {done.stderr.strip().splitlines()[-1]}")
    (folder / "ready").touch()
    return python


def fitted(
    folder: Path, texts: Sequence[str], targets: Sequence[int], test: Sequence[str], labels: list[str], seed: int
) -> Floats:
    """Log-probabilities (N, K) of the test texts from SetFit on texts and the indices of their labels."""
    with tempfile.TemporaryDirectory() as scratch:
        asked = {
            "folder": str(folder), "texts": list(texts), "targets": list(targets), "labels": labels,
            "test": list(test), "seed": seed, "steps": STEPS, "scratch": scratch,
        }  # fmt: skip
        done = subprocess.run(
            [environment(), "-c", PROGRAM], input=json.dumps(asked), capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHONPATH": ""}, cwd=scratch,
        )  # fmt: skip
    if done.returncode:
        raise CannotInstall(f"it fails: {done.stderr.strip().splitlines()[-1]}")
    answered = json.loads(done.stdout.strip().splitlines()[-1])
    scores = np.full((len(test), len(labels)), -20.0, np.float32)
    scores[:, answered["classes"]] = np.log(np.clip(np.array(answered["answer"]), 1e-9, 1))
    return scores
