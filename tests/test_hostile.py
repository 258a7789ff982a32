"Files made to do harm: nothing in them runs, none of them crashes, hangs or fills the memory, and each ends as one line"
import builtins, codecs, collections, contextlib, copyreg, ctypes, functools, gzip, hashlib, importlib, io, json, marshal, operator, os, pathlib, pickle, random, runpy
import shutil, signal, socket, struct, subprocess, sys, tempfile, time, timeit, types, warnings, webbrowser, zipfile, zlib
from pathlib import Path
import pytest
import torch
from continual_llm.archive import MAGIC, TRAILER, load_object
from continual_llm.checkpoint import load_checkpoint
from continual_llm.core import UserError

ROOT = Path(__file__).parent.parent
WORDS = 'cat dog hen fox owl cow mat log hill road roof farm'.split()
TEXT = '\n'.join(f'the {a} sat on the {b} and saw the {c} .\n' for a in WORDS for b in WORDS for c in WORDS[:6])
TINY = 'd_model: 16\nn_layers: 2\nn_heads: 2\nn_kv_heads: 1\nd_ff: 16\nmax_seq_len: 32\n'


# --- archives: each sealed with a right checksum ----------------------------------------------------------------------------------------------------

class Call:
    "Pickles as a call of a function"
    def __init__(self, f, *args): self.f, self.args = f, args
    def __reduce__(self): return self.f, self.args


def seal(data): return data + TRAILER.pack(MAGIC, len(data), hashlib.sha256(data).digest())


def zipped(pickled, how=zipfile.ZIP_STORED, **more):
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w', how) as z:
        z.writestr('archive/data.pkl', pickled); z.writestr('archive/version', '3'); z.writestr('archive/byteorder', 'little')
        for n, d in more.items(): z.writestr('archive/data/'+n.strip('_'), d)
    return b.getvalue()


def saved(obj):
    b = io.BytesIO()
    torch.save(obj, b)
    return b.getvalue()


def calls(canary):
    "Objects that would do something when an ordinary unpickler met them, or that are none of ours"
    touch, x = f"open({canary!r}, 'w').close()", canary + '_x'
    made = dict(system=Call(os.system, f'touch {canary}'), eval=Call(eval, touch), exec=Call(exec, touch), popen=Call(subprocess.Popen, ['touch', canary]),
        run=Call(subprocess.run, ['touch', canary]), output=Call(subprocess.check_output, ['touch', canary]), open=Call(open, canary, 'w'), mkdir=Call(os.mkdir, canary),
        spawn=Call(os.spawnlp, 0, 'touch', 'touch', canary), ospopen=Call(os.popen, f'touch {canary}'), compile=Call(compile, touch, 'x', 'exec'), imp=Call(importlib.import_module, 'antigravity'),
        dunder=Call(builtins.__import__, 'antigravity'), getattr=Call(getattr, [], 'append'), partial=Call(functools.partial, os.system, 'x'), attr=Call(operator.attrgetter, 'system'),
        caller=Call(operator.methodcaller, 'x'), loads=Call(pickle.loads, pickle.dumps(Call(os.system, f'touch {canary}'))), torchload=Call(torch.load, canary), hub=Call(torch.hub.load, 'a/b', 'c'),
        jit=Call(torch.jit.load, canary), runpy=Call(runpy.run_path, canary), cdll=Call(ctypes.CDLL, 'libc.so.6'), web=Call(webbrowser.open, 'http://localhost'), rmtree=Call(shutil.rmtree, x),
        move=Call(shutil.move, x, canary), path=Call(pathlib.PosixPath, 'a'), temp=Call(tempfile.mkdtemp, 'a', 'b', str(Path(canary).parent)), socket=Call(socket.socket), timeit=Call(timeit.timeit, touch, 'pass'),
        unlink=Call(os.unlink, x), marshal=Call(marshal.loads, marshal.dumps(compile(touch, 'x', 'exec'))), frozen=frozenset([1]), cls=Call, type=Call(type, 'X', (), {}), counter=collections.Counter('abc'),
        deque=collections.deque([1]), array=Call(bytearray, 10**12), many=Call(bytes, 10**12), rng=Call(range, 10**12), lst=Call(list, range(9)), sets={1, 2}, cplx=1j, codec=Call(codecs.encode, 'a', 'rot13'),
        sparse=torch.eye(3).to_sparse(), meta=torch.zeros(10**12, device='meta'), param=torch.nn.Parameter(torch.zeros(1)), module=torch.nn.Linear(2, 2), size=torch.Size([10**12]), device=torch.device('cpu'),
        dtype=torch.float8_e4m3fn, ext=Call(copyreg._reconstructor, object, object, None), kill=Call(os.kill, os.getpid(), 9), exit=Call(os._exit, 3), raises=Call(signal.raise_signal, 9), chmod=Call(os.chmod, x, 0),
        sleep=Call(time.sleep, 10**6), spaces=types.SimpleNamespace(a=1), gc=Call(torch.set_num_threads, 99), safe=Call(torch.serialization.add_safe_globals, [os.system]), ones=Call(torch.ones, 10**12),
        default=Call(torch.set_default_dtype, torch.float64), quantized=torch.quantize_per_tensor(torch.ones(2), 1., 0, torch.qint8), half=torch.ones(2, dtype=torch.complex64), numpy=torch.ones(2).numpy(), scalar=torch.ones(2).numpy()[0])
    return {n: saved(dict(w=o)) for n, o in made.items()}


