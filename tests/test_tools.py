"""The scripts behind the Makefile: making .venv (with stand-ins for Python), the sync check, README."""
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = "awk cat cksum cp date dirname grep mkdir pwd rm sed sh sleep".split()

# A stand-in for Python: says its version, makes a "venv" holding a copy of itself, and "installs" as told.
PYTHON = """#!/bin/sh
case "$*" in
    *"-c import sys"*) echo {version} ;;
    *"-c import venv"*) exit {venv} ;;
    *"-c import pip"*) exit 0 ;;
    *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
    *"-m pip"*) echo {said}; echo pip >>pip-calls; exit {pip} ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    "A folder with what env.sh reads, and an empty PATH but for the tools a POSIX system has."
    for name in ("settings.ini", "setup.py", "pyproject.toml", "constraints.txt", "tools/env.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for tool in TOOLS:
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool))
    return tmp_path


def python(project, name="python3", version="3.12.1", venv=0, pip=0, said="ok"):
    path = project / "bin" / name
    path.write_text(PYTHON.format(version=version, venv=venv, pip=pip, said=f"'{said}'"))
    path.chmod(0o755)


def env(project, **variables):
    "Runs env.sh; returns its exit status, and all it said."
    run = subprocess.run(["sh", "tools/env.sh"], cwd=project, env={"PATH": str(project / "bin"), **variables},
                         stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return run.returncode, run.stdout.strip()


def pip_calls(project):
    calls = project / "pip-calls"
    return len(calls.read_text().splitlines()) if calls.exists() else 0


def says(result, *parts):
    "It failed, with one sentence that holds `parts`."
    status, said = result
    line = said.splitlines()[-1]
    assert status == 1
    assert all(part in line for part in parts), said
    assert "Traceback" not in said


def test_no_python(project):
    says(env(project), "no Python found", "3.10 or newer")
    assert not (project / ".venv").exists()


def test_old_python_is_refused_and_a_newer_one_beside_it_is_taken(project):
    python(project, version="3.9.18")
    says(env(project), "Python 3.10 or newer", "python3 is 3.9.18")
    python(project, "python3.11", version="3.11.7")
    status, said = env(project)
    assert status == 0 and "with Python 3.11.7" in said


def test_named_python(project):
    python(project)
    python(project, "old", version="3.8.1")
    says(env(project, PYTHON="old"), "PYTHON=old is Python 3.8.1")
    says(env(project, PYTHON="gone"), "PYTHON=gone is not a command")


def test_no_venv_module(project):
    python(project, venv=1)
    says(env(project), "has no venv module", "python3-venv")
    assert not (project / ".venv").exists()


def test_made_once_then_reused_then_updated(project):
    python(project)
    status, said = env(project)
    assert status == 0 and "Making .venv with Python 3.12.1" in said
    assert env(project) == (0, "")
    assert pip_calls(project) == 1
    with open(project / "constraints.txt", "a") as f:
        f.write("# newer\n")
    status, said = env(project)
    assert status == 0 and "Updating .venv" in said and pip_calls(project) == 2


def test_no_network_then_network(project):
    python(project, pip=1, said="WARNING: Retrying: connection broken by NewConnectionError: Temporary failure in name resolution")
    says(env(project), "cannot reach the package index", ".venv/install.log")
    python(project)
    status, said = env(project)
    assert status == 0 and "its installation was interrupted" in said
    assert env(project) == (0, "")


def test_other_failures_of_pip_are_quoted(project):
    python(project, pip=1, said="ERROR: No matching distribution found for torch==99")
    says(env(project), "No matching distribution found for torch==99")
    python(project, pip=1, said="ERROR: [Errno 28] No space left on device")
    says(env(project), "the disk is full")


def test_a_failed_update_keeps_the_environment_and_is_tried_again(project):
    python(project)
    env(project)
    python(project / ".venv", "python", pip=1, said="ERROR: broken")
    (project / "settings.ini").write_text((project / "settings.ini").read_text() + "\n")
    says(env(project), "broken")
    python(project / ".venv", "python")
    status, said = env(project)
    assert status == 0 and "Updating" in said


def test_another_python_is_asked_for(project):
    python(project)
    env(project)
    python(project, "python3.13", version="3.13.0")
    status, said = env(project, PYTHON="python3.13")
    assert status == 0 and "Removing .venv: it has Python 3.12.1" in said and "Ready: .venv, Python 3.13.0" in said


def test_an_environment_of_somebody_else_is_used_and_never_removed(project):
    python(project)
    (project / ".venv" / "bin").mkdir(parents=True)
    (project / ".venv" / "theirs").touch()
    says(env(project), "make did not build it")
    python(project / ".venv", "python", version="3.11.0")
    status, said = env(project)
    assert status == 0 and "Installing into the .venv that is here already" in said
    assert (project / ".venv" / "theirs").exists()


def test_two_makes_at_once(project):
    python(project)
    (project / ".venv").mkdir()
    (project / ".venv" / ".making").write_text(f"{os.getpid()}\n")
    says(env(project), f"another make (process {os.getpid()})")
    assert (project / ".venv").exists()


# -- check_sync ---------------------------------------------------------------------------------------------------


def test_sync_check_finds_edits_and_strays_without_touching_them(tmp_path):
    from check_sync import check
    here = tmp_path / "dpi_nbdev"
    here.mkdir()
    shutil.copy(ROOT / "settings.ini", here)
    for folder, pattern in (("nbs", "00_core.ipynb"), ("dpi_nbdev", "core.py")):
        (here / folder).mkdir()
        shutil.copy(ROOT / folder / pattern, here / folder)
    found = check(here)
    assert "dpi_nbdev/core.py is not what the notebooks export" not in found
    module = here / "dpi_nbdev" / "core.py"
    module.write_text(module.read_text() + "# by hand\n")
    (here / "dpi_nbdev" / "stray.py").write_text("# AUTOGENERATED! DO NOT EDIT! File to edit: ../nbs/99_stray.ipynb.\n")
    before = os.environ.get("IN_TEST")
    found = check(here)
    assert "dpi_nbdev/core.py is not what the notebooks export" in found
    assert "dpi_nbdev/stray.py is not what the notebooks export" in found
    assert module.read_text().endswith("# by hand\n") and os.environ.get("IN_TEST") == before


# -- README -----------------------------------------------------------------------------------------------------


def test_readme_from_a_notebook(tmp_path):
    import nbformat
    import readme
    from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
    dot = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
    picture = new_output("display_data", {"image/png": dot, "text/plain": "<Figure>"})
    nb = new_notebook(cells=[
        new_code_cell("#| hide\nimport secret", outputs=[new_output("stream", text="hidden")]),
        new_markdown_cell("# Title\n\n> What it is."),
        new_markdown_cell("See [core](00_core.ipynb#seeds), [web](https://example.org), [up](#title).\n\n```\n[not](00_core.ipynb)\n```"),
        new_code_cell("x = 1\nx", outputs=[new_output("execute_result", {"text/plain": "1"})]),
        new_code_cell("#| echo: false\n#| fig-alt: \"A dot: red\"\nplot()", outputs=[picture]),
        new_code_cell("#| include: false\nnever()", outputs=[picture]),
    ])
    path = tmp_path / "index.ipynb"
    nbformat.write(nb, path)
    text, pictures = readme.render(path)
    assert text.startswith("# Title\n\n<!-- Made from") and "> What it is." in text
    assert "```python\nx = 1\nx\n```" in text and "    1\n" in text
    assert "[core](nbs/00_core.ipynb#seeds), [web](https://example.org), [up](#title)" in text and "[not](00_core.ipynb)" in text
    assert not any(word in text for word in ("secret", "hidden", "plot()", "never()", "#|", "<Figure>"))
    (name,) = pictures
    assert f"![A dot: red]({name})" in text and name.startswith("index_files/")
    assert readme.render(path) == (text, pictures)

    readme.write(text, pictures, tmp_path)
    assert readme.on_disk(tmp_path) == (text, pictures)
    (tmp_path / "index_files" / "old.png").touch()
    assert readme.on_disk(tmp_path) != (text, pictures)
