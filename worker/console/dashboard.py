"""`tweetscore dashboard`: Datasette over the SQLite file, read-only. `dashboard.yml` defines charts and queries."""

import importlib.resources
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from worker.errors import BadRequest, DashboardUnavailable
from worker.settings import Settings

try:
    import datasette_dashboards  # noqa: F401 - a plugin that Datasette discovers
    import uvicorn
    import yaml
    from datasette.app import Datasette
    from datasette.database import Database
except ImportError as error:
    raise DashboardUnavailable(
        f"the dashboard needs Datasette ({error}); `pip install 'tweetscore[dashboard]'`"
    ) from error

# A query that takes longer is stopped. The views need less.
QUERY_MS = 5_000
DATABASE_NAME = "tweetscore"


def make_dashboard(settings: Settings) -> Datasette:
    """Return the application for the database of the settings. Raises `BadRequest` unless it is an SQLite file."""
    url = make_url(settings.sql_url)
    if url.get_backend_name() != "sqlite" or not url.database:
        raise BadRequest("the dashboard reads SQLite only; for PostgreSQL use `export` or a tool such as Metabase")
    text = (importlib.resources.files("worker.console") / "dashboard.yml").read_text(encoding="utf-8")
    metadata: dict[str, Any] = yaml.safe_load(text)
    datasette = Datasette(
        [],
        metadata=metadata,
        settings={"sql_time_limit_ms": QUERY_MS, "allow_download": False, "suggest_facets": False},
    )
    datasette.remove_database("_memory")
    # Mutable, because workers continue to write. Datasette opens its connections with mode=ro.
    datasette.add_database(Database(datasette, path=str(Path(url.database)), is_mutable=True), name=DATABASE_NAME)
    return datasette


def serve(settings: Settings, host: str, port: int, notify: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. `notify` receives the address. Port 0 selects a free port."""
    application = make_dashboard(settings).app()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise BadRequest(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error
        notify(f"http://{host}:{listening.getsockname()[1]}/-/dashboards/sentiment")
        uvicorn.Server(uvicorn.Config(application, log_level="warning", lifespan="on")).run([listening])
