"""The model card: README.md of an artifact, in the format of the Hugging Face hub, with its figures.

Everything in it comes from the training run, or for an imported classifier from its files. The licence of the data is
unknown, and the card states that.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCardData

from training.data.numbers import number_text
from training.evaluation.cross_validation import describe
from training.evaluation.epoch import quality_names
from training.model.artifact import Spec
from training.model.base_model import is_hub_name, looks_local
from training.model.imported import ImportedClassifier
from training.reporting import plots
from training.reporting.distillation import COLUMNS, comparison
from training.reporting.training_result import TrainingResult, Values

CARD = "README.md"
MEASURED = {
    "quadratic_kappa": "Quadratic weighted kappa", "mean_absolute_error": "Mean absolute error",
    "root_mean_squared_error": "Root mean squared error", "pearson": "Pearson's r", "spearman": "Spearman's rho",
    "accuracy": "Accuracy", "f1_macro": "F1 macro", "f1_micro": "F1 micro", "roc_auc": "ROC-AUC (mean of labels)",
    "average_precision": "Average precision (mean of labels)", "log_loss": "Log loss", "brier": "Brier score",
    "ece": "Calibration error (ECE), scaled", "ece_uncalibrated": "Calibration error (ECE), before scaling",
}  # fmt: skip

# Figures for the hub: its name of the metric, the shown name, and ours.
HEADLINES = {
    "single_label": (("accuracy", "Accuracy", "accuracy"), ("f1", "F1 macro", "f1_macro")),
    "continuous": (
        ("mae", "Mean absolute error", "mean_absolute_error"),
        ("pearsonr", "Pearson's r", "pearson"),
        ("spearmanr", "Spearman's rho", "spearman"),
    ),
}

# What each cleaner does, see `cleaning.py`.
CLEANED = {"1": "HTML entities resolved, links and mentions removed, white space collapsed"}
CLEANED["2"] = (
    f"{CLEANED['1']}, the mark of hashtags removed, emoji variants unified, repeated characters limited to three"
)
CLEANED["neologdn"] = f"{CLEANED['2']}, then normalised by neologdn"


def write_card(folder: Path, result: TrainingResult) -> None:
    """Write README.md and its PNG figures into an artifact's folder."""
    pictures = _pictures(result)
    for name, (_, figure) in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    images = "\n\n".join(f"![{caption}]({name}.png)" for name, (caption, _) in pictures.items())
    parts = [
        f"---\n{_metadata(result).to_yaml()}\n---", _summary(result), _use(result.spec), _data(result),
        _results(result), *_teacher(result), images, _limits(result), _hyper_parameters(result),
    ]  # fmt: skip
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def write_imported_card(folder: Path, imported: ImportedClassifier) -> None:
    """Write README.md of an imported classifier, which has no test figures, into an artifact's folder."""
    spec = imported.spec
    metadata = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["tweetscore"],
        base_model=_hub_name(spec),
    )
    kind = "any number of" if spec.config.task == "multi_label" else "one of"
    polarity = spec.polarity or {}
    labels = [
        (_code(own), _code(name), f"{polarity[name]:g}" if name in polarity else "")
        for own, name in zip(imported.own_labels, spec.labels, strict=True)
    ]
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# Imported classifier\n\nAssigns {kind} {len(spec.labels)} labels to a tweet. The weights are those of "
        f"{_base(spec)} ({type(imported.model.network).__name__}), in float32. tweetscore imported the model and did "
        "not train it.",
        "## Labels\n\n" + _table(["label of the source", "name here", "polarity"], labels),
        _use(spec),
        "## Results\n\nNo test figures. `tweetscore models evaluate ID labelled.csv` measures the model on a labelled "
        "file and stores the figures in the database.",
        f"## Limits\n\n- Texts are truncated after {spec.config.max_length} tokens.\n"
        "- The probabilities were not calibrated on tweets.\n"
        "- The licence and the training data are those of the source; read its model card before you distribute this "
        "model.",
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _pictures(result: TrainingResult) -> dict[str, tuple[str, Any]]:
    """Return file name -> (caption, figure)."""
    targets, labels, task = result.data.test.targets, result.spec.labels, result.spec.config.task
    raw, calibrated = result.probabilities_at(1.0), result.probabilities
    if task == "continuous":
        actual, predicted = result.values(targets), result.values(calibrated)
        return {
            "epochs": ("Loss and validation metrics per epoch", plots.epochs(result.history, quality_names(task))),
            "values": ("Predicted and actual values of the test rows", plots.values(actual, predicted)),
            "errors": ("Histogram of errors", plots.error_histogram(actual, predicted)),
        }
    return {
        "epochs": ("Loss and validation metrics per epoch", plots.epochs(result.history)),
        "confusion": ("Confusion matrix of the test rows", plots.confusion(targets, calibrated, labels, task)),
        "reliability": ("Reliability diagram", plots.reliability_diagram(targets, raw, calibrated, task)),
        "scores": ("Histogram of confidence", plots.confidence_histogram(targets, calibrated, task)),
    }


