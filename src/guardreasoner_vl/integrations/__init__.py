"""Integrations of the guard service; a library is imported only by the module for it."""

from guardreasoner_vl.remote.client import GuardClient

__all__ = ["GuardClient"]
