"""How Sphinx builds the site; scripts/docs calls it."""

import importlib
import inspect
import json
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import flax.linen as nn
import jax
from docutils.nodes import Element, Text, document, reference
from pydantic.dataclasses import is_pydantic_dataclass
from sphinx.addnodes import desc_annotation, pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.ext.viewcode import viewcode_anchor

import ae_jax

ROOT = Path(__file__).resolve().parent.parent

project = "ae_jax"
release = version = ae_jax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build"]

html_theme = "sphinx_book_theme"
html_title = "ae_jax"
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_theme_options = {
    "footer_content_items": [],
    "navbar_persistent": [],  # else there is a second search field above the first
    "use_download_button": False,
}

# --- Pages ----------------------------------------------------------------------------

myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3


def result(name: str) -> dict[str, Any]:
    """What ``experiments/results/NAME.json`` holds."""
    found: dict[str, Any] = json.loads(
        (ROOT / "experiments" / "results" / f"{name}.json").read_text()
    )
    return found


parity, speed = result("compare_pytorch"), result("benchmark")
myst_substitutions = {
    "drift": f"{parity['headline']['lockstep_f64_9380_nrel']:.1e}",
    "speed": f"{speed['headline']['speed_ratio_item_by_item']:.1f}",
    "speed_best": f"{speed['headline']['speed_ratio_best']:.1f}",
    "machine": "{cores} cores of {cpu}".format(**speed["machine"]),
}

# --- The notebook ---------------------------------------------------------------------

nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_show_tb = True
nb_execution_timeout = 300  # of a cell, on a busy machine too
nb_merge_streams = True

# --- The reference, from docstrings ---------------------------------------------------

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_use_type_comments = False
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]

# A reference to what is not here is an error, but for the types of signatures: those of
# other packages, and type variables.
nitpicky = True
nitpick_ignore_regex = [
    ("py:(class|obj)", r"(?!ae_jax\.).*|ae_jax\.(\w+\.)+([A-Z]|Layer)")
]


def make_readable(app: Sphinx) -> None:
    """Take out of our classes what a reader of the reference has no use for.

    The types of options lose the bounds that pydantic checks; modules lose Linen's own
    arguments, and the fields of tuples the text that Python gives them.
    """
    jax.Array.__name__ = jax.Array.__qualname__ = "Array"  # it has jaxlib's in it
    for found in pkgutil.walk_packages(ae_jax.__path__, "ae_jax."):
        for cls in vars(importlib.import_module(found.name)).values():
            if not isinstance(cls, type) or cls.__module__ != found.name:
                continue
            if is_pydantic_dataclass(cls):
                hints = get_type_hints(cls)
                cls.__annotations__ = {
                    name: hints[name] for name in cls.__annotations__
                }
                set_parameters(cls, lambda p, h=hints: p.replace(annotation=h[p.name]))
            elif issubclass(cls, nn.Module):
                set_parameters(cls, lambda p: p.name not in {"parent", "name"} and p)
            for name in getattr(cls, "_fields", ()):
                if vars(cls)[name].__doc__.startswith("Alias for field"):
                    vars(cls)[name].__doc__ = None


def set_parameters(cls: type[Any], change: Callable[[inspect.Parameter], Any]) -> None:
    """Change or leave out (if falsy) the parameters of a class's signature."""
    signature = inspect.signature(cls)
    kept = filter(None, map(change, signature.parameters.values()))
    cls.__signature__ = signature.replace(parameters=[*kept])  # type: ignore[attr-defined]


def keep_text(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Keep what a field's string says from Napoleon and from typography.

    Napoleon takes what stands before a colon in its first line for a type, unless that
    line is another one, as this empty comment; and two hyphens would become a dash.
    """
    if what in {"attribute", "data", "property"}:
        lines[:] = ["..", "", *(re.sub(r"^(--[\w.-]+)", r"``\1``", x) for x in lines)]


def shorten(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, *texts: str | None
) -> tuple[str | None, ...] | None:
    """Defaults in a signature as one would write them."""
    if texts[0] is None:
        return None
    for shown, written in (
        (r"<function <lambda>>|<factory>", "..."),
        (r"<(?:built-in )?function (\w+)>", r"\1"),
        (r"<class '(?:\w+\.)*(\w+)'>", r"\1"),
        (r"PosixPath\(", "Path("),
    ):
        texts = (re.sub(shown, written, texts[0]), *texts[1:])
    return texts


def shorten_values(app: Sphinx, domain: str, objtype: str, content: Element) -> None:
    """Values as one would write them, and none that one would not."""
    for node in [*content.parent.findall(desc_annotation)]:
        value = node.astext()
        if value.startswith(" = ") and ("<" in value or len(value) > 100):
            node.parent.remove(node)
        for text in [*node.findall(Text)]:
            text.parent.replace(text, Text(text.replace("PosixPath(", "Path(")))


def leave_out(
    app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any
) -> bool | None:
    """Leave out what pydantic, not we, put into a class."""
    return True if name == "model_config" else None


def add_anchors(app: Sphinx, doctree: document) -> None:
    """An object that is documented where it is imported is found by both its names."""
    for anchor in doctree.findall(viewcode_anchor):
        module = anchor["reftarget"].removeprefix("_modules/").replace("/", ".")
        ids, name = anchor.parent["ids"], f"{module}.{anchor['refid']}"
        if name not in ids:
            ids.append(name)


def link_back(app: Sphinx) -> list[Any]:
    """From a source to its documentation, by the name that it has there.

    And no link to the source of what has none, Python's own types.
    """
    modules = app.env._viewcode_modules  # type: ignore[attr-defined]
    for name, entry in [*modules.items()]:
        if entry:
            modules[name] = (*entry[:3], name)
        else:
            del modules[name]
    return []


def find_short(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element
) -> reference | None:
    """What a docstring names as its code does: ``registry`` is ``ae_jax.registry``."""
    if node["refdomain"] != "py" or node.get("refspecific"):
        return None
    node["refspecific"] = True  # any object whose name ends so
    where = node["refdoc"], app.builder, node["reftype"], node["reftarget"]
    return env.domains.python_domain.resolve_xref(env, *where, node, content)


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("builder-inited", make_readable)
    app.connect("autodoc-process-docstring", keep_text, priority=400)
    app.connect("autodoc-process-signature", shorten)
    app.connect("autodoc-skip-member", leave_out)
    app.connect("object-description-transform", shorten_values)
    app.connect("doctree-read", add_anchors, priority=600)  # after viewcode's
    app.connect("html-collect-pages", link_back, priority=400)  # before viewcode's
    app.connect("missing-reference", find_short)
