"""A vLLM server in the role of `vllm.LLM`: token ids and images go out, token ids come back, weights are replaced.

    VLLM_SERVER_DEV_MODE=1 vllm serve MODEL --enable-scale-out --logprobs-mode processed_logprobs

`/inference/v1/generate` (vLLM 0.31) takes the token ids of a prompt, one placeholder for each image, and its images
once for all answers; it returns the ids that the model has read. `/collective_rpc`, of the development mode, makes the
server load weights from a folder, which must have the same path on the server's machine. Anyone who can reach such a
server controls it: keep it on a private network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, Field, NonNegativeInt

from guardreasoner_vl.engines.openai.chat import image_data_url
from guardreasoner_vl.engines.openai.completion import malformed, read_model
from guardreasoner_vl.engines.openai.http import HttpClient, HttpError, LoopThread, openai_key
from guardreasoner_vl.errors import EngineError, GuardError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Iterable, Mapping, Sequence

CONCURRENCY = 256
"""Requests in flight: vLLM has a queue of its own."""
TIMEOUT = 3600.0
"""Seconds for one request, its time in vLLM's queue included."""
PROCESSED = "processed_logprobs"
"""The mode in which vLLM's log-probabilities are those of the distribution that it samples from."""

_DEVELOPMENT = "start the server with VLLM_SERVER_DEV_MODE=1 in its environment"
_SCALE_OUT = "start the server, vLLM 0.31 or later, with --enable-scale-out"


@dataclass(frozen=True)
class Logprob:
    """The log-probability of a token."""

    logprob: float


@dataclass(frozen=True)
class CompletionOutput:
    """One answer; `logprobs` holds only those of the sampled tokens."""

    token_ids: list[int]
    finish_reason: str | None
    logprobs: list[dict[int, Logprob]] | None


@dataclass(frozen=True)
class RequestOutput:
    """The answers to a prompt, and the tokens that the model has read."""

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0


@dataclass(frozen=True)
class FailedOutput:
    """The output of a request that failed; reading it raises the error."""

    error: GuardError

    @property
    def prompt_token_ids(self) -> list[int]:
        """Raise the error, as this is the attribute of an output that is read first."""
        raise self.error


class _Logprobs(BaseModel):
    class Token(BaseModel):
        logprob: float

    content: list[Token]


class _Choice(BaseModel):
    index: int
    token_ids: list[NonNegativeInt]
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None

    def output(self) -> CompletionOutput:
        if self.logprobs is None:
            return CompletionOutput(self.token_ids, self.finish_reason, None)
        values = [token.logprob for token in self.logprobs.content]
        if len(values) != len(self.token_ids):
            raise malformed("logprobs")
        return CompletionOutput(
            self.token_ids,
            self.finish_reason,
            [{token: Logprob(value)} for token, value in zip(self.token_ids, values, strict=True)],
        )


class _Generated(BaseModel):
    choices: list[_Choice]
    prompt_token_ids: list[int]


class _ModelConfig(BaseModel):
    logprobs_mode: str
    max_model_len: int


class _Config(BaseModel):
    model: _ModelConfig = Field(alias="model_config")


class _ServerInfo(BaseModel):
    vllm_config: _Config


class _Reset(BaseModel):
    success: bool


class VLLMServer:
    """The server at `base_url`, with the methods of `vllm.LLM` and its engine that this package calls.

    OPENAI_API_KEY is sent if it is set. Methods raise `EngineError`. Images of prompts are `CheckedImage`s.
    """

    def __init__(self, base_url: str) -> None:
        self._http = HttpClient(base_url, openai_key(None), max_concurrency=CONCURRENCY, timeout=TIMEOUT)
        self._loop = LoopThread()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.stop()
        self._loop.close(self._http.aclose)

    def checked_context(self) -> int:
        """The largest number of tokens of a prompt and its answer.

        Raises `EngineError` if the server lacks a path or returns log-probabilities of another distribution.
        """
        path = "server_info?config_format=json"
        (body,) = self._loop.run_all([self._answer(self._http.get(self._url(path)), _DEVELOPMENT)])
        model = read_model(_ServerInfo, body).vllm_config.model
        if model.logprobs_mode != PROCESSED:
            raise EngineError(
                f"{self._http.server} returns {model.logprobs_mode}, which are not of the distribution that it "
                f"samples from: start the server with --logprobs-mode {PROCESSED}"
            )
        return model.max_model_len

    def generate(
        self, prompts: Sequence[Mapping[str, Any]], sampling_params: Sequence[Mapping[str, Any]], *, use_tqdm: bool
    ) -> list[RequestOutput | FailedOutput]:
        """The outputs of all prompts, in order; all are requested at once. `use_tqdm` has no effect."""
        del use_tqdm
        pairs = zip(prompts, sampling_params, strict=True)
        return self._loop.run_all(self._generate(prompt, parameters) for prompt, parameters in pairs)

    def collective_rpc(self, method: str, kwargs: Mapping[str, str]) -> None:
        """Call a method of the server's workers, such as `reload_weights`, with a folder's path in `kwargs`."""
        try:
            self._post("collective_rpc", {"method": method, "kwargs": kwargs})
        except HttpError as error:
            if error.status != 500:
                raise
            folders = " ".join(kwargs.values())
            raise EngineError(
                f"{self._http.server} failed to load {folders}: it must see this folder under the same path, and serve "
                "a model of the same shape; its log says more"
            ) from error

    @property
    def llm_engine(self) -> Self:
        """This object, which also has the methods of `vllm.LLM.llm_engine`."""
        return self

    def reset_encoder_cache(self) -> None:
        """Drop the embeddings of images."""
        self._post("reset_encoder_cache", {})

    def reset_prefix_cache(self) -> bool:
        """Drop the keys and values of prompts; returns False if another client's requests prevent that."""
        return read_model(_Reset, self._post("reset_prefix_cache", {})).success

    def _url(self, path: str) -> str:
        return f"{self._http.root}/{path}"

    def _post(self, path: str, payload: Mapping[str, Any]) -> bytes:
        (body,) = self._loop.run_all([self._answer(self._http.post(self._url(path), lambda: payload), _DEVELOPMENT)])
        return body

    async def _answer(self, body: Awaitable[bytes], remedy: str) -> bytes:
        try:
            return await body
        except HttpError as error:
            if error.status == 404:
                raise EngineError(f"{self._http.server} lacks a path that training uses: {remedy}") from error
            raise

    async def _generate(self, prompt: Mapping[str, Any], parameters: Mapping[str, Any]) -> RequestOutput | FailedOutput:
        def payload() -> dict[str, Any]:
            images: Iterable[Any] = prompt.get("multi_modal_data", {}).get("image", ())
            parts = [{"type": "image_url", "url": image_data_url(image)} for image in images]
            request = {"token_ids": prompt["prompt_token_ids"], "sampling_params": parameters, "return_token_ids": True}
            return request | ({"content_parts": parts} if parts else {})

        try:
            body = await self._answer(self._http.post(self._url("inference/v1/generate"), payload), _SCALE_OUT)
            answer = read_model(_Generated, body)
            if len(answer.choices) != parameters.get("n", 1):
                raise malformed("choices")
            outputs = [choice.output() for choice in sorted(answer.choices, key=lambda choice: choice.index)]
            return RequestOutput(answer.prompt_token_ids, outputs)
        except GuardError as error:
            return FailedOutput(error)
