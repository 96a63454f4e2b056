"""The model card: README.md of an artifact, in the format of the Hugging Face hub, with its figures.

Everything in it comes from the training run. The licence of the data is unknown to the run, and the card states that.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from training.model.base_model import STARTER, looks_local
from training.reporting import plots
from training.reporting.distillation import COLUMNS, comparison
from training.reporting.training_result import TrainingResult

CARD = "README.md"
MEASURED = {
    "accuracy": "Accuracy", "f1_macro": "F1 macro", "f1_micro": "F1 micro", "roc_auc": "ROC-AUC (mean of labels)",
    "average_precision": "Average precision (mean of labels)", "log_loss": "Log loss", "brier": "Brier score",
    "ece": "Calibration error (ECE), scaled", "ece_uncalibrated": "Calibration error (ECE), before scaling",
}  # fmt: skip

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
        f"---\n{_metadata(result).to_yaml()}\n---", _summary(result), _use(result), _data(result),
        _results(result), *_teacher(result), images, _limits(result), _hyper_parameters(result),
    ]  # fmt: skip
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _pictures(result: TrainingResult) -> dict[str, tuple[str, Any]]:
    """Return file name -> (caption, figure)."""
    targets, labels, task = result.data.test.targets, result.spec.labels, result.spec.config.task
    raw, calibrated = result.probabilities_at(1.0), result.probabilities
    return {
        "epochs": ("Loss and validation metrics per epoch", plots.epochs(result.history)),
        "confusion": ("Confusion matrix of the test rows", plots.confusion(targets, calibrated, labels, task)),
        "reliability": ("Reliability diagram", plots.reliability_diagram(targets, raw, calibrated, task)),
        "scores": ("Histogram of confidence", plots.confidence_histogram(targets, calibrated, task)),
    }


def _metadata(result: TrainingResult) -> ModelCardData:
    spec, figures = result.spec, result.figures
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
        for metric, name, key in (("accuracy", "Accuracy", "accuracy"), ("f1", "F1 macro", "f1_macro"))
    ]
    on_the_hub = spec.base_model != STARTER and not looks_local(spec.base_model)
    return ModelCardData(
        language="ja",
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["sentiment-analysis", "twitter", "tweetscore"],
        base_model=spec.base_model if on_the_hub else None,
        metrics=["accuracy", "f1"],
        model_name=_name(result),
        eval_results=results,
    )


def _name(result: TrainingResult) -> str:
    return f"tweetscore-job-{result.job_id}"


def _base(result: TrainingResult) -> str:
    """Return the base model's name; of a path only its last part, because folder names can be private."""
    name, revision = result.spec.base_model, result.spec.base_revision
    return f"`{Path(name).name if looks_local(name) else name}`" + (f" at revision `{revision}`" if revision else "")


def _summary(result: TrainingResult) -> str:
    config, labels = result.spec.config, result.spec.labels
    kind = "any number of" if config.task == "multi_label" else "one of"
    return (
        f"# {_name(result)}\n\nAssigns {kind} {len(labels)} labels to a Japanese tweet: "
        f"{', '.join(map(_code, labels))}. {_base(result)} fine-tuned for {len(result.history)} epochs; "
        "the weights are those of the last epoch whose validation macro-F1 is within one standard error of the best."
    )


def _use(result: TrainingResult) -> str:
    spec = result.spec
    if spec.config.pooling != "native":
        return "## Use\n\nThe model has a head that plain transformers cannot load; load this folder with tweetscore."
    return (
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        'classifier = pipeline("text-classification", "path/of/this/folder", truncation=True, '
        f'max_length={spec.config.max_length})\nclassifier("最高の一日")\n```\n\n'
        "The logits equal those of tweetscore when the text is cleaned first, with cleaner "
        f"{spec.cleaner_version}: {CLEANED[spec.cleaner_version]}. For tweetscore's probabilities, divide the logits "
        f"by the temperature, {spec.temperature:.3f}."
    )


def _data(result: TrainingResult) -> str:
    sizes = {part: len(getattr(result.data, part)) for part in ("train", "valid", "test")}
    rows = [
        (_code(label), *(int(getattr(result.data, part).targets[:, k].sum()) for part in sizes))
        for k, label in enumerate(result.spec.labels)
    ]
    return (
        f"## Training data\n\n`{result.dataset_name}`, sha256 `{result.dataset_sha256}`.{_split(result)}\n\n"
        + _table(["rows", "training", "validation", "test"], [*rows, ("**all**", *sizes.values())])
    )


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
    stratified = " and stratified" if config.task == "single_label" else ""
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
    per_label = [
        (_code(label), *(_figure(figures[metric, label]) for metric in ("precision", "recall", "f1")),
         int(figures["support", label]))
        for label in result.spec.labels
    ]  # fmt: skip
    same = (
        "With one label per row, micro-F1 equals accuracy by definition.\n\n" if config.task == "single_label" else ""
    )
    return (
        f"## Results on the test rows\n\n{same}"
        + _table(["", "model", "95 % interval (bootstrap)", "TF-IDF + logistic regression", "majority"], rows)
        + "\n\n"
        + _table(["label", "precision", "recall", "F1", "test rows"], per_label)
        + "".join(f"\n\nNote: {note}." for note in result.data.report.get("notes", ()))
        + f"\n\nThe temperature, {result.spec.temperature:.3f}, was fitted on the {len(result.data.valid):,} "
        "validation rows."
    )


def _teacher(result: TrainingResult) -> list[str]:
    compared = comparison(result.data.report)
    return [f"## Teacher\n\n{compared[0]}.\n\n{_table(COLUMNS, compared[1])}"] if compared else []


def _limits(result: TrainingResult) -> str:
    tested = len(result.data.test)
    width = result.figures["f1_macro_high", ""] - result.figures["f1_macro_low", ""]
    return (
        f"## Limits\n\n- Measured on {tested:,} rows of the same dataset: the 95 % interval of macro-F1 is "
        f"{100 * width:.1f} points wide. Results on tweets of other times and topics can be lower.\n"
        f"- Texts are truncated after {result.spec.config.max_length} tokens.\n"
        "- The epoch and the temperature were both chosen on the validation rows.\n"
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
