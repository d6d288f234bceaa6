"""What the notebooks say about themselves: read by `nbs/index.ipynb` (map and counts) and by `tests/test_house.py` (the rules).

Nothing is imported or run: a room is parsed from its cells, so what is counted is what is committed."""
import ast, json, re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIB = 'dfot_vggt'
CHAPTERS = ['Instruments', 'Worlds', 'Denoiser', 'Geometry in', 'Learning', 'Using']                   # by the tens digit
SPINE = 'core trace camera clips uvit diffusion sampling features control train'.split()               # what everyone reads
LEAVES = 'context tokens memory recall align tracks prefer metrics explore'.split()                           # what can be deleted
USERS = 'explore recipes study'.split()                                                                # who may import a leaf
EXPORT = {'export', 'exports', 'exporti'}

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
    "Full dotted names of the modules that `tree` imports, `from lib import room` counted as the room."
    for n in ast.walk(tree):
        if isinstance(n, ast.Import): yield from (a.name for a in n.names)
        elif isinstance(n, ast.ImportFrom): yield from ([f'{LIB}.{a.name}' for a in n.names] if n.module == LIB else [n.module or '.'])

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
        self.number, self.name = re.fullmatch(r'(\d\d)_(\w+)', self.path.stem).groups()
        self.number = int(self.number)
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
    def spine(self): return self.name in SPINE
    @property
    def tested(self):
        "Names that a testing cell mentions, or that reach one through the notebook's own variables, or as the class that a tested function returns."
        classes = {n.name for c in self.code for n in c.tree.body if isinstance(n, ast.ClassDef)}
        found = set().union(*(names(c.tree) for c in self.tests))
        made = [f for c in self.code for f in (((n, used & classes) for n, used in returned(c.tree)) if c.exported else flows(c.tree))]
        while more := set().union(*(used for name, used in made if name in found)) - found: found |= more
        return found

    def imports(self, exported_only=False):
        "Rooms that this one imports."
        found = {m.split('.')[1] for c in self.code if c.exported or not exported_only for m in imported(c.tree) if m.startswith(LIB+'.')}
        return found - {self.name}

@cache
def read(path):
    "The cells of a notebook, without those that never run."
    nb = json.loads(Path(path).read_text(encoding='utf8'))
    return [Cell(c['cell_type'], ''.join(c['source']), c.get('outputs', [])) for c in nb['cells'] if 'eval: false' not in ''.join(c['source'])]

@cache
def rooms():
    "All rooms in order of their numbers."
    return [Room(p, read(p)) for p in sorted((ROOT/'nbs').glob('[0-9][0-9]_*.ipynb'))]

def totals():
    "Sums over all rooms: lines, exports, tests, pictures."
    return [sum(n) for n in zip(*((r.lines, len(r.exports), len(r.tests), r.pictures) for r in rooms()))]

def table():
    "The map: one row a room, one total."
    rows = ['| room | what it is | lines | exports | tests | pictures |', '|---|---|--:|--:|--:|--:|']
    for i, chapter in enumerate(CHAPTERS):
        here = [r for r in rooms() if r.number//10 == i]
        if here: rows.append(f'| **{i} · {chapter}** | | | | | |')
        rows += [f'| [{r.number:02} {r.name}]({r.path.name}){" ★" if r.spine else ""} | {r.quote} | {r.lines} | {len(r.exports)} | {len(r.tests)} | '
                 f'{r.pictures} |' for r in here]
    return '\n'.join([*rows, f'| **{len(rooms())} rooms** | | ' + ' | '.join(f'**{n}**' for n in totals()) + ' |'])

def counts():
    "What the house is proud of, in numbers."
    lines, exports, tests, pictures = totals()
    return (f'{len(rooms())} notebooks hold {lines} exported lines: {exports} functions and classes, {tests} cells that can fail '
            f'({tests/exports:.1f} per export) and {pictures} pictures ({pictures/len(rooms()):.1f} per notebook).')

def edges():
    "`(from, to)` room names: exported imports, but for those of core and show, and those implied by a longer way."
    up = {r.name: {n for n in r.imports(exported_only=True) if n not in ('core', 'show')} for r in rooms()}
    def reach(n): return set().union(*({m} | reach(m) for m in up.get(n, ())))
    return [(m, n) for n in up for m in up[n] if not any(m in reach(k) for k in up[n] - {m})]

def svg(w=960, bw=112, bh=28, row=44, top=58):
    "The house as a picture: a column per chapter, a box per room, the spine filled, a line per import."
    cols = [[r for r in rooms() if r.number//10 == i] for i in range(len(CHAPTERS))]
    h = top + row*max(map(len, cols)) + 6
    at = {r.name: (20 + i*(w-40-bw)/(len(cols)-1), top + j*row) for i, col in enumerate(cols) for j, r in enumerate(col)}
    o = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h}" style="max-width:100%" font-family="sans-serif">',
         f'<rect width="{w}" height="{h}" fill="#fff"/>']
    for i, c in enumerate(CHAPTERS):
        o.append(f'<text x="{20 + i*(w-40-bw)/(len(cols)-1) + bw/2:.0f}" y="30" text-anchor="middle" font-size="14" fill="#555">{i} {c}</text>')
    for a, b in sorted(edges()):
        if a not in at: continue
        (x0, y0), (x1, y1) = at[a], at[b]
        if x0 == x1: d = f'M{x0+bw:.0f} {y0+bh/2:.0f} C{x0+bw+22:.0f} {y0+bh/2:.0f} {x1+bw+22:.0f} {y1+bh/2:.0f} {x1+bw:.0f} {y1+bh/2:.0f}'
        else: d = f'M{x0+bw:.0f} {y0+bh/2:.0f} C{(x0+bw+x1)/2:.0f} {y0+bh/2:.0f} {(x0+bw+x1)/2:.0f} {y1+bh/2:.0f} {x1:.0f} {y1+bh/2:.0f}'
        o.append(f'<path d="{d}" fill="none" stroke="{"#d9822b" if a in SPINE and b in SPINE else "#b8c4d0"}" stroke-width="1.5"/>')
    for r in rooms():
        x, y = at[r.name]
        box, ink = ('#1f4e79', '#fff') if r.spine else ('#eef3f8', '#1f2d3a')
        o.append(f'<rect x="{x:.0f}" y="{y}" width="{bw}" height="{bh}" rx="6" fill="{box}" stroke="#1f4e79"/>'
                 f'<text x="{x+bw/2:.0f}" y="{y+19}" text-anchor="middle" font-size="13" fill="{ink}">{r.number:02} {r.name}</text>')
    return '\n'.join(o + ['</svg>'])

if __name__ == '__main__': print(table())
