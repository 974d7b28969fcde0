"""A folder that the kit saves, behind `transformers serve`: a stock server, a real process, and the kit plays against
it."""

import sys
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path

import pytest
from servers import ServerProcess

from qwen_vl_kit.config import CollectConfig
from qwen_vl_kit.core import read_jsonl
from qwen_vl_kit.engine.base import Request, Sampling
from qwen_vl_kit.engine.hf import HFEngine
from qwen_vl_kit.engine.server import ServerEngine
from qwen_vl_kit.model import encode
from qwen_vl_kit.model.loading import load_model, save_model
from qwen_vl_kit.protocol import turns
from qwen_vl_kit.stages import collect
from qwen_vl_kit.store.ledger import Ledger
from qwen_vl_kit.store.traces import load_episodes

pytestmark = [pytest.mark.slow, pytest.mark.process]

# transformers wants torchvision for the video half of the processor only. Where it is missing, that half is left out;
# the rest is stock.
START = "" if find_spec("torchvision") else """
from transformers import Qwen3VLProcessor, processing_utils
checked = Qwen3VLProcessor.check_argument_for_proper_class
Qwen3VLProcessor.check_argument_for_proper_class = lambda self, name, value: value is None or checked(self, name, value)
processing_utils.MODALITY_TO_AUTOPROCESSOR_MAPPING["video_processor"].from_pretrained = lambda *_, **__: None
"""
PRICES = """
["{model}/input"]
usd = 0.31
per = 1000000
unit = "token"
source = "a test"
date = "2026-11-23"

["{model}/output"]
usd = 1.7
per = 1000000
unit = "token"
source = "a test"
date = "2026-11-23"
"""


def stock(folder: Path, log: Path) -> ServerProcess:
    "`transformers serve` of a folder."
    line = [sys.executable, "-c", START + "from transformers.cli.transformers import main; main()",
            "serve", str(folder), "--host", "127.0.0.1", "--device", "cpu", "--port"]
    return ServerProcess(lambda port: [*line, str(port)], log, well="/health", HF_HUB_OFFLINE="1")


def test_a_stock_server_sees_and_reads_what_the_kit_does(tmp_path, monkeypatch):
    """Its count of each prompt's tokens is the kit's, its greedy replies are the kit's, and the bill is usage times
    price."""
    base = load_model("tiny")
    folder = save_model(base.model, base.processor, tmp_path / "model")
    (tmp_path / "settings.ini").write_text("[qvk]\nprices = prices.toml\n")
    (tmp_path / "prices.toml").write_text(PRICES.format(model=folder))
    config = CollectConfig(
        teacher="model",
        engine="server",
        model=str(folder),
        seeds="0-2",
        horizon="s3",
        render_size=144,
        prompt="brief",
        frames=2,
        temperature=0.0,
        max_new_tokens=8,
        max_reprompts=0,
        noise=1.0,
        concurrency=3,
    )  # the base only says what it sees
    monkeypatch.setenv("QVK_ROOT", str(tmp_path))
    monkeypatch.setenv("OPENAI_API_KEY", "")
    monkeypatch.setenv("OPENAI_HEADERS", "")
    with stock(folder, tmp_path / "server.log") as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        first = collect.run(config, tmp_path / "collect")
        engine = ServerEngine(str(folder), 1)
        asked = turns.messages(config, [next(load_episodes(tmp_path / "collect" / "rollouts.db")).turns[0].frame], [])
        warm = engine.generate([Request(asked, (n,)) for n in range(6)], Sampling(1.5, 8))
        engine.close()
    assert (first.numbers["episodes"], first.numbers["turns"], first.numbers["calls"]) == (
        3,
        9,
        10,
    )  # and one call to probe
    assert len({output.text for output in warm}) > 1  # a temperature is heeded

    kit, counts = HFEngine(load_model(str(folder))), []
    for episode in load_episodes(tmp_path / "collect" / "rollouts.db"):
        assert len(episode.turns) == 3
        for number, turn in enumerate(episode.turns):
            prompt = turns.prompt(config, episode.turns[:number], turn.frame)
            counts.append(len(encode.encode(base.processor, prompt).input_ids))
            [reply] = kit.generate([Request(prompt, (0,))], Sampling(0.0, 8))
            assert (turn.decision.usage["prompt_tokens"], turn.decision.text) == (counts[-1], reply.text)
            assert turn.decision.usage["completion_tokens"] == len(reply.token_ids)
            assert turn.decision.valid or turn.decision.actions == ["noop"]
    assert min(counts) > 81 and max(counts) > 162  # 81 tiles a frame, one frame and two

    calls = [row for row in read_jsonl(tmp_path / "collect" / "calls.jsonl") if "prompt_tokens" in row]
    tokens = [sum(row[kind] for row in calls) for kind in ("prompt_tokens", "completion_tokens")]
    assert len(calls) == 10 and tokens == [row["quantity"] for row in first.usage]
    ledger = Ledger()
    ledger.extend("collect", first.usage)
    assert ledger.total() == Decimal("0.31e-6") * tokens[0] + Decimal("1.7e-6") * tokens[1] > 0
    assert first.numbers["usd"] == pytest.approx(float(ledger.total()), abs=1e-6)

    second = collect.run(config, tmp_path / "collect")  # the server has ended: whoever asked it now would fail
    assert (second.numbers["episodes"], second.usage) == (3, first.usage)
