"""Llama in transformers."""

from flowhn_jax.interop import names
from flowhn_jax.interop.families.attention import (
    read_attention,
    read_rope,
    write_attention,
    write_rope,
)
from flowhn_jax.interop.families.family import Family

FAMILY = Family(
    kind="llama",
    architecture="LlamaForCausalLM",
    model=names.LLAMA_MODEL,
    layer=lambda config, index: names.LLAMA_LAYER,
    read=lambda hf: read_attention(hf) | read_rope(hf),
    write=lambda config: write_attention(config) | write_rope(config),
    supported={},
)
