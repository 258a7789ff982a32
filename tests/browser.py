"A JupyterLab of its own and a browser, for the tests that look at what a person would see"
import base64, contextlib, functools, json, os, shutil, signal, subprocess, sys, time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
import nbformat, psutil

ROOT = Path(__file__).parent.parent
ARGS = ('--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking', '--disable-component-update', '--disable-sync',
        '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1')  # no name is looked up: what asks for another host fails at once
SETTINGS = {'apputils-extension/notification': dict(checkForUpdates=False, fetchNews='false'),
            'docmanager-extension/plugin': dict(autosave=False)}


def chromium():
    "Where Chromium is, or nothing"
    return next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)


def wait_for(ready, what, seconds=120., said=str):
    "What `ready` gives, as soon as it is true; or a failure that names what never came, with what `said` has to add"
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := ready(): return found
        time.sleep(.1)
    raise AssertionError(f'no {what} within {seconds:.0f} s\n{said()}')


def notebook(path, *sources):
    "Write a notebook of these code cells"
    kernel = dict(name='python3', display_name='Python 3', language='python')
    cells = [nbformat.v4.new_code_cell(s) for s in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=dict(kernelspec=kernel)), path)


def outputs(path):
    "Every output that a saved notebook holds"
    return [o for c in nbformat.read(path, as_version=4).cells for o in c.get('outputs', [])]


def picture(src):
    "The bytes of a PNG that stands in its own address"
    head, _, data = src.partition(',')
    assert head == 'data:image/png;base64', head
    return base64.b64decode(data)


def end(process):
    "End a process and all that it started, each by its own id, gently at first"
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired): process.wait(20)
    process.kill()
    process.wait()
    for p in family:
        with contextlib.suppress(psutil.NoSuchProcess): p.kill()
    psutil.wait_procs(family, 20)


class Lab:
    "JupyterLab on a free port of this machine, behind a token, with folders of its own and kernels that use this checkout"
    def __init__(self, folder):
        self.folder, self.work = Path(folder), Path(folder)/'work'
        self.work.mkdir(parents=True)
        for name, values in SETTINGS.items():
            path = self.folder/'settings'/'@jupyterlab'/f'{name}.jupyterlab-settings'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))

    def environment(self):
        "This one's, less what would show, with every folder that is written to moved"
        places = dict(JUPYTER_CONFIG_DIR='config', JUPYTER_DATA_DIR='data', JUPYTER_RUNTIME_DIR='runtime', JUPYTERLAB_SETTINGS_DIR='settings',
                      JUPYTERLAB_WORKSPACES_DIR='workspaces', IPYTHONDIR='ipython', XDG_CACHE_HOME='cache', HOME='home')
        kept = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND' and not k.startswith('JUPYTER')}
        return kept | {k: str(self.folder/v) for k, v in places.items()} | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')

    def __enter__(self):
        command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', '--port=0', '--allow-root', '--expose-app-in-browser',
                   '--LabApp.extension_manager=readonly', f'--ServerApp.root_dir={self.work}']
        with open(self.folder/'log', 'wb') as log:
            self.process = subprocess.Popen(command, env=self.environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try: self.server = wait_for(self.address, 'JupyterLab', said=(self.folder/'log').read_text)
        except BaseException: end(self.process); raise
        return self

    def __exit__(self, *exc): end(self.process)

    def address(self):
        "What the server says of itself, once it serves: url, token"
        assert self.process.poll() is None, (self.folder/'log').read_text()
        try: return json.loads((self.folder/'runtime'/f'jpserver-{self.process.pid}.json').read_text())
        except (FileNotFoundError, ValueError): return None


@contextlib.contextmanager
def browser(folder):
    "Chromium, driven by Playwright, with a home in a folder"
    from playwright.sync_api import sync_playwright
    home = Path(folder)
    home.mkdir(parents=True)
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium(), args=ARGS, env=dict(os.environ, HOME=str(home), TMPDIR=str(home)))
        try: yield b
        finally: b.close()


READY = """() => { const c = window.jupyterapp?.shell.currentWidget?.sessionContext, k = c?.session?.kernel;
                   return c?.isReady && k?.connectionStatus == 'connected' && k.status == 'idle' }"""
WATCH = """() => {
    const seen = window.seen = {frames: [], most: 0}, book = document.querySelector('.jp-Notebook');
    const look = () => {
        const shown = [...book.querySelectorAll('.jp-OutputArea-output :is(img, svg.cl-curve)')];
        seen.most = Math.max(seen.most, shown.length);
        for (const picture of shown) {
            const drawn = picture.src ?? picture.innerHTML, live = picture.closest('.cl-live');
            if (drawn != seen.frames.at(-1)?.drawn) seen.frames.push({drawn, said: live?.innerText, bar: live && parseFloat(live.querySelector('.cl-bar').style.width),
                busy: [...book.querySelectorAll('.jp-InputPrompt')].some(p => p.innerText.includes('*'))});
        }
    };
    new MutationObserver(look).observe(book, {subtree: true, childList: true, attributes: true, attributeFilter: ['src']});
}"""


