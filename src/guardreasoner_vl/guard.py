"""`Guard`: judges exchanges and returns verdicts, one by one, in batches, or from an event loop."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias, TypeVar

from guardreasoner_vl.choices import CHUNK, ENGINES
from guardreasoner_vl.engines.adapter import check_adapter
from guardreasoner_vl.engines.model_files import (
    CALIBRATION,
    EMBEDDED,
    check_folder,
    model_info,
    resolve_folder,
    weights_digest,
)
from guardreasoner_vl.errors import GuardError, InputError, MissingExtraError, RequestCancelledError
from guardreasoner_vl.judging.calibration import Calibration, read_calibration
from guardreasoner_vl.judging.effects import CountCall, EngineCall, EngineReply, ReadCall, ScoreCall
from guardreasoner_vl.judging.judge import error_verdict, judge
from guardreasoner_vl.judging.policy import Policy
from guardreasoner_vl.judging.rounds import (
    WINDOWS_TOGETHER,
    Rounds,
    advance,
    aread,
    cancel_judging,
    count_prompt_tokens,
    error_reply,
    unexpected_error,
    with_listener,
)
from guardreasoner_vl.protocol import CANDIDATES
from guardreasoner_vl.types import Exchange, ImageSource, ModelInfo, Verdict, same_model
from guardreasoner_vl.types.media import unread_medium

if TYPE_CHECKING:
    from guardreasoner_vl.choices import EngineName, Mode
    from guardreasoner_vl.engines.base import Engine, StreamListener
    from guardreasoner_vl.judging.effects import JudgingSteps

Item: TypeAlias = Exchange | Mapping[str, Any]
"""An exchange, or a row `{prompt?, images?, response?}` or `{messages}`."""

RowT = TypeVar("RowT")
ResultT = TypeVar("ResultT")
ItemT_contra = TypeVar("ItemT_contra", contravariant=True)


class Moderator(Protocol[ItemT_contra]):
    """Judges many exchanges: a guard in this process, behind a service or on a cluster, or one of another project."""

    @property
    def model(self) -> ModelInfo:
        """The model that judges."""

    @property
    def mode(self) -> Mode:
        """The mode in which it judges."""

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that affect verdicts, besides the model and the mode; empty if only a service knows them."""

    def moderate_batch(self, items: Iterable[ItemT_contra], *, chunk: int) -> Iterator[Verdict]:
        """Yield verdicts lazily, in order; at most `chunk` items are judged at a time."""


class RowWork(Protocol[RowT, ResultT]):
    """A function of rows that a guard applies, in this process (`Guard.share`) or on a cluster (`scale`).

    The function and its rows are sent to other machines, so they must be picklable.
    """

    def __call__(self, guard: Guard, rows: Sequence[RowT]) -> list[ResultT]:
        """The rows' results, in order; a row that cannot be judged has a result too."""

    def portable(self, row: RowT) -> RowT:
        """The row without references to this machine's files."""

    def unanswered(self, row: RowT, error: GuardError) -> ResultT:
        """The result of a row that no guard has answered."""

    def is_unanswered(self, result: ResultT) -> bool:
        """Whether the row has no result because the engine failed."""


class RowSharer(Protocol):
    """One guard, or several that share the rows of a job."""

    @property
    def model(self) -> ModelInfo:
        """Name and revision of the model that judges."""

    def share(self, work: RowWork[RowT, ResultT], rows: Iterable[RowT], *, chunk: int) -> Iterator[ResultT]:
        """The rows' results, lazily and in order; `work` gets `chunk` rows at a time."""


@dataclass(frozen=True)
class GuardRequest:
    """One item to judge, its mode (None for the guard's mode), and a listener for the streamed reasoning."""

    item: Item
    mode: Mode | None = None
    listener: StreamListener | None = None


