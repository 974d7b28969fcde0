"""Lets PyPI's torchvision be imported beside a CPU torch.

That torchvision is linked to CUDA. Beside torch+cpu its C++ operators do not load, and `import torchvision` fails with
"operator torchvision::nms does not exist". The schemas of two operators are all it needs. `import torch` calls `cure`
at its end (entry point of group `torch.backends`) in every process, those that vLLM starts included.
"""

_library = None


def cure() -> None:
    "Declare torchvision's operators where they cannot be loaded. Does nothing where they can, and never raises."
    global _library
    try:
        import importlib.util
        import pathlib
        import re

        import torch

        found = importlib.util.find_spec("torchvision")
        if _library or torch.version.cuda or torch.version.hip or found is None or not found.origin:
            return
        version = (pathlib.Path(found.origin).parent / "version.py").read_text()
        if re.search(r"\+cu\d", version):  # a build for the CPU brings its own
            _library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                _library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except Exception as error:
        import warnings

        warnings.warn(f"torchvision was not cured: {error!r}", stacklevel=2)