def _metadata(result: TrainingResult) -> ModelCardData:
    spec, figures = result.spec, result.figures
    headline = HEADLINES.get(spec.config.task, HEADLINES["single_label"])
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="private",
            dataset_name=result.dataset_name,
            dataset_split="test",
            metric_type=metric,
            metric_name=name,
            metric_value=round(figures[key, ""], 4),
        )
        for metric, name, key in headline
        if (key, "") in figures
    ]
    return ModelCardData(
        language="ja",
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["sentiment-analysis", "twitter", "tweetscore"],
        base_model=_hub_name(spec),
        metrics=[metric for metric, _, _ in headline],
        model_name=_name(result),
        eval_results=results,
    )


def _hub_name(spec: Spec) -> str | None:
    return spec.base_model if is_hub_name(spec.base_model) else None


def _name(result: TrainingResult) -> str:
    return f"tweetscore-job-{result.job_id}"


def _base(spec: Spec) -> str:
    """Return the base model's name; of a path only its last part, because folder names can be private."""
    name, revision = spec.base_model, spec.base_revision
    return f"`{Path(name).name if looks_local(name) else name}`" + (f" at revision `{revision}`" if revision else "")


def _summary(result: TrainingResult) -> str:
    config, labels = result.spec.config, result.spec.labels
    kind = {"multi_label": "any number of", "ordinal": "one of the ordered"}.get(config.task, "one of")
    task = f"Assigns {kind} {len(labels)} labels to a Japanese tweet: {', '.join(map(_code, labels))}."
    kept = "the last epoch whose validation macro-F1 is within one standard error of the best"
    if config.task == "continuous":
        task = "Assigns a number to a Japanese tweet."
        kept = "the epoch with the lowest mean absolute error on the validation rows"
    return (
        f"# {_name(result)}\n\n{task} {_base(result.spec)} fine-tuned for {len(result.history)} epochs; the weights "
        f"are those of {kept}."
    )


def _use(spec: Spec) -> str:
    if spec.config.pooling != "native":
        return "## Use\n\nThe model has a head that plain transformers cannot load; load this folder with tweetscore."
    return (
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        'classifier = pipeline("text-classification", "path/of/this/folder", truncation=True, '
        f'max_length={spec.config.max_length})\nclassifier("最高の一日")\n```\n\n'
        "The logits equal those of tweetscore when the text is cleaned first, with cleaner "
        f"{spec.cleaner_version}: {CLEANED[spec.cleaner_version]}. {_from_logits(spec)}"
    )


def _from_logits(spec: Spec) -> str:
    if spec.scale is not None:
        return f"For the value, multiply the logit by {spec.scale.deviation:.6g} and add {spec.scale.mean:.6g}."
    median = " The predicted level is the median of these probabilities." if spec.config.task == "ordinal" else ""
    return f"For tweetscore's probabilities, divide the logits by the temperature, {spec.temperature:.3f}.{median}"


def _data(result: TrainingResult) -> str:
    sizes = {part: len(getattr(result.data, part)) for part in ("train", "valid", "test")}
    about = f"## Training data\n\n`{result.dataset_name}`, sha256 `{result.dataset_sha256}`.{_split(result)}\n\n"
    if result.spec.scale is not None:
        targets = [result.values(getattr(result.data, part).targets) for part in sizes]
        measures: dict[str, Callable[[Values], float]] = {
            "mean": np.mean, "standard deviation": np.std, "lowest": np.min, "highest": np.max,
        }  # fmt: skip
        summaries = [(name, *(number_text(of(values)) for values in targets)) for name, of in measures.items()]
        return about + _table(["", "training", "validation", "test"], [("**rows**", *sizes.values()), *summaries])
    rows = [
        (_code(label), *(int(getattr(result.data, part).targets[:, k].sum()) for part in sizes))
        for k, label in enumerate(result.spec.labels)
    ]
    return about + _table(["rows", "training", "validation", "test"], [*rows, ("**all**", *sizes.values())])


