"""Packed rows: every token keeps its text and place, and the logits are those of padded batches."""

import json
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForSequenceClassification, XLMRobertaConfig

from tests.support.classifiers import SMALL, spread
from tests.training.model.test_last_layer import CONFIGS
from training.config import make_config
from training.data.sample import UNLABELLED
from training.model.base_model import STARTER_FOLDER
from training.model.batching import pad
from training.model.classifier import Classifier, NativeClassifier
from training.model.packed_network import PackedNetwork, can_pack
from training.model.packing import ROW_TEXTS, ROW_TOKENS, pack, plan_rows
from training.text.tokenizer import TextEncoder, load_tokenizer

LENGTHS = (3, 7, 32, 22, 9, 13, 2, 2, 4, 5, 6, 7, 32, 32, 32, 128, 1)


def rows_of(lengths: Any, seed: int = 0) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [[int(i) for i in generator.integers(5, 60, length)] for length in lengths]


@given(st.lists(st.integers(1, 60), max_size=300), st.integers(0, 3))
def test_every_token_keeps_its_text_and_its_place(lengths: list[int], more: int) -> None:
    rows = rows_of(lengths)
    plan = plan_rows(lengths, 60)
    assert sorted(text for row in plan for text in row) == list(range(len(rows)))
    assert all(sum(lengths[text] for text in row) <= 60 and len(row) <= ROW_TEXTS for row in plan)
    packed = pack(rows, plan, len(plan) + more, 99, 60)
    used = np.zeros(packed.ids.shape, bool)
    for slot, text in zip(packed.slots, (text for row in plan for text in row), strict=True):
        row, number = divmod(int(slot), ROW_TEXTS)
        place = slice(packed.first[row, number], packed.first[row, number] + lengths[text])
        assert packed.ids[row, place].tolist() == rows[text]
        assert packed.positions[row, place].tolist() == list(range(lengths[text]))
        assert (packed.texts[row, place] == number + 1).all()
        used[row, place] = True
    assert (packed.ids[~used] == 99).all()
    assert not packed.texts[~used].any()
    assert used.sum() == sum(lengths)


def test_a_text_longer_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="129 tokens, and a row 128"):
        plan_rows([5, 129])


def test_rows_of_tweets_are_nearly_full() -> None:
    with UNLABELLED.open(encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line, _ in zip(file, range(2_000), strict=False)]
    lengths = [len(row) for row in TextEncoder(load_tokenizer(STARTER_FOLDER))(texts, 128)]
    began = time.perf_counter()
    plan = plan_rows(lengths)
    assert time.perf_counter() - began < 0.2
    assert sum(lengths) / (ROW_TOKENS * len(plan)) > 0.97


def classifier(architecture: str, pooling: str) -> Classifier:
    torch.manual_seed(5)
    config = make_config("guide" if pooling == "cls" else "fast", pooling=pooling)
    if pooling == "native":
        network = AutoModelForSequenceClassification.from_config(CONFIGS[architecture])
        spread(network)
        return NativeClassifier(network, config).eval()
    encoder = AutoModel.from_config(CONFIGS[architecture])
    model = Classifier(encoder, 3, config)
    spread(model)
    return model.eval()


@pytest.mark.parametrize("pooling", ["native", "pooler", "cls", "mean"])
@pytest.mark.parametrize("architecture", CONFIGS)
def test_logits_are_those_of_padded_batches(architecture: str, pooling: str) -> None:
    if (architecture, pooling) == ("distilbert", "pooler"):
        pytest.skip("DistilBERT has no pooler")
    model = classifier(architecture, pooling)
    rows = rows_of(length for length in LENGTHS if length <= 40)
    plan = plan_rows([len(row) for row in rows])
    packed = pack(rows, plan, len(plan) + 2, 0)
    arrays = [torch.from_numpy(part) for part in (packed.ids, packed.positions, packed.texts, packed.first)]
    with torch.inference_mode():
        every = PackedNetwork(model)(*arrays)
        expected = model(*pad(rows, 0))[[text for row in plan for text in row]]
    assert every.isfinite().all()
    assert expected.std(dim=0).min() > 0.1
    largest = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(every[packed.slots], expected, atol=1e-5 * largest, rtol=1e-5)


def test_other_architectures_are_not_packed() -> None:
    torch.manual_seed(5)
    other = AutoModel.from_config(XLMRobertaConfig(vocab_size=64, pad_token_id=0, **SMALL))
    model = Classifier(other, 3, make_config("fast", pooling="mean"))
    assert not can_pack(model)
    with pytest.raises(ValueError, match="xlm-roberta cannot be packed"):
        PackedNetwork(model)
