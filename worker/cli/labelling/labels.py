"""`tweetscore label`: export tweets to be labelled, import labels, and count them."""

from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from worker.cli import output
from worker.cli.data import DAYS
from worker.cli.output import Json
from worker.errors import BadRequest

app = typer.Typer(no_args_is_help=True, help="Exchange labels of stored tweets with labelling tools.")

Form = Annotated[
    str | None,
    typer.Option("--format", help="label-studio, doccano or csv; by default by the name: .json, .jsonl or .csv."),
]


@app.command("export")
def label_export(
    file: Annotated[str, typer.Argument(help="File to write, replaced when it is complete; - is standard output.")],
    form: Form = None,
    since: Annotated[datetime | None, typer.Option(formats=DAYS, help="Only tweets from this time on, UTC.")] = None,
    topic: Annotated[str | None, typer.Option(help="Only tweets of this topic.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="At most so many tweets, the newest.")] = None,
    has_label: Annotated[
        bool | None, typer.Option("--labelled/--unlabelled", help="Only tweets with, or without, a label by people.")
    ] = None,
    json: Json = False,
) -> None:
    """Write tweets, their labels and the champion's predictions to a file.

    The formats are those that Label Studio, doccano and spreadsheets read.
    """
    from rich.progress import TextColumn

    from worker.connections import open_for_queries
    from worker.labelling.export_labels import export_labels
    from worker.settings import load_settings

    if file != "-" and not Path(file).absolute().parent.is_dir():
        raise BadRequest(f"the folder of {file} does not exist; create it first")
    database = open_for_queries(load_settings())
    with output.long_work("exporting", TextColumn("{task.fields[text]}"), prints=file == "-") as update:
        written = export_labels(
            database, file, form, since=since and since.replace(tzinfo=UTC), topic=topic, has_label=has_label,
            limit=limit, progress=lambda done: update(done, None, f"{done:,} tweets"),
        )  # fmt: skip
    if json and file != "-":
        output.as_json({"file": file, "tweets": written})
    else:
        output.aside(f"exported {written:,} tweets")


@app.command("import")
def label_import(
    file: Annotated[str, typer.Argument(help="File that Label Studio, doccano or a spreadsheet exported, or a URL.")],
    annotator: Annotated[str | None, typer.Option(help="Name of the annotator of rows that name none.")] = None,
    proposed: Annotated[
        bool, typer.Option("--proposed", help="A model proposed these labels: keep them apart, train on none.")
    ] = False,
    form: Form = None,
    json: Json = False,
) -> None:
    """Store the labels of a file. Importing a file again adds nothing.

    A tweet that is not stored yet is stored first if its row has a text.
    """
    from worker.connections import open_sql
    from worker.labelling.import_labels import import_labels
    from worker.settings import load_settings

    database = open_sql(load_settings())
    report = import_labels(database, file, annotator=annotator, proposed=proposed, form=form)
    if json:
        output.as_json(asdict(report))
    else:
        output.line(
            f"{report.added:,} labels added, {report.known:,} known already; {report.unlabelled:,} rows without a "
            f"label, {report.skipped:,} skipped by their annotator"
        )
        if report.stored_tweets:
            output.line(f"{report.stored_tweets:,} tweets were new and are stored; `tweetscore rescore` scores them")
    if report.missing:
        output.aside(
            f"{report.missing:,} tweets are not stored, and their rows have no text: {', '.join(report.missing_ids)}"
            + (", ..." if report.missing > len(report.missing_ids) else "")
            + "; publish them with `tweetscore push` and import the file again"
        )
        raise typer.Exit(1)


@app.command("status")
def label_status(json: Json = False) -> None:
    """Count the labels by source, annotator and label, and the labelled tweets."""
    from db.labelling import labels
    from worker.connections import open_sql
    from worker.settings import load_settings

    with open_sql(load_settings()).read() as session:
        counted, tweets = labels.counts(session), labels.labelled_count(session)
    if json:
        output.as_json({"tweets": tweets, "labels": [dict(row._mapping) for row in counted]})
        return
    output.table(None, ["source", "annotator", "label", "labels"], [tuple(row) for row in counted])
    output.line(f"{tweets:,} tweets are labelled by people" + ("" if tweets else "; see `tweetscore label import`"))