class Guard:
    """Judges exchanges with one engine under one policy.

    Invalid input and engine failures become `error` verdicts; only an invalid setting raises.
    """

    def __init__(self, engine: Engine, policy: Policy | None = None) -> None:
        self.engine = engine
        self.policy = policy or Policy()
        calibration = self.policy.calibration
        if calibration is not None and not _calibrated_for(calibration.model, engine.model):
            raise InputError(
                f"the calibration was measured on {_named(calibration.model)}, the model is {_named(engine.model)}: "
                "calibrate again"
            )

    @classmethod
    def load(
        cls,
        model: str = EMBEDDED,
        engine: EngineName = "auto",
        *,
        revision: str | None = None,
        adapter: str | Path | None = None,
        policy: Policy | None = None,
        calibration: Calibration | str | Path | None = None,
        **options: Any,
    ) -> Guard:
        """Open a guard. `calibration`, written by `calibrate`, is added to the policy; None uses the calibration in the
        model's folder, if there is one (`Policy.folder_calibration`) and no adapter.

        `model`: "embedded", a model folder, or a hub id. With the `openai` engine, which a `base_url` in `options`
        selects, the served model's name, or "embedded" for the first model that the server lists. The engines
        `openvino` and `vllm` need the extras of these names. `adapter`: the folder of a LoRA adapter that was trained
        from the model. Other `options` are passed to the engine. Raises `ModelError`.
        """
        policy = policy or Policy()
        if calibration is not None:
            loaded = calibration if isinstance(calibration, Calibration) else read_calibration(calibration)
            policy = replace(policy, calibration=loaded)
        if engine not in ENGINES:
            raise InputError(f"unknown engine {engine!r}: use one of {', '.join(ENGINES)}")
        if engine == "openai" or (engine == "auto" and "base_url" in options):
            if adapter is not None:
                raise InputError("a server loads its adapters itself: give the name that it serves the adapter as")
            from guardreasoner_vl.engines.openai.engine import OpenAIEngine

            return cls(OpenAIEngine(model=None if model == EMBEDDED else model, **options).connect(), policy)
        if engine in ("openvino", "vllm") and find_spec(engine) is None:  # before a model is downloaded
            raise MissingExtraError(engine, engine)
        folder = resolve_folder(model, revision)
        check_folder(folder)  # before torch is imported, so that a typo is reported at once
        if adapter is not None:
            check_adapter(Path(adapter))
            options["adapter"] = Path(adapter)
        elif policy.calibration is None and policy.folder_calibration:
            policy = replace(policy, calibration=_folder_calibration(folder, model_info(model, folder, revision)))
        if engine == "vllm":
            from guardreasoner_vl.engines.vllm_engine import VLLMEngine

            return cls(VLLMEngine.load(model, revision, **options), policy)
        with _no_garbage_collection():
            from guardreasoner_vl.engines.transformers_engine import TransformersEngine

            engine_type = TransformersEngine
            if engine == "openvino":
                from guardreasoner_vl.engines.openvino_engine import OpenVinoEngine

                engine_type = OpenVinoEngine
        return cls(engine_type.load(model, revision, **options), policy)

    @property
    def model(self) -> ModelInfo:
        """Name and revision of the model that judges."""
        return self.engine.model

    @property
    def mode(self) -> Mode:
        """The default mode."""
        return self.policy.mode

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that affect verdicts, besides the model and the mode, as plain data."""
        return {name: value for name, value in self.policy.as_json().items() if name != "mode"}

    def moderate(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        response: str | None = None,
        mode: Mode | None = None,
    ) -> Verdict:
        """Judge a user's request (text, images, or both) and, if given, the model's response."""
        return self._judge(lambda: as_exchange({"prompt": prompt, "images": images, "response": response}), mode)

    def moderate_messages(self, messages: Sequence[Mapping[str, Any]], *, mode: Mode | None = None) -> Verdict:
        """Judge the last user turn of an OpenAI-style conversation, and the response to it."""
        return self._judge(lambda: Exchange.from_messages(messages), mode)

    async def amoderate(
        self,
        prompt: str | None = None,
        *,
        images: Sequence[ImageSource] = (),
        response: str | None = None,
        mode: Mode | None = None,
    ) -> Verdict:
        """`moderate` without blocking the event loop."""
        return await self._ajudge(lambda: as_exchange({"prompt": prompt, "images": images, "response": response}), mode)

    async def amoderate_messages(self, messages: Sequence[Mapping[str, Any]], *, mode: Mode | None = None) -> Verdict:
        """`moderate_messages` without blocking the event loop."""
        return await self._ajudge(lambda: Exchange.from_messages(messages), mode)

    def moderate_batch(
        self, items: Iterable[Item], *, mode: Mode | None = None, chunk: int = CHUNK
    ) -> Iterator[Verdict]:
        """Judge many items lazily, in order; an invalid item becomes an `error` verdict and does not affect the others.

        `chunk` items are read and judged together.
        """
        policy = self._policy(mode)
        if chunk < 1:
            raise InputError("chunk is a number of items: give at least 1")
        return self._batches(iter(items), policy, chunk)

    def share(self, work: RowWork[RowT, ResultT], rows: Iterable[RowT], *, chunk: int = CHUNK) -> Iterator[ResultT]:
        """Do `work` on the rows lazily, `chunk` rows at a time; yields their results in order."""
        stream = iter(rows)
        while batch := list(islice(stream, chunk)):
            yield from work(self, batch)

    def moderate_from(
        self,
        more: Callable[[int], Iterable[tuple[GuardRequest, Callable[[Verdict], None]]]],
        max_batch_size: int | None = None,
    ) -> None:
        """Judge the items that `more` returns, each with a callback for its verdict, until it returns none and all are
        judged.

        `more` is called between two rounds with the number of exchanges in progress; if there are none it may block.
        The engine gets at most `max_batch_size` calls at once, in the order that `judging.rounds` describes. A callback
        is called as soon as its verdict is known; a cancelled item gets an `error` verdict.
        """
        rounds = Rounds(self.engine, max_batch_size, WINDOWS_TOGETHER)
        while (joining := list(more(len(rounds)))) or rounds:
            for request, done in joining:
                judging = self._judging(
                    partial(as_exchange, request.item), self._policy(request.mode), request.listener
                )
                rounds.add(judging, request.listener, done)
            rounds.step()

    async def amoderate_each(self, request: GuardRequest) -> Verdict:
        """Judge one item without blocking the event loop; cancelling the coroutine cancels the engine's request.

        An item that its listener cancels gets an `error` verdict.
        """
        return await self._ajudge(partial(as_exchange, request.item), request.mode, request.listener)

    def close(self) -> None:
        """Release the engine's resources."""
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _policy(self, mode: Mode | None) -> Policy:
        if mode is None:
            return self.policy
        return replace(self.policy, mode=mode)

    def _judge(self, build: Callable[[], Exchange], mode: Mode | None) -> Verdict:
        return self._judge_all([self._judging(build, self._policy(mode))])[0]

    async def _ajudge(
        self, build: Callable[[], Exchange], mode: Mode | None, listener: StreamListener | None = None
    ) -> Verdict:
        judging = self._judging(build, self._policy(mode), listener)
        outcome = await asyncio.to_thread(advance, judging, None)
        while not isinstance(outcome, Verdict):
            if listener and listener.cancelled:
                outcome = cancel_judging(judging)
                continue
            reply = await self._areply(with_listener(outcome, listener, self.engine.model))
            outcome = await asyncio.to_thread(advance, judging, reply)
        return outcome

    def _batches(self, items: Iterator[Item], policy: Policy, chunk: int) -> Iterator[Verdict]:
        while batch := list(islice(items, chunk)):
            yield from self._judge_all([self._judging(partial(as_exchange, item), policy) for item in batch])

    def _judge_all(self, judgings: Sequence[JudgingSteps]) -> list[Verdict]:
        """All verdicts, in order."""
        verdicts: dict[int, Verdict] = {}
        rounds = Rounds(self.engine)
        for place, judging in enumerate(judgings):
            rounds.add(judging, None, partial(verdicts.__setitem__, place))
        while rounds:
            rounds.step()
        return [verdicts[place] for place in range(len(judgings))]

    def _judging(
        self, build: Callable[[], Exchange], policy: Policy, listener: StreamListener | None = None
    ) -> JudgingSteps:
        """The steps that judge one item; any error becomes its `error` verdict."""
        try:
            if listener and listener.cancelled:  # before its images are decoded
                raise RequestCancelledError
            return (yield from judge(build(), policy, self.model))
        except GuardError as error:
            return error_verdict(error, policy, self.model)
        except Exception as error:
            return error_verdict(unexpected_error("the guard", error), policy, self.model)

    async def _areply(self, call: EngineCall) -> EngineReply:
        if isinstance(call, ReadCall):
            return await aread(call)
        if isinstance(call, CountCall):
            return await asyncio.to_thread(count_prompt_tokens, self.engine, call)
        try:
            if isinstance(call, ScoreCall):
                return await self.engine.ascore(call.request, call.slots, CANDIDATES)
            return await self.engine.agenerate(call.request)
        except Exception as error:
            return error_reply(error, call.slots if isinstance(call, ScoreCall) else None)


