"""The guard service in front of what people run; each library is imported by its own module only."""

from guardreasoner_vl.remote.client import GuardClient

__all__ = ["GuardClient"]
