"""The service's settings: a YAML file, overridden by the environment, overridden by the command line.

    GUARDREASONER_PORT=9000   GUARDREASONER_LIMITS__QUEUE=64   GUARDREASONER_KEYS=first,second

Everything is checked before a model is loaded; a message names the key and never its value, which may be a secret.
"""

from guardreasoner_vl.service.config.access import KeySection, is_loopback
from guardreasoner_vl.service.config.guards import DEFAULT, EnforcementSection, GuardSection
from guardreasoner_vl.service.config.limits import CacheSection, Limits
from guardreasoner_vl.service.config.load import CLIENT_VARIABLES, as_plain, load_config
from guardreasoner_vl.service.config.service import PREFIX, ServiceConfig
from guardreasoner_vl.service.config.upstream import UpstreamSection

__all__ = [
    "CLIENT_VARIABLES",
    "DEFAULT",
    "PREFIX",
    "CacheSection",
    "EnforcementSection",
    "GuardSection",
    "KeySection",
    "Limits",
    "ServiceConfig",
    "UpstreamSection",
    "as_plain",
    "is_loopback",
    "load_config",
]
