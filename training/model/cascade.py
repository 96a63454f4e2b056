"""Save and load the artifact of a cascade: a sealed folder without weights that names two other artifacts.

cascade.json   the student and the teacher with their digests, the threshold, the temperatures and the curve
README.md      what it is made of
SHA256SUMS     sha256 of both; the sha256 of this file identifies the artifact
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training.errors import BadArtifact
from training.store.paths import file_sha256
from training.store.sealed_folder import SUMS, new_sealed_folder, verify

SPEC = "cascade.json"
CARD = "README.md"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class CascadePart:
    """A model version of a cascade. `artifact` is the name of its folder, which lies beside that of the cascade.

    `temperature` divides its logits for the tweets that it decides.
    """

    model_version: int
    artifact: str
    sha256: str
    temperature: float

    def url(self, cascade_url: str) -> str:
        """Return the URL of its artifact in the store of the cascade."""
        return f"{cascade_url.rstrip('/').rpartition('/')[0]}/{self.artifact}"


@dataclass(frozen=True)
class CascadeSpec:
    """A tweet is passed on to the teacher when the student's calibrated probability of its label is below `threshold`.

    Labels, their order and their polarity are the teacher's. `planned_share` is the share of the `rows` on which the
    threshold was chosen that is passed on, `keep` and `bound` are what they had to reach, and `curve` holds the other
    thresholds.
    """

    student: CascadePart
    teacher: CascadePart
    threshold: float
    planned_share: float
    keep: float
    bound: str
    rows: int
    curve: list[dict[str, Any]]


def save_cascade(folder: Path, spec: CascadeSpec) -> str:
    """Write the artifact to a draft folder, seal it and rename it to `folder`. Returns its sha256.

    Raises `CannotSave`.
    """
    with new_sealed_folder(folder) as draft:
        written = {"format_version": FORMAT_VERSION, **asdict(spec)}
        (draft / SPEC).write_text(json.dumps(written, ensure_ascii=False, indent=2), encoding="utf-8")
        (draft / CARD).write_text(_card(spec), encoding="utf-8")
    return file_sha256(folder / SUMS)


def _card(spec: CascadeSpec) -> str:
    return (
        f"# Cascade of models {spec.student.model_version} and {spec.teacher.model_version}\n\n"
        f"Model {spec.student.model_version}, the student, scores every tweet. A tweet for whose label it gives a "
        f"probability below {spec.threshold:.4f} is passed on to model {spec.teacher.model_version}, the teacher, "
        f"whose probabilities then count. On the {spec.rows:,} labelled rows on which the threshold was chosen, that "
        f"is {spec.planned_share:.1%} of the tweets. The weights are in the artifacts `{spec.student.artifact}` and "
        f"`{spec.teacher.artifact}` beside this one.\n"
    )


def is_cascade(folder: Path) -> bool:
    """Return whether an artifact is that of a cascade. Does not verify it."""
    return (folder / SPEC).is_file()


def load_cascade(folder: Path, sha256: str | None = None) -> CascadeSpec:
    """Verify and read the artifact of a cascade.

    Raises `BadArtifact` when the digest is not `sha256`, or a file is missing, damaged or from a newer version.
    """
    verify(folder, sha256)
    try:
        written: dict[str, Any] = json.loads((folder / SPEC).read_text(encoding="utf-8"))
        if written.pop("format_version") != FORMAT_VERSION:
            raise BadArtifact(f"{folder} has a cascade format that this version cannot read; upgrade tweetscore")
        student, teacher = (CascadePart(**written.pop(name)) for name in ("student", "teacher"))
        return CascadeSpec(student, teacher, **written)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise BadArtifact(f"{folder} cannot be loaded: {str(error).splitlines()[0]}") from error
