"""The server on Ray Serve gives the same answers, errors and streams as the local one, from any replica."""

import importlib.util
import os
import re
import socket
from pathlib import Path

import httpx2 as httpx
import pytest
import yaml

from helpers.ray_world import save_models
from helpers.served import Served, close, events_of
from helpers.served import settings as local_settings
from rgtg.config import GenerateSettings
from rgtg.errors import NotServingError, UsageError
from rgtg.integrations.ray_cluster import connect_ray

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is absent: pip install '.[ray]'"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's processes outlive their handles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Ray Serve's own settings are pydantic's old ones
]
KEY = {"Authorization": "Bearer secret"}
ASK = {"model": "policy", "prompt": "ab cd", "max_tokens": 12, "seed": 5, "temperature": 1.0}
GUIDED = ASK | {"guidance": {"scorers": {"kind": 2.0}}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("ray-serve"))


@pytest.fixture(scope="module")
def models(folder):
    return {"policy": str(folder / "policy"), "scorer": f"kind={folder / 'scorer'}", "device": "cpu"}


@pytest.fixture(scope="module")
def url(models):
    """Two replicas behind a proxy."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "cpu_count", lambda: 2)
        with connect_ray(GenerateSettings(ray=True, actors=2, cpus_per_actor=1)):
            from ray import serve

            from rgtg.integrations.ray_serve import app

            serve.start(http_options={"host": "127.0.0.1", "port": port}, logging_config={"log_level": "ERROR"})
            limits = {"api_key": "secret", "max_body_kib": 8, "max_tokens": 64}
            serve.run(app(models | limits | {"replicas": 2}), name="rgtg")
            about = serve.status().applications["rgtg"].deployments["Guided"]
            assert about.replica_states == {"RUNNING": 2}
            yield f"http://127.0.0.1:{port}"
            serve.shutdown()


@pytest.fixture(scope="module")
def local(models):
    served = Served.of(local_settings(**models, max_tokens=64))
    yield served
    served.close()


@pytest.mark.parametrize("body", [ASK, GUIDED])
def test_the_answer_equals_that_of_the_local_engine(url, local, body):
    here = local.post("/v1/completions", **body).json()
    assert here["choices"][0]["text"], here
    for _ in range(4):  # by either replica
        there = httpx.post(f"{url}/v1/completions", json=body, headers=KEY, timeout=60).json()
        assert close(*(one | {"id": "", "created": 0} for one in (here, there))), there


def test_streams_pass_through_the_proxy(url, local):
    body = GUIDED | {"stream": True}
    there, ended = events_of(httpx.post(f"{url}/v1/completions", json=body, headers=KEY, timeout=60))
    here = local.post("/v1/completions", **GUIDED).json()
    assert ended
    assert len(there) > 3
    assert "".join(one["choices"][0]["text"] for one in there) == here["choices"][0]["text"]


def test_key_and_limits_apply(url):
    assert httpx.get(f"{url}/readyz").json()["status"] == "ready"
    assert "<title>" in httpx.get(f"{url}/").text
    for headers in ({}, {"Authorization": "Bearer other"}):
        refused = httpx.post(f"{url}/v1/completions", json=ASK, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    large = httpx.post(f"{url}/v1/completions", json=ASK | {"prompt": "a" * 9000}, headers=KEY)
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    long = httpx.post(f"{url}/v1/completions", json=ASK | {"max_tokens": 65}, headers=KEY)
    assert long.status_code == 400
    assert "64" in long.json()["error"]["message"]


def test_settings_configure_the_deployment(models, monkeypatch):
    from rgtg.integrations.ray_serve import app

    given = {"api_key": "k", "replicas": "2", "max_replicas": "5", "cpus_per_replica": "3", "gpus_per_replica": "0.5"}
    made = app(models | given | {"max_batch": "8", "max_queue": "10", "drain_seconds": "7"})._bound_deployment
    scaling = made._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 8)
    assert {"num_cpus": 3, "num_gpus": 0.5}.items() <= made.ray_actor_options.items()
    assert made.max_ongoing_requests > 18
    assert made._deployment_config.max_queued_requests == 10
    assert made._deployment_config.graceful_shutdown_timeout_s == 12
    monkeypatch.setenv("RGTG_API_KEY", "from the environment".replace(" ", "-"))
    assert app(models | {"replicas": 3})._bound_deployment.num_replicas == 3


def test_a_replica_is_unhealthy_once_its_engine_has_stopped(models):
    from rgtg.integrations.ray_serve import GuidedDeployment, ReplicaSettings

    replica = GuidedDeployment(ReplicaSettings(**models, allow_public=True, host="0.0.0.0", max_queue=0, log="errors"))
    for _ in range(3):
        replica.check_health()
    replica.state.engine.stop()
    with pytest.raises(NotServingError):
        replica.check_health()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "Ray's proxies may be reachable by anyone: set a key .RGTG_API_KEY., or allow_public=true"),
        ({"allow_public": "false"}, "other machines can reach 0.0.0.0: set a key"),
        ({"api_key": "k", "port": 80}, "port: Ray Serve listens"),
        ({"api_key": "k", "replica": 2}, "unknown setting replica; did you mean replicas"),
        ({"api_key": "k", "replicas": 3, "max_replicas": 2}, "max_replicas .2. is below replicas .3."),
    ],
)
def test_invalid_settings_are_errors(models, given, told):
    from rgtg.integrations.ray_serve import app

    with pytest.raises(UsageError, match=told):
        app(models | given)


def test_the_config_file_of_the_documentation_is_valid(monkeypatch, folder):
    from ray.serve.schema import ServeDeploySchema

    page = (Path(__file__).parents[2] / "docs" / "ray.md").read_text()
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.S)
    config = ServeDeploySchema.model_validate(yaml.safe_load(text))
    (application,) = config.applications
    module, _, name = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), name)
    monkeypatch.setenv("RGTG_API_KEY", "k")
    built = build(application.args)._bound_deployment
    assert {deployment.name for deployment in application.deployments} <= {built.name}
