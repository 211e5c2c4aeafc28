"""An adapter's folder: it holds only the decisions' weights, for the plain model that they were trained on."""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from safetensors import safe_open

from megatron_dmc.config import is_same_setting
from megatron_dmc.hf.configuration_dmc import DMC_TYPE

ADAPTER_FILE = "adapter.safetensors"
# Of another kind of adapter: where PEFT is installed, transformers adds it to the weights beside it.
PEFT_CONFIG = "adapter_config.json"
_SINGLE_FILE, _INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
# What base and adapter must agree on. Not max_position_embeddings: a retrofit may see longer texts than its base did.
_SHARED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "hidden_act", "tie_word_embeddings"),
    "quantization_config",
)
_OF_ROTARY = ("rope_type", "rope_theta")
# Only where they are scaled; transformers takes no notice of them elsewhere.
_OF_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
# Of a plain model, and of no meaning for the joined one: it is not trained as a whole.
_NOT_COMPARED = ("model_type", "attention_dropout")


def lacks_its_base(folder: Any) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    holds = [os.path.isfile(os.path.join(str(folder), name)) for name in (ADAPTER_FILE, _SINGLE_FILE, _INDEX_FILE)]
    return holds == [True, False, False]


@contextlib.contextmanager
def joined(adapter: Any, base: Any, config_class: Any) -> Iterator[str]:
    """A temporary folder from which transformers loads the base's weights and the adapter's as those of one model.

    Args:
        adapter: a folder that ``megatron-dmc convert-to-hf --adapter`` wrote.
        base: the folder of a plain model of its family, weights as safetensors.
        config_class: of the joined model.

    Raises:
        ValueError: one of them is something else, or they do not fit together; one line.
    """
    adapter, base = os.path.abspath(adapter), os.path.abspath(base)
    for folder in (adapter, base):
        if not os.path.isdir(folder):
            raise ValueError(f"{folder} is not a folder; huggingface_hub.snapshot_download fetches one from the Hub")
    own = os.path.join(adapter, ADAPTER_FILE)
    if not os.path.isfile(own):
        raise ValueError(f"{adapter} holds no {ADAPTER_FILE}: it is no adapter; leave base out to load a whole model")
    config = config_class.from_dict(_read(adapter, "config.json"))
    _check_config(base, adapter, _read(base, "config.json"), config)
    _check_shapes(own, config)
    files = _tensors(base) | dict.fromkeys(_shapes(own), own)
    with tempfile.TemporaryDirectory() as folder:
        # An absolute name stays what it is when transformers joins it to the folder's name.
        with open(os.path.join(folder, _INDEX_FILE), "w", encoding="utf-8") as file:
            json.dump({"metadata": {}, "weight_map": files}, file)
        generation = os.path.join(adapter, "generation_config.json")
        if os.path.isfile(generation):
            shutil.copy(generation, folder)
        yield folder


def _check_config(base: str, adapter: str, values: dict[str, Any], config: Any) -> None:
    family = config.model_type.removeprefix(DMC_TYPE)
    if values.get("model_type") != family:
        raise ValueError(
            f"{base}: the base of this adapter is a plain {family}, got model_type {values.get('model_type')!r}"
        )
    if lost := [name for name in config.replaced_defaults if name not in values]:
        raise ValueError(
            f"{base}: config.json does not say what {lost[0]} is; a {family} that could be compressed does"
        )
    # Read as the adapter's class, defaults and older forms become the same on both sides.
    try:
        theirs = type(config).from_dict({name: value for name, value in values.items() if name not in _NOT_COMPARED})
    # transformers checks values with errors of its own kinds, in several lines.
    except Exception as error:
        raise ValueError(f"{base}: {' '.join(str(error).split())}") from None
    pairs = {name: [getattr(each, name, None) for each in (theirs, config)] for name in _SHARED}
    # Not every family's configuration fills it in.
    pairs["head_dim"] = [
        getattr(each, "head_dim", None) or each.hidden_size // each.num_attention_heads for each in (theirs, config)
    ]
    # A family's configuration need not know it.
    pairs["mlp_bias"] = [bool(getattr(each, "mlp_bias", False)) for each in (theirs, config)]
    is_scaled = any((each.rope_parameters or {}).get("rope_type", "default") != "default" for each in (theirs, config))
    for name in (*_OF_ROTARY, *(_OF_SCALING if is_scaled else ())):
        pairs[name] = [(each.rope_parameters or {}).get(name) for each in (theirs, config)]
    for name, (found, expected) in pairs.items():
        if not is_same_setting(found, expected):
            raise ValueError(
                f"{base} is not the base of {adapter}: its {name} is {found!r}, the adapter's is {expected!r}; name the "
                "model that the adapter was trained on"
            )


def _check_shapes(own: str, config: Any) -> None:
    rows = 2 * config.num_key_value_heads
    shapes = {"weight": [rows, config.hidden_size], "bias": [rows]}
    names = ((i, name) for i in range(config.num_hidden_layers) for name in shapes)
    found, expected = _shapes(own), {f"model.layers.{i}.self_attn.decision.{name}": shapes[name] for i, name in names}
    for name in sorted({*expected, *found}):
        if found.get(name) != expected.get(name):
            raise ValueError(
                f"{own}: {name} has shape {found.get(name)}, config.json asks for {expected.get(name)}; export it again"
            )


def _tensors(base: str) -> dict[str, str]:
    """File of every tensor; as transformers, of one file rather than of an index."""
    if os.path.isfile(os.path.join(base, PEFT_CONFIG)):
        raise ValueError(
            f"{base} holds a PEFT adapter ({PEFT_CONFIG}): merge it (merge_and_unload) and save the model anew, or remove "
            f"{PEFT_CONFIG} to leave it out"
        )
    single = os.path.join(base, _SINGLE_FILE)
    if os.path.isfile(single):
        return dict.fromkeys(_shapes(single), single)
    if not os.path.isfile(os.path.join(base, _INDEX_FILE)):
        raise ValueError(f"{base} holds no {_SINGLE_FILE} and no index of several; save the base as safetensors")
    files = _read(base, _INDEX_FILE).get("weight_map")
    if not isinstance(files, dict) or not all(str(file).endswith(".safetensors") for file in files.values()):
        raise ValueError(f"{os.path.join(base, _INDEX_FILE)}: weight_map must name a safetensors file for every tensor")
    return {name: os.path.join(base, file) for name, file in files.items()}


def _shapes(path: str) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # the library raises exceptions of its own and several of Python's
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None


def _read(folder: str, name: str) -> dict[str, Any]:
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file))
    except FileNotFoundError:
        raise ValueError(f"{folder} holds no {name}; name the Hugging Face folder of a model") from None
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
