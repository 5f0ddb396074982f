"Packaging: all facts are read from settings.ini, nothing is said twice."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]
pythons = range(int(cfg["min_python"].split(".")[1]), 14)  # those tested
# dev_requirements becomes the extra "dev", and so on
extras = {key.removesuffix("_requirements"): value.split() for key, value in cfg.items()
          if key.endswith("_requirements")}
# On a package index the README stands alone: its links and pictures lead to the repository.
at = lambda m: f"{m[0]}{cfg['git_url']}/{'raw' if m[0].startswith('!') else 'blob'}/{cfg['branch']}/"
readme = re.sub(r"!?\[[^\]]*\]\((?![a-z]+:|#)", at, (here / "README.md").read_text(encoding="utf-8"))

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme,
    long_description_content_type="text/markdown",
    keywords=cfg["keywords"],
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Documentation": cfg["doc_host"] + cfg["doc_baseurl"]},
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in pythons),
    ],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[cfg["lib_path"], f"{cfg['lib_path']}.*"]),
    package_data={cfg["lib_path"]: ["py.typed"]},
    install_requires=cfg["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_path']}={cfg['lib_path']}._modidx:d"],  # so that other nbdev sites link to our symbols
    },
    zip_safe=False,
)
