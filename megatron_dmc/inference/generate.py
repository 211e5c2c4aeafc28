"""Text generation with the compressed cache."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core.inference import utils as inference_utils
from torch import Tensor

from megatron_dmc.config import ConfigError
from megatron_dmc.data.tokenizer import Tokenizer
from megatron_dmc.inference.context import DMCInferenceContext
from megatron_dmc.inference.loading import LoadedModel, load_model
from megatron_dmc.model.attention import StepContext
from megatron_dmc.model.gpt import dmc_layers


@torch.no_grad()
def forward(loaded: LoadedModel, tokens: Tensor, context: DMCInferenceContext) -> Tensor:
    """Takes the next tokens [batch, seq] into the cache; the model's logits, [batch, seq or 1, vocabulary] in float32."""
    tokens = tokens.to(loaded.device)
    # Positions are the cache's: each sequence goes on where it stands.
    with _inference():
        logits = loaded.model(
            tokens, torch.zeros_like(tokens), None, inference_context=context, runtime_gather_output=True
        )
    context.sequence_len_offset += tokens.shape[1]
    return logits.float()


def _inference() -> AbstractContextManager[None]:
    """megatron-core < 0.17 sees from the context that a model infers; newer versions ask a flag of the process."""
    mode = getattr(inference_utils, "InferenceMode", None)
    return nullcontext() if mode is None else mode.active()


def generate(
    loaded: LoadedModel,
    prompt: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Yields the next tokens [batch], one step at a time, after a parallel prefill of prompt [batch, seq].

    temperature 0 takes the likeliest token. Rows that pad the vocabulary are never taken. Ends after max_new_tokens; the
    caller stops at an end token.
    """
    context = DMCInferenceContext(loaded.recipe.dmc, prompt.shape[1] + max_new_tokens, only_last_logits=True)
    logits = forward(loaded, prompt, context)[:, -1]
    for step in range(max_new_tokens):
        logits = logits[:, : loaded.vocabulary]
        if temperature == 0:
            token = logits.argmax(-1)
        else:
            probabilities = torch.softmax(logits / temperature, dim=-1).cpu()
            token = torch.multinomial(probabilities, 1, generator=generator)[:, 0]
        yield token.cpu()
        if step + 1 < max_new_tokens:
            logits = forward(loaded, token[:, None], context)[:, -1]


def new_text(tokenizer: Tokenizer, prompt: Sequence[int], steps: Iterable[int]) -> Iterator[str]:
    """The text that the tokens of ``steps`` add to the prompt's, in pieces; ends with the end-of-text token."""
    # Decoded together with the prompt: some tokenizers drop the space before a text's first word.
    ids = list(prompt)
    shown = text = tokenizer.detokenize(ids)
    for token in steps:
        if token == tokenizer.eod:
            break
        ids.append(token)
        text = tokenizer.detokenize(ids)
        # A character may be spread over several tokens.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
    yield text[len(shown) :]


def run(
    checkpoint: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    *,
    base: str | None = None,
    merge_threshold: float = 0.0,
) -> None:
    """``megatron-dmc generate``: prints the prompt and its continuation as it is made."""
    loaded = load_model(checkpoint, base, must_merge=True)
    for layer in dmc_layers(loaded.model):
        layer.step = StepContext(merge_threshold=merge_threshold)
    ids = loaded.tokenizer.tokenize_prompt(prompt)
    if not ids:
        raise ConfigError("--prompt is empty; give at least one character")
    most = loaded.recipe.model.max_position_embeddings
    if len(ids) + max_new_tokens > most:
        raise ConfigError(
            f"prompt ({len(ids)} tokens) and --max-new-tokens ({max_new_tokens}) exceed the model's {most} positions"
        )
    print(prompt, end="", flush=True)
    steps = generate(
        loaded,
        torch.tensor([ids]),
        max_new_tokens,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
    )
    for piece in new_text(loaded.tokenizer, ids, (int(token[0]) for token in steps)):
        print(piece, end="", flush=True)
    print()
