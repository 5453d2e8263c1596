"""A job of processes that split models: the first one keeps the books, and all of them decode the batches it names."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rgtg.batch.tasks import Batch, Outcome
from rgtg.models.loading.tensor_parallel import broadcast_object

# As `rgtg.batch.run.Complete`.
_Complete = Callable[[Sequence[Batch]], Iterator[list[Outcome]]]


@contextmanager
def leading(here: _Complete) -> Iterator[_Complete]:
    """In the first process: what completes batches here and in all the others, which wait in `follow`.

    They are told which batches once, and that there are none where the block ends without any, or with an error of its
    own. A process that was interrupted tells nobody: the others were too.
    """
    told = False

    def complete(batches: Sequence[Batch]) -> Iterator[list[Outcome]]:
        nonlocal told
        told = True
        broadcast_object(list(batches))
        yield from here(batches)

    try:
        yield complete
    except Exception:
        if not told:
            broadcast_object([])
        raise
    if not told:
        broadcast_object([])


def follow(here: _Complete) -> None:
    """In the other processes: complete what the first one completes; what comes of it is the first one's to keep."""
    for _ in here(broadcast_object(None)):
        pass
