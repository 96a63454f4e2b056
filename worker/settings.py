"""The settings. They are read from the environment once, validated and frozen; other modules receive their values.

The name of a variable is `TWEETSCORE_` and the field in capitals. The common names `REDIS_URL` and `DATABASE_URL` have
no prefix, and neither do the files with their passwords. By default broker and database are embedded: a Valkey and an
SQLite file in the home. An empty variable counts as unset, as in a compose file's `NAME: ${NAME:-}`.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from fsspec.registry import known_implementations
from pydantic import AliasChoices, Field, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from db.errors import shown
from training import failpoint
from training.config import PRESETS
from training.errors import BadConfig
from training.store.store import is_remote, local_path
from worker.engine_names import ENGINES
from worker.errors import BadSettings
from worker.secret_files import read_secret, with_password
from worker.setting_values import expanded, redis_server, web_address

WITH_PASSWORD = ("redis", "database", "reader")
SECRETS = ("console_oidc_client_secret", "webhook_secret")
# Settings that are one of several names.
NAMES = {"engine": ("auto", *ENGINES), "server_sync": ("everysec", "always"), "preset": tuple(PRESETS)}
Access = Literal["look", "label", "operate"]
CALLBACK = "/oauth2callback"


class Settings(BaseSettings):
    model_config = SettingsConfigDict(
        env_prefix="TWEETSCORE_", env_ignore_empty=True, frozen=True, extra="ignore", populate_by_name=True
    )

    home: Path = Field(
        Path("~/.tweetscore"), description="folder of all local files: database, models, logs and caches"
    )
    redis_url: str | None = Field(
        None,
        validation_alias=AliasChoices("REDIS_URL", "redis_url"),
        description="Redis or Valkey server of broker and stream; unset: the embedded Valkey",
    )
    redis_password_file: Path | None = Field(
        None,
        validation_alias=AliasChoices("REDIS_PASSWORD_FILE", "redis_password_file"),
        description="file with the password of the user in `REDIS_URL` and `TWEETSCORE_STREAM_URLS`",
    )
    database_url: str | None = Field(
        None,
        validation_alias=AliasChoices("DATABASE_URL", "database_url"),
        description="SQLite or PostgreSQL; unset: `tweetscore.db` in the home",
    )
    database_password_file: Path | None = Field(
        None,
        validation_alias=AliasChoices("DATABASE_PASSWORD_FILE", "database_password_file"),
        description="file with the password of the user in `DATABASE_URL`",
    )
    reader_url: str | None = Field(
        None,
        description="the database with a read-only PostgreSQL role (`tweetscore db grant-readonly`), for `query` and "
        "exports; unset: `DATABASE_URL` in read-only transactions",
    )
    reader_password_file: Path | None = Field(
        None, description="file with the password of the user in `TWEETSCORE_READER_URL`"
    )
    result_url: str | None = Field(None, description="Celery result backend for the results of jobs; unset: the broker")
    default_queue: bool = Field(
        False,
        description="training workers also read training requests from Celery's default queue `celery`; tasks of other "
        "programs stay there",
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
        description="folder or URL of the checkpoints of running jobs, from which another machine can resume them; "
        "unset: `jobs` in the home",
    )
    cache_mb: int = Field(
        20_000,
        ge=1,
        le=100_000_000,
        description="maximum size in MiB of the cache of files from these URLs, and of models that learned the sample",
    )
    read_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description="additional folders that jobs may read datasets and base models from, separated by `:`"
    )
    base_model: str = Field("starter", min_length=1, description="base model of jobs that do not name one")
    preset: str = Field("fast", description="preset of jobs that do not name one: `guide` or `fast`")
    device: str = Field(
        "auto",
        description="`cpu`, `cuda:1`, or `auto` and `cuda`: the GPU that the fewest other workers of this kind use",
    )
    scorers: int | None = Field(
        None, ge=1, le=64, description="scoring workers that `tweetscore up` starts without `--scorers`; unset: 1"
    )
    gpu_scorers: int | None = Field(
        None, ge=1, le=64, description="scoring workers that may share a GPU; unset: those of `tweetscore up`, divided "
        "by the number of GPUs, and 1 without it",
    )  # fmt: skip
    gpu_memory_share: float | None = Field(
        None, gt=0, le=1, description="share of a GPU's memory that a worker may use; unset: 1 divided by the scoring "
        "workers that may share the GPU, and 1 for a training worker",
    )  # fmt: skip
    engine: str = Field(
        "auto",
        description="engine that runs the model when scoring: `auto` selects the fastest that agrees with float32; or "
        "one of " + ", ".join(f"`{name}`" for name in ENGINES),
    )

    stream_key: str = Field("tweets", min_length=1, description="key of the stream")
    stream_shards: int = Field(
        1, ge=1, le=64, description="shards that publishers divide tweets among by their ids; scoring workers read all "
        "that exist",
    )  # fmt: skip
    stream_urls: Annotated[tuple[str, ...], NoDecode] = Field(
        (), repr=False, description="servers of the stream, separated by spaces: Redis, Valkey, Sentinels or a "
        "cluster; unset: the broker",
    )  # fmt: skip
    group: str = Field("scorers", min_length=1, description="consumer group of the scoring workers")
    window_tweets: int = Field(
        16_384, ge=1, le=100_000, description="most tweets in a window: read, scored and committed together; more than "
        "512 only while eight times as many wait and the model scores them in 2 s. A CPU takes at most 4,096, a GPU as "
        "many as make it fastest",
    )  # fmt: skip
    token_budget: int | None = Field(
        None,
        ge=64,
        le=10_000_000,
        description="maximum number of tokens in a forward pass, with padding; unset: measured for model and device",
    )
    min_idle_seconds: float = Field(
        60, gt=0, le=86_400, description="another worker claims a record that its worker has not renewed for this long"
    )
    shadow_share: float = Field(
        0.1,
        ge=0,
        le=1,
        description="share of the tweets that the challenger scores too, after the champion; dropped while more "
        "than 512 tweets wait",
    )
    linger_seconds: float = Field(10, ge=0, le=3600, description="an idle scoring task ends after this long")
    watch_seconds: float = Field(1, gt=0, le=3600, description="interval at which an idle worker polls for work")
    high_water: int = Field(500_000, ge=1, description="publishers wait while the stream holds more records than this")
    stream_keep_hours: float = Field(
        0, ge=0, le=8760, description="scored records stay in the stream this long, as far as memory allows, so that "
        "`tweetscore replay` can score them again after a backup of the database was restored",
    )  # fmt: skip
    server_memory_mb: int = Field(
        1024,
        ge=4,
        le=10_000_000,
        description="memory limit of the embedded server in MiB; publishers wait while it is full",
    )
    server_sync: str = Field(
        "everysec",
        description="when the embedded server syncs records to disk: `everysec`, or `always` before they are "
        "acknowledged, which slows publishing down",
    )

    retention_days: float | None = Field(
        None,
        gt=0,
        le=36_500,
        description="tweets and dead letters are deleted this long after they were received, on PostgreSQL up to a "
        "thirtieth of the time later; unset: never",
    )
    window_days: float = Field(30, gt=0, le=36_500, description="rows of `scoring_windows` are deleted after this long")
    checkpoint_days: float = Field(
        7,
        gt=0,
        le=36_500,
        description="checkpoints of a failed job are kept this long, so that `tweetscore jobs retry` can resume it",
    )
    stall_seconds: float = Field(
        300,
        gt=0,
        le=86_400,
        description="a worker that holds tweets and commits none for this long, while more arrive, is ended",
    )
    grace_seconds: float = Field(30, gt=0, le=3600, description="maximum time that a worker may take to stop")
    lease_seconds: float = Field(
        60, gt=0, le=86_400, description="another worker resumes a job whose worker has not renewed its lease this long"
    )
    max_attempts: int = Field(3, ge=1, le=100, description="maximum number of attempts of a job before it fails")

    metrics_port: int | None = Field(
        None,
        ge=0,
        le=65_535,
        description="each worker serves `/metrics` on the first free port from this one on; 0: any port; unset: none",
    )
    metrics_host: str = Field("127.0.0.1", min_length=1, description="address that `/metrics` is served on")
    console_access: Access = Field(
        "operate",
        description="what a visitor of the console may do: `look`, `label` (give labels too), or `operate` (promote "
        "models, start and cancel jobs, retry dead letters too)",
    )
    console_oidc_metadata_url: str | None = Field(
        None,
        description="address of an OpenID Connect provider's `.well-known/openid-configuration`; with it visitors of "
        "the console sign in there; unset: nobody signs in, and the console listens on the loopback only",
    )
    console_oidc_client_id: str | None = Field(None, description="id of the console at the provider")
    console_oidc_client_secret: str | None = Field(
        None, repr=False, description="secret of the console at the provider"
    )
    console_oidc_client_secret_file: Path | None = Field(
        None, description="file with that secret, such as a container secret"
    )
    console_oidc_redirect_url: str | None = Field(
        None, description="address of the console for its visitors with `/oauth2callback` at the end"
    )
    console_users: Annotated[dict[str, Access], NoDecode] = Field(
        {},
        description="e-mail addresses that may sign in, separated by `,`, each with `=look`, `=label` or `=operate` if "
        "it differs from `TWEETSCORE_CONSOLE_ACCESS`; unset: everybody whom the provider signs in",
    )
    webhook_url: str | None = Field(
        None,
        description="address (http or https) that events are sent to: jobs ended, champions changed, drift, dead "
        "letters; unset: none",
    )
    webhook_secret: str | None = Field(
        None, repr=False, description="secret that signs the events, which the receiver knows too"
    )
    webhook_secret_file: Path | None = Field(None, description="file with that secret")

    failpoints: str = Field(
        "", description="points in the code at which a worker dies, sleeps or fails, for tests of faults"
    )

    @field_validator("home")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return expanded(value).absolute()

    @field_validator("model_store", "dataset_store", "checkpoint_store", mode="before")
    @classmethod
    def _folder_or_url(cls, value: Any) -> Any:
        if not isinstance(value, str | Path):
            return value
        text = str(value)
        if not is_remote(text):
            return str(expanded(local_path(text)).absolute()) if text else None
        if text.partition("://")[0] not in known_implementations:
            raise ValueError("it must be a folder or a URL that fsspec opens, such as s3://bucket/models")
        return text

    @field_validator("read_roots", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(expanded(Path(part)) for part in value.split(":") if part) if isinstance(value, str) else value

    @field_validator("redis_url")
    @classmethod
    def _redis_scheme(cls, value: str | None) -> str | None:
        if value and not value.startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("it must begin with redis://, rediss:// or unix://")
        return redis_server(value) if value else None

    @field_validator("stream_urls", mode="before")
    @classmethod
    def _servers(cls, value: Any) -> Any:
        return tuple(map(redis_server, value.split() if isinstance(value, str) else value))

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

    @field_validator("engine", "server_sync", "preset")
    @classmethod
    def _known_name(cls, value: str, info: ValidationInfo) -> str:
        names = NAMES[str(info.field_name)]
        if value not in names:
            raise ValueError(f"it must be {', '.join(names[:-1])} or {names[-1]}")
        return value

    @field_validator("console_oidc_metadata_url", "console_oidc_redirect_url", "webhook_url")
    @classmethod
    def _http(cls, value: str | None, info: ValidationInfo) -> str | None:
        path = CALLBACK if info.field_name == "console_oidc_redirect_url" else None
        return web_address(value, path) if value else value

    @field_validator("console_users", mode="before")
    @classmethod
    def _users(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        pairs = [entry.strip().partition("=") for entry in value.split(",") if entry.strip()]
        return {
            mail.strip().lower(): access.strip() or info.data.get("console_access", "look") for mail, _, access in pairs
        }

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
        """Whether broker and stream run on the embedded server."""
        return self.redis_url is None

    @property
    def sql_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'tweetscore.db'}"

    @property
    def query_url(self) -> str:
        return self.reader_url or self.sql_url

    @property
    def boards(self) -> Path:
        return self.home / "runs"

    @property
    def run(self) -> Path:
        """Heartbeats, locks and GPU claims of running workers."""
        return self.home / "run"

    @property
    def engines(self) -> Path:
        """Engine choices that workers of this machine share when the model store cannot be written."""
        return self.home / "engines"

    @property
    def logs(self) -> Path:
        return self.home / "logs"


def load_settings(**overrides: Any) -> Settings:
    """Settings from the environment; raises `BadSettings` with the name, the value and what is allowed."""
    try:
        settings = Settings(**overrides)
    except ValidationError as error:
        raise BadSettings("; ".join(_sentence(fault) for fault in error.errors())) from error
    urls: dict[str, Any] = {f"{name}_url": _with_password(settings, name) for name in WITH_PASSWORD}
    secrets = {name: getattr(settings, name) or _in_file(settings, f"{name}_file") for name in SECRETS}
    if settings.webhook_url and not secrets["webhook_secret"]:
        raise BadSettings(
            "TWEETSCORE_WEBHOOK_URL is set without a secret; set TWEETSCORE_WEBHOOK_SECRET or "
            "TWEETSCORE_WEBHOOK_SECRET_FILE too"
        )
    if (password := _in_file(settings, "redis_password_file")) is not None:
        urls["stream_urls"] = tuple(with_password(url, password) for url in settings.stream_urls)
    return settings.model_copy(update={**urls, **secrets})


def _with_password(settings: Settings, name: str) -> str | None:
    url: str | None = getattr(settings, f"{name}_url")
    password = None if url is None else _in_file(settings, f"{name}_password_file")
    return url if url is None or password is None else with_password(url, password)


def _in_file(settings: Settings, field: str) -> str | None:
    """The content of the file that a field names; None when it names none."""
    file: Path | None = getattr(settings, field)
    return None if file is None else read_secret(file, environment_name(field))


def environment_name(field: str) -> str:
    return field.upper() if field.startswith(("redis_", "database_")) else f"TWEETSCORE_{field.upper()}"


def _sentence(fault: Any) -> str:
    field = str(fault["loc"][0]) if fault["loc"] else "settings"
    name = field if field.isupper() else environment_name(field)
    message = fault["msg"].removeprefix("Value error, ")
    # Leave out the value of a URL: it may contain a password.
    value = "" if name.endswith(("_URL", "_URLS", "_SECRET")) else f" is {shown(fault['input'])}"
    return f"{name}{value}: {message[0].lower()}{message[1:]}"
