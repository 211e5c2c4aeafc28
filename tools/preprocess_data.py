"""Text or chat data to a megatron-core indexed dataset: ``python tools/preprocess_data.py --help``."""

import argparse
import sys
import warnings
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Any

from megatron_dmc.config import ConfigError


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Tokenize text into PREFIX.bin, PREFIX.idx and PREFIX.json; with --chat conversations, and into "
        "PREFIX.mask.bin and PREFIX.mask.idx which of their tokens are the assistant's."
    )
    parser.add_argument(
        "--input",
        required=True,
        action="append",
        metavar="PATH",
        help="a folder (.md, .py, .rst, .txt and .jsonl files in it; links to folders are not followed), a text file "
        '(one document), or a .jsonl file with "text" in every line; with --chat a .jsonl file, or a folder of them; '
        "may be repeated",
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", metavar="FOLDER", help="a folder that holds tokenizer.json")
    tokenizer.add_argument(
        "--train-tokenizer",
        type=int,
        metavar="VOCAB",
        help="train a byte-level BPE of this size on the training documents, into PREFIX_tokenizer/",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help='every line is a conversation, {"messages": [{"role": "user", "content": "..."}, ...]}: the tokenizer\'s chat '
        "template writes it, and the loss is on the assistant's tokens only (needs transformers)",
    )
    parser.add_argument("--chat-template", metavar="FILE", help="a Jinja template instead of the tokenizer's own")
    parser.add_argument("--output", required=True, metavar="PREFIX", help="path of the dataset without its suffixes")
    parser.add_argument(
        "--valid-fraction",
        type=float,
        default=0.0,
        metavar="F",
        help="hold out this part of the text, by document, in PREFIX_valid; the rest goes to PREFIX_train (default: 0, "
        "all goes to PREFIX)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the split (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    return parser.parse_args(arguments)


def preprocess(options: argparse.Namespace) -> None:
    """Writes the dataset or datasets that the options ask for; raises ConfigError for bad input."""
    # Here, so that --help needs no torch, and so that megatron-core's remarks on missing GPU packages can be left out.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
        from megatron_dmc import data
        from megatron_dmc.data.tokenizer import load_tokenizer, train_tokenizer
        from megatron_dmc.distributed.launcher import check_runs_alone
    check_runs_alone()
    if options.chat and options.train_tokenizer is not None:
        raise ConfigError("--chat needs --tokenizer: a newly trained tokenizer has no chat template")
    if options.chat_template is not None and not options.chat:
        raise ConfigError("--chat-template is for --chat; add that, or leave it out")
    prefixes = [options.output]
    if options.valid_fraction != 0.0:
        prefixes = [f"{options.output}_train", f"{options.output}_valid"]
    tokenizer_folder = Path(options.tokenizer or f"{options.output}_tokenizer")
    suffixes = (".bin", ".idx", ".json", ".mask.bin", ".mask.idx")
    outputs = [Path(prefix + suffix) for prefix in prefixes for suffix in suffixes]
    if options.train_tokenizer is not None:
        outputs += [tokenizer_folder / name for name in ("tokenizer.json", "tokenizer_config.json")]
    existing = next((path for path in outputs if path.exists()), None)
    if existing is not None and not options.overwrite:
        raise ConfigError(f"{existing} exists; choose another --output or add --overwrite")
    # before the text is read: a bad tokenizer should not take an hour to show
    tokenizer = load_tokenizer(tokenizer_folder) if options.train_tokenizer is None else None
    documents: Iterable[Any]
    if options.chat:
        assert tokenizer is not None
        template = data.load_chat_template(tokenizer, options.chat_template)
        conversations = chain.from_iterable(data.iter_conversations(path) for path in options.input)
        documents = map(template.render, data.usable_conversations(conversations, tokenizer.special_tokens))
    else:
        documents = chain.from_iterable(data.iter_documents(path) for path in options.input)
    parts: Sequence[Iterable[Any]]
    if tokenizer is not None and options.valid_fraction == 0.0:
        parts = [documents]
    else:
        text_of = attrgetter("text") if options.chat else str
        train, valid = data.split_documents(documents, options.valid_fraction, options.seed, text_of)
        parts = [train, valid][: len(prefixes)]
    if tokenizer is None:
        tokenizer = train_tokenizer(parts[0], options.train_tokenizer, tokenizer_folder)
        print(f"{tokenizer_folder}: {tokenizer.vocab_size} tokens")
    for prefix, part in zip(prefixes, parts, strict=True):
        counts = (data.build_chat_dataset if options.chat else data.build_indexed_dataset)(part, tokenizer, prefix)
        learned = f" ({counts.trained_tokens} of the assistant)" if options.chat else ""
        print(
            f"{prefix}: {counts.documents} documents, {counts.tokens} tokens{learned}, {counts.bytes} bytes "
            f"({counts.bytes_per_token:.3f} bytes per token)"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 1 after one line on standard error."""
    try:
        preprocess(parse_arguments(arguments))
    except (ConfigError, OSError) as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("preprocess_data: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
