"The pages in a real browser, without internet: every picture has pixels and every plot is drawn."
import os, subprocess, sys

import pytest
from conftest import ROOT, sources

pytestmark = pytest.mark.slow

PLOTS = "[...document.scripts].filter(s => s.textContent.includes('plotly.min.js')).length"
LOOK = f'''() => ({{
  blank: [...document.images].filter(i => !i.naturalWidth).map(i => i.src.slice(0, 80)),
  pictures: document.images.length + document.querySelectorAll('.cell-output svg:not(.main-svg)').length,
  plots: {PLOTS},
}})'''

@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    at = sources(tmp_path_factory.mktemp('docs')/'copy')
    subprocess.run([sys.executable, '.ci/docs'], cwd=at, env=dict(os.environ, PYTHONPATH=str(ROOT)), check=True)
    return sorted(p for p in (at/'_docs').rglob('*.html'))

def test_every_picture_appears_offline(pages, chrome):
    total, context = dict(pictures=0, plots=0), chrome.new_context(offline=True)
    for p in pages:
        tab, errors = context.new_page(), []
        tab.on('pageerror', lambda e: errors.append(str(e)))
        tab.goto(p.as_uri(), wait_until='load')
        tab.wait_for_function(f"() => document.querySelectorAll('.js-plotly-plot .main-svg:first-child').length == {PLOTS}", timeout=60000)
        seen = tab.evaluate(LOOK)
        tab.close()
        assert not seen['blank'] and not errors, f'{p.name}: blank {seen["blank"]}, errors {errors}'
        for k in total: total[k] += seen[k]
    assert len(pages) >= len(list((ROOT/'nbs').glob('*.ipynb'))) and total['pictures'] > 0 and total['plots'] > 0, total
