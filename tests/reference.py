"""What the site says of each public symbol, read from the source of the package

`show_doc` asks `Reference` (`renderer` in settings.ini), so that nbdev's own build and `python -m tests.site` say the same.
"""
import ast, importlib, io, re, textwrap, tokenize
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = 'continual_llm'
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
WORDS = {  # words that mean the same wherever a signature leaves them without a comment
    'tokenizer': 'a `Tokenizer`, or its folder',
    'device': 'where tensors are and are computed with: `cpu`, `cuda`, `mps`, or a `torch.device`',
    'processes': 'the `Processes` of the run: one, unless torchrun started more',
    'model': 'a `ContinualLLM`, or another module that is called in the same way',
    'opt': 'the optimizer, as `make_optimizer` gives it',
    'history': 'the `History` of the run',
    'loop': 'the `Loop` that runs',
    'at': 'where the run stands, a `Progress`',
    'store': 'the `Checkpoints` of the run',
    'poll': 'called between micro-batches; may raise to leave',
    'step': 'optimizer step, counted from 0',
    'say': 'gets each line that there is to say',
    'overwrite': 'replace the run in its folder?',
    'recompute': 'is each layer computed again for its gradients?',
    'precision': '`bf16` or `fp32`',
    'optimizer': '`adamw` or `muon`',
    'learning_rate': 'the peak of the run',
    'warmup_steps': 'steps of its warmup',
    'seq_len': 'tokens of a block',
}


@dataclass
class Entry:
    "One function, class, method or property"
    module: str
    name: str                                    # with its class, `Class.method`
    kind: str                                    # function, class, method or property
    line: int                                    # of the file
    doc: str                                     # its docstring
    params: list = field(default_factory=list)   # (name, as written, comment)
    returns: tuple = ('', '')                    # annotation, comment
    raises: list = field(default_factory=list)   # (error, message)
    bases: list = field(default_factory=list)    # names, of a class
    borrowed: bool = False                       # a method whose signature another library asks for

    @property
    def anchor(self): return self.name.lower()

    def missing(self):
        "What is not said about it, in one line, or nothing"
        if self.borrowed: return ''
        if not self.doc: return 'has no docstring'
        bare = [name for name, _, comment in self.params if not comment and f'`{name}`' not in self.doc]
        return f"has no comment on {', '.join(bare)}" if bare else ''


def _comments(source):
    "The comment of each line, those that fill a line joined to the one before"
    found, last = {}, None
    for t in tokenize.generate_tokens(io.StringIO(source).readline):
        if t.type != tokenize.COMMENT: continue
        text, row = t.string.lstrip('#').strip(), t.start[0]
        if not t.line[:t.start[1]].strip() and last in (row-1,):
            found[first] += ' ' + text
        else: found[row], first = text, row
        last = row
    return found


def _closing(node, lines):
    "The line where the parentheses of a function's head close"
    text, depth = '\n'.join(lines[node.lineno-1:node.end_lineno]), 0
    for t in tokenize.generate_tokens(io.StringIO(textwrap.dedent(text)).readline):
        if t.type != tokenize.OP: continue
        depth += (t.string in '([{') - (t.string in ')]}')
        if t.string == ')' and not depth: return node.lineno + t.start[0] - 1


def _kind(annotation): return ast.unparse(annotation).replace(' | ', '|')


def _written(arg, default, star=''):
    text = star + arg.arg + (f':{_kind(arg.annotation)}' if arg.annotation else '')
    return text + (f'={ast.unparse(default)}' if default is not None else '')


@lru_cache(None)
def _classes():
    "Every public class of the package -> its docstring"
    trees = [ast.parse((ROOT/PACKAGE/f'{m}.py').read_text(encoding='utf-8')) for m in modules()]
    return {n.name: ast.get_docstring(n) or '' for t in trees for n in t.body if isinstance(n, ast.ClassDef) and n.name[0] != '_'}


def _of_type(annotation):
    "What the class of a parameter says of itself, where it is one of ours"
    names = re.findall(r'\w+', ast.unparse(annotation)) if annotation is not None else []
    doc = next((_classes()[n] for n in names if _classes().get(n)), '')
    return doc[:1].lower() + doc[1:].split('\n')[0] if doc else ''


