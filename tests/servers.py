"""OpenAI-compatible servers on loopback, for tests: one with scripted answers over real HTTP, which counts what it was
asked and has said, and those of other makers, in processes of their own."""
import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ANSWER = "grass ahead; go on -> move_right"
# A teacher behind this server: `collect` of short episodes with small frames.
PLAY = dict(
    prompt="brief",
    render_size=64,
    horizon="s4",
    teacher="model",
    engine="server",
    model="gpt-4o-mini",
    noise=0.0,
    concurrency=4,
)


def says(text=ANSWER, finish="stop", prompt=900, completion=12, **message):
    "A chat completion that says `text`."
    return 200, {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "m",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": text, **message}}
        ],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


def by_seed(number, body):
    "An answer that hangs on what is asked alone: another action for another seed of the request."
    return says(f"call {body['seed']} -> {('move_left', 'move_right', 'do', 'noop')[body['seed'] % 4]}")


def calls(name="interact_many", arguments='{"reason": "grass", "actions": ["move_right"]}', **more):
    "A chat completion that calls a tool."
    call = {"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}}
    return says(None, "tool_calls", tool_calls=[call], **more)


def refuses(status, message="no", code=None, **headers):
    "An error in OpenAI's form."
    return status, {"error": {"message": message, "type": "error", "code": code}}, headers


def images(body):
    "The data URLs in a request."
    users = [message["content"] for message in body["messages"] if isinstance(message["content"], list)]
    return [part["image_url"] for content in users for part in content if part["type"] == "image_url"]


def counted(reply):
    "Tokens in and out of a reply, as far as it tells in earnest."
    usage = reply.get("usage")
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")] if isinstance(usage, dict) else []
    return counts if counts and all(type(count) is int for count in counts) else [0, 0]


class Endpoint:
    """`with Endpoint(answer) as endpoint`: serves `answer(number, body)` at `endpoint.url`, numbers from 0.

    An answer is what `says`, `calls` and `refuses` give, or "hang" (until the server ends), "drop" (closes the
    connection), "cut" (half of a JSON text), "short" (fewer bytes than its header promises), "page" (HTML)."""

    def __init__(self, answer=lambda number, body: says()):
        self.answer, self.lock, self.ended = answer, threading.Lock(), threading.Event()
        self.bodies, self.headers, self.statuses, self.busy, self.most = [], [], [], 0, 0
        self.tokens = [0, 0]  # of the answers that went out whole

    def __enter__(self):
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    number = len(endpoint.bodies)
                    endpoint.bodies.append(body)
                    endpoint.headers.append({name.title(): value for name, value in self.headers.items()})
                    endpoint.busy += 1
                    endpoint.most = max(endpoint.most, endpoint.busy)
                try:
                    endpoint.reply(self, endpoint.answer(number, body))
                except (BrokenPipeError, ConnectionResetError):  # who asked has gone
                    self.close_connection = True
                finally:
                    with endpoint.lock:
                        endpoint.busy -= 1

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def reply(self, handler, answer):
        "Send an answer, or what a fault makes of one."
        if answer == "hang":
            self.ended.wait()
        if answer in ("hang", "drop"):
            handler.close_connection = True
            return
        status, value, *headers = says() if isinstance(answer, str) else answer
        blob = b"<html>busy</html>" if answer == "page" else json.dumps(value).encode()
        promised, blob = (len(blob) // 2, blob[:len(blob) // 2]) if answer == "cut" else (len(blob), blob)
        with self.lock:
            self.statuses.append(status)
            if status == 200 and not isinstance(answer, str):
                self.tokens = [have + count for have, count in zip(self.tokens, counted(value))]
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(promised))
        for name, text in (headers[0] if headers else {}).items():
            handler.send_header(name.replace("_", "-"), text)
        handler.end_headers()
        handler.wfile.write(blob[:len(blob) // 2] if answer == "short" else blob)
        if answer == "short":
            handler.close_connection = True


class ServerProcess:
    """`with ServerProcess(line, log) as server`: somebody's server on a free port, its API at `server.url`.

    `line(port)` is its command, `well` a path that answers with 200 as soon as it serves, `log` takes what it prints.
    It can be started again after `kill`, at the same address.
    """

    def __init__(self, line: Callable[[int], list[str]], log: Path, well: str = "/v1/models", **variables: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.line, self.log, self.environment = line(port), log, os.environ | {"OMP_NUM_THREADS": "1"} | variables
        self.url, self.well = f"http://127.0.0.1:{port}/v1", f"http://127.0.0.1:{port}{well}"

    def start(self, seconds: float = 60) -> None:
        "Start it, and wait until it answers."
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.line, stdout=log, stderr=log, env=self.environment)
        until = time.monotonic() + seconds
        while not self.answers():
            assert time.monotonic() < until and self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.1)

    def answers(self) -> bool:
        "Whether it serves."
        try:
            with urllib.request.urlopen(self.well, timeout=5) as reply:
                return reply.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        "End it, as kill -9 does."
        self.process.kill()
        self.process.wait()

    def __enter__(self):
        try:
            self.start()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_):
        self.kill()
