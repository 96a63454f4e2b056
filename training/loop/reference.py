"""Reference outputs for a model without validation rows: those of the texts of the sample in this package."""

import random
from collections.abc import Callable

import numpy as np
import torch

from db.errors import plain
from training.data.columns import TEXT_COLUMNS, find_column
from training.data.sample import LABELLED, UNLABELLED
from training.data.table_file import open_table
from training.errors import ModelUnavailable
from training.evaluation.decisions import Floats
from training.loop.predict import predict
from training.model.artifact import REFERENCE_ROWS, Reference, make_reference
from training.model.imported import ImportedClassifier
from training.text.cleaning import clean
from training.text.tokenizer import TextEncoder

# Rows that are run with and without padding, and the difference of logits that counts as none.
PADDING_ROWS, PADDING_TOLERANCE = 16, 1e-3


def sample_texts(limit: int = REFERENCE_ROWS) -> list[str]:
    """Return at most `limit` texts of the sample, drawn at random; the same in every call."""
    texts: dict[str, None] = {}
    for path in (UNLABELLED, LABELLED):
        with open_table(str(path)) as table:
            for _, row in table.rows():
                texts[row[find_column(row, TEXT_COLUMNS)]] = None
    return random.Random(0).sample(list(texts), min(limit, len(texts)))


def sample_reference(
    imported: ImportedClassifier,
    device: torch.device,
    limit: int = REFERENCE_ROWS,
    progress: Callable[[], None] = lambda: None,
) -> Reference:
    """Return the outputs of a classifier for texts of the sample, in float32.

    `progress` is called after each batch. Raises `ModelUnavailable` when the classifier cannot run on the texts, gives
    a value that is not finite, or gives other logits when a text is padded.
    """
    spec, name = imported.spec, plain(imported.spec.base_model)
    texts = [clean(text, spec.cleaner_version) for text in sample_texts(limit)]
    rows = TextEncoder(imported.tokenizer)(texts, spec.config.max_length)
    try:
        logits = _logits(imported, rows, device, progress)
        alone = [_logits(imported, [row], device, progress) for row in rows[:PADDING_ROWS]]
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelUnavailable(f"model {name} cannot classify tweets ({reason}); import another model") from error
    if not np.isfinite(logits).all():
        raise ModelUnavailable(f"model {name} gives logits that are not finite; its weights are damaged: save it again")
    difference = float(np.abs(np.concatenate(alone) - logits[: len(alone)]).max())
    if difference > PADDING_TOLERANCE:
        raise ModelUnavailable(
            f"model {name} gives other logits for a padded text (up to {difference:.3g} off), so its scores would "
            "depend on the other tweets of a batch; correct pad_token_id in its config.json"
        )
    return make_reference(rows, logits)


def _logits(
    imported: ImportedClassifier, rows: list[list[int]], device: torch.device, progress: Callable[[], None]
) -> Floats:
    config = imported.spec.config
    targets = np.zeros((len(rows), len(imported.spec.labels)), np.float32)
    pad_id = imported.tokenizer.pad_token_id
    model = imported.model.to(device)
    return predict(model, rows, targets, config, config.test_batch_size, pad_id, device, progress).logits
