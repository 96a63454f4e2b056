"""Start Streamlit on the console's script."""

import socket
from collections.abc import Callable
from pathlib import Path

from worker.errors import BadRequest, ConsoleUnavailable

try:
    from streamlit.web import bootstrap
except ImportError as error:
    raise ConsoleUnavailable(f"the console needs Streamlit ({error}); `pip install 'tweetscore[console]'`") from error

SCRIPT = Path(__file__).parent / "app.py"


def serve(host: str, port: int, notify: Callable[[str], None]) -> None:
    """Serve until Ctrl-C. `notify` receives the address. Port 0 selects a free port."""
    try:
        with socket.create_server((host, port)) as probe:
            port = probe.getsockname()[1]
    except OSError as error:
        raise BadRequest(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error
    options = {
        "server.address": host, "server.port": port, "server.headless": True, "server.fileWatcherType": "none",
        "browser.gatherUsageStats": False, "global.developmentMode": False, "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",
    }  # fmt: skip
    bootstrap.load_config_options(options)
    notify(f"http://{host}:{port}/")
    bootstrap.run(str(SCRIPT), False, [], options)
