"""Metrics against closed forms, by hand-made readouts and through the verbs."""

import dataclasses
import math
from typing import Any

import pytest
import tiny
import torch
from transformers import LogitsProcessor

import imaginelens as il
from imaginelens.hooks.metrics import Readout, Targets, same, targets_of

SPEC = il.LatentSpec(
    name="test", open="<|latent_start|>", close="<|latent_end|>", pad="<|latent_pad|>", max_steps=3
)
VOCAB, NAN = 7, float("nan")
LOGITS = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
OTHER = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
TARGETS = Targets(
    base_answers=("a", "b", "Circle ", "d"),
    source_answers=("b", "a", "square", "e"),
    base_ids=((1,), (2,), (3, 5), (4,)),
    base_token=(1, 2, 5, 4),
    source_token=(2, 1, 6, 0),
    differ_at=(0, 0, 1, 0),
)


def readout(answers: tuple[str | None, ...], logits: torch.Tensor = LOGITS, **more: Any) -> Readout:
    missing = torch.tensor([a is None for a in answers])
    return Readout(
        logits.masked_fill(missing[:, None], NAN),
        torch.tensor([-0.1, -1.0, -2.5, -30.0], dtype=torch.float64).masked_fill(missing, NAN),
        answers,
        TARGETS,
        **more,
    )


def equal(found: torch.Tensor, wanted: Any) -> None:
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-12, equal_nan=True)


# ---- closed forms ----------------------------------------------------------------------------


def test_metrics_of_a_hand_made_readout() -> None:
    said = readout(("a", "a", "circle", "zebra"))
    rows = zip(TARGETS.source_token, TARGETS.base_token, strict=True)
    equal(
        il.logit_diff(said), [float(LOGITS[i, s] - LOGITS[i, b]) for i, (s, b) in enumerate(rows)]
    )
    equal(il.log_prob(said), [-0.1, -1.0, -2.5, -30.0])
    equal(il.prob(said), [math.exp(v) for v in (-0.1, -1.0, -2.5, -30.0)])
    equal(il.source_answer(said), [0, 1, 0, 0])
    equal(il.base_answer(said), [1, 0, 1, 0])  # case and outer spaces aside
    equal(il.accuracy(said), [1, 0, 1, 0])


def test_kl_is_from_the_unedited_to_the_edited_distribution() -> None:
    before = readout(("a", "b", "c", "d"))
    after = readout(("a", "b", "c", "d"), OTHER, unedited=before)
    p, q = LOGITS.softmax(-1), OTHER.softmax(-1)
    equal(il.kl(after), (p * (p / q).log()).sum(-1))
    assert not torch.allclose(il.kl(after), (q * (q / p).log()).sum(-1))  # the two ways differ
    equal(il.kl(readout(("a", "b", "c", "d"), unedited=before)), [0, 0, 0, 0])
    equal(il.kl(before), [0, 0, 0, 0])  # an unedited run does not differ from itself


def test_flip_compares_with_the_unedited_answer() -> None:
    before = readout(("a", "b", "c", None))
    equal(il.flip(readout((" A", "x", None, "d"), unedited=before)), [0, 1, NAN, NAN])
    equal(il.flip(before), [0, 0, 0, NAN])


@pytest.mark.parametrize(
    "metric",
    [il.logit_diff, il.log_prob, il.prob, il.kl, il.source_answer, il.base_answer, il.accuracy,
     il.flip],
    ids=repr,
)  # fmt: skip
def test_a_missing_answer_is_nan_and_nothing_else(metric: il.Metric) -> None:
    said = readout(("a", None, "square", None))
    for given in (said, dataclasses.replace(said, unedited=said)):
        values = metric(given)
        assert values.isnan().tolist() == [False, True, False, True]
        assert values.shape == (4,)


@pytest.mark.parametrize("metric", [il.logit_diff, il.source_answer], ids=repr)
def test_two_different_answers_are_needed(metric: il.Metric) -> None:
    said = readout(("a", "b", "c", "d"))
    equal_pair = dataclasses.replace(TARGETS, source_answers=("b", "a", "CIRCLE", "e"))
    with pytest.raises(
        il.InputError, match=r"needs two different answers and pair 2 has 'Circle ' twice"
    ):
        metric(dataclasses.replace(said, targets=equal_pair))
    no_source = dataclasses.replace(TARGETS, source_answers=("b", None, "x", "e"))
    with pytest.raises(il.InputError, match="example 1 has no source answer; pass source_answers="):
        metric(dataclasses.replace(said, targets=no_source))
    il.log_prob(dataclasses.replace(said, targets=no_source))  # needs no second answer