def _params(node, comments, lines, method):
    "Parameters of a function, and what it returns"
    a, closing, found = node.args, _closing(node, lines), []
    plain = a.posonlyargs + a.args
    pairs = list(zip(plain, [None]*(len(plain)-len(a.defaults)) + a.defaults, ['']*len(plain)))
    if a.vararg: pairs.append((a.vararg, None, '*'))
    pairs += list(zip(a.kwonlyargs, a.kw_defaults, ['']*len(a.kwonlyargs)))
    if a.kwarg: pairs.append((a.kwarg, None, '**'))
    static = any(isinstance(d, ast.Name) and d.id == 'staticmethod' for d in node.decorator_list)
    for arg, default, star in pairs[1:] if method and not static else pairs:
        end = max(arg.end_lineno, default.end_lineno if default is not None else 0)
        comment = comments.get(end, '') if end != closing else ''
        found.append((arg.arg, _written(arg, default, star), comment or WORDS.get(arg.arg) or _of_type(arg.annotation)))
    returns = _kind(node.returns) if node.returns else ''
    return found, (returns, comments.get(closing, '') if returns or closing != node.lineno else '')


def _message(node):
    "The text of an error, with what is filled in between braces"
    if isinstance(node, ast.Constant): return str(node.value)
    if isinstance(node, ast.JoinedStr): return ''.join(map(_message, node.values))
    if isinstance(node, ast.FormattedValue): return '{' + ast.unparse(node.value) + '}'
    if isinstance(node, ast.BinOp): return _message(node.left) + _message(node.right)
    return '{…}' if len(ast.unparse(node)) > 40 else '{' + ast.unparse(node) + '}'


def _raises(node):
    "The errors that a function raises itself"
    found = []
    for n in ast.walk(node):
        if not isinstance(n, ast.Raise) or not isinstance(n.exc, ast.Call) or not isinstance(n.exc.func, ast.Name): continue
        name = n.exc.func.id
        if name[0].isupper() and n.exc.args: found.append((name, _message(n.exc.args[0])))
    return list(dict.fromkeys(found))


def _fields(node, comments):
    "Fields of a dataclass or a named tuple as parameters"
    found = []
    for n in node.body:
        if not isinstance(n, ast.AnnAssign) or not isinstance(n.target, ast.Name) or n.target.id[0] == '_': continue
        default = n.value
        if isinstance(default, ast.Call) and getattr(default.func, 'id', '') == 'field':
            said = {k.arg: k.value for k in default.keywords}
            if ast.unparse(said.get('init', ast.Constant(True))) == 'False': continue
            default = said.get('default', ast.Call(said['default_factory'], [], []) if 'default_factory' in said else None)
        text = f'{n.target.id}:{_kind(n.annotation)}' + (f'={ast.unparse(default)}' if default is not None else '')
        found.append((n.target.id, text, comments.get(n.end_lineno) or WORDS.get(n.target.id) or _of_type(n.annotation)))
    return found


def _class(node, module, comments, lines):
    bases = [ast.unparse(b) for b in node.bases]
    entry = Entry(module, node.name, 'class', node.lineno, ast.get_docstring(node) or '', bases=bases)
    own = {n.name: n for n in node.body if isinstance(n, FUNCTIONS)}
    if '__init__' in own: entry.params, _ = _params(own['__init__'], comments, lines, True)
    else:
        inherited = [p for b in bases if (e := _entries_before(module, b)) for p in e.params]
        mine = _fields(node, comments) if node.decorator_list or 'NamedTuple' in bases else []
        entry.params = [p for p in inherited if p[0] not in {m[0] for m in mine}] + mine
    entry.raises = [r for name in ('__init__', '__post_init__') if name in own for r in _raises(own[name])]
    yield entry
    for name, n in own.items():
        if name[0] == '_': continue
        kind = 'property' if any(ast.unparse(d) in ('property', 'cached_property') for d in n.decorator_list) else 'method'
        params, returns = _params(n, comments, lines, True)
        above = [e for b in bases if (e := _above(module, b, name))]
        said = {p[0]: p[2] or f'as in `{e.name}`' for e in above for p in e.params}
        params = [(p, text, comment or said.get(p, '')) for p, text, comment in params]
        doc = ast.get_docstring(n) or next((f'As in `{e.name}`' for e in above), '')
        yield Entry(module, f'{node.name}.{name}', kind, n.lineno, doc, params, returns, _raises(n))


_reading = {}


def _entries_before(module, name):
    "A class, or a method of one, that stands further up in the same module, or in one that it imports"
    if name in _reading.get(module, {}): return _reading[module][name]
    source = (ROOT/PACKAGE/f'{module}.py').read_text(encoding='utf-8')
    for n in ast.parse(source).body:
        if isinstance(n, ast.ImportFrom) and (n.level or n.module.startswith(PACKAGE)) and name.split('.')[0] in [a.name for a in n.names]:
            return entries(n.module.split('.')[-1]).get(name)


