"""Text or chat data to a megatron-core indexed dataset: ``python tools/preprocess_data.py --help``."""

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

# So that the tool runs from any folder, and without an installation of the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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


def run(options: argparse.Namespace) -> None:
    # Here, so that --help needs no torch, and so that megatron-core's remarks on missing GPU packages can be left out.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
        from megatron_dmc.data.preprocess import PreprocessOptions, preprocess
    preprocess(PreprocessOptions(**vars(options)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 1 after one line on standard error."""
    try:
        run(parse_arguments(arguments))
    except (ConfigError, OSError) as error:
        print(f"preprocess_data: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("preprocess_data: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
