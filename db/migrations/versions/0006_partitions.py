"""Partitions of `tweets` and `predictions`, and a smaller index of uncertain predictions. PostgreSQL only.

Code that needs migration 0001 keeps working: the tables keep their names, columns and keys. The rows do not move: the
tables of before become one partition. Only its indexes of ids are built again, since ids are now sorted as bytes.

There is no migration 0005: development versions before 0.1.0 left that number in databases.
"""

from typing import Any

from alembic import op

revision = "0006"
down_revision = "0004"
branch_labels = None
depends_on = None

TABLES = ("tweets", "predictions")
# Columns with ids of tweets. PostgreSQL cannot compare two columns of different collations.
IDS = {
    "tweets": ("tweet_id", "retweeted_id", "quoted_id", "replied_to_id"),
    "predictions": ("tweet_id",),
    "labels": ("tweet_id",),
    "review_tweets": ("tweet_id",),
    "review_asks": ("tweet_id",),
}
REFERENCES = {
    "fk_predictions_tweet_id": ("predictions", "tweet_id", "tweets (tweet_id) ON DELETE CASCADE"),
    "fk_predictions_model_version_id": ("predictions", "model_version_id", "model_versions (id)"),
    "fk_labels_tweet_id": ("labels", "tweet_id", "tweets (tweet_id) ON DELETE CASCADE"),
    "fk_review_tweets_tweet_id": ("review_tweets", "tweet_id", "tweets (tweet_id) ON DELETE CASCADE"),
}
KEYS = {"tweets": "tweet_id", "predictions": "tweet_id, model_version_id"}
UNCERTAIN = (
    "CREATE INDEX ix_predictions_uncertain ON predictions (model_version_id, probability) WHERE probability < 0.6"
)
BY_PROBABILITY = "ix_predictions_model_version_id_probability_label"
CREATE_BY_PROBABILITY = f"CREATE INDEX {BY_PROBABILITY} ON predictions (model_version_id, probability, label)"
RECEIVED_AT = "CREATE INDEX ix_tweets_received_at ON tweets (received_at)"
SCORED_AT = "CREATE INDEX ix_predictions_model_version_id_scored_at ON predictions (model_version_id, scored_at)"
WRITTEN_AT = (
    "CREATE INDEX ix_tweets_written_at ON tweets USING brin (coalesce(tweet_created_at, received_at)) "
    "WITH (autosummarize = on, pages_per_range = 32)"
)
# The partition of the rows of before, and the one of ids that belong to no other partition.
BEFORE, OTHER = "before", "other"
# The first id that Twitter gives tomorrow: milliseconds since 2010-11-04T01:42:54.657Z above 22 other bits.
TOMORROW = """
    SELECT CAST((CAST(extract(epoch FROM date_trunc('day', now(), 'UTC') + interval '1 day') * 1000 AS bigint)
                 - 1288834974657) << 22 AS text)"""

# --- triggers

# `EXECUTE` plans for the given ids, so that only their partitions are read.
COUNT = """
        EXECUTE $sql$
            INSERT INTO sentiment_rollup (model_version_id, hour, topic, label, shard, tweets, probability_sum,
                                          score_sum, with_score)
            SELECT p.model_version_id, date_trunc('hour', coalesce(t.tweet_created_at, t.received_at), 'UTC'),
                   coalesce(t.topic, ''), p.label, pg_backend_pid(), {sign}count(*), {sign}sum(p.probability),
                   {sign}sum(coalesce(p.score_signed, 0)), {sign}count(p.score_signed)
            FROM {rows} GROUP BY 1, 2, 3, 4
            ON CONFLICT (model_version_id, hour, topic, label, shard) DO UPDATE SET
                tweets = sentiment_rollup.tweets + excluded.tweets,
                probability_sum = sentiment_rollup.probability_sum + excluded.probability_sum,
                score_sum = sentiment_rollup.score_sum + excluded.score_sum,
                with_score = sentiment_rollup.with_score + excluded.with_score $sql$ USING ids;"""
TRIGGER = """
    CREATE OR REPLACE FUNCTION {name}() RETURNS trigger LANGUAGE plpgsql AS $body$
    DECLARE ids text[] COLLATE "C" := ARRAY(SELECT tweet_id FROM changed);
    BEGIN
        IF cardinality(ids) = 0 THEN RETURN NULL; END IF;
        {work}
        RETURN NULL;
    END $body$"""
