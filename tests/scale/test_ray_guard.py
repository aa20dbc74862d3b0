"""Guards on a Ray cluster of two machines (raylets of one core each): whatever is killed, every row has one verdict."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from functools import partial
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

from guardreasoner_vl.batch.moderate import run_batch
from guardreasoner_vl.errors import EngineError, InputError
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.mining.sampling import CandidateSampling, SampledRow
from guardreasoner_vl.recipe import MineSection
from guardreasoner_vl.scale.ray_guard import RayGuard
from tests.builders import sample
from tests.made_images import image
from tests.scale.guards import broken_guard, deadly_guard, differing_guard, dying_guard, refused_guard
from tests.scripted_guard import scripted_guard

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from guardreasoner_vl.guard import Guard

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STORE = 80 * 2**20


class Machines:
    """A cluster whose head has no core; its workers run on two machines of one core each."""

    def __init__(self) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster()
        self._cluster.add_node(num_cpus=0, object_store_memory=STORE, include_dashboard=False)
        self._nodes = [self._add() for _ in range(2)]
        self.address: str = self._cluster.address

    def _add(self) -> Any:
        return self._cluster.add_node(num_cpus=1, object_store_memory=STORE)

    def lose_one(self) -> None:
        """Kill a machine with all of its processes."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def replace(self) -> None:
        """Add a machine for one that was lost."""
        self._nodes.append(self._add())

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Machines()
    yield cluster
    cluster.close()


def on(machines: Machines, open_guard: Callable[[], Guard] = scripted_guard, **options: Any) -> RayGuard:
    return RayGuard(machines.address, open_guard, Policy(), 2, **options)


def numbered(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"id": n, "prompt": f"number {n}"}) + "\n" for n in range(count)), "utf-8")
    return path


def ids(path: Path) -> list[Any]:
    return [json.loads(line)["id"] for line in path.read_text("utf-8").splitlines()]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_verdicts_are_those_of_one_guard_in_the_order_of_the_rows(machines: Machines) -> None:
    items: list[dict[str, Any]] = [{"prompt": f"{'BAD' if n % 3 else 'bread'} {n}"} for n in range(40)]
    items[7], items[20], items[21] = {"prompt": "BROKEN"}, {"prompt": 5}, {"images": [Path("/nowhere.png")]}
    items[30] = {"prompt": json.loads("[" * 700 + "]" * 700)}  # too deep for pickle
    alone = list(scripted_guard().moderate_batch(items))
    with on(machines) as guard:
        shared = list(guard.moderate_batch(iter(items), chunk=3))
        assert (guard.model, guard.mode, guard.settings) == (
            alone[0].model,
            "slow",
            scripted_guard().settings,
        )
        assert list(guard.moderate_batch([], chunk=3)) == []
    assert shared == alone
    assert [verdict.error.code for verdict in shared if verdict.error] == [
        "engine",
        "invalid_input",
        "invalid_image",
        "invalid_input",
    ]


def test_candidates_are_those_of_one_engine(machines: Machines, tmp_path: Path) -> None:
    path = tmp_path / "cake.png"
    path.write_bytes(image(60, 40).png)
    shown = sample("shown", modality="text-image", images=(str(path),), request_label="unharmful")
    gone = shown.model_copy(update={"id": "gone", "images": ("/nowhere.png",)})
    rows = [SampledRow.of(row) for row in (shown, gone, sample("a", prompt="BAD", request_label="unharmful"))]
    work = CandidateSampling(MineSection(), 1)
    with on(machines) as guard:
        assert list(guard.share(work, rows, chunk=1)) == list(scripted_guard().share(work, rows, chunk=2))


def test_a_job_that_is_given_up_does_not_disturb_the_next(machines: Machines) -> None:
    with on(machines, partial(scripted_guard, pause=0.05)) as guard:
        first = guard.moderate_batch([{"prompt": "BAD"}] * 12, chunk=2)
        assert next(first).flagged
        assert isinstance(first, Generator)
        first.close()
        assert [verdict.flagged for verdict in guard.moderate_batch([{"prompt": "bread"}] * 5, chunk=2)] == [False] * 5


def test_a_row_that_kills_its_worker_is_an_error_and_the_only_one(machines: Machines, tmp_path: Path) -> None:
    items = [{"prompt": f"bread {n}"} for n in range(8)]
    items[2], items[5] = {"prompt": f"ONCE {tmp_path / 'first'} bread"}, {"prompt": "KILL"}
    with on(machines, deadly_guard) as guard:
        verdicts = list(guard.moderate_batch(items, chunk=4))
        assert guard.lost >= 4
    assert [verdict.flagged for verdict in verdicts] == [False] * 5 + [None] + [False] * 2
    assert verdicts[5].error is not None
    assert (verdicts[5].error.code, verdicts[5].action) == ("engine", "block")
    assert "the worker was lost" in verdicts[5].error.message


