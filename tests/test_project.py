"""What holds the project together: settings, notebooks, modules, versions, public names. No network, no training."""
import ast
import importlib
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
MODULES = sorted(p for p in (ROOT / "dpi_nbdev").glob("*.py") if p.name != "_modidx.py")
NOTEBOOKS = sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith((".", "_")) for part in p.relative_to(ROOT).parts))
PAGES = ("index.ipynb", "tutorials", "explanations")  # notebooks that export nothing


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def settings():
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    return parser["DEFAULT"]


def cells(notebook):
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [(c["cell_type"], "".join(c["source"]), c.get("outputs", [])) for c in found]


def exports_to(notebook):
    found = [re.search(r"^#\|\s*default_exp\s+(\S+)", source, re.M) for kind, source, _ in cells(notebook) if kind == "code"]
    return next((m[1] for m in found if m), None)


def imports(module):
    "Dotted paths that a file imports anywhere, functions included; relative ones made absolute."
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {".".join(filter(None, ["dpi_nbdev" if node.level else "", node.module, alias.name])) for alias in node.names}
    return found


# -- settings, installation ----------------------------------------------------------------------------------


def test_what_is_installed_is_what_settings_say():
    cfg, installed = settings(), distribution("dpi_nbdev")
    assert installed.version == cfg["version"]
    assert installed.metadata["Requires-Python"] == f">={cfg['min_python']}"
    wanted = {str(Requirement(r)) for r in cfg["requirements"].split()}
    assert {str(Requirement(r)) for r in installed.requires if "extra" not in r} == wanted
    scripts = {f"{e.name}={e.value}" for e in installed.entry_points if e.group == "console_scripts"}
    assert scripts == set(cfg["console_scripts"].split())


def test_version_is_the_one_of_settings():
    import dpi_nbdev
    assert dpi_nbdev.__version__ == settings()["version"]


def test_citation_and_changelog_name_the_version_of_settings():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == settings()["version"] and citation["repository-code"] == f"https://github.com/{settings()['user']}/{settings()['repo']}"
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert newest[1] == settings()["version"]


@pytest.mark.parametrize("script", settings()["console_scripts"].split())
def test_command_resolves(script):
    module, function = script.split("=")[1].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_constraints_lie_inside_the_ranges_of_settings():
    cfg = settings()
    ranges = [Requirement(r) for r in (cfg["requirements"] + " " + cfg["dev_requirements"]).split()]
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
            if line and not line.startswith("#")]
    for pin in pins:
        (spec,) = pin.specifier
        assert spec.operator == "==", f"{pin} is not an exact version"
        for wanted in ranges:
            if wanted.name == pin.name:
                assert spec.version in wanted.specifier, f"constraints.txt has {pin}, settings.ini wants {wanted}"
    assert {r.name for r in ranges} <= {pin.name for pin in pins}, "a requirement of settings.ini has no tested version"
    for minor in range(10, 14):  # each Python gets exactly one version
        chosen = [p.name for p in pins if p.marker is None or p.marker.evaluate({"python_version": f"3.{minor}"})]
        assert len(chosen) == len(set(chosen)), f"two versions of one package for Python 3.{minor}"
        assert set(chosen) == {p.name for p in pins}, f"a package has no version for Python 3.{minor}"


def test_every_third_party_import_is_a_requirement():
    names = {"sklearn": "scikit-learn", "PIL": "pillow", "yaml": "pyyaml", "mpl_toolkits": "matplotlib", "cycler": "matplotlib"}
    wanted = {Requirement(r).name for r in settings()["requirements"].split()}
    for module in MODULES:
        for path in imports(module):
            top = path.split(".")[0]
            if top != "dpi_nbdev" and top not in sys.stdlib_module_names:
                assert names.get(top, top) in wanted, f"{name_of(module)} imports {top}, which settings.ini does not require"


def test_judging_needs_no_extra():
    outside = lambda names: {path.split(".")[0] for name in names.split() for path in imports(ROOT / "dpi_nbdev" / f"{name}.py")} - set(sys.stdlib_module_names)
    assert outside("metrics features evaluate") <= outside("core diffusion flow build samplers solvers files generate")


