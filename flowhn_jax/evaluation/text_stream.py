"""Decode generated ids into text piece by piece, up to a stop string."""

from collections.abc import Sequence

from flowhn_jax.data.tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
_MAX_PENDING = 64  # tokens whose text is not final, as later ones may complete a character
_MAX_OPEN = 8  # tokens of one incomplete character


class TextStream:
    """The text of one generation.

    A piece is final, and returned, when later tokens can neither change it nor make it part of a
    stop string.

    Attributes:
      text: the final text so far, without a stop string.
      stopped: whether a stop string has ended the text; later tokens are ignored.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), before: Sequence[int] = ()):
        """Start a text that ends at any of the strings in `stop`.

        Args:
          tokenizer: decodes the ids.
          stop: strings that end the text.
          before: the last ids of the prompt; the space before the first token may depend on them.
        """
        self.text = ""
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(before)
        self._final = len(before)  # number of ids whose text is final
        self._context = 0  # index of the first id that the text of later ids may depend on
        self._returned = 0  # number of characters

    def push(self, token: int) -> str:
        """Append a token; return the text that has become final."""
        self._ids.append(token)
        return self._next_piece(wait=True)

    def finish(self) -> str:
        """Return the rest of the text; no more tokens follow."""
        return self._next_piece(wait=False)

    def _next_piece(self, wait: bool) -> str:
        """Return the text that has become final; hold back what may change if `wait`."""
        if self.stopped:
            return ""
        before = self._tokenizer.decode(self._ids[self._context : self._final])
        now = self._tokenizer.decode(self._ids[self._context :])
        # With byte tokens, a later token may undo an earlier character.
        if not now.startswith(before):
            self._context, before = self._final, ""
            now = self._tokenizer.decode(self._ids[self._context :])
        pending = len(self._ids) - self._final
        # The bytes of one character may be spread over several tokens.
        if not (wait and now.endswith(_REPLACEMENT)):
            self._finalize(len(self._ids), now[len(before) :])
        elif pending > _MAX_PENDING:
            end = self._start_of_open_character(now, pending)
            text = self._tokenizer.decode(self._ids[self._context : end])
            self._finalize(end, text[len(before) :])
        end_of_piece = len(self.text) - (self._held_back() if wait else 0)
        piece = self.text[self._returned : end_of_piece]
        self._returned = max(self._returned, end_of_piece)
        return piece

    def _start_of_open_character(self, now: str, pending: int) -> int:
        """Return the index from which on the last ids may be an incomplete character.

        They may be if they decode to one replacement character, and the text before it is the same
        without them.
        """
        for size in range(min(pending - 1, _MAX_OPEN), 0, -1):
            end = len(self._ids) - size
            if self._tokenizer.decode(self._ids[self._context : end]) + _REPLACEMENT == now:
                return end
        return len(self._ids)

    def _finalize(self, end: int, piece: str) -> None:
        """Make the ids up to `end` final, which adds `piece` to the text."""
        self._context, self._final = self._final, end
        longest = max(map(len, self._stop), default=0)
        start = max(0, len(self.text) - longest)
        self.text += piece
        found = [place for stop in self._stop if (place := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held_back(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
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
