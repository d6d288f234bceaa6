"The pages in a real browser, without internet: every picture has pixels and every plot is drawn."
import http.server, os, subprocess, sys, threading
from functools import partial

import pytest
import rooms
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
    assert len(pages) == len(rooms.notebooks()) and total['pictures'] > 0 and total['plots'] > 0, total

CONTRAST = '''() => [...document.querySelectorAll('.smalldocs-search-results.show .search-result > div')].map(e => {
  const rgb = c => c.match(/[\\d.]+/g).map(Number), light = c => { const [r, g, b] = rgb(c).slice(0, 3).map(v => (v /= 255) <= .03928 ? v/12.92 : ((v + .055)/1.055)**2.4); return .2126*r + .7152*g + .0722*b; };
  let back = e; while (back && rgb(getComputedStyle(back).backgroundColor)[3] === 0) back = back.parentElement;
  const [a, b] = [getComputedStyle(e).color, getComputedStyle(back).backgroundColor].map(light).sort((x, y) => y - x);
  return (a + .05)/(b + .05); })'''

def test_search_results_can_be_read(pages, chrome):
    "Contrast of each line of a result against what is behind it: at least 4.5, the limit of WCAG for text."
    root = next(p.parent for p in pages if p.name == 'index.html')
    serve = partial(http.server.SimpleHTTPRequestHandler, directory=str(root))
    serve.log_message = lambda *a: None
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), serve)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        tab = chrome.new_page(viewport=dict(width=1200, height=800))
        tab.goto(f'http://127.0.0.1:{server.server_port}/denoiser/uvit.html', wait_until='load')
        tab.locator('.smalldocs-search input:visible').first.fill('guidance')
        tab.wait_for_selector('.smalldocs-search-results.show .search-result')
        seen = tab.evaluate(CONTRAST)
    finally: server.shutdown(); server.server_close()
    assert seen and min(seen) >= 4.5, seen
