"""``rgtg generate``: guided completions of one prompt, on the terminal, or of a file of prompts."""

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgtg.cli.common import (
    AsJson,
    Config,
    Overrides,
    Quiet,
    Seed,
    hush_libraries,
    refuse_overwriting,
    resumable,
    verb,
    write_json,
)
from rgtg.cli.progress import job_bar, reading_bar
from rgtg.config import DecodingSettings, GenerateSettings
from rgtg.errors import RgtgError, UsageError

if TYPE_CHECKING:
    from rgtg.data.prompts import PromptFile
    from rgtg.types.batch import JobResult

_FILE = "A file of prompts"
_RAY = "A file of prompts, on many machines"
_OF_FILES = ("batch_size", "batch_tokens", "on_bad", "output_format", "force", "ray")
_SPLIT = ("tp_plan", "scorer_tp_plan")
_OF_RAY = ("address", "actors", "gpus_per_actor", "cpus_per_actor")


@verb
def command(
    policy: Annotated[str | None, typer.Option(help="Frozen language model: folder or hub id.")] = None,
    scorer: Annotated[
        list[str] | None, typer.Option(help="What steers it: folder or hub id; repeatable, with a --beta each.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="A row of rgtg methods. Default pargs.")] = None,
    beta: Annotated[
        list[float] | None, typer.Option(help="Guidance strength; multiplies the score. Default 1.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Candidates per step. Default: the method's (10 for most).")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus of the candidates.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Of the guided distribution; 0 is greedy.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Default 64.")] = None,
    min_new_tokens: Annotated[int | None, typer.Option(help="Default 0.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends a completion; repeatable.")] = None,
    entropy_gate: Annotated[
        float | None, typer.Option(help="Steer only where the policy's entropy exceeds this, in nats.")
    ] = None,
    n: Annotated[
        int | None, typer.Option(help="Draws of best-of-n, or of cd-blockwise per segment. Default 10.")
    ] = None,
    segment_length: Annotated[
        int | None, typer.Option(help="Tokens of a segment: cd-blockwise (16), cards (at most 64).")
    ] = None,
    reward_threshold: Annotated[
        float | None, typer.Option(help="cards: reward that a finished completion should reach.")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="Speculate, exactly: policy, prompt-lookup, or a small model's folder.")
    ] = None,
    draft_length: Annotated[int | None, typer.Option(help="Tokens drafted at once. Default: adapts.")] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt; the completion streams to the terminal.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL, an OpenAI batch or Parquet; needs --output.", rich_help_panel=_FILE)
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="JSONL of completions; a stopped run is continued.", rich_help_panel=_FILE)
    ] = None,
    output_format: Annotated[
        str | None, typer.Option(help="records or openai. Default: as the prompts are.", rich_help_panel=_FILE)
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens decoded together at most. Default 8192.", rich_help_panel=_FILE)
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Prompts decoded together at most.", rich_help_panel=_FILE)
    ] = None,
    on_bad: Annotated[
        str | None,
        typer.Option(metavar="error|skip", help="Refuse bad rows, or list them as errors.", rich_help_panel=_FILE),
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace an output of other settings, or a damaged one.", rich_help_panel=_FILE),
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Complete it by workers of a Ray cluster.", rich_help_panel=_RAY)
    ] = False,
    address: Annotated[
        str | None,
        typer.Option(help="HOST:PORT of its head node, or auto. Default: one on this machine.", rich_help_panel=_RAY),
    ] = None,
    actors: Annotated[
        int | None, typer.Option(help="Workers. Default: what the GPUs allow, else one per node.", rich_help_panel=_RAY)
    ] = None,
    gpus_per_actor: Annotated[
        float | None, typer.Option(help="Default: 1 where there are GPUs.", rich_help_panel=_RAY)
    ] = None,
    cpus_per_actor: Annotated[
        int | None, typer.Option(help="Default: 1 beside a GPU, else an equal share.", rich_help_panel=_RAY)
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Keep every candidate's figures of every step.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")] = None,
    device_map: Annotated[
        str | None, typer.Option(help="In place of --device: auto spreads the policy over GPUs, memory and disk.")
    ] = None,
    tp_plan: Annotated[
        str | None, typer.Option(help="In place of both: auto splits the policy's layers among torchrun's processes.")
    ] = None,
    scorer_device: Annotated[str | None, typer.Option(help="Of a separate scorer; default the policy's.")] = None,
    scorer_device_map: Annotated[str | None, typer.Option(help="Of a separate scorer, as --device-map.")] = None,
    scorer_tp_plan: Annotated[str | None, typer.Option(help="Of a separate scorer, as --tp-plan.")] = None,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """Complete prompts with a frozen policy steered by a scorer.

    A file of prompts that was stopped, or killed, goes on where it was when the same command is given again.

    [bold]Example[/bold]: rgtg generate --policy POLICY --scorer SCORER --beta 2 --prompt "Once upon a time"
    """
    given = locals()  # 0 is a value (temperature, beta); an absent list or switch is not
    flags = {k: v for k, v in given.items() if k in GenerateSettings.model_fields and v != [] and v is not False}
    for name in ("scorer", "beta"):  # one is one, not a list of one
        if isinstance(one := flags.get(name), list) and len(one) == 1:
            flags[name] = one[0]
    settings = GenerateSettings.resolve(config, overrides, flags)
    _require_target(settings)
    if settings.output is not None:
        refuse_overwriting([("--config", config)], [settings.output])
    hush_libraries(forks=False)
    first = _is_first(settings)
    with nullcontext() if first else _silent():
        if settings.prompts and settings.output:
            _complete_file(settings, as_json=as_json, quiet=quiet or not first, first=first)
        else:
            _complete_one(settings, as_json=as_json, quiet=quiet)


def _require_target(settings: GenerateSettings) -> None:
    if settings.policy is None:
        raise UsageError("--policy is required: a folder or hub id of a causal language model")
    if (settings.prompt is None) == (settings.prompts is None):
        raise UsageError("give either --prompt TEXT or --prompts FILE --output FILE")
    if (settings.prompts is None) != (settings.output is None):
        raise UsageError("--prompts and --output go together; --prompt prints to the terminal")
    if settings.prompts is None and (given := _given(settings, _OF_FILES)):
        raise UsageError(f"{', '.join(given)}: only a file of prompts (--prompts) uses it")
    if settings.ray and (given := _given(settings, _SPLIT)):
        raise UsageError(f"{', '.join(given)}: models are split among torchrun's processes, not among Ray's workers")
    if not settings.ray and (given := _given(settings, _OF_RAY)):
        raise UsageError(f"{', '.join(given)}: only --ray uses it")


def _is_first(settings: GenerateSettings) -> bool:
    """Of processes that split a model only the first prints and writes; errors are every process's own."""
    if not _given(settings, _SPLIT):
        return True
    from rgtg.models.loading.tensor_parallel import is_main_process

    return is_main_process()


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing on stdout, and no warnings, which the first process gives."""
    with redirect_stdout(StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _given(settings: GenerateSettings, names: tuple[str, ...]) -> list[str]:
    """Which of these settings are not at their default."""
    return [name for name in names if getattr(settings, name) != GenerateSettings.model_fields[name].default]


def _complete_one(settings: GenerateSettings, *, as_json: bool, quiet: bool) -> None:
    from rgtg.batch.tasks import given_decoding_settings, load_guided_policy

    guided, decoding = load_guided_policy(settings), given_decoding_settings(settings)
    assert settings.prompt is not None, "checked before anything is loaded"
    if as_json or settings.trace:
        (done,) = guided.generate(settings.prompt, seed=settings.seed, trace=settings.trace, **decoding)
        sys.stdout.write(done.model_dump_json() + "\n")
        return
    pieces = guided.stream(settings.prompt, seed=settings.seed, **decoding)
    first = next(pieces, "")  # errors come before anything is printed
    sys.stdout.write(("" if quiet else settings.prompt) + first)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _complete_file(settings: GenerateSettings, *, as_json: bool, quiet: bool, first: bool) -> None:
    from rgtg.batch.output import JobOutput
    from rgtg.data.prompts import raise_for_bad_rows, read_prompt_rows
    from rgtg.integrations.ray_cluster import require_ray

    assert settings.prompts is not None, "checked before anything is loaded"
    assert settings.output is not None, "checked before anything is loaded"
    refuse_overwriting([("--prompts", settings.prompts)], JobOutput(settings.output).files)
    if settings.ray:
        require_ray()
    with resumable("the same command goes on from the rows that are finished"):
        with reading_bar("reading", quiet=quiet or as_json) as progress:
            prompts = read_prompt_rows(settings.prompts, progress=progress)
        if settings.on_bad == "error":  # before any model is loaded
            raise_for_bad_rows(prompts.source, prompts.bad, prompts.total)
        if first:
            JobOutput(settings.output).check(force=settings.force)
        with _ready(settings, prompts, first) as run, job_bar("generating", quiet=quiet or as_json) as tell:
            result = run(progress=tell)
    if result is None:
        return
    _save_settings(settings, result)
    _say(result, settings, as_json=as_json, quiet=quiet)
    if result.undecoded:
        raise RgtgError(
            f"{result.undecoded} of {result.rows} rows failed while they were decoded: see "
            f"{JobOutput(settings.output).errors}; the same command tries them again"
        )


@contextmanager
def _ready(
    settings: GenerateSettings, prompts: "PromptFile", first: bool
) -> "Iterator[Callable[..., JobResult | None]]":
    """Models loaded, in this process or in workers of a Ray cluster; yields what completes the prompts with them.

    Where it is not the ``first`` of those that split a model, it only helps, and has no result.
    """
    if settings.ray:
        from rgtg.integrations.ray_batch import on_ray

        with redirect_stdout(sys.stderr), on_ray(settings, prompts) as run:  # Ray tells of deaths on stdout
            yield run
        return
    from rgtg.batch.run import follow_job, run_job
    from rgtg.batch.tasks import given_decoding_settings, load_guided_policy

    arguments = (settings, given_decoding_settings(settings), prompts, load_guided_policy(settings))
    yield partial(run_job, *arguments) if first else lambda progress: follow_job(*arguments)


def _save_settings(settings: GenerateSettings, result: "JobResult") -> None:
    """The settings as they were used, without those that the method does not have: --config reads them back."""
    from rgtg.decoding.methods import find_method, foreign_settings

    used = {name: value for name, value in result.made_with.items() if name in DecodingSettings.model_fields}
    foreign = foreign_settings(find_method(settings.method))
    whole = settings.model_dump(mode="json", exclude={"force"}) | used
    assert settings.output is not None, "checked before anything is loaded"
    path = settings.output.with_name(settings.output.name + ".settings.json")
    write_json(path, {name: value for name, value in whole.items() if name not in foreign})


def _say(result: "JobResult", settings: GenerateSettings, *, as_json: bool, quiet: bool) -> None:
    errors = f"{settings.output}.errors.jsonl"
    if as_json:
        said = {name: n for name, n in result.counts.items() if n or result.counts["candidates"]}
        failed = {"failed": result.failed, "errors": errors} if result.failed else {}
        summary = {"rows": result.completions, "output": str(settings.output)} | failed | said
        sys.stdout.write(json.dumps(summary) + "\n")
    elif not quiet:
        sys.stdout.write(f"{result.completions} completions in {settings.output}\n")
        if result.failed:
            sys.stdout.write(f"{result.failed} of {result.rows} rows have none, with reasons: {errors}\n")
        for line in _other_tokenizer(**result.counts):
            sys.stdout.write(line + "\n")


def _other_tokenizer(candidates: int, retokenised: int, unscored: int) -> list[str]:
    """What is worth knowing of a scorer with a tokenizer of its own."""
    lines = []
    if candidates:
        lines.append(
            f"The scorer has a tokenizer of its own: {retokenised / candidates:.1%} of {candidates:,} candidates were "
            "not exactly one of its tokens (they are read as text)."
        )
    if unscored:
        lines.append(f"The scorer did not read {unscored:,} tokens, since its context was full: they are not steered.")
    return lines
