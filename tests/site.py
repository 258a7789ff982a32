"""The documentation site for machines without Quarto, and the judge of what it is made from

    python -m tests.site                      # into _docs_pandoc
    python -m tests.site --out /tmp/site      # somewhere else

Each page is processed as nbdev does it for Quarto and rendered by pandoc. Whatever is wrong is said in one line each, and the command then exits with 1:
a warning of pandoc's, a link or an anchor that leads nowhere, a figure without alternative text, a public symbol that is not described, a page without a
figure or a table, a page that no menu names, something loaded from another host, a README.md or an llms.txt that is not what the pages say.
"""
import argparse, base64, fnmatch, html, json, os, re, shutil, subprocess, sys
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field
from html.parser import HTMLParser
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import unquote, urljoin

ROOT = Path(__file__).parent.parent
TEMPLATE = '$toc$\n<!--body-->\n$body$'


@dataclass
class Page:
    "A page on its way from notebook to HTML"
    source: str                                 # path below nbs
    title: str
    subtitle: str
    url: str                                    # path below the site
    markdown: str = ''
    files: dict = field(default_factory=dict)   # url -> bytes of a picture
    bare: list = field(default_factory=list)    # numbers of the cells whose picture has no words
    labels: list = field(default_factory=list)  # of its figures
    shows: bool = False                         # is there a figure or a table?
    entries: set = field(default_factory=set)   # names that its reference describes
    body: str = ''
    toc: str = ''

    @property
    def up(self): return '../'*self.url.count('/')


# From a notebook to Markdown


def notebooks(nbs):
    return sorted((p for p in nbs.rglob('*.ipynb') if not re.search(r'(^|/)[_.]', p.relative_to(nbs).as_posix())), key=lambda p: p.relative_to(nbs).as_posix())


def processed(path):
    "A notebook as nbdev hands it to Quarto: what is exported or hidden is gone, what is public is described"
    from execnb.nbio import read_nb, nb2dict
    from nbdev.processors import FilterDefaults
    os.environ['IN_TEST'] = '1'
    nb = read_nb(path)
    FilterDefaults()(nb)
    return nb2dict(nb)


def directives(source):
    "The `#|` lines of a cell as a dictionary, and the rest of it"
    lines = source.split('\n')
    n = next((i for i, line in enumerate(lines) if not line.startswith('#|')), len(lines))
    found = dict((m[1], (m[2] or '').strip(' "')) for line in lines[:n] if (m := re.match(r'#\|\s*([\w-]+):?\s*(.*)', line)))
    return found, '\n'.join(lines[n:]).strip('\n')


def fenced(text, kind):
    fence = '`'*max(3, 1 + max((len(m) for m in re.findall('`+', text)), default=0))
    return f'{fence} {{.{kind}}}\n{text}\n{fence}'


def output(page, o, said, name):
    "One output of a cell as Markdown"
    data = o.get('data', {})
    text = lambda kind: ''.join(data[kind])
    if 'image/png' in data:
        page.files[f"{page.url.removesuffix('.html')}_files/{name}.png"] = base64.b64decode(text('image/png'))
        page.shows = True
        where = f"{Path(page.url).stem}_files/{name}.png"
        return f"![{said.get('fig-cap', '')}]({where}){{alt=\"{html.escape(said.get('fig-alt', ''))}\"}}"
    if 'text/html' in data:
        page.shows |= '<table' in text('text/html')
        return f"```{{=html}}\n{text('text/html')}\n```"
    if 'text/markdown' in data:
        page.shows |= said.get('output') != 'asis' and has_table(text('text/markdown'))
        return text('text/markdown')
    if o['output_type'] == 'stream' and o['name'] != 'stdout': return ''
    shown = ''.join(o.get('text') or data.get('text/plain', '')).rstrip('\n')
    return fenced(shown, 'output .long' if max(map(len, shown.split('\n'))) > 100 else 'output') if shown else ''


def has_table(text): return bool(re.search(r'^\|?[ :]*-{3,}[-| :]*\|[-| :]*$', text, re.M))


