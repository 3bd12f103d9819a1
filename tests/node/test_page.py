"""The node's page in a real browser. scripts/test-page installs what that needs."""

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from metadiskfs.metadisk import wire
from tests.node.node_process import RunningNode, StartNode

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

Browser = webdriver.Chrome


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver, "no Chromium here: scripts/test-page installs it and runs these"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "--headless=new",
        "--no-sandbox",
        "--disable-dev-shm-usage",
        "--disable-gpu",
        "--window-size=900,1000",
    ):
        options.add_argument(flag)
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    folder = tmp_path_factory.mktemp("downloads")
    options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driven = webdriver.Chrome(options, webdriver.ChromeService(driver))
    driven.downloads = folder  # type: ignore[attr-defined]
    yield driven
    driven.quit()


@pytest.fixture
def page(browser: Browser, node: RunningNode) -> Iterator[Browser]:
    """The page, freshly opened, with nothing remembered. Fails the test on any error in the browser's console."""
    browser.get(node.url + "/healthz")
    browser.execute_script("localStorage.clear()")
    browser.get(node.url + "/")
    until(browser, lambda: "Ready" in browser.find_element(By.ID, "summary").text)
    browser.get_log("browser")
    yield browser
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def until(browser: Browser, condition: object, within: float = 30) -> None:
    assert callable(condition)
    WebDriverWait(browser, within).until(lambda _: condition())


def screenshot(browser: Browser, name: str) -> None:
    if folder := os.environ.get("METADISKFS_SCREENSHOTS"):
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def upload(page: Browser, *files: Path) -> None:
    before = len(page.find_elements(By.CSS_SELECTOR, "#uploads li"))
    page.find_element(By.ID, "files").send_keys("\n".join(str(file) for file in files))
    until(page, lambda: len(page.find_elements(By.CSS_SELECTOR, "#uploads .state.good")) == before + len(files))


def remembered(page: Browser) -> list[dict[str, str]]:
    found: list[dict[str, str]] = page.execute_script("return JSON.parse(localStorage.getItem('uploads') || '[]')")
    return found


def saved(page: Browser, name: str) -> bytes:
    path: Path = page.downloads / name  # type: ignore[attr-defined]
    until(page, path.exists)
    return path.read_bytes()


def open_link(page: Browser, text: str) -> str:
    field = page.find_element(By.ID, "link")
    field.clear()
    field.send_keys(text, Keys.ENTER)
    opened = page.find_element(By.ID, "opened")
    until(page, lambda: opened.get_attribute("class") in ("good", "bad") and "…" not in opened.text[:12])
    return opened.text


def test_upload_several_copy_and_open(page: Browser, node: RunningNode, tmp_path: Path) -> None:
    contents = {"one.txt": b"test data\n", "two.bin": os.urandom(3_000_000), "empty": b"", "four.bin": b"4" * 70_000}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    upload(page, *(tmp_path / name for name in contents))
    items = {item["name"]: item for item in remembered(page)}
    assert {name: wire.Link(item["filehash"], item["key"]) for name, item in items.items()} == {
        name: wire.link_of(content) for name, content in contents.items()
    }
    screenshot(page, "uploads")
    two = items["two.bin"]
    text = open_link(page, f"{node.url}/#{two['filehash']}?key={two['key']}")
    assert "Proven and decrypted" in text and "two.bin" in text
    assert saved(page, "two.bin") == contents["two.bin"]
    assert two["key"] not in node.log_text()
    page.refresh()
    until(page, lambda: len(page.find_elements(By.CSS_SELECTOR, "#uploads li")) == 4)
    page.find_element(By.CSS_SELECTOR, "#uploads .forget").click()
    assert len(remembered(page)) == 3


def test_a_link_in_the_address_opens_itself(page: Browser, node: RunningNode) -> None:
    requests.post(node.url + "/api/upload", files={"file": ("addressed.txt", b"by address")}, timeout=10)
    page.get(f"{node.url}/#{wire.link_of(b'by address')}")
    until(page, lambda: "Proven" in page.find_element(By.ID, "opened").text)
    assert saved(page, "addressed.txt") == b"by address"


