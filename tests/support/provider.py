"""An OpenID Connect provider on the loopback that signs everybody in as one person."""

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

from joserfc import jwt
from joserfc.jwk import RSAKey

CLIENT = {"client_id": "tweets", "client_secret": "secret"}


class Provider(ThreadingHTTPServer):
    """`claims` are those of the person who signs in next."""

    def __init__(self, claims: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.claims, self.key = claims, RSAKey.generate_key(2048, {"kid": "1", "use": "sig", "alg": "RS256"})
        self.nonces: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def id_token(self, code: str) -> str:
        now = int(time.time())
        standard = {"iss": self.url, "aud": CLIENT["client_id"], "iat": now, "exp": now + 600}
        return jwt.encode(
            {"alg": "RS256", "kid": "1"}, {**standard, "nonce": self.nonces[code], **self.claims}, self.key
        )


class Handler(BaseHTTPRequestHandler):
    server: Provider

    def do_GET(self) -> None:
        url = self.server.url
        parts = urlsplit(self.path)
        asked = {name: values[0] for name, values in parse_qs(parts.query).items()}
        if parts.path == "/authorize":
            code = f"code-{len(self.server.nonces)}"
            self.server.nonces[code] = asked.get("nonce", "")
            self.send_response(302)
            self.send_header(
                "Location", f"{asked['redirect_uri']}?{urlencode({'code': code, 'state': asked['state']})}"
            )
            self.end_headers()
        elif parts.path == "/keys":
            self._answer({"keys": [self.server.key.as_dict(private=False)]})
        else:
            self._answer(
                {
                    "issuer": url, "authorization_endpoint": f"{url}/authorize", "token_endpoint": f"{url}/token",
                    "jwks_uri": f"{url}/keys", "userinfo_endpoint": f"{url}/user",
                    "id_token_signing_alg_values_supported": ["RS256"], "subject_types_supported": ["public"],
                    "response_types_supported": ["code"],
                }
            )  # fmt: skip

    def do_POST(self) -> None:
        body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        token = self.server.id_token(body["code"][0])
        self._answer({"access_token": "x", "token_type": "Bearer", "expires_in": 600, "id_token": token})

    def _answer(self, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def provider(**claims: Any) -> Iterator[Provider]:
    with Provider(claims) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()
        thread.join()
