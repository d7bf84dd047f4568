"""The built site in a browser: every page, in light and dark, on a telephone and on paper.

make docs && pytest tests/test_site.py
"""

import functools
import json
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from attnzoo.gallery.links import Page
from attnzoo.zoo import load_zoo

ROOT = Path(__file__).parent.parent
SITE = ROOT / "docs" / "_build" / "html"
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
webdriver = pytest.importorskip("selenium.webdriver", reason="the site is visited by selenium")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium and chromedriver are not installed"),
]
needs_site = pytest.mark.skipif(not (SITE / "index.html").exists(), reason="the site is not built: make docs")

LOOK = """
const wide = document.documentElement.clientWidth;
const shown = e => e.getClientRects().length > 0;
const images = [...document.images];
return {
  unlabelled: images.filter(i => !i.hasAttribute("alt") || (!i.alt && !i.closest("a, .sphx-glr-thumbcontainer"))).map(i => i.src),
  broken: images.filter(i => i.complete && !i.naturalWidth).map(i => i.src),
  wide: document.documentElement.scrollWidth > wide ?
    [...document.querySelectorAll("body *")].filter(e => shown(e) && e.getBoundingClientRect().right > wide + 1)
      .slice(0, 3).map(e => e.outerHTML.slice(0, 80)) : [],
};
"""
"""What a page lacks, as JavaScript that selenium runs in it."""
PAPER = """
const title = document.querySelector("h1"), short = e => e.outerHTML.slice(0, 80);
if (!title) return location.pathname == "/search.html" ? [] : ["no title"];
title.scrollIntoView();
const box = title.getBoundingClientRect(), faults = [];
const over = document.elementFromPoint(box.left + 5, box.top + box.height / 2);
if (!over || !title.contains(over)) faults.push("over the title: " + (over && short(over)));
const parts = [...document.querySelectorAll(":is(main, [role=main]) *")].filter(e => e.matches("p, pre, img, table, li")
  && !e.closest("form, details:not([open]), [hidden], .sphx-glr-download-link-note"));
for (const part of parts) {
  if (!part.getClientRects().length) faults.push("hidden: " + short(part));
  if (part.matches("pre") && part.scrollWidth > part.clientWidth + 1) faults.push("cut: " + short(part));
}
return faults.slice(0, 5);
"""
"""What is wrong with a page on paper."""


@dataclass
class Visit:
    """What was wrong with a page, by what was looked at."""

    console: list[str] = field(default_factory=list)
    outside: list[str] = field(default_factory=list)
    unlabelled: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    wide: list[str] = field(default_factory=list)
    paper: list[str] = field(default_factory=list)
    light: list[str] = field(default_factory=list)
    dark: list[str] = field(default_factory=list)


