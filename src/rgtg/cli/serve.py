"""``rgtg serve``: an OpenAI-compatible server with guidance per request, and a page to try it."""

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from rgtg.cli.common import AsJson, Config, Overrides, Quiet, Seed, hush_libraries, verb
from rgtg.errors import MissingExtraError

if TYPE_CHECKING:
    from rgtg.serving.engine.models import ServedModels

_LIMITS = "Limits"
_ACCESS = "Access"


@verb
def run(
    policy: Annotated[str | None, typer.Option(help="frozen language model: folder, GGUF file or hub id")] = None,
    scorer: Annotated[
        list[str] | None, typer.Option(metavar="NAME=FOLDER", help="a scorer that requests can name; repeatable")
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(help="name of the policy in requests; default: its folder's name")
    ] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on; default: 127.0.0.1")] = None,
    port: Annotated[int | None, typer.Option(help="0 picks a free port; default: 8000")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")] = None,
    scorer_device: Annotated[str | None, typer.Option(help="device of separate scorers; default: the policy's")] = None,
    cache_gguf: Annotated[
        bool, typer.Option("--cache-gguf", help="policy is a GGUF file: keep its conversion to bf16 beside it")
    ] = False,
    engine: Annotated[
        str | None,
        typer.Option(metavar="auto|torch|llama-cpp", help="auto: llama.cpp for a GGUF file where it is installed"),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="threads that compute; default: all cores")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="key that clients must send; safer in the environment: RGTG_API_KEY", rich_help_panel=_ACCESS
        ),
    ] = None,
    allow_public: Annotated[
        bool,
        typer.Option(
            "--allow-public", help="allow an address other than loopback without a key", rich_help_panel=_ACCESS
        ),
    ] = False,
    allowed_host: Annotated[
        list[str] | None, typer.Option(help="another accepted Host header; repeatable", rich_help_panel=_ACCESS)
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="web origin whose pages may call the server; repeatable", rich_help_panel=_ACCESS),
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(help="requests that can wait; default: 64", rich_help_panel=_LIMITS)
    ] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="sequences decoded together; default: 16", rich_help_panel=_LIMITS)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="largest max_tokens of a request; default: 4096", rich_help_panel=_LIMITS)
    ] = None,
    request_seconds: Annotated[
        float | None,
        typer.Option(help="time limit of a request, queue included; default: 600", rich_help_panel=_LIMITS),
    ] = None,
    drain_seconds: Annotated[
        float | None,
        typer.Option(help="time limit of accepted requests after SIGTERM; default: 30", rich_help_panel=_LIMITS),
    ] = None,
    config: Config = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    seed: Seed = None,
) -> None:
    """Serve a policy and scorers behind OpenAI's API, with guidance per request and a page at /.

    Settings can also come from the environment (RGTG_PORT), a YAML file, or --set; see docs/http-api.md.

    [bold]Example[/bold]: rgtg serve --policy POLICY --scorer helpful=SCORER --port 8000
    """
    given = locals()
    try:
        from rgtg.serving.settings import ServeSettings
    except ImportError as error:
        raise MissingExtraError("rgtg serve needs its extra: pip install 'rgtg[serve]'") from error
    # 0 is a value (port, max_queue); an empty list and False are options that were not given
    flags = {k: v for k, v in given.items() if k in ServeSettings.model_fields and v != [] and v is not False}
    settings = ServeSettings.resolve(config, overrides, flags)
    hush_libraries()
    try:
        from rgtg.serving.server import log_to_stderr, serve
    except ImportError as error:
        raise MissingExtraError("rgtg serve needs its extra: pip install 'rgtg[serve]'") from error
    log_to_stderr(errors_only=quiet or settings.log == "errors")

    def ready(url: str, models: "ServedModels") -> None:
        names = [models.policy_name, *models.scorers]
        if as_json:
            line = json.dumps({"url": url, "policy": models.policy_name, "scorers": list(models.scorers)})
        else:
            scorers = ", ".join(names[1:]) or "no scorers"
            line = f"ready: {url} serves {names[0]} with {scorers}; the page is at {url}/"
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    serve(settings, ready)
