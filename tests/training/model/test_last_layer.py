"""The last layer for the first position only, and the kernels of training, beside those of plain transformers."""

import copy
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    PretrainedConfig,
    RobertaConfig,
)
from transformers.models.bert.modeling_bert import BertLayer

from tests.support.classifiers import SMALL, spread
from training.config import make_config
from training.model.batching import Batch, pad
from training.model.classifier import Classifier, NativeClassifier
from training.model.dropout import FastDropout
from training.model.kernels import training_kernels
from training.model.last_layer import FirstPosition
from worker.engines.engines import EngineBuilder

CPU = torch.device("cpu")
# Without dropout, so that two forwards in training give the same.
CONFIGS: dict[str, PretrainedConfig] = {
    "bert": BertConfig(vocab_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SMALL),
    "roberta": RobertaConfig(
        vocab_size=64, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SMALL
    ),
    "distilbert": DistilBertConfig(
        vocab_size=64, dim=32, n_layers=2, n_heads=2, hidden_dim=64, dropout=0.0, attention_dropout=0.0,
        seq_classif_dropout=0.0,
    ),
}  # fmt: skip
IDS, MASK = pad([[2, 7, 8, 9, 10, 11, 3], [2, 12, 3], [2, 3], [2, *range(20, 42), 3]], 0)


def first_position_layers(model: nn.Module) -> list[nn.Module]:
    return [layer for layer in model.modules() if isinstance(layer, FirstPosition)]


@pytest.fixture(params=CONFIGS)
def networks(request: pytest.FixtureRequest) -> tuple[NativeClassifier, Any]:
    """A classifier of tweetscore, and the same network untouched."""
    torch.manual_seed(5)
    plain = AutoModelForSequenceClassification.from_config(CONFIGS[request.param])
    spread(plain)
    ours = NativeClassifier(copy.deepcopy(plain), make_config("fast", pooling="native"))
    assert len(first_position_layers(ours)) == 1
    assert ours.network.state_dict().keys() == plain.state_dict().keys()
    return ours, plain


def test_logits_and_exported_graphs_are_those_of_plain_transformers(networks: tuple[NativeClassifier, Any]) -> None:
    ours, plain = networks
    ours.eval()
    plain.eval()
    with torch.inference_mode():
        expected = plain(input_ids=IDS, attention_mask=MASK).logits
        assert expected.std(dim=0).min() > 0.1
        torch.testing.assert_close(ours(IDS, MASK), expected, atol=1e-5, rtol=1e-5)
        alone = torch.cat([ours(IDS[[i], : MASK[i].sum()], MASK[[i], : MASK[i].sum()]) for i in range(len(IDS))])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=1e-5)
    builder, batch = EngineBuilder(ours, CPU), Batch((IDS.numpy(), MASK.numpy()), list(range(4)), IDS.numel(), True)
    for name, tolerance in (("torch-float32", 1e-5), ("openvino-float32", 1e-4), ("openvino-int8", 0.05)):
        [logits] = builder.build(name).run([batch])
        assert np.abs(logits - expected.numpy()).max() <= tolerance * float(expected.abs().max()), name


@pytest.mark.parametrize("kernels", ["of training", "of transformers"])
def test_gradients_are_those_of_plain_transformers(networks: tuple[NativeClassifier, Any], kernels: str) -> None:
    ours, plain = networks
    targets = torch.tensor([0, 1, 0, 1])
    with training_kernels(ours, CPU) if kernels == "of training" else nullcontext():
        nn.functional.cross_entropy(ours.train()(IDS, MASK), targets).backward()  # type: ignore[no-untyped-call]
    plain.train()(input_ids=IDS, attention_mask=MASK, labels=targets).loss.backward()
    found = {name: weight.grad for name, weight in ours.network.named_parameters()}
    for name, weight in plain.named_parameters():
        if weight.grad is not None:  # that of a key's bias is 0 but for rounding
            gradient = torch.zeros_like(weight) if found[name] is None else found[name]
            torch.testing.assert_close(gradient, weight.grad, atol=1e-5, rtol=1e-4, msg=name)
    without = [name for name, gradient in found.items() if gradient is None]
    assert all("key.bias" in name or "k_lin.bias" in name for name in without)


@pytest.mark.parametrize("pooling", ["cls", "pooler", "mean"])
def test_our_own_head_gets_the_same_of_the_encoder_and_the_mean_needs_all_positions(pooling: str) -> None:
    torch.manual_seed(5)
    encoder = AutoModel.from_config(CONFIGS["bert"])
    model = Classifier(copy.deepcopy(encoder), 3, make_config("fast", pooling=pooling)).eval()
    layer = model.get_submodule("bert.encoder.layer.1")
    assert (type(layer) is BertLayer) == (pooling == "mean")
    assert bool(first_position_layers(copy.deepcopy(model))) == (pooling != "mean")
    with torch.inference_mode():
        output = encoder.eval()(input_ids=IDS, attention_mask=MASK)
        states = output.last_hidden_state
        pooled = {
            "cls": states[:, 0], "pooler": output.pooler_output,
            "mean": (states * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True),
        }[pooling]  # fmt: skip
        torch.testing.assert_close(model(IDS, MASK), model.classifier(pooled), atol=1e-5, rtol=1e-5)


def test_a_decoder_and_other_architectures_keep_their_layers() -> None:
    config = make_config("fast", pooling="native")
    decoder = copy.deepcopy(CONFIGS["bert"])
    decoder.is_decoder = True
    assert not first_position_layers(NativeClassifier(AutoModelForSequenceClassification.from_config(decoder), config))


def test_training_drops_the_share_asked_for_and_keeps_the_mean() -> None:
    model = nn.Sequential(nn.Dropout(0.25))
    values = torch.ones(101, 1003, requires_grad=True)
    with training_kernels(model, CPU):
        assert type(model[0]) is FastDropout
        torch.manual_seed(1)
        dropped = model(values)
        torch.manual_seed(1)
        assert torch.equal(model(values), dropped)
        assert not torch.equal(model(values), dropped)
        assert model.eval()(values) is values
    assert type(model[0]) is nn.Dropout
    dropped.sum().backward()
    assert values.grad is not None
    assert torch.equal(values.grad, dropped)
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75])
    # Six standard errors of a share of 101,303 values. Rows and columns are independent of their neighbours.
    kept = (dropped > 0).float()
    assert float(kept.mean()) == pytest.approx(0.75, abs=0.009)
    for a, b in ((kept[:-1], kept[1:]), (kept[:, :-1], kept[:, 1:])):
        assert float((a * b).mean()) == pytest.approx(0.75**2, abs=0.012)
