"""A study to hand on: one HTML file with all of its pages, which opens anywhere, and one zip file
of reports, notebooks, manifests, parameters, results, adapters and histories, with SHA256SUMS.

Left out are images, base weights, merged checkpoints, and tables of rows, pairs and answers, which
quote data that may not be yours to share. Pictures that pages show stay in the pages.
"""

import argparse
import hashlib
import html
import json
import os
import re
import urllib.parse
import zipfile
from collections.abc import Iterable
from pathlib import Path

from bpo.params import Refusal, outputs_root, params_root, short
from bpo.study import verify
from bpo.study.files import write_whole

PACKED = re.compile(r"[^/]+\.(html|ipynb|json|md|csv)|preview\.png"
                    r"|[^/]+/(manifest\.json|timings\.json|results\.csv)"
                    r"|3_dpo_training/[^/]+/(adapter/[^/]+|(history|compute)\.json)")
# The page that was followed to, or that holds what was; else the index.
ONE_AT_A_TIME = """
article:not(#index, :target, :has(:target)) { display: none; }
body:has(> article:not(#index):is(:target, :has(:target))) > #index { display: none; }
@media print { body > article { display: block !important; } }
"""
SHORTEST_KEY = 8  # characters: "EMPTY" and the like are what local servers take for a key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("study")


def run(options: argparse.Namespace) -> int:
    file = write(options.study)
    with file.open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    page = file.with_suffix(".html")
    print(f"{short(page)}: {page.stat().st_size / 1e6:,.1f} MB, all pages in one file")
    print(f"{short(file)}: {file.stat().st_size / 1e6:,.1f} MB, sha256 {sha256}; its pages show "
          "pictures: look whether you may share them")
    return 0


def write(study: str) -> Path:
    """Writes outputs/STUDY.zip, whole or not at all, and the pages as outputs/STUDY.html; the same
    files give the same bytes.

    Raises Refusal when there is no list of hashes, or a file differs from it or holds a key.
    """
    folder, file = outputs_root() / study, outputs_root() / f"{study}.zip"
    if not (folder / verify.SUMS).is_file():
        raise Refusal(f"{short(folder)}: there is no {verify.SUMS}; run the study, or write the "
                      f"list with python -m bpo report {study}")
    listed = verify.read((folder / verify.SUMS).read_text(encoding="utf-8"))
    chosen = {n: folder / n for n in listed if PACKED.fullmatch(n)}
    chosen |= {f"params/{f.name}": f for f in (params_root() / study).glob("*.yaml")}
    keys, packed, temporary = _keys(chosen.values()), {}, file.with_name(f".{file.name}.tmp")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, source in sorted(chosen.items()):
                content = source.read_bytes() if source.is_file() else b""
                packed[name] = hashlib.sha256(content).hexdigest()
                if packed[name] != listed.get(name, packed[name]):
                    raise Refusal(f"{short(source)} is not as {verify.SUMS} lists it, so nothing "
                                  f"was packed; python -m bpo verify {study} names all such files")
                if variable := next((v for key, v in keys.items() if key in content), ""):
                    raise Refusal(f"{short(source)} holds the value of the environment variable "
                                  f"{variable}, a key, so nothing was packed; take it out there "
                                  "(a new key is safer), run that notebook again")
                archive.writestr(_entry(study, name), content)
            archive.writestr(_entry(study, verify.SUMS), verify.text(packed))
        temporary.replace(file)
        write_whole(file.with_suffix(".html"), one_page(folder))
    finally:
        temporary.unlink(missing_ok=True)
    return file


def one_page(folder: Path) -> str:
    """The index and the pages that it lists as one document, without script: a link to a page is
    one to an article, of which the one that was followed to is shown. Links to other files are
    text."""
    names = ["index", *sorted(f.stem for f in folder.glob("*.html") if f.stem != "index")]
    head, articles = "", ""
    for name in names:
        text = (folder / f"{name}.html").read_text(encoding="utf-8")
        before, _, main = text.partition("<body>")
        head = head or before
        main = re.sub(r"</body>\s*</html>\s*$", "", main)
        # names are of one page alone, and stand in quotes nowhere but in tags
        main = re.sub(r'(\s(?:id|for|name|aria-labelledby)="|\shref="#)(?=[^"])', rf"\g<1>{name}-",
                      main)
        main = re.sub(r'href="(?:\./)?([^"/#:]+)\.html"',
                      lambda m: f'href="#{m[1]}"' if m[1] in names else m[0], main)
        main = re.sub(r'<a\s+href="(?!#|https?:)[^"]*">(.*?)</a>', r"<span>\1</span>", main,
                      flags=re.DOTALL)
        articles += f'<article id="{name}">{main}</article>\n'
    head = re.sub(r'<meta (property="og:image"|name="twitter:card")[^>]*>\n?', "", head)
    return head.replace("</style>", ONE_AT_A_TIME + "</style>", 1) + (
        f"<body>\n{articles}</body>\n</html>\n")


def _entry(study: str, name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(f"{study}/{name}")  # of 1980-01-01: its bytes depend on no day
    entry.compress_type, entry.create_system = zipfile.ZIP_DEFLATED, 3
    entry.external_attr = 0o100644 << 16
    return entry


def _keys(files: Iterable[Path]) -> dict[bytes, str]:
    """Each form in which a file may write a key -> its environment variable: those that the
    study's parameters name, in YAML, manifests and notebooks, and all named like a key or token."""
    named = {v for v in os.environ if v.upper().endswith(("_API_KEY", "_TOKEN"))}
    for file in files:
        if file.suffix in (".yaml", ".json", ".ipynb") and file.is_file():
            found = re.findall(rb"key_variable\W+(\w+)", file.read_bytes())
            named.update(variable.decode() for variable in found)
    keys = {v: key for v in named if len(key := os.environ.get(v, "").strip()) >= SHORTEST_KEY}
    return {form.encode(): v for v, key in keys.items() for text in (key, json.dumps(key)[1:-1])
            for form in (text, html.escape(text), urllib.parse.quote(text, safe=""))}
