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
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, YamlConfigSettingsSource
from yaml import YAMLError

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.judging.calibration import Preset, read_calibration
from guardreasoner_vl.judging.policy import MAX_WINDOWS, Policy
from guardreasoner_vl.recipe.unknown import first_problem, known_keys
from guardreasoner_vl.service.audit import AuditSettings
from guardreasoner_vl.service.chat_fields import check_pass_fields
from guardreasoner_vl.service.fetch import RemoteImages
from guardreasoner_vl.types import Frozen, Mode, Target

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic_settings import PydanticBaseSettingsSource

DEFAULT = "default"
"""The guard that judges if a request names none."""

PREFIX = "GUARDREASONER_"
CLIENT_VARIABLES = frozenset({"GUARDREASONER_KEY"})
"""Variables that clients of the service read; the service ignores them."""

TARGETS: tuple[Target, Target] = ("request", "response")


class GuardSection(Frozen):
    """One guard: its model, and what decides its verdicts (`judging.policy.Policy`)."""

    model: str = Field(
        default="embedded",
        description="`embedded`, a model folder, a hub id, or the name that the server at `base_url` gives the model.",
    )
    revision: str | None = Field(default=None, description="Commit or tag of a hub id. Null: the default branch.")
    engine: Literal["auto", "transformers", "openai"] = Field(
        default="auto",
        description="`transformers`: run the model here, in a process of its own. `openai`: ask an OpenAI-compatible "
        "server. `auto`: a server if `base_url` is set.",
    )
    base_url: str | None = Field(
        default=None, description="Address of the model's server, such as http://localhost:8000/v1. Null: no server."
    )
    api_key: SecretStr | None = Field(
        default=None, description="Key for the model's server. Null: OPENAI_API_KEY, if that is set."
    )
    mode: Mode = Field(
        default="slow",
        description="`slow`: reason first. `fast`: give the verdict only. `hybrid`: reason where the fast score lies "
        "in the band. A request may ask for another mode.",
    )
    thresholds: tuple[float | None, float | None] = Field(
        default=(None, None),
        description="Lowest P(harmful) at which the request and the response count as harmful. Null: what the "
        "calibration's `preset` says, or the label without a calibration.",
    )
    calibration: Path | Literal["none"] | None = Field(
        default=None,
        description="File that `calibrate` wrote. Null: the one in the model's folder, if any. `none`: no calibration.",
    )
    preset: Preset = Field(
        default="balanced",
        description="The calibration's thresholds to use: `strict` aims at 10% false positives, `balanced` at 5%, "
        "`permissive` at 1%.",
    )
    band: tuple[float, float] | None = Field(
        default=None,
        description="Scores, lowest and highest, that `hybrid` mode reasons about. Null: the calibration's band, else "
        "0.1 to 0.9. [0, 1] always reasons.",
    )
    max_new_tokens: int = Field(default=1024, description="Longest answer of the model in tokens.")
    retry_new_tokens: int = Field(
        default=4096,
        description="Longest answer in tokens of the one retry after an answer was cut. Not above `max_new_tokens`: no "
        "retry.",
    )
    long_input: Literal["refuse", "windows"] = Field(
        default="windows",
        description="What to do with an exchange that exceeds the model's context: `refuse` it, or judge overlapping "
        "`windows` and take the worst verdict.",
    )

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
    """A key and its caller; several keys may share one name, and then one limit."""

    key: SecretStr = Field(
        description="The secret that the caller sends as `Authorization: Bearer KEY`; 16 characters at least."
    )
    name: str = Field(
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="The caller's name in the audit log and the metrics: 1 to 64 letters, digits, `_`, `.` and `-`. A "
        "key given alone is named `key-1`, `key-2`, ...",
    )
    under_way: int | None = Field(
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


class EnforcementSection(Frozen):
    """What is done about harmful requests, or about harmful responses."""

    renamed_keys: ClassVar[dict[str, str]] = {"use": "mode"}

    mode: Literal["enforce", "monitor"] = Field(
        default="enforce",
        description="`enforce`: block what is harmful. `monitor`: judge and count it, and let everything pass.",
    )
    on_error: Literal["block", "allow"] = Field(
        default="block",
        description="What to do with what could not be judged. `allow` fails open: each exchange let through is "
        "counted and logged as critical.",
    )


class Limits(Frozen):
    """Bounds on sizes, numbers and times."""

    renamed_keys: ClassVar[dict[str, str]] = {"together": "max_batch_size"}

    body_bytes: int = Field(
        default=32_000_000, ge=1_000, description="Largest body of one request in bytes; a larger one gets status 413."
    )
    all_bodies_bytes: int = Field(
        default=512_000_000,
        ge=1_000,
        description="Bytes of all bodies under way together; a request that would exceed them gets status 503.",
    )
    body_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Seconds that the head and the body of a request may each take to arrive; a slower body gets "
        "status 408, a slower head a closed connection. For an answer sent while it grows: seconds between two pieces.",
    )
    queue: int = Field(
        default=256,
        ge=1,
        description="Exchanges of one guard that are accepted and unanswered; one more gets status 429.",
    )
    max_batch_size: int = Field(
        default=128, ge=1, description="Exchanges of one guard that its model is given at once."
    )
    windows: int = Field(
        default=MAX_WINDOWS,
        ge=1,
        description="Windows of one exchange that exceeds the model's context; one that needs more is an "
        "`input_too_long` error.",
    )
    seconds: float = Field(
        default=120.0, gt=0, description="Seconds that one verdict may take; then it is a `deadline` error."
    )
    retry_after: int = Field(
        default=2, ge=1, description="Seconds in the `Retry-After` header of an exchange that is not accepted."
    )
    leave_seconds: float = Field(
        default=5.0,
        ge=0,
        description="Seconds after SIGTERM in which `/readyz` answers 503 while requests are still accepted. 0: stop "
        "accepting at once.",
    )
    drain_seconds: int = Field(
        default=60,
        ge=1,
        description="Seconds after `leave_seconds` to answer accepted requests; then connections are closed.",
    )
    ready_seconds: float = Field(
        default=5.0,
        ge=0,
        description="Age in seconds of an idle guard's last verdict at which a readiness probe has it judge a test "
        "exchange. 0: at every probe.",
    )


