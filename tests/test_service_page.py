"""The service's web page in a real browser: with the mouse, with the keyboard alone, and when things go wrong."""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluation import browser as find_browser
from test_service import serving

from calotype.api import Codec, psnr
from calotype.media import Picture, read_picture, write_picture

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
expect = playwright.expect

FLAGS = [
    "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
PATIENCE = 15_000
"""Milliseconds; the machine may be busy."""


@dataclass
class Sitting:
    """A page that was opened, what its console complained of, and what it asked the network for."""

    page: Any
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def open(self, *files: Path) -> None:
        self.page.set_input_files("#file", files)

    def wait(self, words: str) -> None:
        """Until the status begins with `words`."""
        expect(self.page.locator("#status")).to_have_text(re.compile(f"^{words}"), timeout=PATIENCE)

    def wait_for_error(self, words: str) -> None:
        expect(self.page.locator("#error")).to_be_visible(timeout=PATIENCE)
        expect(self.page.locator("#error-text")).to_contain_text(words)

    def clip(self) -> float:
        """Per cent of the stage that shows the left picture."""
        text = self.page.evaluate("document.getElementById('left-layer').style.clipPath")
        return 100 - float(re.match(r"inset\(0(?:px)? ([\d.]+)%", text)[1])

    def zoom(self) -> int:
        return int(self.page.text_content("#zoom-value").removesuffix(" %"))

    def rows(self) -> dict[str, list[str]]:
        """The table: name of the codec -> size, bpp, PSNR, encoding, decoding."""
        found = {}
        for row in self.page.locator("#rows tr").all():
            found[row.locator("th").inner_text()] = row.locator("td").all_inner_texts()
        return found


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with serving(workers=2, max_pixels=1_000_000) as address:
        yield address


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as play:
        started = play.chromium.launch(executable_path=program, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def visit(chromium: Any, url: str) -> Iterator[Callable[..., Sitting]]:
    """Opens the page in a window; at the end nothing may have been complained of or fetched from elsewhere."""
    sittings: list[Sitting] = []

    def make(width: int = 1280, height: int = 900, address: str = url, **options: Any) -> Sitting:
        page = chromium.new_page(viewport={"width": width, "height": height}, **options)
        sitting = Sitting(page)
        page.on("console", lambda message: sitting.complaints.append(message.text) if message.type != "log" else None)
        page.on("pageerror", lambda error: sitting.complaints.append(str(error)))
        page.on("request", lambda request: sitting.requests.append(request.url))
        page.goto(address)
        sittings.append(sitting)
        return sitting

    yield make
    for sitting in sittings:
        assert sitting.complaints == []
        assert all(r.startswith(("http://127.0.0.1:", "blob:", "data:")) for r in sitting.requests)
        sitting.page.close()


def refused(sitting: Sitting, *statuses: int) -> None:
    """The browser itself notes answers that are errors: these, and nothing else, were expected."""
    notes = [f"Failed to load resource: the server responded with a status of {status} " for status in statuses]
    assert len(sitting.complaints) == len(notes)
    assert all(c.startswith(n) for c, n in zip(sitting.complaints, notes, strict=True))
    sitting.complaints.clear()


@pytest.fixture(scope="module")
def picture(photo: Picture) -> Picture:
    return Picture(np.ascontiguousarray(photo.pixels[40:200, 60:300]))


@pytest.fixture(scope="module")
def files(picture: Picture, codec: Codec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """cat.png, cat.tif, cat.clt, damaged.clt with four tiles, and a text that calls itself a picture."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "cat.png").write_bytes(write_picture(picture, "png"))
    (folder / "cat.tif").write_bytes(write_picture(picture, "tiff"))
    (folder / "cat.clt").write_bytes(codec.encode(picture, quality=40).data)
    wide = Picture(np.tile(picture.pixels, (2, 2, 1)))
    damaged = bytearray(codec.encode(wide, tile=256).data)
    damaged[-30] ^= 0xFF
    (folder / "damaged.clt").write_bytes(damaged)
    (folder / "text.png").write_text("not a picture")
    return folder


def test_a_picture_is_encoded_and_compared(
    visit: Callable[..., Sitting], files: Path, picture: Picture, codec: Codec, tmp_path: Path
) -> None:
    sitting = visit()
    page = sitting.page
    expect(page.locator("#model option")).to_have_count(4)
    assert page.input_value("#model") == "hyperprior"
    assert not page.locator("#split").is_visible()
    sitting.open(files / "cat.png")
    sitting.wait("Encoded to")
    expected = codec.encode(picture, quality=60)
    quality = psnr(picture.pixels, codec.decode(expected.data).picture.pixels)
    size, bpp, decibels, encoding, decoding = sitting.rows()["Calotype, quality 60"]
    assert size == f"{len(expected.data) / 1000:.1f} kB"
    assert bpp == f"{expected.bpp:.3f}"
    assert decibels == f"{quality:.2f} dB"
    assert encoding.endswith("s")
    assert decoding.endswith("s")
    with page.expect_download() as download:
        page.click("#download")
    assert download.value.suggested_filename == "cat.clt"
    assert Path(download.value.path()).read_bytes() == expected.data

    # The decoded picture lies on the right, the original on the left, both of the picture's size.
    shown = page.evaluate(
        "['left', 'right'].map(side => document.getElementById(`${side}-image`))"
        ".map(image => [image.alt, image.naturalWidth, image.naturalHeight])"
    )
    assert shown == [["Original", 240, 160], ["Calotype", 240, 160]]

    page.select_option("#right", "avif")
    sitting.wait("AVIF:")
    (name,) = (n for n in sitting.rows() if n.startswith("AVIF, quality "))
    assert float(sitting.rows()[name][1]) <= float(bpp)
    assert page.get_attribute("#right-image", "alt") == "AVIF"
    page.select_option("#left", "calotype")
    page.select_option("#right", "jpeg")
    sitting.wait("JPEG:")
    assert page.get_attribute("#left-image", "alt") == "Calotype"
    assert len(sitting.rows()) == 4


def test_the_sliders_encode_anew(visit: Callable[..., Sitting], files: Path, picture: Picture, codec: Codec) -> None:
    sitting = visit()
    page = sitting.page
    sitting.open(files / "cat.png")
    sitting.wait("Encoded to")
    page.focus("#amount")
    page.keyboard.press("Home")
    assert page.text_content("#amount-value") == "0"
    expect(page.locator("#rows")).to_contain_text("Calotype, quality 0", timeout=PATIENCE)
    page.locator("input[value=quality]").focus()
    page.keyboard.press("ArrowRight")
    assert page.is_checked("input[value=size]")
    words = page.text_content("#amount-value")
    most = float(words.split(" ")[0])
    assert words == page.get_attribute("#amount", "aria-valuetext")
    assert words == f"{most:.1f} kB, {most * 8000 / 240 / 160:.2f} bpp"
    expect(page.locator("#rows")).not_to_contain_text("Calotype, quality 0", timeout=PATIENCE)
    sitting.wait("Encoded to")
    size = next(cells for name, cells in sitting.rows().items() if name.startswith("Calotype"))[0]
    assert 0.95 * most < float(size.split()[0]) <= most
    expect(page.locator("#note")).to_contain_text("the whole search for the size")
    page.focus("#amount")
    page.keyboard.press("End")
    assert page.text_content("#amount-value").endswith("2.50 bpp")


def test_the_view_by_mouse(visit: Callable[..., Sitting], files: Path) -> None:
    sitting = visit()
    page = sitting.page
    sitting.open(files / "cat.png")
    sitting.wait("Encoded to")
    assert sitting.clip() == 50
    box = page.locator("#stage").bounding_box()
    middle = (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.move(*middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, middle[1], steps=4)
    page.mouse.up()
    assert abs(sitting.clip() - 25) < 1
    assert page.get_attribute("#split", "aria-valuenow") == "25"

    fitted = sitting.zoom()
    page.mouse.move(*middle)
    page.mouse.wheel(0, -400)
    expect(page.locator("#zoom-value")).not_to_have_text(f"{fitted} %")
    assert sitting.zoom() > fitted
    where = "document.getElementById('right-image').style.transform"
    before = page.evaluate(where)
    page.mouse.move(middle[0] + 100, middle[1])
    page.mouse.down()
    page.mouse.move(middle[0] + 160, middle[1] + 10, steps=3)
    page.mouse.up()
    assert page.evaluate(where) != before
    assert page.evaluate(where) == page.evaluate(where.replace("right", "left"))
    page.click("#zoom-one")
    assert sitting.zoom() == 100
    page.click("#zoom-in")
    assert sitting.zoom() == 125
    page.click("#zoom-out")
    page.click("#zoom-fit")
    assert sitting.zoom() == fitted


def test_the_view_by_keyboard_alone(visit: Callable[..., Sitting], files: Path) -> None:
    sitting = visit()
    page = sitting.page
    sitting.open(files / "cat.png")
    sitting.wait("Encoded to")
    page.evaluate("document.activeElement.blur()")
    focused = "document.activeElement.id || document.activeElement.value || document.activeElement.className"
    # A ring around what has the focus; that of the file's input is around its label, of the radio around its group.
    ring = """() => {
        const e = document.activeElement;
        const places = [e, e.nextElementSibling, e.firstElementChild, e.closest(".choice")];
        return places.map(p => p && getComputedStyle(p))
            .some(s => s && s.outlineStyle === "solid" && parseFloat(s.outlineWidth) >= 2);
    }"""
    order = []
    for _ in range(15):
        page.keyboard.press("Tab")
        order.append(page.evaluate(focused))
        assert page.evaluate(ring), f"no ring around {order[-1]}"
    assert order == [
        "file", "left", "zoom-out", "zoom-in", "zoom-fit", "zoom-one", "right", "stage", "split",
        "model", "quality", "amount", "keep", "download", "scroll",
    ]  # fmt: skip

    page.focus("#split")
    for key, expected in (("ArrowRight", 51), ("ArrowUp", 52), ("ArrowLeft", 51), ("PageDown", 41), ("End", 100),
                          ("ArrowRight", 100), ("Home", 0), ("Shift+ArrowRight", 10)):  # fmt: skip
        page.keyboard.press(key)
        assert sitting.clip() == expected
        assert page.get_attribute("#split", "aria-valuenow") == str(expected)
    page.focus("#stage")
    fitted = sitting.zoom()
    page.keyboard.press("1")
    assert sitting.zoom() == 100
    for _ in range(8):
        page.keyboard.press("+")
    assert sitting.zoom() > 500
    where = "document.getElementById('left-image').style.transform"
    before = page.evaluate(where)
    page.keyboard.press("ArrowRight")
    assert page.evaluate(where) != before
    page.keyboard.press("-")
    page.keyboard.press("0")
    assert sitting.zoom() == fitted


def test_files_are_dropped_and_pasted(visit: Callable[..., Sitting], files: Path) -> None:
    sitting = visit()
    for event, name, status in (("drop", "cat.clt", "Decoded"), ("paste", "cat.png", "Encoded to")):
        data = base64.b64encode((files / name).read_bytes()).decode()
        sitting.page.evaluate(
            """([event, name, data]) => {
                const transfer = new DataTransfer();
                transfer.items.add(new File([Uint8Array.from(atob(data), c => c.charCodeAt(0))], name));
                document.dispatchEvent(event === "drop"
                    ? new DragEvent("drop", { dataTransfer: transfer, bubbles: true, cancelable: true })
                    : new ClipboardEvent("paste", { clipboardData: transfer, bubbles: true }));
            }""",
            [event, name, data],
        )
        sitting.wait(status)
        assert name in sitting.page.text_content("#subject")


def test_a_stream_is_shown(visit: Callable[..., Sitting], files: Path) -> None:
    sitting = visit()
    page = sitting.page
    sitting.open(files / "cat.clt")
    sitting.wait("Decoded")
    assert "240 × 160, quality 40" in page.text_content("#subject")
    assert list(sitting.rows()) == ["Calotype, quality 40"]
    assert page.locator("#right-image").is_visible()
    for absent in ("#split", "#fields", "#download", "#left"):
        assert not page.locator(absent).is_visible()


def test_packets_are_lost_by_a_slider(visit: Callable[..., Sitting], files: Path) -> None:
    sitting = visit()
    page = sitting.page
    assert not page.locator("#loss-field").is_visible()
    sitting.open(files / "cat.png")
    sitting.wait("Encoded to")
    assert not page.locator("#loss-field").is_visible(), "latents have no packets"
    page.select_option("#model", "vqgan")
    expect(page.locator("#loss-field")).to_be_visible(timeout=PATIENCE)
    sitting.wait("Encoded to")
    whole, psnr_cell = page.get_attribute("#right-image", "src"), next(iter(sitting.rows().values()))
    page.focus("#loss")
    page.keyboard.press("End")
    sitting.wait("Restored without packets")
    assert page.text_content("#loss-value") == "60 %"
    assert len(page.text_content("#status").split(",")) == 6, "of ten packets"
    assert page.get_attribute("#right-image", "src") != whole
    page.keyboard.press("Home")
    sitting.wait("Decoded without loss")
    assert next(iter(sitting.rows().values())) == psnr_cell
    page.select_option("#model", "hyperprior")
    expect(page.locator("#loss-field")).not_to_be_visible(timeout=PATIENCE)


def test_a_damaged_stream_is_explained_and_can_be_shown(visit: Callable[..., Sitting], files: Path) -> None:
    sitting = visit()
    sitting.open(files / "damaged.clt")
    sitting.wait_for_error("Tile 3 is damaged")
    assert sitting.page.locator("#empty").is_visible()
    sitting.page.click("#partial")
    sitting.wait("Damaged tiles are filled in: 3")
    assert not sitting.page.locator("#error").is_visible()
    assert sitting.page.locator("#right-image").is_visible()
    refused(sitting, 422)


def test_what_is_no_picture_is_refused_in_words(visit: Callable[..., Sitting], files: Path, tmp_path: Path) -> None:
    sitting = visit()
    sitting.open(files / "text.png")
    sitting.wait_for_error("The input is not a picture of a known format")
    assert not sitting.page.locator("#partial").is_visible()
    large = tmp_path / "large.png"
    large.write_bytes(write_picture(Picture(np.zeros((1000, 1001, 1), np.uint8)), "png"))
    sitting.open(large)
    sitting.wait_for_error("over the limit of 1000000")
    sitting.open(files / "cat.png")
    sitting.wait("Encoded to")
    assert not sitting.page.locator("#error").is_visible()
    refused(sitting, 422, 413)


def test_a_service_that_has_gone_is_noticed(visit: Callable[..., Sitting], files: Path) -> None:
    with serving() as address:
        sitting = visit(address=address)
        expect(sitting.page.locator("#model option")).to_have_count(4)
    sitting.open(files / "cat.png")
    sitting.wait_for_error("The service cannot be reached: is it still running?")
    assert len(sitting.complaints) == 1
    assert "ERR_CONNECTION_REFUSED" in sitting.complaints.pop()


def test_a_picture_that_the_browser_does_not_read(
    visit: Callable[..., Sitting], files: Path, codec: Codec, tmp_path: Path
) -> None:
    sitting = visit()
    page = sitting.page
    sitting.open(files / "cat.tif")
    sitting.wait("Encoded to")
    assert page.locator("#right-image").is_visible()
    assert page.get_attribute("#right-image", "alt") == "Calotype"
    assert page.locator("#left option").all_inner_texts()[0] == "Calotype"
    with page.expect_download() as download:
        page.click("#download")
    assert Path(download.value.path()).read_bytes() == codec.encode(read_picture(files / "cat.tif")).data


def test_the_token_is_asked_for(visit: Callable[..., Sitting], files: Path) -> None:
    with serving(token="open sesame") as address:
        sitting = visit(address=address)
        page = sitting.page
        for words in ("wrong", "open sesame"):
            expect(page.locator("#token-dialog")).to_be_visible()
            page.fill("#token", words)
            page.keyboard.press("Enter")
        expect(page.locator("#model option")).to_have_count(4)
        expect(page.locator("#token-dialog")).not_to_be_visible()
        sitting.open(files / "cat.png")
        sitting.wait("Encoded to")
        refused(sitting, 401, 401)


# Every piece of text that lies on a colour of the page: the smallest contrast there is, and where.
CONTRAST = """() => {
    const parse = text => (text.match(/[\\d.]+/g) ?? []).map(Number);
    const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const ground = e => {
        for (; e; e = e.parentElement) {
            const colour = parse(getComputedStyle(e).backgroundColor);
            if (colour.length === 3 || colour[3] === 1) return colour;
        }
        return [255, 255, 255];
    };
    let worst = [99, "", 0];
    let count = 0;
    for (const e of document.body.querySelectorAll("*")) {
        const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
        if (!own || !e.checkVisibility() || e.closest(".tag, noscript, option")) continue;
        const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))];
        const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        count++;
        if (ratio < worst[0]) worst = [ratio, e.outerHTML.slice(0, 80)];
    }
    return [...worst.slice(0, 2), count];
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize(("width", "height"), [(360, 740), (768, 1024), (1440, 900)])
def test_it_fits_and_can_be_read(
    visit: Callable[..., Sitting], files: Path, width: int, height: int, scheme: str
) -> None:
    sitting = visit(width, height, color_scheme=scheme, reduced_motion="reduce")
    page = sitting.page
    for file, words in ((None, ""), ("cat.png", "Encoded to"), ("cat.clt", "Decoded")):
        if file:
            sitting.open(files / file)
            sitting.wait(words)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        ratio, where, count = page.evaluate(CONTRAST)
        assert count > 10
        assert ratio >= 4.5, where
    stage = page.locator("#stage").bounding_box()
    assert stage["x"] >= 0
    assert stage["width"] >= 0.6 * min(width, 1440)
    assert page.evaluate("getComputedStyle(document.getElementById('busy'), '::after').animationName") == "none"
