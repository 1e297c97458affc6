"""The tags of MLflow's runs and registered models. Names that end in a dot begin a tag, one for each of a kind."""

# Of every run.
KEY_TAG = "segadapt.key"  # by which it is found: the experiment, or `experiment/trial id`
KIND_TAG = "segadapt.kind"  # search, train, trial, stage, rerank, finish or duplicate
METHOD_TAG = "segadapt.method"  # of a search, all of them
STATE_TAG = "segadapt.state"  # in our words; MLflow's status has fewer
NOTE_TAG = "mlflow.note.content"  # shown as its description
PARENT_TAG = "mlflow.parentRunId"  # the run it is shown under

# Of the run of a trial.
TRIAL_ID_TAG = "segadapt.trial_id"  # in Ray
EXPERIMENT_TAG = "segadapt.experiment"  # name of its folder: shared stages, repetitions and finishes have their own
SEED_TAG = "segadapt.seed"
OBJECTIVE_TAG = "segadapt.objective"
CHECKPOINT_TAG = "segadapt.checkpoint"  # path of its best below the storage folder; earlier versions noted it absolute
NOT_KEPT = "not kept"
"""What `CHECKPOINT_TAG` holds once the checkpoint was removed."""
BEST_STEP_TAG = "segadapt.best_step"  # training steps of that checkpoint
FAILURE_TAG = "segadapt.failure"
DATA_TAG = "segadapt.data"  # fingerprint of what it, or the network of a model, was trained on
WEIGHTS_TAG = "segadapt.weights"  # what its network, or that of a model, started from: a name on the hub, a file
LICENCE_TAG = "segadapt.weights_licence"  # under which those are
WEIGHTS_HASH_TAG = "segadapt.weights_sha256"  # of their file in the storage
MEMORY_TAG = "segadapt.memory"  # how its batches were divided to fit
RESTARTS_TAG = "segadapt.restarts"
PREEMPTIONS_TAG = "segadapt.preemptions"
FROM_TAG = "segadapt.from"  # name of the trial that a finish continues
TRUE_NAME_TAGS = "segadapt.name."  # a metric's or param's stored name follows; holds the one that MLflow does not take
ROUND_TAGS = "segadapt.round."  # a round's number follows

# Of the run of a search, or of a single one.
TRIALS_TAG = "segadapt.trials"  # as many as are asked for; the param of this name keeps what the search began with
FORKED_FROM_TAG = "segadapt.forked_from"
WARM_START_TAG = "segadapt.warm_start"
GROUND_TAG = "segadapt.ground"  # method whose training all others of a joint search add their losses to
DATA_NOTES_TAG = "segadapt.data_notes"  # what was decided about the data; `segadapt.data` is a trial's fingerprint
BEST_TRIAL_TAG = "segadapt.best_trial"  # its id in Ray
BEST_NAME_TAG = "segadapt.best_name"
VERDICT_TAG = "segadapt.verdict"  # whether the best is better beyond the noise of seeds
STAGE_TAGS = "segadapt.stage."  # the name of a shared stage follows; holds its hash
CACHE_TAGS = "segadapt.cache."  # the name of a shared stage follows; says whether the cache had it

# What doctor notes.
DUPLICATE_TAG = "segadapt.duplicate_of"  # the run that counts
RECOVERED_TAG = "segadapt.recovered"  # from what a run was recorded again
GONE_TAG = "segadapt.checkpoint_gone"  # where a checkpoint lay that is not there any more

# Of a registered model.
MODEL_SEARCH_TAG = "segadapt.search"
MODEL_TRIAL_TAG = "segadapt.trial"  # name of the run that its network comes from
MODEL_CHECKPOINT_TAG = "segadapt.checkpoint_sha256"
