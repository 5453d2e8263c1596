"""vLLM's own HTTP server with the plug-in, asked by the `openai` client: guidance, 400s, and that it stays alive."""

import json
import math
import random
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from helpers.naive import next_log_probs
from helpers.vllm_world import vllm_environment
from rgtg.decoding.guided_policy import GuidedPolicy
from rgtg.engines.vllm import xargs
from rgtg.models.loading.policy import load_policy

openai = pytest.importorskip("openai", reason="the client needs: pip install 'rgtg[judge]'")
pytestmark = [pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore:.*was trained on")]
STARTS_WITHIN = 500  # seconds, on a machine that is busy
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(vllm_python, vllm_world, tmp_path_factory):
    """vLLM's server as docs/vllm.md starts it; stopped at the end."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log"
    command = [
        vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(vllm_world.policy),
        "--served-model-name", "policy", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", "256", "--max-num-seqs", "8", "--enforce-eager", "--chat-template", TEMPLATE,
        "--logits-processors", "rgtg.engines.vllm:Guidance",
    ]  # fmt: skip
    environment = vllm_environment(vllm_world.file) | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + STARTS_WITHIN
        while health(url) != 200:
            assert process.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < deadline, log.read_text()[-6000:]
            time.sleep(0.5)
        with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0, timeout=60) as client:
            yield SimpleNamespace(client=client, url=url)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def health(url):
    try:
        with urllib.request.urlopen(url + "/health", timeout=10) as answer:
            return answer.status
    except (OSError, urllib.error.URLError):
        return None


def complete(server, **given):
    """Text of a greedy completion; ``given`` may replace or add fields."""
    fields = {"model": "policy", "prompt": "the cat sat", "max_tokens": 12, "temperature": 0, **given}
    return server.client.completions.create(**fields).choices[0].text


def status(server, arguments):
    """Status of a completion asked for in raw JSON, which can hold what no client sends (Infinity, NaN)."""
    body = {"model": "policy", "prompt": "the cat sat", "max_tokens": 12, "vllm_xargs": arguments}
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def guided(server, arguments, **given):
    return complete(server, extra_body={"vllm_xargs": arguments}, **given)


def test_completions_and_chats_equal_the_torch_engine(server, vllm_world):
    policy = load_policy(str(vllm_world.policy), dtype="float32", device="cpu")
    steered = GuidedPolicy.from_pretrained(policy, str(vllm_world.scorers["kind"]), beta=3.0, top_k=5)
    wanted = steered.generate(["the cat sat"], max_new_tokens=12, temperature=0.0)[0].text
    arguments = xargs("kind", 3.0, top_k=5)
    assert guided(server, arguments) == wanted != complete(server)
    chat = server.client.chat.completions.create(
        model="policy", messages=[{"role": "user", "content": "the cat sat"}], max_tokens=12, temperature=0,
        extra_body={"vllm_xargs": arguments},
    )  # fmt: skip
    assert chat.choices[0].message.content == wanted
    streamed = server.client.completions.create(
        model="policy", prompt="the cat sat", max_tokens=12, temperature=0, stream=True,
        extra_body={"vllm_xargs": arguments},
    )  # fmt: skip
    assert "".join(part.choices[0].text for part in streamed) == wanted


@pytest.mark.parametrize("name", ["reward", "values"])
def test_models_of_their_own_follow_the_server_s_batch(server, vllm_world, name):
    """The server schedules a step before the last one's tokens are known; several requests enter and leave."""
    policy = load_policy(str(vllm_world.policy), dtype="float32", device="cpu")
    steered = GuidedPolicy.from_pretrained(policy, str(vllm_world.scorers[name]), beta=2.0, top_k=5)
    prompts = ["the cat sat" + "abcdefgh"[:i] for i in range(8)]
    lengths = [10 + 3 * i for i in range(8)]
    wanted = [
        steered.generate([prompt], max_new_tokens=n, temperature=0.0)[0].text
        for prompt, n in zip(prompts, lengths, strict=True)
    ]

    def ask(prompt, n):
        return guided(server, xargs(name, 2.0, top_k=5), prompt=prompt, max_tokens=n)

    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(ask, prompts, lengths)) == wanted


