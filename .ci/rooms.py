"""What the notebooks say about themselves: read by `nbs/index.ipynb` (map and counts), `.ci/docs` and `tests/test_house.py` (the rules).

Nothing is imported or run: a notebook is parsed from its cells, so what is counted is what is committed."""
import ast, json, re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIB = 'dfot_vggt'
PACKAGES = {                                     # folder -> what it is for; a package imports only from those before it
    '': 'tools that everything stands on',
    'data': 'cameras, videos, windows',
    'denoiser': 'the DFoT network and its sampler',
    'geometry': 'VGGT and its features',
    'inject': 'ways of geometry into the denoiser',
    'learn': 'training, recipes, measures',
    'systems': 'relatives, built from the same parts',
    'widgets': 'looking inside',
    'app': 'commands',
    'bench': 'benchmarks; nothing imports them',
    'own': 'notebooks of your own: `nbs/NN_name.ipynb` from number 10'}
CORE_PATH = ('core trace data.camera data.clips denoiser.uvit denoiser.diffusion denoiser.sampling geometry.features inject.controlnet '
             'learn.train').split()              # what everyone reads
EXPORT = {'export', 'exports', 'exporti'}
OWN = 10                                         # notebooks directly in nbs/ from this number on belong to the reader

def calls(tree):
    "Names called anywhere in `tree`: `f(...)` and `x.f(...)` alike."
    return {getattr(n.func, 'id', getattr(n.func, 'attr', '')) for n in ast.walk(tree) if isinstance(n, ast.Call)}

def names(tree):
    "Every identifier and attribute that `tree` mentions."
    return {getattr(n, 'id', getattr(n, 'attr', None)) for n in ast.walk(tree)} - {None}

def defined(tree):
    "Public functions and classes of an exported cell; a `@patch` adds to a class instead."
    return [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name[0] != '_'
            and 'patch' not in names(ast.List(n.decorator_list))]

def returned(tree):
    "`(name, what it returns)` for every function and method that a cell defines."
    for n in ast.walk(tree):
        if isinstance(n, ast.FunctionDef):
            out = [m.value for m in ast.walk(n) if isinstance(m, (ast.Return, ast.Yield)) and m.value] + [n.returns]*bool(n.returns)
            yield n.name, set().union(*map(names, out)) | {m.value for o in out for m in ast.walk(o) if isinstance(m, ast.Constant) and isinstance(m.value, str)}

def flows(tree):
    "`(name, what its definition mentions)` for everything that a cell defines or assigns."
    for n in tree.body:
        if isinstance(n, (ast.FunctionDef, ast.ClassDef)): yield n.name, names(n)
        else: yield from ((m.id, names(n)) for m in ast.walk(n) if isinstance(m, ast.Name) and isinstance(m.ctx, ast.Store))

def asserts(tree, checkers=()):
    "Does `tree` hold something that can fail on purpose: assert, test_*, assert_*, or a checker defined in an earlier cell?"
    return any(isinstance(n, ast.Assert) for n in ast.walk(tree)) or any(re.match(r'test_|assert_', c) or c in checkers for c in calls(tree))

def imported(tree):
    "Full dotted names of the modules that `tree` imports; a public name of the package counts as the module that it comes from."
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names)
        elif isinstance(n, ast.ImportFrom): yield from _sources(n.module or '.', [a.name for a in n.names])

def _sources(module, names):
    package = module.removeprefix(LIB).lstrip('.')
    if module.split('.')[0] != LIB or package not in PACKAGES: return [module]
    return [f'{LIB}.{public().get(n, n)}' if not package else f'{module}.{n}' for n in names]

@cache
def public():
    "`{name: module}` of what the package itself offers, from the list in its `__init__`."
    tree = ast.parse((ROOT/LIB/'__init__.py').read_text(encoding='utf8'))
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '') == '_PUBLIC']
    return {n: f'{m}.{n}' if m == 'learn' else m for found in lists for m, names in ast.literal_eval(found).items() for n in names.split()}

