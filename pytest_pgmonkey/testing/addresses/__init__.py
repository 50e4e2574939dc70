"""Addresses of databases, for other processes and for the application: URLs, files, variables."""
