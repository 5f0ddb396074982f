"""What a visitor of the site would miss, found without Quarto: every notebook is processed as the site does it (nbdev's
processors, into _proc/), and then the pages, what they link to and the site's YAML are looked through.

A page must have a title, a description and what its cells drew and printed; each figure a caption and an alt text, and one
of them marked as the page's card (Quarto takes a social card from the class `preview-image` alone). Links must lead to
pages, headings, files and source lines that exist, names in backticks must be names that some code has.
"""
import ast
import builtins
import json
import multiprocessing
import os
import re
import sys
import warnings
from pathlib import Path

import yaml

import quarto_schema

ROOT = Path(__file__).resolve().parent.parent
LONGEST_LINE = 140  # of printed text that stands in columns; a reader scrolls to its end
LONGEST_SENTENCE = 94  # of printed text that does not: what a desktop shows
FIRST_FIGURE = (200, 1200)  # lines of code and words of prose that may stand before it
# names of other packages' things that no code here uses, and patterns that stand for names
ELSEWHERE = {"PyTorchModelHubMixin", "module.name", "pool_3"}
# nbdev's own directives, and this project's flags for cells that the tests leave out
DIRECTIVES = {"default_exp", "export", "exports", "exporti", "hide", "hide_line", "filter_stream", "notest", "slow", "cuda", "skip_showdoc"}


# -- the notebook as stored ---------------------------------------------------------------------------------------------


def options_of(source: str) -> tuple[set[str], dict]:
    "nbdev's directives and Quarto's options (`#| key: value`) at the top of a cell. Raises `yaml.YAMLError`."
    lines = [line[2:] for line in source.splitlines() if line.startswith("#|")]
    options = [line for line in lines if re.match(r"\s*[\w-]+:(\s|$)", line)]
    return {line.split()[0] for line in lines if line not in options and line.strip()}, yaml.safe_load("\n".join(options)) or {}


