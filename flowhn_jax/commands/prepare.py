"""`python -m flowhn_jax.data.prepare`."""

import argparse
import os
import sys

from flowhn_jax.data.prepare import prepare
from flowhn_jax.utils.text import one_line


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m flowhn_jax.data.prepare",
        description="Turns text into token windows on disk, for training and validation.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--source",
        required=True,
        help="a .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, a folder of them, "
        "hf:NAME[:CONFIG] (a dataset of the Hugging Face hub), or embedded (Python's own sources); "
        "a .txt file is one document of any size, a line or row has at most 64 MiB",
    )
    add(
        "--tokenizer",
        required=True,
        help="bytes, FILE.json (Hugging Face) or hf:NAME; a tokenizer without one of the usual "
        "end-of-text tokens, such as <|endoftext|> or </s>, needs --eot_token",
    )
    add("--out", required=True, help="folder to make")
    add("--context", type=int, default=1024, help="tokens per training window (%(default)s)")
    add(
        "--validation_fraction",
        type=float,
        default=0.01,
        help="share of the documents to hold out (%(default)s)",
    )
    add("--text_field", default="text", help="field or column with the text (%(default)s)")
    add("--eot_token", help="end-of-text token of --tokenizer, where it is not a usual one")
    add(
        "--first_token",
        default="auto",
        help="what each document begins with: bos, eot (end-of-text) or, by default, auto: the "
        "token that --tokenizer itself puts there, or else end-of-text",
    )
    add(
        "--workers",
        type=int,
        help="processes that tokenize (bytes: 1, otherwise one per CPU)",
    )
    add("--overwrite", action="store_true", help="replace another prepared set at --out")
    return parser


def run(argv: list[str] | None = None) -> None:
    """The command line; bad input ends it with one line and status 1."""
    options = _parser().parse_args(argv)
    if options.workers is None:
        options.workers = 1 if options.tokenizer == "bytes" else os.cpu_count()
    try:
        prepared = prepare(**vars(options))
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was kept.")
    print(f"{prepared.folder}: context {prepared.context}, {prepared.vocab_size} token ids")
    for name, split in prepared.splits.items():
        print(
            f"{name:>12}: {split.windows:,} windows, {split.tokens:,} tokens, "
            f"{split.bytes:,} bytes, {split.documents:,} documents, {len(split.shards)} shards"
        )
