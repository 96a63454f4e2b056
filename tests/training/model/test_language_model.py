"""The masked language model of every shape of encoder, and the choice of the tokens that it must predict."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DebertaV2Config,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertModel,
    GPT2Config,
    GPT2Model,
    ModernBertConfig,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
)

from training.config import make_adapt_config
from training.errors import ModelUnavailable
from training.model.base_model import STARTER_FOLDER, BaseModelFolder
from training.model.language_model import Built, build_language_model, save_encoder
from training.model.masking import Masking
from training.text.tokenizer import encode, load_tokenizer

SMALL = {"vocab_size": 8000, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 64}
SHAPES: dict[str, Any] = {
    "bert": lambda: BertModel(BertConfig(**SMALL)),
    "bert without a pooler": lambda: BertModel(BertConfig(**SMALL), add_pooling_layer=False),
    "bert with a head of its own": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "bert with untied embeddings": lambda: BertModel(BertConfig(**SMALL, tie_word_embeddings=False)),
    "distilbert": lambda: DistilBertModel(
        DistilBertConfig(vocab_size=8000, dim=32, n_layers=2, n_heads=2, hidden_dim=64)
    ),
    "roberta": lambda: RobertaModel(RobertaConfig(**SMALL, max_position_embeddings=202, pad_token_id=0)),
    "deberta-v2": lambda: DebertaV2Model(
        DebertaV2Config(**SMALL, relative_attention=True, pos_att_type=["p2c", "c2p"])
    ),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**SMALL, pad_token_id=0, cls_token_id=2, sep_token_id=3)),
}
ORDINARY = ("bert", "bert with untied embeddings", "distilbert")
TOKENIZER = load_tokenizer(STARTER_FOLDER)


def built_from(model: Any, folder: Path) -> Built:
    model.save_pretrained(folder)
    TOKENIZER.save_pretrained(str(folder))
    return build_language_model(BaseModelFolder("tiny", folder), TOKENIZER, make_adapt_config())


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ORDINARY else pytest.mark.slow) for name in SHAPES]
)
def test_every_shape_predicts_the_chosen_tokens_and_is_saved_as_an_encoder(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = SHAPES[name]()
    built = built_from(given, tmp_path / "base")
    model, network = built.model.eval(), built.model.network
    assert built.new_head == (name != "bert with a head of its own")
    ids = torch.randint(5, 8000, (3, 9), generator=torch.Generator().manual_seed(0))
    chosen = torch.rand((3, 9), generator=torch.Generator().manual_seed(1)) < 0.4
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        logits = model(ids, mask, chosen.flatten().nonzero().flatten())
        assert torch.allclose(logits, network(input_ids=ids, attention_mask=mask).logits[chosen], atol=1e-5)
    embeddings = network.get_input_embeddings().weight
    assert network.get_output_embeddings().weight is embeddings  # the head is tied
    with torch.no_grad():
        embeddings.add_(1)
    (tmp_path / "adapted").mkdir()
    save_encoder(tmp_path / "adapted", model, TOKENIZER)
    adapted, info = AutoModel.from_pretrained(tmp_path / "adapted", output_loading_info=True)
    had_pooler = name == "bert" or name in ("bert with untied embeddings", "roberta")
    assert all("pooler" in key for key in info["missing_keys"])
    assert not (had_pooler and info["missing_keys"])
    before, after = getattr(given, "base_model", given).state_dict(), adapted.state_dict()
    moved = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(moved) == 1
    assert torch.equal(after[moved[0]], before[moved[0]] + 1)


def test_an_architecture_without_masked_language_modelling_is_refused(tmp_path: Path) -> None:
    gpt2 = GPT2Model(GPT2Config(vocab_size=8000, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ModelUnavailable, match="'tiny' has the architecture gpt2, which cannot be trained on masked"):
        built_from(gpt2, tmp_path)


@pytest.fixture(scope="module")
def rows() -> list[np.ndarray]:
    texts = [f"今日は電車が遅れて大変だった、明日は映画を見に行きたいと思っています{i}" for i in range(300)]
    return [np.array(ids, np.int32) for ids in encode(TOKENIZER, texts, 64)]


def test_fifteen_percent_are_chosen_and_most_of_them_hidden_and_the_same_seed_gives_the_same(
    rows: list[np.ndarray],
) -> None:
    masking = Masking(TOKENIZER, 0.15)
    masked = [masking(row, 7, 1, i) for i, row in enumerate(rows)]
    again = [masking(row, 7, 1, i) for i, row in enumerate(rows)]
    other = [masking(row, 7, 2, i) for i, row in enumerate(rows)]
    assert all((a == b).all() and (x == y).all() for (a, x), (b, y) in zip(masked, again, strict=True))
    assert any((x != y).any() for (_, x), (_, y) in zip(masked, other, strict=True))
    given, ids = np.concatenate(rows), np.concatenate([ids for ids, _ in masked])
    chosen = np.concatenate([chosen for _, chosen in masked])
    special = np.isin(given, TOKENIZER.all_special_ids)
    assert not chosen[special].any()
    assert (ids[~chosen] == given[~chosen]).all()
    assert chosen[~special].mean() == pytest.approx(0.15, abs=0.02)
    hidden = ids[chosen] == TOKENIZER.mask_token_id
    changed = ids[chosen] != given[chosen]
    assert hidden.mean() == pytest.approx(0.8, abs=0.04)
    assert (changed & ~hidden).mean() == pytest.approx(0.1, abs=0.03)
    assert not np.isin(ids[chosen][changed & ~hidden], TOKENIZER.all_special_ids).any()


def test_the_pieces_of_a_word_are_chosen_together(rows: list[np.ndarray]) -> None:
    masking = Masking(TOKENIZER, 0.15)
    split = 0
    for i, row in enumerate(rows):
        _, chosen = masking(row, i)
        names = TOKENIZER.convert_ids_to_tokens(row.tolist())
        for at, name in enumerate(names):
            if name.startswith("##"):
                split += 1
                assert chosen[at] == chosen[at - 1]
        assert chosen.any()
    assert split > 100


def test_a_text_of_unknown_words_has_nothing_to_predict() -> None:
    row = [TOKENIZER.cls_token_id, TOKENIZER.unk_token_id, TOKENIZER.sep_token_id]
    ids, chosen = Masking(TOKENIZER, 0.15)(row, 0)
    assert (ids.tolist(), chosen.any()) == (row, False)
