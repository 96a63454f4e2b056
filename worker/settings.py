"""The settings: read from the environment once, validated, frozen. Everything below receives values.

Every name is `TWEETSCORE_` and the field in capitals; the two everybody knows, `REDIS_URL` and `DATABASE_URL`, stand
alone, and so do the files with their passwords. The defaults are the embedded ones: a Valkey and an SQLite file below
the home. A variable that is empty counts as unset, as in a compose file's `NAME: ${NAME:-}`.
"""

import re
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote, urlsplit, urlunsplit

from fsspec.registry import known_implementations
from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from db.errors import shown
from training import failpoint
from training.cache import Cache
from training.config import PRESETS
from training.errors import BadConfig
from training.storage import Store, is_remote, local_path
from training.workshop import Workshop
from worker.errors import BadSettings, StreamError
from worker.redis_client import connect

# By name, so that the settings need not import the libraries.
ENGINES = (
    "openvino-int8", "openvino-bfloat16", "openvino-float32", "torch-float16", "torch-bfloat16", "torch-float32",
)  # fmt: skip


WITH_PASSWORD = ("redis", "database", "reader")


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="TWEETSCORE_", env_ignore_empty=True, frozen=True, extra="ignore", populate_by_name=True
    )

    home: Path = Field(Path("~/.tweetscore"), description="everything tweetscore keeps on this machine")
    redis_url: str | None = Field(
        None,
        validation_alias=AliasChoices("REDIS_URL", "redis_url"),
        description="Redis or Valkey for broker and stream; unset: the embedded Valkey",
    )
    redis_password_file: Path | None = Field(
        None,
        validation_alias=AliasChoices("REDIS_PASSWORD_FILE", "redis_password_file"),
        description="file with the password of the user that `REDIS_URL` names, as secrets are handed to containers",
    )
    database_url: str | None = Field(
        None,
        validation_alias=AliasChoices("DATABASE_URL", "database_url"),
        description="SQLite or PostgreSQL; unset: `tweetscore.db` in the home",
    )
    database_password_file: Path | None = Field(
        None,
        validation_alias=AliasChoices("DATABASE_PASSWORD_FILE", "database_password_file"),
        description="the same for `DATABASE_URL`",
    )
    reader_url: str | None = Field(
        None,
        description="the database as a PostgreSQL role that may only look (`tweetscore db grant-readonly`), for "
        "`query`, plots and exports; unset: `DATABASE_URL` in read-only transactions",
    )
    reader_password_file: Path | None = Field(None, description="the same for `TWEETSCORE_READER_URL`")
    result_url: str | None = Field(
        None, description="where Celery keeps the results of jobs, any backend of Celery's; unset: the broker"
    )
    default_queue: bool = Field(
        False,
        description="training workers also take requests to train from Celery's default queue `celery`; the tasks of "
        "other programs stay there",
    )
    model_store: str | None = Field(
        None, description="folder or URL (`s3://bucket/models`) of trained models; unset: `models` in the home"
    )
    dataset_store: str | None = Field(
        None,
        description="folder or URL that submitted datasets and local base models are copied to; unset: `datasets` in "
        "the home",
    )
    checkpoint_store: str | None = Field(
        None,
        description="folder or URL of the checkpoints of running jobs, which another machine can then go on from; "
        "unset: `jobs` in the home",
    )
    cache_mb: int = Field(
        20_000, ge=1, le=100_000_000, description="most MiB of copies kept here of what lies behind such URLs"
    )
    read_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="further folders that jobs may read datasets and base models from, separated by `:`"
    )
    base_model: str = Field("starter", min_length=1, description="base model of a job that names none")
    preset: str = Field("fast", description="preset of a job that names none: `guide` or `fast`")
    device: str = Field(
        "auto",
        description="`cpu`, `cuda:1`, or `auto` and `cuda`: the first GPU that no other worker of the kind has",
    )
    engine: str = Field(
        "auto",
        description="what runs the model when scoring: `auto` takes the fastest that agrees with float32; or one of "
        "`openvino-int8`, `openvino-bfloat16`, `openvino-float32`, `torch-float16`, `torch-bfloat16`, `torch-float32`",
    )

    stream_key: str = Field("tweets", min_length=1, description="key of the stream")
    group: str = Field("scorers", min_length=1, description="consumer group of the scoring workers")
    window_tweets: int = Field(512, ge=1, le=100_000, description="most tweets read, scored and committed together")
    token_budget: int | None = Field(
        None,
        ge=64,
        le=10_000_000,
        description="most tokens, padding included, of one forward; unset: what a sweep finds for model and device",
    )
    repeat_cache: int = Field(
        0, ge=0, le=100_000_000, description="texts whose scores are kept for repeats in later windows; 0: none"
    )
    min_idle_seconds: float = Field(
        60, gt=0, le=86_400, description="after this long without a renewal a record is taken from its worker"
    )
    linger_seconds: float = Field(10, ge=0, le=3600, description="an idle scoring task ends after this long")
    watch_seconds: float = Field(
        1, gt=0, le=3600, description="how often an idle worker looks for work nobody announced"
    )
    high_water: int = Field(500_000, ge=1, description="publishers wait while the stream holds more records than this")
    server_memory_mb: int = Field(
        1024, ge=4, le=10_000_000, description="memory of the embedded server in MiB; full, publishers wait"
    )
    server_sync: str = Field(
        "everysec",
        description="when the embedded server's records are on the disk: `everysec`, or `always` before they are "
        "acknowledged, which publishes more slowly",
    )

    retention_days: float | None = Field(
        None,
        gt=0,
        le=36_500,
        description="tweets and dead letters are deleted so long after they came in; unset: never",
    )
    window_days: float = Field(
        30, gt=0, le=36_500, description="rows of `scoring_windows` are deleted so long after their window"
    )
    checkpoint_days: float = Field(
        7, gt=0, le=36_500, description="so long after a job failed `tweetscore jobs retry` goes on from its checkpoint"
    )
    stall_seconds: float = Field(
        300,
        gt=0,
        le=86_400,
        description="a worker that holds tweets and commits none for so long, while more wait, is ended",
    )
    grace_seconds: float = Field(30, gt=0, le=3600, description="what a worker told to end may take for it")
    lease_seconds: float = Field(60, gt=0, le=86_400, description="a job whose worker is silent this long is resumed")
    max_attempts: int = Field(3, ge=1, le=100, description="starts of a job before it fails for good")

    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="each worker answers `/metrics` on the first free port from this one on, 0 takes any; unset: none",
    )
    metrics_host: str = Field("127.0.0.1", min_length=1, description="address that `/metrics` is answered on")

    failpoints: str = Field("", description="where a worker is made to die, sleep or fail, to rehearse faults")

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return _expanded(value).absolute()

    @field_validator("model_store", "dataset_store", "checkpoint_store", mode="before")
    @classmethod
    def _place(cls, value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value
        text = str(value)
        if not is_remote(text):
            return str(_expanded(local_path(text)).absolute()) if text else None
        if text.partition("://")[0] not in known_implementations:
            raise ValueError("it must be a folder or a URL that fsspec opens, such as s3://bucket/models")
        return text

    @field_validator("read_roots", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(_expanded(Path(part)) for part in value.split(":") if part) if isinstance(value, str) else value

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: str | None) -> str | None:
        if value and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("it must begin with redis://, rediss:// or unix://")
        if value:
            try:
                connect(value).close()
            except StreamError as error:
                raise ValueError(str(error)) from error
        return value or None

    @field_validator("database_url", "reader_url")
    @classmethod
    def _database_scheme(cls, value: str | None) -> str | None:
        if value and not value.startswith(("sqlite", "postgres")):
            raise ValueError("it must begin with sqlite:/// or postgresql://")
        return value or None

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            raise ValueError("it must be auto, cpu, mps, cuda or cuda:N")
        return value

    @field_validator("engine")
    @classmethod
    def _known_engine(cls, value: str) -> str:
        if value not in ("auto", *ENGINES):
            raise ValueError(f"it must be auto or one of {', '.join(ENGINES)}")
        return value

    @field_validator("server_sync")
    @classmethod
    def _known_sync(cls, value: str) -> str:
        if value not in ("everysec", "always"):
            raise ValueError("it must be everysec or always")
        return value

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str) -> str:
        if value not in PRESETS:
            raise ValueError(f"it must be one of {', '.join(PRESETS)}")
        return value

    @field_validator("failpoints")
    @classmethod
    def _known_failpoints(cls, value: str) -> str:
        try:
            failpoint.parse(value)
        except BadConfig as error:
            raise ValueError(str(error)) from error
        return value

    @property
    def embedded(self) -> bool:
        """Whether broker and stream live in the embedded server."""
        return self.redis_url is None

    @property
    def sql_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'tweetscore.db'}"

    @property
    def asking_url(self) -> str:
        return self.reader_url or self.sql_url

    @property
    def models(self) -> Store:
        return self._store(self.model_store, "models")

    @property
    def inputs(self) -> Store:
        """What jobs are made from: datasets, and base models below `encoders`."""
        return self._store(self.dataset_store, "datasets")

    def _store(self, place: str | None, otherwise: str) -> Store:
        return Store(place or self.home / otherwise, Cache(self.home / "cache", self.cache_mb * 1024 * 1024))

    @property
    def boards(self) -> Path:
        return self.home / "runs"

    @property
    def run(self) -> Path:
        """Where running workers leave their pulse."""
        return self.home / "run"

    @property
    def engines(self) -> Path:
        """What workers of this machine share about engines, beside what the model store keeps."""
        return self.home / "engines"

    @property
    def logs(self) -> Path:
        return self.home / "logs"

    def workshop(self, device: str | None = None) -> Workshop:
        """`device` is the one a worker has claimed; by default that of the settings, unclaimed."""
        checkpoints = self._store(self.checkpoint_store, "jobs")
        inputs = self.inputs
        return Workshop(
            model_store=self.models,
            input_store=inputs,
            # A remote store is followed from a folder here, which the trainer writes to.
            jobs_folder=self.home / "jobs" if checkpoints.remote else checkpoints.folder,
            checkpoint_store=checkpoints if checkpoints.remote else None,
            boards_folder=self.boards,
            read_roots=(*(() if inputs.remote else (inputs.folder,)), *self.read_roots),
            device=device or self.device,
            lease_seconds=self.lease_seconds,
            max_attempts=self.max_attempts,
        )


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError("it names the home of a user that does not exist") from error


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment; raises `BadSettings` with the name, the value and what is allowed.

    The home is made, for its owner alone: it holds other people's words.
    """
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        raise BadSettings("; ".join(_sentence(fault) for fault in error.errors())) from error
    try:
        settings.home.mkdir(parents=True, exist_ok=True)
        settings.home.chmod(0o700)
    except OSError as error:
        raise BadSettings(
            f"TWEETSCORE_HOME is {shown(str(settings.home))}: {error.strerror}; name a folder of yours"
        ) from error
    return settings.model_copy(update={f"{name}_url": _with_password(settings, name) for name in WITH_PASSWORD})


def _with_password(settings: Settings, name: str) -> str | None:
    """A URL with the password that a file holds; one that has a password keeps it."""
    url: str | None = getattr(settings, f"{name}_url")
    file: Path | None = getattr(settings, f"{name}_password_file")
    if url is None or file is None:
        return url
    try:
        password = file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, ValueError) as error:
        name_of_file = environment_name(f"{name}_password_file")
        raise BadSettings(
            f"{name_of_file} is {shown(str(file))}: it cannot be read ({type(error).__name__})"
        ) from error
    parts = urlsplit(url)
    who, at, where = parts.netloc.rpartition("@")
    if ":" in who or not at:
        return url
    return urlunsplit(parts._replace(netloc=f"{who}:{quote(password, safe='')}@{where}"))


def environment_name(field: str) -> str:
    return field.upper() if field.startswith(("redis_", "database_")) else f"TWEETSCORE_{field.upper()}"


def _sentence(fault: Any) -> str:
    field = str(fault["loc"][0]) if fault["loc"] else "settings"
    name = field if field.isupper() else environment_name(field)
    message = fault["msg"].removeprefix("Value error, ")
    # A URL may carry a password.
    value = "" if name.endswith("_URL") else f" is {shown(fault['input'])}"
    return f"{name}{value}: {message[0].lower()}{message[1:]}"