def _folder_calibration(folder: Path, model: ModelInfo) -> Calibration | None:
    """The calibration in a model's folder, if there is one, with `model` as its model.

    The revision of a hub snapshot is its commit, which a file in the snapshot cannot name; the file therefore records
    the weights' digest, which is compared here.
    """
    path = folder / CALIBRATION
    if not path.is_file():
        return None
    calibration = read_calibration(path)
    if calibration.model.revision != weights_digest(folder):
        raise InputError(f"{path}: measured on other weights; calibrate again, or ignore it with --calibration none")
    return calibration.model_copy(update={"model": model})


def _calibrated_for(measured: ModelInfo, model: ModelInfo) -> bool:
    """Whether the calibration belongs to the model; not if only one of the two has a revision."""
    return bool(measured.revision) == bool(model.revision) and same_model(measured, model)


def _named(model: ModelInfo) -> str:
    return f"{model.name} ({model.revision or 'no revision'})"


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: importing torch and transformers creates a million permanent objects, and collecting
    among them takes a second."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def as_exchange(item: Item) -> Exchange:
    """Convert an item to an exchange. Raises `InputError`."""
    if isinstance(item, Exchange):
        return item
    if not isinstance(item, Mapping):
        raise InputError("an item must be an Exchange or a mapping with prompt, images, response, or messages")
    if medium := unread_medium(item, ("images",)):
        raise InputError(f"{medium!a:.40}: this medium cannot be judged; pass images as a list in images")
    fields = {name: item[name] for name in ("prompt", "images", "response") if item.get(name) is not None}
    if item.get("messages") is not None:
        if fields:
            raise InputError(f"give either messages or {', '.join(fields)}, not both")
        return Exchange.from_messages(item["messages"])
    for name in ("prompt", "response"):
        if not isinstance(fields.get(name), str | None):
            raise InputError(f"{name} must be a string or null")
    images = fields.get("images", ())
    if isinstance(images, (str, bytes)) or not isinstance(images, Sequence):
        raise InputError("images must be a list")
    return Exchange(fields.get("prompt"), tuple(images), fields.get("response"))
