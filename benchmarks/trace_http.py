"""How many files and functions of rgtg one request over HTTP passes through.

    python benchmarks/trace_http.py [FILES ALLOWED]

A tiny policy is served with a reward model in this process, on a loopback port. After a request that warms it up, one
``POST /v1/completions`` is traced: pargs, 3 new tokens, in every thread. The last line has the counts; with a number,
the exit code is 1 where there are more files.
"""

import http.client
import json
import threading
import time

from traced import Trace, arguments, tiny_models


def serve():
    """Serve in a thread of this process; its address. The one place that names what is inside rgtg."""
    from rgtg.serving.server import serve
    from rgtg.serving.settings import ServeSettings

    addresses, ready = [], threading.Event()

    def told(url, _):
        addresses.append(url.removeprefix("http://"))
        ready.set()

    settings = ServeSettings(policy="policy", scorer={"scorer": "scorer"}, device="cpu", port=0)
    threading.Thread(target=serve, args=(settings, told), daemon=True).start()
    if not ready.wait(120):
        raise SystemExit("the server does not begin")
    return addresses[0]


def ask(address, prompt):
    """One guided completion of three tokens."""
    guidance = {"method": "pargs", "scorers": ["scorer"], "beta": 1.0}
    body = {"model": "policy", "prompt": prompt, "max_tokens": 3, "seed": 0, "guidance": guidance}
    connection = http.client.HTTPConnection(address, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    if answer.status != 200 or json.loads(text)["usage"]["completion_tokens"] != 3:
        raise SystemExit(f"three tokens were asked for, and this came: {text}")
    time.sleep(0.5)  # what the server does after an answer belongs to it


def main():
    args = arguments(__doc__)
    with tiny_models():
        trace = Trace()
        address = serve()
        ask(address, "Once upon a time")
        with trace:
            ask(address, "What is it?")
        trace.report("one request over HTTP, 3 tokens", args.allowed)


if __name__ == "__main__":
    main()
