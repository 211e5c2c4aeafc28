"""A GGUF file of a Llama, as llama.cpp runs it -> a checkpoint of this project, or a Hugging Face folder."""

import contextlib
import importlib.util
import io
import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.convert.folders import check_output
from megatron_dmc.convert.from_hf import import_hf
from megatron_dmc.convert.progress import Written
from megatron_dmc.errors import DMCError, in_one_line
from megatron_dmc.files import why_no_file

SUFFIX = ".gguf"
_ARCHITECTURE = "llama"
_EMBEDDING = "token_embd.weight"
# llama.cpp's form of Llama 3's frequency scaling. transformers' reader leaves it out: the model would be another one.
_FREQUENCIES = "rope_freqs.weight"
# transformers' reader leaves any other tensor out, too.
_TENSOR = re.compile(
    r"(token_embd|output_norm|output|blk\.\d+\.(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down)))\.weight"
)
_POSITIONS = f"{_ARCHITECTURE}.context_length"
_SCALING = f"{_ARCHITECTURE}.rope.scaling.type"
# transformers reads GGUF with both.
_PACKAGES = ("gguf", "accelerate")


def import_gguf(file: str | Path, output: str | Path, *, pad_vocab_to_multiple_of: int = 1) -> Written:
    """Writes a weights-only checkpoint with the file's model and tokenizer, as :func:`import_hf` does of a folder.

    Quantized weights are unpacked: the checkpoint is float32. Needs the float32 model's size in memory twice, and once on
    the output's disk while it converts.

    Args:
        file: one GGUF file of a Llama, its tokenizer included.
        output, pad_vocab_to_multiple_of: as :func:`import_hf`'s.

    Raises:
        ConfigError: the packages that read GGUF are missing; the file is damaged, holds another architecture, or its tokenizer
            and its model do not fit; and whatever :func:`import_hf` refuses.
        CheckpointError: the checkpoint cannot be written.
    """
    file, output = Path(file), Path(output)
    check_output(output)
    check_gguf(file)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.gguf-", dir=output.parent) as temporary:
        folder = Path(temporary)
        write_hf_folder(file, folder)
        try:
            return import_hf(folder, output, pad_vocab_to_multiple_of=pad_vocab_to_multiple_of)
        except DMCError as error:
            # The user knows the file, not the folder that it became.
            raise type(error)(str(error).replace(temporary, str(file))) from None