class Browser:
    """Chromium, on pages that it is served.

    Args:
        folder: For what it keeps.
        address: Of the server; what is asked of another is a request to the outside.
    """

    def __init__(self, folder: Path, address: str):
        options = webdriver.ChromeOptions()
        options.binary_location = BROWSER
        for flag in [*FLAGS.split(), f"--user-data-dir={folder}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        self.driver.set_script_timeout(600)
        self.address = address
        self.axe = axe_script()

    def media(self, media: str = "screen", scheme: str = "light") -> None:
        """What the page is shown on."""
        scheme_feature = {"name": "prefers-color-scheme", "value": scheme}
        self.driver.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"media": media, "features": [scheme_feature]}
        )

    def width(self, pixels: int) -> None:
        """How wide the window is."""
        size = {"width": pixels, "height": 900, "deviceScaleFactor": 1, "mobile": pixels < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def open(self, page: str) -> None:
        """Loads a page, pictures that wait for being scrolled to included."""
        self.driver.get(f"{self.address}/{page}")
        loaded = (
            "const done = arguments[0]; const images = [...document.images];"
            "images.forEach(i => i.loading = 'eager');"
            "Promise.allSettled(images.map(i => i.decode())).then(() => done())"
        )
        self.driver.execute_async_script(loaded)

    def violations(self, without: str, **options: Any) -> list[str]:
        """What axe finds of serious and critical things.

        Args:
            without: A selector of what is not looked at.
            **options: Of `axe.run`.
        """
        self.driver.execute_script(f"if (!window.axe) {{ {self.axe} }}")
        what = json.dumps({"exclude": [[without]] if without else []})
        run = f"axe.run({what}, {json.dumps({'resultTypes': ['violations'], **options})}).then(arguments[0])"
        found = self.driver.execute_async_script(run)["violations"]
        return [
            f"{each['id']}: {each['nodes'][0]['html'][:120]} {each['nodes'][0]['failureSummary'][:200]}"
            for each in found
            if each["impact"] in ("serious", "critical")
        ]

    def visit(self, page: str) -> Visit:
        """Everything that is wrong with a page."""
        self.driver.get_log("performance"), self.driver.get_log("browser")
        self.media()
        self.width(1280)
        self.open(page)
        visit = Visit(**self.driver.execute_script(LOOK))
        side = "" if page in ("index.html", "search.html") else ".sidebar-drawer"  # is the same on every page
        visit.light = self.violations(side)
        self.media(scheme="dark")
        visit.dark = self.violations(side, runOnly=["color-contrast"])  # all else is as in the light
        self.media()
        self.width(390)
        visit.wide += self.driver.execute_script(LOOK)["wide"]
        self.width(794)  # A4
        self.media("print")
        visit.paper = self.driver.execute_script(PAPER)
        visit.console = [
            entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"
        ]
        visit.outside = [
            url for url in self.requested() if re.match(rf"(http|ws)s?:(?!{self.address[5:]})", url)
        ]
        return visit

    def requested(self) -> Iterator[str]:
        """What was asked for since the last time."""
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                yield message["params"]["request"]["url"]


def axe_script() -> str:
    """axe-core, as a Python package brings it along."""
    package = pytest.importorskip("selenium_axe_python", reason="axe comes with selenium-axe-python")
    return (Path(package.__file__).parent / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


class Quiet(SimpleHTTPRequestHandler):
    """Files, without a line for each."""

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def serve() -> Iterator[Any]:
    """Serves folders on this machine; called with one it gives the address."""
    servers = []

    def start(folder: Path) -> str:
        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def browse(serve, tmp_path_factory) -> Iterator[Any]:
    """Browsers on folders."""
    browsers = []

    def start(folder: Path) -> Browser:
        browsers.append(Browser(tmp_path_factory.mktemp("profile"), serve(folder)))
        return browsers[-1]

    yield start
    for browser in browsers:
        browser.driver.quit()


@pytest.fixture(scope="module")
def browser(browse) -> Browser:
    """A browser on the site."""
    return browse(SITE)


@pytest.fixture(scope="module")
def visits(browse) -> dict[str, Visit]:
    """Every page of the site, and what is wrong with it."""
    pages = sorted(str(file.relative_to(SITE)) for file in SITE.rglob("*.html"))
    pages = [page for page in pages if not page.startswith("_")]

    def visited(browser: Browser, pages: list[str]) -> dict[str, Visit]:
        return {page: browser.visit(page) for page in pages}

    browsers = [browse(SITE) for _ in range(2)]
    with ThreadPoolExecutor(len(browsers)) as pool:
        halves = pool.map(visited, browsers, [pages[0::2], pages[1::2]])
        return {page: visit for half in halves for page, visit in half.items()}


@needs_site
@pytest.mark.parametrize("what", Visit.__dataclass_fields__)
def test_nothing_is_wrong_with_a_page(visits, what):
    wrong = {page: getattr(visit, what) for page, visit in visits.items() if getattr(visit, what)}
    assert len(visits) > 150
    assert not wrong, json.dumps(wrong, indent=1)[:4000]


def test_what_is_wrong_is_noticed(browse, tmp_path):
    """A page with one fault of each kind, and the same page without."""
    (tmp_path / "favicon.ico").write_bytes(b"")
    good = (
        '<!doctype html><html lang="en"><head><title>Page</title><meta name="viewport" content="width=device-width">'
        "</head><body><main><h1>Page</h1>%s</main></body></html>"
    )
    bad = (
        '<img src="none.png" alt="a picture"><img src="data:image/gif;base64,R0lGODlhAQABAAAAACw=">'
        '<img src="http://outside.invalid/x.png" alt="">'
        '<p style="width: 500px; background: white; color: #ddd">faint</p>'
        "<style>@media (prefers-color-scheme: dark) { h1 { background: black; color: #222 } }"
        "@media print { div { position: fixed; inset: 0; background: white } p { display: none } }</style><div></div>"
        '<pre style="width: 2em; overflow: auto">too long for this</pre>'
        "<script>console.error('a fault')</script>"
    )
    (tmp_path / "good.html").write_text(good % "", encoding="utf-8")
    (tmp_path / "bad.html").write_text(good % bad, encoding="utf-8")
    browser = browse(tmp_path)
    assert browser.visit("good.html") == Visit()
    visit = browser.visit("bad.html")
    assert any("a fault" in line for line in visit.console)
    assert visit.outside == ["http://outside.invalid/x.png"]
    assert [url.partition(":")[0] for url in visit.unlabelled] == ["data", "http"]
    assert any("none.png" in url for url in visit.broken)
    assert visit.wide
    assert [fault.partition(":")[0] for fault in visit.paper] == ["over the title", "hidden", "cut"]
    assert any(fault.startswith("color-contrast: <p") for fault in visit.light)
    assert any("<h1" in fault for fault in visit.dark)


@needs_site
def test_every_public_name_has_its_entry():
    recorded = json.loads((ROOT / "tests" / "api_surface.json").read_text(encoding="utf-8"))
    anchors: set[str] = set()
    for module in recorded:
        anchors |= Page((SITE / "docs" / "api" / f"{module}.html").read_text(encoding="utf-8")).anchors
    public = {f"{module}.{name}" for module, names in recorded.items() for name in names}
    assert {name for name in public if not {name, f"module-{name}"} & anchors} == set()


@needs_site
@pytest.mark.parametrize("name", ["linformer", "cross_covariance", "hadamard", "entropy"])
def test_search_finds_a_component(browser, name):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    browser.media()
    browser.width(1280)
    browser.open("index.html")
    browser.driver.find_element(By.CSS_SELECTOR, "input[name=q]").send_keys(name, Keys.ENTER)
    found = "#search-results a"
    WebDriverWait(browser.driver, 20).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, found))
    first = [each.get_attribute("href") for each in browser.driver.find_elements(By.CSS_SELECTOR, found)][:5]
    assert any(f"/{name}.html" in link for link in first), first


