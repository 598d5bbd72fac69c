"""Hooks of the docs site: links to files that are no pages lead to the repository."""

import posixpath
import re
from typing import Any

OUTSIDE = ("benchmarks", "configs", "examples", "logitmix", "tests", "README.md", "CHANGELOG.md", "CONTRIBUTING.md")
NO_PAGE = "docs/results/tiny/index.html"  # the site has the README beside it


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    folder = posixpath.dirname(f"docs/{page.file.src_uri}")

    def to_repository(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[1]))
        if target.startswith(OUTSIDE) or target == NO_PAGE:
            return f"]({config.repo_url}/blob/main/{target}{match[2] or ''})"
        return match[0]

    return re.sub(r"\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)", to_repository, markdown)
