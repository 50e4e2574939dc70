"""Clients of any kind and in any process join the running test over PostgreSQL's protocol."""
