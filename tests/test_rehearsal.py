"""The real thing, rehearsed: a model that lies in the hub cache as Qwen3-VL-2B does, by its hub name, through
`configs/h200` and the seed's commands.

Only counts are lowered. What is compared is what transformers and PEFT make of the same files."""

import csv
import re
import shutil

import pytest
import rehearsal
import servers
from commands import qvk

from qwen_vl_kit.core import read_json, read_jsonl, root

pytestmark = [pytest.mark.slow, pytest.mark.process]

SMALL = {
    "horizon": "s6",
    "collect.seeds": "0-5",
    "sft.max_steps": 2,
    "sft.eval_steps": 1,
    "sft.eval_rows": 4,
    "sft.batch_size": 4,
    "grpo.iterations": 1,
    "grpo.groups": 2,
    "grpo.group_size": 2,
    "grpo.batch_size": 4,
    "grpo.gradient_accumulation_steps": 1,
    "benchmark.seeds": "1000000-1000001",
}


def options(settings: dict) -> list[str]:
    "`--set` for each of them."
    return [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]


def command(*words, **more) -> str:
    "Run `qvk`, which has to end well; what it printed."
    code, out, err = qvk(*words, OMP_NUM_THREADS="1", **more)
    assert code == 0, out + err
    return out + err


@pytest.fixture(scope="module")
def run(hub, tmp_path_factory):
    "configs/h200, all six stages."
    out = tmp_path_factory.mktemp("run") / "h200"
    command("run", "configs/h200", "--out", out, *options(SMALL))
    return out


@pytest.fixture(scope="module")
def loaded(hub):
    from qwen_vl_kit.model.loading import load_model
    return load_model(rehearsal.NAME)


@pytest.fixture(scope="module")
def stock(hub):
    "The same files in transformers, float32."
    import torch
    from transformers import Qwen3VLForConditionalGeneration
    return Qwen3VLForConditionalGeneration.from_pretrained(rehearsal.NAME, dtype=torch.float32).eval()


def test_h200_runs_to_its_report_and_says_which_commit_it_was(run):
    assert (run / "report" / "run.html").stat().st_size > 100_000
    for stage in ("sft", "grpo", "benchmark"):
        numbers = read_json(run / stage / "manifest.json")["numbers"]
        assert (numbers["model"], numbers["model_commit"]) == (rehearsal.NAME, rehearsal.COMMIT)
    for stage in ("sft", "grpo"):
        assert read_json(run / stage / "adapter" / "qvk.json")["base_weights"] == rehearsal.COMMIT
    settings, *cut = read_json(run / "benchmark" / "manifest.json")["numbers"]["notices"]
    assert (
        "top_p 0.8, top_k 20" in settings
    )  # the official ones; a frame of 288 pixels is a token a tile, of which there is nothing to say
    assert [line for line in cut if "no usable action" not in line] == [
        f"{arm}: 12 of 12 replies were cut off; raise max_new_tokens" for arm in ("base", "sft", "grpo")
    ]  # a random model never ends
    assert re.search(
        r"(\d+) of \1 replies were cut off", " ".join(read_json(run / "grpo" / "manifest.json")["numbers"]["notices"])
    )
    assert "notices" not in read_json(run / "sft" / "manifest.json")["numbers"]  # which draws nothing
    arms = (run / "benchmark" / "arms.csv").read_text().splitlines()
    assert [line.partition(",")[0] for line in arms[1:]] == ["random", "base", "sft", "grpo", "expert"]
    assert all(
        row["ratio_max"] < 1.02 and row["logprob_gap"] < 0.01 for row in read_jsonl(run / "grpo" / "metrics.jsonl")
    )  # nats a token, in bf16


