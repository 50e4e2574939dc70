"""The core: one session, its outer transaction, members and their turns; it knows no driver."""
