"""What the page Models asks the database."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import TYPE_CHECKING, Any

from training.data.columns import MULTI_LABEL_SEPARATOR
from worker.console.context import Console

if TYPE_CHECKING:
    import pandas as pd

SINGLE_LABEL, CONTINUOUS, MULTI_LABEL = "single_label", "continuous", "multi_label"
BINS = 10
Z = 1.96  # of a 95 % interval
MOST_WRONG = 20
NEWEST_ALIASES = """SELECT a.alias, a.model_version_id, a.assigned_at FROM model_aliases AS a
    WHERE a.id = (SELECT max(b.id) FROM model_aliases AS b WHERE b.alias = a.alias)"""


@dataclass(frozen=True)
class Model:
    """One model version that is not deleted. `task` is that of its job, and single_label without one.

    `origin` is its job, "imported" or "cascade".
    """

    id: int
    job_id: int | None
    base_model: str
    labels: tuple[str, ...]
    artifact_url: str
    sha256: str
    temperature: float
    task: str
    created_at: "pd.Timestamp"
    origin: int | str


def records(frame: "pd.DataFrame") -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def aliases(console: Console) -> dict[str, int]:
    """The model version of each alias that is assigned."""
    found = console.frame(NEWEST_ALIASES)
    return {row["alias"]: int(row["model_version_id"]) for row in records(found)}


def leaderboard(console: Console) -> "pd.DataFrame":
    """One row per model, the newest first, with its aliases in a column `alias`."""
    found = console.frame("SELECT * FROM v_model_leaderboard ORDER BY model_version_id DESC")
    named = aliases(console)
    found.insert(
        1, "alias", [", ".join(name for name, model in named.items() if model == i) for i in found["model_version_id"]]
    )
    return found


def model(console: Console, version_id: int) -> Model | None:
    found = console.frame(
        """SELECT m.job_id, m.base_model, m.labels, m.artifact_url, m.sha256, m.temperature, m.created_at, j.config,
                  c.student_id
           FROM model_versions AS m LEFT JOIN training_jobs AS j ON j.id = m.job_id
           LEFT JOIN cascades AS c ON c.model_version_id = m.id
           WHERE m.id = :model AND m.deleted_at IS NULL""",
        {"model": version_id},
    )
    if found.empty:
        return None
    row = found.iloc[0]
    job_id = None if found["job_id"].isna().iloc[0] else int(row["job_id"])
    return Model(
        version_id, job_id, str(row["base_model"]), tuple(map(str, row["labels"])), str(row["artifact_url"]),
        str(row["sha256"]), float(row["temperature"]), _task(row["config"]), row["created_at"],
        job_id or ("imported" if found["student_id"].isna().iloc[0] else "cascade"),
    )  # fmt: skip


def champion_task(console: Console) -> str:
    champion = aliases(console).get("champion")
    found = None if champion is None else model(console, champion)
    return SINGLE_LABEL if found is None else found.task


def _task(config: Any) -> str:
    return str(config.get("task", SINGLE_LABEL)) if isinstance(config, Mapping) else SINGLE_LABEL


def figures(console: Console, version_id: int) -> dict[tuple[str, str], float]:
    """Test metrics by (metric, label), as `db.registry.metrics`."""
    found = console.frame(
        "SELECT metric, label, value FROM test_metrics WHERE model_version_id = :model", {"model": version_id}
    )
    return {(row["metric"], row["label"]): float(row["value"]) for row in records(found)}


def confusion(console: Console, found: Model) -> "pd.DataFrame":
    """Columns actual, predicted, rows and share: of the rows with this actual label. Every pair of labels has a row."""
    import pandas as pd

    cells = console.frame(
        "SELECT actual, predicted, count AS n FROM confusion_cells WHERE model_version_id = :model", {"model": found.id}
    )
    if cells.empty:
        return pd.DataFrame(columns=["actual", "predicted", "rows", "share"])
    counts = {(row["actual"], row["predicted"]): int(row["n"]) for row in records(cells)}
    totals = {actual: sum(counts.get((actual, other), 0) for other in found.labels) for actual in found.labels}
    return pd.DataFrame(
        [
            {
                "actual": actual, "predicted": predicted, "rows": counts.get((actual, predicted), 0),
                "share": counts.get((actual, predicted), 0) / totals[actual] if totals[actual] else 0.0,
            }
            for actual in found.labels
            for predicted in found.labels
        ]
    )  # fmt: skip


def reliability(console: Console, found: Model) -> "pd.DataFrame":
    """Test rows by probability, in bins of equal width: low, high, rows, probability (mean) and right (share).

    `right_low` and `right_high` are the ends of Wilson's 95 % interval. Empty bins have 0 rows and none of these. The
    probability of a row is that of its predicted label; of a multi-label model each label counts, and is right when the
    row has the label.
    """
    import pandas as pd

    tested = console.frame(
        "SELECT actual, predicted, probability, probabilities FROM test_predictions WHERE model_version_id = :model"
        if found.task == MULTI_LABEL
        else "SELECT actual, predicted, probability FROM test_predictions WHERE model_version_id = :model",
        {"model": found.id},
    )
    if found.task == MULTI_LABEL:
        decided = [
            (float(share), label in row["actual"].split(MULTI_LABEL_SEPARATOR))
            for row in records(tested)
            for label, share in row["probabilities"].items()
        ]
    else:
        decided = list(zip(tested["probability"].astype(float), tested["actual"] == tested["predicted"], strict=True))
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for probability, right in decided:
        bins[min(int(probability * BINS), BINS - 1)].append((probability, right))
    frame = pd.DataFrame({"low": [n / BINS for n in range(BINS)], "high": [(n + 1) / BINS for n in range(BINS)]})
    frame["rows"] = [len(rows) for rows in bins]
    frame["probability"] = [sum(p for p, _ in rows) / len(rows) if rows else None for rows in bins]
    shares = [_share(sum(right for _, right in rows), len(rows)) for rows in bins]
    for place, name in enumerate(("right", "right_low", "right_high")):
        frame[name] = [share[place] for share in shares]
    return frame.astype(dict.fromkeys(("probability", "right", "right_low", "right_high"), "float64"))


def _share(right: int, rows: int) -> tuple[float | None, float | None, float | None]:
    """The share and the ends of its interval (Wilson, 1927), which suits few rows and shares near 0 and 1."""
    if not rows:
        return None, None, None
    share = right / rows
    middle = (share + Z**2 / (2 * rows)) / (1 + Z**2 / rows)
    half = Z * sqrt(share * (1 - share) / rows + Z**2 / (4 * rows**2)) / (1 + Z**2 / rows)
    return share, max(middle - half, 0.0), min(middle + half, 1.0)


def wrongest(console: Console, found: Model) -> "pd.DataFrame":
    """The test rows that the model got wrong with most certainty; of a continuous model the largest errors."""
    measure = "probability" if found.task != CONTINUOUS else "abs(CAST(predicted AS float) - CAST(actual AS float))"
    return console.frame(
        f"""SELECT row_number, actual, predicted, probability, text FROM test_predictions
            WHERE model_version_id = :model AND actual <> predicted
            ORDER BY {measure} DESC, row_number LIMIT :top""",  # noqa: S608 - one of two constants
        {"model": found.id, "top": MOST_WRONG},
    )


def evaluations(console: Console, version_id: int) -> "pd.DataFrame":
    return console.frame(
        """SELECT dataset, rows, accuracy, f1_macro, f1_macro_low, f1_macro_high, ece, evaluated_at
           FROM v_model_evaluations WHERE model_version_id = :model ORDER BY evaluated_at DESC""",
        {"model": version_id},
    )


def history(console: Console, limit: int = 50) -> "pd.DataFrame":
    """The newest assignments of aliases."""
    return console.frame(
        "SELECT alias, model_version_id, assigned_at FROM model_aliases ORDER BY id DESC LIMIT :top", {"top": limit}
    )


# Metrics of the whole test split, with the names that pages show.
SHOWN = (
    ("accuracy", "Accuracy"), ("f1_macro", "F1 macro"), ("tfidf_f1_macro", "F1 macro of TF-IDF"),
    ("roc_auc", "ROC-AUC"), ("ece", "Calibration error"), ("log_loss", "Log loss"), ("brier", "Brier score"),
    ("quadratic_kappa", "Quadratic kappa"), ("mean_absolute_error", "Mean absolute error"),
    ("root_mean_squared_error", "Root mean squared error"), ("pearson", "Pearson's r"), ("spearman", "Spearman's rho"),
)  # fmt: skip


def of_labels(found: Model, measured: dict[tuple[str, str], float]) -> list[dict[str, Any]]:
    """Precision, recall, F1 and number of test rows of each label that was measured."""
    return [
        {"label": label, "precision": measured.get(("precision", label)), "recall": measured.get(("recall", label)),
         "F1": measured.get(("f1", label)), "test rows": measured.get(("support", label))}
        for label in found.labels
        if ("f1", label) in measured
    ]  # fmt: skip
