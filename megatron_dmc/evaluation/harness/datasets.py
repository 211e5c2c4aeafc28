"""What lm-eval calls for the long-context tasks of ``tasks/``: a task's documents, and an answer's score.

lm-eval gives ``--model_args`` and ``--metadata`` as keywords.
"""

from typing import Any

from megatron_dmc.config import ConfigError
from megatron_dmc.evaluation.harness.fitting import long_prompts

# As lm-eval's own RULER tasks.
DEFAULT_LENGTH = 4096
DEFAULT_SAMPLES = 100


def niah_noise(**metadata: Any) -> Any:
    return _dataset("dmc_niah_noise", metadata)


def variable_tracking(**metadata: Any) -> Any:
    return _dataset("dmc_vt", metadata)


def common_words(**metadata: Any) -> Any:
    return _dataset("dmc_cwe", metadata)


def frequent_words(**metadata: Any) -> Any:
    return _dataset("dmc_fwe", metadata)


def score(document: dict[str, Any], answers: list[str]) -> dict[str, float]:
    """The share of the answers that the model's text contains, upper and lower case alike, as RULER counts."""
    said = answers[0].lower()
    return {"score": sum(each.lower() in said for each in document["outputs"]) / len(document["outputs"])}


def _dataset(name: str, metadata: dict[str, Any]) -> Any:
    """datasets.Dataset by split.

    Args:
        metadata: ``tokenizer`` or ``pretrained``, a folder or a name on the Hub; ``max_seq_lengths``, tokens of prompt and
            answer; ``num_samples`` of each length; ``seed``.
    """
    from datasets import Dataset
    from transformers import AutoTokenizer

    folder = metadata.get("tokenizer") or metadata.get("pretrained")
    if not folder:
        raise ConfigError(
            f"{name} counts in a model's tokens: name the tokenizer's folder in --metadata or --model_args"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=bool(metadata.get("trust_remote_code")))

    def measure(text: str) -> int:
        return len(tokenizer(text).input_ids)

    lengths = metadata.get("max_seq_lengths", [DEFAULT_LENGTH])
    count, seed = int(metadata.get("num_samples", DEFAULT_SAMPLES)), int(metadata.get("seed", 0))
    documents = [
        {
            "input": prompt.text,
            # The input's beginning, which a baseline compresses before it reads the rest.
            "context": prompt.context,
            "gen_prefix": prompt.answer_prefix,
            "outputs": prompt.answers,
            "max_length": length,
        }
        for length in (lengths if isinstance(lengths, list) else [lengths])
        for prompt in long_prompts(name, int(length), count, seed, measure)
    ]
    return {"test": Dataset.from_list(documents)}