def top_level_calls(source: str) -> set[str]:
    "Dotted names that a cell calls when it runs, not counting what it only defines."
    names, todo = set(), list(ast.parse("\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))).body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            continue
        if isinstance(node, ast.Call):
            names.add(ast.unparse(node.func))
        todo += ast.iter_child_nodes(node)
    return names


def expects_figure(calls: set[str]) -> bool:
    "Whether a cell with these calls draws something that stays to be seen."
    quiet = {"plt.close", "plt.savefig", "plt.imread", "plt.imsave", "plt.get_cmap", "plt.switch_backend", "plt.get_backend", "plt.get_fignums"}
    drawn = {c for c in calls if re.match(r"plt\.\w+$", c)} - quiet
    return bool(drawn) and "plt.close" not in calls


def cell_faults(cell: dict) -> list[str]:
    "What the visitor would miss in one code cell."
    source, outputs = cell["source"], cell.get("outputs", [])
    try:
        directives, options = options_of(source)
    except yaml.YAMLError as error:
        return [f"the options (#| …) are no YAML: {str(error).splitlines()[0]}"]
    found = [f"unknown directive #| {d}" for d in sorted(directives - DIRECTIVES)]
    found += [f"option {fault}" for fault in quarto_schema.faults(options, quarto_schema.CELL)]
    if any(o["output_type"] == "error" for o in outputs):
        found.append("stores an error")
    if "hide" in directives or options.get("include") is False or options.get("output") is False or options.get("eval") is False:
        return found
    figures = [o for o in outputs if any(kind.startswith("image/") for kind in o.get("data", {}))]
    calls = top_level_calls(source)
    if figures:
        found += [f"its figure has no {key}" for key in ("fig-cap", "fig-alt") if not options.get(key)]
    elif expects_figure(calls):
        found.append("draws, but no figure is stored: run the notebook and save")
    if "print" in calls and not outputs and "test_stdout" not in calls:
        found.append("prints, but nothing is stored: run the notebook and save")
    texts = ["".join(o.get("text", "")) or "".join(o.get("data", {}).get("text/plain", "")) for o in outputs if not o.get("data", {}).keys() - {"text/plain"}]
    lines = [line for text in texts for line in text.splitlines()]
    if "wrap" not in str(options.get("classes", "")).split():
        if (longest := max(map(len, lines), default=0)) > LONGEST_LINE:
            found.append(f"prints a line of {longest} characters: shorten it, or say `#| classes: wrap` if it is a sentence")
        elif longest > LONGEST_SENTENCE and not any("  " in line.strip() for line in lines):
            found.append(f"prints a sentence of {longest} characters: shorten it, or say `#| classes: wrap`")
    return found


def card_of(notebook: dict) -> list[str]:
    "Places marked as the picture that stands for the page elsewhere."
    marked = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            marked += re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)\{[^}]*\.preview-image", cell["source"])
        elif re.search(r"^#\|\s*classes:.*\bpreview-image\b", cell["source"], flags=re.MULTILINE):
            marked.append(first_line(cell["source"]))
    return marked


def first_line(source: str) -> str:
    "What a fault calls a cell by."
    return next((line for line in source.splitlines() if line.strip() and not line.startswith("#|")), "?")[:80]


def before_first_figure(notebook: dict) -> tuple[int, int]:
    "Lines of code and words of prose that a visitor passes before the first figure (or to the end, where there is none)."
    lines = words = 0
    for cell in notebook["cells"]:
        figure = any(kind.startswith("image/") for o in cell.get("outputs", []) for kind in o.get("data", {}))
        if figure or (cell["cell_type"] == "markdown" and "![" in cell["source"]):
            break
        if cell["cell_type"] == "markdown":
            words += len(cell["source"].split())
        elif not re.search(r"^#\|\s*(hide|export|default_exp)\b", cell["source"], flags=re.MULTILINE):  # not shown, or folded
            lines += len(cell["source"].splitlines())
    return lines, words


def faults_of(notebook: dict, front: dict) -> list[str]:
    "What `notebook`, as stored, lacks to become a page; `front` is the front matter nbdev made of its first cells."
    code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
    outputs = [o for c in code for o in c.get("outputs", [])]
    shown = [o for o in outputs if o["output_type"] in ("display_data", "execute_result", "stream")]
    found = [f"has no {key}" for key in ("title", "description") if not front.get(key)]
    found += quarto_schema.faults(front, quarto_schema.PAGE)
    if code and not shown:
        found.append("has no stored outputs: run it from top to bottom and save")
    found += [f"{fault}; in the cell that starts `{first_line(c['source'])}`" for c in code for fault in cell_faults(c)]
    cards = card_of(notebook)
    if len(cards) != 1 and any(kind.startswith("image/") for o in outputs for kind in o.get("data", {})):
        found.append(f"marks {len(cards)} of its figures as its card: give `#| classes: preview-image` to one")
    lines, words = before_first_figure(notebook)
    if cards and (lines > FIRST_FIGURE[0] or words > FIRST_FIGURE[1]):
        found.append(f"has its first figure after {lines} lines of code and {words} words: show one sooner")
    return found


# -- the page as processed ----------------------------------------------------------------------------------------------


def slug(heading: str) -> str:
    "The id that pandoc makes of a heading's text."
    text = re.sub(r"\s+", "-", re.sub(r"[^\w\s.-]", "", heading.lower()).strip())
    return re.sub(r"^[\W\d_]+", "", text) or "section"


def without_math(text: str, faults: list) -> str:
    "`text` with its formulas taken out, by pandoc's rules; faults found on the way are appended."
    def formula(match):
        tex = match[0].strip("$")
        begin, end = re.findall(r"\\begin\{(\w+\*?)\}", tex), re.findall(r"\\end\{(\w+\*?)\}", tex)
        bare = re.sub(r"\\[{}]", "", tex)
        if bare.count("{") != bare.count("}") or len(re.findall(r"\\left\b", tex)) != len(re.findall(r"\\right\b", tex)) or sorted(begin) != sorted(end):
            faults.append(f"a formula does not close what it opens: {match[0][:60]}")
        return "M"
    text = re.sub(r"\$\$.+?\$\$", formula, text, flags=re.DOTALL)
    text = re.sub(r"(?<![\\$])\$(?=\S)(?:\\.|[^$\\])+?(?<=\S)\$(?!\d)", formula, text)
    if re.search(r"(?<!\\)\$", text):
        at = re.search(r"(?<!\\)\$", text).start()
        faults.append(f"a $ has no partner: {text[max(0, at - 20):at + 30]!r}")
    return text


def without_code(text: str) -> str:
    "`text` with the content of code blocks and code spans blanked, so that nothing in them looks like Markdown."
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)(.+?)\1", lambda m: m[1] + re.sub(r"[^\w\s]", "_", m[2]) + m[1], text, flags=re.DOTALL)