def tensor(storage='FloatStorage', key='0', numel='J\x04\x00\x00\x00', offset='K\0', size='K\4\x85', stride='K\1\x85', where='cpu'):
    "The program that makes one tensor, with anything in place of what belongs there"
    parts = f'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\n{storage}\nX{chr(len(key))}\0\0\0{key}X{chr(len(where))}\0\0\0{where}', numel, 'tQ', offset, size, stride
    return ''.join(parts).encode('latin1') + b'\x89ccollections\nOrderedDict\n)RtR.'


BIG = '\x8a\x06\0\0\0\0\0\x01'  # 2**40 as a pickle writes it
HARMLESS = {'deepdict', 'cuda', 'place', 'many', 'comment', 'version', 'half_trailer', 'own_trailer', 'fine', 'laughs', 'nested', 'stride', 'deep', 'deeper', 'mark', 'build', 'memo', 'doubled', 'copies'}  # load as plain values, and are no checkpoints


def programs():
    "Pickle programs that only a hand would write"
    made = dict(empty=b'', stop=b'.', nostop=b'\x80\x02]', protocol=b'\x80\x7f].', noise=random.Random(0).randbytes(5000), deep=b'\x80\x02' + b']'*10**5 + b'a'*99_999 + b'.',
        deeper=b'\x80\x02' + b'('*10**5 + b't'*10**5 + b'.', laughs=b'\x80\x02]q\0' + b''.join(b'(h'+bytes([i]) + b'h'+bytes([i]) + b'lq'+bytes([i+1]) for i in range(60)) + b'.', memo=b'\x80\x02]r\xff\xff\xff\x7f.',
        get=b'\x80\x02h\5.', long=b'\x80\x02\x8b\xff\xff\xff\x7f1.', neglong=b'\x80\x02\x8b\xff\xff\xff\xff1.', text=b'\x80\x02X\xff\xff\xff\x7fab.', utf=b'\x80\x02X\2\0\0\0\xff\xfe.', ascii=b'I1' + b'0'*10**6 + b'\n.',
        inst=b'(S"id"\nios\nsystem\n.', stackglobal=b'\x80\x04\x8c\x05posix\x94\x8c\x06system\x94\x93.', obj=b'(cos\nsystem\no.', ext=b'\x80\x02\x82\1.', persid=b'Pabc\n.', buffer=b'\x80\x05\x97.',
        bytearray8=b'\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7fabc.', build=b'\x80\x02ccollections\nOrderedDict\n)R}X\x09\0\0\0__class__K\1sb.', odd=b'\x80\x02K\1Q.', pop=b'\x80\x020000.', mark=b'\x80\x02((((t.',
        reduce=b'\x80\x02ccollections\nOrderedDict\nK\1R.', dotted=b'\x80\x02ccollections\nabc.os.system\n.', spaced=b'\x80\x02cos system\nx\n.', nested=b'\x80\x02ccollections\nOrderedDict\n(]tR.', float=b'\x80\x02G\0.',
        storage_call=b'\x80\x02ctorch\nFloatStorage\n\x8a\x06\0\0\0\0\0\x01\x85R.', rebuild_call=b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.', sub=b'\x80\x02ctorch\nFloatStorage.__init__.__globals__\n.',
        newline=b'\x80\x02ccollections\nOrderedDict\nos\n.', setitems=b'\x80\x02}(]K\1u.', append=b'\x80\x02K\1K\2a.', deepdict=b'\x80\x02' + b'}K\0'*10**5 + b'N' + b's'*10**5 + b'.', state=b'\x80\x02]}b.',
        key=tensor(key='../x'), absent=tensor(key='7'), numel=tensor(numel=BIG), size=tensor(size=BIG+'\x85'), stride=tensor(size=BIG+'\x85', stride='K\0\x85'), negative=tensor(size='J\xff\xff\xff\xff\x85'),
        offset=tensor(offset=BIG), offset2=tensor(offset='J\xf0\xff\xff\xff'), dims=tensor(size='K\4\x85', stride='K\1K\1\x86'), quant=tensor(storage='QInt8Storage'), dtype=tensor(storage='DoubleStorage'),
        untyped=tensor(storage='UntypedStorage'), cuda=tensor(where='cuda:99'), place=tensor(where='../../etc'), minus=tensor(numel='J\xff\xff\xff\xff'), textsize=tensor(size='X\1\0\0\0a\x85'),
        overlap=tensor(size='K\4\x85', stride='K\2\x85'), many=tensor(size='('+'K\1'*5000+'t', stride='('+'K\1'*5000+'t'), fine=tensor())
    return {n: zipped(p, _0_=bytes(16)) for n, p in made.items()}


