"""Encoder and head, batches, the training loop with its checkpoints, figures, TensorBoard, and the artifact."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, precision_score
from tensorboard.backend.event_processing.event_accumulator import GRAPH, IMAGES, EventAccumulator
from torch import nn
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

from tests.conftest import write_labelled
from tests.support.training_loop import CPU, Bench, maker, stop_at
from training.config import make_config
from training.errors import BadArtifact, BadConfig, StopRequested
from training.evaluation.decisions import to_probabilities
from training.evaluation.metrics import metrics
from training.loop.fit import Epoch, Hooks, as_good
from training.loop.predict import loss_function, predict
from training.model.artifact import load_artifact, make_spec, save_artifact
from training.model.base_model import BaseModelFolder
from training.model.batching import pad, shuffled_batches
from training.model.classifier import Classifier, build_model
from training.model.kernels import MASKED, PLAIN, training_kernels

# Dropout and BatchNorm, so that random state and buffers matter, and a learning rate at which every epoch differs.
SENSITIVE = {"preset": "guide", "pooling": "mean", "learning_rate": 1e-2}


@pytest.fixture
def bench(tiny_encoder: Path, labelled_csv: Path) -> Callable[..., Bench]:
    return maker(tiny_encoder, labelled_csv)


@pytest.fixture(scope="module")
def unbroken(tiny_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Epoch]:
    """The epochs of a `SENSITIVE` run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("unbroken")
    made = maker(tiny_encoder, write_labelled(folder / "labelled.csv"))(**SENSITIVE)
    epochs = made.fit(made.model(), folder)
    assert np.abs(np.diff([epoch.valid_loss for epoch in epochs])).min() > 1e-3
    return epochs


def small_bert(hidden_size: int, **options: Any) -> BertModel:
    return BertModel(
        BertConfig(
            vocab_size=50, hidden_size=hidden_size, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        ),
        **options,
    )


def test_the_guides_head_is_768_384_96_24_and_the_labels() -> None:
    head = Classifier(small_bert(768), 3, make_config("guide")).classifier
    linear = [(layer.in_features, layer.out_features) for layer in head if isinstance(layer, nn.Linear)]
    assert linear == [(768, 384), (384, 96), (96, 24), (24, 3)]
    assert [type(layer).__name__ for layer in head] == [
        "Dropout", "Linear", "BatchNorm1d", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear",
    ]  # fmt: skip
    assert {layer.p for layer in head if isinstance(layer, nn.Dropout)} == {0.2}


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_pooling_takes_what_it_names_and_padding_changes_nothing(pooling: str) -> None:
    torch.manual_seed(0)
    model = Classifier(small_bert(16), 2, make_config("fast", pooling=pooling)).eval()
    rows = [[2, 7, 8, 9, 10, 3], [2, 11, 3]]
    with torch.inference_mode():
        together = model(*pad(rows, 0))
        alone = torch.cat([model(*pad([row], 0)) for row in rows])
        output = model.bert(*pad(rows[:1], 0))
        pooled = {
            "pooler": output.pooler_output, "cls": output.last_hidden_state[:, 0],
            "mean": output.last_hidden_state.mean(1),
        }[pooling]  # fmt: skip
        assert torch.allclose(together, alone, atol=1e-6)
        assert torch.allclose(model.classifier(pooled), together[:1], atol=1e-6)


def test_an_encoder_without_a_trained_pooler_is_pooled_by_its_mean_and_refused_if_the_pooler_is_asked_for(
    tmp_path: Path,
) -> None:
    small_bert(16, add_pooling_layer=False).save_pretrained(tmp_path / "bare")
    encoder = BaseModelFolder("bare", tmp_path / "bare")
    with pytest.raises(BadConfig, match="'bare' has no trained pooler; use --pooling auto, mean or cls"):
        build_model(encoder, 2, make_config("fast", pooling="pooler"))
    for preset in ("fast", "guide"):
        assert build_model(encoder, 2, make_config(preset)).config.pooling == "mean"


@pytest.mark.parametrize(("share", "expected"), [(None, 0.1), (0.0, 0.0), (0.3, 0.3)])
def test_dropout_within_the_encoder_is_the_base_models_unless_it_is_set(
    tiny_encoder: Path, share: float | None, expected: float
) -> None:
    config = make_config("fast", encoder_dropout=share, dropout=0.2, pooling="native")
    model = build_model(BaseModelFolder("tiny", tiny_encoder), 3, config)
    found = {name: layer.p for name, layer in model.named_modules() if isinstance(layer, nn.Dropout)}
    head = {name for name in found if "encoder" not in name and "embeddings" not in name}
    assert {found[name] for name in head} == {0.2}
    assert {p for name, p in found.items() if name not in head} == {expected}


