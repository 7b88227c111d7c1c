"""The demo's page in headless Chromium: a slide and a click change what is shown, and nothing is loaded from elsewhere."""

import dataclasses
import shutil

import pytest

from ssmax.demo import measure
from ssmax.demo.run import facts_of, page

webdriver = pytest.importorskip("selenium.webdriver", reason="make test-browser installs selenium and runs this")
OPTIONS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--window-size=1200,1000")


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for option in (*OPTIONS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


def test_a_slide_and_a_click(browser, tmp_path):
    shipped = measure.load()
    facts = facts_of(dataclasses.replace(shipped, texts=shipped.texts[:1, :513]), lambda tokens: None, trials=1)
    (tmp_path / "demo.html").write_text(page(facts))
    browser.get((tmp_path / "demo.html").as_uri())

    def shown():
        sides = browser.find_elements("css selector", "#sides section")
        return browser.find_element("id", "size").text, [
            side.find_element("css selector", ".facts").text for side in sides
        ]

    first, (softmax, ssmax) = shown()
    assert f"{facts['views'][0]['n']:,} tokens" in first
    assert f"{facts['views'][0]['models']['softmax']['needle']:.3f}" in softmax
    assert f"{facts['views'][0]['models']['ssmax']['needle']:.3f}" in ssmax
    browser.find_element("id", "more").click()
    assert f"{facts['views'][1]['n']:,} tokens" in shown()[0]
    browser.execute_script(
        "const slider = document.getElementById('slider'); slider.value = slider.max; slider.dispatchEvent(new Event('input'))"
    )
    assert f"{facts['views'][-1]['n']:,} tokens" in shown()[0]
    assert len(browser.find_elements("css selector", "#ssmax .text span")) == facts["views"][-1]["n"]
    assert len(browser.find_elements("css selector", "#ssmax .text .needle")) == len(range(*facts["views"][-1]["span"]))
    assert browser.get_log("browser") == []
    browser.save_screenshot(str(tmp_path / "demo.png"))
    assert (tmp_path / "demo.png").stat().st_size > 10_000
