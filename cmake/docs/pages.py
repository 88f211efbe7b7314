#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""The pages of the site, which are Markdown as code hosts show it.

pages.py PAGE.md          prints the page as Doxygen wants it (its filter)
pages.py --check          fails if a relative link of a page leads to no file or heading, the README is too long or
                          its guide lists not all pages, or a member of a configuration or a call is not in parameters.md
pages.py --list           prints the pages
pages.py --guide          prints a page that lists them, which the README's guide is made of

A heading gets the label that links to it use, a link to another page becomes a reference, one to a file
that is no page stays as its text, a page of many sections gets a table of contents, and mathematics ($`…`$ and
fences of math) becomes that of Doxygen.
"""
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = {
    "README.md": "mainpage",
    "benchmarks/README.md": "benchmarks",
    "benchmarks/many_machines.md": "thousand_machines",
    "examples/README.md": "example_programs",
    ".github/CONTRIBUTING.md": "contributing",
    ".github/SECURITY.md": "security",
}
PAGES.update({f"cmake/docs/{path.name}": path.stem for path in sorted((ROOT / "cmake/docs").glob("*.md"))})
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.M | re.S)
SPAN = re.compile(r"`[^`]+`")
GUIDE = re.compile(r"^## Guide\n.*?^(- .*?)\n\n", re.M | re.S)
LONG = 4  # sections, from which on a page has a table of contents
HEADING = re.compile(r"^(#+) (.+)$", re.M)
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def slug(heading):
    """The name that code hosts give to a heading."""
    text = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return text.replace(" ", "-")


def outside_of_fences(text, change):
    parts, end = [], 0
    for code in FENCE.finditer(text):
        parts += [change(text[end:code.start()]), code[0]]
        end = code.end()
    return "".join(parts + [change(text[end:])])


def headings(text):
    return [slug(found[2]) for found in HEADING.finditer(FENCE.sub("", text))]


def resolve(page, link):
    """The file of the repository that a link of a page names, and the heading."""
    path, _, heading = link.partition("#")
    target = (ROOT / page).parent / path if path else ROOT / page
    return target.resolve(), heading


def is_relative(link):
    return not re.match(r"[a-z]+:", link)


def label(page, heading=""):
    name = PAGES[page]
    return f"{name}_{heading.replace('-', '_')}" if heading else name


def for_doxygen(page):
    text = (ROOT / page).read_text(encoding="utf-8")

    def link(found):
        picture, said, to = found.groups()
        if not is_relative(to):
            return found[0]
        target, heading = resolve(page, to)
        name = target.relative_to(ROOT).as_posix()
        if picture:
            return f'\n<div class="picture"><img src="{target.name}" alt="{said}"/></div>\n'
        said = said.replace("`", "")  # Doxygen shows them within a link
        return f"[{said}](@ref {label(name, heading)})" if name in PAGES else said

    first, sections = True, FENCE.sub("", text).count("\n## ")

    def heading(found):
        nonlocal first
        name = label(page) if first else label(page, slug(found[2]))
        contents = "\n\n[TOC]\n" if first and page != "README.md" and sections >= LONG else ""
        first = False
        return f"{found[0]} {{#{name}}}{contents}"

    def fence(found):
        language, body = found.groups()
        if language == "math":
            return "\\f[\n" + body + "\\f]"
        known = f"{{.{language}}}" if language in ("cpp", "python") else ""
        return f"```{known}\n{body}```"

    text = outside_of_fences(text, lambda part: LINK.sub(link, part))
    text = outside_of_fences(text, lambda part: HEADING.sub(heading, part))
    text = re.sub(r"\$`([^`]+)`\$", r"\\f$\1\\f$", text)
    # Doxygen ends a span of code at an apostrophe, unless it has two marks.
    text = outside_of_fences(text, lambda part: SPAN.sub(
        lambda span: f"`{span[0]}`" if "'" in span[0] else span[0], part))
    return FENCE.sub(fence, text)


def guide():
    """The page that lists all others: what the README's guide lists, as the pages below it, in its order."""
    listed = GUIDE.search((ROOT / "README.md").read_text(encoding="utf-8"))[1]

    def below(found):
        name = resolve("README.md", found[3])[0].relative_to(ROOT).as_posix()
        return f'\\subpage {label(name)} "{found[2]}"'

    return "# Guide {#guide}\n\n" + LINK.sub(below, listed)


def members():
    """Those of the structures that configure and call, as (structure, member)."""
    for header in sorted((ROOT / "include/local_mha").rglob("*.hpp")):
        text = header.read_text(encoding="utf-8")
        for found in re.finditer(r"^struct (\w+(?:Config|Call|Options)) \{(.*?)^\};", text, re.M | re.S):
            for member in re.finditer(r"^  [\w:<>, ]+ (\w+)(?: = [^;(]*)?;", found[2], re.M):
                yield found[1], member[1]


def check():
    wrong, links = [], 0
    for page in PAGES:
        text = FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))
        for _, _, to in LINK.findall(text):
            if not is_relative(to):
                continue
            links += 1
            target, heading = resolve(page, to)
            if not target.exists():
                wrong.append(f"{page}: there is no {to}")
            elif heading and heading not in headings(target.read_text(encoding="utf-8")):
                wrong.append(f"{page}: {to} has no such heading")
    missing = [page for page, name in PAGES.items() if name != "mainpage" and f"\\subpage {name} " not in guide()]
    wrong += [f"README.md: the guide does not list {page}" for page in missing]
    parameters = (ROOT / "cmake/docs/parameters.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"\w+", " ".join(re.findall(r"`([^`\n]+)`", parameters))))
    known = 0
    for structure, member in members():
        known += 1
        if structure not in listed or member not in listed:
            wrong.append(f"cmake/docs/parameters.md has no {structure}::{member}")
    if known < 80:
        wrong.append(f"only {known} members of configurations were found")
    readme = len((ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    if readme > 300:
        wrong.append(f"README.md has {readme} lines, more than 300: long parts belong into the guide")
    print("\n".join(wrong) or f"{len(PAGES)} pages, {links} links, {known} members")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    if sys.argv[1:] == ["--check"]:
        check()
    elif sys.argv[1:] == ["--guide"]:
        print(guide())
    elif sys.argv[1:] == ["--list"]:
        print("\n".join(PAGES))
    elif len(sys.argv) == 2:
        print(for_doxygen(pathlib.Path(sys.argv[1]).resolve().relative_to(ROOT).as_posix()))
    else:
        sys.exit(__doc__)
