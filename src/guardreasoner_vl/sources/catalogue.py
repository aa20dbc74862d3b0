"""The data sets that are known by name."""

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
    from guardreasoner_vl.sources.adapters import Adapter

ADAPTERS: dict[str, Adapter] = {
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


def adapter_named(name: str) -> Adapter:
    """The adapter of that name, in any case; raises `InputError` with the names there are."""
    adapter = ADAPTERS.get(name.lower())
    if adapter is None:
        raise InputError(f"no data set named {name!r:.60}; use {', '.join(ADAPTERS)}")
    return adapter
