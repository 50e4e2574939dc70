import pytest


@pytest.fixture(scope="session")
def django_db_setup():
    """Leave the database to pytest-pgmonkey, in place of one that Django creates."""
