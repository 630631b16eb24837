"""``report.html``: one self-contained page that shows what a run did."""

from miles.core.report.page import write_report
from miles.core.report.results import Evaluation, evaluations

__all__ = ["Evaluation", "evaluations", "write_report"]
