"""What a stage is: models, data, training, projection, evaluation. Imports nothing of ours."""
