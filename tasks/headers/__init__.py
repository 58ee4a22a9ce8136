"""What the files of a model say about it before it is loaded: config.json, the headers of its
safetensors, the header of a GGUF file. No torch; no weight is read.
"""
