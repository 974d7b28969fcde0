"""Speed: this kit and the stock way, measured in one run. `python -m benchmarks NAME`.

The other modules are exported from the notebooks in nbs/perf. They belong to a clone and are not in the wheel.
"""


def main(argv: list[str] | None = None) -> int:
    "Measure and print one table; returns the exit code. `argv`: the words after `qvk perf`."
    from .command import main
    return main(argv)
