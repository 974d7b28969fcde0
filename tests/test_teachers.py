"Teachers behind an API: real HTTP on loopback, the real stage, faults, money, and what is left behind."

import base64
import json
import os
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from email.utils import formatdate

import pytest
from commands import one_line, qvk
from servers import PLAY, Endpoint, calls, images, refuses, says

from qwen_vl_kit.config import CollectConfig
from qwen_vl_kit.core import InputError, OverBudget, read_jsonl, root
from qwen_vl_kit.game.images import decode_png
from qwen_vl_kit.game.world import World
from qwen_vl_kit.learn.judge import judge_stores
from qwen_vl_kit.play.rollout import LostEpisodes
from qwen_vl_kit.protocol.turns import data_url
from qwen_vl_kit.runner.arguments import set_environment
from qwen_vl_kit.runner.run import check_access
from qwen_vl_kit.stages import collect
from qwen_vl_kit.stages.collect import check_store
from qwen_vl_kit.store import traces
from qwen_vl_kit.store.ledger import Ledger
from qwen_vl_kit.store.manifest import config_hash, ledger_rows
from qwen_vl_kit.store.prices import BOOK
from qwen_vl_kit.store.traces import load_episodes, read_sessions

pytestmark = pytest.mark.process

EVAL = "configs/seed/eval_gpt4o_vision_proper.toml"


@pytest.fixture
def at(monkeypatch):
    "Point the environment at an endpoint."
    def use(url, key="sk-secret-key", headers='{"X-Team": "secret-team"}'):
        for name, value in (("OPENAI_BASE_URL", url), ("OPENAI_API_KEY", key), ("OPENAI_HEADERS", headers)):
            monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    use("")
    return use


def settings(**changes):
    return CollectConfig(**{**PLAY, **changes})


def command(*args):
    "`qvk` where nothing in the environment says where an endpoint is."
    return qvk(*args, timeout=120, without=["OPENAI_"])


def first_frame(seed, size=64):
    "How a request shows the first frame of a seed."
    return data_url(World(size=size).reset(seed).frame)


def test_a_teacher_of_real_tokens_and_the_bill_agrees_with_the_server(at, tmp_path):
    "Behind the endpoint is the kit's own tiny model: it decodes the images it is sent and counts real tokens."
    from qwen_vl_kit.engine.base import Request, Sampling
    from qwen_vl_kit.engine.hf import HFEngine
    from qwen_vl_kit.model.loading import load_model
    engine, lock = HFEngine(load_model("tiny")), threading.Lock()

    def play(number, body):
        with lock:
            [output] = engine.generate([Request(body["messages"], (body["seed"],))], Sampling(0.6, body["max_tokens"]))
        return says(output.text, prompt=len(output.prompt_ids), completion=len(output.token_ids))

    with Endpoint(play) as endpoint:
        at(endpoint.url)
        result = collect.run(settings(seeds="0-2", render_size=144, max_new_tokens=6, max_reprompts=0), tmp_path)
    assert result.numbers["episodes"] == 3
    assert (
        len(endpoint.bodies) == 12 + 1 + result.numbers["asked_again"] == result.numbers["calls"]
    )  # one turn each, and the probe
    assert [row["quantity"] for row in result.usage] == endpoint.tokens
    ledger = Ledger(book=BOOK)
    assert (
        ledger.extend("collect", result.usage)
        == Decimal("0.15e-6") * endpoint.tokens[0] + Decimal("0.6e-6") * endpoint.tokens[1]
    )
    stored = list(load_episodes(tmp_path / "rollouts.db"))
    for body in endpoint.bodies:
        [image] = images(body)
        assert image["detail"] == "low"
    sent = {image["url"] for body in endpoint.bodies for image in images(body)}
    assert {
        data_url(turn.frame) for episode in stored for turn in episode.turns
    } == sent  # what was stored is what was shown
    assert decode_png(base64.b64decode(next(iter(sent)).partition(",")[2])).shape == (144, 144, 3)
    table = traces.turns(tmp_path / "rollouts.db")
    probe = next(read_jsonl(tmp_path / "calls.jsonl"))
    assert table.usd.sum() > 0 and probe["key"] == [0, 0, 0]
    assert not any(turn.altered for episode in stored for turn in episode.turns)


