"""Adapters that others have made: each part is played as PEFT plays it, or refused by its name; and QLoRA's base in 4
bits."""

import gc
import json
import shutil
import weakref
from pathlib import Path

import contract
import pytest
import torch

from qwen_vl_kit.config import BenchmarkConfig, GRPOConfig
from qwen_vl_kit.core import InputError, read_json, write_json
from qwen_vl_kit.engine.base import Sampling
from qwen_vl_kit.engine.factory import create_engine
from qwen_vl_kit.engine.hf import HFEngine
from qwen_vl_kit.engine.vllm import language_only
from qwen_vl_kit.learn.devices import plan_serving
from qwen_vl_kit.model import loading
from qwen_vl_kit.model.adapter_files import adapter_parts
from qwen_vl_kit.model.adapters import attach
from qwen_vl_kit.model.cards import base_notices, missing_facts, read_card, training_seeds
from qwen_vl_kit.model.checkpoint import tiny_folder
from qwen_vl_kit.model.loading import load_model, load_without_weights
from qwen_vl_kit.play.policies import read_checked_card
from qwen_vl_kit.stages import benchmark, grpo

pytestmark = pytest.mark.slow

ASKED = contract.requests()[:2]
SAMPLING = Sampling(1.0, 6)
PLAY = dict(prompt="brief", render_size=144, horizon="s3")
LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
QUERIES, WORDS = r".*language_model.*\.q_proj", r".*language_model.*(q_proj|embed_tokens)"


def stock():
    "`tiny` as transformers loads it."
    from transformers import AutoModelForImageTextToText
    return AutoModelForImageTextToText.from_pretrained(tiny_folder())