def test_metrics_are_written_as_they_are_called() -> None:
    assert repr(il.logit_diff) == "il.logit_diff"
    assert {m.unit for m in (il.accuracy, il.flip, il.base_answer)} == {"share"}
    with pytest.raises(dataclasses.FrozenInstanceError):
        il.kl.name = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [("Circle ", "circle", True), ("a", "b", False), (None, "a", False), (None, None, False),
     ("STRASSE", "straße", True)],
)  # fmt: skip
def test_same(one: str | None, other: str | None, wanted: bool) -> None:
    assert same(one, other) is wanted


# ---- through the verbs -----------------------------------------------------------------------


class Writes(LogitsProcessor):
    """Row i writes the given tokens, whatever the model wants."""

    def __init__(self, rows: list[list[int]], width: int) -> None:
        self.rows, self.width = rows, width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        scores = scores.clone()
        for row, ids in enumerate(self.rows):
            scores[row] = -1e9
            scores[row, ids[min(input_ids.shape[1] - self.width, len(ids) - 1)]] = 0
        return scores


SPAN = "<|latent_start|>***<|latent_end|>"


def lens_of(name: str = "qwen2_5_vl", answer: Any = None) -> il.LatentModel:
    return il.LatentModel(*tiny.build(name), spec=SPEC, answer=answer)


def writing(
    lens: il.LatentModel, name: str, texts: list[str], seeds: list[int] | None = None
) -> il.Run:
    """A run in which each row feeds three latents and then writes its text."""
    seeds = seeds or list(range(len(texts)))
    given = [
        {
            "images": tiny.image(32 + 16 * (s % 2), 24, s),
            "text": tiny.prompt(name, "what?" + "!" * s),
        }
        for s in seeds
    ]
    rows = [[*lens.encode(SPAN + t), lens.tokenizer.eos_token_id] for t in texts]
    plan = Writes(rows, lens.prompt(given).inputs["input_ids"].shape[1])
    return lens.run(
        given, max_new_tokens=max(map(len, rows)), generation={"logits_processor": [plan]}
    )


