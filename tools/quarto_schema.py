"""What Quarto 1.7 accepts in the site's YAML, as far as this project uses it: an unknown key or a wrong type is a fault.

Taken from the schemas that Quarto validates with. A name of a type, a tuple of allowed values, a list [item] (one or
many), a dict of keys (closed), or a set-like `Any(...)` of these. Keys that are new to the project are added here.
"""


class Any(tuple):
    "One of several schemas."


TYPES = {"string": str, "boolean": bool, "number": (int, float)}
COLOUR = "string"
LINK = {key: "string" for key in ("text", "href", "icon", "aria-label", "rel", "target")}
SOCIAL = {"title": "string", "description": "string", "image": "string", "image-alt": "string", "image-width": "number",
          "image-height": "number"}
CONTENTS: list = []
CONTENTS.append(Any(["string", {**LINK}, {"section": "string", "href": "string", "contents": CONTENTS}]))
REGION = Any(["string", [Any(["string", LINK])]])
NAME = Any(["string", {"family": "string", "given": "string"}, {"name": Any(["string", {"literal": "string"}])}])

CITATION = Any(["boolean", {
    **{key: "string" for key in ("type", "title", "url", "publisher", "version", "abstract", "note", "doi", "container-title")},
    "author": [NAME], "issued": Any(["string", "number"]), "google-scholar": "boolean"}])

HTML = {
    "theme": Any(["string", {"light": ["string"], "dark": ["string"]}]), "css": ["string"],
    "toc": "boolean", "toc-depth": "number", "toc-location": ("body", "left", "right", "left-body", "right-body"), "toc-title": "string",
    "toc-expand": Any(["boolean", "number"]), "number-sections": "boolean", "anchor-sections": "boolean",
    "code-fold": Any(["boolean", ("show", "none")]), "code-summary": "string", "code-overflow": ("scroll", "wrap"),
    "code-tools": Any(["boolean", {"source": Any(["boolean", "string"]), "toggle": "boolean", "caption": "string"}]),
    "code-copy": Any(["boolean", ("hover",)]), "code-link": "boolean", "code-line-numbers": Any(["boolean", "string"]),
    "fig-align": ("default", "left", "right", "center"), "fig-cap-location": ("top", "bottom", "margin"), "fig-responsive": "boolean",
    "tbl-cap-location": ("top", "bottom", "margin"), "lightbox": Any(["boolean", ("auto",)]), "link-external-newwindow": "boolean",
    "html-math-method": Any([("plain", "webtex", "gladtex", "mathml", "mathjax", "katex"), {"method": "string", "url": "string"}]),
    "grid": {key: "string" for key in ("sidebar-width", "margin-width", "body-width", "gutter-width")} | {"content-mode": ("auto", "standard", "full", "slim")},
    "page-layout": ("article", "full", "custom"), "keep-md": "boolean", "smooth-scroll": "boolean", "df-print": "string",
    "appendix-style": ("default", "plain", "none"), "appendix-cite-as": Any(["boolean", [("display", "bibtex")]]),
    "respect-user-color-scheme": "boolean", "axe": "boolean", "google-scholar": "boolean", "description-meta": "string",
}

WEBSITE = {
    **{key: "string" for key in ("title", "description", "favicon", "site-url", "site-path", "repo-url", "repo-link-target", "repo-link-rel",
                                 "repo-subdir", "repo-branch", "issue-url", "image", "image-alt", "body-header", "body-footer")},
    "repo-actions": [("none", "edit", "source", "issue")],
    **{key: "boolean" for key in ("reader-mode", "page-navigation", "back-to-top-navigation", "bread-crumbs")},
    "search": Any(["boolean", {"location": ("navbar", "sidebar"), "type": ("overlay", "textbox"), "limit": "number", "collapse-after": "number",
                               "copy-button": "boolean", "merge-navbar-crumbs": "boolean", "keyboard-shortcut": ["string"],
                               "show-item-context": Any([("tree", "parent", "root"), "boolean"])}]),
    "navbar": Any(["boolean", {"title": Any(["string", "boolean"]), "logo": "string", "logo-alt": "string", "logo-href": "string",
                               "background": COLOUR, "foreground": COLOUR, "search": "boolean", "pinned": "boolean", "collapse": "boolean",
                               "collapse-below": ("sm", "md", "lg", "xl", "xxl"), "left": [Any(["string", LINK])], "right": [Any(["string", LINK])],
                               "tools": [LINK], "toggle-position": ("left", "right"), "tools-collapse": "boolean"}]),
    "sidebar": {"id": "string", "title": Any(["string", "boolean"]), "logo": "string", "search": "boolean", "tools": [LINK], "contents": CONTENTS,
                "style": ("docked", "floating"), "background": COLOUR, "foreground": COLOUR, "border": "boolean",
                "alignment": ("left", "right", "center"), "collapse-level": "number", "pinned": "boolean", "header": ["string"], "footer": ["string"]},
    "page-footer": Any(["string", {"left": REGION, "center": REGION, "right": REGION, "border": Any(["boolean", "string"]),
                                   "background": COLOUR, "foreground": COLOUR}]),
    "open-graph": Any(["boolean", SOCIAL | {"locale": "string", "site-name": "string"}]),
    "twitter-card": Any(["boolean", SOCIAL | {"card-style": ("summary", "summary_large_image"), "creator": "string", "site": "string"}]),
    "drafts": ["string"], "draft-mode": ("visible", "unlinked", "gone"),
}

