"""What a stage is: its Spec, how it runs, and what identifies it.

Folders: models, data, training, defences, measuring. This folder imports nothing else of ebbline.
Only code that runs in a worker imports torch.
"""
