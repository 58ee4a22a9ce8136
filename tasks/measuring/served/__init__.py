"""Measuring at an inference server: vLLM in an environment of its own, which ebbline starts and
ends, or any OpenAI-compatible server by its address.

Invariant: a server that is not the backend of the Spec, or does not have the model, measures
nothing. Its answers are those of greedy decoding with every setting stated.
"""
