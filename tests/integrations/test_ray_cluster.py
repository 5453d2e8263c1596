"""Addresses, resources of workers, and settings of Ray. No cluster is started."""

import importlib.util
import socket

import pytest

from helpers import ray_world  # noqa: F401
from helpers.command import verb
from rgtg.config import GenerateSettings
from rgtg.errors import EndpointError, MissingExtraError, UsageError
from rgtg.integrations.ray_cluster import WorkerResources, connect_ray, plan_workers, require_ray

generate = verb("generate")
NO_RAY = importlib.util.find_spec("ray") is None
SMALL, LARGE = {"CPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}


@pytest.mark.parametrize(
    ("asked", "nodes", "room", "fit"),
    [
        ({}, [SMALL, SMALL], WorkerResources(2, 4, 0), 2),
        ({"actors": 3}, [SMALL, SMALL], WorkerResources(3, 2, 0), 4),
        ({"actors": 3, "cpus_per_actor": 4}, [SMALL, SMALL], WorkerResources(3, 4, 0), 2),
        ({}, [LARGE, SMALL], WorkerResources(4, 1, 1), 4),
        ({"gpus_per_actor": 2}, [LARGE, LARGE], WorkerResources(4, 1, 2), 4),
        ({"gpus_per_actor": 0.4}, [LARGE], WorkerResources(8, 1, 0.4), 8),
        ({"gpus_per_actor": 0.25, "cpus_per_actor": 2}, [LARGE], WorkerResources(16, 2, 0.25), 8),
        ({"device": "cpu"}, [LARGE, SMALL], WorkerResources(2, 8, 0), 2),
        ({"gpus_per_actor": 1}, [SMALL], WorkerResources(1, 1, 1), 0),
    ],
)
def test_workers_get_an_equal_share(asked, nodes, room, fit):
    assert plan_workers(GenerateSettings(**asked), nodes) == (room, fit)


@pytest.mark.skipif(NO_RAY, reason="ray is absent: pip install '.[ray]'")
@pytest.mark.parametrize("address", ["ray://head:10001", "head", "head:", "head:x", "head:99999", ":6379"])
def test_an_invalid_address_is_an_error(address):
    with pytest.raises(UsageError, match="expected HOST:PORT of the cluster's head node"), connect_ray(_at(address)):
        pass


@pytest.mark.skipif(NO_RAY, reason="ray is absent: pip install '.[ray]'")
def test_an_address_where_nothing_listens_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = pytest.raises(EndpointError, match=f"no Ray cluster at {address}: Connection refused")
        with refused, connect_ray(_at(address)):
            pass


def _at(address):
    return GenerateSettings(ray=True, address=address)


def test_a_missing_ray_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'rgtg\[ray\]'"):
        require_ray()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ["--prompts", "p.jsonl", "--output", "o.jsonl", "--actors", 2, "--address", "auto"],
            "address, actors: needs --ray",
        ),
        (["--prompt", "a", "--ray"], "ray: needs a file of prompts"),
        (["--prompts", "p.jsonl", "--output", "o.jsonl", "--ray", "--gpus-per-actor", 1.5], "a part of one GPU"),
        (["--prompts", "p.jsonl", "--output", "o.jsonl", "--ray", "--actors", 0], "actors = 0"),
    ],
)
def test_settings_that_contradict_are_errors(options, told):
    done = generate("--policy", "p", *options)
    assert done.exit_code == 2
    assert told in " ".join(done.output.split())
