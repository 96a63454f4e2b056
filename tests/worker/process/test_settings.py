"""Settings: the embedded defaults, what is refused, and what reaches a child process."""

import stat
from pathlib import Path

import pytest

from worker.app import broker_url, celery_config
from worker.connections import prepare_home
from worker.errors import BadSettings
from worker.process.supervisor import child_environment
from worker.settings import Settings, environment_name, load_settings


def test_the_defaults_are_the_embedded_ones(tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.embedded
    assert settings.sql_url == f"sqlite:///{tmp_path / 'home' / 'tweetscore.db'}"
    assert settings.base_model == "starter"
    assert not settings.home.exists()
    prepare_home(settings)
    assert stat.S_IMODE(settings.home.stat().st_mode) == 0o700


def test_a_home_that_cannot_be_made_is_refused_with_the_remedy() -> None:
    with pytest.raises(BadSettings, match=r"TWEETSCORE_HOME is '/proc/nowhere'.*folder that you can write to"):
        prepare_home(load_settings(home="/proc/nowhere"))


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("TWEETSCORE_TOKEN_BUDGET", "many", "TWEETSCORE_TOKEN_BUDGET is 'many'.*integer"),
        ("TWEETSCORE_TOKEN_BUDGET", "1", "TWEETSCORE_TOKEN_BUDGET is '1'.*greater than or equal to 64"),
        ("TWEETSCORE_DEVICE", "gpu", "TWEETSCORE_DEVICE is 'gpu'.*auto, cpu"),
        ("TWEETSCORE_PRESET", "slow", "TWEETSCORE_PRESET is 'slow'.*guide or fast"),
        ("TWEETSCORE_SERVER_SYNC", "no", "TWEETSCORE_SERVER_SYNC is 'no'.*everysec or always"),
        ("TWEETSCORE_MODEL_STORE", "floppy://models", "TWEETSCORE_MODEL_STORE is 'floppy://models'.*folder"),
    ],
)
def test_a_wrong_value_is_refused_with_name_value_and_what_is_allowed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(BadSettings, match=says):
        load_settings()


@pytest.mark.parametrize("field", Settings.model_fields)
def test_an_empty_variable_is_an_unset_one(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    monkeypatch.delenv(environment_name(field), raising=False)
    unset = Settings()
    monkeypatch.setenv(environment_name(field), "")
    assert Settings() == unset


def test_an_empty_home_is_the_default_one_and_the_working_directory_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir(mode=0o755)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TWEETSCORE_HOME", "")
    assert load_settings().home == tmp_path / ".tweetscore"
    assert stat.S_IMODE((tmp_path / "here").stat().st_mode) == 0o755


@pytest.mark.parametrize("name", ["REDIS_URL", "DATABASE_URL", "TWEETSCORE_STREAM_URLS"])
def test_a_refused_url_does_not_show_its_password(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "mysql://user:hunter2@host/x")
    with pytest.raises(BadSettings, match=f"{name}: it (must begin with|is not a valid URL)") as refused:
        load_settings()
    assert "hunter2" not in str(refused.value)


def test_servers_of_the_stream_get_the_password_of_its_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "password").write_text("a b\n")
    monkeypatch.setenv("REDIS_PASSWORD_FILE", str(tmp_path / "password"))
    monkeypatch.setenv("TWEETSCORE_STREAM_URLS", "redis://worker@a:1/0  redis+cluster://worker@b:1,c:2 redis://own:x@d")
    assert load_settings().stream_urls == (
        "redis://worker:a%20b@a:1/0", "redis+cluster://worker:a%20b@b:1,c:2", "redis://own:x@d"
    )  # fmt: skip


def test_the_settings_are_frozen(settings: Settings) -> None:
    with pytest.raises(ValueError, match="frozen"):
        settings.preset = "guide"  # type: ignore[misc]


def test_a_child_process_reads_the_same_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = load_settings(
        home=tmp_path / "a home",
        redis_url="redis://localhost:1/2",
        linger_seconds=0.5,
        read_roots=(tmp_path, Path("/srv")),
        stream_shards=4,
        stream_urls=("redis://localhost:1/2", "redis+cluster://a:1,b:2"),
    )
    for name, value in child_environment(given).items():
        monkeypatch.setenv(name, value)
    assert load_settings() == given


def test_celery_accepts_json_alone_and_acknowledges_early() -> None:
    config = celery_config("redis://localhost/0")
    assert config["accept_content"] == ["json"]
    assert config["task_acks_late"] is False
    assert broker_url("unix:///run/x.sock?db=3") == "redis+socket:///run/x.sock?virtual_host=3"
    assert broker_url("rediss://host:6380/1") == "rediss://host:6380/1"
