"""`tweetscore dead`: list, show, retry and drop dead letters."""

import json as jsonlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli import output
from worker.cli.output import Json
from worker.errors import BadRecord

if TYPE_CHECKING:
    from db.models import DeadLetter

app = typer.Typer(no_args_is_help=True, help="List, show, retry and drop records that could not be scored.")

Ids = Annotated[list[str] | None, typer.Argument(help="Record ids, as `dead list` prints them.")]
All = Annotated[bool, typer.Option("--all", help="All dead letters.")]


@app.command("list")
def dead_list(
    limit: Annotated[int, typer.Option(min=1, help="Number of rows to print.")] = 20, json: Json = False
) -> None:
    """List the newest dead letters with their reasons."""
    from db import predictions
    from worker.connections import open_sql
    from worker.settings import load_settings

    with open_sql(load_settings()).read() as session:
        letters, count = predictions.recent_dead(session, limit), predictions.dead_count(session)
    if json:
        output.as_json([_described(letter) for letter in letters])
        return
    output.table(
        None,
        ["record", "tweet", "reason", "attempts", "buried"],
        [(x.record_id, _tweet_id(x), x.reason, x.attempts, x.buried_at) for x in letters],
    )
    output.console.print(f"{count} dead letters" + (f", the newest {limit} shown" if count > limit else ""))


@app.command("show")
def dead_show(
    record_id: Annotated[str, typer.Argument(help="Record id, as `dead list` prints it.")], json: Json = False
) -> None:
    """Show one dead letter with its payload."""
    from db import predictions
    from worker.connections import open_sql
    from worker.settings import load_settings

    with open_sql(load_settings()).read() as session:
        letter = predictions.dead_letter(session, record_id)
    described = {**_described(letter), "payload": _payload(letter), "other_fields": letter.other_fields}
    if json:
        output.as_json(described)
        return
    for name, value in described.items():
        if value is not None:
            written = value if isinstance(value, str) else jsonlib.dumps(value, ensure_ascii=False, default=str)
            output.console.print(f"{name:13} {written}", markup=False, soft_wrap=True)


@app.command("retry")
def dead_retry(record_ids: Ids = None, every: All = False, json: Json = False) -> None:
    """Put dead letters back into the stream, to be scored again."""
    from worker.app import make_app
    from worker.connections import broker, open_sql, open_stream
    from worker.maintenance.dead_letters import retry
    from worker.settings import load_settings

    settings, ids = load_settings(), _chosen(record_ids, every)
    with broker(settings) as url:
        done = retry(open_sql(settings), open_stream(settings, url), make_app(settings), ids)
    _print_count("put back into the stream", done, json)


@app.command("drop")
def dead_drop(record_ids: Ids = None, every: All = False, json: Json = False) -> None:
    """Delete dead letters."""
    from worker.connections import open_sql
    from worker.maintenance.dead_letters import drop
    from worker.settings import load_settings

    _print_count("dropped", drop(open_sql(load_settings()), _chosen(record_ids, every)), json)


def _chosen(record_ids: list[str] | None, every: bool) -> list[str] | None:
    if bool(record_ids) == every:
        raise typer.BadParameter("give record ids or --all, but not both")
    return record_ids or None


def _print_count(what: str, done: int, json: bool) -> None:
    if json:
        output.as_json({"count": done})
    else:
        output.console.print(f"{done} dead letters {what}")


def _described(letter: "DeadLetter") -> dict[str, Any]:
    return {
        "record_id": letter.record_id,
        "tweet_id": _tweet_id(letter),
        "reason": letter.reason,
        "attempts": letter.attempts,
        "buried_at": letter.buried_at,
    }


def _tweet_id(letter: "DeadLetter") -> str | None:
    """Return the id of the tweet, also of a record that is not a valid tweet; None when it has none."""
    from worker.stream.tweet_record import parse_payload

    try:
        return parse_payload(letter.payload).id
    except BadRecord:
        found = _payload(letter)
        return str(found["id"]) if isinstance(found, dict) and isinstance(found.get("id"), str | int) else None


def _payload(letter: "DeadLetter") -> Any:
    """Decode JSON, return text unchanged, and escape other bytes."""
    try:
        return jsonlib.loads(letter.payload)
    except (ValueError, RecursionError):
        return letter.payload.decode("utf-8", errors="backslashreplace")
