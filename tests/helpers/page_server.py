"""A small server for the page: its files, and answers in the shapes of docs/http-api.md, made by the real decoder."""

import json
import re
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from importlib import resources

from helpers.http_server import answering

TYPES = {
    "html": "text/html",
    "js": "text/javascript",
    "css": "text/css",
    "json": "application/json",
    "svg": "image/svg+xml",
}
POLICY_HEADER = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def step_of(known, traced):
    """A step of a trace as the server sends it."""
    step = json.loads(traced.model_dump_json())
    texts = [known.text(i) for i in traced.candidate_ids]
    return step | {"candidate_texts": texts, "candidate_bytes": [list(known.of(i)) for i in traced.candidate_ids]}


class TokenBytes:
    """Bytes and text of single tokens, of character-level and SentencePiece tokenizers."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def of(self, token_id):
        token = self.tokenizer.convert_ids_to_tokens(token_id)
        if token_id in self.tokenizer.all_special_ids:
            return b""
        byte = re.fullmatch(r"<0x([0-9A-F]{2})>", token)
        return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()

    def text(self, token_id):
        special = token_id in self.tokenizer.all_special_ids
        return self.tokenizer.convert_ids_to_tokens(token_id) if special else self.of(token_id).decode(errors="replace")


class Answers:
    """Answers of one policy and its scorers, decoded when they are asked for.

    ``refusals`` are given first, in order; ``gate`` lets one event of a stream through each time it is released;
    ``broken`` is what a stream holds instead, and ends without saying so; ``left`` is set when a page went away.
    """

    def __init__(self, make, tokenizer, methods, scorers=("helpful",), delay=0.0):
        self.make, self.tokenizer, self.methods, self.scorers, self.delay = (
            make,
            tokenizer,
            methods,
            list(scorers),
            delay,
        )
        self.bodies, self.keys, self.refusals, self.key = [], [], [], None
        self.known = TokenBytes(tokenizer)
        self.gate, self.broken, self.left = None, None, False

    def describe(self):
        scorers = [{"name": n, "objective": "prefix-bt", "kind": "prefix", "max_length": 128} for n in self.scorers]
        return {
            "policy": "tiny", "max_model_len": 128, "scorers": scorers, "methods": self.methods,
            "limits": {"max_tokens": 100}, "chat_template": False, "end_token_ids": [2],
        }  # fmt: skip

    def complete(self, body, guided=True):
        guidance = body["guidance"] if guided else {"method": "policy", "top_k": body["guidance"].get("top_k")}
        scorers = guidance.get("scorers") or {}
        decoder = self.make(guidance["method"], list(scorers), list(scorers.values()), guidance.get("top_k"))
        settings = {k: body[k] for k in ("temperature", "top_p", "stop") if k in body}
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt).input_ids
        (done,) = decoder.generate_ids(
            [ids], seed=body["seed"], max_new_tokens=body["max_tokens"], trace=True, **settings
        )
        summary = {
            "method": guidance["method"], "scorers": scorers, "score": done.score, "policy_calls": done.policy_calls,
            "scorer_calls": done.scorer_calls, "kl_nats": done.guided_log_prob - done.policy_log_prob,
            "policy_log_prob": done.policy_log_prob, "guided_log_prob": done.guided_log_prob, "fallback": False,
            "prompt_token_ids": ids,
        }  # fmt: skip
        return done, [step_of(self.known, traced) for traced in done.trace], summary

    def compare(self, body):
        sides = {"unguided": self.complete(body, guided=False), "guided": self.complete(body)}
        most = max(len(steps) for _, steps, _ in sides.values())
        for i in range(most):
            for side, (_, steps, _) in sides.items():
                if i < len(steps):
                    text = self.known.of(steps[i]["token_id"]).decode(errors="replace")
                    yield {
                        "object": "comparison.chunk",
                        "side": side,
                        "text": text,
                        "token_id": steps[i]["token_id"],
                        "guidance": {"trace": [steps[i]]},
                    }
        for side, (done, _, summary) in sides.items():
            yield {"object": "comparison.chunk", "side": side, "finish_reason": done.finish_reason, "guidance": summary}
        yield {
            "object": "comparison.summary",
            "seed": body["seed"],
            "first_divergence": None,
            "usage": {},
            "seconds": 1.0,
        }

    def completions(self, body):
        done, steps, summary = self.complete(body)
        for step in steps:
            text = self.known.of(step["token_id"]).decode(errors="replace")
            yield {
                "object": "text_completion",
                "choices": [{"index": 0, "text": text, "finish_reason": None, "guidance": {"trace": [step]}}],
            }
        yield {
            "object": "text_completion",
            "choices": [{"index": 0, "text": "", "finish_reason": done.finish_reason, "guidance": summary}],
        }

    def score(self, body):
        ids = self.tokenizer(body["completion"], add_special_tokens=False).input_ids
        prefixes = [{"token_id": i, "text": "", "score": len(str(i)) + at / 10} for at, i in enumerate(ids)]
        return {"object": "list", "model": body["model"], "data": [{"index": 0, "score": 1.0, "prefixes": prefixes}]}


@contextmanager
def serve_page(answers):
    """The page and those answers at ``url``."""
    files = resources.files("rgtg.serving") / "static"

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if self.path.startswith("/v1/guidance"):
                self.answer(answers.describe())
                return
            name = "index.html" if self.path == "/" else self.path.removeprefix("/static/")
            self.send(200, (files / name).read_bytes(), TYPES[name.rpartition(".")[2]])

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answers.bodies.append((self.path, body))
            if self.path == "/v1/score":
                self.answer(answers.score(body))
            else:
                self.stream({"/v1/compare": answers.compare, "/v1/completions": answers.completions}[self.path](body))

        def answer(self, content):
            given = self.headers.get("Authorization")
            answers.keys.append(given)
            if answers.key and given != f"Bearer {answers.key}":
                self.refuse(401, {"message": "this server needs an API key", "param": None, "code": "invalid_api_key"})
            else:
                self.send(200, json.dumps(content).encode(), "application/json")

        def refuse(self, status, error, headers=()):
            self.send(
                status, json.dumps({"error": error}).encode(), "application/json", [("x-request-id", "req-1"), *headers]
            )

        def send(self, status, data, kind, headers=()):
            self.send_response(status)
            for name, value in (
                ("Content-Type", kind),
                ("Content-Length", str(len(data))),
                ("Content-Security-Policy", POLICY_HEADER),
                *headers,
            ):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def stream(self, events):
            if answers.refusals:
                self.refuse(*answers.refusals.pop(0))
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.send_header("Connection", "close")
            self.end_headers()
            try:
                for event in events if answers.broken is None else answers.broken:
                    if answers.gate:
                        answers.gate.acquire(timeout=60)
                    self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                    self.wfile.flush()
                    time.sleep(answers.delay)
                if answers.broken is None:
                    self.wfile.write(b"data: [DONE]\n\n")
            except OSError:
                answers.left = True
            self.close_connection = True

        def log_message(self, *_):
            pass

    with answering(Handler) as url:
        yield url