def containers():
    "Zip files whose headers lie"
    good, b = zipped(tensor(), _0_=bytes(16)), io.BytesIO()
    torch.save(dict(a=torch.zeros(2)), b, _use_new_zipfile_serialization=False)
    end = good.rfind(b'PK\5\6')
    def entries(*names):
        out = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(out, 'w') as z:
            warnings.simplefilter('ignore')
            for name in names: z.writestr(name, tensor() if name.lower().endswith('pkl') else b'\0'*16)
        return out.getvalue()
    central = good.find(b'PK\1\2')
    def patched(*changes):  # (place, bytes) pairs
        data = bytearray(good)
        for place, new in changes: data[place:place+len(new)] = new
        return bytes(data)
    return dict(bomb=zipped(b'0'*10**8, zipfile.ZIP_DEFLATED), bzip=zipped(b'0'*10**6, zipfile.ZIP_BZIP2), lzma=zipped(b'0'*10**6, zipfile.ZIP_LZMA), nozip=b'x'*999, pickled=pickle.dumps(dict(a=1)), legacy=b.getvalue(), cut=good[:-30], doubled=good*2,
        headers=good.replace(b'\x10\0\0\0', b'\xff\xff\xff\x7f'), names=good.replace(b'archive/data/0', b'archive/../../0'[:14]), count=patched((end+8, b'\xff\xff\xff\xff')), fewer=patched((end+8, b'\1\0\1\0')),
        directory=patched((end+16, b'\xff\xff\xff\x7f')), directory_size=patched((end+12, b'\xff\xff\xff\x7f')), comment=patched((end+20, b'\xff\xff')), zip64=patched((end+8, b'\xff'*12)), local=patched((0, b'PK\7\7')),
        overlapping=patched((good.find(b'PK\1\2', central+4)+42, b'\0\0\0\0')), encrypted=patched((central+8, b'\1\0'), (6, b'\1\0')), method=patched((central+10, b'\x63\0'), (8, b'\x63\0')), disk=patched((end+4, b'\7\0\7\0')),
        expanded=patched((central+24, b'\xff\xff\xff\x7f')), packed=patched((central+20, b'\xff\xff\xff\x7f')), twice=entries('archive/data.pkl', 'archive/data.pkl', 'archive/version'), nothing=entries(),
        two=entries('a/data.pkl', 'b/data.pkl'), upper=entries('archive/DATA.PKL', 'archive/version'), absolute=entries('/data.pkl', '/version'), above=entries('../data.pkl', '../version'), nul=entries('a\0b/data.pkl'),
        script=entries('archive/constants.pkl', 'archive/code/__torch__.py', 'archive/version'), long=entries('a'*60_000 + '/data.pkl'), crowd=entries('archive/data.pkl', *(f'archive/data/{i}' for i in range(3000))),
        version=good.replace(b'archive/version', b'archive/versioN'), order=zipped(tensor(), _0_=bytes(16)).replace(b'little', b'middle'), prefixed=b'#!/bin/sh\n' + good, gzipped=gzip.compress(good), tar=b'\0'*10240,
        half_trailer=good + MAGIC, own_trailer=seal(good), ends=good + b'PK\5\6' + bytes(18))


# --- what a valid archive can say -------------------------------------------------------------------------------------------------------------------

def checkpoints(good):
    "Changes to a checkpoint, all within what `save_object` can write"
    def with_config(**new): return lambda c: c['config'].update(new)
    def top(**new): return lambda c: c.update(new)
    def weights(f): return lambda c: c.update(model_state_dict=f(c['model_state_dict']))
    w, name = torch.zeros(250_000), next(iter(good['model_state_dict']))
    deep = []
    for _ in range(50): deep = [deep, deep]
    odd = (None, -1, 0, 2**62, 1e308, float('nan'), 'x'*10**5, [1], True, torch.zeros(3))
    right = {'dropout_0', 'attn_dropout_0', 'tie_embeddings_True', 'head_dim_None'}
    made = {f'config_{k}_{v!r:.20}': with_config(**{k: v}) for k in good['config'] for v in odd if f'{k}_{v!r:.20}' not in right}
    made |= {f'{k}_{v!r:.20}': top(**{k: v}) for k, vs in dict(format_version=(None, True, 1., '1', -1, 2**62, [1]), epoch=(None, 0, -1, True, '1', 1.), step=(None, -1, True, '3', 2.5), val_loss=('x', float('nan'), [], True, w),
             val_perplexity=('x', float('nan'), {}), tokenizer_hash=(None, 3, 'x'*10**5, '\n\n', [], '0'*64), generation=('000001', None), config=(None, [], 'tiny', {}, {1: 2}, {'x'*10**5: 1}), model_state_dict=(None, [], {}, 'x', {1: w}, {'a': 'b'}, {'a': w})).items() for v in vs}
    made |= dict(layers=with_config(n_layers=1000), few_layers=with_config(n_layers=1), long_rotary=with_config(max_seq_len=2**20, head_dim=1024), wide=with_config(d_model=65_536, d_ff=2**20),
        shared=weights(lambda s: {f'w{i}': w for i in range(20_000)}), crowd=weights(lambda s: {f'w{i}': torch.zeros(0) for i in range(20_000)}), nan=weights(lambda s: dict(s, **{name: s[name]*float('nan')})),
        infinite=weights(lambda s: dict(s, **{name: s[name]/0})), ints=weights(lambda s: {k: v.long() for k, v in s.items()}), doubles=weights(lambda s: {k: v.double() for k, v in s.items()}), turned=weights(lambda s: {k: v.T for k, v in s.items()}),
        spread=weights(lambda s: dict(s, **{name: torch.zeros(1).expand(s[name].shape)})), missing=weights(lambda s: {k: v for k, v in s.items() if k != name}), more=weights(lambda s: dict(s, extra=w)), empty_sizes=weights(lambda s: dict(s, **{name: torch.zeros(0, 2**62)})),
        scalar=weights(lambda s: dict(s, **{name: torch.tensor(1.)})), renamed=weights(lambda s: {k.upper(): v for k, v in s.items()}), long_name=weights(lambda s: {'x'*10**6: w}), dimensions=weights(lambda s: dict(s, **{name: torch.zeros([1]*200)})))
    return made, dict(a_list=[1], a_number=3, a_text='x', a_tensor=w, nothing=None, empty={}, laughs=dict(good, more=deep))


# --- tokenizers: SentencePiece models with a right hash ---------------------------------------------------------------------------------------------

def varint(n):
    n, out = n & 2**64-1, b''
    while n > 127: out, n = out + bytes([n & 127 | 128]), n >> 7
    return out + bytes([n])


