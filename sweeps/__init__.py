"""Which points: study files, the search space, Optuna, the plan, the driving loop."""
