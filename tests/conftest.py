"What several test modules share."

import pytest
import rehearsal
from commands import SMALL, qvk


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A hub cache that holds the rehearsal model, which this process and all that it starts look into; no network is
    asked."""
    from huggingface_hub import constants

    folder, patched = tmp_path_factory.mktemp("hub"), pytest.MonkeyPatch()
    rehearsal.lay(folder)
    patched.setenv("HF_HUB_CACHE", str(folder))
    patched.setenv("HF_HUB_OFFLINE", "1")
    patched.setattr(constants, "HF_HUB_CACHE", str(folder))
    patched.setattr(constants, "HF_HUB_OFFLINE", True)
    yield folder
    patched.undo()


@pytest.fixture(scope="session")
def collected(tmp_path_factory):
    """A run's folder, its name with a space in it, in which a random teacher has played three short episodes. Nobody
    changes it."""
    out = tmp_path_factory.mktemp("a run")
    done = qvk("collect", *SMALL, "--out", out)
    assert done.code == 0, done.err
    assert done.out == f"outputs: {out / 'collect'}\n"
    assert [line.split()[0] for line in done.err.splitlines()] == ["collect", "collect"] and "episodes 3" in done.err
    return out


@pytest.fixture
def small():
    "The config of `collected`."
    from qwen_vl_kit.runner.configs import load_config
    return load_config("configs/demo", "collect", ["teacher=random", "seeds=0-2", "horizon=s5"])
