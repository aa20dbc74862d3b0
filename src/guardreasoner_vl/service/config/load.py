"""Reads the settings from a YAML file, the environment and the command line."""

from __future__ import annotations

import difflib
import os
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_settings import YamlConfigSettingsSource
from yaml import YAMLError

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.recipe.unknown import first_problem, known_keys
from guardreasoner_vl.service.config.service import PREFIX, ServiceConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from pydantic_settings import BaseSettings, PydanticBaseSettingsSource

CLIENT_VARIABLES = frozenset({"GUARDREASONER_KEY"})
"""Variables that clients of the service read; the service ignores them."""


def load_config(path: Path | None = None, **overrides: Any) -> ServiceConfig:
    """Read the configuration; `overrides` take precedence over the environment, and that over the file.

    Raises `InputError`.
    """
    if path is not None and not path.is_file():
        raise InputError(f"{path}: no such file; give a YAML file")
    _check_variables(os.environ)

    class LayeredConfig(ServiceConfig):
        """The configuration from overrides, environment and file, in this order."""

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, YamlConfigSettingsSource(settings_cls, yaml_file=path)

    where = path or "configuration"
    try:
        config = LayeredConfig(**overrides)
        for guard in config.guards.values():
            _ = guard.policy
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error.errors(), ServiceConfig, 'the settings')}") from error
    except (
        OSError,
        ValueError,
        TypeError,
        YAMLError,
    ) as error:  # not YAML, not a mapping, or a variable that is not JSON
        raise InputError(f"{where}: cannot be read ({type(error).__name__}); check it") from error
    return config


def _check_variables(environment: Mapping[str, str]) -> None:
    """Refuse a variable that names no setting; pydantic would ignore it, and a misspelt limit would have no effect."""
    for variable in sorted(environment):
        first = variable[len(PREFIX) :].lower().partition("__")[0]
        if variable.upper().startswith(PREFIX) and not (
            first in ServiceConfig.model_fields or variable.upper() in CLIENT_VARIABLES
        ):
            names = [f"{parent}.{name}" if parent else name for name, parent in known_keys(ServiceConfig)]
            known = [PREFIX + name.replace(".", "__").upper() for name in names]
            close = difflib.get_close_matches(variable.upper(), known, n=1, cutoff=0.6)
            raise InputError(
                f"{variable}: no such setting; " + (f"did you mean {close[0]}?" if close else "unset the variable")
            )


def as_plain(config: ServiceConfig) -> Mapping[str, Any]:
    """The configuration as plain data for display, with the secrets masked."""
    return config.model_dump(mode="json")
