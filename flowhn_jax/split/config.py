"""The user's choices of the split."""

import dataclasses

from flowhn_jax.split.strategies import Strategy, get_strategy

BALANCES = ("flops", "equal", "time")
SCOPES = ("context", "sequence")
READS = ("own", "all")
STEM_KINDS = ("no_split", "ssm", "attention")


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """How the branches of each block share the tokens.

    Attributes:
      strategy: which positions attention gets: 'no_split' (both branches see all), 'ae_split'
        (alternating halves), 'fa_split' (the last ones), 'fac_split' (a window that moves from
        block to block), 'fai_split' (short runs in every period) or 'learned_split' (the same
        number in every period, chosen by a score that the model learns).
      balance: attention's share of the tokens: 'flops' gives both branches equal FLOPs, 'time'
        equal time as `bench branches` measured it on the device, 'equal' half of the tokens; a
        number between 0 and 1 is the share itself. Not used by no_split and ae_split.
      align: attention's number of tokens is rounded to a multiple of this. Used by fa_split and
        fac_split.
      period: length in tokens after which fai_split's runs repeat, or of learned_split's windows,
        each of which sends the same number of tokens to attention.
      shift: positions by which fai_split's runs move back from block to block; None: half a run.
      stem: number of first blocks, of model.blocks, that are not split.
      stem_kind: what all tokens pass in a block of the stem: both branches ('no_split'), or one
        decoder layer alone, that of the SSM ('ssm') or of attention ('attention').
      reads: the tokens whose keys and values, or inputs of the scan, a branch of a split block
        computes: its own ones ('own'), or all ('all'). Outputs are those of its own in any case.
      scope: 'context' plans for `model.context` tokens, and shorter sequences take the beginning of
        that plan; 'sequence' plans for each length separately, for parity with the authors' code,
        and cannot decode.
    """

    strategy: str = "fac_split"
    balance: str | float = "flops"
    align: int = 64
    period: int = 64
    shift: int | None = None
    stem: int = 0
    stem_kind: str = "no_split"
    reads: str = "own"
    scope: str = "context"

    def __post_init__(self):
        strategy = self.strategy_class
        if isinstance(self.balance, str):
            if self.balance not in BALANCES:
                raise ValueError(
                    f"model.split.balance must be {', '.join(BALANCES)} or attention's share of "
                    f"the tokens, a number between 0 and 1; got {self.balance!r:.80}."
                )
        elif not 0 < self.balance < 1:
            raise ValueError(
                "model.split.balance must be above 0 and below 1 where it is attention's share of "
                f"the tokens; got {self.balance}."
            )
        for name, known in (("scope", SCOPES), ("stem_kind", STEM_KINDS), ("reads", READS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f"model.split.{name} must be {' or '.join(known)}; got {value!r:.80}."
                )
        if self.scope == "context" and strategy.needs_sequence_scope:
            raise ValueError(
                f"model.split.scope must be 'sequence' for the strategy {self.strategy!r}, which "
                "exists for parity with the authors' code; got 'context'."
            )
        for name, least in (("align", 1), ("period", 3), ("stem", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"model.split.{name} must be at least {least}; got {getattr(self, name)}."
                )
        if self.stem_kind != "no_split" and not self.stem:
            raise ValueError(
                f"model.split.stem must be at least 1 for model.split.stem_kind "
                f"{self.stem_kind!r}; got 0."
            )
        if self.reads == "all" and self.balance == "time":
            raise ValueError(
                "model.split.balance must not be 'time' for model.split.reads 'all': `bench "
                "branches` measures branches that read their own tokens. Use 'flops'."
            )
        if self.reads == "all" and not strategy.is_split:
            raise ValueError(
                f"model.split.reads must be 'own' for the strategy {self.strategy!r}, whose "
                "branches get all tokens; got 'all'."
            )
        if self.reads == "all" and strategy.is_learned:
            raise ValueError(
                f"model.split.reads must be 'own' for the strategy {self.strategy!r}, which sends "
                "other positions of each sequence to attention; got 'all'."
            )
        if self.shift is not None and not 0 <= self.shift < self.period:
            raise ValueError(
                f"model.split.shift must be 0 to model.split.period - 1 = {self.period - 1}, or "
                f"None for half a run; got {self.shift}."
            )

    @property
    def strategy_class(self) -> type[Strategy]:
        """The strategy's class, which says whether it splits, uses the balance or is bounded."""
        return get_strategy(self.strategy)
