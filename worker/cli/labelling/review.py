"""`tweetscore review`: pick tweets to label, label them in the terminal, and show how far it is."""

import os
import sys
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict
from itertools import repeat
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli import output
from worker.cli.output import Json
from worker.errors import BadRequest

if TYPE_CHECKING:
    from db.session import Database
    from worker.labelling.review import Question

app = typer.Typer(no_args_is_help=True, help="Label stored tweets one at a time, and pick those that are worth it.")

Annotator = Annotated[str | None, typer.Option(help="Name that your labels get; by default your user name.")]
MOST_KEYS = 9
REASONS = ("random", "uncertain", "disagreement", "spread")
READ_BYTES = 64


@app.command("pick")
def review_pick(
    count: Annotated[int, typer.Argument(min=1, help="Number of tweets.")] = 100,
    random_share: Annotated[
        float, typer.Option(min=0, max=1, help="Share that is random, for unbiased figures of quality.")
    ] = 0.5,
    json: Json = False,
) -> None:
    """Pick stored tweets to label.

    Beside the random ones these are tweets that the champion is unsure of, that champion and challenger disagree on,
    and that cover topics and kinds of texts.
    """
    from worker.connections import open_sql
    from worker.labelling.review import fill
    from worker.settings import load_settings

    settings = load_settings()
    picked = fill(open_sql(settings), settings, count, random_share=random_share)
    if json:
        output.as_json({reason: picked[reason] for reason in REASONS})
        return
    listed = ", ".join(f"{picked[reason]:,} {reason}" for reason in REASONS if picked[reason])
    output.line(f"{picked.total():,} tweets picked" + (f": {listed}" if listed else "; all stored tweets are picked"))


@app.command("read")
def review_read(annotator: Annotator = None) -> None:
    """Read picked tweets in the terminal and label them with the keys 1, 2 and 3; s skips, u undoes and q quits."""
    from worker.connections import open_sql
    from worker.settings import load_settings

    if not sys.stdin.isatty():
        raise BadRequest("`review read` reads keys, so run it in a terminal; `tweetscore label import` reads files")
    _read_keys(open_sql(load_settings()), annotator or _user())


@app.command("status")
def review_status(annotator: Annotator = None, json: Json = False) -> None:
    """Show how many picked tweets are labelled, and how well annotators agree."""
    from worker.connections import open_sql
    from worker.labelling.review import progress
    from worker.settings import load_settings

    name = annotator or _user()
    done = progress(open_sql(load_settings()), name)
    if json:
        output.as_json({"annotator": name, **asdict(done)})
        return
    output.table(
        None,
        ["picked", "labelled", "skipped", f"left for {name}", f"by {name}", "labelled by two", "agreement", "kappa"],
        [(done.picked, done.labelled, done.skipped, done.open, done.mine, done.pairs, done.agreement, done.kappa)],
    )


def _read_keys(database: "Database", annotator: str) -> None:
    from worker.labelling import review

    names = review.label_names(database)
    keys = {str(i + 1): name for i, name in enumerate(names[:MOST_KEYS])}
    question = review.next_question(database, annotator)
    if question is not None:
        _show(question, keys)
    with closing(_pressed()) as pressed:
        while question is not None and (key := next(pressed)) != "q":
            if key == "u":
                question = review.undo(database, annotator) or question
            elif key == "s":
                review.skip(database, annotator, question.tweet_id)
                question = review.next_question(database, annotator)
            elif key in keys:
                review.answer(database, annotator, question.tweet_id, keys[key])
                question = review.next_question(database, annotator)
            else:
                continue
            if question is not None:
                _show(question, keys)
    done = review.progress(database, annotator)
    output.line(f"{done.mine:,} labelled by {annotator}, {done.open:,} left")
    if question is None:
        output.line("no tweet is left to label; pick more with `tweetscore review pick`")


def _pressed() -> Generator[str, None, None]:
    """The keys as they are pressed, in small letters; q at the end of the input and for Ctrl-C.

    The terminal passes keys on at once until the generator is closed. `typer.getchar` would lose keys that are pressed
    between two calls.
    """
    import termios
    import tty

    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal, termios.TCSANOW)
        while read := os.read(terminal, READ_BYTES):
            if not read.startswith(b"\x1b"):  # arrows and function keys, which contain digits and letters
                yield from read.decode(errors="replace").lower()
    except KeyboardInterrupt:
        pass
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)
    yield from repeat("q")


def _show(question: "Question", keys: dict[str, str]) -> None:
    facts = (question.topic, question.author_id, question.tweet_created_at and f"{question.tweet_created_at:%Y-%m-%d}")
    output.line("\n" + " · ".join(_visible(str(fact)) for fact in facts if fact))
    output.line(_visible(question.text))
    output.line("  ".join(f"{key} {label}" for key, label in keys.items()) + "  s skip  u undo  q quit")


def _visible(text: str) -> str:
    """The text with control characters escaped: a tweet must not move the cursor or reverse the line."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def _user() -> str:
    import getpass

    return getpass.getuser()