def by_hand(
    lens: il.LatentModel, run: il.Run, row: int, ending: str, hook: Any = None
) -> torch.Tensor:
    """Log-probabilities at the position before each token of an answer, each in a forward of its
    own over the row alone, latents laid over by a plain torch hook."""
    start = int(il.before_answer.resolve(run.tokens, row)[0])
    first = run.tokens.start(row)
    ids = [int(i) for i in run.tokens.ids[row, first : start + 1]] + lens.encode(ending)
    columns = [int(c) - first for c in il.latent.resolve(run.tokens, row)]
    inputs = {k: v[row : row + 1] for k, v in run.prompt.inputs.items() if k == "image_grid_thw"}
    if "image_grid_thw" in inputs:
        sizes = run.prompt.inputs["image_grid_thw"].prod(-1).tolist()
        begin = sum(sizes[:row])
        inputs["pixel_values"] = run.prompt.inputs["pixel_values"][begin : begin + sizes[row]]
        types = run.prompt.inputs["mm_token_type_ids"][row, first:].tolist()
        inputs["mm_token_type_ids"] = torch.tensor([types + [0] * (len(ids) - len(types))])
    else:
        inputs["pixel_values"] = run.prompt.inputs["pixel_values"][row : row + 1]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["position_ids"] = tiny.positions(lens.model, inputs)

    def lay(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        out = out.clone()
        out[0, columns] = run.latents[row, : len(columns)]
        if hook is not None:
            out[0, columns] = hook(out[0, columns])
        return out

    handle = lens.model.get_input_embeddings().register_forward_hook(lay)
    with torch.no_grad():
        logits = lens.model(**inputs, use_cache=False).logits[0]
    handle.remove()
    return logits[start - first : -1]


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llava"])
def test_every_metric_of_a_patch_equals_plain_torch(name: str) -> None:
    """Answers of several tokens that share a prefix, in a padded batch: the first token that
    differs decides, and log_prob sums over all of the base answer."""
    lens = lens_of(name)
    base = writing(lens, name, ["red", "blue"])
    source = writing(lens, name, ["ring", "black"], [2, 3])
    how = dict(base=base, source=source, site="hook_latent", at=il.latent, context="fixed")
    results = {m.name: lens.patch(metric=m, **how) for m in
               (il.logit_diff, il.log_prob, il.prob, il.kl, il.source_answer,
                il.base_answer)}  # fmt: skip
    for row, (one, two) in enumerate((("red", "ring"), ("blue", "black"))):
        before, after = (
            by_hand(lens, base, row, one, hook)
            for hook in (None, lambda z, row=row: source.latents[row])
        )
        b, s = ([i for i in lens.encode(t)] for t in (one, two))
        assert b[:1] == s[:1]  # the shared prefix
        k = next(i for i in range(len(b)) if b[i] != s[i])
        assert k >= 1
        for logits, which in ((before, "before"), (after, "after")):
            logp = logits.log_softmax(-1)
            wanted = {
                "logit_diff": logits[k, s[k]] - logits[k, b[k]],
                "log_prob": sum(logp[i, t] for i, t in enumerate(b)),
                "prob": sum(logp[i, t] for i, t in enumerate(b)).exp(),
                "source_answer": float(int(logits[k].argmax()) == s[k]),
                "base_answer": float(int(logits[k].argmax()) == b[k]),
            }
            p, q = before[k].log_softmax(-1), after[k].log_softmax(-1)
            wanted["kl"] = (p.exp() * (p - q)).sum() if which == "after" else 0.0
            for metric, value in wanted.items():
                found = getattr(results[metric], which)[row]
                assert float(found) == pytest.approx(float(value), rel=1e-8, abs=1e-9), metric
    assert results["kl"].after.min() > 1e-9
    assert torch.equal(
        results["logit_diff"].effect, results["logit_diff"].after - results["logit_diff"].before
    )
    assert results["logit_diff"].landing.rows == [0, 1]


def test_the_tokens_of_answers_are_found_in_their_context() -> None:
    lens = lens_of()
    run = writing(lens, "qwen2_5_vl", ["red", "blue"])
    found = targets_of(run, ["red", "blue"], ["rest", "green"], lens.encode)
    assert found.base_ids == (tuple(lens.encode("red")), tuple(lens.encode("blue")))
    assert found.differ_at == (2, 0)
    assert found.base_token == (lens.encode("d")[0], lens.encode("b")[0])
    assert found.source_token == (lens.encode("s")[0], lens.encode("g")[0])
    spaced = writing(lens, "qwen2_5_vl", [" red", r"\boxed{7}"])
    other = targets_of(spaced, ["blue", "x"], [None, None], lens.encode)
    assert other.source_token == (-1, -1)


def test_an_answer_that_begins_the_other_is_refused() -> None:
    lens = lens_of()
    run = writing(lens, "qwen2_5_vl", ["red"])
    with pytest.raises(il.InputError, match="the tokens of 'red' and 'redder' never differ"):
        targets_of(run, ["red"], ["redder"], lens.encode)


def test_equal_answers_are_refused_by_the_verbs_and_by_pairs() -> None:
    lens = lens_of()
    run = writing(lens, "qwen2_5_vl", ["red"])
    with pytest.raises(
        il.InputError, match="needs two different answers and pair 0 has 'red' twice"
    ):
        lens.patch(base=run, source=run, base_answers="red", source_answers="Red")
    with pytest.raises(il.InputError, match="pair 1 has the answer 'b' on both sides"):
        il.Pairs(
            base=[{}, {}], source=[{}, {}], base_answers=["a", "b"], source_answers=["c", " B"]
        )
    with pytest.raises(il.InputError, match="2 answers were given for 1 examples"):
        lens.patch(base=run, source=run, base_answers=["a", "b"], source_answers="c")
    assert lens.registry.entries == []


def test_missing_answers_stay_missing_through_a_patch() -> None:
    lens = lens_of(answer=il.answers.boxed)
    base = writing(lens, "qwen2_5_vl", [r"\boxed{ab}", "no box", r"\boxed{cd}"])
    assert base.answers == ["ab", None, "cd"]
    for metric in (il.log_prob, il.kl, il.base_answer, il.flip):
        result = lens.ablate(base, il.Zero(), metric=metric, context="fixed")
        assert result.before.isnan().tolist() == [False, True, False], metric
        assert result.after.isnan().tolist() == [False, True, False], metric
        assert result.parse_coverage == pytest.approx(2 / 3)
    assert "nan" not in repr(result)  # the mean is over those there are


def test_draws_in_which_no_answer_was_found_are_counted() -> None:
    """The coverage of an average over draws is that of all draws, not of the first."""
    lens = lens_of(answer=il.answers.after("="))
    name = "qwen2_5_vl"
    one = {"images": tiny.image(32, 24, 0), "text": tiny.prompt(name, "what?")}
    plan = _Sometimes(lens, lens.prompt(one).inputs["input_ids"].shape[1])
    run = lens.run(one, max_new_tokens=7, generation={"logits_processor": [plan]})
    reference = writing(lens, name, ["=a", "=b", "=c"])
    plan.silent = {1}  # of the three edited runs, the second writes no answer
    result = lens.ablate(run, il.Noise(reference, draws=3), metric=il.base_answer)
    assert plan.runs == 4
    assert result.parse_coverage == pytest.approx(2 / 3)


class _Sometimes(LogitsProcessor):
    """Feeds one latent and writes "=x", or in the runs that are `silent` "-x"."""

    def __init__(self, lens: il.LatentModel, width: int) -> None:
        self.texts = [lens.encode(f"<|latent_start|>*<|latent_end|>{m}x") for m in "=-"]
        self.width, self.runs, self.silent = width, 0, set()

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        step = input_ids.shape[1] - self.width
        self.runs += step == 0
        ids = self.texts[self.runs - 2 in self.silent]
        scores = torch.full_like(scores, -1e9)
        scores[:, ids[min(step, len(ids) - 1)]] = 0
        return scores
