"""Sphinx: `make docs` builds docs/_build/html and takes a warning for an error."""

import fusedrnn

project = "fusedrnn"
author = "fusedrnn developers"
copyright = author
version = release = fusedrnn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_custom_sections = ["Inputs", "Outputs"]
napoleon_use_rtype = False
html_theme = "furo"
html_title = f"fusedrnn {version}"
