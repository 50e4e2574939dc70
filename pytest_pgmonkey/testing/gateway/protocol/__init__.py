"""The messages of PostgreSQL's protocol, and one client that speaks it."""
