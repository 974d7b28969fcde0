"""GRPO as a user meets it: killed, overlapping, with nothing to learn, with weights that do not arrive; and what it
relies on in TRL."""

import inspect
import json
import shutil
import sys
from pathlib import Path

import contract
import pytest
from runs import SMALL_GRPO, alike, figures, kill_when, lora, student
from servers import Endpoint, refuses, says

from qwen_vl_kit.config import BenchmarkConfig, GRPOConfig, Protocol
from qwen_vl_kit.core import InputError, OverBudget, TrainingStopped, read_json, read_jsonl, write_json
from qwen_vl_kit.engine.base import EngineDied, Sampling
from qwen_vl_kit.engine.hf import HFEngine
from qwen_vl_kit.learn import player
from qwen_vl_kit.learn.rewards import has_unlocked
from qwen_vl_kit.learn.samples import Group, token_advantages
from qwen_vl_kit.model.cards import read_card
from qwen_vl_kit.model.encode import encode
from qwen_vl_kit.model.loading import load_model
from qwen_vl_kit.play.policies import ExpertPolicy
from qwen_vl_kit.play.rollout import rollout
from qwen_vl_kit.protocol.turns import prompt
from qwen_vl_kit.runner.run import run_stage, state
from qwen_vl_kit.stages import benchmark, grpo
from qwen_vl_kit.store import traces
from qwen_vl_kit.store.manifest import config_hash
from qwen_vl_kit.store.traces import read_sessions

pytestmark = [pytest.mark.slow, pytest.mark.process]

PLAY = dict(prompt="brief", render_size=144, horizon="s10")


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    "What the tests train with: from a student that has seen a few of the teacher's episodes."
    adapter = student(tmp_path_factory.mktemp("student"))
    return SMALL_GRPO | PLAY | {"adapter": str(adapter)}


def played(out: Path) -> list[tuple]:
    "What was played, in the order of names."
    return sorted((session["arm"], e.seed, e.member, [(t.decision.token_ids, t.reward) for t in e.turns])
                  for session, e in read_sessions(out / "rollouts.db", frames=False))


def test_an_adapter_of_single_actions_is_refused_where_plans_are_to_be_played(settings, tmp_path):
    with pytest.raises(InputError, match=r'trained with prompt .*\(horizon = "s20" and not "t50"\)'):
        grpo.run(GRPOConfig(**settings | {"horizon": "t50"}), tmp_path / "grpo")
    assert not (tmp_path / "grpo").exists()


def test_killed_and_resumed_it_learns_the_same(settings, tmp_path):
    config = GRPOConfig(**settings)
    whole = grpo.run(config, tmp_path / "whole")
    program = "from qwen_vl_kit import config\nfrom qwen_vl_kit.stages import grpo\n" \
        f"grpo.run(config.GRPOConfig(**{config.model_dump()!r}), {str(tmp_path / 'killed')!r})"
    db = tmp_path / "killed" / "rollouts.db"

    def third_is_under_way() -> bool:  # its episodes are stored, its updates are not yet made
        return (
            db.is_file()
            and (db.parent / "metrics.jsonl").is_file()
            and "grpo-0002" in set(traces.episodes(db).get("arm", ()))
        )

    kill_when(third_is_under_way, [sys.executable, "-c", program])
    resumed = grpo.run(config, tmp_path / "killed")
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    assert played(tmp_path / "killed") == played(tmp_path / "whole")
    assert resumed.numbers == whole.numbers
    alike(lora(tmp_path / "killed"), lora(tmp_path / "whole"))
    shutil.rmtree(tmp_path / "killed" / "adapter")  # killed once more, between its last update and its end
    grpo.run(config, tmp_path / "killed")
    assert figures(tmp_path / "killed") == figures(tmp_path / "whole")
    alike(lora(tmp_path / "killed"), lora(tmp_path / "whole"))
    with pytest.raises(InputError, match="there are 3 iterations already, and iterations = 1"):
        grpo.run(GRPOConfig(**settings | {"iterations": 1}), tmp_path / "killed")


