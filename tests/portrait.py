"""The picture on the home page: the quick start in JupyterLab, at work

    python -m tests.portrait      # needs Chromium; writes nbs/images/live.png in about two minutes
"""
import io, re, tempfile
from pathlib import Path
from PIL import Image
from tests.browser import ROOT, Book, Lab, browser, notebook, wait_for

PICTURE = ROOT/'nbs'/'images'/'live.png'
SHARE = .6  # of the run that is over when the picture is taken


def over(text):
    "Share of the run that an output says is over, from its words such as `360 of 600`"
    said = re.search(r'([\d,]+) of ([\d,]+)', text)
    done, total = (int(n.replace(',', '')) for n in said.groups()) if said else (0, 1)
    return done/total


def joined(pngs, colours=128, gap=12, indent=64):
    "Pictures below each other as one, with few colours, which is all that a screen of text and curves has"
    parts, out = [Image.open(io.BytesIO(png)).convert('RGB') for png in pngs], io.BytesIO()
    whole = Image.new('RGB', (max(p.width for p in parts), sum(p.height + gap for p in parts)), 'white')
    for i, part in enumerate(parts): whole.paste(part, (indent*bool(i), sum(p.height + gap for p in parts[:i])))
    whole.quantize(colours, dither=Image.Dither.NONE).save(out, 'PNG', optimize=True)
    return out.getvalue()


def portrait(lab, chrome):
    "The cell at work, and the display below it; what it printed before it began to train is left out"
    notebook(lab.work/'first.ipynb', 'from continual_llm.train import quickstart\nrun = quickstart()')
    book = Book(lab, chrome, 'first.ipynb')
    book.tab.set_viewport_size(dict(width=1240, height=1600))
    book.command('application:toggle-left-area')
    book.run()
    wait_for(lambda: over(book.text()) >= SHARE, 'later part of the run', 900, book.text)
    book.tab.add_style_tag(content='.jp-cell-toolbar {display: none}')
    parts = [book.tab.locator(part).first.screenshot() for part in ('.jp-CodeCell .jp-InputArea', '.jp-OutputArea-output:has(.cl-live)')]
    book.command('notebook:interrupt-kernel')
    book.finish()
    return joined(parts)


def main():
    with tempfile.TemporaryDirectory() as d, Lab(Path(d)/'lab') as lab, browser(Path(d)/'browser') as chrome: png = portrait(lab, chrome)
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_bytes(png)
    print(f'{PICTURE.relative_to(ROOT)}: {len(png)/1e3:.0f} KB')


if __name__ == '__main__': main()
