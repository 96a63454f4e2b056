"""An epoch says whether its weights took the place of those kept before."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("epoch_metrics", sa.Column("kept", sa.Boolean(), nullable=False, server_default=sa.true()))
    # Until now the best by macro-F1 was kept, of equals the later.
    op.execute(
        "UPDATE epoch_metrics SET kept = valid_f1_macro >= (SELECT max(e.valid_f1_macro) FROM epoch_metrics AS e "
        "WHERE e.job_id = epoch_metrics.job_id AND e.epoch <= epoch_metrics.epoch)"
    )


def downgrade() -> None:
    op.drop_column("epoch_metrics", "kept")
