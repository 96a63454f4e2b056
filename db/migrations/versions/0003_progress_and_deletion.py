"""A running job says how fast it is; a model can be deleted and its history kept."""

import sqlalchemy as sa
from alembic import op

from db.models import UtcDateTime

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("training_jobs", sa.Column("samples_per_second", sa.Double(), nullable=True))
    op.add_column("model_versions", sa.Column("deleted_at", UtcDateTime(), nullable=True))


def downgrade() -> None:
    op.drop_column("model_versions", "deleted_at")
    op.drop_column("training_jobs", "samples_per_second")