def check_gguf(file: Path) -> None:
    """Raises ConfigError unless a file is whole, a Llama with a tokenizer, and can be read here; reads its header only."""
    if (problem := why_no_file(file)) is not None:
        raise ConfigError(f"{file} {problem}; name a GGUF file")
    if missing := [name for name in _PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"reading {file} needs {' and '.join(missing)}; run pip install {' '.join(missing)}")
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    # What it raises depends on where a file ends.
    except (ValueError, IndexError, KeyError, OverflowError, struct.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is no whole GGUF file ({in_one_line(error, 200)}); fetch it again") from None
    architecture = _value(reader, "general.architecture")
    if architecture != _ARCHITECTURE:
        raise ConfigError(f"{file}: architecture {architecture!r} is not supported; only {_ARCHITECTURE} is")
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    scaling = _value(reader, _SCALING)
    if _FREQUENCIES in shapes or scaling not in (None, "none"):
        named = _FREQUENCIES if _FREQUENCIES in shapes else f"{_SCALING} {scaling!r}"
        raise ConfigError(
            f"{file}: scaled rotary frequencies ({named}) are not read from GGUF; convert the model's Hugging Face folder "
            "instead"
        )
    if other := next((name for name in shapes if not _TENSOR.fullmatch(name)), None):
        raise ConfigError(f"{file} holds {other}, which a plain Llama does not have; this model is not supported")
    if _EMBEDDING not in shapes:
        raise ConfigError(f"{file} holds no {_EMBEDDING}; it is a part of a model, or no language model")
    _check_shapes(file, reader, shapes)
    tokens = _value(reader, "tokenizer.ggml.tokens")
    if tokens is None:
        raise ConfigError(
            f"{file} holds no tokenizer; fetch a file with one, or convert the model's Hugging Face folder"
        )
    if len(tokens) > shapes[_EMBEDDING][0]:
        raise ConfigError(
            f"{file}: its tokenizer has {len(tokens)} tokens, its model {shapes[_EMBEDDING][0]}; the tokenizer is another "
            "model's, fetch the file again"
        )


def _check_shapes(file: Path, reader: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises ConfigError unless the tensors are those of the model that the header describes.

    transformers reads as many layers as the header says, and forgets the rest.
    """

    def size(name: str, absent: int | None = None) -> int:
        found = _value(reader, f"{_ARCHITECTURE}.{name}")
        found = absent if found is None else found
        if not isinstance(found, int) or found < 1:
            raise ConfigError(f"{file} holds no {_ARCHITECTURE}.{name}; fetch it again")
        return found

    hidden, inner, heads = size("embedding_length"), size("feed_forward_length"), size("attention.head_count")
    head_dim = size("attention.key_length", hidden // heads)
    query, key = heads * head_dim, size("attention.head_count_kv", heads) * head_dim
    of_layer = {
        **dict.fromkeys(("attn_norm", "ffn_norm"), (hidden,)),
        **{"attn_q": (query, hidden), "attn_k": (key, hidden), "attn_v": (key, hidden), "attn_output": (hidden, query)},
        **{"ffn_gate": (inner, hidden), "ffn_up": (inner, hidden), "ffn_down": (hidden, inner)},
    }
    vocabulary = shapes[_EMBEDDING][0]
    expected = {_EMBEDDING: (vocabulary, hidden), "output_norm.weight": (hidden,)}
    for layer in range(size("block_count")):
        expected |= {f"blk.{layer}.{name}.weight": shape for name, shape in of_layer.items()}
    # A file without it ties it to the embedding.
    if "output.weight" in shapes:
        expected["output.weight"] = (vocabulary, hidden)
    for name in sorted({*expected, *shapes}):
        if shapes.get(name) != expected.get(name):
            found, wanted = (
                "absent" if shape is None else " x ".join(map(str, shape))
                for shape in (shapes.get(name), expected.get(name))
            )
            raise ConfigError(
                f"{file}: its tensors are not those that its header describes: {name} is {found}, expected {wanted}; fetch "
                "the file again"
            )


def gguf_sizes(file: Path) -> tuple[int, int]:
    """Positions and hidden size of a file that :func:`check_gguf` has let pass.

    Raises:
        ConfigError: the file does not say how many positions its model has.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)
    positions = _value(reader, _POSITIONS)
    if not isinstance(positions, int):
        raise ConfigError(f"{file} holds no {_POSITIONS}; fetch it again")
    (embedding,) = (tensor for tensor in reader.tensors if tensor.name == _EMBEDDING)
    return positions, int(embedding.shape[0])


def write_hf_folder(file: Path, folder: Path) -> None:
    """Writes config.json, safetensors in float32 and the tokenizer's files of a file that :func:`check_gguf` has let pass.

    Raises:
        ConfigError: transformers cannot read it, or finds other tensors in it than the model has.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place: dict[str, Any] = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with _quietly():
            tokenizer = AutoTokenizer.from_pretrained(**place)
            loaded: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32, output_loading_info=True)
    # transformers and its readers raise whatever they happen to meet.
    except Exception as error:
        raise ConfigError(f"{file}: transformers cannot read it: {in_one_line(error, 200)}") from None
    model, info = loaded
    if wrong := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
        raise ConfigError(f"{file}: its tensors are not those of its model, such as {wrong[0]}; fetch the file again")
    # Unpacked weights are plain ones; save_pretrained refuses what says that it is quantized.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    with _quietly():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _value(reader: Any, name: str) -> Any:
    field = reader.fields.get(name)
    return None if field is None else field.contents()


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Progress bars and remarks about what this module does on purpose are left out; errors are raised in any case."""
    from transformers import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(before)
