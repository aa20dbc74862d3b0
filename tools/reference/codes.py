"""Every error code with its meaning and its remedy; a test compares them with the codes that the package uses."""

from __future__ import annotations

from typing import NamedTuple


class Code(NamedTuple):
    """One code: what it means, and what to do about it. `status` is the HTTP status that it comes with, if any."""

    code: str
    meaning: str
    remedy: str
    status: str = ""


REMEDIES = {
    "error": "Catch it for all errors of this package; its message names the remedy.",
    "invalid_input": "Correct what the message names: an empty exchange, an unknown option, a value out of range.",
    "invalid_image": "Save the image again as PNG or JPEG, make it smaller, or send it as a `data:` URL.",
    "input_too_long": "Shorten the text, leave out history or images, or judge it in windows (`long_input: windows`).",
    "model": "Give a complete model folder, `embedded`, or a hub id that is reachable.",
    "engine": "Try again; if it stays, look at the server's log, or lower the batch size.",
    "cancelled": "Send the request again if the answer is still wanted.",
    "recipe": "Change the key that the message names ([recipes.md](recipes.md)).",
    "tracker": "Log in or correct the tracker's settings, or change `tracker` in the recipe.",
    "data": "Correct or remove the file or row that the message names.",
    "missing_extra": "Install the package with the extra that the message names (README, Install).",
}
"""By the code of an exception in `errors.py`; its meaning is the exception's docstring."""

JUDGING = (
    Code("invalid_input", "The exchange is empty, or a value of it is impossible.", "Correct what the message names."),
    Code(
        "invalid_image",
        "An image is broken, too large, too thin, of another format, has too many frames, or is at an address that may "
        "not be fetched.",
        "Save it again as PNG or JPEG; send it as a `data:` URL.",
    ),
    Code(
        "input_too_long",
        "The exchange does not fit the model's context, or needs too many windows.",
        "Shorten it, judge it in windows, or raise `max_windows` (`limits.windows` of the service).",
    ),
    Code(
        "unreadable",
        "A message holds a part that no guard can see, such as audio or a file.",
        "Send text and images, or leave the part out.",
    ),
    Code(
        "no_score",
        "The engine gave no log-probabilities of the labels, which the mode, a threshold or the calibration needs.",
        "Use `slow` mode without threshold and calibration, or an engine that gives log-probabilities.",
    ),
    Code(
        "engine",
        "The engine failed: out of memory, a server's HTTP 5xx, no connection.",
        "Try again; check the server.",
    ),
    Code(
        "timeout", "The model's server gave no answer in time.", "Try again; raise the time-out, or lower concurrency."
    ),
    Code(
        "refused",
        "The model's server did not take the exchange (HTTP 400 or 422), or ended the answer for a reason of its own, "
        "such as its content filter.",
        "See the server's log; turn its filter off.",
    ),
    Code("auth", "The model's server refused the API key.", "Set OPENAI_API_KEY or `api_key`."),
    Code(
        "cancelled", "The caller cancelled the request before it was answered.", "Send it again if it is still wanted."
    ),
    Code("deadline", "No verdict came within `limits.seconds` of the service.", "Send less, or raise the limit."),
    Code("engine_gone", "The engine's process ended while it judged; it is started again.", "Send the exchange again."),
    Code(
        "unknown_guard",
        "The request names a guard that the service does not have.",
        "Use a name that `/v1/models` lists.",
    ),
)
"""Why an exchange could not be judged, besides the grammar."""

_FORM = "Try again; if it stays, use a model that was trained for this task."
GRAMMAR = (
    Code("empty", "The answer is empty.", _FORM),
    Code("unterminated_think", "`<think>` is not closed.", _FORM),
    Code("missing_think", "The answer does not begin with `<think>`.", _FORM),
    Code("duplicate_think", "There is more than one `<think>`.", _FORM),
    Code("missing_result", "There is no `<result>` after the reasoning, or it is not closed.", _FORM),
    Code("duplicate_result", "There is more than one `<result>`.", _FORM),
    Code("missing_label", "The result lacks the label of something that was to be judged.", _FORM),
    Code("duplicate_label", "The result has two labels for the request or for the response.", _FORM),
    Code("unknown_label", "A label is none of harmful, unharmful, harmless and none.", _FORM),
    Code("trailing_text", "Text follows the result.", _FORM),
    Code("truncated", "The answer was cut at the token limit.", "Raise `max_new_tokens`, or shorten the exchange."),
)
"""Why the model's answer is no verdict: it breaks the strict grammar."""

