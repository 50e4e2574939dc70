"""How the documentation is built."""

import re
from pathlib import Path

_INIT = Path(__file__).parent.parent / "pytest_pgmonkey" / "__init__.py"

project = "pytest-pgmonkey"
author = "the authors of pytest-pgmonkey"
release = re.search(r'^__version__ = "(.+)"$', _INIT.read_text("utf-8"), re.MULTILINE)[1]
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = f"pytest-pgmonkey {release}"
