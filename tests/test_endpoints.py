"The real collection against an endpoint of two hundred faults: what can be read is read, the rest is told in a line, no secret is written."

import itertools
import os
import tempfile
from pathlib import Path

import hostile
import pytest
from hostile import AGAIN, ENDS, LOST, READ, Hostile, says

from qwen_vl_kit import collect, traces
from qwen_vl_kit.config import CollectConfig
from qwen_vl_kit.core import InputError, read_jsonl
from qwen_vl_kit.engines import CallFailed
from qwen_vl_kit.rollout import LostEpisodes

FAULTS = {
    (kind, name): answer
    for kind, table in ((READ, hostile.replies()), (AGAIN, hostile.unusable() | hostile.broken()), (LOST, hostile.refusals()), (ENDS, hostile.ends()))
    for name, answer in table.items()
}
TOLD = (InputError, LostEpisodes, CallFailed)  # one line each


@pytest.fixture
def play(monkeypatch, capfd):
    "Play against an endpoint; what was raised, the numbers, and the folder. Fails when a secret is written anywhere, or a request to no journal."
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", hostile.KEY)
    monkeypatch.setenv("OPENAI_HEADERS", f'{{"X-Team": "{hostile.TEAM}"}}')
    folders, memory = itertools.count(), Path("/dev/shm")  # that stores are durable is tried elsewhere

    def play(endpoint, what="", **changes):
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
                asks=0,
                call_seconds=1.5,
                episode_seconds=30.0,
            )
            | changes
        )
        try:
            numbers = collect.run(config, out).numbers
        except TOLD as error:
            raised = error
        except Exception as error:
            raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
        words = str(raised or "") + "".join(capfd.readouterr())
        assert str(raised or "").isprintable() and len(str(raised or "")) < 1000 and "base64" not in words, (what, raised)
        written = [path for path in out.rglob("*") if path.is_file()]
        for spelling in hostile.SPELLINGS:
            assert spelling not in words, (what, words)
            assert not [path.name for path in written if spelling.encode() in path.read_bytes()], what
        if (out / "calls.jsonl").exists():
            assert sum("model" in row for row in read_jsonl(out / "calls.jsonl")) >= endpoint.asked, what
        return raised, numbers, out

    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as place:
        yield play


def test_there_are_as_many_faults_as_there_are_said_to_be():
    assert len(FAULTS) >= 200


def test_each_fault_and_nothing_else(play):
    "The endpoint never says anything else. Every run ends as it should, and with one of the kit's own errors if with any."
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
    "Each among usable replies: all turns are played with an action, and as many calls are made again as there were faults."
    odd = {name: answer for (kind, name), answer in FAULTS.items() if kind in (READ, AGAIN)}
    again = sum(kind == AGAIN for kind, _ in FAULTS)
    answers = dict(enumerate(odd.values(), 1))  # by half the number of the request: calls that are made again find usable ones between
    with Hostile(lambda number: answers.get(number / 2, says())) as endpoint:
        raised, numbers, out = play(endpoint, seeds="0-79", horizon="s5", concurrency=16, retries=20, asks=20, episode_seconds=600.0)
        assert raised is None and (numbers["turns"], numbers["invalid"]) == (400, 0)
        assert endpoint.asked > 2 * len(odd)  # each had its turn
        assert numbers["calls"] == endpoint.asked == 401 + again
    for episode in traces.load(out / "rollouts.db", frames=False):
        for turn in episode.turns:
            words = turn.decision.text + turn.decision.reason
            assert not any(ord(letter) < 32 and letter not in "\t\n\r" or "\ud800" <= letter < "\ue000" for letter in words)
            assert "think" not in turn.decision.reason.lower()
