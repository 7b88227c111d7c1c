"""From rows to figures, verdicts and one page; knows neither the models nor torch."""

from ssmax.report.page import build, claims_text

__all__ = ["build", "claims_text"]