def plain(tokens: list) -> str:
    "The text of inline tokens."
    return "".join(t.get("raw", "") + plain(t.get("children", [])) + (" " if t["type"].endswith("break") else "") for t in tokens)


def walk(tokens: list):
    "All tokens, outer before inner."
    for token in tokens:
        yield token
        yield from walk(token.get("children", []))


class Page:
    "Headings, links, pictures and faults of a page's prose."

    def __init__(self, markdown: list[str]):
        import mistune
        parse = mistune.create_markdown(renderer=None, plugins=["table", "footnotes", "strikethrough"])
        self.anchors, self.links, self.images, self.faults = set(), [], [], []
        seen: dict[str, int] = {}
        for text in markdown:
            # backticks inside headings count for their ids, so headings are read from the unblanked text
            fenceless = re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$", "", text, flags=re.MULTILINE | re.DOTALL)
            for token in walk(parse(fenceless)):
                if token["type"] == "heading":
                    name, explicit = plain(token["children"]), None
                    if match := re.search(r"\s*\{[^}]*#([\w.:-]+)[^}]*\}\s*$", name):
                        explicit, name = match[1], name[:match.start()]
                    at = explicit or slug(re.sub(r"\s*\{[^}]*\}\s*$", "", name))
                    seen[at] = seen.get(at, 0) + 1
                    self.anchors.add(at if seen[at] == 1 else f"{at}-{seen[at] - 1}")
            prose = without_math(without_code(text), self.faults)
            self.anchors |= set(re.findall(r"""\bid=["']([^"']+)["']""", prose)) | set(re.findall(r"\{#([\w.:-]+)", prose))
            self.links += re.findall(r"""<a [^>]*href=["']([^"']+)["']""", prose)
            self.images += [(src, "alt=" in tag) for tag, src in re.findall(r"""(<img [^>]*src=["']([^"']+)["'][^>]*>)""", prose)]
            tokens = list(walk(parse(prose)))
            self.links += [t["attrs"]["url"] for t in tokens if t["type"] == "link"]
            self.images += [(t["attrs"]["url"], bool(plain(t["children"]).strip())) for t in tokens if t["type"] == "image"]
            words = [t["raw"] for t in tokens if t["type"] == "text"]
            # nbdev links names in backticks, also inside the text of a link, and a link in a link is none
            self.faults += [f"the link around `{name}` is lost: write the name alone, nbdev links it"
                            for name in re.findall(r"\[[^\[\]\n]*\[`([^`\n]+)`\]\([^)\n]*\)[^\[\]\n]*\]\(", text)]
            # show_doc sets a docstring between two stars, and pandoc does not nest them
            self.faults += [f"a docstring with a star of its own is not set in italics: {line[:60]}" for line in prose.splitlines()
                            if re.match(r"\*[^*\s][^*]*\s\*[^*\s].*\*$", line)]
            # nbdev links names inside of signatures, too, where no link is one
            self.faults += [f"a signature shows the link of `{name}` as text: write the name without backticks in the comment" for block in
                            re.findall(r"^```.*?^```", text, flags=re.MULTILINE | re.DOTALL) for name in re.findall(r"\[`([^`\n]+)`\]\(http", block)]
            self.faults += [f"the reference {r} leads nowhere" for w in words for r in re.findall(r"\[[^\[\]]+\]\[[^\[\]]*\]", w)]
            # pandoc takes @name for a citation, and @fig-name for a figure's number
            self.faults += [f"{r} would be read as a citation: put it in backticks" for w in words for r in re.findall(r"(?:^|(?<=[\s(\[]))@[A-Za-z][\w:-]*", w)]


