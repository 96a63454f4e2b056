"""Resolve a base model's name to a local folder: the starter, a local folder, or a hub repository at one revision."""

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from db.errors import listed, shown
from training.errors import ModelUnavailable
from training.store.paths import inside_roots

STARTER = "starter"
STARTER_FOLDER = Path(__file__).parents[1] / "starter"
# The name of a base model that a job adapted to stored tweets, with the id of its row in `base_models`.
ADAPTED_NAME = re.compile(r"adapted:([1-9]\d{0,8})", re.ASCII)
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
# Old organisation names on the Hugging Face hub -> new ones. The guide uses an old name.
RENAMED = {"cl-tohoku/": "tohoku-nlp/"}
# Tested commits. Other repositories are pinned to the commit of the first model trained from them.
REVISIONS = {"tohoku-nlp/bert-base-japanese-v3": "65243d6e5629b969c77309f217bd7b1a79d43c7e"}
# Repositories of tohoku-nlp that use the dictionary unidic-lite. The others use ipadic.
UNIDIC_LITE = re.compile(r"tohoku-nlp/bert-(base-japanese(-char)?-v\d+|large-japanese.*)")
UNIDIC_IN_CONFIG = re.compile(r'"mecab_dic"\s*:\s*"unidic_lite"')
CONFIG_AND_TOKENIZER = ["*.json", "*.txt", "*.model"]


@dataclass(frozen=True)
class BaseModelFolder:
    """A base model on disk: `revision` is the hub commit, None for local folders.

    `learned_sample`: the folder has a classifier of the job's labels that has learned the sample.
    """

    name: str
    folder: Path
    revision: str | None = None
    learned_sample: bool = False


def resolve_base_model(name: str, revision: str | None, roots: Sequence[Path]) -> BaseModelFolder:
    """Return a base model's local folder; download it from the hub if needed. Raises `ModelUnavailable`.

    Without `revision`, a hub repository is taken at its commit in `REVISIONS`, else at the newest. A path must be
    inside `roots`, because any client that can submit a job can choose the name.
    """
    if name == STARTER:
        return BaseModelFolder(STARTER, STARTER_FOLDER)
    if looks_local(name) and "://" not in name:
        return BaseModelFolder(name, _local_folder(name, roots))
    check_hub_name(name)
    name = current_hub_name(name)
    check_dictionary(name)
    return _fetch(name, revision or REVISIONS.get(name))


def current_hub_name(name: str) -> str:
    """Return a hub name with renamed organisations replaced."""
    for old, new in RENAMED.items():
        name = name.replace(old, new, 1) if name.startswith(old) else name
    return name


def check_hub_name(name: str) -> None:
    """Raise `ModelUnavailable` for a name that no hub repository can have, such as one with `..`."""
    if ".." in name or not HUB_NAME.fullmatch(name):
        raise ModelUnavailable(f"base model {shown(name)} is not a hub name; use owner/model, a folder, or {STARTER!r}")


def check_dictionary(name: str, folder: Path | None = None) -> None:
    """Raise `ModelUnavailable` when a base model (in `folder` if it is local) needs unidic-lite and that is missing.

    Called before a download, because loading the tokenizer fails only after all files were fetched.
    """
    if importlib.util.find_spec("unidic_lite"):
        return
    if folder is None:
        needed = UNIDIC_LITE.fullmatch(current_hub_name(name)) is not None
    else:
        needed = UNIDIC_IN_CONFIG.search(_text_of(folder / "tokenizer_config.json")) is not None
    if needed:
        raise ModelUnavailable(
            f"base model {shown(name)} needs the dictionary unidic-lite, which is not installed; "
            "`pip install 'tweetscore[unidic-lite]'`"
        )


def adapted_id(name: str) -> int | None:
    """Return the id of an adapted base model, which is named `adapted:ID`; None for any other name."""
    found = ADAPTED_NAME.fullmatch(name)
    return int(found[1]) if found else None


def adapted_name(base_model_id: int) -> str:
    return f"adapted:{base_model_id}"


def is_hub_name(name: str) -> bool:
    """Return whether a name means a hub repository: not the starter, an adapted base model, a path or a URL."""
    return name != STARTER and adapted_id(name) is None and not looks_local(name)


def looks_local(name: str) -> bool:
    """Return whether a name is a path or a URL rather than a hub repository."""
    return name.startswith(("/", ".", "~")) or "://" in name


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""  # the tokenizer's loader reports what is missing


def _local_folder(name: str, roots: Sequence[Path]) -> Path:
    folder = inside_roots(name, roots)
    if folder is None:
        raise ModelUnavailable(
            f"base model {shown(name)} lies outside the folders this worker may read ({listed(roots)}); move it "
            "there or add its folder to TWEETSCORE_READ_ROOTS"
        )
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(f"base model folder {shown(name)} has no config.json; save a model there first")
    return folder


def _fetch(name: str, revision: str | None) -> BaseModelFolder:
    try:
        folder = Path(
            snapshot_download(name, revision=revision, allow_patterns=[*CONFIG_AND_TOKENIZER, "*.safetensors"])
        )
        if not list(folder.glob("*.safetensors")):
            # Some old repositories have only pickled weights, which are loaded with `weights_only`.
            snapshot_download(name, revision=folder.name, allow_patterns=["pytorch_model*.bin"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ModelUnavailable(
            f"base model {shown(name)} could not be downloaded from the hub ({type(error).__name__}); check the name "
            f"and the network, give the path of a local copy, or use {STARTER!r}"
        ) from error
    return BaseModelFolder(name, folder, folder.name)
