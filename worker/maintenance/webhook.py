"""Send signed events to the webhook: one POST with JSON. It uses neither the database nor the stream.

The receiver checks `X-Tweetscore-Signature: sha256=HEX`: the HMAC-SHA256, with the shared secret, of the timestamp in
`X-Tweetscore-Timestamp`, a full stop and the body.
"""

import hashlib
import hmac
import json
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPMessage
from typing import IO, Any
from urllib.parse import urlsplit

from db.errors import TweetscoreError
from worker.errors import BadSettings
from worker.settings import Settings

TIMEOUT_SECONDS = 10.0
SIGNATURE, TIMESTAMP = "X-Tweetscore-Signature", "X-Tweetscore-Timestamp"
ANSWER_BYTES = 500


class NotDelivered(TweetscoreError):
    """Raised when the receiver did not accept an event. `reached` is whether it answered at all."""

    def __init__(self, message: str, reached: bool) -> None:
        super().__init__(message)
        self.reached = reached


@dataclass(frozen=True)
class Receiver:
    """Where events go. The URL may contain a token, so messages show only its host."""

    url: str = field(repr=False)
    secret: str = field(repr=False)

    @property
    def host(self) -> str:
        return urlsplit(self.url).hostname or ""


@dataclass(frozen=True)
class Answer:
    status: int
    text: str


def receiver_from(settings: Settings) -> Receiver | None:
    """The receiver that the settings name; None without one."""
    if settings.webhook_url is None or settings.webhook_secret is None:
        return None
    return Receiver(settings.webhook_url, settings.webhook_secret)


def required_receiver(settings: Settings) -> Receiver:
    receiver = receiver_from(settings)
    if receiver is None:
        raise BadSettings(
            "there is no webhook; set TWEETSCORE_WEBHOOK_URL, and TWEETSCORE_WEBHOOK_SECRET or "
            "TWEETSCORE_WEBHOOK_SECRET_FILE"
        )
    return receiver


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """The value of the header `X-Tweetscore-Signature`."""
    return "sha256=" + hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()


def send(receiver: Receiver, event: dict[str, Any]) -> Answer:
    """POST one event. Raises `NotDelivered` unless the receiver answers with a status from 200 to 299.

    No redirect is followed: it could lead an event, signed, to another host.
    """
    body = json.dumps(event, ensure_ascii=False).encode()
    timestamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "tweetscore",
        TIMESTAMP: timestamp,
        SIGNATURE: signature(receiver.secret, timestamp, body),
    }
    request = urllib.request.Request(receiver.url, body, headers, method="POST")  # noqa: S310 - the settings allow http(s)
    try:
        with OPENER.open(request, timeout=TIMEOUT_SECONDS) as answer:
            return Answer(answer.status, _text(answer))
    except urllib.error.HTTPError as error:
        with error:
            raise NotDelivered(f"{receiver.host} answered with status {error.code}", reached=True) from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise NotDelivered(
            f"{receiver.host} does not answer ({type(reason).__name__}: {reason})", reached=False
        ) from error


def _text(answer: IO[bytes]) -> str:
    try:
        return answer.read(ANSWER_BYTES).decode(errors="replace")
    except (OSError, HTTPException):  # the status counts, the text is only shown
        return ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> None:
        return None


OPENER = urllib.request.build_opener(_NoRedirect)
