"""The pages of the site: those that the navigation names, and whatever they link to, from anywhere in the repository.

mkdocs knows one folder of pages. Here the repository's root takes its place, so a link that works in the repository
works on the site. Addresses are paths in the repository, without `docs/`.
"""

import posixpath
import re
from pathlib import Path

from markdown import Extension, Markdown
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)")
LIST = "index.md"  # of a folder that a page links to
PROGRAM = re.compile(r"^\[(examples/\w+\.py)\]\([^)]+\)$", re.MULTILINE)
CODE = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


class TwoSpaces(Extension):
    """Lists within lists are indented by two spaces, as on GitHub."""

    def extendMarkdown(self, md: Markdown) -> None:
        """As Markdown asks for it, of the first extension, before others add to the parser."""
        md.tab_length = 2
        md.build_parser()


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Read lists as they are written here."""
    config.markdown_extensions.insert(0, TwoSpaces())  # type: ignore[arg-type]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The theme's files, the pages of the navigation, and what is reached from these by links."""
    kept = [file for file in files if file.src_dir != config.docs_dir]
    waiting = [*_named(config.nav), *(f"docs/{name}" for name in config.extra_css)]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen or (text := _text(path)) is None:  # mkdocs itself tells of links that lead nowhere
            continue
        seen.add(path)
        kept.append(_file(path, text, config))
        if path.endswith(".md"):
            waiting += [_target(posixpath.dirname(path), link) for link in LINK.findall(CODE.sub("", text))]
    return Files(kept)


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """A link to a folder leads to the list of its files; a program that stands alone is shown."""
    here = posixpath.dirname(page.file.src_uri)
    markdown = PROGRAM.sub(lambda line: f"{line[0]}\n\n```python\n{_program(line[1])}```", markdown)
    return LINK.sub(lambda link: posixpath.relpath(_target(here, link[1]), here or "."), markdown)


def _program(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def _named(nav: object) -> list[str]:
    """The pages of a navigation."""
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in _named(part)]


def _target(here: str, link: str) -> str:
    """The path of a linked file in the repository; of a folder, that of its list."""
    path = posixpath.normpath(posixpath.join(here, link))
    return posixpath.join(path, LIST) if (ROOT / path).is_dir() else path


def _text(path: str) -> str | None:
    """The text of a file; of a folder's list, one that names its files; nothing of images. None if there is no file."""
    file = ROOT / path
    if file.is_file():
        return file.read_text(encoding="utf-8") if file.suffix == ".md" else ""
    if file.name != LIST or not file.parent.is_dir():
        return None
    names = sorted(each.relative_to(file.parent).as_posix() for each in file.parent.rglob("*") if each.is_file())
    return "\n".join([f"# {posixpath.dirname(path)}\n", *(f"- [{name}]({name})" for name in names), ""])


def _file(path: str, text: str, config: MkDocsConfig) -> File:
    """A file of the repository as one of the site."""
    place = File(path.removeprefix("docs/"), str(ROOT), config.site_dir, config.use_directory_urls).dest_uri
    if (ROOT / path).is_file():
        return File(path, str(ROOT), config.site_dir, config.use_directory_urls, dest_uri=place)
    file = File.generated(config, path, content=text)
    file.dest_uri = place
    return file
