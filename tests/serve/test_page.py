"""The chat page in headless Chromium, over loopback.

Needs playwright and its browser (``playwright install chromium-headless-shell``), or the one that
``CHROMIUM`` names; what needs neither is tested without.
"""

import os
import re
from contextlib import contextmanager

import pytest
import requests

from packed_models import pack_readable
from running_server import let_say, running

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
MARKUP = '<img src="x" onerror="alert(1)"><script>alert(2)</script>&amp;<b>bold'


@pytest.fixture(scope="module")
def directory(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("page") / "tiny"
    return pack_readable(path, TEMPLATE, 2**15, tokenizer)


@pytest.fixture(scope="module")
def url(directory):
    with running(directory) as url:
        yield url


def test_it_is_one_file_under_a_strict_policy(url):
    answer = requests.get(url)
    assert answer.status_code == 200 and answer.headers["Content-Type"].startswith("text/html")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert not re.search(r"(src|href)=|//[a-z]|innerHTML|document\.write|eval", answer.text)


def test_it_needs_no_key_and_all_else_does(directory, tmp_path):
    (tmp_path / "key").write_text("secret")
    with running(directory, api_key=tmp_path / "key") as url:
        assert requests.get(url).status_code == 200
        assert requests.get(f"{url}/v1/models").status_code == 401


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=os.environ.get("CHROMIUM"))
        except api.Error as error:
            pytest.skip(f"no browser: {str(error)[:100]}")
        yield browser
        browser.close()


@contextmanager
def opened(browser, url):
    """The page, which may ask its own server only and show no dialog and no error."""
    page = browser.new_page()
    asked, wrong = [], []
    page.on("request", lambda request: asked.extend([request]))  # a handler has to take attributes
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(url)
    page.asked = asked
    yield page
    page.close()
    assert not wrong
    assert all(request.url.startswith(url) for request in asked)


@pytest.fixture
def page(browser, url):
    with opened(browser, url) as page:
        yield page


def say(page, text, tokens=None):
    if tokens is not None:
        page.locator("summary").click()
        page.fill("#most", str(tokens))
        page.locator("summary").click()
    page.fill("#text", text)
    page.press("#text", "Enter")


def test_it_says_what_the_server_says(page, url):
    page.locator("summary").click()
    page.fill("#system", "You are terse.")
    page.fill("#temperature", "0")
    page.locator("summary").click()
    say(page, "def main():", 12)
    page.locator(".speed").wait_for()
    messages = [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "def main():"},
    ]
    expected = requests.post(
        f"{url}/v1/chat/completions",
        json={"messages": messages, "max_tokens": 12, "temperature": 0},
    ).json()["choices"][0]["message"]["content"]
    assert page.locator(".assistant").text_content() == expected
    assert re.fullmatch(r"12 tokens, [\d.]+ tokens/s", page.locator(".speed").text_content())
    assert page.locator("#model").text_content() == "tiny"
    say(page, "again")  # the second turn brings the first with it
    page.locator(".speed").nth(1).wait_for()
    sent = page.asked[-1].post_data_json
    roles = [message["role"] for message in sent["messages"]]
    assert roles == ["system", "user", "assistant", "user"] and sent["temperature"] == 0


def test_it_streams_and_stops(page):
    say(page, "def main():", 20_000)
    while len(page.locator(".assistant").text_content()) <= 40:
        page.wait_for_timeout(20)
    assert page.locator("#send").is_disabled()
    page.click("#stop")
    page.locator("#send:enabled").wait_for()
    length = len(page.locator(".assistant").text_content())
    say(page, "again", 5)
    page.locator(".speed").nth(1).wait_for()
    assert len(page.locator(".assistant").first.text_content()) == length
    page.click("#again")
    assert page.locator("article").count() == 0


def test_new_while_an_answer_streams(page, url):
    say(page, "def main():", 20_000)
    while len(page.locator(".assistant").text_content()) <= 40:
        page.wait_for_timeout(20)
    page.click("#again")
    page.locator("#send:enabled").wait_for()
    assert page.locator("article, .speed, .error").count() == 0
    while not _is_idle(url):  # the place of the answer that nobody reads is free again
        page.wait_for_timeout(20)
    say(page, "again", 5)
    page.locator(".speed").wait_for()
    assert page.asked[-1].post_data_json["messages"] == [{"role": "user", "content": "again"}]
    assert page.locator(".user").count() == page.locator(".assistant").count() == 1


def _is_idle(url):
    return re.search(r"^sparse_bitnet_running 0(\.0)?$", requests.get(f"{url}/metrics").text, re.M)


def test_markup_in_an_answer_is_text(page, tokenizer, monkeypatch):
    script = tokenizer.encode(MARKUP)
    let_say(monkeypatch, script)
    say(page, MARKUP, len(script))
    page.locator(".speed").wait_for()
    assert page.locator(".assistant").text_content() == MARKUP
    assert page.locator(".user").text_content() == MARKUP
    assert page.locator("article *").count() == 0


def test_an_error_is_shown(page):
    say(page, "x" * 200_000, 5)
    page.locator(".error").wait_for()
    assert "context" in page.locator(".error").text_content()
    say(page, "def", 5)
    page.locator(".speed").wait_for()


def test_with_a_key(browser, directory, tmp_path):
    (tmp_path / "key").write_text("secret")
    with running(directory, api_key=tmp_path / "key") as url, opened(browser, url) as page:
        say(page, "def", 5)
        page.locator(".error").wait_for()
        page.locator("summary").click()
        page.fill("#key", "secret")
        page.locator("summary").click()
        say(page, "def", 5)
        page.locator(".speed").wait_for()


def test_a_model_that_continues_text(browser, pristine):
    with running(pristine / "two-bit") as url, opened(browser, url) as page:
        say(page, "def main():", 8)
        page.locator(".speed").wait_for()
        assert page.asked[-1].url.endswith("/v1/completions")
        assert page.locator(".error").count() == 0
