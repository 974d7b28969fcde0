"""Arms of the benchmark that a config describes: models behind endpoints, other models, adapters of others, several
horizons; what is refused before anything is played, and what fails later. Real HTTP on loopback."""

import csv
import json

import contract
import pytest
from commands import QVK, one_line, qvk
from runs import kill_when
from servers import Endpoint, refuses, says

from qwen_vl_kit.config import ArmConfig, BenchmarkConfig, Protocol, to_toml
from qwen_vl_kit.core import InputError, StageError, read_json
from qwen_vl_kit.model.cards import write_card
from qwen_vl_kit.model.loading import load_without_weights, save_model
from qwen_vl_kit.model.tiny import random_model
from qwen_vl_kit.protocol.turns import prompt_hash
from qwen_vl_kit.runner.commands import main, show_run
from qwen_vl_kit.runner.configs import load_config
from qwen_vl_kit.runner.run import ArmsFailed, run_stage
from qwen_vl_kit.runner.workspace import state
from qwen_vl_kit.stages import benchmark, report
from qwen_vl_kit.store import manifest, traces
from qwen_vl_kit.store.meter import Meter

pytestmark = pytest.mark.process

SEEDS = 3
PLAY = dict(prompt="brief", render_size=144, horizon="s3", seeds="1000000-1000002", model="tiny", engine="hf",
            max_new_tokens=8, bf16=False, threads=1)
TEACHER = {"model": "gpt-4o-mini", "engine": "server", "retries": 0, "concurrency": 1}


def config(arms, horizons=(), **tables):
    return BenchmarkConfig(**PLAY, arms=arms, horizons=list(horizons),
                           arm={name: ArmConfig(**table) for name, table in tables.items()})


def table(out):
    "The rows of arms.csv by arm and horizon."
    return {(row["arm"], row["horizon"]): row for row in csv.DictReader(open(out / "arms.csv"))}


def played(out):
    "(arm, horizon, seed): when and as which run each stored episode was played."
    stored = traces.episodes(out / "rollouts.db")
    return {(row.arm, row.horizon, row.seed): (row.session, row.run) for row in stored.itertuples()}