@pytest.mark.parametrize(("device", "attention"), [("cpu", PLAIN), ("cuda", MASKED)])
def test_training_uses_the_attention_for_its_device_with_the_same_results_and_ends_with_the_former(
    tiny_encoder: Path, device: str, attention: str
) -> None:
    model = build_model(BaseModelFolder("tiny", tiny_encoder), 3, make_config("fast", pooling="native")).eval()
    padded = torch.tensor([[2, 10, 11, 3, 0], [2, 12, 13, 14, 3]])
    batches = [(ids, (ids != 0).long()) for ids in (padded, padded[:, :4])]
    before = [model(*batch) for batch in batches]
    with training_kernels(model, torch.device(device)):
        assert model.encoder_config._attn_implementation == attention
        for batch, logits in zip(batches, before, strict=True):
            torch.testing.assert_close(model(*batch), logits, atol=1e-5, rtol=1e-4)
    assert model.encoder_config._attn_implementation == "sdpa"


def test_a_max_length_beyond_the_encoder_is_refused(tiny_encoder: Path) -> None:
    with pytest.raises(BadConfig, match="max_length is 513; this base model accepts at most 512"):
        build_model(BaseModelFolder("tiny", tiny_encoder), 2, make_config("fast", max_length=513))


@pytest.mark.parametrize("batch_size", [2, 3, 8, 16])
def test_every_row_comes_once_an_epoch_and_never_alone(batch_size: int) -> None:
    for n in range(2, 300):
        lengths = [5 + i * 7 % 50 for i in range(n)]
        epochs = [shuffled_batches(lengths, batch_size, seed) for seed in (1, 1, 2)]
        assert epochs[0] == epochs[1]
        assert n < 100 or epochs[0] != epochs[2]
        for batches in epochs:
            assert sorted(row for batch in batches for row in batch) == list(range(n))
            assert {len(batch) for batch in batches} <= set(range(2, batch_size + 2))
            assert len(batches) == len(epochs[0])


def test_the_loss_of_an_easy_set_falls_and_the_labels_are_learned(bench: Callable[..., Bench], tmp_path: Path) -> None:
    made = bench(pooling="mean", learning_rate=1e-2)
    epochs = made.fit(made.model(), tmp_path)
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    assert epochs[-1].train_loss < 0.3 * epochs[0].train_loss
    assert epochs[-1].valid_accuracy == epochs[-1].valid_f1_macro == 1.0


def test_the_best_epoch_is_kept_and_not_the_last(bench: Callable[..., Bench], tmp_path: Path) -> None:
    """The validation labels are swapped, so that training makes the validation figure worse."""
    made = bench(pooling="mean", learning_rate=3e-3, epochs=4, precision="float32")
    turned = replace(made.data.valid, targets=1 - made.data.valid.targets)
    model = made.model()
    epochs = made.fit(model, tmp_path, valid=turned)
    kept = [epoch for epoch in epochs if epoch.kept][-1]
    assert kept.epoch < 4
    assert epochs[-1].valid_f1_macro < kept.valid_f1_macro
    left = predict(model, made.rows["valid"], turned.targets, made.config, 4, 0, CPU)
    assert left.loss == pytest.approx(kept.valid_loss, abs=1e-5)


