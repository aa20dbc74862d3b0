"""The web page: its files by the path of their route, each with its name in this folder and its media type."""

_SCRIPTS = ("dom.js", "page.js", "panel.js", "reasoning.js", "service.js", "snippets.js", "verdict.js")

FILES: dict[str, tuple[str, str]] = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    **{f"/{name}": (name, "text/javascript") for name in _SCRIPTS},
}
