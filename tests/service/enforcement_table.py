"""The expected action for each combination of the operator's settings, written by hand.

A row: how requests are used, how responses are used, whether the exchange holds a response (an assistant's prefill),
what is wrong with it, and what has to be done.
"""

from __future__ import annotations

from typing import Any

ENFORCE, MONITOR = "enforce", "monitor"
TABLE = [
    (ENFORCE, ENFORCE, False, "request", "block"),
    (ENFORCE, ENFORCE, False, "error", "block"),
    (ENFORCE, ENFORCE, True, "request", "block"),
    (ENFORCE, ENFORCE, True, "response", "block"),
    (ENFORCE, ENFORCE, True, "error", "block"),
    (ENFORCE, MONITOR, False, "request", "block"),
    (ENFORCE, MONITOR, False, "error", "block"),
    (ENFORCE, MONITOR, True, "request", "block"),
    (ENFORCE, MONITOR, True, "response", "allow"),
    (ENFORCE, MONITOR, True, "error", "block"),
    (MONITOR, ENFORCE, False, "request", "allow"),
    (MONITOR, ENFORCE, False, "error", "allow"),
    (MONITOR, ENFORCE, True, "request", "allow"),
    (MONITOR, ENFORCE, True, "response", "block"),
    (MONITOR, ENFORCE, True, "error", "block"),
    (MONITOR, MONITOR, False, "request", "allow"),
    (MONITOR, MONITOR, False, "error", "allow"),
    (MONITOR, MONITOR, True, "request", "allow"),
    (MONITOR, MONITOR, True, "response", "allow"),
    (MONITOR, MONITOR, True, "error", "allow"),
]
USES = [(ENFORCE, ENFORCE), (ENFORCE, MONITOR), (MONITOR, ENFORCE), (MONITOR, MONITOR)]

PROMPTS = {"request": "A BAD request.", "response": "Hello.", "error": "A BROKEN request."}
PREFILLS = {"request": "Sure,", "response": "A BAD answer.", "error": "Sure,"}


def exchange_of(wrong: str, prefill: bool) -> dict[str, Any]:
    """Prompt and response of a row, as `/v1/guard` takes them."""
    return {"prompt": PROMPTS[wrong], **({"response": PREFILLS[wrong]} if prefill else {})}


def messages_of(wrong: str, prefill: bool) -> list[dict[str, Any]]:
    """The same as chat messages."""
    said = exchange_of(wrong, prefill)
    answer = [{"role": "assistant", "content": said["response"]}] if prefill else []
    return [{"role": "user", "content": said["prompt"]}, *answer]


def settings_of(request: str, response: str) -> dict[str, Any]:
    """The service's settings of a row."""
    return {"request": {"mode": request}, "response": {"mode": response}}
