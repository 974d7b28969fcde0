"""Real vLLM, in this process and behind HTTP, on `tiny`: it keeps the contract of all engines, and the kit's stages
play against it.

`make test-vllm` runs this file, with vLLM's CPU build in an environment of its own."""

import contextlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import contract
import pytest
import rehearsal
from runs import student

from qwen_vl_kit.config import BenchmarkConfig
from qwen_vl_kit.core import InputError, read_json, read_jsonl
from qwen_vl_kit.engine import serving
from qwen_vl_kit.engine.base import EngineDied, Request, Sampling
from qwen_vl_kit.engine.factory import create_engine
from qwen_vl_kit.engine.refusals import CallFailed
from qwen_vl_kit.model import encode
from qwen_vl_kit.model.loading import load_without_weights
from qwen_vl_kit.stages import benchmark
from qwen_vl_kit.store import traces
from qwen_vl_kit.store.traces import load_episodes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.process,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here; make test-vllm runs this"),
]

ALONE = {
    "OMP_NUM_THREADS": "1",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}
os.environ.update(ALONE)


@pytest.fixture(scope="module")
def engine():
    engine = create_engine("vllm", "tiny", bf16=False, concurrency=32)
    yield engine
    engine.close()


def test_vllm_keeps_the_contract(engine, tmp_path):
    contract.check(engine, tmp_path)


def test_trl_expands_image_tokens_twice_and_the_kit_does_not(engine):
    "TRL's own code, on the same vLLM: if this fails, TRL has fixed it, and `collapse_image_tokens` may go."
    import torch
    from PIL import Image
    from trl.generation.vllm_generation import VLLMGeneration

    request = contract.requests()[0]
    sample = encode.encode(engine.processor, request.messages)
    stock = VLLMGeneration.__new__(VLLMGeneration)  # its vLLM is ours: starting another takes a minute
    vars(stock).update(
        llm=engine.llm,
        mode="colocate",
        tensor_parallel_size=1,
        enable_sleep_mode=False,
        temperature=0.7,
        top_p=1.0,
        top_k=0,
        min_p=None,
        repetition_penalty=1.0,
        max_completion_length=6,
        logprobs=0,
        generation_kwargs={},
        accelerator=None,
        structured_outputs_regex=None,
        model=torch.nn.Identity(),
    )
    [seen], *_ = stock.generate([sample.input_ids], [[Image.fromarray(frame) for frame in sample.frames]], 1)
    image = engine.processor.image_token_id
    assert sample.input_ids.count(image) == 81 and seen.count(image) > 81
    [ours] = engine.generate([request], contract.SAMPLING)
    assert ours.prompt_ids == sample.input_ids


def test_vllm_refuses_in_one_line_what_it_would_get_wrong(engine, tmp_path):
    tower = contract.adapter(tmp_path / "tower", 0, targets="all-linear")
    with pytest.raises(InputError, match="changes the vision tower, and vLLM would pass over that in silence"):
        engine.set_policy(10, tower)
    high = contract.adapter(tmp_path / "high", 0, rank=128)
    with pytest.raises(InputError, match="an adapter of rank 128, and vLLM was started for 64"):
        engine.set_policy(10, high)
    foreign = contract.adapter(tmp_path / "foreign", 0, base="random:tiny")
    with pytest.raises(InputError, match="was made for random:tiny .* not for tiny"):
        engine.set_policy(10, foreign)
    [first, *_] = contract.requests()
    with pytest.raises(InputError, match="vLLM was started for 4096"):
        engine.generate([first], Sampling(1.0, 4090))


def test_a_vllm_that_fails_is_told_as_a_dead_engine(engine, monkeypatch):
    def broken():
        raise OSError("out of luck\nand more")

    monkeypatch.setattr(engine.llm.llm_engine, "step", broken)
    with pytest.raises(EngineDied, match=r"^vLLM failed while it generated \(OSError: out of luck and more\)$"):
        engine.generate(contract.requests(), contract.SAMPLING)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    "What ends the server, and what opens it."
    log = tmp_path_factory.mktemp("server") / "vllm.log"
    with contextlib.ExitStack() as stack:
        yield (
            stack,
            stack.enter_context(serving.serving("tiny", gpus=0, log=log, bf16=False, longest=1024, concurrency=32)),
        )


@pytest.fixture
def access(server, monkeypatch):
    at = server[1].access
    for name, value in {"OPENAI_BASE_URL": at.base_url, "OPENAI_API_KEY": at.api_key, "OPENAI_HEADERS": ""}.items():
        monkeypatch.setenv(name, value)


def test_a_server_of_ones_own_asks_for_its_key(server, access, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    with pytest.raises(InputError, match="the endpoint refuses model 'tiny' .401"):
        create_engine("server", "tiny", tokens=True).generate(contract.requests()[:1], contract.SAMPLING)


def test_a_vllm_server_keeps_the_contract_of_an_rl_engine(access, tmp_path):
    engine = create_engine("server", "tiny", tokens=True, concurrency=32)
    contract.check(engine, tmp_path)
    with pytest.raises(InputError, match="the endpoint does not take an adapter .* start vLLM with --enable-lora"):
        engine.set_policy(10, contract.adapter(tmp_path / "high", 0, rank=128))
    engine.close()
    again = create_engine("server", "tiny", tokens=True)  # another run, and the server has the adapter already
    name = again.set_policy(1, tmp_path / "adapter1")
    reference, asked = contract.Reference(tmp_path / "adapter1"), contract.requests()
    assert max(map(reference.gap, asked, again.generate(asked, contract.SAMPLING, name))) < 1e-4
    again.close()


def test_qvk_collects_from_a_vllm_server(access, tmp_path):
    settings = {
        "teacher": "model",
        "engine": "server",
        "model": "tiny",
        "seeds": "0-3",
        "horizon": "s3",
        "render_size": 144,
        "prompt": "brief",
        "max_new_tokens": 8,
        "max_reprompts": 0,
        "concurrency": 4,
    }
    (tmp_path / "collect.toml").write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items()))
    line = [Path(sys.executable).with_name("qvk"), "collect", "--config", tmp_path / "collect.toml", "--out", tmp_path]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    episodes = traces.episodes(tmp_path / "collect" / "rollouts.db")
    assert (
        sorted(episodes.seed) == [0, 1, 2, 3]
        and (episodes.turns == 3).all()
        and (episodes.prompt_tokens > 3 * 81).all()
    )
    assert read_json(tmp_path / "collect" / "manifest.json")["numbers"]["calls"] == 13  # and one to probe