# What foreign keys do elsewhere. The sums need the hour and topic of the deleted tweets.
DELETE_OF_TWEETS = """
        EXECUTE 'DELETE FROM predictions WHERE tweet_id = ANY ($1)' USING ids;
        DELETE FROM labels WHERE tweet_id = ANY (ids);
        DELETE FROM review_tweets WHERE tweet_id = ANY (ids);"""
# A prediction without its tweet is refused: a row of the sums without an hour.
CHANGED = "changed AS p {join} JOIN tweets AS t ON t.tweet_id = p.tweet_id AND t.tweet_id = ANY ($1)"
OF_CHANGED = "changed AS t JOIN predictions AS p ON p.tweet_id = t.tweet_id AND p.tweet_id = ANY ($1)"
TRIGGERS = {
    "predictions_insert_counted": COUNT.format(sign="", rows=CHANGED.format(join="LEFT")),
    "predictions_delete_counted": COUNT.format(sign="-", rows=CHANGED.format(join="INNER")),
    "tweets_delete": COUNT.format(sign="-", rows=OF_CHANGED) + DELETE_OF_TWEETS,
}


DELETE_OF_TWEETS_BEFORE = """
    CREATE OR REPLACE FUNCTION tweets_delete() RETURNS trigger LANGUAGE plpgsql AS $body$
    BEGIN DELETE FROM predictions WHERE tweet_id = OLD.tweet_id; RETURN OLD; END $body$"""


def create_triggers() -> None:
    for name, work in TRIGGERS.items():
        op.execute(TRIGGER.format(name=name, work=work))
        event = "INSERT" if "insert" in name else "DELETE"
        op.execute(
            f"CREATE TRIGGER {name} AFTER {event} ON {name.partition('_')[0]} "
            f"REFERENCING {'NEW' if event == 'INSERT' else 'OLD'} TABLE AS changed FOR EACH STATEMENT "
            f"EXECUTE FUNCTION {name}()"
        )


# --- functions that add and drop partitions

# With the rights of the schema's owner, so that workers need not own the tables. The timeout bounds how long scoring
# waits behind them while a query of somebody else keeps a table locked.
DEFINER = "LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '2s'"
NAMED = r"^[0-9]{8}(_[0-9]{4})?$"
# Statements on a partition run no trigger of the whole table.
ADD_PARTITION = f"""
    CREATE FUNCTION add_tweets_partition(suffix text, first_id text, end_id text) RETURNS bigint {DEFINER} AS $body$
    DECLARE
        parent text; rows bigint; moved bigint := 0;
    BEGIN
        IF suffix !~ '{NAMED}' THEN RAISE EXCEPTION 'not a name of a partition: %', suffix; END IF;
        FOREACH parent IN ARRAY ARRAY['tweets', 'predictions'] LOOP
            -- As strong as the lock that ATTACH takes: a raised lock could be in a deadlock with a writer.
            EXECUTE format('LOCK TABLE %1$I_{OTHER} IN ACCESS EXCLUSIVE MODE', parent);
            EXECUTE format('CREATE TABLE %1$I_%2$s (LIKE %1$I INCLUDING DEFAULTS)', parent, suffix);
            -- Rows of this range that came while it had no partition.
            EXECUTE format('WITH gone AS (DELETE FROM %1$I_{OTHER} WHERE tweet_id >= %3$L AND tweet_id < %4$L '
                           'RETURNING *) INSERT INTO %1$I_%2$s SELECT * FROM gone', parent, suffix, first_id, end_id);
            GET DIAGNOSTICS rows = ROW_COUNT;
            moved := moved + rows;
            EXECUTE format('ALTER TABLE %1$I ATTACH PARTITION %1$I_%2$s FOR VALUES FROM (%3$L) TO (%4$L)',
                           parent, suffix, first_id, end_id);
        END LOOP;
        RETURN moved;
    END $body$"""
