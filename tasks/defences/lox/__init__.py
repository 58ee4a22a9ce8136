"""LoX: a stronger aligned model, made from two models before a fine-tuning."""
