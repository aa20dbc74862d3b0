"""What an operator decides: a YAML file, overridden by the environment, overridden by the command line.

    GUARDREASONER_PORT=9000   GUARDREASONER_LIMITS__QUEUE=64   GUARDREASONER_KEYS=first,second

Everything is checked before a model is loaded; a message names the key and never its value, which may be a secret.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, YamlConfigSettingsSource
from yaml import YAMLError

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.judging.calibration import Preset, read_calibration
from guardreasoner_vl.judging.policy import MAX_WINDOWS, Policy
from guardreasoner_vl.recipe.unknown import first_problem, known_keys
from guardreasoner_vl.service.audit import AuditSettings
from guardreasoner_vl.service.fetch import RemoteImages
from guardreasoner_vl.service.passing import check_extra
from guardreasoner_vl.types import Frozen, Mode

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_settings import PydanticBaseSettingsSource

DEFAULT = "default"
"""The guard that judges where a request names none."""

PREFIX = "GUARDREASONER_"
CLIENT_VARIABLES = frozenset({"GUARDREASONER_KEY"})
"""What the clients of a service read; the service leaves these alone."""

Stage = Literal["request", "response"]
"""What a judgement is about: what the user sent, or what the model answered."""
STAGES: tuple[Stage, Stage] = ("request", "response")


class GuardSection(Frozen):
    """One guard: its model, and what decides its verdicts (`policy.Policy`)."""

    model: str = "embedded"
    revision: str | None = None
    engine: Literal["auto", "transformers", "openai"] = "auto"
    base_url: str | None = None
    api_key: SecretStr | None = None
    mode: Mode = "slow"
    thresholds: tuple[float | None, float | None] = (None, None)
    calibration: Path | Literal["none"] | None = None
    preset: Preset = "balanced"
    band: tuple[float, float] | None = None
    max_new_tokens: int = 1024
    retry_new_tokens: int = 4096
    long_input: Literal["refuse", "windows"] = "windows"

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.engine == "openai" and not self.base_url:
            raise ValueError("engine openai needs a base_url")
        if self.engine == "transformers" and self.base_url:
            raise ValueError("a base_url needs engine openai")
        return self

    @property
    def is_remote(self) -> bool:
        """Whether another server runs the model."""
        return self.base_url is not None

    @property
    def policy(self) -> Policy:
        """Raises `InputError` for an impossible value."""
        return Policy(
            mode=self.mode,
            thresholds=self.thresholds,
            band=self.band,
            calibration=read_calibration(self.calibration) if isinstance(self.calibration, Path) else None,
            folder_calibration=self.calibration is None,
            preset=self.preset,
            max_new_tokens=self.max_new_tokens,
            retry_new_tokens=self.retry_new_tokens,
            long_input=self.long_input,
        )


class KeySection(Frozen):
    """A key and the caller's `name`, which stands in the audit log and in the metrics; several keys may share one.

    `under_way`: exchanges that the caller may have accepted and not answered; left out, all of `limits.queue` for an
    only caller and half of it for each of several. `per_minute`: exchanges judged in a minute; left out, any number.
    """

    key: SecretStr
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    under_way: int | None = Field(default=None, ge=1)
    per_minute: int | None = Field(default=None, ge=1)

    @field_validator("key")
    @classmethod
    def _long(cls, value: SecretStr) -> SecretStr:
        if len(value.get_secret_value()) < 16:
            raise ValueError("a key needs 16 characters at least")
        return value


class StageSection(Frozen):
    """`monitor` judges, counts and lets all pass; `on_error: allow` fails open, counted and logged as critical."""

    use: Literal["enforce", "monitor"] = "enforce"
    on_error: Literal["block", "allow"] = "block"


class Limits(Frozen):
    """`queue`: exchanges accepted and not answered, for each guard; `together`: those that a model is given at once.

    `windows` is how many windows a too long exchange is judged in at most; one that needs more is an error.
    `body_bytes` bounds one request, `all_bodies_bytes` all that are under way together. `seconds` is how long one
    verdict may take, `body_seconds` how long a request may take to arrive. After SIGTERM the
    service says for `leave_seconds` that it is not ready, still taking requests; then it answers what it has accepted,
    for `drain_seconds` at most. Readiness asks an idle guard again if its last verdict is older than `ready_seconds`.
    """

    body_bytes: int = Field(default=32_000_000, ge=1_000)
    all_bodies_bytes: int = Field(default=512_000_000, ge=1_000)
    body_seconds: float = Field(default=30.0, gt=0)
    queue: int = Field(default=256, ge=1)
    together: int = Field(default=128, ge=1)
    windows: int = Field(default=MAX_WINDOWS, ge=1)
    seconds: float = Field(default=120.0, gt=0)
    retry_after: int = Field(default=2, ge=1)
    leave_seconds: float = Field(default=5.0, ge=0)
    drain_seconds: int = Field(default=60, ge=1)
    ready_seconds: float = Field(default=5.0, ge=0)


class CacheSection(Frozen):
    """Verdicts kept for equal exchanges; off with 0 entries. Errors are never kept."""

    entries: int = Field(default=0, ge=0)
    seconds: float = Field(default=3600.0, gt=0)


class UpstreamSection(Frozen):
    """The model behind `/v1/chat/completions`; a streamed answer is judged each `window` characters.

    `pass_fields` lists fields of a request that pass unjudged: `NAME`, `messages.NAME`, `messages.content.NAME`.
    """

    base_url: str | None = None
    api_key: SecretStr | None = None
    seconds: float = Field(default=600.0, gt=0)
    window: int = Field(default=400, ge=1)
    pass_fields: tuple[str, ...] = ()

    @field_validator("pass_fields")
    @classmethod
    def _named_rightly(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_extra(names)
        return names


class ServiceConfig(BaseSettings):
    """The whole service. Raises `ValidationError`; `load_config` says it in one line."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, hide_input_in_errors=True
    )

    host: str = "127.0.0.1"
    port: int = Field(default=8800, ge=0, le=65_535)
    keys: Annotated[tuple[KeySection, ...], NoDecode] = ()
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    allowed_origins: Annotated[tuple[str, ...], NoDecode] = ()
    guards: dict[str, GuardSection] = Field(default_factory=lambda: {DEFAULT: GuardSection()})
    request: StageSection = StageSection()
    response: StageSection = StageSection()
    limits: Limits = Limits()
    cache: CacheSection = CacheSection()
    images: RemoteImages = RemoteImages()
    upstream: UpstreamSection = UpstreamSection()
    audit: AuditSettings = AuditSettings()
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"] = "INFO"

    @field_validator("keys", mode="before")
    @classmethod
    def _keys_named(cls, value: Any) -> Any:
        """A key may stand alone: it is then called by its place, `key-1` the first."""
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
            raise ValueError(f"guards needs one that is called {DEFAULT}")
        if len({key.key.get_secret_value() for key in self.keys}) < len(self.keys):
            raise ValueError("keys: two of them are the same; give each caller a key of its own")
        for name in {key.name for key in self.keys}:
            if len({(key.under_way, key.per_minute) for key in self.keys if key.name == name}) > 1:
                raise ValueError(f"keys: {name} stands with two limits; give its keys the same")
        if not self.keys and not is_loopback(self.host):
            raise ValueError("a service that others can reach needs keys: set GUARDREASONER_KEYS, or host 127.0.0.1")
        return self

    def stage(self, stage: Stage) -> StageSection:
        return self.request if stage == "request" else self.response


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def load_config(path: Path | None = None, **given: Any) -> ServiceConfig:
    """The configuration; what is `given` wins over the environment, and that over the file. Raises `InputError`."""
    if path is not None and not path.is_file():
        raise InputError(f"{path}: no such file; give a YAML file")
    _check_variables(os.environ)

    class Layered(ServiceConfig):
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
        made = Layered(**given)
        for guard in made.guards.values():
            _ = guard.policy
    except ValidationError as error:
        raise InputError(f"{where}: {first_problem(error.errors(), ServiceConfig, 'the settings')}") from error
    except (OSError, ValueError, TypeError, YAMLError) as error:  # no YAML, no mapping, a variable that is no JSON
        raise InputError(f"{where}: cannot be read ({type(error).__name__}); check it") from error
    return made


def _check_variables(environment: Mapping[str, str]) -> None:
    """Pydantic ignores a variable that names no setting; a limit that is misspelt would then not hold."""
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
    """Plain data with the secrets masked, for people to look at."""
    return config.model_dump(mode="json")
