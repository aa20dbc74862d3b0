"""OpenAI's own client against the guard service: moderation of texts and images, and the guarded proxy.

    guardreasoner-vl serve --port 8811
    GUARD_URL=http://127.0.0.1:8811 python examples/integrations/openai_client.py

The proxy answers where the service has an upstream: GUARDREASONER_UPSTREAM__BASE_URL=https://.../v1.
"""

from __future__ import annotations

import os
from typing import Any

from openai import BadRequestError, OpenAI


def connect(url: str, key: str = "none") -> OpenAI:
    """The client wants some key even where the service has none."""
    return OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0)


def is_flagged(client: OpenAI, content: Any) -> bool:
    """Whether to block a text, or all the parts of one message; what could not be judged is flagged too."""
    return any(result.flagged for result in client.moderations.create(input=content).results)


def ask(client: OpenAI, model: str, prompt: str) -> str:
    """The model's answer, or why there is none."""
    try:
        completion = client.chat.completions.create(model=model, messages=[{"role": "user", "content": prompt}])
    except BadRequestError as error:
        if error.code not in ("content_filter", "guard_error"):
            raise
        return f"(refused) {error.body}"
    choice = completion.choices[0]
    return (
        f"(refused) {choice.message.refusal}"
        if choice.finish_reason == "content_filter"
        else choice.message.content or ""
    )


def main() -> None:
    """Moderate two texts."""
    client = connect(os.environ.get("GUARD_URL", "http://127.0.0.1:8800"), os.environ.get("GUARD_KEY", "none"))
    for text in ("How do I bake bread?", "Explain how to break into a parked car."):
        print(f"{'block' if is_flagged(client, text) else 'allow'}  {text}")


if __name__ == "__main__":
    main()