def test_as_many_episodes_at_once_as_the_config_says(at, tmp_path):
    together = threading.Barrier(6)  # the first six turns are answered when all six have been asked

    def play(number, body):
        if 1 <= number <= 6:
            together.wait(30)
        return says()

    with Endpoint(play) as endpoint:
        at(endpoint.url)
        collect.run(settings(seeds="0-11", concurrency=6), tmp_path)
    assert endpoint.most == 6


def test_whatever_passes_is_waited_for(at, tmp_path):
    "Every passing fault once; the collection ends whole, and says how many calls failed."
    faults = {
        2: refuses(429, "slow down", Retry_After="0"),
        3: refuses(429, "later", Retry_After=formatdate(time.time() - 5, usegmt=True)),
        5: refuses(500),
        6: "drop",
        7: "cut",
        8: "short",
        9: "hang",
        10: refuses(503, "busy", retry_after_ms="20"),
        11: "page",
    }
    with Endpoint(lambda number, body: faults.get(number, says())) as endpoint:
        at(endpoint.url)
        result = collect.run(settings(seeds="0-4", concurrency=5, call_seconds=1.0), tmp_path)
    assert (result.numbers["episodes"], result.numbers["turns"], result.numbers["invalid"]) == (5, 20, 0)
    assert result.numbers["failed_calls"] == len(faults) and len(endpoint.bodies) == 21 + len(faults)
    assert result.numbers["usd_in_doubt"] > 0  # replies that broke off may have been billed
    assert [row["quantity"] for row in result.usage] == endpoint.tokens == [21 * 900, 21 * 12]


def test_replies_without_an_action_are_asked_again_and_then_marked(at, tmp_path):
    empty = 200, {"choices": [], "usage": {"prompt_tokens": 900, "completion_tokens": 0}}
    cut = calls(arguments='{"actions": ["move_right", "d')
    said = {1: empty, 2: cut, 4: says("I cannot see."), 5: says(""), 6: says("fly -> fly"), 7: calls("interact")}
    with Endpoint(lambda number, body: said.get(number, calls())) as endpoint:
        at(endpoint.url)
        result = collect.run(settings(seeds="3", form="tool", max_reprompts=2, horizon="t4", observe="both"), tmp_path)
    [episode] = load_episodes(tmp_path / "rollouts.db")
    valid = [turn.decision.valid for turn in episode.turns]
    assert valid == [True, False, True, True] and episode.turns[1].decision.actions == episode.turns[1].executed == [
        "noop"
    ]
    assert (result.numbers["invalid"], result.numbers["asked_again"]) == (1, 5)
    assert (episode.turns[0].decision.actions, episode.turns[0].decision.reason) == (["move_right"], "grass")
    assert episode.turns[0].decision.usage["prompt_tokens"] == 3 * 900  # what a turn cost is what all its calls cost
    [tool] = endpoint.bodies[0]["tools"]
    assert (
        tool["function"]["name"] == "interact_many"
        and endpoint.bodies[0]["tool_choice"]["function"]["name"] == "interact_many"
    )
    assert tool["function"]["parameters"]["properties"]["actions"]["maxItems"] == 4
    assert len({body["seed"] for body in endpoint.bodies[1:4]}) == 3  # asked again is not asked the same


@pytest.mark.parametrize(
    "observe, frames, counts", [("image", 3, [1, 1, 2, 3, 3]), ("text", 3, [0] * 5), ("both", 1, [1] * 5)]
)
def test_as_many_images_as_the_protocol_says(at, tmp_path, observe, frames, counts):
    with Endpoint() as endpoint:
        at(endpoint.url)
        collect.run(settings(seeds="0", observe=observe, frames=frames, detail="high"), tmp_path)
    assert [len(images(body)) for body in endpoint.bodies] == counts
    assert all(image["detail"] == "high" for body in endpoint.bodies for image in images(body))
    contents = [body["messages"][1]["content"] for body in endpoint.bodies]
    assert all(
        isinstance(content, str) == (observe == "text") for content in contents
    )  # servers of text models take nothing else
    words = [content if isinstance(content, str) else content[-1]["text"] for content in contents]
    assert ("health" in words[1]) == (observe != "image") and words[-1].endswith(
        "last noop move_right move_right move_right"
    )