def test_a_benchmark_is_the_same_on_a_server_and_here(access, tmp_path):
    "Greedy, in float32: the adapter that the server loaded plays what the kit's own engine plays."
    folder = contract.adapter(tmp_path / "adapter", 1, std=0.2)
    config = BenchmarkConfig(
        model="tiny",
        arms=["base", "sft"],
        sft_adapter=str(folder),
        prompt="brief",
        render_size=144,
        horizon="s3",
        seeds="1000000-1000003",
        temperature=0.0,
        max_new_tokens=8,
        bf16=False,
        concurrency=4,
    )
    said = {}
    for engine in ("server", "hf"):
        out = tmp_path / engine / "benchmark"
        result = benchmark.run(config.model_copy(update={"engine": engine}), out)
        said[engine] = {
            (e.model, e.seed): [t.decision.text for t in e.turns] for e in load_episodes(out / "rollouts.db")
        }
        assert len(said[engine]) == 8 and all(len(texts) == 3 for texts in said[engine].values())
        assert bool(result.usage) == (engine == "server")
    assert said["server"] == said["hf"]
    assert said["hf"]["base", 1_000_000] != said["hf"]["sft", 1_000_000]


@pytest.mark.parametrize("engine", ["vllm", "server", "auto"])
def test_grpo_plays_by_vllm(engine, access, tmp_path):
    """The engine's log-probabilities are the trainer's, before and after updates; on a server, the next iteration is
    played meanwhile. The third way starts a server of its own, as if this machine had two GPUs."""
    settings = {
        "engine": engine,
        "overlap": engine == "server",
        "gpus_for_vllm": int(engine == "auto"),
        "adapter": str(student(tmp_path)),
        "model": "tiny",
        "bf16": False,
        "threads": 1,
        "prompt": "brief",
        "render_size": 144,
        "horizon": "s10",
        "groups": 2,
        "group_size": 3,
        "iterations": 3,
        "batch_size": 16,
        "max_new_tokens": 16,
        "sequence_length": 1024,
        "learning_rate": 1e-3,
        "seeds": "50-99",
    }
    program = (
        "from qwen_vl_kit import config\nfrom qwen_vl_kit.learn import devices\nfrom qwen_vl_kit.stages import grpo\n"
        f"devices.gpu_count = lambda: 2\ngrpo.run(config.GRPOConfig(**{settings!r}), {str(tmp_path / 'grpo')!r})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = list(read_jsonl(tmp_path / "grpo" / "metrics.jsonl"))
    assert len(rows) == 3 and all(row["turns_with_advantage"] > 0 and row["grad_norm"] > 0 for row in rows)
    assert [row["logprob_gap"] < 1e-4 for row in rows] == [
        True,
        engine != "server",
        engine != "server",
    ]  # a server is one iteration behind
    assert (tmp_path / "grpo" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_server_that_dies_is_told(server, access):
    engine = create_engine("server", "tiny", tokens=True, retries=0)
    asked = contract.requests()
    assert len(engine.generate(asked, contract.SAMPLING)) == len(asked)
    mine = create_engine("server", "tiny", tokens=True, at=server[1])
    assert [a.token_ids for a in mine.generate(asked, contract.SAMPLING)] == [
        a.token_ids for a in engine.generate(asked, contract.SAMPLING)
    ]
    server[0].close()
    with pytest.raises(EngineDied, match="vLLM's server has ended; see .*vllm.log"):
        mine.generate(asked, contract.SAMPLING)
    mine.close()
    with pytest.raises(CallFailed, match="the connection broke"):
        engine.generate(asked, contract.SAMPLING)
    engine.close()


def test_a_model_of_the_hub_plays_in_vllm_as_in_transformers(hub):
    "By its name, with its own files: 151,936 words, pictures that merge, two tokens that end a reply."
    asked = [Request(rehearsal.prompt(seed), (7, 0, seed)) for seed in range(3)]
    vllm = create_engine("vllm", rehearsal.NAME, bf16=False, concurrency=4, longest=2048)
    try:
        assert (vllm.loaded.commit, vllm.loaded.end_ids) == (rehearsal.COMMIT, (151_643, 151_645))
        ours = vllm.generate(asked, contract.SAMPLING)
    finally:
        vllm.close()
    reference = contract.Reference(base=rehearsal.NAME)
    assert max(map(reference.gap, asked, ours)) < 1e-4


def test_prompts_are_those_of_autoprocessor(hub):
    "AutoProcessor needs torchvision, which is here."
    from transformers import AutoProcessor

    processor, theirs = load_without_weights(rehearsal.NAME)[0].processor, AutoProcessor.from_pretrained(rehearsal.NAME)
    for size in (64, 144, 288, 320):
        stock = theirs.apply_chat_template(
            rehearsal.prompt(0, size), tokenize=True, return_dict=True, add_generation_prompt=True
        )
        assert encode.encode(processor, rehearsal.prompt(0, size)).input_ids == list(stock["input_ids"][0])
