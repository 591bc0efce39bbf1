"""Values that a user might write into a flag or a recipe, most of them invalid."""

# Values for flags.
WORDS = (
    *("auto", "flowhn", "llama", "mamba2", "jamba", "hymba", "falcon_h1", "no_split", "ae_split"),
    *("fai_split", "time", "equal", "0.5", "sequence", "full", "bfloat16", "xla", "attention=xla"),
    *("None", "True", "[1]", "()", "{'a': 1}", "a,b", "1e3", "1_0", "0x10", "nan", "inf", ""),
    *("learned_split", "set", "nowhere", "é", "\udcff", "9" * 1000),
)
# Values for keys in a recipe, as Python.
LITERALS = (
    *("float('nan')", "-float('inf')", "10**30", "10**5000", "1e999", "1j", "None", "True", "b'1'"),
    *("'flowhn'", "'llama'", "'mamba2'", "'no_split'", "'fai_split'", "'time'", "'x' * 100_000"),
    *("'learned_split'", "()", "[1] * 5", "{}", "{'a': {1: 2}}", "config", "lambda: 0", "object()"),
)
# Statements for a recipe.
STATEMENTS = (
    *("", "1/0", "x = ", "import nothing_of_this_name", "raise KeyError('x')", "return None"),
    *("return 7", "return dict(model=dict(width=16))", "del config.model"),
    *("config.model = None", "config.another = 1", "config.model.split = config", "config.lock()"),
    *("config.model.unlock()", "config = config.to_json()"),
)
