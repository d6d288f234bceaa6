"What `from dfot_vggt import ...` offers: one list, lazy, every name there, cheap."
import subprocess, sys

import pytest
import dfot_vggt
from conftest import ROOT

def loaded(code, *modules):
    "Which of `modules` are loaded after `code` in a new process."
    ask = f'{code}\nimport sys; print(*[m for m in {modules!r} if m in sys.modules])'
    p = subprocess.run([sys.executable, '-c', ask], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    return p.stdout.split()

@pytest.mark.parametrize('name', dfot_vggt.__all__)
def test_every_name_is_there(name):
    value = getattr(dfot_vggt, name)
    assert name in dir(dfot_vggt) and getattr(value, '__name__', '').split('.')[-1] == name

def test_the_list_is_short_and_has_what_people_look_for():
    assert len(dfot_vggt.__all__) == len(set(dfot_vggt.__all__)) <= 36
    assert {'load_dfot', 'load_vggt', 'UViT3DPose', 'VGGT', 'rollout', 'next_frames', 'HistoryGuidance', 'ControlNet', 'TokenInjector', 'SpatialMemory',
            'train', 'recipes'} <= set(dfot_vggt.__all__)
    with pytest.raises(AttributeError, match='no attribute'): dfot_vggt.UViT

def test_the_package_alone_loads_no_torch(): assert loaded('import dfot_vggt', 'torch', 'numpy', 'plotly') == []

@pytest.mark.parametrize('name', ['UViT3DPose', 'load_dfot', 'load_vggt', 'ControlNet', 'rollout'])
def test_a_model_loads_no_compiler(name):
    "roma alone costs 1.3 s, since it loads torch's compiler."
    assert loaded(f'from dfot_vggt import {name}', 'torch', 'roma', 'torch._dynamo') == ['torch']

def test_a_model_draws_nothing(): assert loaded('from dfot_vggt import UViT3DPose', 'plotly', 'IPython', 'av', 'accelerate') == []