def drawing(html):
    "Does this HTML draw something?"
    return bool(re.search(r'<(img|svg|video|canvas)\b|<script.*?plotly', html, re.S))

def picture(out):
    "Is this cell output something to look at?"
    data = out.get('data', {})
    return any(m.startswith('image/') or 'plotly' in m for m in data) or drawing(''.join(data.get('text/html', '')))

@dataclass
class Cell:
    kind: str                                        # code or markdown
    source: str
    outputs: list
    flags: set = field(default_factory=set)          # nbdev directives: export, hide, slow ...
    tree: ast.AST = None

    def __post_init__(self):
        if self.kind != 'code': return
        self.flags = set(re.findall(r'^#\|\s*(\w+)', self.source, re.M))
        self.tree = ast.parse(re.sub(r'^(\s*)[%!].*', r'\1pass', self.source, flags=re.M))             # magics are no Python

    @property
    def exported(self): return bool(self.flags & EXPORT)

@dataclass
class Room:
    path: Path
    cells: list

    def __post_init__(self):
        self.code = [c for c in self.cells if c.kind == 'code']
        self.number, self.stem = re.fullmatch(r'(\d\d)_(\w+)', self.path.stem).groups()
        self.number, folder = int(self.number), self.path.parent.relative_to(ROOT/'nbs').as_posix().strip('.')
        self.name = f'{folder}.{self.stem}'.lstrip('.')                    # of the module, below the package: 'denoiser.uvit'
        self.package = 'own' if not folder and self.number >= OWN else folder
        head = next(c.source for c in self.cells if c.kind == 'markdown')
        self.title, self.quote = re.search(r'^# (.+)', head, re.M).group(1), ' '.join(re.findall(r'^> ?(.+)', head, re.M))
        self.exports = [n for c in self.code if c.flags & {'export', 'exports'} for n in defined(c.tree)]
        self.lines = sum(bool(l.strip()) for c in self.code if c.exported for l in c.source.splitlines())
        self.tests, checkers = [], set()
        for c in self.code:
            if c.exported: continue
            if asserts(c.tree, checkers): self.tests.append(c)
            checkers |= {n.name for n in c.tree.body if isinstance(n, ast.FunctionDef) and asserts(n, checkers)}
        self.pictures = sum(picture(o) for c in self.code for o in c.outputs)

    @property
    def place(self):
        "What comes earlier is smaller: package, number, name."
        return [*PACKAGES].index(self.package), self.number, self.stem

    @property
    def core_path(self): return self.name in CORE_PATH

    @property
    def tested(self):
        "Names that a testing cell mentions, or that reach one through the notebook's own variables, or as the class that a tested function returns."
        classes = {n.name for c in self.code for n in c.tree.body if isinstance(n, ast.ClassDef)}
        found = set().union(*(names(c.tree) for c in self.tests))
        made = [f for c in self.code for f in (((n, used & classes) for n, used in returned(c.tree)) if c.exported else flows(c.tree))]
        while more := set().union(*(used for name, used in made if name in found)) - found: found |= more
        return found

    def imports(self, exported_only=False):
        "Names of the modules of this package that the notebook imports: 'denoiser.uvit'."
        found = {m.removeprefix(f'{LIB}.') for c in self.code if c.exported or not exported_only for m in imported(c.tree) if m.startswith(LIB+'.')}
        return found - {self.name}

@cache
def read(path):
    "The cells of a notebook, without those that never run."
    nb = json.loads(Path(path).read_text(encoding='utf8'))
    return [Cell(c['cell_type'], ''.join(c['source']), c.get('outputs', [])) for c in nb['cells'] if 'eval: false' not in ''.join(c['source'])]

def notebooks():
    "Paths of all notebooks, those of folders too; what JupyterLab keeps beside an open one is none."
    return sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(ROOT/'nbs').parts))

@cache
def rooms():
    "All notebooks that export a module, in reading order."
    return sorted((Room(p, read(p)) for p in notebooks() if re.match(r'\d\d_', p.name)), key=lambda r: r.place)

def packages():
    "`{package: its notebooks}` of those that have any, in order."
    return {p: here for p in PACKAGES if (here := [r for r in rooms() if r.package == p])}