def test_every_row_is_judged_once_though_a_machine_and_its_worker_are_lost(machines: Machines, tmp_path: Path) -> None:
    count = 300
    source, out = numbered(tmp_path / "in.jsonl", count), tmp_path / "out.jsonl"

    def lose_one_in_the_middle() -> None:
        while lines(out) < 60:
            time.sleep(0.01)
        machines.lose_one()

    with on(machines, partial(scripted_guard, pause=0.02)) as guard:
        killer = Thread(target=lose_one_in_the_middle)
        killer.start()
        summary = run_batch(guard, source, out, chunk=5)
        killer.join()
        assert guard.lost == 1
    machines.replace()
    assert ids(out) == list(range(count))
    assert (summary.judged, summary.complete) == (count, True)


def test_a_driver_killed_again_and_again_loses_and_doubles_nothing(machines: Machines, tmp_path: Path) -> None:
    count = 240
    source, out = numbered(tmp_path / "in.jsonl", count), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "tests.scale.ray_batch", machines.address, str(source), str(out), "4"]
    for kills in range(3):
        before = lines(out)
        child = subprocess.Popen(command, cwd=ROOT)
        while kills < 2 and child.poll() is None and lines(out) < before + 24:
            time.sleep(0.01)
        if kills < 2:
            child.send_signal(signal.SIGKILL)
            assert child.wait() == -signal.SIGKILL
            assert before < lines(out) < count
        else:
            assert child.wait() == 0
    assert sorted(ids(out)) == list(range(count))


def test_the_command_line_shares_rows_of_the_embedded_guard(machines: Machines, tmp_path: Path) -> None:
    numbered(tmp_path / "in.jsonl", 6)
    main = "from guardreasoner_vl.cli.app import main; main()"
    command = [sys.executable, "-c", main, "batch", "in.jsonl", "out.jsonl", "--mode", "fast", "--chunk", "4"]
    for options, said in ((["--ray", machines.address, "--workers", "1"], "judged 6 rows"), ([], "6 earlier")):
        done = subprocess.run([*command, *options], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert said in done.stderr
        assert ids(tmp_path / "out.jsonl") == list(range(6))


@pytest.mark.parametrize(
    ("open_guard", "message"),
    [
        (refused_guard, r"cannot open the guard: .*vllm is not installed: install .* extra 'vllm'"),
        (broken_guard, r"cannot open the guard: .*CUDA out of memory. Tried to allocate 15 GiB"),
        (dying_guard, r"cannot open the guard: the worker died while it loaded the model, which may not fit"),
        (differing_guard, "differs from another worker's: copy the same to all machines"),
    ],
)
def test_guards_that_cannot_be_opened_end_the_job_in_one_line(
    machines: Machines, open_guard: Callable[[], Guard], message: str
) -> None:
    with pytest.raises(EngineError, match=message) as error, on(machines, open_guard) as guard:
        list(guard.moderate_batch([{"prompt": "bread"}] * 4, chunk=1))
    assert "\n" not in str(error.value)


def test_a_machine_without_the_package_is_named(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("not_on_the_workers")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def opened() -> Guard:
        raise AssertionError("unreachable: no worker can import it")

    opened.__module__, opened.__qualname__, opened.__name__ = module.__name__, "opened", "opened"
    vars(module)["opened"] = opened
    with (
        pytest.raises(EngineError, match=r"No module named 'not_on_the_workers'.* on all machines"),
        on(machines, opened),
    ):
        pass


def test_a_cluster_that_is_too_small_or_busy_is_refused(machines: Machines, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="room for 2 guards, one for each CPU core, not for 3"):
        RayGuard(machines.address, scripted_guard, Policy(), 3)
    source, out = numbered(tmp_path / "in.jsonl", 10_000), tmp_path / "out.jsonl"
    other = subprocess.Popen(
        [sys.executable, "-m", "tests.scale.ray_batch", machines.address, source, out, "4"], cwd=ROOT
    )
    try:
        while other.poll() is None and not lines(out):
            time.sleep(0.01)
        with pytest.raises(EngineError, match="no worker was ready within 2 s"):
            on(machines, patience=2.0)
    finally:
        other.kill()
        other.wait()
