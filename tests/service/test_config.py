"""Settings: layers, checks, and messages that name keys but never values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.images.decode import ImageLimits
from guardreasoner_vl.service.backend import make_backend
from guardreasoner_vl.service.config import as_plain, is_loopback, load_config

if TYPE_CHECKING:
    from pathlib import Path

KEY = "a-key-of-some-length"


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("port: 1\nlimits: {queue: 1, max_batch_size: 1, retry_after: 1}\nguards: {default: {mode: fast}}\n")
    monkeypatch.setenv("GUARDREASONER_PORT", "2")
    monkeypatch.setenv("GUARDREASONER_LIMITS__QUEUE", "2")
    monkeypatch.setenv("GUARDREASONER_LIMITS__MAX_BATCH_SIZE", "2")
    config = load_config(path, port=3, limits={"max_batch_size": 3})
    assert (config.port, config.limits.queue, config.limits.max_batch_size, config.limits.retry_after) == (3, 2, 3, 1)
    assert config.guards["default"].mode == "fast"


def test_the_defaults_are_safe() -> None:
    config = load_config()
    assert (config.host, config.request.mode, config.request.on_error, config.response.on_error) == (
        "127.0.0.1",
        "enforce",
        "block",
        "block",
    )
    assert config.images.hosts == ()
    assert config.cache.entries == 0
    assert config.audit.path is None


def test_several_guards(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("guards:\n  default: {}\n  big: {base_url: 'http://localhost:1/v1', thresholds: [0.7, null]}\n")
    config = load_config(path)
    assert config.guards["big"].is_remote
    assert config.guards["big"].policy.thresholds == (0.7, None)


def test_the_most_windows_reach_every_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDREASONER_LIMITS__WINDOWS", "9")
    config = load_config(guards={"default": {}, "big": {"base_url": "http://localhost:1/v1"}})
    for section in config.guards.values():
        backend = make_backend(section, config.limits, lambda: None)
        assert (backend.policy.long_input, backend.policy.max_windows) == ("windows", 9)
    with pytest.raises(InputError, match=r"limits\.windows"):
        load_config(limits={"windows": 0})


def test_the_most_pixels_of_an_exchange_reach_every_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_config().limits.exchange_pixels == ImageLimits().max_exchange_pixels
    monkeypatch.setenv("GUARDREASONER_LIMITS__EXCHANGE_PIXELS", "5000")
    config = load_config(guards={"default": {}, "big": {"base_url": "http://localhost:1/v1"}})
    for section in config.guards.values():
        assert make_backend(section, config.limits, lambda: None).policy.images == ImageLimits(max_exchange_pixels=5000)
    with pytest.raises(InputError, match=r"limits\.exchange_pixels"):
        load_config(limits={"exchange_pixels": 0})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "guard.example", ""])
def test_a_public_address_needs_a_key(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(InputError, match="needs keys"):
        load_config(host=host)
    assert load_config(host=host, keys=(KEY,)).host == host


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.8.8.8", "::1"])
def test_this_machine_needs_none(host: str) -> None:
    assert load_config(host=host).host == host


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70_000}, "port"),
        ({"guards": {"other": {}}}, "guards: one must be called default"),
        ({"guards": {"default": {"modell": "x"}}}, r"guards\.default\.modell"),
        ({"guards": {"default": {"engine": "openai"}}}, "needs a base_url"),
        ({"guards": {"default": {"engine": "transformers", "base_url": "http://x"}}}, "needs engine openai"),
        ({"guards": {"default": {"engine": "openvino", "base_url": "http://x"}}}, "needs engine openai"),
        ({"guards": {"default": {"thresholds": [2, None]}}}, "from 0 to 1"),
        ({"guards": {"default": {"calibration": "/nowhere.json"}}}, "cannot be read"),
        ({"keys": ("secret",)}, "16 characters"),
        ({"request": {"on_error": "pass"}}, r"request\.on_error"),
        ({"limits": {"queue": 0}}, r"limits\.queue"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_an_impossible_setting_is_named_and_not_shown(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_config(**settings)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["port: [", "- 1", "port: nine"])
def test_a_file_that_is_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=r"c\.yaml") as caught:
        load_config(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        load_config(tmp_path / "nowhere.yaml")


def test_keys_from_the_environment_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDREASONER_KEYS", f"{KEY}, {KEY}2")
    monkeypatch.setenv("GUARDREASONER_ALLOWED_HOSTS", "a.example,b.example")
    config = load_config()
    assert [key.key.get_secret_value() for key in config.keys] == [KEY, f"{KEY}2"]
    assert config.allowed_hosts == ("a.example", "b.example")
    assert KEY not in str(as_plain(config))
    assert KEY not in repr(config)


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("GUARDREASONER_LIMIT__QUEUE", "GUARDREASONER_LIMITS__QUEUE"),
        ("GUARDREASONER_LIMITS_QUEUE", "GUARDREASONER_LIMITS__QUEUE"),
        ("guardreasoner_prot", "GUARDREASONER_PORT"),
        ("GUARDREASONER_UPSTREAMS__BASE_URL", "GUARDREASONER_UPSTREAM__BASE_URL"),
    ],
)
def test_a_variable_that_names_no_setting(variable: str, meant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "5")
    with pytest.raises(InputError, match=f"{variable}: no such setting; did you mean {meant}") as caught:
        load_config()
    assert "\n" not in str(caught.value)


def test_variables_of_clients_and_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDREASONER_KEY", "a-key-of-a-client-of-ours")
    monkeypatch.setenv("GUARDRAIL_LIMIT__QUEUE", "5")
    assert load_config().keys == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("limits: {qeue: 5}", "unknown key 'limits.qeue'; did you mean 'queue'?"),
        ("limit: {queue: 5}", "unknown key 'limit'; did you mean 'limits'?"),
        ("guards: {default: {modell: x}}", "unknown key 'guards.default.modell'; did you mean 'model'?"),
        ("queue: 5", "unknown key 'queue'; did you mean 'limits.queue'?"),
        ("keys: [{name: a, key: a-key-of-some-length, per_minut: 5}]", "did you mean 'per_minute'?"),
    ],
)
def test_the_error_of_an_unknown_key_suggests_a_known_one(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "old", "new"),
    [
        ("limits: {together: 5}", "limits.together", "limits.max_batch_size"),
        ("request: {use: monitor}", "request.use", "request.mode"),
        ("response: {use: enforce, mode: enforce}", "response.use", "response.mode"),
        ("keys: [{name: shop, under_way: 5}]", "keys.0.under_way", "keys.0.max_in_flight"),
    ],
)
def test_a_renamed_key_is_refused_with_its_new_name(text: str, old: str, new: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(caught.value) == f"{path}: '{old}' was renamed: write '{new}'"


def test_a_renamed_variable_is_refused_with_its_new_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDREASONER_LIMITS__TOGETHER", "5")
    with pytest.raises(InputError, match=r"'limits\.together' was renamed: write 'limits\.max_batch_size'"):
        load_config()


def test_a_misspelt_nested_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDREASONER_LIMITS__QEUE", "5")
    with pytest.raises(InputError, match="did you mean 'queue'"):
        load_config()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([{"name": "a", "key": KEY}, {"name": "b", "key": KEY}], "two keys are the same"),
        (
            [{"name": "a", "key": KEY, "max_in_flight": 1}, {"name": "a", "key": f"{KEY}2"}],
            "the keys of a have different limits",
        ),
        ([{"name": "a b", "key": KEY}], r"keys\.0\.name"),
        ([{"name": "a"}], r"keys\.0\.key"),
        ([{"name": "a", "key": KEY, "per_minute": 0}], r"keys\.0\.per_minute"),
    ],
)
def test_keys_that_cannot_be(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_config(keys=settings)
    assert KEY not in str(caught.value)


def test_named_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDREASONER_KEYS", f'[{{"name": "shop", "key": "{KEY}", "per_minute": 60}}]')
    (config,) = load_config().keys
    assert (config.name, config.per_minute, config.max_in_flight) == ("shop", 60, None)
    assert KEY not in repr(config)
