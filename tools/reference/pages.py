"""All pages of the reference, by file name."""

from __future__ import annotations

from tools.reference.commands import commands_page
from tools.reference.errors import errors_page
from tools.reference.http import http_page
from tools.reference.markdown import page, table
from tools.reference.python_api import python_page
from tools.reference.settings import recipes_page, service_page

_PAGES = {
    "command-line.md": ("Every command with its arguments and options", commands_page),
    "recipes.md": ("Every key of a recipe", recipes_page),
    "service-settings.md": ("Every setting of the HTTP service", service_page),
    "http.md": ("The service's routes, bodies and responses", http_page),
    "python.md": ("The public Python API", python_page),
    "error-codes.md": ("Exceptions, error codes of verdicts and of the service, each with its remedy", errors_page),
}


def pages() -> dict[str, str]:
    """File name to Markdown; the same code gives the same text."""
    rows = [(f"[{name}]({name})", content) for name, (content, _) in _PAGES.items()]
    index = page(
        "Reference",
        "Generated from the code by `make reference`; a test fails where a page is stale.",
        table(("page", "content"), rows),
    )
    return {"README.md": index, **{name: write() for name, (_, write) in _PAGES.items()}}
