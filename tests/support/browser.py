"""Chromium without a window, driven by chromedriver's own protocol: JSON over HTTP, so that no library is needed."""

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAMS = ("chromium", "chromedriver")
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-sync"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-default-apps",
        "--disable-extensions",
    ),
)
_SECONDS = 120


def missing() -> list[str]:
    """Programs that are not on this machine."""
    return [name for name in PROGRAMS if shutil.which(name) is None]


@dataclass(frozen=True)
class Browser:
    """One window. ``url`` is the session's."""

    url: str

    def call(self, method: str, path: str, values: Any = None) -> Any:
        return _request(method, f"{self.url}/{path}", values)

    def open(self, page: Path, *, width: int = 1200, dark: bool = False) -> None:
        """Opens a file as on a screen of this width in CSS pixels, and forgets what has been logged before."""
        self.devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 600
        )
        self.scheme(dark=dark)
        self.log("browser")
        self.log("performance")
        self.call("POST", "url", {"url": page.absolute().as_uri()})

    def scheme(self, *, dark: bool) -> None:
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[feature])

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function's body returns. A promise is waited for."""
        return self.call("POST", "execute/sync", {"script": script, "args": list(arguments)})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.call("POST", "goog/cdp/execute", {"cmd": command, "params": parameters})

    def log(self, kind: str) -> list[dict[str, Any]]:
        """What has been logged since this was asked before."""
        return self.call("POST", "se/log", {"type": kind})

    def complaints(self) -> list[str]:
        """Errors and warnings of the console."""
        return [entry["message"] for entry in self.log("browser") if entry["level"] in ("SEVERE", "WARNING")]

    def requests(self) -> list[str]:
        """Addresses that the page has asked for."""
        messages = [json.loads(entry["message"])["message"] for entry in self.log("performance")]
        return [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    """Started with an empty profile in ``folder``, and ended with the block."""
    command = ["chromedriver", "--port=0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        assert driver.stdout is not None
        try:
            # "ChromeDriver was started successfully on port 12345."
            port = next(line.rstrip(".\n").split()[-1] for line in driver.stdout if "successfully on port" in line)
            server = f"http://127.0.0.1:{port}"
            options = {"args": [*_FLAGS, f"--user-data-dir={folder / 'profile'}"], "binary": shutil.which("chromium")}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"}}
            session = _request("POST", f"{server}/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
            window = Browser(f"{server}/session/{session}")
            try:
                yield window
            finally:
                window.call("DELETE", "")
        finally:
            driver.terminate()


def _request(method: str, url: str, values: Any) -> Any:
    body = None if method == "DELETE" else json.dumps({} if values is None else values).encode()
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url.rstrip("/"), data=body, headers=headers, method=method)
    # A proxy of the environment has no part in this.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_SECONDS) as answer:
            return json.loads(answer.read())["value"]
    except urllib.error.HTTPError as error:
        raise RuntimeError(json.loads(error.read())["value"]["message"]) from None
