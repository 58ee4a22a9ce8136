"""One prompt set in parts that share no prompt."""
