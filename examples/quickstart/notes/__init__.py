"""Notes, kept in PostgreSQL."""