def shown(browser: Browser) -> set[str]:
    """Names on the cards of the overview that can be seen, and the number that is said of them."""
    names = browser.driver.execute_script(
        "return [...document.querySelectorAll('.zoo-cards > li')].filter(e => e.getClientRects().length)"
        ".map(e => e.querySelector('strong').textContent)"
    )
    said = browser.driver.execute_script("return document.querySelector('.zoo-filter output').textContent")
    assert said.split()[0] == str(len(names)), said
    return set(names)


@needs_site
def test_the_overview_shows_what_is_asked_for(browser):
    """By words, by a facet and by both, held to the cards; an address shows the same again."""
    from selenium.webdriver.common.by import By

    zoo = load_zoo()
    causal = {name for name, entry in zoo.mechanisms.items() if "causal" in entry.value.card.masks}
    causal |= {name for name, entry in zoo.fusions.items() if "causal" in entry.value.card.masks}
    browser.media()
    browser.width(1280)
    browser.open("docs/reference/index.html")
    everything = shown(browser)
    assert {*zoo.mechanisms, *zoo.fusions} <= everything
    box = browser.driver.find_element(By.CSS_SELECTOR, "input[name=mask][value=causal]")
    browser.driver.execute_script(
        "arguments[0].closest('details')?.setAttribute('open', ''); arguments[0].click()", box
    )
    assert shown(browser) == causal
    text = browser.driver.find_element(By.NAME, "text")
    text.send_keys("retention")
    both = shown(browser)
    assert "retention" in both and both < causal
    address = browser.driver.current_url.split("/", 3)[3]
    assert "causal" in address and "retention" in address
    browser.open("index.html")
    browser.open(address)
    assert shown(browser) == both
    browser.driver.find_element(By.NAME, "text").send_keys(" no such thing")
    assert shown(browser) == set()


@needs_site
def test_the_overview_works_by_the_keyboard(browser):
    """`/` leads to the words, an arrow from there to the first card, arrows on to the next; Escape clears."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def press(*keys: str) -> Any:
        for key in keys:
            ActionChains(browser.driver).send_keys(key).perform()
        return browser.driver.switch_to.active_element

    browser.media()
    browser.width(1280)
    browser.open("docs/reference/index.html")
    everything = shown(browser)
    assert press("/").get_attribute("name") == "text"
    press(*"linform")
    assert {"linformer"} <= shown(browser) != everything
    assert "linformer" in press(Keys.ARROW_DOWN).get_attribute("href")
    assert press(Keys.ESCAPE).get_attribute("name") == "text"
    browser.driver.execute_async_script("setTimeout(arguments[0], 50)")
    assert shown(browser) == everything
    first = press(Keys.ARROW_DOWN).get_attribute("href")
    second = press(Keys.ARROW_RIGHT).get_attribute("href")
    assert first != second and press(Keys.ARROW_LEFT).get_attribute("href") == first
    press(Keys.ENTER)
    assert browser.driver.current_url == first


@needs_site
def test_the_colours_can_be_chosen_with_the_keyboard(browser):
    """The button for light and dark works by Enter, and the choice is kept on the next page."""
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    browser.media()
    browser.width(1280)
    browser.open("index.html")
    browser.driver.execute_script("localStorage.clear()")
    browser.open("index.html")
    button = next(
        b for b in browser.driver.find_elements(By.CSS_SELECTOR, "button.theme-toggle") if b.is_displayed()
    )
    body = "return getComputedStyle(document.body).backgroundColor"
    light = browser.driver.execute_script(body)
    button.send_keys(Keys.ENTER)
    dark = browser.driver.execute_script(body)
    assert light == "rgb(255, 255, 255)" != dark
    browser.open("docs/recipes.html")
    assert browser.driver.execute_script(body) == dark
    browser.driver.execute_script("localStorage.clear()")
