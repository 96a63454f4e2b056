"""`tweetscore webhook`: try the webhook out."""

import typer

from worker.cli import output
from worker.cli.output import Json

app = typer.Typer(no_args_is_help=True, help="Try the webhook out.")


@app.callback()
def _group() -> None:
    """Keeps `test` a command of its own: a group with one command would be that command."""


@app.command("test")
def webhook_test(json: Json = False) -> None:
    """Send one signed event of the kind webhook.test and print the answer. Exit code 1 when it is not accepted."""
    from db.models import utc_now
    from worker.maintenance.webhook import NotDelivered, required_receiver, send
    from worker.settings import load_settings

    receiver = required_receiver(load_settings())
    try:
        answer = send(receiver, {"id": 0, "kind": "webhook.test", "at": utc_now().isoformat()})
    except NotDelivered as error:
        if json:
            output.as_json({"accepted": False, "finding": str(error)})
        else:
            output.errors.print(str(error), markup=False, soft_wrap=True)
        raise typer.Exit(1) from error
    if json:
        output.as_json({"accepted": True, "status": answer.status, "answer": answer.text})
    else:
        output.line(f"{receiver.host} accepted the event with status {answer.status}: {answer.text or '(no text)'}")
