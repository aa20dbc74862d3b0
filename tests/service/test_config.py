"""Settings: layers, checks, and messages that name keys and no values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.errors import InputError
from guardreasoner_vl.service.backend import backend_of
from guardreasoner_vl.service.config import as_plain, is_loopback, load_config

if TYPE_CHECKING:
    from pathlib import Path

KEY = "a-key-of-some-length"


def test_the_command_line_wins_over_the_environment_and_that_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("port: 1\nlimits: {queue: 1, together: 1, retry_after: 1}\nguards: {default: {mode: fast}}\n")
    monkeypatch.setenv("GUARDREASONER_PORT", "2")
    monkeypatch.setenv("GUARDREASONER_LIMITS__QUEUE", "2")
    monkeypatch.setenv("GUARDREASONER_LIMITS__TOGETHER", "2")
    made = load_config(path, port=3, limits={"together": 3})
    assert (made.port, made.limits.queue, made.limits.together, made.limits.retry_after) == (3, 2, 3, 1)
    assert made.guards["default"].mode == "fast"


def test_the_defaults_are_safe() -> None:
    made = load_config()
    assert (made.host, made.request.use, made.request.on_error, made.response.on_error) == (
        "127.0.0.1",
        "enforce",
        "block",
        "block",
    )
    assert made.images.hosts == ()
    assert made.cache.entries == 0
    assert made.audit.path is None


def test_several_guards(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("guards:\n  default: {}\n  big: {base_url: 'http://localhost:1/v1', thresholds: [0.7, null]}\n")
    made = load_config(path)
    assert made.guards["big"].is_remote
    assert made.guards["big"].policy.thresholds == (0.7, None)


def test_the_most_windows_reach_every_guard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDREASONER_LIMITS__WINDOWS", "9")
    config = load_config(guards={"default": {}, "big": {"base_url": "http://localhost:1/v1"}})
    for section in config.guards.values():
        backend = backend_of(section, config.limits.together, lambda: None, config.limits.windows)
        assert (backend.policy.long_input, backend.policy.max_windows) == ("windows", 9)
    with pytest.raises(InputError, match=r"limits\.windows"):
        load_config(limits={"windows": 0})


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
    ("given", "told"),
    [
        ({"port": 70_000}, "port"),
        ({"guards": {"other": {}}}, "guards needs one that is called default"),
        ({"guards": {"default": {"modell": "x"}}}, r"guards\.default\.modell"),
        ({"guards": {"default": {"engine": "openai"}}}, "needs a base_url"),
        ({"guards": {"default": {"engine": "transformers", "base_url": "http://x"}}}, "needs engine openai"),
        ({"guards": {"default": {"thresholds": [2, None]}}}, "from 0 to 1"),
        ({"guards": {"default": {"calibration": "/nowhere.json"}}}, "cannot be read"),
        ({"keys": ("secret",)}, "16 characters"),
        ({"request": {"on_error": "pass"}}, r"request\.on_error"),
        ({"limits": {"queue": 0}}, r"limits\.queue"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_an_impossible_setting_is_named_and_not_shown(given: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        load_config(**given)
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
    made = load_config()
    assert [key.key.get_secret_value() for key in made.keys] == [KEY, f"{KEY}2"]
    assert made.allowed_hosts == ("a.example", "b.example")
    assert KEY not in str(as_plain(made))
    assert KEY not in repr(made)


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
    ("text", "told"),
    [
        ("limits: {qeue: 5}", "unknown key 'limits.qeue'; did you mean 'queue'?"),
        ("limit: {queue: 5}", "unknown key 'limit'; did you mean 'limits'?"),
        ("guards: {default: {modell: x}}", "unknown key 'guards.default.modell'; did you mean 'model'?"),
        ("queue: 5", "unknown key 'queue'; did you mean 'limits.queue'?"),
        ("keys: [{name: a, key: a-key-of-some-length, per_minut: 5}]", "did you mean 'per_minute'?"),
    ],
)
def test_an_unknown_key_is_told_what_was_meant(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert told in str(caught.value)


def test_a_misspelt_nested_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDREASONER_LIMITS__QEUE", "5")
    with pytest.raises(InputError, match="did you mean 'queue'"):
        load_config()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([{"name": "a", "key": KEY}, {"name": "b", "key": KEY}], "two of them are the same"),
        ([{"name": "a", "key": KEY, "under_way": 1}, {"name": "a", "key": f"{KEY}2"}], "a stands with two limits"),
        ([{"name": "a b", "key": KEY}], r"keys\.0\.name"),
        ([{"name": "a"}], r"keys\.0\.key"),
        ([{"name": "a", "key": KEY, "per_minute": 0}], r"keys\.0\.per_minute"),
    ],
)
def test_keys_that_cannot_be(given: Any, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        load_config(keys=given)
    assert KEY not in str(caught.value)


def test_named_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDREASONER_KEYS", f'[{{"name": "shop", "key": "{KEY}", "per_minute": 60}}]')
    (made,) = load_config().keys
    assert (made.name, made.per_minute, made.under_way) == ("shop", 60, None)
    assert KEY not in repr(made)