def test_readme_of_a_package_index_leads_to_files_of_the_repository():
    pytest.importorskip("setuptools")  # a Python of 3.12 or later has it from torch
    text = subprocess.run([sys.executable, "setup.py", "--long-description"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    cfg, links = settings(), re.findall(r"\]\(([^)]+)\)", text)
    assert [link for link in links if not re.match(r"https://|#", link)] == []
    ours = [m[1] for link in links if (m := re.match(rf"{cfg['git_url']}/(?:blob|raw)/{cfg['branch']}/([^#]+)", link))]
    assert len(ours) > 20 and [path for path in ours if not (ROOT / path).exists()] == []


# -- notebooks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook_has_title_and_description_in_one_cell(notebook):
    first = next(source for kind, source, _ in cells(notebook) if kind == "markdown")
    assert re.match(r"# \S.*\n+> \S", first), "the first text cell holds `# Title`, an empty line, `> description`"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook_exports_a_module_or_is_a_page(notebook):
    is_page = notebook.relative_to(ROOT / "nbs").parts[0] in PAGES
    module = exports_to(notebook)
    assert (module is None) == is_page
    if module == "__init__":
        return
    if module:
        number, _, stem = notebook.stem.partition("_")
        assert number.isdigit() and stem == module, "NN_name.ipynb exports name"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebook_stores_outputs_and_no_errors_or_local_paths(notebook):
    outputs = [o for kind, _, found in cells(notebook) if kind == "code" for o in found]
    assert outputs, "run it from top to bottom and save it: site and README show stored outputs"
    assert [o["ename"] for o in outputs if o["output_type"] == "error"] == [], "it stores an error"
    shown = json.dumps([{k: v for k, v in o.get("data", {}).items() if k.startswith("text")} or o.get("text", "") for o in outputs])
    assert not re.search(r"(/home/|/root/|/Users/|/work/)\w", shown), "an output shows a path of the machine it ran on"


def test_sidebar_names_every_notebook_once():
    from docs_check import sidebar_entries
    sidebar = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))
    listed = sidebar_entries(sidebar["website"]["sidebar"]["contents"])
    there = [p.relative_to(ROOT / "nbs").as_posix() for p in NOTEBOOKS]
    assert sorted(listed) == sorted(there)


def test_site_and_workflows_are_valid_yaml_and_actions_are_pinned():
    assert (ROOT / "nbs" / "_quarto.yml").resolve() == ROOT / "_quarto.yml"
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    assert site["metadata-files"] == ["nbdev.yml", "sidebar.yml"] and site["format"]["html"]["keep-md"]
    for workflow in sorted((ROOT / ".github" / "workflows").glob("*.yaml")):
        jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
        for action in (step["uses"] for job in jobs.values() for step in job["steps"] if "uses" in step):
            assert re.search(r"@v\d+\.\d+\.\d+$", action), f"{workflow.name}: {action} is not pinned to a version"


# -- modules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", MODULES, ids=name_of)
def test_module_comes_from_a_notebook_and_names_no_local_path(module):
    text = module.read_text(encoding="utf-8")
    source = re.search(r"File to edit: \.\./nbs/(\S+\.ipynb)", text)
    assert source and (ROOT / "nbs" / source[1]).exists()
    assert not re.search(r"(/home/|/root/|/Users/|/work/|/tmp/)\w", text)


def test_modules_import_only_lower_numbers():
    number = {exports_to(nb): nb.stem for nb in NOTEBOOKS if exports_to(nb)}
    for module in MODULES:
        if module.stem == "__init__":
            continue
        for path in imports(module):
            if path.split(".")[0] == "dpi_nbdev":
                needed = path.split(".")[1]
                assert needed in number, f"{name_of(module)} imports {path}: import from the module that defines it"
                assert number[needed] < number[module.stem], f"{number[module.stem]} imports the later {number[needed]}"


# -- public names -----------------------------------------------------------------------------------------------


def test_public_names_exist_and_every_module_but_the_commands_has_some():
    import dpi_nbdev
    for name in dpi_nbdev.__all__:
        assert getattr(dpi_nbdev, name) is not None
    modules = {m.stem for m in MODULES} - {"__init__"}
    assert set(dpi_nbdev._public) <= modules
    assert modules - set(dpi_nbdev._public) <= {"cli"}, "nbs/60_api.ipynb: what is public in these?"
    for_checkers = {path.split(".")[1] for path in imports(ROOT / "dpi_nbdev" / "__init__.py") if path.startswith("dpi_nbdev.")}
    assert for_checkers == set(dpi_nbdev._public), "the imports under TYPE_CHECKING and the table differ"


def test_type_checkers_know_the_methods_that_are_patched_in():
    import dpi_nbdev
    declared, bases, patched_in = {}, {}, []
    for node in (n for module in MODULES for n in ast.parse(module.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.ClassDef):
            declared[node.name] = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign)} | {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
            bases[node.name] = [ast.unparse(b) for b in node.bases]
        elif isinstance(node, ast.FunctionDef) and any(ast.unparse(d).startswith("patch") for d in node.decorator_list):
            patched_in.append((ast.unparse(node.args.args[0].annotation), node.name))
    known = lambda cls, name: cls in declared and (name in declared[cls] or any(known(b, name) for b in bases[cls]))
    public = [(cls, name) for cls, name in patched_in if cls in {*dpi_nbdev.__all__, "Process"} and not name.startswith("_") and name != "extra_repr"]
    assert len(public) > 20 and [f"{cls}.{name}" for cls, name in public if not known(cls, name)] == []


def test_import_brings_nothing_heavy_along():
    script = ("import sys, time; t = time.perf_counter(); import dpi_nbdev; from dpi_nbdev import *; t = time.perf_counter() - t;"
              "print(f'{t:.1f}', *sorted({'sklearn', 'matplotlib', 'pandas', 'nbdev', 'IPython', 'jupyter_client'} & sys.modules.keys()))")
    seconds, *heavy = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    print(f"every public name of dpi_nbdev imported in {seconds} s")  # shown by pytest -s; a machine's load is no fault
    assert heavy == []
