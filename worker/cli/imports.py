"""`tweetscore models import`, `models cascade` and `models evaluate`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli import output
from worker.cli.output import Json

if TYPE_CHECKING:
    from worker.intake.make_cascade import MadeCascade


def models_import(
    source: Annotated[str, typer.Argument(metavar="HUB|FOLDER", help="Hub name of a classifier, or its folder.")],
    revision: Annotated[str | None, typer.Option(help="Commit of the Hub repository.")] = None,
    labels: Annotated[
        str | None, typer.Option(help="Name of each of the model's labels: LABEL_0=negative,LABEL_1=positive.")
    ] = None,
    polarity: Annotated[str | None, typer.Option(help="Score of each label from -1 to 1: good=1,bad=-1.")] = None,
    task: Annotated[str | None, typer.Option(help="single_label or multi_label; the model's own by default.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Cut each text to this many tokens.")] = None,
    cleaner: Annotated[str | None, typer.Option(help="Version of the text cleaning: 1, 2 or neologdn.")] = None,
    json: Json = False,
) -> None:
    """Import a Hugging Face text classifier, which can score without training.

    It has no test figures until `models evaluate` measures it.
    """
    from training.model.imported import ImportOptions
    from worker.cli.options import label_map, numbers
    from worker.connections import open_sql
    from worker.intake.import_model import import_model
    from worker.settings import load_settings

    settings = load_settings()
    options = ImportOptions(label_map(labels), numbers("polarity", polarity), task, max_length, cleaner)
    with _batches("running the model on the sample") as progress:
        version, spec = import_model(settings, open_sql(settings), source, revision, options, progress)
    if json:
        output.as_json({**output.fields(version), "polarity": spec.polarity})
        return
    commit = f" at revision {version.base_revision}" if version.base_revision else ""
    output.line(f"model {version.id} imported from {version.base_model}{commit}; {output.NO_TEST_FIGURES}")
    output.line(f"labels: {', '.join(version.labels)}")
    if spec.polarity is None:
        output.line("score_signed stays empty: no polarity is known for these labels; give --labels or --polarity")
    output.line(f"next: tweetscore models promote {version.id}, to score the stream with it")
    output.line(f"      tweetscore models evaluate {version.id} labelled.csv, to measure it")


def models_cascade(
    student: Annotated[int, typer.Argument(help="Model version that scores every tweet.")],
    teacher: Annotated[int, typer.Argument(help="Model version that scores what the student is unsure of.")],
    keep: Annotated[float, typer.Option(help="Share of the teacher's macro-F1 to keep.")] = 0.995,
    by_estimate: Annotated[
        bool,
        typer.Option(
            "--by-estimate", help="Keep it by the estimate, instead of by the lower 5 % bound of a bootstrap."
        ),
    ] = False,
    rows: Annotated[
        str | None, typer.Option(help="Labelled file to choose on; else the validation rows of the teacher's job.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Labels of the file and the models': 0=negative,1=positive.")
    ] = None,
    json: Json = False,
) -> None:
    """Make a model of two: the teacher scores only the tweets that the student is unsure of.

    As few tweets are passed on as keep the wanted share of the teacher's macro-F1 on labelled rows.
    """
    from dataclasses import asdict

    from training.evaluation.cascade import BOOTSTRAP, ESTIMATE
    from worker.cli.options import label_map
    from worker.connections import open_sql
    from worker.intake.make_cascade import make_cascade
    from worker.settings import load_settings

    settings = load_settings()
    bound = ESTIMATE if by_estimate else BOOTSTRAP
    with _batches("scoring the rows") as progress:
        made = make_cascade(
            settings, open_sql(settings), student, teacher, keep, bound, rows, label_map(labels), progress
        )
    if json:
        tested = {
            name: output.metric_rows(figures)
            for name, figures in (("student", made.student), ("cascade", made.cascade), ("teacher", made.teacher))
        }
        output.as_json(
            {**output.fields(made.version), "cascade": asdict(made.spec), "test": tested, "notes": made.rows.notes}
        )
        return
    _print_cascade(made)


def _print_cascade(made: "MadeCascade") -> None:
    spec, version = made.spec, made.version
    output.cascade_table(
        f"model {version.id}: cascade of model {spec.student.model_version}, the student, and model "
        f"{spec.teacher.model_version}, the teacher",
        spec,
    )
    output.line(f"chosen on {spec.rows:,} rows: {made.rows.name}")
    if made.cascade:
        output.table(
            f"{len(made.rows.test):,} test rows, of which {made.tested_share:.1%} are passed on",
            ["metric", "student", "cascade", "teacher"],
            [
                (name, *(figures[metric, ""] for figures in (made.student, made.cascade, made.teacher)))
                for metric, name in (("f1_macro", "F1 macro"), ("accuracy", "accuracy"))
            ],
        )
    else:
        output.line(f"{output.NO_TEST_FIGURES}: `tweetscore models evaluate {version.id} labelled.csv` measures it")
    for note in made.rows.notes:
        output.line(f"note: {note}")
    output.line(f"next: tweetscore models promote {version.id}, to score the stream with it")


def models_evaluate(
    model: Annotated[int, typer.Argument(help="Model version.")],
    dataset: Annotated[str, typer.Argument(help="CSV, TSV, JSONL or Parquet: a label and a text in each row.")],
    labels: Annotated[
        str | None, typer.Option(help="Labels of the file and the model's: 0=negative,1=positive.")
    ] = None,
    json: Json = False,
) -> None:
    """Measure a model on a labelled file and store the figures with the file's name.

    They replace those of an earlier evaluation on the same file.
    """
    from worker.cli.options import label_map
    from worker.connections import open_sql
    from worker.intake.evaluate_model import evaluate_model
    from worker.settings import load_settings

    settings = load_settings()
    with _batches("scoring the rows") as progress:
        done = evaluate_model(settings, open_sql(settings), model, dataset, label_map(labels), progress)
    if json:
        output.as_json(
            {**output.evaluation_fields(done.evaluation, done.figures), "data": done.report, "notes": done.notes}
        )
        return
    output.evaluation_table(done.version, done.evaluation, done.figures)
    report = done.report
    output.line(
        f"{report['rows']:,} rows of {report['read']:,} ({report['duplicates']:,} duplicates, {report['blank']:,} "
        f"blank, {report['conflicting']:,} texts under two labels left out)"
    )
    for note in done.notes:
        output.line(f"note: {note}")


@contextmanager
def _batches(what: str) -> Iterator[Callable[[], None]]:
    """Show the number of finished batches on standard error. Yields a function to call after each."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        update(done, None, f"{what}: {done} batches")

    with output.long_work(what) as update:
        yield step