def totals():
    "Sums over all notebooks: lines, exports, tests, pictures."
    return [sum(n) for n in zip(*((r.lines, len(r.exports), len(r.tests), r.pictures) for r in rooms()))]

def table():
    "The map: one row a package, one a notebook, one total."
    rows = ['| notebook | what it is | lines | exports | tests | pictures |', '|---|---|--:|--:|--:|--:|']
    for package, here in packages().items():
        rows.append(f'| **{package or "top"}** | **{PACKAGES[package]}** | | | | |')
        rows += [f'| [{r.stem}]({r.path.relative_to(ROOT/"nbs").as_posix()}){" ★" if r.core_path else ""} | {r.quote} | {r.lines} | '
                 f'{len(r.exports)} | {len(r.tests)} | {r.pictures} |' for r in here]
    return '\n'.join([*rows, f'| **{len(rooms())} notebooks** | | ' + ' | '.join(f'**{n}**' for n in totals()) + ' |'])

def counts():
    "What the project is proud of, in numbers."
    lines, exports, tests, pictures = totals()
    return (f'{len(rooms())} notebooks hold {lines} exported lines: {exports} functions and classes, {tests} cells that can fail '
            f'({tests/exports:.1f} per export) and {pictures} pictures ({pictures/len(rooms()):.1f} per notebook).')

def edges():
    "`(from, to)` packages, the first imported by the second; those implied by a longer way are left out, and so is the top."
    home = {r.name: r.package for r in rooms()}
    up = {p: {home[n] for r in here for n in r.imports(exported_only=True) if n in home} - {p, ''} for p, here in packages().items()}
    def reach(p): return set().union(*({q} | reach(q) for q in up.get(p, ())))
    return sorted((q, p) for p in up for q in up[p] if not any(q in reach(k) for k in up[p] - {q}))

def svg(w=960, left=150, right=70, bw=104, bh=26, gap=8, pad=12):
    "The packages as rows from top to bottom, a box per notebook, the core path filled, an arrow from what is imported down to who imports it."
    per, y, at, o = (w - left - right)//(bw + gap), 14, {}, []
    for package, here in packages().items():
        height = pad*2 + -(-len(here)//per)*(bh + gap) - gap
        at[package] = y, y + height
        o.append(f'<rect x="6" y="{y}" width="{w-right-6}" height="{height}" rx="8" fill="#f6f8fa" stroke="#d0d7de"/>'
                 f'<text x="20" y="{y+height/2+5:.0f}" font-size="15" font-weight="bold" fill="#1f2d3a">{package or "top"}</text>')
        for j, r in enumerate(here):
            x, yy = left + j%per*(bw + gap), y + pad + j//per*(bh + gap)
            box, ink = ('#1f4e79', '#fff') if r.core_path else ('#fff', '#1f2d3a')
            o.append(f'<rect x="{x}" y="{yy}" width="{bw}" height="{bh}" rx="6" fill="{box}" stroke="#1f4e79"/>'
                     f'<text x="{x+bw/2:.0f}" y="{yy+17}" text-anchor="middle" font-size="12" fill="{ink}">{r.stem}</text>')
        y += height + 14
    for k, (a, b) in enumerate(e for e in edges() if all(p in at for p in e)):
        x0, y0, y1, bend = w - right, at[a][1] - 10, at[b][0] + 10 + 5*(k % 3), 16 + 9*(k % 5)
        o.append(f'<path d="M{x0} {y0} C{x0+bend} {y0} {x0+bend} {y1} {x0+3} {y1}" fill="none" stroke="#d9822b" stroke-width="1.5" marker-end="url(#tip)"/>')
    tip = ('<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
           '<path d="M0 0 L8 4 L0 8 z" fill="#d9822b"/></marker></defs>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {y}" style="max-width:100%" font-family="sans-serif">'
    return '\n'.join([head, tip, f'<rect width="{w}" height="{y}" fill="#fff"/>', *o, '</svg>'])

if __name__ == '__main__': print(table())
