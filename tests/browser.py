"""A real Chromium on a real notebook server, for tests: JupyterLab, Notebook 7 or Voila, of this or another environment.

    with opened(folder, ["1 + 1"], front="lab") as book:
        book.run(0)
        expect(book.find(".jp-OutputArea-output")).to_contain_text("2")
        book.shot("two")

Pictures go to `_screens/` beside the project, or where the environment variable SAGE_SCREENS says.
"""
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import expect, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
SCREENS = Path(os.environ.get("SAGE_SCREENS") or ROOT/"_screens")
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
INSTALL = "apt-get install chromium fonts-dejavu-core, or `playwright install chromium`"
PATIENCE = 90  # seconds: the machine may be busy with other tests
expect.set_options(timeout=1000 * PATIENCE)

# No pop-up with news, and every cell in the page even when it is off the screen.
SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}}
# The toolbar says "idle" before there is a kernel, and what is run that early is dropped without a word: ask the application itself.
READY = """() => { const session = window.jupyterapp?.shell?.currentWidget?.context?.sessionContext;
    return session?.isReady && session.kernelDisplayStatus == 'idle' && session.session?.kernel?.connectionStatus == 'connected' }"""
# Notebook 7.6 complains about its own settings while it loads.
NOT_OURS = ("notebook_core",)
PANEL = "const app = window.jupyterapp, panel = app.shell.currentWidget;"
# What an output says that went wrong: an exception, or text on stderr.
COMPLAINTS = "[data-mime-type='application/vnd.jupyter.error'], [data-mime-type='application/vnd.jupyter.stderr']"


def chromium():
    "The path of a Chromium or Chrome, or None"
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found: return found
    with sync_playwright() as play: own = play.chromium.executable_path  # what `playwright install` put in its cache
    return own if Path(own).exists() else None


def needed():
    "The path of the browser; without one the test is skipped, or fails where SAGE_BROWSER=required says that there has to be one"
    path = chromium()
    if path: return path
    if os.environ.get("SAGE_BROWSER") == "required": pytest.fail(f"no Chromium on this machine: {INSTALL}")
    pytest.skip(f"no Chromium on this machine: {INSTALL}")


# ---- the server -------------------------------------------------------------------------------------------------------

def write_notebook(path, cells):
    "A notebook of code cells, as a reader would have written it"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = [dict(cell_type="code", id=f"cell-{at}", metadata={}, source=source, outputs=[], execution_count=None)
        for at, source in enumerate(cells)]
    about = dict(kernelspec=dict(name="python3", display_name="Python 3", language="python"))
    path.write_text(json.dumps(dict(cells=content, metadata=about, nbformat=4, nbformat_minor=5)), encoding="utf-8")
    return path


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def environment(folder, runtime):
    """Variables with which a server reads and writes its settings in a folder of its own;
    a socket's path must be short, so `runtime` is elsewhere"""
    places = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data", JUPYTERLAB_SETTINGS_DIR="lab",
        JUPYTERLAB_WORKSPACES_DIR="spaces", IPYTHONDIR="ipython")
    (folder/"config"/"labconfig").mkdir(parents=True, exist_ok=True)
    (folder/"config"/"labconfig"/"default_setting_overrides.json").write_text(json.dumps(SETTINGS))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "PYTEST", "PYTHON", "VIRTUAL_ENV"))}
    return kept | {name: str(folder/place) for name, place in places.items()} | dict(JUPYTER_PLATFORM_DIRS="1", JUPYTER_RUNTIME_DIR=runtime)


def command(front, notebook, port, token, python):
    "How a server is started, the address of the notebook, and an address that answers once it is up"
    here = f"http://127.0.0.1:{port}"
    if front == "voila":
        return ([python, "-m", "voila", notebook.name, "--no-browser", f"--port={port}", "--Voila.ip=127.0.0.1"],
            f"{here}/", f"{here}/voila/static/")
    start = [python, "-m", "jupyterlab" if front == "lab" else front, "--no-browser", "--allow-root", "--ip=127.0.0.1",
        f"--port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={notebook.parent}", "--expose-app-in-browser"]
    page = f"{'lab/tree' if front == 'lab' else 'notebooks'}/{notebook.name}"
    return start, f"{here}/{page}?token={token}", f"{here}/api?token={token}"


def answers(address):
    "Whether a server says anything, be it that there is no such page"
    try: urllib.request.urlopen(address, timeout=2)
    except urllib.error.HTTPError: return True
    except OSError: return False
    return True


