"""`tweetscore models`: what was trained, and what scores."""

from dataclasses import asdict
from typing import Annotated

import typer

from db import registry
from worker import show
from worker.runtime import open_sql
from worker.settings import load_settings
from worker.show import Json

app = typer.Typer(no_args_is_help=True, help="Trained models.")


@app.command("list")
def models_list(json: Json = False) -> None:
    """Every trained model with its test figures, newest first."""
    with open_sql(load_settings()).read() as session:
        rows = [(v, registry.metrics(session, v.id)) for v in registry.versions(session)]
        aliases = {alias: registry.assigned(session, alias) for alias in registry.ALIASES}
    named = {v.id: [alias for alias, version in aliases.items() if version == v.id] for v, _ in rows}
    if json:
        show.as_json([{**show.fields(v), "aliases": named[v.id], "f1_macro": m.get(("f1_macro", ""))} for v, m in rows])
        return
    show.table(
        None,
        ["model", "alias", "job", "base model", "labels", "accuracy", "F1 macro", "created"],
        [
            (v.id, ", ".join(named[v.id]), v.job_id, v.base_model, ", ".join(v.labels), m.get(("accuracy", "")),
             m.get(("f1_macro", "")), v.created_at)
            for v, m in rows
        ],
    )  # fmt: skip


@app.command("show")
def models_show(model: int, json: Json = False) -> None:
    """One model: where it lies, which engine scores with it and why, and its test figures."""
    from training.paths import folder_of
    from worker.choices import kept_choices

    settings = load_settings()
    with open_sql(settings).read() as session:
        version, figures = registry.get(session, model), registry.metrics(session, model)
        cells = registry.confusion(session, model)
    engines = kept_choices(folder_of(version.artifact_url, settings.store))
    if json:
        metrics = [{"metric": m, "label": label, "value": v} for (m, label), v in sorted(figures.items())]
        confusion = [{"actual": a, "predicted": p, "count": n} for (a, p), n in sorted(cells.items())]
        written = {"metrics": metrics, "confusion": confusion, "engines": [asdict(choice) for choice in engines]}
        show.as_json({**show.fields(version), **written})
        return
    show.console.print(
        f"model {version.id} of job {version.job_id}: {version.base_model} {version.base_revision or ''}"
    )
    show.console.print(f"{version.artifact_url}\nsha256 {version.sha256}", soft_wrap=True)
    for choice in engines:
        show.engine_table(choice)
    show.test_table(version, figures)
    if cells:
        show.table(
            "Confusion on the test rows",
            ["actual \\ predicted", *version.labels],
            [(actual, *(cells[actual, predicted] for predicted in version.labels)) for actual in version.labels],
        )


@app.command("promote")
def models_promote(
    model: int,
    alias: Annotated[str, typer.Option(help="champion or challenger.")] = registry.CHAMPION,
    json: Json = False,
) -> None:
    """Let a model score the stream from the next window on."""
    with open_sql(load_settings()).begin() as session:
        registry.assign(session, alias, model)
    if json:
        show.as_json({"alias": alias, "model_version_id": model})
    else:
        show.console.print(f"model {model} is the {alias} now")