def lora(folder: Path, **settings) -> Path:
    "A LoRA that PEFT has made for `tiny`, with random weights that matter."
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": LANGUAGE} | settings)
    model = get_peft_model(stock(), config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    model.save_pretrained(folder)
    return folder


def described(folder: Path, **settings) -> Path:
    "The adapter with other words in its config."
    write_json(folder / "adapter_config.json", read_json(folder / "adapter_config.json") | settings)
    return folder


def tensors(folder: Path, change) -> Path:
    "The adapter with `change` made to its dict of tensors."
    from safetensors.torch import load_file, save_file

    held = load_file(folder / "adapter_model.safetensors")
    change(held)
    save_file(held, folder / "adapter_model.safetensors")
    return folder


def gap(folder: Path, outputs: list) -> float:
    "The most that the log-probabilities of outputs differ from those of transformers and PEFT, in nats."
    from peft import PeftModel

    processor, model = load_without_weights("tiny")[0].processor, PeftModel.from_pretrained(stock(), folder).eval()
    return max(
        contract.Reference.gap(_Stock(model, processor), *pair, SAMPLING.temperature)
        for pair in zip(ASKED, outputs, strict=True)
    )


class _Stock:
    def __init__(self, model, processor):
        self.model, self.processor = model, processor


@pytest.fixture(scope="module")
def engine():
    "One for all adapters: each finds the base as it was."
    return HFEngine(load_model("tiny"))


PLAYED = {
    "plain": {},
    "one scale a layer": {
        "rank_pattern": {"q_proj": 8},
        "alpha_pattern": {r"layers\.1\.mlp\.up_proj": 3},
        "use_rslora": True,
    },
    "DoRA": {"use_dora": True, "rank_pattern": {"q_proj": 8}},
    "DoRA on all": {"use_dora": True, "target_modules": "all-linear"},
    "a norm": {"modules_to_save": ["norm"]},
    "an embedding, its head as before": {"modules_to_save": ["embed_tokens"]},
    "a head, its embedding as before": {"modules_to_save": ["lm_head"]},
    "an embedding and its head": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "biases": {"target_modules": QUERIES, "bias": "all"},
    "biases of adapted layers": {"target_modules": r".*(qkv|q_proj)", "bias": "lora_only"},
    "LoRA on the embedding": {"target_modules": WORDS},
    "LoRA on the head": {"target_modules": ["q_proj", "lm_head"]},
    "some words": {"trainable_token_indices": [1, 2, 40]},
    "OLoRA": {"init_lora_weights": "olora"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "EVA": {"init_lora_weights": "eva"},
    "patches": {"target_modules": r".*patch_embed\.proj"},
    "no task": {"task_type": None},
}


@pytest.mark.parametrize("kind", PLAYED)
def test_what_is_played_is_played_as_peft_does(kind, engine, tmp_path):
    folder, base = lora(tmp_path / "adapter", **PLAYED[kind]), engine.generate(ASKED, SAMPLING)
    played = engine.generate(ASKED, SAMPLING, engine.set_policy(engine.versions.latest + 1, folder))
    assert gap(folder, played) < 5e-5
    assert gap(folder, create_engine("hf", "tiny", adapter=folder, bf16=False).generate(ASKED, SAMPLING)) < 5e-5
    assert all(ours.logprobs == theirs.logprobs for ours, theirs in zip(engine.generate(ASKED, SAMPLING), base))


@pytest.mark.parametrize("kind", ["DoRA on all", "an embedding, its head as before", "patches", "OLoRA"])
def test_a_model_that_carries_an_adapter_computes_what_peft_computes(kind, tmp_path):
    folder = lora(tmp_path / "adapter", **PLAYED[kind])
    [output] = create_engine("hf", "tiny", adapter=folder, bf16=False).generate(ASKED[:1], SAMPLING)
    assert contract.Reference(folder).gap(ASKED[0], output, SAMPLING.temperature) < 5e-5


REFUSED = {
    "lora_bias": {"lora_bias": True},
    "target_parameters": {"target_modules": ["q_proj"], "target_parameters": ["k_proj.weight"]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [5, 6]},
    'init_lora_weights = "pissa_niter_4"': {"init_lora_weights": "pissa_niter_4"},
    'init_lora_weights = "mica"': {"init_lora_weights": "mica"},
    'task_type = "SEQ_CLS"': {"task_type": "SEQ_CLS"},
}
WORDED = {  # where PEFT cannot make one here
    'init_lora_weights = "corda"': {"init_lora_weights": "corda"},
    'init_lora_weights = "loftq"': {"init_lora_weights": "loftq"},
    "layer_replication": {"layer_replication": [[0, 2], [1, 3]]},
    "megatron_config": {"megatron_config": {"a": 1}},
    "of_a_later_peft": {"of_a_later_peft": True},
    'peft_type = "ADALORA"': {"peft_type": "ADALORA"},
    'peft_type = "IA3"': {"peft_type": "IA3"},
}


@pytest.mark.parametrize("part", [*REFUSED, *WORDED])
def test_what_cannot_be_played_is_refused_by_its_name(part, engine, tmp_path):
    folder = described(lora(tmp_path / "adapter", **REFUSED.get(part, {})), **WORDED.get(part, {}))
    for way in (
        lambda: engine.set_policy(10**6, folder),
        lambda: load_model("tiny", adapter=folder),
        lambda: benchmark.run(
            BenchmarkConfig(model="tiny", arms=["random", "sft"], sft_adapter=str(folder), seeds="7", **PLAY),
            tmp_path / "benchmark",
        ),
    ):
        with pytest.raises(InputError) as refused:
            way()
        assert part in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "benchmark").exists()


@pytest.mark.parametrize(
    "kind, part",
    [
        ("DoRA", "use_dora"),
        ("one scale a layer", "alpha_pattern"),
        ("a norm", "modules_to_save"),
        ("biases", "bias"),
        ("LoRA on the head", "embeddings"),
        ("OLoRA", "olora"),
    ],
)
def test_vllm_is_given_nothing_that_it_would_play_otherwise(kind, part, tmp_path):
    with pytest.raises(InputError, match=part):
        language_only(lora(tmp_path / "adapter", **PLAYED[kind]))


def _cut(held: dict) -> None:
    del held[next(name for name in held if "layers.2.mlp.down_proj" in name)]


def _added(held: dict) -> None:
    held["base_model.model.model.language_model.layers.7.mlp.up_proj.lora_A.weight"] = torch.zeros(4, 128)


def _resized(held: dict) -> None:
    held["base_model.model.model.language_model.embed_tokens.weight"] = torch.zeros(999, 128)


def _narrow(held: dict) -> None:
    name = next(name for name in held if "q_proj.lora_A" in name)
    held[name] = held[name][:, :64].clone()


@pytest.mark.parametrize(
    "change, says",
    [
        (_cut, r"of its tensors are missing \(.*layers\.2\.mlp\.down_proj"),
        (_narrow, r"\[4, 64\], not \[4, 128\]"),
        (_added, r"1 of its tensors belong to nothing .*layers\.7"),
        (_resized, "the vocabulary was resized"),
    ],
)
def test_tensors_are_those_that_the_config_asks_for(change, says, engine, tmp_path):
    folder = tensors(lora(tmp_path / "adapter"), change)
    played = BenchmarkConfig(
        model="tiny", arms=["random", "sft"], sft_adapter=str(folder), seeds="7", bf16=False, engine="hf", **PLAY
    )
    for way in (lambda: engine.set_policy(10**6, folder), lambda: load_model("tiny", adapter=folder, trainable=True),
                lambda: benchmark.run(played, tmp_path / "benchmark")):
        with pytest.raises(InputError, match=says):
            way()
    assert not (tmp_path / "benchmark" / "rollouts.db").exists()  # no arm has played


def test_files_that_are_not_where_peft_puts_them(tmp_path):
    folder = lora(tmp_path / "several" / "one")
    shutil.copytree(folder, tmp_path / "several" / "two")
    with pytest.raises(InputError, match="in each of its folders one, two; name one of them"):
        read_card(tmp_path / "several")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        kept = (folder / name).read_bytes()
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(InputError, match=f"{name}: a pointer of git-lfs"):
            read_card(folder)
        (folder / name).write_bytes(kept)
    torch.save({}, folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="adapter_model.bin: weights in a pickle"):
        read_card(folder)


@pytest.mark.parametrize("kind, part", [("biases", "bias"), ("LoRA on the embedding", "embeddings"), ("PiSSA", "pissa"),
                                        ("some words", "trainable_token")])
def test_training_does_not_go_on_from_what_the_trainer_would_leave_out(kind, part, tmp_path):
    with pytest.raises(InputError, match=f"training cannot continue from .*{part}"):
        load_model("tiny", adapter=lora(tmp_path / "adapter", **PLAYED[kind]), trainable=True)


def trained(tmp_path: Path, adapter: Path, **more):
    "One iteration of GRPO from an adapter."
    settings = dict(
        model="tiny",
        adapter=str(adapter),
        groups=2,
        group_size=2,
        branch_share=0.0,
        iterations=1,
        batch_size=16,
        max_new_tokens=8,
        seeds="50-99",
        sequence_length=128,
        bf16=False,
        engine="hf",
        threads=1,
    )
    return grpo.run(GRPOConfig(**settings | PLAY | more), tmp_path / "grpo")


@pytest.mark.parametrize("kind, beta", [("DoRA", 0.1), ("a norm", 0.0)])
def test_grpo_goes_on_from_parts_that_are_merged_to_be_played(kind, beta, tmp_path):
    result = trained(tmp_path, lora(tmp_path / "adapter", **PLAYED[kind]), beta=beta)
    [row] = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    assert row["logprob_gap"] < 1e-5 and set(adapter_parts(result.out / "adapter")) == set(
        adapter_parts(tmp_path / "adapter")
    )


def test_an_adapter_without_a_card_is_played_and_trained_on_and_what_nobody_knows_is_reported(tmp_path):
    foreign = described(lora(tmp_path / "checkpoint-40"), base_model_name_or_path="somebody/else")
    result = trained(tmp_path, foreign)
    assert result.numbers["unknown_of_adapter"] == ["base weights", "prompt", "seeds"]
    assert result.numbers["adapter_names_base"] == "somebody/else"
    assert (
        "adapter: its adapter_config.json names somebody/else as its base, and it is put on tiny"
        in result.numbers["notices"]
    )
    card = read_card(result.out)
    assert card["base"] == "tiny" and missing_facts(card) == ["seeds"] and training_seeds(card) == [50, 51]
    config = BenchmarkConfig(
        model="tiny",
        arms=["sft", "grpo"],
        sft_adapter=str(foreign),
        grpo_adapter=str(result.out / "checkpoints/checkpoint-1"),
        seeds="7-8",
        bf16=False,
        engine="hf",
        threads=1,
        max_new_tokens=8,
        **PLAY,
    )
    numbers = benchmark.run(config, tmp_path / "benchmark").numbers
    assert numbers["seeds_not_told"] == ["sft", "grpo"] and numbers["adapters_name_base"] == {"sft": "somebody/else"}
    assert numbers["unknown_of_adapters"]["grpo"] == ["seeds"]  # of the foreign one: a checkpoint has its run's card
    with pytest.raises(InputError, match="seed 50 was trained on by the adapter of arm grpo"):
        benchmark.run(config.model_copy(update={"seeds": "50"}), tmp_path / "seen")
    assert read_checked_card(foreign, config)["prompt_hash"] is None


def test_the_command_says_what_no_card_tells(tmp_path, capsys):
    from qwen_vl_kit.runner.run import check_adapters

    foreign = lora(tmp_path / "adapter")
    check_adapters(BenchmarkConfig(sft_adapter=str(foreign)))
    assert "the base weights, prompt, seeds that it was trained with are not on a card" in capsys.readouterr().err
    write_json(foreign / "qvk.json", {"base": "tiny", "base_weights": "0", "prompt_hash": "0", "seeds": "1-9"})
    check_adapters(BenchmarkConfig(sft_adapter=str(foreign)))
    assert not capsys.readouterr().err


def held(model) -> list:
    "Weak references to a model's weights."
    return [weakref.ref(weight) for weight in model.parameters()]


def test_an_adapter_that_follows_another_takes_its_place(tmp_path):
    one, two = contract.adapter(tmp_path / "one", 1), contract.adapter(tmp_path / "two", 2)
    loaded = attach(load_model("tiny", adapter=one), two)
    [output] = create_engine("hf", "tiny", adapter=two, bf16=False).generate(ASKED[:1], SAMPLING)
    reference = _Stock(loaded.model.eval(), loaded.processor)
    assert contract.Reference.gap(reference, ASKED[0], output, SAMPLING.temperature) < 1e-5
    with pytest.raises(InputError, match="has changed its base"):
        attach(load_model("tiny", adapter=lora(tmp_path / "three", init_lora_weights="olora")), two)


def test_an_engine_that_is_closed_holds_nothing(tmp_path):
    engine = create_engine("hf", "tiny", adapter=contract.adapter(tmp_path / "one", 1), bf16=False)
    engine.generate(ASKED, SAMPLING, engine.set_policy(0, lora(tmp_path / "two", use_dora=True)))
    weights = held(engine.model)
    gc.disable()
    try:
        engine.close()
        assert not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


def test_a_model_that_was_let_go_of_is_gone_when_the_next_is_loaded(tmp_path):
    folders = [contract.adapter(tmp_path / str(i), i) for i in range(2)]
    gc.collect()
    gc.disable()  # it comes when it likes, and the weights of a second model may not fit before
    try:
        first = load_model("tiny", adapter=folders[0])
        weights = held(first.model)
        del first
        second = load_model("tiny", adapter=folders[1])
        assert second.model is not None and not any(weight() is not None for weight in weights)
    finally:
        gc.enable()


def test_a_base_in_4_bits_plays_an_adapter_as_peft_does_and_takes_it_away_again(tmp_path):
    folders = [contract.adapter(tmp_path / str(i), i, targets=targets, rank=rank) for i, (targets, rank) in
               enumerate((("language", 8), ("all-linear", 4), ("language", 16)))]
    engine = create_engine("hf", "tiny", bf16=False, qlora=True)
    base = engine.generate(ASKED, SAMPLING)
    for version, folder in enumerate(folders):
        carrying = load_model("tiny", adapter=folder, qlora=True, trainable=True)
        reference = _Stock(carrying.model.train(), carrying.processor)  # as GRPO's trainer holds it
        outputs = engine.generate(ASKED, SAMPLING, engine.set_policy(version, folder))
        assert (
            max(contract.Reference.gap(reference, *pair, SAMPLING.temperature) for pair in zip(ASKED, outputs)) < 1e-4
        )
        assert outputs[0].logprobs != base[0].logprobs
        assert [o.logprobs for o in engine.generate(ASKED, SAMPLING)] == [o.logprobs for o in base]
    assert (
        base[0].logprobs != create_engine("hf", "tiny", bf16=False).generate(ASKED, SAMPLING)[0].logprobs
    )  # else it is none in 4 bits
    for made, words in (
        ({"quantization": "nf4"}, []),
        ({}, ["it was trained on a base in 16 bits, and is put on one in 4"]),
    ):
        lines = base_notices(carrying, {"base": "tiny", "base_weights": "0", **made})
        assert [line.partition(", which")[0] for line in lines] == words
    with pytest.raises(InputError, match="a base in 4 bits cannot take this part of an adapter: use_dora"):
        engine.set_policy(9, lora(tmp_path / "dora", use_dora=True))


def test_a_base_in_4_bits_is_not_for_the_other_engines():
    for engine in ("vllm", "server"):
        with pytest.raises(InputError, match="in 16"):
            create_engine(engine, "tiny", qlora=True)
        with pytest.raises(ValueError, match="trains on a base in 4 bits"):
            GRPOConfig(variety="qlora", engine=engine)
    assert plan_serving(GRPOConfig(variety="qlora", gpus_for_vllm=2))[0] == 0


@pytest.mark.parametrize(
    "key, value",
    [
        ("base_model_name_or_path", 5),
        ("base_model_name_or_path", ["x"]),
        ("arrow_config", {}),
        ("rank_pattern", [1]),
        ("target_parameters", ""),
        ("use_bdlora", False),
        ("layers_to_transform", "x"),
        ("r", "8"),
    ],
)
def test_a_config_with_a_value_of_another_type_is_refused_in_a_line(key, value, tmp_path):
    folder = described(lora(tmp_path / "adapter"), **{key: value})
    with pytest.raises(InputError):
        load_model("tiny", adapter=folder)


@pytest.mark.parametrize(
    "key, value", [("base", 5), ("base", None), ("base_weights", 7), ("base_digest", []), ("prompt_hash", {})]
)
def test_a_card_with_a_value_of_another_type_is_refused_in_a_line(key, value, tmp_path):
    folder = lora(tmp_path / "adapter")
    write_json(folder / "qvk.json", {"base": "tiny", "base_weights": None, "prompt_hash": None, key: value})
    with pytest.raises(InputError, match="card"):
        read_card(folder)


@pytest.mark.parametrize("text", ['{"a":' + "[" * 100_000, "", "\0", "[]"])
def test_a_config_that_is_not_json_is_refused_in_a_line(text, tmp_path):
    folder = lora(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(text)
    with pytest.raises(InputError):
        read_card(folder)


def test_an_adapter_that_does_not_fit_is_refused_before_the_weights_are_read(tmp_path, monkeypatch):
    foreign = tensors(lora(tmp_path / "adapter"), lambda held: held.pop(next(iter(held))))
    read = []
    monkeypatch.setattr(loading, "_load_weights", lambda *_: read.append(1))
    with pytest.raises(InputError, match="1 of its tensors are missing"):
        load_model("tiny", adapter=foreign)
    assert not read
