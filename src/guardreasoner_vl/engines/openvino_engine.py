"""The engine for CPUs: the text decoder runs in OpenVINO with int8 weights (the extra `openvino`).

    guard = Guard.load(engine="openvino")

Everything else is inherited from the transformers engine: prompts, images, batches, sampling, label scores. The weights
of any folder are quantised as they are loaded, one scale for each row of a matrix; int8 weights keep their values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from guardreasoner_vl.engines.adapter import merge_folder
from guardreasoner_vl.engines.decoding import Decoder
from guardreasoner_vl.engines.int8 import is_int8
from guardreasoner_vl.engines.openvino_graph import compiled, set_state, text_graph
from guardreasoner_vl.engines.transformers_engine import TransformersEngine
from guardreasoner_vl.engines.weights import chosen_dtype, read_network
from guardreasoner_vl.errors import ModelError, reason_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from guardreasoner_vl.engines.decoding import Prefix, StoredLayers
    from guardreasoner_vl.engines.qwen import QwenInputs
    from guardreasoner_vl.engines.weights import DType

_GROUP = 64
"""Numbers of a hidden state that share a scale where products are computed in int8."""


class OpenVinoEngine(TransformersEngine):
    """Runs a Qwen2.5-VL on the CPU; `load` opens a folder or a hub id.

    With dtype `fp32` only the weights are rounded. With any other, hidden states are also int8 in products of matrices,
    and the rest is computed in bf16 if the hardware supports it.
    """

    @staticmethod
    def _open(folder: Path, inputs: QwenInputs, dtype: DType, adapter: Path | None) -> Decoder:
        stored = torch.float32 if is_int8(folder) else torch.bfloat16  # the dtype that holds them exactly
        network = read_network(folder, stored).eval()
        if adapter:
            merge_folder(network, adapter)
        try:
            return OpenVinoDecoder(network, inputs, dtype)
        except RuntimeError as error:
            raise ModelError(
                f"{folder}: OpenVINO cannot compile it ({reason_of(error)}); use --engine transformers"
            ) from error


class _States:
    """The cache of a batch: for each layer the graph's variables for keys and values, and for each of the batch's rows
    the index of the variables' row that it continues, of shape (rows,)."""

    def __init__(self, variables: Sequence[tuple[Any, Any]], rows: torch.Tensor) -> None:
        self.rows = rows
        self._variables = variables

    def keep_rows(self, rows: torch.Tensor) -> None:
        self.rows = self.rows[rows]

    def stored(self) -> StoredLayers:
        return tuple((_copy_tensor(keys), _copy_tensor(values)) for keys, values in self._variables)


def _copy_tensor(variable: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(variable.state.data, np.float32))


class OpenVinoDecoder(Decoder):
    """Forward passes of a model whose text decoder is a graph; torch computes embeddings, images and the rotation.

    It removes the decoder's layers from `model`. One batch is decoded at a time: a new one overwrites its cache.
    """

    def __init__(self, model: Any, inputs: QwenInputs, dtype: DType) -> None:
        super().__init__(model, inputs)
        graph = text_graph(model)
        model.model.language_model.layers = nn.ModuleList()
        model.lm_head = nn.Identity()
        compute_dtype = chosen_dtype(dtype, "cpu")
        model.model.visual.to(compute_dtype)
        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if compute_dtype == torch.bfloat16 else "f32",
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0 if dtype == "fp32" else _GROUP,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "ENABLE_CPU_PINNING": False,  # several processes would be pinned to the same cores
        }
        self._request = compiled(graph, settings)
        named = {state.name: state for state in self._request.query_state()}
        self._variables = [(named[f"keys {number}"], named[f"values {number}"]) for number in range(self.layer_count)]

    def _new_cache(self, prefix: Prefix | None = None, rows: int = 1) -> _States:
        self._request.reset_state()
        if prefix is None:
            return _States(self._variables, torch.arange(rows))
        for variables, stored in zip(self._variables, prefix.layers, strict=True):
            for variable, values in zip(variables, stored, strict=True):
                set_state(variable, values)
        return _States(self._variables, torch.zeros(rows, dtype=torch.long))

    def _last_logits(
        self, embedded: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor, cache: _States
    ) -> torch.Tensor:
        embedded = embedded.float()
        rows, new, _ = embedded.shape
        cos, sin = self.model.model.language_model.rotary_emb(embedded, positions)
        outputs = self._request.infer(
            {
                "embedded": embedded.numpy(),
                "cos": cos[:, None].numpy(),
                "sin": sin[:, None].numpy(),
                "mask": _attended(torch.ones(rows, new) if mask is None else mask, new),
                "rows": cache.rows.int().numpy(),
            }
        )
        cache.rows = torch.arange(rows)
        return torch.from_numpy(outputs[0][:, 0])


def _attended(mask: torch.Tensor, new: int) -> NDArray[np.bool_]:
    """Which tokens each of the last `new` tokens attends to, from the mask of shape (rows, tokens read).

    A padding token attends to itself, because a softmax over no token is NaN.
    """
    total = mask.shape[1]
    causal = torch.ones(new, total, dtype=torch.bool).tril(total - new)
    itself = torch.eye(new, total, dtype=torch.bool).roll(total - new, 1)
    attended: NDArray[np.bool_] = ((causal & mask.bool()[:, None]) | itself)[:, None].numpy()
    return attended
