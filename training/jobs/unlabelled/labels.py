"""Labels that a model gives to rows, kept beside the job's checkpoints: a resumed job does not compute them again.

labels-CHUNK-WRITER   a sealed folder with digests and values of the rows of a chunk; WRITER is the fencing token

The texts themselves are not stored: a tweet that is deleted meanwhile must not remain in the job's folder.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from training import failpoint
from training.errors import BadArtifact
from training.evaluation.decisions import Floats
from training.loop.checkpoints import Checkpoints
from training.store.sealed_folder import new_sealed_folder, verify

log = logging.getLogger(__name__)

CHUNK_ROWS = 1_024
FILE = "labels.safetensors"
DIGEST_BYTES = 16


def kept_labels(texts: Sequence[str], checkpoints: Checkpoints, label: Callable[[int, int], Floats]) -> Floats:
    """Return the values (N, K) of texts: those that an earlier start stored, and others from `label`, which are stored.

    `label(start, stop)` returns the values of the texts from `start` up to `stop`. It gets whole chunks, so that it can
    seed random numbers by `start`, and may raise to stop. Raises `CannotSave`.
    """
    checkpoints.fetch()
    keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES] for text in texts]
    known = _stored(checkpoints.folder)
    for start in range(0, len(keys), CHUNK_ROWS):
        chunk = keys[start : start + CHUNK_ROWS]
        if all(key in known for key in chunk):
            continue
        values = label(start, start + len(chunk))
        place = checkpoints.folder / f"labels-{start // CHUNK_ROWS:04d}-{checkpoints.writer:04d}"
        with new_sealed_folder(place) as draft:
            digests = np.frombuffer(b"".join(chunk), np.uint8).reshape(len(chunk), DIGEST_BYTES)
            save_file({"digests": digests, "values": np.ascontiguousarray(values, np.float32)}, str(draft / FILE))
        known.update(zip(chunk, values, strict=True))
        failpoint.passing("labelled")
    return np.stack([known[key] for key in keys]).astype(np.float32)


def _stored(folder: Path) -> dict[bytes, Floats]:
    """Return the stored values (K,) by digest of their text."""
    known: dict[bytes, Floats] = {}
    for place in sorted(folder.glob("labels-*")):
        try:
            verify(place)
        except BadArtifact as error:
            log.warning("stored labels cannot be used, computing them again: %s", error)
            continue
        arrays = load_file(str(place / FILE))
        known.update(zip((row.tobytes() for row in arrays["digests"]), arrays["values"], strict=True))
    return known
