"""`tweetscore quality`, and `tweetscore models compare --live`."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from worker.cli import output
from worker.cli.output import Json

if TYPE_CHECKING:
    from worker.quality.comparison import LiveComparison
    from worker.quality.live_quality import LiveQuality, QualityReport

PICK = "`tweetscore review pick 100` picks tweets at random to label"
DRIFT = {
    "labels": ("labels", "a change of what people mean, when the model answers as often with each label as before"),
    "length": ("length", "a change of words or of topics; links and mentions count as 24 and 12 characters"),
    "unknown": ("unknown tokens", "new words that are made of known pieces, and old words with a new meaning"),
}


def quality(json: Json = False) -> None:
    """Show how right the champion is on live tweets, and how these differ from its test rows.

    Accuracy and macro-F1 need labels of tweets that were picked at random.
    """
    from worker.connections import open_sql
    from worker.quality.live_quality import measure
    from worker.settings import load_settings

    report = measure(open_sql(load_settings()))
    if json:
        drift = {name: {**asdict(found), "verdict": found.verdict} for name, found in report.drift.items()}
        output.as_json({**asdict(report), "drift": drift})
        return
    output.line(f"model {report.model_version_id}, the champion")
    _print_labelled(report.periods)
    _print_expected(report)
    _print_drift(report)


def _print_labelled(periods: "Sequence[LiveQuality]") -> None:
    if not periods:
        output.line("\naccuracy: this model has several labels for a tweet, or numbers; only single labels are counted")
        return
    output.line("")
    tested = periods[0].test_accuracy
    _print_figure("accuracy", periods, "accuracy", "" if tested is None else f";  test rows: {_share(tested)}")
    if any(period.labels for period in periods):
        covered = [f"{p.covered_tweets / p.tweets:.0%} of the tweets of {p.days} days" for p in periods if p.tweets]
        _blind(f"days without labels (those with labels hold {', '.join(covered)}), and mistakes of the people")
        _print_figure("macro-F1", periods, "f1_macro")
        _blind("much of a rare label: few labels of it decide its F1")
    else:
        _blind(f"anything without labels of tweets that were picked at random; {PICK}")
    needed = [f"{p.days} days: {p.labels_needed:,} (there are {p.labels:,})" for p in periods if p.labels_needed]
    if needed:
        output.line(f"labels for plus or minus 3 points  {';  '.join(needed)}")
        _blind("how evenly the next labels are spread over the days; uneven ones count for less")


def _print_figure(title: str, periods: "Sequence[LiveQuality]", name: str, more: str = "") -> None:
    figures = [f"{period.days} days: {_with_interval(period, name)}" for period in periods]
    output.line(f"{title}  {';  '.join(figures)}{more}")


def _print_expected(report: "QualityReport") -> None:
    if report.expected_accuracy is None:
        return
    tested = report.test_expected_accuracy
    of_tests = f"of the test rows {_share(tested)}" if tested is not None else "there are no test rows"
    output.line(
        f"expected accuracy of {report.tweets:,} tweets of the last {_days(report)}  "
        f"{_share(report.expected_accuracy)}; {of_tests}"
    )
    _blind("mistakes that the model is sure of: it believes the model's own probabilities")


def _print_drift(report: "QualityReport") -> None:
    if not report.days:
        output.line("\ndrift: no tweet of the last 7 days was scored by this model")
        return
    if not report.drift:
        output.line("\ndrift: this model has no test rows to compare the tweets with")
        return
    output.line(f"\ndrift of the last {_days(report)} against the test rows (population stability index)")
    for name, found in report.drift.items():
        title, blind = DRIFT[name]
        output.line(f"{title}  {found.psi:.3f}, {found.verdict}; chance alone gives about {found.chance:.3f}")
        _blind(blind)
    output.table(
        None,
        ["day (UTC)", "tweets", "expected accuracy", *(f"PSI {title}" for title, _ in DRIFT.values())],
        [
            (day.day, f"{day.tweets:,}", day.expected_accuracy, day.psi_labels, day.psi_length, day.psi_unknown)
            for day in report.days
        ],
    )


def _days(report: "QualityReport") -> str:
    return f"{len(report.days)} days with tweets" if len(report.days) > 1 else "day with tweets"


def _blind(what: str) -> None:
    """Print what the figure above cannot see."""
    output.console.print(f"  does not see {what}", style="dim", markup=False, soft_wrap=True)


def _with_interval(period: "LiveQuality", name: str) -> str:
    value = getattr(period, name)
    if value is None:
        return "no labels"
    low, high = getattr(period, f"{name}_low"), getattr(period, f"{name}_high")
    ends = "" if low is None else f" (95 %: {_share(low)} to {_share(high)})"
    return f"{_share(value)}{ends}, {period.labels:,} labels"


def _share(value: float) -> str:
    return f"{value:.3f}"


# --- comparison


def compare(one: int, other: int, json: bool) -> None:
    """Print a comparison of two models on the stored tweets that both scored."""
    from worker.connections import open_sql
    from worker.quality.comparison import compare_live
    from worker.settings import load_settings

    found = compare_live(open_sql(load_settings()), one, other)
    if json:
        cells = [{"first": a, "second": b, "tweets": n} for (a, b), n in sorted(found.confusion.items())]
        output.as_json({**asdict(found), "confusion": cells})
        return
    if not found.tweets:
        output.line(
            f"no tweet was scored by both model {one} and model {other}; `tweetscore rescore --model {other}` scores "
            "the stored tweets"
        )
        return
    _print_comparison(found)


def _print_comparison(found: "LiveComparison") -> None:
    one, other = found.one, found.other
    output.line(
        f"{found.tweets:,} tweets were scored by both; the labels differ on {found.differing:,} "
        f"({found.differing / found.tweets:.1%})"
    )
    rows, columns = (sorted({pair[side] for pair in found.confusion}) for side in (0, 1))
    output.table(
        "Tweets by label",
        [f"model {one} \\ model {other}", *columns],
        [(row, *(f"{found.confusion.get((row, column), 0):,}" for column in columns)) for row in rows],
    )
    if found.examples:
        output.table(
            f"Where they differ ({len(found.examples)} of {found.differing:,})",
            ["tweet", f"model {one}", f"model {other}", "people", "text"],
            [
                (
                    example.tweet_id,
                    f"{example.first} {example.first_probability:.2f}",
                    f"{example.second} {example.second_probability:.2f}",
                    example.label,
                    example.text,
                )
                for example in found.examples
            ],
        )
    output.line(f"all labels: {found.labelled.sentence(one, other)}")
    output.line(f"labels of tweets picked at random: {found.random.sentence(one, other)}")
    _blind("which labels are in a file that one of the models was trained on; other picks than random are not typical")
