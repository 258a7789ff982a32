"What keeps the old, in the loop itself: every method changes the gradients as it says, and adapters are stopped and resumed"
from dataclasses import replace
import pytest, torch
from continual_llm.checkpoint import Checkpoints, checkpoint_payload, load_checkpoint
from continual_llm.distill import distilled
from continual_llm.history import History
from continual_llm.lora import add_lora, merged_state
from continual_llm.loop import LoopConfig, Parts, fit, gradients
from continual_llm.metrics import Score
from continual_llm.model import ContinualLLM, ModelConfig
from continual_llm.optim import OptimConfig, make_optimizer
from continual_llm.penalties import ewc_penalty, fisher, l2_penalty

SHAPE = ModelConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=24, max_seq_len=12)
CONFIG = LoopConfig(steps_per_epoch=6, epochs=1, learning_rate=.01, save_every=1, early_stopping_patience=0)


def made(seed):
    torch.manual_seed(seed)
    return ContinualLLM(SHAPE)


def batch_at(step):
    ids = torch.randint(50, (4, 13), generator=torch.Generator().manual_seed(step))
    return [(ids[:, :-1], ids[:, 1:])]


def alone(model, micro): return model(micro[0], targets=micro[1], reduction='sum'), micro[1].numel()


def parts_for(model, **more):
    "Parts whose resume states hold base and adapter apart, and whose checkpoints are plain"
    def payload(epoch, step, score):
        return checkpoint_payload(model, epoch, step, 'hash', score and score.loss, weights=merged_state(model) if epoch else None)
    def evaluate(poll):
        with torch.no_grad(): return Score(alone(model, batch_at(-1)[0])[0].item(), 48, 10, 100)
    return Parts(**{**dict(batch_at=batch_at, loss_fn=alone, evaluate=evaluate, payload=payload), **more})


def grads(model, **more):
    model.zero_grad()
    nats, tokens = gradients(model, parts_for(model, **more), CONFIG, 0)
    assert tokens == 48
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def test_penalties_add_their_gradient_to_that_of_the_mean_loss():
    model, start = made(0), made(1).state_dict()
    stiffness, plain = fisher(model, batch_at(7)), grads(model)
    for name, g in grads(model, penalty=l2_penalty(model, start, .3)).items():
        torch.testing.assert_close(g - plain[name], .3*(model.get_parameter(name) - start[name]), atol=1e-6, rtol=1e-4)
    stiff = grads(model, penalty=ewc_penalty(model, start, stiffness, 50.))
    for name, g in stiff.items():
        torch.testing.assert_close(g - plain[name], 50*stiffness[name]*(model.get_parameter(name) - start[name]), atol=1e-6, rtol=1e-3)
    matrices = [n for n in plain if not n.endswith('norm.weight')]  # both models' norms are ones still
    assert all((stiff[n] - plain[n]).abs().max() > 0 for n in matrices)


def test_distillation_mixes_two_gradients():
    model, teacher = made(0), made(1)
    plain, mixed, taught = grads(model), grads(model, loss_fn=distilled(teacher, .25)), grads(model, loss_fn=distilled(teacher, 1.))
    for name in plain: torch.testing.assert_close(mixed[name], .75*plain[name] + .25*taught[name], atol=1e-6, rtol=1e-4)
    assert all(not plain[n].equal(mixed[n]) for n in plain)


class Stop(Exception): pass


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_adapters_are_resumed_and_checkpoints_are_plain(optimizer, tmp_path):
    def begin():
        model = add_lora(made(0), rank=2, name='law')
        return model, make_optimizer(model, OptimConfig(optimizer))
    def stops_at(step):
        def read(s):
            if s == step: raise Stop
            return batch_at(s)
        return read
    def run(name, at=None, state=None):
        model, opt = begin()
        parts = parts_for(model)
        fit(model, opt, replace(parts, batch_at=stops_at(at)), CONFIG, History(), Checkpoints(tmp_path/name), state)
        return model
    whole = run('whole')
    with pytest.raises(Stop): run('cut', at=3)
    state = Checkpoints(tmp_path/'cut').latest()[0]
    assert state['step'] == 3
    resumed = run('cut', state=state)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values()): assert a.equal(b), name
    base = made(0).state_dict()
    for name, w in whole.state_dict().items(): assert '.lora.' in name or w.equal(base[name])
    best = load_checkpoint(tmp_path/'cut'/'best'/'checkpoint.pt')
    plain, (ids, _) = ContinualLLM.from_checkpoint(best), batch_at(9)[0]
    assert list(best['model_state_dict']) == list(base)
    with torch.no_grad(): torch.testing.assert_close(plain(ids), whole(ids), atol=1e-5, rtol=1e-5)
    assert not plain.state_dict()['blocks.0.attn.qkv.weight'].equal(base['blocks.0.attn.qkv.weight'])
