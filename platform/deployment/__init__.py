"""A trained network in use: evaluated, exported, registered, predicting."""