def code(page, cell, number):
    said, source = directives(''.join(cell['source']))
    if said.get('include') == 'false': return []
    parts = [fenced(source, cell['metadata'].get('language', 'python'))] if source and said.get('echo') != 'false' else []
    if said.get('output') == 'false': return parts
    name = said.get('label') or f'cell-{number}'
    page.labels += [said['label']] if 'label' in said else []
    joined = []
    for o in cell['outputs']:  # a run prints line by line; the lines are one output
        if joined and o.get('name') == 'stdout' == joined[-1].get('name'): joined[-1] = dict(joined[-1], text=[*joined[-1]['text'], *o['text']])
        else: joined.append(o)
    outputs = [text for i, o in enumerate(joined) if (text := output(page, o, said, f'{name}-{i}' if i else name))]
    if 'image/png' in str([list(o.get('data', {})) for o in cell['outputs']]) and not said.get('fig-alt'): page.bare.append(number)
    return parts + outputs


def to_page(nb, source):
    "A page whose Markdown is written"
    import yaml
    cells = nb['cells']
    front = yaml.safe_load(''.join(cells[0]['source']).strip().strip('-'))
    name = front.get('output-file') or f'{Path(source).stem}.html'
    page = Page(source, front['title'], front.get('description', ''), (Path(source).parent/name).as_posix())
    parts = []
    for number, cell in enumerate(cells[1:], 1):
        text = ''.join(cell.get('source', ''))
        if cell['cell_type'] == 'markdown':
            page.shows |= has_table(text) or '<img' in text or '![' in text
            parts.append(text)
        elif cell['cell_type'] == 'code': parts += code(page, cell, number)
    page.markdown = '\n\n'.join(p for p in parts if p.strip()) + '\n'
    page.entries = set(re.findall(r'^::: \{\.reference\}\n\n#+ (\S+)$', page.markdown, re.M))
    return page


def work(args):
    path, nbs = args
    return to_page(processed(path), path.relative_to(nbs).as_posix())


def read_pages(nbs, workers=2):
    paths = notebooks(nbs)
    with ProcessPoolExecutor(workers, mp_context=get_context('spawn')) as pool:
        return list(pool.map(work, [(p, nbs) for p in paths], chunksize=4))


# From Markdown to HTML


def pandoc(text, *more):
    "HTML of some Markdown, and the warnings"
    import pypandoc
    args = [pypandoc.get_pandoc_path(), '-f', 'markdown', '-t', 'html5', '--mathml', '--wrap=none', '--syntax-highlighting=none', '--fail-if-warnings', *more]
    ran = subprocess.run(args, input=text, capture_output=True, text=True, encoding='utf-8')
    return ran.stdout, [line for line in ran.stderr.split('\n') if line.startswith(('[WARNING]', 'Error'))]


def coloured(text, language):
    "Code with its words marked for the style sheet"
    from pygments import highlight, lexers
    from pygments.formatters import HtmlFormatter
    return highlight(text, lexers.get_lexer_by_name(language, stripnl=False), HtmlFormatter(nowrap=True)).rstrip('\n')


def render(page, template):
    "Fill in the HTML of a page; what pandoc warns of"
    # pandoc gives nothing when it fails on a warning, so a page with warnings stays empty
    made, warnings = pandoc(page.markdown, '--toc', '--toc-depth=3', f'--template={template}', f'--metadata=title:{page.title}')
    page.toc, _, page.body = made.partition('<!--body-->')
    page.body = re.sub(r'<pre class="(python|bash|sh|yaml|json)"><code>(.*?)</code></pre>',
                       lambda m: f'<pre class="code"><code>{coloured(html.unescape(m[2]), m[1])}</code></pre>', page.body, flags=re.S)
    return [f'{page.source}: {w}' for w in warnings]


