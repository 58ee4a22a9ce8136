"""Every error that ebbline raises on purpose.

    EbblineError
    ├── StudyError        a study file or a command asks for something that cannot be
    │   └── StudyHeld     another driver holds the study
    ├── PinError          a model or data set is not pinned to its content, or differs from its pin
    ├── UnstableValue     a value that cannot be hashed the same way twice
    ├── DataError         a data file is missing, empty, truncated or of another shape
    ├── ModelError        a model or adapter cannot be loaded, or is not what the stage needs
    ├── TrainingError     training produced something that must not be kept (NaN loss, empty
    │   │                 adapter), or cannot fit in memory
    │   └── OutOfMemory   a gang ran out of memory, and may try again with a smaller micro-batch
    ├── ProjectionError   Safe LoRA cannot be computed for these weights
    ├── EvaluationError   a measurement cannot be made; it never becomes a number
    │   └── EndpointDown  a judge's endpoint or the model hub answers nothing; no fault of the stage
    ├── DatabaseLost      the database that holds a study's points cannot be reached, or went away
    ├── ClusterLost       the place where stages ran is gone; what was finished is not
    ├── Leaving           the machine is about to go; the stage has saved what it had, and continues
    │                     elsewhere
    └── StoreError        the artifact store is damaged or cannot be written
        ├── DiskFull      there is no space left where the store lies
        ├── Incomplete    an artifact was asked for that is not complete
        └── Differs       what retention had dropped was made again and came out otherwise

A message says what failed, the offending value, where (path, key, line) and what to do next.
"""


class EbblineError(Exception):
    """Anything ebbline refuses to do, with a message meant for the person at the terminal."""


class StudyError(EbblineError):
    pass


class StudyHeld(StudyError):
    pass


class PinError(EbblineError):
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
    """`micro_batch` is what to try next: the checkpoint in the scratch folder goes on from where it
    was.
    """

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


class Differs(StoreError):
    pass