def _split(result: TrainingResult) -> str:
    report, config = result.data.report, result.spec.config
    if config.split == "guide":
        leaked = report["also_in_training"]
        return (
            f" The split is the guide's: all {report['read']:,} rows, sampled by pandas with seed {config.seed}. They "
            f"include {report['blank']:,} blank rows, {report['duplicates']:,} duplicates and "
            f"{report['conflicting']:,} texts with more than one label. {leaked['valid']:,} validation rows and "
            f"{leaked['test']:,} test rows have a text that is also a training row, so the results are better than on "
            "new tweets."
        )
    left_out = (
        f" Of {report['read']:,} rows read, {report['blank']:,} blank rows, {report['duplicates']:,} duplicates and "
        f"{report['conflicting']:,} texts with more than one label were left out."
        if report
        else ""
    )
    stratified = " and stratified" if config.one_label else ""
    return f"{left_out} The split is seeded{stratified}; no text is in two parts."


def _results(result: TrainingResult) -> str:
    figures, config = result.figures, result.spec.config
    rows = []
    for metric, name in MEASURED.items():
        if (metric, "") not in figures:
            continue  # ranking metrics need rows with and without a label
        low, high = figures.get((f"{metric}_low", "")), figures.get((f"{metric}_high", ""))
        interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
        others = (_figure(figures.get((f"{baseline}_{metric}", ""))) for baseline in ("tfidf", "majority"))
        rows.append((name, _figure(figures[metric, ""]), interval, *others))
    parts = ["## Results on the test rows"]
    if config.one_label:
        parts.append("With one label per row, micro-F1 equals accuracy by definition.")
    baselines = ["TF-IDF + logistic regression", "majority"]
    if config.task == "continuous":
        baselines = ["TF-IDF + ridge regression", "mean"]
    parts.append(_table(["", "model", "95 % interval (bootstrap)", *baselines], rows))
    if config.task != "continuous":
        parts.append(_of_labels(result))
    parts += _cross_validation(result)
    parts += [f"Note: {note}." for note in result.data.report.get("notes", ())]
    if config.task != "continuous":
        fitted_on = f"was fitted on the {len(result.data.valid):,} validation rows."
        parts.append(f"The temperature, {result.spec.temperature:.3f}, {fitted_on}")
    return "\n\n".join(parts)


def _of_labels(result: TrainingResult) -> str:
    figures = result.figures
    per_label = [
        (_code(label), *(_figure(figures[metric, label]) for metric in ("precision", "recall", "f1")),
         int(figures["support", label]))
        for label in result.spec.labels
    ]  # fmt: skip
    return _table(["label", "precision", "recall", "F1", "test rows"], per_label)


def _cross_validation(result: TrainingResult) -> list[str]:
    line = describe(result.figures)
    if line is None or result.out_of_fold is None:
        return []
    return [
        f"{line} (mean and standard deviation of the folds). It is over all {len(result.out_of_fold.rows):,} labelled "
        "rows: each was predicted by a model that was not trained on it."
    ]


def _teacher(result: TrainingResult) -> list[str]:
    compared = comparison(result.data.report)
    return [f"## Teacher\n\n{compared[0]}.\n\n{_table(COLUMNS, compared[1])}"] if compared else []


def _limits(result: TrainingResult) -> str:
    figures, tested = result.figures, len(result.data.test)
    if result.spec.config.task == "continuous":
        width = figures["mean_absolute_error_high", ""] - figures["mean_absolute_error_low", ""]
        interval, chosen = f"the mean absolute error is {number_text(width)}", "The epoch was"
    else:
        width = 100 * (figures["f1_macro_high", ""] - figures["f1_macro_low", ""])
        interval, chosen = f"macro-F1 is {width:.1f} points", "The epoch and the temperature were both"
    return (
        f"## Limits\n\n- Measured on {tested:,} rows of the same dataset: the 95 % interval of {interval} wide. "
        "Results on tweets of other times and topics can be worse.\n"
        f"- Texts are truncated after {result.spec.config.max_length} tokens.\n"
        f"- {chosen} chosen on the validation rows.\n"
        "- The labels are the judgement of their annotators. Irony and quotations are often misclassified.\n"
        "- The licence of the training data is unknown; ask its owner before you distribute this model."
    )


def _hyper_parameters(result: TrainingResult) -> str:
    config = result.spec.config.model_dump(mode="json", exclude={"base_model", "base_revision", "labels", "polarity"})
    return "## Hyper-parameters\n\n" + _table(
        ["name", "value"], [(f"`{name}`", f"`{v}`") for name, v in config.items()]
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _code(label: str) -> str:
    """Return a label as inline code, with the characters that break a table replaced."""
    return f"`{' '.join(label.replace('`', ' ').replace('|', ' ').split())}`"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
