"""An endpoint that answers as no endpoint should: a table of faults, each of which ends a request in its own way,
down to the bytes on the wire."""

import gzip
import json
import socket
import socketserver
import struct
import threading
import zlib
from email.utils import formatdate
from urllib.parse import quote

KEY, TEAM = 'sk-planted/0123"456+789', "team-planted-0123456789"  # the key looks otherwise in JSON and in addresses
SPELLINGS = [
    spelling for secret in (KEY, TEAM) for spelling in (secret, json.dumps(secret)[1:-1], quote(secret, safe=""))
]
SAID = "grass ahead -> do"
READ, AGAIN, LOST, ENDS = (
    "read",
    "again",
    "lost",
    "ends",
)  # at once; the call is made again; its episode is lost; the run ends


def http(body: bytes | str = b"", status="200 OK", *headers: str, length: bool = True, version="HTTP/1.1") -> bytes:
    "A response as bytes."
    body = body.encode() if isinstance(body, str) else body
    lines = [
        f"{version} {status}",
        *headers,
        "Connection: close",
        *([f"Content-Length: {len(body)}"] if length else []),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def value(value, *headers, status="200 OK", **more) -> bytes:
    "A response of JSON."
    return http(json.dumps(value), status, "Content-Type: application/json", *headers, **more)


def completion(content=SAID, finish="stop", usage=None, choice=None, **message) -> dict:
    "A chat completion."
    usage = {"prompt_tokens": 900, "completion_tokens": 12} if usage is None else usage
    return {
        "id": "1",
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
            | (choice or {})
        ],
        "usage": usage,
    }


def says(*args, **more) -> bytes:
    return value(completion(*args, **more))


def calls(arguments, **function) -> bytes:
    return says(
        None,
        tool_calls=[
            {"id": "1", "type": "function", "function": {"name": "interact_many", "arguments": arguments} | function}
        ],
    )


def error(status: str, message="no", *headers: str, **fields) -> bytes:
    return value({"error": {"message": message, "type": "error"} | fields}, *headers, status=status)


def chunked(*chunks: bytes, end=b"0\r\n\r\n") -> bytes:
    body = b"".join(f"{len(chunk):x}".encode() + b"\r\n" + chunk + b"\r\n" for chunk in chunks)
    return http(body + end, "200 OK", "Transfer-Encoding: chunked", length=False)


def packed(data: bytes, encoding: str) -> bytes:
    return http(data, "200 OK", f"Content-Encoding: {encoding}")


GOOD = json.dumps(completion()).encode()
DEEP = "[" * 100_000
ERROR = {"message": "Upstream overloaded", "code": 502}
DO = {"reason": "grass", "actions": ["do"]}