def test_what_a_model_refuses_is_learned_once(at, tmp_path):
    def picky(number, body):
        if "max_tokens" in body:
            return refuses(
                400,
                "Unsupported parameter: 'max_tokens' is not supported with this model. "
                "Use 'max_completion_tokens' instead.",
            )
        if "temperature" in body:
            return refuses(
                400,
                "Unsupported value: 'temperature' does not support 0.6 with this model. "
                "Only the default (1) is supported.",
            )
        return says()

    with Endpoint(picky) as endpoint:
        at(endpoint.url)
        collect.run(settings(seeds="0-3", retries=0), tmp_path)
    assert endpoint.statuses.count(400) == 2 and endpoint.statuses.count(200) == 17
    assert endpoint.bodies[-1]["max_completion_tokens"] == 64
    [(session, _)] = list(read_sessions(tmp_path / "rollouts.db", frames=False))[:1]
    assert session


def test_one_failing_seed_takes_no_other_along_and_is_played_again(at, tmp_path):
    bad = first_frame(2)
    ill = True

    def play(number, body):
        return refuses(400, "this picture is against our policy") if ill and images(body)[0]["url"] == bad else says()

    with Endpoint(play) as endpoint:
        at(endpoint.url)
        with pytest.raises(
            LostEpisodes,
            match=r"1 of 4 episodes are lost \(seed 2: CallFailed: 400: this picture is against our policy\)",
        ):
            collect.run(settings(seeds="0-3"), tmp_path)
        assert sorted(traces.episodes(tmp_path / "rollouts.db").seed) == [0, 1, 3]
        ill, asked = False, len(endpoint.bodies)
        result = collect.run(settings(seeds="0-3"), tmp_path)
    assert sorted(traces.episodes(tmp_path / "rollouts.db").seed) == [0, 1, 2, 3]
    assert len(endpoint.bodies) - asked == 4 + 1 and [row["quantity"] for row in result.usage] == endpoint.tokens


def test_an_episode_that_takes_too_long_is_lost_alone(at, tmp_path):
    slow = first_frame(1)
    with Endpoint(lambda number, body: "hang" if images(body)[0]["url"] == slow else says()) as endpoint:
        at(endpoint.url)
        with pytest.raises(LostEpisodes, match="1 of 3 .*seed 1: CallFailed: its episode took longer than 1 s"):
            collect.run(settings(seeds="0-2", episode_seconds=1.0), tmp_path)
    assert sorted(traces.episodes(tmp_path / "rollouts.db").seed) == [0, 2]


def test_when_the_server_is_gone_nobody_tries_the_rest(at, tmp_path):
    with Endpoint(lambda number, body: says() if number < 10 else refuses(500, "gone for good")) as endpoint:
        at(endpoint.url)
        with pytest.raises(LostEpisodes, match="and the rest is not tried"):
            collect.run(settings(seeds="0-99", retries=0), tmp_path)
        assert len(endpoint.bodies) < 30
        endpoint.answer = lambda number, body: refuses(
            401, f"Incorrect API key: {endpoint.headers[0]['Authorization'][7:]}"
        )
        with pytest.raises(InputError, match=r"refuses model 'gpt-4o-mini' \(401: Incorrect API key: \*\*\*\)"):
            collect.run(settings(seeds="0-99"), tmp_path)


