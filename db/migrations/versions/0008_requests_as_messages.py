"""A job that a Celery message asked for keeps the message until its sender was told the outcome."""

import sqlalchemy as sa
from alembic import op

from db.models import UtcDateTime

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("training_jobs", sa.Column("message", sa.Text(), nullable=True))
    op.add_column("training_jobs", sa.Column("answer_due_at", UtcDateTime(), nullable=True))


def downgrade() -> None:
    op.drop_column("training_jobs", "answer_due_at")
    op.drop_column("training_jobs", "message")
