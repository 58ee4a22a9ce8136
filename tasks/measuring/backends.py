"""What computes the completions of a generation: transformers in this process, or a server.

Every backend writes the same files. Which one it was is in the Spec, and so in the key.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ebbline.tasks.measuring import generate
from ebbline.tasks.measuring.grouped import generations
from ebbline.tasks.measuring.grouped.generations import Member
from ebbline.tasks.specs import TRANSFORMERS, GenerateSpec
from ebbline.tasks.stage import Context


def run(spec: GenerateSpec, inputs: Mapping[str, Path], out: Path, ctx: Context) -> None:
    """One generation. Raises EbblineError if it cannot be measured."""
    if spec.backend == TRANSFORMERS:
        generate.run(spec, inputs, out, ctx)
        return
    from ebbline.tasks.measuring.served import generations as served  # imports an HTTP client

    served.run_alone(spec, inputs, out, ctx)


def run_group(members: Sequence[Member]) -> Iterator[Member]:
    """Generations of one model and backend; yields each when its files are written. Members that
    are not yielded have to run alone.
    """
    if members[0].spec.backend == TRANSFORMERS:
        return generations.run(members)
    from ebbline.tasks.measuring.served import generations as served  # imports an HTTP client

    return served.run(members)
