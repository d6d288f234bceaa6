"""Every notebook under nbs/ is one test, run as nbdev_test runs it: several in one process, so none may leave a switch turned.
On one thread: the tensors are small, sums come out the same on every machine, and a second thread on a busy machine is a hundred times slower."""
import gc

import pytest
import rooms
import torch
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_notebook

cfg = get_config()

@pytest.fixture
def switches():
    "Torch's global switches, turned back afterwards."
    def state(): return dict(grad=torch.is_grad_enabled(), dtype=torch.get_default_dtype(), deterministic=torch.are_deterministic_algorithms_enabled())
    before, threads = state(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield before, state
    torch.set_grad_enabled(before['grad'])
    torch.set_default_dtype(before['dtype'])
    torch.use_deterministic_algorithms(before['deterministic'])
    torch.set_num_threads(threads)

NOTEBOOKS = sorted(nbglob(as_path=True))

def test_all_notebooks_are_run(): assert {p.absolute() for p in NOTEBOOKS} == {*rooms.notebooks()}

@pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.relative_to(cfg.nbs_path).with_suffix('').as_posix())
def test_notebook(nb, request, switches):
    force = ['slow'] if request.config.getoption('--slow') else []
    before, state = switches
    ok, _ = run_notebook(nb.absolute(), skip_flags=cfg.tst_flags.split(), force_flags=force, basepath=cfg.config_path)
    gc.collect()
    assert ok, f'{nb.name} failed: traceback on stderr'
    assert state() == before, f'{nb.name} leaves {state()}; the next notebook of the same process expects {before}'
