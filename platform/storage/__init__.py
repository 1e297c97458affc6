"""The storage folder: experiments, checkpoints, shared stages, and who may write when."""
