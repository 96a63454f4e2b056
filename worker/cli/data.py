"""`tweetscore data`, `export` and `delete`: check a file before use, export predictions, delete tweets."""

import time
from dataclasses import asdict
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli import output
from worker.cli.output import Json
from worker.errors import BadRequest

if TYPE_CHECKING:
    from worker.settings import Settings

app = typer.Typer(no_args_is_help=True, help="Check files of labelled rows or tweets before use.")

DAYS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"]


class Form(StrEnum):
    csv = "csv"
    jsonl = "jsonl"
    parquet = "parquet"


@app.command()
def check(
    file: Annotated[str, typer.Argument(help="File of labelled rows or tweets, as `train` or `push` takes it.")],
    base_model: Annotated[
        str | None, typer.Option(help="Model whose tokenizer counts the tokens; by default TWEETSCORE_BASE_MODEL.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Count texts longer than this many tokens.")] = 200,
    suspects: Annotated[
        int | None, typer.Option(metavar="MODEL", help="List instead the rows that this model finds mislabelled.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="With --suspects: number of rows to list.")] = 50,
    out: Annotated[
        str | None, typer.Option("--output", help="With --suspects: also write the rows to this CSV, to correct them.")
    ] = None,
    json: Json = False,
) -> None:
    """Report a file's encoding, columns, labels, duplicates and lengths.

    Each problem is reported with its remedy. With --suspects, list the rows whose labels are probably wrong; needs
    `pip install 'tweetscore[labels]'`.
    """
    from worker.intake.file_report import check_file
    from worker.settings import load_settings

    settings = load_settings()
    if suspects is not None:
        _list_suspects(settings, file, suspects, limit, out, json)
        return
    if out is not None:
        raise BadRequest("--output is for --suspects; give a model with it")
    found = check_file(file, _with_same_tokenizer(settings, base_model or settings.base_model), max_length)
    if json:
        output.as_json(found)
    else:
        output.findings(found)


@app.command()
def pick(
    file: Annotated[str, typer.Argument(help="CSV file to write, with an empty column for the labels.")],
    count: Annotated[int, typer.Option(min=1, help="Number of tweets.")] = 100,
    json: Json = False,
) -> None:
    """Write the stored tweets that are worth labelling next to a file.

    These are tweets that the champion is unsure of and that differ from each other.
    """
    from worker.connections import open_sql
    from worker.maintenance.pick import pick as pick_tweets
    from worker.settings import load_settings

    written = pick_tweets(open_sql(load_settings()), file, count)
    if json:
        output.as_json({"file": file, "tweets": written})
    else:
        output.line(f"{written:,} tweets are in {file}; fill in the column label, then `tweetscore train {file}`")


def _with_same_tokenizer(settings: "Settings", name: str) -> str:
    """Return the base model that an adapted one was made from, which has the same tokenizer; other names unchanged."""
    from db import registry
    from training.model.base_model import adapted_id
    from worker.connections import open_sql

    while (adapted := adapted_id(name)) is not None:
        with open_sql(settings).read() as session:
            name = registry.base_model(session, adapted).base_model
    return name


def _list_suspects(settings: "Settings", file: str, model: int, limit: int, out: str | None, json: bool) -> None:
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    from worker.connections import open_sql
    from worker.maintenance.label_suspects import find_suspects, write_suspects

    with output.long_work("scoring", MofNCompleteColumn(), TimeRemainingColumn()) as update:
        found = find_suspects(settings, open_sql(settings), file, model, update)
    if out is not None:
        write_suspects(out, found.found[:limit])
    if json:
        output.as_json({**asdict(found), "found": len(found.found), "suspects": list(map(asdict, found.found[:limit]))})
    else:
        output.suspects(found, limit)


def export(
    format: Annotated[Form, typer.Option(help="Output format.")] = Form.csv,  # noqa: A002 - the option's name
    out: Annotated[str, typer.Option(help="File, replaced when the export is complete; - is standard output.")] = "-",
    model: Annotated[int | None, typer.Option(help="Model version; by default the champion.")] = None,
    since: Annotated[datetime | None, typer.Option(formats=DAYS, help="Only tweets from this time on, UTC.")] = None,
    topic: Annotated[str | None, typer.Option(help="Only tweets of this topic.")] = None,
    excel: Annotated[bool, typer.Option("--excel", help="Write CSV for Excel, with a byte-order mark.")] = False,
) -> None:
    """Write predictions to a CSV, JSONL or Parquet file.

    In CSV an apostrophe is put before cells that a spreadsheet would run as a formula.
    """
    from rich.progress import MofNCompleteColumn, TimeRemainingColumn

    from worker.connections import open_for_queries
    from worker.maintenance.export import export as write
    from worker.settings import load_settings

    if format == Form.parquet and out == "-":
        raise BadRequest("Parquet cannot be written to standard output; name a file with --out")
    if out != "-" and not Path(out).absolute().parent.is_dir():
        raise BadRequest(f"the folder of {out} does not exist; create it first")
    settings = load_settings()
    database = open_for_queries(settings)
    began = time.monotonic()
    with output.long_work("exporting", MofNCompleteColumn(), TimeRemainingColumn(), prints=out == "-") as update:
        done = write(
            database, out, format, model=model, since=since and since.replace(tzinfo=UTC),
            topic=topic, excel=excel, progress=update,
        )  # fmt: skip
    output.errors.print(f"exported {done} predictions in {time.monotonic() - began:.1f} s")


def delete(
    tweet_id: Annotated[list[str] | None, typer.Option(help="Id of a tweet. Repeatable.")] = None,
    author: Annotated[list[str] | None, typer.Option(help="Id of an author. Repeatable.")] = None,
    before: Annotated[datetime | None, typer.Option(formats=DAYS, help="Tweets written before this time, UTC.")] = None,
    compact: Annotated[bool, typer.Option(help="Rewrite their files; blocks other clients for seconds.")] = True,
    json: Json = False,
) -> None:
    """Delete tweets from the stream, from all tables and from their files."""
    from rich.progress import TextColumn

    from worker.connections import broker, open_sql, open_stream
    from worker.maintenance.deletion import TweetFilter, delete_tweets
    from worker.maintenance.deletion import compact as rewrite
    from worker.settings import load_settings

    tweets = TweetFilter(tuple(tweet_id or ()), tuple(author or ()), before and before.replace(tzinfo=UTC))
    if tweets == TweetFilter():
        raise BadRequest("nothing is selected; give --tweet-id, --author or --before")
    settings = load_settings()
    database = open_sql(settings)
    with broker(settings) as url:
        stream = open_stream(settings, url)
        with output.long_work("deleting", TextColumn("{task.fields[text]}")) as update:
            deleted = delete_tweets(
                database, stream, tweets, lambda what, count: update(count, None, f"{count} {what}")
            )
        not_rewritten = rewrite(database, stream) if compact else []
    database.close()
    if json:
        output.as_json({**vars(deleted), "not_rewritten": not_rewritten})
    else:
        output.console.print(
            f"deleted {deleted.tweets} tweets, {deleted.records} records of the stream and {deleted.dead_letters} dead "
            "letters"
        )
    for sentence in not_rewritten:
        output.errors.print(sentence, markup=False, soft_wrap=True)
    if not_rewritten:
        raise typer.Exit(1)
