"""The deployment files agree with the code: settings, routes, metrics, ports, times, rights."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from guardreasoner_vl.choices import TARGETS
from guardreasoner_vl.recipe.unknown import known_keys
from guardreasoner_vl.service.access import HEALTH
from guardreasoner_vl.service.app import create_app
from guardreasoner_vl.service.backend import EngineLoad
from guardreasoner_vl.service.config import ServiceConfig, load_config
from guardreasoner_vl.service.metrics import OUTCOMES, REASONS, ROUTES, Metrics
from guardreasoner_vl.types import ModelInfo

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
SETTINGS = (DEPLOY / "systemd" / "settings.yaml", KUBERNETES / "settings.yaml")
OPERATIONS = ROOT / "docs" / "operations.md"
KEYS = '[{"name": "shop", "key": "a-key-of-16-characters", "max_in_flight": 200}]'
VALUES: dict[str, set[str]] = {
    "outcome": {*OUTCOMES},
    "target": {*TARGETS},
    "reason": {*REASONS},
    "route": {*ROUTES},
    "status": {"2xx", "3xx", "4xx", "5xx"},
}
"""Values that a label may have, for the labels with fixed values."""
SERIES_OF_PROMETHEUS = {"up": {"job", "instance"}}
TARGET_LABELS = {"job", "instance", "le"}


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDREASONER_KEYS", KEYS)


Document: TypeAlias = "dict[str, Any]"


def documents(path: Path) -> list[Document]:
    return list(yaml.safe_load_all(path.read_text("utf-8")))


def only(path: Path, kind: str) -> Document:
    """The document of that kind."""
    (document,) = (document for document in documents(path) if document["kind"] == kind)
    return document


def pod(path: Path = KUBERNETES / "deployment.yaml") -> Document:
    specification: Document = only(path, "Deployment")["spec"]["template"]["spec"]
    return specification


def container(path: Path = KUBERNETES / "deployment.yaml") -> Document:
    (single,) = pod(path)["containers"]
    result: Document = single
    return result


class UnitParser(configparser.RawConfigParser):
    """Reads a systemd unit: keys keep their case and may repeat."""

    def __init__(self) -> None:
        super().__init__(strict=False, delimiters=("=",))

    def optionxform(self, optionstr: str) -> str:
        return optionstr


def unit() -> UnitParser:
    parser = UnitParser()
    parser.read_string((DEPLOY / "systemd" / "guardreasoner-vl.service").read_text("utf-8"))
    return parser


def containerfile() -> str:
    return (ROOT / "Containerfile").read_text("utf-8")


def known_series() -> dict[str, set[str]]:
    """The names of all series that the service exports, with their labels."""
    metrics = Metrics()
    metrics.verdict("default", "request", "allow", 0.1, 1)
    metrics.request("/v1/guard", "POST", 200, 0.1)
    metrics.refused("queue_full")
    metrics.engine_up({"default": True})
    metrics.engine_load({"default": EngineLoad(1, 1)})
    metrics.models({"default": ModelInfo(name="embedded")})
    body, _ = metrics.render()
    series: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(body.decode()):
        for sample in family.samples:
            series.setdefault(sample.name, set()).update(sample.labels)
    return series


def alerts() -> list[Document]:
    groups = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yaml").read_text("utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def board() -> Document:
    content: Document = json.loads((DEPLOY / "grafana" / "guardreasoner-vl.json").read_text("utf-8"))
    return content


def expressions() -> list[tuple[str, str]]:
    """Every PromQL expression with the name of its alert or panel."""
    rules = [(rule["alert"], rule["expr"]) for rule in alerts()]
    panels = [(panel["title"], target["expr"]) for panel in board()["panels"] for target in panel["targets"]]
    queries = [
        (variable["name"], variable["query"]["query"])
        for variable in board()["templating"]["list"]
        if variable["type"] == "query"
    ]
    return rules + panels + queries


@pytest.mark.parametrize("path", sorted(DEPLOY.rglob("*.yaml")), ids=lambda path: str(path.relative_to(DEPLOY)))
def test_every_yaml_file_parses(path: Path) -> None:
    assert all(documents(path))


@pytest.mark.usefixtures("key")
@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.parent.name)
def test_the_settings_are_the_services(path: Path) -> None:
    config = load_config(path)
    assert config.port == 8800
    assert config.limits.drain_seconds > config.limits.seconds
    assert config.audit.path is not None


def test_the_settings_of_a_machine_need_no_key() -> None:
    assert load_config(SETTINGS[0]).host == "127.0.0.1"


@pytest.mark.usefixtures("key")
def test_the_supervisors_wait_for_the_drain() -> None:
    machine, cluster = (load_config(path).limits for path in SETTINGS)
    assert int(unit()["Service"]["TimeoutStopSec"]) > machine.leave_seconds + machine.drain_seconds
    assert pod()["terminationGracePeriodSeconds"] > cluster.leave_seconds + cluster.drain_seconds


def test_probes_ask_routes_that_need_no_key() -> None:
    paths = {route.path for route in create_app(ServiceConfig()).routes if hasattr(route, "path")}
    guard = container()
    probes = {name: guard[name]["httpGet"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert {probe["path"] for probe in probes.values()} == paths & {*HEALTH}
    assert probes["readinessProbe"]["path"] == "/readyz"
    assert probes["livenessProbe"]["path"] == "/healthz"
    names = [port["name"] for port in guard["ports"]]
    assert all(probe["port"] in names for probe in probes.values())
    assert "http://127.0.0.1:8800/readyz" in unit()["Service"]["ExecStartPost"]


@pytest.mark.usefixtures("key")
def test_ports_user_and_command_are_those_of_the_image() -> None:
    text = containerfile()
    port = int(re.findall(r"^EXPOSE (\d+)$", text, re.MULTILINE)[-1])
    user = int(re.findall(r"^USER (\d+)$", text, re.MULTILINE)[-1])
    assert [entry["containerPort"] for entry in container()["ports"]] == [port]
    assert pod()["securityContext"]["runAsUser"] == user
    assert '["guardreasoner-vl", "serve"]' in text
    assert container()["args"] == ["--config", "/etc/guard/settings.yaml"]
    assert {load_config(path).port for path in SETTINGS} == {port}
    service = only(KUBERNETES / "service.yaml", "Service")["spec"]
    assert [entry["targetPort"] for entry in service["ports"]] == ["http"]


def test_volumes_are_where_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GUARDREASONER_KEYS", KEYS)
    mounts = {mount["mountPath"]: mount["name"] for mount in container()["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod()["volumes"]}
    assert set(mounts.values()) == set(volumes)
    audit = load_config(SETTINGS[1]).audit
    assert audit.path is not None
    size = volumes[mounts[str(audit.path.parent)]]["emptyDir"]["sizeLimit"]
    assert (audit.keep + 1) * audit.max_bytes < int(size.removesuffix("Gi")) * 2**30
    assert "/tmp" in mounts  # HOME of the image
    assert "HOME=/tmp" in containerfile()
    generated = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text("utf-8"))
    (settings,) = generated["configMapGenerator"]
    assert volumes[mounts["/etc/guard"]]["configMap"]["name"] == settings["name"]
    assert settings["files"] == ["settings.yaml"]
    machine = load_config(SETTINGS[0]).audit.path
    assert machine is not None
    assert machine.parent == Path("/var/log") / unit()["Service"]["LogsDirectory"]


def test_pods_have_no_more_rights_than_they_need() -> None:
    assert pod()["securityContext"]["runAsNonRoot"]
    assert not pod()["automountServiceAccountToken"]
    assert container()["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    service = unit()["Service"]
    assert service["NoNewPrivileges"] == "yes"
    assert service["ProtectSystem"] == "strict"
    assert service["User"] != "root"


def test_no_variable_of_another_service_is_read_as_a_setting() -> None:
    """Kubernetes would set GUARDREASONER_PORT in the pods beside a Service of that name."""
    for path in (KUBERNETES / "deployment.yaml", KUBERNETES / "vllm.yaml"):
        assert pod(path)["enableServiceLinks"] is False


def test_selectors_select_the_pods() -> None:
    labels = only(KUBERNETES / "deployment.yaml", "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert only(KUBERNETES / "deployment.yaml", "Deployment")["spec"]["selector"]["matchLabels"] == labels
    assert only(KUBERNETES / "service.yaml", "Service")["spec"]["selector"] == labels
    assert (
        only(KUBERNETES / "disruption-budget.yaml", "PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    )
    assert only(KUBERNETES / "network-policy.yaml", "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    scrape = yaml.safe_load((DEPLOY / "prometheus" / "scrape-kubernetes.yaml").read_text("utf-8"))["scrape_configs"][0]
    assert labels["app.kubernetes.io/name"] in [relabel.get("regex") for relabel in scrape["relabel_configs"]]
    vllm = only(KUBERNETES / "vllm.yaml", "Deployment")["spec"]["template"]["metadata"]["labels"]
    assert only(KUBERNETES / "vllm.yaml", "Service")["spec"]["selector"] == vllm
    assert only(KUBERNETES / "vllm.yaml", "NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == vllm
    assert vllm != labels


def test_every_resource_is_listed_and_there() -> None:
    listed = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text("utf-8"))["resources"]
    files = {path.name for path in KUBERNETES.glob("*.yaml")}
    assert {*listed} == files - {"kustomization.yaml", "settings.yaml", "vllm.yaml"}


def test_images_are_named_by_a_variable() -> None:
    assert container()["image"] == "${GUARD_IMAGE}"
    assert container(KUBERNETES / "vllm.yaml")["image"] == "${VLLM_IMAGE}"


def test_vllm_is_started_as_compose_starts_it() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text("utf-8"))["services"]
    assert container(KUBERNETES / "vllm.yaml")["args"] == services["vllm"]["command"]
    assert "--generation-config=vllm" in services["vllm"]["command"]  # else the base's repetition penalty moves scores


@pytest.mark.parametrize("name", ["scrape.yaml", "scrape-kubernetes.yaml"])
def test_the_scrape_uses_a_key_and_the_metrics_route(name: str) -> None:
    (job,) = yaml.safe_load((DEPLOY / "prometheus" / name).read_text("utf-8"))["scrape_configs"]
    assert job["job_name"] == "guardreasoner-vl"
    assert job["metrics_path"] in ROUTES
    assert job["metrics_path"] not in HEALTH
    assert job["authorization"]["type"] == "Bearer"


@pytest.mark.parametrize(("name", "expression"), expressions(), ids=lambda value: value[:40])
def test_every_expression_asks_for_series_that_exist(name: str, expression: str) -> None:
    series = known_series() | SERIES_OF_PROMETHEUS
    selectors = re.findall(r"\b((?:guardreasoner_\w+|up))\b(?:\{([^}]*)\})?", expression)
    assert selectors, name
    for metric, matchers in selectors:
        assert metric in series, metric
        for label, operator, value in re.findall(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"', matchers):
            assert label in series[metric] | TARGET_LABELS, (metric, label)
            if label in VALUES and not value.startswith("$"):
                words = value.split("|") if operator.endswith("~") else [value]
                assert {*words} <= VALUES[label], (metric, label, value)
    grouped = re.findall(r"\bby \(([^)]*)\)", expression)
    labels = {label.strip() for group in grouped for label in group.split(",")}
    assert labels <= set().union(*series.values()) | TARGET_LABELS
    assert expression.count("(") == expression.count(")")
    assert expression.count("{") == expression.count("}")


def test_every_alert_has_a_severity_and_a_section_in_the_runbook() -> None:
    headings = re.findall(r"^### (\w+)$", OPERATIONS.read_text("utf-8"), re.MULTILINE)
    names = [rule["alert"] for rule in alerts()]
    assert len({*names}) == len(names)
    assert names == headings
    for rule in alerts():
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"


@pytest.mark.usefixtures("key")
def test_the_queue_alert_fits_the_queue() -> None:
    (rule,) = (rule for rule in alerts() if rule["alert"] == "GuardQueueFills")
    queue = load_config(SETTINGS[1]).limits.queue
    assert rule["expr"] == f"guardreasoner_in_flight > {int(0.8 * queue)}"


def test_the_board_has_its_own_panels_in_their_own_places() -> None:
    panels = board()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (column, row)
        for panel in panels
        for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for row in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len({*cells}) == len(cells)
    assert all(0 <= column < 24 for column, _ in cells)
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}


def test_what_the_operations_page_names_exists() -> None:
    text = OPERATIONS.read_text("utf-8")
    series = known_series()
    families = {*series, *(name.removesuffix("_count") for name in series)}
    assert {*re.findall(r"`(guardreasoner_\w+)`", text)} <= families
    settings = {f"{section}.{name}" for name, section in known_keys(ServiceConfig) if section}
    named = re.findall(r"`((?:limits|audit|upstream|images|cache|request|response)\.\w+)(?:: \w+)?`", text)
    assert len(named) > 10
    assert {*named} <= settings
    for path in re.findall(r"`(deploy/[\w/.-]+)`", text):
        assert (ROOT / path).exists(), path
    assert {*re.findall(r"`(/(?:v1/[\w/]+|\w+z|metrics))`", text)} <= {*ROUTES}
