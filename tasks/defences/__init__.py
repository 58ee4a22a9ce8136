"""Defences: changes of a trained adapter after its training. Safe LoRA (arXiv 2405.16833) is the
first.

`defence` is the interface, `gate` Safe LoRA behind it; neither imports torch. The transform is in
`safelora`, `subspace` and `project`. Imports tasks and tasks.models.
"""