def page_of(processed: dict) -> Page:
    "The prose of a processed notebook: its Markdown cells, and the Markdown that its cells (show_doc among them) put out."
    prose = []
    for cell in processed["cells"]:
        if cell["cell_type"] == "markdown":
            prose.append(cell["source"])
        for output in cell.get("outputs", []):
            prose += ["".join(output["data"][kind]) for kind in ("text/markdown", "text/html") if kind in output.get("data", {})][:1]
    return Page(prose)


def front_and_prose(text: str) -> tuple[dict, str]:
    "A .qmd file in two: its YAML and its Markdown."
    _, front, prose = text.split("---\n", 2)
    return yaml.safe_load(front) or {}, prose


class Links:
    "Where links lead: pages by name, files of the site, source lines of the repository."

    def __init__(self, pages: dict[str, Page], outputs: dict[str, str], root: Path, site: str, repo: str):
        self.pages, self.root, self.site, self.repo = pages, root, site, repo
        self.html = {(Path(name).parent / html).as_posix(): name for name, html in outputs.items()}

    def fault(self, name: str, url: str) -> str | None:
        "Why `url` on page `name` leads nowhere, or None."
        target, _, anchor = url.partition("#")
        if url.startswith(self.repo + "/blob/"):
            path = target.removeprefix(self.repo + "/blob/").partition("/")[2]
            file, line = self.root / path, re.match(r"L(\d+)", anchor)
            if not file.is_file():
                return f"links to {path} of the repository, which does not exist"
            if line and int(line[1]) > len(file.read_text(encoding="utf-8").splitlines()):
                return f"links to line {line[1]} of {path}, which is shorter"
            return None
        if target.startswith(self.site):
            target = target.removeprefix(self.site).lstrip("/") or "index.html"
        elif re.match(r"[a-z]+:", url):
            return None if re.match(r"(https://[\w.-]+\.[a-z]+(/|$|#|\?)|mailto:\S+@\S+$)", url) else f"links to {url}: no https address"
        elif target:
            target = os.path.normpath(target.lstrip("/") if target.startswith("/") else Path(name).parent / target)
        else:
            target = name
        page = self.html.get(target, target)
        if page in self.pages:
            return f"links to {url}, and {page} has no such heading" if anchor and anchor not in self.pages[page].anchors else None
        return None if (self.root / "nbs" / target).is_file() and not target.endswith(".html") else f"links to {url}, which does not exist"


def prose_faults(name: str, page: Page, links: Links) -> list[str]:
    "What is wrong with the text, the links and the pictures of a page."
    found = page.faults + [links.fault(name, url) for url in page.links]
    for src, alt in page.images:
        if not src.startswith("data:"):
            found.append((links.fault(name, src) or "").replace("links to", "shows"))
        if not alt:
            found.append(f"shows {src[:60]} without an alt text")
    return [fault for fault in found if fault]


# -- names in backticks -------------------------------------------------------------------------------------------------


class Names:
    "The names that code has: this package's, and every word of code in the repository."

    def __init__(self, modules: dict, words: set[str]):
        self.modules = modules
        self.symbols = {n: getattr(m, n) for m in modules.values() for n in getattr(m, "__all__", [])}
        self.words = words | set(dir(builtins)) | set(self.symbols) | set(modules)

    def fault(self, span: str) -> str | None:
        "Why the code span looks like a name that does not exist, or None."
        if span.removeprefix("dpi_nbdev.") in ELSEWHERE:
            return None
        match = re.match(r"^@?([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)(\(.*\))?$", span.strip(), flags=re.DOTALL)
        if not match:
            return None
        first, *rest = match[1].split(".")
        if first == "dpi_nbdev" and rest:
            if rest[0] in self.symbols:
                return None
            first, *rest = rest
            if first not in self.modules and not first.startswith("__"):
                return f"`{span}`: dpi_nbdev has no {first}"
        owner = self.modules.get(first) if first in self.modules else self.symbols.get(first)
        if rest and first in self.symbols and isinstance(self.symbols[first], type):
            cls = self.symbols[first]
            if not hasattr(cls, rest[0]) and not any(re.search(rf"\bself\.{rest[0]}\b|\"{rest[0]}\"|^\s*{rest[0]}:", text, re.M) for text in sources(cls)):
                return f"`{span}`: {first} has no {rest[0]}"
        elif rest and first in self.modules and rest[-1] not in ("py", "ipynb", "html") and not hasattr(owner, rest[0]):
            return f"`{span}`: {first} has no {rest[0]}"
        looks_like_ours = re.match(r"[A-Z][a-z0-9]+[A-Z]\w*$", first) or match[2] or "_" in first.strip("_")
        if not rest and looks_like_ours and first not in self.words:
            return f"`{span}`: no code here has a name {first}"
        return None


