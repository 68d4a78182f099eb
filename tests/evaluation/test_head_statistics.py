"""Every statistic of every head against eager attention maps, and what is concluded from them."""

import numpy as np
import pytest
import torch
from tiny import probe_batches, rows, tiny_model, tiny_tokenizer

from surgery import SurgeryConfig, patched
from surgery.head_statistics import head_statistics
from surgery.measure import measure_sets


def eager_rows(model, input_ids):
    """Per layer: probabilities P and scores S [H, T, T] of one unpadded sequence, from hooks on eager attention."""
    found = model.eval()(input_ids[None], output_attentions=True, use_cache=False).attentions
    return [p[0].double() for p in found]


@pytest.mark.parametrize("left", (False, True))
@pytest.mark.parametrize("policy", ("non_sink", "response", "all"))
def test_statistics_match_attention_maps(left, policy):
    batch = probe_batches(3, 2, left=left, row_mask=policy == "response")[0]
    model = tiny_model()
    expected = {"sink_mass": [], "entropy": []}
    with torch.no_grad():
        for i in range(3):
            real = batch["attention_mask"][i].bool()
            maps = eager_rows(model, batch["input_ids"][i, real])
            counted = torch.ones(int(real.sum()), dtype=torch.bool)
            if policy == "response":
                counted = batch["row_mask"][i, real].clone()
            if policy != "all":
                counted[0] = False
            expected["sink_mass"].append(torch.stack([p[:, counted, 0].mean(-1) for p in maps]))
            entropy = [-torch.xlogy(p, p).sum(-1)[:, counted].mean(-1) for p in maps]
            expected["entropy"].append(torch.stack(entropy))
    with patched(tiny_model()) as fast:
        fast.eval()
        found, sinks = head_statistics(fast, batch, rows=policy)
    assert sinks is None and set(found) == {"sink_mass", "entropy", "max_logit"}
    for name, per_sequence in expected.items():
        truth = torch.stack(per_sequence, 1).float()
        torch.testing.assert_close(found[name], truth, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_max_logit_is_the_largest_score_of_counted_rows():
    import surgery_kernels as sk

    from surgery import attention

    batch = probe_batches(1, 1)[0]
    seen = []
    original = sk.flash_attn_stats

    def spy(q, k, v, **options):
        group = q.shape[2] // k.shape[2]
        s = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(group, 2)) * options["softmax_scale"]
        hidden = torch.ones(s.shape[-2:], dtype=torch.bool).triu(1)
        seen.append(s.masked_fill(hidden, float("-inf"))[:, :, 1:].amax((-1, -2)))
        return original(q, k, v, **options)

    with patched(tiny_model()) as fast, pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention.sk, "flash_attn_stats", spy)
        found, _ = head_statistics(fast.eval(), {"input_ids": batch["input_ids"]}, stats=("max_logit",))
    torch.testing.assert_close(found["max_logit"], torch.stack(seen))


def test_argmax_sinks_are_found_and_used():
    from surgery import sink_mass
    from surgery.statistics import find_sinks

    batch = probe_batches(3, 2)[0]
    with patched(tiny_model(seed=3)) as model:
        model.eval()
        found, sinks = head_statistics(model, batch, sinks="argmax")
        positions = find_sinks(model, batch)
        expected = sink_mass(model, **batch, sinks=positions[:, None])
    assert sinks[:, 0].tolist() == positions.tolist()
    torch.testing.assert_close(found["sink_mass"], expected)


def test_head_statistics_rejects_unknown_names():
    with patched(tiny_model()) as model, pytest.raises(ValueError, match=r"stats must be names out of .*got \['x'\]"):
        head_statistics(model, probe_batches()[0], stats=("x",))


def test_lengths_and_sink_rate():
    sets = {"harmful": rows(6, 1), "refusal": rows(5, 2)}
    whole = measure_sets(tiny_model(), tiny_tokenizer(), sets, SurgeryConfig(sinks=1), batch_size=4)
    response = measure_sets(tiny_model(), tiny_tokenizer(), sets, SurgeryConfig(sinks=1, rows="response"))
    for name, given in sets.items():
        words = [len(row["response"].split()) for row in given]
        # the chat template closes the answer with one more token
        assert response[name].lengths.tolist() == [n + 1 for n in words]
        assert (whole[name].lengths > response[name].lengths).all()
    one = whole["harmful"]
    assert one.alpha.shape == (3, 6, 4)
    np.testing.assert_allclose(one.sink_rate(0.3), (one.alpha > 0.3).reshape(3, 6, 4).mean((0, 2)))
    assert one.sink_rate(0.0).min() == 1.0 and one.sink_rate(1.0).max() == 0.0


def test_sink_rate_is_gu_et_als_on_rows_of_one_length():
    """Theirs: column sums of the map over T - k, k = 0, then the share of heads above epsilon."""
    text = [{"text": " ".join(["w1", "w2", "w3"] * 12)}, {"text": " ".join(["w4", "w9"] * 20)}]
    config = SurgeryConfig(sinks=1, rows="all", max_length=16, chat=False)
    one = measure_sets(tiny_model(), tiny_tokenizer(), {"a": text}, config)["a"]
    tokenizer, model, rates = tiny_tokenizer(), tiny_model(), []
    for row in text:
        ids = torch.tensor(tokenizer(row["text"])["input_ids"][:16])
        with torch.no_grad():
            maps = torch.stack(eager_rows(model, ids))
        rates.append((maps.sum(-2)[..., 0] / 16 > 0.3).double().mean().item())
    np.testing.assert_allclose(one.sink_rate(), rates)
