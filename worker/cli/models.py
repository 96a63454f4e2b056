"""`tweetscore models`: list, compare, promote and delete models; `imports` holds the other commands."""

from dataclasses import asdict
from shutil import rmtree
from typing import TYPE_CHECKING, Annotated

import typer

from worker.cli import imports, output, quality
from worker.cli.output import Json
from worker.cli.training import job_output
from worker.engines.engine_choice import fallback_folder, saved_choices

if TYPE_CHECKING:
    from db.models import Evaluation, TestPrediction

    Evaluations = list[tuple[Evaluation, dict[tuple[str, str], float]]]

app = typer.Typer(no_args_is_help=True, help="List, compare, import, combine, evaluate, promote and delete models.")
app.command("import")(imports.models_import)
app.command("cascade")(imports.models_cascade)
app.command("evaluate")(imports.models_evaluate)

Alias = Annotated[str, typer.Option(help="Alias to move: champion (scores the stream) or challenger.")]
Model = Annotated[int, typer.Argument(help="Model version.")]
CHAMPION = "champion"  # `db.registry.CHAMPION`, without loading SQLAlchemy
MOST_WRONG = 20
LISTED_METRICS = ("f1_macro", "mean_absolute_error")


@app.command("list")
def models_list(
    deleted: Annotated[bool, typer.Option("--deleted", help="Include deleted models.")] = False, json: Json = False
) -> None:
    """List the models with their test metrics, newest first."""
    from db import registry
    from worker.connections import open_sql
    from worker.settings import load_settings

    with open_sql(load_settings()).read() as session:
        rows = [(v, registry.metrics(session, v.id)) for v in registry.versions(session, deleted)]
        measured = {v.id: registry.evaluations(session, v.id) for v, _ in rows}
        origins = {v.id: v.job_id or ("cascade" if registry.cascade(session, v.id) else "imported") for v, _ in rows}
        aliases = {alias: registry.assigned(session, alias) for alias in registry.ALIASES}
    named = {v.id: [alias for alias, version in aliases.items() if version == v.id] for v, _ in rows}
    if json:
        output.as_json(
            [
                {
                    **output.fields(v),
                    "aliases": named[v.id],
                    **{name: m.get((name, "")) for name in LISTED_METRICS},
                    "evaluations": [output.evaluation_fields(*pair) for pair in measured[v.id]],
                }
                for v, m in rows
            ]
        )
        return
    output.table(
        None,
        ["model", "alias", "job", "base model", "labels", "accuracy", "F1 macro", "MAE", "created"],
        [
            (v.id, ", ".join(named[v.id]) or ("deleted" if v.deleted_at else ""), origins[v.id],
             v.base_model, ", ".join(v.labels), m.get(("accuracy", "")),
             *((m.get((name, "")) for name in LISTED_METRICS) if m else (output.NO_TEST_FIGURES, "")), v.created_at)
            for v, m in rows
        ],
    )  # fmt: skip
    if any(measured.values()):
        output.table(
            "Evaluations",
            ["model", "file", "rows", "F1 macro", "evaluated"],
            [
                (v.id, evaluation.dataset, evaluation.rows, output.macro_f1(figures), evaluation.evaluated_at)
                for v, _ in rows
                for evaluation, figures in measured[v.id]
            ],
        )


@app.command("bases")
def models_bases(json: Json = False) -> None:
    """List the base models that were adapted to stored tweets, newest first."""
    from db import registry
    from worker.connections import open_sql
    from worker.settings import load_settings

    with open_sql(load_settings()).read() as session:
        rows = registry.base_models(session)
    if json:
        output.as_json([{"name": f"adapted:{row.id}", **output.fields(row)} for row in rows])
    else:
        job_output.base_table(rows)


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
        wrong, measured = registry.wrongest(session, model, MOST_WRONG), registry.evaluations(session, model)
        assignments = [row for row in registry.history(session) if row.model_version_id == model]
        job = jobs.find(session, version.job_id) if version.job_id is not None else None
        cascade, used_by = registry.cascade(session, model), registry.cascades_with(session, model)
    report = (job and job.data_report) or {}
    engines = saved_choices(model_store(settings).place(version.artifact_url, version.sha256), settings.engines)
    if json:
        written = {
            "metrics": output.metric_rows(figures),
            "evaluations": [output.evaluation_fields(*pair) for pair in measured],
            "confusion": [{"actual": a, "predicted": p, "count": n} for (a, p), n in sorted(cells.items())],
            "engines": [asdict(choice) for choice in engines],
            "wrong": [output.fields(row) for row in wrong],
            "distillation": report.get("distillation"),
            "cascade": None if cascade is None else output.fields(cascade),
            "used_by_cascades": used_by,
            "promoted": [{"alias": row.alias, "assigned_at": row.assigned_at} for row in assignments],
        }
        output.as_json({**output.fields(version), **written})
        return
    origin = f" of job {version.job_id}" if version.job_id else "" if cascade else " (imported)"
    output.line(f"model {version.id}{origin}: {version.base_model} {version.base_revision or ''}")
    output.console.print(f"{version.artifact_url}\nsha256 {version.sha256}", soft_wrap=True)
    if version.deleted_at:
        output.console.print(f"deleted {version.deleted_at:%Y-%m-%d %H:%M:%S}", style="yellow")
    for row in assignments:
        output.console.print(f"{row.alias} since {row.assigned_at:%Y-%m-%d %H:%M:%S}")
    for user in used_by:
        output.line(f"a part of model {user}, a cascade")
    if cascade:
        output.cascade_table(
            f"student: model {cascade.student_id}, teacher: model {cascade.teacher_id}; `tweetscore models show` shows "
            "the engine of each",
            cascade,
        )
    for choice in engines:
        output.engine_table(choice)
    if not engines and not cascade:
        output.console.print(
            "no engine was tried on this machine yet; until a worker does, the model scores on torch-float32"
        )
    if figures:
        output.test_table(version, figures)
    else:
        remedy = "" if version.deleted_at else f"; `tweetscore models evaluate {model} labelled.csv` measures it"
        output.line(f"{output.NO_TEST_FIGURES}: no job measured this model{remedy}")
    for evaluation, found in measured:
        output.evaluation_table(version, evaluation, found)
    job_output.teacher_table(report)
    _print_test_rows(version.labels, cells, wrong)


