"""The explorer in JupyterLab, in a real browser: a slider is moved and the figure changes.

Slow. Skipped where there is no browser or package for it; in CI (`CI` set) that is a failure.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

if not os.environ.get("CI"):
    for needed in ("selenium", "jupyterlab", "ipywidgets"):
        pytest.importorskip(needed)

from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TOKEN = "explorer-test"
PATIENCE = 120  # seconds, for a busy machine; a quiet one needs a few
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--disable-dev-shm-usage", "--window-size=1400,1000",
)  # fmt: skip

EXPLORE = "from specstop.explorer import explore\nexplorer = explore()\nexplorer"
CUT = "for slider in explorer.sliders.values():\n    slider.unobserve_all('value')\n"
DISCONNECTED = EXPLORE.removesuffix("explorer") + CUT + "explorer"

PIXELS = """
const done = arguments[arguments.length - 1], image = document.querySelector('img.widget-image');
if (!image || !image.src) { done(null); return; }
fetch(image.src).then(answer => answer.arrayBuffer()).then(bytes => crypto.subtle.digest('SHA-256', bytes)).then(
  digest => done(Array.from(new Uint8Array(digest)).map(byte => byte.toString(16).padStart(2, '0')).join('')),
  () => done(null));
"""
"""SHA-256 of the picture the browser shows, null if there is none yet."""


RUN = """
const prompt = document.querySelector('.jp-Notebook .jp-CodeCell .jp-InputPrompt');
if (!window.jupyterapp || !prompt) return false;
if (prompt.textContent.trim() !== '[ ]:') return true;
const status = document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status;
if (status === 'idle' && !(Date.now() - window.lastTry < 4000)) {
  window.lastTry = Date.now();
  window.jupyterapp.commands.execute('notebook:run-all-cells');
}
return false;
"""
"""Run all cells, every few seconds until one has started: JupyterLab drops the command while the kernel connects."""


def find(name):
    """Path of a program of the browser; in CI it must be there."""
    path = shutil.which(name)
    if path is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{name} is not installed; .ci/browser installs it")
    return path


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """A headless Chromium with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = find("chromium")
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    running = webdriver.Chrome(options, webdriver.ChromeService(find("chromedriver")))
    running.set_script_timeout(PATIENCE)
    yield running
    running.quit()


@pytest.fixture(scope="module")
def lab(driver, tmp_path_factory):
    """JupyterLab on a free port, with no settings but these: its folder and its address."""
    folder, home = tmp_path_factory.mktemp("notebooks"), tmp_path_factory.mktemp("jupyter")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
              "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")  # fmt: skip
    env = os.environ | {name: str(home / name.lower()) for name in places} | {"PYTHONPATH": str(ROOT)}
    options = {
        "ServerApp.root_dir": folder, "ServerApp.port": port, "ServerApp.port_retries": 0, "ServerApp.ip": "127.0.0.1",
        "IdentityProvider.token": TOKEN, "ServerApp.open_browser": False, "ServerApp.allow_root": True,
        "LabApp.expose_app_in_browser": True, "LabApp.news_url": "", "LabApp.check_for_updates_class":
        "jupyterlab.NeverCheckForUpdate",
    }  # fmt: skip
    command = [sys.executable, "-m", "jupyterlab", *(f"--{key}={value}" for key, value in options.items())]
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_server(server, address, home / "log")
        yield folder, address
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for_server(server, address, log):
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and server.poll() is None:
        try:
            with urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=5):
                return
        except OSError:
            time.sleep(0.3)
    raise AssertionError(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def open_notebook(driver, lab, name, *cells):
    """Write a notebook of these cells, open it in JupyterLab and run all of it."""
    folder, address = lab
    code = [{"cell_type": "code", "source": cell, "metadata": {}, "outputs": [], "execution_count": None, "id": f"c{i}"}
            for i, cell in enumerate(cells)]  # fmt: skip
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = {"cells": code, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (folder / f"{name}.ipynb").write_text(json.dumps(notebook))
    driver.get(f"{address}/lab/tree/{name}.ipynb?token={TOKEN}&reset")
    until(driver, lambda _: driver.execute_script(RUN))


def until(driver, condition, seconds=PATIENCE):
    return WebDriverWait(
        driver, seconds, poll_frequency=0.2, ignored_exceptions=(StaleElementReferenceException,)
    ).until(condition)


def picture(driver):
    return driver.execute_async_script(PIXELS)


def first_picture(driver):
    try:
        return until(driver, lambda _: picture(driver))
    except TimeoutException:
        text = driver.find_element(By.CSS_SELECTOR, ".jp-Notebook").text
        raise AssertionError(f"no picture in the notebook:\n{text[:2000]}") from None


def drag(driver, label, pixels):
    """Move the slider of this label with the mouse; again if the page was still settling and it missed the handle."""

    path = f"//*[contains(@class, 'widget-slider')][label[normalize-space() = '{label}']]"

    def parts():
        box = driver.find_element(By.XPATH, path)
        return [box.find_element(By.CSS_SELECTOR, name) for name in (".noUi-handle", ".widget-readout")]

    def moved(_):
        handle, number = parts()
        before = number.text
        ActionChains(driver, duration=50).click_and_hold(handle).move_by_offset(pixels, 0).release().perform()
        return number.text != before

    until(driver, moved)


def moves_the_figure(driver, label, pixels, seconds):
    """Whether the picture in the browser is another one within so many seconds of the slider's move."""
    before = first_picture(driver)
    drag(driver, label, pixels)
    try:
        until(driver, lambda _: picture(driver) not in (None, before), seconds)
    except TimeoutException:
        return False
    return True


def test_a_slider_moves_the_figure_and_back(driver, lab):
    open_notebook(driver, lab, "explorer", EXPLORE)
    at_rest = first_picture(driver)
    assert moves_the_figure(driver, "acceptance", -40, PATIENCE)
    said = driver.find_element(By.CSS_SELECTOR, ".widget-html-content").text
    assert said.startswith("Optimum ")
    assert moves_the_figure(driver, "most candidates", -40, PATIENCE)
    driver.find_element(By.CSS_SELECTOR, "button.jupyter-button").click()
    until(driver, lambda _: picture(driver) == at_rest)  # the same settings, the same bytes
    assert driver.find_element(By.CSS_SELECTOR, ".widget-html-content").text != said


def test_that_check_can_fail(driver, lab):
    """A widget whose callbacks are disconnected shows its picture and keeps it."""
    open_notebook(driver, lab, "disconnected", DISCONNECTED)
    assert not moves_the_figure(driver, "acceptance", -40, 10)
