"""Joining a Ray cluster: what is no address or no cluster is one line, and guards are counted by GPUs."""

from __future__ import annotations

import socket
import sys
from dataclasses import dataclass

import pytest

from guardreasoner_vl.errors import EngineError, InputError, MissingExtraError
from guardreasoner_vl.scale.cluster import cluster_size, connect
from tests.local_server import Handler, LocalServer


@dataclass
class Resources:
    """Stands for the module `ray` of a process that has joined a cluster."""

    CPU: float
    GPU: float = 0.0

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": self.CPU, "memory": 1e10, **({"GPU": self.GPU} if self.GPU else {})}


@pytest.mark.parametrize("address", ["head", "ray://head:10001", "head:port", ":6379", ""])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match="no address of a Ray cluster; give its head as HOST:PORT"):
        connect(address)


def test_a_cluster_that_is_away_is_one_line() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EngineError, match=f"no Ray cluster answers at {address}"):
        connect(address)


def test_what_answers_but_is_no_cluster_is_one_line() -> None:
    with LocalServer(Handler) as server:
        address = server.url.removeprefix("http://").removesuffix("/v1")
        with pytest.raises(
            EngineError, match=f"what answers at {address} is no Ray cluster; give the port of its head"
        ):
            connect(address)


def test_without_the_extra_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"ray is not installed: install guardreasoner-vl with the extra 'ray'"):
        connect("local")


@pytest.mark.parametrize(
    ("cluster", "workers", "on_gpus", "size"),
    [
        (Resources(64, 8), None, True, (8, 1)),
        (Resources(64, 8), 3, True, (3, 1)),
        (Resources(64, 8), 16, False, (16, 0)),
        (Resources(4, 8), None, True, (4, 1)),
        (Resources(2), 2, True, (2, 0)),
    ],
)
def test_a_guard_takes_a_core_and_a_gpu_if_there_are_any(
    cluster: Resources, workers: int | None, on_gpus: bool, size: tuple[int, int]
) -> None:
    assert cluster_size(cluster, workers, on_gpus) == size


@pytest.mark.parametrize(
    ("cluster", "workers", "message"),
    [
        (Resources(64, 8), 9, "room for 8 guards, one for each GPU, not for 9: give fewer --workers, or add machines"),
        (Resources(4, 8), 5, "room for 4 guards, one for each CPU core, not for 5"),
        (Resources(2), 3, "room for 2 guards, one for each CPU core, not for 3"),
        (Resources(2), None, r"give --workers \(1 to 2\)"),
        (Resources(0), 1, "room for 0 guards"),
    ],
)
def test_a_cluster_without_room_is_refused(cluster: Resources, workers: int | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        cluster_size(cluster, workers, True)
