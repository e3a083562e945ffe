"""lm-eval's requests in packs against its own Hugging Face model, request by request."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing

from circuitune.errors import UserError
from circuitune.models import Model
from circuitune.packs import Columns, Pack, Texts, longest_packed, run
from circuitune.patching import unembed

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from circuitune.scoring import Backend, ask, backend  # noqa: E402

CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "mistral, windows": ("mistral", {"sliding_window": 6}),
    "qwen2": ("qwen2", {}),
    "qwen2, eager": ("qwen2", {"attn_implementation": "eager"}),
    "gemma3, windows": (
        "gemma3_text",
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gpt2": ("gpt2", {}),
    "gptj": ("gptj", {}),
    "neox": ("gpt_neox", {}),
    "opt": ("opt", {}),
    "phi": ("phi", {"pad_token_id": 0}),
    "falcon, alibi": ("falcon", {"alibi": True, "parallel_attn": False, "multi_query": False}),
}
STEM = "x=1;y=2;"


def asked(kind: str, arguments: Sequence[tuple]) -> list[Instance]:
    """Requests as a task makes them."""
    return [Instance(kind, {}, args, number) for number, args in enumerate(arguments)]


def stock(model: Model, *, batch_size: int = 1) -> HFLM:
    """lm-eval's own model."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    return HFLM(
        pretrained=model.hf,
        tokenizer=model.tokenizer,
        batch_size=batch_size,
        softmax_dtype=dtype,
    )


def letters(rng: random.Random, least: int, most: int) -> str:
    return "".join(rng.choice("abcd ") for _ in range(rng.randint(least, most))) + "e"


