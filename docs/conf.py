"""How the documentation is built."""

import re
from pathlib import Path

from sphinx.pycode import ModuleAnalyzer

_INIT = Path(__file__).parent.parent / "pytest_pgmonkey" / "__init__.py"

project = "pytest-pgmonkey"
author = "the authors of pytest-pgmonkey"
release = re.search(r'^__version__ = "(.+)"$', _INIT.read_text("utf-8"), re.MULTILINE)[1]
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3

# Docstrings say `name` as Markdown does: it is code, and a link where the page describes that name.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
maximum_signature_line_length = 88
# A method is shown once, and not once for each type of connection.
_manager = ModuleAnalyzer.for_module("pytest_pgmonkey.manager")
_manager.analyze()
_manager.overloads.clear()
python_use_unqualified_type_names = True

# What is copied from a console block is its commands, and output has no button.
copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"
copybutton_selector = "div:not(.highlight-text) > div.highlight > pre"

html_theme = "furo"
html_title = f"pytest-pgmonkey {release}"
html_static_path = ["_static"]
html_css_files = ["custom.css"]
