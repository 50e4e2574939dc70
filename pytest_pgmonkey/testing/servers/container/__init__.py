"""A private server in a container."""
