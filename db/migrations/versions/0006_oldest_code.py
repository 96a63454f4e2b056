"""A schema names the oldest code that may work with it, so that workers of several releases can share a database."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    table = op.create_table(
        "schema_compatibility",
        sa.Column("oldest_code", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("oldest_code", name=op.f("pk_schema_compatibility")),
    )
    # Code that knows 0005 does not look; nothing it uses has gone since.
    op.bulk_insert(table, [{"oldest_code": "0005"}])


def downgrade() -> None:
    op.drop_table("schema_compatibility")
