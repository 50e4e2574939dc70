"""What a test has done in the database: the record of its statements, and what is told of it."""
