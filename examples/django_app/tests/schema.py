import subprocess
import sys
from pathlib import Path

import django

MANAGE = Path(__file__).parent.parent / "manage.py"


def migrate(conn):
    """Have Django migrate the tests' database, as it does in production."""
    subprocess.run([sys.executable, MANAGE, "migrate", "--verbosity=0"], check=True)


# The migrated database is kept from run to run, until one of these changes.
migrate.pgmonkey_inputs = ["config/settings.py", "*/migrations/*.py"]
migrate.pgmonkey_version = django.VERSION
