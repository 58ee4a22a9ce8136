"""Where a model, data set or adapter of a study comes from, in the words of a paper."""

from ebbline.analysis.paper.citations import pin_key
from ebbline.analysis.report.provenance import Provenance


def described(where: str, provenance: Provenance) -> str:
    """Describes a model or data set of the study, by its origin here or by its pin."""
    if where in provenance.generated:
        return provenance.generated[where]
    for pin in provenance.pins:
        if pin.where.startswith(f"{where}."):
            if pin.hub:
                return (
                    f"{pin.name} at commit "
                    f"{pin.commit}{f', file {pin.file}' if pin.file else ''} [@{pin_key(pin)}]"
                )
            return f"{pin.name}, a local copy with the sha256 {pin.sha256}"
    return "not recorded"
