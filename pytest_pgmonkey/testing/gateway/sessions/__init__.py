"""What a client works in: a test, a database, or a transaction that has ended."""
