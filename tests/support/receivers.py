"""A receiver of webhooks on the loopback that answers as it is told."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.conftest import PATIENCE_SECONDS
from worker.maintenance.webhook import Receiver

SECRET = "a shared secret"


@dataclass
class Requests:
    """What arrived. `status` answers the next requests; `before_answer` is called before an answer."""

    url: str = ""
    status: int = 204
    location: str | None = None
    before_answer: Callable[[], object] = lambda: None
    got: list[tuple[dict[str, str], bytes]] = field(default_factory=list)

    @property
    def receiver(self) -> Receiver:
        return Receiver(self.url, SECRET)

    @property
    def settings(self) -> dict[str, str]:
        return {"webhook_url": self.url, "webhook_secret": SECRET}

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(body) for _, body in self.got]

    def take(self) -> list[dict[str, Any]]:
        """The events since the last call."""
        events = self.events
        self.got.clear()
        return events


@contextmanager
def receiving(port: int = 0) -> Iterator[Requests]:
    requests = Requests()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            requests.got.append((dict(self.headers.items()), body))
            requests.before_answer()
            try:
                self.send_response(requests.status)
                if requests.location:
                    self.send_header("Location", requests.location)
                self.end_headers()
            except OSError:  # the sender did not wait
                pass

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        requests.url = f"http://127.0.0.1:{server.server_port}/hook?token=hidden"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield requests
        finally:
            server.shutdown()
            thread.join(PATIENCE_SECONDS)
