"""Prompts on their way in: one part of one of them is read in each turn, between the steps of all that decodes."""

from collections.abc import Callable

from rgtg.decoding.engine.prefix_cache import PrefixStore
from rgtg.errors import RgtgError
from rgtg.serving.engine.request import Ticket
from rgtg.serving.engine.sequence import Arrival, Solo, as_ours


class Prompts:
    """Rows that cannot take a step yet, and whose turn it is to read."""

    def __init__(self, chunk: int, store: PrefixStore) -> None:
        """``chunk`` tokens make a part; ``store`` keeps what was read for others that begin alike."""
        self.chunk, self.store = chunk, store
        self.unread: list[Arrival | Solo] = []
        self._turns = 0

    @property
    def rows(self) -> int:
        """Completions that wait for their prompt."""
        return sum(one.rows for one in self.unread)

    def read(self) -> Arrival | Solo | None:
        """One part: of the shortest prompt, and every fourth time of the one that waits longest.

        Returns:
            Whose prompt has been read to its end now; the caller takes it out of ``unread``.
        """
        if not self.unread:
            return None
        self._turns += 1
        one = self.unread[0] if self._turns % 4 == 0 else min(self.unread, key=lambda one: one.prompt.left)
        try:
            one.prompt.advance(self.chunk, self.store)
        except Exception as error:
            self.unread.remove(one)
            one.fail(as_ours(error))
            return None
        return None if one.prompt.left else one

    def drop(self, why_gone: Callable[[Ticket], RgtgError | None]) -> None:
        """End what is not continued, with the reason."""
        for one in list(self.unread):
            if (why := why_gone(one.ticket)) is not None:
                self.unread.remove(one)
                one.fail(why)