def test_the_later_generations_counter(page: Browser, node: RunningNode) -> None:
    """An object of a server whose counter starts at 1 cannot come from this node, but may lie in its store."""
    plaintext = b"from the later generation"
    link = wire.link_of(plaintext, counter_start=1)
    path = node.store / "objects" / link.filehash[:2] / link.filehash
    path.write_bytes(wire.cipher_stream(bytes.fromhex(link.key), counter_start=1).update(plaintext))
    assert "Proven" in open_link(page, str(link))
    assert saved(page, "file") == plaintext


def test_what_goes_wrong_is_said(page: Browser, node: RunningNode) -> None:
    assert "Not a link" in open_link(page, "nonsense")
    content = b"to be damaged"
    link = wire.link_of(content)
    requests.post(node.url + "/api/upload", files={"file": content}, timeout=10)
    assert "does not belong" in open_link(page, f"{link.filehash}?key={'0' * 64}")
    assert "does not have this file" in open_link(page, f"{'0' * 64}?key={link.key}")
    page.get_log("browser")  # the 404 shows there as an error, rightly


def test_names_are_text_not_html(page: Browser, tmp_path: Path) -> None:
    name = "<img src=x onerror=document.title='owned'>.txt"
    (tmp_path / name).write_bytes(b"evil")
    upload(page, tmp_path / name)
    page.refresh()
    until(page, lambda: page.find_elements(By.CSS_SELECTOR, "#uploads .name"))
    assert page.find_element(By.CSS_SELECTOR, "#uploads .name").text == name
    assert not page.find_elements(By.CSS_SELECTOR, "#uploads img")
    open_link(page, "{filehash}?key={key}".format(**remembered(page)[0]))
    page.find_element(By.CSS_SELECTOR, "#uploads .fetch").click()
    time.sleep(0.5)
    assert page.title == "MetaDisk node"


def test_without_a_pointer(page: Browser, tmp_path: Path) -> None:
    """Everything is reached by the tabulator key and shows where it is."""
    (tmp_path / "keys.txt").write_bytes(b"by keyboard")
    upload(page, tmp_path / "keys.txt")
    page.execute_script("document.activeElement.blur(); document.getElementById('account').open = true")
    seen = []
    for _ in range(12):
        ActionChains(page).send_keys(Keys.TAB).perform()
        focused = page.switch_to.active_element
        seen.append(focused.get_attribute("id") or focused.text)
    for wanted in ("files", "link", "Open", "Copy link", "Copy curl link", "Forget", "copy-token", "code", "Redeem"):
        assert wanted in seen, seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone_width_dark_and_light(page: Browser, scheme: str, tmp_path: Path) -> None:
    (tmp_path / ("long-name-" * 12 + ".txt")).write_bytes(b"long")
    upload(page, tmp_path / ("long-name-" * 12 + ".txt"))
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    metrics = {"width": 360, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    page.execute_script("document.getElementById('account').open = true")
    open_link(page, "nonsense")
    screenshot(page, f"phone-{scheme}")
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(246, 247, 249)", "dark": "rgb(18, 21, 27)"}[scheme]
    page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_balance_and_promo_codes(browser: Browser, start_node: StartNode) -> None:
    node = start_node("--max-file-size", "1000")
    browser.get(node.url + "/")
    until(browser, lambda: browser.find_element(By.ID, "balance").get_attribute("textContent") == "0 bytes")
    browser.execute_script("document.getElementById('account').open = true")
    browser.find_element(By.ID, "code").send_keys("NOPE", Keys.ENTER)
    until(browser, lambda: "unknown" in browser.find_element(By.ID, "redeemed").text)
    from metadiskfs.node.accounts import Accounts

    accounts = Accounts(node.store / "accounts.db")
    accounts.set_promo("GIFT", 5 << 20)
    accounts.close()
    field = browser.find_element(By.ID, "code")
    field.clear()
    field.send_keys("GIFT", Keys.ENTER)
    until(browser, lambda: browser.find_element(By.ID, "balance").text == "5.0 MiB")
    large = node.log.parent / "large"
    large.write_bytes(bytes(2000))
    browser.find_element(By.ID, "files").send_keys(str(large))
    until(browser, lambda: "larger than" in browser.find_element(By.CSS_SELECTOR, "#uploads .state").text)
