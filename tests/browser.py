"""A headless Chromium driven over WebDriver with the standard library alone."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import urllib.request
from pathlib import Path

import pytest


class Browser:
    """Debian's chromium and chromium-driver; raises pytest's skip where one is missing."""

    def __init__(self) -> None:
        missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
        if missing:
            pytest.skip(f"{' and '.join(missing)} missing: apt-get install chromium chromium-driver")
        self._profile = tempfile.TemporaryDirectory(prefix="vitkit-browser-", ignore_cleanup_errors=True)
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._base = f"http://127.0.0.1:{self._port()}"
        arguments = [
            "--headless=new",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={self._profile.name}",
        ]
        if os.geteuid() == 0:
            arguments.append("--no-sandbox")
        wanted = {
            "browserName": "chrome",
            "goog:chromeOptions": {"args": arguments, "binary": shutil.which("chromium")},
            "goog:loggingPrefs": {"browser": "ALL"},
        }
        made = self._ask("/session", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/session/{made['sessionId']}"

    def _port(self) -> int:
        assert self._driver.stdout is not None
        for line in self._driver.stdout:
            if found := re.search(r"started successfully on port (\d+)", line):
                return int(found[1])
        raise RuntimeError("chromedriver did not start")

    def _ask(self, path: str, body: object = None, method: str = "POST"):
        data = None if method != "POST" else json.dumps(body or {}).encode()
        request = urllib.request.Request(self._base + path, data, method=method)
        # Without a proxy: the driver is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def close(self) -> None:
        self._ask("", method="DELETE")
        self._driver.terminate()
        self._driver.wait(10)
        self._profile.cleanup()

    def open(self, page: Path) -> None:
        self._ask("/url", {"url": page.resolve().as_uri()})

    def run(self, script: str, *arguments: object):
        """What a JavaScript function body returns."""
        return self._ask("/execute/sync", {"script": script, "args": list(arguments)})

    def click(self, selector: str) -> None:
        """A real click, refused by the driver where something covers the element."""
        (element,) = self._ask("/element", {"using": "css selector", "value": selector}).values()
        self._ask(f"/element/{element}/click")

    def tool(self, command: str, **parameters: object):
        """A command of the DevTools protocol."""
        return self._ask("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def show(self, *, width: int = 1280, scheme: str = "light", media: str = "screen") -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.tool("Emulation.setEmulatedMedia", media=media, features=features)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.tool("Emulation.setDeviceMetricsOverride", **size)

    def picture(self, path: Path) -> None:
        shot = self.tool("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def errors(self) -> list[str]:
        """What the console has complained about since the last call."""
        return [f"{one['level']}: {one['message']}" for one in self._ask("/se/log", {"type": "browser"})]
