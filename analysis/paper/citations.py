r"""The BibTeX entries that a text cites: papers and tools, and models and data of the hub.

Invariant: an entry comes from analysis/paper/references.bib, which people checked, or states only a
pin. No author or year is invented.
"""

import re
from collections.abc import Iterable, Sequence
from importlib.resources import files

from ebbline.analysis.paper.latex import breakable
from ebbline.analysis.report.provenance import Build, Pin
from ebbline.tasks.errors import StudyError

PAPERS = ("lermen2023lora", "gade2023badllama", "hsu2024safelora")
EBBLINE = "ebbline"


def cited(text: str) -> list[str]:
    """The keys that a Markdown text cites in pandoc syntax, `[@one; @two]`.

    Each key appears once, in the order of first use.
    """
    groups = re.findall(r"\[(@[^\]]+)\]", text)
    return list(
        dict.fromkeys(key.strip().removeprefix("@") for group in groups for key in group.split(";"))
    )


def library() -> dict[str, str]:
    """Key -> BibTeX entry of the papers and tools that ebbline can cite."""
    text = files("ebbline.analysis.paper").joinpath("references.bib").read_text("utf-8")
    entries = [f"@{entry.rstrip()}\n" for entry in re.split(r"^@", text, flags=re.MULTILINE)[1:]]
    return {entry[entry.index("{") + 1 : entry.index(",")]: entry for entry in entries}


def pin_key(pin: Pin) -> str:
    """The citation key of a model or data set of the hub: `hub-meta-llama-Llama-2-7b-hf`."""
    return f"hub-{pin.name.replace('/', '-')}" + (
        f"-{re.sub(r'[^A-Za-z0-9.-]', '-', pin.file)}" if pin.file else ""
    )


def bibliography(keys: Iterable[str], pins: Sequence[Pin], build: Build) -> str:
    """The entries of `keys`, in order. Raises StudyError for a key without an entry."""
    found = {
        **library(),
        **{pin_key(pin): _pinned(pin) for pin in pins if pin.hub},
        EBBLINE: _tool(build),
    }
    missing = [key for key in keys if key not in found]
    if missing:
        raise StudyError(
            f"no entry for the references {missing}; analysis/paper/references.bib "
            f"has {sorted(library())}"
        )
    return "\n".join(found[key] for key in keys)


def _pinned(pin: Pin) -> str:
    kind = "" if pin.is_model else "datasets/"
    note = [
        f"commit {breakable(pin.commit or 'unknown')}",
        *([f"file \\path{{{pin.file}}}"] if pin.file else []),
    ]
    return _misc(
        pin_key(pin),
        rf"\path{{{pin.name}}}",
        rf"\url{{https://huggingface.co/{kind}{pin.name}}}",
        ", ".join(note),
    )


def _tool(build: Build) -> str:
    note = f"version {build.version}" + (
        f", commit {breakable(build.commit)}" if build.commit else ""
    )
    return _misc(
        EBBLINE,
        "ebbline: how far a chat model's refusals ebb when it is fine-tuned, and what "
        "brings them back",
        None,
        note,
    )


def _misc(key: str, title: str, where: str | None, note: str) -> str:
    lines = [
        f"  title = {{{{{title}}}}},",
        *([f"  howpublished = {{{where}}},"] if where else []),
        f"  note = {{{note}}},",
    ]
    return "\n".join([f"@misc{{{key},", *lines, f"  key = {{{key}}},", "}", ""])
