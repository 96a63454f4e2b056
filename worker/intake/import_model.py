"""Import an existing classifier: find it -> load it -> run it on the sample -> store the artifact -> insert its row."""

import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from db import registry
from db.errors import plain, shown
from db.models import ModelVersion
from db.session import Database, is_away
from training.errors import BadConfig, CannotSave, ModelUnavailable, StoreUnavailable
from training.loop.reference import sample_reference
from training.model.artifact import Reference, Spec, save_artifact
from training.model.base_model import (
    BaseModelFolder,
    check_dictionary,
    current_hub_name,
    looks_local,
    resolve_base_model,
)
from training.model.devices import pick_device
from training.model.imported import ImportedClassifier, ImportOptions, load_classifier
from training.reporting.model_card import write_imported_card
from training.store.paths import is_file, is_folder, real_path
from training.store.store import Store
from worker.connections import model_store, open_sql
from worker.settings import Settings, load_settings


def import_model(
    settings: Settings,
    database: Database,
    name: str,
    revision: str | None = None,
    options: ImportOptions | None = None,
    progress: Callable[[], None] = lambda: None,
) -> tuple[ModelVersion, Spec]:
    """Make a hub model or a local folder a model version, without training. `revision` is a commit of the hub.

    `progress` is called after each batch of the sample. Raises `ModelUnavailable` or `BadConfig` when the classifier
    cannot be used as it is, and `StoreUnavailable` or `CannotSave` when its artifact cannot be stored.
    """
    source = find_source(database, name, revision)
    imported = load_classifier(source, options or ImportOptions())
    reference = sample_reference(imported, pick_device(settings.device), progress=progress)
    store, stored_as = model_store(settings), f"imported-{uuid.uuid4().hex[:16]}"
    sha256 = _publish(store, stored_as, imported, reference)
    version = _version(imported, store.url_of(stored_as), sha256)
    try:
        with database.begin() as session:
            registry.add_version(session, version, [], [], [])
    except Exception as error:
        # A commit whose answer was lost may have taken place, and then the row needs its artifact.
        if not is_away(error):
            _remove(store, stored_as)
        raise
    return version, imported.spec


def import_with_settings(model: str, revision: str | None = None, **options: Any) -> int:
    """Import a model with the settings of the environment. Returns the id of the model version."""
    settings = load_settings()
    database = open_sql(settings)
    try:
        version, _ = import_model(settings, database, model, revision, ImportOptions(**options))
        return version.id
    finally:
        database.close()


def find_source(database: Database, name: str, revision: str | None) -> BaseModelFolder:
    """Return the folder of a classifier: a local folder, or a downloaded hub model.

    Without `revision`, a hub model is taken at the commit that this database used before, else at the newest. Raises
    `ModelUnavailable`, and `BadConfig` for a revision of a folder.
    """
    folder = real_path(name)
    is_local = folder is not None and is_folder(folder)
    if not looks_local(name) and not is_local:
        if revision is None:
            with database.read() as session:
                revision = registry.revision_used(session, current_hub_name(name))
        return _from_hub(name, revision)
    if folder is None or not is_local:
        raise ModelUnavailable(f"there is no folder {plain(name)}; name a folder, or a hub model as owner/model")
    if not is_file(folder / "config.json"):
        raise ModelUnavailable(f"folder {plain(name)} has no config.json; save a model there with save_pretrained")
    if revision is not None:
        raise BadConfig(f"--revision is {shown(revision)}, but {plain(name)} is a folder; leave the revision out")
    check_dictionary(name, folder)
    return BaseModelFolder(str(folder), folder)


def _from_hub(name: str, revision: str | None) -> BaseModelFolder:
    try:
        return resolve_base_model(name, revision, [])
    except ModelUnavailable as error:
        if error.__cause__ is None:
            raise
        raise ModelUnavailable(
            f"model {shown(name)} could not be downloaded from the hub ({type(error.__cause__).__name__}); check the "
            "name, the revision and the network, or name a folder that holds a copy"
        ) from error


def _publish(store: Store, name: str, imported: ImportedClassifier, reference: Reference) -> str:
    """Store the artifact under `name`. Returns its sha256."""

    def write(folder: Path) -> str:
        def describe(draft: Path) -> None:
            write_imported_card(draft, imported)

        return save_artifact(folder, imported.model, imported.tokenizer, imported.spec, reference, describe)

    try:
        return store.publish(name, write)
    except CannotSave as error:
        raise CannotSave(f"{store} cannot take the model ({error.__cause__}); free disk space and try again") from error
    except BaseException:
        _remove(store, name)
        raise


def _version(imported: ImportedClassifier, url: str, sha256: str) -> ModelVersion:
    spec = imported.spec
    return ModelVersion(
        base_model=spec.base_model,
        base_revision=spec.base_revision,
        artifact_url=url,
        sha256=sha256,
        labels=spec.labels,
        cleaner_version=spec.cleaner_version,
        temperature=spec.temperature,
    )


def _remove(store: Store, name: str) -> None:
    with suppress(StoreUnavailable):  # the error that prevented the import is reported instead
        store.remove_named(name)
