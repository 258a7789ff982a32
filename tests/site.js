// Menu, theme, copying and search; everything is read from this site alone
const up = document.currentScript.dataset.up, root = document.documentElement, at = id => document.getElementById(id)
at('theme').onclick = () => { localStorage.theme = root.dataset.theme = root.dataset.theme == 'dark' ? 'light' : 'dark' }
at('menu').onclick = () => at('menu').setAttribute('aria-expanded', document.querySelector('.side').classList.toggle('open'))

for (const pre of document.querySelectorAll('pre.code:not(.numbered)')) {
  const button = Object.assign(document.createElement('button'), {className: 'copy', textContent: 'copy', type: 'button'})
  button.onclick = () => { navigator.clipboard.writeText(pre.querySelector('code').innerText); button.textContent = 'copied' }
  pre.append(button)
}

const field = at('search'), found = at('found')
let chosen = -1
function load() {  // the index is fetched when somebody first looks for something
  if (load.begun) return
  load.begun = true
  const script = Object.assign(document.createElement('script'), {src: up + 'search.js', onload: look})
  document.head.append(script)
}
function score(words, head, title, text) {  // 0 if a word is nowhere; names that begin with it come first
  let sum = 0
  for (const w of words) {
    const s = head == w ? 40 : head.startsWith(w) ? 20 : head.includes(w) ? 10 : title.includes(w) ? 6 : text.includes(w) ? 1 : 0
    if (!s) return 0
    sum += s
  }
  return sum
}
function look() {
  const words = field.value.toLowerCase().split(/\s+/).filter(Boolean)
  found.hidden = !words.length
  if (!words.length || typeof PAGES == 'undefined') return
  const hits = []
  for (const [title, url, subtitle, sections] of PAGES) {
    const name = title.toLowerCase()
    hits.push([score(words, name, name, subtitle.toLowerCase()), title, subtitle, url])
    for (const [head, anchor, text] of sections) hits.push([score(words, head.toLowerCase(), name, text.toLowerCase()), head, title + (text ? ': ' + text : ''), url + '#' + anchor])
  }
  const best = hits.filter(h => h[0]).sort((a, b) => b[0] - a[0]).slice(0, 12)
  found.replaceChildren(...best.map(([, head, text, url]) => {
    const li = document.createElement('li'), a = Object.assign(document.createElement('a'), {href: up + url, textContent: head})
    a.append(Object.assign(document.createElement('small'), {textContent: text}))
    li.append(a)
    return li
  }))
  if (!best.length) found.append(Object.assign(document.createElement('li'), {textContent: 'Nothing found'}))
  chosen = -1
}
field.onfocus = load
field.oninput = () => { load(); look() }
field.onkeydown = e => {
  const links = [...found.querySelectorAll('a')]
  if (e.key == 'Escape') { field.value = ''; look() }
  if (e.key == 'Enter' && links.length) links[Math.max(chosen, 0)].click()
  if (e.key != 'ArrowDown' && e.key != 'ArrowUp') return
  e.preventDefault()
  chosen = Math.min(Math.max(chosen + (e.key == 'ArrowDown' ? 1 : -1), 0), links.length - 1)
  links.forEach((a, i) => a.classList.toggle('on', i == chosen))
}
document.addEventListener('click', e => { if (!e.target.closest('.find')) found.hidden = true })
document.addEventListener('keydown', e => { if (e.key == '/' && !/INPUT|TEXTAREA/.test(e.target.tagName)) { e.preventDefault(); field.focus() } })
document.querySelector('.side [aria-current]')?.scrollIntoView({block: 'nearest'})
