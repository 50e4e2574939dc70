import pytest
from shop import app


@pytest.fixture
def client(pgmonkey):
    """Flask's test client, in the test's transaction."""
    app.testing = True
    return app.test_client()
