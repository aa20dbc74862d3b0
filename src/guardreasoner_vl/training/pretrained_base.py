"""Builds a small Qwen2.5-VL from a pretrained language model: some of its layers and tokens, and a vision tower.

A Llama is a Qwen2.5-VL text model with zero biases: the weights have the same names, and for text alone the three axes
of the positions agree, so that an untrimmed copy gives the same logits. The embedding of each new token, for a piece of
the wire format, starts as the mean of the tokens that spelt it before, plus noise: means of many tokens are short and
much alike, and the output, which is tied to the embedding, could not tell them apart.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2_5_VLForConditionalGeneration

from guardreasoner_vl.engines.model_files import resolve_folder
from guardreasoner_vl.engines.weights import read_network
from guardreasoner_vl.errors import MissingExtraError, ModelError, reason_of
from guardreasoner_vl.protocol import CANDIDATES
from guardreasoner_vl.recipe import TextShape
from guardreasoner_vl.training.folding import folding
from guardreasoner_vl.training.small_model import add_wire_tokens, small_config, write_texts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from guardreasoner_vl.recipe import PretrainedBase

_ARCHIVES = (".whl", ".zip")


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model and its tokenizer, as transformers loads them."""

    network: Any
    texts: Any

    @property
    def tokenizer(self) -> Tokenizer:
        """The underlying `tokenizers.Tokenizer`."""
        tokenizer: Tokenizer = self.texts.backend_tokenizer
        return tokenizer


def load_language_model(path: str, revision: str | None = None, dtype: torch.dtype = torch.float32) -> LanguageModel:
    """Read a GGUF file, an archive that holds one, a folder or a hub id. Raises `ModelError` if none can be read."""
    source = Path(path).expanduser()
    if source.suffix in (*_ARCHIVES, ".gguf"):
        if not source.is_file():
            raise ModelError(f"{path}: no such file; give a GGUF file, an archive that holds one, or a model folder")
        if source.suffix == ".gguf":
            return _load_base(source.parent, dtype, source.name)
        with TemporaryDirectory() as folder:
            return _load_base(Path(folder), dtype, _unpacked(source, Path(folder)))
    return _load_base(resolve_folder(path, revision), dtype)


def _unpacked(archive: Path, folder: Path) -> str:
    """Unpack the archive's only GGUF file to `folder`; returns its name."""
    try:
        with zipfile.ZipFile(archive) as content:
            names = [name for name in content.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise ModelError(f"{archive}: holds {len(names)} GGUF files; give the path of one")
            (folder / "model.gguf").write_bytes(content.read(names[0]))
    except (OSError, zipfile.BadZipFile) as error:
        raise ModelError(f"{archive}: cannot be read as an archive; download it again") from error
    return "model.gguf"


def _load_base(folder: Path, dtype: torch.dtype, gguf_file: str | None = None) -> LanguageModel:
    named: dict[str, Any] = {"local_files_only": True}
    if gguf_file:
        try:
            import gguf  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("gguf", "train") from error
        named["gguf_file"] = gguf_file
    try:
        texts = AutoTokenizer.from_pretrained(folder, **named)
        weights = {} if gguf_file else {"use_safetensors": True}
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **named, **weights)
    except Exception as error:  # the libraries raise nothing narrower
        raise ModelError(
            f"{folder / (gguf_file or '')}: no language model can be read ({reason_of(error)}); give a GGUF file, an "
            "archive that holds one, or a complete model folder"
        ) from error
    return LanguageModel(network.eval(), texts)


def write_pretrained(folder: Path, base: PretrainedBase, seed: int) -> None:
    """Write a complete, loadable Qwen2.5-VL folder; `seed` initialises the weights that neither source provides.

    Raises `ModelError` if a source cannot be read or does not fit, `RecipeError` if `base.mrope_section` does not fit.
    """
    source = load_language_model(base.path, base.revision)
    text = text_shape(source.network.config, base)
    tokenizer = trimmed(source.tokenizer, base.vocab_size)
    write_texts(folder, tokenizer, base, text.max_positions)
    torch.manual_seed(seed)
    model = Qwen2_5_VLForConditionalGeneration(small_config(text, base, tokenizer))
    kept = kept_layers(base, source.network.config)
    weights = _renumbered(source.network.model.state_dict(), kept)
    # The norm of the first layer left out was trained on the last kept layer's output, the final norm was not.
    if left_out := source.network.model.layers[kept[-1] + 1 :]:
        weights["norm.weight"] = left_out[0].input_layernorm.weight.detach()
    weights["embed_tokens.weight"] = embeddings(source, tokenizer, seed)
    _fill(model.model.language_model, weights, base.path)
    if base.vision_from:
        _fill_tower(model.model.visual, base.vision_from)
    model.save_pretrained(folder)


