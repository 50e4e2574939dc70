"""What a server must be told so that the clients of a configuration can work on it."""
