"""The door for code on psycopg: its connections, its pools, and what their operations become."""
