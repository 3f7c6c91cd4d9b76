"""What the documents say is true: their links lead somewhere and their settings files are accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edge.alerts.message import NoticeKind
from edge.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```yaml\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
SETTINGS_FILES = [(page, block) for page in PAGES for block in BLOCK.findall(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if "://" not in link]
    missing = [link for link in targets if not (page.parent / link).exists()]

    assert missing == []


def test_documents_hold_a_settings_file() -> None:
    assert {page.name for page, _ in SETTINGS_FILES} >= {"README.md", "operations.md"}


@pytest.mark.parametrize(("page", "text"), SETTINGS_FILES, ids=[page.name for page, _ in SETTINGS_FILES])
def test_settings_in_documents_are_accepted(tmp_path: Path, page: Path, text: str) -> None:
    (tmp_path / "box.yaml").write_text(text, encoding="utf-8")

    settings = load_settings(tmp_path / "box.yaml")

    assert settings.cameras, page


def test_every_kind_of_notice_is_explained() -> None:
    formats = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    missing = [kind.value for kind in NoticeKind if f".{kind.value.split('.', 1)[1]}`" not in formats]

    assert missing == []
