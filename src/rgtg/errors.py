"""Every error rgtg raises on purpose: ours and the standard library's at once, with the CLI's exit code.

The text says what is wrong, what was expected and what to do.
"""


class RgtgError(Exception):
    """Work failed; the CLI prints the text without a traceback and exits with ``exit_code``."""

    exit_code = 1


class UsageError(RgtgError, ValueError):
    """A setting or argument is unusable.

    Attributes:
        setting: its name as the text has it, where callers may know it by another (the server's clients do).
    """

    exit_code = 2

    def __init__(self, *args: object, setting: str | None = None) -> None:
        super().__init__(*args)
        self.setting = setting


class DataError(RgtgError, ValueError):
    """A data file or a prompt is unusable; the text names the file and line where there is one."""

    exit_code = 3


class PromptTooLongError(DataError):
    """A prompt, with the tokens asked for, does not fit the model's context."""


class ModelNotFoundError(UsageError, FileNotFoundError):
    """A model folder or hub id cannot be loaded."""


class TokenizerMismatchError(UsageError):
    """Policy and scorer read text differently, so token-wise scores would be meaningless."""


class MissingExtraError(UsageError, ImportError):
    """An optional dependency is absent; the text names the pip command."""


class OutputError(RgtgError, OSError):
    """An output cannot be written."""


class NonFiniteError(RgtgError, ArithmeticError):
    """A loss or a score is NaN or infinite."""


class EndpointError(RgtgError, ConnectionError):
    """An endpoint cannot be reached, refuses, or keeps failing; the text names its URL."""


class StoppedError(RgtgError):
    """The work was stopped on request and can be resumed."""

    exit_code = 75


class BusyError(RgtgError, BlockingIOError):
    """The server's queue is full; the same request may succeed a little later."""


class NotServingError(RgtgError, ConnectionError):
    """The server is still loading its models, or takes in nothing more since it is about to stop."""


class DeadlineError(RgtgError, TimeoutError):
    """A request was not finished in its time."""


def first_line(error: BaseException) -> str:
    """What another library's error says first (the rest is often paragraphs), or its kind where it says nothing.

    Example:
        >>> first_line(KeyError()), first_line(ValueError("too long"))
        ('KeyError', 'too long')
    """
    return str(error).strip().partition("\n")[0] or type(error).__name__