def replies() -> dict:
    "Completions that are read at once, however they come."
    parts = [
        {"type": "thinking", "thinking": [{"type": "text", "text": "left"}]},
        {"type": "text", "text": "grass "},
        "ahead -> do",
        None,
        7,
    ]
    return {
        "parts": says(parts),
        "one part": says({"type": "text", "text": SAID}),
        "strings": says(["grass ahead", " -> do"]),
        "arguments as an object": calls(DO),
        "arguments in a string twice": calls(json.dumps(json.dumps(DO))),
        "arguments with a line end": calls('{"reason": "a\nb", "actions": ["do"]}'),
        "actions as words": calls({"actions": "do"}),
        "a call without a name": calls(DO, name=None),
        "a call of an empty name": calls(DO, name=""),
        "a name that is a list": calls(DO, name=[KEY]),
        "function_call": says(None, function_call={"name": "interact_many", "arguments": json.dumps(DO)}),
        "calls of null": says(tool_calls=[None, 7, [], {}, {"function": None}]),
        "calls that are no list": says(tool_calls=7),
        "a nameless call in words": says('<tool_call>{"arguments": {"actions": ["do"]}}</tool_call>'),
        "an open call": says("<tool_call>" + json.dumps({"name": "interact_many", "arguments": DO})),
        "prose around a call": says('interact_many("actions": ["do"])'),
        "thinking": says("<think>\nor -> move_left\n</think>\n\n" + SAID),
        "thinking without a begin": says("or -> move_left</think>" + SAID),
        "thinking twice": says("<think>a</think><thinking>b</thinking>" + SAID),
        "thinking of Mistral": says("[THINK]a -> b[/THINK]" + SAID),
        "reasoning beside": says(reasoning_content="or left", reasoning=KEY),
        "half an emoji": says("tree \ud83d near -> do"),
        "NULs": says("grass\0 ahead\0 -> do"),
        "terminal codes": says("\x1b[31m\x9bgrass\x07 -> do"),
        "half an emoji in arguments": calls(r'{"reason": "tree \ud83d", "actions": ["do"]}'),
        "byte order mark": http(b"\xef\xbb\xbf" + GOOD),
        "UTF-16": http(json.dumps(completion()).encode("utf-16")),
        "broken UTF-8": http(GOOD.replace(b"ahead", b"ah\xff\xfe\xc3")),
        "keys twice": http(GOOD[:-1] + b', "usage": {"prompt_tokens": 1}}'),
        "usage NaN": says(usage={"prompt_tokens": float("nan"), "completion_tokens": float("inf")}),
        "usage beyond 64 bits": says(usage={"prompt_tokens": 2**63, "completion_tokens": 10**400}),
        "usage negative": says(usage={"prompt_tokens": -9, "completion_tokens": -1}),
        "usage a list": says(usage=[900, 12]),
        "usage 0": says(usage=0),
        "no usage": value({"choices": completion()["choices"]}),
        "usage in words": says(usage={"prompt_tokens": KEY, "completion_tokens": "12"}),
        "usage of booleans": says(usage={"prompt_tokens": True, "completion_tokens": False}),
        "odd details of usage": says(
            usage={"prompt_tokens": 900, "completion_tokens": 12, "prompt_tokens_details": [KEY]}
        ),
        "gzip": packed(gzip.compress(GOOD), "gzip"),
        "deflate": packed(zlib.compress(GOOD), "deflate"),
        "identity": packed(GOOD, "identity"),
        "chunks": chunked(GOOD),
        "tiny chunks": chunked(*(GOOD[i : i + 1] for i in range(len(GOOD)))),
        "trailers": chunked(GOOD, end=b"0;x=y\r\nX-Trailer: " + KEY.encode() + b"\r\n\r\n"),
        "no length": http(GOOD, length=False),
        "called a page": http(GOOD, "200 OK", "Content-Type: text/html; charset=nonsense"),
        "called a stream": http(GOOD, "200 OK", "Content-Type: text/event-stream"),
        "no content type": http(GOOD),
        "HTTP/1.0": http(GOOD, version="HTTP/1.0"),
        "HTTP/9.9": http(GOOD, version="HTTP/9.9"),
        "after 100 and 103": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n"
        + http(GOOD),
        "201": http(GOOD, "201 Created"),
        "206": http(GOOD, "206 Partial Content"),
        "no reason phrase": http(GOOD, "200"),
        "many headers": http(GOOD, "200 OK", *(f"X-{i}: {KEY}" for i in range(80))),
        "odd cookies": http(GOOD, "200 OK", "Set-Cookie: \xff=;;;=,", "Set-Cookie: a=b; domain=.com; expires=never"),
        "a wait with an answer": http(GOOD, "200 OK", "Retry-After: 7200"),
        "a location with an answer": http(GOOD, "200 OK", "Location: http://[::"),
        "no finish reason": says(finish=None),
        "a number for it": says(finish=7),
        "a key for it": says(finish=KEY),
        "no error": value(completion() | {"error": None}),
        "an error beside an answer": value(completion() | {"error": ERROR}),
        "more choices": value(completion() | {"choices": completion()["choices"] + [None, KEY]}),
        "depths beside": http(GOOD[:-1] + b', "more": ' + b"[" * 400 + b"]" * 400 + b"}"),
        "blanks around": http(b" " * 2**21 + GOOD + b"\n" * 2**21),
        "numbers without end": value(completion() | {"created": 10**4000, "more": 1e308}),
        "an infinite number": http(GOOD[:-1] + b', "more": 1e999}'),
        "keys in fields": value(completion() | {"id": KEY, "model": KEY, "system_fingerprint": TEAM, KEY: KEY}),
        "a key in content": says(f"header Bearer {KEY} {TEAM} {quote(KEY, safe='')} -> do"),
        "a key in parts": says([KEY[:7], KEY[7:], " -> do"]),
        "a key in arguments": calls({"reason": f"key {KEY}", "actions": ["do"]}),
        "a key in other letters": calls(
            '{"reason": "' + "".join(f"\\u{ord(letter):04x}" for letter in KEY + TEAM) + '", "actions": ["do"]}'
        ),
        "a key in a header": http(GOOD, "200 OK", f"X-Your-Key: {KEY}", f"Authorization: Bearer {KEY}"),
    }