def sources(cls: type) -> list[str]:
    "The code of a class and of those it builds on, as far as they are this package's."
    import inspect
    return [inspect.getsource(c) for c in cls.__mro__ if c.__module__.startswith("dpi_nbdev")]


def words_of_code(root: Path, notebooks: list[dict]) -> set[str]:
    "Every word in the repository's code, settings and code blocks."
    files = [p for pattern in ("*", "tools/*", "tests/*.py", ".github/workflows/*", ".ci/*") for p in root.glob(pattern)
             if p.is_file() and p.suffix in (".py", ".sh", ".ini", ".txt", ".toml", ".yml", ".yaml", ".cff", "") and p.stat().st_size < 2**20]
    texts = [p.read_text(encoding="utf-8", errors="replace") for p in files]
    texts += [c["source"] for nb in notebooks for c in nb["cells"] if c["cell_type"] == "code"]
    texts += [block for nb in notebooks for c in nb["cells"] if c["cell_type"] == "markdown" for block in re.findall(r"```.*?```", c["source"], flags=re.DOTALL)]
    return set(re.findall(r"[A-Za-z_]\w*", "\n".join(texts)))


def words_of_torch() -> set[str]:
    "Names of PyTorch that prose may mention without any code here using them."
    import torch
    return {n for m in (torch, torch.nn, torch.nn.init, torch.nn.functional, torch.nn.parallel, torch.optim, torch.Tensor, torch.nn.Module) for n in dir(m)}


def code_spans(markdown: str) -> list[str]:
    "Code spans that nbdev would try to link: outside of blocks, and of the text of links."
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", re.sub(r"\[[^\]]*\]\([^)]*\)", "", text))


# -- the site's YAML ----------------------------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    "Refuses a key that stands twice, as Quarto does."

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key) for key, _ in node.value]
        if twice := sorted({str(k) for k in keys if keys.count(k) > 1}):
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


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


def yaml_faults(root: Path, generated: str) -> list[str]:
    "What Quarto would not accept in _quarto.yml, sidebar.yml and the nbdev.yml that nbdev would write."
    found, merged = [], {}
    files = {"_quarto.yml": (root / "_quarto.yml").read_text(encoding="utf-8"), "nbs/nbdev.yml": generated,
             "nbs/sidebar.yml": (root / "nbs" / "sidebar.yml").read_text(encoding="utf-8")}
    for name, text in files.items():
        try:
            content = yaml.load(text, Loader)
        except yaml.YAMLError as error:
            found.append(f"{name}: {' '.join(str(error).split())}")
            continue
        found += [f"{name}: {fault}" for fault in quarto_schema.faults(content, quarto_schema.SITE)]
        merged[name] = content if isinstance(content, dict) else {}
    site = merged.get("_quarto.yml", {})
    html, website = (site.get("format") or {}).get("html") or {}, site.get("website") or {}
    for what, path in [("css", html.get("css")), ("favicon", website.get("favicon")), ("image", website.get("image"))]:
        for p in [path] if isinstance(path, str) else path or []:
            if not (root / "nbs" / p).is_file():
                found.append(f"_quarto.yml: {what} is nbs/{p}, which does not exist")
    for p in site.get("metadata-files", []):
        if p != "nbdev.yml" and not (root / "nbs" / p).is_file():
            found.append(f"_quarto.yml: reads nbs/{p}, which does not exist")
    return found


# -- all of it ----------------------------------------------------------------------------------------------------------


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