def resolve(page, by_source):
    "Links as written on a page -> links between the files of the site"
    def link(m):
        target, _, anchor = m[1].partition('#')
        if re.match(r'\w+:', target) or not target: return m[0]
        if target.startswith('/'): target = page.up + target[1:]
        elif target.endswith('.ipynb'):
            to = os.path.normpath(os.path.join(os.path.dirname(page.source), target))
            target = page.up + by_source[to].url if to in by_source else target
        return f'href="{target}' + (f'#{anchor}"' if anchor else '"')
    page.body = re.sub(r'href="([^"]*)"', link, page.body)
    page.body = re.sub(r'<span class="source">continual_llm/(\w+)\.py, line (\d+)</span>', rf'<a class="source" href="{page.up}source/\1.html#L-\2">source</a>', page.body)
    if page.source == 'index.ipynb':  # the table of pages names them, for the README has another way to them
        page.body = re.sub(r'<td><code>([\w/]+)</code></td>', lambda m: f'<td><a href="{by_source[m[1] + ".ipynb"].url}"><code>{m[1]}</code></a></td>' if m[1] + '.ipynb' in by_source else m[0], page.body)
    page.body = re.sub(r'<table.*?</table>', lambda m: f'<div class="wide{" dense"*(m[0].partition("</tr>")[0].count("<th") > 6)}" tabindex="0">{m[0]}</div>', page.body, flags=re.S)


# The frame of a page