def test_checkpoints_of_another_start_are_not_gone_on_with(settings, tmp_path):
    grpo.run(GRPOConfig(**settings | {"iterations": 1}), tmp_path / "first")
    again = grpo.run(
        GRPOConfig(**settings | {"iterations": 1, "adapter": str(tmp_path / "first" / "adapter")}), tmp_path / "second"
    )
    other = grpo.run(
        GRPOConfig(**settings | {"iterations": 1, "adapter": str(tmp_path / "first" / "adapter")}),
        tmp_path / "first" / "more",
    )
    assert figures(again.out) == figures(other.out)
    grpo.run(GRPOConfig(**settings | {"iterations": 1}), tmp_path / "second")
    assert figures(tmp_path / "second") == figures(tmp_path / "first")
    metrics = tmp_path / "second" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"seconds":', '"seconds":1e9,"once":'))
    last = grpo.run(GRPOConfig(**settings | {"iterations": 1, "learning_rate": 1e-30}), tmp_path / "second")
    assert last.seconds < 1e6  # those of the one before are not this one's
    alike(lora(tmp_path / "second"), lora(Path(settings["adapter"]).parent))  # what the other rate had learned is gone


def test_at_a_learning_rate_of_nothing_the_ratio_stays_one(settings, tmp_path):
    out = grpo.run(GRPOConfig(**settings | {"learning_rate": 1e-30, "epochs": 2}), tmp_path / "still").out
    rows = figures(out)
    assert len(rows) == 3
    assert all(
        row["ratio_mean"] == pytest.approx(1, abs=1e-5) and row["ratio_max"] == pytest.approx(1, abs=1e-4)
        for row in rows
    )
    assert all(
        row["logprob_gap"] < 1e-5 and row["clip_fraction"] == 0 and row["effective_share"] > 0.9999 for row in rows
    )
    alike(lora(Path(settings["adapter"]).parent), lora(out))


def test_two_hundred_syncs_drift_nothing(settings, tmp_path):
    """Policies that come and go, each of which speaks, leave the base as it was, and the last one is what it would
    have been alone."""
    engine = HFEngine(load_model("tiny", bf16=True), bf16=True)
    folders, asked = [settings["adapter"], contract.adapter(tmp_path / "other", 1)], contract.requests()[:1]

    def weights(adapter: str) -> dict:
        engine.generate(asked, Sampling(1.0, 1), adapter)
        return {name: weight.clone() for name, weight in engine.model.state_dict().items()}

    base, first = weights(""), weights(engine.set_policy(0, folders[0]))
    for version in range(1, 200):
        engine.generate(asked, Sampling(1.0, 1), engine.set_policy(version, folders[version % 2]))
    last = weights(engine.set_policy(200, folders[0]))
    alike(last, first)
    alike(weights(""), base)
    assert any((last[name] != base[name]).any() for name in base)


def test_weights_that_do_not_reach_the_engine_stop_the_run(settings, tmp_path, monkeypatch):
    first = HFEngine.set_policy
    monkeypatch.setattr(HFEngine, "set_policy", lambda self, version, folder: first(self, version, settings["adapter"]))
    with pytest.raises(TrainingStopped, match="the engine answers as it did before"):
        grpo.run(GRPOConfig(**settings), tmp_path / "grpo")
    assert list((tmp_path / "grpo" / "checkpoints").glob("checkpoint-*"))  # that of the first iteration is kept


def test_on_a_base_in_4_bits_it_plays_what_it_trains(settings, tmp_path):
    result = grpo.run(
        GRPOConfig(
            **settings | {"variety": "qlora", "engine": "auto", "gpus_for_vllm": 1, "beta": 0.1, "learning_rate": 1e-5}
        ),
        tmp_path / "grpo",
    )
    rows = figures(tmp_path / "grpo")
    assert len(rows) == 3 and all(row["logprob_gap"] < 1e-4 and row["ratio_max"] < 1.01 for row in rows)
    assert read_card(result.out)["quantization"] == "nf4"
    assert read_card(result.out)["base_weights"] == read_card(settings["adapter"])["base_weights"]
    assert "engine hf plays" in result.numbers["not_applied"][0]
    before, after = lora(Path(settings["adapter"]).parent), lora(result.out)
    steps = [abs(after[name] - before[name]).max() for name in before]
    assert 0 < max(steps) < 1e-4  # in bf16 the weights would have moved by more, or not at all