@pytest.mark.parametrize(
    "budget, most", [({"budget_calls": 11}, 2), ({"budget_calls": 3}, 0), ({"budget_usd": 0.0014}, 2)]
)
def test_the_run_stops_before_its_budget_is_passed(at, tmp_path, budget, most):
    """A call costs 900 * 0.15 + 12 * 0.6 = 142.2 millionths: $0.0014 pays nine, the probe and two episodes of four
    turns."""
    config = settings(seeds="0-9", **budget)
    with Endpoint(lambda number, body: says(prompt=900 if number else 850)) as endpoint:
        at(endpoint.url)
        with pytest.raises(
            OverBudget, match=f"would be passed.*; {most} of 10 episodes are stored; with a larger budget"
        ):
            collect.run(config, tmp_path)
        spent = Decimal("0.15e-6") * endpoint.tokens[0] + Decimal("0.6e-6") * endpoint.tokens[1]
        assert len(endpoint.bodies) <= (config.budget_calls or 99) and spent <= Decimal(str(config.budget_usd or 1))
        assert len(traces.episodes(tmp_path / "rollouts.db")) == most if most else True
        more = settings(seeds="0-9", budget_usd=1.0)
        assert config_hash(more) == config_hash(config)  # the same collection, so `qvk` goes on with it
        result = collect.run(more, tmp_path)
    assert result.numbers["episodes"] == 10 and [row["quantity"] for row in result.usage] == endpoint.tokens


def test_a_budget_in_dollars_needs_a_price(at, tmp_path):
    with Endpoint() as endpoint:
        at(endpoint.url)
        with pytest.raises(InputError, match="no price for 'my-model/input'"):
            collect.run(settings(seeds="0", model="my-model", budget_usd=1.0), tmp_path / "collect")
        assert not endpoint.bodies and not (tmp_path / "collect").exists()
        result = collect.run(settings(seeds="0", model="my-model"), tmp_path / "collect")
    assert result.numbers["usd"] is None and [row["quantity"] for row in result.usage] == [4500, 60]
    assert traces.episodes(tmp_path / "collect" / "rollouts.db").usd.isna().all()  # not known is not nothing
    assert traces.turns(tmp_path / "collect" / "rollouts.db").usd.isna().all()
    assert next(read_jsonl(tmp_path / "collect" / "metrics.jsonl"))["usd"] is None


def test_a_model_without_a_price_is_told_before_it_plays(at, capsys):
    at("http://127.0.0.1:1/v1")
    check_access(settings(model="my-model"))
    assert capsys.readouterr().err.startswith("note: no price for 'my-model'")
    check_access(settings())
    assert not capsys.readouterr().err


def test_an_emptied_store_is_not_bought_again_unasked(at, tmp_path):
    with Endpoint() as endpoint:
        at(endpoint.url)
        collect.run(settings(seeds="0-1"), tmp_path)
        asked = len(endpoint.bodies)
        (tmp_path / "rollouts.db").write_bytes(b"")
        for name in ("metrics.jsonl", "calls.jsonl"):
            with pytest.raises(InputError, match=rf"rollouts.db: is empty, and .*{name}.* beside it"):
                collect.run(settings(seeds="0-1"), tmp_path)
            (tmp_path / name).unlink()
            assert len(endpoint.bodies) == asked and not (tmp_path / "rollouts.db").stat().st_size
        collect.run(settings(seeds="0-1"), tmp_path)  # nothing tells of anything: it is as good as new
    assert len(endpoint.bodies) == 2 * asked


def test_a_store_that_is_gone_is_not_bought_again(at, tmp_path):
    """Metrics have a line for each stored episode; calls alone are what is left of a session that was stopped before
    its first one ended."""
    with Endpoint() as endpoint:
        at(endpoint.url)
        collect.run(settings(seeds="0-1"), tmp_path)
        asked = len(endpoint.bodies)
        (tmp_path / "rollouts.db").unlink()
        with pytest.raises(
            InputError, match=r"rollouts.db: is missing, and metrics.jsonl and calls.jsonl beside it .* --force"
        ):
            collect.run(settings(seeds="0-1"), tmp_path)
        assert len(endpoint.bodies) == asked and not (tmp_path / "rollouts.db").exists()
        for left in ("", '{"step":1,"se'):  # of the first line, when it was killed just then
            (tmp_path / "metrics.jsonl").write_text(left)
            check_store(tmp_path)
        result = collect.run(settings(seeds="0-1"), tmp_path)
    assert result.numbers["episodes"] == 2
    assert result.numbers["calls"] == len(endpoint.bodies) == asked  # the calls hold the replies: nothing is paid again


