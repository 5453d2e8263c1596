"""The same over HTTP: ``rgtg serve`` on a loopback port, one request at a time, and eight at once."""

import http.client
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from goldens import told

SCORERS = {
    "kind": "reward", "brief": "stock", "state": "state", "vocab": "vocab", "adapter": "adapter", "farma": "farma",
    "arm": "autoregressive", "pieces": "pieces", "encoder": "encoder", "broken": "broken",
}  # fmt: skip
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is it?"}]
CARDS = {"method": "cards", "reward_threshold": 1.0, "entropy_threshold": 2.0, "segment_length": 6, "retries": 4}


@contextmanager
def served():
    """A server's host and port, while the block runs."""
    named = [part for name, folder in SCORERS.items() for part in ("--scorer", f"{name}={folder}")]
    command = [
        sys.executable, "-m", "rgtg", "serve", "--policy", "policy", *named, "--port", "0", "--device", "cpu", "--json",
        "--quiet", "--set", "prefill_chunk=8",
    ]  # fmt: skip
    log = Path("served.log")
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"rgtg serve ended with {process.wait()}: {log.read_text()[-500:]}")
        yield json.loads(line)["url"].removeprefix("http://")
    finally:
        process.terminate()
        process.wait(60)


def ask(address, path, body=None):
    """Status and text of an answer."""
    connection = http.client.HTTPConnection(address, timeout=120)
    try:
        data = None if body is None else json.dumps(body)
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, data, headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def answer(address, path, body=None):
    """What is kept of an answer, streamed or not."""
    status, text = ask(address, path, body)
    if status == 200 and text.startswith("data: "):
        return streamed(text)
    found = brief(json.loads(text))
    if path.startswith(("/v1/completions", "/v1/chat", "/v1/compare")):
        found.pop("id", None)
    if "error" in found:
        found["error"].pop("message")
    return {"status": status, **found}


def brief(value):
    """JSON with traces and log-probabilities as digests."""
    if isinstance(value, dict):
        short = {"trace": lambda steps: told.digest(steps), "logprobs": lambda shown: {"digest": told.digest(shown)}}
        return {
            name: short[name](inner) if name in short and inner is not None else brief(inner)
            for name, inner in told.lasting(value).items()
        }
    return [brief(inner) for inner in value] if isinstance(value, list) else value


