"""What a stage is: its Spec, how it runs, and what identifies it.

Folders: models, data, training, defences, measuring. Imports nothing of ebbline from outside this
folder. Only what runs in a worker imports torch.
"""
