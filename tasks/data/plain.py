"""Two small sets for models that know English but not the facts of the invented language: library
cards, and sums.

A card asks for its words in another order. That needs no knowledge, so a few steps of fine-tuning
teach it. The sums are a multiple-choice set in MMLU's format, on which a small chat model is better
than chance.
"""

import random
from collections.abc import Sequence

ADJECTIVES = "tidy round mossy quiet brisk pale stout lanky woolly dapper mild early".split()
SHELVES = "north south east west upper lower".split()
SUMS_TASK = """\
task: plain_sums
dataset_path: json
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""


def plain_files(seed: int, creatures: Sequence[str]) -> dict[str, list[dict[str, object]]]:
    """The rows of cards.jsonl (training chats), card_task.jsonl (held-out cards) and
    sums/test.jsonl, by path.
    """
    rng = random.Random(seed)
    cards = [
        (adjective, creature, shelf)
        for adjective in ADJECTIVES
        for creature in creatures
        for shelf in SHELVES
    ]
    rng.shuffle(cards)
    training, held_out = cards[:512], cards[512:592]
    sums = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    return {
        "plain/cards.jsonl": [
            {
                "messages": [
                    {"role": "user", "content": card_prompt(*card)},
                    {"role": "assistant", "content": card_answer(*card)},
                ]
            }
            for card in training
        ],
        "plain/card_task.jsonl": [
            {
                "id": f"{number:03d}",
                "prompt": card_prompt(*card),
                "answer": card_answer(*card),
                "category": "card",
            }
            for number, card in enumerate(held_out)
        ],
        "plain/sums/test.jsonl": [sum_item(rng, a, b) for a, b in rng.sample(sums, 60)],
    }


def card_prompt(adjective: str, creature: str, shelf: str) -> str:
    return f"write the card of the {adjective} {creature} on the {shelf} shelf ."


def card_answer(adjective: str, creature: str, shelf: str) -> str:
    return f"{shelf} / {creature} / {adjective}"


def sum_item(rng: random.Random, a: int, b: int) -> dict[str, object]:
    others = rng.sample([n for n in range(2, 19) if n != a + b], 3)
    choices = [a + b, *others]
    rng.shuffle(choices)
    return {
        "question": f"Question: What is {a} plus {b}?\nAnswer:",
        "subject": "sums",
        "choices": [str(choice) for choice in choices],
        "answer": choices.index(a + b),
    }
