"""What every engine has to keep, asked of a real one: `tests/test_engines.py` asks hf, `tests/test_vllm.py` vllm and
a vLLM server."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from qwen_vl_kit.config import Protocol
from qwen_vl_kit.engine.base import Request, Sampling
from qwen_vl_kit.model import encode, packing
from qwen_vl_kit.model.cards import write_card
from qwen_vl_kit.model.loading import load_model
from qwen_vl_kit.model.lora import lora_config
from qwen_vl_kit.protocol import turns
from qwen_vl_kit.protocol.turns import prompt_hash

BRIEF = Protocol(prompt="brief", render_size=144, horizon="s3")
SAMPLING = Sampling(0.7, 6, seed=5)


def adapter(folder: Path, seed: int, base: str = "tiny", targets: str = "language", rank: int = 8,
            std: float = 0.02) -> Path:
    "A LoRA with random weights that matter, in a folder as a stage leaves it."
    import torch
    from peft import get_peft_model

    loaded = load_model(base)
    peft = get_peft_model(loaded.model, lora_config(rank, 16, targets=targets))
    with torch.no_grad():
        for number, (name, weight) in enumerate(peft.named_parameters()):
            if "lora_B" in name:
                weight.copy_(
                    torch.randn(weight.shape, generator=torch.Generator().manual_seed(1000 * seed + number)) * std
                )
    peft.save_pretrained(folder)
    write_card(folder, loaded, prompt_hash(BRIEF))
    return folder


def requests() -> list[Request]:
    "Different frames and texts, the same text with different frames, two frames, and none."
    random = np.random.RandomState(0)

    def frame():
        return random.randint(0, 255, (144, 144, 3), np.uint8)

    asked = [turns.messages(BRIEF, [frame()], ["do"] * i, urls=False) for i in range(3)]
    asked += [turns.messages(BRIEF, [frame()], ["do"], urls=False) for _ in range(2)]
    asked.append(turns.messages(BRIEF.model_copy(update={"frames": 2}), [frame(), frame()], ["noop"], urls=False))
    rules, user = asked[0]
    asked.append([rules, user | {"content": [part for part in user["content"] if part["type"] == "text"]}])
    return [Request(messages, (7, 0, i)) for i, messages in enumerate(asked)]


class Reference:
    "Plain forward passes of the base, or of one adapter on it, by PEFT."

    def __init__(self, folder: Path | None = None, base: str = "tiny"):
        loaded = load_model(base, adapter=folder)
        self.model, self.processor = loaded.model.eval(), loaded.processor

    def gap(self, request, output, temperature=SAMPLING.temperature) -> float:
        "The most that a log-probability of the output differs, in nats."
        import torch

        sample = encode.encode(self.processor, request.messages)
        assert output.prompt_ids == sample.input_ids
        assert len(output.token_ids) == len(output.logprobs) == output.usage["completion_tokens"] > 0
        n, sample.input_ids = len(sample.input_ids), sample.input_ids + output.token_ids
        sample.labels = [0] * len(sample.input_ids)
        batch = packing.pack([sample], self.processor, len(sample.input_ids))
        with torch.no_grad():
            inputs = {k: v.to(self.model.device) for k, v in batch.items() if k not in ("labels", "where")}
            logits = self.model(**inputs).logits[0].cpu()
        plain = torch.log_softmax(logits / temperature, -1)[n - 1 : -1].gather(
            1, torch.tensor(output.token_ids)[:, None]
        )[:, 0]
        return (plain - torch.tensor(output.logprobs)).abs().max().item()


def close(first, second) -> bool:
    "Whether the same tokens came with the same log-probabilities."
    return all(
        a.token_ids == b.token_ids and np.allclose(a.logprobs, b.logprobs, atol=1e-4)
        for a, b in zip(first, second, strict=True)
    )


def check(engine, tmp_path: Path, limit: float = 1e-4) -> None:
    "The contract, for an engine in float32 on `tiny`."
    asked = requests()
    folders = [adapter(tmp_path / f"adapter{i}", i) for i in range(3)]
    base, *trained = [Reference(), *map(Reference, folders)]

    cold = engine.generate(asked, SAMPLING)
    assert max(map(base.gap, asked, cold)) < limit
    assert close(engine.generate(asked, SAMPLING), cold)  # caches are warm
    assert close(engine.generate(asked[3:4], SAMPLING), cold[3:4])  # whoever shares the batch
    twins = engine.generate(
        [asked[3], replace(asked[4], key=asked[3].key)], SAMPLING
    )  # the same text, and another frame
    assert close(twins[:1], cold[3:4]) and twins[0].logprobs != twins[1].logprobs
    assert {o.finish_reason for o in cold} <= {"stop", "length"}
    greedy = engine.generate(asked, Sampling(0.0, 6))
    assert max(base.gap(a, o, 1.0) for a, o in zip(asked, greedy)) < limit

    names = [engine.set_policy(version, folder) for version, folder in enumerate(folders[:2])]
    many, speaks = asked * 3, (["", *names] * len(asked))
    for answer in range(2):  # caches cold and warm
        mixed = engine.generate(many, SAMPLING, speaks)
        for name, reference in zip(["", *names], [base, *trained]):
            assert max(reference.gap(many[i], mixed[i]) for i in range(len(many)) if speaks[i] == name) < limit, (
                answer,
                name,
            )
    canary = engine.generate(asked, SAMPLING, names[1])
    newest = engine.set_policy(2, folders[2])
    after = engine.generate(asked, SAMPLING, newest)
    assert newest not in names and all(a.logprobs != b.logprobs for a, b in zip(after, canary))
    assert max(map(trained[2].gap, asked, after)) < limit
    assert close(engine.generate(asked, SAMPLING, names[1]), canary) and close(engine.generate(asked, SAMPLING), cold)
    for wrong, says in ((lambda: engine.generate(asked, SAMPLING, names[0]), "no adapter is called"),  # let go
                        (lambda: engine.set_policy(2, folders[2]), "a higher number")):
        try:
            wrong()
        except ValueError as error:
            assert says in str(error)
        else:
            raise AssertionError(says)