def test_a_damaged_store_that_was_paid_for_is_not_bought_again_unasked(at, tmp_path):
    with Endpoint() as endpoint:
        at(endpoint.url)
        collect.run(settings(seeds="0-1"), tmp_path)
        asked = len(endpoint.bodies)
        (tmp_path / "rollouts.db").write_bytes((tmp_path / "rollouts.db").read_bytes()[:5000])
        with pytest.raises(
            InputError,
            match="damaged or cut short; bring it back from a copy, or give --force to play .and pay for. everything",
        ):
            collect.run(settings(seeds="0-1"), tmp_path)
        (tmp_path / "calls.jsonl").unlink()
        with pytest.raises(InputError, match="damaged or cut short; copy it again"):
            collect.run(settings(seeds="0-1"), tmp_path)
    assert len(endpoint.bodies) == asked


def test_cached_tokens_are_counted_and_billed_at_their_own_price(at, tmp_path):
    def play(number, body):  # the probe finds half of its prompt in the cache, and every second call after it
        status, reply = says(prompt=2000, completion=12)
        reply["usage"]["prompt_tokens_details"] = {"cached_tokens": 0 if number % 2 else 1024}
        return status, reply

    def exact(calls):
        cached = (calls + 1) // 2 * 1024
        return (
            Decimal(2000 * calls - cached) * Decimal("0.15") + cached * Decimal("0.075") + 12 * calls * Decimal("0.6")
        ) / 10**6

    with Endpoint(play) as endpoint:
        at(endpoint.url)
        first = collect.run(settings(seeds="0-1"), tmp_path)
        result = collect.run(settings(seeds="0-2"), tmp_path)  # from the journal, and on
    calls = len(endpoint.bodies)
    assert calls == 9 + 5 and {row["unit"]: row["quantity"] for row in result.usage} == {
        "prompt_tokens": 2000 * calls - 7 * 1024, "cached_tokens": 7 * 1024, "completion_tokens": 12 * calls}
    assert Ledger(book=BOOK).extend("collect", first.usage) == exact(9) and Ledger(book=BOOK).extend(
        "collect", result.usage
    ) == exact(calls)
    assert (
        sum(Decimal(row["usd"]) for row in ledger_rows(result)[0])
        == exact(calls)
        == Decimal(str(result.numbers["usd"]))
    )
    assert first.numbers["estimated_usd"] == float(
        8 * (2000 * Decimal("0.15") + 12 * Decimal("0.6")) / 10**6
    )  # at most: nothing in the cache
    table = traces.turns(tmp_path / "rollouts.db")
    assert table.cached_tokens.sum() == result.numbers["stored_cached_tokens"] == 6 * 1024
    stored = {name: count for name, count in result.numbers.items() if name.endswith("_tokens")}
    assert stored == {
        "stored_prompt_tokens": 12 * 2000,
        "stored_cached_tokens": 6 * 1024,
        "stored_completion_tokens": 12 * 12,
    }
    paid = (2000 - table.cached_tokens.fillna(0)) * 0.15 + table.cached_tokens.fillna(0) * 0.075 + 12 * 0.6
    assert list(table.usd) == pytest.approx(list(paid / 1e6))


def test_a_call_that_found_no_server_is_not_in_doubt(at):
    from qwen_vl_kit.engine.base import Request, Sampling
    from qwen_vl_kit.engine.refusals import CallFailed
    from qwen_vl_kit.engine.server import ServerEngine
    from qwen_vl_kit.store.meter import Meter
    meter = Meter(image=2833)
    at("http://127.0.0.1:1/v1")
    engine = ServerEngine("gpt-4o-mini", 1, retries=0, meter=meter)
    engine.endpoint.reached = True  # the server has answered before, and is gone
    with pytest.raises(CallFailed, match="the connection broke"):
        engine.generate([Request([{"role": "user", "content": "x"}])], Sampling())
    engine.close()
    assert (meter.failures, meter.unconfirmed_usd) == (1, 0)


