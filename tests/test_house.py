"The rules of the house, each proved from what is committed: cells, imports, sizes, counts, and that nothing generated is stale."
import ast, os, re, shlex, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions

import pytest
import rooms
from conftest import ROOT
from nbdev.doclinks import nbglob

ROOMS = rooms.rooms()
each_room = pytest.mark.parametrize('room', ROOMS, ids=lambda r: r.name)
NOTEBOOKS = rooms.notebooks()
each_notebook = pytest.mark.parametrize('nb', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').with_suffix('').as_posix())
PLACE = {r.name: r.place for r in ROOMS}          # the later in this order, the more may be imported
WHO = packages_distributions()

ini = ConfigParser(delimiters=['='])
ini.read(ROOT/'settings.ini', encoding='utf8')
def declared(key): return {re.match(r'[\w-]+', r)[0].lower().replace('_', '-') for r in shlex.split(ini['DEFAULT'][key])}

def module(room): return ROOT/rooms.LIB/f'{room.name.replace(".", "/")}.py'

# --- notebooks and packages

def test_all_notebooks_are_seen():
    "By git, by these rules and by nbdev alike: no check passes because it looked into no folder."
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', 'nbs/*.ipynb'], cwd=ROOT, capture_output=True, text=True)
    tracked = listed.stdout.split()
    there = {p.relative_to(ROOT).as_posix() for p in NOTEBOOKS}
    assert there == {p for p in tracked if (ROOT/p).exists()} and len(PLACE) == len(ROOMS) > 40
    assert {r.path for r in ROOMS} == {p for p in NOTEBOOKS if re.match(r'\d', p.name)}, 'notebooks that export are called NN_name.ipynb'
    assert there == {p.relative_to(ROOT).as_posix() for p in nbglob(as_path=True)}

def test_folders_are_packages():
    folders = {r.path.parent.relative_to(ROOT/'nbs').as_posix().strip('.') for r in ROOMS}
    assert folders <= set(rooms.PACKAGES), f'name the new folder in PACKAGES of .ci/rooms.py, at its place in the order: {folders - set(rooms.PACKAGES)}'

@each_room
def test_notebook_module_and_title_are_one_word(room):
    assert re.findall(r'^#\|\s*default_exp (\S+)', '\n'.join(c.source for c in room.code), re.M) == [room.name]
    assert room.title == room.stem and room.quote, 'opens with "# name" and a one-line "> quote"'
    assert f'nbs/{room.path.relative_to(ROOT/"nbs").as_posix()}' in module(room).read_text(encoding='utf8')

def test_every_module_has_its_notebook():
    modules = {p for p in (ROOT/rooms.LIB).rglob('*.py')} - {*(ROOT/rooms.LIB).rglob('__init__.py'), ROOT/rooms.LIB/'_modidx.py'}
    assert modules == {module(r) for r in ROOMS}, 'a module without a notebook is a leftover: delete it'

def test_a_number_is_given_once():
    numbers = [(r.package, r.number) for r in ROOMS]
    assert len({*numbers}) == len(numbers), f'two notebooks of a folder with one number: {sorted(n for n in numbers if numbers.count(n) > 1)}'

@each_room
def test_imports_only_from_earlier_notebooks(room):
    unknown = room.imports() - PLACE.keys()
    assert not unknown, f'{room.name} imports {sorted(unknown)}, which no notebook exports'
    wrong = {n for n in room.imports() if PLACE[n] >= room.place}
    assert not wrong, (f'{room.name} imports {sorted(wrong)}, in an exported cell or in a test: only packages above its own and lower numbers of its '
                       f'folder may be imported ({" < ".join(p or "top" for p in rooms.PACKAGES)}); move what is needed up, or this notebook down')

def test_core_path_exists_and_nothing_imports_bench():
    assert set(rooms.CORE_PATH) <= PLACE.keys() and len(rooms.CORE_PATH) == 10
    assert not [r.name for r in ROOMS for n in r.imports() if n.startswith('bench.') and r.package not in ('bench', 'own')]

@each_room
def test_every_export_is_tested(room):
    missing = [n for n in room.exports if n not in room.tested]
    assert not missing, f'{room.name} exports {missing}, which no testing cell mentions'

@each_room
def test_size(room):
    "Of one module; the whole has no limit."
    assert room.lines < 450, f'{room.name}: {room.lines} exported lines, at most 449: split the notebook in two, each with one idea'

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
    "What the library imports is in requirements (for `systems`, in the extra `das`); what tests and pictures import may be in dev_requirements."
    library = declared('requirements') | (declared('das_requirements') if nb.parent.name == 'systems' else set())
    for exported, known in (True, library), (False, library | declared('dev_requirements') | declared('das_requirements')):
        for top in imports(nb, exported):
            assert {d.lower().replace('_', '-') for d in WHO.get(top, [top])} & known, f'{nb.stem} imports {top}: add it to settings.ini'

def test_every_requirement_is_used():
    used = {d.lower().replace('_', '-') for nb in NOTEBOOKS for top in imports(nb, exported=True) for d in WHO.get(top, [])}
    assert declared('requirements') - used == {'anywidget'}, 'anywidget is for plotly, whose FigureWidget asks for it; all others are imported'

def test_nothing_needs_lpips():
    "The package `lpips` brings torchvision, of which no build for CPUs fits; after it diffusers and transformers fail to import."
    assert not {'lpips', 'torchvision'} & (declared('requirements') | declared('dev_requirements') | declared('das_requirements'))

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

OLD_WORDS = set("""told said seen heard hear hears listen listens own some way ways eye sight spoil ship learner equipped awake afresh rivals elsewhere
contest sole write_aside beat speak speaks say says known given earlier past asked ask asks answer answers claims price ladder rung rungs inlet outlet
outlets dice look looks see sees stain dirt blind hide mine theirs want wanted""".split())

def identifiers(tree):
    "Every whole name that code defines or uses: variables, arguments, keywords, functions, classes, attributes but those of torch and numpy."
    for n in ast.walk(tree):
        if isinstance(n, ast.Name): yield n.id
        elif isinstance(n, (ast.arg, ast.keyword)): yield n.arg
        elif isinstance(n, (ast.FunctionDef, ast.ClassDef)): yield n.name
        elif isinstance(n, ast.Attribute) and getattr(n.value, 'id', '') not in ('torch', 'np', 'F'): yield n.attr

@each_notebook
def test_old_words_are_gone(nb):
    "Names are the field's words (table in nbs/design.ipynb); these were a private language."
    left = {name for c in rooms.read(nb) if c.kind == 'code' and c.exported for name in identifiers(c.tree)} & OLD_WORDS
    assert not left, f'{nb.stem} uses {sorted(left)} as names: say what each thing is, e.g. context, target, observed, residuals, features'

@each_notebook
def test_lines_fit(nb):
    long = [l for c in rooms.read(nb) if c.kind == 'code' and c.exported for l in c.source.splitlines() if len(l) > 120]
    assert not long, 'exported lines over 120 columns:\n' + '\n'.join(long)

@each_notebook
def test_a_notebook_is_read_in_ten_minutes(nb):
    cells = rooms.read(nb)
    main = next((i for i, c in enumerate(cells) if c.kind != 'code' and c.source.startswith('## Appendix')), len(cells))
    assert main <= 82, f'{nb.stem} has {main} cells before an appendix, at most 82: split it, or move detail behind a heading "## Appendix"'

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
    def files(at): return {p.relative_to(at): p.read_bytes() for p in (at/folder).rglob('*') if p.is_file() and p.suffix != '.pyc'
                            and not any(part[0] == '.' for part in p.relative_to(at).parts)}
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
    assert table.count('.ipynb') == len(ROOMS)
    assert table in (ROOT/'README.md').read_text(encoding='utf8'), 'the map is stale: run .ci/readme'

def test_readme_has_the_two_commands():
    "The first fence runs the main job, the second the tests: `.ci/run` reads them from here."
    install = 'pip install -c constraints.txt -e ".[dev]"'
    assert fences(ROOT) == [f'{install} && dfot_study', f'{install} && pytest']

def fences(root): return re.findall(r'^```sh\n(.*?)\n```', (root/'README.md').read_text(encoding='utf8'), re.M | re.S)

def test_constraints_hold_every_requirement():
    pinned = {l.split('==')[0].lower().replace('_', '-'): l for l in (ROOT/'constraints.txt').read_text().splitlines() if '==' in l}
    assert (declared('requirements') | declared('dev_requirements') | declared('das_requirements')) <= pinned.keys()
    assert pinned['torch'] == 'torch==2.13.0'

def test_jupyterlab_may_be_open(copy):
    "What JupyterLab keeps beside an open notebook is no notebook: not for the counts, not for the tests."
    code = 'import sys; sys.path.insert(0, ".ci"); import rooms; from nbdev.doclinks import nbglob; print(len(rooms.notebooks()), len(nbglob()), rooms.totals())'
    def counted(): return subprocess.run([sys.executable, '-c', code], cwd=copy, capture_output=True, text=True, check=True).stdout
    before = counted()
    for nb in ('00_core.ipynb', 'denoiser/01_uvit.ipynb'):
        beside = (copy/'nbs'/nb).parent/'.ipynb_checkpoints'
        beside.mkdir()
        (beside/nb.split('/')[-1].replace('.ipynb', '-checkpoint.ipynb')).write_bytes((copy/'nbs'/nb).read_bytes())
    assert counted() == before and before.split()[0] == str(len(NOTEBOOKS))

@pytest.mark.slow
def test_F34_a_first_notebook_of_ones_own(copy):
    "A copy of a notebook under another name, exported, executed, cleaned, mapped: the rules of the house stay green."
    own = copy/'nbs'/'denoiser'/'10_mycontext.ipynb'
    text = (copy/'nbs'/'denoiser'/'08_context.ipynb').read_text(encoding='utf8')
    for old, new in ('"# context', '"# mycontext'), ('default_exp denoiser.context', 'default_exp denoiser.mycontext'), ('extend_context(', 'my_extend_context('): text = text.replace(old, new)
    own.write_text(text, encoding='utf8')
    subprocess.run('git init -q && git add -A', shell=True, cwd=copy, check=True)
    env = dict(os.environ, PYTHONPATH=str(copy), PATH=f'{sys.prefix}/bin:{os.environ["PATH"]}', OMP_NUM_THREADS='1')
    for line in ('nbdev_export', '.ci/execute denoiser/10', 'nbdev_clean', '.ci/readme', f'{sys.executable} -m pytest -q -p no:xdist -x tests/test_house.py'):
        done = subprocess.run(line, shell=True, cwd=copy, env=env | dict(PYTEST_ADDOPTS=''), capture_output=True, text=True)
        assert done.returncode == 0, f'{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}'
    assert (copy/'dfot_vggt'/'denoiser'/'mycontext.py').exists()
