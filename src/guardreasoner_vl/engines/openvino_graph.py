"""The text decoder of a Qwen2.5-VL as an OpenVINO graph, with int8 weights.

A matrix is a constant of int8 numbers with one scale for each row (`engines.int8`), which the CPU plugin multiplies
without unpacking it. The keys and values of each layer are variables of the graph: a call gathers the rows that its
input `rows` names, in that order and as often as they are named, and appends the keys and values of its tokens.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from guardreasoner_vl.engines.int8 import quantised
from guardreasoner_vl.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray


_TELEMETRY = "openvino_telemetry"


@contextmanager
def _without_telemetry() -> Iterator[None]:
    """Let an import of the telemetry package fail as if it were not installed."""
    before = sys.modules.get(_TELEMETRY)
    sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del sys.modules[_TELEMETRY]
        else:
            sys.modules[_TELEMETRY] = before


with _without_telemetry():  # importing openvino would report it to its makers, over the network
    import openvino
    from openvino import opset13 as op


def compiled(graph: Any, settings: Mapping[str, Any]) -> Any:
    """An `openvino.InferRequest` of the graph on the CPU. Raises `RuntimeError`."""
    return openvino.Core().compile_model(graph, "CPU", dict(settings)).create_infer_request()


def set_state(variable: Any, values: torch.Tensor) -> None:
    """Set one of a request's variables to fp32 values."""
    variable.state = openvino.Tensor(values.numpy())


def text_graph(network: Any) -> Any:
    """The decoder of `network`, a Qwen2.5-VL on the CPU, as an `openvino.Model`. Raises `ModelError`.

    Inputs, for B rows of T new tokens after P earlier ones, padding included: `embedded` (B, T, width), and `cos` and
    `sin` (B, 1, T, head width) of the rotation, in fp32; `mask` (B, 1, T, P + T), true where a token attends; `rows`
    (B,), the earlier row that each row continues, int32. Output: the last token's logits (B, 1, vocabulary), fp32.
    """
    config = network.config.text_config
    if config.use_sliding_window or config.hidden_act != "silu":
        raise ModelError(
            "the openvino engine computes neither sliding windows nor other activations than silu: use "
            "--engine transformers"
        )
    return _TextGraph(network).model()


