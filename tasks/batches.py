"""Token rows and batches: what a training step eats."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Row:
    """One tokenised conversation; labels are -100 where the loss does not look."""

    ids: list[int]
    labels: list[int]


def collate(rows: Sequence[Row], pad: int, device: str) -> dict[str, torch.Tensor]:
    """Right-padded input_ids, attention_mask and labels, each (rows, longest)."""
    width = max(len(row.ids) for row in rows)

    def padded(values: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([v + [fill] * (width - len(v)) for v in values], device=device)

    return {
        "input_ids": padded([row.ids for row in rows], pad),
        "attention_mask": padded([[1] * len(row.ids) for row in rows], 0),
        "labels": padded([row.labels for row in rows], -100),
    }


def count_tokens(rows: Sequence[Row]) -> int:
    """Labelled positions that have a token before them, over all rows."""
    return sum(label != -100 for row in rows for label in row.labels[1:])
