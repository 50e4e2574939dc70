"""What the text of SQL statements says."""
