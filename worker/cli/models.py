"""`tweetscore models`: list, compare, promote and delete models."""

from dataclasses import asdict
from shutil import rmtree
from typing import Annotated

import typer

from worker.cli import output
from worker.cli.output import Json
from worker.scoring.engine_choice import fallback_folder, saved_choices

app = typer.Typer(no_args_is_help=True, help="List, compare, promote and delete trained models.")

Alias = Annotated[str, typer.Option(help="Alias to move: champion (scores the stream) or challenger.")]
Model = Annotated[int, typer.Argument(help="Model version.")]
CHAMPION = "champion"  # `db.registry.CHAMPION`, without loading SQLAlchemy
MOST_WRONG = 20


@app.command("list")
def models_list(
    deleted: Annotated[bool, typer.Option("--deleted", help="Include deleted models.")] = False, json: Json = False
) -> None:
    """List the trained models with their test metrics, newest first."""
    from db import registry
    from worker.connections import open_sql
    from worker.settings import load_settings

    with open_sql(load_settings()).read() as session:
        rows = [(v, registry.metrics(session, v.id)) for v in registry.versions(session, deleted)]
        aliases = {alias: registry.assigned(session, alias) for alias in registry.ALIASES}
    named = {v.id: [alias for alias, version in aliases.items() if version == v.id] for v, _ in rows}
    if json:
        output.as_json(
            [{**output.fields(v), "aliases": named[v.id], "f1_macro": m.get(("f1_macro", ""))} for v, m in rows]
        )
        return
    output.table(
        None,
        ["model", "alias", "job", "base model", "labels", "accuracy", "F1 macro", "created"],
        [
            (v.id, ", ".join(named[v.id]) or ("deleted" if v.deleted_at else ""), v.job_id, v.base_model,
             ", ".join(v.labels), m.get(("accuracy", "")), m.get(("f1_macro", "")), v.created_at)
            for v, m in rows
        ],
    )  # fmt: skip


@app.command("show")
def models_show(model: Model, json: Json = False) -> None:
    """Show one model: its artifact, engine, test metrics and most confident errors."""
    from db import jobs, registry
    from worker.connections import model_store, open_sql
    from worker.settings import load_settings

    settings = load_settings()
    with open_sql(settings).read() as session:
        version, figures = registry.get(session, model), registry.metrics(session, model)
        cells = registry.confusion(session, model)
        wrong = registry.wrongest(session, model, MOST_WRONG)
        assignments = [row for row in registry.history(session) if row.model_version_id == model]
        job = jobs.find(session, version.job_id) if version.job_id is not None else None
    report = (job and job.data_report) or {}
    engines = saved_choices(model_store(settings).place(version.artifact_url, version.sha256), settings.engines)
    if json:
        written = {
            "metrics": output.metric_rows(figures),
            "confusion": [{"actual": a, "predicted": p, "count": n} for (a, p), n in sorted(cells.items())],
            "engines": [asdict(choice) for choice in engines],
            "wrong": [output.fields(row) for row in wrong],
            "distillation": report.get("distillation"),
            "promoted": [{"alias": row.alias, "assigned_at": row.assigned_at} for row in assignments],
        }
        output.as_json({**output.fields(version), **written})
        return
    output.console.print(
        f"model {version.id} of job {version.job_id}: {version.base_model} {version.base_revision or ''}"
    )
    output.console.print(f"{version.artifact_url}\nsha256 {version.sha256}", soft_wrap=True)
    if version.deleted_at:
        output.console.print(f"deleted {version.deleted_at:%Y-%m-%d %H:%M:%S}", style="yellow")
    for row in assignments:
        output.console.print(f"{row.alias} since {row.assigned_at:%Y-%m-%d %H:%M:%S}")
    for choice in engines:
        output.engine_table(choice)
    if not engines:
        output.console.print(
            "no engine was tried on this machine yet; until a worker does, the model scores on torch-float32"
        )
    output.test_table(version, figures)
    output.teacher_table(report)
    if cells:
        output.table(
            "Confusion on the test rows",
            ["actual \\ predicted", *version.labels],
            [(actual, *(cells[actual, predicted] for predicted in version.labels)) for actual in version.labels],
        )
    if wrong:
        output.table(
            f"Most confidently wrong ({len(wrong)} test rows)",
            ["row", "actual", "predicted", "probability", "text"],
            [(row.row_number, row.actual, row.predicted, row.probability, row.text) for row in wrong],
        )


