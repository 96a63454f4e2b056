"""Database access: schema, sessions, queries and migrations. Imports no other package of the project."""
