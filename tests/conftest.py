"What several test modules share."

import pytest
import rehearsal


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    "A hub cache that holds the rehearsal model, which this process and all that it starts look into; no network is asked."
    from huggingface_hub import constants

    folder, patched = tmp_path_factory.mktemp("hub"), pytest.MonkeyPatch()
    rehearsal.lay(folder)
    patched.setenv("HF_HUB_CACHE", str(folder))
    patched.setenv("HF_HUB_OFFLINE", "1")
    patched.setattr(constants, "HF_HUB_CACHE", str(folder))
    patched.setattr(constants, "HF_HUB_OFFLINE", True)
    yield folder
    patched.undo()