def unusable() -> dict:
    "Completions without a usable action: asked for again."
    return {
        "null": says(None),
        "empty": says(""),
        "a number": says(7),
        "an object": says({"a": KEY}),
        "no choices": value({"choices": [], "usage": {}}),
        "message null": says(choice={"message": None}),
        "message a list": says(choice={"message": [KEY]}),
        "no message": value({"choices": [{}]}),
        "reasoning alone": says(None, "length", reasoning_content="Let me think about " + KEY),
        "thinking cut off": says("<think>do -> do", "length"),
        "a refusal": says(None, refusal="I cannot help " + KEY),
        "filtered": says(None, "content_filter"),
        "prose": says("I cannot see anything."),
        "deep JSON in a call": says("<tool_call>" + DEEP),
        "deep arguments": calls(DEEP),
        "a deep reason": calls('{"actions": [], "reason": ' + "[" * 500 + "]" * 500 + "}"),
        "deep arguments as an object": http(
            json.dumps(completion(None, tool_calls=[{"function": {"arguments": "HERE"}}])).replace(
                '"HERE"', "[" * 700 + "]" * 700
            )
        ),
        "blanks in a call": says("<tool_call>a" + " " * 2**21 + "b"),
        "blanks": says(" " * 2**21),
        "arrows": says("->" * 10**5),
        "calls": says("<tool_call>" * 10**5),
        "thoughts": says("<think>" * 10**5 + "</think>" * 10**5),
        "lists": says('interact_many "actions":[' * 10**5),
        "commas": says("," * 10**6),
        "an answer far away": says("x" * 10**6 + " -> do"),
        "another tool": calls(DO, name="fly"),
        "arguments cut off": calls('{"actions": ["do", "mo'),
        "arguments null": calls(None),
        "arguments a list": calls([["do"]]),
        "a number for actions": calls({"actions": 7}),
        "an object for actions": calls({"actions": {"do": [KEY]}}),
        "actions of null": calls({"actions": [None, None]}),
        "unknown actions": calls({"actions": ["fly", KEY]}),
        "too many": says("go -> " + "do, " * 99),
        "a number of 9,999 digits": calls("9" * 9999),
        "digits in a reason": says("tree " + "9" * 9999 + " right; go -> fly"),
    }


