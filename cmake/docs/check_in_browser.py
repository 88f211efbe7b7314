#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Opens the site in a headless browser, from a server on this machine, and fails unless each page of the guide
and of the reference fits into 360 pixels of width and shows no marks of Markdown, its mathematics is typeset, and the
search finds a class:
check_in_browser.py CHROMIUM SITE"""
import functools
import http.server
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import threading

sys.dont_write_bytecode = True  # into the folder of the sources
from pages import PAGES

CHECK = """<!doctype html><meta charset="utf-8"><title>check</title>
<iframe id="page" style="width:360px;height:740px;border:0"></iframe><pre id="result"></pre>
<script>
const frame = document.getElementById('page');
const wait = ms => new Promise(done => setTimeout(done, ms));
const open = name => new Promise(done => { frame.onload = done; frame.src = name; });
async function until(condition) {
  for (let i = 0; i < 400; ++i) { if (condition()) return true; await wait(25); }
  return false;
}
async function check() {
  const result = {};
  for (const name of PAGES) {
    await open(name);
    const document = frame.contentDocument, window = frame.contentWindow;
    const formulas = () => document.querySelectorAll('script[type^="math/tex"]').length;
    const ready = () => document.querySelectorAll('.MathJax_SVG svg').length;
    const raw = /\\\\[(\\[]/.test(document.querySelector('.contents').innerText);
    const mathematics = raw || formulas() > 0;
    if (mathematics) await until(() => formulas() > 0 && ready() >= formulas());
    const scrolls = e => e && (/auto|scroll|hidden/.test(window.getComputedStyle(e).overflowX) || scrolls(e.parentElement));
    const wide = [...document.querySelectorAll('.contents *, #top *, .header *')].filter(
        e => e.getBoundingClientRect().right > 360 && !scrolls(e.parentElement));
    result[name] = {wide: wide.slice(0, 2).map(e => e.tagName + '.' + e.className), width: document.documentElement.scrollWidth, formulas: formulas(), typeset: ready(),
                    pictures: [...document.images].filter(i => !i.naturalWidth).length,
                    marks: [...document.querySelectorAll('.contents p, .contents td, .contents li, .contents dd')].filter(
                        e => /`|(^|[^(])[*]{2}/.test(e.innerText)).map(e => e.innerText.slice(0, 60)).slice(0, 2),
                    broken: /\\\\[(\\[]/.test(document.querySelector('.contents').innerText)};
  }
  await open('index.html');
  const window = frame.contentWindow, document = frame.contentDocument;
  await until(() => document.getElementById('MSearchField'));
  const field = document.getElementById('MSearchField');
  field.value = 'LocalMHA';
  window.searchBox.OnSearchFieldFocus(true);
  window.searchBox.Search();
  const found = () => {
    const results = document.getElementById('MSearchResults');
    const inside = results && (results.contentDocument || results);
    const text = inside && (inside.body ? inside.body.innerText : inside.innerText);
    return text && text.includes('LocalMHA');
  };
  result.search = await until(found);
  document.title = 'done';
  window.parent.document.getElementById('result').textContent = 'RESULT' + JSON.stringify(result) + 'END';
}
check();
</script>
"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


def main():
    chromium, site = sys.argv[1], pathlib.Path(sys.argv[2])
    pages = ["index.html", "guide.html"] + [f"{name}.html" for name in PAGES.values() if name != "mainpage"]
    names = sorted(path.name for path in site.glob("*.html"))
    pages += ["annotated.html"]
    pages += [name for name in names if re.match(r"(class|struct|union|concept|namespace)local__mha(?!.*-members)", name)
              or name.endswith("_8hpp.html")]
    if "classlocal__mha_1_1LocalMHA.html" not in pages or len(pages) < 150:
        sys.exit(f"{site} holds {len(pages)} pages, which is no site")
    check = site / "check_in_browser.html"
    check.write_text(CHECK.replace("PAGES", json.dumps(pages)), encoding="utf-8")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with tempfile.TemporaryDirectory() as profile:
            dom = subprocess.run(
                [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
                 "--disable-background-networking", "--disable-component-update", "--disable-sync",
                 f"--user-data-dir={profile}", "--virtual-time-budget=120000", "--timeout=120000", "--dump-dom",
                 f"http://127.0.0.1:{server.server_port}/{check.name}"],
                capture_output=True, text=True, timeout=300).stdout
    finally:
        server.shutdown()
        check.unlink()
    found = re.search(r"RESULT(\{.*\})END", dom)
    if not found:
        sys.exit("the browser gave no result")
    result = json.loads(found[1])
    wrong = []
    for name in pages:
        said = result[name]
        print(name, said)
        if said["width"] > 360:
            wrong.append(f"{name} is {said['width']} pixels wide, because of {said['wide']}")
        if said["typeset"] < said["formulas"] or said["broken"]:
            wrong.append(f"{name} has {said['formulas']} formulas, {said['typeset']} of them typeset")
        if said["marks"]:
            wrong.append(f"{name} shows marks of Markdown: {said['marks']}")
        if said["pictures"]:
            wrong.append(f"{name} has {said['pictures']} pictures that are not there")
    if result["costs.html"]["formulas"] < 5:
        wrong.append("costs.html has no mathematics")
    if not result["search"]:
        wrong.append("the search does not find LocalMHA")
    if wrong:
        sys.exit("\n".join(wrong))


main()
