"The engine that works everywhere keeps the contract of all engines, and says in one line what it cannot do."

import contract
import pytest

from qwen_vl_kit.core import InputError, read_json, write_json
from qwen_vl_kit.engine import factory
from qwen_vl_kit.engine import vllm as engine_vllm
from qwen_vl_kit.engine.base import EngineDied
from qwen_vl_kit.engine.factory import choose_engine, create_engine
from qwen_vl_kit.engine.graph import CudaGraphDecoder
from qwen_vl_kit.engine.hf import HFEngine
from qwen_vl_kit.model.loading import load_model
from qwen_vl_kit.play.policies import Batched


@pytest.mark.slow
def test_hf_keeps_the_contract(tmp_path):
    engine = create_engine("auto", "tiny", bf16=False)
    contract.check(engine, tmp_path)
    engine.close()


@pytest.mark.slow
def test_hf_keeps_the_contract_in_buffers_that_stay(tmp_path):
    engine = create_engine("hf", "tiny", bf16=False)
    asked = contract.requests()
    grown = [engine.generate(asked[:count], contract.SAMPLING) for count in (2, 7)]
    engine.decode = CudaGraphDecoder(engine.model)
    stayed = [engine.generate(asked[:count], contract.SAMPLING) for count in (2, 7)]
    assert all(map(contract.close, stayed, grown))
    contract.check(engine, tmp_path)
    engine.close()


def test_adapters_that_cannot_be_played_are_refused_in_one_line(tmp_path):
    engine = HFEngine(load_model("random:tiny"))
    other = contract.adapter(tmp_path / "other", 0)
    with pytest.raises(InputError, match="was made for tiny .* not for random:tiny"):
        engine.set_policy(0, other)
    (other / "qvk.json").unlink()  # without a card, shapes still speak: both have the same
    assert engine.set_policy(0, other) == "policy-0000"
    settings = read_json(other / "adapter_config.json")
    write_json(other / "adapter_config.json", settings | {"use_dora": True})
    with pytest.raises(InputError, match="of its tensors are missing .*lora_magnitude_vector"):
        engine.set_policy(1, other)
    (other / "adapter_config.json").unlink()
    with pytest.raises(InputError, match="no adapter here"):
        engine.set_policy(1, other)


def test_an_engine_that_dies_concerns_all_episodes():
    class Dying:
        calls = 0

        def act(self, situations):
            self.calls += 1
            raise EngineDied("vLLM failed while it generated")

    dying = Dying()
    source = Batched(dying)
    source.submit([1, 2, 3])
    with pytest.raises(EngineDied):
        source.ready()
    assert dying.calls == 1  # nobody asks a dead engine again, for each episode alone


def test_a_missing_vllm_is_told(monkeypatch):
    for room in (engine_vllm, factory):
        monkeypatch.setattr(room, "is_installed", lambda module: False)
    assert choose_engine("auto") == "hf"
    with pytest.raises(InputError, match='make gpu installs it, for a GPU; or set engine = "hf"'):
        create_engine("vllm", "tiny")


def test_what_a_frozen_tower_has_seen_is_kept_until_an_adapter_changes_the_tower(tmp_path):
    engine, asked = HFEngine(load_model("tiny")), contract.requests()
    engine.model.requires_grad_(False)
    sight = engine.model.model.vision_cache
    first = engine.generate(asked, contract.SAMPLING)
    seen = sight.computed
    assert (
        contract.close(engine.generate(asked, contract.SAMPLING), first) and sight.computed == seen == 7
    )  # six prompts with frames
    name = engine.set_policy(0, folder := contract.adapter(tmp_path / "tower", 1, targets="all-linear"))
    for reference, adapter in ((contract.Reference(folder), name), (contract.Reference(), "")):
        assert max(map(reference.gap, asked, engine.generate(asked, contract.SAMPLING, adapter))) < 1e-4
