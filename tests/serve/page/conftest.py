"""A server with a guarded stack and its base, and the playground of a browser on it."""

from __future__ import annotations

import json
from typing import Any

import pytest

KEYS = {"Enter": 13, "Tab": 9, " ": 32, "Escape": 27}
TEXT = {"Enter": "\r", " ": " "}
CTRL, SHIFT = 2, 8
WAIT = """new Promise((done, fail) => {
  const until = performance.now() + 10000;
  const look = () => (%s) ? done(true)
    : performance.now() > until ? fail(new Error(`not within 10 s: ${document.body.innerText}`))
    : setTimeout(look, 10);
  look();
})"""
FINISHED = "document.querySelector('#current .run:not(.pending)')"
PIXELS = """[...document.querySelectorAll(%r)].map(image => {
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext('2d');
  context.drawImage(image, 0, 0);
  return [...context.getImageData(0, 0, 4, 4).data].join();
})"""


class Playground:
    """The page in a browser, as a person with a keyboard sees it."""

    def __init__(self, browser: Any, address: str) -> None:
        self.browser, self.address = browser, address

    def open(self, *, width: int = 1280, dark: bool = False, ready: bool = True) -> None:
        """Open the page; wait until it knows the server."""
        self.browser.open(f"{self.address}/", width=width, dark=dark)
        if ready:
            self.wait("document.querySelector('.example')")

    def wait(self, condition: str) -> None:
        """Wait until a JavaScript expression is true."""
        self.browser.evaluate(WAIT % condition)

    def value(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        return self.browser.evaluate(script)

    def text(self, selector: str) -> str:
        """Return the visible text of an element."""
        return self.value(f"document.querySelector({selector!r}).innerText")

    def count(self, selector: str) -> int:
        """Return the number of visible elements."""
        script = "[...document.querySelectorAll(%r)].filter(e => e.checkVisibility()).length"
        return self.value(script % selector)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press and release a key."""
        common = {"key": key, "modifiers": modifiers, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": TEXT[key]} if key in TEXT and not modifiers & CTRL else {}
        self.browser.call("Input.dispatchKeyEvent", type="keyDown", **common, **text)
        self.browser.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def type(self, text: str) -> None:
        """Type into the focused field."""
        self.browser.call("Input.insertText", text=text)

    def focus(self) -> str:
        """Return the id of the focused element, or its text."""
        return self.value("document.activeElement.id || document.activeElement.innerText")

    def fill(self, **fields: Any) -> None:
        """Set fields of the form."""
        for name, value in fields.items():
            own = "checked" if isinstance(value, bool) else "value"
            js = json.dumps(value if isinstance(value, bool) else str(value))
            self.value(f"document.getElementById({name!r}).{own} = {js}; 0")

    def generate(self, prompt: str, **fields: Any) -> None:
        """Fill the form, press Ctrl+Enter in the prompt, and wait for the answer."""
        self.fill(prompt=prompt, **fields)
        self.value("document.querySelector('#prompt').focus()")
        self.press("Enter", CTRL)
        self.wait(f"{FINISHED}?.querySelector('h2').innerText === {prompt!r}")
        self.value("Promise.all([...document.images].map(i => i.decode().catch(() => 0)))")

    def pixels(self, selector: str = "#current img") -> list[str]:
        """Return the first pixels of each image."""
        return self.value(PIXELS % selector)

    def requests(self) -> list[str]:
        """Return the addresses that the page has loaded since it was opened."""
        return [
            event["params"]["request"]["url"]
            for event in self.browser.events
            if event["method"] == "Network.requestWillBeSent"
        ]

    def complaints(self) -> list[str]:
        """Return what the page wrote to the console; answers of 4xx and 5xx are none."""
        return [
            str(event["params"])
            for event in self.browser.events
            if event["method"] in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown")
            or (
                event["method"] == "Log.entryAdded"
                and event["params"]["entry"]["source"] != "network"
            )
        ]


@pytest.fixture(scope="module")
def page_engine(fakes):
    """Return a fake engine with a guarded stack, its base and a stack of another model."""
    from safegen.serve.messages import StackInfo

    base = StackInfo("mini", "mini", "c" * 64, size=(64, 64), is_base=True)
    other = StackInfo("other", "sd15", "d" * 64, size=(96, 64))
    return fakes.FakeEngine((fakes.STACK, base, other))


@pytest.fixture(scope="module")
def page_address(fakes, page_engine):
    """Yield the address of a server whose operator allows the base."""
    from safegen.serve.config import ServerConfig

    config = ServerConfig(stacks=("fake",), concept="skulls", allow_base=True)
    with fakes.serving(config, page_engine) as address:
        yield address


@pytest.fixture
def playground(chromium, page_address):
    """Return the open page."""
    page = Playground(chromium, page_address)
    page.open()
    return page


@pytest.fixture
def make_playground(chromium):
    """Return a function that gives the page of another server, not opened."""
    return lambda address: Playground(chromium, address)
