"""The scripts behind the Makefile: making .venv (with stand-ins for Python), the sync check, README."""
import os
import shutil
import subprocess
import sys
import time
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


# -- docs-check: a fault is made in a copy, and found --------------------------------------------------------------------


def notebook(*cells):
    "A notebook of (source) Markdown and (source, outputs) code cells, as docs_check reads it."
    return {"cells": [dict(cell_type="markdown", source=c) if isinstance(c, str) else dict(cell_type="code", source=c[0], outputs=c[1]) for c in cells]}


def stream(text):
    return dict(output_type="stream", name="stdout", text=text)


FIGURE = dict(output_type="display_data", data={"image/png": "iVBOR", "text/plain": "<Figure>"})
DRAWN = '#| fig-cap: "A line."\n#| fig-alt: "A rising line."\n#| classes: preview-image\nplt.plot(x);'
FRONT = dict(title="t", description="d")


def test_docs_check_takes_a_good_page():
    import docs_check
    good = notebook("# t\n\n> d", (DRAWN, [FIGURE]), ("print(1)", [stream("1\n")]), ("#| hide\nplt.plot(x)", []), ("def f(): plt.show()", []),
                    ("#| classes: wrap\nprint(long)", [stream("word " * 60)]), ("print(table)", [stream("a  b " * 25)]), ("fig, ax = plt.subplots(); plt.close(fig)", []))
    assert docs_check.faults_of(good, FRONT) == []


@pytest.mark.parametrize("cells, front, said", [
    ([(DRAWN, [FIGURE])], dict(title="t"), "has no description"),
    ([(DRAWN, [FIGURE])], dict(FRONT, titel="x"), "titel is no key"),
    ([("f()", [])], FRONT, "has no stored outputs"),
    ([("f()", [dict(output_type="error", ename="E", evalue="", traceback=[])])], FRONT, "stores an error"),
    ([(DRAWN, [FIGURE]), ("#| fig-alt: a line\nplt.plot(x)", [FIGURE])], FRONT, "no fig-cap; in the cell that starts `plt.plot(x)`"),
    ([(DRAWN.replace("fig-alt", "fig_alt"), [FIGURE])], FRONT, "no fig-alt"),
    ([(DRAWN, [FIGURE]), ("fig, ax = plt.subplots()\nax.plot(x);", [])], FRONT, "draws, but no figure is stored"),
    ([(DRAWN, [FIGURE]), ("print(1)", [])], FRONT, "prints, but nothing is stored"),
    ([(DRAWN, [FIGURE]), ("print(1)", [stream("a  " * 47)])], FRONT, "prints a line of 141 characters"),
    ([(DRAWN, [FIGURE]), ("print(1)", [stream("word " * 19)])], FRONT, "prints a sentence of 95 characters"),
    ([(DRAWN.replace("preview-image", "large"), [FIGURE])], FRONT, "marks 0 of its figures as its card"),
    ([(DRAWN, [FIGURE]), (DRAWN, [FIGURE])], FRONT, "marks 2 of its figures"),
    (["word " * 1300, (DRAWN, [FIGURE])], FRONT, "show one sooner"),
    ([(DRAWN, [FIGURE]), ("#| exprot\nf()", [])], FRONT, "unknown directive #| exprot"),
    ([(DRAWN, [FIGURE]), ("#| echo: nope\nf()", [])], FRONT, "option echo cannot be 'nope'"),
    ([(DRAWN, [FIGURE]), ("#| fig-cap: a: b\nf()", [])], FRONT, "are no YAML"),
])
def test_docs_check_finds_what_a_cell_lacks(cells, front, said):
    import docs_check
    found = docs_check.faults_of(notebook(*cells), front)
    assert any(said in fault for fault in found), found


def test_docs_check_names_headings_as_pandoc_does():
    import docs_check
    for heading, at in [("What an import costs", "what-an-import-costs"), ("Why λ, not φ?", "why-λ-not-φ"), ("3. One `DPI.freeze_at` (v0.1)", "one-dpi.freeze_at-v0.1"),
                        ("Saved, loaded: $x_0$", "saved-loaded-x_0"), ("42", "section")]:
        assert docs_check.slug(heading.replace("`", "").replace("$", "")) == at
    page = docs_check.Page(["## Twice\n\n### Twice\n\n## With `code` and *stress*\n\n## Mine {#own}\n\n```\n# no heading\n```"])
    assert page.anchors == {"twice", "twice-1", "with-code-and-stress", "own"}


