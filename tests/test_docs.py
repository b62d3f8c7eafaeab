"""README and docs: their Python runs, and what they name is there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest
import torch

import torchsparse

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "torchsparse"
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
WITH_CODE = {
    "README.md",
    "docs/beyond-convolution.md",
    "docs/choosing-a-dataflow.md",
    "docs/compile.md",
    "docs/conventions.md",
    "docs/deployment.md",
    "docs/how-it-works.md",
    "docs/migration.md",
    "docs/models.md",
    "docs/points.md",
    "docs/training.md",
}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[tuple[int, str]]:
    """(line, code) of the fenced blocks of a page in a language."""
    text = page.read_text("utf-8")
    found = re.finditer(rf"^```{language}\n(.*?)^```$", text, re.S | re.M)
    return [(text.count("\n", 0, m.start(1)), m.group(1)) for m in found]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)


def spans(page: Path) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def test_the_pages_with_code_are_the_known_ones() -> None:
    """The next test would pass on pages whose blocks it does not recognise."""
    found = {str(page.relative_to(ROOT)) for page in PAGES if blocks(page, "python")}
    assert found == WITH_CODE


@each_page
def test_the_code_of_a_page_runs(page: Path) -> None:
    """Its blocks one after the other, as somebody would type them."""
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__docs__"}
    for line, code in blocks(page, "python"):
        exec(compile("\n" * line + code, str(page), "exec"), names)


def test_the_example_of_the_readme_has_ten_lines_or_so() -> None:
    code = blocks(ROOT / "README.md", "python")[0][1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 11


def anchors(page: Path) -> set[str]:
    """What a link may point to within a page."""
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@each_page
def test_named_files_exist(page: Path) -> None:
    for span in spans(page):
        if re.fullmatch(r"[\w.\-]+(/[\w.\-]+)*\.(py|md|toml|npz)|(tests|docs)/[\w/]+", span):
            places = [ROOT / span, SOURCE / span]
            assert any(place.exists() for place in places), span


@each_page
def test_named_objects_exist(page: Path) -> None:
    """`torchsparse.a.b.c`, `F.name`."""
    for span in spans(page):
        name = re.fullmatch(r"((?:torchsparse|F)(?:\.\w+)+)(?:[\s(=].*)?", span)
        if name is None:
            continue
        head, *parts = name[1].split(".")
        path = ["torchsparse", *(["nn", "functional"] if head == "F" else []), *parts]
        thing = torchsparse
        for depth, part in enumerate(path[1:], 2):
            if not hasattr(thing, part):
                importlib.import_module(".".join(path[:depth]))
            thing = getattr(thing, part)


@each_page
def test_named_commands_exist(page: Path) -> None:
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text("utf-8"), re.M)
    commands = {path.stem for path in (SOURCE / "cli").glob("*.py")}
    shell = "\n".join(code for _, code in blocks(page, "sh"))
    text = shell + "\n" + "\n".join(spans(page))
    for target in re.findall(r"(?:^|\s)make (\w+)", text):
        assert target in targets, f"make {target}"
    for command in re.findall(r"^torchsparse (\w+)", text, re.M):
        assert command in commands, f"torchsparse {command}"
    for script in re.findall(r"^python (\S+\.py)", text, re.M):
        assert (ROOT / script).exists(), script


def test_the_readme_opens_with_the_two_commands() -> None:
    first = blocks(ROOT / "README.md", "sh")[0][1].splitlines()
    assert [line.split()[:2] for line in first] == [["make", "demo"], ["make", "test"]]


def test_the_changelog_knows_this_version() -> None:
    heads = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.M)
    assert heads[0] == torchsparse.__version__
