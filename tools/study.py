"""Runs a tutorial's study anew.

    python tools/study.py nbs/tutorials/how_s_is_drawn.ipynb [MINUTES]

Cells that begin with "# the study" are run, in the notebook's folder, and then
`experiment(FILE, minutes=MINUTES)`. FILE is the one that the notebook names, with
".new" behind it until everything is done, so that what was stored stays until then.
The same command goes on where an earlier one stopped.
"""
import json
import os
import re
import sys
from pathlib import Path

MARK = "# the study\n"
NO_STUDY = ("study.py: {} has no cells that begin with '# the study', "
            'or none that calls experiment("…")')


def study_of(notebook):
    "The code of the study, and the file of its results; None where there is no study."
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    own = [source for source in sources if _bare(source).startswith(MARK)]
    code = "\n".join(own)
    named = re.search(r'^experiment\("(.+?)"\)', "\n".join(sources), re.M)
    return (code, Path(named[1])) if code and named else None


def _bare(source):
    "A cell without the directives at its top."
    return re.sub(r"\A(#\|.*\n)*", "", source)


def main(notebook, minutes="inf"):
    notebook = Path(notebook)
    found = study_of(notebook)
    if not found:
        sys.exit(NO_STUDY.format(notebook))
    code, results = found
    os.chdir(notebook.parent)
    names = {}
    exec(compile(code, str(notebook), "exec"), names)
    names["torch"].set_num_threads(1)
    new = results.with_name(results.name + ".new")
    if not names["experiment"](new, minutes=float(minutes)):
        print(f"not done yet: the same command goes on with {new}")
        return
    new.replace(results)
    print(f"{results} is new; run {notebook.name} to draw it")


if __name__ == "__main__":
    main(*sys.argv[1:])