@pytest.mark.parametrize("markdown, said", [
    ("[x](other.ipynb)", None), ("[x](other.ipynb#a-heading)", None), ("[x](#mine)", None), ("[x](https://arxiv.org/abs/1)", None), ("`[x](gone.ipynb)`", None),
    ("[x](https://site.io/p/other.html#a-heading)", None), ("[x](https://github.com/u/p/blob/main/code.py#L2)", None), ("$E[x](t)$ costs \\$5", None),
    ("![A photograph](photo.png)", None), ('<img src="photo.png" alt="A photograph">', None), ("Use `@patch` on it", None),
    ("[x](gone.ipynb)", "gone.ipynb, which does not exist"), ("[x](other.ipynb#no-heading)", "has no such heading"), ("[x](#nowhere)", "has no such heading"),
    ("[x](https://site.io/p/gone.html)", "does not exist"), ("[x](http//arxiv.org)", "does not exist"), ("[x](http://arxiv.org/abs/1)", "no https address"),
    ("[x](https://github.com/u/p/blob/main/code.py#L3)", "which is shorter"), ("[x](https://github.com/u/p/blob/main/gone.py)", "of the repository"),
    ("![A photograph](gone.png)", "shows gone.png"), ("![](photo.png)", "without an alt text"), ('<img src="photo.png">', "without an alt text"),
    ("See [`DPI`](https://site.io/p/other.html) and [the `DPI`\nof](other.ipynb)", None), ("See [[`DPI`](https://site.io/p/other.html)](other.ipynb)", "the link around `DPI` is lost"),
    ("```python\ndef f(\n    x, # see DPI\n):\n```", None), ("```python\ndef f(\n    x, # see [`DPI`](https://site.io/p/other.html)\n):\n```", "the link of `DPI` as text"),
    ("*`s` shaped so that `s * x` scales each sample.*", None), ("*Scales each *sample* of `x` by itself.*", "a star of its own"), ("*One* word, *another*", None),
    ("[text][nowhere]", "leads nowhere"), ("Use @patch on it", "read as a citation"), ("costs $5", "has no partner"), ("$\\frac{1}{2$", "does not close"),
    ("$$\\begin{aligned} x \\end{align}$$", "does not close"),
])
def test_docs_check_follows_links(tmp_path, markdown, said):
    import docs_check
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "photo.png").touch()
    (tmp_path / "code.py").write_text("a = 1\nb = 2\n")
    pages = {"a.ipynb": docs_check.Page(["## Mine\n\n" + markdown]), "other.ipynb": docs_check.Page(["## A heading"])}
    links = docs_check.Links(pages, {"a.ipynb": "a.html", "other.ipynb": "other.html"}, tmp_path, "https://site.io/p", "https://github.com/u/p")
    found = docs_check.prose_faults("a.ipynb", pages["a.ipynb"], links)
    assert found == [] if said is None else len(found) == 1 and said in found[0], found


@pytest.mark.parametrize("span, said", [
    ("DPI", None), ("DPI.freeze_at", None), ("core.seeded", None), ("dpi_nbdev.core.seeded", None), ("dpi_nbdev.DPI", None), ("seeded(0)", None), ("x_t", None),
    ("model.safetensors", None), ("DPI(net, lam)", None), ("core.py", None), ("a + b", None),
    ("DPI.freez_at", "DPI has no freez_at"), ("core.sedeed", "core has no sedeed"), ("dpi_nbdev.cores", "dpi_nbdev has no cores"), ("FlowMatcher", "no code here has a name"),
    ("draw_t", "no code here has a name"), ("sedeed()", "no code here has a name"),
])
def test_docs_check_knows_names(span, said):
    import docs_check
    import dpi_nbdev.core
    import dpi_nbdev.dpi
    names = docs_check.Names(dict(core=dpi_nbdev.core, dpi=dpi_nbdev.dpi), {"x_t", "seeded", "freeze_at"})
    found = names.fault(span)
    assert found is None if said is None else found and said in found, found
    assert docs_check.code_spans(f"`{span}` and [`linked`](x.html)\n```\n`block`\n```") == [span]


