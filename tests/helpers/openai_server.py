"""What the tests' OpenAI-compatible servers share: replies over HTTP in a process of their own, started and stopped."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    """Base of a server's handler: reads and writes JSON, and keeps quiet."""

    def body(self) -> dict:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))

    def reply(self, status: int, content: dict, headers: dict | None = None):
        self.send(json.dumps(content), "application/json", status, headers)

    def say(self, text: str, model: str, tokens: int = 1, **choice):
        """A chat completion of so many tokens."""
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "finish_reason": "stop", **choice}]
        usage = {"prompt_tokens": 1, "completion_tokens": tokens, "total_tokens": 1 + tokens}
        row = {"id": "1", "object": "chat.completion", "created": 0, "model": model}
        self.reply(200, row | {"choices": choices, "usage": usage})

    def send(self, text: str, kind: str, status: int, headers: dict | None = None):
        data = text.encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(data), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass


def serve(handler: type[Handler]) -> None:
    """Print the port and serve until killed."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    print(server.server_port, flush=True)
    server.serve_forever()


@contextmanager
def running(script: str, *habit) -> Iterator[str]:
    """Start `script` (a file beside this one) with a habit; its address, such as http://127.0.0.1:8000/v1."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, habit)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def seen(address: str) -> dict:
    """What the server at `address` says about the requests that came."""
    with urllib.request.urlopen(address.split("/v1")[0] + "/seen") as answer:
        return json.load(answer)
