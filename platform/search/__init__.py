"""How a search proposes and stops trials, with the Optuna study as its memory."""
