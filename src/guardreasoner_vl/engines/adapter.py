"""LoRA adapters in peft's layout: the weight of some linear layers is W + s B A, with s = alpha / rank.

ADAPTER/adapter_config.json         rank, alpha, and the layers' names
ADAPTER/adapter_model.safetensors   for each layer A (rank, inputs) and B (outputs, rank)
ADAPTER/preprocessor_config.json    the image processor that it was trained with, if this package wrote the adapter
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from guardreasoner_vl.engines.model_files import PROCESSOR, json_object
from guardreasoner_vl.errors import GuardError, MissingExtraError, ModelError, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_UNREAD = (
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "megatron_config",
)
_KEEPING_W = (True, False, None, "gaussian", "eva")
"""The ways to draw A and B, by peft's `init_lora_weights`, that leave W as it is."""

_REMEDY = "merge it into its model with peft, and give the merged folder as the model"


def check_adapter(folder: Path) -> int:
    """The adapter's rank. Raises `ModelError` unless the folder holds a LoRA adapter, which changes nothing else."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise ModelError(f"{folder}: no {name}; give the folder of a LoRA adapter, such as RUN/sft/adapter")
    content = json_object(folder / CONFIG)
    if content.get("peft_type") != "LORA":
        raise ModelError(f"{folder}: an adapter of type {content.get('peft_type')!r}, only LoRA is read; {_REMEDY}")
    changed = [name for name in _UNREAD if content.get(name)]
    changed += ["bias"] if content.get("bias", "none") != "none" else []
    changed += ["init_lora_weights"] if content.get("init_lora_weights") not in _KEEPING_W else []
    changed += [name for name in _weight_names(folder / WEIGHTS) if ".lora_" not in name]
    if changed:
        raise ModelError(
            f"{folder}: it changes more than linear layers ({changed[0]:.80}), which is not read; {_REMEDY}"
        )
    rank = content.get("r")
    if not isinstance(rank, int):
        raise ModelError(f"{folder / CONFIG}: the rank `r` is not a number; train or download the adapter again")
    return rank


def processor_folder(model: Path, adapter: Path | None) -> Path:
    """The folder with the image processor to use: the adapter's if it has one, since its image limits may differ."""
    return adapter if adapter and (adapter / PROCESSOR).is_file() else model


def _weight_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as weights:
            return list(weights.keys())
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({reason_of(error)}); train or download the adapter again") from error


def merge_folder(network: Any, folder: Path) -> None:
    """Merge a stored adapter into the network, which then is an ordinary one.

    Raises `ModelError` if the adapter was trained for a network of other shapes or is broken, `MissingExtraError`
    without peft.
    """
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise MissingExtraError("peft", "train") from error
    check_adapter(folder)
    try:
        network.add_adapter(PeftConfig.from_pretrained(str(folder)))
        for parameter in adapter_parameters(network):
            parameter.data = parameter.data.float()
        load_adapter(network, folder)
        merge_adapter(network)
    except GuardError:
        raise
    except Exception as error:
        raise ModelError(
            f"{folder}: does not fit the model ({reason_of(error)}); give the model that it was trained from"
        ) from error


def load_adapter(network: Any, folder: Path) -> None:
    """Copy a stored adapter's weights into the adapted layers of the network. Raises `ModelError` if names differ."""
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    result = set_peft_model_state_dict(network, load_file(folder / WEIGHTS))
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if differing := sorted([*missing, *result.unexpected_keys]):
        raise ModelError(
            f"{folder}: {len(differing)} weights of the adapter and of the model differ in name ({differing[0]:.80}); "
            "give the model that it was trained from"
        )


def adapter_parameters(network: Any) -> list[Any]:
    """A and B of all adapted layers."""
    return [parameter for name, parameter in network.named_parameters() if ".lora_" in name]


def merge_adapter(network: Any) -> None:
    """Replace each adapted layer by a plain one of weight W + s B A.

    The sum is computed in fp32 and rounded to bf16, in which folders are stored, whatever the dtype of W: an adapter
    beside a bf16 model gives exactly the merged folder. Raises `ModelError` for NaN, infinity, or a layer that is not
    linear.
    """
    import torch

    for name, layer in list(adapted_layers(network)):
        plain = layer.get_base_layer()
        if not isinstance(plain, torch.nn.Linear) or layer is network.get_output_embeddings():
            raise ModelError(f"the adapter's layer {name:.80} is an embedding or no linear layer; {_REMEDY}")
        dtype = plain.weight.dtype
        layer.float()
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise ModelError(f"the adapter of {name:.80} holds NaN or infinity: train it again") from error
        network.set_submodule(name, plain.to(torch.bfloat16).to(dtype))
    network.delete_adapter("default")


def adapted_layers(network: Any) -> Iterator[tuple[str, Any]]:
    """The adapted layers and their names."""
    from peft.tuners.lora import LoraLayer

    return ((name, module) for name, module in network.named_modules() if isinstance(module, LoraLayer))
