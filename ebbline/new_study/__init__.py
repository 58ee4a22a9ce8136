"""`ebbline new`: looks at a model, data and prompts, and writes a commented study about them."""
