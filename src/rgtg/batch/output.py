"""The files of a job: its output, the files beside it, and their lines, as rgtg records or OpenAI batch results."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from rgtg.batch.journal import Journal, JournalEntry, mismatch
from rgtg.batch.tasks import CompletedTask, FailedTask
from rgtg.data.prompts import BadRow, PromptRow
from rgtg.errors import OutputError, RgtgError, UsageError
from rgtg.types.base import FileChecksum
from rgtg.types.batch import JobResult, RowFailure
from rgtg.types.generation import OPENAI_FINISH_REASONS, Completion
from rgtg.utils.files import atomic_write, file_checksum, make_folder, sync_file

OutputFormat = Literal["records", "openai"]
# Counts of a scorer with another tokenizer than the policy's, summed over the job.
COUNTS = ("candidates", "retokenised", "unscored")
# Fields of a completion that an OpenAI line holds elsewhere, or that its request holds.
_ELSEWHERE = {"id", "text", "finish_reason", "messages", "chat_template_kwargs"}
_ANOTHER = "give another --output, or --force to replace it"


@dataclass(frozen=True)
class JobOutput:
    """The files of one job, named after its output."""

    path: Path

    @property
    def journal(self) -> Path:
        """Finished rows while the job is running."""
        return self._beside("partial")

    @property
    def errors(self) -> Path:
        """Rows that have no completion."""
        return self._beside("errors.jsonl")

    @property
    def result(self) -> Path:
        """The `JobResult`: what the finished output was made from."""
        return self._beside("job.json")

    @property
    def settings(self) -> Path:
        """The resolved settings."""
        return self._beside("settings.json")

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that the job may write or remove."""
        return self.path, self.journal, self.errors, self.result, self.settings

    def check(self, *, force: bool) -> None:
        """Check before any work that the output can and may be written.

        Raises:
            OutputError: its folder cannot be made or written, it is a folder, or read-only.
            UsageError: it exists and no job made it, without ``force``.
        """
        make_folder(self.path.parent)
        if self.path.is_dir():
            raise OutputError(f"cannot write {self.path}: it is a folder; give a file name")
        if not self.path.exists():
            return
        try:  # a rename would replace the file even if it is read-only
            self.path.open("ab").close()
        except OSError as error:
            raise OutputError(f"cannot write {self.path}: {error.strerror}; choose another --output") from error
        if not self.journal.exists() and self._read_result() is None and not force:
            raise UsageError(f"{self.path} exists, and no job made it: {_ANOTHER}")

    def find_finished(self, made_with: dict[str, Any], *, force: bool) -> JobResult | None:
        """Return the result if this job is finished already; None if there is none, or ``force`` replaces it.

        The output is read and checked, about a second per gigabyte, so that a damaged one does not count as finished.

        Raises:
            UsageError: the output belongs to another job, or has changed since the job wrote it, without ``force``.
            OutputError: the output cannot be read.
        """
        if not self.path.exists() or self.journal.exists():  # the header of the journal says whose it is
            return None
        result = self._read_result()
        if result is None:  # check() has allowed it
            return None
        problem = mismatch(made_with, result.made_with, str(self.path), _ANOTHER) or self._damage(result)
        if problem is not None and not force:
            raise problem
        return result if problem is None else None

    def copy_to_journal(self, journal: Journal, indices: dict[str, int]) -> None:
        """Copy the rows of the finished output to a new journal, so that the rows that failed can be tried again.

        Args:
            journal: of the same job, empty.
            indices: id of each row that can be completed → its index.

        Raises:
            UsageError: the output has changed since the job wrote it.
        """
        with self.path.open("rb") as file:
            while lines := list(islice(file, 1000)):
                try:
                    entries = [_read_entry(line, indices) for line in lines]
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise UsageError(
                        f"{self.path} was changed after the job wrote it: move it away to make it again"
                    ) from error
                journal.append(entries)

    def write(
        self, journal: Journal, failures: Sequence[RowFailure], result: JobResult, output_format: OutputFormat
    ) -> JobResult:
        """Write the files of the finished job atomically, and delete the journal last.

        Returns:
            The result, with the checksum of the output.

        Raises:
            OutputError: a file cannot be written; the journal stays.
            RgtgError: the numbers of rows do not add up, which is a bug.
        """
        try:
            if failures:
                _write_lines(self.errors, (failure_line(failure, output_format).encode() for failure in failures))
            else:
                self.errors.unlink(missing_ok=True)
            count, content = _write_lines(self.path, (line for _, line in journal.records()))
            if count != result.completions or count + len(failures) != result.rows:
                raise RgtgError(
                    f"{result.rows} rows became {count} completions and {len(failures)} failures: they do not add up. "
                    f"This is a bug of rgtg; {journal.path} holds the completions"
                )
            result = result.model_copy(update={"content": content})
            _write_lines(self.result, [result.model_dump_json(indent=2).encode()])
        except OSError as error:
            size = journal.path.stat().st_size
            raise OutputError(
                f"{error}; all {journal.finished} finished rows are kept in {journal.path}, and the same command "
                f"resumes from them once there is room for the output beside it, at most {-(-size // 10**6):,} MB more"
            ) from error
        journal.remove()
        return result

    def _damage(self, result: JobResult) -> UsageError | None:
        """The error for an output that differs from what the job wrote; None if it does not."""
        written, found = result.content, ""
        try:
            if written is None:  # an early rgtg kept only the number of lines
                with self.path.open("rb") as file:
                    lines = sum(line.endswith(b"\n") for line in file)
                if lines != result.completions:
                    found = f"{lines} lines there, {result.completions} written"
            elif (there := file_checksum(self.path)) != written:
                found = f"SHA-256 {there.sha256[:12]}… there, {written.sha256[:12]}… written"
                if there.bytes != written.bytes:
                    found = f"{there.bytes:,} bytes there, {written.bytes:,} written"
        except OSError as error:
            raise OutputError(f"cannot read {self.path}: {error.strerror or error}") from error
        if not found:
            return None
        return UsageError(f"{self.path} was changed after the job wrote it ({found}): {_ANOTHER}")

    def _read_result(self) -> JobResult | None:
        try:
            return JobResult.model_validate_json(self.result.read_bytes())
        except (OSError, ValidationError):
            return None

    def _beside(self, kind: str) -> Path:
        return self.path.with_name(f"{self.path.name}.{kind}")