def streamed(text):
    """A stream, its events sorted by what they belong to: steps of several choices may come in any order."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    events = [told.lasting(json.loads(line)) for line in lines if line != "[DONE]"]
    kept = {"done": lines[-1] == "[DONE]", "of": {}, "rest": []}
    for event in events:
        event.pop("id", None)
        owners = event.pop("choices", None) or ([event] if event.get("side") else [])
        if not owners:
            kept["rest"].append(brief(event))
        for owner in owners:
            mine = kept["of"].setdefault(str(owner.get("index", owner.get("side"))), {"texts": [], "events": []})
            mine["texts"].append(owner.get("text", owner.get("delta", {}).get("content")))
            mine["events"].append(owner)
            if owner.get("finish_reason"):
                mine["end"] = brief(owner)
    for mine in kept["of"].values():
        mine["digest"] = told.digest(mine.pop("events"))
    return kept


def requests():
    """{name: (path, body)} of all that is asked one at a time, in this order."""
    found = {}

    def complete(name, guidance=None, path="completions", **more):
        body = {"model": "policy", "max_tokens": 10, "seed": 3} | more
        body |= {"messages": CHAT} if path == "chat/completions" else {"prompt": more.get("prompt", "Once upon a time")}
        found[name] = (f"/v1/{path}", body | ({"guidance": guidance} if guidance else {}))

    pargs = {"scorers": ["kind"], "beta": 1.5}
    complete("plain")
    complete("by-name", model="policy+kind")
    complete("n", pargs, n=2)
    complete("logprobs", pargs, logprobs=3, n=2)
    complete("prompts", pargs, prompt=["Hi", "The cat sat on the mat. It was", "A"])
    complete("ids", pargs, prompt=[5, 9, 12, 33])
    complete("lists-of-ids", pargs, prompt=[[0, 5, 9], [44], list(range(4, 30))])
    complete("stop", pargs | {"trace": True}, stop=["e", " a"])
    complete("top-p", pargs, top_p=0.7, temperature=0.8)
    complete("greedy", pargs, temperature=0)
    complete("gate", pargs | {"entropy_gate": 2.0, "trace": True})
    complete("whole-vocabulary", {"scorers": ["farma"], "top_k": None})
    complete("several", {"scorers": {"kind": 1.5, "brief": -0.5}, "trace": True})
    complete("several-kinds", {"scorers": {"state": 1.0, "adapter": 0.5, "pieces": 0.5}, "trace": True})
    for scorer in SCORERS:
        complete(f"pargs/{scorer}", {"scorers": [scorer], "trace": True}, prompt="What is it?")
    for method, scorer in (
        ("policy", None), ("pargs-greedy", "kind"), ("args", "brief"), ("args-sample", "adapter"), ("cd", "kind"),
        ("rad", "kind"), ("farma", "farma"), ("farma", "vocab"), ("genarm", "arm"), ("best-of-n", "kind"),
        ("best-of-n", "pieces"), ("best-of-n", "vocab"), ("cd-blockwise", "kind"), ("cd-blockwise", "encoder"),
        ("cards", "kind"), ("cards", "pieces"), ("cards", "state"),
    ):  # fmt: skip
        guidance = {"method": method, "trace": True} | ({"scorers": [scorer]} if scorer else {})
        guidance |= {"n": 3} if method in ("best-of-n", "cd-blockwise") else CARDS if method == "cards" else {}
        guidance |= {"trace": False} if method == "genarm" else {}  # it has no top_k, and a trace needs one
        guidance |= {"segment_length": 4} if method == "cd-blockwise" else {}
        complete(f"{method}/{scorer}", guidance, prompt="no no no no", n=2)
    complete("chat", pargs, "chat/completions", logprobs=True, top_logprobs=2)
    complete("chat/pieces", {"scorers": ["pieces"], "trace": True}, "chat/completions", max_tokens=8)
    complete("chat/best-of-n", {"method": "best-of-n", "scorers": ["encoder"], "n": 2}, max_tokens=8)
    for name, guidance in (
        ("pargs", pargs | {"trace": True}), ("best-of-n", {"method": "best-of-n", "scorers": ["kind"], "n": 3}),
        ("cards", CARDS | {"scorers": ["kind"]}), ("farma", {"method": "farma", "scorers": ["farma"]}),
        ("policy", {"method": "policy"}),
    ):  # fmt: skip
        more = {"stream": True, "stream_options": {"include_usage": True}, "n": 2}
        complete(f"stream/{name}", guidance, **more, logprobs=2 if name == "pargs" else None)
        complete(f"stream/chat/{name}", guidance, "chat/completions", **more, stop=["ab", "e"])
    for name, more in (("plain", {}), ("stream", {"stream": True}), ("ids", {"prompt": [5, 9, 12]}),
                       ("farma", {"guidance": {"method": "farma", "scorers": ["farma"]}}),
                       ("best-of-n", {"guidance": {"method": "best-of-n", "n": 2, "scorers": ["kind"]}})):  # fmt: skip
        body = {"prompt": "Tell me: why", "max_tokens": 8, "seed": 5, "guidance": {"scorers": ["kind"], "beta": 2.0}}
        found[f"compare/{name}"] = ("/v1/compare", body | more)
    texts = [" there was a dog.", "x", "no"]
    for scorer in SCORERS:
        body = {"model": scorer, "prompt": "Once upon a time", "completion": texts}
        found[f"score/{scorer}"] = ("/v1/score", body | {"prefixes": scorer != "encoder"})
        found[f"score/{scorer}/open"] = ("/v1/score", body | {"finished": False})
    found["score/chat"] = ("/v1/score", {"model": "pieces", "messages": CHAT, "completion": "It is I."})
    found["tokenize"] = ("/tokenize", {"prompt": "Once upon a time"})
    found["tokenize/chat"] = ("/tokenize", {"messages": CHAT})
    found["detokenize"] = ("/detokenize", {"tokens": [5, 9, 12, 2]})
    for path in ("/v1/models", "/v1/guidance", "/v1/models/policy+kind", "/health", "/livez", "/v1/nothing"):
        found[f"get{path}"] = (path, None)
    complete("refused/method", {"method": "magic"})
    complete("refused/scorer", {"scorers": ["nobody"]})
    complete("refused/model", model="another")
    complete("refused/beta", {"method": "best-of-n", "scorers": ["kind"], "beta": 2.0})
    complete("refused/long", max_tokens=4000)
    complete("refused/unknown", top_k=3)
    return found


def brought(text):
    """Texts, tokens and how they ended, which depend on no neighbour; floats may."""
    choices = json.loads(text)["choices"]
    found = {key: [choice[key] for choice in choices] for key in ("text", "finish_reason")}
    traces = [(choice.get("guidance") or {}).get("trace") for choice in choices]
    if None not in traces:
        found["token_ids"] = [[step["token_id"] for step in trace] for trace in traces]
    return found


def records():
    """(name, what makes its record): one request at a time, then eight at once."""
    asked, alone = requests(), {}
    with served() as address:
        for name, request in asked.items():
            yield f"served/{name}", lambda name=name, request=request: alone.setdefault(name, answer(address, *request))
        crowd = [name for name, (path, body) in asked.items() if path == "/v1/completions" and not body.get("stream")]
        crowd = [name for name in crowd if alone[name]["status"] == 200]
        with ThreadPoolExecutor(8) as clients:
            texts = dict(zip(crowd, clients.map(lambda name: ask(address, *asked[name])[1], crowd), strict=True))
    for name, text in texts.items():
        yield f"served/at-once/{name}", lambda text=text: brought(text)
    changed = [name for name in crowd if texts_of(json.loads(texts[name])) != texts_of(alone[name])]
    yield "served/at-once", lambda: {"other-than-alone": changed}


def texts_of(found):
    return [choice["text"] for choice in found.get("choices", ())]
