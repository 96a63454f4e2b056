"""A running job says how fast it is, a model can be deleted, and the leaderboard shows how sure its figures are."""

import sqlalchemy as sa
from alembic import op

from db.models import UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

# Figures of the whole test split, each a column: before and after.
OLD = ("accuracy", "f1_micro", "f1_macro", "tfidf_f1_macro")
NEW = (*OLD, "f1_macro_low", "f1_macro_high", "roc_auc", "ece")


def create_leaderboard(metrics: tuple[str, ...], where: str = "") -> None:
    columns = ", ".join(f"max(CASE WHEN x.metric = '{metric}' THEN x.value END) AS {metric}" for metric in metrics)
    op.execute(
        f"CREATE VIEW v_model_leaderboard AS SELECT m.id AS model_version_id, m.base_model, m.job_id, m.created_at, "  # noqa: S608 - names of this file
        f"{columns} FROM model_versions AS m LEFT JOIN test_metrics AS x ON x.model_version_id = m.id AND x.label = '' "
        f"{where} GROUP BY m.id, m.base_model, m.job_id, m.created_at"
    )


def upgrade() -> None:
    op.add_column("training_jobs", sa.Column("samples_per_second", sa.Double(), nullable=True))
    op.add_column("model_versions", sa.Column("deleted_at", UtcDateTime(), nullable=True))
    op.execute("DROP VIEW v_model_leaderboard")
    create_leaderboard(NEW, "WHERE m.deleted_at IS NULL")


def downgrade() -> None:
    op.execute("DROP VIEW v_model_leaderboard")
    create_leaderboard(OLD)
    op.drop_column("model_versions", "deleted_at")
    op.drop_column("training_jobs", "samples_per_second")
