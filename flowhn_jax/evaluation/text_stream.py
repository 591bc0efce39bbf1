"""Generated ids to text piece by piece, up to a stop string."""

from collections.abc import Sequence

from flowhn_jax.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 64  # tokens whose text is not settled, as later ones may complete a character
_MAX_OPEN = 8  # tokens of one character that is not complete


class TextStream:
    """The text of one generation.

    A piece is given out when later tokens can neither change it nor make it part of a stop string.

    Attributes:
      text: all that is settled so far, without a stop string.
      stopped: whether a stop string came; nothing is taken behind it.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()):
        """`before` are the last ids of the prompt: a token's space may depend on them."""
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(before)
        self._settled = len(before)  # ids whose text is settled,
        self._context = 0  # and of them the first that the next ones' text may depend on
        self._given = 0  # characters

    def push(self, token: int) -> str:
        """What one more token adds to what may be shown."""
        self._ids.append(token)
        return self._settle(wait=True)

    def finish(self) -> str:
        """What was held back; no token comes any more."""
        return self._settle(wait=False)

    def _settle(self, wait: bool) -> str:
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._ids[self._context : self._settled])
        now = self._tokenizer.decode(self._ids[self._context :])
        pending = len(self._ids) - self._settled
        # The bytes of one character may be several tokens.
        if not (wait and now.endswith(_REPLACEMENT)):
            self._take(len(self._ids), now[len(before) :])
        elif pending > _MAX_PENDING:
            end = self._before_open_character(now, pending)
            settled = self._tokenizer.decode(self._ids[self._context : end])
            self._take(end, settled[len(before) :])
        shown = len(self.text) - (self._held_back() if wait else 0)
        piece = self.text[self._given : shown]
        self._given = max(self._given, shown)
        return piece

    def _before_open_character(self, now: str, pending: int) -> int:
        """Return where the last ids begin that may be the beginning of a character.

        That is what they are where they make one replacement character together, and the ids
        ahead of them make the same text without them.
        """
        for size in range(min(pending - 1, _MAX_OPEN), 0, -1):
            end = len(self._ids) - size
            if self._tokenizer.decode(self._ids[self._context : end]) + _REPLACEMENT == now:
                return end
        return len(self._ids)

    def _take(self, end: int, piece: str) -> None:
        """Settle the ids up to `end`, whose new text is `piece`."""
        self._context, self._settled = self._settled, end
        self._append(piece)

    def _append(self, piece: str) -> None:
        longest = max(map(len, self._stop), default=0)
        start = max(0, len(self.text) - longest)
        self.text += piece
        found = [place for stop in self._stop if (place := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held_back(self) -> int:
        """Characters at the end that may be the beginning of a stop string."""
        if self.stopped:
            return 0
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, len(stop))
                if self.text.endswith(stop[:length])
            ),
            default=0,
        )
