"""How Sphinx turns what `tools/book.py` staged into the book. Nothing is executed, and no page asks another host for anything."""

from pathlib import Path

import sphinx

project = "Fine-tuning with QLoRA"
author = "the authors of qlora_helpers"
extensions = ["myst_nb", "sphinx_copybutton"]
exclude_patterns: list[str] = []
suppress_warnings = [
    "mystnb.unknown_mime_type",  # a widget's live view; its still copy is shown
    "misc.highlighting_failure",  # cells with %pip are not plain Python
    "myst.header",  # the glossary has no second level
]

nb_execution_mode = "off"
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # live widgets would come from another host
nb_merge_streams = True
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

# MathJax in one file, with its fonts in it. The package that holds it has a name that Python can't import.
SITE_PACKAGES = Path(sphinx.__file__).parents[1]
MATHJAX = SITE_PACKAGES / "sphinx-mathjax-offline" / "static" / "mathjax" / "tex-svg.js"
mathjax_path = "tex-svg.js"

html_theme = "furo"
html_title = project
html_static_path = ["book.css", str(MATHJAX)]
html_css_files = ["book.css"]
html_copy_source = False
html_show_sourcelink = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
