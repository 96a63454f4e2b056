"""The SQL side: schema, sessions, queries, migrations. Imports nothing of the other packages."""