def _above(module, base, method):
    "The method of a base class, or of one of its own"
    if e := _entries_before(module, f'{base}.{method}'): return e
    cls = _entries_before(module, base)
    return next((e for b in cls.bases if (e := _above(cls.module, b, method))), None) if cls else None


def read(source, module):
    "The entries of a module's source, by name"
    comments, lines, found = _comments(source), source.split('\n'), _reading.setdefault(module, {})
    for node in ast.parse(source).body:
        if isinstance(node, FUNCTIONS) and node.name[0] != '_':
            params, returns = _params(node, comments, lines, False)
            found[node.name] = Entry(module, node.name, 'function', node.lineno, ast.get_docstring(node) or '', params, returns, _raises(node))
        if isinstance(node, ast.ClassDef) and node.name[0] != '_':
            for entry in _class(node, module, comments, lines): found[entry.name] = entry
    return found


@lru_cache(None)
def entries(module):
    "Everything public in a module of the package, by name"
    loaded = importlib.import_module(f'{PACKAGE}.{module}')
    found = read((ROOT/PACKAGE/f'{module}.py').read_text(encoding='utf-8'), module)
    found = {name: e for name, e in found.items() if name.split('.')[0] in loaded.__all__}
    for entry in found.values():
        if entry.kind == 'method':
            cls, name = entry.name.split('.')
            others = [c for c in getattr(loaded, cls).__mro__[1:-1] if not c.__module__.startswith(PACKAGE)]
            base = next((c for c in others if name in vars(c)), None)
            entry.borrowed, entry.doc = base is not None, entry.doc or (f'As in `{base.__name__}`' if base else '')
    return found


def modules():
    return sorted(p.stem for p in (ROOT/PACKAGE).glob('[a-z]*.py'))


def _plain(text):
    "Text in which nothing but backticks has a meaning"
    parts = re.split(r'(`[^`]*`)', text)
    return ''.join(p if i%2 else re.sub(r'''([\\*_<>$\[\]~^#@|"'-])''', r'\\\1', p) for i, p in enumerate(parts))


def _signature(e):
    names = [re.sub(r':.*?(?==|$)', '', p[1], count=1, flags=re.S) if not p[1].startswith('*') else p[1].split(':')[0] for p in e.params]
    head, tail = ('class ' if e.kind == 'class' else '') + e.name, f' -> {e.returns[0]}' if e.returns[0] else ''
    if e.kind == 'property': return head + tail
    text = f"{head}({', '.join(names)}){tail}"
    return '\n'.join(textwrap.wrap(text, 88, subsequent_indent='    ', break_long_words=False, break_on_hyphens=False))


def _address(e):
    "Where the source is: on the repository's host if settings.ini knows it, else named"
    from nbdev.config import get_config
    url, branch = get_config().git_url.rstrip('/'), get_config().branch
    where = f'{PACKAGE}/{e.module}.py'
    return f'[source]({url}/blob/{branch}/{where}#L{e.line}){{.source}}' if url else f'[{where}, line {e.line}]{{.source}}'


def markdown(e, level=3):
    "An entry as Markdown"
    parts = [f"{'#'*level} {e.name}", _address(e), f'```python\n{_signature(e)}\n```', _plain(e.doc)]
    said = [(f'`{text}`', _plain(comment)) for _, text, comment in e.params if comment]
    if e.returns[1]: said.append(('*returns*', _plain(e.returns[1])))
    said += [(f'*raises* `{error}`', _plain(message)) for error, message in e.raises]
    if said: parts.append('\n\n'.join(f'{term}\n:   {text}' for term, text in said))
    return f"::: {{.reference}}\n\n" + '\n\n'.join(parts) + '\n\n:::\n'


def of(sym, name=None):
    "The entry of an object that a page has just defined"
    name = name or sym.__qualname__
    found = [e for m in modules() if (e := entries(m).get(name))]
    if not found: raise LookupError(f"{name} is nowhere in {PACKAGE}; run nbdev_export")
    same = [e for e in found if e.doc == (sym.__doc__ or '').strip()]
    return (same or found)[0]


class Reference:
    "What `show_doc` shows: an entry, and those of a class's methods"
    def __init__(self, sym, name=None, title_level=3):
        first = of(sym, name)
        rest = [e for e in entries(first.module).values() if e.name.startswith(first.name + '.')] if first.kind == 'class' else []
        self.text = '\n'.join([markdown(first, title_level), *[markdown(e, title_level+1) for e in rest]])

    def _repr_markdown_(self): return self.text
    def __repr__(self): return self.text
