"""A judge on loopback that speaks the chat-completions protocol; its answers are a function of what it is shown."""

import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from helpers.http_server import answering

_SHOWN = re.compile(r"<completion_([AB])>\n(.*?)\n</completion_", re.DOTALL)


class Server:
    """``answer((first, second), number)`` gives a text, or (status, body), or (status, body, headers)."""

    def __init__(self, answer, usage=True):
        self.answer, self.usage = answer, usage
        self.bodies, self.headers, self._lock = [], [], threading.Lock()

    @property
    def calls(self):
        return len(self.bodies)

    def reply(self, headers, body):
        with self._lock:
            self.bodies.append(body)
            self.headers.append(headers)
            number = len(self.bodies)
        shown = tuple(text for _, text in _SHOWN.findall(body["messages"][0]["content"]))
        said = self.answer(shown, number)
        if not isinstance(said, str):
            return (*said, {})[:3]
        words = sum(len(m["content"].split()) for m in body["messages"])
        usage = {"prompt_tokens": words, "completion_tokens": len(said.split()), "total_tokens": 0}
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
        done = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice]}
        return 200, done | ({"usage": usage} if self.usage else {}), {}


@contextmanager
def serve(answer, **options):
    """A running ``Server`` with its ``url``."""
    server = Server(answer, **options)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content, headers = server.reply({k.lower(): v for k, v in self.headers.items()}, body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (
                {"Content-Type": "application/json", "Content-Length": str(len(data))} | headers
            ).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    with answering(Handler) as url:
        server.url = f"{url}/v1"
        yield server
