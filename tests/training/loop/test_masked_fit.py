"""The training loop of a masked language model: stopped anywhere, it is resumed to the same end."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.training_loop import CPU
from training.config import make_adapt_config
from training.errors import StopRequested
from training.loop import masked_fit as loop
from training.loop.checkpoints import Checkpoints
from training.loop.masked_fit import Losses, MaskedFitInputs, OnStep, masked_fit
from training.model.base_model import BaseModelFolder
from training.model.language_model import LanguageModel, build_language_model
from training.model.masking import Masking
from training.text.tokenizer import encode, load_tokenizer

NOUNS = ("電車", "猫", "天気", "仕事")
TEXTS = [f"{noun}が{end}になった{mark}" for noun in NOUNS for end in ("遅れ", "元気", "雨") for mark in "。！？"]


def fit(encoder: Path, folder: Path, on_step: OnStep = lambda *_: None) -> tuple[Losses, LanguageModel]:
    tokenizer = load_tokenizer(encoder)
    config = make_adapt_config(epochs=2, train_batch_size=8, learning_rate=3e-3, max_length=32)
    rows = [np.array(ids, np.int32) for ids in encode(tokenizer, TEXTS, config.max_length)]
    model = build_language_model(BaseModelFolder("tiny", encoder), tokenizer, config).model
    inputs = MaskedFitInputs(rows[4:], rows[:4], Masking(tokenizer, config.mask_share), config, tokenizer.pad_token_id)
    losses = masked_fit(model, inputs, device=CPU, checkpoints=Checkpoints(folder), on_step=on_step)
    return losses, model


@pytest.fixture(scope="module")
def unbroken(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Losses, LanguageModel]:
    return fit(tiny_encoder, tmp_path_factory.mktemp("unbroken"))


@pytest.mark.parametrize(
    ("step", "measuring"),
    [(0, True), (2, False), (4, True)],
    ids=["before the first step", "in the first epoch", "while its loss is measured"],
)
def test_a_stopped_run_goes_on_to_the_result_of_an_unbroken_one(
    tiny_encoder: Path, tmp_path: Path, unbroken: tuple[Losses, LanguageModel], step: int, measuring: bool
) -> None:
    def stop(at: int, _total: int, loss: float | None, _rate: float | None) -> None:
        if at == step and measuring == (loss is None):
            raise StopRequested

    with pytest.raises(StopRequested):
        fit(tiny_encoder, tmp_path / "broken", stop)
    steps: list[int] = []
    losses, model = fit(tiny_encoder, tmp_path / "broken", lambda at, *_: steps.append(at))
    assert losses == unbroken[0]
    assert (steps[0], steps[-1]) == (step, 8)
    for name, weight in model.network.state_dict().items():
        assert torch.equal(weight, unbroken[1].network.state_dict()[name]), name


def test_a_long_epoch_has_checkpoints_within_it(
    tiny_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)

    def fail(at: int, *_: object) -> None:
        if at == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_encoder, tmp_path, fail)
    assert [path.name.split("-")[1] for path in sorted(tmp_path.glob("step-*"))] == ["00000001", "00000002"]