def menu(pages):
    "[(section, pages)] as `_quarto.yml` has them, and the pages that it does not name"
    import yaml
    sections, left = [], {p.source: p for p in pages}
    for item in yaml.safe_load((ROOT/'_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']:
        if isinstance(item, str): item = dict(section='', contents=[item])
        globs = [g['auto'] if isinstance(g, dict) else g for g in item['contents']]
        found = [left.pop(s) for g in globs for s in sorted(left) if fnmatch.fnmatch(s, g)]
        if found: sections.append((item['section'], found))
    return sections, list(left.values())


def sidebar(page, sections):
    parts = []
    for name, pages in sections:
        links = ''.join(f'<li><a href="{page.up}{p.url}"{" aria-current=page" if p is page else ""}>{html.escape(p.title)}</a></li>' for p in pages)
        inside = page in pages
        parts.append(f'<details{" open" if inside else ""}><summary>{name}</summary><ul>{links}</ul></details>' if name else f'<ul>{links}</ul>')
    return '\n'.join(parts)


FRAME = '''<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><meta name="description" content="{subtitle}"><meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,"><link rel="stylesheet" href="{up}styles.css"><link rel="stylesheet" href="{up}site.css">
<script>document.documentElement.dataset.theme = localStorage.theme || (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')</script>
<script defer src="{up}site.js" data-up="{up}"></script></head>
<body class="{kind}"><a class="skip" href="#content">To the content</a>
<header><button id="menu" aria-label="Menu" aria-expanded="false">☰</button><a class="brand" href="{up}index.html">continual_llm</a>
<div class="find"><input id="search" type="search" placeholder="Search" aria-label="Search" autocomplete="off"><ol id="found" hidden></ol></div>
<button id="theme" aria-label="Dark or light">◐</button></header>
<div class="columns"><nav class="side" aria-label="Pages">{side}</nav>
<main id="content"><h1>{heading}</h1><p class="subtitle">{subtitle}</p>
{body}
<footer>{around}<p class="edit">{edit}</p></footer></main>
<nav class="toc" aria-label="On this page">{toc}</nav></div></body></html>
'''


def edit_line(page):
    from nbdev.config import get_config
    url, branch = get_config().git_url.rstrip('/'), get_config().branch
    name = f'nbs/{page.source}'
    if not url: return f'Written in <code>{name}</code>'
    return f'<a href="{url.replace("github.com", "github.dev")}/blob/{branch}/{name}">Edit this page</a> · <a href="{url}/issues/new">Report an issue</a>'


def framed(page, sections):
    order = [p for _, pages in sections for p in pages]
    i = order.index(page) if page in order else -1
    before, after = (order[i-1] if i > 0 else None), (order[i+1] if -1 < i < len(order)-1 else None)
    around = ''.join(f'<a class="{kind}" href="{page.up}{p.url}">{html.escape(p.title)}</a>' for kind, p in (('before', before), ('after', after)) if p)
    toc = f'<h2>On this page</h2>{page.toc}' if page.toc.strip() else ''
    return FRAME.format(title=html.escape(page.title), heading=html.escape(page.title), subtitle=html.escape(page.subtitle), up=page.up, kind=Path(page.url).stem,
                        side=sidebar(page, sections), body=page.body, toc=toc, around=f'<div class="around">{around}</div>' if around else '', edit=edit_line(page))


# What stands beside the pages


class Reader(HTMLParser):
    "Ids, links, pictures and the text under each heading of a file"
    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.loads, self.bare, self.sections, self.inside = set(), [], [], [], [['', '', '']], ''
        self.anchor, self.main, self.skipped, self.code, self.prose = '', False, 0, 0, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if 'id' in a: self.ids.add(a['id'])
        if tag == 'section' and a.get('id'): self.anchor = a['id']
        if tag == 'main': self.main = True
        if tag in ('footer',): self.main = False
        if tag == 'a' and 'href' in a: self.links.append(a['href'])
        if tag in ('img', 'script', 'iframe', 'video', 'source') and 'src' in a: self.loads.append(a['src'])
        if tag == 'link' and 'href' in a: self.loads.append(a['href'])
        if tag == 'img' and not (a.get('alt') or '').strip(): self.bare.append(a.get('src', ''))
        if re.fullmatch('h[1-4]', tag) and self.main:
            self.inside = tag
            self.sections.append(['', a.get('id') or self.anchor, ''])
        if tag in ('pre', 'style', 'script', 'math'): self.skipped += 1
        if tag == 'code': self.code += 1

    def handle_endtag(self, tag):
        if tag == self.inside: self.inside = ''
        if tag in ('pre', 'style', 'script', 'math'): self.skipped -= 1
        if tag == 'code': self.code -= 1

    def handle_data(self, data):
        if not self.main or self.skipped: return
        if not self.code: self.prose.append(data)
        section = self.sections[-1]
        if self.inside: section[0] += data
        elif len(section[2]) < 300: section[2] += data


def sources():
    "The modules as pages with numbered lines, which the reference points to"
    from tests.reference import PACKAGE, modules
    made = []
    for m in modules():
        lines = coloured((ROOT/PACKAGE/f'{m}.py').read_text(encoding='utf-8'), 'python').split('\n')
        page = Page(f'{m}.py', f'{PACKAGE}.{m}', 'Source, written by nbdev from the page of this module', f'source/{m}.html')
        numbered = '\n'.join(f'<span id="L-{i}"><a href="#L-{i}">{i}</a>{line}</span>' for i, line in enumerate(lines, 1))
        page.body = f'<pre class="code numbered"><code>{numbered}</code></pre>'
        made.append(page)
    return made


def search_index(pages, readers):
    index = []
    for page in pages:
        sections = [[h.strip(), a, re.sub(r'\s+', ' ', t).strip().removeprefix('source ')[:300]] for h, a, t in readers[page.url].sections]
        index.append([page.title, page.url, page.subtitle, [s for s in sections if s[0] and s[1]]])
    return 'PAGES = ' + json.dumps(index, ensure_ascii=False, separators=(',', ':'))


def write(out, pages, sections):
    "All files of the site"
    for url, content in [(p.url, framed(p, sections)) for p in pages] + [(f'{p.url}.md', f'# {p.title}\n\n> {p.subtitle}\n\n{p.markdown}') for p in pages if p.markdown]:
        (out/url).parent.mkdir(parents=True, exist_ok=True)
        (out/url).write_text(content, encoding='utf-8')
    for page in pages:
        for url, data in page.files.items():
            (out/url).parent.mkdir(parents=True, exist_ok=True)
            (out/url).write_bytes(data)


# What may be wrong


def broken(pages, readers, out):
    "Links and pictures that lead nowhere, and what another host would be asked for; how many were looked at"
    problems, n = [], 0
    for page in pages:
        reader = readers[page.url]
        for link in dict.fromkeys(reader.links + reader.loads):
            if re.match(r'https?://|//', link):
                if link in reader.loads: problems.append(f'{page.source}: loads {link} from another host')
                continue
            if re.match(r'(data|mailto):', link): continue
            n += 1
            path, _, anchor = urljoin(page.url, link).partition('#')
            if not (out/unquote(path)).is_file(): problems.append(f'{page.source}: the link {link} leads nowhere')
            elif anchor and path in readers and unquote(anchor) not in readers[path].ids: problems.append(f'{page.source}: the link {link} has no such anchor')
    return problems, n


def undescribed(pages):
    "Public symbols without a description, a comment on each parameter, or a place on a page; how many there are"
    from tests.reference import entries, modules
    shown, problems, n = set().union(*[p.entries for p in pages]), [], 0
    for module in modules():
        for name, entry in entries(module).items():
            n += 1
            why = entry.missing() or ('' if name in shown else 'is on no page: its cell is hidden, or nbdev_export was not run')
            if why: problems.append(f'{module}.{name} {why}')
    return problems, n


def unsaid(pages, readers):
    "Pages without a figure or a table, and figures without words"
    problems = [f'{p.source}: no figure and no table' for p in pages if not p.shows]
    problems += [f'{p.source}: two figures are labelled {l}' for p in pages for l in sorted(set(p.labels)) if p.labels.count(l) > 1]
    problems += [f'{p.source}: cell {n} has a figure without `#| fig-alt:`' for p in pages for n in p.bare]
    return problems + [f'{p.source}: no alternative text for {src}' for p in pages if not p.bare for src in readers[p.url].bare]


def garbled(pages, readers):
    "Markdown that was meant and is shown instead; flags whose hyphens became a dash"
    signs = r'.{0,30}\]\(\S*|(?:^|[\s(])–[a-z]\w*.{0,20}|(?:^|\s)\*\*\S.{0,20}|:::.{0,20}'
    return [f'{p.source}: the text shows {m.strip()!r}' for p in pages for text in readers[p.url].prose for m in re.findall(signs, text)]


def drifted(root=ROOT):
    "Files written from the pages that are not what the pages say"
    from tests.readme import llms, readme
    return [f'{name} is not what the pages say: run python -m tests.readme' for name, text in (('README.md', readme()[0]), ('nbs/llms.txt', llms()))
            if not (root/name).exists() or (root/name).read_text(encoding='utf-8') != text]


def build(out, pages):
    "The site in the folder `out`; what it holds, and what is wrong with it"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out/'template.html').write_text(TEMPLATE)
    with ThreadPoolExecutor(2) as pool: problems = [w for ws in pool.map(lambda p: render(p, out/'template.html'), pages) for w in ws]
    (out/'template.html').unlink()
    for page in pages: resolve(page, {p.source: p for p in pages})
    files, n_warnings = pages + sources(), len(problems)
    sections, left = menu(pages)
    problems += [f'{p.source}: no section of the sidebar in _quarto.yml names it' for p in left]
    write(out, files, sections)
    for name in ('nbs/styles.css', 'nbs/llms.txt', 'tests/site.css', 'tests/site.js'): shutil.copy(ROOT/name, out)
    if (ROOT/'nbs'/'images').is_dir(): shutil.copytree(ROOT/'nbs'/'images', out/'images')
    readers = {p.url: Reader((out/p.url).read_text(encoding='utf-8')) for p in files}
    (out/'search.js').write_text(search_index(pages, readers), encoding='utf-8')
    wrong_links, n_links = broken(files, readers, out)
    wrong_symbols, n_symbols = undescribed(pages)
    problems += wrong_links + wrong_symbols + unsaid(pages, readers) + garbled(pages, readers) + drifted()
    report = f'{len(pages)} pages with {sum(len(p.files) for p in pages)} figures, {n_symbols} symbols documented, {n_links:,} links checked, warnings {n_warnings}'
    return report, problems


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--out', type=Path, default=ROOT/'_docs_pandoc', help='folder of the site, replaced')
    os.chdir(ROOT)
    report, problems = build(parser.parse_args().out.absolute(), read_pages(ROOT/'nbs'))
    for line in problems: print(line)
    print(report + (f'; {len(problems)} problems' if problems else ''))
    sys.exit(bool(problems))


if __name__ == '__main__':
    from tests.site import main  # by its own name, under which the processes that share the work find it again
    main()
