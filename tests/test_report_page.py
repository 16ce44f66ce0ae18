"""The report in a real browser: Chromium, headless, from disk. Needs Debian's packages chromium and chromium-driver."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from fake_run import fake_events, fake_rows, write_images, write_run
from open_r1.reporting.page import write_report

pytestmark = pytest.mark.browser

STEPS, PROMPTS, GROUP = 30, 4, 4
HOSTILE = "<img src=x onerror='window.hit = 1'><script>window.hit = 1</script></script><!--\u2028\u202e\ud800 </answer>"
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find(*names: str) -> str:
    for name in names:
        if path := shutil.which(name):
            return path
    pytest.fail(
        f"no {' or '.join(names)} on the PATH; on Debian: apt-get install chromium chromium-driver", pytrace=False
    )


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = find("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(find("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """Six questions in turns, so that every prompt recurs; the third completion of step 2 is hostile."""
    questions = write_images(tmp_path_factory.mktemp("images"), 6)
    rows = list(fake_rows(questions, range(1, STEPS + 1), STEPS, PROMPTS, GROUP))
    rows[PROMPTS * GROUP + 2]["completion"] = HOSTILE
    return rows


@pytest.fixture(scope="module")
def report(tmp_path_factory, rows) -> Path:
    questions = write_images(tmp_path_factory.mktemp("held_out"), 12, seed=1)
    held_out = [r for s in range(10, 40, 10) for r in fake_rows(questions, [s], STEPS, prompts=12, group=1, seed=s)]
    run = tmp_path_factory.mktemp("run")
    return write_report(write_run(run, rows, held_out, fake_events(STEPS, eval_every=10), max_steps=STEPS))


@pytest.fixture
def page(browser, report) -> Iterator[webdriver.Chrome]:
    """The report, opened anew at 1280 x 900; afterwards the browser must have nothing to complain about."""
    emulate(browser, 1280)
    browser.get_log("browser")
    browser.get_log("performance")
    show(browser, report)
    yield browser
    assert browser.get_log("browser") == []
    assert all(url.startswith(("file:", "data:")) for url in requests(browser))
    assert browser.execute_script("return window.hit") is None


def show(browser: webdriver.Chrome, path: Path, place: str = "") -> None:
    browser.get("about:blank")
    browser.get(f"{path.as_uri()}{place}")


def emulate(browser: webdriver.Chrome, width: int, scheme: str = "light") -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


def requests(browser: webdriver.Chrome) -> list[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [url for url in urls if url != "about:blank"]


def element(page: webdriver.Chrome, name: str):
    return page.find_element(By.ID, name)


def button(page: webdriver.Chrome, kind: str, value: str):
    return page.find_element(By.CSS_SELECTOR, f"button[data-{kind}={value}]")


def status(page: webdriver.Chrome) -> str:
    return element(page, "status").text


def cards(page: webdriver.Chrome) -> list[str]:
    """The texts of the completions of the shown step."""
    columns = page.find_elements(By.CSS_SELECTOR, "#columns > section")
    return [card.text for card in columns[-1].find_elements(By.CSS_SELECTOR, ".completion .text")]


def place(page: webdriver.Chrome) -> str:
    return page.execute_script("return location.hash")


def test_curves_are_drawn(page):
    drawn = page.execute_script(
        """return [...document.querySelectorAll(".chart svg")].filter((svg) => svg.checkVisibility()).map((svg) => {
             const lines = [...svg.querySelectorAll("path")].map((path) => path.getBoundingClientRect());
             const box = svg.getBoundingClientRect();
             return [box.width, box.height, Math.max(...lines.map((line) => line.width)) / box.width];
           })"""
    )
    assert len(drawn) == 14  # the paper's figure once, in the width that fits
    assert all(width > 300 and height > 180 and share > 0.5 for width, height, share in drawn)
    colours = page.execute_script(
        """return [...document.querySelectorAll("#rewards-title ~ g path")]
             .map((path) => getComputedStyle(path).stroke)"""
    )
    assert {"rgb(59, 82, 196)", "rgb(194, 65, 12)"} <= set(colours)  # --curve-1 and --curve-2


def test_browsing_by_step_and_prompt(page, report, rows):
    show(page, report, "#train/1/1")
    assert status(page).startswith(f"Step 1, prompt 1 of {PROMPTS}")
    assert element(page, "previous").get_property("disabled")
    element(page, "next").click()
    assert status(page).startswith("Step 2, prompt 1") and place(page) == "#train/2/1"
    element(page, "slider").send_keys(Keys.END)
    assert status(page).startswith(f"Step {STEPS},") and element(page, "next").get_property("disabled")
    number = element(page, "number")
    number.clear()
    assert status(page).startswith(f"Step {STEPS},")  # nothing is no step
    number.send_keys(Keys.CONTROL, "a")
    number.send_keys("17", Keys.ENTER)
    assert status(page).startswith("Step 17,") and element(page, "slider").get_property("value") == "16"
    start = 16 * PROMPTS * GROUP
    wanted = ["<think>" + record["completion"] for record in rows[start : start + GROUP]]
    assert [" ".join(text.split()) for text in cards(page)] == [" ".join(text.split()) for text in wanted]

    Select(element(page, "prompt")).select_by_index(2)
    record = rows[start + 2 * GROUP]
    question = element(page, "question")
    assert place(page) == "#train/17/3" and f"Solution: {record['solution']}" in question.text
    assert record["prompt"].partition("natural language. ")[2].partition(" \n")[0] in question.text
    image = question.find_element(By.TAG_NAME, "img")
    assert image.get_property("naturalWidth") > 50 and Path(record["images"][0]).name in image.accessible_name


def test_the_same_prompt_at_an_earlier_step(page):
    earlier = element(page, "earlier")
    assert earlier.get_property("disabled")  # nothing is earlier than the first step
    element(page, "slider").send_keys(Keys.END)
    titles = [title.text for title in page.find_elements(By.CSS_SELECTOR, "#columns h3")]
    steps = [option.get_attribute("value") for option in Select(earlier).options]
    assert steps[0] == "" and len(steps) > 5
    assert titles == [f"Earlier, at step {steps[1]}", f"Step {STEPS}"]
    boxes = [section.rect for section in page.find_elements(By.CSS_SELECTOR, "#columns > section")]
    assert boxes[0]["y"] == boxes[1]["y"] and boxes[0]["x"] < boxes[1]["x"]  # side by side
    Select(earlier).select_by_value(steps[3])
    assert page.find_element(By.CSS_SELECTOR, "#columns h3").text == f"Earlier, at step {steps[3]}"
    Select(earlier).select_by_value("")
    assert len(page.find_elements(By.CSS_SELECTOR, "#columns h3")) == 1


def test_filters_and_their_counts(page, report, rows):
    show(page, report, "#train/1/1")
    kinds = {
        "all": lambda record: True,
        "correct": lambda record: record["rewards"]["accuracy_reward"] == 1,
        "wrong": lambda record: record["rewards"]["accuracy_reward"] == 0,
        "truncated": lambda record: not record["ended"],
        "reflective": lambda record: bool(record["reflections"]),
    }
    element(page, "slider").send_keys(Keys.END)
    of_step = rows[-PROMPTS * GROUP :]
    for kind, holds in kinds.items():
        here, everywhere = sum(map(holds, of_step)), sum(map(holds, rows))
        chosen = button(page, "filter", kind)
        assert chosen.text == f"{kind.capitalize()} {here} / {everywhere}"
        chosen.click()
        assert chosen.get_attribute("aria-pressed") == "true"
        assert len(page.find_elements(By.CSS_SELECTOR, "#filters [aria-pressed=true]")) == 1
        assert len(cards(page)) == sum(map(holds, of_step[:GROUP]))


def test_selects_show_why_a_completion_earned_nothing(page, report, rows):
    show(page, report, "#train/1/1")
    why = Select(element(page, "judgement"))
    assert {option.text for option in why.options[1:]} == {record["judgement"] for record in rows}
    chosen = next(record for record in rows if record["judgement"] != "right")["judgement"]
    why.select_by_visible_text(chosen)
    fitting = [record["judgement"] == chosen for record in rows]
    assert button(page, "filter", "all").text.endswith(f"/ {sum(fitting)}")
    assert len(cards(page)) == sum(fitting[:GROUP])
    why.select_by_index(0)
    Select(element(page, "advantage")).select_by_visible_text("positive")
    Select(element(page, "reward")).select_by_visible_text("format above 0")
    fitting = [record["advantage"] > 0 and record["rewards"]["format_reward"] > 0 for record in rows]
    assert button(page, "filter", "all").text.endswith(f"/ {sum(fitting)}")


def test_the_rollouts_open_on_a_group_that_teaches(browser, tmp_path, rows):
    """Four groups of the first step have equal rewards; the first with signal is in the second."""
    rows = [record | ({"advantage": 0.0} if record["step"] == 1 else {}) for record in rows]
    show(browser, write_report(write_run(tmp_path / "run", rows)))
    first = next(at for at, record in enumerate(rows) if record["advantage"])
    assert status(browser).startswith(f"Step 2, prompt {(first - PROMPTS * GROUP) // GROUP + 1} of")


def test_a_table_that_is_wider_than_the_screen_says_so(page, report):
    emulate(page, 390)
    show(page, report)
    wider = page.find_elements(By.CSS_SELECTOR, ".scroll.wider")
    said = "return getComputedStyle(arguments[0], '::before').content"
    assert wider and all("scroll sideways" in page.execute_script(said, table) for table in wider)
    emulate(page, 1280)
    show(page, report)
    assert page.find_elements(By.CSS_SELECTOR, "table") and not page.find_elements(
        By.CSS_SELECTOR, "#why .scroll.wider"
    )


def test_held_out_completions(page):
    button(page, "source", "eval").click()
    assert place(page) == "#eval/10/1" and status(page).startswith("Step 10, prompt 1 of 12")
    element(page, "next").click()
    assert place(page) == "#eval/20/1"
    button(page, "source", "train").click()
    assert place(page) == "#train/20/1"  # the step stays


def test_a_link_leads_to_its_completion(page, report):
    link = page.find_element(By.CSS_SELECTOR, ".example a")
    page.execute_script("arguments[0].click()", link)
    wanted = link.get_attribute("href").partition("#")[2]
    [target] = page.find_elements(By.CSS_SELECTOR, ".completion.target")
    assert place(page) == f"#{wanted}" and target.find_elements(By.TAG_NAME, "mark")
    assert target.find_element(By.TAG_NAME, "h4").text == f"Completion {wanted.split('/')[3]}"
    show(page, report, "#train/12/3")
    assert status(page).startswith("Step 12, prompt 3")
    for nonsense in ("#train/99999/77/5", "#train/x/1", "#eval/-1/2", "#curves"):
        show(page, report, nonsense)
        assert status(page).startswith("Step")


def test_everything_is_reached_by_keyboard(page):
    element(page, "next").click()  # the first step has no previous one and no earlier one
    page.execute_script("document.activeElement.blur(); window.scrollTo(0, 0)")
    reached, focusable = [], "return [...document.querySelectorAll('a, button, input, select, summary')]"
    page.find_element(By.TAG_NAME, "body").click()
    for _ in range(120):
        page.switch_to.active_element.send_keys(Keys.TAB)
        active = page.switch_to.active_element
        if active.tag_name == "body":
            break
        assert page.execute_script("return getComputedStyle(arguments[0]).outlineStyle", active) == "solid"
        reached.append(active)
    controls = [
        control for control in page.execute_script(focusable) if control.is_enabled() and control.is_displayed()
    ]
    assert len(controls) > 15 and all(control in reached for control in controls)
    assert all(control.accessible_name for control in controls)


def test_arrow_keys_change_the_step_unless_they_are_a_controls_own(page):
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT, Keys.ARROW_LEFT)
    assert status(page).startswith("Step 2,")
    element(page, "number").send_keys(Keys.ARROW_LEFT)  # moves the caret
    assert status(page).startswith("Step 2,")
    element(page, "slider").send_keys(Keys.ARROW_RIGHT)  # moves the slider, once
    assert status(page).startswith("Step 3,")


def test_hostile_completions_are_text(page, report):
    show(page, report, "#train/2/1")
    text = cards(page)[2]
    assert "<img src=x onerror='window.hit = 1'><script>window.hit = 1</script></script><!--" in text
    assert page.find_elements(By.CSS_SELECTOR, "#columns img, #columns script") == []
    assert page.execute_script("return window.hit") is None


def test_light_and_dark(page, report):
    def colours() -> list[str]:
        return page.execute_script(
            """const path = document.querySelector("#entropy-title ~ g [style*=--curve-1]");
               const style = getComputedStyle(document.body);
               return [style.backgroundColor, style.color, getComputedStyle(path).stroke]"""
        )

    def brightness(colour: str) -> float:
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    light = colours()
    emulate(page, 1280, "dark")
    dark = colours()
    assert brightness(light[0]) > 600 > brightness(light[1]) and brightness(dark[0]) < 150 < brightness(dark[1])
    assert light[2] != dark[2]


@pytest.mark.parametrize("width", [320, 768])
def test_no_width_scrolls_sideways(page, report, width):
    emulate(page, width)
    for at in ("#train/1/1", f"#train/{STEPS}/2", "#eval/20/3"):
        show(page, report, at)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