def test_ahead_of_the_updates(settings, tmp_path):
    config = GRPOConfig(**settings | {"overlap": True})
    one = grpo.run(config, tmp_path / "one").out
    for iterations in (
        1,
        2,
        3,
    ):  # the second and third go on by weights that played while the one before was trained on
        two = grpo.run(GRPOConfig(**settings | {"overlap": True, "iterations": iterations}), tmp_path / "two").out
    assert figures(one) == figures(two) and played(one) == played(two)
    alike(lora(one), lora(two))
    rows = figures(one)
    assert [row["logprob_gap"] < 1e-4 for row in rows] == [
        True,
        False,
        False,
    ]  # played by the weights of one iteration before
    assert {arm for arm, *_ in played(one)} == {"grpo-0000", "grpo-0001", "grpo-0002"}


def test_weights_that_arrive_wrongly_while_the_next_is_played_stop_the_run(settings, tmp_path, monkeypatch):
    first, other = HFEngine.set_policy, contract.adapter(tmp_path / "other", 1)
    monkeypatch.setattr(
        HFEngine, "set_policy", lambda self, version, folder: first(self, version, folder if version < 3 else other)
    )
    with pytest.raises(TrainingStopped, match="nats from the trainer's: it plays other weights"):
        grpo.run(GRPOConfig(**settings | {"overlap": True}), tmp_path / "grpo")
    assert len(figures(tmp_path / "grpo")) == 1


def test_copies_of_a_turn_count_as_often_as_they_are(settings, tmp_path, monkeypatch):
    "A turn that several episodes share goes through the model once, and pulls as hard; KL is of every one of them."
    whole = settings | {"iterations": 1, "group_size": 8, "batch_size": 1000, "top_share": 1.0, "temperature": 0.5}
    [one] = figures(grpo.run(GRPOConfig(**whole), tmp_path / "one").out)
    [kept_near] = figures(grpo.run(GRPOConfig(**whole | {"beta": 0.1}), tmp_path / "near").out)
    monkeypatch.setattr(player, "merge_duplicates", lambda samples, weights: (samples, weights))
    [each] = figures(grpo.run(GRPOConfig(**whole), tmp_path / "each").out)
    assert one["turns_distinct"] < one["turns_with_advantage"] == each["turns_distinct"] == kept_near["turns_distinct"]
    assert one["grad_norm"] == pytest.approx(each["grad_norm"], rel=1e-4) and kept_near["kl"] == pytest.approx(
        0, abs=1e-6
    )


def as_if_sampled(episodes: list, protocol: Protocol, processor) -> None:
    "Give the teacher's decisions the tokens that an engine would have."
    for episode in episodes:
        for number, turn in enumerate(episode.turns):
            chat = prompt(protocol, episode.turns[:number], turn.frame, turn.text, urls=False)
            turn.decision.prompt_ids = encode(processor, chat).input_ids
            turn.decision.token_ids = processor.tokenizer(turn.decision.text + "<|im_end|>")["input_ids"]
            turn.decision.logprobs = [-1.0] * len(turn.decision.token_ids)


