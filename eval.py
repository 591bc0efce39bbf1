"""Evaluate and use a model: python eval.py [--config=...] --workdir=... --mode=MODE."""

from flowhn_jax.commands import eval as eval_command

if __name__ == "__main__":
    eval_command.run()