def _print_test_rows(labels: list[str], cells: dict[tuple[str, str], int], wrong: "list[TestPrediction]") -> None:
    """Print the confusion matrix, if the test rows have one, and the worst predictions."""
    from training.data.columns import VALUE

    if cells:
        output.table(
            "Confusion on the test rows",
            ["actual \\ predicted", *labels],
            [(actual, *(cells[actual, predicted] for predicted in labels)) for actual in labels],
        )
    if wrong:
        output.table(
            f"{'Largest errors' if labels == [VALUE] else 'Most confidently wrong'} ({len(wrong)} test rows)",
            ["row", "actual", "predicted", "probability", "text"],
            [(row.row_number, row.actual, row.predicted, row.probability, row.text) for row in wrong],
        )


@app.command("compare")
def models_compare(
    one: Model,
    other: Model,
    live: Annotated[
        bool, typer.Option("--live", help="Compare on the stored tweets that both scored, instead of test rows.")
    ] = False,
    json: Json = False,
) -> None:
    """Compare the test metrics of two models, with a significance test."""
    if live:
        quality.compare(one, other, json)
        return
    from db import registry
    from training.data.columns import VALUE
    from training.evaluation.metrics import mcnemar
    from worker.connections import open_sql
    from worker.settings import load_settings

    with open_sql(load_settings()).read() as session:
        versions = [registry.get(session, model) for model in (one, other)]
        figures = [registry.metrics(session, model) for model in (one, other)]
        measured = [registry.evaluations(session, model) for model in (one, other)]
        shared, only_one, only_other = registry.paired(session, one, other)
    p_value = mcnemar(only_one, only_other)
    names = [key for key in sorted(set(figures[0]) | set(figures[1])) if not key[0].startswith(("tfidf_", "majority_"))]
    if json:
        rows = [{"metric": m, "label": k, "values": [f.get((m, k)) for f in figures]} for m, k in names]
        evaluations = [[output.evaluation_fields(*pair) for pair in pairs] for pairs in measured]
        paired = {"rows": shared, "only_first_right": only_one, "only_second_right": only_other, "p_value": p_value}
        output.as_json(
            {"models": [one, other], "metrics": rows, "shared_test_rows": paired, "evaluations": evaluations}
        )
        return
    if names:
        output.table(
            f"model {one} ({versions[0].base_model}) and model {other} ({versions[1].base_model})",
            ["metric", f"model {one}", f"model {other}", "difference"],
            [(f"{m} {k}".strip(), *(f.get((m, k)) for f in figures), _difference(*(f.get((m, k)) for f in figures)))
             for m, k in names],
        )  # fmt: skip
    for model, found in zip((one, other), figures, strict=True):
        if not found:
            output.line(f"model {model} has {output.NO_TEST_FIGURES}")
    if same := _same_file(*measured):
        output.table("Evaluated on the same file", ["file", "rows", f"model {one}", f"model {other}"], same)
    if shared and versions[0].labels == versions[1].labels == [VALUE]:
        output.console.print(
            f"of {shared} test rows in common, model {one} is closer to {only_one} targets, and model {other} to "
            f"{only_other}: exact sign test, p = {p_value:.3g}"
        )
    elif shared:
        output.console.print(
            f"of {shared} test rows in common, only model {one} predicts {only_one} correctly, and only model {other} "
            f"{only_other}: exact McNemar test, p = {p_value:.3g}"
        )
    else:
        output.console.print("the models have no test row in common, so their test metrics cannot be compared")


@app.command("promote")
def models_promote(
    model: Model,
    alias: Alias = CHAMPION,
    force: Annotated[
        bool, typer.Option("--force", help="Also when labels show that it is worse than the champion.")
    ] = False,
    json: Json = False,
) -> None:
    """Make a model the champion, which scores the stream.

    A model that is worse than the champion on labelled tweets or test rows, beyond chance, is refused without --force.
    Workers use the previous champion until they have loaded the new one.
    """
    from worker.connections import open_sql
    from worker.quality.promotion import promote
    from worker.settings import load_settings

    check = promote(open_sql(load_settings()), model, alias, force)
    for finding in (*check.reasons, *check.warnings):
        output.aside(f"warning: {finding}")
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


def _same_file(one: "Evaluations", other: "Evaluations") -> list[tuple[str | int | None, ...]]:
    """Return name, rows and both macro-F1s of each file that two models were evaluated on."""
    others = {evaluation.dataset_sha256: output.macro_f1(figures) for evaluation, figures in other}
    return [
        (evaluation.dataset, evaluation.rows, output.macro_f1(figures), others[evaluation.dataset_sha256])
        for evaluation, figures in one
        if evaluation.dataset_sha256 in others
    ]


def _print_assignment(alias: str, model: int, json: bool) -> None:
    if json:
        output.as_json({"alias": alias, "model_version_id": model})
    else:
        output.console.print(f"model {model} is the {alias} now")
