"What the tests share: where things are, the slow tier, a browser where there is one."
import shutil, sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT/'.ci'))

def pytest_addoption(parser): parser.addoption('--slow', action='store_true', help='run the slow tests and the slow cells of the notebooks too')

def pytest_collection_modifyitems(config, items):
    if config.getoption('--slow'): return
    for i in items:
        if 'slow' in i.keywords: i.add_marker(pytest.mark.skip(reason='slow: pytest --slow'))

def sources(to):
    "Copy the checkout's sources, to change or build at will."
    skip = shutil.ignore_patterns('.git', '.venv', 'venv', 'runs', '_proc', '_docs', 'build', 'dist', '*.egg-info', '__pycache__', '.ipynb_checkpoints', '.*.tmp*')
    return Path(shutil.copytree(ROOT, to, ignore=skip))

@pytest.fixture
def copy(tmp_path): return sources(tmp_path/'copy')

@pytest.fixture
def chrome():
    "A headless Chromium's page-maker; skips where no browser is installed."
    exe = next(filter(None, map(shutil.which, ['chromium', 'chromium-browser', 'google-chrome'])), None)
    if not exe: pytest.skip('no Chromium on this machine')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=exe, args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'])
        yield browser
        browser.close()