def _write_lines(path: Path, lines: Iterable[bytes]) -> tuple[int, FileChecksum]:
    """Write a file atomically and sync it to the disk. Return its number of lines and its checksum."""
    count, size, digest = 0, 0, hashlib.sha256()
    with atomic_write(path) as partial, partial.open("wb") as file:
        for count, line in enumerate(lines, start=1):  # noqa: B007
            size += file.write(line + b"\n")
            digest.update(line + b"\n")
        sync_file(file)
    return count, FileChecksum(bytes=size, sha256=digest.hexdigest())


def choose_output_format(asked: str, rows: Sequence[PromptRow]) -> OutputFormat:
    """The format of an output: as asked; ``auto`` is OpenAI's if all prompts are OpenAI batch lines, else records."""
    if asked != "auto":
        return "openai" if asked == "openai" else "records"
    return "openai" if rows and all(row.endpoint is not None for row in rows) else "records"


def journal_entry(done: CompletedTask, output_format: OutputFormat, model: str) -> JournalEntry:
    """A completed task as the journal holds it.

    Args:
        done: the task and its completion.
        output_format: of its line.
        model: the policy's name in an OpenAI line.
    """
    completion = done.completion
    record = completion.model_dump_json() if output_format == "records" else _openai_line(done, model)
    return JournalEntry(done.task.index, record, tuple(getattr(completion, name) for name in COUNTS))


def row_failure(failed: FailedTask | BadRow) -> RowFailure:
    """A row without a completion as the file of errors holds it."""
    row = failed if isinstance(failed, BadRow) else failed.task.row
    return RowFailure(id=row.id, line=row.number, reason=failed.reason, error=failed.error)


def failure_line(failure: RowFailure, output_format: OutputFormat) -> str:
    """A line of the file of errors."""
    if output_format == "records":
        return failure.model_dump_json()
    error = {"code": failure.reason.replace(" ", "_"), "message": failure.error, "line": failure.line}
    name = failure.id if failure.id is not None else f"row-{failure.line}"
    about = {"id": f"batch_req_{_hash(name)}", "custom_id": failure.id, "response": None, "error": error}
    return json.dumps(about, ensure_ascii=False)


def _read_entry(line: bytes, indices: dict[str, int]) -> JournalEntry:
    """Read a line of a finished output back.

    Raises:
        ValueError, KeyError, TypeError, RecursionError: it is not a line of this job.
    """
    row = json.loads(line)
    counts = row["response"]["body"]["rgtg"] if "response" in row else row
    index = indices[row["custom_id"] if "custom_id" in row else row["id"]]
    return JournalEntry(index, line.decode().rstrip("\n"), tuple(int(counts.get(name, 0)) for name in COUNTS))


def _openai_line(done: CompletedTask, model: str) -> str:
    """A result as OpenAI's batch API gives it; ``created`` is 0, so that the same job gives the same bytes."""
    task, completion = done.task, done.completion
    digest = _hash(task.row.id)
    chat = task.row.endpoint == "chat" or (task.row.endpoint is None and isinstance(task.row.prompt, list))
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{digest}",
        "object": "chat.completion" if chat else "text_completion",
        "created": 0,
        "model": model,
        "choices": [_choice(completion, chat)],
        "usage": {
            "prompt_tokens": task.prompt_tokens,
            "completion_tokens": len(completion.token_ids),
            "total_tokens": task.prompt_tokens + len(completion.token_ids),
        },
        "rgtg": json.loads(completion.model_dump_json(exclude=_ELSEWHERE)),
    }
    response = {"status_code": 200, "request_id": f"req_{digest}", "body": body}
    about = {"id": f"batch_req_{digest}", "custom_id": task.row.id, "response": response, "error": None}
    return json.dumps(about, ensure_ascii=False)


def _choice(completion: Completion, chat: bool) -> dict[str, Any]:
    text = {"message": {"role": "assistant", "content": completion.text}} if chat else {"text": completion.text}
    reason = OPENAI_FINISH_REASONS[completion.finish_reason]
    return {"index": 0, **text, "logprobs": None, "finish_reason": reason}


def _hash(id: str) -> str:
    return hashlib.sha256(id.encode()).hexdigest()[:24]
