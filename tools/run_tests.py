"""`make test`: every check in turn, cheapest first.

A check that fails does not stop the others; all failures stand at the end.
"""
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
if hasattr(os, "sched_getaffinity"):
    cores = len(os.sched_getaffinity(0))
else:
    cores = os.cpu_count() or 2
workers = str(min(cores, 8))  # each holds a PyTorch
pytest = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--dist", "loadfile"]

STEPS = [
    ("dpi_nbdev/ is what the notebooks export, and these are clean",
     [sys.executable, "tools/check_sync.py"]),
    ("README.md is what nbs/index.ipynb renders to",
     [sys.executable, "tools/readme.py", "--check"]),
    ("the site's pages, links, figures and YAML are in order",
     [sys.executable, "tools/docs_check.py"]),
    (f"every notebook runs ({workers} at a time)",
     [BIN / "nbdev_test", "--n_workers", workers, "--timing"]),
    (f"tests/ ({workers} files at a time)",
     [*pytest, "tests"]),  # last: its closing line counts the tests
]
# How nbdev_test lists a notebook that failed, and pytest a test.
FAILED = re.compile(r"\t(\S+\.ipynb)$|(?:FAILED|ERROR) (\S+)")


def run(command, env) -> tuple[int, list[str]]:
    "Runs a step, passing on what it says; its exit status and the names that failed."
    failed = []

    def pass_on(lines):
        for line in lines:
            sys.stdout.write(line)
            sys.stdout.flush()
            if found := FAILED.match(line):
                failed.append(found[1] or found[2])

    step = subprocess.Popen(command, cwd=ROOT, env=env, text=True, errors="replace",
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    reader = threading.Thread(target=pass_on, args=[step.stdout], daemon=True)
    reader.start()
    status = step.wait()
    reader.join(5)  # a process that the step left behind may hold the pipe open
    return status, failed


def main(steps=STEPS) -> int:
    "Runs all steps. 1 when any of them failed, 0 when none did."
    start, failures = time.perf_counter(), []
    # One thread each: notebooks side by side that all take every core are slower
    # than one after the other.
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1",
               PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    for name, command in steps:
        print(f"[{time.perf_counter() - start:4.0f} s] {name}", flush=True)
        status, failed = run(command, env)
        if status:
            failures.append(f"FAILED: {name} (exit status {status})")
            failures += [f"    {what}" for what in failed]
    if failures:
        seconds = time.perf_counter() - start
        print(f"[{seconds:4.0f} s]", *failures, sep="\n", file=sys.stderr, flush=True)
    return 1 if failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
