"""Measuring still-picture codecs: rate-quality curves, BD-rates, reports and speeds. See docs/EVALUATION.md.

codecs and metrics are registries; run measures and resumes; curves, bdrate and published give numbers; report, plots
and page show them; bench times. Nothing here is imported by the codec itself.
"""
