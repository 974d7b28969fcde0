"On a GPU the engine keeps its contract, and the kernels agree. Skipped without one."

import contract
import pytest
import torch

from qwen_vl_kit.engine.factory import create_engine
from qwen_vl_kit.model.attention import attend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_hf_keeps_the_contract_with_a_recorded_step(tmp_path):
    engine = create_engine("hf", "tiny", bf16=False)
    contract.check(engine, tmp_path)
    assert engine.decode.graph is not None
    engine.close()


def test_attention_of_packed_samples_agrees_with_float32():
    torch.manual_seed(0)
    places = torch.cat([torch.arange(n) for n in (70, 5, 128, 40)])[None].cuda()
    shape = (1, places.shape[1], 128)
    whole = [torch.randn(1, heads, *shape[1:], device="cuda") for heads in (16, 8, 8)]
    aim, found = torch.randn(*shape[:2], 16, 128, device="cuda"), {}
    for dtype in (torch.float32, torch.bfloat16):  # the second takes a kernel for variable lengths where there is one
        mine = [x.to(dtype, copy=True).requires_grad_() for x in whole]
        out, _ = attend(None, *mine, None, scaling=128**-0.5, position_ids=places.clone())
        (out * aim.to(dtype)).sum().backward()
        found[dtype] = [out, *(x.grad for x in mine)]
    for exact, short in zip(*found.values()):
        assert (exact - short.float()).norm() < 0.01 * exact.norm()
