"Every notebook under nbs/ is one test, run as nbdev_test runs it."
import gc

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_notebook

cfg = get_config()

@pytest.mark.parametrize('nb', sorted(nbglob(as_path=True)), ids=lambda p: p.stem)
def test_notebook(nb, request):
    force = ['slow'] if request.config.getoption('--slow') else []
    ok, _ = run_notebook(nb.absolute(), skip_flags=cfg.tst_flags.split(), force_flags=force, basepath=cfg.config_path)
    gc.collect()
    assert ok, f'{nb} failed: traceback on stderr'
