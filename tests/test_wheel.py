"A wheel built from the sources works without the clone: every module imports, every asset is inside, every command starts."
import subprocess, sys, zipfile
from configparser import ConfigParser

import pytest
import rooms
from conftest import ROOT, sources

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp('wheel')
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '-w', out, sources(out/'sources')], check=True)
    return next(out.glob('*.whl'))

def inside(wheel):
    with zipfile.ZipFile(wheel) as z: return set(z.namelist()), {n: z.read(n).decode() for n in z.namelist() if 'dist-info' in n}

def test_wheel_holds_modules_and_assets_and_nothing_else(wheel):
    names, _ = inside(wheel)
    lib = {p.relative_to(ROOT).as_posix() for p in (ROOT/'dfot_vggt').rglob('*') if p.is_file() and '__pycache__' not in p.parts and p.name[0] != '.'}
    assert {n for n in names if 'dist-info' not in n} == lib

def test_installed_wheel_works_elsewhere(wheel, tmp_path):
    "Dependencies come from this environment; the package must come from the wheel."
    site = tmp_path/'site'
    subprocess.run([sys.executable, '-m', 'pip', 'install', '-q', '--no-deps', '--target', site, wheel], check=True)
    modules = sorted('.'.join(p.relative_to(ROOT).with_suffix("").parts) for p in (ROOT/'dfot_vggt').rglob('[a-z]*.py'))
    assert len(modules) == len(rooms.rooms()), 'a module per notebook, in all folders'
    assets = sorted(p.relative_to(ROOT/'dfot_vggt'/'assets').as_posix() for p in (ROOT/'dfot_vggt'/'assets').rglob('*') if p.is_file())
    code = f'''
import sys, importlib; sys.path.insert(0, {str(site)!r})
for m in {modules}: assert importlib.import_module(m).__file__.startswith({str(site)!r}), m
from dfot_vggt.core import asset
for a in {assets}: assert asset(a).read_bytes() and str(asset(a)).startswith({str(site)!r}), a
print(len({modules}), 'modules', len({assets}), 'assets')'''
    got = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    assert got.stdout.split()[0] == str(len(modules))

def test_commands_are_functions_of_the_wheel(wheel):
    names, meta = inside(wheel)
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT/'settings.ini')
    text = next((t for n, t in meta.items() if n.endswith('entry_points.txt')), '')
    for line in ini['DEFAULT']['console_scripts'].split():
        name, target = line.split('=')
        module, function = target.split(':')
        assert f'{name} = {target}' in text
        assert f'{module.replace(".", "/")}.py' in names
        assert f'def {function}(' in (ROOT/f'{module.replace(".", "/")}.py').read_text()