class _TextGraph:
    """Builds the graph; nodes of hidden states have shape (B, T, width)."""

    def __init__(self, network: Any) -> None:
        self._network = network
        config = network.config.text_config
        self._eps: float = config.rms_norm_eps
        self._heads: int = config.num_attention_heads
        self._key_heads: int = config.num_key_value_heads
        self._width: int = network.model.language_model.layers[0].self_attn.q_proj.out_features // self._heads
        heads = [-1, 1, -1, self._width]
        self._embedded = _input("embedded", [-1, -1, config.hidden_size], np.float32)
        self._cos, self._sin = _input("cos", heads, np.float32), _input("sin", heads, np.float32)
        self._mask, self._rows = _input("mask", [-1, 1, -1, -1], np.bool_), _input("rows", [-1], np.int32)
        self._states: list[Any] = []
        self._bias = op.unsqueeze(op.select(self._mask, _floats(0.0, rank=4), _floats(-1e9, rank=4)), _integers(2))

    def model(self) -> Any:
        text = self._network.model.language_model
        hidden = self._embedded
        for number, layer in enumerate(text.layers):
            attended = self._attention(layer.self_attn, self._norm(hidden, layer.input_layernorm), number)
            hidden = op.add(hidden, attended)
            hidden = op.add(hidden, self._mlp(layer.mlp, self._norm(hidden, layer.post_attention_layernorm)))
        last = op.gather(hidden, _integers(-1, shape=(1,)), _integers(1))
        logits = _linear(self._norm(last, text.norm), self._network.lm_head)
        inputs = [self._embedded, self._cos, self._sin, self._mask, self._rows]
        return openvino.Model([op.result(logits)], self._states, inputs, "text decoder")

    def _norm(self, hidden: Any, norm: Any) -> Any:
        mean = op.reduce_mean(op.power(hidden, _floats(2.0)), _integers(-1, shape=(1,)), True)
        scaled = op.multiply(hidden, op.divide(_floats(1.0), op.sqrt(op.add(mean, _floats(self._eps)))))
        return op.multiply(scaled, _constant(norm.weight.float()[None, None]))

    def _mlp(self, mlp: Any, hidden: Any) -> Any:
        gate, up = _split_axis(_linear(hidden, mlp.gate_proj, mlp.up_proj), -1, [mlp.gate_proj.out_features] * 2)
        return _linear(op.multiply(op.swish(gate), up), mlp.down_proj)

    def _attention(self, attention: Any, hidden: Any, number: int) -> Any:
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        parts = _split_axis(_linear(hidden, *projections), -1, [part.out_features for part in projections])
        query = self._rotated(self._by_head(parts[0], self._heads))
        key = self._with_earlier(self._rotated(self._by_head(parts[1], self._key_heads)), f"keys {number}")
        value = self._with_earlier(self._by_head(parts[2], self._key_heads), f"values {number}")
        attended = self._attended(query, key, value)
        joined = op.reshape(op.transpose(attended, _integers(0, 2, 1, 3)), _integers(0, 0, -1), True)
        return _linear(joined, attention.o_proj)

    def _by_head(self, states: Any, heads: int) -> Any:
        """(B, T, heads x width) -> (B, heads, T, width)."""
        return op.transpose(op.reshape(states, _integers(0, 0, heads, self._width), True), _integers(0, 2, 1, 3))

    def _rotated(self, states: Any) -> Any:
        first, second = _split_axis(states, -1, [self._width // 2] * 2)
        rotated_half = op.concat([op.multiply(second, _floats(-1.0, rank=4)), first], -1)
        return op.add(op.multiply(states, self._cos), op.multiply(rotated_half, self._sin))

    def _with_earlier(self, states: Any, name: str) -> Any:
        """The rows of the variable `name` that the input `rows` names, then `states`; the variable keeps both."""
        batch = op.gather(op.shape_of(self._embedded, output_type="i64"), _integers(0, shape=(1,)), _integers(0))
        shape = op.concat([batch, _integers(self._key_heads, 0, self._width)], 0)
        empty = op.broadcast(_constant(np.float32(0)), shape)
        stored = [-1, self._key_heads, -1, self._width]
        earlier = op.gather(op.read_value(empty, name, np.float32, stored), self._rows, _integers(0))
        joined = op.concat([earlier, states], -2)
        self._states.append(op.assign(joined, name))
        return joined

    def _attended(self, query: Any, key: Any, value: Any) -> Any:
        """Attend: the query heads of one key head are rows of one product, so that keys and values are not repeated.

        The plugin's own operator for attention took five times as long to read a prompt of 2,000 tokens.
        """
        share = self._heads // self._key_heads
        scaled = op.multiply(query, _floats(self._width**-0.5, rank=4))
        queries = op.reshape(scaled, _integers(0, self._key_heads, -1, self._width), True)
        scores = op.matmul(queries, key, False, True)
        shape = op.shape_of(self._mask, output_type="i64")
        tokens, total = (op.gather(shape, _integers(axis, shape=(1,)), _integers(0)) for axis in (2, 3))
        split = op.concat([_integers(0, self._key_heads, share), tokens, total], 0)
        scores = op.add(op.reshape(scores, split, True), self._bias)
        joined = op.concat([_integers(0, self._key_heads, -1), total], 0)
        shares = op.reshape(op.softmax(scores, -1), joined, True)
        return op.reshape(op.matmul(shares, value, False, False), _integers(0, self._heads, -1, self._width), True)


def _input(name: str, shape: Sequence[int], dtype: Any) -> Any:
    parameter = op.parameter(shape, dtype, name=name)
    parameter.output(0).get_tensor().set_names({name})
    return parameter


def _linear(hidden: Any, *layers: torch.nn.Linear) -> Any:
    """The layers' outputs side by side: x W'^T + b with the quantised weights W'."""
    numbers, scales = zip(*(quantised(layer.weight.detach()) for layer in layers), strict=True)
    weight = op.multiply(op.convert(_constant(torch.cat(numbers)), np.float32), _constant(torch.cat(scales).float()))
    product = op.matmul(hidden, weight, False, True)
    if layers[0].bias is None:
        return product
    return op.add(product, _constant(torch.cat([layer.bias.detach() for layer in layers]).float()[None, None]))


def _split_axis(states: Any, axis: int, lengths: Sequence[int]) -> list[Any]:
    split = op.variadic_split(states, _integers(axis), _integers(*lengths, shape=(len(lengths),)))
    return [split.output(place) for place in range(len(lengths))]


def _constant(values: torch.Tensor | NDArray[Any] | np.generic) -> Any:
    return op.constant(np.ascontiguousarray(values.detach().numpy()) if isinstance(values, torch.Tensor) else values)


def _floats(value: float, rank: int = 3) -> Any:
    return _constant(np.full((1,) * rank, value, np.float32))


def _integers(*values: int, shape: tuple[int, ...] | None = None) -> Any:
    """A list of integers, or with one value and no shape that number alone."""
    if shape is None:
        shape = () if len(values) == 1 else (len(values),)
    return _constant(np.array(values, np.int64).reshape(shape))