@pytest.mark.parametrize("credit", ["critic", "turn"])
def test_the_critic_tells_the_actions_of_a_plan_apart(settings, credit):
    """What the first action of a plan earned is not credited to those that follow; all of a turn's advantage is, where
    there is no critic to say what each was worth."""
    config = GRPOConfig(**settings | {"horizon": "t20", "group_size": 2, "credit": credit, "scale_rewards": False})
    processor, protocol = load_model("tiny").processor, Protocol(**config.fields())
    seeds = list(range(50, 62))
    episodes = rollout(ExpertPolicy(protocol), protocol, seeds, members=2, noise=0.1)
    as_if_sampled(episodes, protocol, processor)
    groups = [Group(0, episodes[i:i + 2]) for i in range(0, len(episodes), 2)]
    made = player.SampleMaker(config, processor)(groups)
    assert {len(row) == len(sample.token_ids) for row, sample in zip(made.advantages, made.samples)} == {True}
    assert any(len(set(row.round(9))) > 1 for row in made.advantages) == (credit == "critic")
    if credit == "turn":
        return
    maker = player.SampleMaker(config, processor)
    early = [(turn, token_advantages(turn, processor.tokenizer))
             for turn in maker._credit(groups, episodes, [[float(len(t.unlocked)) for t in e.turns] for e in episodes])
             if has_unlocked(turn.episode.turns[turn.number].rewards[0]) and len(turn.spent) > 2]
    assert len(early) > 10  # unlocks by the first of several actions
    assert sum(row[0] - row[-2] for _, row in early) / len(early) > 0.3  # its tokens, and those of the last action


def test_nothing_to_learn_is_said(settings, tmp_path):
    "One turn an episode, and nothing taken for what is said: nobody earns anything."
    costless = {"invalid_penalty": 0.0, "grounding_penalty": 0.0}
    config = GRPOConfig(**settings | costless | {"horizon": "s1", "iterations": 4, "batch_size": 6, "seeds": "50-99"})
    with pytest.raises(TrainingStopped, match="nothing to learn; raise temperature, group_size or groups"):
        grpo.run(config, tmp_path / "grpo")
    rows = figures(tmp_path / "grpo")
    assert [row["turns_with_advantage"] for row in rows] == [0, 0] and [row["groups_alike"] for row in rows] == [1, 1]


def test_an_engine_that_dies_costs_its_iteration_only(settings, tmp_path, monkeypatch):
    config, first, calls = GRPOConfig(**settings), HFEngine.generate, []

    def dying(self, *args):
        calls.append(len(args[0]))
        if len(calls) == 30:  # in the middle of an iteration: a turn is one call, and a sync is one
            raise EngineDied("the engine is gone")
        return first(self, *args)

    whole = grpo.run(config, tmp_path / "whole").out
    monkeypatch.setattr(HFEngine, "generate", dying)
    with pytest.raises(EngineDied):
        grpo.run(config, tmp_path / "died")
    counts = traces.episodes(tmp_path / "died" / "rollouts.db").groupby("arm").size()
    assert len(counts) < 3 and set(counts) <= {6}  # whole iterations only
    grpo.run(config, tmp_path / "died")
    assert figures(tmp_path / "died") == figures(whole) and played(tmp_path / "died") == played(whole)


def test_divergence_and_a_lack_of_memory_are_told_and_state_is_kept(settings, tmp_path, monkeypatch):
    import torch

    from qwen_vl_kit.learn import grpo_trainer

    with pytest.raises(TrainingStopped):
        grpo.run(GRPOConfig(**settings | {"learning_rate": 1e12, "max_grad_norm": 1e12}), tmp_path / "diverged")
    first, calls = grpo_trainer.packed_logprobs, []

    def hungry(*args):
        calls.append(1)
        if len(calls) > 3:  # the first iteration's update is done
            raise torch.OutOfMemoryError("CUDA out of memory")
        return first(*args)

    monkeypatch.setattr(grpo_trainer, "packed_logprobs", hungry)
    with pytest.raises(TrainingStopped, match="out of memory; lower batch_size .* the last checkpoint is of update"):
        grpo.run(GRPOConfig(**settings), tmp_path / "hungry")
    assert list((tmp_path / "hungry" / "checkpoints").glob("checkpoint-*/adapter_model.safetensors"))


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
def test_losses_of_trl(settings, tmp_path, loss_type):
    more = {
        "loss_type": loss_type,
        "importance": "sequence" if loss_type == "luspo" else "token",
        "beta": 0.01 if loss_type == "grpo" else 0.0,
    }
    out = grpo.run(GRPOConfig(**settings | more | {"iterations": 1}), tmp_path / "grpo").out
    row = figures(out)[0]
    assert row["grad_norm"] > 0 and ("kl" in row) == (loss_type == "grpo")
    before, after = lora(Path(settings["adapter"]).parent), lora(out)
    assert any((before[name] != after[name]).any() for name in before)


