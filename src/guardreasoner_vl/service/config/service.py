"""All settings of the service together, and what must hold between them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from guardreasoner_vl.service.audit import AuditSettings
from guardreasoner_vl.service.config.access import KeySection, is_loopback
from guardreasoner_vl.service.config.guards import DEFAULT, EnforcementSection, GuardSection
from guardreasoner_vl.service.config.limits import CacheSection, Limits
from guardreasoner_vl.service.config.upstream import UpstreamSection
from guardreasoner_vl.service.fetch import RemoteImages

if TYPE_CHECKING:
    from guardreasoner_vl.types import Target

PREFIX = "GUARDREASONER_"


class ServiceConfig(BaseSettings):
    """All settings of the service. Raises `ValidationError`, of which `load_config` makes one line."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    host: str = Field(
        default="127.0.0.1",
        description="Address to listen on. One that other machines can reach, such as 0.0.0.0, needs `keys`.",
    )
    port: int = Field(default=8800, ge=0, le=65_535, description="TCP port to listen on. 0: any free one.")
    keys: Annotated[tuple[KeySection, ...], NoDecode] = Field(
        default=(),
        description="Keys of the callers, each a mapping or the key alone. Empty: no key is needed, on this machine "
        "only.",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Names that the Host header may have besides this machine's own. Empty with `keys`: any name.",
    )
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        default=(),
        description="Origins of web pages that may call the service, such as https://example.org. Empty: its own page "
        "only.",
    )
    guards: dict[str, GuardSection] = Field(
        default_factory=lambda: {DEFAULT: GuardSection()},
        description="The guards by name; `default` judges where a request names none and must be there.",
    )
    request: EnforcementSection = Field(
        default=EnforcementSection(), description="What is done about harmful requests."
    )
    response: EnforcementSection = Field(
        default=EnforcementSection(), description="What is done about harmful responses."
    )
    limits: Limits = Field(default=Limits(), description="Bounds on sizes, numbers and times.")
    cache: CacheSection = Field(default=CacheSection(), description="Verdicts kept for equal exchanges.")
    images: RemoteImages = Field(default=RemoteImages(), description="Images that the service may fetch from the web.")
    upstream: UpstreamSection = Field(default=UpstreamSection(), description="The model behind the guarded proxy.")
    audit: AuditSettings = Field(default=AuditSettings(), description="The audit log: one line for each verdict.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = Field(
        default="INFO", description="Least severe level of the log records that are written."
    )

    @field_validator("keys", mode="before")
    @classmethod
    def _keys_named(cls, value: Any) -> Any:
        """Name each key that stands alone by its position: the first is `key-1`."""
        if not isinstance(value, (list, tuple)):
            return value
        return tuple(
            {"name": f"key-{place}", "key": key} if isinstance(key, (str, SecretStr)) else key
            for place, key in enumerate(value, 1)
        )

    @field_validator("keys", "allowed_hosts", "allowed_origins", mode="before")  # pydantic runs the last one first
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value.lstrip().startswith("["):
            return json.loads(value)
        return tuple(part.strip() for part in value.split(",") if part.strip())

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if DEFAULT not in self.guards:
            raise ValueError(f"guards: one must be called {DEFAULT}")
        if len({key.key.get_secret_value() for key in self.keys}) < len(self.keys):
            raise ValueError("keys: two keys are the same; give each caller a different one")
        for name in {key.name for key in self.keys}:
            if len({(key.max_in_flight, key.per_minute) for key in self.keys if key.name == name}) > 1:
                raise ValueError(f"keys: the keys of {name} have different limits; give them the same ones")
        if not self.keys and not is_loopback(self.host):
            raise ValueError(
                "a service reachable from other machines needs keys: set GUARDREASONER_KEYS, or host 127.0.0.1"
            )
        return self

    def enforcement(self, target: Target) -> EnforcementSection:
        """The settings of that target."""
        return self.request if target == "request" else self.response
