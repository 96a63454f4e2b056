"""`tweetscore tune`: search for better hyper-parameters than those of a preset."""

import json as json_format
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer

from worker.cli import output
from worker.cli.output import Json
from worker.intake.job_progress import nudge_worker

if TYPE_CHECKING:
    from training.tuning.study import TrialResult
    from worker.intake.tuning import Tuned, TuningRequest

SHOWN_TRIALS = 5  # and the preset's
# Fields that `tweetscore train` has an option for; the others need --set.
OPTIONS = (
    "base_model", "base_revision", "task", "head", "pooling", "loss", "epochs", "learning_rate", "train_batch_size",
    "max_length", "split", "seed",
)  # fmt: skip


def tune(
    dataset: Annotated[str, typer.Argument(help="File of labelled rows, as `train` takes it.")],
    preset: Annotated[str | None, typer.Option(help="Preset to start from, and to vary: guide or fast.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Encoder: a Hub name, a local folder, or starter.")] = None,
    base_revision: Annotated[str | None, typer.Option(help="Commit of the Hub repository.")] = None,
    task: Annotated[str | None, typer.Option(help="Task, as for `train`.")] = None,
    labels: Annotated[str | None, typer.Option(help="Allowed labels: a,b or 0=negative,1=positive.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the split and of the search.")] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="Fix any field, which is then not varied: epochs=4. Repeatable."),
    ] = None,
    minutes: Annotated[float, typer.Option(min=0.01, help="Time limit of this run.")] = 30.0,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Stop when this many trials of the study are finished.")
    ] = None,
    splits: Annotated[
        int | None,
        typer.Option(min=1, max=20, help="Trainings of one trial, each with other validation rows; default by size."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Discard the trials of earlier runs.")] = False,
    train: Annotated[bool, typer.Option("--train", help="Queue a job with the best values at the end.")] = False,
    json: Json = False,
) -> None:
    """Search for better hyper-parameters, in this process, within a time.

    The same command continues a study that was stopped. Values are compared on validation rows, never on test rows.

    With few validation rows the best result is partly chance.

    Needs Optuna, which the extra `tune` installs.
    """
    import importlib.util

    from training.errors import TuningUnavailable

    if importlib.util.find_spec("optuna") is None:
        raise TuningUnavailable("tuning needs Optuna, which is not installed; `pip install 'tweetscore[tune]'`")
    from worker.cli.options import label_map, pairs
    from worker.intake.tuning import TuningRequest

    given: dict[str, Any] = {
        "base_model": base_model, "base_revision": base_revision, "task": task, "seed": seed,
        "labels": label_map(labels),
    }  # fmt: skip
    options = {name: value for name, value in given.items() if value is not None} | pairs("--set", setting or [])
    _run(TuningRequest(dataset, preset, options, minutes, trials, splits, fresh), train, json)


def _run(request: "TuningRequest", train: bool, json: bool) -> None:
    from rich.progress import TextColumn

    from worker.connections import open_sql
    from worker.intake.submit_job import submit_training
    from worker.intake.tuning import Notices, tune
    from worker.settings import load_settings

    settings = load_settings()
    database, limit = open_sql(settings), round(60 * request.minutes)
    with output.long_work("tuning", TextColumn("{task.fields[text]}")) as update:
        notices = Notices(
            lambda seconds, text: update(min(round(seconds), limit), limit, text),
            lambda trial: output.aside(_sentence(trial)),
        )
        tuned = tune(settings, database, request, notices)
    interrupted = tuned.ended_by == "interrupted"
    job = None
    if train and not interrupted:
        job = submit_training(settings, database, request.dataset, tuned.preset, **tuned.options)
    hint = nudge_worker(settings) if job else ""
    command = shlex.join(["tweetscore", "train", request.dataset, "--preset", tuned.preset, *_arguments(tuned.options)])
    if json:
        output.as_json({**tuned.as_dict(), "command": command, "job_id": job.id if job else None})
    else:
        _print(tuned, command)
        if job:
            output.console.print(f"job {job.id} queued{hint}")
    if interrupted:
        raise typer.Exit(1)


def _arguments(options: dict[str, Any]) -> list[str]:
    """The arguments of `tweetscore train` for these fields."""
    arguments = []
    for name, value in options.items():
        if name in OPTIONS:
            arguments += [f"--{name.replace('_', '-')}", str(value)]
        else:
            text = value if isinstance(value, str) else json_format.dumps(value, ensure_ascii=False)
            arguments += ["--set", f"{name}={text}"]
    return arguments


def _sentence(trial: "TrialResult") -> str:
    value = "no figure" if trial.value is None else f"validation {trial.value:.4f}"
    preset = ", the preset's values" if trial.preset else ""
    return f"trial {trial.number}{preset}: {trial.state}, {value}, {trial.seconds:.0f} s"


def _print(tuned: "Tuned", command: str) -> None:
    each = "1 training" if tuned.splits == 1 else f"{tuned.splits} trainings"
    output.line(
        f"study {tuned.study}: {each} a trial, {tuned.validation_rows} validation rows; the test rows were not used"
    )
    ended = [trial for trial in tuned.trials if trial.state != "stopped"]
    shown = ended[:SHOWN_TRIALS] + [trial for trial in ended[SHOWN_TRIALS:] if trial.preset]
    output.table(
        f"The best of the finished trials ({len(ended)}), by the mean validation figure of their trainings",
        ["trial", "validation", "state", "seconds", "values"],
        [
            (
                trial.number, trial.value, f"{trial.state}, preset" if trial.preset else trial.state,
                f"{trial.seconds:.0f}", trial.fault or _values(trial.parameters),
            )
            for trial in shown
        ],
    )  # fmt: skip
    if tuned.importance:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in tuned.importance.items())
        output.line(f"what made the difference between complete trials: {shares}")
    output.line(_comparison(tuned))
    if tuned.ended_by == "interrupted":
        output.line("interrupted; the same command continues the study")
    output.line(f"train with the best values: {command}")


def _comparison(tuned: "Tuned") -> str:
    if tuned.best.preset or tuned.best.value is None or tuned.preset_value is None:
        return "no values were better than the preset's"
    gain = tuned.best.value - tuned.preset_value
    sentence = f"the best figure is {gain:.4f} above the preset's; its standard error is {tuned.standard_error:.4f}"
    return sentence + (", so the difference may be chance" if gain < 2 * tuned.standard_error else "")


def _values(parameters: dict[str, Any]) -> str:
    shown = (f"{value:g}" if isinstance(value, float) else str(value) for value in parameters.values())
    return ", ".join(f"{name} {value}" for name, value in zip(parameters, shown, strict=True))