@contextmanager
def served(notebook, folder, front="lab", python=sys.executable):
    "A server on a free port of this machine alone; the address of the notebook. Its log is left in the folder"
    start, address, sign = command(front, notebook, free_port(), secrets.token_hex(8), python)
    # ports are chosen before they are used: now and then somebody else has taken one meanwhile
    start.append("--KernelManager.transport=ipc")
    with tempfile.TemporaryDirectory(prefix="kernels-") as runtime, (folder/f"{front}.log").open("w") as log:
        process = subprocess.Popen([str(part) for part in start], cwd=notebook.parent, env=environment(folder, runtime),
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            until = time.monotonic() + PATIENCE
            while not answers(sign):
                assert process.poll() is None and time.monotonic() < until, (
                    f"the server did not come up:\n{(folder/f'{front}.log').read_text()}")
                time.sleep(.2)
            yield address
        finally:
            process.terminate()
            try: process.wait(30)
            except subprocess.TimeoutExpired: process.kill()


# ---- the page ---------------------------------------------------------------------------------------------------------

class Book:
    "An open notebook: its cells are run by number, its widgets found by CSS"
    def __init__(self, page, address, front, label=""):
        self.page, self.address, self.front, self.label = page, address, front, label or front
        self.uncaught, self.console, self.shots = [], [], 0
        page.set_default_timeout(1000 * PATIENCE)
        page.on("pageerror", self.threw)
        page.on("console", lambda message: self.console.append(message.text) if message.type == "error" else None)

    def threw(self, error):
        "Keep an error that nothing on the page has caught"
        said = f"{error}\n{error.stack}"
        places = [line for line in said.splitlines() if line.strip().startswith("at ")]
        if not places or not all(any(name in line for name in NOT_OURS) for line in places if "://" in line): self.uncaught.append(said)

    def open(self):
        "Load the page and wait for its kernel"
        self.page.goto(self.address, wait_until="domcontentloaded")
        self.ready()
        return self

    def ready(self):
        "Wait until the kernel is connected and idle; in Voila, which has run all cells by then, until there is a widget"
        if self.front == "voila": return self.page.wait_for_selector(".jupyter-widgets", timeout=3000 * PATIENCE)
        self.page.wait_for_selector(".jp-Notebook .jp-CodeCell")
        self.page.wait_for_function(READY)
        if self.front == "lab":
            self.page.evaluate("() => { if (!window.jupyterapp.shell.leftCollapsed) window.jupyterapp.shell.collapseLeft() }")

    def find(self, css): return self.page.locator(css)

    def say(self, code):
        "Run JavaScript in which `app` is the application and `panel` the notebook"
        return self.page.evaluate(f"async () => {{ {PANEL} {code} }}")

    def start(self, command):
        "Execute a command of the application without waiting for its end"
        self.page.evaluate(f"() => {{ window.ran = false; window.jupyterapp.commands.execute('{command}').then(() "
            f"=> window.ran = true, () => window.ran = true) }}")

    def run(self, number):
        "Run one cell and wait until it has ended well; Voila runs them all, and by itself"
        if self.front == "voila": return
        self.say(f"panel.content.activeCellIndex = {number};")
        self.start("notebook:run-cell")
        self.page.wait_for_function("() => window.ran", timeout=3000 * PATIENCE)
        self.well()

    def run_all(self):
        "Run every cell and wait until all have ended well"
        if self.front == "voila": return
        self.start("notebook:run-all-cells")
        self.page.wait_for_function("() => window.ran", timeout=3000 * PATIENCE)
        self.well()

    def well(self):
        "No cell shows an exception or anything on stderr"
        said = self.find(COMPLAINTS).all_inner_texts()
        assert said == [], "\n".join(said)

    def outputs(self, number):
        "What the saved notebook would hold as outputs of a cell"
        return self.say(f"return panel.content.widgets[{number}].model.sharedModel.toJSON().outputs;")

    def save(self): self.say("await panel.context.save();")

    def restart(self):
        "Restart the kernel: all it knew is gone, and widgets on the page are dead; in Voila by loading the page anew"
        if self.front == "voila": self.page.reload(wait_until="domcontentloaded")
        else: self.say("await panel.context.sessionContext.restartKernel();")
        self.ready()

    def reopen(self):
        "Save, end the kernel, load the page anew, as on the next day"
        self.save()
        self.say("await panel.context.sessionContext.shutdown();")
        self.page.reload(wait_until="domcontentloaded")
        self.ready()

    def dark(self, on=True):
        "The dark theme, or the light one again"
        self.say(f"await app.commands.execute('apputils:change-theme', {{theme: 'JupyterLab {'Dark' if on else 'Light'}'}});")
        self.page.wait_for_function(f"() => document.body.dataset.jpThemeLight == '{'false' if on else 'true'}' && "
            f"!document.querySelector('#jupyterlab-splash')")

    def wide(self, width, height=1000): self.page.set_viewport_size(dict(width=width, height=height))

    def shot(self, name, css=None):
        "A picture of the window, or of one thing on it, for which the window is made high enough"
        self.shots += 1
        SCREENS.mkdir(parents=True, exist_ok=True)
        path, size = SCREENS/f"{self.label}-{self.shots:02d}-{name}.png", self.page.viewport_size
        if not css: return self.page.screenshot(path=path)
        thing = self.find(css).first
        self.wide(size["width"], max(size["height"], int(thing.bounding_box()["height"]) + 300))
        thing.screenshot(path=path)
        self.wide(**size)


@contextmanager
def opened(folder, cells, front="lab", python=sys.executable, label="", width=1200, height=1000):
    "A notebook with these cells, open in a browser with its kernel ready; at the end no error may have gone uncaught on the page"
    path = needed()
    notebook = write_notebook(folder/"book"/"book.ipynb", cells)
    with served(notebook, folder, front, python) as address, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, headless=True,
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        try:
            book = Book(browser.new_page(viewport=dict(width=width, height=height)), address, front, label)
            try:
                yield book.open()
                assert book.uncaught == [], book.uncaught
            except BaseException:
                book.shot("failed")
                raise
        finally: browser.close()
