"""python -m benchmarks.make_texts: write the builtin data `texts`, which mappings are fitted on.

The builtin SmolLM2-135M-Instruct (Apache-2.0) writes them: many topics, each in many styles, and code; at
temperature 0.8, with a seed for each batch. What repeats itself, is no English, is another again or tells
of violence is left out; the rest is cut at the end of a sentence or line. Drafts are kept, so that a stopped
run goes on. The same seeds give the same texts with the same torch, transformers and processor.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from patchscope_nn.models import load
from patchscope_nn.models.builtin import NAME

SEED, BATCH, TEMPERATURE, TOP_K = 20240111, 96, 0.8, 50
LEAST, MOST = 60, 120
FILE = Path(__file__).parents[1] / "patchscope_nn" / "data" / "builtin" / "texts.jsonl"

TOPICS = """
lighthouses; the water cycle; a village bakery; tides; volcanoes; bees; the history of paper; bridges; the
moon; railway stations; bread; chess openings; glaciers; the printing press; owls; a football match; sleep;
coffee; earthquakes; a lost dog; the Roman Empire; rice fields; a broken bicycle; violins; vaccines; the
stock market; a power cut; whales; deserts; castles; the human heart; a school library; maps; salt; a job
interview; rainforests; jazz; recycling; a wedding; the periodic table; Antarctica; tea; a court case;
clocks; mushrooms; a train journey; electric cars; the Silk Road; spiders; insulin; a neighbour's garden;
submarines; Mount Everest; cheese; elections; the speed of light; a chess tournament; penguins; photography;
the Great Wall; a thunderstorm; penicillin; wool; a marathon; black holes; windmills; a museum; the Nile;
dentists; dinosaurs; satellites; the violin maker; taxes; snow; a pirate ship; gravity; kitchen knives; a
night market; wolves; the French Revolution; shoes; opera; rivers; a hospital ward; magnets; languages; the
Olympic Games; a fishing harbour; steel; horses; perfume; an airport; the Renaissance; potatoes; a birthday
party; fossils; insurance; a rumour; forests in autumn; the telephone; bacteria; a hiking trip; sugar;
ballet; the Industrial Revolution; crows; a strike at a factory; rainbows; glass
""".replace("\n", " ")
STYLES = (
    "Write a paragraph of an encyclopedia about {}.",
    "Write the beginning of a short story in which {} matters.",
    "Write a short news report about {}.",
    "Write a diary entry that mentions {}.",
    "Write a dialogue of a few lines between two people about {}.",
    "Explain {} to a ten-year-old child.",
    "Write a letter to a friend about {}.",
    "Write a travel guide's paragraph that has to do with {}.",
    "Give step-by-step instructions that have to do with {}.",
    "Write a paragraph of a biography of somebody whose life had to do with {}.",
    "Write an opinion column about {}.",
    "Write a few questions of a quiz about {}, with their answers.",
    "Write a paragraph of a textbook about {}, with numbers.",
    "Write a product review that has to do with {}.",
    "Write an e-mail to a colleague about {}.",
    "Compare {} with something quite different.",
)
CODE = (
    "Write a short Python function that {}.",
    "Write a short JavaScript function that {}.",
    "Write a small C program that {}.",
    "Write an SQL query that {}.",
    "Write a Python class that {}.",
)
TASKS = (
    "counts the words of a text; finds the largest number of a list; reverses a string; sorts records by "
    "date; reads a file line by line; computes a mean; checks whether a number is prime; removes "
    "duplicates; converts Celsius to Fahrenheit; keeps a shopping list; finds customers without an order; "
    "counts vowels; sums the sales of each month; models a bank account; searches a sorted list; merges "
    "two dictionaries; prints a multiplication table; checks a password; computes Fibonacci numbers; "
    "counts rows of each country"
)


def main() -> None:
    """Write drafts until enough of them are kept, then the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.make_texts", description=main.__doc__)
    parser.add_argument("--texts", type=int, default=800, help="how many")
    parser.add_argument("--drafts", type=Path, default=Path("drafts.jsonl"), help="where drafts are kept")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args()
    drafts = _read(args.drafts)
    model: Any = None
    while len(kept := keep(drafts)) < args.texts:
        number = len(drafts) // BATCH
        model = model or load(NAME, dtype="bfloat16")  # twice as fast here as float32
        batch = draft(model, number)
        with args.drafts.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in batch)
        drafts += batch
        print(f"batch {number}: {len(keep(drafts))} of {len(drafts)} drafts kept", flush=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in kept[: args.texts]]
    args.out.write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines)} texts, {args.out.stat().st_size} bytes")


