"""The linear algebra of defences, module by module: updates as factors, the leading directions of
alignment, random rotations, and the files of a defended adapter. Imports torch.
"""
