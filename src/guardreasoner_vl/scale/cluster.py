"""The connection to a Ray cluster (the extra `ray`), and how many guards it has room for."""

from __future__ import annotations

import logging
import os
import socket
from typing import Any

from guardreasoner_vl.errors import EngineError, InputError, MissingExtraError, reason_of

LOCAL, AUTO = "local", "auto"
"""Addresses of a new cluster on this machine that ends with this process, and of the cluster of this machine."""

_CONNECT_SECONDS = 5.0
_SETTINGS, _HEADER = b"\x04", 9
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0" * 5
"""What a client of HTTP/2, on which gRPC is built, sends first (RFC 9113, section 3.4): an empty SETTINGS frame, whose
header is `_HEADER` bytes long. A server's first frame is of the same type."""


def connect(address: str) -> Any:
    """Connect this process to the cluster and return the module `ray`.

    Nothing is sent to Ray's makers, no dashboard is started, and no worker's output reaches this process, because it
    could show what is judged. Raises `MissingExtraError`, `InputError` for an invalid address, and `EngineError`
    if no cluster answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error
    if address not in (LOCAL, AUTO):
        _check_answers(address)
    options = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        raise EngineError(
            f"cannot join the Ray cluster {address} ({reason_of(error)}); run this on a machine of the cluster, with "
            "the cluster's versions of Ray and Python"
        ) from error
    return ray


def cluster_size(ray: Any, workers: int | None, on_gpus: bool) -> tuple[int, int]:
    """The number of workers, and the number of GPUs of each.

    A worker takes one CPU core, and one GPU if `on_gpus` is true and the cluster has any; by default there is then one
    worker for each GPU. Raises `InputError` if `workers` is None without a GPU, or the cluster is too small.
    """
    resources = ray.cluster_resources()
    cores, gpus = int(resources.get("CPU", 0)), int(resources.get("GPU", 0)) if on_gpus else 0
    if workers is None and not gpus:
        raise InputError(f"the cluster has no GPU to set the number of guards: give --workers (1 to {cores})")
    room = min(cores, gpus) if gpus else cores
    workers = workers or room
    if not 1 <= workers <= room:
        kind = "GPU" if gpus and gpus <= cores else "CPU core"
        raise InputError(
            f"the cluster has room for {room} guards, one for each {kind}, not for {workers}: give fewer --workers, or "
            "add machines"
        )
    return workers, 1 if gpus else 0


def _check_answers(address: str) -> None:
    """Raise unless a gRPC server listens at the address: Ray itself would try for minutes, whatever listens there."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isdecimal()) or "/" in address:
        raise InputError(
            f"{address!r:.100}: no address of a Ray cluster; give its head as HOST:PORT (port 6379), 'auto' on one of "
            "its machines, or 'local'"
        )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS) as connection:
            connection.sendall(_PREFACE)
            answer = connection.makefile("rb").read(_HEADER)
    except (OSError, OverflowError) as error:
        raise EngineError(
            f"no Ray cluster answers at {address} ({reason_of(error)}); check the address, and that `ray start` ran"
        ) from error
    if answer[3:4] != _SETTINGS and os.environ.get("RAY_USE_TLS", "0") == "0":
        raise EngineError(f"what answers at {address} is no Ray cluster; give the port of its head, by default 6379")
