"""Names of parameters in Hugging Face's models; FlowHN's authors use Jamba's.

Each mapping is from their names within a layer to our paths within a block. It has all parameters
that a model of the kind can have.
"""


def _mixer(theirs: str, ours: str, names: dict[str, str]) -> dict[str, str]:
    return {f"{theirs}.{name}": f"{ours}/{path}" for name, path in names.items()}


def _biases(*names: str) -> dict[str, str]:
    return {f"{name}_proj.bias": f"{name}_proj/bias" for name in names}


_STATE_SPACE = {
    "A_log": "a_log",
    "D": "d",
    "conv1d.weight": "conv_weight",
    "conv1d.bias": "conv_bias",
    "in_proj.weight": "in_proj/kernel",
    "out_proj.weight": "out_proj/kernel",
}
_PROJECTION_BIASES = _biases("in", "out")
_OF_MAMBA1 = _STATE_SPACE | {
    "x_proj.weight": "x_proj/kernel",
    "dt_proj.weight": "dt_proj/kernel",
    "dt_proj.bias": "dt_bias",
}
_OF_JAMBA = {f"{name}_layernorm.weight": f"{name}_norm/scale" for name in ("dt", "b", "c")}
_OF_MAMBA2 = {
    **_STATE_SPACE,
    **_PROJECTION_BIASES,
    "dt_bias": "dt_bias",
    "norm.weight": "norm/scale",
}
_OF_ATTENTION = {f"{name}_proj.weight": f"{name}_proj/kernel" for name in ("q", "k", "v", "o")}
_ATTENTION_BIASES = _biases("q", "k", "v", "o")
_QK_NORMS = {f"{name}_norm.weight": f"{name}_norm/scale" for name in ("q", "k")}
_OF_MLP = {f"{name}_proj.weight": f"{name}_proj/kernel" for name in ("gate", "up", "down")}
_MLP_BIASES = _biases("gate", "up", "down")

# In Jamba and in the authors' FlowHN.
MAMBA1 = _mixer("mamba", "mixer", _OF_MAMBA1 | _OF_JAMBA)
ATTENTION = _mixer("self_attn", "mixer", _OF_ATTENTION)
JAMBA_MAMBA1 = MAMBA1 | _mixer("mamba", "mixer", _PROJECTION_BIASES)
FEED_FORWARD = _mixer("feed_forward", "mlp", _OF_MLP)
NORMS = {"input_layernorm.weight": "norm/scale", "pre_ff_layernorm.weight": "mlp_norm/scale"}
JAMBA_MODEL = {
    "model.embed_tokens.weight": "embed/embedding",
    "model.final_layernorm.weight": "final_norm/scale",
    "lm_head.weight": "head/kernel",
}

FALCON_H1_LAYER = {
    **_mixer("mamba", "mixer/ssm", _OF_MAMBA2),
    **_mixer("self_attn", "mixer/attention", _OF_ATTENTION | _ATTENTION_BIASES),
    **_mixer("feed_forward", "mlp", _OF_MLP | _MLP_BIASES),
    **NORMS,
}
LLAMA_LAYER = {
    **_mixer("self_attn", "mixer", _OF_ATTENTION | _ATTENTION_BIASES | _QK_NORMS),
    **_mixer("mlp", "mlp", _OF_MLP | _MLP_BIASES),
    "input_layernorm.weight": "norm/scale",
    "post_attention_layernorm.weight": "mlp_norm/scale",
}
LLAMA_MODEL = {
    "model.embed_tokens.weight": "embed/embedding",
    "model.norm.weight": "final_norm/scale",
    "lm_head.weight": "head/kernel",
}
MAMBA1_LAYER = {
    "norm.weight": "norm/scale",
    **_mixer("mixer", "mixer", _OF_MAMBA1 | _PROJECTION_BIASES),
}
MAMBA2_LAYER = {
    "norm.weight": "norm/scale",
    **_mixer("mixer", "mixer", _OF_MAMBA2),
}
MAMBA_MODEL = {
    "backbone.embeddings.weight": "embed/embedding",
    "backbone.norm_f.weight": "final_norm/scale",
    "lm_head.weight": "head/kernel",
}
