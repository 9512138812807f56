"""What makes a site of pages that are written for the folder: links that leave `docs/`.

README, CONTRIBUTING and CHANGELOG become pages, pictures from elsewhere are copied. Whatever else lies
outside `docs/` becomes a link into the repository where `mkdocs.yml` names one (`repo_url`), and plain text
where not.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from mkdocs.structure.files import File, Files
from pymdownx.slugs import slugify

ROOT = Path(__file__).resolve().parent.parent.parent
TOP = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
SOURCES = {page: source for source, page in TOP.items()}
FENCES = re.compile(r"(^```.*?^```$)", re.M | re.S)
# A link or picture; a span of code is passed over, unless it stands in the text of a link.
LINK = re.compile(r"`[^`\n]*`|(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]+)(#[^()\s]*)?\)")


def on_config(config: Any) -> Any:
    """Headings get the anchors that code hosts give them, so that a link fits both."""
    config.mdx_configs["toc"]["slugify"] = slugify(case="lower")
    return config


def on_files(files: Files, config: Any) -> Files:
    """The pages that lie beside `docs/` are added."""
    for source, page in TOP.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of one page, as the site needs them; blocks of code stay as they are."""
    folder = PurePosixPath("docs", page.file.src_uri).parent
    source = (
        PurePosixPath(SOURCES.get(page.file.src_uri, "docs/x")).parent if folder.name == "docs" else folder
    )
    parts = FENCES.split(markdown)
    parts[::2] = [LINK.sub(lambda found: _link(found, source, config, files), part) for part in parts[::2]]
    return "".join(parts)


def _link(found: re.Match[str], source: PurePosixPath, config: Any, files: Files) -> str:
    """The link of a page in the folder `source` of the repository, for a page at the top of the site."""
    picture, text, target, anchor = found.groups()
    if target is None or "://" in target or target.startswith("mailto:"):
        return found[0]
    place = normpath(str(source / target))
    if place.startswith("docs/"):
        return f"{picture}[{text}]({place.removeprefix('docs/')}{anchor or ''})"
    if place in TOP:
        return f"[{text}]({TOP[place]}{anchor or ''})"
    if not (ROOT / place).exists():
        return found[0]  # which the build then reports
    if picture:
        return f"![{text}]({_copied(place, config, files)})"
    return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{place})" if config.repo_url else text


def _copied(place: str, config: Any, files: Files) -> str:
    """Where the site holds a copy of a picture of the repository."""
    name = f"copied/{place}"
    if files.get_file_from_path(name) is None:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / place)))
    return name