def choices(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Questions with choices: some begin alike, some are too long, one context is empty."""
    rng = random.Random(seed)
    found: list[tuple[str, str]] = []
    for _ in range(count):
        context = STEM + letters(rng, 1, 20)
        options = [" " + letters(rng, 0, 5) for _ in range(4)] + [" a", " ab", " abc"]
        found += [(context, option) for option in rng.sample(options, 4)]
    found += [("", "abc"), ("a", " b"), (STEM + letters(rng, 70, 90), " abc"), ("ab ", "c")]
    return [*found, found[0]]


def same_scores(fast: Sequence[tuple], slow: Sequence[tuple]) -> None:
    """Log probabilities equal up to rounding (some angles are float32), greedy flags exactly."""
    np.testing.assert_allclose([x for x, _ in fast], [x for x, _ in slow], atol=1e-5, rtol=0)
    assert [greedy for _, greedy in fast] == [greedy for _, greedy in slow]


# ------------------------------------------------------------------------------------- equality


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("batch_tokens", [40, 1024])
def test_log_likelihoods_equal_those_of_lm_eval(
    tiny: Callable[..., Model], case: str, batch_tokens: int
) -> None:
    family, options = CASES[case]
    model = tiny(family, **options)
    requests = asked("loglikelihood", choices(6))
    fast = backend(model, batch_tokens=batch_tokens)
    assert (fast.longest == 0) == ("alibi" in case)
    slow = stock(model).loglikelihood(requests, disable_tqdm=True)
    same_scores(fast.loglikelihood(requests, disable_tqdm=True), slow)
    assert len({round(value, 6) for value, _ in slow}) > 20


@pytest.mark.parametrize("case", CASES)
def test_documents_equal_those_of_lm_eval(tiny: Callable[..., Model], case: str) -> None:
    family, options = CASES[case]
    model = tiny(family, **options)
    rng = random.Random(1)
    texts = [letters(rng, 2, 30), letters(rng, 150, 160), letters(rng, 62, 62), "a"]
    requests = asked("loglikelihood_rolling", [(text,) for text in [*texts, texts[0]]])
    slow = stock(model).loglikelihood_rolling(requests, disable_tqdm=True)
    fast = backend(model).loglikelihood_rolling(requests, disable_tqdm=True)
    np.testing.assert_allclose(fast, slow, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("case", "batch_tokens"),
    [(case, 30) for case in CASES] + [("llama", 1024), ("gemma3, windows", 1024)],
)
def test_answers_equal_those_of_lm_eval(
    tiny: Callable[..., Model], case: str, batch_tokens: int
) -> None:
    """With stop strings of one and several tokens, with long prompts, and with equal ones."""
    family, options = CASES[case]
    model = tiny(family, **options)
    rng = random.Random(2)
    prompts = [STEM + letters(rng, 0, 20) for _ in range(5)] + [letters(rng, 90, 100), "a", "a"]
    lm, fast = stock(model), backend(model, batch_tokens=batch_tokens)

    def both(until: list[str]) -> list[str]:
        settings = {"until": until, "max_gen_toks": 9, "do_sample": False}
        requests = asked("generate_until", [(prompt, settings) for prompt in prompts])
        slow = lm.generate_until(requests, disable_tqdm=True)
        assert fast.generate_until(requests, disable_tqdm=True) == slow
        return slow

    whole = both([])
    some = [text[4:6] for text in whole if len(text) > 6]
    assert both([some[0][0], *some[1:3]]) != whole


def test_the_end_token_and_settings_of_the_model_are_followed(tiny: Callable[..., Model]) -> None:
    """Its own end tokens, a repetition penalty and a least length act as in ``generate``."""
    model = tiny("llama", seed=3)
    rng = random.Random(3)
    prompts = [letters(rng, 1, 20) for _ in range(6)]
    requests = asked("generate_until", [(p, {"until": [], "max_gen_toks": 12}) for p in prompts])
    lm, fast = stock(model), backend(model)
    plain = lm.generate_until(requests, disable_tqdm=True)
    settings = model.hf.generation_config
    said = [letter for letter in "".join(plain) if letter.isascii()]
    for name, value in (
        ("eos_token_id", [257, ord(max(sorted(set(said)), key=said.count)) - ord("!")]),
        ("repetition_penalty", 1.7),
        ("min_new_tokens", 6),
    ):
        setattr(settings, name, value)
        slow = lm.generate_until(requests, disable_tqdm=True)
        assert fast.generate_until(requests, disable_tqdm=True) == slow
        assert slow != plain
        plain = slow


def test_a_start_token_is_added_once(tiny: Callable[..., Model]) -> None:
    model = tiny()
    model = replace(model, tokenizer=model.tokenizer)
    model.tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    contexts = ["abc", "<s>abc", "<s>abd"]
    settings = {"until": ["b"], "max_gen_toks": 8}
    requests = asked("generate_until", [(context, settings) for context in contexts])
    lm, fast = stock(model), backend(model)
    assert fast.generate_until(requests) == lm.generate_until(requests)
    requests = asked("loglikelihood", [(context, " ab") for context in ["", *contexts]])
    slow = lm.loglikelihood(requests)
    same_scores(fast.loglikelihood(requests), slow)
    assert slow[1] == slow[2]


def test_half_precision_differs_by_rounding_alone(tiny: Callable[..., Model]) -> None:
    """Packs and plain texts in bfloat16 are equally far from float64."""
    model = tiny()
    requests = asked("loglikelihood", choices(6))
    exact = np.array([value for value, _ in stock(model).loglikelihood(requests)])
    model.hf.bfloat16()
    fast = backend(model)
    assert fast.longest > 10**6
    errors = [
        np.abs(np.array([value for value, _ in lm.loglikelihood(requests)]) - exact).mean()
        for lm in (fast, stock(model))
    ]
    assert 0 < errors[0] < 1.5 * errors[1]


def test_sampling_is_left_to_lm_eval(tiny: Callable[..., Model]) -> None:
    settings = {"until": [], "max_gen_toks": 9, "do_sample": True, "temperature": 1.0}
    requests = asked("generate_until", [("abc", settings), ("abd", settings)])
    model = tiny()
    answers = []
    for lm in (stock(model), backend(model)):
        torch.manual_seed(0)
        answers.append(lm.generate_until(requests, disable_tqdm=True))
    assert answers[0] == answers[1]


def test_close_choices_are_left_to_lm_eval(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only where two tokens are as good as equal; with a wide margin for all answers."""
    model = tiny()
    requests = asked("generate_until", [("abc", {"until": [], "max_gen_toks": 5})] * 2)
    calls: list[int] = []
    usual = HFLM.generate_until

    def counted(self: HFLM, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        calls.append(len(requests))
        return usual(self, requests, disable_tqdm)

    monkeypatch.setattr(HFLM, "generate_until", counted)
    first = backend(model).generate_until(requests, disable_tqdm=True)
    assert calls == []
    monkeypatch.setattr("circuitune.scoring.TIE", 1e6)
    assert backend(model).generate_until(requests, disable_tqdm=True) == first
    assert calls == [1, 1]


def test_nothing_gives_nothing(tiny: Callable[..., Model]) -> None:
    lm = backend(tiny())
    assert lm.loglikelihood([]) == lm.loglikelihood_rolling([]) == lm.generate_until([]) == []


def test_what_cannot_be_asked_is_named(tiny: Callable[..., Model]) -> None:
    lm = backend(tiny())
    with pytest.raises(UserError, match=r"1 to 64 tokens.*adds 0"):
        lm.loglikelihood(asked("loglikelihood", [("abc", "")]))
    with pytest.raises(UserError, match="adds 65"):
        lm.loglikelihood(asked("loglikelihood", [("abc", "d" * 65)]))
    with pytest.raises(UserError, match=r"64 new tokens of the 64 positions"):
        lm.generate_until(asked("generate_until", [("abc", {"until": [], "max_gen_toks": 64})]))


def test_the_model_is_left_as_it_was(tiny: Callable[..., Model]) -> None:
    """No padding token is added to its tokenizer, no weight changes."""
    model = tiny()
    before = {name: weight.clone() for name, weight in model.hf.state_dict().items()}
    backend(model).loglikelihood(asked("loglikelihood", choices(2)), disable_tqdm=True)
    assert model.tokenizer.pad_token_id is None
    for name, weight in model.hf.state_dict().items():
        torch.testing.assert_close(weight, before[name], atol=0, rtol=0)


def test_changed_weights_are_used_at_once(tiny: Callable[..., Model]) -> None:
    """Nothing that was computed for one variant answers for the next."""
    model = tiny()
    requests = asked("loglikelihood", choices(2))
    lm = backend(model)
    before = lm.loglikelihood(requests, disable_tqdm=True)
    with torch.no_grad():
        model.part(1, model.family.out).weight.mul_(3.0)
    after = lm.loglikelihood(requests, disable_tqdm=True)
    assert max(abs(one[0] - other[0]) for one, other in zip(before, after, strict=True)) > 1e-2
    same_scores(after, stock(model).loglikelihood(requests, disable_tqdm=True))


# ------------------------------------------------------------------------------------ economy


def counted(model: Model, work: Callable[[], object]) -> int:
    """How many tokens pass the first layer while something runs."""
    tokens: list[int] = []
    mlp = model.part(0, model.family.mlp)
    handle = mlp.register_forward_pre_hook(lambda _, args: tokens.append(args[0][..., 0].numel()))
    work()
    handle.remove()
    return sum(tokens)


@pytest.mark.parametrize("batch_tokens", [48, 1024])
def test_what_texts_share_runs_once(tiny: Callable[..., Model], batch_tokens: int) -> None:
    """Small packs and one large pack run each token of the tree once, and nothing else."""
    model = tiny()
    requests = asked("loglikelihood", choices(8))
    lm = backend(model, batch_tokens=batch_tokens)
    rows = set()
    for context, continuation in (request.args for request in requests):
        both = ([256], lm.tok_encode(continuation)) if not context else None
        first, second = both or lm._encode_pair(context, continuation)
        rows.add(tuple((first + second)[-65:-1]))
    tree = {row[:end] for row in rows for end in range(1, len(row) + 1)}
    assert counted(model, lambda: lm.loglikelihood(requests, disable_tqdm=True)) == len(tree)


def test_an_answer_runs_each_token_once(tiny: Callable[..., Model]) -> None:
    model = tiny()
    rng = random.Random(5)
    prompts = [STEM + letters(rng, 0, 20) for _ in range(9)]
    settings = {"until": ["a", "b", " "], "max_gen_toks": 9}
    requests = asked("generate_until", [(prompt, settings) for prompt in prompts])
    lm = backend(model, batch_tokens=60)
    sizes = []
    for prompt, text in zip(prompts, lm.generate_until(requests), strict=True):
        made = len(lm.tok_encode(text))
        # All but the last token of an answer run; one that stops has its stop string beside.
        sizes.append(len(prompt) - len(STEM) + (made if made < 9 else 8))
    assert counted(model, lambda: lm.generate_until(requests)) == len(STEM) + sum(sizes)
    assert min(sizes) < max(sizes)


# ---------------------------------------------------------------------------------------- packs


def test_a_long_text_that_shares_little_runs_alone(
    tiny: Callable[..., Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    long, other, kin = (tuple(range(n, n + 40)) for n in (50, 100, 150))
    texts = [(1, *long), (1, *other), (2, *kin), (2, *kin, 3), (1, 5)]
    assert Texts.of(texts).alone(20) == [(1, *long), (1, *other)]
    assert Texts.of(texts).alone(41) == []
    assert Texts.of([]).alone(0) == []
    packs: list[Pack] = []

    def noting(model: Model, columns: Columns, pack: Pack) -> torch.Tensor:
        packs.append(pack)
        return run(model, columns, pack)

    lm = backend(tiny("llama"), batch_tokens=20)
    monkeypatch.setattr("circuitune.scoring.run", noting)
    lm._loglikelihood_tokens([(None, list(text), [9]) for text in texts], disable_tqdm=True)
    whole = [tuple(pack.tokens) for pack in packs if pack.places[0] == 0]
    assert whole[:2] == [(1, *long), (1, *other)]
    assert all(pack.visible is None for pack in packs[:2])


def test_texts_share_what_they_begin_with() -> None:
    texts = Texts.of([(1, 2, 3), (1, 2), (4,), (1, 2, 3, 5), (1, 7)])
    assert texts.rows == [(1, 2), (1, 2, 3), (1, 2, 3, 5), (1, 7), (4,)]
    assert texts.common == [0, 2, 3, 1, 0]
    assert list(texts.branches(0, 5, 0)) == [(0, 4), (4, 5)]
    assert list(texts.branches(0, 4, 1)) == [(0, 3), (3, 4)]
    assert list(texts.branches(0, 3, 2)) == [(1, 3)]
    assert texts.shared(0, 3) == 2
    assert texts.size(0, 5, 0) == 6
    assert texts.size(1, 3, 2) == 2
    assert list(texts.stems(0, 5, 100)) == [(0, [0, 1, 2, 3, 4])]
    assert list(texts.stems(0, 5, 3)) == [(1, [0, 1, 2, 3]), (0, [4])]


@pytest.mark.parametrize("seed", range(4))
def test_size_counts_the_tokens_of_the_tree(seed: int) -> None:
    rng = random.Random(seed)
    rows = {tuple(rng.randrange(2) for _ in range(rng.randint(1, 9))) for _ in range(12)}
    texts = Texts.of(list(rows))
    tree = {row[:end] for row in rows for end in range(1, len(row) + 1)}
    assert texts.size(0, len(texts.rows), 0) == len(tree)
    grouped = [place for _, group in texts.stems(0, len(rows), 3) for place in group]
    assert sorted(grouped) == list(range(len(rows)))
    for length, group in texts.stems(0, len(rows), 3):
        assert len({texts.rows[place][:length] for place in group}) == 1
        assert all(len(texts.rows[place]) > length for place in group)


@pytest.mark.parametrize("case", [case for case in CASES if "alibi" not in case])
def test_a_pack_equals_its_texts(tiny: Callable[..., Model], case: str) -> None:
    """Hidden states of a tree behind a stem, against a plain forward pass of each text."""
    family, options = CASES[case]
    model = tiny(family, **options)
    rng = random.Random(6)
    stem = [rng.randrange(250) for _ in range(7)]
    rows = [tuple(stem + [rng.randrange(3) for _ in range(rng.randint(1, 12))]) for _ in range(9)]
    texts = Texts.of(list(set(rows)))
    columns = Columns()
    run(model, columns, Pack.plain(stem, 0))
    pack, paths = Pack.tree(texts, range(len(texts.rows)), len(stem))
    hidden = run(model, columns.copy(), pack)
    for place, path in paths.items():
        with torch.no_grad():
            whole = model.hf(torch.tensor([texts.rows[place]])).logits[0, len(stem) :]
        torch.testing.assert_close(unembed(model, hidden[path]), whole, atol=1e-5, rtol=0)
    assert len(columns.places) == len(stem)
    assert columns.cache.get_seq_length() == len(stem)


def test_what_packs_do_not_fit_is_found_out(tiny: Callable[..., Model]) -> None:
    assert longest_packed(tiny()) > 10**6
    alibi = {"alibi": True, "parallel_attn": False, "multi_query": False}
    assert longest_packed(tiny("falcon", **alibi)) == 0
    stretched = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert longest_packed(tiny(rope_parameters=stretched)) == 64


def test_texts_beyond_the_trained_positions_are_left_to_lm_eval(
    tiny: Callable[..., Model],
) -> None:
    """Positions that stretch with the longest text of a batch."""
    stretched = {
        "rope_type": "dynamic",
        "factor": 2.0,
        "rope_theta": 1e4,
        "original_max_position_embeddings": 24,
    }
    model = tiny(rope_parameters=stretched)
    rng = random.Random(7)
    requests = asked("loglikelihood", [(letters(rng, n, n), " ab") for n in (5, 12, 30, 50, 9)])
    fast, slow = backend(model), stock(model)
    assert fast.longest == 24
    same_scores(fast.loglikelihood(requests), slow.loglikelihood(requests))


# ---------------------------------------------------------------------------------------- tasks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task of choices and one of generated answers."""
    rows = [{"q": f"{a} + {b} =", "a": str(a + b)} for a in range(2, 6) for b in range(2, 5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path}/sums.jsonl}}}}\n"
        'test_split: test\ndoc_to_text: "{{q}}"\nmetadata: {version: 1}\n'
    )
    (tmp_path / "choose.yaml").write_text(
        common + 'task: choose\noutput_type: multiple_choice\ndoc_to_choice: ["{{a}}", "x", "yz"]\n'
        "doc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )
    (tmp_path / "write.yaml").write_text(
        common + 'task: write\noutput_type: generate_until\ndoc_to_target: "{{a}}"\n'
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 6}\n'
        "metric_list: [{metric: exact_match}]\n"
    )
    return tmp_path


def test_tasks_are_asked_offline_and_every_document_is_kept(
    tiny: Callable[..., Model], folder: Path
) -> None:
    model = tiny()
    names = ["choose", "write"]
    samples = {"choose": [0, 3, 7], "write": [1, 2]}
    fast = ask(backend(model), names, folder, samples=samples)
    slow = ask(stock(model), names, folder, samples=samples)
    assert isinstance(backend(model), Backend)
    for name in names:
        assert [row["doc_id"] for row in fast["samples"][name]] == samples[name]
        for one, other in zip(fast["samples"][name], slow["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            assert one["prompt_hash"] == other["prompt_hash"]
            if name == "write":
                assert one["resps"] == other["resps"]
    assert fast["results"] == slow["results"]
