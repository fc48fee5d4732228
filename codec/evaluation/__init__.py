"""Measuring codecs of pictures and of video: rate-quality curves, BD-rates, reports, speeds. See docs/EVALUATION.md.

codecs (still_codecs, video_codecs) and metrics (video_metrics) are registries; dataset and clips read originals;
measuring makes one measurement, run all of them, and resumes; curves, bdrate and published give numbers; report, plots
and page show them; bench times. Nothing here is imported by the codec itself.
"""
