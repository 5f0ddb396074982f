"""Processes every notebook as the site would (nbdev's processors, into _proc/), and says what a visitor would miss."""
import multiprocessing
import os
import sys
import warnings
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent


def sidebar_entries(contents) -> list[str]:
    "Files a sidebar names, in order, from its nested sections."
    entries = []
    for item in contents:
        if isinstance(item, dict):
            entries += [item["href"]] if "href" in item else []
            entries += sidebar_entries(item.get("contents", []))
        else:
            entries.append(item)
    return entries


def faults_of(notebook: dict, front: dict) -> list[str]:
    "What `notebook`, as stored, lacks to become a page; `front` is the front matter nbdev made of its first cells."
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in code for o in c.get("outputs", [])]
    shown = [o for o in outputs if o["output_type"] in ("display_data", "execute_result", "stream")]
    return ([f"has no {key}" for key in ("title", "description") if not front.get(key)]
            + (["has no stored outputs: run it from top to bottom and save"] if code and not shown else [])
            + ["stores an error" for o in outputs if o["output_type"] == "error"][:1])


def process(path: Path, page: Path) -> str | None:
    "Writes the page of one notebook. Returns what stopped it, if anything did."
    from nbdev.processors import FilterDefaults
    from nbdev.serve_drv import main as write_page

    warnings.filterwarnings("ignore", message="Found cells containing imports")  # below, when it matters
    page.parent.mkdir(parents=True, exist_ok=True)
    try:
        write_page((path, page, FilterDefaults))
    except Exception as error:  # nbdev's message is a heading, then the cell; the cause is the cell's own error
        what, code = error.__cause__ or error, str(error).splitlines()[1:]
        first = next((line for line in code if line.strip() and not line.startswith("#|")), "?")
        return (f"{type(what).__name__}: {what}; in the cell that starts `{first}`. The site runs exported cells and cells with"
                " an import (even one inside a function), and no others: keep imports apart from code that needs other cells")


def main() -> None:
    from execnb.nbio import read_nb
    from nbdev.doclinks import nbglob
    from nbdev.frontmatter import _fm2dict

    os.chdir(ROOT)
    notebooks = sorted(path.resolve() for path in nbglob(as_path=True))
    names = [path.relative_to(ROOT / "nbs").as_posix() for path in notebooks]
    pages = [ROOT / "_proc" / name for name in names]
    with multiprocessing.get_context("spawn").Pool(min(2, os.cpu_count() or 1), maxtasksperchild=1) as pool:
        stops = pool.starmap(process, zip(notebooks, pages), chunksize=1)

    faults = []
    for path, name, page, stop in zip(notebooks, names, pages, stops):
        raw = [] if stop else [c.source for c in read_nb(page).cells if c.cell_type == "raw"]
        found = [stop] if stop else faults_of(read_nb(path), _fm2dict(raw[0]) if raw else {})
        faults += [f"nbs/{name}: {fault}" for fault in found]

    sidebar = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))
    listed = set(sidebar_entries(sidebar["website"]["sidebar"]["contents"]))
    faults += [f"nbs/sidebar.yml: names {name}, which does not exist" for name in sorted(listed - set(names))]
    faults += [f"nbs/sidebar.yml: does not name {name}" for name in sorted(set(names) - listed)]
    if faults:
        sys.exit("\n".join(faults))
    print(f"{len(notebooks)} pages processed: each has a title, a description, stored outputs and a place in the sidebar.")


if __name__ == "__main__":
    main()
