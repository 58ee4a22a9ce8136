"""Every error that ebbline raises on purpose.

    EbblineError
    ├── StudyError        a study file or a command has an invalid setting
    │   └── StudyHeld     another driver holds the study
    ├── PinError          a model or data set has no pin, or its content differs from its pin
    ├── MissingExtra      a package of an extra is not installed
    ├── UnstableValue     a value has no stable hash
    ├── DataError         a data file is missing, empty, truncated or of another format
    ├── ModelError        a model or adapter cannot be loaded, or is of the wrong kind for the stage
    ├── TrainingError     a training does not fit in memory, or its result is invalid (NaN loss,
    │   │                 empty adapter)
    │   └── OutOfMemory   a gang ran out of memory; a smaller micro-batch may fit
    ├── ProjectionError   a defence cannot be computed for these weights and settings
    ├── EvaluationError   a measurement failed; it has no number
    │   └── EndpointDown  a judge's endpoint or the model hub does not answer; the stage is
    │                     not at fault
    ├── DatabaseLost      the database of a study's points cannot be reached
    ├── ClusterLost       the cluster is gone; the store keeps the finished stages
    ├── Leaving           the machine is about to go; the stage saved a checkpoint and continues
    │                     elsewhere
    └── StoreError        the artifact store is damaged or cannot be written
        ├── DiskFull      the store's disk is full
        ├── Incomplete    a requested artifact is not complete
        ├── Damaged       an artifact or an input is not what its record or pin says
        └── Differs       an artifact that retention had dropped has other content when recomputed

A message says what failed, the offending value, where (path, key, line) and what to do next.
"""


class EbblineError(Exception):
    """An error that ebbline raises on purpose, with a message for the person at the terminal."""


class StudyError(EbblineError):
    pass


class StudyHeld(StudyError):
    pass


class PinError(EbblineError):
    pass


class MissingExtra(EbblineError):
    pass


class UnstableValue(EbblineError):
    pass


class DataError(EbblineError):
    pass


class ModelError(EbblineError):
    pass


class TrainingError(EbblineError):
    pass


class OutOfMemory(TrainingError):
    """Retry with `micro_batch`: the training resumes from its checkpoint in the scratch folder."""

    def __init__(self, message: str, micro_batch: int) -> None:
        super().__init__(message)
        self.micro_batch = micro_batch


class ProjectionError(EbblineError):
    pass


class EvaluationError(EbblineError):
    pass


class EndpointDown(EvaluationError):
    pass


class DatabaseLost(EbblineError):
    pass


class ClusterLost(EbblineError):
    pass


class Leaving(EbblineError):
    pass


class StoreError(EbblineError):
    pass


class DiskFull(StoreError):
    pass


class Incomplete(StoreError):
    pass


class Damaged(StoreError):
    pass


class Differs(StoreError):
    pass
