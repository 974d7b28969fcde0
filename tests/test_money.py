"""What calls of endpoints cost: the journal, budgets, unknown prices and usage, a judge's paid answers. Real HTTP on
loopback, real processes."""

import json
import math
import random
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal

import pytest
from pydantic import ValidationError
from servers import PLAY, Endpoint, by_seed, images, refuses, says

from qwen_vl_kit.config import BenchmarkConfig, CollectConfig
from qwen_vl_kit.core import InputError, OverBudget, read_jsonl, root
from qwen_vl_kit.engine.refusals import CallFailed
from qwen_vl_kit.learn.judge import judge_stores
from qwen_vl_kit.play.rollout import LostEpisodes
from qwen_vl_kit.runner import run
from qwen_vl_kit.runner.run import RunFailed, run_all, run_stage, spending, state
from qwen_vl_kit.show.tables import arms_table, read_arms, text_table
from qwen_vl_kit.stages import benchmark, collect
from qwen_vl_kit.store import manifest, traces
from qwen_vl_kit.store.manifest import ledger_rows
from qwen_vl_kit.store.meter import Meter
from qwen_vl_kit.store.prices import BOOK
from qwen_vl_kit.store.traces import read_sessions

pytestmark = pytest.mark.process

JUDGED = dict(judge="remote", judge_model="judge-1", retries=0)
SCORE = says('{"score": 40, "why": "wood"}', prompt=500, completion=10)


