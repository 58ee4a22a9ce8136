"""Controls: what a defence could do by accident. Each has a defence as its partner and changes as
many modules; `registry` lists them. No file imports torch.
"""
