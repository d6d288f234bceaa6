"The explorer under a real hand: JupyterLab draws a house figure, its slider moves, and the map that the browser shows is the next frame's."
import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from test_browser import lab, open_and_run    # noqa: F401 (lab is a fixture)

pytestmark = pytest.mark.slow

CELLS = ['''import torch
from dfot_vggt.explore import LevelExplorer
from dfot_vggt.show import lines''', '''
acts = {'down.0': torch.arange(4*2*3*3.).view(4, 2, 3, 3), 'mid': torch.arange(4*5*2*2.).view(4, 5, 2, 2)}     # t c h w
explorer = LevelExplorer(torch.zeros(4, 3, 8, 8), acts)
explorer.box''', '''lines(loss=[3., 2., 1.])''', '''print('all cells ran')''']

FIND = "[...document.querySelectorAll('.js-plotly-plot')].find(p => p.data && p.data.some(d => d.type == 'heatmap'))"
MAP = f'''() => {{ const z = {FIND}.data.find(d => d.type == 'heatmap').z
                 return Array.from(z, row => Array.from(row._inputArray || row)) }}'''

def test_slider_moves_the_map(lab, chrome, tmp_path):    # noqa: F811
    nb = new_notebook(cells=[new_code_cell(c) for c in CELLS], metadata=dict(kernelspec=dict(name='python3', display_name='Python 3', language='python')))
    nbformat.write(nb, tmp_path/'explorer.ipynb')
    tab, _ = open_and_run(chrome, lab, 'explorer.ipynb')
    def shows(words): tab.wait_for_function(f"() => {FIND}?.layout.title.text.includes('{words}')", timeout=60000)
    tab.wait_for_function("() => [...document.querySelectorAll('.js-plotly-plot')].some(p => p.data?.[0].name == 'loss')", timeout=60000)
    shows('down.0 · channel 0 of 2 · frame t 0')                             # both figures are drawn, so nothing moves under the mouse any more
    down, mid = np.arange(4*2*3*3.).reshape(4, 2, 3, 3), np.arange(4*5*2*2.).reshape(4, 5, 2, 2)
    assert np.allclose(tab.evaluate(MAP), down[0, 0])
    tab.locator('.widget-slider .noUi-handle').nth(1).click()                # 0: channel, 1: frame t
    for _ in range(2): tab.keyboard.press('ArrowRight')
    shows('frame t 2')
    assert np.allclose(tab.evaluate(MAP), down[2, 0])
    tab.locator('.widget-dropdown select').select_option('mid')
    shows('mid · channel 0 of 5 · frame t 2')
    assert np.allclose(tab.evaluate(MAP), mid[2, 0])
