"""NeMo Guardrails calls `init` before it loads the models of the configuration beside this file."""

from guardreasoner_vl.integrations.nemo import init

__all__ = ["init"]
