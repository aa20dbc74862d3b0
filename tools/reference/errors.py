"""The page of errors: exceptions, and the codes of verdicts and of the service."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from guardreasoner_vl import errors
from tools.reference.codes import CLIENTS, GRAMMAR, JUDGING, MAKING, REMEDIES, SERVICE
from tools.reference.markdown import code, docstring, page, table

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tools.reference.codes import Code

_INTRO = """\
`code` is a short word for programs; the message beside it is one line for people that names the remedy and never quotes
what was judged. The service answers an error as `{"error": {"message", "type", "param", "code"}}`."""
_JUDGING = """\
`Verdict.error.code`, in Python, on the command line and in a body with status 200. The labels are `error`, `flagged` is
null, and `action` is `block`, or what `on_error` says if the guard is at fault: `engine`, `engine_gone`, `engine_down`,
`auth`, `queue_full` ([Enforcement](../service.md#enforcement))."""
_GRAMMAR = """\
The model's answer breaks the strict grammar of reasoning and result, so that no label is read from it."""
_CLIENTS = """\
`GuardClient` and the integrations make these verdicts themselves, which block, where no verdict came. With
`on_error="allow"` the client lets an exchange pass while the service cannot be reached or fails (429, 5xx)."""


def exceptions() -> list[type[errors.GuardError]]:
    """The exceptions of `errors.py`, in the order of the file."""
    members = vars(errors).values()
    return [member for member in members if inspect.isclass(member) and issubclass(member, errors.GuardError)]


def errors_page() -> str:
    """Exceptions and codes, each with its meaning and its remedy."""
    tree = docstring(errors).split("\n\n")[1]
    return page(
        "Error codes",
        _INTRO,
        "## Exceptions",
        "All can be imported from `guardreasoner_vl`. An exception of another module is a subclass of one of these.",
        f"```\n{inspect.cleandoc(tree)}\n```",
        table(
            ("exception", "code", "meaning", "remedy"),
            [
                (code(kind.__name__), code(kind.code), docstring(kind).split("\n\n")[0], REMEDIES[kind.code])
                for kind in exceptions()
            ],
        ),
        "## Verdicts",
        _JUDGING,
        _table(JUDGING),
        "### Answers outside the grammar",
        _GRAMMAR,
        _table(GRAMMAR),
        "## Statuses of the service",
        "The service did not judge, or the proxy does not pass on; a verdict is status 200. In a stream that has "
        'begun, `upstream` and `guard_error` come as `data: {"error": ...}`.',
        table(
            ("status", "code", "meaning", "remedy"),
            [(item.status, code(item.code), item.meaning, item.remedy) for item in SERVICE],
        ),
        "## Clients",
        _CLIENTS,
        _table(CLIENTS),
        "## Training, teachers, other guards",
        _table(MAKING),
    )


def _table(codes: Iterable[Code]) -> str:
    return table(("code", "meaning", "remedy"), [(code(item.code), item.meaning, item.remedy) for item in codes])