def fields_of(data):
    "The fields of a protocol buffer as (number, wire type, value)"
    at, out = 0, []
    def number():
        nonlocal at
        n = shift = 0
        while True:
            b, at = data[at], at+1
            n, shift = n | (b & 127) << shift, shift+7
            if b < 128: return n
    while at < len(data):
        tag = number()
        if tag & 7 == 0: value = number()
        else:
            size = number() if tag & 7 == 2 else 4
            value, at = data[at:at+size], at+size
        out.append((tag >> 3, tag & 7, value))
    return out


def message(fields): return b''.join(varint(f << 3 | w) + (varint(v) if w == 0 else varint(len(v)) + v if w == 2 else v) for f, w, v in fields)


def tokenizers(good):
    "SentencePiece models that only a hand would write"
    fields = fields_of(good)
    pieces, rest = [fields_of(v) for f, _, v in fields if f == 1], [x for x in fields if x[0] != 1]
    def model(pieces, rest=rest): return message([(1, 2, message(p)) for p in pieces] + rest)
    def piece(text, kind=None, score=0.): return [(1, 2, text if isinstance(text, bytes) else text.encode()), (2, 5, struct.pack('<f', score))] + ([(3, 0, kind)] if kind is not None else [])
    def text_of(p): return dict((f, v) for f, _, v in p)[1]
    def kind(i, k): return [piece(text_of(p), k) if j == i else p for j, p in enumerate(pieces)]
    def every(k): return [piece(text_of(p), k) for p in pieces]
    def spec(number, **new):  # other values in the trainer's (2) or normalizer's (3) part
        new = {int(k[1:]): v for k, v in new.items()}
        return [(f, w, message([x for x in fields_of(v) if x[0] not in new] + [(k, 0 if isinstance(x, int) else 2, x) for k, x in new.items()])) if f == number else (f, w, v) for f, w, v in rest]
    trie = struct.pack('<I', 4096)
    return dict(empty=b'', nothing=model([]), no_spec=model(pieces, []), one=model([piece('a')]), no_special=model(pieces[4:]), no_pad=model(pieces[1:]), twice=model(pieces + [piece('dup')]*2), empty_piece=model(pieces + [piece('')]),
        bad_byte=model(pieces + [piece('hello', 6)]), last_is_byte=model(kind(len(pieces)-1, 6)), no_utf8=model(pieces + [piece(b'\xff\xfe')]), kind_99=model(pieces + [piece('zz', 99)]), nan=model([piece(text_of(p), dict((f, v) for f, _, v in p).get(3), float('nan')) for p in pieces]),
        **{f'all_{k}': model(every(k)) for k in range(1, 7)}, **{f'{name}_is_{k}': model(kind(i, k)) for i, name in enumerate(('pad', 'bos', 'eos', 'unk')) for k in (1, 2, 4, 6)}, long_piece=model(pieces + [piece('x'*5_000_000)]),
        many=model(pieces + [piece(f'p{i}') for i in range(100_000)]), **{f'type_{t}': model(pieces, spec(2, f3=t)) for t in (1, 3, 4, 99)}, pad_id=model(pieces, spec(2, f43=2**63)), vocab=model(pieces, spec(2, f4=2**31-1)), ids=model(pieces, spec(2, f40=2**40, f41=2**40, f42=2**40)),
        **{f'named_{i}': model(pieces, spec(2, **{f'f{i}': b'nope'})) for i in (45, 46, 47, 48)}, same_name=model(pieces, spec(2, f46=b'</s>')), charsmap=model(pieces, spec(3, f2=b'\xff'*100)), charsmap_size=model(pieces, spec(3, f2=struct.pack('<I', 2**31) + bytes(5000))),
        charsmap_noise=model(pieces, spec(3, f2=trie + random.Random(0).randbytes(4096) + b'ab\0')), charsmap_units=model(pieces, spec(3, f2=trie + b'\xff\xff\xff\x7f'*1024 + b'ab\0')), prefix=model(pieces, spec(3, f3=1)), suffix=model(pieces, spec(2, f24=1)),
        self_test=model(pieces, rest + [(4, 2, message([(1, 2, message([(1, 2, b'hi'), (2, 2, b'no')]))]))]), denormal=model(pieces, rest + [(5, 2, message([(2, 2, b'\xff'*64)]))]), cut=good[:-3], tail=good + b'\xff'*30, reversed=model(pieces[::-1]), zeros=bytes(1000), text=b'hello',
        no_fallback=model(pieces, spec(2, f35=0)), half_bytes=model(pieces[:100] + pieces[200:]), unknown_field=good + varint(99 << 3 | 2) + varint(10**6) + bytes(10**6), lying_length=varint(1 << 3 | 2) + varint(2**62) + b'x')


# --- token files, memories, runs, settings and texts ------------------------------------------------------------------------------------------------