class CacheSection(Frozen):
    """Verdicts kept in memory for equal exchanges; errors are never kept."""

    entries: int = Field(
        default=0, ge=0, description="Verdicts to keep; the one unused for longest goes first. 0: no cache."
    )
    seconds: float = Field(default=3600.0, gt=0, description="Seconds after which a verdict is judged anew.")


class UpstreamSection(Frozen):
    """The model behind the guarded proxy, `/v1/chat/completions`."""

    base_url: str | None = Field(
        default=None, description="Address of the model's server, such as http://localhost:8000/v1. Null: no proxy."
    )
    api_key: SecretStr | None = Field(default=None, description="Key for the model's server. Null: none is sent.")
    seconds: float = Field(default=600.0, gt=0, description="Seconds that the model's answer may take.")
    window: int = Field(
        default=400,
        ge=1,
        description="Characters of a streamed answer between two judgements; fewer release text sooner and cost more.",
    )
    pass_fields: tuple[str, ...] = Field(
        default=(),
        description="More fields of a chat request that are passed on unjudged: `NAME`, `messages.NAME` or "
        "`messages.content.NAME`.",
    )

    @field_validator("pass_fields")
    @classmethod
    def _named_rightly(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        check_pass_fields(names)
        return names


class ServiceConfig(BaseSettings):
    """The whole service. Raises `ValidationError`; `load_config` says it in one line."""

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
            raise ValueError(f"guards: one must be called {DEFAULT}")
        if len({key.key.get_secret_value() for key in self.keys}) < len(self.keys):
            raise ValueError("keys: two keys are the same; give each caller a different one")
        for name in {key.name for key in self.keys}:
            if len({(key.under_way, key.per_minute) for key in self.keys if key.name == name}) > 1:
                raise ValueError(f"keys: the keys of {name} have different limits; give them the same ones")
        if not self.keys and not is_loopback(self.host):
            raise ValueError(
                "a service reachable from other machines needs keys: set GUARDREASONER_KEYS, or host 127.0.0.1"
            )
        return self

    def enforcement(self, target: Target) -> EnforcementSection:
        """The settings of that target."""
        return self.request if target == "request" else self.response


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


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
