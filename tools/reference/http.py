"""The page of the HTTP interface, from the application's OpenAPI description."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Any

from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.config import ServiceConfig, UpstreamSection
from tools.reference.markdown import anchor, code, page, table
from tools.reference.types import any_of, plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    Schema = Mapping[str, Any]

_INTRO = """\
Where the service has keys, each request but those for the page (`/`), `/healthz` and `/readyz` needs the header
`Authorization: Bearer KEY`. A field that is null counts as absent. `x-request-id` and `traceparent` are taken from the
request and returned. Errors: [error-codes.md](error-codes.md). A running service describes itself at
`/openapi.json`."""
_FIELDS = ("field", "type", "default", "meaning")
_NAMES = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false", "null": "null"}
_BOUNDS = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))


def openapi() -> dict[str, Any]:
    """The description of a service with all routes, whatever the environment says; no model is loaded."""
    upstream = UpstreamSection(base_url="http://localhost")
    return create_app(ServiceConfig.model_construct(upstream=upstream)).openapi()


def http_page() -> str:
    """Routes, then the shapes that they share."""
    described = openapi()
    routes = [
        (f"{method.upper()} {path}", operation)
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    ]
    index = [(f"[`{name}`](#{anchor(name)})", _lines(operation)[0]) for name, operation in routes]
    shapes = described["components"]["schemas"]
    return page(
        "HTTP interface",
        _INTRO,
        table(("route", "purpose"), index),
        *(block for name, operation in routes for block in _route(name, operation)),
        "## Shapes",
        *(block for name, schema in sorted(shapes.items()) for block in _shape(name, schema)),
    )


def _route(name: str, operation: Schema) -> Iterator[str]:
    yield f"## {name}"
    yield from _lines(operation)
    for schema in _schemas(operation.get("requestBody", {})):
        yield "Body:"
        yield _fields(schema)
        examples = [json.dumps(example) for example in schema.get("examples", ())]
        yield "```json\n" + "\n".join(examples) + "\n```" if examples else ""
    for status, response in operation["responses"].items():
        kinds = [_kind(schema) for schema in _schemas(response) if schema]
        yield f"Response {status}: {any_of(kinds)}." if kinds else ""


def _shape(name: str, schema: Schema) -> Iterator[str]:
    yield f"### {name}"
    yield from _lines(schema)
    yield _fields(schema) if "properties" in schema else f"One of {any_of([f'`{value}`' for value in schema['enum']])}."


def _fields(schema: Schema) -> str:
    required = schema.get("required", ())
    return table(
        _FIELDS,
        [
            (code(name), _kind(field), _default(field, name in required), _meaning(field))
            for name, field in schema["properties"].items()
        ],
    )


def _default(field: Schema, required: bool) -> str:
    if required:
        return "required"
    if "default" in field:
        return code(json.dumps(field["default"]))
    return code("[]" if field.get("type") == "array" else "null")


def _meaning(field: Schema) -> str:
    texts = [field.get("description"), *(choice.get("description") for choice in field.get("anyOf", ()))]
    return next((text for text in texts if text), "")


def _kind(schema: Schema) -> str:
    """A schema's type in words."""
    return any_of(_choices(schema))


def _choices(schema: Schema) -> list[str]:
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return [f"[{name}](#{anchor(name)})"]
    if "anyOf" in schema:
        return [kind for choice in schema["anyOf"] for kind in _choices(choice)]
    if "enum" in schema or "const" in schema:
        return [f"`{value}`" for value in schema.get("enum", [schema.get("const")])]
    if schema.get("type") == "array":
        return [f"list of {plural(_kind(schema['items']))}"]
    if schema.get("type") == "object":
        values = schema.get("additionalProperties")
        return [f"object, its values {_kind(values)}" if isinstance(values, dict) else "object"]
    bounds = ", ".join(f"{sign} {schema[name]:g}" for name, sign in _BOUNDS if name in schema)
    return [_NAMES.get(schema.get("type", ""), "any value") + (f" ({bounds})" if bounds else "")]


def _schemas(holder: Schema) -> list[Any]:
    return [content["schema"] for content in holder.get("content", {}).values() if "schema" in content]


def _lines(described: Schema) -> list[str]:
    """The paragraphs of a description, unwrapped."""
    text = inspect.cleandoc(described.get("description", ""))
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