@pytest.fixture
def at(monkeypatch):
    "Point the environment at an endpoint."
    for name in ("OPENAI_API_KEY", "OPENAI_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    return lambda url: monkeypatch.setenv("OPENAI_BASE_URL", url)


def settings(**changes):
    return CollectConfig(**{**PLAY, **changes})


def play(config, out):
    "What the stage does: collect, then judge."
    return judge_stores(collect.run(config, out), config)


def sent(out):
    "The calls that a journal tells of."
    return [row for row in read_jsonl(out / "calls.jsonl") if "model" in row] if (out / "calls.jsonl").is_file() else []


def of_judge(endpoint):
    "The requests that a judge got."
    return [body for body in endpoint.bodies if body["model"] == "judge-1"]


def both(judged=lambda number: SCORE):
    "Answers of a teacher that says something else each time, and of a judge: `judged(number)` of its requests from 0."
    lock, numbers = threading.Lock(), iter(range(10**6))

    def answer(number, body):
        if body["model"] != "judge-1":
            return says(f"grass {number} -> do")
        with lock:
            mine = next(numbers)
        return judged(mine)
    return answer


class Billing:
    """A model that heeds what it is asked, and its bill: a picture is 2,833 tokens, four characters are one, a reply
    has at most `max_tokens`."""

    def __init__(self, seed, faults=()):
        self.random, self.faults, self.usd, self.lock = random.Random(seed), faults, Decimal(0), threading.Lock()

    def __call__(self, number, body):
        with self.lock:
            text = "".join(message["content"] for message in body["messages"] if isinstance(message["content"], str))
            prompt = 2833 * len(images(body)) + len(text) // 4
            completion, fault = self.random.randint(1, body["max_tokens"]), self.random.random()
            if fault < 0.1 and self.faults:
                return refuses(503, "busy", retry_after_ms="1")
            self.usd += (
                prompt * Decimal("0.15") + completion * Decimal("0.6")
            ) / 10**6  # whatever becomes of the reply
            return (
                self.random.choice(self.faults)
                if fault < 0.2 and self.faults
                else says(prompt=prompt, completion=completion)
            )


# The journal


def test_a_request_stands_in_the_journal_before_it_is_sent(at, tmp_path):
    seen, usual = [], both()

    def answer(number, body):
        seen.append((number + 1, len(sent(tmp_path)), sent(tmp_path)[number]["model"]))
        return refuses(500, "busy", retry_after_ms="1") if number in (0, 5, 12) else usual(number, body)

    with Endpoint(answer) as endpoint:
        at(endpoint.url)
        play(settings(seeds="0-3", **JUDGED | {"retries": 3}), tmp_path)
    assert all(rows >= asked for asked, rows, _ in seen) and len(seen) == len(sent(tmp_path))
    assert {model for _, _, model in seen} == {"gpt-4o-mini", "judge-1"}


def test_nothing_is_sent_when_the_journal_has_closed(at, tmp_path):
    "One call is told that the key is wrong while others are about to be made again."
    with Endpoint(
        lambda number, body: says() if number < 6 else refuses(401, "bad key") if number == 9 else refuses(500, "busy")
    ) as endpoint:
        at(endpoint.url)
        with pytest.raises(InputError, match="refuses model"):
            collect.run(settings(seeds="0-99", concurrency=16), tmp_path)
        assert len(endpoint.bodies) <= len(sent(tmp_path))  # its thread has ended: nothing comes later


def test_a_journal_that_cannot_be_written_stops_everything(at, tmp_path):
    with Endpoint() as endpoint:
        at(endpoint.url)
        for name, make in (("full", lambda path: path.symlink_to("/dev/full")), ("folder", lambda path: path.mkdir())):
            (tmp_path / name).mkdir()
            make(tmp_path / name / "calls.jsonl")
            with pytest.raises(InputError, match="calls.jsonl: "):
                collect.run(settings(seeds="0"), tmp_path / name)
        assert not endpoint.bodies


def test_a_journal_that_is_taken_away_stops_the_run(at, tmp_path):
    def answer(number, body):
        if number == 10:
            (tmp_path / "calls.jsonl").unlink()
        return says()

    with Endpoint(answer) as endpoint:
        at(endpoint.url)
        with pytest.raises(InputError, match="calls.jsonl: was removed or replaced"):
            collect.run(settings(seeds="0-30"), tmp_path)
    assert len(endpoint.bodies) <= 10 + 1 + 4


FOREIGN = [
    "hello",
    "[1]",
    "7",
    "null",
    "{}",
    '{"call": "1"}',
    '{"call": 9, "answered": true, "billed": true}',
    "\x00\x00",
    "[" * 10**5,
    '{"call": 1, "model": "m", "worst": [1], "key": [], "again": 0}',
    '{"call": 2, "model": "m", "worst": null, "again": 0}',
    '{"call": 1, "prompt_tokens": "9", "completion_tokens": 1}',
    '{"call": 1, "prompt_tokens": -9, "completion_tokens": 1}',
    '{"call": 2, "model": ["m"], "worst": [9, 9], "again": 0}',
    '{"call": 2, "model": "gpt-4o-mini", "worst": [9, -10], "again": 0}',
    '{"call": 2, "model": "m", "worst": [9, 9], "size": [1], "again": 0}',
    '{"call": 1, "answered": true}',
]


@pytest.mark.parametrize("line", FOREIGN)
def test_a_foreign_line_in_a_journal_is_told_and_nothing_is_sent(at, tmp_path, line):
    first = '{"call": 1, "model": "gpt-4o-mini", "worst": [900, 64], "key": [], "again": 0}'
    (tmp_path / "calls.jsonl").write_text(f"{first}\n\n{line}\n")
    with Endpoint() as endpoint:
        at(endpoint.url)
        with pytest.raises(InputError, match=r"calls.jsonl:3: is not a row that this kit writes"):
            collect.run(settings(seeds="0"), tmp_path)
        assert not endpoint.bodies and not (tmp_path / "rollouts.db").exists()


def test_one_process_at_a_time_writes_a_journal(tmp_path):
    journal = tmp_path / "calls.jsonl"
    script = (
        f"from qwen_vl_kit.store.meter import Meter; m = Meter(journal=__import__('pathlib').Path({str(journal)!r})); "
        "m.send('m', 0, 9, 1); print('sent', flush=True); input(); m.settle(1, None); m.close()"
    )
    early = Meter(budget_calls=2, journal=journal, book=BOOK)  # has read what there was: nothing
    other = subprocess.Popen(
        [sys.executable, "-c", script], cwd=root(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "sent\n"
    with pytest.raises(InputError, match="another run writes to it"):
        early.send("m", 0, 9, 1)
    other.communicate("\n")
    assert early.send("m", 0, 9, 1) == 2  # what the other has sent counts
    with pytest.raises(OverBudget):
        early.send("m", 0, 9, 1)
    early.close()
    assert [row["call"] for row in sent(tmp_path)] == [1, 2]


def test_threads_share_a_meter(tmp_path):
    meter = Meter(budget_calls=300, journal=tmp_path / "calls.jsonl", book=BOOK)

    def call(_):
        try:
            number = meter.send("gpt-4o-mini", 0, 4000, 64)
        except OverBudget:
            return 0
        meter.settle(number, {"prompt_tokens": 1000, "completion_tokens": 10})
        return number

    with ThreadPoolExecutor(16) as pool:
        numbers = list(pool.map(call, range(400)))
    meter.close()
    again = Meter(journal=tmp_path / "calls.jsonl", book=BOOK)
    assert (
        sorted(numbers)[100:] == list(range(1, 301))
        and again.usd == meter.usd == 300 * Decimal("0.000156")
        and not meter.reserved
    )


# Budgets


@pytest.mark.parametrize("concurrency", [1, 7, 64])
def test_who_bills_what_was_asked_is_not_paid_more_than_the_budget(at, tmp_path, concurrency):
    "Under all faults, over resumes with budgets that grow and with torn last lines."
    billing = Billing(concurrency, ("drop", "cut", "short", "page"))
    with Endpoint(billing) as endpoint:
        at(endpoint.url)
        for budget in (0.0001, 0.004, 0.012, 0.02):
            try:
                collect.run(settings(seeds="0-39", concurrency=concurrency, budget_usd=budget, retries=2), tmp_path)
            except (OverBudget, LostEpisodes):
                pass
            assert billing.usd <= Decimal(str(budget)) and len(endpoint.bodies) <= len(sent(tmp_path))
            with open(tmp_path / "calls.jsonl", "a") as file:
                file.write('{"call": 99')
        assert billing.usd > Decimal("0.008")


def test_a_budget_holds_when_the_process_is_killed_again_and_again(at, tmp_path):
    "kill -9 while calls are in flight, and the last line is torn; the judge's calls are under the same budget."
    config, billing, gate = (
        settings(seeds="0-11", budget_usd=0.02, **JUDGED | {"judge_model": "gpt-4o-mini"}),
        Billing(0),
        threading.Event(),
    )
    script = "from qwen_vl_kit import config; from qwen_vl_kit.stages import collect; " \
        f"collect.run(config.CollectConfig(**{config.model_dump()}), {str(tmp_path)!r})"

    def answer(number, body):
        reply = billing(number, body)
        if number in (9, 19):
            gate.set()
        return "hang" if number in (7, 8, 9, 17, 18, 19) else reply

    with Endpoint(answer) as endpoint:
        at(endpoint.url)
        for _ in range(2):
            process = subprocess.Popen([sys.executable, "-c", script], cwd=root())
            assert gate.wait(60)
            gate.clear()
            process.send_signal(signal.SIGKILL)
            process.wait()
            blob = (tmp_path / "calls.jsonl").read_bytes()
            (tmp_path / "calls.jsonl").write_bytes(blob[:-3])
        with pytest.raises(OverBudget, match="would be passed"):
            play(config, tmp_path)
        assert billing.usd <= Decimal("0.02")
        numbers = Meter(journal=tmp_path / "calls.jsonl").numbers()
        assert billing.usd <= Decimal(str(numbers["usd"])) + Decimal(str(numbers["usd_in_doubt"]))


def test_a_turn_that_was_answered_is_not_paid_again(at, tmp_path):
    """All episodes are open together. A refused key ends the first session, a kill the second; the third is refused
    again, and the fourth finishes: each turn is billed once, and what is stored is what one session would have."""
    config, limits, full = settings(seeds="0-7", concurrency=8, retries=0), iter((13, 21, 25, 999)), threading.Event()
    script = "from qwen_vl_kit import config; from qwen_vl_kit.stages import collect; " \
        f"collect.run(config.CollectConfig(**{config.model_dump()}), {str(tmp_path / 'run')!r})"
    billed, limit, hangs, lock = [], 0, False, threading.Lock()

    def answer(number, body):
        with lock:
            if len(billed) < limit:
                billed.append(body["seed"])
                return by_seed(number, body)
        full.set()
        return "hang" if hangs else refuses(401, "no such key", code="invalid_api_key")

    with Endpoint(answer) as endpoint:
        at(endpoint.url)
        for session, limit in enumerate(limits):
            hangs = session == 1
            if hangs:
                full.clear()
                process = subprocess.Popen([sys.executable, "-c", script], cwd=root())
                assert full.wait(60)
                process.send_signal(signal.SIGKILL)
                process.wait()
            elif limit < 999:
                with pytest.raises(InputError, match="no such key"):
                    collect.run(config, tmp_path / "run")
            else:
                numbers = collect.run(config, tmp_path / "run").numbers
    with Endpoint(by_seed) as endpoint:
        at(endpoint.url)
        collect.run(config, tmp_path / "alone")
    lost = 8  # that were answered, and whose answer the killed process may not have read
    assert len(set(billed)) == 8 * 4 and len(billed) <= 1 + 8 * 4 + lost
    assert numbers["episodes"] == 8 and numbers["usd"] >= 0.0001422 * 8 * 4
    assert len({traces.fingerprint(tmp_path / out / "rollouts.db") for out in ("run", "alone")}) == 1


@pytest.mark.parametrize("budget, episodes", [({"budget_calls": 12}, 2), ({"budget_usd": 0.0022}, 3)])
def test_no_episode_is_begun_that_the_budget_cannot_finish(at, tmp_path, budget, episodes):
    "Ten episodes of four turns; a call costs $0.0001422."
    config, paid = settings(seeds="0-9", **budget), 1 + 4 * episodes
    ended = f"would be passed: {paid} calls.*; {episodes} of 10 episodes are stored; .* takes at most (.*) more"
    with Endpoint() as endpoint:
        at(endpoint.url)
        for _ in range(2):  # the second time there is no room for the call that comes before all others
            with pytest.raises(OverBudget, match=ended) as refused:
                collect.run(config, tmp_path)
            assert len(endpoint.bodies) == paid
        more = re.search(ended, str(refused.value))[1]
        enough = {"budget_calls": paid + int(more.split()[0])} if "calls" in more else \
            {"budget_usd": paid * 0.0001422 + float(more[1:])}
        assert collect.run(settings(seeds="0-9", **enough), tmp_path).numbers["episodes"] == 10
    assert len(endpoint.bodies) == 1 + 10 * 4 + 1


@pytest.mark.parametrize("budget", [{"budget_calls": 1}, {"budget_usd": 1e-9}])
def test_a_budget_without_room_for_an_episode_pays_for_nothing(at, tmp_path, budget):
    with Endpoint() as endpoint:
        at(endpoint.url)
        for _ in range(2):
            with pytest.raises(OverBudget, match="would be passed: .*; 0 of 3 episodes are stored"):
                collect.run(settings(seeds="0-2", **budget), tmp_path)
        assert not endpoint.bodies


@pytest.mark.parametrize(
    "bad",
    [
        {"budget_usd": -1.0},
        {"budget_usd": float("nan")},
        {"budget_usd": float("inf")},
        {"budget_usd": "1"},
        {"budget_calls": -1},
        {"budget_calls": 1.5},
        {"budget_calls": True},
    ],
)
def test_a_budget_is_a_number_from_0_up(bad):
    with pytest.raises(ValidationError):
        settings(**bad)


def test_replies_longer_than_asked_stop_the_run_and_a_passed_budget_is_told(at, tmp_path):
    "The probe's reply is short; then 30,000 tokens come where 64 were asked for, to four calls at once."
    together = threading.Barrier(4)
    with Endpoint(
        lambda number, body: says(completion=30_000 if number and (together.wait(30) or True) else 12)
    ) as endpoint:
        at(endpoint.url)
        config = settings(seeds="0-19", budget_usd=0.03)
        for _ in range(2):
            with pytest.raises(
                OverBudget, match=r"the budget of \$0.03 was passed by \$0.04.*; 0 of 20 episodes are stored"
            ):
                collect.run(config, tmp_path)
        assert len(endpoint.bodies) == 5
    numbers = Meter(config.budget_usd, journal=tmp_path / "calls.jsonl").numbers()
    assert numbers["usd_over_budget"] == pytest.approx(numbers["usd"] - 0.03) and "more than the budget" in spending(
        numbers
    )


def test_what_was_learnt_of_long_replies_is_known_to_the_next_run(tmp_path):
    meter = Meter(0.1, journal=tmp_path / "calls.jsonl", book=BOOK)
    meter.settle(meter.send("gpt-4o-mini", 0, 1000, 64), {"prompt_tokens": 900, "completion_tokens": 4000})
    meter.close()
    again = Meter(0.1, journal=tmp_path / "calls.jsonl", book=BOOK)
    again.send("gpt-4o-mini", 0, 500, 64)
    assert again.last_reserved == again.cost("gpt-4o-mini", 900, 4000)
    assert again.bound("other")(0, 500, 64) == [250, 64]  # of another model nothing is known


def test_an_arm_of_the_benchmark_whose_dollars_are_unknown_did_not_cost_nothing(at, tmp_path):
    shown = {name: PLAY[name] for name in ("prompt", "render_size", "horizon", "engine")}
    for model, known in (("gpt-4o-mini", True), ("my-model", False)):
        with Endpoint() as endpoint:
            at(endpoint.url)
            benchmark.run(
                BenchmarkConfig(**shown, model=model, arms=["random", "base"], seeds="1000000-1000001"),
                tmp_path / model,
            )
        chance, base = read_arms(tmp_path / model / "arms.csv").usd
        assert chance == 0 and (base > 0 if known else math.isnan(base))
        assert text_table(arms_table(tmp_path / model / "arms.csv")).endswith("–") != known


def test_calls_of_a_probe_that_failed_count(at, tmp_path):
    "A probe and an episode are five calls: after four of seven there is no room for them."
    for name, fault in (("short", "short"), ("refused", refuses(500, "busy", retry_after_ms="1"))):
        with Endpoint(lambda number, body, fault=fault: fault) as endpoint:
            at(endpoint.url)
            for error in (CallFailed, CallFailed, OverBudget):
                with pytest.raises(error):
                    collect.run(settings(seeds="0", budget_calls=7, retries=1), tmp_path / name)
            assert len(endpoint.bodies) == 4


# What is unknown


ABSURD = [
    None,
    [900, 12],
    "900",
    {},
    {"prompt_tokens": 0, "completion_tokens": 0},
    *(
        {"prompt_tokens": count, "completion_tokens": 12}
        for count in (None, "900", 900.0, -900, 2**63, True, {"text": 900}, float("nan"))
    ),
]


@pytest.mark.parametrize("usage", ABSURD)
def test_dollars_are_unknown_where_an_answer_does_not_count_its_tokens(at, tmp_path, usage):
    reply = says()[1] | {"usage": usage}
    if usage is None:
        del reply["usage"]
    with Endpoint(lambda number, body: (200, reply) if number in (3, 4) else says()) as endpoint:
        at(endpoint.url)
        result = collect.run(settings(seeds="0-2"), tmp_path)
    numbers = result.numbers
    assert (numbers["turns"], numbers["invalid"], numbers["usd"], numbers["answers_without_usage"]) == (12, 0, None, 2)
    assert "dollars unknown (2 answers did not say" in spending(numbers)
    made = json.loads(manifest.write(tmp_path, result, settings(seeds="0-2")).read_text())
    assert made["usd"] is None and made["unpriced"] == [
        {"item": "gpt-4o-mini", "quantity": 2, "unit": "answers without usage"}
    ]
    unknown = [row["usd"] for row in read_jsonl(tmp_path / "metrics.jsonl")].count(None)
    assert unknown == traces.episodes(tmp_path / "rollouts.db").usd.isna().sum() > 0


def test_what_is_unknown_counts_at_its_worst_toward_a_budget(at, tmp_path):
    reply = says()[1] | {"usage": None}
    with Endpoint(lambda number, body: (200, reply)) as endpoint:
        at(endpoint.url)
        with pytest.raises(OverBudget, match=r"dollars unknown and up to \$0.00.* for calls whose cost is not known"):
            collect.run(settings(seeds="0-9", budget_usd=0.005), tmp_path)
        assert 0 < len(endpoint.bodies) < 12  # of $0.00046 at most each


def test_a_dated_name_is_billed_as_its_model(at, tmp_path):
    with Endpoint(
        lambda number, body: says('{"score": 9}') if body["model"].startswith("openai/") else says()
    ) as endpoint:
        at(endpoint.url)
        names = dict(model="gpt-4o-mini-2024-07-18", judge_model="openai/gpt-4o-mini-2024-07-18")
        result = play(settings(seeds="0", budget_usd=1.0, **JUDGED | names), tmp_path)
        assert result.numbers["usd"] == pytest.approx(6 * 0.0001422) and result.numbers["judged"] == 1
        assert (
            sum(Decimal(row["usd"]) for row in ledger_rows(result)[0]) == 6 * Decimal("0.0001422")
            and not ledger_rows(result)[1]
        )
        with pytest.raises(InputError, match="no price for 'gpt-4o-2024-08-06/input'"):
            collect.run(settings(seeds="0", budget_usd=1.0, model="gpt-4o-2024-08-06"), tmp_path / "other")
    assert len(endpoint.bodies) == 6


# A judge


@pytest.mark.parametrize(
    "fault, error",
    [
        (refuses(400, "image too large"), CallFailed),
        ("drop", CallFailed),
        (says("A fine game."), None),
        (refuses(401, "bad key"), InputError),
        ("hang", CallFailed),
    ],
)
def test_a_judges_answers_are_kept_whatever_happens_to_others(at, tmp_path, fault, error):
    config, ill = settings(seeds="0-5", call_seconds=1.0, **JUDGED), True
    with Endpoint(both(lambda number: fault if ill and number == 5 else SCORE)) as endpoint:
        at(endpoint.url)
        if error:
            with pytest.raises(error):
                play(config, tmp_path)
        else:
            assert play(config, tmp_path).numbers["not_judged"] == 1
        asked, ill = len(of_judge(endpoint)), False
        assert [len(session["scores"]) for session, _ in read_sessions(tmp_path / "rollouts.db", frames=False)].count(
            1
        ) == 5
        assert play(config, tmp_path).numbers["not_judged"] == 0 and len(of_judge(endpoint)) == asked + 1
        assert play(config, tmp_path).numbers["judged"] == 6 and len(of_judge(endpoint)) == asked + 1


def test_a_teacher_has_an_endpoint_of_its_own_and_its_judge_the_usual_one(at, tmp_path, monkeypatch):
    with Endpoint(both()) as openai, Endpoint() as own:
        at(openai.url)
        for name, value in (("OPENAI_API_KEY", "sk-openai-1"), ("OWN_BASE_URL", own.url), ("OWN_API_KEY", "sk-own-2")):
            monkeypatch.setenv(name, value)
        assert play(settings(seeds="0-1", env_prefix="OWN", **JUDGED), tmp_path).numbers["judged"] == 2
    asked = [{body["model"] for body in endpoint.bodies} for endpoint in (openai, own)]
    assert asked == [{"judge-1"}, {"gpt-4o-mini"}]
    keys = [{headers["Authorization"] for headers in endpoint.headers} for endpoint in (openai, own)]
    assert keys == [{"Bearer sk-openai-1"}, {"Bearer sk-own-2"}]


def test_a_judges_answers_outlive_the_process(at, tmp_path):
    config, full, gate = settings(seeds="0-5", concurrency=2, **JUDGED), threading.Event(), threading.Event()
    script = (
        "from qwen_vl_kit import config; from qwen_vl_kit.stages import collect; from qwen_vl_kit.learn import judge; "
        f"c = config.CollectConfig(**{config.model_dump()}); "
        f"judge.judge_stores(collect.run(c, {str(tmp_path)!r}), c)"
    )

    def judged(number):
        if number == 5:  # number 4 is in flight, too, and nothing else
            full.set()
        if number in (4, 5):
            gate.wait()
        return SCORE

    with Endpoint(both(judged)) as endpoint:
        at(endpoint.url)
        process = subprocess.Popen([sys.executable, "-c", script], cwd=root())
        assert full.wait(60)
        process.send_signal(signal.SIGKILL)
        process.wait()
        gate.set()
        assert len((tmp_path / "answers.jsonl").read_bytes().splitlines()) == 4
        with open(tmp_path / "answers.jsonl", "a") as file:
            file.write('{"key": "12')
        result = play(config, tmp_path)
        assert result.numbers["judged"] == 6 and len(of_judge(endpoint)) == 6 + 2
    assert len(list(read_jsonl(tmp_path / "answers.jsonl"))) == 6 and len(sent(tmp_path)) == len(endpoint.bodies)


def test_a_budget_that_ends_keeps_a_judges_answers(at, tmp_path):
    "13 calls of the teacher cost $0.0018486, the judge's $0.000081 each and at most some $0.0002."
    config = settings(
        seeds="0-5", horizon="s2", budget_usd=0.0022, **JUDGED | {"judge_model": "gpt-4o-mini-2024-07-18"}
    )

    def answer(number, body):
        return SCORE if body["model"] == config.judge_model else says(f"grass {number} -> do")

    with Endpoint(answer) as endpoint:
        at(endpoint.url)
        with pytest.raises(
            OverBudget, match=r"would be passed: .*; (\d) of 6 episodes are judged; with a larger budget"
        ):
            play(config, tmp_path)
        first = len(endpoint.bodies)
        play(settings(**config.model_dump() | {"budget_usd": 0.0}), tmp_path)
    assert 13 < first < 19 == len(endpoint.bodies)


def test_a_judge_heeds_the_limits_of_its_config(at, tmp_path):
    with Endpoint(both(lambda number: refuses(500, "busy", retry_after_ms="1"))) as endpoint:
        at(endpoint.url)
        with pytest.raises(
            CallFailed,
            match=r"6 of 6 episodes are not judged \(CallFailed: 500: busy \(3 times\)\); the same command asks",
        ):
            play(settings(seeds="0-5", concurrency=2, **JUDGED | {"retries": 2}), tmp_path)
        assert len(of_judge(endpoint)) == 18 and endpoint.most <= 2


def test_a_judge_that_fails_again_and_again_is_not_asked_about_the_rest(at, tmp_path):
    with Endpoint(both(lambda number: says("A fine game."))) as endpoint:
        at(endpoint.url)
        with pytest.raises(CallFailed, match="episodes are not judged .*not asked, after 8 failures in a row"):
            play(settings(seeds="0-29", horizon="s1", **JUDGED), tmp_path)
        assert 8 <= len(of_judge(endpoint)) <= 11


@pytest.mark.parametrize(
    "config", [settings(budget_usd=1.0, **JUDGED), settings(teacher="expert", model="", budget_usd=1.0, **JUDGED)]
)
def test_a_judge_without_a_price_is_told_before_anything_is_played(at, tmp_path, config):
    with Endpoint() as endpoint:
        at(endpoint.url)
        with pytest.raises(InputError, match="no price for 'judge-1/input'"):
            collect.run(config, tmp_path / "collect")
        assert not endpoint.bodies and not (tmp_path / "collect").exists()


def test_a_stage_that_is_yet_to_come_lacks_a_price_before_the_first_one_runs(at, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "run_stage", lambda *_, **__: pytest.fail("a stage ran"))
    with pytest.raises(InputError, match="no price for 'mine/input'"):
        run_all(
            "configs/demo",
            str(tmp_path),
            overrides=['grpo.judge="remote"', 'grpo.judge_model="mine"', "grpo.budget_usd=1.0"],
        )


def test_a_judge_that_scored_nothing_has_not_done_its_work(at, tmp_path):
    ill, out = True, tmp_path / "collect"
    config = settings(seeds="0-1", horizon="s2", **JUDGED)
    with Endpoint(both(lambda number: says("A fine game.") if ill else SCORE)) as endpoint:
        at(endpoint.url)
        with pytest.raises(
            RunFailed,
            match="the judge has scored none of 2 episodes .*no score from 0 to 100 in the reply 'A fine game",
        ):
            run_stage("collect", config, out)
        assert state("collect", config, out) == "incomplete"
        played, ill = len(endpoint.bodies), False
        assert run_stage("collect", config, out) and state("collect", config, out) == "done"
        assert len(endpoint.bodies) == played + 2
    numbers = json.loads((out / "manifest.json").read_text())["numbers"]
    assert (numbers["judged"], numbers["calls"], numbers["usd"]) == (2, len(endpoint.bodies), None)


def test_a_judges_answers_count_when_there_is_no_room_to_keep_them(at, tmp_path):
    (tmp_path / "answers.jsonl").symlink_to("/dev/full")
    with Endpoint(both()) as endpoint:
        at(endpoint.url)
        with pytest.raises(InputError, match="answers.jsonl: no space left on device"):
            play(settings(seeds="0-19", concurrency=2, **JUDGED), tmp_path)
        asked = len(of_judge(endpoint))
        scored = [len(session["scores"]) for session, _ in read_sessions(tmp_path / "rollouts.db", frames=False)].count(
            1
        )
        assert 1 <= scored == asked <= 3
        (tmp_path / "answers.jsonl").unlink()
        assert (
            play(settings(seeds="0-19", **JUDGED), tmp_path).numbers["judged"] == 20
            and len(of_judge(endpoint)) == 20
        )