DROP_PARTITION = f"""
    CREATE FUNCTION drop_tweets_partition(suffix text, received_before timestamptz) RETURNS bigint {DEFINER} AS $body$
    DECLARE
        parent text; late bigint;
    BEGIN
        IF suffix !~ '{NAMED}' AND suffix <> '{BEFORE}' THEN
            RAISE EXCEPTION 'not a partition that may be dropped: %', suffix;
        END IF;
        LOCK TABLE tweets, predictions IN ACCESS EXCLUSIVE MODE;
        FOREACH parent IN ARRAY ARRAY['labels', 'review_tweets'] LOOP
            EXECUTE format('DELETE FROM %1$I AS x USING tweets_%2$s AS t '
                           'WHERE x.tweet_id = t.tweet_id AND t.received_at < %3$L', parent, suffix, received_before);
        END LOOP;
        FOREACH parent IN ARRAY ARRAY['tweets', 'predictions'] LOOP
            EXECUTE format('ALTER TABLE %1$I DETACH PARTITION %1$I_%2$s', parent, suffix);
        END LOOP;
        -- Tweets that arrived late stay.
        EXECUTE format('INSERT INTO predictions_{OTHER} SELECT p.* FROM predictions_%1$s AS p '
                       'JOIN tweets_%1$s AS t USING (tweet_id) WHERE t.received_at >= %2$L', suffix, received_before);
        EXECUTE format('INSERT INTO tweets_{OTHER} SELECT * FROM tweets_%1$s WHERE received_at >= %2$L',
                       suffix, received_before);
        GET DIAGNOSTICS late = ROW_COUNT;
        EXECUTE format('DROP TABLE tweets_%1$s, predictions_%1$s', suffix);
        RETURN late;
    END $body$"""
FUNCTIONS = ("add_tweets_partition(text, text, text)", "drop_tweets_partition(text, timestamptz)")


def create_functions(writers: list[str]) -> None:
    op.execute(ADD_PARTITION)
    op.execute(DROP_PARTITION)
    for function in FUNCTIONS:
        op.execute(f"REVOKE ALL ON FUNCTION {function} FROM PUBLIC")
        for role in writers:
            op.execute(f"GRANT EXECUTE ON FUNCTION {function} TO {role}")


# --- views and privileges, which belong to a table and not to its name

# Every view that reads the tables, also through another view, in the order in which they were created.
READERS = """
    WITH RECURSIVE readers AS (
        SELECT r.ev_class AS view FROM pg_depend AS d JOIN pg_rewrite AS r ON r.oid = d.objid
        WHERE d.classid = 'pg_rewrite'::regclass AND r.ev_class <> d.refobjid
          AND d.refobjid = ANY ('{{{tables}}}'::regclass[])
        UNION
        SELECT r.ev_class FROM readers JOIN pg_depend AS d ON d.refobjid = readers.view
        JOIN pg_rewrite AS r ON r.oid = d.objid
        WHERE d.classid = 'pg_rewrite'::regclass AND r.ev_class <> d.refobjid)
    SELECT c.oid::regclass::text AS name, pg_get_viewdef(c.oid) AS body, obj_description(c.oid, 'pg_class') AS comment
    FROM readers JOIN pg_class AS c ON c.oid = readers.view WHERE c.relkind = 'v' ORDER BY c.oid"""
COLUMN_COMMENTS = """
    SELECT quote_ident(a.attname), d.description FROM pg_attribute AS a JOIN pg_description AS d
        ON d.objoid = a.attrelid AND d.objsubid = a.attnum AND d.classoid = 'pg_class'::regclass
    WHERE a.attrelid = '{name}'::regclass AND a.attnum > 0"""
PRIVILEGES = """
    SELECT a.privilege_type, CASE a.grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(a.grantee)) END
    FROM pg_class AS c, aclexplode(c.relacl) AS a
    WHERE c.oid = '{name}'::regclass AND a.grantee <> c.relowner ORDER BY 2, 1"""


def ask(sql: str) -> list[Any]:
    return list(op.get_bind().exec_driver_sql(sql))


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def take_away_views() -> list[str]:
    """Drop the views that read the tables. Returns the statements that create them again, with what is granted."""
    views = ask(READERS.format(tables=", ".join(IDS)))
    statements = []
    for name, body, comment in views:
        statements.append(f"CREATE VIEW {name} AS {body}")
        if comment:
            statements.append(f"COMMENT ON VIEW {name} IS {quoted(comment)}")
        for column, described in ask(COLUMN_COMMENTS.format(name=name)):
            statements.append(f"COMMENT ON COLUMN {name}.{column} IS {quoted(described)}")
        statements += grants(name, name)
    for name, *_ in reversed(views):
        op.execute(f"DROP VIEW {name}")
    return statements


def grants(source: str, target: str) -> list[str]:
    """The statements that grant on `target` what is granted on `source`."""
    return [f"GRANT {privilege} ON {target} TO {role}" for privilege, role in ask(PRIVILEGES.format(name=source))]


def run(statements: list[str]) -> None:
    for statement in statements:  # not through `text()`, which takes a colon for a parameter
        op.get_bind().exec_driver_sql(statement.replace("%", "%%"))


# --- the migration