def test_an_address_without_v1_is_told(at, tmp_path):
    with Endpoint(lambda number, body: refuses(404, "Not Found")) as endpoint:
        at(endpoint.url.removesuffix("/v1"))
        with pytest.raises(InputError, match="end in /v1"):
            collect.run(settings(seeds="0"), tmp_path / "collect")
        at(endpoint.url)
        with pytest.raises(InputError, match="and the model's name"):
            collect.run(settings(seeds="0"), tmp_path / "collect")


def test_a_remote_judge_stands_on_the_same_bill_and_answers_once(at, tmp_path):
    def play(number, body):
        return says('{"score": 40, "why": "wood"}', prompt=500, completion=10) if body["model"] == "judge-1" else says()

    config = settings(seeds="0-1", judge="remote", judge_model="judge-1")
    with Endpoint(play) as endpoint:
        at(endpoint.url)
        result = judge_stores(collect.run(config, tmp_path), config)
        assert {row["item"]: row["quantity"] for row in result.usage if row["unit"] == "prompt_tokens"} == {
            "gpt-4o-mini": 8100,
            "judge-1": 500,
        }
        # both episodes read alike, so they are asked about once
        assert [session["scores"] for session, _ in read_sessions(tmp_path / "rollouts.db", frames=False)] == [
            {"judge-1": 0.4}
        ] * 2
        asked = len(endpoint.bodies)
        again = judge_stores(collect.run(config, tmp_path), config)
    assert len(endpoint.bodies) == asked and again.usage == result.usage
    rubric = settings(seeds="0-1", judge="rubric")
    assert judge_stores(result, rubric).numbers["judged"] == 2


def test_a_collection_that_is_killed_goes_on_and_the_books_still_agree(at, tmp_path):
    """kill -9 while calls are in flight: nothing twice, nothing lost, and what the server has counted is on the bill
    or in doubt."""
    gate, full = threading.Event(), threading.Event()

    def play(number, body):
        if number == 33:  # all four that may be in flight have arrived
            full.set()
        if number >= 30:
            gate.wait()
        return says()

    config = settings(seeds="0-11")
    script = ("from qwen_vl_kit import config; from qwen_vl_kit.stages import collect; "
              f"collect.run(config.CollectConfig(**{config.model_dump()}), {str(tmp_path)!r})")
    with Endpoint(play) as endpoint:
        at(endpoint.url)
        process = subprocess.Popen([sys.executable, "-c", script], cwd=root())
        assert full.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        gate.set()
        stored = len(traces.episodes(tmp_path / "rollouts.db"))
        answered = sum("prompt_tokens" in line for line in read_jsonl(tmp_path / "calls.jsonl"))
        result = collect.run(config, tmp_path)
    numbers, lines = result.numbers, list(read_jsonl(tmp_path / "calls.jsonl"))
    rest = 4 * 12 - (answered - 1)  # the very first call asked what the first turn asked again
    assert (numbers["earlier_episodes"], numbers["estimated_calls_of_the_rest"]) == (stored, rest)
    assert not {"estimated_calls", "estimated_usd"} & set(numbers)
    assert numbers["estimated_usd_of_the_rest"] == pytest.approx(
        rest * 0.0001422
    )  # beside the dollars of the whole run
    assert 0 < stored < 12 and sorted(traces.episodes(tmp_path / "rollouts.db").seed) == list(range(12))
    assert 1 <= numbers["failed_calls"] <= 4 and numbers["usd_in_doubt"] >= 0.0001422 * numbers["failed_calls"]
    assert numbers["calls"] == len([line for line in lines if "model" in line]) == len(endpoint.bodies)
    assert [row["quantity"] for row in result.usage] == [
        count * (numbers["calls"] - numbers["failed_calls"]) for count in (900, 12)
    ]


