"""``rgtg generate``: guided completions of one prompt or of a file of prompts."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import replace
from functools import partial
from io import StringIO
from typing import TYPE_CHECKING, Any

from rgtg.cli.common import Invocation, command, hush_libraries, resumable, write_json
from rgtg.cli.progress import job_bar, reading_bar
from rgtg.config import DecodingSettings, GenerateSettings
from rgtg.errors import RgtgError, UsageError
from rgtg.utils.files import refuse_overwriting

if TYPE_CHECKING:
    from rgtg.data.prompts import PromptFile
    from rgtg.types.batch import JobResult

_OF_FILES = "prompts output output_format batch_tokens batch_size on_bad force"
_OF_RAY = "ray address actors gpus_per_actor cpus_per_actor"
_SPLIT = ("tp_plan", "scorer_tp_plan")
_OF_TORCH = ("device", "scorer_device", "scorer_device_map", "cache_gguf", "threads")


@command(
    GenerateSettings,
    "policy scorer method beta top_k top_p temperature max_new_tokens min_new_tokens stop entropy_gate kl_budget n "
    "value_threshold abstain_below "
    "segment_length proposal reward_threshold draft draft_length prompt chat system chat_template_kwargs trace dtype "
    "device device_map tp_plan scorer_device scorer_device_map scorer_tp_plan cache_gguf engine threads",
    panels={"A file of prompts": _OF_FILES, "A file of prompts, on many machines": _OF_RAY},
)
def run(settings: GenerateSettings, invocation: Invocation) -> None:
    """Complete prompts with a frozen policy guided by a scorer.

    If a file of prompts was stopped or killed, the same command resumes it.

    [bold]Example[/bold]: rgtg generate --policy POLICY --scorer SCORER --beta 2 --prompt "Once upon a time"
    """
    _check_options(settings)
    if settings.output is not None:
        refuse_overwriting([("--config", invocation.config)], [settings.output])
    hush_libraries(forks=False)
    first = _is_first(settings)
    with nullcontext() if first else _silent():
        if settings.prompts and settings.output:
            _complete_file(settings, replace(invocation, quiet=invocation.quiet or not first), first=first)
        else:
            _complete_one(settings, invocation)


def _check_options(settings: GenerateSettings) -> None:
    if settings.policy is None:
        raise UsageError("--policy is required: a folder, GGUF file or hub id of a causal language model")
    if (settings.prompt is None) == (settings.prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE --output FILE")
    if (settings.prompts is None) != (settings.output is None):
        raise UsageError("--prompts and --output go together; --prompt prints to the terminal")
    if settings.prompts is None and (given := _given(settings, (*_OF_FILES.split(), "ray"))):
        raise UsageError(f"{', '.join(given)}: needs a file of prompts (--prompts)")
    if settings.system is not None and not settings.chat:
        raise UsageError("--system is the system message of a chat: add --chat")
    if settings.prompt is not None and settings.chat_template_kwargs and not settings.chat:
        raise UsageError("--chat-template-kwargs applies to chats, and the prompt is plain text: add --chat")
    if settings.ray and (given := _given(settings, _SPLIT)):
        raise UsageError(f"{', '.join(given)}: models are split among torchrun's processes, not among Ray's workers")
    if not settings.ray and (given := _given(settings, _OF_RAY.split())):
        raise UsageError(f"{', '.join(given)}: needs --ray")
    if settings.engine == "vllm":
        _check_vllm(settings)


def _check_vllm(settings: GenerateSettings) -> None:
    """Refuse what vLLM cannot carry before any worker starts it."""
    from rgtg.config.engines import require_carried, require_vllm

    if not settings.ray:
        raise UsageError(
            "--engine vllm completes files of prompts on Ray: add --ray; without Ray, vLLM's own server and batch "
            "command take guided requests (docs/vllm.md)"
        )
    wanted = {"traces": settings.trace, "drafts": settings.draft, "device_map and tp_plan": settings.device_map}
    for what in [settings.method, *(name for name, given in wanted.items() if given)]:
        require_carried("vllm", what)
    if given := _given(settings, _OF_TORCH):
        raise UsageError(f"{', '.join(given)}: vLLM chooses its devices and threads itself; leave it out")
    require_vllm("ray")


def _is_first(settings: GenerateSettings) -> bool:
    """Whether this is rank 0. If processes split a model, only rank 0 prints and writes; all of them raise errors."""
    if not _given(settings, _SPLIT):
        return True
    from rgtg.models.loading.tensor_parallel import is_main_process

    return is_main_process()


@contextmanager
def _silent() -> Iterator[None]:
    """Discard stdout and warnings, which rank 0 shows."""
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _given(settings: GenerateSettings, names: Sequence[str]) -> list[str]:
    """The settings that differ from their defaults."""
    return [name for name in names if getattr(settings, name) != GenerateSettings.model_fields[name].default]


def _complete_one(settings: GenerateSettings, invocation: Invocation) -> None:
    from rgtg.batch.tasks import given_decoding_settings, load_guided_policy

    guided, decoding = load_guided_policy(settings), given_decoding_settings(settings)
    assert settings.prompt is not None, "checked before anything is loaded"
    prompt: str | list[dict[str, Any]] = settings.prompt
    if settings.chat:
        from rgtg.data.prompts import chat_of

        _require_chat_template(guided.policy.tokenizer)
        prompt = chat_of(settings.prompt, settings.system)
    if invocation.as_json or settings.trace:
        (done,) = guided.generate(prompt, seed=settings.seed, trace=settings.trace, **decoding)
        sys.stdout.write(done.model_dump_json() + "\n")
        return
    pieces = guided.stream(prompt, seed=settings.seed, **decoding)
    first = next(pieces, "")  # errors are raised before anything is printed
    # a completion is shown after its prompt, the reply of a chat alone
    sys.stdout.write(("" if invocation.quiet or settings.chat else settings.prompt) + first)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _require_chat_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            "--chat: the policy's tokenizer has no chat template; leave --chat out, or set one in its "
            "tokenizer_config.json"
        )


def _complete_file(settings: GenerateSettings, invocation: Invocation, *, first: bool) -> None:
    from rgtg.batch.output import JobOutput
    from rgtg.data.prompts import raise_for_bad_rows, read_prompt_rows
    from rgtg.integrations.ray_cluster import require_ray

    assert settings.prompts is not None, "checked before anything is loaded"
    assert settings.output is not None, "checked before anything is loaded"
    refuse_overwriting([("--prompts", settings.prompts)], JobOutput(settings.output).files)
    if settings.ray:
        require_ray()
    with resumable("the same command resumes from the finished rows"):
        with reading_bar("reading", quiet=invocation.silent) as progress:
            prompts = read_prompt_rows(settings.prompts, chats=settings.chat, system=settings.system, progress=progress)
        if settings.on_bad == "error":  # before any model is loaded
            raise_for_bad_rows(prompts.source, prompts.bad, prompts.total)
        if first:
            JobOutput(settings.output).check(force=settings.force)
        with _ready(settings, prompts, first) as run, job_bar("generating", quiet=invocation.silent) as progress:
            result = run(progress=progress)
    if result is None:
        return
    _save_settings(settings, result)
    _summarise(result, settings, invocation)
    if result.undecoded:
        raise RgtgError(
            f"{result.undecoded} of {result.rows} rows failed during decoding: see "
            f"{JobOutput(settings.output).errors}; the same command tries them again"
        )


@contextmanager
def _ready(
    settings: GenerateSettings, prompts: "PromptFile", first: bool
) -> "Iterator[Callable[..., JobResult | None]]":
    """Load the models, here or in the workers of a Ray cluster, and yield a function that completes the prompts.

    On ranks other than the ``first`` one, which only help to decode, the function returns None.
    """
    if settings.ray:
        from rgtg.integrations.ray_batch import ray_job

        with redirect_stdout(sys.stderr), ray_job(settings, prompts) as run:  # Ray reports dead workers on stdout
            yield run
        return
    from rgtg.batch.run import follow_job, run_job
    from rgtg.batch.tasks import given_decoding_settings, load_guided_policy

    arguments = (settings, given_decoding_settings(settings), prompts, load_guided_policy(settings))
    if settings.chat:
        _require_chat_template(arguments[-1].policy.tokenizer)
    yield partial(run_job, *arguments) if first else lambda progress: follow_job(*arguments)


def _save_settings(settings: GenerateSettings, result: "JobResult") -> None:
    """Write the settings as they were used, without those that the method ignores. --config reads them back."""
    from rgtg.decoding.methods import find_method, foreign_settings

    used = {name: value for name, value in result.made_with.items() if name in DecodingSettings.model_fields}
    foreign = foreign_settings(find_method(settings.method))
    resolved = settings.model_dump(mode="json", exclude={"force"}) | used
    assert settings.output is not None, "checked before anything is loaded"
    path = settings.output.with_name(settings.output.name + ".settings.json")
    write_json(path, {name: value for name, value in resolved.items() if name not in foreign})


def _summarise(result: "JobResult", settings: GenerateSettings, invocation: Invocation) -> None:
    errors = f"{settings.output}.errors.jsonl"
    if invocation.as_json:
        counts = {name: n for name, n in result.counts.items() if n or result.counts["candidates"]}
        failed = {"failed": result.failed, "errors": errors} if result.failed else {}
        summary = {"rows": result.completions, "output": str(settings.output)} | failed | counts
        sys.stdout.write(json.dumps(summary) + "\n")
    elif not invocation.quiet:
        sys.stdout.write(f"{result.completions} completions in {settings.output}\n")
        if result.failed:
            sys.stdout.write(f"{result.failed} of {result.rows} rows have none, with reasons: {errors}\n")
        for line in _other_tokenizer(**result.counts):
            sys.stdout.write(line + "\n")


def _other_tokenizer(candidates: int, retokenised: int, unscored: int) -> list[str]:
    """Counts of a scorer with another tokenizer."""
    lines = []
    if candidates:
        lines.append(
            f"The scorer has its own tokenizer: {retokenised / candidates:.1%} of {candidates:,} candidates were "
            "not exactly one of its tokens (they are read as text)."
        )
    if unscored:
        lines.append(f"The scorer did not read {unscored:,} tokens because its context was full: they are not guided.")
    return lines
