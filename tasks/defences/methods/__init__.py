"""Defences that change an adapter after its training, a file each. `registry` lists them,
`method` is their interface. No file imports torch: the linear algebra is in `computing`.
"""
