"The `qvk` command as a user starts it, in a process of its own."

import os
import subprocess
import sys
from typing import NamedTuple

from qwen_vl_kit.core import root

QVK = [sys.executable, "-c", "import sys; from qwen_vl_kit.runner.cli import main; sys.exit(main())"]

SMALL = "--config configs/demo --set teacher=random --set seeds=0-2 --set horizon=s5".split()  # three short episodes


class Outcome(NamedTuple):
    "How a command ended, and what it printed."

    code: int
    out: str
    err: str


def qvk(*args, cwd=None, timeout=900, without=(), **variables) -> Outcome:
    """Run `qvk` in the project's folder or `cwd`, with more environment variables, and without those that begin with
    one of `without`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(tuple(without))}
    done = subprocess.run(
        [*QVK, *map(str, args)],
        cwd=cwd or root(),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=inherited | variables,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


def one_line(error) -> str:
    """The only line of an error: that of a raised exception (pytest's `error`), or that which a command printed to
    stderr, where notes and lines of progress do not count."""
    if not isinstance(error, str):
        assert "\n" not in str(error.value), str(error.value)
        return str(error.value)
    lines = [line for line in error.splitlines() if not line.startswith("note: ") and not line.endswith("…")]
    assert len(lines) == 1 and lines[0].startswith("qvk: "), error
    return lines[0]
