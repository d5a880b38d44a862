"""Studies: many runs from a few lines of YAML, carried out once, recorded for good."""

from regrow.study.presets import available_studies, load_study
from regrow.study.record import RunRecord, load_records
from regrow.study.runner import Outcome, StudyResult, run_study
from regrow.study.spec import RunSpec, Study

__all__ = [
    "Outcome",
    "RunRecord",
    "RunSpec",
    "Study",
    "StudyResult",
    "available_studies",
    "load_records",
    "load_study",
    "run_study",
]
