"""The text decoder alone in several runtimes: tokens read and written per second, and the tokens that they choose.

    python -m benchmarks.decoders FOLDER    # writes the decoder and its prompts, and measures the package's engines

In an environment of its own, with onnxruntime-genai, onnx-ir, torch and transformers:

    python -m onnxruntime_genai.models.builder -i FOLDER -o FOLDER/onnx-int4 -p int4 -e cpu
    python benchmarks/decoders.py FOLDER --onnx FOLDER/onnx-int4

Without images the decoder of a Qwen2.5-VL is a Qwen2. B prompts of 64 tokens are read, and 48 tokens are written
greedily; medians of repeats.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

DTYPES: tuple[Literal["fp32", "auto"], ...] = ("fp32", "auto")
READ, WRITTEN = 64, 48
"""Tokens of a prompt, and of its answer."""
BATCHES = (1, 8, 32)
_SHARED = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
"""Settings that both configurations have."""
PROMPTS = "prompts.json"
"""The prompts (32, 64), and under `expected` the tokens that transformers in fp32 writes (32, 48)."""


def write_decoder(model: str, folder: Path) -> None:
    """Write the text decoder as a Qwen2 of transformers, and prompts of made-up exchanges cut to their first tokens."""
    from safetensors.torch import save_file

    from benchmarks.speed import exchanges
    from guardreasoner_vl.engines.model_files import resolve_folder
    from guardreasoner_vl.engines.transformers_engine import TransformersEngine
    from guardreasoner_vl.protocol import build_messages
    from guardreasoner_vl.types import Exchange

    engine = TransformersEngine.load(model, dtype="fp32")
    text = engine.network.config.text_config.to_dict()
    rope = text.pop("rope_parameters")
    config = {name: text.get(name) for name in _SHARED} | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_theta": rope["rope_theta"],
        "use_sliding_window": False,
        "torch_dtype": "float32",
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")
    weights = {f"model.{name}": weight for name, weight in engine.network.model.language_model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve_folder(model) / name, folder)
    texts = [Exchange(row.prompt, response="Here is what I know. " * 20) for row in exchanges(BATCHES[-1], seed=1)]
    prompts = [engine.inputs.encode(build_messages(row), ()).ids[:READ] for row in texts]
    (folder / PROMPTS).write_text(json.dumps({"prompts": prompts}), "utf-8")


def report(name: str, folder: Path, run: Callable[[NDArray[np.int64]], tuple[float, float, NDArray[np.int64]]]) -> None:
    """`run` reads and answers prompts (B, 64): seconds of both and tokens (B, 48)."""
    stored = json.loads((folder / PROMPTS).read_text("utf-8"))
    prompts = np.array(stored["prompts"])
    parts, tokens = [], np.zeros((0, WRITTEN), np.int64)
    for rows in BATCHES:
        runs = [run(prompts[:rows]) for _ in range(4)][1:]
        reading, writing = statistics.median(each[0] for each in runs), statistics.median(each[1] for each in runs)
        tokens = runs[-1][2]
        parts.append(f"{rows:2}: {rows * READ / reading:6.0f} read/s {rows * WRITTEN / writing:6.0f} written/s")
    if "expected" not in stored:
        (folder / PROMPTS).write_text(json.dumps(stored | {"expected": tokens.tolist()}), "utf-8")
        stored["expected"] = tokens
    equal = (tokens == np.array(stored["expected"])).mean()
    print(f"{name:24} {'   '.join(parts)}   equal tokens {100 * equal:.1f}%", flush=True)


def by_decoder(decoder: Any) -> Callable[[NDArray[np.int64]], tuple[float, float, NDArray[np.int64]]]:
    """How the package's engines run it."""
    from guardreasoner_vl.engines.qwen import Encoded

    def run(prompts: NDArray[np.int64]) -> tuple[float, float, NDArray[np.int64]]:
        positions = np.broadcast_to(np.arange(READ), (3, READ))
        started = time.perf_counter()
        batch = decoder.prefill([Encoded(row.tolist(), [], positions) for row in prompts], [])
        read = time.perf_counter()
        written = []
        for _ in range(WRITTEN):
            written.append(batch.logits.argmax(-1))
            decoder.extend(batch, written[-1][:, None].tolist())
        return read - started, time.perf_counter() - read, np.stack([chosen.numpy() for chosen in written], 1)

    return run


def by_onnx(folder: Path) -> Callable[[NDArray[np.int64]], tuple[float, float, NDArray[np.int64]]]:
    """ONNX Runtime's own generation loop."""
    import onnxruntime_genai

    model = onnxruntime_genai.Model(str(folder))

    def run(prompts: NDArray[np.int64]) -> tuple[float, float, NDArray[np.int64]]:
        settings = onnxruntime_genai.GeneratorParams(model)
        total = READ + WRITTEN
        settings.set_search_options(
            batch_size=len(prompts),
            max_length=total,
            min_length=total,
            do_sample=False,
            past_present_share_buffer=False,
        )
        generator = onnxruntime_genai.Generator(model, settings)
        started = time.perf_counter()
        generator.append_tokens(prompts.astype(np.int32))
        read = time.perf_counter()
        for _ in range(WRITTEN):
            generator.generate_next_token()
        seconds = time.perf_counter() - read
        rows = [generator.get_sequence(row)[READ:] for row in range(len(prompts))]
        return read - started, seconds, np.array([row[:WRITTEN] for row in rows], np.int64)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--onnx", type=Path, help="a folder of onnxruntime-genai's builder; only that is measured")
    arguments = parser.parse_args()
    if arguments.onnx:
        report(arguments.onnx.name, arguments.folder, by_onnx(arguments.onnx))
        return
    from guardreasoner_vl.engines.openvino_engine import OpenVinoEngine
    from guardreasoner_vl.engines.transformers_engine import TransformersEngine

    write_decoder(arguments.model, arguments.folder)
    for engine in (TransformersEngine, OpenVinoEngine):
        for dtype in DTYPES:
            decoder = engine.load(arguments.model, dtype=dtype).decoder
            report(f"{engine.__name__}, {dtype}", arguments.folder, by_decoder(decoder))


if __name__ == "__main__":
    main()