def test_the_seeds_own_line_loses_one_seed_goes_on_and_shows_its_key_to_nobody(tmp_path):
    bad, ill = first_frame(1, 288), True
    with Endpoint(
        lambda number, body: refuses(400, "no") if ill and images(body)[0]["url"] == bad else says()
    ) as endpoint:
        (tmp_path / "env").write_text(f"""# keys
OPENAI_API_KEY=sk-secret-key
OPENAI_BASE_URL="{endpoint.url}"
OPENAI_HEADERS='{{"X-Team": "secret-team"}}'
""")
        line = [
            "eval",
            "--config",
            EVAL,
            "--seeds",
            "0-2",
            "--trace-db",
            tmp_path / "t" / "rollouts.db",
            "--set",
            'horizon="t3"',
        ]
        code, said, error = command(*line, "--env-file", tmp_path / "env")
        assert (
            code == 1
            and "1 of 3 episodes are lost (seed 1: CallFailed: 400: no)" in error
            and "[eval] app_id: a label" in error
        ), error
        ill = False
        code, said, error = command(*line, "--env-file", tmp_path / "env", "--set", "budget_usd=5")
        assert code == 0, error
        assert endpoint.most <= 2  # the TOML's concurrency
        assert (
            endpoint.headers[0]["Authorization"] == "Bearer sk-secret-key"
            and endpoint.headers[0]["X-Team"] == "secret-team"
        )
    table = traces.episodes(tmp_path / "t" / "rollouts.db")
    assert sorted(table.seed) == [0, 1, 2] and set(table.turns) == {3}
    for path in (tmp_path / "t").rglob("*"):
        assert not path.is_file() or b"secret" not in path.read_bytes(), path
    assert "secret" not in said + error and "base64" not in said + error
    made = json.loads((tmp_path / "t" / "manifest.json").read_text())
    last, sent = error.splitlines()[-1], len(endpoint.bodies)
    assert "episodes 3 (2 of them before)" in last and last.endswith(
        f"${made['usd']:.6f} for {sent} calls (1 not answered)"
    ), last
    assert Decimal(str(made["usd"])) == Decimal("0.15e-6") * endpoint.tokens[0] + Decimal("0.6e-6") * endpoint.tokens[1]
    code, _, error = command(*line)
    assert code == 0 and "already done" in error  # without a key: nothing is to be asked
    assert "note: " not in error  # nor is anything about to run


def test_the_seeds_line_obeys_max_turns():
    from qwen_vl_kit.runner.configs import load_config
    from qwen_vl_kit.settings import horizon
    assert horizon(load_config(EVAL, "collect").horizon).turns == 50


@pytest.mark.parametrize(
    "words, environment, expected",
    [
        (["--seeds", "0-"], {}, "cannot read seeds from '0-'"),
        (["--seeds", "5-2"], {}, "run backwards"),
        (["--seeds", "a"], {}, "cannot read seeds from 'a'"),
        ([], {}, "no key for model 'gpt-4o-mini'; set OPENAI_API_KEY"),
        ([], {"OPENAI_BASE_URL": "http://127.0.0.1:1/v1"}, "no server answers there; check OPENAI_BASE_URL"),
        ([], {"OPENAI_BASE_URL": "localhost"}, "OPENAI_BASE_URL: is not a URL"),
        ([], {"OPENAI_API_KEY": "k", "OPENAI_HEADERS": "X: y"}, "OPENAI_HEADERS: must be a JSON object of strings"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, words, environment, expected):
    (tmp_path / "env").write_text(
        "".join(f"{name}='{value}'\n" for name, value in environment.items()) or "OTHER_KEY=1\n"
    )
    code, said, error = command(
        "eval", "--config", EVAL, "--trace-db", tmp_path / "t" / "rollouts.db", "--env-file", tmp_path / "env", *words
    )
    assert (code, said) == (2, "") and expected in one_line(error), error
    assert not (tmp_path / "t").exists()


def test_an_env_file_does_not_override_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("QVK_TEST_A", "kept")
    (tmp_path / "env").write_text("QVK_TEST_A=other\n")
    set_environment(str(tmp_path / "env"))
    assert os.environ["QVK_TEST_A"] == "kept"
