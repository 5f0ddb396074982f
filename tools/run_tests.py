"""`make test`: every check in turn, cheapest first; stops at the first that fails."""
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 2
workers = min(cores, 8)  # each holds a PyTorch

STEPS = [
    ("dpi_nbdev/ is what the notebooks export, and these are clean", [sys.executable, "tools/check_sync.py"]),
    ("README.md is what nbs/index.ipynb renders to", [sys.executable, "tools/readme.py", "--check"]),
    ("the site's pages, links, figures and YAML are in order", [sys.executable, "tools/docs_check.py"]),
    (f"every notebook runs ({workers} at a time)", [BIN / "nbdev_test", "--n_workers", str(workers), "--timing"]),
    (f"tests/ ({workers} files at a time)", [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "--dist", "loadfile", "tests"]),  # last: its closing line counts the tests
]


def main() -> int:
    "Exit status of the first step that fails, 0 when none does."
    start = time.perf_counter()
    # One thread each: notebooks side by side that all take every core are slower than one after the other.
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1",
               PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    for name, command in STEPS:
        print(f"[{time.perf_counter() - start:4.0f} s] {name}", flush=True)
        status = subprocess.run(command, cwd=ROOT, env=env).returncode
        if status:
            print(f"[{time.perf_counter() - start:4.0f} s] FAILED: {name}", file=sys.stderr, flush=True)
            return status if status > 0 else 128 - status
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("Interrupted.")
