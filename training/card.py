"""The model card: the README.md of an artifact by the hub's conventions, and the pictures it shows.

All of it comes from the run itself. What that cannot know, who may use the data above all, it says it does not know.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from training import plots
from training.encoders import STARTER, looks_local
from training.outcome import Outcome

CARD = "README.md"
MEASURED = {
    "accuracy": "Accuracy", "f1_macro": "F1 macro", "f1_micro": "F1 micro", "roc_auc": "ROC-AUC (mean of labels)",
    "average_precision": "Average precision (mean of labels)", "log_loss": "Log loss", "brier": "Brier score",
    "ece": "Calibration error (ECE), scaled", "ece_uncalibrated": "Calibration error (ECE), before scaling",
}  # fmt: skip

CLEANED = {"1": "HTML entities resolved, links and mentions dropped, white space folded"}
CLEANED["2"] = f"{CLEANED['1']}, hashtags reduced to their word, emoji to one form, repeated characters to three"
CLEANED["neologdn"] = f"{CLEANED['2']}, then normalised by neologdn"


def write_card(folder: Path, outcome: Outcome) -> None:
    """Write README.md and its PNGs into an artifact."""
    pictures = _pictures(outcome)
    for name, (_, figure) in pictures.items():
        figure.savefig(folder / f"{name}.png", dpi=120)
    images = "\n\n".join(f"![{says}]({name}.png)" for name, (says, _) in pictures.items())
    parts = [
        f"---\n{_metadata(outcome).to_yaml()}\n---", _summary(outcome), _use(outcome), _data(outcome),
        _results(outcome), images, _limits(outcome), _hyper_parameters(outcome),
    ]  # fmt: skip
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _pictures(outcome: Outcome) -> dict[str, tuple[str, Any]]:
    targets, labels, task = outcome.data.test.targets, outcome.spec.labels, outcome.spec.config.task
    raw, calibrated = outcome.probabilities_at(1.0), outcome.probabilities
    return {
        "epochs": ("Loss and validation figures per epoch", plots.epochs(outcome.history)),
        "confusion": ("Confusion matrix of the test rows", plots.confusion(targets, calibrated, labels, task)),
        "reliability": ("Reliability diagram", plots.reliability_diagram(targets, raw, calibrated, task)),
        "scores": ("Histogram of scores", plots.scores(targets, calibrated, task)),
    }


def _metadata(outcome: Outcome) -> ModelCardData:
    spec, figures = outcome.spec, outcome.figures
    results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="private",
            dataset_name=outcome.dataset_name,
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
        model_name=_name(outcome),
        eval_results=results,
    )


def _name(outcome: Outcome) -> str:
    return f"tweetscore-job-{outcome.job_id}"


def _base(outcome: Outcome) -> str:
    """The base model without the folders of whoever trained it."""
    name, revision = outcome.spec.base_model, outcome.spec.base_revision
    return f"`{Path(name).name if looks_local(name) else name}`" + (f" at revision `{revision}`" if revision else "")


def _summary(outcome: Outcome) -> str:
    config, labels = outcome.spec.config, outcome.spec.labels
    kind = "any number of" if config.task == "multi_label" else "one of"
    return (
        f"# {_name(outcome)}\n\nGives a Japanese tweet {kind} {len(labels)} labels: "
        f"{', '.join(map(_code, labels))}. {_base(outcome)} fine-tuned for {len(outcome.history)} epochs; "
        "the weights are those of the last epoch that the validation rows cannot tell from the best."
    )


def _use(outcome: Outcome) -> str:
    spec = outcome.spec
    if spec.config.pooling != "native":
        return "## Use\n\nThe head is one of tweetscore's own: load the folder with tweetscore."
    return (
        "## Use\n\n```python\nfrom transformers import pipeline\n\n"
        'classifier = pipeline("text-classification", "path/of/this/folder", truncation=True, '
        f'max_length={spec.config.max_length})\nclassifier("最高の一日")\n```\n\n'
        "The logits are tweetscore's. Its probabilities are those of the logits divided by the temperature, "
        f"{spec.temperature:.3f}, and it cleans a text first (cleaner {spec.cleaner_version}: "
        f"{CLEANED[spec.cleaner_version]})."
    )


def _data(outcome: Outcome) -> str:
    sizes = {part: len(getattr(outcome.data, part)) for part in ("train", "valid", "test")}
    rows = [
        (_code(label), *(int(getattr(outcome.data, part).targets[:, k].sum()) for part in sizes))
        for k, label in enumerate(outcome.spec.labels)
    ]
    return (
        f"## Training data\n\n`{outcome.dataset_name}`, sha256 `{outcome.dataset_sha256}`.{_split(outcome)}\n\n"
        + _table(["rows", "training", "validation", "test"], [*rows, ("**all**", *sizes.values())])
    )


def _split(outcome: Outcome) -> str:
    report, config = outcome.data.report, outcome.spec.config
    if config.split == "guide":
        leaked = report["also_in_training"]
        return (
            f" The split is the guide's: all {report['read']:,} rows, drawn by pandas with seed {config.seed}, among "
            f"them {report['blank']:,} blank ones, {report['duplicates']:,} copies and {report['conflicting']:,} texts "
            f"under two labels. {leaked['valid']:,} validation rows and {leaked['test']:,} test rows have a text that "
            "also stands among the training rows, which makes figures better than new tweets would."
        )
    left_out = (
        f" Of {report['read']:,} rows read, {report['blank']:,} blank ones, {report['duplicates']:,} copies and "
        f"{report['conflicting']:,} texts under two labels were left out."
        if report
        else ""
    )
    stratified = " and stratified" if config.task == "single_label" else ""
    return f"{left_out} The split is seeded{stratified}; no text stands in two parts."


def _results(outcome: Outcome) -> str:
    figures, config = outcome.figures, outcome.spec.config
    rows = []
    for metric, name in MEASURED.items():
        if (metric, "") not in figures:
            continue  # no label was there to be ranked
        low, high = figures.get((f"{metric}_low", "")), figures.get((f"{metric}_high", ""))
        interval = "" if low is None or high is None else f"{low:.4f} to {high:.4f}"
        others = (_figure(figures.get((f"{baseline}_{metric}", ""))) for baseline in ("tfidf", "majority"))
        rows.append((name, _figure(figures[metric, ""]), interval, *others))
    per_label = [
        (_code(label), *(_figure(figures[metric, label]) for metric in ("precision", "recall", "f1")),
         int(figures["support", label]))
        for label in outcome.spec.labels
    ]  # fmt: skip
    same = "For one label a row micro-F1 is accuracy, by definition.\n\n" if config.task == "single_label" else ""
    return (
        f"## Results on the test rows\n\n{same}"
        + _table(["", "model", "95 % interval (bootstrap)", "TF-IDF + logistic regression", "majority"], rows)
        + "\n\n"
        + _table(["label", "precision", "recall", "F1", "test rows"], per_label)
        + "".join(f"\n\nNote: {note}." for note in outcome.data.report.get("notes", ()))
        + f"\n\nThe temperature, {outcome.spec.temperature:.3f}, was fitted on the {len(outcome.data.valid):,} "
        "validation rows."
    )


def _limits(outcome: Outcome) -> str:
    tested = len(outcome.data.test)
    width = outcome.figures["f1_macro_high", ""] - outcome.figures["f1_macro_low", ""]
    return (
        f"## Limits\n\n- Measured on {tested:,} rows of the same dataset: the interval of macro-F1 is "
        f"{100 * width:.1f} points wide, and tweets of other times and topics may fare worse.\n"
        f"- A text is cut after {outcome.spec.config.max_length} tokens.\n"
        "- The validation rows chose both the epoch and the temperature.\n"
        "- The labels are their annotators' judgement; irony and quotations are often misread.\n"
        "- Nothing is known here of the licence of the data: ask whoever labelled it before passing the model on."
    )


def _hyper_parameters(outcome: Outcome) -> str:
    config = outcome.spec.config.model_dump(mode="json", exclude={"base_model", "base_revision", "labels", "polarity"})
    return "## Hyper-parameters\n\n" + _table(
        ["name", "value"], [(f"`{name}`", f"`{v}`") for name, v in config.items()]
    )


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _code(label: str) -> str:
    """A label inside a table, whatever it is made of."""
    return f"`{' '.join(label.replace('`', ' ').replace('|', ' ').split())}`"


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
