"""Models and tweets to measure with. The models are as large as the real ones, without an afternoon of training.

A random encoder tells texts apart by little more than rounding, so its head stays random too; the starter's is fitted.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import BertConfig, BertModel

from tests.support.paths import ROOT
from training.config import TrainConfig, make_config
from training.loop.predict import predict
from training.model.artifact import make_reference, make_spec, save_artifact
from training.model.base_model import STARTER_FOLDER, BaseModelFolder
from training.model.classifier import Classifier, build_model
from training.model.last_layer import FirstPosition
from training.text.cleaning import clean
from training.text.tokenizer import TextEncoder, load_tokenizer

if TYPE_CHECKING:
    from training.data.dataset import Split

SAMPLE_LABELLED = ROOT / "training" / "sample" / "labelled.csv"
LABELS = ["negative", "neutral", "positive"]
CPU = torch.device("cpu")
VOCABULARY = 32_000
# Rows to try engines on: enough to compare them, and fewer than a training keeps, since each costs a float32 forward.
REFERENCE_ROWS = 256
# BERT base; the small form keeps the shape and drops the size.
BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}


def base_artifact(folder: Path, small: bool = False) -> str:
    """A BERT of base size with random weights, saved as an artifact. Returns its sha256."""
    torch.manual_seed(1)
    encoder = BertModel(BertConfig(vocab_size=VOCABULARY, **(SMALL if small else BASE)))
    config = make_config("fast", base_model="random", pooling="pooler")
    return _save(folder, Classifier(encoder, 3, config), config, "random", fit=False)


def starter_artifact(folder: Path) -> str:
    """The starter encoder under a fitted head, saved as an artifact. Returns its sha256."""
    config = make_config("fast", pooling="pooler")
    return _save(
        folder, build_model(BaseModelFolder("starter", STARTER_FOLDER), 3, config), config, "starter", fit=True
    )


def operations(model: Classifier, tokens: int, texts: int) -> int:
    """Multiplications and additions of the encoder's matrix products for so many tokens, padding included, of so many
    texts; attention scores left out.

    A last layer that is computed for the first position alone has one token per text.
    """
    modules = dict(model.network.named_modules())
    short = tuple(f"{name}." for name, module in modules.items() if isinstance(module, FirstPosition))
    return sum(
        2 * module.weight.numel() * (texts if name.startswith(short) else tokens)
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and "pooler" not in name and "classifier" not in name
    )


def _save(folder: Path, model: Classifier, config: TrainConfig, name: str, *, fit: bool) -> str:
    from training.data.dataset import Split, read_rows, split_rows  # needs pandas, which the benchmark of GPUs does not

    tokenizer = load_tokenizer(STARTER_FOLDER)
    encode = TextEncoder(tokenizer)
    data = split_rows(read_rows(SAMPLE_LABELLED), config)

    def rows(split: "Split") -> list[list[int]]:
        return encode([clean(text) for text in split.texts], config.max_length)

    model.eval()
    if fit:
        few = Split(data.train.texts[:600], data.train.targets[:600], data.train.row_numbers[:600])
        _fit_head(model, rows(few), few.targets, config, tokenizer.pad_token_id)
    valid = rows(data.valid)[:REFERENCE_ROWS]
    logits = predict(model, valid, data.valid.targets[:REFERENCE_ROWS], config, 64, tokenizer.pad_token_id, CPU).logits
    spec = make_spec(data.labels, config, BaseModelFolder(name, STARTER_FOLDER), tokenizer)
    return save_artifact(folder, model, tokenizer, spec, make_reference(valid, logits))


def _fit_head(model: Classifier, rows: list[list[int]], targets: np.ndarray, config: TrainConfig, pad_id: int) -> None:
    """Logistic regression over what the untouched encoder says."""
    from sklearn.linear_model import LogisticRegression

    head = model.classifier
    model.classifier = nn.Identity()
    pooled = predict(model, rows, np.zeros((len(rows), head.in_features), np.float32), config, 64, pad_id, CPU).logits
    fitted = LogisticRegression(C=1.0, max_iter=1000).fit(pooled, targets.argmax(axis=1))
    with torch.no_grad():
        head.weight.copy_(torch.from_numpy(fitted.coef_))
        head.bias.copy_(torch.from_numpy(fitted.intercept_))
    model.classifier = head
