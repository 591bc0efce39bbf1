"""`flowhn prepare`: text to token windows on disk. It does not import JAX."""

import os
from collections.abc import Callable, Sequence

from flowhn_jax.commands import runner
from flowhn_jax.commands.flags import Flags


def define(flags: Flags) -> Callable[[], None]:
    """Define the flags; return the function that prepares a set and prints what it holds."""
    source = flags.path(
        "source",
        "a .txt, .jsonl, .jsonl.gz, .jsonl.zst or .parquet file, a folder of them, "
        "hf:NAME[:CONFIG] (a dataset of the Hugging Face hub), embedded (Python's own sources) or "
        "packages (those of installed packages); a .txt file is one document of any size, a line "
        "or row has at most 64 MiB.",
        required=True,
        others=("hf",),
    )
    tokenizer = flags.path(
        "tokenizer",
        "bytes, FILE.json (Hugging Face) or hf:NAME; a tokenizer without one of the usual "
        "end-of-text tokens, such as <|endoftext|> or </s>, needs --eot_token.",
        required=True,
        others=("hf",),
    )
    out = flags.path("out", "folder to make.", required=True)
    context = flags.integer(
        "context", 1024, "tokens per training window; the recipe's model.context."
    )
    validation_fraction = flags.number(
        "validation_fraction", 0.01, "fraction of the documents to hold out for validation."
    )
    text_field = flags.string("text_field", "text", "field or column that holds the text.")
    eot_token = flags.string(
        "eot_token", None, "end-of-text token of --tokenizer, if it is not one of the usual ones."
    )
    first_token = flags.string(
        "first_token",
        "auto",
        "what each document begins with: bos, eot (end-of-text) or auto: the token that "
        "--tokenizer itself puts there, or else end-of-text.",
    )
    workers = flags.integer(
        "workers",
        None,
        "processes that tokenize and pack, with the same result for any number; default: 1 for "
        "bytes, otherwise one per CPU.",
    )
    shard = flags.string(
        "shard",
        "0/1",
        "I/N, for N hosts that share --out, on a disk or in a bucket, and prepare one set, each "
        "with another I from 0 to N-1 and otherwise the same command; the last to finish writes "
        "the set.",
    )
    overwrite = flags.boolean("overwrite", False, "replace a different prepared set at --out.")

    def main() -> None:
        from flowhn_jax.data.prepare import ShardsMissing, prepare

        default_workers = 1 if tokenizer.value == "bytes" else os.cpu_count() or 1
        try:
            prepared = prepare(
                source.value,
                tokenizer.value,
                out.value,
                context=context.value,
                validation_fraction=validation_fraction.value,
                text_field=text_field.value,
                eot_token=eot_token.value,
                first_token=first_token.value,
                workers=default_workers if workers.value is None else workers.value,
                shard=shard.value,
                overwrite=overwrite.value,
            )
        except ShardsMissing as missing:
            print(missing)
            return
        print(f"{prepared.folder}: context {prepared.context}, {prepared.vocab_size} token ids")
        for name, split in prepared.splits.items():
            print(
                f"{name:>12}: {split.windows:,} windows, {split.tokens:,} tokens, "
                f"{split.bytes:,} bytes, {split.documents:,} documents, {len(split.shards)} shards"
            )

    return main


def run(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and prepare the set."""
    with runner.command(
        "prepare",
        define,
        argv,
        shows_tracebacks=False,
        interrupted="interrupted before there was anything to keep.",
    ) as main:
        main()
