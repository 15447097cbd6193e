"""How all benchmarks here measure: CPU time on one core, each case in a process of its own.

CPU time on a pinned core moves by about a tenth from run to run on a shared machine, wall
time by a factor. Cases take turns (A B A B ...), so that a drift of the machine meets all of
them, and the medians of one run are compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time


def options(description: str) -> argparse.ArgumentParser:
    """The command line of a benchmark whose cases take turns."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=3, help="how often each case runs")
    return parser


def pin_to_one_core():
    """Before the backend is imported: it makes its threads by the cores it sees."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"


def cpu_ms(function, repeats: int = 7, warmup: int = 2) -> float:
    """Median CPU milliseconds of a call; `function` returns when its work is done."""
    for _ in range(warmup):
        function()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1e3 * statistics.median(times)


def cpu_ms_in_turns(functions: dict, rounds: int = 9, warmup: int = 2) -> dict:
    """`cpu_ms` of each of the named functions, which take turns: name -> milliseconds."""
    times = {name: [] for name in functions}
    for i in range(warmup + rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            if i >= warmup:
                times[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(times[name]) for name in functions}


def report(**figures):
    """A case's last words: one JSON line that `take_turns` reads."""
    print(json.dumps(figures))


def take_turns(script: str, cases: dict, rounds: int = 3) -> dict:
    """Run `python script *arguments` for each case, in turns.

    Args:
        script: file that prints a line of JSON figures last.
        cases: name -> (interpreter, backend, arguments).
        rounds: how often each case runs.

    Returns: name -> the medians of its figures, or {"error": last line} if it failed.
    """
    seen = {name: [] for name in cases}
    for _ in range(rounds):
        for name, (python, backend, arguments) in cases.items():
            environment = os.environ | {"KERAS_BACKEND": backend}
            done = subprocess.run(
                [python or sys.executable, script, *arguments],
                env=environment,
                capture_output=True,
                text=True,
            )
            lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
            if done.returncode:
                print(f"{name} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
            else:
                seen[name].append(json.loads(lines[-1]))
    return {name: _medians(runs) for name, runs in seen.items()}


def _medians(runs):
    if not runs:
        return {}
    return {
        key: statistics.median(run[key] for run in runs)
        if isinstance(runs[0][key], (int, float))
        else runs[0][key]
        for key in runs[0]
    }