@pytest.fixture
def at(monkeypatch):
    "Point the environment at an endpoint."
    for name in ("OPENAI_API_KEY", "OPENAI_HEADERS", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return lambda url: monkeypatch.setenv("OPENAI_BASE_URL", url)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    "An adapter of tiny."
    return contract.adapter(tmp_path_factory.mktemp("adapter") / "adapter", 1)


# What is refused

WRITTEN = {
    "arms = ['base', 'teacher']\n[arm.teacher]\nengine = 'server'": "key 'arm.teacher.model': an arm needs a model",
    "arms = ['base', 'techer']\n[arm.teacher]\nmodel = 'm'": "no arm is called 'techer'; did you mean 'teacher'?",
    "arms = ['base', 'teacher']": "write a table [arm.teacher] that names its model",
    "arms = ['base', 'base']": "key 'arms': names something twice",
    "arms = []": "key 'arms': list should have at least 1 item",
    "arms = ['a b']": "the name of an arm has letters, digits",
    "[arm.sft]\nadaptor = 'x'": "unknown key 'arm.sft.adaptor' for benchmark; did you mean 'adapter'?",
    "[arm.sft]\ntemperature = 'hot'": "key 'arm.sft.temperature': input should be a valid number",
    "[arm.expert]\nmodel = 'tiny'": 'policy = "expert" plays no model',
    "[arm.a]\nmodel = 'm'\nenv_prefix = 'sk-12'": "key 'arm.a.env_prefix': write what stands before _API_KEY",
    "[arm.a]\nmodel = 'm'\nenv_prefix = 'OWN_'": "in capitals, such as OPENAI, not \"OWN_\"; its default is \"OPENAI\"",
    "[arm]\nmodel = 'tiny'": "key 'arm.model': input should be a valid dictionary",
    "horizons = ['t50', '50']": "unknown horizon '50'",
    "horizons = ['t50', 't50']": "key 'horizons': names something twice",
    "sft_adapter = 'a'\n[arm.sft]\nadapter = 'b'": "key 'arm.sft.adapter': sft_adapter names another one",
    "[arm.a]\nmodel = 'm'\n[arm.a]\nmodel = 'n'": "cannot be read as TOML",
}


@pytest.mark.parametrize("text", WRITTEN)
def test_a_table_that_is_wrong_is_one_line_with_its_key(text, tmp_path):
    (tmp_path / "benchmark.toml").write_text(text)
    with pytest.raises(InputError) as refused:
        load_config(tmp_path / "benchmark.toml", "benchmark")
    assert WRITTEN[text] in one_line(refused) and "benchmark.toml" in one_line(refused)


def test_what_check_prints_is_read_back(tmp_path):
    text = 'arms = ["base", "sft.v2", "teacher"]\nhorizons = ["t9", "s9"]\n[arm."sft.v2"]\nadapter = "a"\n'
    (tmp_path / "benchmark.toml").write_text(text + '[arm.teacher]\nmodel = "m"\n')
    given = load_config(tmp_path, "benchmark", ["arm.teacher.engine=server", "arm.sft.v2.temperature=0.2"])
    assert given.arm["sft.v2"] == ArmConfig(adapter="a", temperature=0.2) and given.arm["teacher"].engine == "server"
    (tmp_path / "benchmark.toml").write_text(to_toml(given))
    assert load_config(tmp_path, "benchmark") == given


def test_arms_that_cannot_play_are_refused_before_any_is_played(adapter, tmp_path, at):
    lost, other = contract.adapter(tmp_path / "lost", 2, base="random:tiny"), tmp_path / "no-folder"
    at("http://127.0.0.1:1/v1")
    for name, settings, says_why in (
        ("mine", {"adapter": str(lost)}, "arm mine: the adapter was made for random:tiny"),
        ("mine", {"adapter": str(other)}, "no adapter here"),
        ("mine", {"model": "tinyy"}, "arm mine: unknown model 'tinyy'; did you mean 'tiny'?"),
        ("mine", {"model": str(other)}, "arm mine: no such folder"),
        ("mine", TEACHER | {"model": "mine", "budget_usd": 1.0}, "no price for 'mine/input', which budget_usd"),
        ("mine", TEACHER | {"adapter": str(adapter)}, "arm mine: the adapter was made for tiny, not for gpt-4o-mini"),
        ("mine", TEACHER, "arm mine: no server answers there"),
    ):
        with pytest.raises(InputError) as refused:
            benchmark.run(config(["random", name], **{name: settings}), tmp_path / "out")
        assert says_why in one_line(refused)
        assert not (tmp_path / "out" / "rollouts.db").exists() and not (tmp_path / "out" / "arms.csv").exists()


@pytest.mark.parametrize("answer", [refuses(401, "Incorrect API key"), refuses(404, "no such model")])
def test_an_endpoint_that_refuses_key_or_model_is_bad_input_and_nothing_is_paid(answer, tmp_path, at):
    with Endpoint(lambda number, body: answer) as endpoint:
        at(endpoint.url)
        with pytest.raises(InputError) as refused:
            benchmark.run(config(["random", "teacher"], teacher=TEACHER), tmp_path)
    assert f"arm teacher: the endpoint refuses model 'gpt-4o-mini' ({answer[0]}: " in one_line(refused)
    assert len(endpoint.bodies) == 1 and not (tmp_path / "rollouts.db").exists()


def test_without_a_key_an_api_arm_is_refused(tmp_path, at):
    with pytest.raises(InputError, match="arm teacher: no key for model 'gpt-4o-mini'; set OPENAI_API_KEY"):
        benchmark.run(config(["random", "teacher"], teacher=TEACHER), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Models behind endpoints


def test_an_api_arm_has_its_dollars_in_its_row_and_on_the_bill(tmp_path, at):
    with Endpoint() as endpoint:
        at(endpoint.url)
        result = benchmark.run(config(["random", "teacher"], teacher=TEACHER | {"temperature": 0.1}), tmp_path)
        assert {body["temperature"] for body in endpoint.bodies} == {0.1}
        benchmark.run(config(["random", "teacher"], teacher=TEACHER | {"temperature": 0.1}), tmp_path)
    calls, price = SEEDS * 3, (900 * 0.15 + 12 * 0.60) / 1e6
    assert len(endpoint.bodies) == calls + 1  # one to probe; the second time there is nothing to ask
    rows = table(tmp_path)
    assert float(rows["teacher", "s3"]["usd"]) == pytest.approx(calls * price, abs=1e-6)
    assert float(rows["random", "s3"]["usd"]) == 0 and rows["teacher", "s3"]["model"] == "gpt-4o-mini"
    assert (result.numbers["calls"], result.numbers["usd"]) == (calls + 1, pytest.approx((calls + 1) * price))
    assert {row["unit"]: row["quantity"] for row in result.usage}["prompt_tokens"] == 900 * (calls + 1)
    assert Meter(journal=tmp_path / "calls" / "teacher.jsonl").calls == calls + 1


def test_a_budget_stops_its_arm_alone_and_a_larger_one_goes_on(tmp_path, at):
    small, large = ({"teacher": TEACHER | {"budget_calls": calls}} for calls in (5, 50))
    first, second = config(["teacher", "random"], **small), config(["teacher", "random"], **large)
    with Endpoint() as endpoint:
        at(endpoint.url)
        result = benchmark.run(first, tmp_path)
        assert list(table(tmp_path)) == [("random", "s3")] and len(endpoint.bodies) <= 5
        assert "the budget of 5 calls would be passed" in result.numbers["failed_arms"]["teacher"]
        assert "1 of 3 episodes are stored; with a larger budget" in result.numbers["failed_arms"]["teacher"]
        manifest.write(tmp_path, result, first)
        assert [state("benchmark", each, tmp_path) for each in (first, second)] == ["incomplete"] * 2
        before = played(tmp_path)
        again = benchmark.run(second, tmp_path)
    assert list(table(tmp_path)) == [("teacher", "s3"), ("random", "s3")] and "failed_arms" not in again.numbers
    assert before.items() <= played(tmp_path).items()  # nothing was played, or paid, twice
    assert again.numbers["calls"] == len(endpoint.bodies)


def test_an_arm_that_fails_at_one_horizon_keeps_its_row_of_another(tmp_path, at):
    "Probe and t2 take 1 + 3 * 2 calls; of the three episodes at s5 one is paid, too, and no other one is begun."
    out, arms, pair = tmp_path / "run" / "benchmark", ["random", "teacher"], ["t2", "s5"]
    small, large = (config(arms, pair, teacher=TEACHER | {"budget_calls": calls}) for calls in (15, 50))
    with Endpoint() as endpoint:
        at(endpoint.url)
        with pytest.raises(ArmsFailed, match=r"lacks 1 of its 4 rows \(teacher \(s5\): .*; 1 of 3 episodes are stored"):
            run_stage("benchmark", small, out)
        assert len(endpoint.bodies) == 12
        assert list(table(out)) == [("random", "t2"), ("random", "s5"), ("teacher", "t2")]
        with open(out / "episodes.csv") as file:
            assert [row["horizon"] for row in csv.DictReader(file) if row["arm"] == "teacher"] == ["t2"] * SEEDS
        numbers = read_json(out / "manifest.json")["numbers"]
        assert list(numbers["failed_arms"]) == ["teacher (s5)"] and len(numbers["rates"]) == 3
        assert "teacher (s5) is not in the table: the budget" in show_run(out.parent)
        assert state("benchmark", small, out) == "incomplete"
        run_stage("benchmark", large, out)
    assert list(table(out))[2:] == [("teacher", "t2"), ("teacher", "s5")] and state("benchmark", large, out) == "done"


def test_two_arms_behind_one_endpoint_have_budgets_of_their_own(tmp_path, at):
    with Endpoint() as endpoint:
        at(endpoint.url)
        arms = {"one": TEACHER | {"budget_calls": 5}, "two": TEACHER | {"model": "gpt-4o", "max_new_tokens": 5}}
        result = benchmark.run(config(["one", "two"], **arms), tmp_path)
    assert list(result.numbers["failed_arms"]) == ["one"] and list(table(tmp_path)) == [("two", "s3")]
    assert {(body["model"], body["max_tokens"]) for body in endpoint.bodies} == {("gpt-4o-mini", 8), ("gpt-4o", 5)}
    assert result.numbers["calls_of_arms"]["two"]["calls"] == SEEDS * 3 + 1


def test_two_arms_at_two_endpoints_send_each_key_to_its_own(tmp_path, at, monkeypatch):
    arms = {"one": TEACHER, "two": TEACHER | {"env_prefix": "OWN"}}
    answers = "grass -> move_left", "sk-own-2 tree -> move_right"  # the second repeats its key
    openai, own = (Endpoint(lambda number, body, answer=answer: says(answer)) for answer in answers)
    with openai, own:
        at(openai.url)
        for name, value in (("OPENAI_API_KEY", "sk-openai-1"), ("OWN_BASE_URL", own.url), ("OWN_API_KEY", "sk-own-2")):
            monkeypatch.setenv(name, value)
        benchmark.run(config(["one", "two"], **arms), tmp_path)
    keys = [{headers["Authorization"] for headers in endpoint.headers} for endpoint in (openai, own)]
    assert keys == [{"Bearer sk-openai-1"}, {"Bearer sk-own-2"}]
    assert len(openai.bodies) == len(own.bodies) == SEEDS * 3 + 1
    turns = traces.turns(tmp_path / "rollouts.db")
    assert [set(turns.reply[turns.arm == arm]) for arm in arms] == [{answers[0]}, {"*** tree -> move_right"}]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(key in blob for blob in files for key in (b"sk-openai-1", b"sk-own-2"))


@pytest.mark.parametrize("answer, says_why", [
    (refuses(401, "Incorrect API key sk-own-2"),
     "arm two: the endpoint refuses model 'gpt-4o-mini' (401: Incorrect API key ***); check OWN_API_KEY, OWN_BASE_URL"),
    ("page", "; OWN_BASE_URL should be the address of its API"),
    (None, "no server answers there; check OWN_BASE_URL"),
])
def test_an_error_of_an_endpoint_names_its_own_variables_and_no_key(answer, says_why, tmp_path, at, monkeypatch):
    monkeypatch.setenv("OWN_API_KEY", "sk-own-2")
    with Endpoint(lambda number, body: answer) as own, Endpoint() as openai:
        at(openai.url)
        monkeypatch.setenv("OWN_BASE_URL", own.url if answer else "http://127.0.0.1:1/v1")
        with pytest.raises((InputError, StageError)) as refused:
            benchmark.run(config(["two"], two=TEACHER | {"env_prefix": "OWN"}), tmp_path)
    assert says_why in one_line(refused) and "sk-own-2" not in one_line(refused) and not openai.bodies
    assert not any(b"sk-own-2" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


@pytest.mark.slow
def test_one_env_file_opens_two_endpoints_and_its_keys_are_written_nowhere(tmp_path):
    arms = config(["one", "two"], one=TEACHER, two=TEACHER | {"env_prefix": "OWN", "budget_usd": 1.0})
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "benchmark.toml"
    path.write_text(to_toml(arms))
    run = lambda *words: qvk(*words, without=["OPENAI_", "OWN_"])
    shown = run("check", path)
    assert shown.code == 0 and 'env_prefix = "OWN"' in shown.out, shown.err  # and no endpoint is asked for
    line = ("benchmark", "--config", path, "--out", tmp_path / "run", "--env-file", tmp_path / "env")
    with Endpoint() as openai, Endpoint(lambda number, body: says("here is sk-own-2 -> do")) as own:
        first = f"OPENAI_API_KEY=sk-openai-1\nOPENAI_BASE_URL={openai.url}\nOWN_API_KEY=sk-own-2\n"
        (tmp_path / "env").write_text(first)
        refused = run(*line)
        assert refused.code == 2 and "no address for model 'gpt-4o-mini'; set OWN_BASE_URL" in one_line(refused.err)
        assert not openai.bodies and not (tmp_path / "run").exists()
        (tmp_path / "env").write_text(first + f"OWN_BASE_URL={own.url}\nOWN_HEADERS='{{\"X-Team\": \"sk-team-3\"}}'\n")
        done = run(*line)
    assert done.code == 0, done.err
    assert {headers["Authorization"] for headers in openai.headers} == {"Bearer sk-openai-1"}
    sent = {(headers["Authorization"], headers["X-Team"]) for headers in own.headers}
    assert sent == {("Bearer sk-own-2", "sk-team-3")}
    assert not any("X-Team" in headers for headers in openai.headers)
    assert (tmp_path / "run" / "benchmark" / "run.ipynb").is_file()
    blobs = [path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()]
    blobs.append((done.out + done.err + refused.err).encode())
    assert not any(key in blob for blob in blobs for key in (b"sk-openai-1", b"sk-own-2", b"sk-team-3"))


def test_an_endpoint_that_moves_to_other_variables_is_the_same_arm(tmp_path, at, monkeypatch):
    with Endpoint() as endpoint:
        at(endpoint.url)
        benchmark.run(config(["teacher"], teacher=TEACHER), tmp_path)
        monkeypatch.setenv("OWN_BASE_URL", endpoint.url)
        benchmark.run(config(["teacher"], teacher=TEACHER | {"env_prefix": "OWN"}), tmp_path)
    assert len(endpoint.bodies) == SEEDS * 3 + 1


def test_a_prefix_without_an_address_is_refused_and_no_key_goes_elsewhere(tmp_path, at, monkeypatch):
    monkeypatch.setenv("OWN_API_KEY", "sk-own-2")
    with Endpoint() as endpoint:
        at(endpoint.url)
        with pytest.raises(InputError, match="arm two: no address for model 'gpt-4o-mini'; set OWN_BASE_URL"):
            benchmark.run(config(["one", "two"], one=TEACHER, two=TEACHER | {"env_prefix": "OWN"}), tmp_path / "out")
    assert endpoint.bodies == [] and not (tmp_path / "out").exists()


def test_an_arm_that_was_paid_is_not_played_again_as_another(tmp_path, at):
    with Endpoint() as endpoint:
        at(endpoint.url)
        benchmark.run(config(["teacher"], teacher=TEACHER), tmp_path)
        asked = len(endpoint.bodies)
        with pytest.raises(InputError, match="arm teacher has paid for with other settings; give the arm another name"):
            benchmark.run(config(["teacher"], teacher=TEACHER | {"temperature": 0.9}), tmp_path)
        benchmark.run(config(["teacher"], teacher=TEACHER | {"budget_usd": 5.0, "concurrency": 4}), tmp_path)
        (tmp_path / "rollouts.db").unlink()
        with pytest.raises(InputError, match="is missing, and calls/teacher.jsonl beside it shows"):
            benchmark.run(config(["teacher"], teacher=TEACHER), tmp_path)
    assert len(endpoint.bodies) == asked


def test_an_arm_without_a_price_was_paid_all_the_same(tmp_path, at, monkeypatch):
    with Endpoint() as endpoint:
        at(endpoint.url)
        mine, changed = TEACHER | {"model": "mine"}, TEACHER | {"model": "mine", "temperature": 0.9}
        benchmark.run(config(["teacher"], teacher=mine), tmp_path)
        asked, before = len(endpoint.bodies), played(tmp_path)
        with pytest.raises(InputError, match=r"paid for with other settings \(10 calls, dollars unknown\); give"):
            benchmark.run(config(["teacher"], teacher=changed), tmp_path)
        assert (len(endpoint.bodies), played(tmp_path)) == (asked, before)
        free = "usd = 0\nper = 1\nunit = 'tokens'\nsource = 'own server'\ndate = '2026-11-01'\n"
        (tmp_path / "prices.toml").write_text(f"['mine/input']\n{free}['mine/output']\n{free}")
        with monkeypatch.context() as book:
            book.setattr("qwen_vl_kit.store.prices.site", lambda name: str(tmp_path / "prices.toml"))
            benchmark.run(config(["teacher"], teacher=changed), tmp_path)  # what is known to be free is played again
        assert len(endpoint.bodies) == 2 * asked
        (tmp_path / "rollouts.db").unlink()
        with pytest.raises(InputError, match="is missing, and calls/teacher.jsonl beside it shows"):
            benchmark.run(config(["teacher"], teacher=changed), tmp_path)


def test_an_arm_that_goes_on_at_another_endpoint_is_reported(tmp_path, at, capsys):
    teacher = config(["teacher"], teacher=TEACHER)
    with Endpoint(dying(5)) as first, Endpoint() as second:
        at(first.url.replace("://", "://user:secret-1@"))
        with pytest.raises(StageError):
            benchmark.run(teacher, tmp_path)
        assert "so far" not in capsys.readouterr().err
        at(second.url)
        result = benchmark.run(teacher, tmp_path)
        origins = [endpoint.url.removesuffix("/v1") for endpoint in (first, second)]
    counts = result.numbers["calls_of_arms"]["teacher"]["endpoints"]
    assert counts == {origins[0]: 5, origins[1]: len(second.bodies)}
    noted = f"note: arm teacher: calls were answered by {origins[0]} (5 calls) so far, and go to {origins[1]} now"
    assert noted in capsys.readouterr().err.splitlines()
    assert any(line.startswith("teacher: its calls were answered by different") for line in result.numbers["notices"])
    assert b"secret-1" not in (tmp_path / "calls" / "teacher.jsonl").read_bytes()


def test_a_forecast_of_less_than_a_cent_says_how_much(tmp_path, at, capsys):
    with Endpoint() as endpoint:
        at(endpoint.url)
        benchmark.run(config(["teacher"], teacher=TEACHER), tmp_path)
    most = SEEDS * 3 * (900 * 0.15 + 12 * 0.60) / 1e6
    assert f"arm teacher will take at most 9 calls and ${most:.4f}, unless" in capsys.readouterr().err


def dying(count):
    "Answers so many calls, and is busy from then on."
    return lambda number, body: says() if number < count else refuses(503, "busy", retry_after_ms="1")


@pytest.mark.slow
def test_an_arm_that_fails_takes_nothing_along_and_the_same_command_completes_it(tmp_path):
    (tmp_path / "configs").mkdir()
    arms = config(["random", "base", "teacher"], teacher=TEACHER)
    (tmp_path / "configs" / "benchmark.toml").write_text(to_toml(arms))
    (tmp_path / "configs" / "report.toml").write_text("")
    command = ("run", tmp_path / "configs", "--from", "benchmark", "--out", tmp_path / "run")
    out = tmp_path / "run" / "benchmark"
    with Endpoint(dying(5)) as endpoint:
        failed = qvk(*command, OPENAI_BASE_URL=endpoint.url)
    assert failed.code == 1
    last = failed.err.splitlines()[-1]
    assert last.startswith("qvk: benchmark: the table lacks 1 of its 3 rows (teacher: ") and "503: busy" in last
    assert list(table(out)) == [("random", "s3"), ("base", "s3")] and "random" in failed.out
    assert list(read_json(out / "manifest.json")["numbers"]["failed_arms"]) == ["teacher"]
    assert (tmp_path / "run" / "report" / "run.html").is_file() and not (out / ".work").exists()
    before = played(out)
    with Endpoint() as endpoint:
        done = qvk(*command, OPENAI_BASE_URL=endpoint.url)
    assert done.code == 0, done.err
    assert list(table(out)) == [("random", "s3"), ("base", "s3"), ("teacher", "s3")]
    assert before.items() <= played(out).items()
    missing = sum(key[0] == "teacher" for key in played(out).keys() - before.keys())
    assert len(endpoint.bodies) == 3 * missing - 1  # one of their turns was answered before, so no probe is needed
    assert qvk("verify", tmp_path / "run").code == 0
    assert qvk(*command).code == 0  # there is nothing left to ask, so nobody has to answer


def test_the_bill_keeps_what_an_arm_has_cost_that_is_gone(tmp_path, at):
    with Endpoint() as endpoint:
        at(endpoint.url)
        paid = benchmark.run(config(["random", "teacher"], teacher=TEACHER), tmp_path)
    left = benchmark.run(config(["random"]), tmp_path)
    assert (left.numbers["calls"], left.numbers["usd"]) == (paid.numbers["calls"], paid.numbers["usd"])
    assert left.usage == paid.usage and list(table(tmp_path)) == [("random", "s3")]
    assert "10 calls of teacher, which is no arm of this table any more" in " ".join(left.numbers["notices"])


def test_seeds_that_a_run_trains_on_are_refused_before_its_first_stage(tmp_path, capsys):
    assert main(["run", "configs/demo", "--set", "seeds=0-3", "--out", str(tmp_path / "run")]) == 2
    assert "plays seed 0, which arm sft is trained on in collect" in one_line(capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_was_paid_before_a_kill_is_not_paid_again(tmp_path, at):
    (tmp_path / "benchmark.toml").write_text(to_toml(config(["random", "teacher"], teacher=TEACHER)))
    line = ["benchmark", "--config", str(tmp_path / "benchmark.toml"), "--out", str(tmp_path / "run")]
    with Endpoint(lambda number, body: says() if number < 5 else "hang") as endpoint:
        at(endpoint.url)
        kill_when(lambda: len(endpoint.bodies) > 5, [*QVK, *line])
        endpoint.answer = lambda number, body: says()
        done = qvk(*line)
    assert done.code == 0, done.err
    assert len(endpoint.bodies) == 6 + 2 * 3 - 1  # one episode was stored, and the reply to a turn of the next one
    made = read_json(tmp_path / "run" / "benchmark" / "manifest.json")
    assert made["numbers"]["calls"] == 11 and made["numbers"]["failed_calls"] == 1
    assert [row["quantity"] for row in made["usage"]] == endpoint.tokens


def test_without_any_complete_arm_there_is_no_table_and_the_same_command_goes_on(tmp_path, at):
    with Endpoint(dying(5)) as endpoint:
        at(endpoint.url)
        with pytest.raises(StageError, match="no arm is complete: teacher: 2 of 3 episodes are lost"):
            benchmark.run(config(["teacher"], teacher=TEACHER), tmp_path)
    assert len(played(tmp_path)) == 1 and not (tmp_path / "arms.csv").exists()
    with Endpoint() as endpoint:
        at(endpoint.url)
        benchmark.run(config(["teacher"], teacher=TEACHER), tmp_path)
    assert len(endpoint.bodies) == 2 * 3 - 1 and list(table(tmp_path)) == [("teacher", "s3")]


def test_a_run_knows_before_its_first_stage_that_an_arm_cannot_play(tmp_path, monkeypatch, capsys):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    lost = contract.adapter(tmp_path / "lost", 2, base="random:tiny")
    for sets, says_why in (
        (["arm.api.model=m", "arm.api.engine=server"], "no key for model 'm'"),
        (["arm.api.model=m", "arm.api.engine=server", "arm.api.env_prefix=OWN"], "no address for model 'm'; set OWN_"),
        (["grpo.engine=server", "benchmark.engine=hf", "arm.api.model=tiny"], "no key for model 'tiny'"),
        (["arm.api.adapter=outputs/nowhere"], "arm api: no adapter here"),
        (["arm.api.model=m", "arm.api.engine=server", "arm.api.budget_usd=1"], "which arm.api.budget_usd needs"),
        (["arm.api.model=tinyy"], "arm api: unknown model 'tinyy'"),
        ([f"arm.api.adapter={lost}"], "arm api: the adapter was trained with prompt"),
    ):
        words = [word for each in ['benchmark.arms=["sft", "api"]', *sets] for word in ("--set", each)]
        assert main(["run", "configs/demo", "--out", str(tmp_path / "run"), *words]) == 2
        assert says_why in one_line(capsys.readouterr().err)
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_command_ends_with_2_for_a_key_that_is_refused(tmp_path):
    (tmp_path / "benchmark.toml").write_text(to_toml(config(["random", "teacher"], teacher=TEACHER)))
    with Endpoint(lambda number, body: refuses(401, "Incorrect API key")) as endpoint:
        code, _, error = qvk("benchmark", "--config", tmp_path / "benchmark.toml", "--out", tmp_path / "run",
                             OPENAI_BASE_URL=endpoint.url)
    assert code == 2 and "arm teacher: the endpoint refuses model" in one_line(error)
    assert not (tmp_path / "run").exists()


# Other models and adapters


def test_two_models_in_one_table(tmp_path):
    folder = save_model(*random_model("tiny"), tmp_path / "other")
    arms = config(["base", "other", "cold"], other={"model": str(folder)}, cold={"model": "tiny", "temperature": 0.0})
    result = benchmark.run(arms, tmp_path / "out")
    rows = table(tmp_path / "out")
    assert [row["model"] for row in rows.values()] == ["tiny", str(folder), "tiny"]
    turns = traces.turns(tmp_path / "out" / "rollouts.db")
    assert set(turns.reply[turns.arm == "base"]).isdisjoint(turns.reply[turns.arm == "other"])
    assert result.numbers["model"] == "tiny" and result.numbers["models"] == {"other": {"model": str(folder)}}


def test_an_adapter_without_a_card_plays_and_what_nobody_knows_is_said(adapter, tmp_path):
    bare = contract.adapter(tmp_path / "bare", 3)
    (bare / "qvk.json").unlink()
    result = benchmark.run(config(["base", "bare"], bare={"adapter": str(bare)}), tmp_path / "out")
    assert result.numbers["seeds_not_told"] == ["bare"] and result.inputs == {"bare": bare}
    assert ("bare", "s3") in table(tmp_path / "out")
    own = Protocol(**BenchmarkConfig(**PLAY, arms=["base"]).fields())
    assert set(traces.episodes(tmp_path / "out" / "rollouts.db").prompt_hash) == {prompt_hash(own)}


def test_where_an_arm_without_a_card_stands_nobody_takes_its_seeds_as_unseen(adapter, tmp_path, capfd):
    bare, out = contract.adapter(tmp_path / "bare", 3), tmp_path / "run" / "benchmark"
    (bare / "qvk.json").unlink()
    settings = config(["base", "bare"], ["s3", "s2"], bare={"adapter": str(bare)})
    manifest.write(out, benchmark.run(settings, out), settings)
    assert capfd.readouterr().err.count("prompt") <= 1
    assert [row["training_seeds"] for row in table(out).values()] == ["", "", "not known", "not known"]
    notices = read_json(out / "manifest.json")["numbers"]["notices"]
    unseen = "bare: nobody knows whether it was trained on these seeds"
    for shown in ("\n".join(notices), show_run(out.parent), report.about(out.parent)):
        assert shown.count(unseen) == shown.count("bare: its card (qvk.json) does not name its prompt") == 1
    assert "training seeds" in show_run(out.parent).splitlines()[0]


def test_replies_that_cannot_be_used_are_noted_of_every_model_with_arm_and_horizon(tmp_path):
    bare = contract.adapter(tmp_path / "bare", 3, std=1.0)  # of random weights that never say anything
    carded = config(["random", "base", "bare"], ["s3", "s2"], bare={"adapter": str(bare)})
    notices = benchmark.run(carded, tmp_path / "carded").numbers["notices"]
    lost = "turns: no usable action in the reply, so noop was played"
    for horizon, turns in (("s3", 9), ("s2", 6)):
        assert f"bare ({horizon}): {turns} of {turns} {lost}" in notices
    assert not [line for line in notices if line.startswith("random")]
    (bare / "qvk.json").unlink()
    notices = benchmark.run(carded, tmp_path / "bare-out").numbers["notices"]
    hint = "its adapter may have been trained under another prompt or horizon, which no card names"
    assert f"bare (s3): 9 of 9 {lost}; {hint}" in notices


def test_an_adapter_plays_at_another_horizon_under_its_own_prompt(tmp_path):
    folder = contract.adapter(tmp_path / "adapter", 1)
    trained = Protocol(prompt="brief", render_size=144, horizon="t3", progress=True)
    write_card(folder, load_without_weights("tiny")[0], prompt_hash(trained), protocol=trained.fields(), seeds="7-9")
    played_at = config(["base", "mine"], ["t3", "s3"], mine={"adapter": str(folder)}).model_copy(
        update={"progress": True})
    result = benchmark.run(played_at, tmp_path / "out")
    rows = table(tmp_path / "out")
    assert list(rows) == [("base", "t3"), ("base", "s3"), ("mine", "t3"), ("mine", "s3")]
    assert [row["trained_horizon"] for row in rows.values()] == ["", "", "", "t3"]
    own_prompt = "mine: its adapter was trained at t3 and plays s3 under its own prompt"
    assert f"{own_prompt}, the first 1 of its actions a turn" in result.numbers["notices"]
    stored = traces.episodes(tmp_path / "out" / "rollouts.db")
    assert set(stored.prompt_hash[stored.arm == "mine"]) == {prompt_hash(trained)} and len(stored) == 4 * SEEDS
    for changes, says_why in (({"horizons": ["s9"]}, "counts the 3 turns of t3, and s9 has 9"),
                              ({"history": 2}, "history = 4 and not 2")):
        with pytest.raises(InputError, match=says_why):
            benchmark.run(played_at.model_copy(update=changes), tmp_path / "other")
    with pytest.raises(InputError, match="seed 8 was trained on by the adapter of arm mine"):
        benchmark.run(played_at.model_copy(update={"seeds": "8"}), tmp_path / "other")


# More of the same


def test_arms_and_horizons_that_are_added_are_all_that_is_played(tmp_path):
    first = config(["random", "base"])
    manifest.write(tmp_path, benchmark.run(first, tmp_path), first)
    before = played(tmp_path)
    more = config(["base", "expert", "random"], ["s3", "s5"])
    assert [state("benchmark", each, tmp_path) for each in (first, more)] == ["done", "incomplete"]
    benchmark.run(more, tmp_path)
    assert list(table(tmp_path)) == [(arm, horizon) for arm in ("base", "expert", "random") for horizon in ("s3", "s5")]
    assert before.items() <= played(tmp_path).items() and len(played(tmp_path)) == 6 * SEEDS
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6


def test_an_arm_that_has_changed_is_played_again_alone(tmp_path):
    benchmark.run(config(["random", "base", "cold"], cold={"model": "tiny", "temperature": 0.3}), tmp_path)
    before = played(tmp_path)
    benchmark.run(config(["random", "base", "cold"], cold={"model": "tiny", "temperature": 0.0}), tmp_path)
    after = played(tmp_path)
    assert before.keys() == after.keys()
    assert {key[0] for key in before if before[key] != after[key]} == {"cold"}


def test_a_retrained_adapter_is_another_player(tmp_path):
    folder = contract.adapter(tmp_path / "adapter", 1)
    benchmark.run(config(["base", "mine"], mine={"adapter": str(folder)}), tmp_path / "out")
    before = played(tmp_path / "out")
    contract.adapter(folder, 2)
    benchmark.run(config(["base", "mine"], mine={"adapter": str(folder)}), tmp_path / "out")
    after = played(tmp_path / "out")
    assert {key[0] for key in before if before[key] != after[key]} == {"mine"} and len(after) == len(before)


@pytest.mark.slow
def test_a_benchmark_after_another_training_plays_what_was_trained_and_pays_for_nothing_again(tmp_path, at):
    folder, out = contract.adapter(tmp_path / "adapter", 1), tmp_path / "run" / "benchmark"
    settings = config(["mine", "teacher"], mine={"adapter": str(folder)}, teacher=TEACHER)
    with Endpoint() as endpoint:
        at(endpoint.url)
        run_stage("benchmark", settings, out)
        asked, before = len(endpoint.bodies), played(out)
        contract.adapter(folder, 2)
        assert state("benchmark", settings, out) == "stale"
        run_stage("benchmark", settings, out, renew=True)  # as `qvk run` does, when it has trained again
    after = played(out)
    assert len(endpoint.bodies) == asked and {key[0] for key in before if before[key] != after[key]} == {"mine"}
    assert (state("benchmark", settings, out), manifest.verify(tmp_path / "run")) == ("done", [])


def test_an_arm_that_is_left_out_keeps_its_table_and_its_episodes(tmp_path):
    (tmp_path / "benchmark.toml").write_text(to_toml(config(["random", "mine"], mine={"policy": "expert"})))
    less = load_config(tmp_path / "benchmark.toml", "benchmark", ['arms=["random"]'])
    assert less.notices == ["[arm.mine] is not in arms, and is not played"]
    both = load_config(tmp_path / "benchmark.toml", "benchmark")
    for each in (both, less, both):
        benchmark.run(each, tmp_path / "out")
    assert len({session for session, _ in played(tmp_path / "out").values()}) == 2 * SEEDS
    assert json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])["arm"] == "mine"
