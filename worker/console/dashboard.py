"""`tweetscore dashboard`: Datasette over the SQLite file, opened to read. What is shown stands in `dashboard.yml`."""

import importlib.resources
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from worker.errors import BadRequest, DashboardUnavailable
from worker.settings import Settings

try:
    import datasette_dashboards  # noqa: F401 - a plugin of Datasette, which finds it by itself
    import uvicorn
    import yaml
    from datasette.app import Datasette
    from datasette.database import Database
except ImportError as error:
    raise DashboardUnavailable(
        f"the dashboard needs Datasette ({error}); `pip install 'tweetscore[dashboard]'`"
    ) from error

# Views are made to answer in less; a question that takes longer is stopped.
QUERY_MS = 5_000
SHOWN_AS = "tweetscore"


def make_dashboard(settings: Settings) -> Datasette:
    """The application over the settings' database; raises `BadRequest` when that is no SQLite file."""
    url = make_url(settings.sql_url)
    if url.get_backend_name() != "sqlite" or not url.database:
        raise BadRequest("the dashboard reads SQLite; for PostgreSQL use `export` or a tool that speaks to it")
    text = (importlib.resources.files("worker.console") / "dashboard.yml").read_text(encoding="utf-8")
    metadata: dict[str, Any] = yaml.safe_load(text)
    made = Datasette(
        [],
        metadata=metadata,
        settings={"sql_time_limit_ms": QUERY_MS, "allow_download": False, "suggest_facets": False},
    )
    made.remove_database("_memory")
    # Mutable, since workers write on: Datasette reads through connections with mode=ro.
    made.add_database(Database(made, path=str(Path(url.database)), is_mutable=True), name=SHOWN_AS)
    return made


def serve(settings: Settings, host: str, port: int, say: Callable[[str], None]) -> None:
    """Until Ctrl-C; `say` is told the address. Port 0 takes a free one."""
    application = make_dashboard(settings).app()
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise BadRequest(f"{host}:{port} cannot be listened on ({error.strerror}); take another --port") from error
        say(f"http://{host}:{listening.getsockname()[1]}/-/dashboards/sentiment")
        uvicorn.Server(uvicorn.Config(application, log_level="warning", lifespan="on")).run([listening])