SERVICE = (
    Code("invalid_input", "The body holds no exchange that can be judged.", "Correct what the message names.", "400"),
    Code("invalid_image", "An image was refused.", "Save it again as PNG or JPEG; send it as a `data:` URL.", "400"),
    Code("content_filter", "The proxy blocked a harmful request.", "None: the operator's policy blocks it.", "400"),
    Code(
        "guard_error",
        "The proxy blocked a request that could not be judged, or an answer in a form that cannot be.",
        "Look for the verdict's error code in the message; send text and images.",
        "400, 502",
    ),
    Code(
        "unauthorised",
        "The key is missing, unknown or no longer valid.",
        "Send `Authorization: Bearer KEY`.",
        "401, 503",
    ),
    Code(
        "bad_origin",
        "A web page of another origin calls the service.",
        "The operator lists it in `allowed_origins`.",
        "403",
    ),
    Code(
        "unknown_guard", "The request names a guard that does not exist.", "Use a name that `/v1/models` lists.", "404"
    ),
    Code("http_error", "No such route or method, or the client left.", "Check path and method.", "404, 405, 499"),
    Code("too_slow", "The request took longer to arrive than `limits.body_seconds`.", "Send it again.", "408"),
    Code("too_large", "The body exceeds `limits.body_bytes`.", "Send less at once.", "413"),
    Code("bad_host", "The Host header is not this service's.", "The operator adds it to `allowed_hosts`.", "421"),
    Code(
        "invalid_request",
        "The body is not JSON, or a field is wrong.",
        "Correct the field that the message names.",
        "422",
    ),
    Code("queue_full", "The guard has `limits.queue` exchanges in flight.", "Wait for `Retry-After`.", "429"),
    Code("caller_busy", "The caller has its `max_in_flight` exchanges unanswered.", "Wait for their verdicts.", "429"),
    Code("rate_limited", "The caller has used up its `per_minute`.", "Wait for `Retry-After`.", "429"),
    Code("client_gone", "The client left before its body was read.", "None: nobody reads this.", "499"),
    Code("internal", "The service failed in a way that was not foreseen.", "Look at the service's log.", "500"),
    Code(
        "upstream",
        "The model behind the proxy cannot be reached, failed, or broke its answer off.",
        "Ask again; check the model's server. Its own status, 400 or more, is passed on.",
        "502",
    ),
    Code("engine_down", "The engine is being started.", "Wait for `Retry-After`.", "503"),
    Code("bodies_full", "Bodies in flight exceed `limits.all_bodies_bytes`.", "Try again.", "503"),
    Code(
        "upstream_full", "`limits.queue` chats wait for the model behind the proxy.", "Wait for `Retry-After`.", "503"
    ),
)
"""Why the service did not answer with a verdict."""

CLIENTS = (
    Code(
        "guard_refused", "The service answered with a status other than 200.", "See the status and the service's log."
    ),
    Code("guard_malformed", "The service answered with something that is no verdict.", "Check the address."),
    Code("guard_timeout", "The service took too long.", "Raise the client's `timeout`, or relieve the service."),
    Code("guard_unreachable", "The service cannot be reached.", "Check that it runs, and its address."),
    Code(
        "guard_hung_up",
        "The service closed the connection without an answer, as it may if a request is too large. Always blocked.",
        "Send less; see the service's log.",
    ),
    Code("guard_unasked", "The exchange cannot be sent.", "Check texts and image files."),
    Code(
        "unknown_call", "LiteLLM: this kind of call cannot be judged.", "Use chat completions, messages or responses."
    ),
    Code(
        "unheld_stream",
        "LiteLLM: outside its proxy no streamed answer is held back.",
        "Do not stream, or use the proxy.",
    ),
)
"""Verdicts that a client makes itself, which block: nothing was judged."""

MAKING = (
    Code("stopped", "Online RL was told to stop and saved its work.", "Run the same command again: it resumes."),
    Code(
        "diverged",
        "A reward or a gradient is not a finite number.",
        "Lower `grpo.learning_rate`, or use `grpo.reward.form: bounded`.",
    ),
    Code(
        "cannot_label", "The teacher cannot label rows that have no label.", "Use another teacher, or leave them out."
    ),
    Code("malformed", "The teacher's endpoint sent an answer that cannot be read.", "Run the same command again."),
    Code("no_response", "The Batch API has no answer to a request.", "Run the same command again."),
    Code(
        "unsupported", "A baseline cannot judge this exchange, such as one with images.", "Leave such rows to others."
    ),
    Code(
        "unparsable", "A baseline's answer is in no form that it is known for.", "It counts as an error of that guard."
    ),
)
"""Training, teachers, and other people's guards that are measured for comparison."""

ALL = (*JUDGING, *GRAMMAR, *SERVICE, *CLIENTS, *MAKING)