def requests() -> Iterator[str]:
    """What the model is asked for: one request in eight is for code, and none comes twice."""
    prose = [style.format(topic.strip()) for style in STYLES for topic in TOPICS.split(";") if topic.strip()]
    code = [form.format(task.strip()) for form in CODE for task in TASKS.split(";")]
    chooser = random.Random(SEED)  # noqa: S311 (a seeded choice, no secret)
    chooser.shuffle(prose)
    chooser.shuffle(code)
    for place, request in enumerate(prose):
        if place % 7 == 0:
            yield code[place // 7 % len(code)]
        yield request


def draft(model: Any, number: int) -> list[str]:
    """The texts of one batch, from their first line on."""
    asked = list(itertools.islice(itertools.cycle(requests()), number * BATCH, (number + 1) * BATCH))
    chats = [
        model.tokenizer.apply_chat_template(
            [
                {"role": "system", "content": "You write what is asked for, without an introduction."},
                {"role": "user", "content": one},
            ],
            tokenize=False,
            add_generation_prompt=True,
        )
        for one in asked
    ]
    batch = model.tokenizer(chats, return_tensors="pt", padding=True, padding_side="left")
    torch.manual_seed(SEED + number)
    with torch.no_grad():
        ids = model.module.generate(
            **batch,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
            max_new_tokens=MOST + 20,
            pad_token_id=model.tokenizer.pad_token_id,
        )
    texts = model.tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [cut(model.tokenizer, text) for text in texts]


_PREFACE = re.compile(
    r"^(?:sure|certainly|of course|here(?:'s| is| are)|title:|subject:)[^\n]*\n+", re.IGNORECASE
)
_END = re.compile(r"[.!?][\"')]?(?=\s)|\n")


def cut(tokenizer: Any, text: str) -> str:
    """A draft without its preface, cut at the last sentence or line that ends within the most tokens."""
    text = _PREFACE.sub("", text.strip()).replace("**", "").strip()
    ids = tokenizer(text)["input_ids"]
    if len(ids) > MOST:
        text = tokenizer.decode(ids[:MOST])
        ends = [found.end() for found in _END.finditer(text)]
        text = text[: ends[-1]] if ends else ""
    text = text.strip().removesuffix("```").strip()
    return text if len(tokenizer(text)["input_ids"]) >= LEAST else ""


def keep(drafts: list[str]) -> list[str]:
    """The drafts that are good: in plain characters, not repeating themselves, and no other's like."""
    kept: list[str] = []
    seen: set[tuple[str, ...]] = set()
    openings: Counter[tuple[str, ...]] = Counter()
    for text in drafts:
        words = text.lower().split()
        if not text or not _is_plain(text) or _repeats(words):
            continue
        runs = {tuple(words[place : place + 8]) for place in range(len(words) - 7)}
        opening = tuple(words[:3])
        if len(runs & seen) > len(runs) // 8 or openings[opening] >= 6:  # noqa: PLR2004 (thresholds that are used once)
            continue
        openings[opening] += 1
        seen |= runs
        kept.append(text)
    return kept


_REFUSED = re.compile(
    r"\b(?:as an ai|i'm sorry|i cannot|language model)\b"
    r"|\[[\w' ]*(?:your|insert|name|date|friend|colleague)[\w' ]*\]"
    r"|\b(?:suicid|murder|rap(?:e|ed|ist)\b|sexual|nud(?:e|ity)|nazi|terroris|massacre|genocid|slur)",
    re.IGNORECASE,
)
_COMMON = frozenset(
    "the a an of to and in is was it for on with that as at by from are were i you he she they".split()  # noqa: SIM905 (a list of quoted words is harder to read)
)


def _is_plain(text: str) -> bool:
    """Whether a text is English or code in ASCII characters, with no refusal and no blank to fill in."""
    words = text.lower().split()
    english = sum(word in _COMMON for word in words) > 0.18 * len(words)
    characters = text.replace("\u2019", "'").replace("\u201c", '"').replace("\u201d", '"')
    return _REFUSED.search(text) is None and characters.isascii() and (english or "```" in text)


def _repeats(words: list[str]) -> bool:
    """Whether a run of four words comes three times, or few of the words differ."""
    runs = Counter(tuple(words[place : place + 4]) for place in range(len(words) - 3))
    return max(runs.values(), default=9) > 2 or len(set(words)) < 0.45 * len(words)  # noqa: PLR2004 (thresholds that are used once)


def _read(drafts: Path) -> list[str]:
    if not drafts.exists():
        return []
    with drafts.open(encoding="utf-8") as file:
        return [json.loads(line)["text"] for line in file]


if __name__ == "__main__":
    main()
