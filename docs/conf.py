"""Sphinx settings. Nothing here needs the network."""

from importlib.metadata import version as installed_version

project = "lightning_comm"
author = "The lightning_comm developers"
copyright = "2026, The lightning_comm developers"
release = version = installed_version("lightning-comm")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"lightning_comm {release}"

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