def test_a_remote_judge_is_paid_once_for_an_episode(settings, tmp_path, monkeypatch):
    """It scores nothing at first, then its budget ends, then all is well but one refused call; what it has said is
    not asked again."""
    def play(number, body):
        if number < 12:
            return says("A fine game.")
        return refuses(400, "too long") if number == 30 else says('{"score": 40}', prompt=500, completion=10)

    def run_with(budget):
        return grpo.run(
            GRPOConfig(**settings | {"iterations": 2, "judge": "remote", "budget_usd": budget}), tmp_path / "grpo"
        )

    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with Endpoint(play) as endpoint:
        monkeypatch.setenv("OPENAI_BASE_URL", endpoint.url)
        with pytest.raises(
            TrainingStopped, match="the judge has scored none of .* episodes .*goes on from the last checkpoint"
        ):
            run_with(0.0)
        refused = len(endpoint.bodies)
        monkeypatch.setattr(endpoint, "answer", lambda number, body: play(number + 12 - refused, body))
        with pytest.raises(OverBudget, match="would be passed"):
            run_with(refused * 0.0001422 + 0.0008)
        assert endpoint.bodies[refused:] and len(endpoint.bodies) < refused + 12
        result = run_with(0.0)
        answered = len(list(read_jsonl(tmp_path / "grpo" / "answers.jsonl")))
        asked = {json.dumps(body["messages"]) for body in endpoint.bodies[refused:]}
    calls = [row for row in read_jsonl(tmp_path / "grpo" / "calls.jsonl") if "model" in row]
    assert result.numbers["calls"] == len(calls) == len(endpoint.bodies) and len(asked) - 1 <= answered <= len(asked)
    assert len(endpoint.bodies) - refused == len(asked)


def test_a_remote_judge_without_a_key_is_told_first(settings, tmp_path, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InputError, match="no key for model 'gpt-4o-mini'"):
        grpo.run(GRPOConfig(**settings | {"judge": "remote"}), tmp_path / "grpo")
    assert not (tmp_path / "grpo").exists()
    assert (
        config_hash(GRPOConfig(budget_usd=1.0))
        == config_hash(GRPOConfig(budget_usd=2.0))
        != config_hash(GRPOConfig(judge="remote"))
    )


def test_bad_input(settings, tmp_path):
    def fails(match, **more):
        with pytest.raises(InputError, match=match):
            grpo.run(GRPOConfig(**settings | more), tmp_path / "grpo")
        assert not (tmp_path / "grpo" / "adapter").exists()

    fails("was trained with prompt", history=0)
    fails("made for tiny", model="random:tiny")
    fails("name more seeds", seeds="5-6")


def test_a_finished_run_goes_on_when_more_is_asked_of_it(settings, tmp_path):
    def go(name, iterations):
        run_stage("grpo", GRPOConfig(**settings | {"iterations": iterations}), tmp_path / name)

    for name, iterations in (("parts", 1), ("parts", 2), ("whole", 2)):
        go(name, iterations)
    alike(lora(tmp_path / "parts"), lora(tmp_path / "whole"))
    assert figures(tmp_path / "parts") == figures(tmp_path / "whole") and played(tmp_path / "parts") == played(
        tmp_path / "whole"
    )
    with pytest.raises(InputError, match="which 1 does not extend"):
        go("parts", 1)
    assert state("grpo", GRPOConfig(**settings | {"iterations": 2}), tmp_path / "parts") == "done"