def read(path: Path) -> dict:
    "A notebook, with the source of its cells as strings."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def process_all(notebooks: list[Path], pages: list[Path]) -> list[str | None]:
    "Every notebook in a process of its own, with the slow imports done once, where processes can be forked."
    how = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(how)
    if how == "forkserver":
        context.set_forkserver_preload(["nbdev.showdoc", "nbdev.processors", "nbdev.serve_drv", "matplotlib.pyplot", "sklearn.datasets", "torch", "dpi_nbdev.cli"])
    with context.Pool(min(2, os.cpu_count() or 1), maxtasksperchild=1) as pool:
        return pool.starmap(process, zip(notebooks, pages), chunksize=1)


def check() -> tuple[list[str], int]:
    "All faults, and the number of pages."
    import importlib

    from nbdev.config import get_config
    from nbdev.doclinks import nbglob
    from nbdev.frontmatter import _fm2dict
    from nbdev.quarto import _nbdev_yml

    notebooks = sorted(path.resolve() for path in nbglob(as_path=True))
    names = [path.relative_to(ROOT / "nbs").as_posix() for path in notebooks]
    outputs = [ROOT / "_proc" / name for name in names]
    stops = process_all(notebooks, outputs)

    stored = {name: read(path) for name, path in zip(names, notebooks)}
    faults, pages, html = [], {}, {}
    for name, page, stop in zip(names, outputs, stops):
        if stop:
            faults.append(f"nbs/{name}: {stop}")
            continue
        processed = read(page)
        raw = [c["source"] for c in processed["cells"] if c["cell_type"] == "raw"]
        front = _fm2dict(raw[0]) if raw else {}
        pages[name], html[name] = page_of(processed), front.get("output-file", Path(name).with_suffix(".html").name)
        faults += [f"nbs/{name}: {fault}" for fault in faults_of(stored[name], front)]

    for path in sorted((ROOT / "nbs").glob("**/*.qmd")):  # pages without code, such as 404.qmd: Quarto takes them as they are
        name, (front, prose) = path.relative_to(ROOT / "nbs").as_posix(), front_and_prose(path.read_text(encoding="utf-8"))
        pages[name], html[name], stored[name] = Page([prose]), path.with_suffix(".html").name, {"cells": [dict(cell_type="markdown", source=prose)]}
        faults += [f"nbs/{name}: {fault}" for fault in faults_of(stored[name], front)]

    config = get_config()
    modules = {name: importlib.import_module(f"dpi_nbdev.{name}") for name in
               (p.stem for p in sorted((ROOT / "dpi_nbdev").glob("[a-z]*.py")))}
    known, links = Names(modules, words_of_code(ROOT, list(stored.values())) | words_of_torch()), Links(
        pages, html, ROOT, config.doc_host + config.doc_baseurl, config.git_url)
    for name, page in pages.items():
        spans = [s for c in stored[name]["cells"] if c["cell_type"] == "markdown" for s in code_spans(c["source"])]
        found = prose_faults(name, page, links) + [known.fault(span) for span in spans]
        faults += [f"nbs/{name}: {fault}" for fault in dict.fromkeys(found) if fault]

    values = {key: config[key] for key in ("title", "description", "branch", "git_url", "doc_host", "doc_baseurl")}
    found = yaml_faults(ROOT, _nbdev_yml.format(**values, doc_path=config.doc_path.name))
    faults += found
    if not any(f.startswith("nbs/sidebar.yml") for f in found):
        sidebar = yaml.safe_load((ROOT / "nbs" / "sidebar.yml").read_text(encoding="utf-8"))
        entries = sidebar_entries(sidebar["website"]["sidebar"]["contents"])
        faults += [f"nbs/sidebar.yml: names {name}, which does not exist" for name in sorted(set(entries) - set(names))]
        faults += [f"nbs/sidebar.yml: does not name {name}" for name in sorted(set(names) - set(entries))]
    return faults, len(notebooks)


def main() -> None:
    os.chdir(ROOT)
    faults, n = check()
    if faults:
        sys.exit("\n".join(faults) + f"\n{len(faults)} faults on {n} pages and in the site's YAML.")
    print(f"{n} pages processed: titles, outputs, figures with captions, links, names and the site's YAML are in order.")


if __name__ == "__main__":
    main()
