"Adapters against the `peft` library on transformers' own models: ours runs there, and theirs here"
import random
import pytest, torch
from continual_llm.core import UserError
from continual_llm.lora import PARTS, adapters, add_lora, load_adapter, merge_lora, save_adapter, use
from continual_llm.model import ContinualLLM, ModelConfig
from tests.test_model import ours_from, theirs

SHAPE = dict(vocab_size=97, d_model=48, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=80, max_seq_len=64)
SHAPES = {'llama': dict(), 'llama-untied-wide-heads': dict(tie_embeddings=False, head_dim=16), 'qwen3': dict(qk_norm=True)}


@pytest.fixture(scope='module', params=SHAPES)
def both(request):
    "The same model as theirs and as ours, and token ids"
    config = ModelConfig(**{**SHAPE, **SHAPES[request.param]})
    hf = theirs(config)
    return hf, lambda: ours_from(hf.state_dict(), config), torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))


def stir(model, which):
    "Give an adapter weights, as if it had learned"
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if which in name: p.copy_(.2*torch.randn(p.shape, generator=g))
    return model


@pytest.mark.parametrize('targets', [PARTS, ('q_proj', 'up_proj')])
def test_ours_runs_in_peft(both, targets, tmp_path):
    from peft import PeftModel
    hf, make, ids = both
    ours = add_lora(make(), rank=3, alpha=5., targets=targets, name='law')
    with torch.no_grad(): before, after = ours(ids), stir(ours, '.on_law.')(ids)
    save_adapter(ours, tmp_path/'law')
    wrapped = PeftModel.from_pretrained(hf, tmp_path/'law')
    with torch.no_grad(): scores = wrapped(ids).logits
    wrapped.unload()  # the model goes to the next test without it
    assert (after - before).abs().max() > .1                       # the adapter says something
    assert (scores - after).abs().max() < 2e-5
    with torch.no_grad(): assert (merge_lora(ours)(ids) - scores).abs().max() < 2e-5


@pytest.mark.parametrize('targets', [PARTS, ('v_proj', 'o_proj', 'down_proj')])
def test_theirs_runs_here(both, targets, tmp_path):
    from peft import LoraConfig, get_peft_model
    hf, make, ids = both
    wrapped = stir(get_peft_model(hf, LoraConfig(task_type='CAUSAL_LM', r=4, lora_alpha=6, target_modules=list(targets))), '.lora_').eval()
    with torch.no_grad(): scores = wrapped(ids).logits
    wrapped.save_pretrained(tmp_path)
    wrapped.unload()
    ours = load_adapter(make(), tmp_path, 'theirs')
    with torch.no_grad(): assert (ours(ids) - scores).abs().max() < 2e-5 < .1 < (use(ours)(ids) - scores).abs().max()
    assert adapters(ours) == ['theirs']


def test_begins_as_theirs_does(both):
    "A is drawn from the same range as peft draws it from"
    from peft import LoraConfig, get_peft_model
    hf, make, _ = both
    b = next(p for n, p in add_lora(make(), rank=64, targets=['down_proj']).named_parameters() if n.endswith('.A'))
    wrapped = get_peft_model(hf, LoraConfig(r=64, target_modules=['down_proj']))
    a = next(p for n, p in wrapped.named_parameters() if 'lora_A' in n)
    wrapped.unload()
    bound = 80**-.5
    for w in (a, b): assert w.shape == (64, 80) and .98*bound < w.abs().max() <= bound and abs(w.std() - bound/3**.5) < .03*bound


def test_damaged_files_are_loaded_or_refused(tmp_path):
    "Bytes changed anywhere: one line, or numbers of the right shapes; never another error, and a refused one adds nothing"
    config = ModelConfig(**SHAPE)
    ours = add_lora(ContinualLLM(config), rank=2, targets=['q_proj'], name='law')
    save_adapter(ours, tmp_path)
    whole, rng, refused = {p.name: p.read_bytes() for p in tmp_path.iterdir()}, random.Random(0), 0
    for n in range(300):
        name = 'adapter_model.safetensors' if n % 2 else 'adapter_config.json'
        bad = bytearray(whole[name])
        for _ in range(rng.choice([1, 3])): bad[rng.randrange(min(len(bad), 700))] = rng.choice([rng.randrange(256), *b'0129"[{:'])
        if n % 7 == 0: del bad[rng.randrange(len(bad)):]
        (tmp_path/name).write_bytes(bad)
        before = adapters(ours)
        try: load_adapter(ours, tmp_path, f'n{n}')
        except UserError as e:
            refused += 1
            assert '\n' not in str(e) and adapters(ours) == before
        (tmp_path/name).write_bytes(whole[name])
    assert refused > 150
