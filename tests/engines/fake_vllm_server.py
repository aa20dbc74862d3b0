"""A local server with the paths of vLLM that training uses, over the stand-in for `vllm.LLM`."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image

from tests.engines.fake_vllm import LLM, SamplingParams
from tests.local_server import Handler, LocalServer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.engines.fake_vllm import CompletionOutput


class FakeVLLMServer(LocalServer):
    """Serves `model`; `requests` has the bodies of all generations, `paths` what else was asked for.

    `missing` are paths that it does not have, `below` is the path that all of its paths begin with, and `dies_after` is
    the number of generations after which every further request breaks off.
    """

    def __init__(self, model: Path, **options: Any) -> None:
        super().__init__(_Handler)
        settings: dict[str, Any] = {
            "max_model_len": 512,
            "generation_config": "vllm",
            "enable_prefix_caching": True,
            "block_size": 16,
            "limit_mm_per_prompt": {"image": 8},
            "logprobs_mode": "processed_logprobs",
        }
        self.llm = LLM(str(model), **settings | options)
        self.requests: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.missing: tuple[str, ...] = ()
        self.below = ""
        self.authorizations: list[str | None] = []
        self.dies_after: int | None = None


class _Handler(Handler):
    stub: FakeVLLMServer

    def do_GET(self) -> None:
        self._reply({})

    def do_POST(self) -> None:
        self._reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def _reply(self, payload: dict[str, Any]) -> None:
        stub = self.stub
        path = self.path.partition("?")[0].removeprefix(stub.below)
        stub.authorizations.append(self.headers["Authorization"])
        with stub.lock:
            if stub.dies_after is not None and len(stub.requests) >= stub.dies_after:
                self.close_connection = True
            elif path in stub.missing or not self.path.startswith(stub.below):
                self.send(404, b"{}")
            elif path == "/inference/v1/generate":
                stub.requests.append(payload)
                self._send(generated(stub.llm, payload))
            else:
                stub.paths.append(path)
                try:
                    answer = self._operated(path, payload)
                except OSError:  # no such folder
                    self.send(500, b"{}")
                else:
                    self._send(answer)

    def _operated(self, path: str, payload: dict[str, Any]) -> Any:
        llm = self.stub.llm
        if path == "/server_info":
            config = {"logprobs_mode": llm.logprobs_mode, "max_model_len": llm.max_model_len}
            return {"vllm_config": {"model_config": config}}
        if path == "/collective_rpc":
            llm.collective_rpc(payload["method"], payload["kwargs"])
        elif path == "/reset_encoder_cache":
            llm.reset_encoder_cache()
        else:
            assert path == "/reset_prefix_cache"
            return {"success": llm.reset_prefix_cache()}
        return {"results": [None]}

    def _send(self, body: Any) -> None:
        self.send(200, json.dumps(body).encode())


def generated(llm: LLM, payload: dict[str, Any]) -> dict[str, Any]:
    """The answer of `/inference/v1/generate`; the image processor has the model folder's limits."""
    images = [_decoded(part["url"]) for part in payload.get("content_parts", ())]
    prompt: dict[str, Any] = {"prompt_token_ids": payload["token_ids"]}
    if images:
        budget = llm.inputs.budget
        prompt["multi_modal_data"] = {"image": images}
        prompt["mm_processor_kwargs"] = {"min_pixels": budget.min_pixels, "max_pixels": budget.max_pixels}
    parameters = payload["sampling_params"]
    biases = {int(token): bias for token, bias in parameters.get("logit_bias", {}).items()}
    (output,) = llm.generate([prompt], [SamplingParams(**parameters | {"logit_bias": biases})], use_tqdm=False)
    return {
        "request_id": "1",
        "choices": [_choice(number, answer) for number, answer in enumerate(output.outputs)],
        "prompt_token_ids": output.prompt_token_ids if payload["return_token_ids"] else None,
    }


def _choice(number: int, answer: CompletionOutput) -> dict[str, Any]:
    content = None
    if answer.logprobs is not None:
        pairs = zip(answer.token_ids, answer.logprobs, strict=True)
        content = [{"token": f"token_id:{token}", "logprob": of_tokens[token].logprob} for token, of_tokens in pairs]
    return {
        "index": number,
        "token_ids": answer.token_ids,
        "finish_reason": answer.finish_reason,
        "logprobs": content and {"content": content},
    }


def _decoded(url: str) -> Image.Image:
    return Image.open(BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))).convert("RGB")
