"""The real collection against an endpoint of two hundred faults: what can be read is read, the rest is told in a
line, no secret is written."""

import base64
import itertools
import os
import shutil
import ssl
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace

import hostile
import pytest
from hostile import AGAIN, ENDS, LOST, READ, Hostile, error, says, value

from qwen_vl_kit.config import CollectConfig
from qwen_vl_kit.core import InputError, read_jsonl
from qwen_vl_kit.engine.refusals import CallFailed
from qwen_vl_kit.learn.judge import judge_stores
from qwen_vl_kit.play.rollout import LostEpisodes
from qwen_vl_kit.stages import collect
from qwen_vl_kit.store.traces import load_episodes, sources

pytestmark = pytest.mark.process

FAULTS = {
    (kind, name): answer
    for kind, table in (
        (READ, hostile.replies()),
        (AGAIN, hostile.unusable() | hostile.broken()),
        (LOST, hostile.refusals()),
        (ENDS, hostile.ends()),
    )
    for name, answer in table.items()
}
CUT_OFF = "1 of 1 replies were cut off; raise max_new_tokens"
UNUSABLE = "1 of 1 turns: no usable action in the reply, so noop was played"
TOLD = (InputError, LostEpisodes, CallFailed)  # one line each


@pytest.fixture
def play(monkeypatch, capfd):
    """Play against an endpoint; what was raised, the numbers, and the folder. Fails when a secret is written
    anywhere, or a request to no journal."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", hostile.KEY)
    monkeypatch.setenv("OPENAI_HEADERS", f'{{"X-Team": "{hostile.TEAM}"}}')
    folders, memory = itertools.count(), Path("/dev/shm")  # that stores are durable is tried elsewhere

    def play(endpoint, what="", notes=(), **changes):
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        out, raised, numbers = Path(place) / str(next(folders)), None, {}
        config = CollectConfig(
            **dict(
                prompt="brief",
                render_size=64,
                horizon="s1",
                teacher="model",
                engine="server",
                model="gpt-4o-mini",
                noise=0.0,
                seeds="0",
                retries=0,
                max_reprompts=0,
                call_seconds=1.5,
                episode_seconds=30.0,
            )
            | changes
        )
        try:
            numbers = judge_stores(collect.run(config, out), config).numbers
        except TOLD as error:
            raised = error
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        words = str(raised or "") + "".join(capfd.readouterr())
        assert not [note for note in notes if note not in words], words
        assert str(raised or "").isprintable() and len(str(raised or "")) < 1000 and "base64" not in words, (
            what,
            raised,
        )
        written = [path for path in out.rglob("*") if path.is_file()]
        for spelling in hostile.SPELLINGS:
            assert spelling not in words, (what, words)
            assert not [path.name for path in written if spelling.encode() in path.read_bytes()], what
        journal = read_jsonl(out / "calls.jsonl") if (out / "calls.jsonl").exists() else ()
        assert sum("model" in row for row in journal) >= endpoint.asked, (
            what
        )  # more where a connection broke before all of a request was sent
        return raised, numbers, out

    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        yield play


def test_there_are_as_many_faults_as_there_are_said_to_be():
    assert len(FAULTS) >= 200


def test_each_fault_and_nothing_else(play):
    """The endpoint never says anything else. Every run ends as it should, and with one of the kit's own errors if
    with any."""
    wrong = []
    for (kind, name), answer in FAULTS.items():
        if kind == READ:  # their turn comes below
            continue
        with Hostile(lambda number, answer=answer: answer) as endpoint:
            raised, numbers, _ = play(endpoint, f"{kind}: {name}")
        right = {
            AGAIN: isinstance(raised, CallFailed) or raised is None and numbers["invalid"] == 1,
            LOST: isinstance(raised, CallFailed),
            ENDS: isinstance(raised, (InputError, CallFailed)),
        }[kind]
        if not right:
            wrong.append(f"{kind}, {name}: {raised!r} {numbers.get('invalid')}")
    assert not wrong, "\n".join(wrong)


def test_every_passing_fault_once_in_a_run(play):
    """Each among usable replies: all turns are played with an action, and as many calls are made again as there were
    faults."""
    odd = {name: answer for (kind, name), answer in FAULTS.items() if kind in (READ, AGAIN)}
    again = sum(kind == AGAIN for kind, _ in FAULTS)
    answers = dict(
        enumerate(odd.values(), 1)
    )  # by half the number of the request: calls that are made again find usable ones between
    with Hostile(lambda number: answers.get(number / 2, says())) as endpoint:
        raised, numbers, out = play(
            endpoint, seeds="0-79", horizon="s5", concurrency=16, retries=20, max_reprompts=20, episode_seconds=600.0
        )
        assert raised is None and (numbers["turns"], numbers["invalid"]) == (400, 0)
        assert endpoint.asked > 2 * len(odd)  # each had its turn
        assert numbers["calls"] == endpoint.asked == 401 + again
    for episode in load_episodes(out / "rollouts.db", frames=False):
        for turn in episode.turns:
            words = turn.decision.text + turn.decision.reason
            assert not any(
                ord(letter) < 32 and letter not in "\t\n\r" or "\ud800" <= letter < "\ue000" for letter in words
            )
            assert "think" not in turn.decision.reason.lower()


def test_a_judge_repeats_the_key(play):
    "What a judge says is kept in a file of its own."
    answer = says(f'{{"score": 40, "why": "{hostile.KEY} {hostile.TEAM}"}}')
    with Hostile(lambda number: answer if number == 2 else says()) as endpoint:
        raised, numbers, out = play(endpoint, judge="remote", judge_model="gpt-4o-mini")
        assert raised is None and numbers["judged"] == 1 and endpoint.asked == 3
    assert "***" in (out / "answers.jsonl").read_text()


def test_a_page_in_place_of_an_answer_is_told_by_its_beginning(play):
    "It is what a web interface answers with, where the address lacks the API's path."
    page, stream = f"<!doctype html>\n<p>{hostile.KEY} Open WebUI", 'data: {"choices": []}\n\n'
    for text, parts in (
        (page, ("begins with '<!doctype html> <p>***", "ends in /v1")),
        (stream, ("begins with 'data: {",)),
        ("", ("is empty",)),
    ):
        with Hostile(lambda number, text=text: hostile.http(text)) as endpoint:
            raised, _, _ = play(endpoint)
        assert not [part for part in parts if part not in str(raised)], raised


def test_an_endpoint_that_has_moved_on_its_host_is_followed(play):
    moved = hostile.http(b"", "308 Permanent Redirect", "Location: /v2/chat/completions")
    with Hostile(lambda number: moved if not number else says()) as endpoint:
        raised, numbers, _ = play(endpoint)
        assert (
            raised is None and numbers["calls"] == endpoint.asked == 3
        )  # the one that was sent away is in the journal, too


@pytest.mark.parametrize("address", ["/v1/", "/v1?api-version=1", "/v1/chat/completions", "/v1 \n"])
def test_addresses_as_they_are_copied(play, address):
    with Hostile(lambda number: says()) as endpoint:
        endpoint.url = endpoint.url.removesuffix("/v1") + address
        raised, numbers, _ = play(endpoint)
        assert raised is None and numbers["calls"] == endpoint.asked == 2
    assert set(endpoint.paths) == {"/v1/chat/completions" + ("?api-version=1" if "?" in address else "")}


def test_a_user_and_a_password_in_the_address(play, monkeypatch):
    "They are sent as HTTP Basic, beside no key, and told to nobody."
    basic = base64.b64encode(b"me:pass-word-7").decode()
    with Hostile(lambda number: says(f"pass-word-7 {basic} -> do")) as endpoint:
        endpoint.url = endpoint.url.replace("//", "//me:pass-word-7@")
        raised, _, _ = play(endpoint)
        assert isinstance(raised, InputError) and "OPENAI_API_KEY is set, too" in str(raised) and not endpoint.asked
        monkeypatch.delenv("OPENAI_API_KEY")
        raised, numbers, out = play(endpoint)
        assert raised is None and not numbers["invalid"] and endpoint.opened == {f"Basic {basic}"}
    assert not [
        path for path in out.rglob("*") if b"pass-word" in path.read_bytes() or basic.encode() in path.read_bytes()
    ]


def test_what_is_refused_in_any_words_is_left_out(play):
    refused = [
        value({"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, status="422 No"),
        error("400 No", "Unsupported parameter", param="messages[1].content[0].image_url.detail"),
        error("400 No", "This model only takes its own temperature."),
        error("500 No", "tools param requires --jinja flag"),
        error("400 No", "Unsupported parameter", param="max_tokens", code="unsupported_parameter"),
    ]
    with Hostile(lambda number: dict(enumerate(refused)).get(number, says())) as endpoint:
        raised, numbers, out = play(endpoint, form="tool")
        assert raised is None and numbers["calls"] == endpoint.asked == len(refused) + 2
    left_out = dict.fromkeys(("seed", "detail", "temperature", "tools", "tool_choice")) | {
        "max_tokens": "max_completion_tokens"
    }
    [source] = sources(out / "rollouts.db").source
    assert source["parameters_changed"] == left_out


def test_waits_are_reported_and_cut_replies_counted(play):
    waits = error("429 No", "slow down", "Retry-After: 5")
    with Hostile(lambda number: waits if number == 1 else says("grass", "length")) as endpoint:
        raised, numbers, _ = play(
            endpoint, retries=1, notes=["asks to wait 5 s (429: slow down)"]
        )
        assert raised is None and numbers["notices"] == [CUT_OFF, UNUSABLE]


def test_a_tool_call_that_is_cut_off_is_counted_where_the_endpoint_does_not_say_so(play):
    "llama.cpp's server does not; calls that are whole, or shorter than they may be, are what it calls them."
    whole, half = '{"actions": ["do"]}', '{"actions": ["do", "mo'
    for arguments, tokens, is_cut in ((half, 64, True), (half, 63, False), (whole, 64, False)):
        call = {"function": {"name": "interact_many", "arguments": arguments}}
        answer = says(None, "tool_calls", {"prompt_tokens": 900, "completion_tokens": tokens}, tool_calls=[call])
        with Hostile(lambda number, answer=answer: answer) as endpoint:
            raised, numbers, _ = play(endpoint, arguments, form="tool", max_new_tokens=64)
        assert raised is None and numbers["invalid"] == (arguments == half)
        assert numbers.get("notices", []) == [CUT_OFF] * is_cut + [UNUSABLE] * numbers["invalid"]


@pytest.fixture(scope="module")
def certified():
    "A TLS context with a certificate that nobody has signed."
    with tempfile.TemporaryDirectory() as place:
        pair = ["-keyout", f"{place}/key.pem", "-out", f"{place}/certificate.pem"]
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-days",
                "2",
                "-subj",
                "/CN=other.example",
                *pair,
            ],
            check=True,
            capture_output=True,
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(f"{place}/certificate.pem", f"{place}/key.pem")
        context.authority = f"{place}/certificate.pem"
        yield context


@pytest.mark.skipif(not shutil.which("openssl"), reason="makes a certificate with openssl")
@pytest.mark.parametrize(
    "scheme, authority, expected",
    [
        ("https", False, "certificate is not accepted (self-signed certificate)"),
        ("https", True, "certificate is not accepted"),
        ("http", False, "begins with https://"),
    ],
)
def test_faults_of_tls_are_told_as_such(play, monkeypatch, certified, scheme, authority, expected):
    "A certificate of nobody, one of another host, and TLS where plain HTTP was looked for."
    if authority:
        monkeypatch.setenv("SSL_CERT_FILE", certified.authority)
    with Hostile(lambda number: says(), certified) as endpoint:
        endpoint.url = endpoint.url.replace("http:", f"{scheme}:")
        raised, _, _ = play(endpoint)
        assert isinstance(raised, InputError) and expected in str(raised) and not endpoint.asked


def test_https_of_a_server_without_tls(play):
    with Hostile(lambda number: says()) as endpoint:
        endpoint.url = endpoint.url.replace("http:", "https:")
        raised, _, _ = play(endpoint)
        assert isinstance(raised, InputError) and "the address of a server without TLS begins with http://" in str(
            raised
        )


def test_proxies(play, monkeypatch):
    "One that works, one that is down, one that nobody knows; and an endpoint on this machine, which needs none."
    with Hostile(lambda number: says()) as proxy, Hostile(lambda number: says()) as near:
        far = SimpleNamespace(url="http://endpoint.invalid/v1", asked=0)
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//me:pass-word-7@").removesuffix("/v1"))
        raised, numbers, _ = play(far)
        assert raised is None and proxy.asked == numbers["calls"] == 2
        monkeypatch.setenv("HTTP_PROXY", "me:pass-word-7@127.0.0.1:9")
        raised, _, _ = play(far)
        assert isinstance(raised, InputError) and str(raised).startswith(
            "HTTP_PROXY: the proxy http://127.0.0.1:9 does not answer"
        )
        assert play(near)[0] is None and near.asked == 2
        monkeypatch.setenv("HTTP_PROXY", "gopher://me:pass-word-7@127.0.0.1:9")
        raised, _, _ = play(far)
        assert (
            isinstance(raised, InputError)
            and str(raised).startswith("HTTP_PROXY: a proxy of the scheme 'gopher'")
            and "pass" not in str(raised)
        )
