"""The documentation: ``sphinx-build -W --keep-going -b html docs docs/_build`` (extra ``docs``)."""

import dataclasses
from typing import Any

import latex2mathml.converter
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.writers.html5 import HTML5Translator

import oag_transform
from oag_transform.generator.settings import PAPER
from oag_transform.transform import Arguments

project = "oag-transform"
copyright = "the oag-transform authors"
version = release = oag_transform.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
smartquotes_action = "qe"  # quotes and ellipses; an option keeps its two hyphens
suppress_warnings = ["config.cache"]  # functions in this file aren't pickled

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # attributes once, in the class
napoleon_custom_sections = ["Shape", ("Returns (forward)", "returns_style")]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = ["art"]  # a large library for one base class
autodoc_typehints_format = "short"
maximum_signature_line_length = 70
default_role = "code"

html_theme = "furo"
html_title = f"oag-transform {release}"
html_static_path = ["_static"]
html_css_files = ["wide.css"]
html_copy_source = False
html_show_sphinx = False


class SettingsList(SphinxDirective):
    """Every argument of OnlineAlternateGenerator: name, default, the paper's value, meaning; from its declaration."""

    def run(self) -> list[nodes.Node]:
        """Definitions, which wrap on a phone as a table doesn't."""
        lines = []
        for field in dataclasses.fields(Arguments):
            paper = f"; ``paper()``: ``{PAPER[field.name]!r}``" if PAPER.get(field.name, field.default) != field.default else ""
            lines += [f"**{field.name}** = ``{field.default!r}``{paper}", f"    {field.metadata['meaning']}", ""]
        return self.parse_text_to_nodes("\n".join(lines))


def visit_math(self: HTML5Translator, node: nodes.math) -> None:
    """Formulas as MathML: every browser shows it, without a script and without a network."""
    self.body.append(latex2mathml.converter.convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self: HTML5Translator, node: nodes.math_block) -> None:
    """Likewise, on a line of its own that scrolls where it is too wide."""
    self.body.append(f'<div class="math">{latex2mathml.converter.convert(node.astext(), display="block")}</div>')
    raise nodes.SkipNode


def skip_fields(app: Sphinx, what: str, name: str, member: object, skip: bool, options: object) -> bool | None:
    """Fields of named tuples: the class's docstring has them."""
    return True if (getattr(member, "__doc__", None) or "").startswith("Alias for field number") else None


def keep_options(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """Mark the options of command lines, which a browser would break after their hyphens."""
    if "body" in context:
        context["body"] = context["body"].replace('<span class="pre">-', '<span class="pre option">-')


def setup(app: Sphinx) -> dict[str, Any]:
    """Register what is above."""
    app.connect("html-page-context", keep_options)
    app.connect("autodoc-skip-member", skip_fields)
    app.add_directive("settings-list", SettingsList)
    app.add_html_math_renderer("mathml", inline_renderers=(visit_math, None), block_renderers=(visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}


html_math_renderer = "mathml"