def broken() -> dict:
    "Answers that are none, and faults on the wire: the call is made again."
    again = {
        f"{status}": error(f"{status} Oops", KEY)
        for status in (408, 409, 425, 429, 500, 501, 502, 503, 504, 511, 529, 599, 600, 999)
    }
    again |= {
        f"429, wait {wait}": error("429 No", KEY, f"Retry-After: {wait}")
        for wait in ("0", "-5", "nan", "inf", "soon", "1e-9", "", formatdate(0), "Mon, 99 Foo", "0, 7200")
    }
    again |= {
        f"body {body[:9]}": http(body)
        for body in (
            "",
            " ",
            "null",
            "[]",
            "7",
            '"x"',
            "true",
            "NaN",
            "{}",
            "[[]]",
            '{"choices": null}',
            '{"choices": {}}',
            '{"choices": "x"}',
            '{"choices": ["x"]}',
            '{"choices": [null]}',
            '{"choices": [[]]}',
            '{"object": "list"}',
            DEEP,
            '{"a":' * 10**5,
            "9" * 9999,
            "<html>Sign in</html>",
            KEY,
            "\0",
        )
    }
    again |= {
        f"200, error {str(fault)[:30]}": value(fault)
        for fault in (
            {"error": ERROR},
            {"error": "overloaded"},
            {"error": [ERROR]},
            {"error": {"message": None}},
            {"error": True},
            {"error": 7, "choices": []},
            {"error": {"message": [KEY], "code": "429"}},
            {"error": ERROR, "choices": None, "usage": None},
            {"error": {"code": 10**400}},
            completion(None, "error", choice={"error": ERROR}),
            {"error": {"message": KEY, "metadata": {"raw": KEY}}},
        )
    }
    half = len(GOOD) // 2
    return again | {
        "gzip that is none": packed(GOOD, "gzip"),
        "gzip cut": packed(gzip.compress(GOOD)[:-9], "gzip"),
        "brotli": packed(b"\x0b\x02\x80", "br"),
        "a bomb": packed(gzip.compress(bytes(2**26)), "gzip"),
        "an unknown packing": packed(GOOD, KEY.replace('"', "")),
        "too long": http(b" " * 2**24),
        "a stream": http(f"data: {GOOD.decode()}\n\ndata: [DONE]\n\n", "200 OK", "Content-Type: text/event-stream"),
        "204": http(b"", "204 No Content"),
        "205": http(b"", "205 Reset Content"),
        "JSON cut": http(GOOD[:half]),
        "fewer bytes": http(GOOD)[:-5],
        "chunks cut": chunked(GOOD, end=b""),
        "a chunk cut": chunked(GOOD[:half], end=b"ff\r\n" + GOOD[half:]),
        "chunk of garbage": chunked(GOOD, end=b"zz\r\n\r\n"),
        "chunk too large": chunked(GOOD, end=b"f" * 40 + b"\r\n"),
        "chunk below zero": chunked(GOOD, end=b"-1\r\n\r\n"),
        "nothing": b"",
        "reset": [None],
        "a line": b"HTTP/1.1 200 OK\r\n",
        "reset in the head": [http(GOOD)[:30], None],
        "reset in the body": [http(GOOD)[:-30], None],
        "half a line": b"HTTP/1.",
        "garbage": b"\0\xff" * 999,
        "words": b"Welcome to the hotel. " + KEY.encode() + b"\r\n\r\n",
        "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "a TLS alert": b"\x15\x03\x01\0\x02\x02\x46",
        "a header without end": http(GOOD, "200 OK", "X: " + "x" * 300_000),
        "headers without end": http(GOOD, "200 OK", *(f"X-{i}: {i}" for i in range(30_000))),
        "NUL in a header": http(GOOD, "200 OK", "X: a\0b"),
        "a header of no name": http(GOOD, "200 OK", ": x"),
        "two lengths": http(GOOD, "200 OK", "Content-Length: 3"),
        "length below zero": http(GOOD, "200 OK", "Content-Length: -1", length=False),
        "length in words": http(GOOD, "200 OK", "Content-Length: x", length=False),
        "unknown transfer": http(GOOD, "200 OK", "Transfer-Encoding: x", length=False),
        "101": http(GOOD, "101 Switching Protocols", "Upgrade: x"),
        "100 alone": b"HTTP/1.1 100 Continue\r\n\r\n",
        "status 2000": http(GOOD, "2000 OK"),
        "status 20": http(GOOD, "20 OK"),
        "status x": http(GOOD, "x"),
        "hang": [99],
        "slow": [b"HTTP/1.1 200 OK\r\n"] + [0.05, b"X: y\r\n"] * 999,
        "slow body": [http(b"", "200 OK", length=False)] + [0.05, b" "] * 999,
        "endless": [http(b"", "200 OK", length=False)] + [b" " * 2**20] * 999,
        "endless 1xx": [b"HTTP/1.1 102 Processing\r\n\r\n"] + [0.02, b"HTTP/1.1 102 Processing\r\n\r\n"] * 999,
    }


def refusals() -> dict:
    "Refusals of one request, whose episode is lost, as far as it was told why."
    texts = {
        "in words": "against our policy",
        "with a key": f"bad {KEY} and {quote(KEY, safe='')} of {TEAM}",
        "with codes": "bad \x1b[31m\0\ud83d thing",
        "without end": "x" * 2**21,
        "with an image": "data:image/png;base64," + "A" * 9999,
        "of blanks": " " * 2**21,
        "of tags": "<" * 2**21,
    }
    lost = {f"400 {name}": error("400 Bad Request", text) for name, text in texts.items()}
    lost |= {
        f"{status}": error(f"{status} Oops", KEY)
        for status in (300, 303, 304, 305, 400, 406, 410, 413, 415, 418, 422, 431, 451, 499)
    }
    lost |= {
        f"400 as {str(fault)[:30]}": value(fault, status="400 Bad")
        for fault in (
            None,
            [],
            7,
            KEY,
            {},
            [{"error": {"message": KEY}}],
            {"detail": [{"loc": [KEY], "msg": KEY}]},
            {"detail": KEY},
            {"errors": [KEY]},
            {"error": KEY},
            {"error": {"message": KEY, "param": KEY, "code": KEY, "type": KEY}},
            {"error": {"param": ["temperature"], "code": {}}},
            {"message": {"a": KEY}},
        )
    }
    return lost | {
        "400 without a body": http(b"", "400 Bad Request"),
        "400 of a page": http("<html><title>Bad</title>" + "<" * 99_999, "400 Bad Request"),
        "400 cut": http(json.dumps({"error": KEY}), "400 Bad Request", f"X: {KEY}"),
        "400 with every parameter": error(
            "400 Bad",
            "temperature, seed, tools, tool_choice, logprobs, max_tokens, max_completion_tokens and 'detail' "
            "are not supported",
        ),
    }


