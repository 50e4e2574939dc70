"""A database of the test's own: clones of the prepared one, and those that are kept."""
