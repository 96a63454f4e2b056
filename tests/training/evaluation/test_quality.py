"""Figures an expert would sign: calibration, intervals, ranking, baselines, the card and its pictures."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from matplotlib import image
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, f1_score
from sklearn.metrics import log_loss as reference_log_loss
from sklearn.multiclass import OneVsRestClassifier

from training import failpoint
from training.config import make_config
from training.data.dataset import Dataset, Split
from training.evaluation import baselines as baselines_module
from training.evaluation.baselines import STRENGTHS, baselines, majority, tfidf
from training.evaluation.calibration import brier_score, calibration_error, fit_temperature, log_loss, reliability_bins
from training.evaluation.decisions import choose, to_probabilities
from training.evaluation.epoch import Epoch
from training.evaluation.metrics import mcnemar, model_figures
from training.model.artifact import Spec
from training.reporting import plots
from training.reporting.model_card import write_card
from training.reporting.training_result import TrainingResult

JAPANESE = ["否定", "中立", "肯定"]
SINGLE, SEVERAL = "single_label", "multi_label"


def drawn(rows: int, labels: int, sharpness: float, seed: int = 0) -> tuple[Any, Any]:
    """Targets (N, K) drawn by the probabilities of logits (N, K), and those logits times `sharpness`."""
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(rows, labels)).astype(np.float32) * 2
    probabilities = to_probabilities(torch.from_numpy(logits), SINGLE).numpy()
    chosen = [generator.choice(labels, p=row / row.sum()) for row in probabilities.astype(np.float64)]
    return np.eye(labels, dtype=np.float32)[chosen], logits * sharpness


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_temperature_undoes_what_made_a_model_too_sure_or_not_sure_enough(sharpness: float) -> None:
    targets, logits = drawn(4_000, 3, sharpness)
    temperature = fit_temperature(logits, targets, SINGLE)
    assert temperature == pytest.approx(sharpness, rel=0.08)
    errors = [
        calibration_error(targets, to_probabilities(torch.from_numpy(logits), SINGLE, t).numpy(), SINGLE)
        for t in (1.0, temperature)
    ]
    assert errors[1] < 0.025
    assert errors[1] <= errors[0] + 0.005


def test_the_temperature_of_several_labels_a_row_is_fitted_on_every_yes_and_no() -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(size=(4_000, 2)).astype(np.float32)
    targets = (generator.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    assert fit_temperature(4 * logits, targets, SEVERAL) == pytest.approx(4, rel=0.1)


def test_a_handful_of_rows_that_are_all_right_does_not_make_a_model_certain() -> None:
    targets = np.eye(2, dtype=np.float32)[[0, 1, 0, 1]]
    assert 0.2 < fit_temperature(targets * 2, targets, SINGLE) < 1


def test_log_loss_and_brier_are_scikit_learns() -> None:
    for labels in (2, 3):
        targets, logits = drawn(200, labels, 1.0)
        said = to_probabilities(torch.from_numpy(logits), SINGLE).numpy()
        truth = targets.argmax(1)
        assert log_loss(targets, said, SINGLE) == pytest.approx(reference_log_loss(truth, said), abs=1e-5)
        wanted = brier_score_loss(truth, said if labels > 2 else said[:, 1])
        assert brier_score(targets, said, SINGLE) == pytest.approx(wanted, abs=1e-5)
    certain = np.eye(2, dtype=np.float32)
    assert np.isfinite(log_loss(certain, 1 - certain, SINGLE))  # sure and wrong is bad, not infinite


def test_calibration_error_is_the_distance_between_confidence_and_share_right_weighed_by_rows() -> None:
    # Three rows at 0.9 of which two are right, one at 0.6 that is wrong.
    said = np.array([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9], [0.6, 0.4]], np.float32)
    targets = np.eye(2, dtype=np.float32)[[0, 0, 0, 1]]
    assert [(n, round(r, 4)) for n, _, r in reliability_bins(targets, said, SINGLE)] == [(1, 0.0), (3, 0.6667)]
    assert calibration_error(targets, said, SINGLE) == pytest.approx((3 * (0.9 - 2 / 3) + 0.6) / 4, abs=1e-6)


def test_bootstrap_intervals_hold_the_figure_and_narrow_with_more_rows() -> None:
    widths = []
    for rows in (100, 1600):
        targets, logits = drawn(rows, 3, 1.0)
        figures = model_figures(targets, logits, 1.0, JAPANESE, make_config("fast"))
        for name in ("accuracy", "f1_macro"):
            assert figures[f"{name}_low", ""] < figures[name, ""] < figures[f"{name}_high", ""]
        share = figures["accuracy", ""]
        widths.append(figures["accuracy_high", ""] - figures["accuracy_low", ""])
        assert widths[-1] == pytest.approx(2 * 1.96 * np.sqrt(share * (1 - share) / rows), rel=0.15)
    assert widths[1] < widths[0] / 3
    again = model_figures(targets, logits, 1.0, JAPANESE, make_config("fast"))
    assert again == figures  # seeded


def test_a_perfect_model_has_perfect_figures_and_a_label_nobody_has_is_not_ranked() -> None:
    targets = np.eye(3, dtype=np.float32)[[0, 1] * 20]
    figures = model_figures(targets, 50 * targets, 1.0, JAPANESE, make_config("fast"))
    assert (figures["roc_auc", ""], figures["average_precision", "中立"]) == (1.0, 1.0)
    assert ("roc_auc", "肯定") not in figures
    assert figures["log_loss", ""] == pytest.approx(0, abs=1e-6)
    assert figures["f1_macro", ""] == pytest.approx(2 / 3)
    assert (figures["f1_macro_low", ""], figures["f1_macro_high", ""]) == pytest.approx((2 / 3, 2 / 3))


def splits(targets: Any) -> Dataset:
    texts = [f"今日は{'嬉しい' if row[0] else '悲しい'}日{i}" for i, row in enumerate(targets)]
    split = Split(texts, targets, list(range(len(texts))))
    return Dataset(JAPANESE[: targets.shape[1]], split, split, split)


def test_the_majority_gives_every_row_the_commonest_training_label() -> None:
    data = splits(np.eye(2, dtype=np.float32)[[0, 0, 0, 1]])
    assert majority(data.train, data.test).tolist() == [[0.75, 0.25]] * 4
    figures, notes = baselines(data, SINGLE)
    assert notes == []
    assert figures["majority_accuracy", ""] == 0.75
    assert figures["tfidf_accuracy", ""] == 1.0
    assert ("majority_support", "否定") not in figures


def random_splits(rows: int, labels: int = 3) -> Dataset:
    generator = np.random.default_rng(0)
    names = [f"label {k}" for k in range(labels)]

    def split(count: int) -> Split:
        of = generator.integers(0, labels, count)
        texts = [f"{'晴雨雪風雲霧'[k] * 2}が{generator.integers(10**9)}回続く" for k in of]
        return Split(texts, np.eye(labels, dtype=np.float32)[of], list(range(count)))

    return Dataset(names, split(rows), split(rows // 8), split(rows // 8))


@pytest.mark.parametrize("task", [SINGLE, SEVERAL])
def test_the_figures_of_a_dataset_of_ordinary_size_are_those_of_plain_tfidf(task: str) -> None:
    data = random_splits(160)
    vectorizer = TfidfVectorizer(analyzer="char", ngram_range=(1, 4), sublinear_tf=True)
    x_train, x_valid, x_test = (
        vectorizer.fit_transform(data.train.texts), *map(vectorizer.transform, (data.valid.texts, data.test.texts))
    )  # fmt: skip
    tried = []
    for strength in STRENGTHS:
        plain = LogisticRegression(C=strength, max_iter=1000)
        plain = plain if task == SINGLE else OneVsRestClassifier(plain)
        plain.fit(x_train, data.train.targets.argmax(axis=1) if task == SINGLE else data.train.targets)
        chosen = choose(np.asarray(plain.predict_proba(x_valid), dtype=np.float32), task)
        quality = f1_score(data.valid.targets, chosen, average="macro", zero_division=0)
        tried.append((quality, -strength, plain.predict_proba(x_test).astype(np.float32)))
    said, notes = tfidf(data.train, data.valid, data.test, task)
    assert notes == []
    assert (said == max(tried, key=lambda found: found[:2])[2]).all()


def test_a_large_dataset_is_fitted_on_a_part_drawn_by_the_seed_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_splits(800)
    characters = sum(map(len, data.train.texts))
    monkeypatch.setattr(baselines_module, "MAX_CHARACTERS", characters // 40)
    monkeypatch.setattr(baselines_module, "MAX_WEIGHTS", 300)
    figures, (note,) = baselines(data, SINGLE, seed=1)
    assert baselines(data, SINGLE, seed=1) == (figures, [note])
    assert figures["tfidf_accuracy", ""] > 0.9
    assert re.fullmatch(
        r"the tfidf baseline was limited to (19|20|21) of 800 training rows, sampled with the job's seed and the 100 "
        "most frequent features, to bound its memory", note,
    )  # fmt: skip


def test_a_label_that_no_drawn_row_has_is_given_no_probability(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_splits(400)
    rare = np.eye(4, dtype=np.float32)[[*data.train.targets.argmax(axis=1)[:-1], 3]]
    train = replace(data.train, targets=rare)
    monkeypatch.setattr(baselines_module, "MAX_CHARACTERS", 200)
    said, notes = tfidf(train, train, data.test, SINGLE)
    assert said.shape == (len(data.test), 4)
    assert (said[:, 3] == 0).all()
    assert len(notes) == 1


def test_a_baseline_without_memory_costs_a_note_and_no_other_figure() -> None:
    failpoint.arm("baseline=full~tfidf")
    try:
        figures, notes = baselines(random_splits(80), SINGLE)
    finally:
        failpoint.arm("")
    assert notes == ["the tfidf baseline failed (MemoryError); its figures are missing"]
    assert {name.partition("_")[0] for name, _ in figures} == {"majority"}


def test_mcnemar_is_chance_for_equals_and_none_for_a_landslide() -> None:
    assert (mcnemar(0, 0), mcnemar(7, 7)) == (1.0, 1.0)
    assert mcnemar(0, 10) == pytest.approx(2 / 2**10)


def outcome_of(labels: list[str], task: str = SINGLE, base_model: str = "starter", **settings: Any) -> TrainingResult:
    generator = np.random.default_rng(0)
    targets = np.eye(len(labels), dtype=np.float32)[generator.integers(0, len(labels), 60)]
    if task == SEVERAL:
        targets = (generator.random((60, len(labels))) < 0.4).astype(np.float32)
    logits = (2 * targets + generator.normal(size=targets.shape)).astype(np.float32)
    loss = "bce" if task == SEVERAL else "cross_entropy"
    config = make_config("fast", task=task, loss=loss, base_model=base_model, pooling="native", **settings)
    split = Split([f"本文{i} $x$ 😀" for i in range(60)], targets, list(range(60)))
    report = {"read": 70, "blank": 1, "duplicates": 8, "conflicting": 1}
    history = [Epoch(n, 1 / n, 1e-4, 0.9 / n, 0.5 + n / 10, 0.5 + n / 10, 1.0) for n in (1, 2, 3)]
    figures = model_figures(targets, logits, 1.3, labels, config)
    spec = Spec(labels, None, config, base_model, None, "ipadic", temperature=1.3)
    return TrainingResult(7, 1, spec, "tweets.csv", "ab" * 32, Dataset(labels, split, split, split, report), history,
                   figures, logits)  # fmt: skip


@pytest.mark.parametrize("task", [SINGLE, SEVERAL])
def test_the_card_is_a_model_card_with_every_figure_and_its_pictures(tmp_path: Path, task: str) -> None:
    outcome = outcome_of(JAPANESE, task)
    write_card(tmp_path, outcome)
    card = ModelCard.load(tmp_path / "README.md")
    metadata = yaml.safe_load(card.data.to_yaml())
    assert (metadata["language"], metadata["pipeline_tag"]) == ("ja", "text-classification")
    results = metadata["model-index"][0]["results"][0]["metrics"]
    assert results[0]["value"] == pytest.approx(outcome.figures["accuracy", ""], abs=1e-4)
    assert "base_model" not in metadata  # the starter is not on the hub
    for wanted in (
        "Of 70 rows read", "| `肯定` |", f"| F1 macro | {outcome.figures['f1_macro', '']:.4f} |", "temperature, 1.300",
        "95 % interval", "## Limits", "| `learning_rate` | `0.0001` |", "tweets.csv",
    ):  # fmt: skip
        assert wanted in card.text, wanted
    shown = [line.partition("](")[2].rstrip(")") for line in card.text.splitlines() if line.startswith("![")]
    assert sorted(shown) == sorted(path.name for path in tmp_path.glob("*.png")) == [
        "confusion.png", "epochs.png", "reliability.png", "scores.png",
    ]  # fmt: skip
    for name in shown:
        pixels = image.imread(tmp_path / name)[:, :, :3]
        assert pixels.std() > 0.05  # something is drawn
        edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edges > 0.99).mean() > 0.97, name  # and nothing runs over the edge


def test_a_card_names_a_hub_model_and_no_folder_of_whoever_trained_it(tmp_path: Path) -> None:
    write_card(tmp_path, outcome_of(JAPANESE, base_model="tohoku-nlp/bert-base-japanese"))
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "tohoku-nlp/bert-base-japanese"
    write_card(tmp_path, outcome_of(JAPANESE, base_model="/home/someone/secret/my-bert"))
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "`my-bert`" in text
    assert "secret" not in text


def test_japanese_labels_are_drawn_as_glyphs_and_odd_ones_do_not_break_a_picture(
    recwarn: pytest.WarningsRecorder, tmp_path: Path
) -> None:
    outcome = outcome_of(["肯定😀", "$x_{", "とても長いラベルの名前でどこまでも続く", "a|b`c"])
    write_card(tmp_path, outcome)
    targets, said = outcome.data.test.targets, outcome.probabilities
    plots.predictions(outcome.data.test.texts, targets, said, outcome.spec.labels, SINGLE).savefig(tmp_path / "p.png")
    assert [str(w.message) for w in recwarn if "Glyph" in str(w.message)] == []


def test_a_matrix_of_many_labels_is_still_drawn(tmp_path: Path) -> None:
    outcome = outcome_of([f"ラベル{i}" for i in range(30)])
    figure = plots.confusion(outcome.data.test.targets, outcome.probabilities, outcome.spec.labels, SINGLE)
    figure.savefig(tmp_path / "many.png")
    assert figure.get_figwidth() <= 13