def token_files(good):
    "Token files with a right checksum, and some that are none"
    from continual_llm.data import HEADER, _checksum
    head, body = json.loads(good[:HEADER]), good[HEADER:]
    n, docs = head['n_tokens'], head['n_docs']
    def forged(body=body, **new):
        changed = {**head, **new}
        changed['checksum'] = _checksum(changed, crc=zlib.crc32(body))
        return json.dumps(changed).encode().ljust(HEADER-1)[:HEADER-1] + b'\n' + body
    starts = len(body) - 8*docs
    def with_starts(f): return forged(body[:starts] + b''.join(struct.pack('<q', f(i)) for i in range(docs)))
    kinds = ('O', '<f4', '>u2', '<u8', '|V2', 'U1', 'M8[s]', [['a', '<u2']], 'u2,'*99, '<u4')
    made = {f'{k}_{v!r:.15}': forged(**{k: v}) for k in head if k != 'checksum' for v in (None, -1, 0, 2**40, 10**300, 1e308, 'x', [], {}, True, *(kinds if k == 'dtype' else ())) if v != head[k]}
    made |= {f'size_{a}_{b}': forged(bytes(max(0, -(-2*a // 8)*8 + 8*b)), n_tokens=a, n_docs=b) for a, b in ((0, 0), (0, 5), (5, 0), (-4, 3), (4, -1), (500, 500))}
    return dict(made, ids_outside=forged(b'\xff'*starts + body[starts:]), one_outside=forged(b'\xff\xff' + body[2:]), starts_negative=with_starts(lambda i: -i), starts_beyond=with_starts(lambda i: i*2**40), starts_back=with_starts(lambda i: docs-i),
        starts_same=with_starts(lambda i: 0), starts_late=with_starts(lambda i: i+1), no_json=b'x'*len(good), nesting=b'['*HEADER + body, digits=b'9'*HEADER + body, no_header=body, text=b'hello', nothing=b'', nul=bytes(10**5), a_list=b'[]'.ljust(HEADER) + body,
        wrong_checksum=good[:-1] + b'\x7f', cut=good[:-8], more=good + bytes(8), nan=good[:HEADER].replace(b'"n_docs": ', b'"n_docs": NaN, "x": ')[:HEADER] + body)


ODD_JSON = ['', '{', '[]', '{}', 'null', '3', '"x"', '[' * 10**5, '{"a":' * 10**5, '9' * 10**5, '\ufeff{}', '{"format": 1}', 'NaN', '\0', '{"a": 1e999}', '"\\ud800"', '[' + '[],' * 10**6 + '1]']


def around(good, odd=(None, -1, 0, 3, 10**18, 1e308, 'x', '../../x', 'x'*10**5, '\n', [], {}, [[]], True)):
    "JSON like a good one with odd values, and what is none"
    made = {f'{k}_{v!r:.12}': json.dumps({**good, k: v}) for k in good for v in odd if v != good[k] or type(v) is not type(good[k])}
    return made | {f'without_{k}': json.dumps({a: b for a, b in good.items() if a != k}) for k in good} | {f'text_{i}': t for i, t in enumerate(ODD_JSON)}


CONFIGS = dict(tag='d_model: !!python/object/apply:os.system ["true"]', new='d_model: !!python/object/new:os.system [true]', name='d_model: !!python/name:os.system', module='d_model: !!python/module:os', laughs='a: &a [x,x]\nb: &b [*a,*a]\nc: [*b,*b]',
    merge='<<: {d_model: 3}', anchor='d_model: &a 64', alias='d_model: *a', nesting='[' * 60_000, maps='{' * 60_000, deep='\n'.join(' '*i + 'a:' for i in range(300)), dashes='- ' * 30_000, questions='? ' * 20_000, long='d_model: ' + '1'*60_000, hexadecimal='d_model: 0x' + 'f'*60_000,
    binary='d_model: 0b' + '1'*60_000, sixty='d_model: 1' + ':1'*20_000, float='rope_theta: 1' + '0'*400 + '.0', nan='rope_theta: .nan', infinite='rope_theta: .inf', date='d_model: 2001-99-99', keys='\n'.join(f'k{i}: 1' for i in range(5000)), huge='x'*10**6, nul='d_model: \0',
    wide=b'\xff\xfed\0_\0', invalid=b'd_model: \xff', directive='%YAML 9.9\n---\nd_model: 64', percent='%TAG ! tag:x,2000:\n---\nd_model: !x 64', block='d_model: |\n' + '  x\n'*15_000, quotes='d_model: "' + '\\x41'*15_000 + '"', comment='#'*60_000, value='=: 3', bool='n_layers: yes',
    layers='n_layers: 1000000000', length='max_seq_len: 1000000000000', width='d_model: 99999999999999999999', control='d_model: \x07', two='d_model: 64\n---\nd_model: 32', surrogate='d_model: "\\ud800"', empty='', tab='\td_model: 3')


def texts():
    "Sources that unpack or parse to more than they seem"
    bomb = gzip.compress(b'\n' * 20_000_000, 9)
    return {'blank.txt.gz': bomb, 'short.txt.gz': gzip.compress(b'0\n' * 10_000_000, 9), 'zeros.txt.gz': gzip.compress(bytes(100_000_000), 1), 'line.txt.gz': gzip.compress(b'x' * 50_000_000, 1), 'twice.txt.gz': gzip.compress(bomb),
        'members.txt.gz': bomb * 20, 'header.txt.gz': b'\x1f\x8b\x08\x1c' + b'\xff' * 9999, 'name.txt.gz': b'\x1f\x8b\x08\x08' + bytes(6) + b'x' * 10**6, 'cut.txt.gz': bomb[:100], 'noise.txt.gz': b'\x1f\x8b\x08\0' + random.Random(0).randbytes(9999), 'stored.txt.gz': bomb[:12] + b'\0' * 999,
        'deep.jsonl': b'[' * 2_000_000, 'maps.jsonl': b'{"a":' * 400_000, 'lists.jsonl': b'{"text": [' + b'[],' * 1_000_000 + b'0]}', 'keys.jsonl': b'{' + b','.join(b'"%d":0' % i for i in range(10**6)) + b'}', 'digits.jsonl': b'{"text": ' + b'9' * 10**6 + b'}', 'long.jsonl': b'{"text": "' + b'x' * 40_000_000 + b'"}',
        'float.jsonl': b'{"text": 1' + b'0' * 10**6 + b'.0}', 'escapes.jsonl': b'{"text": "' + b'\\u0000' * 10**5 + b'"}', 'pair.jsonl': b'{"text": "\\ud800"}', 'bomb.jsonl.gz': gzip.compress(b'{"text": "' + b'x' * 50_000_000 + b'"}', 1), 'nul.txt': bytes(10**6), 'crowd.txt': b'\xff' * 10**6}


def states():
    "Changes to a resume state, as (what to change) -> None"
    def put(*path, to):
        def change(s):
            for p in path[:-1]: s = s[p]
            s[path[-1]] = to
        return change
    def moments(f): return lambda s: [m.update({k: f(v) for k, v in m.items() if torch.is_tensor(v)}) for m in s['optimizer']['state'].values()]
    odd = (None, [], 'x', -1, torch.zeros(2))
    made = {f'{k}_{v!r:.12}': put(k, to=v) for k in ('optimizer', 'history', 'progress', 'model_state_dict', 'config', 'facts', 'step', 'format_version') for v in odd}
    made |= {f'progress_{k}_{v!r:.12}': put('progress', k, to=v) for k in ('step', 'best_loss', 'nats', 'stopped', 'new') for v in ('x', None, -5, [])}
    made |= {f'history_{v!r:.12}': put('history', 'records', to=v) for v in odd} | {f'records_{v!r:.12}': put('history', 'records', to=[v]*3) for v in odd} | {f'optimizer_{k}_{v!r:.12}': put('optimizer', k, to=v) for k in ('state', 'param_groups') for v in odd}
    return dict(made, small_moments=moments(lambda t: t.flatten()[:1].clone()), no_moments=moments(lambda t: torch.zeros(0)), whole_moments=moments(lambda t: t.long()), nan_moments=moments(lambda t: t*float('nan')), large_moments=moments(lambda t: torch.zeros(10**6)),
        params=lambda s: s['optimizer']['param_groups'][0].update(params=[0]*9), lr=lambda s: s['optimizer']['param_groups'][0].update(lr='x'), group=lambda s: s['optimizer']['param_groups'][0].update(foreach='x', fused=3, betas=None),
        kinds=lambda s: s['history'].update(records=[dict(kind='eval', best=True, loss=None, step=None)]*2), weights=lambda s: s.update(model_state_dict={k: v[:0] for k, v in s['model_state_dict'].items()}))


# --- the child that opens them ----------------------------------------------------------------------------------------------------------------------

FORBIDDEN = ('os.system', 'os.exec', 'os.posix_spawn', 'os.spawn', 'os.fork', 'os.forkpty', 'os.kill', 'subprocess.', 'socket.connect', 'socket.bind', 'socket.__new__', 'ctypes.', 'webbrowser.', 'code.__new__', 'exec', 'pickle.', 'shutil.move')


class Hang(BaseException): "A case took longer than any should"


class Watch:
    "Runs cases and notes what each should not have done"
    def __init__(self, home, limit):
        self.home, self.bad, self.counts, self.slowest, self.events, self.on = home, [], collections.Counter(), (0., ''), [], False
        self.canary = str(home/'canary')
        sys.addaudithook(self.hear)
        signal.signal(signal.SIGVTALRM, self.hang)
        if sys.platform == 'linux':
            import resource
            size = int(next(l for l in open('/proc/self/status') if l.startswith('VmSize')).split()[1])*1024 + limit
            resource.setrlimit(resource.RLIMIT_AS, (size, size))

    def hear(self, event, args):
        imported = event == 'exec' and not args[0].co_filename.startswith('<')
        if self.on and event.startswith(FORBIDDEN) and not imported: self.events.append(event)

    def hang(self, *a): raise Hang

    def case(self, group, name, f, may=()):
        "`f` must raise a `UserError` of one line, or, if `name` may, give a value back"
        open(self.canary + '_x', 'w').close()
        self.events.clear()
        signal.setitimer(signal.ITIMER_VIRTUAL, 30)
        begun, said, self.on = time.process_time(), None, True
        try: f()
        except UserError as e: said = str(e)
        except BaseException as e: self.bad.append((group, name, type(e).__name__, str(e)[:200]))
        else:
            if name not in may: self.bad.append((group, name, 'passed'))
        finally:
            self.on = False
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        self.slowest = max(self.slowest, (round(time.process_time() - begun, 2), f'{group} {name}'))
        self.counts[group] += 1
        if said and ('\n' in said or len(said) > 1000 or 'weights_only' in said): self.bad.append((group, name, 'said', said[:200]))
        if self.events: self.bad.append((group, name, 'did', self.events[:3]))
        if os.path.exists(self.canary) or not os.path.exists(self.canary + '_x') or not os.access(self.canary + '_x', os.W_OK):
            self.bad.append((group, name, 'RAN'))
            os.unlink(self.canary)

    def command(self, *argv):
        "The command's one line as a `UserError`; what it prints otherwise"
        from continual_llm.cli import main
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try: main([str(a) for a in argv])
            except SystemExit as e: code = e.code
        if code == 0: return out.getvalue()
        assert code == 2 and 'Traceback' not in err.getvalue(), (code, err.getvalue()[-300:])
        line, = [l for l in err.getvalue().splitlines() if l.startswith('continual-llm: ') and not l.startswith('continual-llm: note: ')]
        raise UserError(line)


def fresh(path, data):
    "Replace whatever stands at `path`"
    if path.is_dir() and not path.is_symlink(): shutil.rmtree(path)
    else: path.unlink(missing_ok=True)
    path.write_bytes(data.encode(errors='surrogatepass') if isinstance(data, str) else data)


def special(path, f):
    "`f` with a folder, a pipe, an endless device and an unreadable name at `path`"
    for kind, make in dict(folder=path.mkdir, pipe=lambda: os.mkfifo(path), zeros=lambda: path.symlink_to('/dev/zero'), circle=lambda: path.symlink_to(path), nowhere=lambda: path.symlink_to('/none/at/all')).items():
        fresh(path, b'')
        path.unlink()
        make()
        yield kind, f
    path.unlink()


def made(home):
    "A text, a tokenizer and a finished run, all small"
    from continual_llm.tokenizer import train_tokenizer
    from continual_llm.train import pretrain
    (home/'text.txt').write_text(TEXT)
    (home/'tiny.yaml').write_text(TINY)
    train_tokenizer(home/'text.txt', 300, save=home/'tok')
    pretrain(str(home/'text.txt'), str(home/'tiny.yaml'), tokenizer=str(home/'tok'), epochs=1, batch_size=2, grad_accumulation=1, max_steps=3, save_every=1, save_dir=str(home/'run'), cache=str(home/'cache'), quiet=True)


def archive_cases(watch, home):
    path, commands = home/'h.pt', (('generate', '--max_tokens', 1), ('evaluate', '--data', home/'text.txt', '--cache', home/'cache'))
    for group, files in dict(calls=calls(watch.canary), programs=programs(), containers=containers()).items():
        for i, (name, data) in enumerate(files.items()):
            fresh(path, seal(data))
            watch.case(group, name, lambda: load_object(path), may=HARMLESS)
            watch.case(group, name, lambda: load_checkpoint(path))
            command, *flags = commands[i % 2]
            watch.case(group, name, lambda: watch.command(command, '--model', path, *flags))


def checkpoint_cases(watch, home):
    from continual_llm.archive import save_object
    from continual_llm.generate import generate, load_model
    path = home/'run'/'best'/'checkpoint.pt'
    kept = path.read_bytes()
    changes, others = checkpoints(load_object(path))
    def written(change):
        c = load_object(home/'good.pt')
        change(c)
        return c
    save_object(load_object(path), home/'good.pt')
    values = {n: lambda change=c: written(change) for n, c in changes.items()} | {n: lambda o=o: o for n, o in others.items()}
    for i, (name, make) in enumerate(values.items()):
        fresh(path, seal(saved(make())))
        may = {'laughs'}
        watch.case('checkpoints', name, lambda: generate(*load_model(path)[:2], 'the', max_tokens=1), may)
        command = ('generate', '--max_tokens', 1) if i % 2 else ('evaluate', '--data', home/'text.txt', '--cache', home/'cache')
        watch.case('checkpoints', name, lambda: watch.command(command[0], '--model', path, *command[1:]), may)
    for kind, f in special(path, lambda: watch.command('generate', '--model', path)): watch.case('checkpoints', kind, f)
    fresh(path, kept)


def tokenizer_cases(watch, home):
    from continual_llm.tokenizer import FORMAT, Tokenizer
    model, info = home/'tok'/'tokenizer.model', home/'tok'/'tokenizer.json'
    good_model, good_info = model.read_bytes(), {k: v for k, v in json.loads(info.read_text()).items() if k != 'checksum'}
    def use(folder=home/'tok'):
        tok = Tokenizer.load(folder)
        for text in (' the \u2581\n', '\0é日本', '<s> </s> <pad>'): assert tok.decode(tok.encode(text)) == text
        assert len({tok.pad_id, tok.bos_id, tok.eos_id}) == 3 and min(tok.pad_id, tok.bos_id, tok.eos_id) >= 0
        repr(tok), tok.describe(TEXT[:500]), tok.markers
    for name, data in tokenizers(good_model).items():
        fresh(model, data)
        fresh(info, json.dumps(dict(good_info, hash=hashlib.sha256(f'continual_llm tokenizer {FORMAT}\n'.encode() + data).hexdigest())))
        may = {'nan', 'kind_99', 'type_1', 'type_4', 'type_99', 'pad_id', 'vocab', 'ids', 'self_test', 'reversed', 'suffix', 'unknown_field', 'many', 'named_45', 'unk_is_1', 'unk_is_2', 'unk_is_4', 'unk_is_6'}
        watch.case('tokenizers', name, use, may)
        watch.case('tokenizers', name, lambda: watch.command('generate', '--model', home/'run', '--tokenizer', home/'tok', '--max_tokens', 1), {'unk_is_2'})  # another hash than the checkpoint's, but for the one that changes nothing
    fresh(model, good_model)
    for name, text in around(good_info).items():
        fresh(info, text)
        fine = name.startswith(('vocab_size', 'model_type', 'trained_on', 'source_hash', 'format_True', 'without_vocab', 'without_model', 'without_trained', 'without_source', 'without_markers', 'markers_[]'))
        watch.case('tokenizer.json', name, use, {name} if fine else ())
    fresh(info, json.dumps(good_info))
    for path in (model, info):
        for kind, f in special(path, lambda: watch.command('generate', '--model', home/'run', '--tokenizer', home/'tok')): watch.case('tokenizers', f'{path.name} {kind}', f)
        fresh(path, good_model if path == model else json.dumps(good_info))


def token_cases(watch, home):
    "What is refused in the cache is made again, so that the score is the same; what memory holds is refused"
    from continual_llm.data import open_tokens
    from continual_llm.memory import domains
    command = ('evaluate', '--model', home/'run', '--data', home/'text.txt', '--cache', home/'own')
    right = watch.command(*command)
    path, = (home/'own').glob('*.tokens')
    good = path.read_bytes()
    def same(): assert watch.command(*command) == right, 'another score'
    harmless = ('source_', 'part_', 'n_words', 'n_bytes', 'n_lines', 'vocab_size', 'ids_outside', 'one_outside', 'starts_same', 'starts_late', 'size_', "dtype_'<u4'")  # whole, though not what they say
    for i, (name, data) in enumerate(token_files(good).items()):
        fresh(path, data)
        watch.case('token files', name, lambda: len(open_tokens(path).ids), {name} if name.startswith((*harmless, 'tokenizer_hash')) else ())
        if name.startswith(('n_words', 'n_bytes', 'size_')): watch.case('token files', name, lambda: watch.command(*command), {name})  # a forgery that only the text itself could tell
        elif i % 8 == 0 or '_' not in name or 'outside' in name or 'starts' in name: watch.case('token files', name, same, {name})
    shutil.copy(next(p for p in (home/'cache').glob('*.tokens') if p.read_bytes() != good), path)
    watch.case('token files', 'of another text', same, {'of another text'})
    for kind, f in special(path, same): watch.case('token files', kind, f, {kind})
    place = home/'run'/'memory'/'base'
    about = {k: v for k, v in json.loads((place/'domain.json').read_text()).items() if k != 'checksum'}  # which a hand leaves out
    for name, text in around(about).items():
        fresh(place/'domain.json', text)
        fine = name.startswith(('source_hash_\'', 'tokenizer_hash_\'', 'replay_None', 'val_None', 'source_x', 'source_[', 'source_{', 'source_N', 'source_-', 'source_0', 'source_3', 'source_1', 'source_T', 'source_.', "source_'", 'share', 'max_bytes', 'seed', 'without_source', 'without_share', 'without_max', 'without_seed', 'number'))
        watch.case('memory', name, lambda: [repr(d) for d in domains(home/'run'/'memory')], {name} if fine else ())
    fresh(place/'domain.json', json.dumps(about))
    for path in (place/'domain.json', place/'replay.tokens', place/'val.tokens'):
        kept = path.read_bytes()
        for kind, f in special(path, lambda: domains(home/'run'/'memory')): watch.case('memory', f'{path.name} {kind}', f, {kind, f'{path.name} circle', f'{path.name} nowhere'} if 'json' in path.name else ())
        fresh(path, kept)


def setting_cases(watch, home):
    "Configs, texts, run.json and resume states, through `pretrain`"
    from continual_llm.model import model_config
    from continual_llm.source import Source
    from continual_llm.archive import save_object
    flags = ('--data', home/'text.txt', '--tokenizer', home/'tok', '--epochs', 1, '--batch_size', 2, '--grad_accumulation', 1, '--max_steps', 3, '--save_every', 1, '--cache', home/'cache')
    for name, text in CONFIGS.items():
        fresh(home/'h.yaml', text)
        watch.case('configs', name, lambda: model_config(home/'h.yaml'))
        watch.case('configs', name, lambda: watch.command('pretrain', '--config', home/'h.yaml', '--save_dir', home/'new', *flags))
    for kind, f in special(home/'h.yaml', lambda: model_config(home/'h.yaml')): watch.case('configs', kind, f)
    for name, data in texts().items():
        fresh(home/name, data)
        watch.case('texts', name, lambda: Source.of(home/name).check())
        (home/name).unlink()
    assert not (home/'new').exists()
    run = home/'run'
    resumed = lambda: watch.command('pretrain', '--resume', '--config', home/'tiny.yaml', '--save_dir', run, *flags)
    resumed()
    record = {k: v for k, v in json.loads((run/'run.json').read_text()).items() if k != 'checksum'}
    for name, text in around(record, odd=(None, -1, 10**9, 'x', [])).items():
        fresh(run/'run.json', text)
        watch.case('run.json', name, resumed, {name} if name.startswith(('device', 'status', 'versions', 'result', 'threads', 'without_device', 'without_status', 'without_versions', 'without_result', 'without_accepts', 'without_stage')) else ())
    for kind, f in special(run/'run.json', resumed): watch.case('run.json', kind, f, {'circle', 'nowhere'})
    fresh(run/'run.json', json.dumps(record))
    newest, last = run/'last'/'000003.pt', run/'last'/'000002.pt'
    good = last.read_bytes()
    def resumed_a_step():
        newest.unlink(missing_ok=True)
        resumed()
    for name, change in states().items():
        fresh(last, good)
        state = load_object(last)
        change(state)
        fresh(last, seal(saved(state)))
        watch.case('resume states', name, resumed_a_step, {name})
    fresh(last, good)


def child(home, *groups):
    warnings.simplefilter('ignore')
    home = Path(home)
    made(home)
    os.chdir(home)
    watch = Watch(home, 3 << 30)
    for f in ('generate', '--max_tokens', 1), ('evaluate', '--data', 'text.txt', '--cache', 'cache'): watch.command(f[0], '--model', 'run', *f[1:])  # all is imported
    from continual_llm.monitor import memory_used
    memory_used()  # what it asks the system with, too
    for group in groups: globals()[f'{group}_cases'](watch, home)
    import resource
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps(dict(counts=watch.counts, slowest=watch.slowest, peak=round(peak, 2), bad=watch.bad)))


@pytest.mark.skipif(os.name != 'posix', reason='needs a limit on memory, and pipes')
@pytest.mark.parametrize('groups', [('archive', 'checkpoint'), ('tokenizer', 'token', 'setting')], ids=' '.join)
def test_hostile_files(tmp_path, groups):
    "Every case in one child with capped memory; the child itself must come to its end"
    code = f'from tests.test_hostile import child\nchild({str(tmp_path)!r}, *{groups!r})'
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1')
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=1200, cwd=ROOT, env=env)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    said = json.loads(done.stdout.splitlines()[-1])
    print(said['counts'], 'slowest', said['slowest'], 'peak GB', said['peak'])
    assert said['bad'] == [] and sum(said['counts'].values()) > 500, said
