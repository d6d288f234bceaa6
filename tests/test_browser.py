"A reader's first minute: JupyterLab opens a notebook in a real browser, the cells run, a slider is moved, the plot follows."
import json, os, socket, subprocess, sys, time, urllib.request

import nbformat
import pytest
from conftest import ROOT
from nbformat.v4 import new_code_cell, new_notebook

pytestmark = pytest.mark.slow

CELLS = ['''import torch
from dfot_vggt.widgets.level_explorer import LevelExplorer
from dfot_vggt.show import lines''', '''
frame = torch.arange(6.)[:, None, None, None]                            # the map of `down.0` at frame t is t + .5 everywhere
explorer = LevelExplorer(torch.rand(6, 3, 16, 16), {'down.0': (frame + .5).expand(6, 4, 8, 8), 'mid': -frame.expand(6, 9, 4, 4)})
explorer.box''', '''lines(loss=[3., 2., 1.])''', '''print('all cells ran')''']

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
    return tab, asked

PLOTS = "[...document.querySelectorAll('.js-plotly-plot')].filter(p => p.data)"
SHOWN = f"""() => {{
  const plot = {PLOTS}.find(p => p.data.some(d => d.type == 'heatmap')), plain = a => Array.from(a._inputArray || a)
  return plot && [plain(plain(plot.data.find(d => d.type == 'heatmap').z)[0])[0], plot.layout.title.text]
}}"""

def test_handles_move_the_plot(lab, chrome, tmp_path):
    nb = new_notebook(cells=[new_code_cell(c) for c in CELLS], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))
    nbformat.write(nb, tmp_path/'explore.ipynb')
    tab, asked = open_and_run(chrome, lab, 'explore.ipynb')
    def shows(value, title):
        tab.wait_for_function(f"() => ({SHOWN})()?.[1] == '{title}'", timeout=60000)
        assert tab.evaluate(SHOWN) == [value, title], 'the map follows its title'
    tab.wait_for_function(f"() => {PLOTS}.some(p => p.data.some(d => d.name == 'loss'))", timeout=60000)     # a figure of the house; nothing moves any more
    shows(.5, 'down.0 · channel 0 of 4 · frame t 0')
    tab.locator('.widget-slider', has_text='frame t').locator('.noUi-handle').click()
    for _ in range(3): tab.keyboard.press('ArrowRight')
    shows(3.5, 'down.0 · channel 0 of 4 · frame t 3')
    tab.locator('.widget-dropdown select').select_option('mid')
    shows(-3, 'mid · channel 0 of 9 · frame t 3')
    assert not tab.query_selector_all('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]')
    assert all(u.startswith((lab, 'data:', 'blob:', lab.replace('http', 'ws'))) for u in asked), 'nothing is asked for elsewhere'
