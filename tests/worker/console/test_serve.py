"""Where the console listens, whom it lets in, and how it ends."""

import signal
import socket
import stat
import subprocess
import tomllib
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import command
from worker.console import serve
from worker.console.signin import admit
from worker.errors import BadRequest, BadSettings
from worker.settings import Settings, load_settings

OIDC = {
    "console_oidc_metadata_url": "https://id.example.org/.well-known/openid-configuration",
    "console_oidc_client_id": "tweets",
    "console_oidc_client_secret": 'pass"word\\\n',
    "console_oidc_redirect_url": "https://tweets.example.org/oauth2callback",
}


def never(address: str) -> None:
    pytest.fail(f"it listens on {address}")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_an_address_that_others_reach_needs_a_sign_in_or_a_proxy(host: str, settings: Settings) -> None:
    with pytest.raises(BadRequest, match=r"TWEETSCORE_CONSOLE_OIDC_METADATA_URL .* --behind-proxy"):
        serve.serve(settings, host, 0, None, never)


@pytest.mark.parametrize("proxy", ["example.org", "ftp://example.org", "https://example.org/path", ""])
def test_the_address_of_a_proxy_is_checked(proxy: str, settings: Settings) -> None:
    with pytest.raises(BadRequest, match="--behind-proxy"):
        serve.serve(settings, "0.0.0.0", 0, proxy, never)


def test_a_port_that_is_taken_is_refused_in_words(tweetscore: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ended = tweetscore("console", "--port", str(taken.getsockname()[1]))
    assert (ended.returncode, "choose another --port" in ended.stderr) == (2, True)


def test_browsers_may_come_from_the_loopback_and_the_public_address_alone() -> None:
    alone = serve.stream_options("127.0.0.1", 1, None)
    assert alone["server.allowedHosts"] == serve.LOOPBACK_HOSTS
    assert alone["server.corsAllowedOrigins"] == []
    public = serve.stream_options("0.0.0.0", 1, "https://tweets.example.org:8443/")
    assert public["server.allowedHosts"][-1] == "tweets.example.org"
    assert public["server.corsAllowedOrigins"] == ["https://tweets.example.org:8443"]


def test_the_secrets_of_the_sign_in_are_for_the_owner_and_the_key_of_the_cookies_is_kept(settings: Settings) -> None:
    settings = settings.model_copy(update=OIDC)
    (file,) = map(Path, serve.secrets_files(settings))
    first = tomllib.loads(file.read_text(encoding="utf-8"))["auth"]
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert first["client_secret"] == OIDC["console_oidc_client_secret"]
    assert first["redirect_uri"] == OIDC["console_oidc_redirect_url"]
    assert len(first["cookie_secret"]) == 64
    serve.secrets_files(settings)
    assert tomllib.loads(file.read_text(encoding="utf-8"))["auth"] == first
    serve.secrets_files(load_settings(home=settings.home))
    assert not file.exists()


@pytest.mark.parametrize("missing", OIDC)
def test_half_a_sign_in_is_refused_by_name(missing: str, settings: Settings) -> None:
    with pytest.raises(BadSettings, match=f"TWEETSCORE_{missing.upper()}"):
        serve.secrets_files(settings.model_copy(update={**OIDC, missing: None}))


def test_the_secret_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("from a file\n", encoding="utf-8")
    assert (
        load_settings(console_oidc_client_secret_file=tmp_path / "secret").console_oidc_client_secret == "from a file"
    )
    with pytest.raises(BadSettings, match="TWEETSCORE_CONSOLE_OIDC_CLIENT_SECRET_FILE"):
        load_settings(console_oidc_client_secret_file=tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("console_users", "ann@example.org=admin"),
        ("console_access", "all"),
        ("console_oidc_metadata_url", "id.example.org"),
        ("console_oidc_redirect_url", "https://tweets.example.org/"),
    ],
)
def test_a_setting_that_is_not_allowed_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(BadSettings, match=f"TWEETSCORE_{name.upper()}"):
        load_settings(**{name: value})


def test_listed_visitors_enter_with_their_access_and_no_others() -> None:
    settings = load_settings(
        console_users="Ann@example.org=look, bob@example.org", console_access="label", console_oidc_client_id="x"
    )
    assert admit(settings, {"email": "ann@Example.org"}) == ("ann@example.org", "look")
    assert admit(settings, {"email": "bob@example.org", "email_verified": True}) == ("bob@example.org", "label")
    assert admit(settings, {"email": "bob@example.org", "email_verified": False}) == ("bob@example.org", None)
    assert admit(settings, {"email": "eve@example.org"}) == ("eve@example.org", None)
    assert admit(settings, {}) == ("", None)
    assert admit(load_settings(console_access="look"), {"sub": "7"}) == ("7", "look")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_console_and_its_terminal_shows_the_address_alone(
    number: signal.Signals, settings: Settings, tmp_path: Path
) -> None:
    with command(tmp_path / "log", {"home": settings.home}, "console", "--port", "0") as running:
        running.says("Ctrl-C")
        address = running.said().split()[0]
        with urllib.request.urlopen(f"{address}_stcore/health") as answer:
            assert answer.status == 200
        running.send(number)
        assert running.ended() == 0
        assert running.said().split("\n")[:2] == [address, "Press Ctrl-C to stop."]
        assert "Streamlit" not in running.said()
