"The rules of the house, each proved from what is committed: cells, imports, sizes, counts, and that nothing generated is stale."
import ast, re, shlex, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions

import pytest
import rooms
from conftest import ROOT

ROOMS = rooms.rooms()
each_room = pytest.mark.parametrize('room', ROOMS, ids=lambda r: r.name)
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
each_notebook = pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.stem)
place = {r.name: r.path.stem for r in ROOMS}      # '30_heads' < '30_vggt': rooms of one number are a suite, in the order of their names
WHO = packages_distributions()

ini = ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini', encoding='utf8')
def declared(key): return {re.match(r'[\w-]+', r)[0].lower().replace('_', '-') for r in shlex.split(ini['DEFAULT'][key])}

def source(room): return (ROOT/rooms.LIB/f'{room.name}.py').read_text(encoding='utf8')

# --- rooms

def test_there_are_rooms(): assert len(ROOMS) >= 3 and len(place) == len(ROOMS), 'notebooks must have distinct names'

@each_room
def test_notebook_module_and_title_are_one_word(room):
    assert re.findall(r'^#\|\s*default_exp (\S+)', '\n'.join(c.source for c in room.code), re.M) == [room.name]
    assert room.title == room.name and room.quote, 'opens with "# name" and a one-line "> quote"'
    assert room.name in source(room) and f'{room.path.name}' in source(room)

def test_every_module_has_its_notebook():
    modules = {p.stem for p in (ROOT/rooms.LIB).rglob('*.py')} - {'__init__', '_modidx'}
    assert modules == set(place), 'a module without a notebook is a leftover: delete it'

@each_room
def test_imports_only_from_earlier_rooms(room):
    wrong = {n for n in room.imports() if place.get(n, '99') >= room.path.stem}
    assert not wrong, f'{room.number:02} {room.name} imports {sorted(wrong)}, in an exported cell or in a test'

@each_room
def test_leaves_can_be_deleted(room):
    if room.name in rooms.USERS: return
    suite = {r.name for r in ROOMS if r.number == room.number}                         # a leaf of several rooms goes as a whole
    assert not room.imports(exported_only=True) & set(rooms.LEAVES) - suite

@each_room
def test_every_export_is_tested(room):
    missing = [n for n in room.exports if n not in room.tested]
    assert not missing, f'{room.name} exports {missing}, which no testing cell mentions'

@each_room
def test_size(room): assert room.lines < 450, f'{room.name}: {room.lines} exported lines; is this one idea?'

# --- cells

def imports(nb, exported):
    "Top-level names of the foreign packages that a notebook imports."
    for c in rooms.read(nb):
        if c.kind != 'code' or (exported and not c.exported): continue
        for m in rooms.imported(c.tree):
            top = m.split('.')[0]
            if top not in sys.stdlib_module_names and top not in (rooms.LIB, 'rooms'): yield top

@each_notebook
def test_every_import_is_declared(nb):
    "What the library imports is in requirements; what tests and pictures import may be in dev_requirements."
    for exported, known in (True, declared('requirements')), (False, declared('requirements') | declared('dev_requirements')):
        for top in imports(nb, exported):
            assert {d.lower().replace('_', '-') for d in WHO.get(top, [top])} & known, f'{nb.stem} imports {top}: add it to settings.ini'

def test_every_requirement_is_used():
    used = {d.lower().replace('_', '-') for nb in NOTEBOOKS for top in imports(nb, exported=True) for d in WHO.get(top, [])}
    assert declared('requirements') - used == {'anywidget'}, 'anywidget is for plotly, whose FigureWidget asks for it; all others are imported'

@each_notebook
def test_imports_live_in_cells_of_their_own(nb):
    "The docs build runs every cell that holds an import: it must not hold anything dear."
    for c in rooms.read(nb):
        if c.kind != 'code' or c.exported or 'hide' in c.flags or not any(rooms.imported(c.tree)): continue
        assert all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in c.tree.body), f'an import among other code:\n{c.source}'

@each_notebook
def test_first_cell_is_title_and_quote(nb):
    "nbdev's docs turn the first cell into front matter and drop what follows the quote."
    assert re.fullmatch(r'# \S+\n+> .+', rooms.read(nb)[0].source.strip()), 'the first cell: "# name" and one line "> quote", nothing else'

@each_notebook
def test_no_debugger_and_no_torchvision(nb):
    for c in rooms.read(nb):
        if c.kind == 'code': assert not re.search(r'\bpdb\b|\bbreakpoint\(|\btorchvision\b', re.sub(r'#.*', '', c.source)), c.source

@each_notebook
def test_lines_are_readable(nb):
    long = [l for c in rooms.read(nb) if c.kind == 'code' for l in c.source.splitlines() if len(l) > 140]
    assert not long, 'over 140 columns:\n' + '\n'.join(long)

@each_notebook
def test_committed_with_outputs_and_without_errors(nb):
    cells = [c for c in rooms.read(nb) if c.kind == 'code']
    assert any(c.outputs for c in cells), f'run it: .ci/execute {nb.stem}'
    assert not [o for c in cells for o in c.outputs if o['output_type'] == 'error']

@each_notebook
def test_notebook_below_1_MB(nb): assert nb.stat().st_size < 1e6

# --- nothing generated is stale

def changed(copy, folder):
    "Files of `folder` that differ between the checkout and `copy`."
    def files(at): return {p.relative_to(at): p.read_bytes() for p in (at/folder).rglob('*') if p.is_file() and p.suffix != '.pyc' and p.name[0] != '.'}
    a, b = files(ROOT), files(copy)
    return sorted(str(p) for p in a.keys() | b.keys() if a.get(p) != b.get(p))

def command(name, cwd): subprocess.run([sys.executable, '-m', f'nbdev.{name}'] if '.' in name else [f'{sys.prefix}/bin/{name}'], cwd=cwd, check=True)

def test_export_changes_nothing(copy):
    command('nbdev_export', copy)
    assert not changed(copy, rooms.LIB), 'the package is stale, or was edited by hand: run nbdev_export'
    assert (copy/'pyproject.toml').read_bytes() == (ROOT/'pyproject.toml').read_bytes()

def test_clean_changes_nothing(copy):
    command('nbdev_clean', copy)
    assert not changed(copy, 'nbs'), 'run nbdev_clean'

def test_readme_is_fresh():
    got = subprocess.run([sys.executable, '.ci/readme', '--check'], cwd=ROOT, capture_output=True, text=True)
    assert got.returncode == 0, got.stderr
    table = rooms.table().replace('](', '](nbs/')
    assert table in (ROOT/'README.md').read_text(encoding='utf8'), 'the map is stale: run .ci/readme'

def test_readme_has_the_two_commands():
    "The first fence runs the main job, the second the tests: `.ci/run` reads them from here."
    install = 'pip install -c constraints.txt -e ".[dev]"'
    assert fences(ROOT) == [f'{install} && dfot_study', f'{install} && pytest']

def fences(root): return re.findall(r'^```sh\n(.*?)\n```', (root/'README.md').read_text(encoding='utf8'), re.M | re.S)

def test_constraints_hold_every_requirement():
    pinned = {l.split('==')[0].lower().replace('_', '-'): l for l in (ROOT/'constraints.txt').read_text().splitlines() if '==' in l}
    assert (declared('requirements') | declared('dev_requirements')) <= pinned.keys()
    assert pinned['torch'] == 'torch==2.13.0'