class Book:
    "A notebook in a tab of its own"
    def __init__(self, lab, browser, name):
        self.url, self.tab = f"{lab.server['url']}lab/tree/{name}?reset&token={lab.server['token']}", browser.new_page(viewport=dict(width=1280, height=1000))
        self.open()

    def open(self):
        "Load it, and wait until its kernel is ready to work"
        self.tab.goto(self.url)
        self.until(READY, 'kernel')

    def until(self, condition, what, seconds=120.):
        "Wait for a condition in the page"
        wait_for(lambda: self.tab.evaluate(condition), what, seconds, self.text)

    def command(self, name): self.tab.evaluate('name => { jupyterapp.commands.execute(name) }', name)  # the braces: it is not waited for

    def text(self):
        "All that the outputs say"
        return '\n'.join(self.tab.locator('.jp-OutputArea-output').all_inner_texts())

    def prompts(self): return [p.strip(' []:') for p in self.tab.locator('.jp-CodeCell .jp-InputPrompt').all_inner_texts()]

    def watch(self): self.tab.evaluate(WATCH)

    def seen(self):
        "Since `watch`: each new picture in an output, what stood around it, whether a cell was at work; and the most of them at a time"
        return self.tab.evaluate('() => seen')

    def run(self):
        "Start all cells; the first request after a kernel came up is sometimes lost"
        for _ in range(20):
            self.command('notebook:run-all-cells')
            with contextlib.suppress(AssertionError): return wait_for(lambda: self.prompts()[0], 'cell at work', 5)
        raise AssertionError('no cell ever began')

    def finish(self, seconds=400.):
        "Wait until every cell has its number"
        wait_for(lambda: all(p.isdigit() for p in self.prompts()), 'end of the cells', seconds, self.text)

    def save(self):
        "Write the notebook, and wait until it is written"
        self.command('docmanager:save')
        self.until('() => !jupyterapp.shell.currentWidget.context.model.dirty', 'saved notebook')

    def leave(self):
        "Give the kernel back"
        self.tab.evaluate('() => jupyterapp.shell.currentWidget.sessionContext.shutdown()')


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): pass


@contextlib.contextmanager
def serve(folder):
    "A folder on a free port of this machine; its address"
    server = ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(_Quiet, directory=folder))
    thread = Thread(target=server.serve_forever)
    thread.start()
    try: yield f'http://127.0.0.1:{server.server_port}/'
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


LOOK = r"""async () => {
    for (const d of document.querySelectorAll('main details')) d.open = true;
    const size = e => { const r = e.getBoundingClientRect(); return [r.width, r.height] };
    const pictures = [...document.images];
    await Promise.allSettled(pictures.map(i => { i.loading = 'eager'; return i.decode() }));
    const text = document.createTreeWalker(document.querySelector('main'), NodeFilter.SHOW_TEXT), tex = [];
    while (text.nextNode()) if (!text.currentNode.parentElement.closest('code, pre, math, script') && /\\[a-z]{2,}|\$\$/.test(text.currentNode.data)) tex.push(text.currentNode.data);
    return {pictures: pictures.map(i => ({src: i.src, whole: i.complete && i.naturalWidth > 0, size: size(i)})), tex,
            math: [...document.querySelectorAll('math')].map(m => ({text: m.textContent, size: size(m)}))};
}"""


class Visit:
    "A tab that remembers what was asked for, and what went wrong"
    def __init__(self, browser, **more):
        self.tab, self.asked, self.wrong = browser.new_page(**more), [], []
        self.tab.on('request', lambda r: self.asked.append(r.url))
        self.tab.on('requestfailed', lambda r: self.wrong.append(f'{r.url}: {r.failure}'))
        self.tab.on('response', lambda r: r.status >= 400 and self.wrong.append(f'{r.url}: {r.status}'))
        self.tab.on('console', lambda m: m.type in ('error', 'warning') and self.wrong.append(f'{self.tab.url}: {m.text}'))
        self.tab.on('pageerror', lambda e: self.wrong.append(f'{self.tab.url}: {e}'))

    def look(self, url):
        "Open a page and unfold all of it: its pictures and its maths with their sizes, and TeX that was left over"
        self.tab.goto(url)
        return self.tab.evaluate(LOOK)

    def width(self, inner):
        "How wide the page is in a window of this width"
        self.tab.set_viewport_size(dict(width=inner, height=844))
        return self.tab.evaluate('() => document.documentElement.scrollWidth')
