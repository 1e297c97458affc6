"""The tags of MLflow's runs and registered models. Names that end in a dot begin a tag, one for each of a kind."""

# Of every run.

KEY_TAG = "segadapt.key"
"""What the run is found by, whatever MLflow calls it: the experiment, or `experiment/trial id`."""

KIND_TAG = "segadapt.kind"
"""What it is: search, train, trial, stage, rerank, finish or duplicate."""

METHOD_TAG = "segadapt.method"
"""Its method; of a search, all of them."""

STATE_TAG = "segadapt.state"
"""How it stands, in our words; MLflow's status has fewer."""

NOTE_TAG = "mlflow.note.content"
"""What MLflow shows as its description."""

PARENT_TAG = "mlflow.parentRunId"
"""The run that MLflow shows it under."""

# Of the run of a trial.

TRIAL_ID_TAG = "segadapt.trial_id"
"""Its id in Ray."""

EXPERIMENT_TAG = "segadapt.experiment"
"""Name of the folder that it lies in: shared stages, repetitions and finishes have their own."""

SEED_TAG = "segadapt.seed"
"""Seed of its training."""

OBJECTIVE_TAG = "segadapt.objective"
"""What its checkpoints are compared by."""

CHECKPOINT_TAG = "segadapt.checkpoint"
"""Path of its best checkpoint below the storage folder; earlier versions noted an absolute path."""

NOT_KEPT = "not kept"
"""What `CHECKPOINT_TAG` holds once the checkpoint was removed."""

BEST_STEP_TAG = "segadapt.best_step"
"""Training steps of that checkpoint."""

FAILURE_TAG = "segadapt.failure"
"""Why it failed."""

DATA_TAG = "segadapt.data"
"""Fingerprint of the data it was trained on; of a model, of those its network was trained on."""

MEMORY_TAG = "segadapt.memory"
"""How its batches were divided, if they did not fit the GPU."""

RESTARTS_TAG = "segadapt.restarts"
"""How often it was started again after its process had died."""

PREEMPTIONS_TAG = "segadapt.preemptions"
"""How often its process was asked to end, and left in good order."""

FROM_TAG = "segadapt.from"
"""Name of the trial that a finish continues."""

ROUND_TAGS = "segadapt.round."
"""Begins the tags of a round of self-training; its number follows."""

# Of the run of a search, or of a single one.

TRIALS_TAG = "segadapt.trials"
"""How many trials were asked for; the param of this name keeps what the search began with."""

FORKED_FROM_TAG = "segadapt.forked_from"
"""Search whose settings it began with."""

WARM_START_TAG = "segadapt.warm_start"
"""Searches whose trials count as prior points."""

DATA_NOTES_TAG = "segadapt.data_notes"
"""What was decided about the data, such as the classes that are trained."""

BEST_TRIAL_TAG = "segadapt.best_trial"
"""Id of its best trial in Ray."""

BEST_NAME_TAG = "segadapt.best_name"
"""Name of the run of its best trial."""

VERDICT_TAG = "segadapt.verdict"
"""Whether the best configuration is better beyond the noise of seeds."""

STAGE_TAGS = "segadapt.stage."
"""Begins the tags with the hashes of the shared stages; a stage's name follows."""

CACHE_TAGS = "segadapt.cache."
"""Begins the tags that say whether the cache had a shared stage; its name follows."""

# What doctor notes.

DUPLICATE_TAG = "segadapt.duplicate_of"
"""Of a run that was recorded a second time: the run that counts."""

RECOVERED_TAG = "segadapt.recovered"
"""Of a run that was recorded again: from what."""

GONE_TAG = "segadapt.checkpoint_gone"
"""Where the checkpoint of a run lay, which is not there any more."""

# Of a registered model.

MODEL_SEARCH_TAG = "segadapt.search"
"""Search of the run that its network comes from."""

MODEL_TRIAL_TAG = "segadapt.trial"
"""Name of that run."""

MODEL_CHECKPOINT_TAG = "segadapt.checkpoint_sha256"
"""Hash of the checkpoint that its network comes from."""
