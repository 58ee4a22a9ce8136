"""A real LaTeX: documents of both templates' widths around an export, compiled. Tests that need it
skip where it is not installed.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

PACKAGES = {"article.cls": "texlive-latex-base", "booktabs.sty": "texlive-latex-recommended"}
PREAMBLES = {  # widths as in neurips_2024.sty and acl.sty
    "neurips": r"\documentclass[10pt]{article}\setlength{\textwidth}{5.5in}"
    r"\setlength{\textheight}{9in}",
    "acl": r"\documentclass[11pt,twocolumn]{article}\setlength{\textwidth}{16cm}"
    r"\setlength{\columnsep}{0.6cm}"
    r"\setlength{\textheight}{24.7cm}\setlength{\topmargin}{-2cm}\setlength{\oddsidemargin}{0cm}",
}


def missing() -> list[str]:
    """The Debian packages that a test lacks."""
    if shutil.which("kpsewhich") is None:
        return list(PACKAGES.values())
    return [
        package
        for file, package in PACKAGES.items()
        if subprocess.run(["kpsewhich", file], capture_output=True).returncode != 0
    ]


needs_latex = pytest.mark.skipif(
    bool(missing()), reason=f"needs {' and '.join(missing())} from Debian"
)


def compiled(style: str, body: str, folder: Path, bibliography: bool = False) -> str:
    """LaTeX's log of the last of its runs over a document with `body`; the PDF is FOLDER/STYLE.pdf.
    Fails when it does not compile.
    """
    folder.mkdir(parents=True, exist_ok=True)
    source = (
        rf"{PREAMBLES[style]}\usepackage{{booktabs,graphicx,url}}"
        rf"\begin{{document}}{body}\end{{document}}"
    )
    (folder / f"{style}.tex").write_text(source, "utf-8")
    latex = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", style]
    for command in [latex, *([["bibtex", style], latex] if bibliography else []), latex]:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, errors="replace", timeout=120
        )
        assert done.returncode == 0, done.stdout
        if command[0] == "bibtex":
            assert "Warning" not in done.stdout, done.stdout
    return (folder / f"{style}.log").read_text("utf-8", errors="replace")
