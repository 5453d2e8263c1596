"""Settings of ``rgtg judge``."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr

from rgtg.config.base import Settings


class JudgeSettings(Settings):
    """``rgtg judge``: which completions meet, which model judges them, and what that may cost."""

    model: str = Field(description="name of the judge at the endpoint")
    base_url: str | None = Field(None, description="of the endpoint; default: OPENAI_BASE_URL, else OpenAI's own")
    api_key: SecretStr | None = Field(None, exclude=True, description="default: OPENAI_API_KEY; never written anywhere")
    a: str | None = Field(None, description="completions: FILE or NAME=FILE")
    b: str | None = Field(None, description="completions of the same prompts: FILE or NAME=FILE")
    completions: list[str] = Field(default_factory=list, description="FILE, NAME=FILE or an output folder of compare")
    pairs: str | None = Field(None, description="preference pairs: how often the judge agrees with them")
    on_bad: Literal["error", "skip"] = "error"
    baseline: str | None = Field(None, description="judge the others against this one only; default: every two")
    limit: int | None = Field(None, ge=1, description="use only the first prompts")
    output: Path
    cache: Path | None = Field(None, description="file of paid answers; default: answers.jsonl in the output folder")
    prompt_file: Path | None = Field(None, description="a prompt of your own with {prompt}, {first} and {second}")
    temperature: float | None = Field(0.0, ge=0, description="none leaves it out of the request")
    max_tokens: int | None = Field(512, ge=1, description="longest answer; none leaves it out of the request")
    request: dict[str, Any] = Field(default_factory=dict, description="more fields of the request, as the server knows")
    concurrency: int = Field(8, ge=1, le=256, description="calls under way at once")
    timeout: float = Field(120.0, gt=0, description="seconds for one answer")
    retries: int = Field(
        5, ge=0, le=20, description="of a call, after 408, 409, 429, 5xx, a timeout or a lost connection"
    )
    answer_retries: int = Field(2, ge=0, le=10, description="of an answer without one clear verdict")
    price_in: float | None = Field(None, ge=0, description="price of a million tokens read")
    price_out: float | None = Field(None, ge=0, description="price of a million tokens written")
    bootstrap: int = Field(1000, ge=100)
    dry_run: bool = False

    @property
    def answers(self) -> Path:
        """Where paid answers are kept."""
        return self.cache or self.output / "answers.jsonl"
