#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Fails if a page of the site links to what is not there, or takes anything from a network:
check_links.py SITE"""
import html.parser
import pathlib
import sys
import urllib.parse

LINKS = {"a": "href", "link": "href", "img": "src", "script": "src", "iframe": "src", "area": "href"}


class Page(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.names = [], set()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.names.update(values[key] for key in ("id", "name") if values.get(key))
        if values.get(LINKS.get(tag, "")):
            self.links.append((tag, values[LINKS[tag]]))


def main():
    site = pathlib.Path(sys.argv[1])
    pages = {}
    for path in sorted(site.glob("*.html")):
        pages[path.name] = Page()
        pages[path.name].feed(path.read_text(encoding="utf-8"))
    if "index.html" not in pages or len(pages) < 50:
        sys.exit(f"{site} holds {len(pages)} pages, which is no site")
    wrong, links = [], 0
    for name, page in pages.items():
        for tag, link in page.links:
            url = urllib.parse.urlsplit(link)
            if url.scheme == "javascript":
                continue
            links += 1
            if url.scheme or url.netloc:
                if tag != "a":
                    wrong.append(f"{name}: takes {link} from elsewhere")
                continue
            path = urllib.parse.unquote(url.path) or name
            fragment = urllib.parse.unquote(url.fragment)
            if not (site / path).exists():
                wrong.append(f"{name}: there is no {link}")
            elif fragment and path in pages and fragment not in pages[path].names:
                wrong.append(f"{name}: {path} has no place {fragment}")
    print("\n".join(wrong) or f"{len(pages)} pages, {links} links")
    if wrong:
        sys.exit(1)


main()
