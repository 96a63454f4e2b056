"""Dead letters by age: retention takes the oldest, and `tweetscore dead list` shows the newest, without a sort."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_dead_letters_buried_at", "dead_letters", ["buried_at"])


def downgrade() -> None:
    op.drop_index("ix_dead_letters_buried_at", "dead_letters")
