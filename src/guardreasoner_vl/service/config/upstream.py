"""The settings of the model behind the guarded proxy."""

from __future__ import annotations

from pydantic import Field, SecretStr, field_validator

from guardreasoner_vl.service.chat_fields import check_pass_fields
from guardreasoner_vl.types import Frozen


class UpstreamSection(Frozen):
    """The model behind the guarded proxy, `/v1/chat/completions`."""

    base_url: str | None = Field(
        default=None, description="Address of the model's server, such as http://localhost:8000/v1. Null: no proxy."
    )
    api_key: SecretStr | None = Field(default=None, description="Key for the model's server. Null: none is sent.")
    seconds: float = Field(default=600.0, gt=0, description="Seconds that the model's answer may take.")
    window: int = Field(
        default=400,
        ge=1,
        description="Characters of a streamed answer between two judgements; fewer release text sooner and cost more.",
    )
    pass_fields: tuple[str, ...] = Field(
        default=(),
        description="More fields of a chat request that are passed on unjudged: `NAME`, `messages.NAME` or "
        "`messages.content.NAME`.",
    )

    @field_validator("pass_fields")
    @classmethod
    def _named_rightly(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_pass_fields(names)
        return names
