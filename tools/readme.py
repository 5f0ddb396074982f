"""README.md and its pictures (index_files/) from nbs/index.ipynb: `readme.py` writes, `readme.py --check` compares.

One path on every machine: nbdev's processors, then nbconvert's Markdown. nbdev_readme would go through Quarto, whose
pandoc wraps lines, formats tables and names pictures differently; with two paths the committed README would change
with the machine that last made it, and `make test` could not check it where Quarto is missing.
"""
import re
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
WARNING = "<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook, not this file. -->"
PICTURES = "index_files"


def mark_for_nbconvert(cell):
    "Quarto's per-cell options (`#| echo: false`) as tags, and off the code, which nbconvert would print."
    if cell.cell_type != "code":
        return
    said = yaml.safe_load("\n".join(re.findall(r"^#\|(.*)", cell.source, flags=re.MULTILINE))) or {}
    if said.get("include") is False:
        del cell["source"]  # nbdev's way to drop a cell
        return
    tags = [tag for option, tag in [("echo", "no-input"), ("output", "no-output")] if said.get(option) is False]
    cell["metadata"] = dict(cell.get("metadata", {}), tags=tags, alt=said.get("fig-alt") or said.get("fig-cap", ""))
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.MULTILINE)


def processed(notebook: Path):
    "The notebook as nbformat sees it, after the processors of the site that make sense outside of it."
    import nbformat
    from execnb.nbio import nb2str
    from nbdev import processors as P
    from nbdev.process import NBProcessor

    procs = [P.strip_ansi, P.hide_line, P.filter_stream_, P.rm_header_dash, P.rm_export, P.clean_magics, P.hide_,
             mark_for_nbconvert]
    nb = NBProcessor(notebook, procs)
    nb.process()
    nb.nb.metadata["language_info"] = {"name": "python"}  # nbdev_clean strips it; code blocks are coloured by it
    return nbformat.reads(nb2str(nb.nb), 4)


def from_root(markdown: str) -> str:
    "Links and pictures relative to nbs/ made relative to the top, where README.md lies. Code blocks stay as they are."
    def fix(match):
        opening, target = match.groups()
        return opening + (f"nbs/{target}" if (ROOT / "nbs" / target.split("#")[0]).exists() else target)

    blocks = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    blocks[::2] = [re.sub(r'(\]\(|(?:src|href)=")(?![a-z]+:|[/#]|index_files/)([^)"\s]+)', fix, text) for text in blocks[::2]]
    return "".join(blocks)


def render(notebook: Path) -> tuple[str, dict[str, bytes]]:
    "README's text, and its pictures by path."
    from nbconvert import MarkdownExporter
    from traitlets.config import Config

    nb = processed(notebook)
    config = Config()
    remove = config.TagRemovePreprocessor
    remove.enabled, remove.remove_input_tags = True, {"no-input"}
    remove.remove_all_outputs_tags = {"no-output"}
    config.ExtractOutputPreprocessor.output_filename_template = "{unique_key}-{cell_index}-{index}{extension}"
    resources = {"unique_key": "figure", "output_files_dir": PICTURES}
    text, resources = MarkdownExporter(config=config).from_notebook_node(nb, resources)

    # nbconvert calls every picture "png"; say instead what it shows.
    alts = {str(i): cell.metadata.get("alt", "") for i, cell in enumerate(nb.cells)}
    text = re.sub(rf"!\[(?:png|svg|jpeg)\]\(({PICTURES}/figure-(\d+)-)",
                  lambda m: f"![{alts.get(m[2]) or 'figure'}]({m[1]}", text)
    text = "\n".join(line.rstrip() for line in from_root(text).splitlines())
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    title, _, rest = text.partition("\n")
    return f"{title}\n\n{WARNING}\n{rest}", resources.get("outputs", {})


def on_disk(root: Path = ROOT) -> tuple[str, dict[str, bytes]]:
    "What `render` would return if README.md were up to date."
    readme, folder = root / "README.md", root / PICTURES
    pictures = {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(folder.glob("*"))} if folder.is_dir() else {}
    return readme.read_text(encoding="utf-8") if readme.exists() else "", pictures


def write(text: str, pictures: dict[str, bytes], root: Path = ROOT) -> None:
    "Replaces README.md and the pictures."
    for old in (root / PICTURES).glob("*"):
        old.unlink()
    for name, content in pictures.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    (root / "README.md").write_text(text, encoding="utf-8")


def main(check: bool) -> None:
    notebook = ROOT / "nbs" / "index.ipynb"
    if not notebook.exists():
        print("nbs/index.ipynb does not exist: README.md stays as it is.")
    elif not check:
        write(*render(notebook))
        print("Wrote README.md.")
    elif render(notebook) != on_disk():
        sys.exit("README.md is not what nbs/index.ipynb renders to: run `make readme`.")


if __name__ == "__main__":
    main(check="--check" in sys.argv[1:])
