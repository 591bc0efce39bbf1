"""The layers that models are made of: flax.nnx modules, used functionally.

Shapes in docstrings and comments, here and in `models`, use these letters:

  B  sequences of a batch
  T  tokens of a sequence
  D  width of the residual stream (model.width)
  V  vocabulary (model.vocab_size)
  F  hidden units of an MLP (model.mlp_width)
  H  heads: of queries in attention, of channels in Mamba-2
  G  groups of heads: of keys and values in attention, of B and C in Mamba-2
  K  size of an attention head
  C  token slots of an attention cache
  E  channels of a state-space mixer (model.ssm_expand * model.width)
  P  channels of a Mamba-2 head, E = H * P
  S  states of a channel (model.ssm_state)
  R  rank of Mamba-1's time step (model.ssm_dt_rank)
  W  taps of a convolution (model.ssm_conv)

A `...` stands for any leading dimensions: [B, T] for whole sequences, [B] for one token of each.
"""
