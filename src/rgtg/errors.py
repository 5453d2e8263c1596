"""Every error that rgtg raises on purpose. Each is a subclass of a built-in exception too, and has an exit code.

The message says what is wrong, what was expected and what to do.
"""


class RgtgError(Exception):
    """The base of all. The CLI prints the message without a traceback and exits with ``exit_code``."""

    exit_code = 1


class UsageError(RgtgError, ValueError):
    """A setting or argument cannot be used.

    Attributes:
        setting: its name in the message, for callers that know it by another name (clients of the server do).
    """

    exit_code = 2

    def __init__(self, *args: object, setting: str | None = None) -> None:
        super().__init__(*args)
        self.setting = setting


class DataError(RgtgError, ValueError):
    """A data file or a prompt cannot be used. The message names the file and line, if there is one.

    Attributes:
        row: which of the texts that were given, from 0, where there are several; the message names it too.
    """

    exit_code = 3

    def __init__(self, *args: object, row: int | None = None) -> None:
        super().__init__(*args)
        self.row = row


class PromptTooLongError(DataError):
    """A prompt and the requested new tokens do not fit the model's context."""


class UnknownTokenError(DataError):
    """A text holds a token for which a model that reads it has no embedding."""


class ModelNotFoundError(UsageError, FileNotFoundError):
    """A model folder or hub id cannot be loaded."""


class TokenizerMismatchError(UsageError):
    """Policy and scorer tokenize text differently, so token-wise scores would be meaningless."""


class MissingExtraError(UsageError, ImportError):
    """An optional dependency is not installed. The message names the pip command."""


class OutputError(RgtgError, OSError):
    """An output cannot be written."""


class NonFiniteError(RgtgError, ArithmeticError):
    """A loss or a score is NaN or infinite."""


class EndpointError(RgtgError, ConnectionError):
    """An endpoint cannot be reached, rejects requests or keeps failing. The message names its URL."""


class StoppedError(RgtgError):
    """The work was stopped on request and can be resumed."""

    exit_code = 75


class BusyError(RgtgError, BlockingIOError):
    """The server's queue is full; the request may succeed later."""


class NotServingError(RgtgError, ConnectionError):
    """The server is still loading its models, or is about to stop."""


class DeadlineError(RgtgError, TimeoutError):
    """A request exceeded its time limit."""


def of_row(error: DataError, row: int, total: int, what: str = "text") -> DataError:
    """The same error, saying which of several texts it is about.

    Example:
        >>> of_row(DataError("it is empty"), 1, 3)
        DataError('text 2 of 3: it is empty')
    """
    return type(error)(f"{what} {row + 1} of {total}: {error}", row=row) if total > 1 else error


def first_line(error: BaseException) -> str:
    """The first line of another library's error message, or the name of its class if the message is empty.

    Example:
        >>> first_line(KeyError()), first_line(ValueError("too long"))
        ('KeyError', 'too long')
    """
    return str(error).strip().partition("\n")[0] or type(error).__name__


def one_line(error: BaseException, limit: int = 300) -> str:
    """A whole error message on one line, cut at ``limit`` characters.

    Example:
        >>> one_line(ValueError("too  long"), 5)
        'too l'
    """
    return " ".join(str(error).split())[:limit]
