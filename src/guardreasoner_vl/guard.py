"""`Guard`: exchanges in, verdicts out; one by one, in batches, or from an event loop."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from guardreasoner_vl.engines.model_files import (
    CALIBRATION,
    EMBEDDED,
    check_folder,
    model_info,
    resolve_folder,
    weights_digest,
)
from guardreasoner_vl.errors import CalledOffError, GuardError, InputError
from guardreasoner_vl.judging.calibration import Calibration, read_calibration
from guardreasoner_vl.judging.effects import Call, Count, Reply, Score
from guardreasoner_vl.judging.judge import error_verdict, judge
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.judging.rounds import (
    WINDOWS_TOGETHER,
    Rounds,
    advance,
    call_off,
    counted,
    fault,
    unanswered,
    watched,
)
from guardreasoner_vl.protocol import CANDIDATES
from guardreasoner_vl.types import Exchange, ImageSource, Mode, ModelInfo, Verdict, same_model
from guardreasoner_vl.types.media import unread_medium

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from guardreasoner_vl.engines.base import Engine, Watch
    from guardreasoner_vl.judging.effects import Judging

Item: TypeAlias = Exchange | Mapping[str, Any]
"""An exchange, or a row `{prompt?, images?, response?}` or `{messages}`."""

EngineName = Literal["auto", "transformers", "openai"]
ENGINES: tuple[EngineName, ...] = ("auto", "transformers", "openai")
CHUNK = 128


@dataclass(frozen=True)
class Asked:
    """One of many that are judged together: the item, its mode (the guard's own if None), and who watches."""

    item: Item
    mode: Mode | None = None
    watch: Watch | None = None


class Guard:
    """Judges exchanges with one engine under one policy.

    Input that cannot be judged and faults of the engine become `error` verdicts; only a wrong setting raises.
    """

    def __init__(self, engine: Engine, policy: Policy | None = None) -> None:
        self.engine = engine
        self.policy = policy or Policy()
        calibrated = self.policy.calibration
        if calibrated is not None and not _calibrated_for(calibrated.model, engine.model):
            raise InputError(
                f"the calibration was measured on {_named(calibrated.model)}, the model is {_named(engine.model)}: "
                "calibrate again"
            )

    @classmethod
    def load(
        cls,
        model: str = EMBEDDED,
        engine: EngineName = "auto",
        *,
        revision: str | None = None,
        policy: Policy | None = None,
        calibration: Calibration | str | Path | None = None,
        **options: Any,
    ) -> Guard:
        """Open a guard; `calibration` is one that `calibrate` wrote, and goes into the policy. Without one, that in
        the model's folder does (`Policy.folder_calibration`).

        `model`: "embedded", a model folder, or a hub id. With the `openai` engine, which a `base_url` among
        `options` implies, the served model's name; without one, the server's first. Further `options` go to the
        engine. Raises `ModelError`.
        """
        policy = policy or Policy()
        if calibration is not None:
            measured = calibration if isinstance(calibration, Calibration) else read_calibration(calibration)
            policy = replace(policy, calibration=measured)
        if engine not in ENGINES:
            raise InputError(f"unknown engine {engine!r}: use one of {', '.join(ENGINES)}")
        if engine == "openai" or (engine == "auto" and "base_url" in options):
            from guardreasoner_vl.engines.openai.engine import OpenAIEngine

            return cls(OpenAIEngine.connect(model=None if model == EMBEDDED else model, **options), policy)
        folder = resolve_folder(model, revision)
        check_folder(folder)  # before torch is imported, so that a typo is told at once
        if policy.calibration is None and policy.folder_calibration:
            policy = replace(policy, calibration=_folder_calibration(folder, model_info(model, folder, revision)))
        with _no_garbage_collection():
            from guardreasoner_vl.engines.transformers_engine import TransformersEngine

        return cls(TransformersEngine.load(model, revision, **options), policy)

    @property
    def model(self) -> ModelInfo:
        """Name and revision of the model that judges."""
        return self.engine.model

    @property
    def mode(self) -> Mode:
        """The mode in which it judges if none is named."""
        return self.policy.mode

    @property
    def settings(self) -> dict[str, Any]:
        """What decides its verdicts besides the model and the mode, as plain data."""
        return {name: value for name, value in self.policy.as_json().items() if name != "mode"}

    def moderate(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        response: str | None = None,
        mode: Mode | None = None,
    ) -> Verdict:
        """Judge what a user sent (text, images, or both) and, if given, what the model answered."""
        return self._one(lambda: as_exchange({"prompt": prompt, "images": images, "response": response}), mode)

    def moderate_messages(self, messages: Sequence[Mapping[str, Any]], *, mode: Mode | None = None) -> Verdict:
        """Judge the last user turn, and the answer after it, of an OpenAI-style conversation."""
        return self._one(lambda: Exchange.from_messages(messages), mode)

    async def amoderate(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        response: str | None = None,
        mode: Mode | None = None,
    ) -> Verdict:
        """`moderate` without blocking the event loop."""
        return await self._aone(lambda: as_exchange({"prompt": prompt, "images": images, "response": response}), mode)

    async def amoderate_messages(self, messages: Sequence[Mapping[str, Any]], *, mode: Mode | None = None) -> Verdict:
        """`moderate_messages` without blocking the event loop."""
        return await self._aone(lambda: Exchange.from_messages(messages), mode)

    def moderate_batch(
        self, items: Iterable[Item], *, mode: Mode | None = None, chunk: int = CHUNK
    ) -> Iterator[Verdict]:
        """Judge many, lazily and in order; a bad item becomes an `error` verdict and the rest go on.

        `chunk` items are read and judged together.
        """
        policy = self._policy(mode)
        if chunk < 1:
            raise InputError("chunk is a number of items: give at least 1")
        return self._batches(iter(items), policy, chunk)

    def moderate_from(
        self, more: Callable[[int], Iterable[tuple[Asked, Callable[[Verdict], None]]]], most: int | None = None
    ) -> None:
        """Judge the items that `more` returns, each with a callback for its verdict, until it returns none and all are
        judged.

        `more` is called between two rounds with the number of exchanges under way; while there are none it may wait.
        At most `most` calls are put to the engine at once, in the order that `judging.rounds` describes. A verdict is
        handed over as soon as it is there; an item that is called off ends in an `error` verdict.
        """
        rounds = Rounds(self.engine, most, WINDOWS_TOGETHER)
        while (joining := list(more(len(rounds)))) or rounds:
            for asked, done in joining:
                judging = self._judging(partial(as_exchange, asked.item), self._policy(asked.mode), asked.watch)
                rounds.add(judging, asked.watch, done)
            rounds.step()

    async def amoderate_each(self, asked: Asked) -> Verdict:
        """The verdict about one item, without blocking the event loop; cancelling it cancels the engine's request.

        An item that is called off ends in an `error` verdict.
        """
        return await self._aone(partial(as_exchange, asked.item), asked.mode, asked.watch)

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _policy(self, mode: Mode | None) -> Policy:
        if mode is None:
            return self.policy
        return replace(self.policy, mode=mode)

    def _one(self, build: Callable[[], Exchange], mode: Mode | None) -> Verdict:
        return self._together([self._judging(build, self._policy(mode))])[0]

    async def _aone(self, build: Callable[[], Exchange], mode: Mode | None, watch: Watch | None = None) -> Verdict:
        judging = self._judging(build, self._policy(mode), watch)
        outcome = await asyncio.to_thread(advance, judging, None)
        while not isinstance(outcome, Verdict):
            if watch and watch.called_off:
                outcome = call_off(judging)
                continue
            reply = await self._areply(watched(outcome, watch))
            outcome = await asyncio.to_thread(advance, judging, reply)
        return outcome

    def _batches(self, items: Iterator[Item], policy: Policy, chunk: int) -> Iterator[Verdict]:
        while batch := list(islice(items, chunk)):
            yield from self._together([self._judging(partial(as_exchange, item), policy) for item in batch])

    def _together(self, judgings: Sequence[Judging]) -> list[Verdict]:
        """All verdicts, in order."""
        verdicts: dict[int, Verdict] = {}
        rounds = Rounds(self.engine)
        for place, judging in enumerate(judgings):
            rounds.add(judging, None, partial(verdicts.__setitem__, place))
        while rounds:
            rounds.step()
        return [verdicts[place] for place in range(len(judgings))]

    def _judging(self, build: Callable[[], Exchange], policy: Policy, watch: Watch | None = None) -> Judging:
        """One item's judging; nothing that goes wrong with it reaches the others."""
        try:
            if watch and watch.called_off:  # before its images are decoded
                raise CalledOffError
            return (yield from judge(build(), policy, self.model))
        except GuardError as error:
            return error_verdict(error, policy, self.model)
        except Exception as error:
            return error_verdict(fault("the guard", error), policy, self.model)

    async def _areply(self, call: Call) -> Reply:
        if isinstance(call, Count):
            return await asyncio.to_thread(counted, self.engine, call)
        try:
            if isinstance(call, Score):
                return await self.engine.ascore(call.request, call.slots, CANDIDATES)
            return await self.engine.agenerate(call.request)
        except Exception as error:
            return unanswered(error, call.slots if isinstance(call, Score) else None)


def _folder_calibration(folder: Path, model: ModelInfo) -> Calibration | None:
    """The calibration in a model's folder, if there is one, as that of the opened model.

    Of a hub's snapshot the revision is the commit, which no file in it can name: the weights' digest tells whose it is.
    """
    path = folder / CALIBRATION
    if not path.is_file():
        return None
    calibration = read_calibration(path)
    if calibration.model.revision != weights_digest(folder):
        raise InputError(f"{path}: measured on other weights; calibrate again, or leave it out with --calibration none")
    return calibration.model_copy(update={"model": model})


def _calibrated_for(measured: ModelInfo, model: ModelInfo) -> bool:
    """Whether the calibration is the model's; if only one of the two has a revision, it is taken to be another's."""
    return bool(measured.revision) == bool(model.revision) and same_model(measured, model)


def _named(model: ModelInfo) -> str:
    return f"{model.name} ({model.revision or 'no revision'})"


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Importing torch and transformers makes a million objects that live on; looking for garbage costs a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def as_exchange(item: Item) -> Exchange:
    """The exchange that an item is or describes; raises `InputError`."""
    if isinstance(item, Exchange):
        return item
    if not isinstance(item, Mapping):
        raise InputError("an item is an Exchange or a mapping with prompt, images, response, or messages")
    if medium := unread_medium(item, ("images",)):
        raise InputError(f"{medium!a:.40}: no such medium is judged; give images in images, a list")
    own = {name: item[name] for name in ("prompt", "images", "response") if item.get(name) is not None}
    if item.get("messages") is not None:
        if own:
            raise InputError(f"give either messages or {', '.join(own)}, not both")
        return Exchange.from_messages(item["messages"])
    for name in ("prompt", "response"):
        if not isinstance(own.get(name), str | None):
            raise InputError(f"{name} must be a string or null")
    images = own.get("images", ())
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise InputError("images must be a list")
    return Exchange(own.get("prompt"), tuple(images), own.get("response"))