def text_shape(config: Any, base: PretrainedBase) -> TextShape:
    """The decoder's shape. Raises `ModelError` for a model that cannot become a Qwen2.5-VL."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = config.rope_parameters
    reasons = {
        f"a model of type {config.model_type!r}": config.model_type != "llama",
        "its heads are not hidden_size / heads wide": head * config.num_attention_heads != config.hidden_size,
        "its embedding is not tied to its output": not config.tie_word_embeddings,
        "it scales its positions": rope.get("rope_type", "default") != "default",
        "its output projections have biases": bool(getattr(config, "attention_bias", False)),
        "its MLP has biases": bool(getattr(config, "mlp_bias", False)),
        f"its activation is {config.hidden_act}": config.hidden_act != "silu",
        f"it has {config.num_hidden_layers} layers": kept_layers(base, config)[-1] >= config.num_hidden_layers,
        f"it has {config.max_position_embeddings} positions": (base.max_positions or 1)
        > config.max_position_embeddings,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise ModelError(f"{base.path}: {reason}; give a Llama-shaped model that fits model.base")
    return TextShape(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        layers=len(kept_layers(base, config)),
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        max_positions=base.max_positions or config.max_position_embeddings,
        rope_theta=rope["rope_theta"],
        rms_norm_eps=config.rms_norm_eps,
    )


def trimmed(source: Tokenizer, vocab_size: int | None) -> Tokenizer:
    """The tokenizer reduced to its most frequent tokens, plus the wire format's; `vocab_size` counts all of them.

    Merges are listed in the order in which they were learnt, so the first ones alone are a valid byte-level BPE. The
    result folds disguised letters (`training.folding`), which the source's tokenizer does not.
    """
    settings = json.loads(source.to_str())
    model = settings["model"]
    if model["type"] != "BPE" or "ByteLevel" not in json.dumps(settings["pre_tokenizer"]):
        raise ModelError(f"the tokenizer ({model['type']}) is not a byte-level BPE: give a model that has one")
    added = [token["content"] for token in settings["added_tokens"]]
    whole = Tokenizer.from_str(source.to_str())
    _add_guard_tokens(whole)
    room = (vocab_size or whole.get_vocab_size()) - (whole.get_vocab_size() - source.get_vocab_size())
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = list(dict.fromkeys([*added, *letters]))
    if room < len(tokens):
        raise ModelError(f"vocab_size {vocab_size} has no room for the bytes and the wire format: give 1,024 or more")
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    kept, known = [], set(tokens)
    for first, second in merges:
        if len(tokens) == room and first + second not in known:
            break
        kept.append([first, second])
        if first + second not in known:
            known.add(first + second)
            tokens.append(first + second)
    tokens += [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in known][
        : room - len(tokens)
    ]
    source_ids = source.get_vocab()  # some sources lack bytes that their training texts lacked
    ordered = sorted(tokens, key=lambda token: source_ids.get(token, len(source_ids)))
    ids = {token: number for number, token in enumerate(ordered)}
    # transformers gives a GGUF file's tokenizer an unknown token, and a decoder that loses spaces beside added tokens.
    settings["model"] = {
        **model,
        "vocab": ids,
        "merges": kept,
        "unk_token": None,
        "byte_fallback": False,
        "fuse_unk": False,
    }
    settings["added_tokens"] = [{**token, "id": ids[token["content"]]} for token in settings["added_tokens"]]
    settings["post_processor"] = None
    tokenizer = Tokenizer.from_str(json.dumps(settings))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.normalizer = folding()
    _add_guard_tokens(tokenizer)
    return tokenizer


def _add_guard_tokens(tokenizer: Tokenizer) -> None:
    """Add the tokens of the wire format, and one for each label word."""
    add_wire_tokens(tokenizer)
    tokenizer.add_tokens([AddedToken(word, special=False, normalized=False) for word in CANDIDATES])


def embeddings(source: LanguageModel, tokenizer: Tokenizer, seed: int) -> torch.Tensor:
    """Embeddings (vocabulary, width): the source's rows for kept tokens, for a new one the mean of its old tokens'.

    To a mean that is shorter than the source's median row, seeded noise of the missing length is added.
    """
    rows = source.network.get_input_embeddings().weight.detach().float()
    typical = rows.norm(dim=1).median()
    generator = torch.Generator().manual_seed(seed)
    ids: Mapping[str, int] = source.tokenizer.get_vocab()
    ordered = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    result = torch.empty(len(ordered), rows.shape[1])
    for token, number in ordered:
        if token in ids:
            result[number] = rows[ids[token]]
            continue
        parts = source.tokenizer.encode(token, add_special_tokens=False).ids
        mean = rows[parts].mean(0) if parts else rows.mean(0)
        noise = torch.nn.functional.normalize(torch.randn(mean.shape, generator=generator), dim=0)
        result[number] = mean + noise * (typical**2 - mean @ mean).clamp(min=0).sqrt()
    return result


def kept_layers(base: PretrainedBase, config: Any) -> Sequence[int]:
    """The numbers of the source's layers that are kept, ascending."""
    if isinstance(base.layers, tuple):
        return base.layers
    return range(base.layers or config.num_hidden_layers)


def _renumbered(weights: Mapping[str, torch.Tensor], kept: Sequence[int]) -> dict[str, torch.Tensor]:
    """The weights with the kept layers' numbers in the new model, and all others as they are."""
    numbers = {f"layers.{old}.": f"layers.{new}." for new, old in enumerate(kept)}
    renumbered = {}
    for name, weight in weights.items():
        prefix = name[: name.index(".", len("layers.")) + 1] if name.startswith("layers.") else ""
        if not prefix or prefix in numbers:
            renumbered[numbers.get(prefix, "") + name.removeprefix(prefix)] = weight
    return renumbered


def _fill(network: Any, weights: Mapping[str, torch.Tensor], path: str) -> None:
    """Copy the weights that the network has; its biases become zero. Raises `ModelError` if a weight is missing."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
            elif name.endswith("_proj.bias"):
                parameter.zero_()
            else:
                raise ModelError(f"{path}: it has no {name}; give a Llama-shaped model")


def _fill_tower(tower: Any, path: str) -> None:
    """Copy the weights with the same name and shape; others stay. Raises `ModelError` if a block does not fit."""
    source = read_network(resolve_folder(path), torch.float32).model.visual.state_dict()
    shapes = {name: parameter.shape for name, parameter in tower.state_dict().items()}
    same = {name: weight for name, weight in source.items() if shapes.get(name) == weight.shape}
    if any(name.startswith("blocks.") and name not in same for name in shapes):
        raise ModelError(f"{path}: its vision tower has another width; set model.base.vision to its shape")
    tower.load_state_dict(same, strict=False)