def ends(elsewhere: str = "http://localhost:9") -> dict:
    "Refusals that hold for every request: the run ends."
    over = {f"{status}": error(f"{status} No", KEY) for status in (401, 402, 403, 404, 405, 407)}
    over |= {
        f"429, wait {wait}": error("429 No", "quota is used up", f"Retry-After: {wait}")
        for wait in ("7200", "99999999999", "1" * 300, "Fri, 31 Dec 9999 23:59:59 GMT", formatdate(4e9, usegmt=True))
    }
    over |= {
        f"{status} to another host": http(
            b"", f"{status} Moved", f"Location: {elsewhere}/v1/chat/completions?key={quote(KEY, safe='')}"
        )
        for status in (301, 302, 307, 308)
    }
    over |= {
        f"307 to {where[:20]}": http(b"", "307 Moved", f"Location: {where}")
        for where in (
            "",
            "//localhost:9/v1",
            "http://[::",
            "http://x:99999/",
            "ftp://127.0.0.1/x",
            "https://127.0.0.1:9/v1",
            f"http://{TEAM}.example/{TEAM}",
            "\xff\xfe",
            "javascript:alert(1)",
            "http://127.0.0.1@localhost:9/",
        )
    }
    return over | {
        "no quota": error("429 No", "You exceeded your quota", code="insufficient_quota"),
        "no location": http(b"", "302 Found"),
        "503 for a day": error("503 Down", "back tomorrow", "Retry-After: 86400"),
        "200, error 401": value({"error": {"message": KEY, "code": 401}}),
        "a redirect to itself": http(b"", "307 Moved", "Location: /v1/chat/completions"),
    }


class Hostile(socketserver.ThreadingTCPServer):
    """`with Hostile(choose) as endpoint`: serves at `endpoint.url` what `choose(number)` gives: bytes, or a list of
    bytes, pauses in seconds, and None for a connection that is reset. `asked` counts the requests that came whole,
    `paths` and `opened` are where they went and what Authorization they had."""

    allow_reuse_address, daemon_threads, request_queue_size = True, True, 64

    def __init__(self, choose, tls=None):
        super().__init__(("127.0.0.1", 0), _Handler)
        if tls:
            self.socket = tls.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)
        self.choose, self.asked, self.lock, self.closing = choose, 0, threading.Lock(), threading.Event()
        self.paths, self.opened = [], set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        "Whoever asked has gone."


class _Handler(socketserver.StreamRequestHandler):
    def handle(self):
        if self.rfile.peek(1)[:1] == b"\x16":  # TLS is not spoken here
            return
        path, headers = (self.rfile.readline().decode("latin-1").split() or ["", ""])[1], {}
        while (line := self.rfile.readline().decode("latin-1")).strip():
            name, _, text = line.partition(":")
            headers[name.lower()] = text.strip()
        length = int(headers.get("content-length", 0))
        if not line or len(self.rfile.read(length)) < length:
            return
        with self.server.lock:
            number, self.server.asked = self.server.asked, self.server.asked + 1
            self.server.paths.append(path)
            self.server.opened.add(headers.get("authorization"))
        answer = self.server.choose(number)
        for piece in answer if isinstance(answer, list) else [answer]:
            if piece is None:  # a reset in place of an end
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                return
            if isinstance(piece, (int, float)):
                if self.server.closing.wait(piece):
                    return
            else:
                self.connection.sendall(piece)