def test_a_grammar_binds_guided_requests_too(server):
    for text in ("abc", "xyz"):
        body = {"structured_outputs": {"choice": [text]}, "vllm_xargs": xargs("kind", 3.0, top_k=5)}
        assert complete(server, extra_body=body) == text


def test_log_probabilities_are_those_of_the_policy(server, vllm_world):
    """As docs/vllm.md says: without --logprobs-mode processed_logprobs."""
    policy = load_policy(str(vllm_world.policy), dtype="float32", device="cpu")
    answer = server.client.completions.create(
        model="policy", prompt="the cat sat", max_tokens=1, temperature=0, logprobs=1,
        extra_body={"vllm_xargs": xargs("kind", 3.0, top_k=5)},
    )  # fmt: skip
    found = answer.choices[0].logprobs
    log_probs = next_log_probs(policy.model, policy.tokenizer("the cat sat").input_ids)
    token = policy.tokenizer.convert_tokens_to_ids(found.tokens[0])
    assert found.token_logprobs[0] == pytest.approx(log_probs[token].item(), abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"extra_body": {"vllm_xargs": {"rgtg_scorers": "nice"}}}, "unknown scorer 'nice'; this server has kind"),
        ({"extra_body": {"vllm_xargs": xargs("kind"), "repetition_penalty": 1.2}}, "repetition_penalty"),
        ({"extra_body": {"vllm_xargs": xargs("kind", method="cards")}}, "decides on a whole segment"),
    ],
)
def test_what_cannot_be_done_gets_400_with_the_reason(server, fields, message):
    with pytest.raises(openai.BadRequestError, match=message):
        complete(server, **fields)


def malformed(numbers):
    """Arguments of which at least one is wrong."""
    scalar = [None, True, -1, 0, 1.5, math.inf, math.nan, 10**30, "", "pargs", "kind", "x" * 300, "\n", "é\x00"]

    def anything(depth=0):
        kind = numbers.random()
        if depth < 3 and kind < 0.3:
            return [anything(depth + 1) for _ in range(numbers.randrange(5))]
        if depth < 3 and kind < 0.4:
            return {str(numbers.choice(scalar)): anything(depth + 1) for _ in range(numbers.randrange(3))}
        return numbers.choice(scalar)

    wrong = {
        "rgtg_scorers": lambda: numbers.choice([["nice"], [], 1, [["kind"]], {"kind": 1}, ["kind", "kind"], "", [2.5]]),
        "rgtg_betas": lambda: numbers.choice([[], [1, 2, 3], "1", ["2"], {"kind": 1}, [[1]], 1e300, [-1e200]]),
        "rgtg_top_k": lambda: numbers.choice([0, -3, 2.5, "3", "", [], [5], {"k": 1}]),
        "rgtg_method": lambda: numbers.choice(["", "cards", "best-of-n", "magic", 3, ["pargs"], {"m": 1}]),
        "rgtg_gate": anything,
        "rgtg": anything,
    }
    name = numbers.choice(list(wrong))
    arguments = {"rgtg_scorers": "kind"} | {name: wrong[name]()}
    if numbers.random() < 0.3:
        arguments[numbers.choice(["other", "rgtg_x", "rgtg_betas "])] = anything()
    return arguments


def test_a_thousand_malformed_requests_leave_the_engine_alive(server):
    """Each gets a 4xx, while guided requests go on beside them."""
    numbers, wanted, failures = random.Random(0), guided(server, xargs("kind", 3.0)), []
    done = threading.Event()

    def go_on():
        while not done.is_set():
            if guided(server, xargs("kind", 3.0)) != wanted:
                failures.append("another text")

    neighbour = threading.Thread(target=go_on)
    neighbour.start()
    try:
        for i in range(1000):
            arguments = malformed(numbers)
            assert 400 <= status(server, arguments) < 500, arguments
            if i % 100 == 0:
                assert health(server.url) == 200
    finally:
        done.set()
        neighbour.join()
    assert not failures
    assert health(server.url) == 200
    assert guided(server, xargs("kind", 3.0)) == wanted
