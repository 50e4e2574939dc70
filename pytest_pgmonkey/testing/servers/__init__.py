"""Where the server of a test run comes from; `launch` alone knows all of its sources."""
