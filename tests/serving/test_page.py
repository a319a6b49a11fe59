"""The pages as people use them: in a real browser, on a server that answers."""

import json
import re
import shutil
import string
import urllib.parse
from pathlib import Path

import httpx
import pytest

import tfrec
from tfrec.serving.keys import Keys

pytest.importorskip("playwright", reason="needs the package playwright")
from playwright.sync_api import Page, expect, sync_playwright

pytestmark = pytest.mark.slow

TEXTS = Path(tfrec.__file__).parent / "serving" / "web" / "texts"
SIZES = {"phone": (390, 844), "desktop": (1440, 900)}
NAMED = re.compile(r"""\bt\("([\w.]+)"[,)]|data-t[-\w]*="([\w.]+)\"""")
REFUSED = "net::ERR_CONNECTION_REFUSED"


@pytest.fixture(scope="module")
def chromium():
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("there is no chromium; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


class Visit:
    """A page in a browser window of its own, and what went wrong on it."""

    def __init__(self, browser, url: str, size: str = "desktop", **told) -> None:
        width, height = SIZES[size]
        told = {"locale": "en-GB", "reduced_motion": "reduce", **told}
        self.context = browser.new_context(viewport={"width": width, "height": height}, **told)
        self.url, self.errors, self.asked = url, [], []
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", self._said)
        self.page.on("request", lambda request: self.asked.append(request.url))

    def _said(self, message) -> None:
        if message.type in ("error", "warning"):
            self.errors.append(message.text)

    def open(self, path: str = "/") -> Page:
        self.page.goto(self.url + path)
        self.page.wait_for_selector("html[data-ready]")
        return self.page

    def as_user(self, user: str) -> Page:
        page = self.open()
        page.get_by_role("button", name="Pick a user").click()
        page.get_by_role("searchbox", name="Search users").fill(user)
        page.locator(f'dialog [data-user="{user}"]').click()
        expect(page.get_by_role("heading", level=1)).to_have_text(f"User {user}")
        settled(page)
        return page


@pytest.fixture
def visits(chromium, server_url):
    """Opens windows on the shared server; no page of them may say anything in the console."""
    opened: list[Visit] = []

    def visit(size: str = "desktop", url: str = server_url, **told) -> Visit:
        opened.append(Visit(chromium, url, size, **told))
        return opened[-1]

    yield visit
    for one in opened:
        one.context.close()
    for one in opened:
        assert one.errors == []


def settled(page: Page) -> None:
    """Waits until no list is being fetched."""
    expect(page.locator("#shelves")).to_have_attribute("aria-busy", "false")
    expect(page.locator(".card:not(.ghost)").first).to_be_visible()


def shelf(page: Page, name: str) -> list[str]:
    """Ids of the items of one shelf."""
    cards = page.locator(f'[data-shelf="{name}"] .card')
    return cards.evaluate_all("cards => cards.map((card) => card.dataset.item)")


def everything(page: Page) -> set[str]:
    cards = page.locator("#shelves .card")
    return set(cards.evaluate_all("cards => cards.map((card) => card.dataset.item)"))


def card(page: Page, item: str):
    return page.locator(f'.card[data-item="{item}"]').first


def like(page: Page, item: str) -> None:
    card(page, item).get_by_role("button", name="Like").click()
    expect(page.locator("#heard")).to_contain_text("because you liked")
    settled(page)


def search(page: Page, words: str) -> None:
    page.get_by_role("searchbox", name="Search").fill(words)
    expect(page.get_by_role("heading", name=f"Found for “{words}”")).to_be_visible()
    settled(page)


class TestVisitor:
    def test_somebody_new_is_welcomed_with_what_is_popular(self, visits):
        page = visits().open()
        expect(page.get_by_role("heading", level=1)).to_have_text("What would you enjoy next?")
        assert shelf(page, "popular")
        assert page.locator("[data-shelf]").count() == 1

    def test_a_user_is_picked_and_gets_his_shelves(self, visits, server_url):
        page = visits().as_user("u3")
        answer = httpx.post(f"{server_url}/v1/shelves", json={"user_id": "u3", "k": 16}).json()
        expected = {one["key"]: one for one in answer["shelves"]}
        for name in ("for_you", "popular"):
            assert shelf(page, name) == [one["item_id"] for one in expected[name]["items"]]

    def test_a_like_changes_the_lists_and_the_page_says_how(self, visits, server_url):
        page = visits().as_user("u5")
        before = shelf(page, "for_you")
        like(page, before[0])
        after = shelf(page, "for_you")
        assert before[0] not in after
        assert after != before[1:]
        answer = httpx.post(f"{server_url}/v1/shelves", json={"user_id": "u5", "k": 16}).json()
        assert after == [one["item_id"] for one in answer["shelves"][0]["items"]]
        expect(page.locator("#notice")).to_contain_text("because you liked")
        assert page.locator(".card-mark:visible").count() > 0

    def test_what_is_hidden_never_comes_again(self, visits):
        page = visits().as_user("u7")
        item = shelf(page, "popular")[0]
        card(page, item).get_by_role("button", name="Not for me").click()
        expect(page.locator("#heard")).to_contain_text("is not for you")
        settled(page)
        assert item not in everything(page)
        page.reload()
        settled(page)
        assert item not in everything(page)

    def test_a_rating_is_kept_in_the_history(self, visits):
        page = visits().as_user("u9")
        item = shelf(page, "for_you")[0]
        card(page, item).get_by_role("button", name="Rate").click()
        page.get_by_role("button", name="4 stars").click()
        expect(page.locator("#heard")).to_contain_text("4 of 5")
        page.get_by_role("button", name="History").click()
        expect(page.get_by_role("dialog")).to_contain_text("Rated 4")

    def test_somebody_describes_himself_in_his_own_words(self, visits, server_url):
        visit = visits()
        page = visit.open()
        page.get_by_role("textbox", name="in your own words").fill("a war in space")
        with page.expect_request("**/v1/shelves") as asked:
            page.get_by_role("button", name="Show me my shelves").click()
        body = json.loads(asked.value.post_data)
        assert body["profile"] == "a war in space"
        assert body["user_id"].startswith("visitor-")
        expect(page.get_by_role("heading", level=1)).to_have_text("Your shelves")
        expect(page.locator("#who-words")).to_have_text("a war in space")
        settled(page)
        assert shelf(page, "for_you")

    def test_words_are_asked_for_where_none_were_said(self, visits):
        page = visits().open()
        page.get_by_role("button", name="Show me my shelves").click()
        expect(page.get_by_role("alert").filter(has_text="Say a few words")).to_be_visible()

    def test_search_finds_and_goes_away_again(self, visits, server_url):
        page = visits().as_user("u2")
        shelves = everything(page)
        search(page, "love story")
        query = urllib.parse.urlencode({"q": "love story", "k": 30, "user_id": "u2"})
        answer = httpx.get(f"{server_url}/v1/search?{query}").json()
        assert shelf(page, "search") == [one["item_id"] for one in answer["items"]]
        page.get_by_role("button", name="Clear the search").click()
        expect(page.locator('[data-shelf="for_you"]')).to_be_visible()
        settled(page)
        assert everything(page) == shelves

    def test_the_slider_asks_for_variety_and_stays(self, visits):
        visit = visits()
        page = visit.as_user("u4")
        with page.expect_request("**/v1/shelves") as asked:
            page.get_by_role("slider", name="Variety").fill("80")
        assert json.loads(asked.value.post_data)["diversity"] == 0.8
        with page.expect_request("**/v1/shelves") as asked:
            page.reload()
        assert json.loads(asked.value.post_data)["diversity"] == 0.8
        expect(page.get_by_role("slider", name="Variety")).to_have_value("80")

    def test_the_panel_tells_how_an_item_came_to_be_there(self, visits, server_url):
        page = visits().as_user("u6")
        item = shelf(page, "for_you")[0]
        told = httpx.post(
            f"{server_url}/v1/shelves", json={"user_id": "u6", "k": 16, "explain": True}
        ).json()
        expected = told["shelves"][0]["items"][0]
        card(page, item).locator(".card-open").click()
        panel = page.get_by_role("dialog")
        expect(panel.get_by_role("heading", level=2)).to_have_text(expected["title"])
        expect(panel).to_contain_text("Model version")
        expect(panel).to_contain_text("Propensity")
        expect(panel.locator(".total strong")).to_have_text(f"{expected['score']:.3f}")
        assert panel.locator("table.bars tr").count() == len(expected["parts"])
        for near in expected["explanation"]["because"]:
            expect(panel.locator(".nears")).to_contain_text(near["title"])
        expect(panel.locator(".minis li").first).to_be_visible()

    def test_a_visitor_is_forgotten_after_he_said_so_twice(self, visits, server_url):
        page = visits().as_user("u8")
        like(page, shelf(page, "for_you")[0])
        page.get_by_role("button", name="History").click()
        page.get_by_role("button", name="Forget user u8").click()
        page.get_by_role("button", name="Cancel").click()
        assert httpx.get(f"{server_url}/v1/users/u8").json()["history"]
        page.get_by_role("button", name="Forget user u8").click()
        page.get_by_role("button", name="Yes, forget it").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("What would you enjoy next?")
        known = httpx.get(f"{server_url}/v1/users/u8").json()
        assert (known["history"], known["earlier"], known["known"]) == ([], [], False)


class TestKept:
    def test_a_reload_keeps_who_is_here_what_he_said_and_how_he_reads(self, visits):
        page = visits().as_user("u11")
        page.get_by_role("button", name="中文").click()
        page.locator("#theme").click()
        item = shelf(page, "for_you")[0]
        shown = everything(page)
        page.reload()
        settled(page)
        assert page.locator("html").get_attribute("lang") == "zh-Hans"
        assert page.locator("html").get_attribute("data-theme") == "dark"
        expect(page.get_by_role("heading", level=1)).to_have_text("用户 u11")
        assert shelf(page, "for_you")[0] == item
        assert everything(page) == shown

    def test_the_language_switches_everything_at_once(self, visits):
        page = visits().as_user("u12")
        page.get_by_role("button", name="中文").click()
        expect(page.get_by_role("heading", name="为您推荐")).to_be_visible()
        assert page.title() == "推荐"
        expect(
            card(page, shelf(page, "for_you")[0]).get_by_role("button", name="喜欢")
        ).to_be_visible()
        page.get_by_role("button", name="English").click()
        expect(page.get_by_role("heading", name="For you")).to_be_visible()

    def test_a_restart_in_between_loses_nothing(self, visits, own_server):
        page = visits(url=own_server.url).as_user("u13")
        first = shelf(page, "for_you")[0]
        like(page, first)
        shown = everything(page)
        own_server.stop()
        own_server.start()
        page.reload()
        settled(page)
        assert everything(page) == shown
        assert first not in shown

    def test_a_server_that_is_gone_is_told_and_found_again(self, visits, own_server):
        visit = visits(url=own_server.url)
        page = visit.as_user("u14")
        first = shelf(page, "for_you")[0]
        own_server.stop()
        card(page, first).get_by_role("button", name="Like").click()
        banner = page.get_by_role("alert").filter(has_text="The service is not answering")
        expect(banner).to_be_visible()
        expect(page.locator("#heard")).to_contain_text("Kept here")
        assert first in everything(page)
        own_server.start()
        expect(banner).to_be_hidden(timeout=20_000)
        expect(card(page, first)).to_have_count(0)
        history = httpx.get(f"{own_server.url}/v1/users/u14").json()["history"]
        assert [(one["item_id"], one["event"]) for one in history] == [(first, "like")]
        visit.errors = [error for error in visit.errors if REFUSED not in error]

    def test_an_idle_page_notices_by_itself(self, visits, own_server):
        visit = visits(url=own_server.url)
        page = visit.open("/operate")
        own_server.stop()
        banner = page.get_by_role("alert").filter(has_text="The service is not answering")
        expect(banner).to_be_visible()
        page.get_by_role("button", name="Try now").click()
        expect(banner).to_contain_text("Try now")
        own_server.start()
        expect(banner).to_be_hidden(timeout=20_000)
        visit.errors = [error for error in visit.errors if REFUSED not in error]


class TestKeys:
    def test_a_key_is_asked_for_where_one_is_needed_and_kept_for_the_tab(
        self, visits, own_server, tmp_path
    ):
        own_server.stop()
        token = Keys(tmp_path / "state" / "keys.json").create("admin")
        own_server.more = ["--host", "0.0.0.0"]
        own_server.start()
        visit = visits(url=own_server.url)
        page = visit.page
        page.goto(own_server.url)
        dialog = page.get_by_role("dialog", name="This service wants an API key")
        dialog.get_by_label("API key", exact=True).fill("no such key")
        page.keyboard.press("Enter")
        expect(dialog).to_contain_text("does not accept this key")
        dialog.get_by_label("API key", exact=True).fill(token)
        page.keyboard.press("Enter")
        settled(page)
        page.goto(f"{own_server.url}/operate")
        expect(page.locator("#versions")).to_contain_text("Version 2")
        assert dialog.count() == 0
        assert token not in json.dumps(page.evaluate("({ ...localStorage })"))
        visit.errors = [error for error in visit.errors if "401" not in error]


class TestOperators:
    def test_what_is_measured_is_shown(self, visits, server_url):
        for user in ("u1", "u2", "u3"):
            httpx.post(f"{server_url}/v1/recommend", json={"user_id": user, "k": 5})
        page = visits().open("/operate")
        stats = httpx.get(f"{server_url}/v1/stats").json()
        tiles = page.locator("#tiles")
        expect(tiles).to_contain_text(f"of {stats['requests']} request")
        expect(page.locator("#coverage")).to_contain_text(f"of {stats['served']['catalog']} titles")
        for place in ("traffic", "latency", "deciles"):
            assert page.locator(f"#{place} svg[role=img]").get_attribute("aria-label")
        assert page.locator("#stages tbody tr").count() == len(
            [one for one in stats["latency"].values() if one["count"]]
        )

    def test_a_version_is_activated_shared_and_rolled_back_after_a_question(
        self, visits, own_server
    ):
        page = visits(url=own_server.url).open("/operate")
        row = page.locator('[data-version="1"].version')
        row.get_by_role("button", name="Roll back to version 1").click()
        page.get_by_role("button", name="Cancel").click()
        assert shares(own_server.url) == {"2": 1.0}
        row.get_by_role("button", name="Roll back to version 1").click()
        page.get_by_role("dialog").get_by_role("button", name="Roll back").click()
        expect(page.locator("#heard")).to_contain_text("Version 1 now answers 100%")
        assert shares(own_server.url) == {"1": 1.0}
        page.get_by_role("button", name="Set the share of version 2").click()
        page.get_by_role("spinbutton", name="Share in percent").fill("20")
        page.get_by_role("dialog").get_by_role("button", name="Set share").click()
        expect(page.locator("#heard")).to_contain_text("Version 2 now answers 20%")
        assert shares(own_server.url) == {"1": 0.8, "2": 0.2}

    def test_where_nothing_was_asked_yet_the_page_says_so(self, visits, own_server):
        page = visits(url=own_server.url).open("/operate")
        for place in ("latency", "deciles", "sources", "events"):
            expect(page.locator(f"#{place}")).to_contain_text("No data yet")


def shares(url: str) -> dict[str, float]:
    versions = httpx.get(f"{url}/v1/models").json()["versions"]
    return {one["version"]: round(one["share"], 6) for one in versions if one["share"]}


class TestForEverybody:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("path", ["/", "/operate"])
    def test_nothing_is_wider_than_the_window(self, visits, size, path):
        visit = visits(size)
        page = visit.open(path)
        assert overflow(page) == 0
        if path == "/":
            page = visit.as_user("u15")
            assert overflow(page) == 0
            search(page, "space")
            assert overflow(page) == 0
            page.get_by_role("button", name="Clear the search").click()
            settled(page)
            page.locator(".card-open").first.click()
            expect(page.locator(".minis li").first).to_be_visible()
            assert page.get_by_role("dialog").evaluate("d => d.scrollWidth - d.clientWidth") == 0

    @pytest.mark.parametrize("size", SIZES)
    def test_everything_to_touch_is_large_enough(self, visits, size):
        page = visits(size).as_user("u16")
        small = page.locator("button:visible, input:visible, a:visible").evaluate_all(
            """nodes => nodes.filter((node) => {
              const { width, height } = node.getBoundingClientRect();
              return !node.matches(".skip") && (width < 44 || height < 44);
            }).map((node) => node.outerHTML.slice(0, 80))"""
        )
        assert small == []

    def test_the_keyboard_alone_is_enough(self, visits, server_url):
        page = visits().open()
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name="Skip to the recommendations")).to_be_focused()
        tab_to(page, "Pick a user")
        page.keyboard.press("Enter")
        page.keyboard.type("u17")
        expect(page.locator("dialog [data-user]")).to_have_count(1)
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", level=1)).to_have_text("User u17")
        settled(page)
        tab_to(page, "how it came to be here")
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_have_count(0)
        tab_to(page, "Like ")
        page.keyboard.press("Enter")
        expect(page.locator("#heard")).to_contain_text("because you liked")
        settled(page)
        assert "card" in page.evaluate("document.activeElement.closest('.card')?.className ?? ''")
        tab_to(page, "Rate ")
        page.keyboard.press("Enter")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("Enter")
        expect(page.locator("#heard")).to_contain_text("3 of 5")
        page.keyboard.press("/")
        expect(page.get_by_role("searchbox", name="Search")).to_be_focused()
        page.keyboard.type("space")
        expect(page.get_by_role("heading", name="Found for “space”")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.get_by_role("heading", name="For you")).to_be_visible()

    @pytest.mark.parametrize("colours", ["light", "dark"])
    @pytest.mark.parametrize("size", SIZES)
    def test_axe_finds_nothing(self, visits, size, colours):
        visit = visits(size, color_scheme=colours)
        page = visit.open()
        assert violations(page) == []
        page = visit.as_user("u18")
        assert violations(page) == []
        like(page, shelf(page, "for_you")[0])
        assert violations(page) == []
        for opener in (".card-open", "#who-history", "#who-switch", ".card .rate"):
            page.locator(opener).first.click()
            expect(page.locator("dialog:modal, :popover-open")).to_be_visible()
            page.wait_for_load_state("networkidle")
            assert violations(page) == [], opener
            page.keyboard.press("Escape")
        search(page, "space")
        assert violations(page) == []
        assert violations(visit.open("/operate")) == []

    def test_nothing_is_asked_of_another_address(self, visits, server_url):
        visit = visits()
        visit.as_user("u19")
        visit.open("/operate")
        assert {
            url.partition("/v1")[0] for url in visit.asked if not url.startswith(server_url)
        } == set()

    def test_the_same_item_has_the_same_cover_on_every_visit(self, visits):
        draw = "() => document.querySelector('.card .cover').outerHTML"
        assert visits().open().evaluate(draw) == visits().open().evaluate(draw)

    def test_both_languages_have_the_same_texts_with_the_same_places(self):
        english, chinese = (
            json.loads((TEXTS / f"{name}.json").read_text()) for name in ("en", "zh")
        )
        assert english.keys() == chinese.keys()
        for key in english:
            assert places(english[key]) == places(chinese[key]), key

    def test_every_text_that_is_named_is_there(self):
        named = set()
        for file in [*TEXTS.parent.glob("*.js"), *TEXTS.parent.glob("*.html")]:
            found = re.findall(
                r"""\bt\("([\w.]+)"[,)]|data-t[-\w]*="([\w.]+)\"""", file.read_text()
            )
            named |= {one or other for one, other in found}
        assert named - texts("en").keys() == set()


def overflow(page: Page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


def tab_to(page: Page, name: str) -> None:
    """Presses Tab until the focus is on something of that name."""
    focused = (
        "() => (document.activeElement.ariaLabel ?? document.activeElement.textContent).trim()"
    )
    for _ in range(80):
        page.keyboard.press("Tab")
        told = page.evaluate(focused)
        if name in told and len(told) < 120:
            return
    raise AssertionError(f"80 times Tab did not lead to '{name}'")


def violations(page: Page) -> list[str]:
    """What axe-core finds, a line each."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-core")
    found = axe.Axe().run(page).response["violations"]
    return [f"{one['id']}: {node['html'][:120]}" for one in found for node in one["nodes"]]


def texts(name: str) -> dict[str, str | dict[str, str]]:
    return json.loads((TEXTS / f"{name}.json").read_text())


def places(text: str | dict[str, str]) -> set[str]:
    forms = text.values() if isinstance(text, dict) else [text]
    found = [{name for _, name, _, _ in string.Formatter().parse(form) if name} for form in forms]
    return set().union(*found)