@app.command("compare")
def models_compare(one: Model, other: Model, json: Json = False) -> None:
    """Compare the test metrics of two models, with a significance test."""
    from db import registry
    from training.evaluation.metrics import mcnemar
    from worker.connections import open_sql
    from worker.settings import load_settings

    with open_sql(load_settings()).read() as session:
        versions = [registry.get(session, model) for model in (one, other)]
        figures = [registry.metrics(session, model) for model in (one, other)]
        shared, only_one, only_other = registry.paired(session, one, other)
    p_value = mcnemar(only_one, only_other)
    names = [key for key in sorted(set(figures[0]) | set(figures[1])) if not key[0].startswith(("tfidf_", "majority_"))]
    if json:
        rows = [{"metric": m, "label": k, "values": [f.get((m, k)) for f in figures]} for m, k in names]
        paired = {"rows": shared, "only_first_right": only_one, "only_second_right": only_other, "p_value": p_value}
        output.as_json({"models": [one, other], "metrics": rows, "shared_test_rows": paired})
        return
    output.table(
        f"model {one} ({versions[0].base_model}) and model {other} ({versions[1].base_model})",
        ["metric", f"model {one}", f"model {other}", "difference"],
        [(f"{m} {k}".strip(), *(f.get((m, k)) for f in figures), _difference(*(f.get((m, k)) for f in figures)))
         for m, k in names],
    )  # fmt: skip
    if shared:
        output.console.print(
            f"of {shared} test rows in common, only model {one} predicts {only_one} correctly, and only model {other} "
            f"{only_other}: exact McNemar test, p = {p_value:.3g}"
        )
    else:
        output.console.print("the models have no test row in common, so their metrics cannot be compared")


@app.command("promote")
def models_promote(model: Model, alias: Alias = CHAMPION, json: Json = False) -> None:
    """Make a model the champion, which scores the stream.

    Workers use the previous champion until they have loaded the new one.
    """
    from db import registry
    from worker.connections import open_sql
    from worker.settings import load_settings

    with open_sql(load_settings()).begin() as session:
        registry.assign(session, alias, model)
    _print_assignment(alias, model, json)


@app.command("rollback")
def models_rollback(alias: Alias = CHAMPION, json: Json = False) -> None:
    """Move an alias back to its previous model."""
    from db import registry
    from worker.connections import open_sql
    from worker.settings import load_settings

    with open_sql(load_settings()).begin() as session:
        _, model = registry.rollback(session, alias)
    _print_assignment(alias, model, json)


@app.command("delete")
def models_delete(
    model: Model,
    predictions: Annotated[bool, typer.Option("--predictions", help="Also delete its predictions.")] = False,
    json: Json = False,
) -> None:
    """Delete a model's artifact.

    Its test metrics stay in the database. Its predictions are deleted only with --predictions.
    """
    from db import registry
    from worker.connections import model_store, open_sql
    from worker.settings import load_settings

    settings = load_settings()
    with open_sql(settings).begin() as session:
        version = registry.mark_deleted(session, model, predictions)
    # Remove the artifact after the commit: a row without its artifact would be an error, the reverse is not.
    model_store(settings).remove(version.artifact_url, version.sha256)
    rmtree(fallback_folder(model_store(settings).place(version.artifact_url, version.sha256), settings.engines), True)
    if json:
        output.as_json(output.fields(version))
    else:
        output.console.print(f"model {model} is deleted" + (", and so are its predictions" if predictions else ""))


def _difference(one: float | None, other: float | None) -> str:
    return "" if one is None or other is None else f"{other - one:+.4f}"


def _print_assignment(alias: str, model: int, json: bool) -> None:
    if json:
        output.as_json({"alias": alias, "model_version_id": model})
    else:
        output.console.print(f"model {model} is the {alias} now")
