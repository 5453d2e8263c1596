"""A tiny policy with two scorers behind the server's app, in this process or over a socket."""

import json
import socket
import threading
import time
from contextlib import contextmanager
from functools import cache

import uvicorn
from openai import OpenAI
from starlette.testclient import TestClient

from helpers.naive import info
from helpers.tiny_models import tiny_policy, tiny_reward_model, tiny_tokenizer
from rgtg.models.loading.policy import Policy
from rgtg.models.scorers.reward_model import PrefixScorer
from rgtg.serving.engine.engine import Engine
from rgtg.serving.engine.models import ServedModels
from rgtg.serving.http.app import create_app
from rgtg.serving.http.state import ServerState
from rgtg.serving.server import load_engine
from rgtg.serving.settings import ServeSettings

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('odd role') }}"
    "{% endif %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
FOLDER = "/somewhere/secret"


def chat_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def scorer(seed=1, objective="prefix-bt"):
    return PrefixScorer(
        tiny_reward_model(seed=seed), tiny_tokenizer(), info=info(objective), name=f"{FOLDER}/scorer-{seed}"
    )


@cache
def tiny_models():
    """A policy ``tiny`` that can chat, and scorers ``kind`` and ``brief``."""
    return ServedModels(Policy(tiny_policy(), chat_tokenizer()), {"kind": scorer(1), "brief": scorer(2)}, "tiny")


def settings(**given):
    return ServeSettings(**{"policy": "tiny", "allowed_host": ["testserver"]} | given)


class Served:
    """A running engine behind an app; ``client`` speaks HTTP in this process, ``openai`` is OpenAI's SDK on it."""

    def __init__(self, models=None, **given):
        engine = Engine(models or tiny_models(), settings(**given))
        engine.start()
        self._open(engine)

    @classmethod
    def of(cls, settings):
        """What ``rgtg serve`` makes of these settings, models loaded."""
        made = cls.__new__(cls)
        made._open(load_engine(settings))
        return made

    def _open(self, engine):
        self.engine, self.models, self.settings = engine, engine.models, engine.settings
        self.state = ServerState(self.settings)
        self.state.open(self.engine)
        self.app = create_app(self.state)
        self.client = TestClient(self.app, raise_server_exceptions=False)
        self.openai = OpenAI(base_url="http://testserver/v1", api_key="none", http_client=self.client, max_retries=0)

    def post(self, path, **body):
        return self.client.post(path, json=body)

    def idle(self, seconds=10.0):
        """Whether nothing runs or waits any more, within so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            now = self.engine.snapshot()
            if now.running == now.waiting == 0:
                return True
            time.sleep(0.01)
        return False

    def close(self):
        self.engine.stop()


@contextmanager
def serving(models=None, **given):
    served = Served(models, **given)
    try:
        yield served
    finally:
        served.close()


@contextmanager
def on_a_socket(served):
    """The app on loopback; yields its URL."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(served.app, log_config=None, ws="none", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{bound.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def events_of(response):
    """The JSON of each event of a stream, and whether it ended with [DONE]."""
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    done = data[-1] == "[DONE]"
    return [json.loads(line) for line in data[: -1 if done else None]], done


def close(one, other):
    """Whether two JSON values are the same, figures up to what another batch or a cached prompt changes."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other) < 1e-4
    return one == other
