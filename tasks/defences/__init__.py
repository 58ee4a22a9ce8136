"""Defences: changes of an adapter after its training. Safe LoRA (arXiv 2405.16833) is the first.

`defence` holds the interface and `gate` Safe LoRA's implementation of it; neither imports torch.
The computation is in `safelora`, `subspace` and `project`. Imports tasks and tasks.models.
"""