def test_the_benchmark_refuses_what_any_training_before_has_seen(settings, tmp_path):
    one = grpo.run(GRPOConfig(**settings | {"iterations": 1, "seeds": "60-99"}), tmp_path / "grpo").out
    two = grpo.run(
        GRPOConfig(**settings | {"iterations": 1, "seeds": "70-99", "adapter": str(one)}),
        tmp_path / "elsewhere" / "grpo",
    ).out
    shown = {name: settings[name] for name in (*PLAY, "model")}
    for seed in (0, 60, 70):  # of the teacher's traces, of the first GRPO, of the second
        config = BenchmarkConfig(**shown, arms=["grpo"], grpo_adapter=str(two), seeds=str(seed))
        with pytest.raises(InputError, match=f"seed {seed} was trained on by the adapter of arm grpo"):
            benchmark.run(config, tmp_path / "benchmark")
    assert not (tmp_path / "benchmark").exists()


def test_damaged_adapters_are_told_before_anything_is_written(settings, tmp_path):
    def fails(match, change):
        folder = tmp_path / "adapter"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(settings["adapter"], folder)
        change(folder)
        with pytest.raises(InputError, match=match):
            grpo.run(GRPOConfig(**settings | {"adapter": str(folder)}), tmp_path / "grpo")
        assert not (tmp_path / "grpo").exists()

    def whole(folder):
        write_json(folder / "qvk.json", read_json(folder / "qvk.json") | {"variety": "full"})
        (folder / "adapter_config.json").rename(folder / "config.json")
        (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")

    weights = "adapter_model.safetensors"
    fails("without its weights", lambda folder: (folder / weights).unlink())
    fails("without adapter_config.json", lambda folder: (folder / "adapter_config.json").unlink())
    fails("damaged or cut short", lambda folder: (folder / weights).write_bytes((folder / weights).read_bytes()[:-9]))
    fails("these are whole weights", whole)

    def less(folder):
        from safetensors.numpy import load_file, save_file
        tensors = load_file(folder / weights)
        layer = min(tensors).partition(".lora_")[0]
        save_file(
            {name: tensor for name, tensor in tensors.items() if not name.startswith(layer + ".")}, folder / weights
        )

    def said(name, **more):
        return lambda folder: write_json(folder / name, read_json(folder / name) | more)

    fails("2 of its tensors are missing", less)
    fails("cannot read seeds from 'zz'", said("qvk.json", seeds="zz"))
    fails("its tensors are not those of the LoRA", said("adapter_config.json", r=5))
    shown = {name: settings[name] for name in PLAY}
    for arm, model, match in (("sft", "random:tiny", "made for tiny"), ("base", "tinyy", "unknown model")):
        config = BenchmarkConfig(**shown, model=model, arms=["random", arm], sft_adapter=settings["adapter"])
        with pytest.raises(InputError, match=match):
            benchmark.run(config, tmp_path / "benchmark")
        assert not (tmp_path / "benchmark").exists()


def test_trl_is_as_it_was_when_this_was_written():
    "What `TurnGRPOTrainer` overrides or reads; an upgrade that changes one of them fails here, not in the results."
    from trl import GRPOTrainer

    def parameters(name):
        return list(inspect.signature(getattr(GRPOTrainer, name)).parameters)

    assert parameters("_generate_and_score_completions") == ["self", "inputs"]
    assert parameters("_compute_loss") == ["self", "model", "inputs"]
    assert parameters("_prepare_inputs") == ["self", "generation_batch"]
    assert parameters("log") == ["self", "logs", "start_time"]
    assert parameters("_get_per_token_logps_and_entropies")[:8] == [
        "self",
        "model",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "batch_size",
        "compute_entropy",
        "compute_aux_loss",
    ]
    assert "self._run_epoch(" in inspect.getsource(GRPOTrainer._inner_training_loop)
    loss = inspect.getsource(GRPOTrainer._compute_loss)
    for key in (
        "prompt_ids",
        "prompt_mask",
        "completion_ids",
        "completion_mask",
        "advantages",
        "ref_per_token_logps",
        "num_items_in_batch",
    ):
        assert f'inputs["{key}"]' in loss, key
    assert 'inputs.get("old_per_token_logps")' in loss and 'self._metrics[mode]["entropy"]' in loss
    assert "_buffered_inputs" in inspect.getsource(GRPOTrainer._prepare_inputs)
    assert "old_per_token_logps - " not in loss and "per_token_logps - old_per_token_logps" in loss
