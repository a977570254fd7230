import contextlib

import pytest
import torch
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model

from preftune.evaluate import generation
from preftune.evaluate.generation import divergence, sampled
from preftune.evaluate.subjects import base_model
from preftune.models.load import load_model, load_tokenizer
from preftune.models.tokenizer import token_ids

PROMPT = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def policy_and_reference():
    tiny = base_model("embedded://tiny")
    reference = load_model(tiny, OmegaConf.create({}), use_cpu=True).eval()
    policy = load_model(tiny, OmegaConf.create({}), use_cpu=True).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        policy.model.embed_tokens.weight += 0.06 * torch.randn_like(policy.model.embed_tokens.weight)
    return policy, reference, load_tokenizer(tiny)


def exact(policy, reference, ids, eos):
    """KL of the first two tokens of an answer, by enumeration of the first one."""

    def steps(rows):
        ours, theirs = (model(torch.tensor(rows)).logits[:, -1].log_softmax(-1) for model in (policy, reference))
        return ours.exp(), (ours.exp() * (ours - theirs)).sum(-1)

    with torch.no_grad():
        first, kl = steps([ids])
        _, second = steps([[*ids, token] for token in range(first.size(1))])
    second[eos] = 0  # nothing follows it
    return (kl + (first[0] * second).sum()).item()


def test_the_estimate_is_the_kl_by_enumeration(policy_and_reference):
    policy, reference, tokenizer = policy_and_reference
    drawn = sampled(policy, tokenizer, [PROMPT] * 128, max_tokens=2, bf16=False, seed=0)
    found = divergence(policy, lambda: contextlib.nullcontext(reference), drawn, bf16=False)
    ids = token_ids(tokenizer, PROMPT, add_generation_prompt=True)
    expected = exact(policy, reference, ids, tokenizer.eos_token_id)
    assert found["kl"] == pytest.approx(expected, abs=4 * found["kl_error"])
    assert 0 < found["kl_error"] < 0.2 * found["kl"]
    assert found["kl_per_token"] == pytest.approx(found["kl"] / found["kl_tokens"])


def test_a_model_has_no_divergence_from_itself(policy_and_reference):
    policy, _, tokenizer = policy_and_reference
    drawn = sampled(policy, tokenizer, [PROMPT], max_tokens=4, bf16=False, seed=0)
    found = divergence(policy, lambda: contextlib.nullcontext(policy), drawn, bf16=False)
    assert found["kl"] == 0 and found["kl_error"] is None


def test_sampling_takes_the_seed_and_leaves_the_generator_alone(policy_and_reference):
    policy, _, tokenizer = policy_and_reference
    prompts = [PROMPT, [{"role": "user", "content": "Hi there"}]]  # padded on the left
    state = torch.random.get_rng_state()
    once, again, other = (sampled(policy, tokenizer, prompts, 6, False, seed) for seed in (1, 1, 2))
    assert once == again != other
    assert torch.equal(state, torch.random.get_rng_state())
    assert [prompt for prompt, _ in once] == [token_ids(tokenizer, p, add_generation_prompt=True) for p in prompts]


def test_bf16_draws_what_autocast_draws_and_leaves_the_weights_as_they_were(policy_and_reference, monkeypatch):
    tokenizer, base = policy_and_reference[2], load_model(base_model("embedded://tiny"), OmegaConf.create({}), True)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", init_lora_weights=False)).eval()
    before = {name: weight for name, weight in model.named_parameters(remove_duplicate=False)}
    drawn = sampled(model, tokenizer, [PROMPT] * 4, 6, bf16=True, seed=0)
    assert all(weight is before[name] for name, weight in model.named_parameters(remove_duplicate=False))
    monkeypatch.setattr(generation, "computing", lambda model, bf16: torch.autocast("cpu", torch.bfloat16))
    assert sampled(model, tokenizer, [PROMPT] * 4, 6, bf16=True, seed=0) == drawn