@pytest.mark.parametrize("name, old, new, said", [
    ("_quarto.yml", "  favicon:", "  favicom:", "website.favicom is no key"),
    ("_quarto.yml", "    toc: true", "    toc: 3", "format.html.toc should be a boolean"),
    ("_quarto.yml", "    toc: true", "    toc: true\n    toc: false", "toc stands twice"),
    ("_quarto.yml", "[edit, source, issue]", "[edit, report]", "repo-actions[1] should be one of"),
    ("_quarto.yml", "    css: styles.css", "    css: style.css", "css is nbs/style.css, which does not exist"),
    ("_quarto.yml", "sidebar.yml]", "sidebars.yml]", "reads nbs/sidebars.yml"),
    ("_quarto.yml", "  type: website", "  type: websight", "project.type should be one of"),
    ("_quarto.yml", "website:\n", "website: [\n", "_quarto.yml"),
    ("nbs/sidebar.yml", "- section: The idea", "- sektion: The idea", "sektion is no key"),
    ("nbs/sidebar.yml", "style: floating", "style: flying", "should be one of docked, floating"),
])
def test_docs_check_validates_the_yaml(tmp_path, name, old, new, said):
    import docs_check
    (tmp_path / "nbs" / "results").mkdir(parents=True)
    for file in ("_quarto.yml", "nbs/sidebar.yml", "nbs/styles.css", "nbs/favicon.svg", "nbs/results/samples.png"):
        shutil.copy(ROOT / file, tmp_path / file)
    generated = "project:\n  output-dir: _docs\n\nwebsite:\n  title: \"t\"\n  repo-branch: main\n"
    assert docs_check.yaml_faults(tmp_path, generated) == []
    text = (tmp_path / name).read_text(encoding="utf-8")
    assert old in text
    (tmp_path / name).write_text(text.replace(old, new, 1), encoding="utf-8")
    found = docs_check.yaml_faults(tmp_path, generated)
    assert any(said in fault for fault in found), found


def test_docs_check_says_which_cell_stops_a_page(tmp_path):
    import docs_check
    import nbformat
    path = tmp_path / "bad.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# Bad\n\n> A page."),
                                                   nbformat.v4.new_code_cell("#| export\ndef fine(): pass"),   # pages without symbols run nothing
                                                   nbformat.v4.new_code_cell("import math\nnowhere + 1")]), path)
    stop = docs_check.process(path, tmp_path / "out" / "bad.ipynb")
    assert stop and "nowhere" in stop and "import math" in stop


def test_the_site_has_its_parts():
    import yaml
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    html, website = site["format"]["html"], site["website"]
    assert set(html["theme"]) == {"light", "dark"} and html["code-fold"] and website["search"] and site["citation"]["url"]
    assert {"edit", "issue"} <= set(website["repo-actions"]) and website["repo-subdir"] == "nbs" and website["open-graph"] and website["twitter-card"]
    assert (ROOT / "nbs" / "404.qmd").is_file() and (ROOT / "nbs" / "index.ipynb").is_file()


# -- run_tests -------------------------------------------------------------------------


def test_a_failing_step_does_not_stop_the_others_and_all_failures_end_the_list(capfd):
    import run_tests
    step = lambda code: [sys.executable, "-c", code]
    notebook = "print('\\t00_core.ipynb\\n\\t31_training.ipynb'); exit(3)"
    test = "print('FAILED tests/test_x.py::test_y - assert 0\\n1 failed'); exit(1)"
    fine, killed = "print('all is well')", "import os; os.kill(os.getpid(), 9)"
    assert run_tests.main([("fine", step(fine)), ("also fine", step(fine))]) == 0
    assert capfd.readouterr().err == ""
    steps = [("notebooks", step(notebook)), ("fine", step(fine)),
             ("killed", step(killed)), ("tests", step(test))]
    assert run_tests.main(steps) == 1
    said = capfd.readouterr()
    assert "all is well" in said.out and said.out.splitlines()[-1] == "1 failed"
    assert said.err.splitlines()[1:] == [
        "FAILED: notebooks (exit status 3)",
        "    00_core.ipynb", "    31_training.ipynb",
        "FAILED: killed (exit status -9)",
        "FAILED: tests (exit status 1)", "    tests/test_x.py::test_y"]


def test_the_names_that_failed_are_found_in_what_nbdev_test_says(tmp_path):
    "nbdev_test goes on after a notebook that fails, and run_tests reads its list."
    import nbformat
    import run_tests
    from nbformat.v4 import new_code_cell, new_notebook
    for name, source in (("a", "1 / 0"), ("b", "1 + 1"), ("c", "nowhere")):
        nb = new_notebook(cells=[new_code_cell(source)])
        nbformat.write(nb, tmp_path / f"{name}.ipynb")
    command = [run_tests.BIN / "nbdev_test", "--path", tmp_path, "--n_workers", "0"]
    status, failed = run_tests.run(list(map(str, command)), dict(os.environ))
    assert status == 1 and failed == ["a.ipynb", "c.ipynb"]


def test_a_process_left_behind_does_not_hold_the_tests_up():
    import run_tests
    leave = "import subprocess; subprocess.Popen(['sleep', '20']); print('done')"
    start = time.monotonic()
    assert run_tests.run([sys.executable, "-c", leave], dict(os.environ)) == (0, [])
    assert time.monotonic() - start < 15


def test_pytest_is_the_last_step():
    import run_tests
    assert "pytest" in run_tests.STEPS[-1][1] and run_tests.STEPS[-1][1][-1] == "tests"
