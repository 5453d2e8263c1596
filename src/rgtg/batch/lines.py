"""Lines of an output and of its file of errors: records of rgtg, or results of an OpenAI batch."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Literal

from rgtg.batch.journal import Entry
from rgtg.batch.tasks import Done, Failed
from rgtg.data.prompts import BadRow, PromptRow
from rgtg.types.batch import RowFailure
from rgtg.types.generation import Completion

Shape = Literal["records", "openai"]
# Of a scorer with a tokenizer of its own; they are added up over a job.
COUNTED = ("candidates", "retokenised", "unscored")


def shape_of(asked: str, rows: Sequence[PromptRow]) -> Shape:
    """The shape of an output: as asked, or (``auto``) that of the prompts, if all of them are OpenAI batch lines."""
    if asked != "auto":
        return "openai" if asked == "openai" else "records"
    return "openai" if rows and all(row.endpoint is not None for row in rows) else "records"


def entry_of(done: Done, shape: Shape, model: str) -> Entry:
    """A finished task as the working file holds it.

    Args:
        done: the task and its completion.
        shape: of the output.
        model: name that an OpenAI line gives the policy.
    """
    completion = done.completion
    record = completion.model_dump_json() if shape == "records" else _openai_line(done, model)
    return Entry(done.task.index, record, tuple(getattr(completion, name) for name in COUNTED))


def failure_of(failed: Failed | BadRow) -> RowFailure:
    """What the file of errors says of a row."""
    if isinstance(failed, BadRow):
        return RowFailure(id=failed.id, line=failed.number, reason=failed.reason, error=failed.error)
    row = failed.task.row
    return RowFailure(id=row.id, line=row.number, reason=failed.reason, error=failed.error)


def failure_line(failure: RowFailure, shape: Shape) -> str:
    """A line of the file of errors."""
    if shape == "records":
        return failure.model_dump_json()
    error = {"code": failure.reason.replace(" ", "_"), "message": failure.error, "line": failure.line}
    name = failure.id if failure.id is not None else f"row-{failure.line}"
    about = {"id": f"batch_req_{_hash(name)}", "custom_id": failure.id, "response": None, "error": error}
    return json.dumps(about, ensure_ascii=False)


def id_of(line: bytes) -> str:
    """The row that a line of a finished output belongs to.

    Raises:
        ValueError: it is no such line.
    """
    row = json.loads(line)
    found = row.get("custom_id", row.get("id")) if isinstance(row, dict) else None
    if not isinstance(found, str):
        raise ValueError("no id")
    return found


def counts_of(line: bytes) -> tuple[int, ...]:
    """The figures of a line of a finished output that are added up."""
    row = json.loads(line)
    figures = row["response"]["body"]["rgtg"] if "response" in row else row
    return tuple(int(figures.get(name, 0)) for name in COUNTED)


def _openai_line(done: Done, model: str) -> str:
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
            "prompt_tokens": task.length,
            "completion_tokens": len(completion.token_ids),
            "total_tokens": task.length + len(completion.token_ids),
        },
        "rgtg": json.loads(completion.model_dump_json(exclude={"id", "text", "finish_reason"})),
    }
    response = {"status_code": 200, "request_id": f"req_{digest}", "body": body}
    about = {"id": f"batch_req_{digest}", "custom_id": task.row.id, "response": response, "error": None}
    return json.dumps(about, ensure_ascii=False)


def _choice(completion: Completion, chat: bool) -> dict[str, Any]:
    said = {"message": {"role": "assistant", "content": completion.text}} if chat else {"text": completion.text}
    return {"index": 0, **said, "logprobs": None, "finish_reason": completion.finish_reason}


def _hash(id: str) -> str:
    return hashlib.sha256(id.encode()).hexdigest()[:24]
