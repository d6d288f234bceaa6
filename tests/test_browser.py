"A reader's first minute: JupyterLab opens a notebook in a real browser, the cells run, a slider is moved, the plot follows."
import json, os, socket, subprocess, sys, time, urllib.request

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = pytest.mark.slow

CELLS = ['''import ipywidgets as W, plotly.graph_objects as go''', '''
view = go.FigureWidget(go.Scatter(x=[0, 1, 2], y=[0, 0, 0]))
slider = W.IntSlider(0, 0, 10, description='frame')
def follow(change):
    with view.batch_update(): view.data[0].y = [0, change['new'], 2*change['new']]
slider.observe(follow, 'value')
W.VBox([slider, view])''', '''print('all cells ran')''']

@pytest.fixture
def lab(tmp_path):
    "JupyterLab's address, serving `tmp_path`, with settings of its own."
    dirs = {k: tmp_path/'jupyter'/k for k in ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTERLAB_SETTINGS_DIR', 'JUPYTERLAB_WORKSPACES_DIR')}
    news = dirs['JUPYTERLAB_SETTINGS_DIR']/'@jupyterlab'/'apputils-extension'
    news.mkdir(parents=True)
    (news/'notification.jupyterlab-settings').write_text(json.dumps(dict(fetchNews='false', checkForUpdates=False)))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    args = ['--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}', '--IdentityProvider.token=', '--ServerApp.password=',
            f'--ServerApp.root_dir={tmp_path}', '--LabApp.news_url=None', '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate']
    env = dict(os.environ, PYTHONPATH=str(ROOT), **{k: str(v) for k, v in dirs.items()})
    with open(tmp_path/'server.log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'jupyter', 'lab', *args], env=env, stdout=log, stderr=log)
        try:
            url, deadline = f'http://127.0.0.1:{port}', time.time() + 60
            while True:
                try: urllib.request.urlopen(f'{url}/api/status', timeout=1); break
                except OSError:
                    assert time.time() < deadline and server.poll() is None, (tmp_path/'server.log').read_text()
                    time.sleep(.25)
            yield url
        finally:
            server.terminate()
            server.wait(20)

def open_and_run(chrome, url, name):
    "The notebook's tab after Run All Cells; every address it asked for."
    tab, asked = chrome.new_page(viewport=dict(width=1300, height=1000)), []
    tab.on('request', lambda r: asked.append(r.url))
    tab.goto(f'{url}/lab/tree/{name}?reset', wait_until='domcontentloaded')
    tab.wait_for_selector('.jp-Notebook .jp-Cell', timeout=60000)
    tab.wait_for_selector('#jp-main-statusbar >> text=| Idle', timeout=60000)      # before that, Run asks for a kernel
    tab.get_by_role('menuitem', name='Run', exact=True).click()
    tab.get_by_role('menuitem', name='Run All Cells', exact=True).click()
    tab.wait_for_selector('.jp-OutputArea-output:has-text("all cells ran")', timeout=120000)
    tab.wait_for_selector('.js-plotly-plot .main-svg', timeout=60000)
    return tab, asked

Y = "Array.from((d => d._inputArray || d)(document.querySelector('.js-plotly-plot').data[0].y))"

def test_slider_moves_the_plot(lab, chrome, tmp_path):
    nb = new_notebook(cells=[new_code_cell(c) for c in CELLS], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))
    nbformat.write(nb, tmp_path/'widget.ipynb')
    tab, asked = open_and_run(chrome, lab, 'widget.ipynb')
    assert tab.evaluate(f'() => {Y}') == [0, 0, 0]
    tab.locator('.widget-slider .noUi-handle').first.click()
    for _ in range(3): tab.keyboard.press('ArrowRight')
    tab.wait_for_function(f'() => {Y}[2] == 6', timeout=15000)
    assert tab.evaluate(f'() => {Y}') == [0, 3, 6]
    assert not tab.query_selector_all('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]')
    assert all(u.startswith((lab, 'data:', 'blob:', lab.replace('http', 'ws'))) for u in asked), 'nothing is asked for elsewhere'
