"""`tweetscore data | export | delete | plot`: what goes in looked at beforehand, and what comes out beside SQL."""

import time
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import MofNCompleteColumn, TextColumn, TimeRemainingColumn

from worker import show
from worker.errors import BadRequest
from worker.runtime import broker, open_for_queries, open_sql, open_stream
from worker.settings import load_settings
from worker.show import Json

app = typer.Typer(no_args_is_help=True, help="Files of labelled rows or tweets, before they are used.")

DAYS = ["%Y-%m-%d", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%SZ"]


class Form(StrEnum):
    csv = "csv"
    jsonl = "jsonl"
    parquet = "parquet"


class Picture(StrEnum):
    sentiment = "sentiment"
    confusion = "confusion"
    calibration = "calibration"
    throughput = "throughput"


@app.command()
def check(
    file: Annotated[str, typer.Argument(help="Labelled rows or tweets, as `train` or `push` takes them.")],
    base_model: Annotated[str | None, typer.Option(help="Whose tokenizer counts; the setting's if unnamed.")] = None,
    max_length: Annotated[int, typer.Option(min=8, help="Tokens a text is cut to.")] = 200,
    json: Json = False,
) -> None:
    """Look at a file: encoding, columns, labels, duplicates, lengths, and what to do about what is wrong."""
    from worker.check import check_file

    settings = load_settings()
    found = check_file(file, base_model or settings.base_model, max_length)
    if json:
        show.as_json(found)
    else:
        show.findings(found)


def export(
    format: Annotated[Form, typer.Option(help="csv, jsonl or parquet.")] = Form.csv,  # noqa: A002 - the option's name
    out: Annotated[str, typer.Option(help="File, there whole or not at all; - is standard output.")] = "-",
    model: Annotated[int | None, typer.Option(help="Model version; the champion if unnamed.")] = None,
    since: Annotated[datetime | None, typer.Option(formats=DAYS, help="Tweets from then on, UTC.")] = None,
    topic: Annotated[str | None, typer.Option(help="Tweets of one topic.")] = None,
    excel: Annotated[bool, typer.Option("--excel", help="CSV as Excel reads it: with a byte-order mark.")] = False,
) -> None:
    """Write predictions to a file. Cells that a spreadsheet would run are defused with an apostrophe."""
    from worker.export import export as write

    if format == Form.parquet and out == "-":
        raise BadRequest("Parquet goes into a file; name one with --out")
    if out != "-" and not Path(out).absolute().parent.is_dir():
        raise BadRequest(f"there is no folder for {out}; make it first")
    settings = load_settings()
    database = open_for_queries(settings)
    began = time.monotonic()
    with show.long_work("exporting", MofNCompleteColumn(), TimeRemainingColumn(), prints=out == "-") as tell:
        done = write(
            database, out, format, model=model, since=since and since.replace(tzinfo=UTC),
            topic=topic, excel=excel, progress=tell,
        )  # fmt: skip
    show.errors.print(f"exported {done} predictions in {time.monotonic() - began:.1f} s")


def delete(
    tweet_id: Annotated[list[str] | None, typer.Option(help="A tweet's id; may be repeated.")] = None,
    author: Annotated[list[str] | None, typer.Option(help="An author's id; may be repeated.")] = None,
    before: Annotated[datetime | None, typer.Option(formats=DAYS, help="Tweets written before then, UTC.")] = None,
    compact: Annotated[bool, typer.Option(help="Rewrite the files they lay in; others wait for seconds.")] = True,
    json: Json = False,
) -> None:
    """Delete tweets for good: from the stream, from every table, and from the files behind them."""
    from worker.forget import Wish, forget
    from worker.forget import compact as rewrite

    wish = Wish(tuple(tweet_id or ()), tuple(author or ()), before and before.replace(tzinfo=UTC))
    if wish == Wish():
        raise BadRequest("nothing is named; say --tweet-id, --author or --before")
    settings = load_settings()
    database = open_sql(settings)
    with broker(settings) as url:
        stream = open_stream(settings, url)
        with show.long_work("deleting", TextColumn("{task.fields[text]}")) as tell:
            gone = forget(database, stream, wish, lambda what, count: tell(count, None, f"{count} {what}"))
        left = rewrite(database, stream) if compact else []
    database.close()
    if json:
        show.as_json({**vars(gone), "not_rewritten": left})
    else:
        show.console.print(
            f"deleted {gone.tweets} tweets, {gone.records} records of the stream and {gone.dead_letters} dead letters"
        )
    for sentence in left:
        show.errors.print(sentence, markup=False, soft_wrap=True)
    if left:
        raise typer.Exit(1)


def plot(
    picture: Annotated[Picture, typer.Argument(help="sentiment, confusion, calibration or throughput.")],
    out: Annotated[Path, typer.Option(help="A PNG file.")],
    model: Annotated[int | None, typer.Option(help="Model version; the champion if unnamed.")] = None,
) -> None:
    """Draw a picture of what the database holds."""
    from worker.pictures import draw

    if not out.absolute().parent.is_dir():
        raise BadRequest(f"there is no folder for {out}; make it first")
    settings = load_settings()
    draw(open_for_queries(settings), picture, model).savefig(out, format="png", dpi=150)
    show.console.print(f"{out}", markup=False)
