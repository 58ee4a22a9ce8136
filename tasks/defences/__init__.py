"""Defences: changes of an adapter after its training. Safe LoRA (arXiv 2405.16833) is the first.

`defence` holds the interface, `safe_lora` its implementation and `gate` the choice of modules; none
imports torch. The computation is in `projectors`, `subspace` and `project`. Imports tasks and
tasks.models.
"""
