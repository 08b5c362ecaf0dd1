"""For mkdocs: pages link to files of the repository beside docs/; the site holds copies of them, so that none breaks.

Markdown keeps its links as GitHub follows them. Other pages of the repository (CONTRIBUTING.md, and the like) become
pages of the site; scripts, run files and pictures are copied as they are.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)((?:#[^)\s]*)?\))")
BESIDE = "repository"  # folder of the site that holds what lies beside docs/


def on_files(files: Any, config: Any) -> Any:
    """Add every file beside docs/ that a page links to, and what those link to in turn."""
    waiting = [(Path("docs") / file.src_uri, (ROOT / "docs" / file.src_uri)) for file in files.documentation_pages()]
    seen: set[str] = set()
    while waiting:
        place, source = waiting.pop()
        for target in linked(place, source.read_text(encoding="utf-8")):
            if target in seen or target.startswith("docs/") or not (ROOT / target).is_file():
                continue
            seen.add(target)
            path = ROOT / target
            if target.endswith(".md"):
                content = rewritten(Path(target), path.read_text(encoding="utf-8"))
                files.append(File.generated(config, f"{BESIDE}/{target}", content=content))
                waiting.append((Path(target), path))
            else:
                files.append(File.generated(config, f"{BESIDE}/{target}", content=path.read_bytes()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links of a page of docs/ that leave docs/, into the copies; generated pages have theirs already."""
    if page.file.src_uri.startswith(f"{BESIDE}/"):
        return markdown
    return rewritten(Path("docs") / page.file.src_uri, markdown)


def linked(place: Path, text: str) -> list[str]:
    """Paths in the repository that a page links to."""
    return [resolved(place, link) for _, link, _ in LINK.findall(text) if "://" not in link]


def resolved(place: Path, link: str) -> str:
    """Where a link of the page at `place` leads, from the repository's root."""
    return posixpath.normpath(posixpath.join(place.parent.as_posix(), link))


def rewritten(place: Path, text: str) -> str:
    """The page with its links as they are in the site."""
    here = in_site(place.as_posix())

    def link(match: re.Match[str]) -> str:
        if "://" in match[2]:
            return match[0]
        target = resolved(place, match[2])
        folder = ROOT / target
        if folder.is_dir() and (folder / "README.md").is_file():
            target = f"{target}/README.md"
        return match[1] + posixpath.relpath(in_site(target), posixpath.dirname(here)) + match[3]

    return LINK.sub(link, text)


def in_site(target: str) -> str:
    """A path of the repository as a path of the site's sources."""
    return target.removeprefix("docs/") if target.startswith("docs/") else f"{BESIDE}/{target}"
