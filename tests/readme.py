"""README.md from nbs/index.ipynb, the way the documentation build does it, for machines without Quarto

    python -m tests.readme          # write README.md and its pictures
"""
import base64, fnmatch, json, re
from pathlib import Path
from tests.site import directives

ROOT = Path(__file__).parent.parent
PICTURES = 'index_files/figure-commonmark'


def _output(o, name, pictures):
    "One output of a cell as Markdown, its picture kept aside"
    data = o.get('data', {})
    if 'image/png' in data:
        pictures[f'{name}.png'] = base64.b64decode(data['image/png'])
        return f'{PICTURES}/{name}.png'
    if o['output_type'] == 'stream' and o['name'] != 'stdout': return ''
    text = ''.join(o.get('text') or data.get('text/plain', '')).rstrip('\n')
    return '\n'.join('    ' + line for line in text.split('\n')) if text else ''


def _code(cell, n, pictures):
    said, source = directives(''.join(cell['source']))
    if 'hide' in said or not source: return []
    parts = [f'``` python\n{source}\n```']
    for i, o in enumerate(cell['outputs']):
        text = _output(o, f'cell-{n}-output-{i+1}', pictures)
        if text.endswith('.png'): text = f"![{said.get('fig-alt', '')}]({text})\n\n*{said.get('fig-cap', '')}*"
        if text: parts.append(text)
    return parts


def _moved(text):
    "Markdown of the home page seen from the folder above: the picture, and each page of the table as a link to its notebook"
    return re.sub(r'^\| `([\w/]+)` \|', r'| [`\1`](nbs/\1.ipynb) |', text.replace('src="images/', 'src="nbs/images/'), flags=re.M)


def readme():
    "The text of README.md, and its pictures by name"
    cells, pictures, parts = json.loads((ROOT/'nbs'/'index.ipynb').read_text(encoding='utf-8'))['cells'], {}, []
    for n, cell in enumerate(cells, 1):
        if cell['cell_type'] == 'code': parts += _code(cell, n, pictures)
        else: parts.append(_moved(''.join(cell['source']).strip('\n')))
    return '\n\n'.join(parts) + '\n', pictures


def _front(page):
    "Title and subtitle of a page, and the file that it becomes on the site"
    cells = json.loads(page.read_text(encoding='utf-8'))['cells']
    title, subtitle = re.match(r'# (.+)\n\n?> (.+)', next(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')).groups()
    name = re.sub(r'^\d+[a-zA-Z0-9]*_', '', page.stem) + '.html'
    return title, subtitle, (page.parent.relative_to(ROOT/'nbs')/name).as_posix()


def llms():
    "The text of llms.txt: every page of the site in a line, for programs that read"
    import yaml
    nbs = ROOT/'nbs'
    title, subtitle, _ = _front(nbs/'index.ipynb')
    parts, left = [f'# {title}\n\n> {subtitle}\n\nEach page is there as Markdown too, under its address with `.md` after it.\n'], sorted(p.relative_to(nbs).as_posix() for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    for item in yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']:
        if isinstance(item, str): item = dict(section='Home', contents=[item])
        globs = [g['auto'] if isinstance(g, dict) else g for g in item['contents']]
        found = [left.pop(left.index(p)) for g in globs for p in fnmatch.filter(left, g)]
        lines = [f'- [{t}]({url}): {s}' for t, s, url in map(_front, [nbs/p for p in found])]
        parts.append(f"## {item['section']}\n\n" + '\n'.join(lines) + '\n')
    return '\n'.join(parts)


def write():
    (ROOT/'nbs'/'llms.txt').write_text(llms(), encoding='utf-8')
    text, pictures = readme()
    (ROOT/PICTURES).mkdir(parents=True, exist_ok=True)
    for old in (ROOT/PICTURES).glob('*.png'): old.unlink()
    for name, png in pictures.items(): (ROOT/PICTURES/name).write_bytes(png)
    (ROOT/'README.md').write_text(text, encoding='utf-8')


if __name__ == '__main__': write()
