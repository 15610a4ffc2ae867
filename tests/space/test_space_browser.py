"""The Space in a real browser: both tabs, with a mouse on a desktop and with a finger on a phone."""

import json
import os
import shutil
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

from example_pictures import FOLDER

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
SCREENS = {
    "desktop": {"viewport": {"width": 1280, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2},
}
PATIENCE = 300_000  # ms, on a loaded machine
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser():
    path = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip(f"no browser is installed (one of {', '.join(BROWSERS)})")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=SCREENS)
def page(request, browser, server):
    """The Space on a screen. Nothing may go wrong in the browser, nor be cut off at the side."""
    context = browser.new_context(**SCREENS[request.param], accept_downloads=True)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("response", lambda answer: wrong.append(answer.url) if answer.status >= 400 else None)
    page.goto(server.url)
    page.screen = request.param
    page.get_by_role("tab", name="Find objects").wait_for()
    yield page
    assert wrong == []
    assert page.evaluate("document.documentElement.scrollWidth") <= SCREENS[request.param]["viewport"]["width"]
    context.close()


@pytest.fixture
def snap(page, request, tmp_path):
    """snap(name): a screenshot, kept in SCREENSHOTS where that names a folder."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path)

    def take(name):
        folder.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=folder / f"{page.screen}-{name}.png", full_page=True)

    return take


def example(page, number):
    page.locator(".examples:visible button").nth(number).click()


def said(page, tab):
    """What the tab says once it is done."""
    status = page.locator(f"#{tab} .status p")
    expect(status).not_to_have_class("invitation", timeout=PATIENCE)
    return status


def saved_document(page, tab):
    with page.expect_download() as download:
        page.locator(f"#{tab}").get_by_text("Download COCO JSON").click()
    return json.loads(Path(download.value.path()).read_text())


def drag(page, start, end):
    """With the mouse, or with a finger on a phone."""
    (x, y), (u, v) = start, end
    steps = [(x + (u - x) * i / 5, y + (v - y) * i / 5) for i in range(1, 6)]
    if page.screen == "desktop":
        page.mouse.move(x, y)
        page.mouse.down()
        for point in steps:
            page.mouse.move(*point)
        page.mouse.up()
        return
    session = page.context.new_cdp_session(page)
    for kind, points in (("Start", [(x, y)]), *(("Move", [point]) for point in steps), ("End", [])):
        points = [{"x": left, "y": top} for left, top in points]
        session.send("Input.dispatchTouchEvent", {"type": f"touch{kind}", "touchPoints": points})


def test_an_example_is_cut_out_filtered_and_saved(page, snap):
    snap("1-start")
    example(page, 1)
    expect(said(page, "found")).to_contain_text("object")
    rows = page.locator("#found table tbody tr")
    expect(rows.first).to_contain_text("starfish")
    few = rows.count()
    page.wait_for_timeout(1000)  # for the pictures, and for what scrolls
    snap("2-found")
    document = saved_document(page, "found")
    assert len(document["annotations"]) == few

    slider = page.locator("#found input[type=range]")
    slider.fill("0.05")
    expect(rows.nth(few)).to_be_visible()
    slider.fill("1")
    expect(said(page, "found")).to_contain_text("No object has this score")
    expect(rows).to_have_count(0)
    snap("3-nothing")


def test_an_upload_is_cut_out_and_what_is_no_picture_is_explained(page, snap, tmp_path):
    upload = page.locator("input[type=file]").first
    upload.set_input_files(FOLDER / "birds.jpg")
    expect(said(page, "found")).to_contain_text("object")
    page.get_by_label("Remove image").or_(page.get_by_label("Clear")).first.click()
    expect(page.locator("#found .status p")).to_have_class("invitation")
    (tmp_path / "page.png").write_text("<html></html>")
    page.locator("input[type=file]").first.set_input_files(tmp_path / "page.png")
    expect(page.locator("#found .status .error")).to_contain_text("not a picture")
    expect(page.locator("#found table")).to_be_hidden()
    snap("4-error")


def test_boxes_of_an_example_become_masks(page, snap):
    page.get_by_role("tab", name="Boxes to masks").click()
    snap("5-boxes-start")
    page.get_by_role("button", name="Make masks").click()
    expect(page.locator("#masks .status .error")).to_contain_text("no picture yet")
    example(page, 0)
    expect(page.locator("#canvas canvas")).to_be_visible()
    expect(page.locator("#masks .status p")).to_have_class("invitation")
    page.wait_for_timeout(1000)
    page.get_by_role("button", name="Make masks").click()
    expect(said(page, "masks")).to_contain_text("2 objects")
    page.wait_for_timeout(1000)
    snap("6-masks")
    document = saved_document(page, "masks")
    assert [annotation["bbox"] for annotation in document["annotations"]] == [[100, 38, 360, 359], [9, 342, 199, 123]]


def test_a_box_is_drawn_by_hand(page, snap):
    page.get_by_role("tab", name="Boxes to masks").click()
    example(page, 4)
    canvas = page.locator("#canvas canvas")
    expect(canvas).to_be_visible()
    page.wait_for_timeout(1000)
    page.get_by_role("button", name="Make masks").click()
    expect(page.locator("#masks .status .error")).to_contain_text("no boxes yet")
    canvas.scroll_into_view_if_needed()
    page.wait_for_timeout(1000)
    area = canvas.bounding_box()
    middle, height = area["x"] + area["width"] / 2, area["height"]
    drag(page, (middle - 0.35 * height, area["y"] + 0.1 * height), (middle + 0.2 * height, area["y"] + 0.8 * height))
    page.get_by_role("button", name="Make masks").click()
    expect(said(page, "masks")).to_contain_text("1 object")
    page.wait_for_timeout(1000)
    snap("7-drawn")
    (annotation,) = saved_document(page, "masks")["annotations"]
    x, y, width, height = (value / 256 for value in annotation["bbox"])  # the photograph has 256 x 256 pixels
    assert (x, y, width, height) == pytest.approx((0.15, 0.1, 0.55, 0.7), abs=0.03)


def test_boxes_are_pasted(page, snap):
    page.get_by_role("tab", name="Boxes to masks").click()
    example(page, 2)
    expect(page.locator("#canvas canvas")).to_be_visible()
    page.get_by_text("Paste boxes, name the objects").click()
    page.locator("#pasted textarea").fill("900 900 950 950")
    page.locator("#put-boxes").click()
    expect(page.locator("#masks .status .error")).to_contain_text("outside the picture")
    page.locator("#pasted textarea").fill("100, 290, 330, 500\n10 10 60 60")
    page.locator("#put-boxes").click()
    expect(page.locator("#masks .status p")).to_contain_text("2 boxes on the picture")
    page.wait_for_timeout(1000)
    snap("8-pasted")
    page.get_by_role("button", name="Make masks").click()
    expect(page.locator("#masks .status p")).to_contain_text("2 objects")
    document = saved_document(page, "masks")
    assert [annotation["bbox"] for annotation in document["annotations"]] == [[100, 290, 230, 210], [10, 10, 50, 50]]
