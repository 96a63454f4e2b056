"""Start Streamlit on the console's script."""

import asyncio
import ipaddress
import secrets
import signal
import socket
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from worker.errors import BadRequest, BadSettings, ConsoleUnavailable
from worker.settings import Settings, environment_name

try:
    from streamlit import net_util
    from streamlit.runtime.pages_manager import PagesManager
    from streamlit.web import bootstrap
    from streamlit.web.server import Server
except ImportError as error:
    raise ConsoleUnavailable(f"the console needs Streamlit ({error}); `pip install 'tweetscore[console]'`") from error

SCRIPT = Path(__file__).parent / "app.py"
LOOPBACK_HOSTS = ["localhost", "127.0.0.1", "[::1]", "::1"]
OIDC_FIELDS = tuple(f"console_oidc_{name}" for name in ("metadata_url", "client_id", "client_secret", "redirect_url"))
# Told apart by colour-blind people, and readable on the light and on the dark background.
ACCENT = {"light": "#0063a6", "dark": "#56b4e9"}


def serve(settings: Settings, host: str, port: int, proxy: str | None, notify: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM. `notify` receives the address. Port 0 selects a free port.

    `proxy` is the address that visitors use, of a proxy that lets only the right people pass. Raises `BadRequest` when
    the address cannot be listened on, or can be reached from other machines without a sign-in or a proxy.
    """
    public = _public_address(settings, proxy)
    if public is None and not is_loopback(host):
        raise BadRequest(
            f"{host} can be reached from other machines, and nobody signs in; set TWEETSCORE_CONSOLE_OIDC_METADATA_URL "
            "and the settings below it, or name with --behind-proxy the address of a proxy that checks the visitors"
        )
    port = _free_port(host, port)
    options = stream_options(host, port, public) | {"secrets.files": secrets_files(settings)}
    # Streamlit would ask a public web service for this machine's address when a page of another origin connects.
    net_util.get_external_ip = lambda: None
    # The folder `pages` holds modules, not scripts of Streamlit's older kind.
    PagesManager.uses_pages_directory = False
    bootstrap.load_config_options(options)
    address = public or f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    asyncio.run(_run(lambda: notify(address)))


async def _run(on_ready: Callable[[], None]) -> None:
    server = Server(str(SCRIPT), False)
    await server.start()
    bootstrap.prepare_streamlit_environment(str(SCRIPT))
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    on_ready()
    await server.stopped


def stream_options(host: str, port: int, public: str | None) -> dict[str, Any]:
    """Streamlit's options. With `public`, browsers may come from that origin too, else from the loopback alone."""
    hosts = [*LOOPBACK_HOSTS, *([urlsplit(public).hostname or ""] if public else [])]
    theme = {f"theme.{base}.primaryColor": color for base, color in ACCENT.items()}
    return {
        "server.address": host, "server.port": port, "server.headless": True, "server.fileWatcherType": "none",
        # A web page that resolves its own name to this machine is refused.
        "server.allowedHosts": hosts, "server.corsAllowedOrigins": [public.rstrip("/")] if public else [],
        "server.enableStaticServing": False, "browser.gatherUsageStats": False, "global.developmentMode": False,
        "client.toolbarMode": "minimal", "client.showErrorDetails": "none", "client.showErrorLinks": False,
        # Its CSV files would hold cells that a spreadsheet runs; pages offer downloads of their own.
        "client.disableDataExport": True,
        "logger.level": "error", "logger.hideWelcomeMessage": True, "logger.enableRich": False, **theme,
    }  # fmt: skip


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _public_address(settings: Settings, proxy: str | None) -> str | None:
    """The address that visitors use, when it is not the one that is listened on."""
    if proxy is not None:
        parts = urlsplit(proxy)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path not in ("", "/"):
            raise BadRequest(f"--behind-proxy {proxy!r} is not an address such as https://tweets.example.org")
        return f"{parts.scheme}://{parts.netloc}/"
    if settings.console_oidc_redirect_url:
        parts = urlsplit(settings.console_oidc_redirect_url)
        return f"{parts.scheme}://{parts.netloc}/"
    return None


def _free_port(host: str, port: int) -> int:
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, port), family=family) as probe:
            return int(probe.getsockname()[1])
    except OSError as error:
        raise BadRequest(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error


def secrets_files(settings: Settings) -> list[str]:
    """Write the sign-in settings to the file that Streamlit reads them from. Raises `BadSettings` when one is unset."""
    path = settings.run / "console-secrets.toml"
    values = {field: getattr(settings, field) for field in OIDC_FIELDS}
    missing = [environment_name(field) for field, value in values.items() if not value]
    if len(missing) == len(OIDC_FIELDS):
        path.unlink(missing_ok=True)
        return [str(path)]
    if missing:
        raise BadSettings(f"signing in to the console needs {' and '.join(missing)} too; set all four or none of them")
    auth = {
        "redirect_uri": values["console_oidc_redirect_url"], "cookie_secret": _cookie_secret(path),
        "client_id": values["console_oidc_client_id"], "client_secret": values["console_oidc_client_secret"],
        "server_metadata_url": values["console_oidc_metadata_url"],
    }  # fmt: skip
    settings.run.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text("[auth]\n" + "".join(f"{name} = {_toml(value)}\n" for name, value in auth.items()), "utf-8")
    return [str(path)]


def _cookie_secret(path: Path) -> str:
    """Keep the key of the cookies, so that a restart signs nobody out."""
    with suppress(OSError, ValueError, KeyError):
        return str(tomllib.loads(path.read_text(encoding="utf-8"))["auth"]["cookie_secret"])
    return secrets.token_hex(32)


def _toml(value: str) -> str:
    """A TOML basic string."""
    escaped = "".join(
        f"\\u{ord(character):04x}" if character < " " or character in '"\\\x7f' else character for character in value
    )
    return f'"{escaped}"'
