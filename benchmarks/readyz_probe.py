"""Probe a service's /readyz for some seconds, 20 times a second, each over a new connection, and print the times.

python -m benchmarks.readyz_probe http://127.0.0.1:8800 60
"""

from __future__ import annotations

import http.client
import json
import statistics
import sys
import time
from collections import Counter
from urllib.parse import urlsplit

EVERY_SECONDS = 0.05


def probe(url: str, seconds: float) -> dict[str, object]:
    """Answer times in milliseconds, and counts by status; `none` is no answer within 60 s."""
    host = urlsplit(url).netloc
    took: list[float] = []
    statuses: Counter[str] = Counter()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        started = time.perf_counter()
        connection = http.client.HTTPConnection(host, timeout=60)
        try:
            connection.request("GET", "/readyz")
            statuses[str(connection.getresponse().status)] += 1
        except OSError:
            statuses["none"] += 1
        finally:
            connection.close()
        took.append(1000 * (time.perf_counter() - started))
        time.sleep(EVERY_SECONDS)
    cuts = statistics.quantiles(took, n=1000)
    shares = {"p50": cuts[499], "p99": cuts[989], "p99.9": cuts[998], "max": max(took)}
    return {"asked": len(took), **{name: round(value, 1) for name, value in shares.items()}, **statuses}


if __name__ == "__main__":
    print(json.dumps(probe(sys.argv[1], float(sys.argv[2]))))
