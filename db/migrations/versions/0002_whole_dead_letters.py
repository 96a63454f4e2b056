"""Dead letters keep the fields beside `tweet`, so that a record can be put back whole."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    column = sa.JSON().with_variant(postgresql.JSONB(astext_type=sa.Text()), "postgresql")
    op.add_column("dead_letters", sa.Column("other_fields", column, nullable=True))


def downgrade() -> None:
    op.drop_column("dead_letters", "other_fields")
