"""The adapters of the known data sets, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.sources import (
    aegis,
    beavertails,
    guardreasoner_train,
    hod,
    released,
    sharegpt,
    spa_vl,
    toxic_chat,
    unsafebench,
    vlguard,
    wildguard,
)

if TYPE_CHECKING:
    from guardreasoner_vl.sources.adapters import SourceAdapter

ADAPTERS: dict[str, SourceAdapter] = {
    adapter.name: adapter
    for adapter in (
        wildguard.ADAPTER,
        aegis.ADAPTER,
        beavertails.ADAPTER,
        beavertails.ADAPTER_30K,
        toxic_chat.ADAPTER,
        unsafebench.ADAPTER,
        vlguard.ADAPTER,
        vlguard.IMAGES_ADAPTER,
        hod.ADAPTER,
        spa_vl.ADAPTER,
        released.ADAPTER,
        guardreasoner_train.ADAPTER,
        sharegpt.ADAPTER,
    )
}


def adapter_named(name: str) -> SourceAdapter:
    """The adapter of that name, ignoring case. Raises `InputError` with the known names."""
    adapter = ADAPTERS.get(name.lower())
    if adapter is None:
        raise InputError(f"no data set named {name!r:.60}; use {', '.join(ADAPTERS)}")
    return adapter
