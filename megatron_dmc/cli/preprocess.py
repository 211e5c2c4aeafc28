"""``megatron-dmc preprocess``."""

import argparse
import os
import re
import warnings

from megatron_dmc.cli.common import path, prefix
from megatron_dmc.config import LARGEST_VOCABULARY, SMALLEST_VOCABULARY

HELP = "text or conversations to a dataset"


def fraction(text: str) -> float:
    """A part of a whole, which is never all of it."""
    value = float(text)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


def vocabulary(text: str) -> int:
    """The size of a tokenizer that is to be trained."""
    if not re.fullmatch(r"\d{1,18}", text, re.ASCII) or not SMALLEST_VOCABULARY <= int(text) <= LARGEST_VOCABULARY:
        raise argparse.ArgumentTypeError(
            f"must be a whole number from {SMALLEST_VOCABULARY} (256 bytes and the end of a text) to {LARGEST_VOCABULARY}, "
            f"got {text}"
        )
    return int(text)


def dataset(text: str) -> str:
    """A :func:`prefix` that does not end in a suffix of its files already."""
    stem = re.sub(r"(\.bin|\.idx)+$", "", prefix(text))
    if stem != text:
        better = stem if os.path.basename(stem) else os.path.join(stem, "train")
        raise argparse.ArgumentTypeError(f".bin and .idx are added to {text}; name it {better}")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        required=True,
        action="append",
        type=path,
        metavar="PATH",
        help="a folder (.md, .py, .rst, .txt and .jsonl files in it; links to folders are not followed), a text file "
        '(one document), or a .jsonl file with "text" in every line; with --chat a .jsonl file, or a folder of them; '
        "may be repeated",
    )
    tokenizer = parser.add_mutually_exclusive_group(required=True)
    tokenizer.add_argument("--tokenizer", type=path, metavar="FOLDER", help="a folder that holds tokenizer.json")
    tokenizer.add_argument(
        "--train-tokenizer",
        type=vocabulary,
        metavar="VOCAB",
        help="train a byte-level BPE of this size on the training documents, into PREFIX_tokenizer/",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help='every line is a conversation, {"messages": [{"role": "user", "content": "..."}, ...]}: the tokenizer\'s chat '
        "template writes it, and the loss is on the assistant's tokens only (needs transformers)",
    )
    parser.add_argument(
        "--chat-template",
        type=path,
        metavar="FILE|NAME",
        help="a Jinja template's file, or the name of one of the tokenizer's, instead of its default",
    )
    parser.add_argument(
        "--output", required=True, type=dataset, metavar="PREFIX", help="path of the dataset without its suffixes"
    )
    parser.add_argument(
        "--valid-fraction",
        type=fraction,
        default=0.0,
        metavar="F",
        help="hold out this part of the text, by document, in PREFIX_valid; the rest goes to PREFIX_train (default: 0, "
        "all goes to PREFIX)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="of the split (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def run(options: argparse.Namespace) -> None:
    """Tokenizes text into PREFIX.bin, PREFIX.idx and PREFIX.json; with --chat conversations, and into PREFIX.mask.bin and
    PREFIX.mask.idx which of their tokens are the assistant's."""
    # Only here: what reading the data itself warns of is for the user.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
        from megatron_dmc.data.preprocess import PreprocessOptions, preprocess
    preprocess(
        PreprocessOptions(
            input=options.input,
            output=options.output,
            tokenizer=options.tokenizer,
            train_tokenizer=options.train_tokenizer,
            chat=options.chat,
            chat_template=options.chat_template,
            valid_fraction=options.valid_fraction,
            seed=options.seed,
            overwrite=options.overwrite,
        )
    )
