"""Promote a model version, unless labels show that it is worse than the champion beyond chance."""

from dataclasses import dataclass, field

from sqlalchemy.orm import Session

from db import registry
from db.quality import pairs
from db.session import Database
from training.data.columns import VALUE
from worker.errors import PromotionRefused
from worker.quality.comparison import CHANCE, agreements


@dataclass
class PromotionCheck:
    """`reasons` against a promotion, each with its figures; `warnings` say what could not be compared."""

    reasons: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def check_promotion(database: Database, version_id: int) -> list[str]:
    """Return the reasons why a version is worse than the champion beyond chance; none when it may be promoted."""
    with database.read() as session:
        return examine(session, version_id).reasons


def promote(database: Database, version_id: int, alias: str = registry.CHAMPION, force: bool = False) -> PromotionCheck:
    """Point an alias at a version. Returns what was found, so that the caller can show it.

    Raises `PromotionRefused` for a champion that would be worse beyond chance, unless `force`; `NotFound` for a version
    or an alias that does not exist. The challenger is never refused.
    """
    with database.begin() as session:
        registry.usable(session, version_id)
        check = examine(session, version_id) if alias == registry.CHAMPION else PromotionCheck()
        if check.reasons and not force:
            raise PromotionRefused(
                f"model {version_id} was not promoted: {'; '.join(check.reasons)}; to promote it all the same, use "
                f"`tweetscore models promote {version_id} --force`"
            )
        registry.assign(session, alias, version_id)
    return check


def examine(session: Session, version_id: int) -> PromotionCheck:
    """Compare a version with the champion on labelled tweets that both scored, and on their test rows."""
    check = PromotionCheck()
    champion = registry.assigned(session, registry.CHAMPION)
    if champion is None or champion == version_id:
        return check
    compared = _compare_live(session, champion, version_id, check)
    compared = _compare_tests(session, champion, version_id, check) or compared
    if not compared:
        check.warnings.append(
            f"nothing compares model {version_id} with the champion, model {champion}: label tweets that both scored, "
            "or measure both on one file with `tweetscore models evaluate`"
        )
    return check


def _compare_live(session: Session, champion: int, version_id: int, check: PromotionCheck) -> bool:
    """Compare on all labelled tweets. Returns whether there are any."""
    if VALUE in (registry.get(session, champion).labels[0], registry.get(session, version_id).labels[0]):
        return False  # people give labels, and these models predict numbers
    labelled, _ = agreements(session, champion, version_id)
    if not labelled.by_chance and labelled.only_first_right > labelled.only_second_right:
        check.reasons.append(
            f"on {labelled.tweets:,} labelled tweets that both scored, only the champion (model {champion}) is right "
            f"on {labelled.only_first_right:,}, and only model {version_id} on {labelled.only_second_right:,} (exact "
            f"McNemar test, p = {labelled.p_value:.2g})"
        )
    return labelled.tweets > 0


def _compare_tests(session: Session, champion: int, version_id: int, check: PromotionCheck) -> bool:
    """Compare on the test rows in common, or else by the shares of different ones. Returns whether either is possible.

    Shares of different rows say less: they compare only models of the same labels, by Fisher's exact test.
    """
    from scipy.stats import fisher_exact  # imported here: SciPy and scikit-learn load slowly

    from training.evaluation.metrics import mcnemar

    shared, only_champion, only_version = registry.paired(session, champion, version_id)
    if shared:
        p_value = mcnemar(only_champion, only_version)
        if p_value < CHANCE and only_champion > only_version:
            check.reasons.append(
                f"on {shared:,} test rows in common, only the champion (model {champion}) is better on "
                f"{only_champion:,}, and only model {version_id} on {only_version:,} (exact McNemar test, p = "
                f"{p_value:.2g})"
            )
        return True
    labels = [set(registry.get(session, model).labels) for model in (champion, version_id)]
    (rows, right), (other_rows, other_right) = (pairs.tested(session, model) for model in (champion, version_id))
    if not rows or not other_rows or labels[0] != labels[1] or labels[0] == {VALUE}:
        return False
    p_value = float(fisher_exact([[right, rows - right], [other_right, other_rows - other_right]]).pvalue)
    if p_value < CHANCE and right / rows > other_right / other_rows:
        check.reasons.append(
            f"on different test rows, the champion (model {champion}) is right on {right:,} of {rows:,} and model "
            f"{version_id} on {other_right:,} of {other_rows:,} (Fisher's exact test, p = {p_value:.2g})"
        )
    return True
