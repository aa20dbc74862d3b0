"""The settings of who may call the service."""

from __future__ import annotations

import ipaddress
from typing import ClassVar

from pydantic import Field, SecretStr, field_validator

from guardreasoner_vl.types import Frozen


class KeySection(Frozen):
    """A key and its caller; several keys may share one name, and then one limit."""

    renamed_keys: ClassVar[dict[str, str]] = {"under_way": "max_in_flight"}

    key: SecretStr = Field(
        description="The secret that the caller sends as `Authorization: Bearer KEY`; 16 characters at least."
    )
    name: str = Field(
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="The caller's name in the audit log and the metrics: 1 to 64 letters, digits, `_`, `.` and `-`. A "
        "key given alone is named `key-1`, `key-2`, ...",
    )
    max_in_flight: int | None = Field(
        default=None,
        ge=1,
        description="Exchanges that the caller may have accepted and unanswered. Null: `limits.queue` for the only "
        "caller, half of it where there are several.",
    )
    per_minute: int | None = Field(
        default=None, ge=1, description="Exchanges of the caller that are judged in a minute. Null: no limit."
    )

    @field_validator("key")
    @classmethod
    def _long(cls, value: SecretStr) -> SecretStr:
        if len(value.get_secret_value()) < 16:
            raise ValueError("a key needs 16 characters at least")
        return value


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