SITE = {
    "project": {"type": ("default", "website", "book", "manuscript"), "output-dir": "string", "title": "string", "render": ["string"],
                "resources": ["string"], "pre-render": ["string"], "post-render": ["string"]},
    "metadata-files": ["string"], "format": {"html": HTML, "commonmark": ("default",)}, "website": WEBSITE,
    "lang": "string", "license": "string", "copyright": "string", "citation": CITATION, "google-scholar": "boolean", "author": [NAME],
    "execute": {"enabled": "boolean", "freeze": Any(["boolean", ("auto",)]), "echo": "boolean", "warning": "boolean"},
}

# The first cell of a page and the options of a code cell (`#| key: value`).
PAGE = {"title": "string", "description": "string", "output-file": "string", "subtitle": "string", "image": "string", "image-alt": "string",
        "date": "string", "order": "number", "toc": "boolean", "sidebar": Any(["boolean", "string"]), "search": "boolean", "aliases": ["string"],
        "page-layout": ("article", "full", "custom"), "format": {"html": HTML}, "skip_exec": "boolean", "skip_showdoc": "boolean"}
CELL = {"echo": Any(["boolean", ("fenced",)]), "output": Any(["boolean", ("asis",)]), "include": "boolean", "eval": "boolean",
        "warning": "boolean", "error": "boolean", "code-fold": Any(["boolean", ("show",)]), "code-summary": "string",
        "code-overflow": ("scroll", "wrap"), "label": "string", "classes": "string", "column": "string",
        "fig-cap": ["string"], "fig-alt": ["string"], "fig-align": ("default", "left", "right", "center"), "fig-width": "number",
        "layout-ncol": "number", "tbl-cap": "string", "lst-cap": "string"}


def faults(value, schema, where: str = "") -> list[str]:
    "One sentence for each place of `value` that `schema` does not allow."
    if isinstance(schema, str):
        kind = TYPES[schema]
        good = isinstance(value, kind) and not (schema == "number" and isinstance(value, bool))
        return [] if good else [f"{where or 'the file'} should be a {schema}, and is {value!r}"]
    if isinstance(schema, Any):
        tries = [faults(value, s, where) for s in schema]
        if [] in tries:
            return []
        # the complaints of the alternative with the right shape say most
        shaped = [t for t, s in zip(tries, schema) if isinstance(s, dict) == isinstance(value, dict) and isinstance(s, list) == isinstance(value, list)]
        return min(shaped, key=len) if isinstance(value, (dict, list)) and shaped else [f"{where} cannot be {value!r}"]
    if isinstance(schema, tuple):
        return [] if value in schema and isinstance(value, str) else [f"{where} should be one of {', '.join(schema)}, and is {value!r}"]
    if isinstance(schema, list):
        items = value if isinstance(value, list) else [value]
        return [f for i, item in enumerate(items) for f in faults(item, schema[0], f"{where}[{i}]" if isinstance(value, list) else where)]
    if not isinstance(value, dict):
        return [f"{where or 'the file'} should have keys, and is {value!r}"]
    return [f for key, item in value.items()
            for f in (faults(item, schema[key], f"{where}.{key}".lstrip(".")) if key in schema
                      else [f"{f'{where}.{key}'.lstrip('.')} is no key that Quarto (or tools/quarto_schema.py) knows"])]