def test_the_same_run_twice_has_the_same_losses(
    bench: Callable[..., Bench], tmp_path: Path, unbroken: list[Epoch]
) -> None:
    made = bench(**SENSITIVE)
    again = made.fit(made.model(), tmp_path)
    for name in ("train_loss", "valid_loss"):
        losses = [[getattr(epoch, name) for epoch in epochs] for epochs in (unbroken, again)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_of_epochs_that_few_rows_cannot_tell_apart_the_later_is_kept() -> None:
    assert as_good(0.88, best=0.9, rows=100)  # one standard error is 0.03
    assert not as_good(0.88, best=0.9, rows=1_000)  # 0.0095
    assert as_good(1.0, best=1.0, rows=10)
    assert not as_good(0.99, best=1.0, rows=10)
    assert as_good(0.0, best=0.0, rows=10)


@pytest.mark.parametrize(
    ("step", "validating"),
    [
        pytest.param(2, False, id="in the first epoch"),
        pytest.param(9, False, id="in the middle of the second epoch"),
        pytest.param(12, False, id="after the last batch of the second epoch"),
        pytest.param(12, True, id="during the second validation"),
    ],
)
def test_a_stopped_run_goes_on_where_it_stood_to_the_result_of_an_unbroken_one(
    bench: Callable[..., Bench], tmp_path: Path, unbroken: list[Epoch], step: int, validating: bool
) -> None:
    made = bench(**SENSITIVE)
    with pytest.raises(StopRequested):
        made.fit(made.model(), tmp_path, hooks=stop_at(step, validating=validating))
    seen: list[int] = []
    resumed = made.fit(made.model(), tmp_path, hooks=Hooks(on_resume=lambda progress: seen.append(progress.step)))
    assert seen == [step]
    assert [epoch.epoch for epoch in resumed] == [1, 2, 3]
    for ours, theirs in zip(resumed, unbroken, strict=True):
        assert ours.valid_loss == pytest.approx(theirs.valid_loss, abs=1e-4)
        assert ours.train_loss == pytest.approx(theirs.train_loss, abs=1e-4)
        assert ours.learning_rate == theirs.learning_rate


def test_a_torn_checkpoint_is_passed_over_aloud_for_the_one_before(
    bench: Callable[..., Bench], tmp_path: Path, unbroken: list[Epoch], caplog: pytest.LogCaptureFixture
) -> None:
    made = bench(**SENSITIVE)
    with pytest.raises(StopRequested):
        made.fit(made.model(), tmp_path, hooks=stop_at(9, validating=False))
    newest = max((tmp_path / "checkpoints").glob("step-*"))
    (newest / "state.pt").write_bytes((newest / "state.pt").read_bytes()[:-30])
    seen: list[int] = []
    with caplog.at_level(logging.WARNING):
        resumed = made.fit(made.model(), tmp_path, hooks=Hooks(on_resume=lambda progress: seen.append(progress.step)))
    assert seen == [6]
    assert f"checkpoint {newest.name} cannot be used" in caplog.text
    assert [e.valid_loss for e in resumed] == pytest.approx([e.valid_loss for e in unbroken], abs=1e-4)


def test_a_checkpoint_whose_best_weights_are_torn_is_passed_over_too(
    bench: Callable[..., Bench], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The validation labels are swapped, so that the first epoch stays the best; then its weights are damaged."""
    made = bench(pooling="mean", learning_rate=1e-2)
    turned = replace(made.data.valid, targets=1 - made.data.valid.targets)
    with pytest.raises(StopRequested):
        made.fit(made.model(), tmp_path, valid=turned, hooks=stop_at(9, validating=False))
    (best,) = (tmp_path / "checkpoints").glob("best-*")
    (best / "model.safetensors").write_bytes(b"torn")
    with caplog.at_level(logging.WARNING):
        resumed = made.fit(made.model(), tmp_path, valid=turned)
    assert caplog.text.count("cannot be used") == 2
    assert [epoch.epoch for epoch in resumed] == [1, 2, 3]


def test_checkpoints_keep_the_newest_two_and_the_best_weights_they_name(
    bench: Callable[..., Bench], tmp_path: Path
) -> None:
    made = bench(pooling="mean", learning_rate=2e-3, epochs=8)
    kept = tmp_path / "checkpoints"
    named: list[set[str]] = []

    def look(_: object) -> None:
        saved = [torch.load(path / "state.pt", weights_only=True) for path in kept.glob("step-*")]
        named.append({state["progress"]["best"] for state in saved})
        assert named[-1] <= {path.name for path in kept.glob("best-*")}
        assert len(saved) <= 2
        assert len(list(kept.glob("best-*"))) <= 2

    made.fit(made.model(), tmp_path, hooks=Hooks(on_epoch=look))
    assert len(named) == 8
    assert len(set.union(*named)) > 1, "more than one epoch was the best in its turn"


def test_the_guides_learning_rate_falls_by_a_quarter_each_epoch(bench: Callable[..., Bench], tmp_path: Path) -> None:
    made = bench("guide", epochs=4, learning_rate=1e-5, train_batch_size=47)  # 48 rows: the last one alone
    rates = [epoch.learning_rate for epoch in made.fit(made.model(), tmp_path)]
    assert rates == pytest.approx([1e-5 * 0.75**epoch for epoch in range(4)], rel=1e-9)


def test_predicting_leaves_batchnorms_statistics_alone_and_keeps_the_rows_order(bench: Callable[..., Bench]) -> None:
    made = bench("guide")
    model = made.model().train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any("running_mean" in name for name in before)
    together = made.predict(model, "train", batch_size=7)
    one_by_one = made.predict(model, "train", batch_size=1)
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert np.allclose(together.probabilities, one_by_one.probabilities, atol=1e-6)
    assert together.loss == pytest.approx(one_by_one.loss, abs=1e-5)


def test_tensorboard_shows_loss_figure_and_graph(bench: Callable[..., Bench], tmp_path: Path) -> None:
    made = bench(epochs=2)
    epochs = made.fit(made.model(), tmp_path)
    events = EventAccumulator(str(tmp_path / "board"), size_guidance={IMAGES: 0}).Reload()
    assert [event.step for event in events.Scalars("training loss")] == list(range(1, 13))
    assert [event.value for event in events.Scalars("validation loss")] == pytest.approx([e.valid_loss for e in epochs])
    assert [event.step for event in events.Images("predictions vs. actuals")] == [6, 12]
    assert events.Tags()[GRAPH]
    assert any("classifier" in node.name for node in events.Graph().node)


def test_metrics_are_sklearns_and_micro_f1_is_accuracy() -> None:
    truth, chosen = [0, 0, 1, 2, 2, 2], [0, 1, 1, 2, 2, 0]
    figures = metrics(
        np.eye(3, dtype=np.float32)[truth], np.eye(3, dtype=np.float32)[chosen], list("abc"), "single_label"
    )
    assert figures["accuracy", ""] == figures["f1_micro", ""] == pytest.approx(accuracy_score(truth, chosen))
    assert figures["accuracy", ""] == pytest.approx(4 / 6)
    assert figures["f1_macro", ""] == pytest.approx(f1_score(truth, chosen, average="macro"))
    assert [figures["precision", label] for label in "abc"] == pytest.approx(
        precision_score(truth, chosen, average=None)
    )
    assert [figures["support", label] for label in "abc"] == [2, 1, 3]


def test_metrics_of_several_labels_count_every_label_by_itself() -> None:
    targets = np.array([[1, 1], [0, 1], [0, 0], [1, 0]], dtype=np.float32)
    probabilities = np.array([[0.9, 0.6], [0.2, 0.4], [0.1, 0.1], [0.5, 0.7]], dtype=np.float32)
    figures = metrics(targets, probabilities, ["a", "b"], "multi_label")
    assert figures["accuracy", ""] == 0.5  # rows that are right in every label
    assert figures["f1_micro", ""] == pytest.approx(2 * 3 / (4 + 4))
    assert (figures["f1", "a"], figures["f1", "b"]) == (1.0, 0.5)


def test_probabilities_of_one_label_sum_to_one_under_bce_and_rise_with_the_sigmoid(bench: Callable[..., Bench]) -> None:
    made = bench("guide", loss="bce")
    scored = made.predict(made.model(), "test")
    assert scored.probabilities.sum(axis=1) == pytest.approx(np.ones(len(made.data.test)), abs=1e-6)
    logits = torch.tensor([[2.0, -1.0], [0.3, 0.4]])
    assert torch.equal(to_probabilities(logits, "single_label").argmax(1), logits.sigmoid().argmax(1))
    assert torch.equal(to_probabilities(logits, "multi_label"), logits.sigmoid())
    assert isinstance(loss_function(made.config), nn.BCEWithLogitsLoss)


@pytest.mark.parametrize("preset", ["guide", "fast"])
def test_an_artifact_gives_the_same_logits_as_the_model_that_was_saved(
    bench: Callable[..., Bench], tmp_path: Path, preset: str
) -> None:
    made = bench(preset)
    model = made.model().train()
    batch = pad(made.rows["train"][:9], 0)
    model(*batch)  # change BatchNorm's statistics from their initial values
    model.eval()
    spec = make_spec(made.data.labels, model.config, made.encoder, made.tokenizer)
    sha256 = save_artifact(tmp_path / "store" / "a", model, made.tokenizer, spec)
    loaded = load_artifact(tmp_path / "store" / "a", sha256)
    with torch.inference_mode():
        assert torch.equal(loaded.model(*batch), model(*batch))
        assert loaded.spec == spec
        if made.config.head == "linear":  # then it is a plain Hugging Face classifier too
            plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "store" / "a").eval()
            assert torch.allclose(plain(*batch).logits, model(*batch), atol=1e-6)
            assert plain.config.id2label == {0: "negative", 1: "positive"}


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [flip_a_byte, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "tweetscore.json", "vocab.txt", "SHA256SUMS"])
def test_an_artifact_with_a_flipped_byte_or_a_missing_file_is_refused(
    tiny_artifact: SimpleNamespace, tmp_path: Path, damage: Callable[[Path], None], name: str
) -> None:
    folder = shutil.copytree(tiny_artifact.folder, tmp_path / "copy")
    load_artifact(folder, tiny_artifact.sha256)
    damage(folder / name)
    with pytest.raises(BadArtifact, match=r"(damaged|sha256 differs|has no SHA256SUMS)"):
        load_artifact(folder, tiny_artifact.sha256)
