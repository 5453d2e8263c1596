"""Overload, disconnects, deadlines and shutdown of the server."""

import asyncio
import collections
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest
import uvicorn

from helpers.served import events_of, on_a_socket, serving, settings
from rgtg.serving.engine.request import TokenEvent
from rgtg.serving.http.streaming import FLUSH_SECONDS
from rgtg.serving.server import DrainingServer, listen

LONG = {"model": "tiny+kind", "prompt": "Once upon", "max_tokens": 100, "stream": True}
SHORT = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}


async def ask_raw(url, body):
    """Send a request and keep the connection open."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    data = json.dumps(body).encode()
    head = ["POST /v1/completions HTTP/1.1", f"Host: {host}", "Content-Type: application/json"]
    writer.write("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
    await writer.drain()
    return reader, writer


async def leave_mid_stream(url, body):
    """Read the first event of a stream, then close the connection."""
    reader, writer = await ask_raw(url, body)
    await reader.readuntil(b"data: ")
    writer.transport.abort()


def test_nothing_runs_after_200_clients_disconnect_mid_stream():
    async def disconnect_all(url):
        await asyncio.gather(*(leave_mid_stream(url, LONG) for _ in range(200)))

    with serving(max_queue=200, max_batch=8) as served, on_a_socket(served) as url:
        asyncio.run(disconnect_all(url))
        assert served.idle()
        assert "abort" in served.client.get("/metrics").text
        start = time.monotonic()
        assert served.post("/v1/completions", **SHORT).status_code == 200
        assert time.monotonic() - start < 2


def test_a_disconnect_frees_its_place_within_a_few_steps():
    """Also for requests that are not streamed or wait in the queue."""

    async def scene(served, url, heard):
        _, running = await ask_raw(url, LONG | {"stream": False})
        while "step" not in heard:
            await asyncio.sleep(0.002)
        waiting = [(await ask_raw(url, LONG | {"stream": stream}))[1] for stream in (True, False)]
        while served.engine.snapshot().waiting < 2:
            await asyncio.sleep(0.002)
        for writer in waiting:
            writer.transport.abort()
        while served.engine.snapshot().waiting:
            await asyncio.sleep(0.002)
        assert served.engine.snapshot().running == 1
        cancelled = served.engine.cancel

        def cancel(handle):
            heard.append("cancel")
            cancelled(handle)

        served.engine.cancel = cancel
        running.transport.abort()
        while served.engine.snapshot().running:
            await asyncio.sleep(0.002)

    with serving(max_batch=1, max_queue=5) as served, on_a_socket(served) as url:
        heard = []
        slow_down(served.engine, 0.02, lambda event: heard.append("step" if isinstance(event, TokenEvent) else "end"))
        asyncio.run(asyncio.wait_for(scene(served, url, heard), 60))
        after = heard[heard.index("cancel") :]
        assert after.count("step") <= 3
        assert heard.count("step") < 100


async def storm(url, clients, seconds):
    """Send requests from several clients without pause; count the statuses, and refusals without Retry-After."""
    end = time.monotonic() + seconds
    seen, rude = collections.Counter(), 0

    async def ask(client, number):
        nonlocal rude
        body = {"model": "tiny+kind", "prompt": "Once upon", "max_tokens": 8, "stream": number % 2 == 0}
        while time.monotonic() < end:
            answer = await client.post("/v1/completions", json=body)
            seen[answer.status_code] += 1
            rude += answer.status_code in (429, 503) and "retry-after" not in answer.headers
            if answer.status_code == 200:
                assert not body["stream"] or events_of(answer)[1]

    limits = httpx2.Limits(max_connections=clients)
    async with httpx2.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        await asyncio.gather(*(ask(client, number) for number in range(clients)))
    return seen, rude


def resident():
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def overload(seconds, queue=8):
    with serving(max_queue=queue, max_batch=4) as served, on_a_socket(served) as url:
        asyncio.run(storm(url, 8 * queue, min(seconds / 3, 10)))  # warm-up: allocations that happen once
        before = resident()
        seen, rude = asyncio.run(storm(url, 8 * queue, seconds))
        grown = resident() - before
        assert set(seen) <= {200, 429, 503}, seen
        assert min(seen[200], seen[429]) > 0
        assert not rude
        start = time.monotonic()
        assert httpx2.post(f"{url}/v1/completions", json=SHORT).status_code == 200
        assert time.monotonic() - start < 1
        assert served.idle()
        return seen, grown


def test_overload_is_answered_with_429():
    overload(2)


def slow_down(engine, seconds, hear=lambda event: None):
    """Delay every event of the engine by so many seconds; ``hear`` gets it first."""
    submit = engine.submit

    def slowly(listener):
        return lambda event: (hear(event), time.sleep(seconds), listener(event))

    engine.submit = lambda groups, listener, deadline: submit(groups, slowly(listener), deadline)


@pytest.mark.slow
def test_memory_does_not_grow_in_a_minute_of_overload():
    seen, grown = overload(60)
    print(f"{dict(seen)}, grown by {grown / 2**20:.1f} MiB")
    assert grown < 32 * 2**20


def test_requests_past_their_deadline_fail():
    with serving(request_seconds=0.05, max_batch=1) as served:
        slow_down(served.engine, 0.02)
        answer = served.post("/v1/completions", **LONG | {"stream": False})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "deadline_exceeded")
        events, done = events_of(served.post("/v1/completions", **LONG))
        assert events[-1]["error"]["code"] == "deadline_exceeded"
        assert not done
        assert served.idle()


@contextlib.contextmanager
def running_server(served):
    """Run a server in a thread; the block must stop it, and it has stopped when the block ends."""
    with listen(settings(port=0)) as bound:
        config = uvicorn.Config(served.app, log_config=None, ws="none", timeout_graceful_shutdown=FLUSH_SECONDS)
        server = DrainingServer(config, served.state)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield server, bound
        thread.join(30)
        assert not thread.is_alive()


def drained(served, seconds, body, clients):
    """Send requests from several clients, then SIGTERM, then more requests; return the answers and the late answers."""
    answers, late = [], []
    with running_server(served) as (server, bound):
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        served.state.settings.drain_seconds = seconds
        asking = [
            threading.Thread(target=lambda: answers.append(httpx2.post(f"{url}/v1/completions", json=body, timeout=60)))
            for _ in range(clients)
        ]
        for each in asking:
            each.start()
        while (now := served.engine.snapshot()).running + now.waiting + len(answers) < clients:
            time.sleep(0.005)  # some may be answered before the last is accepted
        server.handle_exit(signal.SIGTERM, None)
        while served.state.status != "draining":
            time.sleep(0.001)
        late += [
            httpx2.post(f"{url}/v1/completions", json=body),
            httpx2.get(f"{url}/readyz"),
            httpx2.get(f"{url}/livez"),
        ]
        for each in asking:
            each.join()
    return answers, late


@pytest.mark.parametrize("stream", [True, False])
def test_draining_finishes_accepted_requests(stream):
    with serving(max_batch=2) as served:
        answers, late = drained(served, 30, LONG | {"stream": stream}, 6)
    assert [answer.status_code for answer in answers] == [200] * 6
    for answer in answers:
        if stream:
            events, done = events_of(answer)
            assert done
            assert events[-1]["choices"][0]["finish_reason"]
    assert [answer.status_code for answer in late] == [503, 503, 200]


def test_draining_stops_at_its_time_limit():
    with serving(max_batch=1, max_queue=10) as served:
        slow_down(served.engine, 0.6)  # so that none ends before a busy machine begins to drain
        start = time.monotonic()
        answers, _ = drained(served, 1.5, LONG | {"stream": False}, 4)
        assert time.monotonic() - start < 10
    assert {answer.status_code for answer in answers} == {503}
    assert {answer.json()["error"]["code"] for answer in answers} == {"not_serving"}


def test_a_failed_engine_is_reported_by_health_checks(monkeypatch):
    with serving() as served:
        assert [served.client.get(path).status_code for path in ("/livez", "/readyz")] == [200, 200]
        monkeypatch.setattr(served.engine, "_admit", lambda: 1 / 0)
        assert served.post("/v1/completions", **LONG | {"stream": False}).status_code == 500
        assert [served.client.get(path).status_code for path in ("/livez", "/readyz")] == [503, 503]
        refused = served.post("/v1/completions", **SHORT)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_serving")


def test_log_lines_escape_the_path(caplog):
    with serving() as served, caplog.at_level("INFO", "rgtg.serving"):
        served.client.get("/nope%0a2026-01-01 POST /v1/completions 200%1b[31m" + "x" * 500)
    (line,) = [record.getMessage() for record in caplog.records if "nope" in record.getMessage()]
    assert line.startswith("GET /nope%0A2026-01-01%20POST")
    assert len(line) < 300


def test_a_slow_reader_gets_its_whole_answer_while_draining():
    """A client that stops reading while the server drains still gets its whole answer."""
    with serving() as served, running_server(served) as (server, bound):
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        body = json.dumps({
            "model": "tiny", "prompt": "a", "max_tokens": 40, "n": 4, "stream": True,
            "guidance": {"method": "policy", "top_k": 64, "trace": True},
        }).encode()  # fmt: skip
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(bound.getsockname())
            head = ["POST /v1/completions HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
            client.sendall("\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body)
            got = client.recv(1000)
            server.handle_exit(signal.SIGTERM, None)
            time.sleep(1.5)
            client.settimeout(20)
            while more := client.recv(2**16):
                got += more
    assert got.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")


class Process:
    """``rgtg serve`` in a process of its own."""

    def __init__(self, policy, scorer, port=0):
        code = "from rgtg.__main__ import main; main()"
        command = [sys.executable, "-c", code, "serve", "--policy", policy, "--scorer", f"kind={scorer}", "--json"]
        self.process = subprocess.Popen(
            [*map(str, command), "--port", str(port), "--drain-seconds", "20", "--dtype", "float32"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        self.told = json.loads(line)
        self.url = self.told["url"]
        self.port = int(self.url.rpartition(":")[2])

    def ask(self, **body):
        asked = {"model": "policy+kind", "prompt": "Once upon", "seed": 1} | body
        return httpx2.post(f"{self.url}/v1/completions", json=asked, timeout=60)

    def end(self, sig):
        self.process.send_signal(sig)
        out, errors = self.process.communicate(timeout=60)
        return self.process.returncode, out, errors


def test_sigterm_finishes_accepted_requests(policy_folder, scorer_folder):
    server = Process(policy_folder, scorer_folder)
    assert server.told == {"url": server.url, "policy": "policy", "scorers": ["kind"]}
    answers = []
    asking = [
        threading.Thread(target=lambda: answers.append(server.ask(max_tokens=100, model="policy"))) for _ in range(8)
    ]
    for each in asking:
        each.start()
    while f"prompt_tokens_total {8 * len('Once upon')}.0" not in httpx2.get(f"{server.url}/metrics").text:
        time.sleep(0.005)  # until all are accepted
    code, out, errors = server.end(signal.SIGTERM)
    for each in asking:
        each.join()
    assert (code, out) == (0, "")
    assert [answer.status_code for answer in answers] == [200] * 8
    assert "Traceback" not in errors
    assert str(policy_folder) not in "".join(answer.text for answer in answers)


@pytest.mark.slow
def test_a_killed_server_can_be_restarted_on_the_same_port(policy_folder, scorer_folder):
    server = Process(policy_folder, scorer_folder)
    before = server.ask(max_tokens=10).json()["choices"][0]["text"]
    assert server.end(signal.SIGKILL)[0] == -signal.SIGKILL
    again = Process(policy_folder, scorer_folder, port=server.port)
    assert again.ask(max_tokens=10).json()["choices"][0]["text"] == before
    assert again.end(signal.SIGINT)[0] == 0
