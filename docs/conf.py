"""Sphinx: `make docs` builds docs/_build/html and takes a warning for an error."""

from pathlib import Path

import tomllib

import fusedrnn
from fusedrnn.benchmarks import keep

project = "fusedrnn"
author = "fusedrnn developers"
copyright = author
version = release = fusedrnn.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "works.md"]  # a part of other pages
myst_heading_anchors = 3
myst_enable_extensions = ["substitution"]
myst_substitutions = {"result": keep.sentence(keep.read())}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_custom_sections = [("Inputs", "params_style"), "Outputs"]
napoleon_use_rtype = False
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
with (Path(__file__).parents[1] / "pyproject.toml").open("rb") as file:
    urls = tomllib.load(file)["project"].get("urls", {})
if "Source" in urls:
    html_theme_options = {"source_repository": urls["Source"], "source_branch": "main", "source_directory": "docs/"}
html_title = f"fusedrnn {version}"