def sort_ids_as(collation: str) -> None:
    for table, columns in IDS.items():
        changes = ", ".join(f'ALTER COLUMN {name} TYPE text COLLATE "{collation}"' for name in columns)
        op.execute(f"ALTER TABLE {table} {changes}")


def put_aside(table: str, suffix: str) -> None:
    """Rename a table and what has a name of its own, so that the names are free."""
    for (index,) in ask(f"SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = '{table}'::regclass"):
        op.execute(f"ALTER INDEX {index} RENAME TO {index}_{suffix}")
    op.execute(f"ALTER TABLE {table} RENAME TO {table}_{suffix}")


def create_like(table: str, source: str, partitioned: bool) -> None:
    by_id = " PARTITION BY RANGE (tweet_id)" if partitioned else ""
    op.execute(f"CREATE TABLE {table} (LIKE {source} INCLUDING DEFAULTS INCLUDING COMMENTS){by_id}")
    ((comment,),) = ask(f"SELECT obj_description('{source}'::regclass, 'pg_class')")
    op.execute(f"COMMENT ON TABLE {table} IS {quoted(comment)}")
    op.execute(f"ALTER TABLE {table} ADD CONSTRAINT pk_{table} PRIMARY KEY ({KEYS[table]})")
    run(grants(source, table))


def attach_rows_of_before() -> None:
    """Make the tables of before the partition of all ids until tomorrow, or of all other ids when some are above these:
    they are not those of Twitter then."""
    ((tomorrow,),) = ask(TOMORROW)
    ((above,),) = ask(f"SELECT max(tweet_id) >= '{tomorrow}' FROM tweets_{BEFORE}")
    for table in TABLES:
        if above:
            op.execute(f"ALTER TABLE {table}_{BEFORE} RENAME TO {table}_{OTHER}")
            op.execute(f"ALTER TABLE {table} ATTACH PARTITION {table}_{OTHER} DEFAULT")
        else:
            op.execute(f"CREATE TABLE {table}_{OTHER} PARTITION OF {table} DEFAULT")
            bounds = f"FROM (MINVALUE) TO ('{tomorrow}')"
            op.execute(f"ALTER TABLE {table} ATTACH PARTITION {table}_{BEFORE} FOR VALUES {bounds}")


def upgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    op.drop_index(BY_PROBABILITY, table_name="predictions")
    op.execute(UNCERTAIN)
    op.execute(WRITTEN_AT)
    views = take_away_views()
    for name, (table, _, _) in REFERENCES.items():
        op.drop_constraint(name, table)
    for name in TRIGGERS:
        op.execute(f"DROP TRIGGER {name} ON {name.partition('_')[0]}")
    sort_ids_as("C")
    for table in TABLES:
        put_aside(table, BEFORE)
        create_like(table, f"{table}_{BEFORE}", partitioned=True)
    for index in (RECEIVED_AT, WRITTEN_AT, SCORED_AT, UNCERTAIN):
        op.execute(index)
    if ask(f"SELECT 1 FROM tweets_{BEFORE} LIMIT 1"):
        attach_rows_of_before()
    else:
        for table in TABLES:
            op.drop_table(f"{table}_{BEFORE}")
            op.execute(f"CREATE TABLE {table}_{OTHER} PARTITION OF {table} DEFAULT")
    create_triggers()
    create_functions([role for privilege, role in ask(PRIVILEGES.format(name="tweets")) if privilege == "INSERT"])
    run(views)


def downgrade() -> None:
    if op.get_bind().dialect.name != "postgresql":
        return
    views = take_away_views()
    for function in FUNCTIONS:
        op.execute(f"DROP FUNCTION {function}")
    for table in TABLES:
        put_aside(table, "parts")
        create_like(table, f"{table}_parts", partitioned=False)
        op.execute(f"INSERT INTO {table} SELECT * FROM {table}_parts")
    for table in TABLES:
        op.drop_table(f"{table}_parts")
    sort_ids_as("default")
    run([RECEIVED_AT, SCORED_AT, CREATE_BY_PROBABILITY])
    for name, (table, column, target) in REFERENCES.items():
        op.execute(f"ALTER TABLE {table} ADD CONSTRAINT {name} FOREIGN KEY ({column}) REFERENCES {target}")
    create_triggers()
    op.execute("DROP TRIGGER tweets_delete ON tweets")
    op.execute(DELETE_OF_TWEETS_BEFORE)
    op.execute("CREATE TRIGGER tweets_delete BEFORE DELETE ON tweets FOR EACH ROW EXECUTE FUNCTION tweets_delete()")
    run(views)