def test_a_prompt_is_what_transformers_makes_of_it(loaded, stock):
    "Ids, positions and logits, and 81 image tokens at 288 pixels: each one a tile."
    import torch
    from PIL import Image

    from qwen_vl_kit.model import encode, packing
    from qwen_vl_kit.model.packing import positions

    messages = rehearsal.prompt()
    sample = encode.encode(loaded.processor, messages)
    frame = Image.fromarray(sample.frames[0])
    bare = [
        {
            **message,
            "content": [
                part if part["type"] == "text" else {"type": "image", "image": frame} for part in message["content"]
            ]
            if isinstance(message["content"], list)
            else message["content"],
        }
        for message in messages
    ]
    theirs = loaded.processor.apply_chat_template(
        bare, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert sample.input_ids == theirs["input_ids"][0].tolist()
    assert sample.input_ids.count(rehearsal.IDS["<|image_pad|>"]) == 81
    kinds = (theirs["input_ids"] == rehearsal.IDS["<|image_pad|>"]).int()
    places, _ = stock.model.get_rope_index(theirs["input_ids"], kinds, image_grid_thw=theirs["image_grid_thw"])
    assert (positions(sample.input_ids, theirs["image_grid_thw"], loaded.processor)[1:] == places[:, 0].numpy()).all()
    batch = packing.pack([sample], loaded.processor, 8192, frames=True)
    batch.pop("where"), batch.pop("labels")
    with torch.no_grad():
        ours = loaded.model(**batch).logits
        plain = stock(
            **{name: theirs[name] for name in ("input_ids", "pixel_values", "image_grid_thw")}, mm_token_type_ids=kinds
        ).logits
    assert (ours - plain).abs().max() < 1e-5


def test_a_reply_ends_with_each_of_the_models_end_tokens(loaded):
    from qwen_vl_kit.engine.base import Request, Sampling
    from qwen_vl_kit.engine.hf import HFEngine

    assert loaded.end_ids == (rehearsal.IDS["<|endoftext|>"], rehearsal.IDS["<|im_end|>"])
    engine = HFEngine(loaded)
    request, sampling = Request(rehearsal.prompt(), (0,)), Sampling(1.0, 6)
    [whole] = engine.generate([request], sampling)
    assert (whole.finish_reason, len(whole.token_ids)) == ("length", 6)
    engine.end_ids = (whole.token_ids[4], whole.token_ids[2])  # a random model says neither by itself
    [ended] = engine.generate([request], sampling)
    assert (ended.finish_reason, ended.token_ids) == ("stop", whole.token_ids[:3])


def test_the_adapter_is_plain_peft(run, stock):
    "PEFT and transformers alone play what the kit has trained."
    import torch
    from peft import PeftModel

    from qwen_vl_kit.engine.base import Request, Sampling
    from qwen_vl_kit.engine.hf import HFEngine
    from qwen_vl_kit.model import encode
    from qwen_vl_kit.model.loading import load_model

    folder = run / "grpo" / "adapter"
    engine = HFEngine(load_model(rehearsal.NAME))
    [played] = engine.generate([Request(rehearsal.prompt(), (0,))], Sampling(1.0, 6), engine.set_policy(1, folder))
    sample = encode.encode(engine.processor, rehearsal.prompt())
    images = engine.processor.image_processor(sample.frames, return_tensors="pt")
    ids = torch.tensor([sample.input_ids + played.token_ids])
    tuned = PeftModel.from_pretrained(stock, folder).eval()
    try:
        with torch.no_grad():
            logits = (
                tuned(input_ids=ids, mm_token_type_ids=(ids == rehearsal.IDS["<|image_pad|>"]).int(), **images)
                .logits[0]
                .log_softmax(-1)
            )
    finally:
        tuned.unload()
    wanted = logits[len(sample.input_ids) - 1:-1].gather(1, torch.tensor(played.token_ids)[:, None])[:, 0]
    assert (wanted - torch.tensor(played.logprobs)).abs().max() < 1e-4


def test_an_adapter_names_its_base_as_the_hub_does(hub, run):
    "So that PEFT, vLLM and the hub find it on another machine: not the folder in this one's cache."
    for stage in ("sft", "grpo"):
        described = read_json(run / stage / "adapter" / "adapter_config.json")
        assert (described["base_model_name_or_path"], described["revision"]) == (rehearsal.NAME, rehearsal.COMMIT)
        assert str(hub) not in (run / stage / "adapter" / "README.md").read_text()


def test_by_name_by_commit_by_its_beginning_and_by_folder_it_is_one_model(hub, run, tmp_path):
    from qwen_vl_kit.model.cards import matching_card
    from qwen_vl_kit.model.loading import load_without_weights

    snapshot = hub / f"models--{rehearsal.NAME.replace('/', '--')}" / "snapshots" / rehearsal.COMMIT
    (tmp_path / "link").symlink_to(snapshot)
    copied = shutil.copytree(snapshot, tmp_path / "copied")
    revisions = [(rehearsal.NAME, revision) for revision in ("", "main", rehearsal.COMMIT, rehearsal.COMMIT[:7])]
    found = [
        load_without_weights(*how)[0]
        for how in (*revisions, (str(snapshot),), (str(tmp_path / "link"),), (str(copied),))
    ]
    assert [one.weights for one in found[:-1]] == [rehearsal.COMMIT] * 6
    assert len({one.digest for one in found}) == 1 and found[-1].weights == found[0].digest
    for one in found:  # an adapter that was trained by the name fits each of them
        assert matching_card(one, run / "sft" / "adapter")["base"] == rehearsal.NAME


@pytest.mark.parametrize("form", ["tool", "plain"])
def test_other_forms_of_reply_and_several_actions_a_turn(hub, tmp_path, form):
    "t50's plans, as a tool's call or bare, with the base's weights in 4 bits: collect, export, sft, grpo, benchmark."
    import importlib

    from qwen_vl_kit.runner.configs import load_config

    values = SMALL | {
        "horizon": "t3",
        "collect.seeds": "0-2",
        "sft.max_steps": 1,
        "form": form,
        "sft.variety": "qlora",
        "grpo.max_new_tokens": 8,
        "benchmark.max_new_tokens": 8,
        "benchmark.seeds": "1000000",
        "benchmark.arms": ["base", "sft"],
    }
    for stage in ("collect", "export", "sft", "grpo", "benchmark"):
        result = importlib.import_module(f"qwen_vl_kit.stages.{stage}").run(
            load_config("configs/h200", stage, values), tmp_path / stage
        )
    assert any(
        line.startswith("sft: it was trained on a base in 4 bits, and is put on one in 16")
        for line in result.numbers["notices"]
    )
    rows = list(read_jsonl(tmp_path / "benchmark" / "metrics.jsonl"))
    assert [row["arm"] for row in rows] == ["base", "sft"] and (tmp_path / "grpo" / "adapter" / "qvk.json").is_file()


def test_the_seed_documents_six_commands(hub, tmp_path):
    "Its own lines and TOMLs, against an endpoint on this machine."
    for name in ("configs", "nbs"):
        (tmp_path / name).symlink_to(root() / name)
    shutil.copy(root() / "settings.ini", tmp_path)
    sft, grpo = {"max_steps": 1, "eval_rows": 4}, {"iterations": 1, "groups": 1, "group_size": 2, "max_new_tokens": 8}
    def answer(number, body):
        "A teacher's reply to pictures, a judge's to an episode in words."
        return servers.says() if servers.images(body) else servers.says('{"score": 50, "why": "it walks"}')

    with servers.Endpoint(answer) as endpoint:
        access = dict(cwd=tmp_path, OPENAI_BASE_URL=endpoint.url, OPENAI_API_KEY="sk-nobody")
        store = "traces/gpt4o_vision_100/rollouts.db"
        command("eval", "--config", "configs/seed/eval_gpt4o_vision_proper.toml", "--seeds", "0-3", "--trace-db", store,
            *options({"horizon": "t3"}), **access)
        command("filter", "--config", "configs/seed/filter_vision_test.toml", *options({"val_fraction": 0.5}), **access)
        command(
            "train", "--type", "sft", "--config", "configs/seed/crafter_qwen3vl_2b_gpt4o.toml", *options(sft), **access
        )
        command(
            "train",
            "--type",
            "rl",
            "--config",
            "configs/seed/crafter_rl_qwen3vl_2b.toml",
            *options(grpo | {"horizon": "t3"}),
            **access,
        )
        command("benchmark", "--config", "configs/seed/benchmark.toml",
            *options({"horizon": "t3", "seeds": "1000000", "max_new_tokens": 8,
                      "grpo_adapter": "lora_adapters/qwen3vl_2b_crafter_rl_iter1"}), **access)
        rows = {row["arm"]: row for row in csv.DictReader(open(tmp_path / "outputs/seed/benchmark/arms.csv"))}
        assert list(rows) == ["base", "sft", "grpo", "teacher"] and float(rows["teacher"]["usd"]) > 0
        assert (rows["teacher"]["model"], rows["sft"]["model"]) == ("gpt-4o-mini", rehearsal.NAME)
        command("report", "--config", "configs/seed/report.toml", **access)
